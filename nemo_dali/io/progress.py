"""Progress of long work: a bar on a terminal, a plain line every ten seconds otherwise."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from nemo_dali.io.terminal import say

T = TypeVar("T")
PLAIN_INTERVAL_S = 10.0


def progress(items: Iterable[T], *, total: int | None, what: str, unit: str) -> Iterator[T]:
    """Yield ``items`` while showing on stderr how many of ``total`` are done, the rate and the time left, if known.

    Example of a plain line: ``mining photos: 1200/17000 photo, 85.1 photo/s, 186 s left``.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit=unit)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= PLAIN_INTERVAL_S or (done == total and shown > start):
            rate = done / (now - start)
            if total is None:
                say(f"{what}: {done} {unit}, {rate:.1f} {unit}/s", error=True)
            else:
                left = (total - done) / rate
                say(f"{what}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {left:.0f} s left", error=True)
            shown = now
