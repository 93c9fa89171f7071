"""The contact sheet: what is drawn, where it should be."""

import numpy as np
import pytest

from nemo_dali.loader import contact_sheet as module
from nemo_dali.loader.contact_sheet import Cell, Sample, draw_panel, draw_sheet

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
