"""Exclusions as a user asks for them: what they leave out, and what the table says."""

import numpy as np
import pytest

from nemo_dali.commands.cli import main
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining._inputs import Crops
from nemo_dali.mining.crops import CROPS, crop_box
from nemo_dali.mining.exclusions import ALWAYS, Exclusions
from nemo_dali.mining.job import mine
from nemo_dali.mining.table import NegativeTable, done, read_table
from tests.helpers.files import index_refer
from tests.helpers.forged import forge
from tests.helpers.tables import write_random_table


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


def make_twins(dataset, folder):
    """The data set with photos 2 and 5 of one content."""

    def edit(parts):
        parts.arrays["images/digest"][5] = parts.arrays["images/digest"][2]

    return forge(dataset, edit, folder / "twins.ris.h5")


@pytest.mark.parametrize("approximate", [False, True])
def test_copies_of_the_own_photo(dataset, clip, tmp_path, approximate):
    if approximate:
        pytest.importorskip("faiss")
    opened = Dataset.open(make_twins(dataset, tmp_path))
    weights = {"model": str(clip[0] / "tiny.json"), "pretrained": str(clip[0] / "tiny.pt"), "device": "cpu"}
    report = mine(
        opened.path, output=tmp_path / "a.neg.h5", approximate=approximate, probes=approximate or None, **weights
    )
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    own = opened.refs.image[opened.sentences.ref]
    wanted = [every - ({2, 5} if photo in (2, 5) else set()) for every, photo in zip(others(opened), own, strict=True)]
    assert rows(table) == wanted != others(opened) and {2, 5} & set().union(*rows(table)) == {2, 5}
    assert table.exclusions == [*ALWAYS, "copies of the own photo: 2 photos have some"]
    assert report.copies == 2 and "2 photos have copies under other names" in str(report)


def test_a_table_that_holds_copies_of_own_photos_is_told_once(dataset, clip, tmp_path, caplog):
    """As those that were made before they were left out, or by others."""
    twins = make_twins(dataset, tmp_path)
    write_random_table(tmp_path / "old.neg.h5", Dataset.open(twins))
    mined(twins, clip, tmp_path)
    for name, told in (("old.neg.h5", 1), ("a.neg.h5", 0)):
        caplog.clear()
        loader = Loader(twins, tmp_path / name, batch_size=2, size=32)
        loader.plan(0, np.arange(len(loader.dataset)))
        assert caplog.text.count("has copies of sentences' own photos among their negatives") == told
    assert "nemo-dali mine" not in caplog.text


