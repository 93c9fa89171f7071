"""What the pipelines ask CUDA for: which device, its streams, events and memory.

The README says what of it has run on a GPU, under "What has run where".
"""

import logging
import os
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError
from nemo_dali.kernels.device import on as on

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("nemo_dali")

COPIED_AT_A_TIME = 2**26  # bytes
LOCKED_AT_A_TIME = 2**36  # bytes; some drivers refuse 2**39 at once
PORTABLE, MAPPED = 1, 2  # flags of cudaHostRegister: for all devices, and in their address space
DOCTOR = "'nemo-dali doctor' says what is missing."


def cuda_device(device: Any) -> int | None:
    """The number of a CUDA device given as torch takes it ("cuda", "cuda:1", a torch.device); None for the CPU.

    Raises:
        ValueError: neither the CPU nor a CUDA device.
        NemoError: torch sees no such device, or CuPy is missing.
    """
    match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", str(device))
    if match is None:
        raise ValueError(f"device ({device!r}) must be 'cpu', 'cuda' or 'cuda:N'")
    if match[1]:
        return None
    import torch

    if not torch.cuda.is_available():
        raise NemoError(f"torch sees no CUDA device, so device must be 'cpu'; {DOCTOR}")
    number = torch.cuda.current_device() if match[2] is None else int(match[2])
    if number >= torch.cuda.device_count():
        raise NemoError(f"There is no device cuda:{number}: torch sees {torch.cuda.device_count()}, counted from 0.")
    try:
        import cupy  # noqa: F401  # whether the launchers will find it
    except ImportError as error:
        raise NemoError(
            f"device='cuda' needs CuPy, which cannot be imported ({error}). Install it with "
            "pip install 'nemo-dali[cuda12]', or 'nemo-dali[cuda13]' where torch is built for CUDA 13."
        ) from error
    rank = os.environ.get("LOCAL_RANK", "")
    if match[2] is None and rank.isdecimal() and number != int(rank) < torch.cuda.device_count():
        _warn_of_rank(number, int(rank))
    return number


@cache  # once is enough
def _warn_of_rank(number: int, local_rank: int) -> None:
    """Ranks that choose no GPU all use the first one: they run out of memory, or at a fraction of the speed."""
    logger.warning(
        "device='cuda' is GPU %d, torch's current one, where LOCAL_RANK is %d: ranks may share that GPU. Call "
        "torch.cuda.set_device(local_rank) before, or give device='cuda:%d'.",
        number,
        local_rank,
        local_rank,
    )


def default_device() -> str:
    """ "cuda" where there is a GPU that can be used, else "cpu"."""
    try:
        cuda_device("cuda")
    except NemoError:
        return "cpu"
    return "cuda"


def place(number: int) -> "torch.device":
    """A device's name for torch."""
    import torch

    return torch.device("cuda", number)


def current_stream(number: int) -> "torch.cuda.Stream":
    """The stream that torch works on now."""
    import torch

    return torch.cuda.current_stream(number)


def side_stream(number: int) -> "torch.cuda.Stream":
    """A stream whose work runs alongside the current one's."""
    import torch

    return torch.cuda.Stream(place(number))


def event() -> "torch.cuda.Event":
    """An event that may be recorded repeatedly; until it is first recorded, ``query`` says that all is done."""
    import torch

    return torch.cuda.Event()


def memory_for(nbytes: int, number: int, stream: int) -> "torch.Tensor":
    """uint8 [nbytes] on a device for work on a stream, given by its address; torch reuses it only for such work."""
    import torch

    from nemo_dali.kernels.device import torch_stream

    with torch.cuda.stream(torch_stream(number, stream)):
        return torch.empty(nbytes, dtype=torch.uint8, device=place(number))


_parents: list[Any] = []


def leave_to_parent(*owners: Any) -> None:
    """Keep what a fork has inherited until the process ends: releasing it would call CUDA, which no longer works."""
    _parents.extend(owners)


def synchronize(number: int) -> None:
    """Wait until a device has nothing left to do."""
    import torch

    torch.cuda.synchronize(number)


def send(array: npt.NDArray[Any], number: int) -> "torch.Tensor":
    """A copy of a small array on a device, in the order of torch's current stream; the host does not wait for it."""
    import torch

    return torch.from_numpy(array).pin_memory().to(place(number), non_blocking=True)


def free_memory(number: int) -> int:
    """Bytes of GPU memory that nobody uses, including torch's own reserve."""
    import torch

    spare = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    return int(torch.cuda.mem_get_info(number)[0]) + spare


