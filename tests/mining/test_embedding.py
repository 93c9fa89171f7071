"""Embedding: the model's own vectors, whatever is trimmed, shared or threaded."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nemo_dali.data.dataset import Dataset
from nemo_dali.distributed.ranks import Ranks
from nemo_dali.errors import NemoError
from nemo_dali.mining import embedding
from nemo_dali.mining._inputs import Photos, Sentences
from nemo_dali.mining.clip import load_clip
from nemo_dali.mining.embedding import embed
from tests.helpers.files import make_noise
from tests.helpers.turned import index_turned, write_turned

TEXTS = [
    "left man",
    "the man on the far left side of the photo who wears a hat and a coat and shoes",
    "dog",
    "left man",
    "café, naïve ☃ 狗",
    "DOG!",
    "red chair",
]


@pytest.fixture(scope="module")
def loaded(clip):
    return load_clip(str(clip[0] / "tiny.json"), str(clip[0] / "tiny.pt"), device="cpu")


def run(inputs, loaded, rows, *, batch_size=4, done=0, workers=2, scale=1.0, into=None):
    found = np.zeros((rows, loaded.width), np.float32) if into is None else into
    records = []
    options = {"done": done, "batch_size": batch_size, "scale": scale, "workers": workers}
    stage = embed(inputs, loaded, found, ranks=Ranks(), record=records.append, **options)
    return found, records, stage


def test_sentences_get_the_models_own_vectors(loaded, clip):
    import torch

    inputs = Sentences(loaded, TEXTS, batch_size=4)
    found, records, stage = run(inputs, loaded, len(TEXTS))
    with torch.inference_mode():
        expected = clip[1].encode_text(loaded.tokenizer(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found[0].tobytes() == found[3].tobytes()
    assert inputs.rows == 6 and records == [4, 6] and stage.rows == 6
    assert inputs.cut == [TEXTS[1]]


def test_short_sentences_are_given_few_tokens(loaded):
    inputs = Sentences(loaded, TEXTS, batch_size=2)
    shapes = [batch.shape for batch in inputs.batches(range(3))]
    assert [rows for rows, _ in shapes] == [2, 2, 2]
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths) and lengths[0] < 6 and lengths[-1] == 12


@pytest.mark.parametrize("change", ["pooling", "mask"])
def test_a_text_encoder_that_looks_ahead_gets_whole_sentences(clip, change):
    changed = load_clip(str(clip[0] / "tiny.json"), str(clip[0] / "tiny.pt"), device="cpu")
    if change == "pooling":
        changed.network.text_pool_type = "last"
    else:
        changed.network.attn_mask = None
    assert {batch.shape[1] for batch in Sentences(changed, TEXTS, batch_size=2).batches(range(3))} == {12}


@pytest.mark.parametrize("texts", [["a man", ""], [" \t", "a man"]])
def test_a_sentence_without_text_is_told(loaded, texts):
    with pytest.raises(NemoError, match=rf"Sentence {texts.index(min(texts, key=len))} of the data set has no text"):
        Sentences(loaded, texts, batch_size=2)


def test_photos_get_the_models_own_vectors(loaded, clip, tmp_path):
    import torch

    dataset = Dataset.open(make_noise(tmp_path, photos=21))
    inputs = Photos(loaded, dataset, batch_size=4, num_threads=2)
    photos = [Image.open(dataset.photo_path(row)) for row in range(21)]
    assert {photo.mode for photo in photos} == {"RGB", "L"}
    expected = torch.stack([loaded.transform(photo) for photo in photos])
    given = torch.cat(list(inputs.batches(range(6))))
    assert torch.equal(given[:21], expected) and torch.equal(given[21], expected[20])  # decoded to the same bits
    found, records, _ = run(inputs, loaded, 21)
    with torch.inference_mode():
        np.testing.assert_allclose(found, clip[1].encode_image(expected, normalize=True), atol=2e-6)
    assert records[-1] == 21


def test_photos_that_exif_turns_are_embedded_upright(loaded, tmp_path):
    import torch

    made = write_turned(tmp_path)
    seen = []
    for files in (index_turned(made, "apply"), index_turned(made, "refuse", upright=True)):
        inputs = Photos(loaded, Dataset.open(files.dataset), batch_size=4, num_threads=1)
        seen.append(torch.cat(list(inputs.batches(range(5)))))
    assert torch.equal(*seen)


def test_threads_rounds_and_resumption_change_no_byte(loaded, monkeypatch):
    texts = [f"{word} {number}" for word in ("man", "left dog", "the red chair") for number in range(9)]
    whole, *_ = run(Sentences(loaded, texts, batch_size=4), loaded, 27)
    for workers in (1, 3):
        assert run(Sentences(loaded, texts, batch_size=4), loaded, 27, workers=workers)[0].tobytes() == whole.tobytes()
    monkeypatch.setattr(embedding, "ROUND_S", 0.0)
    again, records, _ = run(Sentences(loaded, texts, batch_size=4), loaded, 27)
    assert again.tobytes() == whole.tobytes() and records == [4, 8, 12, 16, 20, 24, 27]
    half, inputs = whole.copy(), Sentences(loaded, texts, batch_size=4)
    half[inputs._sentence[12:]] = 0
    _, records, stage = run(inputs, loaded, 27, done=12, into=half)
    assert half.tobytes() == whole.tobytes() and records == [16, 20, 24, 27] and stage.rows == 15


def test_the_vectors_of_several_models_share_the_length(loaded):
    plain = run(Sentences(loaded, TEXTS, batch_size=4), loaded, 7)[0]
    half = run(Sentences(loaded, TEXTS, batch_size=4), loaded, 7, scale=0.5)[0]
    np.testing.assert_array_equal(half, plain * 0.5)


def test_torchs_settings_come_back(loaded):
    import torch

    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    run(Sentences(loaded, TEXTS, batch_size=4), loaded, 7)
    assert (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32) == before


def test_torchs_new_settings_of_precision_are_kept_too():
    """In a process of its own: torch does not forget which of its settings were used."""
    code = """
