"""The limit of the address space: libraries for GPUs map much of it, and end the process when it runs out."""

import re
import resource
import subprocess
import sys

from nemo_dali.errors import NemoError

ROOM_ENOUGH = 8 * 2**30  # bytes of address space for torch and DALI, built for GPUs


def check_address_space() -> None:
    """If it is limited, load torch and DALI in another process first: with too little of it they end the process.

    Call this before anything in the package that may import NumPy, whose threads end the process too.

    Raises:
        NemoError: they ended it.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if not 0 <= limit < ROOM_ENOUGH:
        return
    done = subprocess.run([sys.executable, "-c", "import torch, nvidia.dali"], capture_output=True)
    if done.returncode < 0 or re.search(b"failed to map|[Aa]llocat|MemoryError", done.stderr):
        raise NemoError(
            f"torch and DALI cannot be loaded within the {limit / 2**30:.1f} GiB that this process may map. Raise its "
            f"limit (ulimit -v), for example to {ROOM_ENOUGH >> 30} GiB."
        )


def raise_it_first() -> str:
    """The remedy if the address space is limited, as a sentence to put before another; else an empty string."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"This process may map only {limit / 2**30:.1f} GiB: raise that limit first (ulimit -v). "
