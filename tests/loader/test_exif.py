"""Photos that EXIF turns, from the Loader: as their data set's file says, whatever makes the samples."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_dali import FileFormatError, Loader, MosaicPolicy, PhotoError
from nemo_dali.commands.torch_baseline import Samples, check_equal
from nemo_dali.data.dataset import Dataset
from nemo_dali.loader import _prefetch
from nemo_dali.tiles.build import make_tiles
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.hostile_photos import chunk, insert, segment
from tests.helpers.oracles import by_hand
from tests.helpers.turned import index_turned, write_turned

POLICY = MosaicPolicy(p_mined=0.4, p_random=0.3, grids={2: 1.0, 3: 1.0}, jitter=0.3, max_similarity=0.4)
SINGLES = MosaicPolicy(p_mined=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos of every orientation. Read-only."""
    return write_turned(tmp_path_factory.mktemp("turned"))


@pytest.fixture(scope="module")
def turned(made):
    """Their data set, orientations applied."""
    return index_turned(made, "apply")


@pytest.fixture(scope="module")
def upright(made):
    """The data set of photos that are stored as viewers show the others."""
    return index_turned(made, "refuse", upright=True)


def loader(*files, policy=POLICY, **options):
    negatives = None if policy is SINGLES else [each.negatives for each in files]
    options = {"batch_size": 4, "size": 90, "num_threads": 2} | options
    return Loader([each.dataset for each in files], negatives, policy=policy, **options)


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.plan.tobytes() == other.plan.tobytes()
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
    return ours


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "uint8"},
        {"resample": "pillow-bilinear", "prefetch": 1},
        {"fit": "letterbox", "policy": SINGLES},
        {"split_mode": "eval", "policy": None},
    ],
)
def test_samples_are_those_of_upright_photos(turned, upright, options):
    batches = assert_same(loader(turned, **options), loader(upright, **options))
    if "split_mode" in options:
        assert sum(len(batch.image) for batch in batches) == 40  # sentences
        for batch, other in zip(batches, loader(upright, **options), strict=True):
            assert np.array_equal(batch.sizes, other.sizes)
            for mask, expected in zip(batch.original_masks(), other.original_masks(), strict=True):
                assert np.array_equal(mask, expected) and mask.any()


def test_as_stored_where_the_file_says_so(made):
    ignored = index_turned(made, "ignore")
    dataset, rows = Dataset.open(ignored.dataset), 0
    for batch in loader(ignored, dtype="uint8", size=64):
        for image, mask, row in zip(batch.image.numpy(), batch.mask.numpy(), batch.plan, strict=True):
            expected, its_mask = by_hand(dataset, row, 64, "cv2-linear")
            assert np.array_equal(image, expected) and np.array_equal(mask, its_mask)
            rows += 1
    assert rows == 20


def test_each_data_set_of_a_mix_is_shown_as_its_own_file_says(made, turned, upright, tmp_path):
    ignored = index_turned(made, "ignore")
    (tmp_path / "stored").mkdir()
    for path in made.photos.iterdir():  # what the photos are without EXIF
        with Image.open(path) as photo:
            Image.fromarray(np.asarray(photo)).save(tmp_path / "stored" / path.name, "PNG")
    options = {"policy": SINGLES, "dtype": "uint8", "size": 64}
    mixed = list(loader(ignored, turned, **options))
    assert {photo >= 20 for batch in mixed for photo in batch.plan["images"][:, 0].tolist()} == {False, True}
    assert_same(mixed, loader(ignored, upright, images=[tmp_path / "stored", made.upright], **options))


def test_only_photos_that_are_turned_get_a_longer_graph(turned, upright, monkeypatch):
    given, real = [], _prefetch.open_pipeline
    monkeypatch.setattr(_prefetch, "open_pipeline", lambda **options: given.append(options["turns"]) or real(**options))
    for files in (turned, upright):
        next(iter(loader(files)))
    assert given == [True, False]


def test_a_photo_of_another_size_is_named_by_its_annotated_size(tmp_path):
    made = write_turned(tmp_path)
    files = index_turned(made, "apply")
    path = made.photos / "13-6.png"
    with Image.open(made.upright / path.name) as photo:
        width, height = photo.size
        photo.save(path)  # as stored what it was turned to
    with pytest.raises(PhotoError, match=rf"{path} \({height}x{width} pixels, not {width}x{height}\); it is"):
        list(loader(files))
    substituting = loader(files, on_error="substitute")
    assert sum(len(batch.image) for batch in substituting) == 20
    assert list(substituting.substituted.photos) == [str(path)]


