"""Readers of untrusted files, tried in a program that is ended by a hang, a crash or too much memory."""

import os
import pickle
import random
import resource
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_dali.errors import NemoError
from tests.helpers import fork_server

CPU_S = 5
MEMORY = 1 << 30

Read = Callable[[Path], object]
Mutate = Callable[[random.Random, Sequence[bytes]], bytes]


def limit_memory(memory: int = MEMORY) -> None:
    """Let this program take ``memory`` bytes of address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def told(read: Read, path: Path) -> str | None:
    """None if a file is read, else the one sentence with which it is refused.

    The program is ended by a signal once it has taken ``CPU_S``, even in C code.
    """
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        read(path)
        return None
    except NemoError as error:
        text = str(error)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    assert text.isprintable() and len(text) < 2000, repr(text[:2000])
    return text


def _read_within_bounds(read: Read, path: Path, memory: int) -> None:
    """In a program of its own, read a file and print what it is refused with."""
    limit_memory(memory)
    print(told(read, path), flush=True)
    os._exit(0)  # at once: taking down what is imported would take longer than the file


def outcome(read: Read, path: Path, *, memory: int = MEMORY) -> str:
    """What a file is refused with, "None" if it is not; anything else that happens to the program is an error."""
    code = "import pickle, sys; function, *rest = pickle.loads(bytes.fromhex(sys.argv[1])); function(*rest)"
    done = fork_server.run(code, pickle.dumps((_read_within_bounds, read, path, memory)).hex())
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.strip()


def _try_all(read: Read, seeds: Sequence[bytes], mutate: Mutate, path: Path, numbers: range) -> None:
    limit_memory()
    read_any = 0
    for number in numbers:
        path.write_bytes(mutate(random.Random(number), seeds))
        try:
            read_any += told(read, path) is None
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f"input {number} is in {path}") from None
    print(read_any, flush=True)
    os._exit(0)


def fuzz(read: Read, seeds: Sequence[bytes], mutate: Mutate, path: Path, count: int, *, at_once: int = 1000) -> int:
    """Read ``count`` mutated files, ``at_once`` per program; returns how many of them are readable.

    Args:
        path: where the files are written; one that causes a failure stays there.
    """
    readable = 0
    (path.parent / "call").write_bytes(pickle.dumps((read, seeds, mutate, path)))
    for begin in range(0, count, at_once):
        numbers = range(begin, min(begin + at_once, count))
        code = (
            "import pickle, sys; from pathlib import Path; from tests.helpers.bounds import _try_all;"
            f"_try_all(*pickle.loads(Path(sys.argv[1]).read_bytes()), {numbers!r})"
        )
        done = fork_server.run(code, path.parent / "call")
        assert done.returncode == 0, f"status {done.returncode}, {path}: {done.stderr[-3000:]}"
        readable += int(done.stdout)
    return readable


def mutate_bytes(random: random.Random, seeds: Sequence[bytes], *, pieces: Sequence[bytes] = ()) -> bytes:
    """One of the seeds after one to four changes: bits, a cut, parts of others, ``pieces`` put in or written over."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(6 if pieces else 5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1 and random.random() < 0.3:
            del data[at:]
        elif kind == 2:
            other = random.choice(seeds)
            begin = random.randrange(len(other) + 1)
            data[at : at + random.choice((0, 20))] = other[begin : begin + random.randrange(200)]
        elif kind == 3:
            del data[at : at + random.randrange(1, 20)]
        elif kind == 4:
            part = data[at : at + random.randrange(1, 30)]
            data[at:at] = part * random.choice((1, 2, 1000))
        elif kind == 5:
            data[at : at + random.choice((0, 0, 1, 4))] = random.choice(pieces) * random.choice((1, 1, 2, 50, 3000))
    return bytes(data)
