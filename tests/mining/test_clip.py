"""Model configs and weights from anywhere ▸ a model, or one sentence, soon and without a network."""

import copy
import io
import json
import os
import socket
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from nemo_dali.mining.clip import load_clip
from tests.helpers.bounds import fuzz, mutate_bytes, outcome
from tests.helpers.clip import CLIP_CONFIG
from tests.helpers.counts import examples


def read(path: Path) -> object:
    """Load the model of a config with the weights beside it; a network would be a failure."""

    def refuse(*_: object) -> None:
        print("the network was asked for", file=sys.stderr, flush=True)
        os._exit(9)

    socket.socket.connect = refuse  # type: ignore[assignment,method-assign]
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    return load_clip(str(path), str(next(path.parent.glob("tiny.*[!n]"))), device="cpu")


def write(folder: Path, clip: tuple[Path, torch.nn.Module], edit=lambda config: None, name: str = "x.json") -> Path:
    """A config beside the tiny model's weights."""
    config = copy.deepcopy(CLIP_CONFIG)
    config = edit(config) or config
    (folder / name).write_text(json.dumps(config))
    if not (folder / "tiny.pt").exists():
        (folder / "tiny.pt").write_bytes((clip[0] / "tiny.pt").read_bytes())
    return folder / name


def put(where: str, key: str, value: object):
    """An edit of a config."""

    def edit(config):
        (config[where] if where else config)[key] = value

    return edit


def test_a_sound_config_is_read_without_a_network(clip, tmp_path):
    assert outcome(read, write(tmp_path, clip)) == "None"
    whole = write(tmp_path, clip, lambda config: {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}})
    assert outcome(read, whole) == "None"


