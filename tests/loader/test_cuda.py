"""Batches made on a GPU; and, without one, the same way with the GPU's part played by the host."""

import ctypes
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_dali import Loader, MosaicPolicy, NemoError, PhotoError
from nemo_dali.kernels.device import ON_DEVICE, TO_DEVICE
from nemo_dali.kernels.dlpack import read_tensors
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.kernels.tile import RESAMPLE
from nemo_dali.loader import _token_table, styles
from nemo_dali.pipeline import gpu, opening
from nemo_dali.pipeline.device_batch import DeviceBatch
from nemo_dali.tiles import make_tiles
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.files import make_files
from tests.helpers.lanes import lanes

POLICY = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, jitter=0.5, max_similarity=0.4)


def batches(files, device, epochs=2, **options):
    loader = Loader(files.dataset, files.negatives, batch_size=4, policy=POLICY, size=90, device=device, **options)
    return [batch for _ in range(epochs) for batch in loader]


def assert_same(some, others):
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert one.plan.tobytes() == other.plan.tobytes()
        assert torch.equal(one.mask.cpu(), other.mask)
        assert torch.equal(one.tokens.cpu(), other.tokens)
        assert torch.equal(one.attention_mask.cpu(), other.attention_mask)


@needs_compiler
@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16", "uint8"], fast=["float32"]))
def test_the_gpus_way_ends_in_the_cpus_batches(files, played, dtype, resample):
    options = {"dtype": dtype, "resample": resample}
    played_batches, expected = batches(files, "cuda", **options), batches(files, "cpu", **options)
    assert_same(played_batches, expected)
    for one, other in zip(played_batches, expected, strict=True):
        assert one.image.dtype == other.image.dtype and torch.equal(one.image, other.image)


MIXED = MosaicPolicy(p_mined=0.5, p_random=0.0, grids={2: 1.0, 3: 1.0}, jitter=0.5)
ONLY_SINGLES, ONLY_MOSAICS = MosaicPolicy(p_mined=0.0, p_random=0.0), MosaicPolicy(p_mined=1.0, p_random=0.0)
LETTERBOXES = [
    ("float32", "float32", "cv2-linear", MIXED),
    ("bfloat16", "float32", "pillow-bilinear", MIXED),
    ("float16", "int64", "cv2-linear", ONLY_SINGLES),
    ("uint8", "uint8", "pillow-bilinear", MIXED),
    ("uint8", "uint8", "cv2-linear", ONLY_MOSAICS),
]


def letterboxes(files, device, dtype, mask_dtype, resample, policy):
    options = {"dtype": dtype, "mask_dtype": mask_dtype, "resample": resample, "policy": policy}
    loader = Loader(files.dataset, files.negatives, batch_size=4, size=90, device=device, fit="letterbox", **options)
    made = list(loader)
    grids = np.concatenate([batch.plan["grid"] for batch in made])
    assert (policy is ONLY_SINGLES) == (grids == 1).all() and (policy is ONLY_MOSAICS) == (grids > 1).all()
    return made


@needs_compiler
@pytest.mark.parametrize(("dtype", "mask_dtype", "resample", "policy"), LETTERBOXES)
def test_the_gpus_way_ends_in_the_cpus_batches_with_letterboxes_among_mosaics(
    files, played, monkeypatch, dtype, mask_dtype, resample, policy
):
    write = DeviceBatch.write
    monkeypatch.setattr(DeviceBatch, "write", lambda *arguments: (played.launched.append("batch"), write(*arguments)))
    made = letterboxes(files, "cuda", dtype, mask_dtype, resample, policy)
    expected = letterboxes(files, "cpu", dtype, mask_dtype, resample, policy)
    assert_same(made, expected)
    for one, other in zip(made, expected, strict=True):
        assert one.image.dtype == other.image.dtype and torch.equal(one.image, other.image)
        assert one.mask.dtype == other.mask.dtype
    assert any(batch.mask.any() for batch in made)
    order = []  # of the batches that were delivered; some more were made ahead
    for batch in made:
        grid = batch.plan["grid"]
        itemsize = batch.image.itemsize
        order += [
            "batch",
            *[mosaic_gpu.kernel_name(RESAMPLE[resample], itemsize), "write_masks"] * bool((grid > 1).any()),
            "take_tokens_2",
            *[letterbox_gpu.kernel_name(itemsize)] * bool((grid == 1).any()),
        ]
    assert played.launched[: len(order)] == order
    assert {kind for kind, _ in played.copies} == {TO_DEVICE} and len(played.copies) == played.launched.count("batch")


