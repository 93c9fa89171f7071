"""Tiles in page-locked and in GPU memory; without a GPU the host plays its part."""

import gc
import json
import mmap
import os
import socket

import numpy as np
import pytest
import torch

from nemo_dali import MosaicPolicy, NemoError, cuda, node_memory
from nemo_dali.dataset import Dataset
from nemo_dali.node_memory import node_copy
from nemo_dali.sharding import exchange
from nemo_dali.tiling import make_tiles
from tests.kernels.cuda_host import needs_compiler
from tests.test_resident import SIZE, loader

GPU = {"device": "cuda", "dtype": "float32"}
PLACES = [
    {"placement": "pinned"},
    {"placement": "device"},
    {"placement": "device", "device_budget": 0},
    {"placement": "device", "device_budget": 400_000},
]


@pytest.fixture(scope="module")
def path(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "all.tiles.h5"
    make_tiles(files.dataset, size=SIZE, output=path, grids=(1, 2, 3))
    return path


def assert_same_pass(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.image.cpu(), other.image) and torch.equal(one.mask.cpu(), other.mask)
        assert one.plan.tobytes() == other.plan.tobytes()


@needs_compiler
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_place_gives_the_stream_paths_batches(files, path, played, place, dtype):
    resident, stream = loader(files, tiles=path, device="cuda", dtype=dtype, **place), loader(files, dtype=dtype)
    assert resident.mode == place["placement"]
    for _ in range(2):
        assert_same_pass(resident, stream)


@needs_compiler
def test_the_budget_holds_what_is_read_most_often(files, path, played):
    """A sample reads two tiles of 2x2 and half a frame here, so the frames come last, as many as fit whole."""
    policy = MosaicPolicy(p_mined=0.5, grids={2: 1.0, 3: 0.0})
    photos, frame = len(Dataset.open(files.dataset).images.id), 3 * SIZE**2
    quarters = photos * 3 * SIZE**2  # four sizes of cells, as SIZE is odd
    for budget, on_device in ((quarters, quarters), (quarters + 5 * frame // 2, quarters + 2 * frame), (frame, None)):
        placed = loader(files, tiles=path, policy=policy, placement="device", device_budget=budget, **GPU)._resident
        assert placed.device_bytes + placed.pinned_bytes == quarters + photos * frame
        assert placed.device_bytes == on_device or (on_device is None and 0 < placed.device_bytes <= budget)
    shown_whole = MosaicPolicy(p_mined=0.1, grids={2: 1.0})  # then frames are read more often
    options = {"tiles": path, "policy": shown_whole, "placement": "device", **GPU}
    assert loader(files, device_budget=photos * frame, **options)._resident.device_bytes == photos * frame


@needs_compiler
def test_what_a_loader_held_is_let_go_with_it(files, path, played):
    kept = loader(files, tiles=path, placement="pinned", **GPU)
    other = loader(files, tiles=path, placement="pinned", **GPU)
    next(iter(other))
    assert len(played) == 2
    del other
    gc.collect()
    assert len(played) == 1
    assert next(iter(kept)).image.shape == (4, 3, SIZE, SIZE)


@needs_compiler
def test_too_little_memory_is_told_with_the_remedy(files, path, played, monkeypatch):
    monkeypatch.setattr(cuda, "free_memory", lambda number: 1000)
    with pytest.raises(NemoError, match=r"GPU 0 has 0\.0 GB free.*device_budget.*placement='pinned'"):
        loader(files, tiles=path, placement="device", **GPU)
    assert_same_pass(loader(files, tiles=path, placement="device", device_budget=1000, **GPU), loader(files))
    monkeypatch.setattr(node_memory, "available_memory", lambda: 1000)
    with pytest.raises(NemoError, match=r"page-locked memory, and 0\.0 GB are free.*placement='host'"):
        loader(files, tiles=path, placement="pinned", **GPU)


@needs_compiler
@pytest.mark.usefixtures("played")
def test_options_that_do_not_fit_each_other_are_refused(files, path):
    for options, message in (
        ({"tiles": path, "device": "cuda"}, r"placement \('host'\) must be 'host' for device='cpu', and 'pinned'"),
        ({"tiles": path, "placement": "device"}, r"placement \('device'\) must be 'host' for device='cpu'"),
        ({"placement": "pinned", "device": "cuda"}, r"placement \('pinned'\) must be left out without tiles"),
        ({"tiles": path, "device_budget": 1}, r"device_budget \(1\) must be left out unless placement is 'device'"),
        ({"tiles": path, "placement": "shared"}, r"placement \('shared'\) must be one of"),
        (
            {"tiles": path, "device": "cuda", "placement": "device", "device_budget": -1},
            r"device_budget \(-1\) must be >= 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            loader(files, **options)


def test_a_copy_is_equal_aligned_and_leaves_no_descriptor():
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, shape, dtype=np.uint8) for shape in ((3, 3, 5, 7), (0, 3, 2, 2), (2, 3, 40, 41))]
    before = len(os.listdir("/proc/self/fd"))
    copy = node_copy(arrays, together=False)
    assert all(np.array_equal(one, other) for one, other in zip(copy.arrays, arrays, strict=True))
    assert all(one.ctypes.data % mmap.PAGESIZE == 0 for one in copy.arrays)
    del copy
    assert len(os.listdir("/proc/self/fd")) == before


def act(rank, port, folder):
    """One rank's part in a copy for two; its finding is written to a file."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    array = np.random.default_rng(1).integers(0, 256, (50, 3, 7, 9), dtype=np.uint8)
    node_memory.CHUNK = 1000  # so that each has pieces to copy
    copy = node_copy([array], together=True)
    right = bool((copy.arrays[0] == array).all())
    exchange(None)
    copy.arrays[0][rank, 0, 0, 0] = 100 + rank
    exchange(None)
    shared = copy.arrays[0][:2, 0, 0, 0].tolist() == [100, 101]
    node_memory.available_memory = lambda: 0  # asked by rank 0 alone
    told = ""
    try:
        node_copy([array], together=True)
    except NemoError as error:
        told = str(error)
    (folder / str(rank)).write_text(json.dumps([right, shared, told]))
    exchange(None)
    distributed.destroy_process_group()


def test_the_ranks_of_a_node_share_one_copy(tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    torch.multiprocessing.spawn(act, (port, tmp_path), nprocs=2)
    for rank in "01":
        right, shared, told = json.loads((tmp_path / rank).read_text())
        assert right and shared and "Use placement='host'" in told
