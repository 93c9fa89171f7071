"""What the CUDA kernels ask of a GPU, counted on a CPU: no GPU is needed, and no time is measured.

    python benchmarks/gpu_counts.py [--quick]

It runs the PTX of every kernel on the CPU (``tests/helpers/ptx``), where each issue of an instruction by a warp is
counted, and writes results/gpu_model.json. All figures are *counted, not measured*. A case has these figures, per
pixel of the output where the name says so:

* ``instructions_per_pixel``: thread instructions, 32 for each issue of a warp, including idle lanes; of machine code
  if ``nvdisasm`` is available (``counted_in``), else of PTX. ``ptx_instructions_per_pixel`` is always of PTX, and
  ``classes`` are its parts.
* ``sectors_per_byte``: 32-byte sectors that warps request from global memory, for each byte that must be moved; at best
  1/32, which ``traffic`` scales to 1. ``least_traffic`` counts a sector once, however often it is requested.
* ``wavefronts_per_pixel``: cycles of shared memory times 32 lanes; ``bank_conflicts``: their ratio to what they would
  be if no two lanes wanted the same bank.
* ``barriers``: that a block reaches. ``bytes_in_flight``: of asynchronous copies, that the blocks of a multiprocessor
  request before they wait.
* ``blocks``: that a multiprocessor holds at a time, limited by registers, shared memory and threads.
* ``issue_share``: for each GPU of that architecture, the share of its issue slots that the kernel takes at 85 % of the
  copy rate. Above 1 it cannot reach that rate, which is assumed, see COPY_SHARE and GPUS.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from common import RESULTS, ROOT, revision
from kernel_batches import PHOTO, Case, ellipse, least_bytes, masks_of, tiles_of

from nemo_dali.commands.bench import machine, versions
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.kernels.reference import normalisation_table
from nemo_dali.kernels.tile import CV2_LETTERBOX, RESAMPLE
from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD

sys.path.append(str(ROOT))
from tests.helpers.ptx import launches, machine_code
from tests.helpers.ptx.machine import Counted, run

ARCHITECTURES = ("80", "90")
DTYPES = ("float16", "float32", "uint8")
COPY_SHARE = 0.84  # of the memory's rate that a device-to-device copy is assumed to reach
AIM = 0.85  # of the copy rate
ALIGNMENT = 512  # bytes, of CUDA's and torch's allocators


class Gpu(NamedTuple):
    """Multiprocessors, GHz and GB/s of memory, from NVIDIA's data sheets; the clock is the boost clock."""

    architecture: str
    multiprocessors: int
    clock: float
    memory: float


GPUS = {
    "A100 SXM 80 GB": Gpu("80", 108, 1.41, 2039),
    "H100 SXM": Gpu("90", 132, 1.755, 3350),
    "H200 SXM": Gpu("90", 132, 1.755, 4800),
}
# Of a multiprocessor: bytes of shared memory, of which each block takes 1,024 more than it asks for; CUDA C++
# Programming Guide, compute capabilities. Both have 65,536 registers, 64 warps and 32 blocks.
SHARED = {"80": 164 * 1024, "90": 228 * 1024}
RESERVED, REGISTERS, WARPS, BLOCKS, SCHEDULERS = 1024, 65536, 64, 32, 4


@dataclass(frozen=True)
class Launched:
    """A launch: its kernel's PTX and name, threads and bytes of dynamic shared memory of a block, and what it did."""

    ptx: str
    name: str
    threads: int
    dynamic_shared: int
    counted: Counted


def mosaic(case: Case, architecture: str) -> Launched:
    """A batch of "mosaic" or of "gather"."""
    return _images(case, architecture, launches.mosaic, mosaic_gpu)


def gather(case: Case, architecture: str) -> Launched:
    return _images(case, architecture, launches.gather, gather_gpu)


def letterbox(case: Case, architecture: str) -> Launched:
    return _images(case, architecture, launches.letterbox, letterbox_gpu)


def aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy aligned as a GPU's allocator would align it."""
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    copy: npt.NDArray[Any] = memory[skip : skip + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def _images(case: Case, architecture: str, launch: Callable[..., Counted], module: Any) -> Launched:
    table = aligned(normalisation_table(IMAGENET_MEAN, IMAGENET_STD, case.dtype))
    frames = aligned(np.zeros((case.batch, 3, case.size, case.size), table.dtype))
    masks = aligned(np.zeros((case.batch, case.size, case.size), np.uint8))
    random = np.random.default_rng(0)
    photos = [aligned(random.integers(0, 256, (*PHOTO, 3), np.uint8)) for _ in range(case.batch * case.grid**2)]
    tiles = tiles_of(case, image=frames.ctypes.data, mask=masks.ctypes.data, table=table.ctypes.data)
    tiles["photo"] = [photo.ctypes.data for photo in photos]
    stage = 0
    if module is mosaic_gpu:
        stage = mosaic_gpu.blocks_of(tiles)[1]
        name = mosaic_gpu.kernel_name(int(tiles["resample"][0]), table.itemsize)
    else:
        name = module.kernel_name(table.itemsize)
    if module is letterbox_gpu:
        runs = ellipse(random)
        tiles["resample"], tiles["runs"], tiles["run_count"] = CV2_LETTERBOX, runs.ctypes.data, runs.size
    counted = launch(tiles, architecture)
    return Launched(launches.ptx_of(module.SOURCE, architecture), name, int(np.prod(module.THREADS)), stage, counted)


def mask(case: Case, architecture: str) -> Launched:
    """A batch of masks."""
    _, _, (targets, ends) = masks_of(case)
    ptx = launches.mask_ptx_of(case.dtype, architecture)
    targets, ends, output = map(aligned, (targets, ends, np.zeros((case.batch, case.size, case.size), case.dtype)))
    counted = run(
        launches.assembled(ptx)["write_masks"],
        mask_gpu.grid(case.batch, case.size, case.size),
        (mask_gpu.THREADS,),
        (targets.ctypes.data, ends.ctypes.data, output.ctypes.data, case.size, case.size, mask_gpu.BAND),
        readable=launches.memory_of(targets, ends),
        writable=launches.memory_of(output),
        dynamic_shared=mask_gpu.shared_bytes(),
    )
    return Launched(ptx, "write_masks", mask_gpu.THREADS, mask_gpu.shared_bytes(), counted)


LAUNCHES = {"mosaic": mosaic, "gather": gather, "letterbox": letterbox, "mask": mask}


def cases(*, quick: bool) -> list[Case]:
    """One sample of each kind; the counts per pixel do not depend on the number of samples."""
    dtypes, grids = (DTYPES[:1], (2,)) if quick else (DTYPES, (1, 2, 3))
    images = [Case("mosaic", grid, rule, dtype, 1) for rule in RESAMPLE for dtype in dtypes for grid in grids]
    gathers = [Case("gather", grid, None, dtype, 1) for dtype in dtypes for grid in grids]
    letterboxes = [Case("letterbox", 1, None, dtype, 1) for dtype in dtypes]
    return images + gathers + letterboxes + [Case("mask", grid, "cv2-linear", "uint8", 1) for grid in grids]


def needed(case: Case) -> int:
    """Bytes that a case moves at the very least; a letterbox reads all of the photo and writes the mask too."""
    if case.kernel == "letterbox":
        return 3 * PHOTO[0] * PHOTO[1] + case.size**2 * (3 * np.dtype(case.dtype).itemsize + 1)
    return least_bytes(case)


def classes_of(kernel: Any, counts: Any) -> Counter[str]:
    """Issues of PTX instructions by their class."""
    found: Counter[str] = Counter()
    for text, issues in zip(kernel.texts, counts["issues"].tolist(), strict=True):
        words = text.split(" ", 2)[1 if text.startswith("@") else 0].split(".")
        found[class_of(words)] += issues
    return found


def class_of(words: Sequence[str]) -> str:
    """The class of a PTX instruction, given its name's parts."""
    name = words[0]
    if name in ("ld", "st"):
        space = next((word for word in words if word in ("global", "shared", "param")), "generic")
        return f"{'loads' if name == 'ld' else 'stores'}, {space}"
    groups = {
        "asynchronous copies": ("cp",),
        "barriers": ("bar", "barrier"),
        "branches": ("bra", "ret", "exit"),
        "decisions": ("setp", "selp"),
        "moves": ("mov", "cvta", "cvt", "prmt", "shf", "shfl"),
    }
    for group, members in groups.items():
        if name in members:
            return group
    return "floats" if words[-1] in ("f32", "f64") else "whole numbers"


def occupancy(launched: Launched, resources: machine_code.Resources, architecture: str) -> int:
    """Blocks that a multiprocessor holds at a time."""
    warps = -(-launched.threads // 32)
    registers = -(-resources.registers * 32 // 256) * 256 * warps  # given to a warp in units of 256
    shared = resources.shared + launched.dynamic_shared + RESERVED
    return min(BLOCKS, WARPS // warps, REGISTERS // registers, SHARED[architecture] // shared)


def row(case: Case, architecture: str) -> dict[str, Any]:
    """A case's entry in the document."""
    launched = LAUNCHES[case.kernel](case, architecture)
    counts, pixels, least = launched.counted.counts, case.batch * case.size**2, needed(case)
    kernel = launches.assembled(launched.ptx)[launched.name]
    in_machine_code = machine_code.issues_of(kernel, counts, launched.ptx, architecture)
    classes = classes_of(kernel, counts)
    issues = sum((in_machine_code or classes).values())
    resources = machine_code.link(launched.ptx, architecture).resources[launched.name]
    blocks, totals = occupancy(launched, resources, architecture), launched.counted.totals
    sectors = int(counts["sectors"].sum())
    once = totals["sectors_read"] + totals["sectors_written"]

    def per_pixel(count: float) -> float:
        return round(32 * count / pixels, 2)

    return {
        "kernel": launched.name,
        "dtype": case.dtype,
        "arch": f"sm_{architecture}",
        "grid": case.grid,
        "size": case.size,
        "photo": list(PHOTO),
        "resample": case.resample,
        "instructions_per_pixel": per_pixel(issues),
        "counted_in": "PTX" if in_machine_code is None else "machine code",
        "ptx_instructions_per_pixel": per_pixel(sum(classes.values())),
        "classes": {name: per_pixel(count) for name, count in classes.most_common()},
        "bytes_needed_per_pixel": round(least / pixels, 2),
        "sectors_per_byte": round(sectors / least, 5),
        "traffic": round(32 * sectors / least, 3),
        "least_traffic": round(32 * once / least, 3),
        "wavefronts_per_pixel": per_pixel(int(counts["wavefronts"].sum())),
        "bank_conflicts": round(counts["wavefronts"].sum() / max(counts["fewest"].sum(), 1), 3),
        "barriers": round(totals["barriers"] / launched.counted.blocks, 2),
        "bytes_in_flight": totals["most_in_flight"] * blocks,
        "registers": resources.registers,
        "spills": resources.spills,
        "shared_bytes": resources.shared + launched.dynamic_shared,
        "threads": launched.threads,
        "blocks": blocks,
        "warps": blocks * -(-launched.threads // 32),
        "issue_share": {
            name: round(issue_share(issues / pixels, least / pixels, gpu), 3)
            for name, gpu in GPUS.items()
            if gpu.architecture == architecture
        },
    }


def issue_share(issues: float, size: float, gpu: Gpu) -> float:
    """Share of a GPU's issue slots at AIM of its copy rate, from warp instructions and bytes per pixel."""
    pixels = AIM * COPY_SHARE * gpu.memory / size  # 1e9 a second
    return issues * pixels / (gpu.multiprocessors * gpu.clock * SCHEDULERS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2x2 and float16 alone")
    parser.add_argument("--revision", help="where there is no git repository to ask")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_model.json")
    options = parser.parse_args(arguments)
    measured, rows = options.revision or revision(), []
    for case in cases(quick=options.quick):
        for architecture in ARCHITECTURES:
            rows.append(found := row(case, architecture))
            print(*(found[name] for name in SHOWN), *found["issue_share"].values(), flush=True)
    document = {
        "basis": "counted, not measured",
        "revision": measured,
        "machine": machine(),
        "versions": versions(),
        "assumed": {"copy_share": COPY_SHARE, "aim": AIM, "gpus": {name: gpu._asdict() for name, gpu in GPUS.items()}},
        "cases": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n")


SHOWN = ("kernel", "dtype", "arch", "grid", "instructions_per_pixel", "traffic", "bank_conflicts", "blocks")

if __name__ == "__main__":
    main()
