"""Train a small model on a Loader with DistributedDataParallel, so that any number of ranks can go on where it stopped.

    torchrun --nproc-per-node 2 examples/train_ddp.py F.ris.h5 F.neg.h5 --out run
    torchrun --nproc-per-node 4 examples/train_ddp.py F.ris.h5 F.neg.h5 --out run --resume

On GPUs (NCCL) where there are some, else on the CPU (Gloo). The global batch stays the same whatever the number of
ranks, and with it what every step is made of. ``run/checkpoint.pt`` is replaced every ``--save-every`` steps;
``run/seen-from-STEP-rank-RANK.jsonl`` lists the positions of the epoch that each step showed.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate
from torch.nn.parallel import DistributedDataParallel

from nemo_dali import Loader, MosaicPolicy

VOCABULARY = 49408  # of CLIP's tokens


class Segmenter(nn.Module):
    """A few convolutions, scaled by the mean of the expression's token embeddings: logits [B, S, S]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, image: torch.Tensor, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weight = attention_mask.unsqueeze(2).float()
        text = (self.embedding(tokens) * weight).sum(1) / weight.sum(1)
        features = self.encoder(image) * (1 + text[:, :, None, None])
        return interpolate(self.head(features), image.shape[2:], mode="bilinear")[:, 0]


def save(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all: the job may die at any moment."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if options.global_batch % ranks:
        raise SystemExit(f"--global-batch ({options.global_batch}) must be a multiple of the {ranks} ranks")
    loader = Loader(
        options.dataset,
        options.negatives,
        batch_size=options.global_batch // ranks,
        policy=MosaicPolicy(max_similarity=options.max_similarity),
        seed=options.seed,
        size=options.size,
        device=str(device),
    )
    torch.manual_seed(options.seed)
    segmenter = Segmenter().to(device)
    optimizer = torch.optim.SGD(segmenter.parameters(), lr=options.learning_rate, momentum=0.9)
    step, path = 0, options.out / "checkpoint.pt"
    if options.resume and path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        segmenter.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step = saved["step"]
    model = segmenter
    if distributed.is_initialized():
        steps = [torch.zeros_like(torch.tensor(step, device=device)) for _ in range(ranks)]
        distributed.all_gather(steps, torch.tensor(step, device=device))
        if len({int(other) for other in steps}) > 1:  # a file system that shows a new file late, say
            raise SystemExit(f"The ranks go on from different steps: {[int(other) for other in steps]}. Start again.")
        model = DistributedDataParallel(segmenter)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / f"seen-from-{step}-rank-{rank}.jsonl", "w", buffering=1) as seen:
        for epoch in range(loader.epoch, options.epochs):
            loader.set_epoch(epoch)  # a loaded position in this epoch is kept
            for image, mask, tokens, attention_mask, plan in loader:
                logits = model(image, tokens, attention_mask)
                loss = binary_cross_entropy_with_logits(logits, mask.float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                positions, refs = plan["position"].tolist(), plan["ref"].tolist()
                seen.write(json.dumps({"step": step, "epoch": epoch, "positions": positions, "refs": refs}) + "\n")
                last = step == options.epochs * len(loader)
                if rank == 0 and (last or step % options.save_every == 0):
                    print(f"epoch {epoch}, step {step}: loss {loss.item():.4f}", flush=True)
                    state = {"model": segmenter.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    save(path, {**state, "loader": loader.state_dict()})  # rank 0's is every rank's


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("negatives")
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt, if it is there")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--global-batch", type=int, default=16, help="samples of a step, over all ranks")
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--max-similarity", type=float, default=0.3)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:  # not started by torchrun: one process
        train(options, device)
        return
    distributed.init_process_group("nccl" if gpu else "gloo")
    train(options, device)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
