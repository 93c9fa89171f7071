"""The files of a data set of any number of photos, made by repeating a small one.

Photo ``i`` of M is the small data set's photo ``i % m``, with its refs, masks and tiles. To a loader, whose work
depends on how many rows and bytes there are, that is a data set of M photos, all with different digests. Sentences
are told apart by a number, and there may be more or fewer per ref. Photos need not exist if nothing is decoded.
"""

import shutil
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali.data import dataset as ris
from nemo_dali.data.columns import Annotations, Images, PhotoFiles, Refs, Sentences, begins
from nemo_dali.data.dataset import Dataset
from nemo_dali.io.layout import Layout
from nemo_dali.io.writer import unfinished, write_h5
from nemo_dali.mining.table_writer import write_table
from nemo_dali.tiles import file as tile_file
from nemo_dali.tiles.file import TileFile, tiles_fingerprint

T = TypeVar("T", bound=np.generic)

BLOCK = 4096  # rows of a table made at a time
FOLDER = 1000  # copied photos in a folder


def repeat_dataset(
    source: Dataset, output: str | Path, *, photos: int, sentences: int, copies: str | Path | None = None
) -> Dataset:
    """Write a data set file that repeats another's photos.

    Args:
        source: its photos, all with a ref, as ``index_dataset`` writes them.
        output: the .ris.h5 file.
        photos, sentences: how many; at least one sentence per ref, and as evenly spread as possible.
        copies: a folder that gets a copy of the photo for every row, unless it has one; None: rows share the source's
            files. A data set of fewer photos may use the same folder.

    Returns:
        The data set, opened.

    Raises:
        ValueError: no photo, or fewer sentences than refs.
        FileFormatError: the file cannot be written.
    """
    if photos < 1:
        raise ValueError(f"photos ({photos}) must be at least 1")
    m, refs = len(source.images.id), source.refs
    photo = np.arange(photos) % m
    whole, rest = divmod(photos, m)
    some = np.flatnonzero(refs.image < rest)  # of the last, incomplete round
    ref = np.concatenate([np.tile(np.arange(len(refs.image)), whole), some])
    turn = np.repeat(np.arange(whole + 1), [len(refs.image)] * whole + [len(some)])
    if sentences < len(ref):
        raise ValueError(f"sentences ({sentences}) must be at least one for each of {len(ref)} refs")
    sentence_count = np.diff(np.arange(len(ref) + 1) * sentences // len(ref)).astype(np.int32)
    text = _sentences(source, ref, sentence_count)
    category_count, rle_count = source.images.category_count[photo], refs.rle_count[ref]
    annotations = Annotations(
        name=f"{source.name}-x{photos}",
        images=Images(
            id=np.arange(1, photos + 1),
            width=source.images.width[photo],
            height=source.images.height[photo],
            file_name=_file_names(source, photo, copies),
            category_begin=begins(category_count),
            category_count=category_count,
        ),
        refs=Refs(
            ref_id=np.arange(1, len(ref) + 1),
            ann_id=np.arange(1, len(ref) + 1),
            image=(refs.image[ref] + m * turn).astype(np.int32),
            category=refs.category[ref],
            sentence_begin=begins(sentence_count),
            sentence_count=sentence_count,
            rle_begin=begins(rle_count),
            rle_count=rle_count,
            empty=refs.empty[ref],
            no_target=refs.no_target[ref],
            source=["repeated"] * len(ref),
            distractors=refs.distractors[ref],
        ),
        sentences=Sentences(
            sent_id=np.arange(1, sentences + 1),
            ref=np.repeat(np.arange(len(ref), dtype=np.int32), sentence_count),
            text=text,
            raw=text,
        ),
        image_categories=_ranges(source.image_categories, source.images.category_begin[photo], category_count),
        category_id=source.category_id,
        category_name=source.category_name,
        rle_counts=_ranges(source.rle_counts, refs.rle_begin[ref], rle_count),
        exif=source.exif,
    )
    files = source.photo_files
    digest = np.ascontiguousarray(files.digest[photo]).view("<u8")
    digest[:, 0] ^= (np.arange(photos) // m).astype(np.uint64)
    files = PhotoFiles(digest.view(np.uint8), files.orientation[photo], files.coco_id[photo])
    root = str(source.image_root if copies is None else Path(copies).absolute())
    with write_h5(output, format=ris.FORMAT, version=ris.VERSION) as write:
        ris.write_columns(write, annotations, files, image_root=root, left_out=0)
    return Dataset.open(output)


def _sentences(source: Dataset, ref: npt.NDArray[np.int64], count: npt.NDArray[np.int32]) -> list[str]:
    """A ref's own sentences in turn, each with two numbers below 1,000 or so: new sentences, with few new words."""
    text, begin, length = source.sentences.text, source.refs.sentence_begin, source.refs.sentence_count
    owner = np.repeat(ref, count)
    number = np.arange(len(owner)) - np.repeat(begins(count), count)  # of the sentence within its ref
    rows = begin[owner] + number % length[owner]
    return [f"{text[row]} {i // 1000} {i % 1000}" for i, row in enumerate(rows.tolist())]


def _file_names(source: Dataset, photo: npt.NDArray[np.int64], copies: str | Path | None) -> list[str]:
    if copies is None:
        return [source.images.file_name[row] for row in photo.tolist()]
    names = []
    for row, original in enumerate(photo.tolist()):
        path = Path(source.photo_path(original))
        names.append(f"{row // FOLDER}/{row}{path.suffix}")
        if row % FOLDER == 0:
            (Path(copies) / str(row // FOLDER)).mkdir(parents=True, exist_ok=True)
        if not (copy := Path(copies) / names[-1]).exists():
            shutil.copyfile(path, copy)
    return names


def _ranges(values: npt.NDArray[T], begin: npt.NDArray[np.int64], count: npt.NDArray[np.int32]) -> npt.NDArray[T]:
    """``values[begin[i] : begin[i] + count[i]]`` for every i, joined."""
    rows: npt.NDArray[np.int64] = np.arange(count.sum(dtype=np.int64)) + np.repeat(begin - begins(count), count)
    return values[rows]


def spread_table(dataset: Dataset, output: str | Path, *, depth: int = 1000, seed: int = 0) -> None:
    """Write a negative table without mining: every sentence's candidates are spread evenly over all other photos.

    Candidate j of a sentence is the photo ``j + 1`` steps after its own, wrapping around. The length of a step is drawn
    for each sentence and shares no factor with the number of photos, so that none comes twice. Similarities fall evenly
    by 0.2, starting between 0.3 and 0.4.

    Raises:
        FileFormatError: the file cannot be written.
    """
    random = np.random.default_rng(seed)
    sentences, photos = len(dataset.sentences.ref), len(dataset.images.id)
    own = dataset.refs.image[dataset.sentences.ref].astype(np.int64)
    lengths = np.flatnonzero(np.gcd(np.arange(photos), photos) == 1)
    step = random.choice(lengths, sentences)
    first = random.uniform(0.3, 0.4, sentences).astype(np.float32)
    number = np.arange(1, min(depth, photos - 1) + 1)
    fall = (0.2 * number / len(number)).astype(np.float32)
    blocks = (slice(begin, begin + BLOCK) for begin in range(0, sentences, BLOCK))
    write_table(
        output,
        blocks=(
            (((own[rows, None] + step[rows, None] * number) % photos).astype(np.int32), first[rows, None] - fall)
            for rows in blocks
        ),
        text_embedding=np.ones((sentences, 1), np.float32),
        image_embedding=np.ones((photos, 1), np.float32),
        depth=depth,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="none",
        pretrained="none",
        weights_hash="",
        exclusions=["own photo"],
    )


def repeat_tiles(source: TileFile, dataset: Dataset, output: str | Path) -> None:
    """Write the tile file of a repeated data set: the small one's tiles over and over, in full.

    Args:
        source: tiles of the data set that ``dataset`` repeats.
        output: the .tiles.h5 file; overwritten.
    """
    photos, m = len(dataset.images.id), len(source.digest)
    arrays = {
        tile_file.array_name(*shape): Layout("|u1", (photos, *array.shape[1:]), by_row=True)
        for shape, array in source.arrays.items()
    }
    attributes: dict[str, Any] = {"dataset_fingerprint": dataset.fingerprint, "dataset_name": dataset.name}
    attributes |= {name: getattr(source, name) for name in ("size", "resample", "decoder")}
    with unfinished(
        Path(output).absolute(),
        format=tile_file.FORMAT,
        version=tile_file.VERSION,
        attributes=attributes | {"grids": list(source.grids)},
        arrays=arrays | {"digest": Layout("|u1", (photos, 32))},
        read=tile_file.read_tiles,
        done=lambda _: "",
    ) as made:
        for shape, array in source.arrays.items():
            tiles = made.writable(tile_file.array_name(*shape))
            for begin in range(0, photos, m):
                tiles[begin : begin + m] = array[: photos - begin]
            made.seal(tile_file.array_name(*shape))
        made.writable("digest")[:] = np.resize(source.digest, (photos, 32))
        made.finish(tiles_fingerprint(made.file, made.file.digest))
