"""DeviceBatch: the GPU's half of a batch.

training thread                  DALI's thread, when the photos of the batch are decoded
frames = torch.empty(...)  ──▶   DALI's stream waits for the training stream's work so far (`ready`),
ready = an event behind it       the photos' addresses join the tiles ──▶ one copy of all that kernels read ──▶
                                 mosaic kernel, mask kernel, text kernel, letterbox kernel

With resident tiles the training thread does both, and the other stream is a side stream of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.device import CopyOnDevice, Launch
from nemo_dali.kernels.dlpack import read_tensors
from nemo_dali.kernels.mosaic.cpu import DONE, WRONG_SIZE
from nemo_dali.kernels.tile import CV2_LETTERBOX, TileRecords
from nemo_dali.pipeline.uploads import Uploads

if TYPE_CHECKING:
    import torch


def place_photos(tiles: TileRecords, photos: list[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Write the photos' addresses into the tiles.

    Args:
        tiles: dtype ``TILE`` [..., photos].
        photos: DLPack capsules of uint8 [H, W, 3] each.

    Returns:
        status: uint8 [photos], DONE, or WRONG_SIZE for a photo that does not have the size that its tile says.
        fits: bool [photos], whether it has that size.
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
    """A batch on its way through a GPU. It holds everything that the kernels touch, except the decoded photos.

    Attributes:
        tiles: dtype ``TILE`` [cells], complete but for the photos' addresses.
        launches: those that do not depend on decoded photos.
        stream: torch's current one when the memory of frames, masks and text was allocated.
        resident: what holds the tiles' photos, if they are planes that were resampled beforehand; their addresses are
            then already set.
        ready: the pipeline's event on ``stream``, after the last use of that memory.
        status: uint8 [cells], DONE or WRONG_SIZE, once the kernels are queued.
    """

    tiles: TileRecords
    launches: Sequence[Launch | CopyOnDevice]
    stream: "torch.cuda.Stream"
    resident: Any = None
    ready: Any = None
    status: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def write(self, photos: list[Any], uploads: Uploads, stream: int) -> None:
        """Queue the kernels.

        Args:
            photos: DLPack capsules of the decoded photos, uint8 [H, W, 3] each, in the order of the tiles; none where
                tiles are resident.
            stream: address of the CUDA stream that they are decoded on.
        """
        from nemo_dali.kernels.device import torch_stream

        torch_stream(uploads.device, stream).wait_event(self.ready)
        if self.resident is not None:
            uploads.queue(self.launches, stream)
            self.status = np.full(len(self.tiles), DONE, np.uint8)
            return
        self.status, fits = place_photos(self.tiles, photos)
        if fits.all():  # else the batch is made again, or fails
            uploads.queue(self._with_photos(), stream)

    def _with_photos(self) -> list[Launch | CopyOnDevice]:
        from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
        from nemo_dali.kernels.mosaic import gpu as mosaic_gpu

        boxed = self.tiles["resample"] == CV2_LETTERBOX
        launches = list(self.launches)
        if not boxed.any():
            launches.insert(0, mosaic_gpu.launch_of(self.tiles))
            return launches
        if not boxed.all():
            launches.insert(0, mosaic_gpu.launch_of(self.tiles[~boxed]))
        launches.append(letterbox_gpu.launch_of(self.tiles[boxed]))  # writes masks too, so it follows the mask kernel
        return launches


def device_batch(
    tiles: TileRecords,
    sample: npt.NDArray[np.int64],
    mask: "torch.Tensor",
    stream: "torch.cuda.Stream",
    *,
    text: Sequence[Launch | CopyOnDevice] = (),
    resident: Any = None,
) -> DeviceBatch:
    """Prepare a batch whose memory has just been allocated.

    Args:
        tiles: dtype ``TILE`` [cells], at least one; ``run_count`` and ``runs`` are set in the targets' cells.
        sample: int64 [cells], the sample that each cell belongs to.
        mask: torch uint8 [B, H, W] on the device; the frames are whatever the tiles point to.
        stream: torch's current stream, for which they were allocated.
        text: launches that write the batch's text.
        resident: see ``DeviceBatch``.

    Raises:
        NemoError: the targets have too many run lengths.
    """
    from nemo_dali.kernels.gather import gpu as gather_gpu
    from nemo_dali.kernels.mask import gpu as mask_gpu

    launches = list(text)
    samples, height, width = mask.shape
    if resident is not None or (tiles["resample"] != CV2_LETTERBOX).any():  # else the letterbox kernel writes all masks
        targets, ends = mask_gpu.targets_of(tiles, sample, samples)
        launches.insert(0, mask_gpu.launch_of(targets, ends, mask.data_ptr(), frame_height=height, frame_width=width))
    if resident is not None:
        launches.insert(0, gather_gpu.launch_of(tiles))
    return DeviceBatch(tiles, launches, stream, resident)
