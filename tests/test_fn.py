"""The operators for pipelines of the user's own, on the CPU, against the oracle."""

import re

import numpy as np
import pycocotools.mask
import pytest
import torch
from numba import njit
from numba.core import event
from nvidia.dali import Pipeline, fn, types
from PIL import Image

import nemo_dali.fn
from nemo_dali.kernels import reference
from tests.helpers.lanes import lanes
from tests.helpers.operator_graphs import (
    BATCH,
    CENTERS,
    CONDITIONS,
    DTYPES,
    MEAN,
    RESAMPLINGS,
    STD,
    assert_conditionals_work,
    assert_equal,
    failures,
    feed,
    oracle,
    random_photos,
    random_runs,
    run,
)
from tests.helpers.paths import ROOT

DOCUMENTATION = ROOT / "docs" / "operators.md"


@pytest.mark.parametrize("resample", RESAMPLINGS)
@pytest.mark.parametrize("cells", lanes([1, 4, 9], fast=[4]))
def test_mosaics_are_the_oracles_on_every_thread_and_step(cells, resample):
    """All dtypes and layouts side by side, made ahead, from photos that differ in size from sample to sample."""
    random = np.random.default_rng(cells)
    steps = [random_photos(random, cells) for _ in range(3)]
    kinds = [(dtype, last) for dtype in DTYPES for last in (False, True)]

    def graph():
        photos = [feed(*(step[i] for step in steps)) for i in range(cells)]
        options = {"size": 97, "resample": resample}
        return tuple(nemo_dali.fn.mosaic(photos, dtype=d, channels_last=last, **options) for d, last in kinds)

    outputs, layouts = run(graph, steps=3, num_threads=3, prefetch_queue_depth=3)
    assert layouts == ["HWC" if last else "CHW" for _, last in kinds]
    for step, output in zip(steps, outputs, strict=True):
        for (dtype, last), frames in zip(kinds, output, strict=True):
            expected = [oracle(step, i, dtype=dtype, size=97, resample=resample, last=last)[0] for i in range(BATCH)]
            assert_equal(frames, expected)


@pytest.mark.parametrize("resample", RESAMPLINGS)
def test_the_crossing_can_lie_anywhere_and_move_from_sample_to_sample(resample):
    random = np.random.default_rng(1)
    photos = random_photos(random, 4)
    runs = [[random_runs(random, *photo.shape[:2]) for photo in batch] for batch in photos]
    moving = [np.array(center, np.int64) for center in CENTERS[-BATCH:]]

    def graph():
        nodes, counts = [feed(batch) for batch in photos], [feed(batch) for batch in runs]
        options = {"size": 64, "resample": resample}
        outputs = []
        for center in (*CENTERS, feed(moving)):
            outputs.append(nemo_dali.fn.mosaic(nodes, center=center, **options))
            for cell in range(4):
                size_of = nodes[cell].shape()
                outputs.append(
                    nemo_dali.fn.remap_mask(counts[cell], size_of, cell=cell, grid=2, center=center, **options)
                )
        return tuple(outputs)

    (outputs,), _ = run(graph)
    for number, centers in enumerate([*([center] * BATCH for center in CENTERS), [tuple(c) for c in moving]]):
        for cell in range(4):
            for i in range(BATCH):
                frame, mask = oracle(
                    photos, i, size=64, center=centers[i], resample=resample, counts=runs[cell][i], cell=cell
                )
                assert_equal([outputs[5 * number][i], outputs[5 * number + 1 + cell][i]], [frame, mask])


@pytest.mark.parametrize("resample", RESAMPLINGS)
@pytest.mark.parametrize("grid", [1, 2, 3])
def test_masks_are_the_oracles_in_every_cell(grid, resample):
    """Objects, nothing (said in three ways) and the whole photo; shapes with channels behind them, as decoders say."""
    random = np.random.default_rng(grid)
    photos = random_photos(random, grid * grid)
    pixels = [photo.shape[0] * photo.shape[1] for photo in photos[0]]
    special = [[np.array(counts, np.uint32) for counts in ([], [p], [p, 0], [0, p])] for p in pixels]
    dtypes = ["uint8", "int64", "float32"]

    def runs_of(cell):
        return [random_runs(random, *photo.shape[:2]) for photo in photos[cell]]

    kinds = [(cell, runs_of(cell)) for cell in range(grid * grid)]
    kinds += [(0, [counts[k] for counts in special]) for k in range(4)]

    def graph():
        return tuple(
            nemo_dali.fn.remap_mask(
                feed(runs),
                feed([np.array(photo.shape) for photo in photos[cell]]),
                cell=cell,
                grid=grid,
                size=71,
                resample=resample,
                dtype=dtypes[number % 3],
            )
            for number, (cell, runs) in enumerate(kinds)
        )

    (outputs,), layouts = run(graph)
    assert set(layouts) == {"HW"}
    for number, (cell, runs) in enumerate(kinds):
        for i in range(BATCH):
            if len(runs[i]):
                _, mask = oracle(photos, i, size=71, resample=resample, counts=runs[i], cell=cell)
            else:
                mask = np.zeros((71, 71), np.uint8)
            assert_equal([outputs[number][i]], [mask.astype(dtypes[number % 3])])


