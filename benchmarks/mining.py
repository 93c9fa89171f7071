"""Each stage of mining by itself: ranking beside a plain matrix product, embedding beside decoding, and the search.

    python benchmarks/mining.py                     ranking at the scale of RefCOCO: 120,000 sentences, 17,000 photos
    python benchmarks/mining.py --sentences 12000   a tenth of it
    python benchmarks/mining.py --model ViT-L-14    another model; its weights are random, as only the clock counts

Ranking alternates, block by block, with the matrix product alone, so that the ratio holds on a noisy machine; both run
in one process, whose peak memory is reported. The first sentences are compared with a brute-force ranking before
anything is timed. Writes mining.json.
"""

import argparse
import json
import tempfile
import threading
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import RESULTS, generate, in_a_process, revision

from nemo_dali.commands.bench import Spread, machine, versions
from nemo_dali.data.dataset import Dataset
from nemo_dali.distributed.ranks import Ranks
from nemo_dali.io.threads import thread_count
from nemo_dali.kernels.ranking.reference import rank_reference
from nemo_dali.mining._inputs import Photos, Sentences
from nemo_dali.mining.approximate import ApproximateRanker, list_count
from nemo_dali.mining.clip import Clip, model_name
from nemo_dali.mining.embedding import embed
from nemo_dali.mining.ranking import Ranker

F32 = npt.NDArray[np.float32]
PEAK_INTERVAL_S = 0.02


