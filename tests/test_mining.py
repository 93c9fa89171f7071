import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nemo_dali.annotations import Annotations, Images, Refs, Sentences
from nemo_dali.dataset import Dataset, index_dataset
from nemo_dali.errors import FileFormatError, NemoError, PhotoError
from nemo_dali.kernels.ranking import _rank_rows, rank_reference
from nemo_dali.mining import mine, rank, rank_blocks
from nemo_dali.table import NegativeTable
from tests.conftest import CLIP_CONFIG


def _unit(rng, rows, width):
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- ranking ---------------------------------------------------------------------------------------------------------


def _check_ranking(text, image, own, depth, neighbors, similarity):
    """Against all similarities in float64, up to ties within 1e-6; equal float32 similarities by row."""
    exact = text.astype(np.float64) @ image.astype(np.float64).T
    width = min(depth, len(image) - 1)
    assert neighbors.shape == similarity.shape == (len(text), width)
    assert neighbors.dtype == np.int32 and similarity.dtype == np.float32
    for row in range(len(text)):
        assert own[row] not in neighbors[row] and len(set(neighbors[row].tolist())) == width
        np.testing.assert_allclose(similarity[row], exact[row, neighbors[row]], rtol=0, atol=1e-6)
        best = np.sort(np.delete(exact[row], own[row]))[::-1][:width]
        np.testing.assert_allclose(similarity[row], best, rtol=0, atol=1e-6)
        step = np.diff(similarity[row])
        assert (step <= 0).all() and (np.diff(neighbors[row])[step == 0] > 0).all()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sentences=st.integers(1, 9),
    photos=st.integers(2, 40),
    width=st.integers(1, 70),
    depth=st.integers(1, 50),
    copies=st.booleans(),
)
def test_rank_is_the_brute_force_ranking(seed, sentences, photos, width, depth, copies):
    rng = np.random.default_rng(seed)
    text, image = _unit(rng, sentences, width), _unit(rng, photos, width)
    if copies:
        image = image[rng.integers(0, photos, photos)]
    own = rng.integers(0, photos, sentences).astype(np.int32)
    _check_ranking(text, image, own, depth, *rank(text, image, own, depth=depth))


