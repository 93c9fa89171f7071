"""Where resident tiles are kept in memory, and which of them a sample's cells show.

placement   the tiles are read from                                    by
host        the mapped file, one copy per node in the page cache       the CPU's kernel
pinned      page-locked memory, one copy per node, over the bus        the GPU's kernel
device      the GPU's own memory; beyond the budget, page-locked       the GPU's kernel
"""

import itertools
import math
import os
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import PathLike
from nemo_dali._choices import Placement
from nemo_dali.data.dataset import Dataset
from nemo_dali.distributed.node_memory import node_copy
from nemo_dali.distributed.ranks import Ranks
from nemo_dali.errors import NemoError
from nemo_dali.io.threads import thread_count
from nemo_dali.pipeline import gpu
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.file import Shape, TileFile

ROOM = 2**29  # bytes of GPU memory that kernels and the decoder need

Addresses = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]


class ResidentTiles:
    """The tiles that a policy shows, in memory. What a GPU reads is released with this object.

    Args:
        paths: .tiles.h5 files, one for each of ``datasets``.
        size, resample, policy: the loader's; the policy must not jitter the crossing of 2x2 mosaics.
        grids: those that its plan may have; 1 for single photos.
        placement: where to keep them.
        device_id: CUDA device number; None: the CPU, for "host" only.
        device_budget: for "device", bytes of GPU memory; the tiles that are read most often go there, the rest into
            page-locked memory. None: all of them, or an error.
        together: whether every rank of torch.distributed makes one now, so that a node's ranks can share a copy.

    Attributes:
        placement: as given.
        addresses: uint64 [sizes * photos], of every tile; call ``check`` before reading one.
        device_bytes, pinned_bytes: of the tiles in GPU memory and in page-locked memory.

    Raises:
        ValueError: lists of different lengths.
        FileFormatError: a file that does not fit the data set, the size, the resampling or the policy's grids.
        NemoError: not enough memory.
    """

    def __init__(
        self,
        paths: Sequence[PathLike],
        datasets: Sequence[Dataset],
        *,
        size: int,
        resample: str,
        policy: MosaicPolicy,
        grids: Collection[int],
        placement: Placement = "host",
        device_id: int | None = None,
        device_budget: int | None = None,
        together: bool = False,
    ) -> None:
        if len(paths) != len(datasets):
            raise ValueError(f"tiles ({len(paths)} given) must be one per data set ({len(datasets)})")
        self.placement = placement
        self.files = [TileFile.open(path) for path in paths]
        for file, dataset in zip(self.files, datasets, strict=True):
            file.check_dataset(dataset)
            file.check(size=size, resample=resample, grids=grids)
        if together:
            Ranks.through_store().agree({"tile files": [file.fingerprint for file in self.files]}, "made a Loader")
        arrays = [(shape, file.arrays[shape]) for shape in _most_read_first(policy, size, grids) for file in self.files]
        self.device_bytes = self.pinned_bytes = 0
        if device_id is None:
            rows = [_rows(array.ctypes.data, array) for _, array in arrays]
        else:
            budget = device_budget if placement == "device" else 0
            self._check_all([shape for shape, _ in arrays])
            rows = self._send([array for _, array in arrays], device_id, budget, together)
        begins = np.cumsum([0, *(len(file.digest) for file in self.files)])
        self._begin_of = list(zip(begins[:-1].tolist(), self.files, strict=True))
        self._photos = int(begins[-1])
        self._shapes = list(dict.fromkeys(shape for shape, _ in arrays))
        self._sound = np.full(len(self._shapes) * self._photos, device_id is not None)
        self.addresses = np.concatenate(
            [
                addresses
                for shape in self._shapes
                for (of, _), addresses in zip(arrays, rows, strict=True)
                if of == shape
            ]
        )

    def _check_all(self, shapes: Iterable[Shape]) -> None:
        """Compare all tiles with their checksums."""
        with ThreadPoolExecutor(thread_count()) as pool:
            for checked in [pool.submit(file.rows[shape].check_all) for shape in set(shapes) for file in self.files]:
                checked.result()

    def _send(self, arrays: list[U8], device_id: int, budget: int | None, together: bool) -> list[Addresses]:
        """Copy arrays, already checked, to where a GPU reads them; returns the address of each of their rows."""
        needed = sum(array.nbytes for array in arrays)
        counts, left = [], needed if budget is None else budget
        for array in arrays:
            counts.append(min(left // array[0].nbytes, len(array)))
            left -= counts[-1] * array[0].nbytes
        rest = [array[count:] for array, count in zip(arrays, counts, strict=True)]
        self.pinned_bytes = sum(array.nbytes for array in rest)
        self.device_bytes = needed - self.pinned_bytes
        sent: list[Any] = []
        problem, locked, shift = "", None, 0
        try:
            self._check_room(needed, device_id)
            sent += [gpu.copy_of(array[:count], device_id) for array, count in zip(arrays, counts, strict=True)]
        except NemoError as error:
            if not (self.pinned_bytes and together):
                raise
            problem = str(error)  # the other ranks must learn of it
        if self.pinned_bytes:
            copy = node_copy(rest, together=together, problem=problem)
            locked, rest = copy.memory, list(copy.arrays)
            shift = gpu.lock_pages(locked, device_id) - locked.ctypes.data
        # Not at the end of the process, which frees everything anyway.
        weakref.finalize(self, _let_go, device_id, os.getpid(), sent, locked).atexit = False
        return [
            np.concatenate([_rows(tensor.data_ptr(), tensor), _rows(array.ctypes.data + shift, array)])
            for tensor, array in zip(sent, rest, strict=True)
        ]

    def _check_room(self, needed: int, device_id: int) -> None:
        free = gpu.free_memory(device_id)
        if self.device_bytes and self.device_bytes + ROOM > free:
            raise NemoError(
                f"The tiles take {needed / 1e9:.1f} GB, and GPU {device_id} has {free / 1e9:.1f} GB free. Give a "
                "smaller device_budget, in bytes, to have the rest in page-locked memory, or use placement='pinned'."
            )

    @property
    def decoder(self) -> str:
        """What decoded the photos: "mixed" if a GPU decoded those of any file, else "cpu"."""
        return "mixed" if any(file.decoder.endswith("mixed") for file in self.files) else "cpu"

    def check_files(self) -> None:
        """See ``Corpus.check_files``."""
        for file in self.files:
            file.mapped.check()

    def find(
        self, heights: npt.NDArray[np.int32], widths: npt.NDArray[np.int32], photos: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The tiles of photos [n] at given sizes [n], int64 [n]: indices into ``addresses``."""
        first = np.empty(len(photos), np.int64)
        for index, (height, width) in enumerate(self._shapes):
            first[(heights == height) & (widths == width)] = index * self._photos
        return first + photos

    def check(self, tiles: npt.NDArray[np.int64]) -> None:
        """Compare tiles [n] with their checksums, each on its first use.

        Raises:
            FileFormatError: one is not as it was written.
        """
        if self._sound.take(tiles).all():
            return
        for index, shape in enumerate(self._shapes):
            photos = tiles[(tiles // self._photos == index) & ~self._sound[tiles]] - index * self._photos
            for begin, file in self._begin_of:
                of_file = photos[(begin <= photos) & (photos < begin + len(file.digest))]
                file.rows[shape].check(of_file - begin)
        self._sound[tiles] = True


def _most_read_first(policy: MosaicPolicy, size: int, grids: Collection[int]) -> list[Shape]:
    """The sizes of the cells of grids, first those of which the average sample reads the most tiles."""
    mosaic = _mosaic_share(policy)
    reads: dict[Shape, float] = defaultdict(float)
    for grid in grids:
        share = 1 - mosaic if grid == 1 else mosaic * policy.grids[grid] / sum(policy.grids.values())
        sides = np.diff(size * np.arange(grid + 1) // grid).tolist()
        for shape in itertools.product(sides, sides):
            reads[shape] += share
    return sorted(filter(all, reads), key=lambda shape: -reads[shape])


def _mosaic_share(policy: MosaicPolicy) -> float:
    """The share of samples that are mosaics, averaged from epoch 0 to the last one in which something changes."""
    epochs = policy.turns
    shares = [now.p_mined + now.p_random for now in map(policy.difficulty, epochs)]
    if epochs == [0]:
        return shares[0]
    pairs = zip(itertools.pairwise(epochs), itertools.pairwise(shares), strict=True)
    return sum((end - begin) * sum(share) / 2 for (begin, end), share in pairs) / epochs[-1]


def _rows(begin: int, array: Any) -> Addresses:
    """The addresses of the rows of an array that begins at ``begin``."""
    return np.uint64(begin) + np.arange(len(array), dtype=np.uint64) * np.uint64(math.prod(array.shape[1:]))


def _let_go(device_id: int, process: int, sent: list[Any], locked: U8 | None) -> None:
    if os.getpid() == process:  # CUDA does not survive a fork
        with suppress(RuntimeError):  # after a CUDA error nothing runs there any more
            gpu.synchronize(device_id)  # the last batches may still be reading this memory
            if locked is not None:
                gpu.unlock_pages(locked, device_id)
    sent.clear()
