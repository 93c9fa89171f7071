"""Which photos a sentence does not get besides its own."""

from typing import NamedTuple

import numpy as np

from nemo_dali.kernels.arrays import F32, F64, I32, U8, U64


class Rules(NamedTuple):
    """Which photos a sentence does not get besides its own. Arrays that are empty, and infinite bounds, rule out none.

    Attributes:
        never: uint8 [P], 1 for photos that nobody gets.
        twin: int32 [P], equal for photos of one content.
        own_twin: int32 [groups], that of the group's own photo; photos that have it are ruled out.
        shown: uint64 [P, W], the categories of a photo's objects as bits.
        category: int32 [groups], of the group's target; photos that show it are ruled out; -1: unknown.
        similar: float32 [U, P], proposed similarities of groups' own photos to these photos.
        similar_row: int32 [groups], the row of that which belongs to the group.
        similar_image: float32 [U, D], the embeddings of those own photos.
        similar_above: photos more similar than that to the own photo are ruled out.
        siblings_above: photos more similar than that to another sentence of the group are ruled out.
        crop: float32 [P * C, D], the embeddings of each photo's C crops.
        best: float32 [rows, P], proposed similarities of sentences to the best of each photo's crops.
        best_above: float64 [rows], photos whose best crop is more similar than that to the sentence are ruled out.
    """

    never: U8
    twin: I32
    own_twin: I32
    shown: U64
    category: I32
    similar: F32
    similar_row: I32
    similar_image: F32
    similar_above: float
    siblings_above: float
    crop: F32
    best: F32
    best_above: F64


def no_rules() -> Rules:
    """Rules that rule out nothing."""
    empty = np.empty(0, np.int32)
    matrix = np.empty((0, 0), np.float32)
    return Rules(
        never=np.empty(0, np.uint8),
        twin=empty,
        own_twin=empty,
        shown=np.empty((0, 0), np.uint64),
        category=empty,
        similar=matrix,
        similar_row=empty,
        similar_image=matrix,
        similar_above=float("inf"),
        siblings_above=float("inf"),
        crop=matrix,
        best=matrix,
        best_above=np.empty(0),
    )
