"""``nemo-dali demo``: every step on generated data, with a small CLIP model trained on the spot."""

import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._lazy import extra
from nemo_dali.commands.demo_page import page
from nemo_dali.commands.preview import preview
from nemo_dali.commands.report.page import report
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import NemoError
from nemo_dali.io.output import cannot_write, partial_name, write_own
from nemo_dali.io.progress import progress
from nemo_dali.io.terminal import say
from nemo_dali.kernels.jit import cache_path
from nemo_dali.kernels.mosaic.cpu import write_tile
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.job import mine
from nemo_dali.mining.report import MiningReport
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import read_policy, write_policy
from nemo_dali.synthetic import synthesize

MARKER = "made-by-nemo-dali-demo"
MADE = (
    *("clip.json", "clip.pt", "train.ris.h5", "val.ris.h5", "train.neg.h5", "val.neg.h5"),
    *("mosaics.png", "policy.json", "report.html", "index.html"),
)
# A ResNet of a million weights beside a text transformer of two layers: what two cores train in about a minute.
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
VIEW_SIDE = 72  # an eighth more than the model's, so that what it sees can be cropped a little differently each time
BATCH = 64
LEARNING_RATE = 1e-3
STEPS = 400
LONGEST_TRAINING = 110.0  # seconds, for STEPS steps; on a slow machine it ends early, its learning rate brought down
OTHER_FOLDER = "Choose another folder with --out."
NEXT = (
    "nemo-dali index REFER_ROOT --dataset refcoco --split-by unc --split train --images train2014 -o refcoco.ris.h5",
    "nemo-dali mine refcoco.ris.h5 --model ViT-B-32 --pretrained laion2b_s34b_b79k -o refcoco.neg.h5",
    "nemo-dali report refcoco.ris.h5 refcoco.neg.h5 -o report.html",
    "nemo-dali tune refcoco.ris.h5 refcoco.neg.h5 -o policy.json",
    "nemo-dali preview refcoco.ris.h5 refcoco.neg.h5 --policy policy.json -o sheet.png",
)
NEAREST = 20  # negatives per sentence that are looked at for what they show


def run_demo(out: str | Path, *, images: int = 600, steps: int = STEPS, loader_batches: int = 60) -> Path:
    """Generate a data set, train a CLIP model on it, index, mine, tune, load and preview; print each result.

    Everything goes into the folder ``out``. What an earlier demo left there is removed and made anew; any other folder
    that is not empty is refused.

    Args:
        images: generated photos, at least 40.
        steps: training steps of 64 photos. With more, the model tells photos apart better, but training takes longer.
        loader_batches: batches of 8 that the loader is timed over, at most an epoch.

    Returns:
        The page that shows it all, ``out``/index.html.

    Raises:
        ValueError: ``images`` < 40, too few for every split.
        NemoError: ``out`` holds files that are not a demo's, or cannot be written, or a package is not installed.
    """
    if images < 40:
        raise ValueError(f"images ({images}) must be at least 40")
    begin = time.monotonic()
    with extra("mining,report", "The demo"):  # fail now, not after the work
        import open_clip  # noqa: F401  # whether it is there
        import plotly  # noqa: F401  # likewise
    out = Path(out)
    _clear(out)
    data, config, weights = out / "data", out / "clip.json", out / "clip.pt"

    said: list[str] = []

    def tell(*lines: str) -> None:
        say(*lines)
        said.extend(lines)

    made = synthesize(data, images=images)
    tell(
        f"Generated {made['images']} photos of {made['annotations']} objects, with {made['sentences']} expressions for "
        f"{made['refs']} of them, in RefCOCO's layout: {data}"
    )
    for split in ("train", "val"):
        annotations = read_refer(data, dataset="refcoco", split_by="unc", split=split)
        photos = data / "images" / "mscoco" / "images" / "train2014"
        index_dataset(annotations, images=photos, output=out / f"{split}.ris.h5")
    tell(f"Indexed the training split and the validation split: {out / 'train.ris.h5'}, {out / 'val.ris.h5'}")

    write_own(config, (json.dumps(CLIP_CONFIG, indent=2) + "\n").encode())
    training = train_clip(Dataset.open(out / "train.ris.h5"), weights, steps=steps)
    tell(
        f"Trained a CLIP model contrastively on the training split: {training.steps} steps of {training.batch} photos, "
        f"each with an expression, in {training.seconds:.0f} s, loss {training.first_loss:.2f} to "
        f"{training.last_loss:.2f}: {weights}"
    )
    reports = {
        split: mine(out / f"{split}.ris.h5", model=str(config), pretrained=str(weights), output=out / f"{split}.neg.h5")
        for split in ("train", "val")
    }
    tell(f"Mined negatives for {reports['train'].sentences} expressions: {out / 'train.neg.h5'}")
    tell(f"  ranking of the true photo, training split:   {_ranking(reports['train'])}")
    tell(f"  ranking of the true photo, validation split: {_ranking(reports['val'])}")
    same, base = _same_kind(out / "train.ris.h5", out / "train.neg.h5")
    tell(
        f"  {same:.0%} of an expression's first {NEAREST} negatives show the kind of object that it is about, and "
        f"{base:.0%} of all photos do"
    )

    dataset, table = Dataset.open(out / "train.ris.h5"), NegativeTable.open(out / "train.neg.h5")
    proposal = report(dataset.path, table.path, output=out / "report.html").proposal
    write_policy(out / "policy.json", proposal.policy, tuned_for=table.fingerprint, why=list(proposal.why))
    tell(f"Proposed tau {proposal.policy.max_similarity} and K {proposal.policy.top_k}: {out / 'policy.json'}")
    tell(*(f"  {reason}" for reason in proposal.why), f"Drew the curves behind this choice: {out / 'report.html'}")

    rate, batches, threads = _time_loader(out, loader_batches)
    tell(f"Loaded {batches} batches of 8 mosaics of 480x480 as float32: {rate:.0f} samples/s on {threads} threads")
    shown = replace(proposal.policy, p_mined=0.8, p_random=0.16, grids={2: 0.7, 3: 0.3})
    preview(out / "train.ris.h5", out / "train.neg.h5", output=out / "mosaics.png", policy=shown)
    write_own(out / "index.html", page(said, NEXT))
    if kernels := cache_path(write_tile):
        say(f"Compiled kernels are cached, the mosaic's in {kernels}: later starts need not compile them.")
    say(f"The demo took {time.monotonic() - begin:.0f} s. Look at {out / 'index.html'} in a browser.")
    say("", "For your own data (here RefCOCO, photos in train2014/):", *(f"  {command}" for command in NEXT))
    say(
        "",
        "Do mosaics help? On photos like these, a small model trained from scratch found fewer targets with them than "
        "without:",
        "  docs/effect.md; run it with python benchmarks/effect.py --work DIR",
    )
    return out / "index.html"


