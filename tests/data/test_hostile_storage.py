"""Object storage that means harm or is broken: an end in bounded time, with a photo's name, without credentials."""

import json

import pytest

from nemo_dali.data.s3 import check_names, scrubbed
from nemo_dali.errors import NemoError
from tests.helpers import fork_server
from tests.helpers.hostile_server import REMEMBERED, WAYS, HostileServer
from tests.helpers.lanes import lanes

pytestmark = pytest.mark.process

PROGRAM = """
import json, logging, resource, sys, time, traceback
from nemo_dali import Loader, MosaicPolicy, NemoError
from nemo_dali.data import s3
from nemo_dali.data.photos import find_problem
from nemo_dali.loader import _faults
from nemo_dali.pipeline import graphs

s3.LONGEST_READ, graphs.LONGEST_WAIT, graphs.LONGEST_DRAIN = 2, 4, 2
_faults.PAUSES = (0.1,)
logging.basicConfig(level=logging.DEBUG, format="%(message)s")
dataset, negatives, way = sys.argv[1:]
said, taken = {}, {}
for what in ("find_problem", "loader"):
    begin = time.monotonic()
    try:
        if what == "loader":
            options = {"size": 32, "policy": MosaicPolicy(p_mined=0), "context_length": 16, "num_threads": 2}
            list(Loader(dataset, negatives, batch_size=2, images=f"s3://{way}", **options))
        else:
            said[what] = find_problem(f"s3://{way}/a.jpg", 40, 30).sentence()
    except NemoError as error:
        said[what] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    taken[what] = time.monotonic() - begin
print(json.dumps([said, taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)
# Silence is given up by the SDK, some seconds later: not while the interpreter ends, where CPython would end the thread
# inside C++ and with it the process. Ours waits far longer than the SDK, but for this test.
time.sleep(10 if way == "hang" else 0)
sys.exit(3)
"""
NO_ANSWER = "The server does not answer (", "The server does not answer ("
UNUSABLE = "The server's answer cannot be used (", "The server's answer cannot be used ("
SAID = {  # by find_problem, and by the Loader
    "close": NO_ANSWER,
    "garbage": UNUSABLE,
    "hang": ("The server did not send it within 2 s", "Object storage did not send"),
    "loop": UNUSABLE,
    "huge": ("announces more bytes than fit in memory", "announces more bytes than fit in memory"),
    "short": UNUSABLE,
    "trickle": ("The server did not send it within 2 s", "Object storage did not send 2 photos of a batch within 4 s"),
    "echo": ("The server refuses to give it (", "The server refuses to give it ("),
}


@pytest.fixture(scope="module")
def server():
    return HostileServer()


@pytest.mark.parametrize("way", lanes(WAYS, fast=["trickle", "echo"]))
def test_an_end_in_bounded_time_with_a_name_and_without_credentials(server, files, way):
    done = fork_server.run(PROGRAM, files.dataset, files.negatives, way, env=server.environment())
    assert done.returncode == 3, done.stderr[-3000:]  # its own: no thread that waits keeps it or changes it
    assert REMEMBERED not in done.stdout + done.stderr
    said, taken, memory = json.loads(done.stdout)
    for what, words in zip(("find_problem", "loader"), SAID[way], strict=True):
        assert words in said[what] and f"s3://{way}/" in said[what], said
        assert taken[what] < 30, taken
    assert memory < 1500


@pytest.mark.parametrize("address", ["http://user:topsecret@host", "https://AKIAKEY@host:9000"])
def test_credentials_in_the_servers_address_are_refused_and_not_repeated(monkeypatch, address):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(NemoError, match="AWS_ENDPOINT_URL holds a user's name or password") as error:
        check_names("s3://bucket", ["a.jpg"])
    assert "topsecret" not in str(error.value) and "AKIAKEY" not in str(error.value)
    check_names("/local", ["a.jpg"])


def test_what_is_scrubbed(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a+token/")
    text = "Could not read http://user:password@host/a?X-Amz-Signature=abc&b with a+token/ in s3://bucket/a@b.jpg"
    assert scrubbed(text) == "Could not read http://…host/a?…&b with … in s3://bucket/a@b.jpg"


INTERRUPTED = """
import os, signal, sys, threading, time
from nemo_dali import Loader
from nemo_dali.pipeline import graphs

graphs.LONGEST_DRAIN = 2
loader = Loader(*sys.argv[1:], batch_size=2, images="s3://trickle", size=32, context_length=16, num_threads=2)
threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    next(iter(loader))
except KeyboardInterrupt:
    print(time.monotonic() - begin)
"""


def test_an_interrupt_ends_the_wait(server, files):
    done = fork_server.run(INTERRUPTED, files.dataset, files.negatives, env=server.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert 1 < float(done.stdout) < 10
