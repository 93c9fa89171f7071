"""uint8 to the frame's own numbers: ``(value / 255 - mean) / std``, to torch's own bit; for the CPU.

The table ``reference.normalisation_table`` says what each of the 256 values becomes. To look them up one by one takes
two loads a value; to compute them takes a third of that, because a vector register computes sixteen at a time. The
quotients are those of divisions, by a rounded reciprocal and one correction with an exact remainder (Markstein 1990).
A number of 16 bits mostly comes out the same of one multiplication and addition, a third of the work. ``recipe_of``
compares all results with the table before anything is computed: what differs is looked up.

``normalise`` writes a row as an array. ``stream_normalised`` writes whole cache lines past the cache, straight from the
vector registers, which is as fast as filling the same memory (benchmarks/NOTES.md).
"""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from nemo_dali._choices import DType
from nemo_dali.kernels.arrays import U8, Bits, Int
from nemo_dali.kernels.jit import intrinsic, jit
from nemo_dali.kernels.stores import LINE, as_pointer, keep, store_line, store_past_cache, uncounted

LOOK_UP, FLOAT32, FLOAT16, BFLOAT16, COPY, FUSED_FLOAT16, FUSED_BFLOAT16 = range(7)
FUSED = {FLOAT16: FUSED_FLOAT16, BFLOAT16: FUSED_BFLOAT16}  # the same by one multiplication and addition
BITS = {FLOAT32: types.uint32, COPY: types.uint8} | dict.fromkeys([*FUSED, *FUSED.values()], types.uint16)
KINDS: dict[str, int] = dict(zip(get_args(DType), (FLOAT32, FLOAT16, COPY, BFLOAT16), strict=True))

RECIPE = np.dtype(
    [
        # Of each channel mean, std and one over it; of a fused kind what is multiplied by, and what is added.
        ("numbers", "f4", (3, 3)),
        ("kind", "i4"),  # LOOK_UP, or what is computed
    ]
)
Recipe = npt.NDArray[np.void]  # of dtype RECIPE, [1]

_F32 = ir.FloatType()


def _same(builder: Any, value: Any, like: Any) -> Any:
    """A number as it is, or as a vector of as many as ``like`` has."""
    if not isinstance(like, ir.VectorType):
        return value
    undefined, index = ir.Constant(ir.VectorType(value.type, like.count), ir.Undefined), ir.IntType(32)
    first = builder.insert_element(undefined, value, ir.Constant(index, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, like.count), [0] * like.count))