def _clear(out: Path) -> None:
    """Make the folder, or empty it of what an earlier demo made."""
    try:
        if (out / MARKER).is_file():
            say(f"Removing the earlier demo in {out}")
            shutil.rmtree(out / "data", ignore_errors=True)
            for name in MADE:
                for path in (out / name, partial_name(out / name)):
                    path.unlink(missing_ok=True)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise NemoError(f"{out} exists and is not an earlier demo. Empty it, or choose another folder with --out.")
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
    except OSError as error:
        raise cannot_write(out, error, OTHER_FOLDER) from error


def _ranking(report: MiningReport) -> str:
    by_chance = f"(by chance {report.photos / 2:.0f})", f"(by chance {min(1, 10 / report.photos):.0%})"
    return (
        f"median rank {report.median_rank:.0f} of {report.photos} {by_chance[0]}, "
        f"among the first ten for {report.recall_at_10:.0%} {by_chance[1]}"
    )


def _same_kind(dataset_path: Path, table_path: Path) -> tuple[float, float]:
    """How often a near negative shows the category of the referent, and how often any photo does."""
    dataset, table = Dataset.open(dataset_path), NegativeTable.open(table_path)
    shows = dataset.shown_categories()
    category = dataset.refs.category[dataset.sentences.ref]
    table.check_all_rows()
    near = table.neighbors[:, :NEAREST]
    return float(shows[near, category[:, None]].mean()), float(shows[:, category].mean())


