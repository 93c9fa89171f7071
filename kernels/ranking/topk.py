"""The most similar photos of each sentence, exactly; ``ranking.Ranking`` calls these kernels.

A similarity is the float32 nearest to the dot product of two embeddings, whose products are exact in float64 and are
summed in a fixed order (a fused multiply-add changes nothing then). So identical photos tie to the bit, and neither the
block size nor the matrix product changes a byte: that product only proposes candidates, within a bound of its rounding
error. It may come from anywhere.

    scores float32 [rows, photos] ──▶ Ranking.take ──▶ keys uint64 [rows, depth], the best so far ──▶ result

A key holds a photo's similarity and its row, and ascends as rankings do; photos come block after block. Rows belong to
groups that share their own photo and category: a ref's sentences.
"""

import numpy as np

from nemo_dali.kernels.arrays import F32, F64, I32, I64, U8, U64, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.ranking.keys import DIGITS, key_of, similarity_in, sort_keys
from nemo_dali.kernels.ranking.rules import Rules

CHUNK = 256  # photos that are dismissed together
ENOUGH = 5  # 2**-5: how many more candidates than needed are as good as none, as a search for a better limit costs too


@jit(error_model="python", fastmath={"contract"})
def similarity_of(vector: F64, image: F32, photo: Int, part: F64) -> np.float32:
    """Of float64 [D] and row ``photo`` of float32 [M, D], float32: eight parts added, of those four, then one by one.

    Every step but the last treats its elements alike, so that the compiler may use vectors of any length. No views are
    taken of the arrays: counting who has one costs more than the sum.

    Args:
        part: float64 [D / 8] to work in.
    """
    eighth = len(part)
    for i in range(eighth):
        part[i] = (
            (vector[i] * image[photo, i] + vector[eighth + i] * image[photo, eighth + i])
            + (
                vector[2 * eighth + i] * image[photo, 2 * eighth + i]
                + vector[3 * eighth + i] * image[photo, 3 * eighth + i]
            )
        ) + (
            (
                vector[4 * eighth + i] * image[photo, 4 * eighth + i]
                + vector[5 * eighth + i] * image[photo, 5 * eighth + i]
            )
            + (
                vector[6 * eighth + i] * image[photo, 6 * eighth + i]
                + vector[7 * eighth + i] * image[photo, 7 * eighth + i]
            )
        )
    last = eighth // 4
    total = 0.0
    for i in range(last):
        part[i] = (part[i] + part[2 * last + i]) + (part[last + i] + part[3 * last + i])
    for i in range(last):
        total += part[i]
    return np.float32(total) + np.float32(0)  # + 0: no negative zero


@jit(error_model="python")
def _best_of(vector: F64, image: F32, first: Int, count: Int, part: F64) -> np.float32:
    """The largest similarity to ``count`` rows of an embedding, from row ``first`` on."""
    best = similarity_of(vector, image, first, part)
    for i in range(first + 1, first + count):
        best = max(best, similarity_of(vector, image, i, part))
    return best