@pytest.mark.parametrize(("photos", "width", "depth"), [(3000, 64, 100), (20_000, 32, 1000), (500, 512, 499)])
def test_kernel_equals_its_reference_to_the_bit(photos, width, depth):
    rng = np.random.default_rng(photos)
    # The common direction of CLIP embeddings: similarities lie close together, far from zero.
    text, image = (_unit(rng, n, width) * 0.5 + _unit(np.random.default_rng(1), 1, width) for n in (40, photos))
    image[7], image[photos // 2] = image[photos - 1], image[photos - 1]
    own = rng.integers(0, photos, len(text)).astype(np.int32)
    neighbors, similarity, own_rank = rank_reference(text, image, own, depth=depth)
    (block,) = rank_blocks(text, image, own, depth=depth)
    assert block.neighbors.tobytes() == neighbors.tobytes()
    assert block.similarity.tobytes() == similarity.tobytes()
    near = own_rank <= depth + 1
    np.testing.assert_array_equal(block.own_rank[near], own_rank[near])
    assert (np.abs(block.own_rank - own_rank) <= 2).all() and near.any()
    _check_ranking(text, image, own, depth, neighbors, similarity)


def test_proposing_scores_may_be_off_by_half_the_slack():
    """The matrix product only proposes: whatever it is off by, within its bound, the ranking stays exact."""
    rng = np.random.default_rng(0)
    text, image = _unit(rng, 50, 64), _unit(rng, 900, 64)
    own = rng.integers(0, 900, 50).astype(np.int32)
    neighbors, similarity, _ = rank_reference(text, image, own, depth=40)
    scores = text @ image.T + rng.uniform(-0.02, 0.02, (50, 900)).astype(np.float32)
    for slack, same in ((0.0401, True), (0.0, False)):
        found = np.empty_like(neighbors), np.empty_like(similarity), np.empty_like(own)
        _rank_rows(0, 50, scores, np.float32(slack), text, image, own, *found)
        assert np.array_equal(found[0], neighbors) == same and np.array_equal(found[1], similarity) == same


def test_identical_photos_tie_and_come_by_row():
    rng = np.random.default_rng(0)
    text = _unit(rng, 5, 512)
    image = np.repeat(_unit(rng, 30, 512), 20, axis=0)[rng.permutation(600)]
    own = np.arange(5, dtype=np.int32)
    neighbors, similarity = rank(text, image, own, depth=300)
    for row in range(5):
        for value in np.unique(similarity[row, :280]):  # the last group may be cut off by the depth
            group = neighbors[row, similarity[row] == value]
            same = np.flatnonzero((image == image[group[0]]).all(axis=1))
            np.testing.assert_array_equal(group, same[same != own[row]][: len(group)])
    same = rank(text, np.tile(image[:1], (50, 1)), own, depth=60)[0]
    np.testing.assert_array_equal(same, [[photo for photo in range(50) if photo != row] for row in range(5)])


def test_block_size_changes_no_byte():
    rng = np.random.default_rng(0)
    text, image = _unit(rng, 101, 96), _unit(rng, 700, 96)
    own = rng.integers(0, 700, 101).astype(np.int32)
    neighbors, similarity = rank(text, image, own, depth=50)
    for block_rows in (1, 7, 64, 101, 500):
        blocks = list(rank_blocks(text, image, own, depth=50, block_rows=block_rows))
        assert [b.begin for b in blocks] == list(range(0, 101, block_rows))
        assert b"".join(b.neighbors.tobytes() for b in blocks) == neighbors.tobytes()
        assert b"".join(b.similarity.tobytes() for b in blocks) == similarity.tobytes()


def test_own_rank_counts_before_the_exclusion():
    text = np.float32([[1, 0]] * 4)
    angle = np.arange(4) * 0.3
    image = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    (block,) = rank_blocks(text, image, np.arange(4, dtype=np.int32), depth=1)
    assert block.own_rank.tolist() == [1, 2, 3, 4]
    assert block.neighbors[:, 0].tolist() == [1, 0, 0, 0]


def test_zero_and_opposite_similarities_rank():
    """Zeros of either sign tie."""
    text = np.float32([[1, 0, 0, 0]])
    image = np.float32([[0, 1, 0, 0], [-1, 0, 0, 0], [-0.0, 1, 0, 0], [1, 0, 0, 0], [-1e-45, 1, 0, 0]])
    neighbors, similarity = rank(text, image, np.int32([3]), depth=9)
    assert neighbors.tolist() == [[0, 2, 4, 1]] and similarity[0, [0, 1, 3]].tolist() == [0, 0, -1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_embedding": np.full((3, 4), np.nan, np.float32)}, r"text_embedding \(row 0\)"),
        ({"image_embedding": np.diag(np.float32([1, np.inf, 1, 1]))}, r"image_embedding \(row 1\)"),
        ({"image_embedding": np.ones((1, 4), np.float32)}, "image_embedding"),
        ({"image_embedding": np.ones((5, 3), np.float32)}, "image_embedding"),
        ({"own_image": np.int32([0, 1, 5])}, "own_image"),
        ({"own_image": np.int32([0, -1, 0])}, "own_image"),
        ({"own_image": np.int32([0, 1])}, "own_image"),
        ({"depth": 0}, r"depth \(0\)"),
    ],
)
def test_rank_refuses_wrong_arguments(change, named):
    rng = np.random.default_rng(0)
    arguments = {
        "text_embedding": _unit(rng, 3, 4),
        "image_embedding": _unit(rng, 5, 4),
        "own_image": np.int32([0, 1, 2]),
        "depth": 2,
    }
    with pytest.raises(ValueError, match=named):
        rank(**(arguments | change))


# --- mining ----------------------------------------------------------------------------------------------------------

PHOTOS, SENTENCES_EACH = 11, 3


