from pathlib import Path

import pytest
import torch

from nemo_dali import Loader, MosaicPolicy, NemoError
from nemo_dali.commands.torch_baseline import Samples, check_equal, dataloader
from nemo_dali.errors import PhotoError
from tests.helpers.files import make_files
from tests.helpers.hostile_photos import NO_PHOTOS, png
from tests.helpers.lanes import lanes

POLICY = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, jitter=0.3, max_similarity=0.4)


def loader(files, **options):
    return Loader(files.dataset, files.negatives, batch_size=8, size=75, policy=POLICY, num_threads=1, **options)


@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
@pytest.mark.parametrize("dtype", lanes(["float32", "float16", "bfloat16", "uint8"], fast=["float32"]))
def test_the_baselines_samples_are_the_loaders(files, dtype, resample):
    ours = loader(files, dtype=dtype, resample=resample, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    for batch in ours:
        samples = Samples(ours, batch.plan)
        theirs = [torch.stack(column) for column in zip(*(samples[i] for i in range(len(samples))), strict=True)]
        check_equal(batch, theirs)


@pytest.mark.slow
def test_workers_deliver_the_plan_in_order(files):
    ours = loader(files)
    rows = ours.plan(0, range(16))
    batches = iter(dataloader(ours, rows, batches=4))
    expected = list(ours)[:2]
    for batch, theirs in zip(expected * 2, batches, strict=True):
        check_equal(batch, theirs)


@pytest.mark.parametrize("what", ["a FIFO", "another size"])
def test_photos_are_looked_at_before_workers_decode_them(tmp_path, what):
    files = make_files(tmp_path)
    ours = loader(files)
    rows = ours.plan(0, range(16))
    path = Path(ours.corpus.photo_path(int(rows["images"][0].max())))
    if what == "a FIFO":
        NO_PHOTOS[what][0](path)
    else:
        path.write_bytes(png(20000, 20000))
    with pytest.raises(PhotoError, match=f"{path} \\((Is not a regular file|20000x20000 pixels, not )"):
        dataloader(ours, rows, batches=2)


def test_a_difference_is_told(files):
    batch = next(iter(loader(files)))
    theirs = [tensor.clone() for tensor in list(batch)[:4]]
    check_equal(batch, theirs)
    theirs[1][0, 0, 0] ^= 1
    with pytest.raises(NemoError, match="baseline's masks are not the loader's"):
        check_equal(batch, theirs)


def test_images_of_another_decoder_may_differ_a_little(files):
    batch = next(iter(loader(files)))
    theirs = [tensor.clone() for tensor in list(batch)[:4]]
    level = float(theirs[0].max() - theirs[0].min()) / 255
    theirs[0] += level
    check_equal(batch, theirs, exact=False)
    for exact, shift in ((True, 0), (False, 2 * level)):
        theirs[0] += shift
        with pytest.raises(NemoError, match="baseline's images are not the loader's"):
            check_equal(batch, theirs, exact=exact)
