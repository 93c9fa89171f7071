"""Exclusions as a user asks for them: what they leave out, and what the table says."""

import json

import numpy as np
import pytest

from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset, index_dataset
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.mining.exclusions import ALWAYS, Exclusions
from nemo_dali.mining.job import mine
from nemo_dali.mining.table import NegativeTable
from tests.helpers.files import index_refer
from tests.helpers.refer import write_refer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return index_refer(tmp_path_factory.mktemp("exclusions"))


def mined(dataset, clip, folder, **exclusions):
    weights = {"model": str(clip[0] / "tiny.json"), "pretrained": str(clip[0] / "tiny.pt"), "device": "cpu"}
    report = mine(dataset, output=folder / "a.neg.h5", exclusions=Exclusions(**exclusions), **weights)
    return NegativeTable.open(folder / "a.neg.h5"), report


def rows(table):
    return [set(row[row >= 0].tolist()) for row in np.asarray(table.neighbors)]


def others(dataset):
    """All photos but the own one, by sentence."""
    own = dataset.refs.image[dataset.sentences.ref]
    return [set(range(len(dataset.images.id))) - {photo} for photo in own.tolist()]


def test_without_exclusions_every_other_photo_is_there(dataset, clip, tmp_path):
    table, report = mined(dataset, clip, tmp_path)
    assert rows(table) == others(Dataset.open(dataset))
    assert table.exclusions == ALWAYS and report.short == 0


def test_similar_photos(dataset, clip, tmp_path):
    opened = Dataset.open(dataset)
    free, _ = mined(dataset, clip, tmp_path)
    image = np.asarray(free.image_embedding, np.float64)
    similarity = image @ image.T
    bound = float(np.median(similarity))
    table, report = mined(dataset, clip, tmp_path, similar_photos=bound)
    own = opened.refs.image[opened.sentences.ref]
    wanted = [every & set(np.flatnonzero(similarity[o] <= bound)) for every, o in zip(others(opened), own, strict=True)]
    assert rows(table) == wanted and report.short > 0
    assert "fewer candidates" in str(report)
    assert table.exclusions == [*ALWAYS, f"photos more similar than {float(bound)!r} to the own photo"]
    assert table.fingerprint != free.fingerprint


def test_the_targets_category(dataset, clip, tmp_path):
    opened = Dataset.open(dataset)
    table, _ = mined(dataset, clip, tmp_path, category=True)
    shown = opened.shown_categories()
    category = opened.refs.category[opened.sentences.ref]
    wanted = [every & set(np.flatnonzero(~shown[:, c])) for every, c in zip(others(opened), category, strict=True)]
    assert rows(table) == wanted and any(wanted) and wanted != others(opened)
    assert table.exclusions[-1] == "photos that show the target's category"


def test_photos_that_another_sentence_of_the_ref_finds(dataset, clip, tmp_path):
    opened = Dataset.open(dataset)
    free, _ = mined(dataset, clip, tmp_path)
    similarity = np.asarray(free.text_embedding, np.float64) @ np.asarray(free.image_embedding, np.float64).T
    bound = round(float(np.quantile(similarity, 0.7)), 4)
    table, _ = mined(dataset, clip, tmp_path, siblings=bound)
    ref, wanted = np.asarray(opened.sentences.ref), []
    for sentence, every in enumerate(others(opened)):
        siblings = (ref == ref[sentence]) & (np.arange(len(ref)) != sentence)
        wanted.append(every - set(np.flatnonzero((similarity[siblings] > bound).any(axis=0)).tolist()))
    assert rows(table) == wanted and wanted != others(opened)
    assert table.exclusions[-1] == f"photos more similar than {float(bound)!r} to another sentence of the ref"


def test_photos_of_another_data_set(dataset, clip, tmp_path):
    """By name, wherever they lie there."""

    def rename(refs, instances):
        for number, photo in enumerate(instances["images"]):
            if number % 2:
                photo["file_name"] = f"other_{photo['file_name']}"

    opened = Dataset.open(dataset)
    (tmp_path / "other").mkdir()
    other = write_refer(tmp_path / "other", photos=14, split="val")
    for number, photo in enumerate(other.instances["images"]):
        if number % 2:
            (other.photos / photo["file_name"]).rename(other.photos / f"other_{photo['file_name']}")
    rename(None, other.instances)
    (other.root / "refcoco" / "instances.json").write_text(json.dumps(other.instances))
    annotations = read_refer(other.root, dataset="refcoco", split_by="unc", split="val")
    index_dataset(annotations, images=other.photos, output=tmp_path / "val.ris.h5")
    common = {row for row, name in enumerate(opened.images.file_name) if name in annotations.images.file_name}
    assert len(common) == 7
    table, _ = mined(dataset, clip, tmp_path, photos_of=[tmp_path / "val.ris.h5"])
    assert rows(table) == [every - common for every in others(opened)]
    assert table.exclusions[-1].startswith("photos of refcoco-unc-val (") and table.exclusions[-1].endswith("): 7")


def test_without_categories_they_cannot_be_excluded(tmp_path, clip):
    def forget(refs, instances):
        instances["categories"] = []

    with pytest.raises(NemoError, match=r"No ref of .*train\.ris\.h5 has a category"):
        mined(index_refer(tmp_path, edit=forget), clip, tmp_path, category=True)


def test_other_files_than_data_sets_are_refused(dataset, clip, tmp_path):
    with pytest.raises(FileFormatError, match="nowhere"):
        mined(dataset, clip, tmp_path, photos_of=[tmp_path / "nowhere.ris.h5"])


@pytest.mark.parametrize("bound", [float("nan"), 1.5, -2])
@pytest.mark.parametrize("name", ["similar_photos", "siblings"])
def test_bounds_out_of_range(name, bound):
    with pytest.raises(ValueError, match=rf"{name} \("):
        Exclusions(**{name: bound})


def test_the_command_takes_them_all(dataset, clip, tmp_path):
    weights = ["--model", clip[0] / "tiny.json", "--pretrained", clip[0] / "tiny.pt"]
    rules = ["--exclude-similar-photos", 0.99, "--exclude-category", "--exclude-siblings", 0.5]
    words = ["mine", dataset, *weights, *rules, "--exclude-photos-of", dataset, "-o", tmp_path / "a.neg.h5"]
    assert main([str(word) for word in words]) == 0
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    assert len(table.exclusions) == 6 and (np.asarray(table.neighbors) == -1).all()  # its own photos are all there are
