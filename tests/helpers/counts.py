"""How often a property is tried: a fifth in the ordinary lanes, but at least 20 times, in full by ``make fuzz``."""

import os

FULL = os.environ.get("NEMO_DALI_FUZZ") == "1"


def examples(full: int) -> int:
    """How many of ``full`` examples to try."""
    return full if FULL else max(full // 5, 20)