def _make_dataset(folder: Path, *, photos: int = PHOTOS, seed: int = 0) -> Path:
    """Photos of noise, one ref each, three sentences a ref."""
    rng = np.random.default_rng(seed)
    (folder / "photos").mkdir(parents=True)
    sizes = rng.integers(40, 90, (photos, 2))
    names = [f"{row}.jpg" for row in range(photos)]
    for name, (width, height) in zip(names, sizes, strict=True):
        noise = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        noise.resize((width, height)).convert("L" if name == "3.jpg" else "RGB").save(folder / "photos" / name)
    row, nothing = np.arange(photos), np.full(photos, -1)
    words = ["left", "right", "red", "big", "the", "dog", "on", "chair"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 20))) for _ in range(photos * SENTENCES_EACH)]
    annotations = Annotations(
        name="noise",
        images=Images(row, sizes[:, 0], sizes[:, 1], names, row * 0, row * 0),
        refs=Refs(
            ref_id=row,
            ann_id=row,
            image=row[::-1],
            category=nothing,
            sentence_begin=row * SENTENCES_EACH,
            sentence_count=row * 0 + SENTENCES_EACH,
            rle_begin=row * 2,
            rle_count=row * 0 + 2,
            empty=row * 0,
            source=[""] * photos,
            distractors=nothing,
        ),
        sentences=Sentences(np.arange(len(texts)), np.repeat(row, SENTENCES_EACH), texts, texts),
        image_categories=np.zeros(0, np.int32),
        category_id=np.zeros(0, np.int64),
        category_name=[],
        rle_counts=np.stack([row[::-1] * 0, sizes[::-1].prod(axis=1)], axis=1).ravel().astype(np.uint32),
    )
    index_dataset(annotations, images=folder / "photos", output=folder / "noise.ris.h5")
    return folder / "noise.ris.h5"


@pytest.fixture
def dataset(tmp_path):
    return _make_dataset(tmp_path)


def _mine(dataset, clip, output, **options):
    defaults = {"model": str(clip[0] / "tiny.json"), "pretrained": str(clip[0] / "tiny.pt"), "device": "cpu"}
    return mine(dataset, output=output, **(defaults | {"batch_size": 4} | options))


def test_mining_from_photos_to_table(dataset, clip, tmp_path):
    import open_clip
    import torch

    report = _mine(dataset, clip, tmp_path / "a.neg.h5")
    table, opened = NegativeTable.open(tmp_path / "a.neg.h5"), Dataset.open(dataset)
    table.check_dataset(opened)
    network = clip[1]
    transform = open_clip.image_transform(32, is_train=False)
    with torch.inference_mode():
        photos = [transform(Image.open(opened.photo_path(row)))[None] for row in range(PHOTOS)]
        images = torch.cat([network.encode_image(photo, normalize=True) for photo in photos])
        tokens = open_clip.tokenize(list(opened.sentences.text), context_length=12)
        texts = network.encode_text(tokens, normalize=True)
    np.testing.assert_allclose(table.image_embedding, images, atol=1e-5)
    np.testing.assert_allclose(table.text_embedding, texts, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(table.image_embedding.astype(np.float64), axis=1), 1, atol=1e-6)

    own = opened.refs.image[opened.sentences.ref]
    assert table.exclusions == ["own photo"]
    _check_ranking(table.text_embedding, table.image_embedding, own, 1000, table.neighbors, table.similarity)
    similarity = texts.double().numpy() @ images.double().numpy().T
    own_rank = 1 + (similarity > similarity[np.arange(len(own)), own][:, None]).sum(axis=1)
    assert (report.photos, report.sentences, report.neighbors) == (PHOTOS, PHOTOS * SENTENCES_EACH, PHOTOS - 1)
    assert report.median_rank == np.median(own_rank)
    assert report.recall_at_1 == pytest.approx((own_rank == 1).mean())
    assert report.recall_at_10 == pytest.approx((own_rank <= 10).mean())
    assert report.fingerprint == table.fingerprint and report.device == "cpu" and report.photos_per_s > 0
    assert f"10 negatives for each of {len(own)} sentences, from 11 photos" in str(report)


def test_mining_twice_gives_the_same_bytes(dataset, clip, tmp_path):
    for name in ("a", "b"):
        _mine(dataset, clip, tmp_path / f"{name}.neg.h5", depth=6)
    with h5py.File(tmp_path / "a.neg.h5") as a, h5py.File(tmp_path / "b.neg.h5") as b:
        assert list(a) == list(b) and a.attrs["fingerprint"] == b.attrs["fingerprint"]
        for name in a:
            assert a[name][:].tobytes() == b[name][:].tobytes()


