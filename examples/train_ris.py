"""Train a small model of referring image segmentation on a Loader: a starting point for your own training.

    python examples/train_ris.py train.ris.h5 train.neg.h5 --val val.ris.h5 --policy policy.json --out run
    torchrun --nproc-per-node 4 examples/train_ris.py ... --resume    # the same arguments

Runs on GPUs (NCCL, mixed precision) if there are any, else on the CPU (Gloo). The global batch, and so the samples of
every step, are the same for any number of ranks: any number of them can continue where others stopped.

    run/checkpoint.pt                   the state that a run continues from, replaced every --save-every steps
    run/metrics.jsonl                   a line per evaluation: metrics of all samples, and by distractors and kind
    run/seen-from-STEP-rank-RANK.jsonl  the positions of the epoch, and the refs, that each step showed
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate
from torch.nn.parallel import DistributedDataParallel

from nemo_dali import Batch, Loader, MosaicPolicy
from nemo_dali.metrics import Segmentation
from nemo_dali.synthetic import expression_kinds

VOCABULARY, WORDS = 49408, 22  # CLIP's tokens, and how many of a sentence are kept, as CRIS does for RefCOCOg


# --- the model ---------------------------------------------------------------------------------------------------


def convolution(width_in: int, width_out: int, *, stride: int = 1) -> nn.Sequential:
    """A convolution with group norm, which ignores the other samples: it does not matter which rank has them."""
    layer = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(8, width_out), nn.ReLU())


def coordinates(features: Tensor) -> Tensor:
    """x and y of each place, from -1 to 1: [B, 2, h, w]. Without them nothing is left or right."""
    y, x = (torch.linspace(-1, 1, side, device=features.device) for side in features.shape[2:])
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))])
    return grid.to(features.dtype).expand(len(features), -1, -1, -1)


class Film(nn.Module):
    """The sentence scales and shifts the channels of a level, which also gets the coordinates."""

    def __init__(self, width_in: int, width_out: int, width_text: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width_in + 2, width_out, 1)
        self.by_text = nn.Linear(width_text, 2 * width_out)

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:
        scale, shift = self.by_text(sentence)[:, :, None, None].chunk(2, dim=1)
        return torch.relu(self.mix(torch.cat([features, coordinates(features)], dim=1)) * (1 + scale) + shift)


class Segmenter(nn.Module):
    """Logits [B, S, S] of a mask, from images [B, 3, S, S] and tokens with their mask [B, L].

        image ─▶ stride 2 ─▶ 4 ─────────▶ 8 ─────────▶ 16 ─▶ FiLM ─▶ places look at each other and at the words
                             └▶ FiLM ─┐   └▶ FiLM ─┐                                  │
        logits ◀─ up by 4 ◀────────── + ◀───────── + ◀────────────────────────────────┘

    2 million weights, of which 0.8 million are the embeddings of the vocabulary.
    """

    def __init__(self, width: int = 128, width_fine: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.words = nn.GRU(16, width // 2, batch_first=True, bidirectional=True)
        self.stem = nn.Sequential(convolution(3, 24, stride=2), convolution(24, 48, stride=2))
        self.stages = nn.ModuleList(
            nn.Sequential(convolution(below, above, stride=2), convolution(above, above))
            for below, above in ((48, 96), (96, 160))
        )
        pairs = ((48, width_fine), (96, width), (160, width))
        self.fuse = nn.ModuleList(Film(below, above, width) for below, above in pairs)
        # Without dropout: what it drops would depend on the number of ranks.
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, dropout=0, batch_first=True, norm_first=True)
        self.relate = nn.TransformerDecoder(layer, 2)
        self.up = nn.ModuleList(convolution(below, width_fine) for below in (width, width_fine))
        self.head = nn.Conv2d(width_fine, 1, 1)

    def forward(self, image: Tensor, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        words, _ = self.words(self.embedding(tokens))
        said = attention_mask[:, :, None].to(words.dtype)
        sentence = (words * said).sum(1) / said.sum(1)
        levels = [self.stem(image)]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        fine, middle, coarse = (fuse(level, sentence) for fuse, level in zip(self.fuse, levels, strict=True))
        places = coarse.flatten(2).transpose(1, 2)  # [B, places, width]
        places = self.relate(places, words, memory_key_padding_mask=attention_mask == 0)
        top = places.transpose(1, 2).reshape(coarse.shape)
        for level, smooth in zip((middle, fine), self.up, strict=True):
            top = smooth(level + interpolate(top, level.shape[2:], mode="bilinear"))
        return interpolate(self.head(top), image.shape[2:], mode="bilinear")[:, 0]


def objective(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of the pixels plus the Dice loss of each mask, in float32."""
    logits, mask = logits.float(), mask.float()
    probability = logits.sigmoid()
    both, either = (probability * mask).sum((1, 2)), (probability + mask).sum((1, 2))
    dice = 1 - (2 * both + 1) / (either + 1)
    return binary_cross_entropy_with_logits(logits, mask) + dice.mean()


# --- the training ------------------------------------------------------------------------------------------------


