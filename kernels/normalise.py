"""uint8 to the frame's own numbers: ``(value / 255 - mean) / std``, to torch's own bit; for the CPU.

The table ``reference.normalisation_table`` says what each of the 256 values becomes. To look them up one by one takes
two loads a value; to compute them takes a third of that, because a vector register computes sixteen at a time. The
quotients are those of divisions, by a rounded reciprocal and one correction with an exact remainder (Markstein 1990).
``recipe_of`` compares all results with the table before anything is computed: what differs is looked up.
"""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from nemo_dali._choices import DType
from nemo_dali.kernels.arrays import U8, Bits
from nemo_dali.kernels.jit import intrinsic, jit

LOOK_UP, FLOAT32, FLOAT16, BFLOAT16, COPY = 0, 1, 2, 3, 4
KINDS: dict[str, int] = dict(zip(get_args(DType), (FLOAT32, FLOAT16, COPY, BFLOAT16), strict=True))

RECIPE = np.dtype(
    [
        ("mean", "f4", 3),
        ("std", "f4", 3),
        ("per_std", "f4", 3),  # one over it
        ("kind", "i4"),  # LOOK_UP, or what is computed
    ]
)
Recipe = npt.NDArray[np.void]  # of dtype RECIPE, [1]

_compile = jit()
_f32, _u16, _u32 = np.float32, np.uint16, np.uint32


@intrinsic
def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, float32, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, uint32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _half_bits(typing_context: Any, value: Any) -> Any:
    """The bits, uint16, of a float32 rounded to float16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@jit(inline="always")
def _divide(value: np.float32, by: np.float32, one_over: np.float32) -> np.float32:
    quotient = value * one_over
    return _fma(_fma(-quotient, by, value), one_over, quotient)


@jit(inline="always")
def _normalised(value: np.uint8, mean: np.float32, std: np.float32, per_std: np.float32) -> np.float32:
    return _divide(_divide(_f32(value), _f32(255), _f32(1) / _f32(255)) - mean, std, per_std)


@jit(inline="always")
def _brain_bits(value: np.float32) -> np.uint32:
    bits = _bits(value)
    return (bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16)


@_compile
def normalise(pixels: U8, channel: int, table: Bits, recipe: Recipe, out: Bits) -> None:
    """Write a row of one channel.

    Args:
        pixels: uint8 [w].
        channel: 0, 1 or 2.
        table: [3, 256], what each value becomes.
        recipe: dtype ``RECIPE`` [1].
        out: [w], of the table's dtype.
    """
    kind, mean, std, per_std = (
        recipe[0].kind,
        recipe[0].mean[channel],
        recipe[0].std[channel],
        recipe[0].per_std[channel],
    )
    if kind == FLOAT32:
        for x in range(out.size):
            out[x] = _bits(_normalised(pixels[x], mean, std, per_std))
    elif kind == FLOAT16:
        for x in range(out.size):
            out[x] = _half_bits(_normalised(pixels[x], mean, std, per_std))
    elif kind == BFLOAT16:
        for x in range(out.size):
            out[x] = _brain_bits(_normalised(pixels[x], mean, std, per_std))
    elif kind == COPY:
        for x in range(out.size):
            out[x] = pixels[x]
    else:
        for x in range(out.size):
            out[x] = table[channel, pixels[x]]


def recipe_of(table: npt.NDArray[np.generic], mean: Sequence[float], std: Sequence[float], dtype: str) -> Recipe:
    """How to compute a table of ``reference.normalisation_table``: dtype ``RECIPE`` [1]."""
    recipe = np.zeros(1, RECIPE)
    with np.errstate(all="ignore"):
        recipe["mean"], recipe["std"] = mean, std
        recipe["per_std"] = np.float32(1) / recipe["std"]
    recipe["kind"] = KINDS[dtype]
    bits = table.view(f"u{table.itemsize}")
    values, computed = np.arange(256, dtype=np.uint8), np.empty_like(bits)
    for channel in range(3):
        normalise(values, channel, bits, recipe, computed[channel])
    if not np.array_equal(computed, bits):
        recipe["kind"] = LOOK_UP
    return recipe