def test_cells_and_shapes_can_come_with_the_samples_or_be_constants():
    random = np.random.default_rng(2)
    photos = [random.integers(0, 256, (40, 30, 3), dtype=np.uint8) for _ in range(BATCH)]
    runs = [random_runs(random, 40, 30).astype(np.int32) for _ in photos]
    cells = [np.array(cell, np.int64) for cell in (8, 0, 5)]

    def graph():
        options = {"grid": 3, "size": 50}
        return (
            nemo_dali.fn.remap_mask(feed(runs), (40, 30), cell=feed(cells), **options),
            nemo_dali.fn.remap_mask(feed(runs), (40, 30, 3), cell=feed([cell[None] for cell in cells]), **options),
        )

    ((scalars, ones),), _ = run(graph)
    expected = [oracle([photos] * 9, i, size=50, counts=runs[i], cell=int(cells[i]))[1] for i in range(BATCH)]
    assert_equal(scalars, expected)
    assert_equal(ones, expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_frame_may_be_smaller_than_its_grid(size):
    photos = random_photos(np.random.default_rng(size), 9)
    (((frames,),), _) = run(lambda: nemo_dali.fn.mosaic([feed(batch) for batch in photos], size=size))
    assert_equal(frames, [oracle(photos, i, size=size)[0] for i in range(BATCH)])


def test_mean_and_std_are_the_callers():
    photos = random_photos(np.random.default_rng(4), 1)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    (((frames,),), _) = run(lambda: nemo_dali.fn.mosaic([feed(photos[0])], size=31, mean=mean, std=std))
    pixels, _ = run(lambda: nemo_dali.fn.mosaic([feed(photos[0])], size=31, dtype="uint8"))
    for frame, uint8 in zip(frames, pixels[0][0], strict=True):
        value = torch.from_numpy(uint8).float().div(255)
        expected = (value - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert np.array_equal(frame, expected.numpy())


@pytest.mark.parametrize("flags", CONDITIONS)
def test_they_work_inside_conditionals(flags):
    assert_conditionals_work(flags)


def test_building_a_pipeline_compiles_nothing():
    photos = random_photos(np.random.default_rng(6), 4)
    runs = [np.array([3, 2, 20], np.uint32)] * BATCH
    with event.install_recorder("numba:run_pass") as compiled:
        run(
            lambda: (
                nemo_dali.fn.mosaic([feed(batch) for batch in photos], size=33),
                nemo_dali.fn.mosaic([feed(batch) for batch in photos], size=34, dtype="uint8", channels_last=True),
                nemo_dali.fn.remap_mask(feed(runs), (5, 5), size=35),
            )
        )
        assert not compiled.buffer
        njit(lambda x: x)(1)
        assert compiled.buffer


@pytest.mark.parametrize("name", failures())
def test_a_sample_that_cannot_be_drawn_is_named(name):
    graph, text = failures()[name]
    with pytest.raises(RuntimeError, match=text):
        run(graph)


def test_a_pipeline_goes_on_behind_a_bad_batch():
    photos = random_photos(np.random.default_rng(8), 1)[0]
    gray = [np.zeros((3, 3, 1), np.uint8)] * BATCH
    pipe = Pipeline(batch_size=BATCH, num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipe:
        pipe.set_outputs(nemo_dali.fn.mosaic([feed(photos, gray, photos)], size=24))
    pipe.build()
    pipe.run()
    with pytest.raises(RuntimeError, match="1 channels"):
        pipe.run()
    (frames,) = pipe.run()
    assert_equal([np.array(frames[i]) for i in range(BATCH)], [oracle([photos], i, size=24)[0] for i in range(BATCH)])


WRONG = {
    "images (2 of them) must be 1, 4 or 9": lambda photo, runs: nemo_dali.fn.mosaic([photo] * 2),
    "dtype ('bfloat16') must be one of": lambda photo, runs: nemo_dali.fn.mosaic([photo], dtype="bfloat16"),
    "resample ('cubic') must be one of": lambda photo, runs: nemo_dali.fn.mosaic([photo], resample="cubic"),
    "size (0) must be an integer >= 1": lambda photo, runs: nemo_dali.fn.mosaic([photo], size=0),
    "size (9.5) must be an integer": lambda photo, runs: nemo_dali.fn.mosaic([photo], size=9.5),
    "mean ((1, 2)) must be three numbers": lambda photo, runs: nemo_dali.fn.mosaic([photo], mean=(1, 2)),
    "std ((1, 0, 1)) must be three": lambda photo, runs: nemo_dali.fn.mosaic([photo], std=(1, 0, 1)),
    "center is where the edges of a 2x2 cross": lambda photo, runs: nemo_dali.fn.mosaic([photo], center=(1, 2)),
    "center ((1, 481)) must be two integers from 0 to 480": (
        lambda photo, runs: nemo_dali.fn.mosaic([photo] * 4, center=(1, 481))
    ),
    "center ([3]) must be two": lambda photo, runs: nemo_dali.fn.mosaic([photo] * 4, center=[3]),
    "grid (4) must be 1, 2 or 3": lambda photo, runs: nemo_dali.fn.remap_mask(runs, (2, 2), grid=4),
    "cell (4) must be an integer from 0 to 3": lambda photo, runs: nemo_dali.fn.remap_mask(
        runs, (2, 2), grid=2, cell=4
    ),
    "dtype ('float16') must be one of": lambda photo, runs: nemo_dali.fn.remap_mask(runs, (2, 2), dtype="float16"),
    "device ('cuda') must be one of": lambda photo, runs: nemo_dali.fn.remap_mask(runs, (2, 2), device="cuda"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_argument_is_refused(text):
    with Pipeline(batch_size=1, num_threads=1, device_id=None), pytest.raises(ValueError, match=re.escape(text)):
        WRONG[text](fn.zeros(shape=[2, 2, 3], dtype=types.UINT8), fn.zeros(shape=[0], dtype=types.UINT32))


def test_the_documentation_makes_run_lengths_as_coco_does():
    lines = re.search(r"(    pixels = .*\n)    (np\.diff.*)\n", DOCUMENTATION.read_text())
    random = np.random.default_rng(10)
    for mask in (*random.integers(0, 2, (20, 5, 7), dtype=np.uint8), np.zeros((3, 4)), np.ones((3, 4), bool)):
        names = {"m": mask, "np": np}
        exec(lines[1].strip(), names)
        runs = eval(lines[2], names)
        coco = pycocotools.mask.frPyObjects({"size": list(mask.shape), "counts": runs.tolist()}, *mask.shape)
        assert runs.dtype == np.uint32 and np.array_equal(pycocotools.mask.decode(coco), mask)


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch):
    """In a folder with photos and run lengths as it describes them."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), flags=re.DOTALL)
    random = np.random.default_rng(9)
    for folder in ("photos", "runs"):
        (tmp_path / folder).mkdir()
    photos, masks = {}, {}
    for i in range(8):
        h, w = random.integers(40, 160, 2)
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((w, h)).save(tmp_path / "photos" / f"{i}.jpg")
        photos[i] = np.array(Image.open(tmp_path / "photos" / f"{i}.jpg"))
        masks[i] = random_runs(random, h, w)
        np.save(tmp_path / "runs" / f"{i}.npy", masks[i])
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    exec(compile(code, "operators.md", "exec"), names)
    images, found = names["image"], names["mask"]
    batch = len(images)
    assert batch > 1
    for i in range(batch):
        image, mask = np.array(images[i]), np.array(found[i])
        _, expected = oracle([[photos[i]]] * 4, 0, size=480, counts=masks[i])
        alone = reference.resize_cv2_linear(photos[i], 240, 240).transpose(2, 0, 1)
        table = reference.normalisation_table(MEAN, STD, "float32")
        assert np.array_equal(image[:, :240, :240], np.stack([table[c][alone[c]] for c in range(3)]))
        assert np.array_equal(mask, expected)