@needs_compiler
@pytest.mark.parametrize("words", [None, lambda sentence: [1, 2]], ids=["", "masked"])
@pytest.mark.parametrize("share", [_token_table.SHARE, 0])
def test_text_is_the_cpus_whether_or_not_its_tokens_fit_on_the_gpu(files, played, monkeypatch, share, words):
    monkeypatch.setattr(_token_table, "SHARE", share)
    played_batches, expected = (batches(files, device, masked_words=words) for device in ("cuda", "cpu"))
    assert_same(played_batches, expected)
    for one, other in zip(played_batches, expected, strict=True):
        texts = [(one.tokens, other.tokens), (one.attention_mask, other.attention_mask)]
        texts += [(one.masked_tokens, other.masked_tokens)] if words else []
        for text, of_cpu in texts:
            assert text.dtype == of_cpu.dtype == torch.int64 and text.is_contiguous() and torch.equal(text, of_cpu)
    assert ("take_tokens_2" in played.launched) == (share > 0)
    copied = [kind for kind, _ in played.copies]
    fed = copied.count(TO_DEVICE)  # one copy a batch, with all text that is made on the host
    assert copied.count(ON_DEVICE) == fed * (bool(words) + (not share))


class There(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("style", styles.STYLES)
def test_no_style_copies_pageable_memory_to_a_gpu(files, style):
    """Such a copy makes the host wait; torch refuses it where there is no GPU at all."""
    options = {"batch_size": 3, "policy": ONLY_SINGLES, "size": 20, "fit": "letterbox", "mask_dtype": "float32"}
    batch = next(iter(Loader(files.dataset, files.negatives, masked_words=lambda sentence: [1], **options)))
    tensors = {name: getattr(batch, name) for name in ("image", "mask", "tokens", "attention_mask", "masked_tokens")}
    there = replace(batch, **{name: tensor.as_subclass(There) for name, tensor in tensors.items()})
    levels = (tensors["mask"] * 255).round().byte().as_subclass(There)
    masks = styles.masks_of(levels, np.array([True, False, True]), "float32")
    assert masks.max() <= 255 and torch.equal(masks[0].as_subclass(torch.Tensor), tensors["mask"][0])
    assert type(styles.arrange(there, style)) is type(styles.arrange(batch, style))


@needs_compiler
def test_batches_are_safe_to_keep_and_a_pass_can_be_given_up(files, played):
    loader = Loader(files.dataset, files.negatives, batch_size=4, policy=POLICY, size=40, device="cuda")
    first = next(iter(loader))
    copy = first.image.clone()
    kept = list(loader)  # the same epoch anew, with what was made ahead thrown away
    assert torch.equal(kept[0].image, copy) and torch.equal(first.image, copy)
    assert len({batch.image.data_ptr() for batch in kept}) == len(kept) == len(loader)


@needs_compiler
def test_a_photo_that_cannot_be_decoded_is_named_and_the_loader_goes_on(tmp_path, played):
    files = make_files(tmp_path)
    loader = Loader(files.dataset, files.negatives, batch_size=4, policy=POLICY, size=40, device="cuda", seed=3)
    expected = list(loader)
    bad = loader.corpus.photo_path(int(expected[5].plan["images"][0, 0]))
    with open(bad, "rb") as file:
        content = file.read()
    with open(bad, "wb") as file:
        file.write(content[: len(content) // 2])
    loader.set_epoch(0)
    with pytest.raises(PhotoError, match=bad):
        list(loader)
    with open(bad, "wb") as file:
        file.write(content)
    loader.set_epoch(0)
    again = list(loader)
    assert all(torch.equal(one.image, other.image) for one, other in zip(again, expected, strict=True))


@needs_compiler
def test_a_photo_of_another_size_than_annotated_is_named(tmp_path, played):
    from PIL import Image

    files = make_files(tmp_path)
    loader = Loader(files.dataset, files.negatives, batch_size=4, policy=POLICY, size=40, device="cuda")
    bad = loader.corpus.photo_path(int(loader.plan(0, [0])["images"][0, 0]))
    Image.new("RGB", (31, 32)).save(bad)
    with pytest.raises(PhotoError, match=bad):
        next(iter(loader))


def test_capsules_are_read_as_dali_made_them():
    """Addresses and shapes, by way of the Python function that the GPU's graph uses."""
    from nvidia.dali import Pipeline, fn, types

    random = np.random.default_rng(0)
    photos = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((3, 5), (1, 1), (40, 2))]
    seen = []

    def function(capsules):
        data, shapes = read_tensors(capsules)
        for address, shape in zip(data.tolist(), shapes.tolist(), strict=True):
            pixels = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), shape)
            seen.append(pixels.copy())
        return [torch.zeros(1, dtype=torch.uint8).__dlpack__() for _ in capsules]

    pipe = Pipeline(batch_size=3, num_threads=1, device_id=None)
    with pipe:
        source = fn.external_source(name="photos", ndim=3, dtype=types.UINT8)
        pipe.set_outputs(fn.dl_tensor_python_function(source, function=function, batch_processing=True))
    pipe.build()
    pipe.feed_input("photos", photos)
    pipe.run()
    assert all(np.array_equal(one, other) for one, other in zip(seen, photos, strict=True))


