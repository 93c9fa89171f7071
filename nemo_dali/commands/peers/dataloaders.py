"""PyTorch's DataLoader over mosaics by OpenCV, torchvision, Albumentations and Kornia.

Each is written as its documentation advises. All decode the four photos of a row, resize each to its cell and read the
referent's mask; worker processes live as long as the loader and have one thread each.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nemo_dali.commands.peers.work import Setting, Work

Samples = Any  # a map-style data set


def normalised_where(work: Work) -> list[Setting]:
    """Two settings: each worker normalises its samples, or sends uint8 and this process normalises whole batches."""
    if work.dtype == "uint8":
        return prefetched(work)
    return [{"workers": work.cores, "prefetch": 2, "normalised": where} for where in ("by the batch", "by workers")]


def prefetched(work: Work) -> list[Setting]:
    """Two settings: batches that each worker makes ahead."""
    return [{"workers": work.cores, "prefetch": prefetch} for prefetch in (4, 2)]


def in_flight(setting: Setting) -> int:
    """Batches that the workers make ahead at most."""
    return int(setting["workers"] * setting["prefetch"])


class _Endless:
    """A sampler: 0 to n - 1, again and again."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(self._n))


def _one_thread(_: int) -> None:
    """Use one thread in each worker: the workers are the parallelism."""
    import torch

    torch.set_num_threads(1)
    os.environ["RAYON_NUM_THREADS"] = "1"  # of kornia_rs, which reads it when it first has work
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


def _batches(
    work: Work, setting: Setting, samples: Samples, collate: Callable[..., Any] | None = None
) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    yield from DataLoader(
        samples,
        batch_size=work.batch_size,
        sampler=_Endless(len(work.rows)),
        num_workers=setting["workers"],
        prefetch_factor=setting["prefetch"],
        persistent_workers=True,
        worker_init_fn=_one_thread,
        multiprocessing_context="fork",  # the default, but in a process that was spawned
        collate_fn=collate,
    )


class _Mosaics:
    """Image [3, S, S], uint8 unless there is ``finish``, and mask [S, S]."""

    def __init__(self, work: Work, finish: Any) -> None:
        self.work, self.finish = work, finish

    def __len__(self) -> int:
        return len(self.work.rows)

    def __getitem__(self, index: int) -> Any:
        import torch

        mask = torch.zeros((self.work.size, self.work.size), dtype=torch.uint8)
        frame = self.frame(index, mask)
        return (frame if self.finish is None else self.finish(frame)), mask

    def frame(self, index: int, mask: Any) -> Any:
        """The mosaic; the target's part of the mask is filled in."""
        raise NotImplementedError


def _normalised(work: Work) -> Callable[[Any], Any]:
    """Normalisation by torch: uint8 [..., 3, S, S] to float32."""
    import torch

    mean, std = (torch.tensor(values)[:, None, None] for values in (work.mean, work.std))
    return lambda image: image.float().div_(255).sub_(mean).div_(std)


