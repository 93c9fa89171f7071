"""Photos that are bad, met while training: replaced, tried again, or told."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.loader import _faults as faults
from nemo_dali.loader.loader import Loader
from nemo_dali.pipeline.decoder_check import refused
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers import fork_server
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.files import make_files
from tests.helpers.oracles import by_hand

EVERY_KIND = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, jitter=0.5, top_k=10)
SIZE = 32  # small enough for jitter to leave cells without pixels


def make(files, **options):
    defaults = {"batch_size": 4, "size": SIZE, "dtype": "uint8", "policy": EVERY_KIND, "context_length": 16}
    return Loader(files.dataset, files.negatives, **{**defaults, "on_error": "substitute", **options})


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_size(path):
    Image.open(path).resize((33, 35)).save(path)


DAMAGES = {
    "missing": Path.unlink,
    "truncated": truncated,
    "garbage": lambda path: path.write_bytes(b"not a photo" * 50),
    "empty": lambda path: path.write_bytes(b""),
    "another size": of_another_size,
}


def damage(files, count, seed=0):
    """Damage some photos, each in another way; bool [photos]."""
    dataset = Dataset.open(files.dataset)
    bad = np.zeros(len(dataset.images.id), bool)
    for number, photo in enumerate(np.random.default_rng(seed).choice(len(bad), count, replace=False)):
        list(DAMAGES.values())[number % len(DAMAGES)](Path(dataset.photo_path(photo)))
        bad[photo] = True
    return bad


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Files of which a quarter of the photos are bad, and which: bool [photos]."""
    files = make_files(tmp_path_factory.mktemp("damaged"), photos=32)
    return files, damage(files, 8)


@pytest.fixture
def pauses(monkeypatch):
    slept = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    return slept


def told_before(loader, bad):
    """The rows of the loader's epoch 0 for somebody who knows all bad photos."""
    rows = loader.plan(0, np.arange(len(loader) * loader.batch_size * loader.world_size))
    return loader._planner.substitute(0, rows, bad)


def test_every_sample_is_the_one_of_a_run_that_knew_all_bad_photos(damaged, caplog):
    files, bad = damaged
    loader, dataset = make(files), Dataset.open(files.dataset)
    batches = list(loader)
    assert len(batches) == len(loader) == 16
    expected, replaced = told_before(loader, bad)
    assert np.array_equal(np.concatenate([batch.plan for batch in batches]), expected)
    for batch in batches:
        for image, mask, row in zip(batch.image.numpy(), batch.mask.numpy(), batch.plan, strict=True):
            shown = row.copy()
            shown["images"][bad[row["images"]] & (row["images"] >= 0)] = np.flatnonzero(~bad)[0]  # without pixels
            expected_image, expected_mask = by_hand(dataset, shown, SIZE, "cv2-linear")
            assert np.array_equal(image, expected_image) and np.array_equal(mask, expected_mask)
        assert batch.sentences == [dataset.sentences.text[row] for row in batch.plan["sentence"]]
        assert batch.ref_ids == dataset.refs.ref_id[batch.plan["ref"]].tolist()
        assert torch.equal(batch.tokens, loader.text_of(batch.plan)[0])
    summary = loader.substituted
    assert (summary.targets, summary.negatives) == (replaced.targets, replaced.negatives)
    assert summary.targets > 0 and summary.negatives > 0
    paths = {dataset.photo_path(photo) for photo in np.flatnonzero(bad)}
    assert set(summary.photos) == paths
    for path in paths:
        assert caplog.text.count(f"{path} (") == 1  # one warning a photo
    told = f"Epoch 0: {replaced.targets} targets and {replaced.negatives} negatives were replaced by others; 8 bad"
    assert told in caplog.text


