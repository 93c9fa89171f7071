"""CLIP models small enough to make in a test."""

from pathlib import Path

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}

# As wide as open_clip assumes OpenAI's models to be.
OPENAI_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    "quick_gelu": True,
}


def write_openai_archive(path: Path) -> None:
    """Write a CLIP model in the form that OpenAI published: traced, partly float16, with three numbers added."""
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**OPENAI_CONFIG).eval()
    for key, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 49408)):
        vars(network).pop(key, None)
        network.register_buffer(key, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 12, dtype=torch.int64)}
    traced = torch.jit.trace_module(network, inputs)
    open_clip.model.convert_weights_to_fp16(network)
    traced.save(str(path))
