"""A Loader whose samples can be shown from resident tiles too."""

from nemo_dali import Loader, MosaicPolicy

SIZE = 91  # its thirds and halves are of two sizes each
POLICY = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, max_similarity=0.4)


def loader(files, *, resample="cv2-linear", policy=POLICY, **options):
    options = {"batch_size": 4, "size": SIZE, "seed": 5} | options
    return Loader(files.dataset, files.negatives, policy=policy, resample=resample, **options)