import torch
from nemo_dali.mining._precision import deterministic_convolutions, exact_float32
backends = torch.backends
places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
def found():
    return [place.fp32_precision for place in places] + [backends.cudnn.benchmark, backends.cudnn.deterministic]
for place, precision in zip(places, ("tf32", "tf32", "ieee")):
    place.fp32_precision = precision
backends.cudnn.benchmark = True
before = found()
with exact_float32(), deterministic_convolutions():
    assert found() == ["ieee"] * 3 + [False, True]
assert found() == before == ["tf32", "tf32", "ieee", True, False]
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_that_waits_is_told_from_one_that_works(loaded, monkeypatch):
    import time

    class Slow(Sentences):
        def batches(self, numbers):
            for batch in super().batches(numbers):
                time.sleep(0.05)
                yield batch

    inputs = Slow(loaded, [f"man {number}" for number in range(40)], batch_size=4)
    stage = run(inputs, loaded, 40)[2]
    assert 0.25 < stage.starved <= stage.seconds
    encode = Sentences.encode

    def slowly(self, batch):
        time.sleep(0.05)
        return encode(self, batch)

    monkeypatch.setattr(Sentences, "encode", slowly)
    stage = run(Sentences(loaded, [f"man {number}" for number in range(40)], batch_size=4), loaded, 40)[2]
    assert stage.starved < 0.1 * stage.seconds


@pytest.mark.gpu
def test_vectors_of_a_gpu_are_the_cpus_nearly_and_the_same_each_time(clip, tmp_path):
    on_gpu, on_cpu = (
        load_clip(str(clip[0] / "tiny.json"), str(clip[0] / "tiny.pt"), device=d) for d in ("cuda", "cpu")
    )
    dataset = Dataset.open(make_noise(tmp_path, photos=21))
    photos = [run(Photos(c, dataset, batch_size=4, num_threads=2), c, 21)[0] for c in (on_gpu, on_gpu, on_cpu)]
    assert photos[0].tobytes() == photos[1].tobytes()
    np.testing.assert_allclose(photos[0], photos[2], atol=1e-4)
    texts = [run(Sentences(c, TEXTS, batch_size=4), c, len(TEXTS))[0] for c in (on_gpu, on_cpu)]
    np.testing.assert_allclose(*texts, atol=1e-4)
