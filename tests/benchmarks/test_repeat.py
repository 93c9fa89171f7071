"""Files of many photos made of a small data set's: every row is the source's, and a Loader takes them."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from benchmarks.repeat import repeat_dataset, repeat_tiles, spread_table
from nemo_dali import Loader, MosaicPolicy
from nemo_dali.data.columns import have_twins, twins
from nemo_dali.data.dataset import Dataset
from nemo_dali.mining.table import NegativeTable
from nemo_dali.tiles.build import make_tiles
from nemo_dali.tiles.file import TileFile

PHOTOS, SENTENCES, SIZE = 61, 400, 50  # 24 photos twice, and 13 of them once more
POLICY = MosaicPolicy(p_mined=0.8, max_similarity=0.35, grids={2: 1.0, 3: 1.0})


@pytest.fixture(scope="module")
def source(files):
    return Dataset.open(files.dataset)


@pytest.fixture(scope="module")
def large(source, tmp_path_factory):
    return repeat_dataset(source, tmp_path_factory.mktemp("large") / "f.ris.h5", photos=PHOTOS, sentences=SENTENCES)


@pytest.fixture(scope="module")
def table(large):
    path = large.path.with_name("f.neg.h5")
    spread_table(large, path, depth=30)
    return NegativeTable.open(path)


@pytest.fixture(scope="module")
def tiles(files, large):
    once, path = (large.path.with_name(name) for name in ("once.tiles.h5", "f.tiles.h5"))
    make_tiles(files.dataset, size=SIZE, output=once, grids=(1, 2, 3))
    repeat_tiles(TileFile.open(once), large, path)
    return TileFile.open(once), TileFile.open(path)


def runs(dataset, ref):
    begin = dataset.refs.rle_begin[ref]
    return dataset.rle_counts[begin : begin + dataset.refs.rle_count[ref]].tolist()


def texts(dataset, ref):
    begin = dataset.refs.sentence_begin[ref]
    return dataset.sentences.text[begin : begin + dataset.refs.sentence_count[ref]]


def categories(dataset, photo):
    begin = dataset.images.category_begin[photo]
    return dataset.image_categories[begin : begin + dataset.images.category_count[photo]].tolist()


def test_photos_are_the_sources_over_and_over(source, large):
    m = len(source.images.id)
    assert len(large.images.id) == PHOTOS and len(set(large.images.id.tolist())) == PHOTOS
    for row in range(PHOTOS):
        for name in ("width", "height", "file_name"):
            assert getattr(large.images, name)[row] == getattr(source.images, name)[row % m]
        assert large.photo_path(row) == source.photo_path(row % m)
        assert categories(large, row) == categories(source, row % m)


def test_no_photo_is_a_copy_of_another_by_its_digest(source, large):
    assert np.array_equal(large.photo_files.digest[: len(source.images.id)], source.photo_files.digest)
    assert not have_twins(twins(large.photo_files)).any()


def test_every_photo_has_the_sources_refs(source, large):
    m = len(source.images.id)
    for row in range(PHOTOS):
        theirs, ours = np.flatnonzero(source.refs.image == row % m), np.flatnonzero(large.refs.image == row)
        assert [runs(large, ref) for ref in ours] == [runs(source, ref) for ref in theirs]
        assert large.refs.category[ours].tolist() == source.refs.category[theirs].tolist()


def test_sentences_are_as_many_as_asked_for_and_differ(source, large):
    assert len(large.sentences.ref) == SENTENCES == len(set(large.sentences.text))
    assert np.ptp(large.refs.sentence_count) == 1
    for row in range(PHOTOS):
        theirs, ours = (
            [texts(dataset, ref) for ref in np.flatnonzero(dataset.refs.image == photo)]
            for dataset, photo in ((source, row % len(source.images.id)), (large, row))
        )
        for said, repeated in zip(theirs, ours, strict=True):
            assert [text.rsplit(" ", 2)[0] for text in repeated] == [said[i % len(said)] for i in range(len(repeated))]


def test_the_files_hold_what_their_fingerprints_say(large, table, tiles):
    for file in (large, table, tiles[1]):
        assert file.content_fingerprint() == file.fingerprint


def test_candidates_are_other_photos_and_none_twice(large, table):
    table.check_dataset(large)
    own = large.refs.image[large.sentences.ref]
    assert table.neighbors.shape == (SENTENCES, 30)
    assert not (table.neighbors == own[:, None]).any()
    assert all(len(set(row)) == 30 for row in table.neighbors.tolist())
    assert len(np.unique(table.neighbors)) == PHOTOS
    begin, end = table.windows(0.3, 10)
    assert begin.max() > begin.min() and (end - begin == 10).all()


def test_tiles_are_the_sources_over_and_over(large, tiles):
    source, repeated = tiles
    repeated.check_dataset(large)
    for name in ("size", "resample", "grids", "decoder"):
        assert getattr(repeated, name) == getattr(source, name)
    rows = np.arange(PHOTOS) % len(source.digest)
    assert repeated.arrays.keys() == source.arrays.keys()
    for shape, array in repeated.arrays.items():
        assert np.array_equal(array, source.arrays[shape][rows])
        assert array.ctypes.data % 4096 == 0


@pytest.mark.slow
def test_all_modes_show_the_same_with_copies_and_without(source, large, table, tiles, tmp_path):
    copied = repeat_dataset(
        source, tmp_path / "f.ris.h5", photos=PHOTOS, sentences=SENTENCES, copies=tmp_path / "photos"
    )
    assert len(list((tmp_path / "photos").glob("*/*.jpg"))) == PHOTOS
    spread_table(copied, tmp_path / "f.neg.h5", depth=30)
    options = {"batch_size": 8, "size": SIZE, "policy": POLICY, "seed": 3}
    stream = Loader(large.path, table.path, **options)
    resident = Loader(large.path, table.path, tiles=tiles[1].path, **options)
    copies = Loader(copied.path, tmp_path / "f.neg.h5", **options)
    assert len(stream) == len(large.refs.image) // 8
    for one, *others in zip(stream, resident, copies, strict=True):
        for other in others:
            assert one.plan.tobytes() == other.plan.tobytes()
            assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
            assert torch.equal(one.tokens, other.tokens)


def test_a_larger_data_set_uses_the_copies_that_are_there(source, tmp_path):
    def made(photos):
        return repeat_dataset(
            source, tmp_path / f"{photos}.ris.h5", photos=photos, sentences=200, copies=tmp_path / "photos"
        )

    small = made(30)
    (tmp_path / "photos/0/5.jpg").write_bytes(b"kept")
    assert made(40).images.file_name[:30] == list(small.images.file_name)
    assert (tmp_path / "photos/0/5.jpg").read_bytes() == b"kept"


def test_fewer_photos_than_the_source_has(source, tmp_path):
    few = repeat_dataset(source, tmp_path / "f.ris.h5", photos=5, sentences=20)
    assert len(few.images.id) == 5 and set(few.refs.image.tolist()) == set(range(5))
    assert all(len(getattr(few.sentences, f.name)) == 20 for f in fields(few.sentences))


@pytest.mark.parametrize(("wrong", "match"), [({"photos": 0}, r"photos \(0\)"), ({"sentences": 100}, "122 refs")])
def test_impossible_counts_are_refused(source, tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match):
        repeat_dataset(source, tmp_path / "f.ris.h5", **{"photos": PHOTOS, "sentences": SENTENCES} | wrong)
    assert not (tmp_path / "f.ris.h5").exists()
