"""Arguments that a Loader does not take, and what takes their place."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

_SEED = "Give seed: every draw depends on seed, epoch and position alone"
_PINNED = "Give device='cuda', which makes batches on the GPU"

# Of torch's DataLoader; docs/drop-in/index.md shows it too.
INSTEAD = {
    "num_workers": "Give num_threads; there, too, 0 lets the machine decide: this process's share of the cores",
    "shuffle": "Leave it out: every epoch is shuffled by seed and epoch; split_mode='eval' keeps the file's order",
    "sampler": "Leave it out: ranks share each epoch by torch.distributed's rank and world_size, or by those you give",
    "batch_sampler": "Give batch_size, which is per rank",
    "collate_fn": "Give preset, or style, which sets the form of a batch",
    "pin_memory": _PINNED,
    "pin_memory_device": _PINNED,
    "worker_init_fn": _SEED,
    "generator": _SEED,
    "prefetch_factor": "Give prefetch, the total number of batches made ahead",
    "persistent_workers": "Leave it out: threads stay until close()",
    "multiprocessing_context": "Leave it out: threads take the place of worker processes",
    "timeout": "Leave it out: object storage has limits of its own, and local reads have none",
    "in_order": "Leave it out: batches come in the order of the plan",
}

# Of DALI's iterators.
INSTEAD_OF_DALI = {
    "pipelines": "Give dataset, negatives and batch_size: a Loader makes its own pipeline",
    "output_map": "Give style='dali', whose dicts have 'image', 'mask', 'tokens' and 'attention_mask'",
    "reader_name": "Leave it out: len(loader) is the steps of an epoch",
    "auto_reset": "Leave it out: every pass continues where the last one ended",
    "last_batch_policy": "Give drop_last=True for DROP and False for FILL; split_mode='eval' is PARTIAL",
    "fill_last_batch": "Give drop_last=False, or True to leave out an incomplete last batch",
    "last_batch_padded": "Leave it out: drop_last=False fills the last batch up",
    "dynamic_shape": "Leave it out: batches have one shape",
    "prepare_first_batch": "Leave it out: a pass makes its first batches when the first one is requested",
}


def refuse_others(given: Mapping[str, Any], loader: type) -> None:
    """Refuse arguments, by name, that a Loader does not have.

    Raises:
        TypeError: there is one; the message says what takes its place.
    """
    parameters = inspect.signature(loader).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    for name in given:
        for others, of in ((INSTEAD, "torch's DataLoader"), (INSTEAD_OF_DALI, "DALI's iterators")):
            if name in others:
                raise TypeError(f"Loader takes no {name}, an argument of {of}. {others[name]}.")
        meant = get_close_matches(name, [*known, *INSTEAD], n=1)
        hint = f"did you mean {meant[0]!r}?" if meant else "help(Loader) lists its arguments."
        raise TypeError(f"Loader takes no argument {name!r}; {hint}")
