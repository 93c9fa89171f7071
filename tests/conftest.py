"""Data that several test files share: a small data set and a negative table with random similarities."""

import json
import os
import shutil

import pytest

from tests.helpers.browser import browser  # noqa: F401  # a fixture
from tests.helpers.clip import CLIP_CONFIG
from tests.helpers.cuda_host import library
from tests.helpers.files import make_files
from tests.helpers.played_gpu import played  # noqa: F401  # a fixture


def pytest_runtest_setup(item):
    """A test marked ``gpu`` is skipped without a CUDA device; where FAIL_WITHOUT_CUDA=1 that is a failure."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("FAIL_WITHOUT_CUDA") == "1" else pytest.skip)("needs a CUDA device")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """24 photos, 48 refs. Read-only: a test that changes a file makes its own with ``make_files``."""
    return make_files(tmp_path_factory.mktemp("shared"))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests neither read nor leave tokens in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_DALI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def cuda_library():
    """The CUDA source, built for the host; what needs it is skipped without g++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return library()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A tiny open_clip model with random weights: its config, its weights and the network itself."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**CLIP_CONFIG).eval()
    (folder / "tiny.json").write_text(json.dumps(CLIP_CONFIG))
    torch.save(network.state_dict(), folder / "tiny.pt")
    return folder, network