@jit(error_model="python")
def own_bests(begin: Int, end: Int, text: F32, crop: F32, own: I32, count: Int, best: F32) -> None:
    """Of rows [begin, end) the similarity to the best of the own photo's ``count`` crops."""
    vector, part = np.empty(text.shape[1]), np.empty(text.shape[1] // 8)
    for row in range(begin, end):
        vector[:] = text[row]
        best[row] = _best_of(vector, crop, own[row] * count, count, part)


@jit(error_model="python")
def own_keys(begin: Int, end: Int, text: F32, image: F32, own: I32, keys: U64) -> None:
    """Keys of the own photos of rows [begin, end)."""
    vector, part, value = np.empty(text.shape[1]), np.empty(text.shape[1] // 8), np.empty(1, np.float32)
    for row in range(begin, end):
        vector[:] = text[row]
        keys[row] = key_of(similarity_of(vector, image, own[row], part), own[row], value)


@jit(error_model="python")
def _mark_above(
    score: F32, bound: float, slack: np.float32, vector: F64, image: F32, count: Int, part: F64, marks: U8
) -> None:
    """Mark the photos whose similarity is above a bound, in uint8 [P]; the proposed one tells but for a few.

    Args:
        image: float32 [P * count, D]: of each photo ``count`` vectors, the best of which counts.
    """
    upper, lower = np.float32(bound) + slack, np.float32(bound) - slack
    near = 0
    for photo in range(len(score)):
        marks[photo] = score[photo] > upper
        near += score[photo] >= lower
        near -= score[photo] > upper
    if near:
        for photo in range(len(score)):
            if lower <= score[photo] <= upper:
                marks[photo] = _best_of(vector, image, photo * count, count, part) > bound


@jit(error_model="python", fastmath={"nnan", "nsz"})
def _range(score: F32) -> tuple[np.float32, np.float32]:
    """The lowest and the highest."""
    low, high = score[0], score[0]
    for photo in range(len(score)):
        low = min(low, score[photo])
        high = max(high, score[photo])
    return low, high


@jit(error_model="python")
def _count(score: F32, limit: np.float32) -> Int:
    """How many are not below a limit: by vectors, as every loop over all photos here but one."""
    count = np.int32(0)
    for photo in range(len(score)):
        count += np.int32(score[photo] >= limit)
    return count


@jit(error_model="python")
def _cut(score: F32, depth: Int, low: np.float32, high: np.float32, guess: np.float32, slack: np.float32) -> np.float32:
    """A limit that at least ``depth`` scores reach, and few more than that; ``low`` where there are no more.

    Between two limits that too many and too few reach, the next is where a straight line through the logarithms of
    their counts would have it.
    """
    few: Int
    below, many = low, _count(score, low)
    above, few = high, np.int32(0)
    if many <= depth:
        return low
    limit = guess
    for turn in range(40):
        if not below < limit < above:
            limit = below + (above - below) * np.float32(0.5)
        count = _count(score, limit)
        if count >= depth:
            below, many = limit, count
            if count - depth <= max(depth >> ENOUGH, 8):
                break
        else:
            above, few = limit, count
        if above - below <= slack:
            break
        if turn % 4 == 3:
            limit = below + (above - below) * np.float32(0.5)
        else:
            share = np.log(many / (depth + (depth >> ENOUGH) * 0.5)) / np.log(many / max(few, 0.5))
            limit = below + (above - below) * np.float32(share)
    return below


@jit(error_model="python")
def _count_ahead(
    score: F32,
    own_key: np.uint64,
    own_similarity: np.float32,
    slack: np.float32,
    first: Int,
    vector: F64,
    image: F32,
    part: F64,
    value: F32,
) -> Int:
    """How many photos come before the own one, in chunks of which few hold a photo that must be looked at."""
    upper, lower = own_similarity + slack, own_similarity - slack
    ahead = np.int32(0)
    for begin in range(0, len(score), CHUNK):
        chunk = score[begin : begin + CHUNK]
        above = _count(chunk, upper)
        ahead += above
        if _count(chunk, lower) > above:
            for photo in range(begin, begin + len(chunk)):
                if lower <= score[photo] < upper:
                    ahead += key_of(similarity_of(vector, image, photo, part), first + photo, value) < own_key
    return ahead


@jit(error_model="python")
def _rule_out(
    group: Int,
    first: Int,
    own: Int,
    slack: np.float32,
    image: F32,
    rules: Rules,
    vector: F64,
    part: F64,
    marks: U8,
    out: U8,
) -> None:
    """Mark the photos that no sentence of a group gets, in uint8 [P]; ``marks`` is another to work in."""
    photos = len(out)
    out[:] = 0
    if len(rules.never):
        out[:] = rules.never
    if len(rules.twin):
        twin = rules.own_twin[group]
        for photo in range(photos):
            out[photo] |= rules.twin[photo] == twin
    if len(rules.category) and rules.category[group] >= 0:
        word, bit = rules.category[group] >> 6, np.uint64(1) << np.uint64(rules.category[group] & 63)
        for photo in range(photos):
            if rules.shown[photo, word] & bit:
                out[photo] = 1
    if len(rules.similar):
        row = rules.similar_row[group]
        vector[:] = rules.similar_image[row]
        _mark_above(rules.similar[row], rules.similar_above, slack, vector, image, 1, part, marks)
        for photo in range(photos):
            out[photo] |= marks[photo]
    if first <= own < first + photos:
        out[own - first] = 1


@jit(error_model="python")
def rank_groups(  # noqa: PLR0913  # Numba takes no dataclass, and a tuple used once is no shorter
    begin: Int,
    end: Int,
    groups: I64,
    scores: F32,
    first: Int,
    slack: np.float32,
    text: F32,
    image: F32,
    own: I32,
    rules: Rules,
    own_keys: U64,
    keys: U64,
    counts: I64,
    own_rank: I32,
) -> None:
    """Take a block of photos into the ranking of the rows of groups [begin, end); arguments as in ``Ranking.take``."""
    photos, width = image.shape
    depth = keys.shape[1]
    histogram, places = np.empty(DIGITS, np.int32), np.empty(photos + 1, np.int32)
    candidates, spare = np.empty(depth + photos, np.uint64), np.empty(depth + photos, np.uint64)
    masked, guess = np.empty(photos, np.float32), np.float32(0)
    shared, mine = np.empty(photos, np.uint8), np.empty(photos, np.uint8)
    vector, part, value = np.empty(width), np.empty(width // 8), np.empty(1, np.float32)
    photo: Int
    most = 0
    for group in range(begin, end):
        most = max(most, groups[group + 1] - groups[group])
    sibling_rule = rules.siblings_above < np.inf
    above = np.empty((most if sibling_rule else 0, photos), np.uint8)  # by sentence of the group
    times = np.empty(photos, np.int32)
    crops = len(rules.crop) // photos
    nearer = np.empty(photos if crops else 0, np.uint8)
    for group in range(begin, end):
        rows = range(groups[group], groups[group + 1])
        _rule_out(group, first, own[groups[group]], slack, image, rules, vector, part, mine, shared)
        siblings = sibling_rule and len(rows) > 1
        if siblings:
            times[:] = 0
            for row in rows:
                marks = above[row - groups[group]]
                vector[:] = text[row]
                _mark_above(scores[row], rules.siblings_above, slack, vector, image, 1, part, marks)
                for photo in range(photos):
                    times[photo] += marks[photo]
        for row in rows:
            score = scores[row]
            vector[:] = text[row]

            own_similarity = similarity_in(own_keys[row], value)
            own_rank[row] += _count_ahead(
                score, own_keys[row], own_similarity, slack, first, vector, image, part, value
            )

            out = shared
            if siblings:
                out, marks = mine, above[row - groups[group]]
                for photo in range(photos):
                    out[photo] = shared[photo] | (times[photo] > marks[photo])
            if crops:
                bound, crop = rules.best_above[row], rules.crop
                _mark_above(rules.best[row], bound, slack, vector, crop, crops, part, nearer)
                for photo in range(photos):
                    mine[photo] = out[photo] | nearer[photo]
                out = mine

            for photo in range(photos):
                masked[photo] = -np.inf if out[photo] else score[photo]

            # A row that is full needs only what may displace its last one; another the best of this block.
            if counts[row] == depth:
                limit = similarity_in(keys[row, depth - 1], value) - slack
            else:
                low, high = _range(score)
                guess = _cut(masked, depth, low, high, guess, slack)
                limit = guess - slack  # no photo that may be among them is missed
            found = 0
            for photo in range(photos):  # without a branch that would be guessed wrong for each
                places[found] = photo
                found += masked[photo] >= limit

            count = counts[row]
            candidates[:count] = keys[row, :count]
            for place in range(found):
                photo = np.int64(places[place])
                candidates[count] = key_of(similarity_of(vector, image, photo, part), first + photo, value)
                count += 1
            sort_keys(candidates, count, spare, histogram)
            counts[row] = min(count, depth)
            keys[row, : counts[row]] = candidates[: counts[row]]


@jit(error_model="python")
def rank_candidates(  # noqa: PLR0913  # Numba takes no dataclass, and a tuple used once is no shorter
    begin: Int,
    end: Int,
    groups: I64,
    candidates: I64,
    text: F32,
    image: F32,
    own: I32,
    rules: Rules,
    own_keys: U64,
    keys: U64,
    counts: I64,
    own_rank: I32,
) -> None:
    """Rank only given photos; arguments as in ``Ranking``. ``rules.similar`` is not used."""
    width, depth = image.shape[1], keys.shape[1]
    vector, other, part = np.empty(width), np.empty(width), np.empty(width // 8)
    value = np.empty(1, np.float32)
    found = np.empty(candidates.shape[1], np.uint64)
    crops = len(rules.crop) // len(image)
    for group in range(begin, end):
        rows = range(groups[group], groups[group + 1])
        for row in rows:
            vector[:] = text[row]
            count = 0
            for photo in candidates[row]:
                if photo < 0:
                    continue
                key = key_of(similarity_of(vector, image, photo, part), photo, value)
                own_rank[row] += key < own_keys[row]
                if photo == own[row] or (len(rules.never) and rules.never[photo]):
                    continue
                if len(rules.twin) and rules.twin[photo] == rules.own_twin[group]:
                    continue
                if len(rules.category) and rules.category[group] >= 0:
                    category = rules.category[group]
                    if rules.shown[photo, category >> 6] >> np.uint64(category & 63) & np.uint64(1):
                        continue
                if rules.similar_above < np.inf:
                    other[:] = image[own[row]]
                    if similarity_of(other, image, photo, part) > rules.similar_above:
                        continue
                if crops:
                    best = _best_of(vector, rules.crop, photo * crops, crops, part)
                    if best > rules.best_above[row]:
                        continue
                ruled_out: bool | np.bool_ = False
                if rules.siblings_above < np.inf:
                    for sibling in rows:
                        if sibling != row:
                            other[:] = text[sibling]
                            ruled_out |= similarity_of(other, image, photo, part) > rules.siblings_above
                if not ruled_out:
                    found[count] = key
                    count += 1
            found[:count].sort()
            counts[row] = min(count, depth)
            keys[row, : counts[row]] = found[: counts[row]]
