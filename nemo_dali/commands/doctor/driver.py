"""NVIDIA's driver and the GPUs, queried through the driver's own C libraries: works with torch or CuPy broken."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """A GPU that CUDA shows to this process."""

    name: str
    compute_capability: tuple[int, int]
    memory: int  # bytes


@dataclass(frozen=True)
class Driver:
    """An installed driver."""

    version: str | None = None  # None: there is no NVML to ask
    cuda: str | None = None  # the newest CUDA that it supports
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None  # why CUDA does not start


def read_driver() -> Driver | None:
    """What libcuda and NVML say; None where there is neither a driver nor a GPU's device file."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Driver(error=str(error)) if any(Path("/dev").glob("nvidia[0-9]*")) else None
    version, number = _driver_version(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    supported = cuda_version(number.value)
    if status := cuda.cuInit(0):
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(name))
        error_name = (name.value or b"unknown error").decode()
        return Driver(version, supported, error=None if status == NO_DEVICE else f"{error_name} ({status})")
    cuda.cuDeviceGetCount(ctypes.byref(number))
    return Driver(version, supported, tuple(_gpu(cuda, ordinal) for ordinal in range(number.value)))


def cuda_version(number: int) -> str:
    """A version as CUDA's interfaces write it: 12080 is "12.8"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    device, value, name, memory = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in COMPUTE_CAPABILITY:
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(), (capability[0], capability[1]), memory.value)


def _driver_version() -> str | None:
    version = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
        return None
    return version.value.decode()
