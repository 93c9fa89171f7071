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

from nemo_dali.distributed import ranks
from nemo_dali.errors import NemoError
from nemo_dali.io.threads import thread_count

PAGE = mmap.PAGESIZE
CHUNK = 2**26  # bytes copied at a time
ROOM = 2**28  # bytes that a process needs besides
PATIENCE = 3600.0  # seconds until a rank that is still copying is missed: its disk may be slow
INSTEAD = "Or hold more in GPU memory (placement='device'), use device='cpu' with placement='host', or no tiles."
CONTROL_GROUPS = Path("/sys/fs/cgroup")

U8 = npt.NDArray[np.uint8]
T = TypeVar("T")


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or less where a control group bounds it."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, names = CONTROL_GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CONTROL_GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = root / group.lstrip("/")
        for folder in (inner, *inner.parents):  # a container may see its group as the root
            if folder == root.parent:
                break
            with contextlib.suppress(OSError, ValueError):  # no such group, or no limit: "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                found.append(limit - used + _files_in_memory(folder))
    return max(min(found), 0)


def _files_in_memory(group: Path) -> int:
    """Bytes of files that a control group counts and that the kernel gives up when memory is asked for."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
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


def node_copy(arrays: Sequence[U8], *, together: bool, problem: str = "") -> NodeCopy:
    """Copy arrays once for all ranks of this node; every rank calls it at the same time, with equal arrays.

    Args:
        arrays: contiguous uint8.
        together: whether the ranks are torch.distributed's; False: this process copies for itself.
        problem: why this rank cannot go on, if so; then no rank does.

    Raises:
        NemoError: a rank has a problem, or its node not enough memory; on every rank the same sentence.
    """
    begins = np.cumsum([0, *(-(-array.nbytes // PAGE) * PAGE for array in arrays)]).tolist()
    nbytes = max(begins[-1], PAGE)
    peers = ranks.node_peers() if together else [0]
    share = peers.index(_rank()) if together else 0

    def tell(fact: T) -> list[T]:
        return ranks.exchange(fact, patience=PATIENCE) if together else [fact]

    with contextlib.ExitStack() as opened:
        made = -1
        if share == 0 and not problem:
            try:
                made = _make(nbytes, copies=1 if together else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
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
        except Exception as error:  # whatever it is, the other ranks are to hear of it
            problem = str(error)
        _raise_first(tell(problem))  # beyond this, all have copied their share, and nobody needs the descriptor
    return NodeCopy(memory, copies)


def _raise_first(problems: Iterable[str]) -> None:
    if problem := next(filter(None, problems), None):
        raise NemoError(problem)


def _rank() -> int:
    import torch.distributed as distributed

    return distributed.get_rank()


def _make(nbytes: int, *, copies: int) -> int:
    """Descriptor of so much new memory, if the node has room for so many copies of it."""
    free = available_memory()
    if copies * nbytes + ROOM > free:
        raise NemoError(
            f"The tiles take {copies * nbytes / 1e9:.1f} GB of page-locked memory, and {free / 1e9:.1f} GB are free on "
            f"this node. {INSTEAD}"
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
            f"the ranks of a node as one user and in one container. {INSTEAD}"
        ) from error


def _copy(arrays: Sequence[U8], copies: Sequence[U8], share: int, shares: int) -> None:
    """Copy every ``shares``-th piece, from the ``share``-th on."""

    def pieces() -> Iterator[tuple[Any, Any]]:
        for array, copy in zip(arrays, copies, strict=True):
            flat, into = array.reshape(-1), copy.reshape(-1)
            for begin in range(0, flat.size, CHUNK):
                yield into[begin : begin + CHUNK], flat[begin : begin + CHUNK]

    with ThreadPoolExecutor(thread_count()) as pool:
        for _ in pool.map(lambda piece: np.copyto(*piece), list(pieces())[share::shares]):
            pass
