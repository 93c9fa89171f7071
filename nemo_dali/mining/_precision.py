"""Products of float32 numbers in float32, whatever reduced precision the user allows a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep matrix products and convolutions from using TF32 while the block runs.

    torch 2.9 has new settings for that, and refuses to read the old ones once the new ones have been used.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    if hasattr(matmul, "fp32_precision"):
        both: Any = cudnn  # torch's types do not know its conv and rnn
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
    """Make cuDNN deterministic. ``torch.backends.cudnn.flags`` would read the old settings too."""
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