def copy_of(array: npt.NDArray[np.uint8], number: int) -> "torch.Tensor":
    """A copy on a device, through a small page-locked buffer; it is complete when this returns.

    Raises:
        NemoError: the GPU has no memory left.
    """
    return copy_of_pieces([array], array.nbytes, number).view(array.shape)


def copy_of_pieces(pieces: Iterable[npt.NDArray[np.uint8]], nbytes: int, number: int) -> "torch.Tensor":
    """Arrays of ``nbytes`` in all, one after the other on a device: uint8 [nbytes]; as ``copy_of``."""
    import torch

    try:
        copy = torch.empty(nbytes, dtype=torch.uint8, device=place(number))
    except torch.OutOfMemoryError as error:
        raise NemoError(
            f"GPU {number} has no room for {nbytes / 1e9:.1f} GB more. Lower batch_size, prefetch or device_budget."
        ) from error
    buffer = page_locked(min(COPIED_AT_A_TIME, nbytes))
    at = 0
    for piece in pieces:
        flat = piece.reshape(-1)
        for begin in range(0, flat.size, COPIED_AT_A_TIME):
            part = flat[begin : begin + COPIED_AT_A_TIME]
            buffer[: part.size].numpy()[:] = part
            copy[at : at + part.size].copy_(buffer[: part.size])
            at += part.size
    return copy


def page_locked(nbytes: int) -> "torch.Tensor":
    """uint8 [nbytes] in host memory that a GPU writes without the host waiting for it."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _pieces(memory: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    return [memory[begin : begin + LOCKED_AT_A_TIME] for begin in range(0, memory.size, LOCKED_AT_A_TIME)]


def lock_pages(memory: npt.NDArray[np.uint8], number: int) -> int:
    """Keep memory from being moved or swapped out, so that all GPUs can read it; returns its address on this one.

    Args:
        memory: uint8 [bytes], page-aligned.

    Raises:
        NemoError: the system does not allow it.
    """
    from cupy.cuda import Device, runtime

    locked, shifts = [], set()
    with Device(number):
        try:
            for piece in _pieces(memory):
                runtime.hostRegister(piece.ctypes.data, piece.nbytes, PORTABLE | MAPPED)
                locked.append(piece)
                there = int(runtime.pointerGetAttributes(piece.ctypes.data).devicePointer)
                shifts.add(there - piece.ctypes.data)
            if len(shifts) != 1:
                raise NemoError(f"GPU {number} does not see page-locked memory in one piece. Use placement='device'.")
        except (runtime.CUDARuntimeError, NemoError) as error:
            for piece in locked:
                runtime.hostUnregister(piece.ctypes.data)
            if isinstance(error, NemoError):
                raise
            raise NemoError(
                f"{memory.nbytes / 1e9:.1f} GB of memory cannot be page-locked ({error}). Hold more in GPU memory "
                "(placement='device'), or use device='cpu' with placement='host'."
            ) from error
    return memory.ctypes.data + shifts.pop()


def unlock_pages(memory: npt.NDArray[np.uint8], number: int) -> None:
    """Undo ``lock_pages``."""
    from cupy.cuda import Device, runtime

    with Device(number):
        for piece in _pieces(memory):
            runtime.hostUnregister(piece.ctypes.data)


def check_photo_sizes(width: npt.NDArray[np.int32], height: npt.NDArray[np.int32]) -> None:
    """Refuse photos, int32 [photos] in pixels, that the mosaic kernel cannot take.

    Raises:
        NemoError: one is too large.
    """
    from nemo_dali.kernels.mosaic.gpu import LARGEST_PHOTO

    if (largest := max(width.max(), height.max())) > LARGEST_PHOTO:
        raise NemoError(
            f"A photo is {largest} pixels wide or high; on a GPU {LARGEST_PHOTO} are the most. Make it smaller before "
            "'nemo-dali index', or use the CPU (device='cpu', --device cpu)."
        )


def hardware_share(num_threads: int) -> float:
    """Share of the JPEGs that the hardware decoder should take where a GPU has one; the threads take the rest.

    NVIDIA's own decoder test gives the hardware 0.12 alongside 70 threads on a Hopper (DALI, qa/TL1_decoder_perf), so
    it does as much as 9.5 threads. Without a hardware decoder DALI ignores the number.
    """
    return 1 / (1 + num_threads / 9.5)
