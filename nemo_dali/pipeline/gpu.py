"""The GPU's half of a batch: which device, and what happens to its decoded photos there.

training thread                  DALI's thread, when the photos of the batch are decoded
frames = torch.empty(...)  ──▶   DALI's stream waits for the training stream's work so far (`ready`),
ready = an event behind it       the photos' addresses join the tiles ──▶ mosaic kernel, mask kernel,
                                 letterbox kernel

What of it has run on a GPU is in the README, "What has run where".
"""

import logging
import os
import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError
from nemo_dali.kernels.dlpack import read_tensors
from nemo_dali.kernels.mask.cpu import Targets
from nemo_dali.kernels.mosaic.cpu import DONE, WRONG_SIZE
from nemo_dali.kernels.tile import CV2_LETTERBOX, TileRecords

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("nemo_dali")

COPIED_AT_A_TIME = 2**26  # bytes
LOCKED_AT_A_TIME = 2**36  # bytes; some drivers refuse 2**39 at once
PORTABLE, MAPPED = 1, 2  # flags of cudaHostRegister: for all devices, and in their address space
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
    rank = os.environ.get("LOCAL_RANK", "")
    if match[2] is None and rank.isdecimal() and number != int(rank) < torch.cuda.device_count():
        _warn_of_rank(number, int(rank))
    return number


@cache  # once is enough
def _warn_of_rank(number: int, local_rank: int) -> None:
    """Ranks that choose no GPU are all on the first one: that is out of memory, or a fraction of the speed."""
    logger.warning(
        "device='cuda' is GPU %d, torch's current one, where LOCAL_RANK is %d: ranks may share that GPU. Call "
        "torch.cuda.set_device(local_rank) before, or give device='cuda:%d'.",
        number,
        local_rank,
        local_rank,
    )


def default_device() -> str:
    """ "cuda" where there is a GPU that can be used, else "cpu"."""
    try:
        cuda_device("cuda")
    except NemoError:
        return "cpu"
    return "cuda"


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


def free_memory(number: int) -> int:
    """Bytes of GPU memory that nobody uses, torch's own reserve among them."""
    import torch

    spare = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    return int(torch.cuda.mem_get_info(number)[0]) + spare


def copy_of(array: npt.NDArray[np.uint8], number: int) -> "torch.Tensor":
    """A copy on a device, through a small page-locked buffer; it is there when this returns.

    Raises:
        NemoError: the GPU has no memory left.
    """
    import torch

    try:
        copy = torch.empty(array.shape, dtype=torch.uint8, device=place(number))
    except torch.OutOfMemoryError as error:
        raise NemoError(
            f"GPU {number} has no room for {array.nbytes / 1e9:.1f} GB more. Lower device_budget."
        ) from error
    flat, into = array.reshape(-1), copy.view(-1)
    buffer = page_locked(min(COPIED_AT_A_TIME, flat.size))
    for begin in range(0, flat.size, COPIED_AT_A_TIME):
        piece = flat[begin : begin + COPIED_AT_A_TIME]
        buffer[: piece.size].numpy()[:] = piece
        into[begin : begin + piece.size].copy_(buffer[: piece.size])
    return copy


def page_locked(nbytes: int) -> "torch.Tensor":
    """uint8 [nbytes] in host memory that a GPU writes without the host waiting for it."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _pieces(memory: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    return [memory[begin : begin + LOCKED_AT_A_TIME] for begin in range(0, memory.size, LOCKED_AT_A_TIME)]


def lock_pages(memory: npt.NDArray[np.uint8], number: int) -> int:
    """Keep memory from being moved or swapped out, so that all GPUs may read it; its address there.

    Args:
        memory: uint8 [bytes], from a page's beginning.

    Raises:
        NemoError: the system does not allow it.
    """
    from cupy.cuda import Device, runtime

    locked, shifts = [], set()
    with Device(number):
        try:
            for piece in _pieces(memory):
                runtime.hostRegister(piece.ctypes.data, piece.nbytes, PORTABLE | MAPPED)
                locked.append(piece)
                there = int(runtime.pointerGetAttributes(piece.ctypes.data).devicePointer)
                shifts.add(there - piece.ctypes.data)
            if len(shifts) != 1:
                raise NemoError(f"GPU {number} does not see page-locked memory in one piece. Use placement='device'.")
        except (runtime.CUDARuntimeError, NemoError) as error:
            for piece in locked:
                runtime.hostUnregister(piece.ctypes.data)
            if isinstance(error, NemoError):
                raise
            raise NemoError(
                f"{memory.nbytes / 1e9:.1f} GB of memory cannot be page-locked ({error}). Hold more in GPU memory "
                "(placement='device'), or use device='cpu' with placement='host'."
            ) from error
    return memory.ctypes.data + shifts.pop()


def unlock_pages(memory: npt.NDArray[np.uint8], number: int) -> None:
    """Undo ``lock_pages``."""
    from cupy.cuda import Device, runtime

    with Device(number):
        for piece in _pieces(memory):
            runtime.hostUnregister(piece.ctypes.data)


def check_photo_sizes(width: npt.NDArray[np.int32], height: npt.NDArray[np.int32]) -> None:
    """Refuse photos, int32 [photos] in pixels, that the mosaic kernel cannot take.

    Raises:
        NemoError: one is too large.
    """
    from nemo_dali.kernels.mosaic.gpu import LARGEST_PHOTO

    if (largest := max(width.max(), height.max())) > LARGEST_PHOTO:
        raise NemoError(
            f"A photo is {largest} pixels wide or high; on a GPU {LARGEST_PHOTO} are the most. Make it smaller before "
            "'nemo-dali index', or use the CPU (device='cpu', --device cpu)."
        )


def hardware_share(num_threads: int) -> float:
    """Share of the JPEGs that the hardware decoder should take where a GPU has one; the rest are ``num_threads``'s.

    NVIDIA's own decoder test gives the hardware 0.12 beside 70 threads on a Hopper (DALI, qa/TL1_decoder_perf), so it
    does as much as 9.5 threads. Without a hardware decoder DALI ignores the number.
    """
    return 1 / (1 + num_threads / 9.5)


def place_photos(tiles: TileRecords, photos: list[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Tell tiles where their photos are.

    Args:
        tiles: dtype ``TILE`` [..., photos].
        photos: DLPack capsules of uint8 [H, W, 3] each.

    Returns:
        status: uint8 [photos], DONE, or WRONG_SIZE for a photo of another size than its tile says.
        fits: bool [photos], whether it is of that size.
    """
    data, shapes = read_tensors(photos)
    tiles["photo"] = data
    first = tiles.reshape(-1, len(photos))[0]
    fits = (shapes == np.stack([first["photo_height"], first["photo_width"], np.full(len(photos), 3)], axis=1)).all(
        axis=1
    )
    status: npt.NDArray[np.uint8] = np.where(fits, DONE, WRONG_SIZE).astype(np.uint8)
    return status, fits