TOWERS = ("vision_cfg", "text_cfg")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        *((put(tower, "layers", value), "as 'layers'; at most") for tower in TOWERS for value in (10**9, 201, 1e300)),
        *((put(tower, "width", value), "as 'width'; at most") for tower in TOWERS for value in (10**9, 10**400)),
        (put("vision_cfg", "layers", [3, 4, 10**9, 3]), "as 'layers'"),
        (put("vision_cfg", "image_size", 10**6), "as 'image_size'"),
        (put("vision_cfg", "image_size", [4096, 10**6]), "as 'image_size'"),
        (put("vision_cfg", "image_size", "32"), "not a whole number > 0"),
        (put("vision_cfg", "patch_size", 0), "not a whole number > 0"),
        (put("vision_cfg", "width", -64), "not a whole number > 0"),
        (lambda c: c["vision_cfg"].update(image_size=4096, patch_size=1, pos_embed_type="sin_cos_2d"), "too many"),
        (put("text_cfg", "context_length", 10**6), "as 'context_length'"),
        (put("text_cfg", "heads", 10**6), "as 'heads'"),
        (put("text_cfg", "vocab_size", 10**9), "as 'vocab_size'"),
        (put("", "embed_dim", 10**6), "as 'embed_dim'"),
        (put("vision_cfg", "ls_init_value", float("nan")), "number nan"),
        (put("vision_cfg", "mlp_ratio", float("inf")), "number inf"),
        (put("vision_cfg", "mlp_ratio", 1e6), "as 'mlp_ratio'"),
        (put("", "multimodal_cfg", {"layers": 10**9}), "as 'layers'"),
        (put("text_cfg", "width", 16_000), "values, but"),
        (put("text_cfg", "vocab_size", 2_000_000), "values, but"),
        (lambda c: c["vision_cfg"].update(layers=200, width=16_384, head_width=64), "values, but"),
        (put("vision_cfg", "timm_model_name", "vit_giant_patch14_clip_224"), "values, but"),
        (put("text_cfg", "hf_model_name", "roberta-base"), "fetched from the Hugging Face Hub"),
        (put("text_cfg", "hf_model_name", "https://x.org/y"), "has the address"),
        (put("text_cfg", "hf_tokenizer_name", "timm/ViT-B-16-SigLIP"), "fetched from the Hugging Face Hub"),
        (put("text_cfg", "hf_tokenizer_name", ["roberta-base"]), "fetched from the Hugging Face Hub"),
        (put("vision_cfg", "timm_model_name", "hf-hub:timm/vit_base"), "not one of timm's own"),
        (put("vision_cfg", "timm_model_name", "hf_hub:timm/vit_base"), "not one of timm's own"),
        (put("vision_cfg", "timm_model_name", "local-dir:/tmp"), "not one of timm's own"),
        (put("vision_cfg", "timm_model_name", "no_such_model"), "cannot be loaded"),
        (put("text_cfg", "tokenizer_kwargs", {"bpe_path": "/dev/zero"}), "'tokenizer_kwargs' other than"),
        (put("text_cfg", "layers", {}), "cannot be loaded"),
        (put("vision_cfg", "act_kwargs", {"x": 5}), "cannot be loaded"),
        (put("text_cfg", "x", {"trust_remote_code": True}), "trust_remote_code"),
        (lambda config: {"model_cfg": config, "preprocess_cfg": []}, "'preprocess_cfg' that is not an object"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_more_are_refused(clip, tmp_path, edit, reason):
    sentence = outcome(read, write(tmp_path, clip, edit))
    assert reason in sentence


def test_pretrained_flags_of_timm_fetch_nothing(clip, tmp_path):
    path = write(
        tmp_path, clip, lambda c: c["vision_cfg"].update(timm_model_name="resnet18", timm_model_pretrained=True)
    )
    torch.save({"a": torch.zeros(30_000_000, dtype=torch.uint8)}, tmp_path / "tiny.pt")
    assert "cannot be loaded" in outcome(read, path)  # other tensors


def test_a_name_for_which_a_vocabulary_is_fetched(clip, tmp_path):
    assert "'siglip' is in its name" in outcome(read, write(tmp_path, clip, name="my-siglip.json"))


@pytest.mark.parametrize("text", ["[" * 10**5, "{", '{"embed_dim": ' + "9" * 10**5 + "}", "\xff", " " * (2**20 + 1)])
def test_what_is_no_config_is_told(clip, tmp_path, text):
    write(tmp_path, clip).write_bytes(text.encode("latin1"))
    assert "cannot be read" in outcome(read, tmp_path / "x.json")


def test_pipes_are_not_waited_for(clip, tmp_path):
    write(tmp_path, clip)
    (tmp_path / "x.json").unlink()
    os.mkfifo(tmp_path / "x.json")
    assert "it is not a regular file" in outcome(read, tmp_path / "x.json")
    path = write(tmp_path, clip, name="y.json")
    (tmp_path / "tiny.pt").unlink()
    os.mkfifo(tmp_path / "tiny.pt")
    assert "neither a weights file nor a tag" in outcome(read, path)


# --- weights ---------------------------------------------------------------------------------------------------------


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def packed(content: bytes) -> bytes:
    """A file of PyTorch's, of which a part is compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
        new.writestr("archive/data/99", bytes(2_000_000_000 // 8))
    return file.getvalue()


def archive(content: bytes, pickled: bytes) -> bytes:
    """A file of PyTorch's with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for part in old.infolist():
            new.writestr(part.filename, pickled if part.filename.endswith("data.pkl") else old.read(part))
    return file.getvalue()


def legacy() -> bytes:
    """The tiny model's kind of file as PyTorch before 1.6 wrote it."""
    file = io.BytesIO()
    torch.save({"x": torch.zeros(10**7)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


DOUBLED_KEY = b"\x80\2}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"K\1s."


def test_files_of_every_form_and_of_training_are_read(clip, tmp_path):
    path = write(tmp_path, clip)
    state = clip[1].state_dict()
    optimizer = torch.optim.AdamW(copy.deepcopy(clip[1]).parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    steps = {number: {"step": number} for number in range(3000)}
    checkpoint = {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer.state_dict(), "steps": steps}
    for content in (state, checkpoint):
        for new in (True, False):
            torch.save(content, tmp_path / "tiny.pt", _use_new_zipfile_serialization=new)
            assert outcome(read, path) == "None"


def expanded() -> bytes:
    file = io.BytesIO()
    tensors = {"positional_embedding": torch.zeros(1, 1).expand(10**9, 32), "x": torch.zeros(10**7)}
    torch.save(tensors, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "make", "reason"),
    [
        ("safetensors", lambda _: safetensors(b"{}", 2**60), "is damaged"),
        ("safetensors", lambda _: safetensors(b'{"a":{"dtype":"F32","shape":[1152921504606846976],'
                                              b'"data_offsets":[0,4611686018427387904]}}'), "is damaged"),
        ("safetensors", lambda _: safetensors(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],'
                                              b'"data_offsets":[0,0]}}'), "is damaged"),
        ("safetensors", lambda _: safetensors(b"[" * 10**6), "is damaged"),
        ("pt", packed, "is compressed"),
        ("pt", lambda _: expanded(), "a different image size or context length"),
        ("pt", lambda content: archive(content, DOUBLED_KEY), "as the key of a dict"),
        ("pt", lambda content: archive(content, b"\x80\2]" + 2_000_000 * b"\x8f" + b"."), "more containers"),
        ("pt", lambda content: archive(content, b"\x80\2}N" + 1_000_000 * b"\x85" + b"K\1s."), "more containers"),
        ("pt", lambda _: DOUBLED_KEY * 5, "as the key of a dict"),
        ("pt", lambda _: legacy()[:60] + DOUBLED_KEY * 5, "is damaged"),  # in what is the same in every such file
        ("pt", lambda _: legacy(), "cannot be loaded"),
        ("pt", lambda _: b"\x80\x02]" + b"\x8f" * 100, "is damaged"),
        ("pt", lambda content: content[: len(content) // 2], "is damaged"),
        ("pt", lambda _: b"", "is damaged"),
    ],
)  # fmt: skip
def test_weights_that_take_memory_are_refused(clip, tmp_path, suffix, make, reason):
    path = write(tmp_path, clip)
    content = (tmp_path / "tiny.pt").read_bytes()
    (tmp_path / "tiny.pt").unlink()
    (tmp_path / f"tiny.{suffix}").write_bytes(make(content))
    assert reason in outcome(read, path)


PIECES = [
    *(b"1e999", b"-1", b"0", b"NaN", b"9" * 400, b"1000000000", b"5000", b"true", b"null", b"[", b"{", b"]", b"}"),
    *(b'"x"', b'"hf-hub:a/b"', b'"timm_model_name": "resnet18", ', b'"hf_model_name": "x", ', b'"layers": ', b"\xff"),
    *(b'"attentional_pool": true, ', b'"pos_embed_type": "sin_cos_2d", ', b'"pool_type": "x", ', b",", b":", b'"'),
]


def mutate(random, seeds):
    return mutate_bytes(random, seeds, pieces=PIECES)


@pytest.mark.fuzz
@pytest.mark.slow
def test_any_config_is_a_model_or_refused(clip, tmp_path):
    path = write(tmp_path, clip)
    seeds = [path.read_bytes(), json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"mean": [0.5] * 3}}).encode()]
    assert fuzz(read, seeds, mutate, path, examples(1000), at_once=200) > 0