def test_tensors_of_other_dimensions_have_no_shape():
    capsules = [torch.zeros(shape, dtype=torch.uint8).__dlpack__() for shape in ((4,), (2, 2), (1, 2, 3))]
    assert read_tensors(capsules)[1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 3]]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", None])
def test_a_device_that_is_none_is_refused(files, device):
    with pytest.raises(ValueError, match="must be 'cpu', 'cuda' or 'cuda:N'"):
        Loader(files.dataset, files.negatives, batch_size=1, device=device)


def test_without_a_gpu_the_error_says_so(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NemoError, match=r"torch sees no CUDA device.*nemo-dali doctor"):
        Loader(files.dataset, files.negatives, batch_size=1, device="cuda")


def test_a_device_beyond_the_last_and_a_missing_cupy_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(NemoError, match="no device cuda:2: torch sees 2"):
        gpu.cuda_device("cuda:2")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(NemoError, match=r"needs CuPy.*nemo-dali\[cuda12\]"):
        gpu.cuda_device(torch.device("cuda", 1))


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says of two GPUs, of which it uses the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    gpu._warn_of_rank.cache_clear()


@pytest.mark.usefixtures("two_gpus")
def test_a_rank_that_has_chosen_no_gpu_is_warned_once(monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [gpu.cuda_device("cuda"), gpu.cuda_device(torch.device("cuda"))] == [0, 0]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "GPU 0" in record.message and "LOCAL_RANK is 1" in record.message
    assert "Call torch.cuda.set_device(local_rank) before, or give device='cuda:1'." in record.message


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("rank", "devices", "current", "device"),
    [
        ("1", 2, 1, "cuda"),  # it has chosen
        ("0", 2, 0, "cuda"),
        ("1", 2, 0, "cuda:0"),  # it says which
        ("1", 1, 0, "cuda"),  # it is shown one only
        ("7", 2, 0, "cuda"),  # more ranks than GPUs
        (None, 2, 0, "cuda"),
        ("", 2, 0, "cuda"),
        ("x", 2, 0, "cuda"),
    ],
)
def test_a_rank_that_has_chosen_or_cannot_is_not_warned(monkeypatch, caplog, rank, devices, current, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert gpu.cuda_device(device) == current and not caplog.records


def test_the_hardware_decoders_share_falls_with_the_threads():
    shares = [gpu.hardware_share(threads) for threads in (1, 2, 8, 16, 70)]
    assert shares == sorted(shares, reverse=True) and 0.11 < shares[-1] < 0.13 and shares[0] > 0.85


def test_a_full_gpu_is_told_with_the_remedy(files, played, monkeypatch):
    loader = Loader(files.dataset, files.negatives, batch_size=4, size=40, device="cuda")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(NemoError, match=r"no room for another batch.*Lower batch_size"):
        next(iter(loader))


@needs_compiler
def test_a_loader_can_be_closed_when_its_gpu_is_gone(files, played, monkeypatch):
    loader = Loader(files.dataset, files.negatives, batch_size=4, size=40, device="cuda")
    next(iter(loader))

    def gone(number):
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(gpu, "current_stream", gone)
    loader.close()  # with batches in flight
    with pytest.raises(RuntimeError, match="unknown error"):
        next(iter(loader))


@pytest.mark.gpu
@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_a_gpus_batches_are_the_cpus_but_for_the_decoder(files, dtype, resample):
    """nvJPEG's pixels are not libjpeg's: masks, tokens and plan are equal, pixels close."""
    made, expected = (batches(files, device, dtype=dtype, resample=resample) for device in ("cuda", "cpu"))
    assert_same(made, expected)
    for one, other in zip(made, expected, strict=True):
        assert one.image.is_cuda and one.image.dtype == other.image.dtype
        difference = (one.image.cpu().float() - other.image.float()).abs()
        level = 1.0 if dtype == "uint8" else 1 / 255 / 0.224
        assert difference.mean() < 2 * level


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "mask_dtype", "resample", "policy"), LETTERBOXES)
def test_a_gpus_letterboxes_are_the_cpus_but_for_the_decoder(files, dtype, mask_dtype, resample, policy):
    made, expected = (letterboxes(files, device, dtype, mask_dtype, resample, policy) for device in ("cuda", "cpu"))
    assert_same(made, expected)
    for one, other in zip(made, expected, strict=True):
        difference = (one.image.cpu().float() - other.image.float()).abs()
        assert difference.mean() < 2 * (1.0 if dtype == "uint8" else 1 / 255 / 0.224)


