"""The operators of ``fn`` on the CPU: the callbacks of ``kernels.callbacks`` in DALI's ``numba_function``.

    photos ─────────────────────────▶ callback ──▶ pixels ──▶ reshape ──▶ frame
    size, table, ... (a constant) ────▲   └─▶ verdict ──▶ check ──▲

The verdict is the frame's shape; where a sample could not be drawn it says why, and the check, in Python, raises.
"""

import functools
from collections.abc import Sequence
from ctypes import c_int32
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn as dali
from nvidia.dali import types
from nvidia.dali.data_node import DataNode

import nemo_dali.kernels.callbacks as callbacks
from nemo_dali.errors import NemoError
from nemo_dali.kernels.dlpack import read_tensors
from nemo_dali.kernels.normalise import Recipe, recipe_of
from nemo_dali.kernels.reference import normalisation_table
from nemo_dali.pipeline.operators import Compiled, no_collection

Normalisation = tuple[tuple[float, ...], tuple[float, ...], str]  # mean, std, dtype
Target = tuple[DataNode, DataNode, DataNode]  # CPU data: cell int32 [1], photo's shape int64 [2 or more], int64 runs
Input = tuple[DataNode, Any, int]  # data, its type, its dimensions

FAILURES = {
    callbacks.CHANNELS: "images[{0}] has {1} channels, but must be RGB, [H, W, 3]",
    callbacks.NO_PIXELS: "images[{0}] has no pixels",
    callbacks.CENTER_COUNT: "center must have two values, x and y",
    callbacks.CENTER_X: "center's x ({0}) must be from 0 to size",
    callbacks.CENTER_Y: "center's y ({0}) must be from 0 to size",
    callbacks.CELL_COUNT: "cell must have one value, not {0}",
    callbacks.CELL: "cell ({0}) must be from 0 to grid * grid - 1",
    callbacks.SHAPE: "shape must begin with the photo's height and width, each at least 1",
    callbacks.RUN_SUM: (
        "runs add up to {0} pixels, but must add up to the photo's, height times width of shape; pair each photo with "
        "its own mask"
    ),
    callbacks.NEGATIVE_RUN: "runs[{0}] is negative, but must be a length",
}


@dataclass(frozen=True, eq=False)
class Geometry:
    """How a frame is laid out.

    Attributes:
        size: height and width of the frame in pixels.
        grid: cells per side.
        center: x, y of the crossing of a 2x2; or DALI CPU data, int32 [2] a sample.
        resample: one of ``tile.RESAMPLE``'s values.
    """

    size: int
    grid: int
    center: DataNode | tuple[int, int]
    resample: int


def mosaic(
    images: list[DataNode], geometry: Geometry, *, normalisation: Normalisation, channels_last: bool
) -> DataNode:
    """See ``fn.mosaic``."""
    size, grid = geometry.size, geometry.grid
    table, recipe = normalising(*normalisation)
    dtype = types.to_dali_type(normalisation[2])
    shape = (size, size, 3) if channels_last else (3, size, size)
    at_once = 3 if grid == 3 else len(images)  # numba_function takes six inputs: nine photos are drawn row by row
    frame, verdicts = None, []
    for first in range(0, len(images), at_once):
        record = _frame(
            geometry,
            first_cell=first,
            table=table.ctypes.data,
            recipe=recipe.ctypes.data,
            itemsize=table.itemsize,
            channels_last=channels_last,
        )
        inputs = [record, *((image, types.UINT8, 3) for image in images[first : first + at_once])]
        if frame is None:
            frame, verdict = call(callbacks.run_mosaic, [_empty(shape), *inputs], dtype, 3)
        else:
            # Into the frame of the first call: nobody reads it before all verdicts are there.
            inputs.append((frame, known(dtype), 3))
            _, verdict = call(callbacks.run_mosaic, [_empty((0, 0, 0)), *inputs], dtype, 3)
        verdicts.append(verdict)
    layout = "HWC" if channels_last else "CHW"
    return dali.reinterpret(frame, dtype=dtype, shape=checked("mosaic", *verdicts), layout=layout)


