"""How many threads this process may use."""

import os
import threading
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
LEAST_MOST = 64


def most_threads() -> int:
    """How many threads may be asked for: four a core, at least 64. If the system refuses one, DALI ends the process."""
    return max(4 * (os.cpu_count() or 1), LEAST_MOST)


def core_quota(file: Path | None = None) -> float | None:
    """Cores that the control group grants on average, which is what a container's ``--cpus`` sets; None: no limit."""
    try:
        quota, period = (file or CPU_MAX).read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def thread_count() -> int:
    """Cores this process may use, by affinity and quota, divided by its node's ranks, as torchrun announces them."""
    cores = len(os.sched_getaffinity(0))
    if (quota := core_quota()) is not None:
        cores = min(cores, max(int(quota), 1))
    return max(cores // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 1)


def can_start(count: int) -> bool:
    """Whether the system lets this process start that many more threads: they are started and ended; 0.3 ms each."""
    done, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        done.set()
        for thread in started:
            thread.join()
    return True
