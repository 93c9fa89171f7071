"""One copy of some arrays per node, in memory that all its ranks map.

The memory has no name: one rank makes it (memfd_create), the others open it through that process's /proc/PID/fd. So it
is not limited by /dev/shm, often 64 MB in containers, and it is freed with the last rank, however that rank ends.
"""

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemo_dali.distributed.ranks import Ranks
from nemo_dali.errors import NemoError
from nemo_dali.io.threads import thread_count

PAGE = mmap.PAGESIZE
CHUNK = 2**26  # bytes copied at a time
ROUND = 16  # chunks that a rank copies before it reports: the others' timeout is for a GiB, however slow the disk
ROOM = 2**28  # bytes that a process needs for everything else
INSTEAD = "Or hold more in GPU memory (placement='device'), use device='cpu' with placement='host', or no tiles."
CONTROL_GROUPS = Path("/sys/fs/cgroup")

U8 = npt.NDArray[np.uint8]


def available_memory() -> int:
    """Bytes that this process can still allocate: the machine's, or fewer where a control group limits it."""
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
    """Bytes of cached files that a control group counts and that the kernel frees when memory is needed."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


@dataclass(frozen=True, eq=False)
class NodeCopy:
    """Copies of arrays. The memory is freed when the last array and the last process are done with it.

    Attributes:
        memory: uint8 [bytes], all of it, page-aligned.
        arrays: uint8, views into it with the shapes of the given arrays.
    """

    memory: U8
    arrays: tuple[U8, ...]


def node_copy(arrays: Sequence[U8], *, together: bool, problem: str = "") -> NodeCopy:
    """Copy arrays once for all ranks of this node; every rank calls it at the same time, with equal arrays.

    Args:
        arrays: contiguous uint8.
        together: whether the ranks are torch.distributed's; False: this process copies for itself.
        problem: why this rank cannot continue, if it cannot; then no rank does.

    Raises:
        NemoError: a rank has a problem, or its node too little memory; the message is the same on every rank.
    """
    begins = np.cumsum([0, *(-(-array.nbytes // PAGE) * PAGE for array in arrays)]).tolist()
    nbytes = max(begins[-1], PAGE)
    ranks = Ranks.through_store() if together else Ranks()
    peers = ranks.node_peers()
    share = peers.index(ranks.rank)
    chunks = [(number, begin) for number, array in enumerate(arrays) for begin in range(0, array.size, CHUNK)]
    chunks = chunks[share :: len(peers)]

    with contextlib.ExitStack() as opened:
        made = -1
        if share == 0 and not problem:
            try:
                made = _make(nbytes, copies=1 if together else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
                opened.callback(os.close, made)
            except (NemoError, OSError) as error:
                problem = str(error)
        shared = ranks.share((os.getpid(), made, len(chunks), problem))
        _raise_first(problem for *_, problem in shared)
        owner, descriptor, *_ = shared[peers[0]]
        most = max(count for _, _, count, _ in shared)  # with fewer ranks on a node, each copies more
        for first in range(0, max(most, 1), ROUND):
            try:
                if first == 0:
                    memory = np.frombuffer(_map(owner, descriptor, nbytes), np.uint8)
                    copies = tuple(
                        memory[begin : begin + array.nbytes].reshape(array.shape)
                        for begin, array in zip(begins, arrays, strict=False)
                    )
                _copy(arrays, copies, chunks[first : first + ROUND])
            except Exception as error:  # whatever it is, the other ranks must learn of it
                problem = str(error)
            _raise_first(ranks.share(problem))
        # Now all have copied their share, and nobody needs the descriptor.
    return NodeCopy(memory, copies)


def _raise_first(problems: Iterable[str]) -> None:
    if problem := next(filter(None, problems), None):
        raise NemoError(problem)


def _make(nbytes: int, *, copies: int) -> int:
    """Descriptor of ``nbytes`` of new memory, if the node has room for ``copies`` of it."""
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


def _copy(arrays: Sequence[U8], copies: Sequence[U8], chunks: Sequence[tuple[int, int]]) -> None:
    """Copy chunks, each given by the number of its array and where it begins in the flattened array."""

    def copy(number: int, begin: int) -> None:
        part = slice(begin, begin + CHUNK)
        np.copyto(copies[number].reshape(-1)[part], arrays[number].reshape(-1)[part])

    with ThreadPoolExecutor(thread_count()) as pool:
        for _ in pool.map(copy, *zip(*chunks, strict=True)) if chunks else ():
            pass
