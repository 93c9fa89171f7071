"""The contact sheet: what is drawn, where it should be, and that it is what a loader delivers."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from nemo_dali import preview
from nemo_dali.errors import NemoError
from nemo_dali.loader import contact_sheet as module
from nemo_dali.loader.contact_sheet import Cell, Sample, draw_panel, draw_sheet
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.files import make_files

GREY = 128
SIDE = 200


def sample(*, box=(60, 50, 120, 100), sentence="small red ball", kind="single", cells=(), side=SIDE):
    """A grey frame whose target is the box x0, y0, x1, y1."""
    mask = np.zeros((side, side), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return Sample(np.full((3, side, side), GREY, np.uint8), mask, sentence, kind, cells)


QUARTERS = tuple(
    Cell((x, y, x + 100, y + 100), similarity)
    for (x, y), similarity in zip(((0, 0), (100, 0), (0, 100), (100, 100)), (0.31, 0.28, None, -0.002), strict=True)
)


def test_outline_lies_around_the_mask_and_the_inside_is_only_tinted():
    panel = np.asarray(draw_panel(sample(), SIDE)).astype(int)
    assert panel.shape == (SIDE, SIDE, 3)
    x, y = 90, 75  # the middle of the target
    target, dark = module.TARGET, (20, 20, 24)
    for steps, expected in ((1, target), (2, target), (3, dark), (4, (GREY,) * 3), (9, (GREY,) * 3)):
        for pixel in (panel[50 - steps, x], panel[99 + steps, x], panel[y, 60 - steps], panel[y, 119 + steps]):
            assert tuple(pixel) == expected
    tinted = [GREY * (1 - module.TINT) + c * module.TINT for c in target]
    assert np.allclose(panel[50:100, 60:120], tinted, atol=1.5)


def test_an_empty_mask_leaves_the_photo_as_it_is():
    panel = np.asarray(draw_panel(sample(box=(0, 0, 0, 0)), SIDE))
    assert (panel == GREY).all()


def test_cells_are_divided_and_only_known_similarities_are_written():
    plain = np.asarray(draw_panel(sample(kind="mined"), SIDE)).astype(int)
    panel = np.asarray(draw_panel(sample(kind="mined", cells=QUARTERS), SIDE)).astype(int)
    changed = (plain != panel).any(axis=2)
    assert changed[150, 98:102].sum() == 2
    assert changed[98:102, 150].sum() == 2
    assert (panel[150, 98:102][changed[150, 98:102]] == module.PAPER).all()
    changed[98:102] = changed[:, 98:102] = False
    for x, y, written in ((0, 0, True), (100, 0, True), (0, 100, False), (100, 100, True)):
        corner = changed[y : y + 30, x : x + 60]
        assert corner.any() == written
        if written:
            assert corner[8:24, 8:30].mean() > 0.8
    assert not changed[30:98, :].any()


def test_labels_differ_with_the_number_and_never_say_minus_zero():
    def label(similarity):
        cell = Cell((0, 0, SIDE, SIDE), similarity)
        return np.asarray(draw_panel(sample(cells=(cell,)), SIDE))[:30, :60]

    assert not np.array_equal(label(0.31), label(0.37))
    assert np.array_equal(label(0.314), label(0.31))
    assert np.array_equal(label(-0.002), label(0.0))


def test_large_frames_are_scaled_to_the_panel():
    big = sample(side=720, box=(216, 180, 432, 360), cells=tuple(Cell((x, 0, x + 360, 720), 0.5) for x in (0, 360)))
    panel = np.asarray(draw_panel(big, 360)).astype(int)
    assert panel.shape == (360, 360, 3)
    assert np.allclose(panel[135, 106], module.TARGET, atol=45)
    assert np.allclose(panel[135, 112:170], panel[135, 150], atol=1)
    assert tuple(panel[135, 95]) == (GREY,) * 3
    assert (panel[300, 178:182] == module.PAPER).any()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 9, 12, 13])
def test_every_sample_is_on_the_sheet(count):
    sheet = np.asarray(draw_sheet([sample(side=100, box=(10, 10, 30, 30), kind="mined") for _ in range(count)]))
    target = (sheet == module.TARGET).all(axis=2)
    one = (np.asarray(draw_panel(sample(side=100, box=(10, 10, 30, 30)), 100)) == module.TARGET).all(axis=2)
    assert target.sum() == count * one.sum()
    kinds = (sheet == module.KIND_COLOURS["mined"]).all(axis=2)
    assert kinds.sum() > 100 * count


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "   ",
        "x" * 5000,
        "word " * 2000,
        "le garçon à gauche",
        "左边的红色汽车",
        "🙂 עברית العربية",
        "a\nb\tc\x00d",
        "\x1b[2J \u202e \ud800 \udcff",
        "\u0301",
    ],
)
def test_any_sentence_can_be_drawn_and_stays_below_its_panel(sentence):
    samples = [sample(sentence=sentence), sample(sentence="")]
    sheet = np.asarray(draw_sheet(samples)).astype(int)
    without = np.asarray(draw_sheet([sample(sentence=""), sample(sentence="")])).astype(int)
    changed = (sheet != without).any(axis=2)
    assert changed[:, module.GAP + SIDE + 2 :].sum() == 0
    assert changed[: module.TITLE + SIDE].sum() == 0
    if sentence.strip() and sentence != "\u0301":
        assert changed.any()


def test_lines_are_broken_between_words_and_cut_with_an_ellipsis():
    font = module._font(16)
    assert module._fit("small red ball", font, [200, 200]) == ["small red ball"]
    width = font.getlength("small red")
    assert module._fit("small red ball", font, [width, 200]) == ["small red", "ball"]
    cut = module._fit("small red ball on the left of the green tree", font, [width, width])
    assert len(cut) == 2
    assert cut[1].endswith("…")
    assert all(font.getlength(line) <= width for line in cut)


def test_marks_are_drawn_in_colours_of_their_own():
    def drawn(colour, **facts):
        return (np.asarray(draw_sheet([sample(kind="mined", **facts)])) == colour).all(axis=2).sum()

    assert drawn(module.NO_TARGET) == drawn(module.OUTSIDE, cells=QUARTERS) == 0
    assert drawn(module.OUTSIDE, cells=(Cell((0, 0, 100, 100), 0.31, outside=True),)) > 500
    assert drawn(module.OUTSIDE, cells=(Cell((0, 0, 100, 100), None, outside=True),)) > 500
    marked = Sample(**{**vars(sample()), "no_target": True})
    assert ((np.asarray(draw_sheet([marked])) == module.NO_TARGET).all(axis=2)).sum() > 500


def test_what_would_turn_a_line_round_is_drawn_as_its_number():
    width = [10_000]
    assert module._fit("a\x1b[2J\u202eb\u200d\x00", module._font(16), width) == ["a\\x1b[2J\\u202eb\\u200d\\x00"]
    assert module._fit("a\nb\u2028c\x85d", module._font(16), width) == ["a b c d"]


# --- of a loader ------------------------------------------------------------------------------------------------------

EVERY_KIND = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 0.5, 3: 0.5}, jitter=0.3)


def make(files, **options):
    return Loader(files.dataset, files.negatives, **{"batch_size": 5, "size": 48, "policy": EVERY_KIND, **options})


def equal(one, other):
    pixels = np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)
    facts = [(sample.sentence, sample.kind, [cell.box for cell in sample.cells]) for sample in (one, other)]
    return pixels and facts[0] == facts[1]


@pytest.mark.parametrize(
    "options",
    [{"dtype": dtype} for dtype in ("float32", "float16", "bfloat16")] + [{"style": "rela"}, {"preset": "cris"}],
)
def test_a_loaders_next_samples_are_those_that_it_delivers(files, options):
    plain = make(files, **{**options, "dtype": "uint8", "mask_dtype": "uint8", "style": "batch"})
    batches = [batch for batch, _ in zip(plain, range(3), strict=False)]
    loader = make(files, **options)
    shown = loader.next_samples(12)
    assert len(shown) == 12 and {one.kind for one in shown} == {"single", "mined", "random"}
    pixels = np.concatenate([batch.image.numpy() for batch in batches])
    masks = np.concatenate([batch.mask.numpy() for batch in batches])
    rows = np.concatenate([batch.plan for batch in batches])
    sentences = [sentence for batch in batches for sentence in batch.sentences]
    for index, one in enumerate(shown):
        rounding = 1 if options.get("dtype") in ("float16", "bfloat16") else 0
        coarse = 3 if options.get("dtype") == "bfloat16" else rounding
        assert np.abs(one.image.astype(int) - pixels[index]).max() <= coarse and one.image.dtype == np.uint8
        assert np.array_equal(one.mask, masks[index])
        assert one.sentence == sentences[index] and len(one.cells) == (rows[index]["grid"] ** 2 if one.cells else 0)
        if one.cells:
            x0, y0, x1, y1 = one.cells[rows[index]["cell"]].box
            assert one.mask[y0:y1, x0:x1].sum() == one.mask.sum() > 0
    image = preview(loader, 12)
    assert isinstance(image, Image.Image) and np.array_equal(image, draw_sheet(shown))


def test_a_preview_takes_nothing_from_a_pass(files):
    undisturbed = make(files)
    expected = [batch.plan.tobytes() for _ in range(2) for batch in undisturbed]
    loader = make(files)
    delivered, last = [], len(loader) - 1
    for _ in range(2):
        for step, batch in enumerate(loader):
            delivered.append(batch.plan.tobytes())
            if step in (1, last):  # behind the last step the next epoch's first samples are shown
                at = loader.state_dict()
                follows = len(delivered)
                assert len(loader.next_samples(7)) == 7
                assert loader.state_dict() == at and len(delivered) == follows
    assert delivered == expected
    first, *_ = make(files).next_samples(1)
    again = make(files)
    list(again)
    assert not equal(first, again.next_samples(1)[0])
    again.set_epoch(0)
    assert equal(first, again.next_samples(1)[0])


def picture(html):
    encoded = re.search('src="data:image/jpeg;base64,([^"]+)"', html)[1]
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_a_notebook_shows_a_batch_and_a_loader(files, monkeypatch):
    loader = make(files)
    batch = next(iter(loader))
    html = batch._repr_html_()
    assert "5 x 3 x 48 x 48" in html and "torch.float32" in html
    assert picture(html).size == draw_sheet(batch.samples()).size
    html = loader._repr_html_()
    assert "48 samples" in html and "p_mined 0.5" in html and picture(html).size == draw_sheet(batch.samples(4)).size
    monkeypatch.setattr(type(batch), "sentences", ['<script>"&' for _ in range(5)])
    assert "<script>" not in batch._repr_html_() and "&lt;script&gt;&quot;&amp;" in batch._repr_html_()


def test_a_loader_that_cannot_make_its_next_batch_is_shown_with_the_reason(tmp_path):
    files = make_files(tmp_path, photos=12)
    for photo in files.photos.iterdir():
        photo.write_bytes(b"<b>")
    html = make(files)._repr_html_()
    assert "48 x 48, float32" in html and "<img" not in html and "--skip-corrupt" in html


def test_what_cannot_be_previewed(files):
    loader = make(files)
    for count in (0, 1.5):
        with pytest.raises((ValueError, TypeError), match="count"):
            preview(loader, count)
    idle = make(files, policy=None, split_mode="eval", rank=1, world_size=2, batch_size=200, samples="first")
    with pytest.raises(NemoError, match="no samples"):
        preview(idle)
