"""No more files or memory for a process in mid-pass: one sentence, and nothing is lost when there are again."""

import json

import pytest

from tests.helpers import fork_server

pytestmark = pytest.mark.process

PROGRAM = """
import contextlib, json, logging, os, resource, sys, torch
from nemo_dali import Loader, MosaicPolicy, NemoError
dataset, negatives, limit, left, size = sys.argv[1:]
logging.disable()
options = {"batch_size": 4, "size": int(size), "context_length": 16, "num_threads": 2, "prefetch": 1, "dtype": "uint8"}
loader = Loader(dataset, negatives, policy=MosaicPolicy(p_mined=1), **options)
expected = [batch.image for batch in loader]
loader.set_epoch(0)
passes = iter(loader)
batches, held, said = [next(passes).image], [], ""
limit = getattr(resource, limit)
soft, hard = resource.getrlimit(limit)
if limit == resource.RLIMIT_NOFILE:
    resource.setrlimit(limit, (400, hard))
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    for _ in range(int(left)):
        os.close(held.pop())
else:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(limit, (used + int(left), hard))
try:
    for batch in passes:
        batches.append(batch.image)
except NemoError as error:
    said = str(error)
resource.setrlimit(limit, (soft, hard))
for descriptor in held:
    os.close(descriptor)
loader.load_state_dict(loader.state_dict())
batches += [batch.image for batch in loader]
same = len(batches) == len(expected) and all(map(torch.equal, batches, expected))
print(json.dumps([said, same]))
"""


@pytest.mark.parametrize(
    ("limit", "left", "size", "words"),
    [
        ("RLIMIT_NOFILE", 2, 32, "Too many files are open at once. Raise the limit (ulimit -n)."),
        ("RLIMIT_NOFILE", 8, 32, "Too many files are open at once. Raise the limit (ulimit -n)."),
        ("RLIMIT_AS", 10**6, 2000, "This process's memory has no room for another batch of 61 MiB. Lower batch"),
    ],
)
def test_a_limit_reached_in_mid_pass_is_told_and_nothing_is_lost(files, limit, left, size, words):
    done = fork_server.run(PROGRAM, files.dataset, files.negatives, limit, left, size)
    assert done.returncode == 0, done.stderr[-3000:]
    said, same = json.loads(done.stdout)
    assert said.startswith(words) and same
