"""The files of the study: generated photos, a CLIP model trained on others, the tables of the arms, and the policy."""

import itertools
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from effect_study import Arm, Scenes, Study
from mining_rules_data import windows_around

from nemo_dali.commands.demo import CLIP_CONFIG, train_clip
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.mining.job import mine
from nemo_dali.mining.pool_curves import measure_curves
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.table_writer import write_table
from nemo_dali.mining.tune import propose
from nemo_dali.plan.by_epoch import ByEpoch
from nemo_dali.plan.policy import MosaicPolicy, read_policy, write_policy
from nemo_dali.synthetic import synthesize
from nemo_dali.synthetic.false_negatives import false_negatives
from nemo_dali.synthetic.truth import Truth
from nemo_dali.tiles.build import make_tiles

SHOWN = 24  # scenes that the figure chooses from: the first hard ones
EVALUATION = ("easy", "hard")
PARTS = ("training", *EVALUATION, "for_clip")


@dataclass(frozen=True)
class Files:
    """Where everything is in a folder, which studies of the same photos may share."""

    folder: Path
    study: Study

    def scenes(self, part: str) -> Path:
        """The generated folder of one of ``PARTS``."""
        scenes: Scenes = getattr(self.study, part)
        return self.folder / f"{part}-{scenes.digest()}"

    def dataset(self, part: str) -> Path:
        """The data set file of one of ``PARTS``."""
        return self._beside(part, "ris.h5")

    def tiles(self, part: str) -> Path:
        """The tiles of one of ``PARTS``, for single photos and for 2x2."""
        return self._beside(part, f"{self.study.size}.tiles.h5")

    def table(self, arm: Arm) -> Path:
        """The table that an arm's negatives are drawn from; any table if it draws none."""
        return self.negatives("training", arm.negatives or "clip")

    def negatives(self, part: str, kind: str) -> Path:
        """A table of one of ``PARTS``, of one kind of ``Negatives``."""
        return self._beside(part, f"{kind}.neg.h5")

    @property
    def policy(self) -> Path:
        """What ``tune`` proposes for CLIP's table of the training photos."""
        return self._beside("training", "policy.json")

    def _beside(self, part: str, ending: str) -> Path:
        scenes = self.scenes(part)
        return scenes.with_name(f"{scenes.name}.{ending}")

    def checkpoint(self, arm: str, seed: int) -> Path:
        """The checkpoint of a run."""
        return self.folder / f"runs-{self.study.digest()}" / f"{arm}-{seed}.pt"

    @property
    def weights(self) -> Path:
        """The weights of the CLIP model."""
        return self._beside("for_clip", "clip.pt")

    @property
    def config(self) -> Path:
        """The config of the CLIP model."""
        return self._beside("for_clip", "clip.json")


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a trained model on one of ``EVALUATION``: sentences, by row, and the groups they belong to."""

    refs: int
    kind: np.ndarray  # uint8 [S], indices into kind_names
    kind_names: tuple[str, ...]
    distractors: np.ndarray  # int [S]
    shown: dict[int, tuple[int, str]]  # rows whose predictions are kept: the photo's id, and the sentence

    @classmethod
    def of(cls, files: Files, part: str) -> "Asked":
        """Read the data set and its truth."""
        dataset = Dataset.open(files.dataset(part))
        truth = Truth.read(files.scenes(part)).of(dataset)
        distractors = dataset.refs.distractors[dataset.sentences.ref]
        first = np.flatnonzero(np.diff(dataset.sentences.ref, prepend=-1))  # of each ref
        kept = first[(distractors[first] == 3) & (truth.kind[first] == truth.kind_names.index("attribute"))][:SHOWN]
        photos = dataset.images.id[dataset.refs.image[dataset.sentences.ref[kept]]]
        texts = [dataset.sentences.text[row] for row in kept.tolist()]
        shown = dict(zip(kept.tolist(), zip(photos.tolist(), texts, strict=True), strict=True))
        return cls(len(first), truth.kind, truth.kind_names, distractors, shown)


def prepare(study: Study, folder: Path) -> Files:
    """Make the missing files of a study; the next call continues an interrupted one."""
    files = Files(folder, study)
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        _dataset(files, part, getattr(study, part))
    check_apart({part: Dataset.open(files.dataset(part)) for part in PARTS})
    if not files.weights.exists():
        files.config.write_text(json.dumps(CLIP_CONFIG))
        dataset = Dataset.open(files.dataset("for_clip"))
        train_clip(
            dataset, files.weights, steps=study.clip_steps, views=windows_around(dataset, seed=0), longest=math.inf
        )
    for part in ("training", *EVALUATION):
        if not files.tiles(part).exists():
            make_tiles(files.dataset(part), size=study.size, output=files.tiles(part), grids=(1, 2))
        if not files.negatives(part, "clip").exists():
            _mine(files, part, "clip", Exclusions())
    if not files.negatives("training", "cropped").exists():
        _mine(files, "training", "cropped", Exclusions(crops=study.crops_margin))
    _sorted_by_truth(files, "training", "fitting")
    _sorted_by_truth(files, "training", "unfitting")
    for part in EVALUATION:
        _sorted_by_truth(files, part, "unfitting")
    if not files.policy.exists():
        dataset, table = (
            Dataset.open(files.dataset("training")),
            NegativeTable.open(files.negatives("training", "clip")),
        )
        proposal = propose(measure_curves(dataset, table))
        write_policy(files.policy, proposal.policy, tuned_for=table.fingerprint, why=list(proposal.why))
    return files


def _dataset(files: Files, part: str, scenes: Scenes) -> None:
    if files.dataset(part).exists():
        return
    source = files.scenes(part)
    shutil.rmtree(source, ignore_errors=True)  # it may be incomplete
    synthesize(source, **asdict(scenes))
    annotations = read_refer(source, dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=source / "images/mscoco/images/train2014", output=files.dataset(part))


def _mine(files: Files, part: str, kind: str, exclusions: Exclusions) -> None:
    mine(
        files.dataset(part),
        model=str(files.config),
        pretrained=str(files.weights),
        output=files.negatives(part, kind),
        depth=10**6,
        exclusions=exclusions,
    )


def check_apart(datasets: dict[str, Dataset]) -> None:
    """Refuse data sets if two have a photo in common, by content, because each numbers its photos from 1."""
    contents = {part: set(map(bytes, dataset.photo_files.digest)) for part, dataset in datasets.items()}
    for one, other in itertools.combinations(contents, 2):
        if not contents[one].isdisjoint(contents[other]):
            raise SystemExit(f"{one} and {other} have photos in common; give their scenes other seeds.")


def _sorted_by_truth(files: Files, part: str, kind: str) -> None:
    """Write a table of the photos that show what a sentence's words describe, or of the others, in CLIP's order."""
    output = files.negatives(part, kind)
    if output.exists():
        return
    dataset, table = Dataset.open(files.dataset(part)), NegativeTable.open(files.negatives(part, "clip"))
    truth = Truth.read(files.scenes(part)).of(dataset)
    rows, width = table.neighbors.shape
    pairs = np.repeat(np.arange(rows), width), np.asarray(table.neighbors).ravel()
    fits = truth.fits_words(*pairs).reshape(rows, width)
    wanted = fits if kind == "fitting" else ~fits
    order = np.argsort(~wanted, axis=1, kind="stable")
    there = np.take_along_axis(wanted, order, 1)
    neighbors = np.where(there, np.take_along_axis(table.neighbors, order, 1), -1).astype(np.int32)
    similarity = np.where(there, np.take_along_axis(table.similarity, order, 1), -np.inf).astype(np.float32)
    write_table(
        output,
        blocks=[(neighbors, similarity)],
        text_embedding=np.asarray(table.text_embedding),
        image_embedding=np.asarray(table.image_embedding),
        depth=width,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model=table.model,
        pretrained=table.pretrained,
        weights_hash=table.weights_hash,
        exclusions=["own photo", f"photos that are not {kind}, by the truth"],
    )


def policy_of(arm: Arm, files: Files) -> MosaicPolicy:
    """The policy that an arm trains under, over all epochs."""
    tuned, _ = read_policy(files.policy)
    share = ByEpoch({0: 0.0, arm.singles_first: arm.share, files.study.epochs - files.study.singles: 0.0})
    return MosaicPolicy(
        p_mined=share if arm.negatives else 0.0,
        p_random=0.0 if arm.negatives else share,
        top_k=tuned.top_k,
        max_similarity=tuned.max_similarity if arm.bounded else None,
    )


def described(files: Files) -> dict[str, Any]:
    """Describe the study's data: how many photos, refs and sentences, and how hard those of the evaluation are."""
    found: dict[str, Any] = {}
    for part in PARTS:
        dataset = Dataset.open(files.dataset(part))
        found[part] = {
            "photos": len(dataset.images.id),
            "refs": len(dataset.refs.ref_id),
            "sentences": len(dataset.sentences.ref),
            "refs_by_distractors": np.bincount(dataset.refs.distractors).tolist(),
        }
    found["negatives"] = {}
    truth = Truth.read(files.scenes("training"))
    for name, arm in files.study.arms.items():
        if arm.share:
            policy = policy_of(arm, files).at(arm.singles_first)
            drawn = false_negatives(files.dataset("training"), files.table(arm), truth, policy=policy)
            found["negatives"][name] = asdict(drawn.mined if arm.negatives else drawn.random)
    policy, _ = read_policy(files.policy)
    found["scenes"] = {
        row: {"image_id": photo, "sentence": text} for row, (photo, text) in Asked.of(files, "hard").shown.items()
    }
    return found | {"tuned": {"max_similarity": policy.max_similarity, "top_k": policy.top_k}}