def test_photos_all_but_one_with_another_are_told(dataset, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_dali.mining.job.NEAR_IDENTICAL", -1.0)
    table, report = mined(dataset, clip, tmp_path)
    assert report.near_identical == (14, 14) and rows(table) == others(Dataset.open(dataset))
    assert "14 of 14 photos are nearly identical to another (cosine 0.999 or more)" in str(report)
    assert "--exclude-similar-photos 0.998 leaves them out" in str(report)
    image = np.asarray(table.image_embedding)
    bound = float(np.median(image @ image.T))
    monkeypatch.setattr("nemo_dali.mining.job.NEAR_IDENTICAL", bound + 1e-6)
    _, report = mined(dataset, clip, tmp_path, similar_photos=bound)
    assert report.near_identical == (0, 0) and "nearly identical" not in str(report)


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


def test_photos_a_crop_of_which_is_as_near_as_the_own_photos(dataset, clip, tmp_path):
    import torch
    from PIL import Image

    from nemo_dali.mining.clip import load_clip

    opened = Dataset.open(dataset)
    model = load_clip(str(clip[0] / "tiny.json"), str(clip[0] / "tiny.pt"), device="cpu")
    free, _ = mined(dataset, clip, tmp_path)
    assert len(free.crop_embedding) == 0
    table, _ = mined(dataset, clip, tmp_path, crops=0.01)
    seen = []
    for row in range(len(opened.images.id)):
        photo = Image.open(opened.photo_path(row)).convert("RGB")
        seen += [model.transform(photo.crop(crop_box(*photo.size, place))) for place in range(CROPS)]
    with torch.inference_mode():
        expected = model.network.encode_image(torch.stack(seen), normalize=True).numpy()
    np.testing.assert_allclose(table.crop_embedding, expected, atol=2e-6)

    similarity = np.asarray(table.text_embedding, np.float64) @ np.asarray(table.crop_embedding, np.float64).T
    best = similarity.reshape(len(similarity), -1, CROPS).max(axis=2)
    own = opened.refs.image[opened.sentences.ref]
    out = best > best[np.arange(len(own)), own, None] - 0.01
    wanted = [every - set(np.flatnonzero(row).tolist()) for every, row in zip(others(opened), out, strict=True)]
    assert rows(table) == wanted and any(wanted) and wanted != others(opened)
    assert table.exclusions == [
        *ALWAYS,
        "photos with a crop less than 0.01 below the own photo's best, by similarity to the sentence",
    ]
    assert table.mapped.index.attributes["exclude_crops"] == [0.01]


def test_embeddings_of_crops_are_taken_from_a_table_that_has_them(dataset, clip, tmp_path):
    """Another margin needs no model, and gives the bytes that the model would."""
    mined(dataset, clip, tmp_path, crops=0.01)
    (tmp_path / "a.neg.h5").rename(tmp_path / "first.neg.h5")
    options = {"embeddings": tmp_path / "first.neg.h5", "device": "cpu"}
    again = mine(dataset, output=tmp_path / "again.neg.h5", exclusions=Exclusions(crops=-0.02), **options).output
    other, _ = mined(dataset, clip, tmp_path, crops=-0.02)
    found = NegativeTable.open(again)
    for name in ("neighbors", "similarity", "crop_embedding"):
        assert getattr(found, name).tobytes() == getattr(other, name).tobytes()
    plain = mine(dataset, output=tmp_path / "plain.neg.h5", **options).output
    assert len(NegativeTable.open(plain).crop_embedding) == 0
    with pytest.raises(NemoError, match=r"plain\.neg\.h5 has no embeddings of crops.* Mine with --model"):
        mine(dataset, output=tmp_path / "b.neg.h5", embeddings=plain, exclusions=Exclusions(crops=0.01))


def test_a_run_with_crops_goes_on_where_it_stood(dataset, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_dali.mining.embedding.ROUND_S", 0.0)
    whole, report = mined(dataset, clip, tmp_path, crops=0.01)
    whole.path.rename(tmp_path / "whole.neg.h5")
    assert "crops " in str(report)
    place = Crops.place

    def die(self, vectors, begin, embedding):
        if begin >= 64:
            raise KeyboardInterrupt
        place(self, vectors, begin, embedding)

    monkeypatch.setattr(Crops, "place", die)
    with pytest.raises(KeyboardInterrupt):
        mined(dataset, clip, tmp_path, crops=0.01)
    half = read_table(tmp_path / "a.neg.h5.partial")
    assert half.progress.tolist() == [14, len(set(Dataset.open(dataset).sentences.text)), 64, 0]
    assert "14 photos, 64 crops and" in done(half)
    with pytest.raises(FileFormatError, match="exclu"):
        mined(dataset, clip, tmp_path, crops=0.02)
    begins = []

    def record(self, vectors, begin, embedding):
        begins.append(begin)
        place(self, vectors, begin, embedding)

    monkeypatch.setattr(Crops, "place", record)
    mined(dataset, clip, tmp_path, crops=0.01)
    assert min(begins) == 64
    assert (tmp_path / "a.neg.h5").read_bytes() == (tmp_path / "whole.neg.h5").read_bytes()


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


@pytest.mark.parametrize("margin", [float("nan"), 2.5, -3])
def test_a_margin_out_of_range(margin):
    with pytest.raises(ValueError, match=r"crops \("):
        Exclusions(crops=margin)


def test_the_command_takes_them_all(dataset, clip, tmp_path, capsys):
    weights = ["--model", clip[0] / "tiny.json", "--pretrained", clip[0] / "tiny.pt"]
    rules = ["--exclude-similar-photos", 0.99, "--exclude-category", "--exclude-siblings", 0.5]
    rules += ["--exclude-crops", -1.5]
    opened = Dataset.open(dataset)

    def keep_three(parts):
        names = parts.strings("images/file_name")
        parts.set_strings("images/file_name", [name if row < 3 else f"x{row}.jpg" for row, name in enumerate(names)])
        parts.arrays["images/coco_id"][3:] = -1
        parts.arrays["images/digest"][3:] = 0

    forge(dataset, keep_three, tmp_path / "three.ris.h5")
    words = ["mine", dataset, *weights, *rules, "--exclude-photos-of", tmp_path / "three.ris.h5"]
    assert main([str(word) for word in [*words, "-o", tmp_path / "a.neg.h5"]]) == 0
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    assert len(table.exclusions) == 7 and not np.isin(table.neighbors, [0, 1, 2]).any()
    assert np.flatnonzero(table.excluded_photos).tolist() == [0, 1, 2] and len(opened.images.id) > 3
    said = capsys.readouterr().out
    assert "left out: photos of refcoco-unc-train (" in said and "): 3\n" in said
    short, none = ((np.asarray(table.neighbors)[:, place] < 0).sum() for place in (-1, 0))
    assert f"{short} sentences have fewer candidates than" in said and f"{none} of them none" in said
    assert main(["inspect", str(tmp_path / "a.neg.h5")]) == 0
    assert "photos with a crop less than -1.5 below the own photo's best" in " ".join(capsys.readouterr().out.split())


def test_a_data_set_without_a_photo_left_is_refused_before_the_work(dataset, clip, tmp_path):
    with pytest.raises(NemoError, match=r"All 14 photos of .* are among those to be left out"):
        mined(dataset, clip, tmp_path, photos_of=[dataset])
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_candidates_is_refused(dataset, clip, tmp_path):
    with pytest.raises(NemoError, match=r"No sentence has a candidate: .* Exclude less, and remove .*partial, or"):
        mined(dataset, clip, tmp_path, similar_photos=-1.0)
    assert not (tmp_path / "a.neg.h5").exists()


@pytest.mark.parametrize("what", ["id", "content", "name"])
def test_photos_of_other_data_sets_are_told_by_id_and_content_not_by_name(dataset, clip, tmp_path, what, caplog):
    """COCO calls a photo differently in 2014 and in 2017; two folders may have photos of one name."""

    def edit(parts):
        names = parts.strings("images/file_name")
        if what == "id":
            parts.set_strings("images/file_name", [f"train2017/{name.rpartition('_')[2]}" for name in names])
            parts.arrays["images/digest"][:] = 7
        elif what == "content":
            parts.set_strings("images/file_name", [f"kitchen/{row}.jpg" for row in range(len(names))])
            parts.arrays["images/coco_id"][:] = -1
        else:
            parts.arrays["images/coco_id"][:] = -1
            parts.arrays["images/digest"][:] = 7
        parts.arrays["images/coco_id"][4:] = -1
        parts.arrays["images/digest"][4:] = 9

    forge(dataset, edit, tmp_path / "other.ris.h5")
    table, _ = mined(dataset, clip, tmp_path, photos_of=[tmp_path / "other.ris.h5"])
    expected = [] if what == "name" else [0, 1, 2, 3]
    assert np.flatnonzero(table.excluded_photos).tolist() == expected
    assert ("has none of the photos of" in caplog.text) == (what == "name")
    own = np.isin(Dataset.open(dataset).refs.image, expected)
    assert (f"{own.sum()} of {len(own)} refs are of photos that are left out" in caplog.text) == (what != "name")