def test_an_embedding_does_not_depend_on_how_many_follow(clip, tmp_path):
    """The last batch is as large as the others."""
    for photos, name in ((4, "a"), (3, "b")):
        _mine(_make_dataset(tmp_path / name, photos=4), clip, tmp_path / f"{name}.neg.h5", batch_size=photos)
    a, b = (NegativeTable.open(tmp_path / f"{name}.neg.h5") for name in "ab")
    np.testing.assert_allclose(a.image_embedding, b.image_embedding, atol=1e-6)


def test_weights_hash_is_of_the_tensors(dataset, clip, tmp_path):
    import safetensors.torch
    import torch

    state = clip[1].state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "train.pth")
    torch.save(state | {"logit_scale": state["logit_scale"] + 1}, tmp_path / "other.bin")
    hashes = []
    for weights in (clip[0] / "tiny.pt", tmp_path / "w.safetensors", tmp_path / "train.pth", tmp_path / "other.bin"):
        _mine(dataset, clip, tmp_path / "a.neg.h5", pretrained=str(weights))
        table = NegativeTable.open(tmp_path / "a.neg.h5")
        hashes.append(table.weights_hash)
        assert table.pretrained == str(weights) and table.model.endswith("tiny.json")
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3] and len(hashes[0]) == 64