class Training:
    """A model and everything that trains it: what a checkpoint holds besides the loader's state.

    Args:
        steps: of the whole run; the learning rate rises over the first ``warm_up`` and falls along a cosine to 0.
    """

    def __init__(self, device: torch.device, *, learning_rate: float, steps: int, warm_up: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.device, self.step = device, 0
        self.segmenter = Segmenter().to(device, memory_format=torch.channels_last)
        self.model: nn.Module = self.segmenter
        self.optimizer = torch.optim.AdamW(self.segmenter.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)

        def share(step: int) -> float:
            rising = (step + 1) / (warm_up + 1)
            return min(rising, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        gpu = device.type == "cuda"
        self.precision = torch.bfloat16 if not gpu or torch.cuda.is_bf16_supported() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, S, S]."""
        with torch.autocast(self.device.type, self.precision, enabled=self.device.type == "cuda"):
            image = batch.image.contiguous(memory_format=torch.channels_last)
            return self.model(image, batch.tokens, batch.attention_mask)

    def learn(self, batch: Batch) -> Tensor:
        """Take a step, and return its loss without waiting for it."""
        loss = objective(self.predict(batch), batch.mask)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.step += 1
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("segmenter", "optimizer", "scheduler", "scaler")}
        gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {**parts, "step": self.step, "random": torch.get_rng_state(), "random_gpu": gpu}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("segmenter", "optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["random"].cpu())
        if state["random_gpu"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_gpu"].cpu(), self.device)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all: the job may die at any moment."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@torch.inference_mode()
def evaluate(training: Training, loader: Loader, kinds: list[str] | None = None) -> dict[str, Any]:
    """Metrics of all samples of an evaluation, on all ranks, by distractors in the photo and by kind of expression."""
    metric = Segmentation("lavt")
    model, training.model = training.model, training.segmenter.eval()  # ranks may have different numbers of steps
    for batch in loader:
        kind = {"kind": [kinds[sentence] for sentence in batch.plan["sentence"].tolist()]} if kinds else {}
        metric.update(training.predict(batch) > 0, batch.mask, groups={"distractors": batch.distractors, **kind})
    training.model = model.train()
    return {"all": metric.compute(), **metric.compute_groups()}


def report(found: dict[str, Any]) -> None:
    """Print what ``evaluate`` found."""
    groups = [(by, key) for by in ("distractors", "kind") for key in found.get(by, {})]
    rows = {"all": found["all"]} | {f"{by} {key}": found[by][key] for by, key in groups}
    for name, row in rows.items():
        shown = ", ".join(f"{metric} {row[metric]:.4f}" for metric in ("mIoU", "oIoU", "P@0.5", "P@0.7"))
        print(f"  {name}: {shown}" + (f" ({row['samples']} samples)" if "samples" in row else ""), flush=True)


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if options.global_batch % ranks:
        raise SystemExit(f"--global-batch ({options.global_batch}) must be a multiple of the {ranks} ranks")
    common = {"size": options.size, "context_length": WORDS, "device": str(device), "num_threads": options.workers}
    loader = Loader(
        options.dataset,
        options.negatives,
        batch_size=options.global_batch // ranks,
        policy=options.policy or (None if options.negatives else MosaicPolicy(p_mined=0)),
        seed=options.seed,
        tiles=options.tiles,
        placement="pinned" if options.tiles and device.type == "cuda" else "host",
        **common,
    )
    held_out = options.val and Loader(
        options.val, batch_size=options.global_batch // ranks, split_mode="eval", **common
    )
    kinds = expression_kinds(options.val_truth, options.val) if held_out and options.val_truth else None
    steps = options.steps or options.epochs * len(loader)
    training = Training(
        device, learning_rate=options.learning_rate, steps=steps, warm_up=options.warm_up, seed=options.seed
    )
    path = options.out / "checkpoint.pt"
    if options.resume and path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        training.load_state_dict(saved["training"])
        loader.load_state_dict(saved["loader"])
    if distributed.is_initialized():
        begins = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(ranks)]
        distributed.all_gather(begins, torch.tensor(training.step, device=device))
        if len({int(begin) for begin in begins}) > 1:  # a file system that shows a new file late, say
            raise SystemExit(f"Ranks continue from different steps: {[int(begin) for begin in begins]}. Start again.")
        training.model = DistributedDataParallel(training.segmenter)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / f"seen-from-{training.step}-rank-{rank}.jsonl", "w", buffering=1) as seen:
        while training.step < steps:
            epoch = loader.epoch
            loader.set_epoch(epoch)  # a loaded position in this epoch is kept
            for batch in loader:
                loss = training.learn(batch)
                step, plan = training.step, batch.plan
                shown = {"positions": plan["position"].tolist(), "refs": plan["ref"].tolist()}
                seen.write(json.dumps({"step": step, "epoch": epoch, **shown}) + "\n")
                ends = step % len(loader) == 0 or step == steps  # of an epoch, or of the run
                if rank == 0 and (ends or step % options.save_every == 0):
                    print(f"epoch {epoch}, step {step} of {steps}: loss {loss.item():.4f}", flush=True)
                if ends and held_out:
                    found = evaluate(training, held_out, kinds)
                    if rank == 0:
                        report(found)
                        with open(options.out / "metrics.jsonl", "a") as log:
                            log.write(json.dumps({"step": step, **found}) + "\n")
                if rank == 0 and (ends or step % options.save_every == 0):  # rank 0's loader state is every rank's
                    save(path, {"training": training.state_dict(), "loader": loader.state_dict()})
                if step == steps:
                    break


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="F.ris.h5")
    parser.add_argument("negatives", nargs="?", help="F.neg.h5; without it every sample is a single photo")
    parser.add_argument("--val", help="a .ris.h5 to evaluate on after each epoch")
    parser.add_argument("--val-truth", help="its folder, if nemo-dali synth made it: metrics by kind of expression too")
    parser.add_argument("--policy", help="a policy file, as nemo-dali tune writes it")
    parser.add_argument("--tiles", help="F.tiles.h5: read photos from there")
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt, if it exists")
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--global-batch", type=int, default=16, help="samples per step, over all ranks")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="steps of the whole run, instead of --epochs")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=100, help="steps")
    parser.add_argument("--workers", type=int, help="threads of the loader (default: the cores of this rank)")
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