@dataclass(eq=False)
class DeviceBatch:
    """A batch on its way through a GPU. It holds all that the kernels touch, besides the decoded photos.

    Attributes:
        tiles: dtype ``TILE`` [cells], complete but for the photos' addresses.
        targets, ends: what ``mask.gpu.make_targets`` gives; letterboxed samples have none there.
        mask: torch uint8 [B, H, W] on the device; the frames are whatever the tiles point to.
        ready: event behind the last use of the frames' memory.
        resident: what holds the tiles' photos, if they are planes that were resampled beforehand; their addresses are
            set then.
        status: uint8 [cells], DONE or WRONG_SIZE, once the kernels are queued.
    """

    tiles: TileRecords
    targets: Targets
    ends: npt.NDArray[np.uint32]
    mask: "torch.Tensor"
    ready: "torch.cuda.Event"
    resident: Any
    status: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def write(self, photos: list[Any], stream: int) -> None:
        """Queue the kernels.

        Args:
            photos: DLPack capsules of the decoded photos, uint8 [H, W, 3] each, in the order of the tiles; none where
                tiles are resident.
            stream: address of the CUDA stream that they are decoded on.
        """
        from nemo_dali.kernels.device import torch_stream

        device = self.mask.device.index
        torch_stream(device, stream).wait_event(self.ready)
        write_tiles = self._resample if self.resident is None else self._gather
        self.status = write_tiles(photos, device=device, stream=stream)

    def _write_masks(self, *, device: int, stream: int) -> None:
        """Queue all masks; those of letterboxed samples become 0."""
        from nemo_dali.kernels.device import upload
        from nemo_dali.kernels.mask.gpu import write_masks

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

    def _resample(self, photos: list[Any], *, device: int, stream: int) -> npt.NDArray[np.uint8]:
        from nemo_dali.kernels.letterbox.gpu import write_tiles as write_letterboxes
        from nemo_dali.kernels.mosaic.gpu import write_tiles

        status, fits = place_photos(self.tiles, photos)
        boxed = self.tiles["resample"] == CV2_LETTERBOX
        write_tiles(self.tiles[fits & ~boxed], device=device, stream=stream)
        if not boxed.all():
            self._write_masks(device=device, stream=stream)
        write_letterboxes(self.tiles[fits & boxed], device=device, stream=stream)  # masks too, so it is last
        return status

    def _gather(self, photos: list[Any], *, device: int, stream: int) -> npt.NDArray[np.uint8]:
        from nemo_dali.kernels.gather.gpu import write_tiles

        write_tiles(self.tiles, device=device, stream=stream)
        self._write_masks(device=device, stream=stream)
        return np.full(len(self.tiles), DONE, np.uint8)


def device_batch(
    tiles: TileRecords,
    sample: npt.NDArray[np.int64],
    mask: "torch.Tensor",
    stream: "torch.cuda.Stream",
    *,
    resident: Any = None,
) -> DeviceBatch:
    """Make ready a batch whose frames and masks have just been allocated.

    Args:
        tiles: dtype ``TILE`` [cells], at least one; ``run_count`` and ``runs`` are set in the targets' cells.
        sample: int64 [cells], the sample that each cell belongs to.
        mask: torch uint8 [B, H, W] on the device.
        stream: torch's current stream, for which they were allocated.
        resident: see ``DeviceBatch``.
    """
    from nemo_dali.kernels.mask.gpu import make_targets

    shown = (tiles["run_count"] > 0) & (tiles["resample"] != CV2_LETTERBOX)
    of = np.zeros(len(mask), tiles.dtype)  # the target's tile of each sample; empty where a mask is
    of[sample[shown]] = tiles[shown]
    targets, ends = make_targets(
        addresses=of["runs"],
        counts=of["run_count"],
        boxes=np.stack([of[name] for name in ("y0", "x0", "y1", "x1")], axis=1),
        photos=np.stack([of[name] for name in ("photo_height", "photo_width")], axis=1),
        resample=of["resample"],
    )
    return DeviceBatch(tiles, targets, ends, mask, stream.record_event(), resident)
