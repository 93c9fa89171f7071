import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.errors import FileFormatError
from nemo_dali.kernels.ranking import checks
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.table_writer import write_table
from tests.helpers.counts import examples
from tests.helpers.forged import forge
from tests.helpers.h5_files import assert_views_agree


def _unit(rng, rows, width):
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _write(path, *, sentences=20, photos=12, depth=1000, seed=0, valid=None, block=7, **changes):
    """A table of random rows; ``valid``: photos per row, the rest is padding."""
    rng = np.random.default_rng(seed)
    width = min(depth, photos - 1)
    neighbors = np.array([rng.permutation(photos)[:width] for _ in range(sentences)], np.int32)
    similarity = -np.sort(-rng.uniform(-0.2, 0.5, (sentences, width)).astype(np.float32), axis=1)
    if valid is not None:
        padding = np.arange(width) >= np.asarray(valid)[:, None]
        neighbors[padding], similarity[padding] = -1, -np.inf
    options = {
        "blocks": [(neighbors[i : i + block], similarity[i : i + block]) for i in range(0, sentences, block)],
        "text_embedding": _unit(rng, sentences, 8),
        "image_embedding": _unit(rng, photos, 8),
        "depth": depth,
        "dataset_fingerprint": "d" * 64,
        "dataset_name": "refcoco unc train",
        "model": "ViT-B-32",
        "pretrained": "laion2b_s34b_b79k",
        "weights_hash": "e" * 64,
        "exclusions": ["own photo"],
    }
    digest = write_table(path, **(options | changes))
    return neighbors, similarity, digest


def test_a_table_comes_back_as_written(tmp_path):
    path = tmp_path / "a.neg.h5"
    neighbors, similarity, digest = _write(path, valid=np.arange(20) % 12)
    table = NegativeTable.open(path)
    np.testing.assert_array_equal(table.neighbors, neighbors)
    np.testing.assert_array_equal(table.similarity, similarity)
    assert table.neighbors.dtype == np.int32 and table.similarity.dtype == np.float32
    assert not table.neighbors.flags.writeable and not table.neighbors.flags.owndata  # mapped
    assert table.text_embedding.shape == (20, 8) and table.image_embedding.shape == (12, 8)
    assert (table.fingerprint, table.dataset_fingerprint, table.weights_hash) == (digest, "d" * 64, "e" * 64)
    assert (table.model, table.pretrained, table.depth) == ("ViT-B-32", "laion2b_s34b_b79k", 1000)
    assert table.exclusions == ["own photo"] and table.path == path
    with h5py.File(path) as file:  # opens in plain h5py, and says what it is
        assert (file.attrs["format"].decode(), file.attrs["version"]) == ("nemo-dali/neg", 2)
        assert file["neighbors"].chunks is None and json.loads(file.attrs["exclusions"]) == ["own photo"]
    assert_views_agree(path)


def test_a_table_pickles_as_its_path(tmp_path):
    path = tmp_path / "a.neg.h5"
    _write(path, sentences=5000)
    table = NegativeTable.open(path)
    pickled = pickle.dumps(table)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).neighbors, table.neighbors)


def test_the_fingerprint_is_of_the_content(tmp_path):
    digests = [
        _write(tmp_path / "a.neg.h5", **changes)[2]
        for changes in (
            {},
            {"pretrained": "weights.pt", "model": "other name"},
            {"block": 3},
            {"seed": 1},
            {"dataset_fingerprint": "f" * 64},
            {"weights_hash": "f" * 64},
            {"exclusions": []},
        )
    ]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests)) == 5


def test_blocks_must_cover_all_sentences(tmp_path):
    path = tmp_path / "a.neg.h5"
    with pytest.raises(ValueError, match="blocks"):
        _write(path, blocks=[(np.zeros((3, 11), np.int32), np.zeros((3, 11), np.float32))])
    assert list(tmp_path.iterdir()) == []


def _window(neighbors, similarity, tau, k):
    """The pool as a list of photo rows, from its definition."""
    pool = []
    for photo, value in zip(neighbors.tolist(), similarity.tolist(), strict=True):
        if photo >= 0 and (tau is None or value <= tau) and len(pool) < k:
            pool.append(photo)
    return pool