class _Code:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["in a checkpoint", "bare pickle"])
def test_weights_that_hold_code_are_refused_and_not_run(dataset, clip, tmp_path, kind):
    import pickle

    import torch

    code = _Code()
    code.path = str(tmp_path / "it ran")
    weights = tmp_path / "weights.pt"
    if kind == "bare pickle":
        weights.write_bytes(pickle.dumps(code, protocol=2))
    else:
        torch.save(clip[1].state_dict() | {"x": code}, weights)
    with pytest.raises(NemoError, match=r"weights\.pt .*refused"):
        _mine(dataset, clip, tmp_path / "a.neg.h5", pretrained=str(weights))
    assert not os.path.exists(code.path) and not (tmp_path / "a.neg.h5").exists()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"hello world" * 100, "half"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_weights(dataset, clip, tmp_path, name, content):
    whole = (clip[0] / "tiny.pt").read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(NemoError) as error:
        _mine(dataset, clip, tmp_path / "a.neg.h5", pretrained=str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def _other_architecture(folder):
    (folder / "wide.json").write_text(json.dumps(CLIP_CONFIG | {"embed_dim": 48}))
    return {"model": str(folder / "wide.json")}


def _config(folder, text):
    (folder / "c.json").write_text(text)
    return {"model": str(folder / "c.json")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda folder: {"model": "ViT-B32"}, r"no model 'ViT-B32'.*ViT-B-32"),
        (
            lambda folder: {"model": "ViT-B-32", "pretrained": "nowhere.pt"},
            r"nowhere\.pt is neither.*laion2b_s34b_b79k",
        ),
        (lambda folder: {"pretrained": str(folder / "nowhere.pt")}, "neither a weights file nor a tag"),
        (_other_architecture, r"wide\.json with the weights .* cannot be loaded \(.*size mismatch"),
        (lambda folder: {"model": "ViT-S-16-alt"}, r"cannot be loaded \(.*"),
        (lambda folder: {"model": str(folder / "none.json")}, r"none\.json cannot be read"),
        (lambda folder: _config(folder, "{"), "cannot be read"),
        (lambda folder: _config(folder, "[]"), "no 'embed_dim'"),
        (lambda folder: _config(folder, json.dumps(CLIP_CONFIG | {"vision_cfg": {"colour": 1}})), "cannot be loaded"),
    ],
)
def test_wrong_models_and_weights_are_told_in_one_line(dataset, clip, tmp_path, options, message):
    with pytest.raises(NemoError, match=message) as error:
        _mine(dataset, clip, tmp_path / "a.neg.h5", **options(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tag_without_a_network(dataset, clip, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", fail)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(NemoError, match=r"'laion2b_s34b_b79k' of ViT-B-32 could not be fetched .*local weights file"):
        _mine(dataset, clip, tmp_path / "a.neg.h5", model="ViT-B-32", pretrained="laion2b_s34b_b79k")


def test_a_config_file_never_replaces_a_model_of_open_clip(dataset, clip, tmp_path):
    import open_clip

    builtin = open_clip.get_model_config("ViT-B-32")
    (tmp_path / "ViT-B-32.json").write_text(json.dumps(CLIP_CONFIG))
    _mine(dataset, clip, tmp_path / "a.neg.h5", model=str(tmp_path / "ViT-B-32.json"))
    assert open_clip.get_model_config("ViT-B-32") == builtin


def test_a_hub_config_brings_its_preprocessing(dataset, clip, tmp_path):
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "squash"}
    for name, config in (
        ("a", {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}),
        ("b", {"model_cfg": CLIP_CONFIG}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        _mine(dataset, clip, tmp_path / f"{name}.neg.h5", model=str(tmp_path / f"{name}.json"))
    _mine(dataset, clip, tmp_path / "c.neg.h5")
    a, b, c = (NegativeTable.open(tmp_path / f"{name}.neg.h5") for name in "abc")
    np.testing.assert_array_equal(b.image_embedding, c.image_embedding)
    np.testing.assert_array_equal(a.text_embedding, c.text_embedding)
    assert np.abs(a.image_embedding - c.image_embedding).max() > 1e-3


@pytest.mark.parametrize("tower", ["visual.proj", "text_projection"])
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_embeddings_that_are_not_finite(dataset, clip, tmp_path, tower, value):
    import torch

    state = clip[1].state_dict()
    torch.save(state | {tower: torch.full_like(state[tower], value)}, tmp_path / "w.pt")
    what = r"photos/0\.jpg" if tower == "visual.proj" else "for '"
    with pytest.raises(NemoError, match=f"no finite embedding.*{what}"):
        _mine(dataset, clip, tmp_path / "a.neg.h5", pretrained=str(tmp_path / "w.pt"))
    assert not (tmp_path / "a.neg.h5").exists()


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "does not exist"),
        (_truncate, "cannot be decoded"),
        (lambda path: path.write_bytes(b"no photo"), "cannot be decoded"),
        (lambda path: Image.new("RGB", (30, 20)).save(path), "is 30x20 pixels, but was"),
    ],
)
def test_photos_that_changed_since_the_index(dataset, clip, tmp_path, spoil, message):
    (tmp_path / "a.neg.h5").write_bytes(b"an older table")
    spoil(tmp_path / "photos" / "5.jpg")
    with pytest.raises(PhotoError, match=rf"photos/5\.jpg {message}"):
        _mine(dataset, clip, tmp_path / "a.neg.h5")
    assert (tmp_path / "a.neg.h5").read_bytes() == b"an older table"


def test_photos_in_another_folder(dataset, clip, tmp_path):
    _mine(dataset, clip, tmp_path / "a.neg.h5")
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(PhotoError, match="--images"):
        _mine(dataset, clip, tmp_path / "b.neg.h5")
    report = _mine(dataset, clip, tmp_path / "b.neg.h5", images=tmp_path / "moved")
    assert report.fingerprint == NegativeTable.open(tmp_path / "a.neg.h5").fingerprint


def test_one_photo_is_too_few(clip, tmp_path):
    with pytest.raises(NemoError, match="only one photo"):
        _mine(_make_dataset(tmp_path, photos=1), clip, tmp_path / "a.neg.h5")


@pytest.mark.parametrize("options", [{"depth": 0}, {"batch_size": 0}, {"device": "abacus"}])
def test_wrong_arguments(dataset, clip, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        _mine(dataset, clip, tmp_path / "a.neg.h5", **options)


def test_no_place_for_the_table_is_told_before_the_work(dataset, clip, tmp_path):
    with pytest.raises(FileFormatError, match="Cannot write"):
        _mine(dataset, clip, tmp_path / "nowhere" / "a.neg.h5", model="not looked at")


def test_ranking_on_several_threads_at_once():
    """The kernel shares nothing between calls."""
    rng = np.random.default_rng(0)
    text, image = _unit(rng, 30, 64), _unit(rng, 400, 64)
    own = rng.integers(0, 400, 30).astype(np.int32)
    expected = rank(text, image, own, depth=20)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: rank(text, image, own, depth=20), range(8)):
            np.testing.assert_array_equal(result[0], expected[0])
            np.testing.assert_array_equal(result[1], expected[1])
