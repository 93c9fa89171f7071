"""What launching a kernel needs besides the kernel: small arrays on the device, and the stream.

torch owns the device memory, so that one allocator serves the whole process; CuPy launches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt


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

    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_Stream(stream)):
        yield


def torch_stream(device: int, stream: int) -> Any:
    """A CUDA stream as torch's; for address 0 torch's default one, as torch would make up another of it."""
    import torch

    if stream == 0:
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(stream, torch.device("cuda", device))


def upload(arrays: list[npt.NDArray[Any]], *, device: int, stream: int) -> tuple[Any, list[int]]:
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
