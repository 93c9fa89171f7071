"""Damaged and forged files of ours, and what reading one gives: run in a process of its own, by ``fork_server``.

damage   bytes of a sound file changed, or its end cut off
forgery  other values, types, shapes or attributes, with all checksums right
"""

import hashlib
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali import Loader, MosaicPolicy, NemoError
from nemo_dali.data.dataset import Dataset
from nemo_dali.io.h5 import read_index
from nemo_dali.mining.table import NegativeTable
from nemo_dali.tiles.file import TileFile
from tests.helpers.forged import Parts, forge

CPU_S = 5
MEMORY = 1 << 30
SIZE = 32  # of frames


def limit() -> None:
    """From here on, refuse more than ``MEMORY`` further bytes, and end the process after ``CPU_S`` of CPU time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    spent = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime) + CPU_S + 1, resource.RLIM_INFINITY))


def damaged(sound: bytes, spans: list[tuple[int, int]], seed: int) -> bytes:
    """A file with some bytes changed: most of them in the index and the arrays, where they matter."""
    draw = random.Random(seed)
    content = bytearray(sound)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        begin, length = draw.choice([*spans, (0, len(sound))])
        content[begin + draw.randrange(max(length, 1))] ^= draw.randrange(1, 256)
    return bytes(content[: draw.randrange(len(content))] if draw.random() < 0.05 else content)


def spans_of(path: Path) -> list[tuple[int, int]]:
    """Where the index, twice as likely as one array, and the arrays are."""
    with open(path, "rb") as file:
        index = read_index(file.fileno())
    return [(0, 1000)] * 2 + [(entry.offset, entry.nbytes) for entry in index.arrays.values() if entry.nbytes]


def forgery(seed: int) -> Callable[[Parts], None]:
    """A change of one or two things to something that a hostile author might choose."""
    draw = random.Random(seed)

    def value_of(array: Any) -> Any:
        if array.dtype.kind == "f":
            return draw.choice([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30])
        low, high = np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
        return draw.choice(
            [low, high, 0, 1, max(low, -1), max(low, -7), min(high, 255), min(high, 2**31 - 1), high // 2]
        )

    def change(parts: Parts) -> None:
        for _ in range(draw.choice([1, 1, 2])):
            what = draw.random()
            name = draw.choice([name for name in parts.arrays if not name.startswith("checksums/")])
            array = parts.arrays[name]
            if what < 0.6 and array.size:
                flat = array.reshape(-1)
                for place in draw.sample(range(array.size), min(array.size, draw.choice([1, 1, 3, array.size]))):
                    flat[place] = value_of(array)
            elif what < 0.7:
                parts.arrays[name] = array[: len(array) // 2] if draw.random() < 0.5 else np.repeat(array, 2, axis=0)
            elif what < 0.75:
                parts.arrays[name] = array.astype(draw.choice(["|u1", "<i4", "<i8", "<f4", "<u4"]))
            elif what < 0.8:
                del parts.arrays[name]
                return
            else:
                key = draw.choice(list(parts.attributes))
                odd: list[Any] = [
                    -1,
                    0,
                    2**62,
                    10**9,
                    1.5,
                    "",
                    "x" * 3000,
                    "\x1b]0;x\x07\u202e",
                    "../..",
                    [],
                    [[]],
                    [2],
                ]
                odd += ["/dev/zero", "s3://", "s3://a@b/c", ["x"] * 50, [1e300], "cubic", "9" * 400]
                value = draw.choice(odd)
                parts.attributes[key] = [3, 3] if value == [[]] else value

    return change


def read(kind: str, path: Path) -> str:
    """A digest of everything in a file."""
    digest = hashlib.sha256()
    if kind == "ris":
        dataset = Dataset.open(path)
        digest.update(dataset.content_fingerprint().encode())
        for table in (dataset.images, dataset.refs, dataset.sentences):
            for column in vars(table).values():
                digest.update(repr(list(column)).encode())
        for ref in range(len(dataset.refs.ref_id)):
            digest.update(dataset.mask(ref).tobytes())
        digest.update(repr((dataset.name, dataset.image_root, dataset.left_out, dataset.category_name)).encode())
        return digest.hexdigest()
    if kind == "neg":
        table = NegativeTable.open(path)
        table.check_all_rows()
        table.check_embeddings()
        for array in (table.neighbors, table.similarity, table.text_embedding, table.image_embedding, table.own_rank):
            digest.update(array.tobytes())
        digest.update(repr((table.dataset_fingerprint, table.model, table.exclusions, table.depth)).encode())
        digest.update(table.excluded_photos.tobytes())
        return digest.hexdigest()
    tiles = TileFile.open(path)
    for rows in tiles.rows.values():
        rows.check_all()
        digest.update(rows.array.tobytes())
    digest.update(repr((tiles.dataset_fingerprint, tiles.size, tiles.resample, tiles.grids, tiles.decoder)).encode())
    return digest.hexdigest()


def show(kind: str, path: Path, folder: Path) -> str:
    """A digest of what a Loader delivers, with this file in place of the sound one."""
    files = {name: folder / f"sound.{name}.h5" for name in ("ris", "neg", "tiles")} | {kind: path}
    loader = Loader(
        files["ris"],
        files["neg"],
        tiles=files["tiles"] if kind == "tiles" else None,
        batch_size=3,
        size=SIZE,
        policy=MosaicPolicy(p_mined=0.8, p_random=0.2, max_similarity=0.4),
        num_threads=1,
        prefetch=1,
        drop_last=False,
    )
    digest = hashlib.sha256()
    try:
        for batch in loader:
            for tensor in (batch.image, batch.mask, batch.tokens, batch.attention_mask):
                digest.update(tensor.numpy().tobytes())
            digest.update(batch.plan.tobytes())
    finally:
        loader.close()
    return digest.hexdigest()


def try_files(kind: str, folder: Path, what: str, begin: int, end: int, *, loader: bool) -> dict[str, int]:
    """Try damage or forgeries by their seeds; returns how often a file was refused, and how often taken.

    Raises:
        AssertionError: damage went unnoticed.
        Exception: anything but an error of the package.
    """
    sound = folder / f"sound.{kind}.h5"
    content, spans = sound.read_bytes(), spans_of(sound)
    path = folder / f"tried-{what}-{begin}.{kind}.h5"
    attempt = (lambda: show(kind, path, folder)) if loader else (lambda: read(kind, path))
    path.write_bytes(content)
    expected = attempt()
    counts = {"refused": 0, "taken": 0}
    for seed in range(begin, end):
        print(f"{kind} {what} {seed}", flush=True)
        if what == "damage":
            path.write_bytes(damaged(content, spans, seed))
        else:
            forge(sound, forgery(seed), path)
        limit()
        try:
            found = attempt()
        except (NemoError, ValueError) as error:
            assert "\n" not in str(error) and (isinstance(error, NemoError) or loader), repr(error)
            counts["refused"] += 1
        else:
            assert what == "forgery" or found == expected, "what was read differs, and nobody noticed"
            counts["taken"] += 1
    path.unlink()
    return counts