def mask(target: Target, geometry: Geometry, *, dtype: str) -> DataNode:
    """See ``fn.remap_mask``."""
    empty = _empty((geometry.size, geometry.size))
    inputs = target_inputs(target, geometry, itemsize=np.dtype(dtype).itemsize)
    drawn, verdict = call(callbacks.run_mask, [empty, *inputs], types.to_dali_type(dtype), 2)
    return dali.reshape(drawn, shape=checked("remap_mask", verdict), layout="HW")


def target_inputs(target: Target, geometry: Geometry, *, itemsize: int = 1) -> list[Input]:
    """The inputs of the mask's callbacks after their first."""
    cell, shape, runs = target
    return [
        _frame(geometry, itemsize=itemsize),
        (cell, types.INT32, 1),
        (shape, types.INT64, 1),
        (runs, types.INT64, 1),
    ]


def _empty(shape: tuple[int, ...]) -> Input:
    """A callback's first input."""
    return dali.zeros(shape=[0, *shape], dtype=types.UINT8), types.UINT8, 1 + len(shape)


def _frame(geometry: Geometry, **fields: Any) -> Input:
    """``callbacks.FRAME`` as int32."""
    record = np.zeros(1, callbacks.FRAME)
    record["size"], record["grid"], record["resample"] = geometry.size, geometry.grid, geometry.resample
    for name, value in fields.items():
        record[name] = value
    words = record.view(np.int32)
    if isinstance(geometry.center, DataNode):
        rest = types.Constant(words[callbacks.CENTER_VALUES :], device="cpu")
        return dali.cat(geometry.center, rest), types.INT32, 1
    words[: callbacks.CENTER_VALUES] = geometry.center
    return types.Constant(words, device="cpu"), types.INT32, 1


def call(run: Any, inputs: Sequence[Input], out_type: Any, out_ndim: int) -> tuple[DataNode, DataNode]:
    """Run one of the callbacks; returns its first output, and the verdict on it."""
    nodes, in_types, in_ndims = zip(*inputs, strict=True)
    compiled = Compiled(
        run_fn=run,
        setup_fn=callbacks.setup,
        out_types=[known(out_type), types.INT32],
        outs_ndim=[out_ndim, 1],
        in_types=list(in_types),
        ins_ndim=list(in_ndims),
        device="cpu",
    )
    written, verdict = compiled(*nodes)
    return written, verdict


def known(dtype: Any) -> Any:
    """The type as numba_function writes it: it has no float16."""
    return types.UINT16 if dtype == types.FLOAT16 else dtype


def checked(operator: str, *verdicts: DataNode) -> DataNode:
    """The first of several verdicts on the same samples, if all are good; otherwise the batch fails.

    What is made from the samples must depend on it: DALI drops the error of an operator that nothing else reads from.
    """

    def check(*batches: list[Any]) -> list[Any]:
        with no_collection():
            addresses, _ = read_tensors([capsule for batch in batches for capsule in batch])
            for i, address in enumerate(addresses.tolist()):
                kind = -c_int32.from_address(address).value
                if kind > 0:
                    count = 3 if kind == callbacks.CHANNELS else 2
                    raise failure(operator, i % len(batches[0]), kind, *(c_int32 * count).from_address(address)[1:])
            return batches[0]

    return dali.dl_tensor_python_function(*verdicts, function=check, batch_processing=True)


def failure(operator: str, sample: int, kind: int, *numbers: int) -> NemoError:
    """What is wrong with a sample of a batch, one of FAILURES."""
    return NemoError(f"nemo_dali.fn.{operator}, sample {sample} of the batch: {FAILURES[kind].format(*numbers)}.")


@functools.cache  # and so kept for good: pipelines hold the addresses
def normalising(mean: tuple[float, ...], std: tuple[float, ...], dtype: str) -> tuple[npt.NDArray[np.generic], Recipe]:
    """``reference.normalisation_table``, C-contiguous, and how to compute it, ``normalise.RECIPE`` [1]."""
    table = np.ascontiguousarray(normalisation_table(mean, std, dtype))
    return table, recipe_of(table, mean, std, dtype)
