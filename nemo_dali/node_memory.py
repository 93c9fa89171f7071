"""One copy of some arrays per node, in memory that all its ranks map.

The memory has no name: one rank makes it (memfd_create), the others open it through that process's /proc/PID/fd. So it
is not bounded by /dev/shm, of which containers often have 64 MB, and it goes with the last rank, however that one ends.
"""

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali import sharding
from nemo_dali.errors import NemoError

PAGE = mmap.PAGESIZE
CHUNK = 2**26  # bytes copied at a time
ROOM = 2**28  # bytes that a process needs besides

U8 = npt.NDArray[np.uint8]
T = TypeVar("T")


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or less where a control group bounds it."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for limit, used in (
        ("memory.max", "memory.current"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            group = Path("/sys/fs/cgroup")
            found.append(int((group / limit).read_text()) - int((group / used).read_text()) + _cache(group / limit))
    return max(min(found), 0)


def _cache(limit: Path) -> int:
    """Bytes of files that the control group counts and that the kernel gives up when memory is asked for."""
    stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


@dataclass(frozen=True, eq=False)
class NodeCopy:
    """Copies of arrays. The memory goes when the last array and the last process are done with it.

    Attributes:
        memory: uint8 [bytes], all of it, from a page's beginning.
        arrays: uint8, views into it of the shapes that were given.
    """

    memory: U8
    arrays: tuple[U8, ...]


def node_copy(arrays: Sequence[U8], *, together: bool) -> NodeCopy:
    """Copy arrays once for all ranks of this node; every rank calls it at the same time, with equal arrays.

    Args:
        arrays: contiguous uint8.
        together: whether the ranks are torch.distributed's; False: this process copies for itself.

    Raises:
        NemoError: the node has not enough memory, on every rank the same.
    """
    begins = np.cumsum([0, *(-(-array.nbytes // PAGE) * PAGE for array in arrays)]).tolist()
    nbytes = max(begins[-1], PAGE)
    peers = sharding.node_peers() if together else [0]
    share = peers.index(_rank()) if together else 0

    def tell(fact: T) -> list[T]:
        return sharding.exchange(fact) if together else [fact]

    with contextlib.ExitStack() as opened:
        made, problem = -1, ""
        if share == 0:
            try:
                made = _make(nbytes)
                opened.callback(os.close, made)
            except (NemoError, OSError) as error:
                problem = str(error)
        owners = tell((os.getpid(), made, problem))
        _raise_first(problem for _, _, problem in owners)
        owner, descriptor, _ = owners[peers[0]]
        try:
            memory = np.frombuffer(_map(owner, descriptor, nbytes), np.uint8)
            copies = tuple(
                memory[begin : begin + array.nbytes].reshape(array.shape)
                for begin, array in zip(begins, arrays, strict=False)
            )
            _copy(arrays, copies, share, len(peers))
        except NemoError as error:
            problem = str(error)
        _raise_first(tell(problem))  # beyond this, all have copied their share, and nobody needs the descriptor
    return NodeCopy(memory, copies)


def _raise_first(problems: Iterable[str]) -> None:
    if problem := next(filter(None, problems), None):
        raise NemoError(problem)


def _rank() -> int:
    import torch.distributed as distributed

    return distributed.get_rank()


def _make(nbytes: int) -> int:
    """Descriptor of so much new memory."""
    free = available_memory()
    if nbytes + ROOM > free:
        raise NemoError(
            f"The tiles take {nbytes / 1e9:.1f} GB of page-locked memory, and {free / 1e9:.1f} GB are free on this "
            "node. Use placement='host', which maps the file, a smaller size, or fewer grids."
        )
    descriptor = os.memfd_create("nemo-dali tiles")
    os.ftruncate(descriptor, nbytes)
    return descriptor


def _map(owner: int, descriptor: int, nbytes: int) -> mmap.mmap:
    try:
        if owner == os.getpid():
            return mmap.mmap(descriptor, nbytes)
        with open(f"/proc/{owner}/fd/{descriptor}", "r+b") as file:
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise NemoError(
            f"The memory of process {owner}, which holds this node's tiles, cannot be mapped ({error.strerror}). Run "
            "the ranks of a node as one user and in one container, or use placement='host'."
        ) from error


def _copy(arrays: Sequence[U8], copies: Sequence[U8], share: int, shares: int) -> None:
    """Copy every ``shares``-th piece, from the ``share``-th on."""

    def pieces() -> Iterator[tuple[Any, Any]]:
        for array, copy in zip(arrays, copies, strict=True):
            flat, into = array.reshape(-1), copy.reshape(-1)
            for begin in range(0, flat.size, CHUNK):
                yield into[begin : begin + CHUNK], flat[begin : begin + CHUNK]

    with ThreadPoolExecutor(sharding.thread_count()) as pool:
        for _ in pool.map(lambda piece: np.copyto(*piece), list(pieces())[share::shares]):
            pass
