"""Batches of masks for the GPU's kernel, with what is expected painted by the reference's rules."""

import sys
from typing import Any, NamedTuple, get_args

import numpy as np

from nemo_dali._choices import MaskDType
from nemo_dali.kernels import reference
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.tile import CV2_LINEAR, PILLOW_BILINEAR

SOURCES = {CV2_LINEAR: reference.nearest_sources_cv2, PILLOW_BILINEAR: reference.nearest_sources_pillow}


class Batch(NamedTuple):
    frame: tuple[int, int]  # height, width
    runs: list[Any]  # uint32 [n] per sample
    boxes: list[tuple[int, int, int, int]]  # y0, x0, y1, x1
    photos: list[tuple[int, int]]  # height, width
    resample: int
    dtype: str

    def targets(self):
        addresses, counts = mask_gpu.run_addresses(self.runs)
        return mask_gpu.make_targets(
            addresses=addresses, counts=counts, boxes=self.boxes, photos=self.photos, resample=self.resample
        )

    def expected(self):
        masks = np.zeros((len(self.runs), *self.frame), self.dtype)
        for mask, runs, (y0, x0, y1, x1), (height, width) in zip(
            masks, self.runs, self.boxes, self.photos, strict=True
        ):
            if y0 < y1 and x0 < x1:
                painted = np.repeat(np.arange(len(runs)) % 2, runs)[: height * width]
                photo = np.concatenate([painted, np.zeros(height * width - len(painted), int)]).reshape(width, height).T
                rows, columns = (SOURCES[self.resample](*pair) for pair in ((height, y1 - y0), (width, x1 - x0)))
                mask[y0:y1, x0:x1] = photo[rows][:, columns]
        return masks


def cell_of_grid(random, height, width):
    """A cell of a single, a 2x2 (its crossing anywhere, also on the frame's edge) or a 3x3."""
    grid = random.integers(1, 4)
    edges = [[size * j // grid for j in range(grid + 1)] for size in (height, width)]
    if grid == 2 and random.random() < 0.6:
        for edge, size in zip(edges, (height, width), strict=True):
            edge[1] = random.choice([0, size, random.integers(0, size + 1)])
    y, x = random.integers(0, grid, 2)
    return tuple(int(edge) for edge in (edges[0][y], edges[1][x], edges[0][y + 1], edges[1][x + 1]))


def some_runs(random, pixels):
    """Run lengths of a mask that is empty, full, a few long runs or noise, with the quirks of COCO's writers."""
    kind = random.choice(["none", "empty", "full", "edges", "few", "noise"])
    if kind == "none":
        return np.empty(0, np.uint32)
    if kind == "edges":  # the first pixel and the last one
        runs = [0, 1, pixels - 2, 1] if pixels > 2 else [0, pixels]
    else:
        count = {"empty": 1, "full": 1, "few": 6, "noise": pixels // 2 + 1}[kind]
        cuts = np.sort(random.integers(0, pixels + 1, count - 1))
        runs = np.diff(np.concatenate([[0], cuts, [pixels]])).tolist()  # some of length 0
        if kind == "full" or random.random() < 0.3:
            runs = [0, *runs]
    if len(runs) > 1 and random.random() < 0.3:
        runs = runs[:-1]  # the last run is left out
    elif random.random() < 0.2:
        runs = [*runs, 5]  # beyond the photo
    return np.array(runs, np.uint32)


def random_batch(seed, *, largest_frame, largest_photo, samples):
    random = np.random.default_rng(seed)
    frame = tuple(int(n) for n in random.integers(1, largest_frame + 1, 2))
    photos = [tuple(int(n) for n in random.integers(1, largest_photo + 1, 2)) for _ in range(samples)]
    return Batch(
        frame=frame,
        runs=[some_runs(random, height * width) for height, width in photos],
        boxes=[cell_of_grid(random, *frame) for _ in photos],
        photos=photos,
        resample=seed % 2,
        dtype=get_args(MaskDType)[seed % 3],
    )


def numba_launch(batch, *, threads, band):
    """The masks by Numba's own launch, in the simulator or on a GPU."""
    from numba import cuda

    from nemo_dali.kernels.mask.kernel import write_masks

    targets, ends = batch.targets()
    expected = batch.expected()
    masks = cuda.to_device(np.full(expected.size, 7, batch.dtype))
    grid = mask_gpu.grid(len(targets), *batch.frame, threads=threads, band=band)
    shared = mask_gpu.shared_bytes(threads=threads, band=band)
    ends = np.append(ends, 0).astype(np.uint32)  # Numba does not copy an array of no bytes
    launch = write_masks[grid, threads, 0, shared]
    launch(cuda.to_device(targets.view(np.int32)), cuda.to_device(ends), masks, *batch.frame, band)
    return masks.copy_to_host().reshape(expected.shape)


def simulate(seeds):
    """Run in a process of its own, because Numba decides at its import what ``numba.cuda`` is."""
    for seed in seeds:
        batch = random_batch(seed, largest_frame=20, largest_photo=40, samples=3)
        random = np.random.default_rng(seed)
        found = numba_launch(batch, threads=int(random.integers(1, 9)), band=int(random.integers(2, 13)))
        if not np.array_equal(found, batch.expected()):
            sys.exit(f"seed {seed} differs: {batch}")
    print("simulated", len(seeds))
