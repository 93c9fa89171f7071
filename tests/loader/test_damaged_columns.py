"""What of a data set file is looked at when it is used: damage is told when the step that it is of is made ahead."""

import shutil

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.loader.loader import Loader
from tests.helpers.files import make_files
from tests.helpers.forged import forge

OPTIONS = {"batch_size": 4, "size": 32, "seed": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def flip(path, name, place=0):
    """Another byte in an array, its checksum as it was."""
    offset = Dataset.open(path).mapped.index.arrays[name].offset + place
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_run_lengths_fail_the_step_that_shows_them(files, tmp_path):
    path = shutil.copy(files.dataset, tmp_path / "data.ris.h5")
    whole = Loader(files.dataset, files.negatives, **OPTIONS)
    steps = [batch.plan["ref"].tolist() for batch in whole]
    ref = steps[3][2]
    flip(path, "rle/counts", 4 * int(Dataset.open(path).refs.rle_begin[ref]))
    seen = []
    with pytest.raises(FileFormatError, match=rf"data\.ris\.h5 is damaged: the run lengths of ref {ref} do not match"):
        seen.extend(batch.plan["ref"].tolist() for batch in Loader(path, files.negatives, **OPTIONS))
    assert 0 < len(seen) <= 3 and seen == steps[: len(seen)]  # batches are made ahead


def test_run_lengths_that_are_not_the_photos_are_refused_whatever_their_checksum(files, tmp_path):
    path = forge(files.dataset, lambda parts: parts.arrays["rle/counts"].__imul__(2), tmp_path / "data.ris.h5")
    with pytest.raises(FileFormatError, match="run lengths of a ref do not add up to its photo's pixels"):
        next(iter(Loader(path, files.negatives, **OPTIONS)))


def test_names_that_leave_the_image_root_are_refused_when_a_photo_is_read(files, tmp_path):
    def edit(parts):
        parts.set_strings("images/file_name", ["../" + name for name in parts.strings("images/file_name")])

    path = forge(files.dataset, edit, tmp_path / "data.ris.h5")
    for on_error in ("raise", "substitute"):
        with pytest.raises(FileFormatError, match="/images/file_name has a name that leaves the image root"):
            next(iter(Loader(path, files.negatives, on_error=on_error, **OPTIONS)))


def test_sentences_are_looked_at_when_they_are_asked_for(files, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "cache"))
    path = shutil.copy(files.dataset, tmp_path / "data.ris.h5")
    next(iter(Loader(path, files.negatives, **OPTIONS)))  # tokens are in the cache from now on
    flip(path, "sentences/text")
    batch = next(iter(Loader(path, files.negatives, **OPTIONS)))
    with pytest.raises(FileFormatError, match="/sentences/text does not match its checksum"):
        _ = batch.sentences


def test_several_data_sets_with_run_lengths_of_each(files, tmp_path):
    other = make_files(tmp_path / "other", photos=11, seed=5)
    loader = Loader([files.dataset, other.dataset], [files.negatives, other.negatives], **OPTIONS)
    first, second = (Dataset.open(path) for path in (files.dataset, other.dataset))
    refs = np.arange(len(first.refs.image) + len(second.refs.image))[::-1]
    address, count = loader.corpus.runs_at(refs)
    assert count.tolist() == [*second.refs.rle_count[::-1], *first.refs.rle_count[::-1]]
    theirs = loader.corpus.datasets[1]
    assert address[0] == theirs.rle_counts[int(theirs.refs.rle_begin[-1]) :].ctypes.data