def test_exif_that_dali_itself_dies_of_does_no_harm(tmp_path):
    """DALI 2.4's ``adjust_orientation`` ends the process on the PNG: a value lies far outside the block."""
    block = b"II*\0" + struct.pack("<IHHHIIHHII", 8, 2, 0x112, 3, 1, 6, 0x132, 2, 20, 10**6) + bytes(4)
    made = write_turned(tmp_path, [6])
    for path in made.photos.iterdir():
        with Image.open(path) as photo:
            Image.fromarray(np.asarray(photo)).save(path)
        with Image.open(path) as photo:
            Image.fromarray(np.rot90(np.asarray(photo), -1)).save(made.upright / path.name, "PNG")
        plain = path.read_bytes()
        jpeg = insert(plain, segment(0xE1, b"Exif\0\0" + block))
        path.write_bytes(jpeg if path.suffix == ".jpg" else plain[:33] + chunk(b"eXIf", block) + plain[33:])
    options = {"policy": SINGLES, "batch_size": 2}
    turned, upright = index_turned(made, "apply"), index_turned(made, "refuse", upright=True)
    assert Dataset.open(turned.dataset).turn.tolist() == [6, 6]
    assert_same(loader(turned, **options), loader(upright, **options))


@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
def test_tiles_are_those_of_upright_photos(turned, upright, made, tmp_path, resample):
    options = {"size": 90, "resample": resample, "grids": (1, 2, 3), "num_threads": 1}
    tiles = [tmp_path / "turned.tiles.h5", tmp_path / "upright.tiles.h5"]
    for files, output in zip((turned, upright), tiles, strict=True):
        make_tiles(files.dataset, output=output, **options)
    policy = MosaicPolicy(p_mined=0.4, p_random=0.3, grids={2: 1.0, 3: 1.0}, max_similarity=0.4)
    shown = {"policy": policy, "resample": resample}
    resident = assert_same(loader(turned, tiles=tiles[0], **shown), loader(upright, tiles=tiles[1], **shown))
    assert_same(resident, loader(turned, **shown))
    ignored = index_turned(made, "ignore")
    with pytest.raises(FileFormatError, match="a different data set"):
        loader(ignored, tiles=tiles[0], **shown)


@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
def test_the_baseline_turns_photos_too(turned, resample):
    ours = loader(turned, resample=resample)
    for batch in ours:
        samples = Samples(ours, batch.plan)
        theirs = [torch.stack(column) for column in zip(*(samples[i] for i in range(len(samples))), strict=True)]
        check_equal(batch, theirs)


@needs_compiler
@pytest.mark.usefixtures("played")
def test_the_gpus_way_ends_in_the_cpus_batches(turned, tmp_path):
    options = {"size": 90, "grids": (1, 2), "num_threads": 1}
    on_cpu, on_gpu = tmp_path / "a.tiles.h5", tmp_path / "b.tiles.h5"
    assert_same(loader(turned, device="cuda"), loader(turned))
    for device, output in (("cpu", on_cpu), ("cuda", on_gpu)):
        make_tiles(turned.dataset, output=output, device=device, **options)
    policy = MosaicPolicy(p_mined=0.5, max_similarity=0.4)
    assert_same(loader(turned, policy=policy, tiles=on_cpu), loader(turned, policy=policy, tiles=on_gpu))


@pytest.mark.gpu
def test_a_gpu_turns_what_it_decodes(turned, upright):
    """What its decoder makes of a photo, turned, or of the same pixels stored upright: PNGs are equal, JPEGs close."""
    options = {"policy": SINGLES, "dtype": "uint8", "device": "cuda"}
    there, here = loader(turned, **options), loader(turned, **options | {"device": "cpu"})
    names = Dataset.open(turned.dataset).images.file_name
    photos = 0
    for one, other in zip(there, here, strict=True):
        assert torch.equal(one.mask.cpu(), other.mask)
        difference = (one.image.cpu().int() - other.image.int()).abs().float()
        for row, of_sample in zip(one.plan, difference, strict=True):
            assert of_sample.max() == 0 if names[row["images"][0]].endswith("png") else of_sample.mean() < 2
            photos += 1
    assert photos == 20
