"""The contact sheet: drawn where it should be, true to the table, written whole or not at all."""

import os

import numpy as np
import pytest
from PIL import Image

from nemo_dali.commands import preview as module
from nemo_dali.commands.preview import preview
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.io import output
from nemo_dali.loader.contact_sheet import CAPTION, GAP, TITLE, draw_sheet
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.by_epoch import ByEpoch
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.forged import forge
from tests.helpers.tables import write_ranked_table


def test_preview_draws_what_the_loader_delivers(files, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        module, "draw_sheet", lambda samples, title: drawn.extend(samples) or draw_sheet(samples, title=title)
    )
    policy = MosaicPolicy(p_mined=0.6, p_random=0.2, grids={2: 0.5, 3: 0.5}, jitter=0.2)
    preview(files.dataset, files.negatives, output=tmp_path / "sheet.png", count=10, seed=3, policy=policy, size=96)
    loader = Loader(files.dataset, files.negatives, batch_size=5, seed=3, policy=policy, size=96, dtype="uint8")
    batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    loader.close()
    dataset, table = Dataset.open(files.dataset), NegativeTable.open(files.negatives)
    rows = np.concatenate([batch.plan for batch in batches])
    assert len(drawn) == len(rows) == 10
    assert len(set(rows["kind"])) == 3
    sentences = [sentence for batch in batches for sentence in batch.sentences]
    pixels = np.concatenate([batch.image.numpy() for batch in batches])
    masks = np.concatenate([batch.mask.numpy() for batch in batches])
    for panel, row, sentence, image, mask in zip(drawn, rows, sentences, pixels, masks, strict=True):
        assert panel.sentence == sentence == dataset.sentences.text[row["sentence"]]
        assert panel.kind == ("single", "random", "mined")[row["kind"]]
        assert np.array_equal(panel.image, image)
        assert np.array_equal(panel.mask, mask)
        if row["kind"] == 0:
            assert panel.cells == ()
            continue
        assert len(panel.cells) == row["grid"] ** 2
        for cell, photo in enumerate(row["images"][: len(panel.cells)]):
            shown = panel.cells[cell].similarity
            if cell == row["cell"]:
                assert shown is None
                x0, y0, x1, y1 = panel.cells[cell].box
                assert mask.any()
                assert mask[y0:y1, x0:x1].sum() == mask.sum()
            else:
                place = np.flatnonzero(table.neighbors[row["sentence"]] == photo)
                assert shown == table.similarity[row["sentence"], place[0]]


def test_the_sheet_is_of_the_epoch_that_is_asked_for(files, tmp_path, monkeypatch, caplog):
    policy = MosaicPolicy(
        p_mined=ByEpoch({0: 0.0, 3: 1.0}), top_k=ByEpoch({0: 9, 3: 4}), max_similarity=ByEpoch({0: None, 3: 0.2})
    )
    drawn, titles = [], []
    monkeypatch.setattr(
        module,
        "draw_sheet",
        lambda samples, title: titles.append(title) or drawn.append(samples) or draw_sheet(samples, title=title),
    )
    for epoch in ({}, {"epoch": 3}):
        preview(files.dataset, files.negatives, output=tmp_path / "a.png", count=50, policy=policy, size=16, **epoch)
    assert {panel.kind for panel in drawn[0]} == {"single"} and {panel.kind for panel in drawn[1]} == {"mined"}
    assert titles[0].startswith("epoch 0 · ") and "the first 9 of" in titles[0] and "no bound" in titles[0]
    assert "epoch 3 · " in titles[1] and "the first 4 of" in titles[1] and "similarity at most 0.2" in titles[1]
    said = "This policy has no mined mosaics in epoch 0. Choose another with --epoch: epoch 3 has the most."
    assert caplog.text.count("no mined mosaics") == 1 and said in caplog.text
    loader = Loader(files.dataset, files.negatives, batch_size=2, policy=policy.at(3), size=16)
    rows = np.concatenate([loader.plan(3, np.arange(48)), loader.plan(4, np.arange(2))])
    dataset, table = Dataset.open(files.dataset), NegativeTable.open(files.negatives)
    for panel, row in zip(drawn[1], rows, strict=True):
        assert panel.sentence == dataset.sentences.text[row["sentence"]]
        ranked = zip(table.neighbors[row["sentence"]], table.similarity[row["sentence"]].astype(float), strict=True)
        pool = [photo for photo, similarity in ranked if similarity <= 0.2][:4]
        for place, cell in enumerate(panel.cells):
            assert cell.outside == (place != row["cell"] and row["images"][place] not in pool)
    preview(files.dataset, files.negatives, output=tmp_path / "a.png", count=2, policy=MosaicPolicy(), size=16)
    assert "epoch" not in titles[2]
    preview(files.dataset, files.negatives, output=tmp_path / "a.png", count=2, size=16, epoch=7)
    assert titles[3].startswith("epoch 7 · ")
    with pytest.raises(ValueError, match="epoch"):
        preview(files.dataset, files.negatives, output=tmp_path / "a.png", count=2, size=16, epoch=-1)