def _time_loader(out: Path, batches: int) -> tuple[float, int, int]:
    """Samples per second over some batches after the first one, their number, and the loader's threads."""
    policy = replace(read_policy(out / "policy.json")[0], p_mined=1.0)
    loader = Loader(out / "train.ris.h5", out / "train.neg.h5", batch_size=8, policy=policy)
    iterator = iter(loader)
    next(iterator)
    start, done = time.monotonic(), 0
    for _ in iterator:
        done += 1
        if done == batches:
            break
    seconds = time.monotonic() - start
    loader.close()
    return done * 8 / seconds, done, loader.num_threads


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a training went; losses are means over the first and the last ten steps."""

    steps: int
    batch: int  # photos per step
    seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True, eq=False)
class Views:
    """What a model is trained on: uint8 [V, VIEW_SIDE, VIEW_SIDE, 3], and the sentences that go with each view.

    Attributes:
        sentences: as rows of the data set's sentences.
    """

    pixels: npt.NDArray[np.uint8]
    sentences: Sequence[Sequence[int]]


def train_clip(
    dataset: Dataset,
    weights: Path,
    *,
    steps: int,
    seed: int = 0,
    views: Views | None = None,
    longest: float | None = None,
) -> Training:
    """Train a model of ``CLIP_CONFIG`` on a data set's photos and expressions and save its ``state_dict``.

    Every step sees distinct photos, cropped a little differently each time, with one of their expressions each:
    open_clip's contrastive loss, AdamW, a learning rate that rises and falls. One thread computes: layers this small
    gain little from a second, and lose much when it is busy elsewhere. The same seed gives the same weights on a
    machine, unless it is so slow that ``longest`` cuts in.

    Args:
        views: what is seen instead of whole photos.
        longest: seconds after which training ends early; None: ``longest_training``.
    """
    import open_clip
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = open_clip.CLIP(**CLIP_CONFIG).to(memory_format=torch.channels_last)
            # Of 49,408 tokens about a hundred occur: the layers above tell their random vectors apart well enough.
            network.token_embedding.requires_grad_(False)
            training = _train(
                network,
                dataset,
                views or _whole_photos(dataset),
                steps,
                longest_training(steps) if longest is None else longest,
                Random(seed),
            )
        saved = io.BytesIO()
        torch.save(network.state_dict(), saved)
        write_own(weights, saved.getbuffer())
    except OSError as error:
        raise cannot_write(weights, error, OTHER_FOLDER) from error
    finally:
        torch.set_num_threads(threads)
    return training


def longest_training(steps: int) -> float:
    """Seconds after which a training of this many steps ends early."""
    return LONGEST_TRAINING * max(steps / STEPS, 1)


def _train(network: Any, dataset: Dataset, views: Views, steps: int, longest: float, random: Random) -> Training:
    import open_clip
    import torch

    size = CLIP_CONFIG["vision_cfg"]["image_size"]
    margin = VIEW_SIDE - size
    pixels, said = torch.from_numpy(views.pixels).permute(0, 3, 1, 2), views.sentences
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    tokens = open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["text_cfg"]["context_length"])(
        list(dataset.sentences.text)
    )
    learnt = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=LEARNING_RATE, weight_decay=0.1)
    contrastive = open_clip.ClipLoss()
    batch = min(BATCH, len(pixels))
    losses: list[float] = []
    start = time.monotonic()
    for step in progress(range(steps), total=steps, what="training", unit="step"):
        gone = max(step / steps, (time.monotonic() - start) / longest)
        if gone >= 1:
            break
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(step / 30, 1) * (0.51 + 0.49 * np.cos(np.pi * gone))
        rows = random.sample(range(len(pixels)), batch)
        x, y = random.randrange(margin + 1), random.randrange(margin + 1)
        image = (pixels[rows, :, y : y + size, x : x + size] / 255 - mean) / std
        text = tokens[[random.choice(said[row]) for row in rows]]
        loss = contrastive(
            network.encode_image(image.to(memory_format=torch.channels_last), normalize=True),
            network.encode_text(text, normalize=True),
            network.logit_scale.exp(),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            network.logit_scale.clamp_(0, np.log(100))
        losses.append(loss.item())
    first, last = float(np.mean(losses[:10])), float(np.mean(losses[-10:]))
    return Training(len(losses), batch, time.monotonic() - start, first, last)


def _whole_photos(dataset: Dataset) -> Views:
    """All photos, the shorter edge resized and the middle cut out, with all of their sentences."""
    from PIL import Image

    small = np.empty((len(dataset.images.id), VIEW_SIDE, VIEW_SIDE, 3), np.uint8)
    for row in range(len(small)):
        with Image.open(dataset.photo_path(row)) as file:
            file.draft("RGB", (2 * VIEW_SIDE, 2 * VIEW_SIDE))
            photo = file.convert("RGB")
        scale = VIEW_SIDE / min(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
        x, y = (photo.width - VIEW_SIDE) // 2, (photo.height - VIEW_SIDE) // 2
        small[row] = np.asarray(photo.crop((x, y, x + VIEW_SIDE, y + VIEW_SIDE)))
    said: list[list[int]] = [[] for _ in small]
    for row, ref in enumerate(dataset.sentences.ref):
        said[dataset.refs.image[ref]].append(row)
    return Views(small, said)
