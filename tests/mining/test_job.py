import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError, PhotoError
from nemo_dali.mining.clip import load_clip
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.mining.job import mine
from nemo_dali.mining.pool_curves import measure_curves
from nemo_dali.mining.table import NegativeTable, read_table
from nemo_dali.mining.table_writer import begin_table
from nemo_dali.mining.tune import propose
from tests.helpers.clip import CLIP_CONFIG
from tests.helpers.files import index_grefs, index_refer, make_noise
from tests.helpers.forged import forge
from tests.helpers.rankings import check_ranking
from tests.helpers.tables import write_ranked_table

PHOTOS, SENTENCES_EACH = 11, 3


@pytest.fixture
def dataset(tmp_path):
    return make_noise(tmp_path)


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
    assert table.exclusions == ["own photo", "photos outside the split"] and table.method == "exact"
    assert table.progress.tolist() == [PHOTOS, len(set(opened.sentences.text)), PHOTOS * SENTENCES_EACH]
    check_ranking(table.text_embedding, table.image_embedding, own, 1000, table.neighbors, table.similarity)
    similarity = texts.double().numpy() @ images.double().numpy().T
    own_rank = 1 + (similarity > similarity[np.arange(len(own)), own][:, None]).sum(axis=1)
    assert (report.photos, report.sentences, report.neighbors) == (PHOTOS, PHOTOS * SENTENCES_EACH, PHOTOS - 1)
    np.testing.assert_array_equal(table.own_rank, own_rank)
    assert report.median_rank == np.median(own_rank)
    assert report.recall_at_1 == pytest.approx((own_rank == 1).mean())
    assert report.recall_at_10 == pytest.approx((own_rank <= 10).mean())
    assert report.fingerprint == table.fingerprint and report.device == "cpu" and report.photos_per_s > 0
    assert f"10 negatives for each of {len(own)} sentences, from 11 photos" in str(report)


def test_mining_twice_gives_the_same_bytes(dataset, clip, tmp_path):
    for name in ("a", "b"):
        _mine(dataset, clip, tmp_path / f"{name}.neg.h5", depth=6)
    assert (tmp_path / "a.neg.h5").read_bytes() == (tmp_path / "b.neg.h5").read_bytes()


def test_an_embedding_does_not_depend_on_how_many_follow(clip, tmp_path):
    """The last batch is as large as the others."""
    for photos, name in ((4, "a"), (3, "b")):
        _mine(make_noise(tmp_path / name, photos=4), clip, tmp_path / f"{name}.neg.h5", batch_size=photos)
    a, b = (NegativeTable.open(tmp_path / f"{name}.neg.h5") for name in "ab")
    np.testing.assert_allclose(a.image_embedding, b.image_embedding, atol=1e-6)


@pytest.mark.slow
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
    with pytest.raises(NemoError, match=r"weights\.pt .*(refused|was not opened)"):
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
        (Path.unlink, "cannot be opened"),
        pytest.param(_truncate, "is corrupt", marks=pytest.mark.slow),
        pytest.param(lambda path: path.write_bytes(b"no photo"), "is corrupt", marks=pytest.mark.slow),
        (lambda path: Image.new("RGB", (30, 20)).save(path), "has a different size than annotated"),
    ],
)
def test_a_bad_photo_is_named_and_what_was_done_is_kept(dataset, clip, tmp_path, monkeypatch, spoil, message):
    monkeypatch.setattr("nemo_dali.mining._inputs.DECODED", 4)
    monkeypatch.setattr("nemo_dali.mining.job.thread_count", lambda: 1)
    _mine(dataset, clip, tmp_path / "whole.neg.h5")
    _mine(dataset, clip, tmp_path / "a.neg.h5", depth=3)
    earlier = (tmp_path / "a.neg.h5").read_bytes()
    victim = tmp_path / "photos" / "9.jpg"
    good = victim.read_bytes()
    spoil(victim)
    with pytest.raises(PhotoError, match=rf"A photo {message}: .*photos/9\.jpg .*continues where it stopped") as error:
        _mine(dataset, clip, tmp_path / "a.neg.h5")
    assert "\n" not in str(error.value)
    assert (tmp_path / "a.neg.h5").read_bytes() == earlier
    assert read_table(tmp_path / "a.neg.h5.partial").progress.tolist() == [8, 0, 0]  # two micro-batches of four
    victim.write_bytes(good)
    report = _mine(dataset, clip, tmp_path / "a.neg.h5")
    assert (tmp_path / "a.neg.h5").read_bytes() == (tmp_path / "whole.neg.h5").read_bytes()
    assert report.photos == PHOTOS and not (tmp_path / "a.neg.h5.partial").exists()


