"""Mining: CLIP embeddings of photos and sentences, and for each sentence the photos most similar to it.

    photos ──decode, preprocess──▶ image encoder ──▶ image_embedding [M, D] ──┐
                                                                              ├──rank──▶ negative table
    sentences ──tokenizer────────▶ text encoder ───▶ text_embedding [S, D] ───┘

The same data set, weights, batch size and machine give the same bytes.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nemo_dali.clip import first_not_finite, load_clip
from nemo_dali.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.progress import progress
from nemo_dali.table import write_table

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

BLOCK_BYTES = 64 << 20  # of similarities held at once while ranking: a thousand sentences against 17,000 photos
OWN_PHOTO = "own photo"


@dataclass(frozen=True)
class MiningReport:
    """What ``mine`` wrote, how long it took and how good the model is on this data.

    The rank of a sentence's own photo is its place among all photos, from 1, before it is excluded.
    """

    output: Path
    fingerprint: str
    photos: int
    sentences: int
    neighbors: int  # per sentence
    device: str
    seconds_photos: float
    seconds_sentences: float
    seconds_ranking: float
    photos_per_s: float
    median_rank: float
    recall_at_1: float  # share of the sentences whose own photo comes first
    recall_at_10: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.neighbors} negatives for each of {self.sentences} sentences, "
            f"from {self.photos} photos\n"
            f"own photo: median rank {self.median_rank:g}, first for {self.recall_at_1:.1%} of the sentences, "
            f"among the first ten for {self.recall_at_10:.1%}\n"
            f"time on {self.device}: photos {self.seconds_photos:.1f} s ({self.photos_per_s:.1f}/s), "
            f"sentences {self.seconds_sentences:.1f} s, ranking {self.seconds_ranking:.1f} s"
        )


def mine(
    dataset_path: str | Path,
    *,
    model: str,
    pretrained: str,
    output: str | Path,
    depth: int = 1000,
    batch_size: int = 64,
    device: str | None = None,
    images: str | Path | None = None,
) -> MiningReport:
    """Embed all photos and sentences of a data set, rank the photos for each sentence and write a .neg.h5 file.

    Args:
        dataset_path: a .ris.h5 file.
        model: the name of an open_clip model ("ViT-B-32"), or the path of an open_clip model config (.json).
        pretrained: a tag that open_clip can fetch ("laion2b_s34b_b79k"), or a local weights file (.pt, .pth, .bin,
            .safetensors). Tensors are all that is read from it.
        output: the table; one that exists is replaced only when the new one is complete.
        depth: photos kept per sentence, at most all but its own.
        batch_size: photos or sentences that the model sees at once.
        device: "cpu", "cuda", "cuda:1", ...; None: CUDA where there is a device, else the CPU.
        images: where the photos are, if not where they were when the data set file was made.

    Raises:
        NemoError: the model or its weights cannot be used, or the data set has fewer than two photos.
        PhotoError: a photo is missing, cannot be decoded or has changed.
        FileFormatError: the data set cannot be read or the table cannot be written.
    """
    for name, value in (("depth", depth), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    if not Path(output).absolute().parent.is_dir():  # told now, not after hours of work
        raise FileFormatError(f"Cannot write {output}: its folder does not exist. Choose another place with -o.")
    dataset = Dataset.open(dataset_path, images=images)
    if len(dataset.images.id) < 2:
        raise NemoError(f"{dataset.path} has only one photo, so there are no negatives. Index more photos.")
    clip = load_clip(model, pretrained, device=device)

    start = time.monotonic()
    image_embedding = clip.embed_photos(dataset, batch_size=batch_size)
    photos_done = time.monotonic()
    text_embedding = clip.embed_sentences(dataset.sentences.text, batch_size=batch_size)
    sentences_done = time.monotonic()

    own_rank = np.empty(len(text_embedding), np.int32)

    def rows() -> Iterator[tuple[I32, F32]]:
        own_image = np.asarray(dataset.refs.image)[dataset.sentences.ref]
        for block in rank_blocks(text_embedding, image_embedding, own_image, depth=depth):
            own_rank[block.begin : block.begin + len(block.own_rank)] = block.own_rank
            yield block.neighbors, block.similarity

    digest = write_table(
        output,
        blocks=rows(),
        text_embedding=text_embedding,
        image_embedding=image_embedding,
        depth=depth,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model=model,
        pretrained=pretrained,
        weights_hash=clip.weights_hash,
        exclusions=[OWN_PHOTO],
    )
    return MiningReport(
        output=Path(output),
        fingerprint=digest,
        photos=len(image_embedding),
        sentences=len(text_embedding),
        neighbors=min(depth, len(image_embedding) - 1),
        device=str(clip.device),
        seconds_photos=photos_done - start,
        seconds_sentences=sentences_done - photos_done,
        seconds_ranking=time.monotonic() - sentences_done,
        photos_per_s=len(image_embedding) / (photos_done - start),
        median_rank=float(np.median(own_rank)),
        recall_at_1=float((own_rank <= 1).mean()),
        recall_at_10=float((own_rank <= 10).mean()),
    )


# --- ranking ---------------------------------------------------------------------------------------------------------


class RankedBlock(NamedTuple):
    """The ranking for the sentences from row ``begin`` on; N = min(depth, M - 1)."""

    begin: int
    neighbors: I32  # [b, N]
    similarity: F32  # [b, N]
    own_rank: I32  # [b], the own photo's place among all M, from 1


def rank(text_embedding: F32, image_embedding: F32, own_image: I32, *, depth: int) -> tuple[I32, F32]:
    """Exact top-N of all photos but the own one, for each sentence; equal similarities go to the lower row.

    Args:
        text_embedding: float32 [S, D] of unit length.
        image_embedding: float32 [M, D] of unit length, M >= 2.
        own_image: integer [S], the photo row that a sentence belongs to.
        depth: photos per sentence, at most M - 1 are there.

    Returns:
        ``(neighbors int32 [S, N], similarity float32 [S, N])``, N = min(depth, M - 1), most similar first.
    """
    blocks = list(rank_blocks(text_embedding, image_embedding, own_image, depth=depth))
    return np.concatenate([b.neighbors for b in blocks]), np.concatenate([b.similarity for b in blocks])


def rank_blocks(
    text_embedding: F32, image_embedding: F32, own_image: I32, *, depth: int, block_rows: int | None = None
) -> Iterator[RankedBlock]:
    """What ``rank`` returns, in blocks of consecutive sentences.

    Memory beside the arguments: ``block_rows`` x M float32 (64 MiB unless given) and the block's own result. The block
    size changes nothing in the results.
    """
    from nemo_dali.kernels.ranking import rank_block

    text, image, own = text_embedding, image_embedding, np.asarray(own_image)
    sentences, photos = len(text), len(image)
    if photos < 2:
        raise ValueError(f"image_embedding ({photos} photos) must have at least 2")
    if depth < 1:
        raise ValueError(f"depth ({depth}) must be at least 1")
    if text.ndim != 2 or image.ndim != 2 or text.shape[1] != image.shape[1] or own.shape != (sentences,):
        raise ValueError(
            f"text_embedding {text.shape}, image_embedding {image.shape} and own_image {own.shape} must be "
            "[S, D], [M, D] and [S]"
        )
    if sentences and not (own.min() >= 0 and own.max() < photos):
        raise ValueError(f"own_image ({own.min()} to {own.max()}) must be rows of {photos} photos")
    for name, array in (("text_embedding", text), ("image_embedding", image)):
        if (row := first_not_finite(array)) is not None:
            raise ValueError(f"{name} (row {row}) must be finite")
    padding = ((0, 0), (0, -text.shape[1] % 4))  # the kernel takes multiples of 4; zeros change no sum
    text, image = (np.ascontiguousarray(np.pad(x, padding) if padding[1][1] else x, np.float32) for x in (text, image))
    rows = block_rows or max(1, BLOCK_BYTES // (4 * photos))
    threads = len(os.sched_getaffinity(0))
    begins = range(0, sentences, rows)
    with ThreadPoolExecutor(threads) as pool:
        for begin in progress(begins, total=len(begins), what="ranking photos", unit="block"):
            block = slice(begin, begin + rows)
            ranked = rank_block(
                text[block],
                image,
                own[block].astype(np.int32),
                depth=min(depth, photos - 1),
                pool=pool,
                threads=threads,
            )
            yield RankedBlock(begin, *ranked)
