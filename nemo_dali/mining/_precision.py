"""Products of float32 numbers in float32, whatever a user lets a GPU shorten."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exact_float32() -> Iterator[None]:
    """Neither matrix products nor convolutions are shortened to TF32 while the block runs.

    torch 2.9 has new settings for that, and refuses to read the old ones where somebody has used the new.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    if hasattr(matmul, "fp32_precision"):
        both: Any = cudnn  # torch's types do not know what it has of each
        settings = [(of, "fp32_precision", "ieee") for of in (matmul, both.conv, both.rnn)]
    before = [getattr(of, name) for of, name, _ in settings]
    try:
        for of, name, value in settings:
            setattr(of, name, value)
        yield
    finally:
        for (of, name, _), value in zip(settings, before, strict=True):
            setattr(of, name, value)


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """cuDNN takes the same way each time. ``torch.backends.cudnn.flags`` would read the old settings besides."""
    import torch

    cudnn = torch.backends.cudnn
    settings = {"enabled": True, "benchmark": False, "deterministic": True}
    before = {name: getattr(cudnn, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(cudnn, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(cudnn, name, value)