class PeakMemory:
    """The peak private memory of this process while the block runs, in MiB, above what it had before."""

    def __enter__(self) -> "PeakMemory":
        self.before, self.mib, self._over = _private_mib(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(PEAK_INTERVAL_S):
            self.mib = max(self.mib, _private_mib() - self.before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _private_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def embeddings(sentences: int, photos: int, width: int, *, groups: int = 2000) -> tuple[F32, F32]:
    """Unit vectors with a direction in common and clusters, as CLIP's have."""
    random = np.random.default_rng(0)

    def unit(array: F32) -> F32:
        return array / np.linalg.norm(array, axis=1, keepdims=True)

    centre = unit(random.standard_normal((groups, width), np.float32)) + 0.7 * unit(
        random.standard_normal((1, width), np.float32)
    )
    image, text = (
        unit(centre[random.integers(0, groups, count)] + unit(random.standard_normal((count, width), np.float32)))
        for count in (photos, sentences)
    )
    return text, image


def ranking(options: argparse.Namespace, end: Connection) -> None:
    """Rank all sentences, a block at a time, each beside its matrix product alone."""
    text, image = embeddings(options.sentences, options.photos, options.width)
    own = np.arange(options.sentences) * 7 % options.photos
    ranker = Ranker(text, image, own, depth=options.depth)
    exact = rank_reference(text[:4], image, own[:4], depth=ranker.depth)
    if not all(np.array_equal(*pair) for pair in zip(ranker.rank(0, 4)[1:], exact, strict=True)):
        raise RuntimeError("the ranking is wrong, so it is not timed")
    with tempfile.TemporaryFile() as file:  # the result, as the table's file holds it
        size = options.sentences, ranker.depth
        result = np.memmap(file, np.int32, "w+", shape=(2, *size))
        blocks = ranker.blocks()
        ranker.rank(*blocks[0])
        products, rankings = [], []
        with PeakMemory() as peak:
            for begin, last in blocks:
                start = time.perf_counter()
                np.matmul(text[begin:last], image.T)
                products.append(time.perf_counter() - start)
                start = time.perf_counter()
                block = ranker.rank(begin, last)
                result[0, begin:last], result[1, begin:last] = block.neighbors, block.similarity.view(np.int32)
                rankings.append(time.perf_counter() - start)
    flops = 2.0 * options.sentences * options.photos * options.width
    end.send(
        {
            "seconds": round(sum(rankings), 2),
            "matmul_seconds": round(sum(products), 2),
            "gflops": round(flops / sum(rankings) / 1e9, 1),
            "matmul_gflops": round(flops / sum(products) / 1e9, 1),
            "share_of_matmul": asdict(Spread.of([p / r for p, r in zip(products, rankings, strict=True)])),
            "peak_mib_beside_embeddings_and_result": round(peak.mib),
            "blocks": len(blocks),
        }
    )


def searching(options: argparse.Namespace, end: Connection) -> None:
    """The approximate search at several numbers of probes, beside the exact ranking of the same sentences."""
    text, image = embeddings(options.searched, options.search_photos, options.width)
    own = np.arange(options.searched) * 7 % options.search_photos
    ranker = Ranker(text, image, own, depth=min(options.depth, 100))
    lists = list_count(options.search_photos)
    start = time.perf_counter()
    search = ApproximateRanker(ranker, text, image, probes=1, ranks=Ranks())
    built = time.perf_counter() - start
    ranker.rank(0, 1)
    found: dict[str, Any] = {"photos": options.search_photos, "lists": lists, "build_s": round(built, 2), "probes": {}}
    start = time.perf_counter()
    for block in ranker.blocks():
        ranker.rank(*block)
    found["exact_sentences_per_s"] = round(options.searched / (time.perf_counter() - start), 1)
    for probes in sorted({max(1, lists // divisor) for divisor in (64, 16, 4)}):
        search.probe(probes)
        search.rank(0, 1)
        start = time.perf_counter()
        for block in ranker.blocks():
            search.rank(*block)
        rate = options.searched / (time.perf_counter() - start)
        recall = {str(int(n)): round(float(share), 4) for n, share in search.recall()}
        found["probes"][str(probes)] = {"sentences_per_s": round(rate, 1), "recall": recall}
    end.send(found)


def embedding(options: argparse.Namespace, end: Connection) -> None:
    """Photos decoded, preprocessed and embedded; sentences embedded with all tokens and with only their own."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = Dataset.open(generate(Path(folder), images=options.images)[0])
        clip = random_clip(options.model)
        threads = thread_count()
        photos = Photos(clip, dataset, batch_size=options.batch_size, num_threads=threads)
        count = photos.rows // options.batch_size  # whole micro-batches
        list(photos.batches(range(1)))
        start = time.perf_counter()
        list(photos.batches(range(count)))
        decoded = count * options.batch_size / (time.perf_counter() - start)
        found: dict[str, Any] = {"model": options.model, "batch_size": options.batch_size, "threads": threads}
        found["photos"] = {"decoded_and_preprocessed_per_s": round(decoded, 1)}
        vectors = np.zeros((photos.rows, clip.width), np.float32)
        with PeakMemory() as peak:
            stage = _embed(photos, clip, vectors, options.batch_size)
        found["photos"] |= {
            "embedded_per_s": round(stage.rate, 2),
            "model_waited": round(stage.starved / stage.seconds, 3),
            "peak_mib": round(peak.mib),
        }
        texts = list(dataset.sentences.text)[: options.texts]
        short, whole = (Sentences(clip, texts, batch_size=options.batch_size) for _ in range(2))
        whole.trims = False
        rates = []
        for inputs in (short, whole):
            vectors = np.zeros((len(texts), clip.width), np.float32)
            with PeakMemory() as peak:
                stage = _embed(inputs, clip, vectors, options.batch_size)
            rates.append(stage.rate)
        found["sentences"] = {
            "distinct": short.rows,
            "embedded_per_s": round(rates[0], 1),
            "with_all_tokens_per_s": round(rates[1], 2),
            "peak_mib": round(peak.mib),
        }
        end.send(found)


def _embed(inputs: Any, clip: Clip, vectors: F32, batch_size: int) -> Any:
    options: dict[str, Any] = {"done": 0, "batch_size": batch_size, "scale": 1.0, "workers": thread_count()}
    return embed(inputs, clip, vectors, ranks=Ranks(), record=lambda rows: None, **options)


def random_clip(model: str) -> Clip:
    """One of open_clip's models, untrained, on the CPU."""
    import open_clip
    import torch

    name, _ = model_name(model)
    network, _, transform = open_clip.create_model_and_transforms(name, precision="fp32")
    width = open_clip.get_model_config(name)["embed_dim"]
    tokenizer = open_clip.get_tokenizer(name)
    return Clip(
        network=network.eval(),
        width=width,
        transform=transform,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        weights_hash="",
        model=model,
        pretrained="none",
        encoder="",
    )


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=120_000)
    parser.add_argument("--photos", type=int, default=17_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--searched", type=int, default=500, help="sentences of the approximate search")
    parser.add_argument("--search-photos", type=int, default=200_000)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model, or a model config .json")
    parser.add_argument("--images", type=int, default=64, help="photos that are embedded")
    parser.add_argument("--texts", type=int, default=256, help="sentences that are embedded")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured = revision()  # before the results change the tree
    result: dict[str, Any] = {}
    for measure in (ranking, searching, embedding):
        result[measure.__name__] = in_a_process(measure, options)
        print(measure.__name__, json.dumps(result[measure.__name__]), flush=True)
    config = {name: value for name, value in vars(options).items() if name != "output"}
    result |= {"config": config, "machine": machine(), "versions": versions(), "revision": measured}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "mining.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
