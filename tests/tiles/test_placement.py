"""Tiles in page-locked and in GPU memory; without a GPU the host plays its part."""

import gc
import json
import mmap
import os
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_dali import ByEpoch, MosaicPolicy, NemoError
from nemo_dali.data.dataset import Dataset
from nemo_dali.distributed import node_memory
from nemo_dali.distributed import ranks as ranks_module
from nemo_dali.distributed.node_memory import node_copy
from nemo_dali.distributed.ranks import Ranks
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline import gpu
from nemo_dali.tiles.build import make_tiles
from nemo_dali.tiles.placement import ResidentTiles, _mosaic_share, _most_read_first
from tests.helpers import fork_server
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.lanes import lanes
from tests.helpers.resident import POLICY, SIZE, loader

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
@pytest.mark.parametrize("dtype", lanes(["float32", "bfloat16", "uint8"], fast=["bfloat16"]))
def test_every_place_gives_the_stream_paths_batches(files, path, played, place, dtype):
    resident, stream = loader(files, tiles=path, device="cuda", dtype=dtype, **place), loader(files, dtype=dtype)
    assert resident.mode == place["placement"]
    for _ in range(2):
        assert_same_pass(resident, stream)


@needs_compiler
@pytest.mark.usefixtures("played")
def test_the_budget_holds_what_is_read_most_often(files, path):
    """SIZE is odd, so a 2x2 has four sizes of cells: each is read as often as mosaics are shown, frames as singles."""
    photos, frame = len(Dataset.open(files.dataset).images.id), 3 * SIZE**2
    quarters = photos * frame
    for share, first, last in ((0.7, quarters, photos * frame), (0.3, photos * frame, quarters)):
        options = {"tiles": path, "policy": MosaicPolicy(p_mined=share), "placement": "device", **GPU}
        whole = loader(files, **options)._resident
        assert (whole.device_bytes, whole.pinned_bytes) == (first + last, 0)
        found = loader(files, device_budget=first, **options)._resident
        assert (found.device_bytes, found.pinned_bytes) == (first, last)
        side = np.full(photos, SIZE if share == 0.7 else SIZE // 2, np.int32)
        locked = found.addresses[found.find(side, side, np.arange(photos))]
        assert len(locked) == photos and len(set(np.diff(locked).tolist())) == 1
    part = loader(files, device_budget=photos * frame + 5 * frame // 2, **options)._resident
    largest = 3 * (SIZE // 2 + 1) ** 2  # the first of the other tiles, or those as small as any
    assert photos * frame < part.device_bytes <= photos * frame + 5 * frame // 2 < part.device_bytes + largest


@needs_compiler
def test_what_a_loader_held_is_let_go_with_it(files, path, played):
    kept = loader(files, tiles=path, placement="pinned", **GPU)
    other = loader(files, tiles=path, placement="pinned", **GPU)
    next(iter(other))
    assert len(played.locked) == 2
    del other
    gc.collect()
    assert len(played.locked) == 1
    assert next(iter(kept)).image.shape == (4, 3, SIZE, SIZE)


@needs_compiler
def test_too_little_memory_is_told_with_the_remedy(files, path, played, monkeypatch):
    monkeypatch.setattr(gpu, "free_memory", lambda number: 1000)
    with pytest.raises(NemoError, match=r"GPU 0 has 0\.0 GB free.*device_budget.*placement='pinned'"):
        loader(files, tiles=path, placement="device", **GPU)
    assert_same_pass(loader(files, tiles=path, placement="device", device_budget=0, **GPU), loader(files))
    monkeypatch.setattr(node_memory, "available_memory", lambda: 1000)
    with pytest.raises(NemoError, match=r"page-locked memory, and 0\.0 GB are free.*placement='device'"):
        loader(files, tiles=path, placement="pinned", **GPU)


@pytest.mark.parametrize(
    ("p_mined", "share"),
    [
        (0.7, 0.7),
        (ByEpoch({0: 0.0, 2: 0.8, 20: 0.8}), 0.74),  # to the last epoch that is named
        (ByEpoch({0: 0.0, 18: 0.8, 20: 0.8}), 0.1),
        (ByEpoch({0: 0.0, 20: 0.8}, "linear"), 0.4),
    ],
)
def test_what_is_read_most_often_is_that_over_all_epochs(p_mined, share):
    policy = MosaicPolicy(p_mined=p_mined)
    assert _mosaic_share(policy) == pytest.approx(share)
    first = _most_read_first(policy, 40, {1, 2})[0]
    assert first == ((20, 20) if 4 * share > 1 - share else (40, 40))


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


def act(rank, port, folder, files, path):
    """One rank's part in a copy for two; its finding is written to a file."""
    import torch.distributed as distributed

    def told(call):
        try:
            call()
        except NemoError as error:
            return str(error)
        return ""

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    array = np.random.default_rng(1).integers(0, 256, (50, 3, 7, 9), dtype=np.uint8)
    node_memory.CHUNK, node_memory.ROUND = 1000, 2  # so that each has five chunks to copy, in three rounds
    said = []
    share = ranks_module.Ranks.share
    ranks_module.Ranks.share = lambda self, fact: (said.append(fact), share(self, fact))[1]
    copy = node_copy([array], together=True)
    ranks_module.Ranks.share = share
    found = {"right": bool((copy.arrays[0] == array).all()), "rounds": said[2:]}
    Ranks.through_store().share(None)
    copy.arrays[0][rank, 0, 0, 0] = 100 + rank
    Ranks.through_store().share(None)
    found["shared"] = copy.arrays[0][:2, 0, 0, 0].tolist() == [100, 101]

    gpu.free_memory = lambda number: 10**9
    gpu.copy_of = lambda array, number: torch.from_numpy(array.copy())
    gpu.lock_pages, gpu.unlock_pages = lambda memory, number: memory.ctypes.data, lambda memory, number: None
    gpu.synchronize = lambda number: None

    def place(policy=POLICY, budget=None, placement="pinned"):
        corpus = Corpus([files.dataset], [], [])
        grids = policy.shown_grids
        options = {"size": SIZE, "resample": "cv2-linear", "policy": policy, "grids": grids, "placement": placement}
        return ResidentTiles([path], corpus.datasets, **options, device_id=0, device_budget=budget, together=True)

    tiles = place()
    address = int(tiles.addresses.min())
    (line,) = [line for line in open("/proc/self/maps") if line.startswith(f"{address:x}-")]
    found["one"] = len(set(Ranks.through_store().share(line.split()[4]))) == 1  # the inode
    gpu.free_memory = lambda number: 10**9 if rank else 0
    found["full"] = told(lambda: place(budget=100_000, placement="device"))
    gpu.free_memory = lambda number: 10**9
    node_memory.available_memory = lambda: 0  # asked by rank 0 alone
    found["no room"] = told(place)
    Ranks.through_store().share(None)
    ranks_module.PATIENCE = 1.0
    node_memory.available_memory = lambda: 10**12
    if rank:
        node_memory._copy = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with suppress(KeyboardInterrupt):
        found["ended"] = told(lambda: node_copy([array], together=True))
    (folder / str(rank)).write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def fork(*arguments):
    """Become two ranks."""
    torch.multiprocessing.start_processes(act, arguments, nprocs=2, start_method="fork")


@pytest.mark.process
def test_the_ranks_of_a_node_share_one_copy_and_hear_of_each_others_problems(tmp_path, files, path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    fork_server.call(fork, port, tmp_path, files, path)
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found["right"] and found["shared"] and found["one"] and found["rounds"] == [""] * 3
        assert "GPU 0 has 0.0 GB free" in found["full"] and "0.0 GB are free on this node" in found["no room"]
    assert json.loads((tmp_path / "0").read_text())["ended"].startswith("Rank 1 of 2 made no Loader within 1 s")


def test_memory_is_what_the_tightest_control_group_leaves(tmp_path, monkeypatch):
    groups = tmp_path / "job" / "step"
    groups.mkdir(parents=True)
    for folder, limit, used, cached in ((groups, "max", 5, 0), (groups.parent, 10_000, 7_000, 600)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 11\n")
    monkeypatch.setattr(node_memory, "CONTROL_GROUPS", tmp_path)
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self: "0::/job/step\n" if str(self) == "/proc/self/cgroup" else read(self)
    )
    assert node_memory.available_memory() == 10_000 - 7_000 + 611


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_on_a_gpu_every_place_gives_the_cpus_batches(files, path, place):
    """With tiles that the CPU decoded; a busy stream, a pass given up and a loader that is gone change nothing."""
    expected = list(loader(files, tiles=path))
    side = torch.cuda.Stream()
    for _ in range(2):
        resident = loader(files, tiles=path, **GPU, **place)
        with torch.cuda.stream(side):
            next(iter(resident))
            made = []
            for batch in resident:
                torch.cuda._sleep(20_000_000)
                made.append((batch.image.clone(), batch.mask.clone()))
        del resident, batch
        gc.collect()
        side.synchronize()
        assert len(made) == len(expected) > 0
        for (image, mask), other in zip(made, expected, strict=True):
            assert torch.equal(image.cpu(), other.image) and torch.equal(mask.cpu(), other.mask)