class _OpenCV(_Mosaics):
    """Samples equal the Loader's bit for bit."""

    def frame(self, index: int, mask: Any) -> Any:
        import cv2
        import torch

        side = self.work.cell, self.work.cell
        frame = np.empty((self.work.size, self.work.size, 3), np.uint8)
        for cell, path in enumerate(self.work.paths(index)):
            place = self.work.place(cell)
            photo: Any = cv2.imread(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            frame[place] = cv2.resize(photo, side, interpolation=cv2.INTER_LINEAR)
            if cell == self.work.target(index):
                own: Any = cv2.imread(self.work.mask(index), cv2.IMREAD_GRAYSCALE)
                mask[place] = torch.from_numpy(cv2.resize(own, side, interpolation=cv2.INTER_NEAREST))
        return torch.from_numpy(frame).permute(2, 0, 1).contiguous()


def opencv(work: Work, setting: Setting) -> Iterator[Any]:
    """Decoded and resized by OpenCV, normalised by torch."""
    where, finish = setting.get("normalised"), _normalised(work)
    for image, mask in _batches(work, setting, _OpenCV(work, finish if where == "by workers" else None)):
        yield (finish(image) if where == "by the batch" else image), mask


class _Torchvision(_Mosaics):
    """Mosaics by transforms v2."""

    def __init__(self, work: Work, finish: Any) -> None:
        from torchvision.transforms import v2

        super().__init__(work, finish)
        self.resize = v2.Resize((work.cell, work.cell), antialias=True)  # nearest for a Mask


class _OnTensors(_Torchvision):
    def frame(self, index: int, mask: Any) -> Any:
        import torch
        from torchvision import tv_tensors
        from torchvision.io import decode_image

        frame = torch.empty((3, self.work.size, self.work.size), dtype=torch.uint8)
        for cell, path in enumerate(self.work.paths(index)):
            photo = tv_tensors.Image(decode_image(path, mode="RGB"))
            if cell == self.work.target(index):
                own = tv_tensors.Mask(decode_image(self.work.mask(index), mode="GRAY"))
                photo, own = self.resize(photo, own)
                mask[self.work.place(cell)] = own[0]
            else:
                photo = self.resize(photo)
            frame[:, *self.work.place(cell)] = photo
        return tv_tensors.Image(frame)


class _OnPil(_Torchvision):
    def frame(self, index: int, mask: Any) -> Any:
        from PIL import Image
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        frame = Image.new("RGB", (self.work.size, self.work.size))
        for cell, path in enumerate(self.work.paths(index)):
            with Image.open(path) as file:
                photo = file.convert("RGB")
            y, x = self.work.place(cell)
            if cell == self.work.target(index):
                with Image.open(self.work.mask(index)) as file:
                    own = tv_tensors.Mask(file)
                photo, own = self.resize(photo, own)
                mask[y, x] = own[0]
            else:
                photo = self.resize(photo)
            frame.paste(photo, (x.start, y.start))
        return functional.to_image(frame)


def torchvision(kind: type[_Torchvision]) -> Callable[[Work, Setting], Iterator[Any]]:
    """Transforms v2 on tensors or on PIL images."""

    def start(work: Work, setting: Setting) -> Iterator[Any]:
        import torch
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(work.mean, work.std, inplace=True)])
        where = setting.get("normalised")
        for image, mask in _batches(work, setting, kind(work, finish if where == "by workers" else None)):
            yield (finish(tv_tensors.Image(image)) if where == "by the batch" else image), mask

    return start


on_tensors, on_pil = torchvision(_OnTensors), torchvision(_OnPil)


class _Albumentations:
    """Samples of ``Mosaic``: its cells keep a photo's aspect ratio, so each photo is stretched to its cell first.

    Images are uint8 unless they are ``normalised``.
    """

    def __init__(self, work: Work, normalised: bool) -> None:
        import albumentations as A
        import cv2

        size, cell = (work.size, work.size), (work.cell, work.cell)
        self.work = work
        self.stretch = A.Compose([A.Resize(*cell, cv2.INTER_LINEAR, cv2.INTER_NEAREST, p=1.0)])
        normalise = [A.Normalize(work.mean, work.std, max_pixel_value=255.0, p=1.0)] if normalised else []
        mosaic = A.Mosaic((2, 2), size, cell, center_range=(0.5, 0.5), p=1.0)
        self.mosaic = A.Compose([mosaic, *normalise, A.ToTensorV2()])

    def __len__(self) -> int:
        return len(self.work.rows)

    def __getitem__(self, index: int) -> Any:
        import cv2

        items: list[Any] = []
        for cell, path in enumerate(self.work.paths(index)):
            item = {"image": cv2.imread(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)}
            if is_target := cell == self.work.target(index):
                item["mask"] = cv2.imread(self.work.mask(index), cv2.IMREAD_GRAYSCALE)
            items.insert(0 if is_target else len(items), self.stretch(**item))
        made = self.mosaic(**items[0], mosaic_metadata=items[1:])
        return made["image"], made["mask"]


