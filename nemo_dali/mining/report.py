"""MiningReport: what a run of ``mine`` wrote, and how it went."""

from dataclasses import dataclass
from pathlib import Path

from nemo_dali._checks import short_repr

NEAR_IDENTICAL = (
    0.999  # cosine of two photos that a model cannot tell apart: another size or compression of one picture
)


@dataclass(frozen=True)
class MiningReport:
    """What ``mine`` wrote, how long this run took and how good the model is on this data.

    The rank of a sentence's own photo is its place among all photos, from 1, before it is excluded; sentences without a
    target do not count, as their photo shows nothing of what they say. With an approximate first stage the rank is a
    lower bound.
    """

    output: Path
    fingerprint: str
    photos: int
    sentences: int
    no_target: int  # of these, sentences without a target
    neighbors: int  # per sentence
    device: str
    ranks: int
    seconds_photos: float
    seconds_sentences: float
    seconds_crops: float
    seconds_ranking: float
    photos_per_s: float  # over all ranks, in this run
    starved: float  # share of the time spent embedding photos in which the model waited for them, on rank 0
    median_rank: float
    recall_at_1: float  # share of the sentences whose own photo comes first
    recall_at_10: float
    short: int  # sentences with fewer candidates than neighbors, because the others are excluded
    empty: int  # of these, sentences without any
    copies: int  # photos whose file has the same content as another's
    near_identical: tuple[
        int, int
    ]  # photos as similar as NEAR_IDENTICAL to one of other content, and how many were compared
    left_out: tuple[str, ...]  # other data sets whose photos are left out, and how many
    cut: tuple[str, ...]  # sentences with more tokens than the model takes
    recall: tuple[tuple[int, float], ...]  # (N, recall@N) of an approximate first stage
    advice: str  # on the depth

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {'up to ' if self.short else ''}{self.neighbors} negatives for each of {self.sentences} "
            "sentences, "
            f"from {self.photos} photos",
            *self._own_photo(),
            f"time on {self.device}{f' and {self.ranks} ranks' if self.ranks > 1 else ''}: "
            f"photos {self.seconds_photos:.1f} s ({self.photos_per_s:.1f}/s), "
            f"{f'crops {self.seconds_crops:.1f} s, ' if self.seconds_crops else ''}"
            f"sentences {self.seconds_sentences:.1f} s, ranking {self.seconds_ranking:.1f} s",
        ]
        if self.photos_per_s:
            slow = "reading and decoding photos" if self.starved > 0.5 else "the model"
            lines.append(f"what limited embedding photos: {slow}; the model waited {self.starved:.0%} of the time")
        lines += [f"left out: {text}" for text in self.left_out]
        if self.copies:
            lines.append(f"{self.copies} photos have copies under other names: none of them is a negative of the other")
        near, compared = self.near_identical
        if near:
            lines.append(
                f"{near} of {compared} photos are nearly identical to another (cosine {NEAR_IDENTICAL} or more) and "
                f"may be its negatives: --exclude-similar-photos {NEAR_IDENTICAL - 0.001:g} leaves them out"
            )
        if self.short:
            lines.append(
                f"{self.short} sentences have fewer candidates than {self.neighbors}, {self.empty} of them none: the "
                "others are excluded"
            )
        if self.cut:
            lines.append(
                f"{len(self.cut)} sentences are longer than the model takes and were cut, such as "
                f"{short_repr(self.cut[0])}"
            )
        if self.recall:
            found = ", ".join(f"{share:.1%} of the first {n}" for n, share in self.recall)
            lines.append(f"the approximate search finds {found}; raise --probes to find more")
        lines.append(f"depth: {self.advice}")
        return "\n".join(lines)

    def _own_photo(self) -> list[str]:
        if self.no_target == self.sentences:
            return []
        whose = " with a target" if self.no_target else ""
        return [
            f"own photo: median rank {self.median_rank:g}, first for {self.recall_at_1:.1%} of the sentences{whose}, "
            f"among the first ten for {self.recall_at_10:.1%}"
        ]
