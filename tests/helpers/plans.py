"""What the planner is given, with random content."""

import numpy as np

from nemo_dali.plan.part import Part


def make_part(refs=300, photos=90, depth=40, seed=0, dtype=np.float32, **columns):
    """A data set of ``refs`` refs with one to four sentences, and a table with some short rows."""
    random = np.random.default_rng(seed)
    count = random.integers(1, 5, refs).astype(np.int32)
    ref_image = random.integers(0, photos, refs).astype(np.int32)
    neighbors = np.full((count.sum(), depth), -1, np.int32)
    similarity = np.full((count.sum(), depth), -np.inf, np.float32)
    for row, own in enumerate(np.repeat(ref_image, count)):
        valid = depth if random.random() < 0.8 else int(random.integers(0, depth))
        others = np.delete(np.arange(photos), own)
        neighbors[row, :valid] = random.permutation(others)[:valid]
        similarity[row, :valid] = -np.sort(-random.uniform(0, 0.5, valid))
    return Part(
        ref_image=ref_image,
        sentence_begin=(np.cumsum(count) - count).astype(np.int64),
        sentence_count=count,
        sentences=int(count.sum()),
        empty=np.zeros(refs, np.uint8),
        photos=photos,
        neighbors=neighbors,
        similarity=similarity.astype(dtype),
        **columns,
    )
