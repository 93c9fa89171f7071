"""Programs for tests, started in milliseconds: forked from a process that has imported torch, DALI and nemo_dali.

    test ──start──▶ server ──fork──▶ watcher ──fork──▶ program: runs the code as __main__, and ends as a program does
      ▲                                  │
      └──────── exit status ◀────────────┘

Apart from how it starts, a program is a Python process like any other: its main thread runs the code, an uncaught error
ends it with a traceback, and the interpreter is torn down as always.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

PRELOADED = (
    "nvidia.dali.fn",
    "open_clip",
    "torch.distributed",
    "nemo_dali.fn",
    "nemo_dali.loader.loader",
    "nemo_dali.mining.job",
)
DEADLINE = 120  # seconds for a program that is waited for
LONGEST_MESSAGE = 2**20  # bytes of a program with its environment


class Program:
    """A started program. Its parent is the watcher, which reports how it ended.

    Attributes:
        pid: process number.
        stdout, stderr: what it prints, as text.
        returncode: as ``subprocess`` has it, once it has been waited for.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        socket.send_fds(_server(), [json.dumps(request).encode()], [out_end, err_end, theirs.fileno()])
        os.close(out_end)
        os.close(err_end)
        theirs.close()
        self._reports = ours
        ours.settimeout(DEADLINE)
        self.pid = self._report()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.returncode: int | None = None

    def _report(self) -> int:
        (number,) = struct.unpack("i", self._reports.recv(4, socket.MSG_WAITALL))
        return number

    def wait(self) -> int:
        """The exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(self._report())
            self._reports.close()
        return self.returncode

    def communicate(self, timeout: float = DEADLINE) -> tuple[str, str]:
        """The rest of its output, until it has ended."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            try:
                out, err = (text.result(timeout) for text in texts)
            except BaseException:
                self.kill()
                raise
        self.stdout.close()
        self.stderr.close()
        self.wait()
        return out, err

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has been waited for."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by force."""
        self.send_signal(signal.SIGKILL)


def start(code: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Program:
    """Start a program.

    Args:
        code: Python source.
        arguments: ``sys.argv`` after its first.
        env: the environment; None: this process's.
        cwd: the working directory; None: this process's.
    """
    environment = dict(os.environ if env is None else env)
    return Program(
        {"code": code, "arguments": [*map(str, arguments)], "env": environment, "cwd": str(cwd or Path.cwd())}
    )


def run(code: str, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end; ``options`` are those of ``start``."""
    program = start(code, *arguments, **options)
    out, err = program.communicate()
    return subprocess.CompletedProcess(code, program.wait(), out, err)


def call(function: Callable[..., object], *arguments: object) -> None:
    """Call a function of a test module in a program of its own."""
    code = "import pickle, sys; function, arguments = pickle.loads(bytes.fromhex(sys.argv[1])); function(*arguments)"
    done = run(code, pickle.dumps((function, arguments)).hex())
    assert done.returncode == 0, done.stderr


@functools.cache
def _server() -> socket.socket:
    """The connection to the server of this run of the tests, which all its workers share."""
    run_of_tests = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    address = f"{tempfile.gettempdir()}/nemo-dali-{run_of_tests}.socket"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_MESSAGE)
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(address)
        except OSError:  # nobody listens: this worker is the first one, or the last server's workers are gone
            _start_server(address)
            connection.connect(address)
    atexit.register(connection.close)
    return connection


def _start_server(address: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    command = [sys.executable, "-m", "tests.helpers.fork_server", str(listener.fileno())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # In its own session, so that interrupting the tests does not reach it. It ends when nobody is connected any more.
    server = subprocess.Popen(
        command,
        pass_fds=[listener.fileno()],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    listener.close()
    atexit.register(server.poll)


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Serve until all test processes are gone. In a forked program, returns what it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    connections: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *connections], [], [])[0]:
            if ready is listener:
                connections.append(listener.accept()[0])
                continue
            message, descriptors, _, _ = socket.recv_fds(ready, LONGEST_MESSAGE, 3)
            if not message:
                connections.remove(ready)
                ready.close()
                if not connections:
                    os.unlink(listener.getsockname())
                    os.unlink(f"{listener.getsockname()}.lock")
                    return None
            elif os.fork() == 0:
                for inherited in (listener, *connections):
                    inherited.close()
                return _watch(json.loads(message), *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _watch(request: dict[str, Any], out: int, err: int, reports: int) -> dict[str, Any]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if program := os.fork():
        os.close(out)
        os.close(err)
        os.write(reports, struct.pack("i", program))
        os.write(reports, struct.pack("i", os.waitpid(program, 0)[1]))
        os._exit(0)
    os.close(reports)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    sys.argv = ["-c", *request["arguments"]]
    return request


if __name__ == "__main__":
    for _module in PRELOADED:
        __import__(_module)
    gc.freeze()  # so that imported objects are not looked at when a program ends
    _request = serve(socket.socket(fileno=int(sys.argv[1])))
    if _request is not None:
        _main = types.ModuleType("__main__")
        sys.modules["__main__"] = _main
        exec(compile(_request["code"], "<string>", "exec"), vars(_main))
