import json
import pickle
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.errors import FileFormatError
from nemo_dali.mining.table import NegativeTable, write_table
from tests.helpers.counts import examples


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
    assert isinstance(table.neighbors, np.memmap) and isinstance(table.similarity, np.memmap)
    assert table.text_embedding.shape == (20, 8) and table.image_embedding.shape == (12, 8)
    assert (table.fingerprint, table.dataset_fingerprint, table.weights_hash) == (digest, "d" * 64, "e" * 64)
    assert (table.model, table.pretrained, table.depth) == ("ViT-B-32", "laion2b_s34b_b79k", 1000)
    assert table.exclusions == ["own photo"] and table.path == path
    with h5py.File(path) as file:  # opens in plain h5py, and says what it is
        assert (file.attrs["format"], file.attrs["version"]) == ("nemo-dali/neg", 1)
        assert file["neighbors"].chunks is None and json.loads(file.attrs["exclusions"]) == ["own photo"]


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
        neighbors[row, : len(values)] = np.arange(len(values))
        similarity[row, : len(values)] = sorted(values, reverse=True)
    _write(path, sentences=len(rows), photos=photos, blocks=[(neighbors, similarity)])
    if half:
        similarity = similarity.astype(np.float16)
        with h5py.File(path, "r+") as file:
            del file["similarity"]
            file["similarity"] = similarity
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


def test_opening_and_windows_do_not_read_the_whole_table(tmp_path):
    """In processor time, which other work on the machine changes less."""
    path = tmp_path / "a.neg.h5"
    sentences, photos = 120_000, 1001
    with h5py.File(path, "w") as file:  # 960 MB that stay a hole in the file
        file.create_dataset("neighbors", (sentences, photos - 1), "<i4")[-1:] = np.arange(1000)
        file.create_dataset("similarity", (sentences, photos - 1), "<f4")[-1:] = np.linspace(0.5, 0, 1000)
        file["text_embedding"] = np.zeros((sentences, 4), np.float32)
        file["image_embedding"] = np.zeros((photos, 4), np.float32)
        strings = ("dataset_fingerprint", "dataset_name", "model", "pretrained", "weights_hash", "fingerprint")
        file.attrs.update(dict.fromkeys(strings, "x") | {"depth": 1000, "exclusions": "[]"})
        file.attrs.update({"format": "nemo-dali/neg", "version": 1})
    start = time.process_time()
    table = NegativeTable.open(path)
    opened = time.process_time()
    table.windows(0.25, 100)  # the first one also waits for the disk
    warm = time.process_time()
    begin, end = table.windows(0.25, 100)
    done = time.process_time()
    assert (begin[-1], end[-1]) == (500, 600)
    assert opened - start < 0.1 and done - warm < 0.5


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


def _replace(file, name, array):
    del file[name]
    file[name] = array


def _climb(file):
    file["similarity"][0, 1] = 0.9


def _out_of_range(file):
    file["neighbors"][-1, 0] = 12


def _nan(file):
    file["similarity"][0, 0] = np.nan


def _gap(file):
    file["neighbors"][0, 2] = -1


@pytest.mark.parametrize(
    "damage",
    [
        _climb,
        _out_of_range,
        _nan,
        _gap,
        lambda file: file.__delitem__("neighbors"),
        lambda file: _replace(file, "neighbors", np.zeros((20, 11), np.int64)),
        lambda file: _replace(file, "neighbors", np.zeros(20, np.int32)),
        lambda file: _replace(file, "neighbors", np.zeros((20, 9), np.int32)),
        lambda file: _replace(file, "similarity", np.zeros((20, 10), np.float32)),
        lambda file: _replace(file, "text_embedding", np.zeros((19, 8), np.float32)),
        lambda file: (file.__delitem__("similarity"), file.create_group("similarity")),
        lambda file: file.attrs.__delitem__("weights_hash"),
        lambda file: file.attrs.__delitem__("depth"),
        lambda file: file.attrs.__setitem__("depth", 5),
        lambda file: file.attrs.__setitem__("exclusions", "not json"),
        lambda file: file.attrs.__setitem__("exclusions", "3"),
        lambda file: file.attrs.__setitem__("format", "nemo-dali/ris"),
        lambda file: file.attrs.__setitem__("version", 2),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, damage):
    path = tmp_path / "a.neg.h5"
    _write(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(FileFormatError) as error:
        NegativeTable.open(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert "nemo-dali mine" in message or "Give a 'nemo-dali/neg' file" in message
