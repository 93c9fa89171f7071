"""Negative tables of random content, written as mining writes them."""

import numpy as np

from nemo_dali.mining.ranking import Ranker
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.table_writer import write_table
from tests.helpers.rankings import unit


def write_random_table(path, dataset, *, depth=1000, seed=0):
    """A table as mining would write it, but with similarities drawn from a generator."""
    random = np.random.default_rng(seed)
    sentences, photos = len(dataset.sentences.ref), len(dataset.images.id)
    neighbors = np.empty((sentences, min(depth, photos - 1)), np.int32)
    for row, ref in enumerate(dataset.sentences.ref):
        others = np.delete(np.arange(photos), dataset.refs.image[ref])
        neighbors[row] = random.permutation(others)[: neighbors.shape[1]]
    similarity = -np.sort(-random.uniform(0, 0.5, neighbors.shape).astype(np.float32))
    write_table(
        path,
        blocks=[(neighbors, similarity)],
        text_embedding=np.ones((sentences, 1), np.float32),
        image_embedding=np.ones((photos, 1), np.float32),
        depth=depth,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="random",
        pretrained="none",
        weights_hash="0" * 64,
        exclusions=["own photo"],
    )


def write_ranked_table(path, dataset, *, depth=1000, seed=0, shorten=False):
    """A table of random embeddings, ranked; ``shorten``: some rows end early, as exclusions make them."""
    rng = np.random.default_rng(seed)
    sentences, photos = len(dataset.sentences.ref), len(dataset.images.id)
    text, image = unit(rng, sentences, 32), unit(rng, photos, 32)
    own = dataset.refs.image[dataset.sentences.ref]
    similarity = (text @ image.T).astype(np.float32)
    similarity[np.arange(sentences), own] = -np.inf
    width = min(depth, photos - 1)
    neighbors = np.argsort(-similarity, axis=1)[:, :width].astype(np.int32)
    values = np.take_along_axis(similarity, neighbors, axis=1)
    if shorten:
        ends = rng.integers(0, width + 1, sentences)
        behind = np.arange(width) >= ends[:, None]
        neighbors[behind], values[behind] = -1, -np.inf
    write_table(
        path,
        blocks=[(neighbors, values)],
        text_embedding=text,
        image_embedding=image,
        depth=depth,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="random",
        pretrained="none",
        weights_hash="",
        exclusions=[],
    )
    return NegativeTable.open(path)


def write_excluding_table(path, dataset, exclusions, *, scenes=7, seed=0):
    """A table ranked under ``mining.Exclusions``; its photos' embeddings are those of a few scenes, with noise."""
    rng = np.random.default_rng(seed)
    sentences, photos = len(dataset.sentences.ref), len(dataset.images.id)
    image = unit(rng, scenes, 32)[rng.integers(0, scenes, photos)] + 0.05 * rng.standard_normal((photos, 32))
    image = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32)
    text, ref = unit(rng, sentences, 32), dataset.sentences.ref
    excluded, _ = exclusions.of(dataset)
    ranker = Ranker(text, image, dataset.refs.image[ref], depth=1000, ref=ref, excluded=excluded)
    write_table(
        path,
        blocks=[(block.neighbors, block.similarity) for block in (ranker.rank(*block) for block in ranker.blocks())],
        text_embedding=text,
        image_embedding=image,
        depth=1000,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="random",
        pretrained="none",
        weights_hash="",
        exclusions=[],
        excluded_photos=excluded.never,
        rules={"category": exclusions.category, "similar_photos": exclusions.similar_photos},
    )
    return image