def test_samples_without_a_target_and_negatives_outside_the_policy_are_marked(files, tmp_path, monkeypatch):
    def edit(parts):
        arrays = parts.arrays
        arrays["refs/empty"][::2] = 1
        ends = arrays["refs/rle_begin"] + arrays["refs/rle_count"]
        for begin, end in list(zip(arrays["refs/rle_begin"], ends, strict=True))[::2]:
            runs = arrays["rle/counts"][begin:end]
            runs[:] = [runs.sum(), *[0] * (len(runs) - 1)]

    dataset = Dataset.open(forge(files.dataset, edit, tmp_path / "data.ris.h5"), images=files.photos)
    table = write_ranked_table(tmp_path / "data.neg.h5", dataset, seed=2, shorten=True)
    policy = MosaicPolicy(p_mined=0.7, p_random=0.2, max_similarity=0.1, max_similarity_no_target=-0.1, top_k=5)
    drawn = []
    monkeypatch.setattr(module, "draw_sheet", lambda samples, title: drawn.extend(samples) or draw_sheet(samples))
    said = preview(dataset.path, table.path, output=tmp_path / "a.png", count=40, policy=policy, images=files.photos)
    loader = Loader(dataset.path, table.path, batch_size=4, policy=policy, images=files.photos, size=32)
    rows = loader.plan(0, np.arange(40))
    marks = {"no target": 0, "outside": 0, "unranked": 0}
    for panel, row in zip(drawn, rows, strict=True):
        assert panel.no_target == (row["ref"] % 2 == 0)
        marks["no target"] += panel.no_target
        ranked = list(
            zip(table.neighbors[row["sentence"]], table.similarity[row["sentence"]].astype(float), strict=True)
        )
        pool = [photo for photo, similarity in ranked if similarity <= (-0.1 if panel.no_target else 0.1)][:5]
        for place, cell in enumerate(panel.cells):
            photo = row["images"][place]
            assert cell.outside == (panel.kind == "mined" and place != row["cell"] and photo not in pool)
            marks["outside"] += cell.outside
            marks["unranked"] += cell.outside and cell.similarity is None
    assert min(marks.values()) > 2
    assert said == sum(any(cell.outside for cell in panel.cells) for panel in drawn) > 0
    enough = MosaicPolicy(p_mined=1)
    assert preview(files.dataset, files.negatives, output=tmp_path / "b.png", count=4, size=32, policy=enough) == 0


def test_preview_is_reproducible_and_the_seed_chooses_other_samples(files, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        preview(files.dataset, files.negatives, output=tmp_path / f"{name}.png", count=3, seed=seed, size=64)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (GAP + 3 * (64 + GAP), TITLE + 64 + CAPTION + GAP // 2)
    assert len(list(tmp_path.iterdir())) == 3


def test_more_samples_than_the_data_set_has_go_on_in_the_next_epoch(files, tmp_path):
    preview(files.dataset, files.negatives, output=tmp_path / "sheet.png", count=50, size=32)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] == GAP + 4 * (32 + GAP)
        assert sheet.size[1] == TITLE + 13 * (32 + CAPTION) + GAP // 2


@pytest.mark.parametrize(("photos", "grids"), [(2, {}), (4, {2: 1.0}), (8, {2: 1.0}), (9, {2: 0.7, 3: 0.3})])
def test_the_default_policy_fits_the_number_of_photos(photos, grids):
    policy = module._telling_policy(photos)
    assert policy.most_negatives < photos
    assert (policy.p_mined > 0.5) == bool(grids)
    assert not grids or policy.grids == grids


def test_bad_arguments_and_places(files, tmp_path):
    with pytest.raises(ValueError, match=r"count \(0\) must be"):
        preview(files.dataset, files.negatives, output=tmp_path / "sheet.png", count=0)
    with pytest.raises(ValueError, match=r"count \(an integer of 301 bits\) must be"):
        preview(files.dataset, files.negatives, output=tmp_path / "sheet.png", count=2**300)
    with pytest.raises(ValueError, match=r"must end in \.png"):
        preview(files.dataset, files.negatives, output=tmp_path / "sheet.jpg")
    with pytest.raises(NemoError, match="folder does not exist"):
        preview(files.dataset, files.negatives, output=tmp_path / "missing" / "sheet.png")
    with pytest.raises(NemoError, match="does not exist"):
        preview(tmp_path / "missing.ris.h5", files.negatives, output=tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_sheet_and_nothing_else(files, tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    preview(files.dataset, files.negatives, output=path, count=1, size=32)
    old, write = path.read_bytes(), os.write

    def half(descriptor, content):
        write(descriptor, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "write", half)
    with pytest.raises(NemoError, match="No space left on device"):
        preview(files.dataset, files.negatives, output=path, count=1, seed=1, size=32)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_sheet_is_replaced_and_that_is_told_before_the_work(files, tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    preview(files.dataset, files.negatives, output=path, count=1, size=32)
    old = path.read_bytes()
    preview(files.dataset, files.negatives, output=path, count=1, seed=1, size=32)
    assert path.read_bytes() != old
    monkeypatch.setattr(module, "draw_sheet", None)
    Image.new("RGB", (9, 9)).save(path)
    foreign = path.read_bytes()
    with pytest.raises(NemoError, match="it exists and is not a sheet"):
        preview(files.dataset, files.negatives, output=path, count=1, size=32)
    assert path.read_bytes() == foreign
    path.unlink()
    path.symlink_to(files.dataset)
    with pytest.raises(NemoError, match="it is the input"):
        preview(files.dataset, files.negatives, output=path, count=1, size=32)
