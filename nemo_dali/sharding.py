"""Which of all processes this one is, and what share of the machine is its own."""

import logging
import os

logger = logging.getLogger("nemo_dali")


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The arguments, where both are given; else torch.distributed's, if it is initialised; else 0 of 1."""
    import torch.distributed as distributed

    if rank is None and world_size is None:
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        if (announced := os.environ.get("WORLD_SIZE", "1")) != "1":
            logger.warning(
                "WORLD_SIZE is %s, but torch.distributed is not initialised: this loader is rank 0 of 1 and so shows "
                "every sample. Make it after init_process_group, or give rank and world_size.",
                announced,
            )
        return 0, 1
    if rank is None or world_size is None:
        raise ValueError(f"rank ({rank}) and world_size ({world_size}) must be given together")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must be in [0, world_size), and world_size ({world_size}) >= 1")
    return rank, world_size


def thread_count() -> int:
    """Cores this process may use, shared by the ranks on its node, as torchrun announces them."""
    return max(len(os.sched_getaffinity(0)) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 1)
