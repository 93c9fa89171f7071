"""Mutants of the kernels' PTX: the machine sees each barrier, wait, alignment and bound that is left out.

A mutant is caught by a fault of the machine or by a wrong byte; each is tried with several orders of the warps.
"""

import re

import numpy as np
import pytest

from nemo_dali.kernels import cuda_source, reference
from nemo_dali.kernels.gather import cpu as gather_cpu
from nemo_dali.kernels.mosaic import cpu as mosaic_cpu
from nemo_dali.kernels.tile import CV2_LETTERBOX, CV2_LINEAR, PILLOW_BILINEAR, TILE
from tests.helpers.building import needs_compiler
from tests.helpers.mask_batches import random_batch, some_runs
from tests.helpers.ptx import launches
from tests.helpers.ptx.assembler import assemble
from tests.helpers.ptx.machine import Fault

pytestmark = needs_compiler
LIMIT = 10**7  # issues; a mutant may never end
SEEDS = range(4)


def anywhere(array, skew):
    """A copy that begins so many bytes behind a multiple of 128."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    begin = -memory.ctypes.data % 128 + skew
    copy = memory[begin : begin + array.nbytes].reshape(array.shape)
    copy[:] = array
    return copy


class Scene:
    """Cells of some photos, what they must become, and the launch that makes it.

    Args:
        kernels: "mosaic", "gather" or "letterbox".
        photos: heights and widths. cells: boxes (y0, x0, y1, x1) in frames of their own.
        multiple: of pixels, that a row of the frames has.
    """

    def __init__(self, kernels, photos, cells, *, resample=CV2_LINEAR, dtype="float16", multiple=1, last=False):
        random = np.random.default_rng(0)
        self.launch = getattr(launches, kernels)
        self.table = np.ascontiguousarray(reference.normalisation_table((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), dtype))
        height, width = (max(cell[edge] for cell in cells) + 3 for edge in (2, 3))
        width = -(-width // multiple) * multiple
        shape = (height, width, 3) if last else (3, height, width)
        self.frames = np.full((len(cells), *shape), 7, self.table.dtype)
        self.masks = np.full((len(cells), height, width), 7, np.uint8)
        expected_frames, expected_masks = self.frames.copy(), self.masks.copy()
        tiles = np.zeros(len(cells), TILE)
        for name, column in zip(("y0", "x0", "y1", "x1"), np.transpose(cells), strict=True):
            tiles[name] = column
        tiles["frame_height"], tiles["frame_width"] = height, width
        tiles["photo_height"], tiles["photo_width"] = np.transpose(photos)
        tiles["itemsize"], tiles["resample"] = self.table.itemsize, resample
        tiles["table"], tiles["channels_last"] = self.table.ctypes.data, last
        self.runs = [some_runs(random, h * w) for h, w in photos]
        if kernels == "gather":
            shapes = [(3, y1 - y0, x1 - x0) for y0, x0, y1, x1 in cells]
        else:
            shapes = [(h, w, 3) for h, w in photos]
        if kernels == "letterbox":
            tiles["runs"], tiles["run_count"] = [a.ctypes.data for a in self.runs], [a.size for a in self.runs]
        self.photos = [anywhere(random.integers(0, 256, shape, np.uint8), 16 * i + 5) for i, shape in enumerate(shapes)]
        tiles["photo"] = [photo.ctypes.data for photo in self.photos]
        for index, photo in enumerate(self.photos):
            tiles["image"][index] = expected_frames[index].ctypes.data
            tiles["mask"][index] = expected_masks[index].ctypes.data
            if kernels == "gather":
                gather_cpu.write_sample(tiles[index : index + 1])
            else:
                assert mosaic_cpu.write_tile(tiles[index], photo) == mosaic_cpu.DONE
            tiles["image"][index], tiles["mask"][index] = self.frames[index].ctypes.data, self.masks[index].ctypes.data
        self.tiles, self.expected = tiles, expected_frames.tobytes()
        self.expected += expected_masks.tobytes() if kernels == "letterbox" else b""

    def draw(self, architecture, text, seed):
        """Whether the launch makes what it must, and the issues of each instruction."""
        self.frames[:], self.masks[:] = 7, 7
        counts = self.launch(self.tiles, architecture, text=text, seed=seed, limit=LIMIT).counts
        right = (self.frames.tobytes() + self.masks.tobytes()).startswith(self.expected)
        return right, counts["issues"]


class Masks:
    """A batch of masks, likewise."""

    def __init__(self, seed):
        self.batch = random_batch(seed, largest_frame=150, largest_photo=90, samples=2)

    def draw(self, architecture, text, seed):
        found, counted = launches.masks(self.batch, architecture, text=text, seed=seed, limit=LIMIT)
        return np.array_equal(found, self.batch.expected()), counted.counts["issues"]


# Cells of several parts and steps, photos that are enlarged and made smaller, by a little and so far that a step does
# not fit into the stage; one column with more taps than are kept.
PHOTOS = [(61, 83), (200, 37), (31, 1900)]
LAYOUTS = [{}, {"multiple": 16}, {"last": True, "multiple": 16}, {"last": True}]
CELLS = [(1, 2, 60, 150), (0, 3, 33, 20), (2, 0, 50, 17)]
SCENES = {
    "cv2_linear_2": lambda: [Scene("mosaic", PHOTOS, CELLS, **layout) for layout in LAYOUTS],
    "cv2_linear_4": lambda: [Scene("mosaic", PHOTOS, CELLS, dtype="float32", **layout) for layout in LAYOUTS],
    "pillow_bilinear_2": lambda: [
        Scene("mosaic", [*PHOTOS, (9, 8000)], [*CELLS, (0, 0, 4, 1)], resample=PILLOW_BILINEAR, **layout)
        for layout in LAYOUTS
    ],
    "gather_2": lambda: [Scene("gather", PHOTOS, CELLS, **layout) for layout in LAYOUTS],
    "letterbox_2": lambda: [Scene("letterbox", PHOTOS, CELLS, resample=CV2_LETTERBOX)],
    "write_masks": lambda: [Masks(seed) for seed in (0, 6)],
}
SOURCES = {"cv2": "mosaic", "pillow": "mosaic", "gather": "gather", "letterbox": "letterbox"}


def source_of(kernel):
    return getattr(launches, f"{SOURCES[kernel.split('_')[0]]}_gpu").SOURCE


def text_of(kernel, architecture):
    """The PTX of this kernel alone."""
    if kernel == "write_masks":
        return launches.mask_ptx_of("uint8", architecture)
    return only(launches.ptx_of(source_of(kernel), architecture), kernel)


def only(text, kernel):
    return re.sub(
        r"\.(?:visible\s+)?\.?entry\s+(\w+)\s*\([^)]*\)[^{]*\{.*?\n\}",
        lambda found: found[0] if found[1] == kernel else "",
        text,
        flags=re.DOTALL,
    )


def is_caught(scenes, architecture, text):
    for scene in scenes:
        for seed in SEEDS:
            try:
                if not scene.draw(architecture, text, seed)[0]:
                    return True
            except Fault:
                return True
    return False


def mutants_of(text, pattern, replacement):
    """The text with one match replaced, for each match in turn, and the line that it is on."""
    for found in re.finditer(pattern, text):
        mutant = text[: found.start()] + found.expand(replacement) + text[found.end() :]
        yield text.count("\n", 0, found.start()) + 1, mutant


FAST = ("cv2_linear_2", "gather_2", "write_masks")
KERNELS = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in SCENES]


@pytest.fixture(scope="module")
def scenes():
    return {}


def check(kept, kernel, architecture, pattern, replacement, *, reached):
    """Every mutant of what the scenes reach is caught, and they reach at least this share of all."""
    if kernel not in kept:
        kept[kernel] = SCENES[kernel]()
    scenes, text = kept[kernel], text_of(kernel, architecture)
    assembled, issues = assemble(text)[kernel], 0
    for scene in scenes:
        for seed in SEEDS:
            right, counts = scene.draw(architecture, text, seed)
            assert right
            issues = issues + counts
    issued = set(assembled.lines[issues > 0].tolist())
    mutants = list(mutants_of(text, pattern, replacement))
    tried = [(line, mutant) for line, mutant in mutants if line in issued]
    assert len(tried) >= max(reached * len(mutants), 1), [line for line, _ in mutants if line not in issued]
    survivors = [line for line, mutant in tried if not is_caught(scenes, architecture, mutant)]
    lines = text.splitlines()
    assert not survivors, [(line, lines[line - 1]) for line in survivors]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_barrier_that_is_left_out(scenes, kernel):
    check(scenes, kernel, "80", r"\bbar(rier)?\.sync\s[^;]*;", "", reached=1)


@pytest.mark.parametrize("kernel", KERNELS[:-1])
def test_a_wait_that_is_left_out(scenes, kernel):
    check(scenes, kernel, "80", r"cp\.async\.wait_(all|group)[^;]*;", "", reached=1)


@pytest.mark.parametrize(
    "kernel", [pytest.param(name, marks=[pytest.mark.slow] * (name != "gather_2")) for name in [*SCENES][:-1]]
)
def test_an_alignment_that_is_missed(scenes, kernel):
    check(
        scenes,
        kernel,
        "80",
        r"((?:cp\.async\.c\w|\b(?:ld|st)\.[\w.:]*v4)[^;]*?\[%\w+)(?:\+(\d+))?\]",
        r"\1+4]",
        reached=0.6,
    )


@pytest.mark.parametrize("kernel", [name for name in KERNELS if "cv2_linear_2" in name.values])
def test_lanes_of_a_warp_that_do_not_wait_for_each_other(scenes, kernel):
    check(scenes, kernel, "80", r"\bbar\.warp\.sync[^;]*;", "", reached=1)


# In the sources: what is left out, and what is left.
BOUNDS = [
    ("if (at >= low && at + 16 <= high) {", "if (at + 16 <= high) {"),
    ("if (at >= low && at + 16 <= high) {", "if (at >= low) {"),
    ("i < min(at + 16, high); i++", "i < at + 16; i++"),
    ("int i = max(at, low);", "int i = at;"),
]


@pytest.mark.parametrize("kernel", [pytest.param("gather_2"), pytest.param("cv2_linear_2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("bound", "rest"), BOUNDS)
def test_a_bound_that_is_left_out(scenes, kernel, bound, rest):
    source = cuda_source.text_of(source_of(kernel))
    assert source.count(bound) == 1
    if kernel not in scenes:
        scenes[kernel] = SCENES[kernel]()
    mutant = launches.compile_text(source.replace(bound, rest), "80")
    assert is_caught(scenes[kernel], "80", only(mutant, kernel))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["75", "90"])
def test_barriers_on_other_architectures(scenes, architecture):
    for kernel in ("cv2_linear_2", "pillow_bilinear_2", "gather_2"):
        check(scenes, kernel, architecture, r"\bbar(rier)?\.sync\s[^;]*;", "", reached=1)
