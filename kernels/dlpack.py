"""Addresses and shapes of the tensors in DLPack capsules, as DALI hands a batch to a Python function."""

import ctypes
from typing import Any

import numpy as np
from numba import carray

from nemo_dali.kernels.arrays import I64, U64
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.stores import as_pointer

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@jit(error_model="python")
def _read_tensors(heads: U64, data: U64, shapes: I64) -> None:
    """A head (DLPack's DLTensor) is six words: data, device, ndim and dtype, shape, strides, byte offset."""
    for i in range(heads.size):
        head = carray(as_pointer(heads[i]), 6, np.uint64)
        dimensions = carray(as_pointer(heads[i] + np.uint64(16)), 1, np.int32)[0]
        shape = carray(as_pointer(head[3]), dimensions, np.int64)
        data[i] = head[0] + head[5]
        shapes[i] = 0
        if dimensions == 3:
            for k in range(3):
                shapes[i, k] = shape[k]


def read_tensors(capsules: list[Any]) -> tuple[U64, I64]:
    """Addresses uint64 [n] and shapes int64 [n, 3] of contiguous tensors in DLPack capsules.

    The shape is 0 where a tensor has not three dimensions.
    """
    heads = np.array([_get_pointer(capsule, b"dltensor") for capsule in capsules], np.uint64)
    data, shapes = np.empty(len(heads), np.uint64), np.empty((len(heads), 3), np.int64)
    _read_tensors(heads, data, shapes)
    return data, shapes