@pytest.mark.gpu
def test_on_a_gpu_batches_are_ready_for_the_current_stream_and_safe_to_keep(files):
    """Work on a busy side stream sees whole batches, and nothing writes into a batch that is still held."""
    options = {"batch_size": 4, "policy": POLICY, "size": 480, "dtype": "uint8", "hw_decoder_load": 0.0}
    expected = [batch.image.clone() for batch in Loader(files.dataset, files.negatives, device="cuda", **options)]
    torch.cuda.synchronize()
    loader = Loader(files.dataset, files.negatives, device="cuda", prefetch=3, **options)
    side, sums, kept = torch.cuda.Stream(), [], []
    with torch.cuda.stream(side):
        for epoch in range(3):
            for step, batch in enumerate(loader):
                torch.cuda._sleep(20_000_000)
                sums.append((batch.image != expected[step]).sum() if epoch == 0 else batch.image.sum())
                if step % 3 == 0 and epoch == 0:
                    kept.append((step, batch.image))
    side.synchronize()
    assert sum(sums[: len(loader)]) == 0
    assert all(torch.equal(image, expected[step]) for step, image in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["training thread", "dali"])
def test_on_a_gpu_resident_tiles_are_whole_and_safe_to_keep(files, tmp_path, monkeypatch, way):
    """The consumer's stream is busy, and so are those that wrote into the same memory before."""
    monkeypatch.setattr(opening, "GATHER_FROM", way)
    make_tiles(files.dataset, size=480, output=tmp_path / "all.tiles.h5", grids=(1, 2))
    options = {"batch_size": 4, "policy": MosaicPolicy(p_mined=0.5), "size": 480, "dtype": "float16"}
    names = ("image", "mask", "tokens", "attention_mask")
    expected = [
        [getattr(batch, name).cuda() for name in names] for batch in Loader(files.dataset, files.negatives, **options)
    ]
    there = {"tiles": tmp_path / "all.tiles.h5", "placement": "device", "device": "cuda", "prefetch": 3}
    loader, side, wrong = Loader(files.dataset, files.negatives, **options, **there), torch.cuda.Stream(), []
    torch.cuda.synchronize()
    for epoch in range(3):
        loader.set_epoch(0)
        with torch.cuda.stream(side if epoch == 1 else torch.cuda.current_stream()):
            for batch, tensors in zip(loader, expected, strict=True):
                torch.cuda._sleep(20_000_000)
                wrong += [(getattr(batch, name) != of).sum() for name, of in zip(names, tensors, strict=True)]
    torch.cuda.synchronize()
    assert len(wrong) == 3 * len(names) * len(loader) and not any(map(int, wrong))


