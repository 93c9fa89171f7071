"""All rows of the comparison: the Loader's three, then its peers."""

from importlib import import_module
from typing import Any

from nemo_dali._lazy import extra
from nemo_dali.commands.peers import dataloaders, pipelines
from nemo_dali.commands.peers.work import Row
from nemo_dali.errors import NemoError

OPENCV: dict[str, Any] = {"image": "cv2-linear", "mask": "cv2-linear"}
PILLOW: dict[str, Any] = {"image": "pillow-bilinear", "mask": "pillow-bilinear"}
DALI: dict[str, Any] = {"image": "cv2-linear", "mask": "pillow-bilinear"}  # its masks: nearest, of the center
TORCHVISION: dict[str, Any] = {"image": "pillow-bilinear", "mask": "cv2-linear"}  # its masks: nearest, of the corner
OURS: dict[str, Any] = {"is_peer": False, "masks": "run lengths", "modules": ("nvidia.dali.plugin.numba", "torch")}
PLAN = "an exact plan, the same steps for any number of ranks"
NO_PLAN = f"{PLAN}, a resume at any step"
LOADER_PLAN = f"{NO_PLAN} without torchdata's StatefulDataLoader"
DALI_PLAN = f"{PLAN} (its readers shard files, its pipelines resume from checkpoints)"

ROWS = (
    Row("host", "Loader, resident tiles", pipelines.host, **OPENCV, **OURS),
    Row("stream", "Loader, stream, cv2-linear", pipelines.stream, **OPENCV, **OURS),
    Row("stream-antialiased", "Loader, stream, pillow-bilinear", pipelines.stream_antialiased, **PILLOW, **OURS),
    Row(
        name="opencv",
        label="DataLoader, OpenCV",
        start=dataloaders.opencv,
        **OPENCV,
        modules=("cv2", "torch"),
        packages=("opencv-python-headless", "torch"),
        settings=dataloaders.normalised_where,
        ahead=dataloaders.in_flight,
        cannot=(LOADER_PLAN,),
    ),
    Row(
        name="torchvision-tensors",
        label="DataLoader, torchvision v2 on tensors",
        start=dataloaders.on_tensors,
        **TORCHVISION,
        tolerance=0.1,
        worst=0.2,
        modules=("torchvision.transforms.v2", "torchvision.io"),
        packages=("torchvision", "torch"),
        settings=dataloaders.normalised_where,
        ahead=dataloaders.in_flight,
        cannot=(LOADER_PLAN, "a mosaic: cells are pasted by hand"),
    ),
    Row(
        name="torchvision-pil",
        label="DataLoader, torchvision v2 on PIL images",
        start=dataloaders.on_pil,
        **TORCHVISION,
        modules=("torchvision.transforms.v2", "PIL.Image"),
        packages=("torchvision", "torch", "pillow"),
        settings=dataloaders.normalised_where,
        ahead=dataloaders.in_flight,
        cannot=(LOADER_PLAN, "a mosaic: cells are pasted by hand"),
    ),
    Row(
        name="albumentations",
        label="DataLoader, Albumentations Mosaic",
        start=dataloaders.albumentations,
        **OPENCV,
        modules=("albumentations", "torch"),
        packages=("albumentations", "opencv-python-headless", "torch"),
        settings=dataloaders.normalised_where,
        ahead=dataloaders.in_flight,
        is_placed=False,
        cannot=(
            LOADER_PLAN,
            "placement: of equal cells the target's is always the first, the others are shuffled",
            "cells that stretch a photo: they keep the aspect ratio, so A.Resize comes before",
        ),
    ),
    Row(
        name="kornia",
        label="DataLoader, Kornia RandomMosaic",
        start=dataloaders.kornia,
        **OPENCV,
        tolerance=0.5,
        worst=1.0,
        modules=("kornia", "kornia_rs", "torch"),
        packages=("kornia", "kornia_rs", "torch"),
        settings=dataloaders.mosaic_where,
        ahead=dataloaders.in_flight,
        cannot=(
            LOADER_PLAN,
            "four given photos: it draws from the batch, unless its parameters are replaced, as here",
            "masks: the mask travels as a fourth channel",
            "photos of several sizes: kornia_rs resizes them to cells before",
        ),
    ),
    Row(
        name="spdl",
        label="SPDL",
        start=pipelines.spdl,
        **PILLOW,
        tolerance=1.5,  # FFmpeg scales luma and chroma before it converts them to RGB
        worst=2.5,
        modules=("spdl.pipeline", "spdl.io", "torch"),
        packages=("spdl_io", "spdl_core", "torch"),
        settings=pipelines.spdl_stages,
        ahead=lambda setting: 9 + int(setting["threads"]),  # queues after its stages, for batches of four or more
        cannot=(NO_PLAN, "a mosaic: cells are arranged by torch"),
    ),
    Row(
        name="dali",
        label="DALI's own operators",
        start=pipelines.dali,
        **DALI,
        tolerance=0.5,
        worst=1.0,
        modules=("nvidia.dali.plugin.pytorch", "torch"),
        packages=("nvidia-dali-cuda120", "nvidia-dali-cuda130", "torch"),
        settings=pipelines.dali_readers,
        ahead=lambda setting: 4,  # its queues, and what a reader has opened
        cannot=(DALI_PLAN, "grids of several sizes in one graph: it decodes four photos for each sample"),
    ),
)
BY_NAME = {row.name: row for row in ROWS}
PEERS = tuple(row.name for row in ROWS if row.is_peer)


def missing(row: Row) -> str | None:
    """A sentence on why a row cannot run here, and what to do; None if it can."""
    try:
        with extra("peers", row.label):
            for module in row.modules:
                import_module(module)
        if row.name == "spdl":
            from spdl.io.utils import get_ffmpeg_versions

            get_ffmpeg_versions()  # loads FFmpeg
    except NemoError as error:
        return str(error)
    except RuntimeError:
        return (
            f"{row.label} finds no FFmpeg. Install version 4 or newer, or add the folder of its libraries to "
            "LD_LIBRARY_PATH."
        )
    return None
