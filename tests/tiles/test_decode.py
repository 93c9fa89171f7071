"""Tiles made on a GPU; without one the host plays its part."""

import numpy as np
import pytest
from PIL import Image

from nemo_dali import Loader
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError, PhotoError
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.tiles.build import make_tiles
from nemo_dali.tiles.file import TileFile
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.files import make_files


@needs_compiler
@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
def test_the_gpus_way_gives_the_cpus_tiles(files, tmp_path, resample, played):
    options = {"size": 50, "grids": (1, 2, 3), "resample": resample, "num_threads": 1}
    for device in ("cpu", "cuda"):
        assert make_tiles(files.dataset, output=tmp_path / device, device=device, **options).decoded == 24
    here, there = (TileFile.open(tmp_path / device) for device in ("cpu", "cuda"))
    assert here.arrays.keys() == there.arrays.keys() and len(here.arrays) == 6
    assert all(np.array_equal(here.arrays[shape], there.arrays[shape]) for shape in here.arrays)
    assert here.decoder.endswith("cpu") and there.decoder.endswith("mixed")
    # Two batches: each waits for the memory's last use before it writes, and is waited for before it is copied.
    assert played.calls.count("the stream for an event") == played.calls.count("the host for the stream") == 2


@needs_compiler
@pytest.mark.usefixtures("played")
def test_a_photo_of_another_size_is_named_and_a_run_on_the_cpu_does_not_go_on(tmp_path):
    files = make_files(tmp_path)
    dataset = Dataset.open(files.dataset)
    bad = dataset.photo_path(20)
    whole = Image.open(bad).copy()
    Image.new("RGB", (31, 32)).save(bad)
    options = {"size": 40, "output": tmp_path / "a.tiles.h5", "num_threads": 1}
    with pytest.raises(PhotoError, match=bad):
        make_tiles(files.dataset, device="cuda", **options)
    whole.save(bad)
    with pytest.raises(
        FileFormatError, match=r"16 of 24 photos are done for decoder DALI .*To continue, give the same"
    ):
        make_tiles(files.dataset, device="cpu", **options)
    assert make_tiles(files.dataset, device="cuda", **options).decoded == 8


@needs_compiler
@pytest.mark.usefixtures("played")
def test_photos_too_large_for_the_kernel_are_refused_beforehand(files, tmp_path, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "LARGEST_PHOTO", 39)
    with pytest.raises(NemoError, match=r"A photo is \d+ pixels wide or high; on a GPU 39 are the most.*--device cpu"):
        make_tiles(files.dataset, size=40, output=tmp_path / "a.tiles.h5", device="cuda")
    with pytest.raises(NemoError, match=r"39 are the most.*device='cpu'"):
        Loader(files.dataset, files.negatives, batch_size=4, device="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_gpus_tiles_are_the_cpus_but_for_the_decoder(files, tmp_path):
    for device in ("cpu", "cuda"):
        make_tiles(files.dataset, size=96, output=tmp_path / device, device=device)
    here, there = (TileFile.open(tmp_path / device) for device in ("cpu", "cuda"))
    for shape, array in here.arrays.items():
        assert np.abs(array.astype(np.int16) - there.arrays[shape]).mean() < 2
