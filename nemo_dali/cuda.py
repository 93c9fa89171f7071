"""The GPU's half of a batch: which device, and what happens to its decoded photos there.

training thread                  DALI's thread, when the photos of the batch are decoded
frames = torch.empty(...)  ──▶   DALI's stream waits for the training stream's work so far (`ready`),
ready = an event behind it       the photos' addresses join the tiles ──▶ mosaic kernel, mask kernel

No GPU has run this yet; ``FAIL_WITHOUT_CUDA=1 pytest -m gpu`` does.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError
from nemo_dali.kernels.mosaic import DONE, WRONG_SIZE
from nemo_dali.kernels.tensors import read_tensors

if TYPE_CHECKING:
    import torch

DOCTOR = "'nemo-dali doctor' says what is missing."


def cuda_device(device: Any) -> int | None:
    """The number of a CUDA device given as torch takes it ("cuda", "cuda:1", a torch.device); None for the CPU.

    Raises:
        ValueError: neither the CPU nor a CUDA device.
        NemoError: torch sees no such device, or CuPy is missing.
    """
    match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", str(device))
    if match is None:
        raise ValueError(f"device ({device!r}) must be 'cpu', 'cuda' or 'cuda:N'")
    if match[1]:
        return None
    import torch

    if not torch.cuda.is_available():
        raise NemoError(f"torch sees no CUDA device, so device must be 'cpu'; {DOCTOR}")
    number = torch.cuda.current_device() if match[2] is None else int(match[2])
    if number >= torch.cuda.device_count():
        raise NemoError(f"There is no device cuda:{number}: torch sees {torch.cuda.device_count()}, counted from 0.")
    try:
        import cupy  # noqa: F401  # whether the launchers will find it
    except ImportError as error:
        raise NemoError(
            f"device='cuda' needs CuPy, which cannot be imported ({error}). Install it with "
            "pip install 'nemo-dali[cuda12]', or 'nemo-dali[cuda13]' where torch is built for CUDA 13."
        ) from error
    return number


def place(number: int) -> "torch.device":
    """A device's name for torch."""
    import torch

    return torch.device("cuda", number)


def current_stream(number: int) -> "torch.cuda.Stream":
    """The stream that torch works on now."""
    import torch

    return torch.cuda.current_stream(number)


def on(number: int) -> Any:
    """A context in which a device is torch's current one."""
    import torch

    return torch.cuda.device(number)


def synchronize(number: int) -> None:
    """Wait until a device has nothing left to do."""
    import torch

    torch.cuda.synchronize(number)


def send(tensor: "torch.Tensor", number: int) -> "torch.Tensor":
    """A copy on a device, in the order of torch's current stream; the host does not wait for it."""
    return tensor.pin_memory().to(place(number), non_blocking=True)


def hardware_share(num_threads: int) -> float:
    """Share of the JPEGs that the hardware decoder should take where a GPU has one; the rest are ``num_threads``'s.

    NVIDIA's own decoder test gives the hardware 0.12 beside 70 threads on a Hopper (DALI, qa/TL1_decoder_perf), so it
    does as much as 9.5 threads. Without a hardware decoder DALI ignores the number.
    """
    return 1 / (1 + num_threads / 9.5)


@dataclass(eq=False)
class DeviceBatch:
    """A batch on its way through a GPU. It holds all that the kernels touch, besides the decoded photos.

    Attributes:
        tiles: dtype ``TILE`` [cells], complete but for the photos' addresses.
        targets, ends: what ``mask_cuda.make_targets`` gives.
        mask: torch uint8 [B, H, W] on the device; the frames are whatever the tiles point to.
        ready: event behind the last use of the frames' memory.
        status: uint8 [cells], DONE or WRONG_SIZE, once the kernels are queued.
    """

    tiles: npt.NDArray[Any]
    targets: npt.NDArray[Any]
    ends: npt.NDArray[np.uint32]
    mask: "torch.Tensor"
    ready: "torch.cuda.Event"
    status: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def write(self, photos: list[Any], stream: int) -> None:
        """Queue the kernels.

        Args:
            photos: DLPack capsules of the decoded photos, uint8 [H, W, 3] each, in the order of the tiles.
            stream: address of the CUDA stream that they are decoded on.
        """
        from nemo_dali.kernels.launch import torch_stream, upload
        from nemo_dali.kernels.mask_cuda import write_masks
        from nemo_dali.kernels.mosaic_cuda import write_tiles

        device = self.mask.device.index
        data, shapes = read_tensors(photos)
        size = np.stack([self.tiles["photo_height"], self.tiles["photo_width"], np.full(len(self.tiles), 3)], axis=1)
        fits = (shapes == size).all(axis=1)
        self.tiles["photo"] = data
        torch_stream(device, stream).wait_event(self.ready)
        write_tiles(self.tiles[fits], device=device, stream=stream)
        _owner, (targets, ends) = upload([self.targets, self.ends], device=device, stream=stream)
        samples, height, width = self.mask.shape
        write_masks(
            targets,
            ends,
            self.mask.data_ptr(),
            samples,
            frame_height=height,
            frame_width=width,
            device=device,
            stream=stream,
        )
        self.status = np.where(fits, DONE, WRONG_SIZE).astype(np.uint8)


def device_batch(
    tiles: npt.NDArray[Any], sample: npt.NDArray[np.int64], mask: "torch.Tensor", stream: "torch.cuda.Stream"
) -> DeviceBatch:
    """Make ready a batch whose frames and masks have just been allocated.

    Args:
        tiles: dtype ``TILE`` [cells], at least one; ``run_count`` and ``runs`` are set in the targets' cells.
        sample: int64 [cells], the sample that each cell belongs to.
        mask: torch uint8 [B, H, W] on the device.
        stream: torch's current stream, for which they were allocated.
    """
    from nemo_dali.kernels.mask_cuda import make_targets

    shown = tiles["run_count"] > 0
    of = np.zeros(len(mask), tiles.dtype)  # the target's tile of each sample; empty where a mask is
    of[sample[shown]] = tiles[shown]
    targets, ends = make_targets(
        addresses=of["runs"],
        counts=of["run_count"],
        boxes=np.stack([of[name] for name in ("y0", "x0", "y1", "x1")], axis=1),
        photos=np.stack([of[name] for name in ("photo_height", "photo_width")], axis=1),
        resample=int(tiles["resample"][0]),
    )
    return DeviceBatch(tiles, targets, ends, mask, stream.record_event())