def _like(kind: Any, element: Any) -> Any:
    """A type of other elements, as many as ``kind`` has."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    kind = a.type
    name = f"llvm.fma.v{kind.count}f32" if isinstance(kind, ir.VectorType) else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [a, b, c])


def _divide(builder: Any, value: Any, by: Any, one_over: Any) -> Any:
    quotient = builder.fmul(value, one_over)
    return _fma(builder, _fma(builder, builder.fneg(quotient), by, value), one_over, quotient)


def _normalised(builder: Any, pixels: Any, kind: int, numbers: Sequence[Any]) -> Any:
    """The bits of normalised uint8 ``pixels``, a number or a vector, as unsigned integers.

    ``numbers`` are a channel's of a recipe.
    """
    if kind == COPY:
        return pixels
    value = builder.uitofp(pixels, _like(pixels.type, _F32))
    first, second, third = (_same(builder, number, value.type) for number in numbers)
    if kind in FUSED.values():
        value = _fma(builder, value, first, second)
    else:
        constants = (ir.Constant(_F32, float(x)) for x in (255, np.float32(1) / np.float32(255)))
        whole = _divide(builder, value, *(_same(builder, constant, value.type) for constant in constants))
        value = _divide(builder, builder.fsub(whole, first), second, third)
    word, half = _like(value.type, ir.IntType(32)), _like(value.type, ir.IntType(16))
    if kind in (FLOAT16, FUSED_FLOAT16):
        return builder.bitcast(builder.fptrunc(value, _like(value.type, ir.HalfType())), half)
    bits = builder.bitcast(value, word)
    if kind == FLOAT32:
        return bits
    one, most, shift = (_same(builder, ir.Constant(ir.IntType(32), x), word) for x in (1, 0x7FFF, 16))
    odd = builder.and_(builder.lshr(bits, shift), one)  # a tie goes to the even one
    return builder.trunc(builder.lshr(builder.add(builder.add(bits, most), odd), shift), half)


def _value_of(kind: int) -> Any:
    """Compiled: the bits of one normalised pixel."""

    @intrinsic
    def value(typing_context: Any, pixel: Any, a: Any, b: Any, c: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _normalised(builder, arguments[0], kind, arguments[1:])

        return BITS[kind](types.uint8, *[types.float32] * 3), codegen

    return value


def _line_of(kind: int) -> Any:
    """Compiled: normalise uint8 pixels from address ``source`` on, as many as fill a cache line, and store that at
    address ``target``, a multiple of ``LINE``, past the cache.
    """

    @intrinsic
    def line(typing_context: Any, target: Any, source: Any, a: Any, b: Any, c: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, source, *numbers = arguments
            pixels = ir.VectorType(ir.IntType(8), int(LINE) * 8 // BITS[kind].bitwidth)
            loaded = builder.load(builder.inttoptr(source, pixels.as_pointer()), align=1)
            store_past_cache(builder, _normalised(builder, loaded, kind, numbers), target)
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 2, *[types.float32] * 3), codegen

    return line


_float32, _float16, _bfloat16 = _value_of(FLOAT32), _value_of(FLOAT16), _value_of(BFLOAT16)
_fused_float16, _fused_bfloat16 = _value_of(FUSED_FLOAT16), _value_of(FUSED_BFLOAT16)
_float32_line, _float16_line, _bfloat16_line = _line_of(FLOAT32), _line_of(FLOAT16), _line_of(BFLOAT16)
_fused_float16_line, _fused_bfloat16_line = _line_of(FUSED_FLOAT16), _line_of(FUSED_BFLOAT16)
_copied_line = _line_of(COPY)


@jit()
def normalise(pixels: U8, channel: int, table: Bits, recipe: Recipe, out: Bits) -> None:
    """Write a row of one channel.

    Args:
        pixels: uint8 [w].
        channel: 0, 1 or 2.
        table: [3, 256], what each value becomes.
        recipe: dtype ``RECIPE`` [1].
        out: [w], of the table's dtype.
    """
    kind, numbers = recipe[0].kind, recipe[0].numbers
    a, b, c = numbers[channel, 0], numbers[channel, 1], numbers[channel, 2]
    if kind == FLOAT32:
        for x in range(out.size):
            out[x] = _float32(pixels[x], a, b, c)
    elif kind == FLOAT16:
        for x in range(out.size):
            out[x] = _float16(pixels[x], a, b, c)
    elif kind == BFLOAT16:
        for x in range(out.size):
            out[x] = _bfloat16(pixels[x], a, b, c)
    elif kind == FUSED_FLOAT16:
        for x in range(out.size):
            out[x] = _fused_float16(pixels[x], a, b, c)
    elif kind == FUSED_BFLOAT16:
        for x in range(out.size):
            out[x] = _fused_bfloat16(pixels[x], a, b, c)
    elif kind == COPY:
        for x in range(out.size):
            out[x] = pixels[x]
    else:
        for x in range(out.size):
            out[x] = table[channel, pixels[x]]


@jit()
def stream_normalised(pixels: U8, channel: int, table: Bits, recipe: Recipe, target: np.uint64) -> Int:
    """Write pixels of one channel to an address, past the cache, as far as they fill whole cache lines.

    Where the first pixels belong into a line that begins before ``target``, these are written the ordinary way.

    Args:
        pixels: uint8 [n], best of ``stores.uncounted``.
        channel, table, recipe: as in ``normalise``.
        target: a multiple of the table's item size.

    Returns:
        How many pixels were written. The rest, fewer than fill a line, are the caller's to write, with what follows.
        ``stores.fence`` comes before anybody else reads any of it.
    """
    count, head = np.uint64(pixels.size), np.uint64(0)
    if target % LINE:
        head = min((np.uint64(0) - target) % LINE // np.uint64(table.itemsize), count)
        normalise(pixels[:head], channel, table, recipe, carray(as_pointer(target), head, table.dtype))
        target += head * np.uint64(table.itemsize)
    source, of_line = np.uint64(pixels.ctypes.data) + head, LINE // np.uint64(table.itemsize)  # pixels of a line
    lines = (count - head) // of_line
    kind, numbers = recipe[0].kind, recipe[0].numbers
    a, b, c = numbers[channel, 0], numbers[channel, 1], numbers[channel, 2]
    if kind == FLOAT32:
        for k in range(lines):
            _float32_line(target + k * LINE, source + k * of_line, a, b, c)
    elif kind == FLOAT16:
        for k in range(lines):
            _float16_line(target + k * LINE, source + k * of_line, a, b, c)
    elif kind == BFLOAT16:
        for k in range(lines):
            _bfloat16_line(target + k * LINE, source + k * of_line, a, b, c)
    elif kind == FUSED_FLOAT16:
        for k in range(lines):
            _fused_float16_line(target + k * LINE, source + k * of_line, a, b, c)
    elif kind == FUSED_BFLOAT16:
        for k in range(lines):
            _fused_bfloat16_line(target + k * LINE, source + k * of_line, a, b, c)
    elif kind == COPY:
        for k in range(lines):
            _copied_line(target + k * LINE, source + k * of_line, a, b, c)
    else:
        looked_up = np.empty(of_line, table.dtype)
        values = uncounted(looked_up)
        for k in range(lines):
            begin = head + k * of_line
            normalise(pixels[begin : begin + of_line], channel, table, recipe, values)
            store_line(target + k * LINE, np.uint64(values.ctypes.data))
        keep(looked_up)
    return head + lines * of_line


def recipe_of(table: npt.NDArray[np.generic], mean: Sequence[float], std: Sequence[float], dtype: str) -> Recipe:
    """How to compute a table of ``reference.normalisation_table``: dtype ``RECIPE`` [1]."""
    recipe, kind = np.zeros(1, RECIPE), KINDS[dtype]
    rounded = np.array([mean, std], np.float32)  # as torch has them
    with np.errstate(all="ignore"):
        if kind in FUSED:
            scale, offset = 1 / (255 * rounded[1].astype(np.float64)), -rounded[0].astype(np.float64) / rounded[1]
            recipe["numbers"][0, :, :2], recipe["kind"] = np.stack([scale, offset], axis=1), FUSED[kind]
            if _gives(recipe, table):
                return recipe
        recipe["numbers"] = np.stack([*rounded, np.float32(1) / rounded[1]], axis=1)
    recipe["kind"] = kind
    if not _gives(recipe, table):
        recipe["kind"] = LOOK_UP
    return recipe


def _gives(recipe: Recipe, table: npt.NDArray[np.generic]) -> bool:
    """Whether a recipe makes the table's numbers, one by one and in lines."""
    bits, values = table.view(f"u{table.itemsize}"), np.arange(256, dtype=np.uint8)
    for channel, expected in enumerate(bits):
        alone, lines = np.empty_like(expected), np.empty_like(expected)
        normalise(values, channel, bits, recipe, alone)
        done = stream_normalised(values, channel, bits, recipe, np.uint64(lines.ctypes.data))
        if not (np.array_equal(alone, expected) and np.array_equal(lines[:done], expected[:done])):
            return False
    return True
