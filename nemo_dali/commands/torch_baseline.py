"""What the Loader is measured against: the same samples from a PyTorch DataLoader, as a good engineer would write it.

Only the photos of a sample are decoded, each resized straight into its cell, in worker processes that live as long as
the loader; masks come from run lengths by pycocotools; normalisation is torch's own. Nothing is kept from sample to
sample. Pixels, masks and tokens equal the Loader's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.data.orientation import turned_pixels
from nemo_dali.data.photos import find_problem
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.loader.loader import Loader
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline.cells import lay_out

IN_FLIGHT = 4  # batches that each worker makes ahead


class Samples:
    """A map-style data set of plan rows, dtype ``plan.PLAN`` [n]: image, mask, tokens and attention mask of each."""

    def __init__(self, loader: Loader, rows: PlanRows) -> None:
        import torch

        self._corpus: Corpus = loader.corpus
        self._rows = rows
        self._size = loader.size
        self._dtype = loader.dtype
        self._pillow = loader.resample == "pillow-bilinear"
        self._mean, self._std = (torch.tensor(numbers)[:, None, None] for numbers in (loader.mean, loader.std))
        # Tokens of these rows alone: workers need not carry the whole data set's.
        self._tokens, self._attention = loader.text_of(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        import torch
        from pycocotools import mask as coco

        row = self._rows[index : index + 1]
        image = np.empty((self._size, self._size, 3), np.uint8)
        mask = np.zeros((self._size, self._size), np.uint8)
        tiles, _, photos = lay_out(row, self._size)
        for tile, photo in zip(tiles, photos.tolist(), strict=True):
            y, x = slice(int(tile["y0"]), int(tile["y1"])), slice(int(tile["x0"]), int(tile["x1"]))
            shape = (y.stop - y.start, x.stop - x.start)
            image[y, x] = self._photo(photo, shape)
            if tile["run_count"]:
                height, width = int(self._corpus.photo_height[photo]), int(self._corpus.photo_width[photo])
                runs = self._corpus.runs_of(int(row["ref"][0]))
                encoded = coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
                mask[y, x] = self._nearest(coco.decode(encoded), shape)
        frame = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        if self._dtype != "uint8":
            frame = frame.float().div_(255).sub_(self._mean).div_(self._std).to(getattr(torch, self._dtype))
        return frame, torch.from_numpy(mask), self._tokens[index], self._attention[index]

    def _photo(self, row: int, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """A photo, RGB, stretched to (height, width)."""
        path = self._corpus.photo_path(row)
        turn = 1 if self._corpus.photo_turn is None else int(self._corpus.photo_turn[row])
        if self._pillow:
            from PIL import Image

            with Image.open(path) as photo:
                upright = photo.convert("RGB")
            if turn > 1:
                upright = Image.fromarray(turned_pixels(np.asarray(upright), turn))
            return np.asarray(upright.resize(shape[::-1], Image.Resampling.BILINEAR))
        import cv2

        decoded: Any = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        resized = cv2.resize(turned_pixels(decoded, turn), shape[::-1], interpolation=cv2.INTER_LINEAR)
        pixels: npt.NDArray[np.uint8] = cv2.cvtColor(resized, cv2.COLOR_BGR2RGB, dst=resized)
        return pixels

    def _nearest(self, mask: npt.NDArray[np.uint8], shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
        if self._pillow:
            from PIL import Image

            return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))
        import cv2

        resized: npt.NDArray[np.uint8] = cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST)
        return resized


def one_thread(_: int) -> None:
    """Use one thread in each worker: the workers are the parallelism."""
    import torch

    torch.set_num_threads(1)
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)


def dataloader(loader: Loader, rows: PlanRows, *, batches: int, in_flight: int = IN_FLIGHT) -> Any:
    """A DataLoader over plan rows in their order, with as many workers as the loader has threads.

    Args:
        rows: dtype ``plan.PLAN`` [n].
        batches: how many, over the rows again and again.
        in_flight: batches that each worker makes ahead.

    Raises:
        PhotoError: a photo is missing, or not as annotated; workers decode whatever they find.
        NemoError: OpenCV is missing.
    """
    import torch
    from torch.utils.data import DataLoader

    corpus = loader.corpus
    for photo in np.unique(rows["images"][rows["images"] >= 0]).tolist():
        width, height = int(corpus.photo_width[photo]), int(corpus.photo_height[photo])
        turn = 1 if corpus.photo_turn is None else int(corpus.photo_turn[photo])
        if (problem := find_problem(corpus.photo_path(photo), width, height, turn, decode=False)) is not None:
            raise PhotoError(f"{problem.sentence()}. {problem.remedy()}")

    if loader.resample == "cv2-linear":
        try:
            import cv2  # noqa: F401  # whether the workers will find it
        except ImportError as error:
            raise NemoError("The baseline of 'cv2-linear' needs OpenCV: pip install opencv-python-headless.") from error
    sampler: Sequence[int] = np.resize(np.arange(len(rows)), batches * loader.batch_size).tolist()
    return DataLoader(
        Samples(loader, rows),  # type: ignore[arg-type]  # map-style: torch wants no base class, its types do
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_threads,
        prefetch_factor=in_flight,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=one_thread,
        multiprocessing_context="spawn",  # DALI's threads do not survive a fork
    )


def check_equal(ours: Any, theirs: Any, *, exact: bool = True) -> None:
    """Compare a batch of the loader with the baseline's batch of the same plan rows.

    Args:
        exact: whether the same decoder made both; else images may differ by two levels of 255 on average.

    Raises:
        NemoError: they differ, so their speeds cannot be compared.
    """
    import torch

    names = ("images", "masks", "tokens", "attention masks")
    for name, one, other in zip(names, ours, theirs, strict=False):
        equal = torch.equal(one.cpu(), other)
        if name == "images" and not (equal or exact):
            span = 255 if other.dtype == torch.uint8 else float(other.max() - other.min())
            equal = float((one.cpu().float() - other.float()).abs().mean()) < 2 / 255 * span
        if not equal:
            raise NemoError(f"The baseline's {name} are not the loader's, so their speeds cannot be compared.")
