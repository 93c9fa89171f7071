"""How many threads this process may use."""

import os
import threading

LEAST_MOST = 64


def most_threads() -> int:
    """How many threads may be asked for: four a core. Where the system refuses one, DALI ends the process."""
    return max(4 * (os.cpu_count() or 1), LEAST_MOST)


def thread_count() -> int:
    """Cores this process may use, shared by the ranks on its node, as torchrun announces them."""
    return max(len(os.sched_getaffinity(0)) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 1)


def can_start(count: int) -> bool:
    """Whether the system lets this process start so many threads more: some are started, and ended; 0.3 ms each."""
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
