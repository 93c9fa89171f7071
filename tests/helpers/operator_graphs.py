"""Graphs with the operators of nemo_dali.fn, what runs them, and what must come out."""

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

import nemo_dali.fn
from nemo_dali.kernels import reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLINGS = ["cv2-linear", "pillow-bilinear"]
DTYPES = ["float32", "float16", "uint8"]
BATCH = 3
CENTERS = [(0, 0), (64, 64), (0, 64), (64, 0), (32, 0), (1, 63), (20, 41)]


def random_photos(random, count, *, largest=130):
    """Batches of photos, uint8, one per cell."""
    shapes = random.integers(1, largest, (count, BATCH, 2))
    return [[random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in batch] for batch in shapes]


def random_runs(random, height, width):
    """Run lengths of a mask with some objects."""
    pixels = height * width
    ends = np.sort(random.integers(0, pixels + 1, random.integers(1, 12)))
    return np.diff(ends, prepend=0, append=pixels).astype(np.uint32)


class Source:
    """Gives one batch per iteration, over and over, and counts them in ``taken``."""

    def __init__(self, *batches):
        self.batches, self.taken = batches, 0

    def __call__(self):
        self.taken += 1
        return self.batches[(self.taken - 1) % len(self.batches)]


def feed(*batches):
    """A node that gives the batches, lists of arrays, one after the other."""
    kinds = {"uint8": types.UINT8, "int32": types.INT32, "uint32": types.UINT32, "int64": types.INT64}
    kinds["float32"] = types.FLOAT
    first = batches[0][0]
    return fn.external_source(source=Source(*batches), ndim=first.ndim, dtype=kinds[str(first.dtype)])


def run(graph, *, steps=1, device_id=None, **options):
    """Build a pipeline of what ``graph`` returns; the outputs of ``steps`` iterations as arrays, and their layouts."""
    pipe = Pipeline(batch_size=BATCH, **{"num_threads": 2, "device_id": device_id, **options})
    with pipe:
        outputs = graph()
        pipe.set_outputs(*(outputs if isinstance(outputs, tuple) else (outputs,)))
    pipe.build()
    arrays, layouts = [], []
    for _ in range(steps):
        taken = pipe.run()
        layouts = [output.layout() for output in taken]
        taken = [output if device_id is None else output.as_cpu() for output in taken]
        arrays.append([[np.array(output[i]) for i in range(len(output))] for output in taken])
    return arrays, layouts