@pytest.mark.fuzz
@settings(max_examples=examples(60), deadline=None)
@given(
    data=st.data(),
    photos=st.integers(2, 20),
    tau=st.one_of(st.none(), st.floats(-0.25, 0.5, width=32), st.sampled_from([-0.1, 0.0, 0.1, 0.3])),
    k=st.integers(1, 25),
    half=st.booleans(),
)
def test_windows_hold_the_pool(tmp_path_factory, data, photos, tau, k, half):
    path = tmp_path_factory.mktemp("windows") / "a.neg.h5"
    steps = st.lists(st.sampled_from([-0.1, 0.0, 0.1, 0.3, 0.30000001, 0.5]), min_size=0, max_size=photos - 1)
    rows = data.draw(st.lists(steps, min_size=1, max_size=6))
    neighbors = np.full((len(rows), photos - 1), -1, np.int32)
    similarity = np.full(neighbors.shape, -np.inf, np.float32)
    for row, values in enumerate(rows):
        neighbors[row, : len(values)] = np.arange(len(values))  # the last photo is in no row
        similarity[row, : len(values)] = sorted(values, reverse=True)
    _write(path, sentences=len(rows), photos=photos, blocks=[(neighbors, similarity)])
    if half:
        similarity = similarity.astype(np.float16)
        forge(path, _put("similarity", similarity))
    table = NegativeTable.open(path)
    begin, end = table.windows(tau, k)
    assert begin.dtype == end.dtype == np.int64
    pools = [_window(n, s, tau, k) for n, s in zip(neighbors, similarity, strict=True)]
    assert [table.neighbors[row, b:e].tolist() for row, (b, e) in enumerate(zip(begin, end, strict=True))] == pools

    sizes = np.array([len(pool) for pool in pools])
    report = table.pool_sizes(tau, k)
    assert json.loads(json.dumps(report)) == report
    assert (report["sentences"], report["empty"]) == (len(pools), (sizes == 0).sum())
    assert (report["fewer_than_3"], report["fewer_than_8"]) == ((sizes < 3).sum(), (sizes < 8).sum())
    assert (report["quantiles"]["0"], report["quantiles"]["100"]) == (sizes.min(), sizes.max())


def test_wrong_window_arguments(tmp_path):
    _write(tmp_path / "a.neg.h5")
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    with pytest.raises(ValueError, match=r"top_k \(0\)"):
        table.windows(None, 0)
    with pytest.raises(ValueError, match=r"max_similarity \(nan\)"):
        table.windows(float("nan"), 3)


def test_opening_reads_no_candidates(tmp_path):
    path = tmp_path / "a.neg.h5"
    _write(path)
    forge(path, lambda parts: parts.arrays["neighbors"].fill(99))
    table = NegativeTable.open(path)
    with pytest.raises(FileFormatError, match="the candidates of sentence 3 are not distinct photos"):
        table.check_rows(np.array([3]))


def test_photos_that_no_sentence_may_show_are_kept(tmp_path):
    excluded = np.arange(12) % 5 == 1
    none = [(np.full((20, 11), -1, np.int32), np.full((20, 11), -np.inf, np.float32))]
    _write(tmp_path / "a.neg.h5", excluded_photos=excluded, blocks=none)
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    np.testing.assert_array_equal(table.excluded_photos, excluded)
    with h5py.File(tmp_path / "a.neg.h5") as file:
        assert file["excluded_photos"][:].tolist() == [0b01000010, 0b1000]


def test_another_data_set_is_refused_by_name(tmp_path):
    path = tmp_path / "a.neg.h5"
    _write(path)
    table = NegativeTable.open(path)
    rows = {
        "sentences": SimpleNamespace(ref=range(len(table.neighbors))),
        "images": SimpleNamespace(id=range(len(table.image_embedding))),
        "path": tmp_path / "x.ris.h5",
    }
    table.check_dataset(SimpleNamespace(fingerprint="d" * 64, name="refcoco unc train", **rows))
    with pytest.raises(FileFormatError) as error:
        table.check_dataset(SimpleNamespace(fingerprint="0123456789abcdef", name="other", **rows))
    message = str(error.value)
    assert "d" * 12 in message and "0123456789ab" in message and "nemo-dali mine" in message
    assert "refcoco unc train" in message and "x.ris.h5" in message


@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
def test_a_table_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "a.neg.h5"
    _write(path, sentences=300)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(FileFormatError, match="nemo-dali mine"):
        NegativeTable.open(path)


def _set(name, place, value):
    return lambda parts: parts.arrays[name].__setitem__(place, value)