@pytest.mark.slow
def test_neither_ranks_nor_prefetching_nor_resumes_nor_the_order_of_faults_matter(damaged):
    files, bad = damaged
    expected, _ = told_before(make(files, batch_size=8), bad)
    steps = expected.reshape(8, 8)
    for world, prefetch in ((1, 1), (2, 3), (4, 2)):
        ranks = [make(files, batch_size=8 // world, rank=r, world_size=world, prefetch=prefetch) for r in range(world)]
        for step, batches in zip(steps, zip(*ranks, strict=True), strict=True):
            assert np.array_equal(np.concatenate([batch.plan for batch in batches]), step)
    state = make(files, batch_size=8).state_dict()
    for begin in reversed(range(1, 8)):  # faults are met in another order by every one of these
        loader = make(files, batch_size=8)
        loader.load_state_dict({**state, "samples_seen": 8 * begin})
        assert np.array_equal(np.concatenate([batch.plan for batch in loader]), expected[8 * begin :])


def test_pixels_are_those_of_a_run_that_met_the_faults_before(damaged):
    files, _ = damaged
    first = make(files)
    met = list(first)
    first.set_epoch(0)
    known = list(first)
    for one, other in zip(met, known, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
        assert one.plan.tobytes() == other.plan.tobytes()


@pytest.mark.parametrize("kind", ["single", "random", "mined"])
def test_every_kind_of_sample_is_mended(damaged, kind):
    files, bad = damaged
    policy = MosaicPolicy(p_mined=kind == "mined", p_random=kind == "random", top_k=5)
    loader = make(files, policy=policy)
    before = loader.plan(0, np.arange(64))
    after = np.concatenate([batch.plan for batch in loader])
    shown = after["images"][after["images"] >= 0]
    assert not bad[shown].any() and bad[before["images"][before["images"] >= 0]].any()
    assert np.array_equal(after["kind"], before["kind"]) and np.array_equal(after["position"], np.arange(64))


@needs_compiler
def test_it_works_on_a_gpus_way_too(damaged, played):
    files, bad = damaged
    loader = make(files, device="cuda")
    expected, _ = told_before(loader, bad)
    assert np.array_equal(np.concatenate([batch.plan for batch in loader]), expected)
    loader.set_epoch(0)
    host = make(files)
    for one, other in zip(loader, host, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)


def test_a_photo_that_pillow_alone_refuses_is_shown(tmp_path):
    """Else it would depend on its neighbours in the batch whether it counts as bad."""
    files = make_files(tmp_path, photos=8)
    dataset = Dataset.open(files.dataset)
    path = Path(dataset.photo_path(3))
    width, height = int(dataset.images.width[3]), int(dataset.images.height[3])
    deep = np.random.default_rng(0).integers(0, 2**16, (height, width), np.uint16)
    Image.fromarray(deep).save(path, format="PNG")
    Path(dataset.photo_path(5)).unlink()
    loader = make(files, policy=MosaicPolicy(p_mined=1, grids={2: 1}), batch_size=16)
    (batch,) = loader
    assert 3 in batch.plan["images"] and 5 not in batch.plan["images"]
    assert set(loader.substituted.photos) == {dataset.photo_path(5)}


@pytest.mark.parametrize("refuse", ["all", "all but three"])
def test_when_nothing_is_left_there_is_one_error_and_no_endless_loop(tmp_path, refuse):
    files = make_files(tmp_path, photos=8)
    for path in sorted(files.photos.iterdir())[0 if refuse == "all" else 3 :]:
        path.unlink()
    loader = make(files, policy=MosaicPolicy(p_mined=1))
    with pytest.raises(NemoError, match="can be read") as error:
        list(loader)
    assert not isinstance(error.value, PhotoError)


def test_a_folder_of_photos_that_went_away_is_waited_for(tmp_path, pauses):
    files = make_files(tmp_path, photos=12)
    loader = make(files)
    passes = iter(loader)
    next(passes)
    files.photos.rename(tmp_path / "elsewhere")
    with pytest.raises(PhotoError, match="cannot be opened"):
        list(passes)
    assert len(pauses) == 3 and not loader.substituted.photos


@pytest.mark.process
@pytest.mark.slow
def test_a_photo_without_a_header_does_not_end_the_process(tmp_path):
    """DALI's decoder parses headers on several threads, and crashed now and then where the last one fails."""
    files = make_files(tmp_path, photos=8)
    first, *others = sorted(map(str, files.photos.iterdir()))
    Path(first).write_bytes(b"not a photo" * 50)
    code = f"""
import numpy as np
from nemo_dali.kernels.tile import TILE
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.paths import encode_path
paths = [encode_path(path) for path in {others!r} * 30] + [encode_path({first!r})]
pipeline = StreamPipeline(max_cells=211, num_threads=32, prefetch=1)
for _ in range(300):
    pipeline.feed(paths, np.zeros(211, TILE), None)
    try:
        pipeline.wait()
    except RuntimeError:
        print("failed")
pipeline.close()
"""
    done = fork_server.run(code)
    assert (done.returncode, done.stdout.count("failed")) == (0, 300), done.stderr[-2000:]


def test_by_default_the_error_names_photo_and_ref(damaged):
    files, bad = damaged
    loader, dataset = make(files, on_error="raise"), Dataset.open(files.dataset)
    with pytest.raises(PhotoError) as error:
        list(loader)
    position = int(str(error.value).split("position ")[1].split(" ")[0])
    (row,) = loader.plan(0, [position])
    assert position // 4 == loader.state_dict()["samples_seen"] // 4
    (named,) = [photo for photo in np.flatnonzero(bad) if f"{dataset.photo_path(photo)} (" in str(error.value)]
    assert named in row["images"]
    part = "the photo" if row["images"][row["cell"]] == named else "a negative"
    assert f"it is {part} of ref {dataset.refs.ref_id[row['ref']]} at position" in str(error.value)
    assert "on_error='substitute'" in str(error.value)
    assert loader.substituted.photos == {} and loader.substituted.targets == 0


def test_an_unknown_way_to_treat_errors_is_refused(files):
    with pytest.raises(ValueError, match="on_error"):
        make(files, on_error="ignore")


def test_what_dali_refuses_is_found_among_many(damaged):
    files, bad = damaged
    dataset = Dataset.open(files.dataset)
    paths = [dataset.photo_path(photo) for photo in range(len(bad))]
    found = refused(paths, dataset.images.width, dataset.images.height, num_threads=1)
    assert sorted(found) == np.flatnonzero(bad).tolist()


# Fails the first calls that open a photo, for this process as a whole, as a disk would.
FAILING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static atomic_int failed;
static int fails(const char *path) {
    const char *name = getenv("FAILING_NAME");
    if (!name || !strstr(path, name) || atomic_fetch_add(&failed, 1) >= atoi(getenv("FAILING_TIMES"))) return 0;
    errno = atoi(getenv("FAILING_ERRNO"));
    return 1;
}
#define FOPEN(name) FILE *name(const char *path, const char *mode) { \\
    FILE *(*real)(const char *, const char *) = dlsym(RTLD_NEXT, #name); \\
    return fails(path) ? NULL : real(path, mode); }
FOPEN(fopen)
FOPEN(fopen64)
#define OPEN(name) int name(const char *path, int flags, ...) { \\
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \\
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \\
    return fails(path) ? -1 : real(path, flags, mode); }
OPEN(open)
OPEN(open64)
"""

CHILD = """
import logging, sys
from nemo_dali import Loader, MosaicPolicy, NemoError
from nemo_dali.loader import _faults as faults
logging.basicConfig(format="%(message)s")
faults.PAUSES = (0.01, 0.02, 0.03)
dataset, negatives, on_error = sys.argv[1:]
policy = MosaicPolicy(p_mined=1)
loader = Loader(dataset, negatives, batch_size=4, size=32, policy=policy, on_error=on_error, context_length=16)
try:
    print(len(list(loader)))
except NemoError as error:
    print(type(error).__name__, error)
print(len(loader.substituted.photos))
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A library that makes the opening of photos fail, for LD_PRELOAD."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.c").write_text(FAILING)
    built = folder / "failing.so"
    command = ["gcc", "-shared", "-fPIC", "-o", built, folder / "failing.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return built


def run_failing(library, files, on_error, errno, times):
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAILING_NAME": "/photos/COCO"}
    environment |= {"FAILING_ERRNO": str(errno), "FAILING_TIMES": str(times)}
    arguments = [sys.executable, "-c", CHILD, files.dataset, files.negatives, on_error]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.process
@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("on_error", ["raise", "substitute"])
def test_a_hiccup_of_the_disk_is_tried_again_and_replaces_nothing(files, failing, on_error):
    printed, told = run_failing(failing, files, on_error, errno=5, times=20)  # EIO
    assert printed == ["12", "0"]
    assert "is retried" in told


@pytest.mark.process
@pytest.mark.slow
@needs_compiler
def test_a_disk_that_stays_unreadable_is_told_after_three_tries(files, failing):
    printed, told = run_failing(failing, files, "substitute", errno=116, times=10**6)  # ESTALE
    assert printed[0].startswith("PhotoError A photo cannot be opened") and "Stale file handle" in printed[0]
    assert printed[1] == "0" and told.count("is retried") == 3


def fail_reading(monkeypatch, times, message="Error in CPU operator `nvidia.dali.fn.io.file.read`,"):
    """Let DALI's next batches fail, as if the disk had been away for a moment."""
    from nvidia.dali import Pipeline

    real, left = Pipeline.share_outputs, [times]

    def share_outputs(self, *arguments, **options):
        outputs = real(self, *arguments, **options)
        if left[0] and self.max_batch_size == 36:  # the loader's pipeline, not the one that looks at photos
            left[0] -= 1
            self.release_outputs()
            raise RuntimeError(f"{message} encountered:\n\nthe disk hiccups\nCurrent pipeline object is gone")
        return outputs

    monkeypatch.setattr(Pipeline, "share_outputs", share_outputs)


@pytest.mark.parametrize("on_error", ["raise", "substitute"])
def test_three_tries_with_growing_pauses(files, monkeypatch, pauses, caplog, on_error):
    expected = [batch.image for batch in make(files)]
    fail_reading(monkeypatch, 3)
    loader = make(files, on_error=on_error, prefetch=1)
    passes = iter(loader)
    images = [next(passes).image]
    assert pauses == list(faults.PAUSES) and sum(pauses) < 4 and pauses == sorted(pauses)
    assert caplog.text.count("is retried") == 3 and "the disk hiccups." in caplog.text
    images += [batch.image for batch in passes]
    assert len(images) == 12 and all(map(torch.equal, images, expected))
    assert len(pauses) == 3 and not loader.substituted.photos


@pytest.mark.parametrize("on_error", ["raise", "substitute"])
def test_a_fourth_failure_is_the_error(files, monkeypatch, pauses, on_error):
    fail_reading(monkeypatch, 4)
    with pytest.raises(NemoError, match="every photo of the batch can be read: the disk hiccups"):
        list(make(files, on_error=on_error, prefetch=1))
    assert len(pauses) == 3


def test_what_no_second_try_can_mend_is_told_at_once(files, monkeypatch, pauses):
    fail_reading(monkeypatch, 1, message="bad_alloc in `nvidia.dali.fn.decoders.image`")
    with pytest.raises(NemoError, match="out of memory"):
        list(make(files))
    fail_reading(monkeypatch, 1, message="Error in GPU operator `DLTensorPythonFunction`,")
    with pytest.raises(NemoError, match="the disk hiccups"):
        list(make(files))
    assert not pauses
