"""How much memory this process may use."""

import math
import os
import resource
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_bytes() -> int:
    """The machine's memory, or what the process's control group may use of it, if that is less."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in LIMITS:
        try:
            least = min(least, int(path.read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return least


def address_space_left() -> float:
    """Bytes that this process may still map; infinity where nothing limits that (``ulimit -v``)."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
