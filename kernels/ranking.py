"""The most similar photos of each sentence, exactly: NumPy reference, Numba kernel, launcher.

A similarity is the float32 nearest to the dot product of two embeddings, whose products are exact in float64 and are
summed in a fixed order. So identical photos tie to the bit, and neither the block size nor the matrix product changes
a byte: that product only proposes candidates, within a bound of its rounding error.
"""

from itertools import pairwise

import numba
import numpy as np

BINS = 8192  # of one row's histogram: 64 KiB of counters, two photos a bin for 17,000 photos


def rank_reference(text, image, own, *, depth):
    """The same as ``rank_block``, by a full sort; its last result is exact everywhere."""
    neighbors, similarity, own_rank = [], [], []
    for sentence, photo in zip(text.astype(np.float64), own, strict=True):
        a, b, c, d = np.split(image.astype(np.float64) * sentence, 4, axis=1)
        part = (a + b) + (c + d)
        while part.shape[1] > 8:
            half = part.shape[1] - part.shape[1] // 2
            part[:, : part.shape[1] - half] += part[:, half:]
            part = part[:, :half]
        total = np.zeros(len(image))
        for column in part.T:
            total += column
        exact = total.astype(np.float32)
        order = np.argsort(-exact, kind="stable")
        own_rank.append(1 + np.flatnonzero(order == photo)[0])
        neighbors.append(order[order != photo][:depth])
        similarity.append(exact[neighbors[-1]])
    return np.array(neighbors, np.int32), np.array(similarity, np.float32), np.array(own_rank, np.int32)


@numba.njit(nogil=True, cache=True)
def _dot(sentence, photo, part):
    """Dot product of float64 [D] and float32 [D]: four quarters added, then halved to 8, then one by one.

    Every step but the last treats its elements alike, so that the compiler may use vectors of any length.
    """
    quarter = len(part)
    s0, s1, s2, s3 = sentence[:quarter], sentence[quarter : 2 * quarter], sentence[-2 * quarter :], sentence[-quarter:]
    p0, p1, p2, p3 = photo[:quarter], photo[quarter : 2 * quarter], photo[-2 * quarter :], photo[-quarter:]
    for i in range(quarter):
        part[i] = (s0[i] * p0[i] + s1[i] * p1[i]) + (s2[i] * p2[i] + s3[i] * p3[i])
    size = quarter
    while size > 8:
        half = size - size // 2
        for i in range(size - half):
            part[i] += part[half + i]
        size = half
    total = 0.0
    for i in range(size):
        total += part[i]
    return total


@numba.njit(nogil=True, cache=True)
def _falling(bits):
    """Map the bits of a float32 to a uint32 that falls as the float rises; its own inverse."""
    return bits if bits >> np.uint32(31) else bits ^ np.uint32(0x7FFFFFFF)


@numba.njit(nogil=True, cache=True)
def _rank_rows(begin, end, scores, slack, text, image, own, neighbors, similarity, own_rank):
    """Rank rows [begin, end) of a block into the last three arrays; the others as in ``rank_block``."""
    photos, width = image.shape
    depth = neighbors.shape[1]
    histogram = np.empty(BINS, np.int64)
    candidates = np.empty(photos, np.int64)
    keys = np.empty(photos, np.uint64)
    sentence = np.empty(width, np.float64)
    part = np.empty(width // 4, np.float64)
    value = np.empty(1, np.float32)
    value_bits = value.view(np.uint32)
    similarity_bits = similarity.view(np.uint32)
    for row in range(begin, end):
        score = scores[row]
        low, high = score.min(), score.max()
        scale = np.float32(BINS - 1) / (high - low) if high - low > slack else np.float32(0)

        # The bin that holds the (depth + 1)-th highest score: the sentence's own photo may be among those.
        histogram[:] = 0
        for photo in range(photos):
            histogram[np.int64((score[photo] - low) * scale)] += 1
        edge = BINS - 1
        above = histogram[edge]
        while above <= depth:
            edge -= 1
            above += histogram[edge]

        # float32 sums and products are monotone, so no photo whose score is within slack of that bin is missed.
        count = 0
        for photo in range(photos):
            if (score[photo] + slack - low) * scale >= edge:
                candidates[count] = photo
                count += 1

        sentence[:] = text[row]
        for i in range(count):
            value[0] = np.float32(_dot(sentence, image[candidates[i]], part)) + np.float32(0)  # + 0: no negative zero
            keys[i] = (np.uint64(_falling(value_bits[0])) << np.uint64(32)) | np.uint64(candidates[i])
        keys[:count].sort()  # ascends as (-similarity, photo) does

        own_rank[row] = 0
        filled = 0
        for i in range(count):
            photo = np.int64(keys[i] & np.uint64(0xFFFFFFFF))
            if photo == own[row]:
                own_rank[row] = i + 1
            elif filled < depth:
                neighbors[row, filled] = photo
                similarity_bits[row, filled] = _falling(np.uint32(keys[i] >> np.uint64(32)))
                filled += 1
        if own_rank[row] == 0:  # behind all candidates: the proposing scores are good enough to count with
            above = 1
            for photo in range(photos):
                above += score[photo] > score[own[row]]
            own_rank[row] = above


def rank_block(text, image, own, *, depth, pool, threads):
    """Rank all photos for each sentence of a block: most similar first, equal ones by lower row.

    Args:
        text: float32 [S, D], contiguous, of about unit length; D is a multiple of 4.
        image: float32 [M, D], likewise.
        own: int32 [S], the photo row that each sentence does not get.
        depth: photos kept per sentence, 1 to M - 1.
        pool: an executor whose ``threads`` threads share the rows.

    Returns:
        ``(neighbors int32 [S, depth], similarity float32 [S, depth], own_rank int32 [S])``; the last is the place of
        the own photo among all M, from 1, and beyond depth + 1 may be off by photos that are all but equal.
    """
    scores = text @ image.T
    # A float32 dot product summed in any order is off by at most D * u * |t| * |i| with u = 2**-24; two photos by
    # twice that, and rounding the exact ones to float32 adds one u each. The floor keeps the kernel's division finite.
    lengths = [float(np.sqrt(np.einsum("ij,ij->i", x, x).max())) for x in (text, image)]
    slack = np.float32(max((2.02 * text.shape[1] + 4) * 2.0**-24 * lengths[0] * lengths[1], 1e-30))
    neighbors = np.empty((len(text), depth), np.int32)
    similarity = np.empty((len(text), depth), np.float32)
    own_rank = np.empty(len(text), np.int32)
    cuts = np.linspace(0, len(text), threads + 1).astype(int)
    jobs = [
        pool.submit(_rank_rows, begin, end, scores, slack, text, image, own, neighbors, similarity, own_rank)
        for begin, end in pairwise(cuts)
    ]
    for job in jobs:
        job.result()
    return neighbors, similarity, own_rank
