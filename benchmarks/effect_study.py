"""The study that ``effect.py`` carries out, as docs/effect.md specifies it: scenes, arms, model and counts.

The design was frozen before the first run that counts: a run records ``Study.digest()``, and runs of another design
are not mixed with it. ``FOLLOW_UPS`` came later, once mosaics had lost, and was frozen before its own runs.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

Negatives = Literal["clip", "cropped", "fitting", "unfitting"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one arm of the study trains on before the last epochs, which show single photos in all arms.

    Attributes:
        share: of the samples that are mosaics.
        negatives: the table that they are drawn from: CLIP's; the same without the photos that ``--exclude-crops``
            leaves out ("cropped"); only photos that show what the sentence describes ("fitting"), or only others
            ("unfitting"), these two by the truth and in CLIP's order; None: random photos.
        bounded: by the tau that ``tune`` proposes; otherwise there is no bound.
        singles_first: epochs of single photos before the mosaics.
    """

    share: float = 0.5
    negatives: Negatives | None = "clip"
    bounded: bool = False
    singles_first: int = 0


ARMS = {
    "single": Arm(share=0.0, negatives=None),
    "random": Arm(negatives=None),
    "tuned": Arm(bounded=True),
    "unbounded": Arm(),
    "later": Arm(bounded=True, singles_first=3),
    "cropped": Arm(negatives="cropped"),
    "oracle": Arm(negatives="unfitting"),
    "false": Arm(negatives="fitting"),
}


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Generated photos: what ``synthesize`` takes."""

    seed: int
    images: int
    distractors: tuple[int, int] = (0, 3)
    expressions: dict[str, float] | None = None

    def digest(self) -> str:
        """Tells files of different scenes apart."""
        return _digest(self)[:8]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that decides the outcome except the code and the seed of a run.

    Attributes:
        training, easy, hard, for_clip: the photos; no two share one. Trained models are measured on ``easy``, whose
            targets have no distractor or one, and on ``hard``.
        clip_steps: of the CLIP model's training, on windows of any size around what sentences are about.
        crops_margin: of ``--exclude-crops``.
        size: of the frames, in pixels; batch_size: samples per step.
        epochs: of all arms; the last ``singles`` of them show single photos only.
        warm_up: steps over which the learning rate rises.
        seeds: of the runs, for the weights and for the order and the draws of samples.
    """

    training: Scenes
    easy: Scenes
    hard: Scenes
    for_clip: Scenes
    clip_steps: int
    crops_margin: float = 0.1
    size: int = 128
    batch_size: int = 16
    epochs: int = 10
    singles: int = 2
    learning_rate: float = 1e-3
    warm_up: int = 100
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    arms: dict[str, Arm] = field(default_factory=lambda: dict(ARMS))

    def digest(self) -> str:
        """Digest of the whole design except the seeds, whose number may grow."""
        return _digest(replace(self, seeds=()))[:16]


def _digest(design: Scenes | Study) -> str:
    return hashlib.sha256(json.dumps(asdict(design), sort_keys=True).encode()).hexdigest()


KINDS = {"attribute": 3.0, "zone": 1.0}  # of expressions: what a mosaic does not make ambiguous
STUDY = Study(
    training=Scenes(seed=101, images=1250, expressions=KINDS),
    easy=Scenes(seed=102, images=1000, distractors=(0, 1), expressions=KINDS),
    hard=Scenes(seed=103, images=1600, distractors=(2, 3), expressions=KINDS),
    for_clip=Scenes(seed=104, images=2500, expressions=KINDS),
    clip_steps=1500,
)
# Possible reasons why mosaics lose: too many of them, photos that are seen too rarely, cells that are too small.
FOLLOW_UPS = {
    "quarter": replace(STUDY, arms={"quarter": Arm(share=0.25, bounded=True)}, seeds=(1, 2, 3)),
    "fewer": replace(
        STUDY,
        training=Scenes(seed=105, images=420, expressions=KINDS),
        epochs=30,
        singles=6,
        arms={name: ARMS[name] for name in ("single", "random", "tuned", "oracle")},
        seeds=(1, 2, 3),
    ),
    "larger": replace(STUDY, arms={name: ARMS[name] for name in ("single", "tuned")}, size=160, seeds=(1, 2, 3)),
}
STUDIES = {"main": STUDY} | FOLLOW_UPS