def _put(name, array):
    return lambda parts: parts.arrays.update({name: array})


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: parts.arrays.pop("neighbors"),
        lambda parts: parts.arrays.pop("own_rank"),
        lambda parts: parts.arrays.pop("excluded_photos"),
        _put("neighbors", np.zeros((20, 11), np.int64)),
        _put("neighbors", np.zeros((20, 9), np.int32)),
        _put("similarity", np.zeros((20, 10), np.float32)),
        _put("text_embedding", np.zeros((19, 8), np.float32)),
        _put("excluded_photos", np.zeros(3, np.uint8)),
        _put("own_rank", np.full(20, 13, np.int32)),
        _put("own_rank", np.full(20, -1, np.int32)),
        _put("recall", np.array([[1.0, np.nan]])),
        lambda parts: parts.attributes.pop("weights_hash"),
        lambda parts: parts.attributes.pop("depth"),
        lambda parts: parts.attributes.update(depth=5),
        lambda parts: parts.attributes.update(depth="5"),
        lambda parts: parts.attributes.update(exclusions="not a list"),
        lambda parts: parts.attributes.update(exclusions=[3]),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, damage):
    path = tmp_path / "a.neg.h5"
    _write(path)
    forge(path, damage)
    with pytest.raises(FileFormatError) as error:
        NegativeTable.open(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "nemo-dali mine" in message


@pytest.mark.parametrize(
    "damage",
    [
        _set("similarity", (7, 1), 0.9),
        _set("similarity", (7, 0), np.nan),
        _set("similarity", (7, 4), np.nan),
        _set("similarity", (7, 0), np.inf),
        _set("similarity", (7, 10), -np.inf),
        _set("neighbors", (7, 0), 12),
        _set("neighbors", (7, 10), -7),
        _set("neighbors", (7, 2), -1),
        _set("neighbors", (7, 10), -1),
        lambda parts: _set("neighbors", (7, 5), parts.arrays["neighbors"][7, 3])(parts),
    ],
)
def test_candidates_that_cannot_be_are_refused_when_they_are_used(tmp_path, damage):
    """Whatever the checksums say."""
    path = tmp_path / "a.neg.h5"
    _write(path)
    forge(path, damage)
    table = NegativeTable.open(path)
    table.check_rows(np.array([3, 8, 3]))
    for rows in ([7], [8, 7]):
        with pytest.raises(FileFormatError, match=r"a\.neg\.h5 is damaged: the candidates of sentence 7 are not"):
            table.check_rows(np.array(rows))
    with pytest.raises(FileFormatError, match="sentence 7"):
        table.windows(None, 3)
    table.check_rows(np.array([8]))


def test_a_photo_that_is_excluded_for_all_is_no_candidate(tmp_path):
    path = tmp_path / "a.neg.h5"
    neighbors, _, _ = _write(path)
    forge(path, lambda parts: parts.arrays["excluded_photos"].__setitem__(0, 1 << 3))
    table = NegativeTable.open(path)
    for row in range(20):
        if 3 in neighbors[row]:
            with pytest.raises(FileFormatError, match="a photo among its candidates that is excluded for all"):
                table.check_rows(np.array([row]))
        else:
            table.check_rows(np.array([row]))


def test_the_own_photo_is_no_candidate(tmp_path):
    neighbors, _, _ = _write(tmp_path / "a.neg.h5")
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    (missing,) = set(range(12)) - set(neighbors[7].tolist())
    with pytest.raises(FileFormatError, match="sentence 7"):
        table.check_rows(np.array([7]), np.array([neighbors[7, 4]]))
    table.check_rows(np.array([7]), np.array([missing]))


@pytest.mark.parametrize("name", ["text_embedding", "image_embedding"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 5.0])
def test_embeddings_that_cannot_be_are_refused_when_they_are_used(tmp_path, name, value):
    path = tmp_path / "a.neg.h5"
    _write(path)
    NegativeTable.open(path).check_embeddings()
    forge(path, _set(name, (5, 2), value))
    with pytest.raises(FileFormatError, match=f"/{name} has a row that is not of unit length"):
        NegativeTable.open(path).check_embeddings()


def test_a_changed_bit_is_found_when_it_is_used(tmp_path):
    path = tmp_path / "a.neg.h5"
    _write(path)
    whole, arrays = path.read_bytes(), NegativeTable.open(path).mapped.index.arrays
    for name in ("neighbors", "similarity", "text_embedding", "image_embedding"):
        entry = arrays[name]
        place = entry.offset + 5 * entry.nbytes // entry.shape[0] + 4  # in row 5
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        table = NegativeTable.open(path)
        table.check_rows(np.array([4, 6]))
        with pytest.raises(FileFormatError, match=f"row 5 of /{name} does not match its checksum"):
            table.check_rows(np.array([5]))
            table.check_embeddings()


def test_several_threads_may_check_rows(tmp_path, monkeypatch):
    _write(tmp_path / "a.neg.h5")
    table, real = NegativeTable.open(tmp_path / "a.neg.h5"), checks.first_bad_row
    inside, most = [], []

    def slow(*arguments):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return real(*arguments)

    monkeypatch.setattr(checks, "first_bad_row", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: table.check_rows(np.array([row])), range(8)))
    assert most == [1] * 8  # they share what they mark photos in
