"""Batches in flight: what is fed when, and what is left when something fails."""

import re

import numpy as np
import pytest
from PIL import Image

from nemo_dali.errors import NemoError
from nemo_dali.kernels.mosaic.cpu import DONE
from nemo_dali.kernels.tile import TILE
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.overlap import Fed, in_flight
from nemo_dali.pipeline.paths import encode_path
from tests.helpers.paths import ROOT


class Noted(StreamPipeline):
    """A pipeline that notes what is asked of it; batches are numbers."""

    def __init__(self, **options):
        super().__init__(max_cells=1, num_threads=1, **options)
        self.notes = []

    def feed(self, paths, work, keep, **options):
        self.notes.append(f"feed {keep}")
        super().feed(paths, work, keep, **options)

    def wait(self):
        self.notes.append(f"wait {self.oldest}")
        return super().wait()


@pytest.fixture
def photo(tmp_path):
    """Paths of a photo and of what is none."""
    Image.new("RGB", (6, 4)).save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    return {name: [encode_path(str(tmp_path / f"{name}.jpg"))] for name in ("good", "bad")}


def tiles():
    made = np.zeros(1, TILE)  # an empty box: nothing is written
    made["photo_height"], made["photo_width"] = 4, 6
    return made


def batches(photo, count, notes, bad=()):
    for number in range(count):
        notes.append(f"make {number}")
        yield Fed(photo["bad" if number in bad else "good"], tiles(), number)


def test_the_next_is_fed_when_one_has_landed_and_before_it_is_given(photo):
    pipeline = Noted(prefetch=2)
    notes = pipeline.notes
    made = in_flight(
        pipeline, batches(photo, 4, notes), prefetch=2, land=lambda keep, status: notes.append(f"land {keep} {status}")
    )
    assert notes == []
    for number, status in made:
        assert status.tolist() == [DONE]
        notes.append(f"given {number}")
    landed = {number: [f"wait {number}", f"land {number} [{DONE}]"] for number in range(4)}
    assert notes == [
        *("make 0", "feed 0", "make 1", "feed 1"),
        *(*landed[0], "make 2", "feed 2", "given 0"),
        *(*landed[1], "make 3", "feed 3", "given 1"),
        *(*landed[2], "given 2"),
        *(*landed[3], "given 3"),
    ]
    pipeline.close()


@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_come_in_order_at_any_depth(photo, prefetch):
    pipeline = Noted(prefetch=prefetch)
    endless = batches(photo, 10**9, [])
    made = in_flight(pipeline, endless, prefetch=prefetch)
    assert [next(made)[0] for _ in range(7)] == list(range(7))
    assert pipeline.in_flight == prefetch
    made.close()
    assert pipeline.in_flight == prefetch  # its owner may want to drain it, and feed it again
    pipeline.drain()
    assert [keep for keep, _ in in_flight(pipeline, batches(photo, 4, []), prefetch=prefetch)] == [0, 1, 2, 3]
    pipeline.close()


def test_a_batch_that_fails_is_told_by_what_it_is_of_and_nothing_more_is_fed(photo):
    pipeline = Noted(prefetch=2)
    made = in_flight(
        pipeline,
        batches(photo, 5, [], bad=[1]),
        prefetch=2,
        failed=lambda keep, error: NemoError(f"batch {keep} of {type(error).__name__}"),
    )
    assert next(made)[0] == 0
    with pytest.raises(NemoError, match="batch 1 of RuntimeError") as told:
        next(made)
    assert isinstance(told.value.__cause__, RuntimeError)
    assert pipeline.notes[-1] == "wait 1"
    pipeline.close()


def test_without_words_of_the_callers_dalis_error_is_raised(photo):
    pipeline = Noted(prefetch=1)
    with pytest.raises(RuntimeError, match=r"peek_image_shape|decoders"):
        next(in_flight(pipeline, batches(photo, 2, [], bad=[0]), prefetch=1))
    pipeline.close()


def test_what_land_raises_ends_it(photo):
    pipeline = Noted(prefetch=2)

    def refuse(keep, status):
        raise NemoError("another size")

    with pytest.raises(NemoError, match="another size"):
        next(in_flight(pipeline, batches(photo, 5, []), prefetch=2, land=refuse))
    assert pipeline.notes == ["feed 0", "feed 1", "wait 0"]
    pipeline.close()


def test_the_loop_is_written_once():
    texts = {path: path.read_text() for path in (ROOT / "nemo_dali").rglob("*.py") if path.parent.name != "loader"}
    loops = [path.name for path, text in texts.items() if re.search(r"pipe(line)?\.(feed\(|schedule_run)", text)]
    assert sorted(loops) == ["decoder_check.py", "graphs.py", "overlap.py"]  # the first asks batch by batch