def test_photos_in_another_folder(dataset, clip, tmp_path):
    _mine(dataset, clip, tmp_path / "a.neg.h5")
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(PhotoError, match="--images"):
        _mine(dataset, clip, tmp_path / "b.neg.h5")
    report = _mine(dataset, clip, tmp_path / "b.neg.h5", images=tmp_path / "moved")
    assert report.fingerprint == NegativeTable.open(tmp_path / "a.neg.h5").fingerprint


def test_one_photo_is_too_few(clip, tmp_path):
    with pytest.raises(NemoError, match="only one photo"):
        _mine(make_noise(tmp_path, photos=1), clip, tmp_path / "a.neg.h5")


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 0},
        {"batch_size": 0},
        {"device": "abacus"},
        {"probes": 3},
        {"probes": 0, "approximate": True},
        {"model": None},
        {"pretrained": ["a", "b"]},
        {"embeddings": "x.neg.h5"},
    ],
)
def test_wrong_arguments(dataset, clip, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        _mine(dataset, clip, tmp_path / "a.neg.h5", **options)
    assert not list(tmp_path.glob("a.neg.h5*"))


def test_no_place_for_the_table_is_told_before_the_work(dataset, clip, tmp_path):
    with pytest.raises(FileFormatError, match="Cannot write"):
        _mine(dataset, clip, tmp_path / "nowhere" / "a.neg.h5", model="not looked at")


def test_a_kill_between_the_arrays_of_a_block_costs_that_block_only(dataset, clip, tmp_path):
    """Rows that were not recorded as done may hold anything; those that were stay."""
    table = _mine(dataset, clip, tmp_path / "whole.neg.h5").output
    whole = NegativeTable.open(table)
    sentences, photos = len(whole.neighbors), len(whole.image_embedding)
    attributes = dict(whole.mapped.index.attributes)
    output = tmp_path / "killed.neg.h5"
    shape = {"sentences": sentences, "photos": photos, "width": whole.image_embedding.shape[1]}

    class Kill(BaseException):
        pass

    half = sentences // 2
    with pytest.raises(Kill), begin_table(output, **shape, attributes=attributes) as made:
        made.writable("text_embedding")[:] = whole.text_embedding
        made.writable("image_embedding")[:] = whole.image_embedding
        made.writable("neighbors")[:half] = whole.neighbors[:half]
        made.writable("similarity")[:half] = whole.similarity[:half]
        made.writable("neighbors")[half:] = -1  # and the similarities behind it are still to come
        for stage, rows in enumerate((photos, sentences, half)):
            made.record("progress", stage, rows.to_bytes(8, "little"))
        raise Kill
    with begin_table(output, **shape, attributes=attributes) as made:
        assert made.file.progress.tolist() == [photos, sentences, half]


def test_a_table_too_shallow_for_a_mosaic_is_finished_and_told(dataset, clip, tmp_path):
    report = _mine(dataset, clip, tmp_path / "shallow.neg.h5", depth=2)
    table = NegativeTable.open(report.output)
    proposal = propose(measure_curves(Dataset.open(dataset), table))
    assert proposal.policy.top_k == 3 and any("mine deeper" in line.lower() for line in proposal.why)


def test_of_a_long_sentence_that_was_cut_only_the_beginning_is_shown(tmp_path):
    dataset = Dataset.open(index_refer(tmp_path, photos=6))
    given = write_ranked_table(tmp_path / "given.neg.h5", dataset)
    report = mine(dataset.path, embeddings=given.path, output=tmp_path / "a.neg.h5")
    long = replace(report, cut=("the brown dog " * 70, "short"))
    (line,) = [line for line in str(long).split("\n") if "cut" in line]
    assert line.startswith("2 sentences are longer than the model takes and were cut, such as 'the brown dog the")
    assert len(line) < 140 and line.endswith("'...")
    assert "such as 'short'" in str(replace(report, cut=("short",)))


@pytest.mark.parametrize("none", [3, 1])
def test_own_photos_of_sentences_without_a_target_do_not_count(tmp_path, none):
    dataset = Dataset.open(index_grefs(tmp_path, none=none))
    given = write_ranked_table(tmp_path / "given.neg.h5", dataset)
    report = mine(dataset.path, embeddings=given.path, output=tmp_path / "a.neg.h5")
    targeted = dataset.refs.empty[dataset.sentences.ref] == 0
    assert report.no_target == (~targeted).sum() > 0
    if none == 1:
        assert "own photo" not in str(report).partition("depth:")[0] and "has a target" in report.advice
        return
    own_rank = NegativeTable.open(report.output).own_rank[targeted]
    assert report.median_rank == np.median(own_rank) and report.recall_at_10 == (own_rank <= 10).mean()
    assert "of the sentences with a target, among" in str(report)


@pytest.mark.parametrize("approximate", [False, True])
def test_where_everything_is_excluded_that_is_told(dataset, clip, tmp_path, approximate):
    if approximate:
        pytest.importorskip("faiss")
    exclusions = Exclusions(similar_photos=-1.0)
    with pytest.raises(NemoError, match=r"No sentence has a candidate: .* remove .*empty\.neg\.h5\.partial, or choose"):
        _mine(dataset, clip, tmp_path / "empty.neg.h5", exclusions=exclusions, approximate=approximate)
    assert not (tmp_path / "empty.neg.h5").exists()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_of_another_context_length_are_not_interpolated(clip, tmp_path, kind):
    folder, network = clip
    weights = folder / "tiny.pt"
    if kind == "safetensors":
        weights = tmp_path / "tiny.safetensors"
        save_file(network.state_dict(), weights)
        load_clip(str(folder / "tiny.json"), str(weights), device="cpu")  # with its own config it loads
    config = json.loads((folder / "tiny.json").read_text())
    config["text_cfg"]["context_length"] += 4
    (tmp_path / "longer.json").write_text(json.dumps(config))
    with pytest.raises(NemoError, match="a different image size or context length"):
        load_clip(str(tmp_path / "longer.json"), str(weights), device="cpu")


def test_bounds_that_differ_in_the_seventh_digit_are_told_apart(dataset):
    words = [
        Exclusions(similar_photos=bound).of(Dataset.open(dataset))[1]["exclusions"][-1]
        for bound in (0.9000001, 0.9000004)
    ]
    assert words[0] != words[1]


@pytest.mark.slow
def test_what_embeddings_come_from_cannot_change_in_the_middle(dataset, clip, tmp_path, monkeypatch):
    folder, _ = clip
    both = {"model": [str(folder / "tiny.json")] * 2, "pretrained": [str(folder / "tiny.pt")] * 2, "device": "cpu"}
    given = mine(dataset, output=tmp_path / "both.neg.h5", **both).output
    monkeypatch.setattr("nemo_dali.mining.job._rank", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mine(dataset, output=tmp_path / "cut.neg.h5", embeddings=given)
    with pytest.raises(FileFormatError, match="begun with --embeddings"):
        mine(dataset, output=tmp_path / "cut.neg.h5", **both)


@pytest.mark.parametrize(("device", "error"), [("cuda", NemoError), ("foo", ValueError), ("", ValueError)])
def test_a_wrong_device_is_told_with_given_embeddings_too(dataset, clip, tmp_path, device, error):
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    given = _mine(dataset, clip, tmp_path / "given.neg.h5").output
    with pytest.raises(error, match="device"):
        mine(dataset, output=tmp_path / "again.neg.h5", embeddings=given, device=device)


def test_embeddings_of_a_table_must_be_finite(dataset, clip, tmp_path):
    given = _mine(dataset, clip, tmp_path / "given.neg.h5").output
    forge(given, lambda parts: parts.arrays["image_embedding"].__setitem__((3, 0), np.nan))
    with pytest.raises(NemoError, match=r"given.neg.h5 is damaged: /image_embedding has a row that is not of unit"):
        mine(dataset, output=tmp_path / "again.neg.h5", embeddings=given)
    assert not (tmp_path / "again.neg.h5.partial").exists()


def test_a_config_that_asks_for_code_is_refused(dataset, clip, tmp_path):
    folder, _ = clip
    config = json.loads((folder / "tiny.json").read_text())
    config["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "evil.json").write_text(json.dumps(config))
    with pytest.raises(NemoError, match="trust_remote_code"):
        load_clip(str(tmp_path / "evil.json"), str(folder / "tiny.pt"), device="cpu")
