"""Which graph makes a Loader's batches."""

from typing import Any, Literal

from nemo_dali.pipeline.batches import BatchPipeline
from nemo_dali.pipeline.graphs import ResidentPipeline, StreamPipeline
from nemo_dali.pipeline.graphs_gpu import CudaResidentPipeline, CudaStreamPipeline
from nemo_dali.pipeline.side_stream import SideStreamPipeline

# What queues the gather of resident tiles on a GPU: the training thread, on a side stream, or DALI's, which costs the
# host more. Read whenever a pipeline is opened.
GATHER_FROM: Literal["training thread", "dali"] = "training thread"


def open_pipeline(
    *,
    batch_size: int,
    most_cells: int,
    resident: bool,
    device_id: int | None,
    num_threads: int,
    prefetch: int,
    hw_decoder_load: float,
    erase: bool,
    turns: bool,
) -> BatchPipeline[Any]:
    """The pipeline for batches of ``batch_size`` samples of up to ``most_cells`` cells.

    Args:
        resident: it shows resident tiles, not photos.
        device_id: a CUDA device number; None: the CPU.
        num_threads, prefetch, hw_decoder_load: as in ``Loader``.
        erase: photos have black squares; with photos only.
        turns: whether some photos are to be turned.
    """
    options: dict[str, Any] = {"num_threads": num_threads, "prefetch": prefetch}
    if device_id is None:
        if resident:
            return ResidentPipeline(max_cells=batch_size, **options)
        return StreamPipeline(max_cells=batch_size * most_cells, turns=turns, erase=erase, **options)
    options["device_id"] = device_id
    if resident:
        if GATHER_FROM == "training thread":
            return SideStreamPipeline(device_id=device_id, prefetch=prefetch)
        return CudaResidentPipeline(max_cells=1, **options)
    options |= {"hw_decoder_load": hw_decoder_load, "turns": turns, "erase": erase}
    return CudaStreamPipeline(max_cells=batch_size * most_cells, **options)