@pytest.mark.gpu
@pytest.mark.parametrize("style", styles.STYLES)
@pytest.mark.parametrize("placement", [None, "device"])
def test_on_a_gpu_no_step_of_any_style_waits(files, tmp_path, style, placement):
    options = {"batch_size": 4, "size": 90, "device": "cuda", "mask_dtype": "float32", "style": style}
    options |= {"masked_words": lambda sentence: [1]}
    if placement is None:
        options |= {"policy": MIXED, "fit": "letterbox"}
    else:
        make_tiles(files.dataset, size=90, output=tmp_path / "all.tiles.h5", grids=(1, 2))
        options |= {"tiles": tmp_path / "all.tiles.h5", "placement": placement, "policy": MosaicPolicy(p_mined=0.5)}
    loader = Loader(files.dataset, files.negatives, infinite=True, **options)
    steps = iter(loader)
    for _ in range(loader.prefetch + 1):  # kernels are loaded, and memory is there
        next(steps)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype, and sets it
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(5):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()


@pytest.mark.gpu
def test_on_a_gpu_a_bad_photo_is_named_and_the_loader_goes_on(tmp_path):
    files = make_files(tmp_path)
    loader = Loader(
        files.dataset, files.negatives, batch_size=4, policy=POLICY, size=40, device="cuda", seed=3, hw_decoder_load=0.0
    )
    expected = [batch.image.cpu() for batch in loader]
    bad = Path(loader.corpus.photo_path(int(loader.plan(0, [20])["images"][0, 0])))
    content = bad.read_bytes()
    bad.write_bytes(b"no photo")
    loader.set_epoch(0)
    with pytest.raises(PhotoError, match=bad.name):
        list(loader)
    bad.write_bytes(content)
    loader.set_epoch(0)
    assert all(torch.equal(one.image.cpu(), other) for one, other in zip(loader, expected, strict=True))


@pytest.mark.parametrize(
    "way", [pytest.param("played", marks=needs_compiler), pytest.param("a GPU", marks=pytest.mark.gpu)]
)
def test_without_the_hardware_decoder_a_resume_repeats_every_bit(files, request, way):
    """From every step, with other batches ahead and other threads."""
    if way == "played":
        request.getfixturevalue("played")
    options = {"batch_size": 4, "policy": POLICY, "size": 90, "device": "cuda", "hw_decoder_load": 0.0}
    loader = Loader(files.dataset, files.negatives, **options)
    states, whole = [loader.state_dict()], []
    for batch in loader:
        whole.append(batch)
        states.append(loader.state_dict())
    loader.close()
    for done, state in enumerate(states[:-1]):
        resumed = Loader(files.dataset, files.negatives, prefetch=1 + done % 3, num_threads=1 + done % 2, **options)
        resumed.load_state_dict(state)
        rest = list(resumed)
        resumed.close()  # while the host still plays the GPU
        assert len(rest) == len(whole) - done > 0
        assert all(torch.equal(one.image, other.image) for one, other in zip(rest, whole[done:], strict=True))


@pytest.mark.gpu
def test_two_loaders_on_one_gpu_do_not_disturb_each_other(files):
    options = {
        "batch_size": 4,
        "policy": POLICY,
        "size": 90,
        "dtype": "uint8",
        "device": "cuda",
        "hw_decoder_load": 0.0,
    }
    first, second = (Loader(files.dataset, files.negatives, seed=seed, **options) for seed in (0, 1))
    alone = [[batch.image.cpu() for batch in loader] for loader in (first, second)]
    first.set_epoch(0), second.set_epoch(0)
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one.image.cpu(), alone[0][step]) and torch.equal(other.image.cpu(), alone[1][step])
