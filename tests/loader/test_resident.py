"""Samples from resident tiles are the stream path's, and what the mode cannot do is refused when the loader is made."""

import numpy as np
import pytest
import torch

from nemo_dali import FileFormatError, Loader, MosaicPolicy
from nemo_dali.tiles.build import make_tiles
from tests.helpers.files import make_files
from tests.helpers.lanes import lanes
from tests.helpers.resident import SIZE, loader


@pytest.fixture(scope="module", params=["cv2-linear", "pillow-bilinear"])
def tiles(request, files, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / f"{request.param}.tiles.h5"
    make_tiles(files.dataset, size=SIZE, output=path, grids=(1, 2, 3), resample=request.param)
    return path, request.param


def same(one, other):
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.mask, other.mask)
        and torch.equal(one.tokens, other.tokens)
        and one.plan.tobytes() == other.plan.tobytes()
    )


@pytest.mark.parametrize("dtype", lanes(["float32", "float16", "bfloat16", "uint8"], fast=["float32", "uint8"]))
def test_every_kind_of_sample_equals_the_stream_paths(files, tiles, dtype):
    path, resample = tiles
    options = {"resample": resample, "dtype": dtype, "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.25)}
    resident, stream = loader(files, tiles=path, **options), loader(files, **options)
    kinds = set()
    for _ in range(2):
        for one, other in zip(resident, stream, strict=True):
            assert same(one, other)
            kinds |= set(zip(one.plan["kind"].tolist(), one.plan["grid"].tolist(), strict=True))
    assert kinds >= {(0, 1), (1, 2), (1, 3), (2, 2), (2, 3)}


def test_the_state_of_one_mode_resumes_the_other(files, tiles):
    path, resample = tiles
    resident, stream = loader(files, resample=resample, tiles=path), loader(files, resample=resample)
    passing = iter(resident)
    for _ in range(3):
        next(passing)
    stream.load_state_dict(resident.state_dict())
    assert all(same(one, other) for one, other in zip(passing, stream, strict=True))


def test_photos_are_not_read(tmp_path, tiles):
    files = make_files(tmp_path)
    path = tmp_path / "own.tiles.h5"
    make_tiles(files.dataset, size=SIZE, output=path, grids=(1, 2, 3))
    expected = list(loader(files))
    for photo in files.photos.iterdir():
        photo.unlink()
    assert all(same(one, other) for one, other in zip(loader(files, tiles=path), expected, strict=True))


def test_several_data_sets_have_a_tile_file_each(tmp_path):
    sets = [make_files(tmp_path / name, seed=seed, photos=photos) for name, seed, photos in (("a", 1, 8), ("b", 2, 12))]
    paths = []
    for files in sets:
        paths.append(files.dataset.with_name("t.tiles.h5"))
        make_tiles(files.dataset, size=SIZE, output=paths[-1], grids=(1, 2))
    policy = MosaicPolicy(p_mined=0.5, p_random=0.2, max_similarity=0.4)
    options = {"batch_size": 4, "size": SIZE, "policy": policy}
    given = [files.dataset for files in sets], [files.negatives for files in sets]
    stream, resident = Loader(*given, **options), Loader(*given, **options, tiles=paths)
    assert all(same(one, other) for one, other in zip(resident, stream, strict=True))
    with pytest.raises(FileFormatError, match="a different data set"):
        Loader(*given, **options, tiles=paths[::-1])
    with pytest.raises(ValueError, match=r"tiles \(1 given\) must be one per data set \(2\)"):
        Loader(*given, **options, tiles=paths[0])


def test_what_the_tiles_are_not_made_for_is_refused(files, tiles):
    path, resample = tiles
    other = {"cv2-linear": "pillow-bilinear", "pillow-bilinear": "cv2-linear"}[resample]
    with pytest.raises(FileFormatError, match=rf"size {SIZE}, not 90.*nemo-dali tiles .*--size 90"):
        loader(files, resample=resample, tiles=path, size=90)
    with pytest.raises(FileFormatError, match=rf"resample {resample}, not {other}.*--resample"):
        loader(files, resample=other, tiles=path)
    with pytest.raises(ValueError, match=r"jitter \(0.1\) must be 0 with tiles"):
        loader(files, resample=resample, tiles=path, policy=MosaicPolicy(p_mined=1.0, jitter=0.1))


def test_a_grid_without_tiles_is_refused_only_where_the_policy_shows_it(files, tmp_path):
    path = tmp_path / "two.tiles.h5"
    make_tiles(files.dataset, size=SIZE, output=path, grids=(2,))
    only_mosaics = MosaicPolicy(p_mined=1.0, jitter=0.0)
    assert next(iter(loader(files, tiles=path, policy=only_mosaics))).image.shape == (4, 3, SIZE, SIZE)
    with pytest.raises(FileFormatError, match=r"no tiles for grid 1.*--grids 1 2"):
        loader(files, tiles=path, policy=MosaicPolicy(p_mined=0.9))


def test_a_replaced_file_does_not_disturb_a_running_loader(files, tiles, tmp_path):
    """Replaced by renaming, as every writer of ours does."""
    path, resample = tiles
    own = tmp_path / "own.tiles.h5"
    own.write_bytes(path.read_bytes())
    expected = list(loader(files, resample=resample))
    running = iter(loader(files, resample=resample, tiles=own))
    first = next(running)
    other = tmp_path / "other"
    other.write_bytes(np.random.default_rng(0).bytes(100))
    other.rename(own)
    assert all(same(one, two) for one, two in zip([first, *running], expected, strict=True))
