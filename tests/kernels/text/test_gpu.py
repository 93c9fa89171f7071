"""The text's CUDA source: on the CPU, also as PTX; compiled for every GPU; on a GPU."""

import ctypes

import numpy as np
import pytest

from nemo_dali.kernels.plan.masking import take_tokens
from nemo_dali.kernels.text import gpu as text_gpu
from tests.helpers.cuda_compile import ARCHITECTURES, ONE_FAST, check_report, report_of_run_time_compiler
from tests.helpers.cuda_host import TEXT_KERNELS, launch_text, needs_compiler
from tests.helpers.ptx import launches

CASES = [(np.uint16, 65535, 7), (np.int32, 65536, 7), (np.int32, -1, 3), (np.uint16, 49407, 77), (np.uint16, 5, 1)]


def sentences(largest, length):
    """Tokens and lengths of 50 sentences, and 30 rows of them, some more than once."""
    random = np.random.default_rng(length)
    tokens = random.integers(0, max(largest, 2), (50, length), dtype=np.int32)
    tokens[17, -1] = largest
    return tokens, random.integers(0, length + 1, 50, dtype=np.int32), random.integers(0, 50, 30, dtype=np.int32)


def expected(tokens, lengths, rows):
    taken = np.empty((2, len(rows), tokens.shape[1]), np.int64)
    take_tokens(tokens, lengths, rows, *taken)
    return taken


@needs_compiler
@pytest.mark.parametrize(("dtype", "largest", "length"), CASES)
def test_the_source_takes_what_the_cpu_takes(cuda_library, dtype, largest, length):
    tokens, lengths, rows = sentences(largest, length)
    assert text_gpu.table_dtype(tokens) == dtype
    table = text_gpu.table_rows(tokens, lengths, dtype)
    taken = np.full((2, len(rows), length), -7, np.int64)
    launch = text_gpu.launch_of(table.ctypes.data, table.itemsize, rows, taken.ctypes.data, length=length)
    assert launch.blocks == (-(-rows.size * length // 128),) and launch.arrays == (rows,)
    pointers = (rows.ctypes.data, *launch.arguments[:3])
    launch_text(cuda_library, launch.blocks, table.itemsize == 4, pointers, *map(int, launch.arguments[3:]))
    assert np.array_equal(taken, expected(tokens, lengths, rows))


@needs_compiler
@pytest.mark.parametrize("architecture", launches.ONE_FAST)
@pytest.mark.parametrize(("dtype", "largest", "length"), CASES)
def test_the_ptx_takes_what_the_cpu_takes(architecture, dtype, largest, length):
    tokens, lengths, rows = sentences(largest, length)
    table = text_gpu.table_rows(tokens, lengths, dtype)
    taken = np.full((2, len(rows), length), -7, np.int64)
    launch = text_gpu.launch_of(table.ctypes.data, table.itemsize, rows, taken.ctypes.data, length=length)
    launches.text(launch, table, taken, architecture)
    assert np.array_equal(taken, expected(tokens, lengths, rows))


@pytest.mark.parametrize("architecture", ONE_FAST)
def test_the_run_time_compiler_takes_it(architecture):
    assert architecture in ARCHITECTURES
    report = report_of_run_time_compiler(text_gpu.SOURCE, architecture)
    check_report(report, f"sm_{architecture}", TEXT_KERNELS, registers=32)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "largest", "length"), CASES)
def test_a_gpu_takes_what_the_cpu_takes(dtype, largest, length):
    import torch

    tokens, lengths, rows = sentences(largest, length)
    table = text_gpu.table_rows(tokens, lengths, dtype)
    there = torch.from_numpy(table.view(np.uint8)).cuda()
    taken = torch.full((2, len(rows), length), -7, device="cuda")
    launch = text_gpu.launch_of(there.data_ptr(), table.itemsize, rows, taken.data_ptr(), length=length)
    stream = torch.cuda.current_stream().cuda_stream
    launch.send_and_queue(device=torch.cuda.current_device(), stream=stream)
    assert np.array_equal(taken.cpu().numpy(), expected(tokens, lengths, rows))
    assert ctypes.sizeof(ctypes.c_longlong) == taken.element_size()