def oracle(photos, sample, *, dtype="float32", size, center=None, resample="cv2-linear", counts=(), cell=0, last=False):
    """Frame and mask of one sample."""
    return reference.mosaic(
        [batch[sample] for batch in photos],
        grid={1: 1, 4: 2, 9: 3}[len(photos)],
        center=(size // 2, size // 2) if center is None else center,
        counts=np.array(counts, np.uint32),
        cell=cell,
        size=size,
        resample=resample,
        table=reference.normalisation_table(MEAN, STD, dtype),
        channels_last=last,
    )


def assert_equal(some, others):
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


CONDITIONS = [(True, False, True), (True, True, True), (False, False, False)]


def assert_conditionals_work(flags):
    """Check graphs in which DALI splits a batch by flags, also into all and nothing, and rewrites their functions."""
    random = np.random.default_rng(5)
    photos = random_photos(random, 9)
    runs = [random_runs(random, *photo.shape[:2]) for photo in photos[3]]
    centers = [np.array(center, np.int32) for center in ((5, 9), (0, 40), (20, 20))]

    @pipeline_def(batch_size=BATCH, num_threads=2, device_id=None, enable_conditionals=True)
    def graph():
        nodes = [feed(batch) for batch in photos]
        counts, center = feed(runs), feed(centers)
        nine = fn.external_source(source=Source([np.array(flag) for flag in flags]), ndim=0, dtype=types.BOOL)
        if nine:
            image = nemo_dali.fn.mosaic(nodes, size=40)
            mask = nemo_dali.fn.remap_mask(counts, nodes[3].shape(), cell=3, grid=3, size=40)
        else:
            image = nemo_dali.fn.mosaic(nodes[:4], size=40, center=center)
            mask = nemo_dali.fn.remap_mask(counts, nodes[3].shape(), cell=3, grid=2, size=40, center=center)
        return image, mask

    pipe = graph()
    pipe.build()
    for _ in range(3):
        images, masks = pipe.run()
        for i in range(BATCH):
            shown = photos if flags[i] else photos[:4]
            expected = oracle(shown, i, size=40, center=tuple(centers[i]), counts=runs[i], cell=3)
            assert_equal([np.array(images[i]), np.array(masks[i])], expected)


def failures():
    """Graphs that meet a sample that cannot be drawn, and a pattern for what DALI must say."""
    good = random_photos(np.random.default_rng(7), 1)[0]
    runs = [np.array([1, 2, 3], np.uint32)] * BATCH

    def spoilt(photo):
        return [*good[:-1], photo]

    def mosaic(count, **options):
        return lambda: nemo_dali.fn.mosaic([feed(good)] * count, size=20, **options)

    def at(cell, photo):
        return lambda: nemo_dali.fn.mosaic(
            [feed(spoilt(photo) if i == cell else good) for i in range(9 if cell > 3 else 4)], size=20
        )

    def values(*rows):
        return [np.array(row, np.int32) for row in rows]

    def centered(*rows):
        return lambda: nemo_dali.fn.mosaic([feed(good)] * 4, size=20, center=feed(values(*rows)))

    def mask(**options):
        nodes = {name: feed(value) if isinstance(value, list) else value for name, value in options.items()}
        return nemo_dali.fn.remap_mask(**{"runs": feed(runs), "shape": (2, 3), "size": 20, **nodes})

    def lengths(*third):
        return lambda: mask(runs=values([1, 2, 3], [], third))

    return {
        "four channels": (at(1, np.zeros((4, 4, 4), np.uint8)), r"sample 2 .*: images\[1\] has 4 channels"),
        "one channel": (at(7, np.zeros((4, 4, 1), np.uint8)), r"sample 2 .*: images\[7\] has 1 channels"),
        "no pixels": (at(8, np.zeros((4, 0, 3), np.uint8)), r"sample 2 .*: images\[8\] has no pixels"),
        "left": (centered((0, 0), (-1, 3), (5, 5)), r"sample 1 .*: center's x \(-1\) must be"),
        "below": (centered((0, 0), (20, 20), (5, 21)), r"sample 2 .*: center's y \(21\) must be"),
        "three values": (centered(*[(1, 2, 3)] * 3), r"center must have two values"),
        "mask's center": (
            lambda: mask(grid=2, center=values((0, 0), (-1, 3), (5, 5))),
            r"remap_mask, sample 1 .*: center's x \(-1\) must be",
        ),
        "cell": (lambda: mask(grid=2, cell=values([0], [3], [4])), r"sample 2 .*: cell \(4\) must be"),
        "negative cell": (lambda: mask(grid=2, cell=values([0], [-1], [3])), r"sample 1 .*: cell \(-1\) must be"),
        "two cells": (lambda: mask(grid=2, cell=values(*[(0, 1)] * 3)), r"cell must have one value, not 2"),
        "short shape": (lambda: mask(shape=values(*[[5]] * 3)), r"shape must begin with the photo's height and width"),
        "too few pixels": (lengths(1, 2), r"sample 2 .*: runs add up to 3 pixels, but must"),
        "too many pixels": (lengths(1, 2, 4), r"sample 2 .*: runs add up to 7 pixels, but must"),
        "far too many pixels": (lengths(*[2**31 - 1] * 9), r"sample 2 .*: runs add up to 2147483647 pixels"),
        "one run": (lengths(5), r"sample 2 .*: runs add up to 5 pixels"),
        "negative run": (lengths(1, -2, 7), r"sample 2 .*: runs\[1\] is negative"),
        "negative run, the others right": (lengths(1, 5, -1), r"sample 2 .*: runs\[2\] is negative"),
        "another photo's runs": (lambda: mask(shape=values([2, 3], [3, 2], [3, 3])), r"sample 2 .*: runs add up to 6"),
        "no photo": (lambda: mask(shape=values([1, 1], [0, 5], [1, 1])), r"sample 1 .*: shape must begin"),
    }
