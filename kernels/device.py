"""What launching a kernel needs besides the kernel: small arrays on the device, and the stream.

torch owns the device memory, so that one allocator serves the whole process; CuPy launches.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

TO_DEVICE, ON_DEVICE = 1, 3  # cudaMemcpyKind: from the host, and within the device


def padded(size: Any) -> Any:
    """The next multiple of 16."""
    return (size + 15) // 16 * 16


class _Stream:
    """A stream's address as CuPy takes it: CUDA's stream protocol."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address  # the protocol's version


@contextmanager
def current(device: int, stream: int) -> Iterator[None]:
    """Make a device, by its number, and a CUDA stream, by its address, CuPy's current ones."""
    import cupy

    with cupy.cuda.Device(device), cupy_stream(stream):
        yield


def on(device: int) -> Any:
    """A context in which a device, by its number, is the current one of this thread."""
    import torch

    return torch.cuda.device(device)


# A few streams are used over and over, and these objects say no more than where they are.
@functools.lru_cache(maxsize=64)
def torch_stream(device: int, stream: int) -> Any:
    """A CUDA stream as torch's; for address 0 torch's default one, as torch would make up another of it."""
    import torch

    if stream == 0:
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(stream, torch.device("cuda", device))


@functools.lru_cache(maxsize=64)
def cupy_stream(stream: int) -> Any:
    """A CUDA stream as CuPy's."""
    import cupy

    return cupy.cuda.Stream.from_external(_Stream(stream))


def copy(to: int, source: int, nbytes: int, kind: int, *, stream: int) -> None:
    """Queue a copy between addresses; host memory must be page-locked and stay as it is until the copy is done."""
    from cupy.cuda import runtime

    runtime.memcpyAsync(to, source, nbytes, kind, stream)


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel to be launched, and the arrays that it reads, which are to be sent to the device first.

    Attributes:
        load: gives the kernel for a device, by its number.
        blocks, threads: of the grid and of a block, along up to three axes.
        arrays: in host memory; their addresses on the device are the kernel's first arguments.
        arguments: the others.
        shared_mem: bytes of dynamic shared memory for a block.
    """

    load: Callable[[int], Any]
    blocks: tuple[int, ...]
    threads: tuple[int, ...]
    arrays: Sequence[npt.NDArray[Any]]
    arguments: tuple[Any, ...] = ()
    shared_mem: int = 0

    def queue(self, addresses: Sequence[int], *, device: int, stream: int) -> None:
        """Queue it, the arrays being at these addresses; what is there must stay until ``stream`` has come past it."""
        kernel = self.load(device)
        arguments = (*addresses, *self.arguments)
        with on(device):
            # CuPy's own way to the current stream takes longer than the launch.
            kernel(self.blocks, self.threads, arguments, shared_mem=self.shared_mem, stream=cupy_stream(stream))

    def send_and_queue(self, *, device: int, stream: int) -> None:
        """Send the arrays, each launch its own, and queue it."""
        _owner, addresses = upload(self.arrays, device=device, stream=stream)
        self.queue(addresses, device=device, stream=stream)


@dataclass(frozen=True, eq=False)
class CopyOnDevice:
    """Arrays to be sent to the device that are to lie one behind the other from an address on; used as a ``Launch``."""

    arrays: Sequence[npt.NDArray[Any]]
    to: int

    def queue(self, addresses: Sequence[int], *, device: int, stream: int) -> None:
        """Queue it, the arrays being at these addresses."""
        to = self.to
        for array, address in zip(self.arrays, addresses, strict=True):
            copy(to, address, array.nbytes, ON_DEVICE, stream=stream)
            to += array.nbytes


def upload(arrays: Sequence[npt.NDArray[Any]], *, device: int, stream: int) -> tuple[Any, list[int]]:
    """Copy arrays to a device in one transfer that the host does not wait for.

    Args:
        device: CUDA device number.
        stream: CUDA stream's address.

    Returns:
        A torch tensor that owns the memory, to be held until the work that uses it has been queued on ``stream``; and
        the device address of each array, a multiple of 16.
    """
    import torch

    begins = np.cumsum([0, *(padded(array.nbytes) for array in arrays)]).tolist()
    # torch keeps page-locked blocks for further use, and gives one out again only after the copies out of it are done.
    packed = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=True)
    for array, begin in zip(arrays, begins, strict=False):
        packed[begin : begin + array.nbytes].numpy()[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    with torch.cuda.stream(torch_stream(device, stream)):
        sent = packed.to(f"cuda:{device}", non_blocking=True)
    return sent, [sent.data_ptr() + begin for begin in begins[:-1]]
