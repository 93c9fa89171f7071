"""An approximate first stage for millions of photos, by FAISS; what it finds is ranked exactly.

    photos ──k-means──▶ lists of alike ones, 8 bits a number ──probe the nearest lists──▶ candidates ──▶ exact ranking

An exact ranking compares each sentence with every photo; this one only with those in ``probes`` of the lists. What it
misses is measured against the exact ranking on a sample of sentences, and recorded.
"""

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali._lazy import extra
from nemo_dali.mining.ranking import RankedBlock

if TYPE_CHECKING:
    from nemo_dali.distributed.ranks import Ranks
    from nemo_dali.mining.ranking import Ranker

F32 = npt.NDArray[np.float32]

TRAINING_PER_LIST = 40  # photos that k-means learns from, per list; FAISS asks for 39 at least
ADDED = 1 << 16  # photos added to the lists at a time
SAMPLE = 256  # sentences on which the recall is measured, or a few more


def list_count(photos: int) -> int:
    """How many lists: a power of two near four times the square root of the photos, as FAISS's guide suggests."""
    return int(2 ** max(0, min(round(math.log2(4 * math.sqrt(photos))), math.floor(math.log2(photos / 39)))))


class ApproximateRanker:
    """Ranks, for any sentences, the photos that an index finds.

    Args:
        ranker: an exact one of the same embeddings.
        text_embedding, image_embedding: float32 [S, D] and [M, D] of unit length.
        probes: lists that are searched for each sentence, at most ``list_count(M)``.
        ranks: rank 0 builds the index.

    Raises:
        NemoError: FAISS is not installed.
    """

    def __init__(
        self, ranker: "Ranker", text_embedding: F32, image_embedding: F32, *, probes: int, ranks: "Ranks"
    ) -> None:
        faiss = import_faiss()
        self._ranker, self._text = ranker, text_embedding
        self._photos = len(image_embedding)
        # The same number of threads whatever the number of ranks: the others wait.
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        made = ranks.attempt(lambda: _build(image_embedding) if ranks.rank == 0 else np.empty(0, np.uint8))
        (size,) = ranks.from_first(np.array([len(made)]))
        made = ranks.from_first(made if ranks.rank == 0 else np.empty(size, np.uint8))
        self._index: Any = faiss.deserialize_index(made)
        self.probe(probes)
        faiss.omp_set_num_threads(ranker.threads)

    def probe(self, probes: int) -> None:
        """Search this many lists from now on."""
        self._index.nprobe = probes

    def rank(self, begin: int, end: int) -> RankedBlock:
        """Like ``Ranker.rank``, for the photos found; ``own_rank`` is a lower bound on the own photo's place."""
        wanted = self._ranker.depth + self._ranker.depth // 4 + 16  # 8 bits a number put some in the wrong order
        while True:
            wanted = min(wanted, self._photos)
            _, found = self._index.search(np.ascontiguousarray(self._text[begin:end]), wanted)
            block = self._ranker.rank_among(begin, end, found)
            short = block.neighbors[:, -1] < 0
            if wanted == self._photos or not (short & (found[:, -1] >= 0)).any():
                return block
            wanted *= 4  # too many of the best were excluded

    def recall(self) -> npt.NDArray[np.float64]:
        """float64 [n, 2]: for some N the mean share of the exact first N that is found, on a sample of sentences."""
        blocks = self._ranker.blocks(most_rows=1)  # one ref each
        places = np.unique(np.linspace(0, len(blocks) - 1, min(SAMPLE, len(blocks))).astype(int))
        shares = []
        for begin, end in (blocks[place] for place in places):
            for exact, found in zip(
                self._ranker.rank(begin, end).neighbors, self.rank(begin, end).neighbors, strict=True
            ):
                exact = exact[exact >= 0]
                if len(exact):
                    hit = np.isin(exact, found)
                    shares.append([hit[:n].mean() for n in recall_places(self._ranker.depth)])
        if not shares:  # no sentence has a candidate: none is missed
            shares.append([1.0] * len(recall_places(self._ranker.depth)))
        return np.array(list(zip(recall_places(self._ranker.depth), np.mean(shares, axis=0), strict=True)))


def recall_places(depth: int) -> list[int]:
    """The N at which recall is measured."""
    return sorted({min(n, depth) for n in (10, 100, depth)})


def import_faiss() -> Any:
    """Import FAISS.

    Raises:
        NemoError: it is not installed.
    """
    with extra("faiss", "The approximate search"):
        import faiss
    return faiss


def _build(image_embedding: F32) -> npt.NDArray[np.uint8]:
    """An index of all photos, serialised."""
    faiss = import_faiss()
    photos, width = image_embedding.shape
    lists = list_count(photos)
    index = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    learnt = np.unique(np.linspace(0, photos - 1, min(photos, TRAINING_PER_LIST * lists)).astype(np.int64))
    index.train(np.ascontiguousarray(image_embedding[learnt]))
    for begin in range(0, photos, ADDED):
        index.add(np.ascontiguousarray(image_embedding[begin : begin + ADDED]))
    made: npt.NDArray[np.uint8] = faiss.serialize_index(index)
    return made
