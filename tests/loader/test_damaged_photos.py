"""JPEGs that are cut short or damaged inside: who refuses them, on the CPU and on a GPU.

A decoder notices that a JPEG has no end. Damage to its pixels it may show instead, each in its own way. nvJPEG need not
notice either, so both devices agree on which photos are bad where `index --verify` has seen them all.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_dali import Loader, MosaicPolicy, PhotoError
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.files import Files
from tests.helpers.refer import write_refer
from tests.helpers.tables import write_random_table

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
POLICY = MosaicPolicy(p_mined=0.6, p_random=0.2, grids={2: 1.0, 3: 1.0})


def inside(content, new):
    """The bytes in the middle, which are of the pixels, become others."""
    begin = len(content) * 6 // 10
    return content[:begin] + new + content[begin + len(new) :]


CUT = {
    "at three fifths": lambda content: content[: len(content) * 3 // 5],
    "near the end": lambda content: content[:-20],
    "before the end's marker": lambda content: content[:-2],
}
DAMAGED = {
    "zeros": lambda content: inside(content, bytes(60)),
    "noise": lambda content: inside(content, bytes(np.random.default_rng(0).integers(0, 255, 60, np.uint8))),
    "a flipped bit": lambda content: inside(content, bytes([content[len(content) * 6 // 10] ^ 8])),
    "an early end": lambda content: inside(content, b"\xff\xd9"),
    "a part that is gone": lambda content: content[: len(content) * 6 // 10] + content[len(content) * 7 // 10 :],
}


def damage(photos, ways):
    """Damage the first photos of a folder, each in its way; their names."""
    chosen = sorted(photos.glob("*.jpg"))[: len(ways)]
    for path, way in zip(chosen, ways.values(), strict=True):
        path.write_bytes(way(path.read_bytes()))
    return {path.name for path in chosen}


def make(folder, ways, **options):
    """Files of 20 photos some of which are damaged, and the names of these."""
    refer = write_refer(folder, photos=20)
    names = damage(refer.photos, ways)
    files = Files(folder / "data.ris.h5", folder / "data.neg.h5", refer.photos)
    annotations = read_refer(refer.root, dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=files.dataset, **options)
    write_random_table(files.negatives, Dataset.open(files.dataset))
    return files, names


def open_loader(files, **options):
    options = {"batch_size": 4, "size": 64, "dtype": "uint8", "policy": POLICY, "hw_decoder_load": 0.0, **options}
    return Loader(files.dataset, files.negatives, context_length=16, **options)


@pytest.mark.parametrize("way", CUT)
def test_verify_and_the_loader_refuse_a_photo_without_an_end(tmp_path, way):
    with pytest.raises(PhotoError, match="corrupt"):
        make(tmp_path / "verified", {way: CUT[way]}, verify=True)
    files, (name,) = make(tmp_path / "not", {way: CUT[way]})
    with pytest.raises(PhotoError, match=name):
        list(open_loader(files))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_where_all_photos_were_verified_every_device_shows_them_all(tmp_path, device):
    """Those without an end are left out, and what the verifying decoder took, damaged or not, is bad for nobody."""
    files, names = make(tmp_path, {**CUT, **DAMAGED}, verify=True, skip_corrupt=True)
    kept = set(Dataset.open(files.dataset).images.file_name)
    cut = sorted(names)[: len(CUT)]
    assert not kept & set(cut) and kept >= names - set(cut)
    loader = open_loader(files, device=device, on_error="substitute")
    batches, expected = list(loader), loader.plan(0, np.arange(len(loader) * 4))
    assert np.array_equal(np.concatenate([batch.plan for batch in batches]), expected)
    assert not loader.substituted.photos
    shown = {loader.corpus.photo_path(row) for row in np.unique(expected["images"]) if row >= 0}
    assert {Path(path).name for path in shown} >= names - set(cut)


@pytest.mark.gpu
@pytest.mark.parametrize("way", {**CUT, **DAMAGED})
def test_on_a_gpu_a_damaged_photo_is_named_or_shown_and_harms_no_other(tmp_path, way, record_property):
    """What nvJPEG makes of it is NVIDIA's to say, and is kept with the result of this test."""
    files, (name,) = make(tmp_path, {way: {**CUT, **DAMAGED}[way]})
    bad = Dataset.open(files.dataset).images.file_name.index(name)
    loader = open_loader(files, device="cuda", on_error="substitute")
    batches = list(loader)
    record_property(f"damaged JPEG, {way}", "refused" if loader.substituted.photos else "shown")
    assert {Path(path).name for path in loader.substituted.photos} <= {name}
    sound, _ = make(tmp_path / "sound", {})
    compared = 0
    for batch, expected in zip(batches, open_loader(sound, device="cuda"), strict=True):
        same = (batch.plan["images"] == expected.plan["images"]).all(axis=1)
        same &= (batch.plan["images"] != bad).all(axis=1)
        compared += int(same.sum())
        assert torch.equal(batch.mask[torch.from_numpy(same)], expected.mask[torch.from_numpy(same)])
        assert torch.equal(batch.image[torch.from_numpy(same)], expected.image[torch.from_numpy(same)])
    assert compared > 10


@needs_compiler
def test_without_verify_it_is_the_decoder_that_says_which_photos_are_bad(tmp_path, played, monkeypatch):
    """A GPU's decoder that shows a photo without an end, as nvJPEG may: then the devices' samples differ."""
    from nvidia.dali import fn, types

    files, (name,) = make(tmp_path, {"cut": CUT["near the end"]})
    here = open_loader(files, on_error="substitute")
    assert len(list(here)) and {Path(path).name for path in here.substituted.photos} == {name}

    decode = fn.decoders.image

    def lenient(data, device="cpu", **options):
        if device == "cpu":
            return decode(data, **options)
        return fn.zeros(shape=fn.peek_image_shape(data, dtype=types.INT32), dtype=types.UINT8)

    monkeypatch.setattr(fn.decoders, "image", lenient)
    there = open_loader(files, device="cuda", on_error="substitute")
    assert len(list(there)) == len(here) and not there.substituted.photos
    there.close()  # while the host still plays the GPU
