"""Names for the types of what kernels take and give, for readers and type checkers: Numba goes by the values."""

from typing import Any

import numpy as np
import numpy.typing as npt

Int = int | np.integer[Any]  # Numba takes either
Record = Any  # an element of a structured array: compiled code reads its fields as attributes

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.integer[Any]]
Bits = npt.NDArray[np.unsignedinteger[Any]]  # a frame's numbers of any type, as unsigned integers of their size
