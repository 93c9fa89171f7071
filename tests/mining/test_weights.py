"""Weights in every form ▸ the tensors that PyTorch reads from it, or one sentence; no code of a file's runs."""

import io
import json
import logging
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_dali.errors import NemoError
from nemo_dali.mining._weights import read_weights
from nemo_dali.mining.clip import load_clip
from tests.helpers.bounds import fuzz, mutate_bytes, outcome
from tests.helpers.clip import CLIP_CONFIG, OPENAI_CONFIG, write_openai_archive
from tests.helpers.counts import examples

# PyTorch 2.10 says that TorchScript will go; archives stay. Tracing tells of the shapes that it fixes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def read(path: Path) -> dict[str, torch.Tensor]:
    with read_weights(path).readable() as file:
        tensors: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
        return tensors


def check_equal(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


class Tower(torch.nn.Module):
    """Whatever a module can hold besides parameters, and tensors of several kinds, views and repetitions."""

    def __init__(self) -> None:
        super().__init__()
        shared = torch.nn.Linear(3, 3, bias=False)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4).half(), torch.nn.LayerNorm(4), shared)
        self.again = shared
        self.scales = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.randn(2)), torch.nn.Parameter(torch.tensor(3.0))]
        )
        numbers = torch.arange(24)
        self.register_buffer("turned", numbers.reshape(4, 6).t()[1:3])
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0, 5))
        self.register_buffer("wide", torch.randn(2, 3).double().bfloat16())
        self.register_buffer("missing", None)
        self.sizes, self.names, self.pair = [1, 2], {"a": 1}, (1, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(x) * self.sizes[0] + self.names["a"] + self.pair[1]


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripted") / "tower.pt"
    torch.jit.script(Tower()).save(str(path))
    return path


@pytest.fixture(scope="session")
def openai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openai") / "tiny.pt"
    write_openai_archive(path)
    (path.parent / "tiny.json").write_text(json.dumps(OPENAI_CONFIG))
    return path


def test_an_archive_gives_the_tensors_that_torchscript_gives(scripted: Path) -> None:
    expected = torch.jit.load(str(scripted)).state_dict()
    assert len(expected) == 12
    check_equal(read(scripted), expected)
    assert read_weights(scripted).shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def test_an_archive_of_openai_is_the_model_that_its_state_dict_is(openai: Path, tmp_path: Path) -> None:
    import open_clip

    state = torch.jit.load(str(openai)).state_dict()
    assert {"input_resolution", "context_length", "vocab_size", "attn_mask"} <= state.keys()
    del state["attn_mask"]  # OpenAI's own model makes it anew too
    reference = open_clip.model.build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).float()
    plain = {name: tensor for name, tensor in state.items() if name in reference.state_dict()}
    assert plain.keys() == reference.state_dict().keys() and plain["visual.proj"].dtype == torch.float16
    torch.save(plain, tmp_path / "plain.pt")

    config = str(openai.with_suffix(".json"))
    clip = load_clip(config, str(openai), device="cpu")
    check_equal(clip.network.state_dict(), reference.state_dict())
    assert clip.weights_hash == load_clip(config, str(tmp_path / "plain.pt"), device="cpu").weights_hash
    photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(clip.network.encode_image(photos), reference.encode_image(photos))


