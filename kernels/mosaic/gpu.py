"""Launches ``mosaic.cu``: all cells of a batch at once, on a stream of the caller's."""

import numpy as np

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.arrays import U32
from nemo_dali.kernels.device import Launch, padded
from nemo_dali.kernels.tile import CV2_LINEAR, RESAMPLE, TileRecords

THREADS = (32, 8)  # of a block: along a row, along a column
LARGEST_PHOTO = 8192  # pixels, width and height

_COLUMNS = 128  # most output columns of a part
# Rows of a part: fewer balance the load better, more share the weights of its columns, dear with Pillow's rule.
_CV2_ROWS, _PILLOW_ROWS = 40, 48
_STEP = 8  # output rows in the making at a time
_LINES = 3 * _STEP * (4 * _COLUMNS + 16)  # bytes of these on their way out, of the widest type
_GROUP = 16  # "pillow-bilinear": photo rows resampled along x at a time
_COLUMN_TAPS = 1536  # "pillow-bilinear": weights along x that are kept at a time
_LEAD, _BEYOND = 15, 16  # bytes of a staged row around its segment, at most: before it, and read behind it
_PHOTO_LINE = 1280  # "cv2-linear": bytes of a staged row, at most; a block keeps two for each warp
_STAGE = 18 * 1024  # "pillow-bilinear": bytes of photo rows that a block keeps in shared memory where it can choose
_LARGEST_STAGE = 25 * 1024  # and where it cannot: a row of the largest photo

SOURCE = cuda_source.Source(
    "mosaic/mosaic.cu",
    {
        "LANES": THREADS[0],
        "ROWS": THREADS[1],
        "COLUMNS": _COLUMNS,
        "PART_ROWS": max(_CV2_ROWS, _PILLOW_ROWS),
        "STEP": _STEP,
        "LINES": _LINES,
        "GROUP": _GROUP,
        "COLUMN_TAPS": _COLUMN_TAPS,
        "LEAD": _LEAD,
        "BEYOND": _BEYOND,
        "PHOTO_LINE": _PHOTO_LINE,
    },
    headers=("mosaic/parts.cuh", "mosaic/cv2_linear.cuh", "mosaic/pillow_bilinear.cuh"),
)


def kernel_name(resample: int, itemsize: int) -> str:
    """The kernel for one of RESAMPLE's values and values of ``itemsize`` bytes."""
    names = {value: name.replace("-", "_") for name, value in RESAMPLE.items()}
    return f"{names[resample]}_{itemsize}"


def blocks_of(tiles: TileRecords) -> tuple[U32, int]:
    """Divide cells into the parts that blocks of threads write.

    Args:
        tiles: dtype ``TILE`` [n], n >= 1, of one resampling, without empty boxes. ``first_block``, ``part_width`` and
            ``part_height`` are set.

    Returns:
        tile_of_block: uint32 [blocks], the row of ``tiles`` that each block works on.
        stage_bytes: of dynamic shared memory for a block.

    Raises:
        ValueError: a photo is larger than LARGEST_PHOTO along one axis.
    """
    source_height, source_width = tiles["photo_height"].astype(np.int64), tiles["photo_width"].astype(np.int64)
    if max(source_height.max(), source_width.max()) > LARGEST_PHOTO:
        raise ValueError(f"photos on a GPU must be at most {LARGEST_PHOTO} pixels wide and high")
    width, height = (tiles["x1"] - tiles["x0"]).astype(np.int64), (tiles["y1"] - tiles["y0"]).astype(np.int64)
    cv2 = tiles["resample"][0] == CV2_LINEAR
    across, down = source_width / width, source_height / height
    # Photo pixels behind n neighbouring output pixels: at most (n - 1) * scale + around.
    around = np.full(len(tiles), 3.0) if cv2 else 2 * np.maximum(across, 1) + 2
    # With Pillow's rule half of the rows that a step likes to keep must fit into the stage.
    most = ((_PHOTO_LINE if cv2 else _STAGE // _STEP) - _LEAD - _BEYOND) / 3 - around
    most = np.clip(np.floor(most / across) + 1, 1, _COLUMNS).astype(np.int64)
    if not cv2:
        taps = np.minimum(2 * np.ceil(np.maximum(across, 1)) + 1, source_width)
        most = np.clip(_COLUMN_TAPS // taps, 1, most).astype(np.int64)
    # A column for each lane; or lines that begin at a multiple of 16 bytes in the frame.
    unit = np.where(most >= THREADS[0], THREADS[0], 16) if cv2 else 16
    most = np.where(most >= 16, most // unit * unit, most)
    even = -(-width // -(-width // most))
    part_width = np.where(most >= 16, np.minimum(-(-even // unit) * unit, most), even)
    part_height = np.minimum(_CV2_ROWS if cv2 else _PILLOW_ROWS, height)
    tiles["part_width"], tiles["part_height"] = part_width, part_height

    segment = 3 * np.minimum(np.ceil((np.minimum(part_width, width) - 1) * across + around), source_width)
    pitch = padded(_LEAD + segment.astype(np.int64) + _BEYOND)
    if cv2:
        stage = 2 * THREADS[1] * pitch.max()
    else:
        rows = np.minimum(_GROUP, np.ceil((_STEP - 1) * down + 2 * np.maximum(down, 1) + 2)).astype(np.int64)
        stage = max(pitch.max(), min((rows * pitch).max(), _STAGE), _LINES)
    blocks = -(-width // part_width) * -(-height // part_height)
    tiles["first_block"] = np.cumsum(blocks) - blocks
    return np.repeat(np.arange(len(tiles), dtype=np.uint32), blocks), int(stage)


def launch_of(tiles: TileRecords) -> Launch:
    """The launch that writes all cells of a batch; their masks are the work of ``mask.gpu``.

    Args:
        tiles: dtype ``TILE`` [n], n >= 1, in host memory, of one resampling and item size, without empty boxes;
            ``first_block`` and the parts' sizes are set. Addresses are those of device memory, which must stay until
            the launch's stream has come past it.

    Raises:
        ValueError: see ``blocks_of``.
    """
    tile_of_block, stage_bytes = blocks_of(tiles)
    name = kernel_name(int(tiles["resample"][0]), int(tiles["itemsize"][0]))
    return Launch(
        load=lambda device: cuda_source.load_kernel(SOURCE, name, device),
        blocks=(len(tile_of_block),),
        threads=THREADS,
        arrays=(tiles, tile_of_block),
        arguments=(np.int32(stage_bytes),),
        shared_mem=stage_bytes,
    )


def write_tiles(tiles: TileRecords, *, device: int, stream: int) -> None:
    """Queue the writing of all cells of a batch by ``launch_of``'s launch; there may be none.

    Args:
        device: CUDA device number. stream: CUDA stream's address.

    Raises:
        ValueError: see ``blocks_of``.
    """
    if len(tiles):
        launch_of(tiles).send_and_queue(device=device, stream=stream)
