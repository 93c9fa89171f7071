"""How many threads this process may use."""

import os


def thread_count() -> int:
    """Cores this process may use, shared by the ranks on its node, as torchrun announces them."""
    return max(len(os.sched_getaffinity(0)) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 1)
