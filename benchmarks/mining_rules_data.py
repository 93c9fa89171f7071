"""What ``mining_rules`` compares rules on: generated photos of known truth, and three CLIPs' embeddings of them.

The CLIPs are trained on other photos than the rules are tried on: two on whole photos, like the demo's, and one on
windows of any size around what an expression is about, because photos on the web show things at all sizes. Everything
that takes minutes is kept in a folder and made once.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from nemo_dali.commands.demo import CLIP_CONFIG, VIEW_SIDE, Views, train_clip
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.mining.clip import Clip, load_clip
from nemo_dali.mining.crops import CROPS, crop_box
from nemo_dali.synthetic import synthesize
from nemo_dali.synthetic.truth import Truth

F32 = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]

TRAINED_ON, TRIED_ON = 101, 202  # seeds of the photos
CLIPS = {"whole": (0, False), "second": (1, False), "windows": (0, True)}  # seed, and whether trained on windows
PADDING = 1.5  # the side of a thing's square crop over the longer side of its box
SETS: dict[str, dict[str, float] | None] = {"all": None, "attribute": {"attribute": 1.0}}  # kinds of expressions
WINDOWS = 4  # of each ref that a CLIP is trained on: the middle of the photo, and three around the target
BATCH = 512


@dataclass(frozen=True, eq=False)
class Embedded:
    """Unit vectors of one CLIP: texts [S, D], photos [M, D], their crops [M, CROPS, D], things [T, D]."""

    text: F32
    photo: F32
    crop: F32
    thing: F32


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, its truth by rows, the things that can be seen, and what each CLIP makes of it.

    Attributes:
        thing_photo, thing_category: of each thing, in the photos' order. target: of each ref, its thing.
    """

    dataset: Dataset
    truth: Truth
    thing_photo: npt.NDArray[np.int64]
    thing_category: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    clips: dict[str, Embedded]


def prepare(folder: Path, kinds: str, *, training_images: int, images: int, steps: int) -> Data:
    """Generate, train and embed what is not in the folder yet.

    Args:
        kinds: the rules are tried on sentences of these; the CLIPs are trained on all kinds.
        training_images, images: photos generated for training, and to try the rules on.
        steps: of each CLIP's training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained_on = _generated(folder / "trained_on", TRAINED_ON, training_images, None)
    tried_on = _generated(folder / kinds, TRIED_ON, images, SETS[kinds])
    (folder / "clip.json").write_text(json.dumps(CLIP_CONFIG))
    for name, (seed, windows) in CLIPS.items():
        if not (folder / f"{name}.pt").exists():
            views = windows_around(trained_on, seed) if windows else None
            weights, options = folder / f"{name}.pt", {"steps": steps, "seed": seed, "longest": math.inf}
            print(name, train_clip(trained_on, weights, views=views, **options), flush=True)
    truth = Truth.read(folder / kinds).of(tried_on)
    seen = [(scene.things[i], row) for row, scene in enumerate(truth.scenes) for i in truth.seen[row]]
    photo = np.array([row for _, row in seen])
    boxes = np.array([thing.box for thing, _ in seen], float)
    names = list(tried_on.category_name)
    category = np.array([names.index(thing.kind) for thing, _ in seen])
    clips = {}
    for name in CLIPS:
        path = folder / f"{kinds}.{name}.npz"
        if not path.exists():
            clip = load_clip(str(folder / "clip.json"), str(folder / f"{name}.pt"), device="cpu")
            np.savez(path, **vars(_embedded(tried_on, clip, photo, boxes)))
        with np.load(path) as arrays:
            clips[name] = Embedded(**arrays)
    return Data(tried_on, truth, photo, category, _targets(tried_on, photo, category, boxes), clips)


def _generated(folder: Path, seed: int, images: int, expressions: dict[str, float] | None) -> Dataset:
    path = folder.with_suffix(".ris.h5")
    if not path.exists():
        synthesize(folder, images=images, seed=seed, expressions=expressions)
        annotations = read_refer(folder, dataset="refcoco", split_by="unc", split="train")
        index_dataset(annotations, images=folder / "images/mscoco/images/train2014", output=path)
    return Dataset.open(path)


def windows_around(dataset: Dataset, seed: int) -> Views:
    """Square windows of random size around each ref's target, and one of the whole photo, with the ref's sentences."""
    random = np.random.default_rng(seed)
    pixels, sentences = [], []
    for ref, row in enumerate(dataset.refs.image.tolist()):
        if ref == 0 or row != dataset.refs.image[ref - 1]:
            with Image.open(dataset.photo_path(row)) as file:
                photo = file.convert("RGB")
        x0, y0, x1, y1 = _box(dataset.mask(ref))
        first = int(dataset.refs.sentence_begin[ref])
        for number in range(WINDOWS):
            short = min(photo.size)
            least = min(1.15 * max(x1 - x0, y1 - y0), short)
            side = short if number == 0 else float(np.exp(random.uniform(np.log(least), np.log(short))))
            x, y = (
                random.uniform(*sorted((max(0.0, high - side), min(length - side, low))))
                for low, high, length in ((x0, x1, photo.width), (y0, y1, photo.height))
            )
            pixels.append(_shrunk(photo, _inside(x, y, side, photo), VIEW_SIDE))
            sentences.append(list(range(first, first + int(dataset.refs.sentence_count[ref]))))
    return Views(np.stack(pixels), sentences)


def _box(mask: npt.NDArray[np.uint8]) -> Box:
    y, x = np.nonzero(mask)
    return float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)


def _inside(x: float, y: float, side: float, photo: Image.Image) -> Box:
    x, y = (max(min(at, length - side), 0.0) for at, length in ((x, photo.width), (y, photo.height)))
    return x, y, min(x + side, photo.width), min(y + side, photo.height)


def _shrunk(photo: Image.Image, box: Box, side: int) -> npt.NDArray[np.uint8]:
    return np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC, box=box))


def _crops(photo: Image.Image, boxes: npt.NDArray[np.float64]) -> Iterator[Box]:
    """A photo's middle, the crops that cover it, and a square around each box."""
    short = min(photo.size)
    yield _inside((photo.width - short) / 2, (photo.height - short) / 2, short, photo)
    for place in range(CROPS):
        yield crop_box(*photo.size, place)
    for x0, y0, x1, y1 in boxes.tolist():
        side = min(PADDING * max(x1 - x0, y1 - y0), short)
        yield _inside((x0 + x1 - side) / 2, (y0 + y1 - side) / 2, side, photo)