def albumentations(work: Work, setting: Setting) -> Iterator[Any]:
    """``Mosaic`` with the three other photos as its metadata."""
    where, finish = setting.get("normalised"), _normalised(work)
    for image, mask in _batches(work, setting, _Albumentations(work, where == "by workers")):
        yield (finish(image) if where == "by the batch" else image), mask


class _KorniaCells:
    """The four cells of a sample, row by row, uint8 [4, 4, S/2, S/2]: RGB, and the mask as a channel."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __len__(self) -> int:
        return len(self.work.rows)

    def __getitem__(self, index: int) -> Any:
        import torch
        from kornia.geometry.transform import resize
        from kornia.io import ImageLoadType, load_image
        from kornia_rs import imgproc

        side = self.work.cell
        cells = torch.zeros((4, 4, side, side), dtype=torch.uint8)
        for cell, path in enumerate(self.work.paths(index)):
            photo = np.ascontiguousarray(load_image(path, ImageLoadType.RGB8).permute(1, 2, 0).numpy())  # if grey
            cells[cell, :3] = torch.from_numpy(imgproc.resize(photo, (side, side), "bilinear")).permute(2, 0, 1)
            if cell == self.work.target(index):
                own = load_image(self.work.mask(index), ImageLoadType.GRAY8)
                cells[cell, 3] = resize(own[None].float(), (side, side), "nearest")[0, 0]
        return cells


class _KorniaMosaic:
    """``RandomMosaic`` of a batch's cells, uint8 [B, 4, 4, S/2, S/2], with the plan in place of what it would draw.

    It takes no masks, so the mask travels as a fourth channel. Its ``apply_transform`` is called with the parameters:
    calling the module itself would first pad all cells to the size of the frame, and throw that away.
    """

    def __init__(self, work: Work) -> None:
        from kornia.augmentation import RandomMosaic

        self.work = work
        self.mosaic = RandomMosaic((work.size, work.size), (2, 2), start_ratio_range=(0.0, 0.0), p=1.0)

    def __call__(self, cells: Any) -> Any:
        import torch
        from kornia.enhance import normalize

        samples = len(cells)
        flat = cells.flatten(0, 1).float()
        params = self.mosaic.forward_parameters((samples, *flat.shape[1:]))
        columns_first = torch.tensor([0, 2, 1, 3])  # its order
        params["permutation"] = 4 * torch.arange(samples)[:, None] + columns_first
        made = self.mosaic.apply_transform(flat, params, self.mosaic.flags)
        image, mask = made[:, :3], made[:, 3].to(torch.uint8)
        if self.work.dtype == "uint8":
            return image.to(torch.uint8), mask
        mean, std = (255 * torch.tensor(values) for values in (self.work.mean, self.work.std))
        return normalize(image, mean, std), mask

    def collate(self, samples: list[Any]) -> Any:
        """The same in a worker."""
        import torch

        return self(torch.stack(samples))


def mosaic_where(work: Work) -> list[Setting]:
    """Two settings: this process makes mosaics of whole batches with all of its threads, or each worker does."""
    return [{"workers": work.cores, "prefetch": 2, "mosaics": where} for where in ("by workers", "by the batch")]


def kornia(work: Work, setting: Setting) -> Iterator[Any]:
    """``RandomMosaic`` after a DataLoader that decodes and resizes with kornia_rs."""
    mosaic = _KorniaMosaic(work)
    if setting["mosaics"] == "by workers":
        yield from _batches(work, setting, _KorniaCells(work), mosaic.collate)
    for cells in _batches(work, setting, _KorniaCells(work)):
        yield mosaic(cells)
