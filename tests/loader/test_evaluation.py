"""Evaluation: every sample once, in the order of the file, at any number of ranks; and samples that are sentences."""

from collections import Counter

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from nemo_dali.data.dataset import Dataset
from nemo_dali.loader.loader import Loader
from nemo_dali.metrics import Segmentation
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.files import index_refer

SINGLES = MosaicPolicy(p_mined=0)


def evaluation(files, **options):
    return Loader(files.dataset, split_mode="eval", **{"batch_size": 7, "size": 32, "dtype": "uint8", **options})


def test_every_sentence_comes_once_in_order_and_the_last_step_is_smaller(files):
    loader = evaluation(files)
    count = len(Dataset.open(files.dataset).sentences.ref)
    assert count % 7 and len(loader) == -(-count // 7) and len(loader.dataset) == count
    batches = list(loader)
    assert [len(batch.image) for batch in batches] == [7] * (count // 7) + [count % 7]
    assert len(batches[-1].mask) == len(batches[-1].tokens) == len(batches[-1].sentences) == count % 7
    assert np.array_equal(np.concatenate([batch.plan["sentence"] for batch in batches]), np.arange(count))
    assert all((batch.plan["grid"] == 1).all() for batch in batches)
    again = list(loader)
    assert all(torch.equal(a.image, b.image) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize(("world", "batch_size"), [(2, 5), (3, 4), (4, 30), (7, 20)])
def test_ranks_share_the_samples_without_padding(files, world, batch_size):
    whole = len(Dataset.open(files.dataset).sentences.ref)
    seen, lengths = [], []
    for rank in range(world):
        loader = evaluation(files, batch_size=batch_size, rank=rank, world_size=world)
        steps = [batch.plan["sentence"].tolist() for batch in loader]
        assert len(loader) == len(steps) and all(steps)
        lengths.append(len(steps))
        seen += [sentence for step in steps for sentence in step]
    assert sorted(seen) == list(range(whole)) and max(lengths) - min(lengths) <= 1


def test_a_pass_goes_on_where_a_state_says(files):
    whole = [batch.plan["sentence"].tolist() for batch in evaluation(files)]
    loader = evaluation(files)
    passing = iter(loader)
    for _ in range(4):
        next(passing)
    resumed = evaluation(files)
    resumed.load_state_dict(loader.state_dict())
    assert [batch.plan["sentence"].tolist() for batch in resumed] == whole[4:]


def test_a_batch_tells_the_photos_sizes_masks_and_ids(files):
    dataset = Dataset.open(files.dataset)
    for batch in evaluation(files, samples="refs"):
        refs = batch.plan["ref"]
        rows = dataset.refs.image[refs]
        assert batch.sizes.tolist() == np.stack([dataset.images.height[rows], dataset.images.width[rows]], 1).tolist()
        assert batch.sent_ids == dataset.sentences.sent_id[batch.plan["sentence"]].tolist()
        assert batch.categories == dataset.refs.category[refs].tolist() and batch.sources == [""] * len(refs)
        assert not batch.empty.any()
        for ref, size, mask in zip(refs, batch.sizes, batch.original_masks(), strict=True):
            begin, count = dataset.refs.rle_begin[ref], dataset.refs.rle_count[ref]
            runs = {"size": size.tolist(), "counts": dataset.rle_counts[begin : begin + count].tolist()}
            assert np.array_equal(mask, coco.decode(coco.frPyObjects(runs, *size.tolist())))


def test_a_batch_tells_the_distractors_and_metrics_group_by_them(tmp_path):
    def edit(refs, _):
        for number, ref in enumerate(refs):
            if number % 5:
                ref["distractors"] = number % 4

    path = index_refer(tmp_path, photos=20, edit=edit)
    dataset = Dataset.open(path)
    assert set(dataset.refs.distractors.tolist()) == {-1, 0, 1, 2, 3}
    loader = Loader([path, path], split_mode="eval", batch_size=7, size=32, dtype="uint8")
    metric, found = Segmentation(), []
    for batch in loader:
        assert batch.distractors.dtype == np.int64
        found += batch.distractors.tolist()
        metric.update(batch.mask, batch.mask, groups={"distractors": batch.distractors})
    expected = dataset.refs.distractors[dataset.sentences.ref].tolist() * 2
    assert found == expected
    groups = metric.compute_groups()["distractors"]
    assert {key: measured["samples"] for key, measured in groups.items()} == dict(sorted(Counter(expected).items()))


@pytest.mark.parametrize("which", ["first", "last"])
def test_the_first_or_last_sentence_of_each_ref(files, which):
    refs = Dataset.open(files.dataset).refs
    sentences = np.concatenate([batch.plan["sentence"] for batch in evaluation(files, samples=which)])
    wanted = refs.sentence_begin + (refs.sentence_count - 1 if which == "last" else 0)
    assert np.array_equal(sentences, wanted) and refs.sentence_count.max() > 1


def test_perfect_predictions_measure_as_perfect(files):
    metric = Segmentation("lavt")
    for batch in evaluation(files, size=96):
        metric.update(batch.mask, batch.mask)
    assert metric.compute()["oIoU"] == 1
    metric = Segmentation("caris")
    for batch in evaluation(files):
        metric.update(batch.original_masks(), batch.original_masks())
    assert metric.compute()["mIoU"] == 1


@pytest.mark.parametrize("several", [1, 2])
def test_in_training_too_every_sentence_may_be_a_sample(files, several):
    """Each once an epoch, in another order each time, with its own ref; also through several data sets."""
    dataset = Dataset.open(files.dataset)
    loader = Loader(
        [files.dataset] * several,
        [files.negatives] * several,
        samples="sentences",
        batch_size=7,
        size=16,
        drop_last=True,
        policy=MosaicPolicy(top_k=10),
    )
    count = several * len(dataset.sentences.ref)
    assert len(loader) == count // 7 and len(loader.dataset) == count
    orders = [loader.plan(epoch, np.arange(count)) for epoch in range(2)]
    of_sentence = np.concatenate([dataset.sentences.ref + k * len(dataset.refs.ref_id) for k in range(several)])
    for rows in orders:
        assert np.array_equal(np.sort(rows["sentence"]), np.arange(count))
        assert np.array_equal(rows["ref"], of_sentence[rows["sentence"]])
    assert not np.array_equal(orders[0]["sentence"], orders[1]["sentence"])
    batch = next(iter(loader))
    assert np.array_equal(batch.plan, orders[0][:7])


def test_an_infinite_pass_goes_through_the_epochs(files):
    finite = Loader(files.dataset, batch_size=20, size=16, policy=SINGLES, samples="sentences")
    expected = [batch.plan["sentence"].tolist() for _ in range(3) for batch in finite]
    loader = Loader(files.dataset, batch_size=20, size=16, policy=SINGLES, samples="sentences", infinite=True)
    assert len(loader) == len(finite)
    found = []
    for batch in loader:
        found.append(batch.plan["sentence"].tolist())
        if len(found) == len(expected):
            break
    assert found == expected and loader.state_dict()["epoch"] == 2


def test_raw_and_cleaned_texts_have_tokens_of_their_own(files):
    raw, sent = (
        next(iter(Loader(files.dataset, batch_size=4, size=16, policy=SINGLES, text=text))).tokens
        for text in ("raw", "sent")
    )
    assert not torch.equal(raw, sent)