class Writer(torch.nn.Module):
    """Writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.training, self.read = path, False, torch.zeros(1)

    def forward(self) -> None:
        pass

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        self.read = torch.from_file(self.path, shared=True, size=4)


class Holder(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.layer, self.writer = torch.nn.Linear(2, 2), Writer(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.writer()
        return self.layer(x)


def test_the_code_of_an_archive_does_not_run(tmp_path: Path) -> None:
    written = tmp_path / "written"
    torch.jit.script(Holder(str(written))).save(str(tmp_path / "x.pt"))
    assert read(tmp_path / "x.pt").keys() == {"layer.weight", "layer.bias"}
    assert not written.exists()
    torch.jit.load(str(tmp_path / "x.pt"))
    assert written.exists()


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Options:
    """Of a module that no library has."""


def checkpoint(**more: Any) -> dict[str, Any]:
    """What a training run saves: a state dict, some of it views of one storage, and what else it knows."""
    numbers = torch.arange(10.0)
    state = OrderedDict(a=numbers[2:8].reshape(2, 3).t(), b=numbers, c=torch.nn.Parameter(torch.ones(2).half()))
    state["d"] = torch.tensor(7)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    return {"epoch": 3, "state_dict": state, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), **more}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "more",
    [
        {"best": np.float64(0.5)},
        {"scores": [np.float32(1), np.int64(2), np.bool_(True)], "curve": np.arange(5.0)},
        {"model": torch.nn.Linear(2, 2), "when": np.datetime64("2020-01-01")},
    ],
)
def test_a_checkpoint_with_objects_of_numpy_and_pytorch_is_read(tmp_path: Path, new: bool, more: Any) -> None:
    whole = checkpoint(**more)
    torch.save(whole, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)
    check_equal(read(tmp_path / "x.pt"), whole["state_dict"])


@pytest.mark.parametrize("new", [True, False])
def test_a_model_comes_out_the_same_beside_a_numpy_scalar(clip: Any, tmp_path: Path, new: bool) -> None:
    state = {f"module.{name}": tensor for name, tensor in clip[1].state_dict().items()}
    saved = {"state_dict": state, "best": np.float64(0.5)}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    given = load_clip(str(clip[0] / "tiny.json"), str(clip[0] / "tiny.pt"), device="cpu")
    assert (
        load_clip(str(clip[0] / "tiny.json"), str(tmp_path / "x.pt"), device="cpu").weights_hash == given.weights_hash
    )


@pytest.mark.parametrize("new", [True, False])
def test_objects_of_other_libraries_are_refused_by_name(tmp_path: Path, new: bool) -> None:
    torch.save(checkpoint(best=np.float64(1), options=Options()), tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(NemoError, match=r"x\.pt wants to use 'tests\.mining\.test_weights\.Options', and was not open"):
        read_weights(tmp_path / "x.pt")


# --- damage and forgery ----------------------------------------------------------------------------------------------


def load(path: Path) -> object:
    return read(path)


def rewrite(path: Path, edit: Any, **compression: Any) -> None:
    """The archive with other parts: ``edit`` gets and gives the content by name below the root, None leaves it out."""
    with zipfile.ZipFile(path) as old:
        parts = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    parts = edit(parts) or parts
    with zipfile.ZipFile(path, "w", **compression) as new:
        for name, content in parts.items():
            new.writestr(f"x/{name}", content)


def put(name: str, content: bytes) -> Any:
    return lambda parts: parts | {name: content}


def without(name: str) -> Any:
    return lambda parts: {key: content for key, content in parts.items() if key != name}


def change(old: bytes, new: bytes) -> Any:
    def edit(parts: dict[str, bytes]) -> dict[str, bytes]:
        assert old in parts["data.pkl"]
        return parts | {"data.pkl": parts["data.pkl"].replace(old, new, 1)}

    return edit


MODULE = b"c__torch__\nM\n)\x81"  # an object of a class of the archive's own
ITSELF = b"\x80\2" + MODULE + b"q\0}X\1\0\0\0ah\0sb."
DOUBLED = b"\x80\2" + MODULE + b"".join(
    b"q%c" % i + MODULE + b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cub" % (i, i) for i in range(25)
) + b"."  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (without("data.pkl"), "it has 0 parts that describe tensors"),
        (put("data.pkl", b""), "is damaged"),
        (put("data.pkl", b"\x80\2}."), "holds no tensors by name"),
        (put("data.pkl", b"\x80\2" + MODULE + b"."), "holds no tensors by name"),
        (put("data.pkl", b"\x80\2cposix\nsystem\nX\4\0\0\0true\x85R."), "wants to use 'posix.system'"),
        (put("data.pkl", b"\x80\2cbuiltins\neval\nX\1\0\0\0001\x85R."), "wants to use 'builtins.eval'"),
        (put("data.pkl", ITSELF), "nests modules more than 32 deep"),
        (put("data.pkl", DOUBLED), "repeats its modules"),
        (put("data.pkl", b"\x80\2]" + 2_000_000 * b"\x8f" + b"."), "more containers"),
        (without("data/0"), "it lacks '0'"),
        (put("data/0", b"12"), "'0' has a different size"),
        (put("byteorder", b"big"), "a different byte order"),
        (change(b"HalfStorage", b"ComplexFloatStorage"), "of the kind 'ComplexFloatStorage'"),
        (change(b"storage", b"stOrage"), "is damaged"),
        (change(b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict"), "holds no tensors by name"),
    ],
)  # fmt: skip
def test_malformed_archives_are_told_in_one_sentence(scripted: Path, tmp_path: Path, edit: Any, reason: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(scripted.read_bytes())
    rewrite(path, edit)
    assert reason in outcome(load, path)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        *((1, (24,), (1,)), (0, (25,), (1,)), (0, (4, 7), (6, 1))),
        *((0, (10**9, 24), (0, 1)), (0, (2, 2), (1,)), (-1, (2,), (1,))),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path: Path, offset: int, shape: Any, stride: Any) -> None:
    class Forged:
        def __reduce__(self) -> Any:
            storage = torch.arange(24.0).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, offset, shape, stride, False, OrderedDict())

    torch.save({"a": Forged(), "best": np.float64(1)}, tmp_path / "x.pt")
    assert "is damaged" in outcome(load, tmp_path / "x.pt")


def test_packed_code_is_let_be_and_packed_tensors_are_refused(scripted: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(scripted.read_bytes())
    with zipfile.ZipFile(path) as archive:
        assert any(part.compress_type for part in archive.infolist())  # as TorchScript writes code
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tower/code/more.py", bytes(10**8))
    check_equal(read(path), torch.jit.load(str(scripted)).state_dict())
    rewrite(path, lambda parts: None, compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in outcome(load, path)


def test_parts_that_are_encrypted_or_damaged_are_told(scripted: Path, tmp_path: Path) -> None:
    content = scripted.read_bytes()
    with zipfile.ZipFile(scripted) as archive:
        infos = {part.filename.partition("/")[2]: part for part in archive.infolist()}
    directory = content.index(b"PK\1\2")
    encrypted = bytearray(content)
    encrypted[directory + 8] |= 1
    encrypted[infos["data/0"].header_offset + 6] |= 1
    for name, changed in (("encrypted", bytes(encrypted)), ("short", content[: len(content) // 2])):
        (tmp_path / f"{name}.pt").write_bytes(changed)
        assert f"{name}.pt is damaged" in outcome(load, tmp_path / f"{name}.pt")
    flipped = bytearray(content)
    flipped[content.index(torch.jit.load(str(scripted)).state_dict()["scales.0"].numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    assert "flipped.pt is damaged (Bad CRC-32" in outcome(load, tmp_path / "flipped.pt")


def test_no_room_for_the_copy_is_told(scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        NemoError, match=r"could not be copied to .* \(.*No space left.*\)\. Set the environment variable TMPDIR"
    ):
        read(scripted)


PIECES = [
    *(b"h\0", b"q\0", b"q\1", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q", b"s", b"u", b"(", b"}", b")", b"\x81"),
    *(b"J\xff\xff\xff\x7f", b"K\0", b"N", b"0", b"2", b".", MODULE, b"ctorch._utils\n_rebuild_tensor_v2\n", b"]", b"a"),
    *(b"ctorch\nHalfStorage\n", b"X\1\0\0\0000", b"ccollections\nOrderedDict\n", b"numpy", b"\x8a\x08" + b"\xff" * 8),
]


def load_with_description(path: Path) -> object:
    """The archive beside the file with another description of its tensors."""
    with zipfile.ZipFile(path.with_name("seed.pt")) as old, zipfile.ZipFile(path.with_name("y.pt"), "w") as new:
        for name in old.namelist():
            new.writestr(name, path.read_bytes() if name.endswith("/data.pkl") else old.read(name))
    return read(path.with_name("y.pt"))


def mutate(random: Any, seeds: Any) -> bytes:
    return mutate_bytes(random, seeds, pieces=PIECES)


@pytest.mark.fuzz
@pytest.mark.slow
def test_any_description_is_read_or_refused(scripted: Path, tmp_path: Path) -> None:
    (tmp_path / "seed.pt").write_bytes(scripted.read_bytes())
    with zipfile.ZipFile(scripted) as archive:
        seed = archive.read("tower/data.pkl")
    assert fuzz(load_with_description, [seed], mutate, tmp_path / "x.pkl", examples(2000), at_once=500) > 0


# --- QuickGELU -------------------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture, model: str | Path, weights: str | Path) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nemo_dali"):
        load_clip(str(model), str(weights), device="cpu")
    return " ".join(record.getMessage() for record in caplog.records if record.name != "root")


def test_openais_weights_without_quick_gelu_are_told(
    openai: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(caplog, openai.with_suffix(".json"), openai) == ""
    (tmp_path / "plain.json").write_text(json.dumps(OPENAI_CONFIG | {"quick_gelu": False}))
    assert warnings_of(caplog, tmp_path / "plain.json", openai) == (
        f"{openai} was trained with QuickGELU (like everything that OpenAI published), but {tmp_path / 'plain.json'} "
        "is a model without it, which makes its embeddings worse. Set 'quick_gelu' to true in a model config."
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny-openai.pt", "tag openai"),
        ("ViT-B-32_metaclip-400m.pt", "tag metaclip_400m"),
        ("b32_400m.pt", "tag metaclip_400m"),
        ("x-quickgelu.pt", "by its name"),
        ("models--timm--vit_base_patch32_clip_224.openai/snapshots/1/open_clip_model.pt", "tag openai"),
        ("laion400m_e32.pt", None),  # with it for one model, without for others
        ("laion2b_s34b_b79k.pt", None),
        ("openai/tiny.pt", None),
        ("cc12m.pt", None),  # of one model only
        ("ViT-B-32.pt", None),
    ],
)
def test_files_that_open_clip_knows_are_told_by_name(
    clip: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, reason: str | None
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((clip[0] / "tiny.pt").read_bytes())
    told = warnings_of(caplog, clip[0] / "tiny.json", path)
    assert reason in told if reason else told == ""
    (tmp_path / "gelu.json").write_text(json.dumps(CLIP_CONFIG | {"quick_gelu": True}))
    assert warnings_of(caplog, tmp_path / "gelu.json", path) == ""


@pytest.mark.parametrize(
    ("model", "pretrained", "remedy"),
    [
        ("ViT-B-32", "laion400m_e32", "Give the model ViT-B-32-quickgelu."),
        ("ViT-B-32", "my-laion400m-e32-copy.pt", "Give the model ViT-B-32-quickgelu."),
        ("ViT-B-32", "laion2b_s34b_b79k", None),
        ("ViT-B-16", "laion400m_e32", None),
        ("ViT-B-16", "cc12m.pt", None),
        ("ViT-B-32-quickgelu", "laion400m_e32", None),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", None),
    ],
)
def test_tags_of_open_clips_own_models(
    clip: Any, caplog: pytest.LogCaptureFixture, model: str, pretrained: str, remedy: str | None
) -> None:
    from nemo_dali.mining._quick_gelu import warn_of_quick_gelu

    weights = read_weights(clip[0] / "tiny.pt")
    warn_of_quick_gelu(model, model, pretrained, weights)
    assert caplog.text.rstrip().endswith(remedy) if remedy else caplog.text == ""


def test_legacy_storages_of_another_length_are_told(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.arange(5.0), "x": np.float64(1)}, file, _use_new_zipfile_serialization=False)
    content = file.getvalue()
    for changed in (content[:-1], content[:-28] + b"\1" + content[-27:], content[:-40]):
        (tmp_path / "x.pt").write_bytes(changed)
        assert "x.pt is damaged" in outcome(load, tmp_path / "x.pt")