def _embedded(
    dataset: Dataset, clip: Clip, photo_of: npt.NDArray[np.int64], boxes: npt.NDArray[np.float64]
) -> Embedded:
    """Embed every crop of every photo, and every sentence."""
    import torch

    waiting: list[torch.Tensor] = []
    found: list[F32] = []

    def encode(encoder: object, some: Sequence[torch.Tensor]) -> F32:
        with torch.inference_mode():
            vectors = encoder(torch.stack(list(some)))
            return (vectors / vectors.norm(dim=-1, keepdim=True)).numpy()

    for row in range(len(dataset.images.id)):
        with Image.open(dataset.photo_path(row)) as file:
            photo = file.convert("RGB")
        waiting += [clip.transform(photo.crop(tuple(map(round, box)))) for box in _crops(photo, boxes[photo_of == row])]
        if len(waiting) >= BATCH or row + 1 == len(dataset.images.id):
            found.append(encode(clip.network.encode_image, waiting))
            waiting.clear()
    crops = np.concatenate(found)
    count = 1 + CROPS + np.bincount(photo_of, minlength=len(dataset.images.id))
    first = np.cumsum(count) - count
    place = np.arange(len(crops)) - np.repeat(first, count)
    texts = sorted(set(dataset.sentences.text))
    vectors = np.concatenate(
        [encode(clip.network.encode_text, clip.tokenizer(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
    )
    at = {text: row for row, text in enumerate(texts)}
    return Embedded(
        text=vectors[[at[text] for text in dataset.sentences.text]],
        photo=crops[place == 0],
        crop=crops[(place > 0) & (place <= CROPS)].reshape(len(count), CROPS, -1),
        thing=crops[place > CROPS],
    )


def _targets(
    dataset: Dataset,
    photo: npt.NDArray[np.int64],
    category: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """For each ref, the thing of its category in its photo whose box is nearest to its mask's."""
    targets = []
    for ref, row in enumerate(dataset.refs.image.tolist()):
        among = np.flatnonzero((photo == row) & (category == dataset.refs.category[ref]))
        off = np.abs(boxes[among] - _box(dataset.mask(ref))).sum(axis=1)
        targets.append(among[off.argmin()])
    return np.array(targets)
