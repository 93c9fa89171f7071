"""The report: what is in the page, and how it behaves in a real browser."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from nemo_dali.commands.cli import main
from nemo_dali.commands.report.page import _picture, _shown_ranks, json_in_html, report
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import NemoError
from nemo_dali.io.output import partial_name
from nemo_dali.kernels.plan.draws import window as window_of
from nemo_dali.kernels.plan.pools import pool_begins, valid_ends
from nemo_dali.mining.pool_curves import measure_curves
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.tune import propose
from nemo_dali.plan.policy import MosaicPolicy, write_policy
from nemo_dali.synthetic import synthesize
from nemo_dali.synthetic.false_negatives import false_negatives
from nemo_dali.synthetic.truth import Truth
from tests.helpers.browser import CHROMIUM, refuse
from tests.helpers.files import index_grefs, index_refer
from tests.helpers.tables import write_ranked_table
from tests.helpers.turned import index_turned, write_turned

NASTY = "</script><script>document.title='taken'</script><b>\"'& ü<!--<script>/*PLOTLY*//*DATA*/\u2028]]>\x9b"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of 90 photos with a table; some sentences would break out of a careless page."""
    folder = tmp_path_factory.mktemp("report")

    def edit(refs, instances):
        for ref in refs[::4]:
            ref["sentences"][0]["sent"] = NASTY

    dataset = Dataset.open(index_refer(folder, photos=90, edit=edit))
    return dataset, write_ranked_table(folder / "a.neg.h5", dataset)


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    dataset, table = data
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(dataset.path, table.path, output=path, examples=20)
    return path


class _Page(html.parser.HTMLParser):
    """Its scripts, and what its elements ask the network for."""

    def __init__(self):
        super().__init__()
        self.scripts, self.addresses, self.inside = [], [], False

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


def content(path):
    parsed = _Page()
    parsed.feed(path.read_text(encoding="utf-8"))
    assert len(parsed.scripts) == 3 and parsed.addresses == []
    return json.loads(parsed.scripts[1])


def test_the_page_holds_the_curves_and_pictures(data, page):
    dataset, table = data
    curves = measure_curves(dataset, table)
    proposal = propose(curves)
    found = content(page)
    assert found["taus"] == curves.taus.tolist() and found["ks"] == curves.ks.tolist()
    for name, values in (
        ("short", curves.short3),
        ("shown", curves.shown),
        ("size", curves.size),
        ("never", curves.never),
    ):
        given = np.array([[np.nan if x is None else x for x in row] for row in found["metrics"][name]])
        np.testing.assert_allclose(given, values, atol=5.1e-5)
    assert (found["proposal"]["t"], found["proposal"]["c"]) == (proposal.t, proposal.c)
    assert found["proposal"]["why"][:-1] == list(proposal.why)
    assert [d["name"] for d in found["distributions"]] == ["own photo", "rank 1", "rank 10", "rank 89", "any photo"]
    for distribution in found["distributions"]:
        step = found["bins"][1] - found["bins"][0]
        assert sum(distribution["density"]) * step == pytest.approx(1, abs=0.02)
    assert "90 photos" in found["about"] and "random with none" in found["about"]

    assert len({example["row"] for example in found["examples"]}) == 20
    for example in found["examples"]:
        row = example["row"]
        assert example["sentence"] == dataset.sentences.text[row] and example["valid"] == 89
        assert [rank for rank, *_ in example["candidates"]] == _shown_ranks(89)
        for rank, similarity, photo in example["candidates"]:
            assert photo == table.neighbors[row, rank - 1]
            assert similarity == pytest.approx(float(table.similarity[row, rank - 1]), abs=1e-4)
        begins = [(np.asarray(table.similarity[row]) > tau).sum() for tau in curves.taus]
        assert example["begins"] == begins
    shown = {str(photo) for example in found["examples"] for *_, photo in example["candidates"]}
    assert shown <= found["thumbs"].keys() and found["unread"] == ""
    width, height = dataset.images.width, dataset.images.height
    for photo, address in list(found["thumbs"].items())[:20]:
        picture = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
        assert picture.size[0] / picture.size[1] == pytest.approx(width[int(photo)] / height[int(photo)], rel=0.05)


def test_sentences_without_a_target_are_shown_apart(tmp_path):
    dataset = Dataset.open(index_grefs(tmp_path, photos=40))
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset)
    proposal = report(dataset.path, table.path, output=tmp_path / "r.html", examples=8).proposal
    curves, found = measure_curves(dataset, table), content(tmp_path / "r.html")
    assert found["proposal"]["n"] == proposal.t_no_target is not None
    np.testing.assert_allclose(found["no_target"]["short"], curves.no_target.short3, atol=5.1e-5)
    assert found["policy"]["max_similarity_no_target"] == proposal.policy.max_similarity_no_target
    assert f"{len(curves.no_target.rows)} without a target are apart" in found["looked"]
    empty = dataset.refs.empty[dataset.sentences.ref]
    assert [example["no_target"] for example in found["examples"]] == [
        bool(empty[example["row"]]) for example in found["examples"]
    ]
    assert sum(example["no_target"] for example in found["examples"]) == 2 and len(found["examples"]) == 8


def test_nothing_in_the_data_ends_the_script_or_begins_another():
    value = [NASTY, "/*DATA*/", "<!--<script>"]
    text = json_in_html(value)
    assert json.loads(text) == value and text.isascii() and not set(text) & set("<>&\x7f")


def test_only_a_report_is_replaced_and_that_is_told_before_the_work(data, page, tmp_path, monkeypatch):
    dataset, table = data
    path = tmp_path / "r.html"
    shutil.copy(page, path)
    partial_name(path).write_bytes(page.read_bytes()[:100_000])  # as a killed run leaves it
    report(dataset.path, table.path, output=path, examples=1)
    assert len(content(path)["examples"]) == 1 and [*tmp_path.iterdir()] == [path]
    monkeypatch.setattr("nemo_dali.commands.report.page.measure_curves", None)
    path.write_text("<!doctype html><title>My thesis</title>")
    before = path.read_bytes()
    with pytest.raises(NemoError, match="it exists and is not a report"):
        report(dataset.path, table.path, output=path)
    partial_name(tmp_path / "new.html").write_text("mine")
    with pytest.raises(NemoError, match=r"new\.html\.partial is not an unfinished file"):
        report(dataset.path, table.path, output=tmp_path / "new.html")
    assert path.read_bytes() == before and partial_name(tmp_path / "new.html").read_text() == "mine"


def test_the_target_is_outlined(data, page):
    dataset, _ = data
    example = content(page)["examples"][0]
    ref = int(dataset.sentences.ref[example["row"]])
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(example["photo"].split(",")[1]))), int)
    mask = dataset.mask(ref)
    assert picture.shape[:2] == mask.shape  # smaller than the page shows, so not resized
    photo = np.asarray(Image.open(dataset.photo_path(int(dataset.refs.image[ref]))).convert("RGB"), int)
    changed = np.abs(picture - photo).max(axis=2) > 60
    inside = mask.astype(bool)
    near = np.zeros_like(inside)
    for y, x in np.argwhere(inside):
        near[max(y - 6, 0) : y + 7, max(x - 6, 0) : x + 7] = True
    assert changed[near].mean() > 0.05 and changed[~near].mean() < 0.01


def test_photos_that_exif_turns_are_shown_upright(tmp_path):
    made = write_turned(tmp_path)
    turned = Dataset.open(index_turned(made, "apply").dataset)
    upright = Dataset.open(index_turned(made, "refuse", upright=True).dataset)
    for row in range(20):
        assert _picture(turned, row, None) == _picture(upright, row, None) != ""
        assert _picture(turned, None, row) == _picture(upright, None, row) != ""


def test_masks_are_those_of_the_annotations(data):
    from pycocotools import mask as coco

    dataset, _ = data
    for ref in range(0, len(dataset.refs.image), 7):
        row = dataset.refs.image[ref]
        size = [int(dataset.images.height[row]), int(dataset.images.width[row])]
        begin = dataset.refs.rle_begin[ref]
        runs = dataset.rle_counts[begin : begin + dataset.refs.rle_count[ref]].tolist()
        np.testing.assert_array_equal(
            dataset.mask(ref), coco.decode(coco.frPyObjects({"size": size, "counts": runs}, *size))
        )


def test_ranks_with_a_picture():
    assert _shown_ranks(5) == [1, 2, 3, 4, 5]
    for width in (48, 49, 300, 5000):
        ranks = _shown_ranks(width)
        assert ranks[:48] == list(range(1, 49)) and ranks[-1] == width and len(ranks) <= 121
        assert ranks == sorted(set(ranks))


def test_photos_that_cannot_be_read_are_left_blank(data, tmp_path):
    dataset, table = data
    shutil.copytree(dataset.image_root, tmp_path / "photos")
    victims = dataset.images.file_name[4], dataset.images.file_name[8]
    (tmp_path / "photos" / victims[0]).unlink()
    (tmp_path / "photos" / victims[1]).write_bytes(b"no photo")
    report(dataset.path, table.path, output=tmp_path / "r.html", examples=60, images=tmp_path / "photos")
    found = content(tmp_path / "r.html")
    assert not {"4", "8"} & found["thumbs"].keys()
    count = int(re.match(r"(\d+) photos could not be read", found["unread"])[1])
    blank = sum(example["photo"] == "" for example in found["examples"])
    own = dataset.refs.image[dataset.sentences.ref[[example["row"] for example in found["examples"]]]]
    assert blank == np.isin(own, [4, 8]).sum() and count == 2 + blank


def test_the_command(data, tmp_path, capsys):
    dataset, table = data
    words = ["report", str(dataset.path), str(table.path), "--examples", "3", "--seed", "4", "--passing", "0.4"]
    assert main([*words, "-o", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    assert "open it in a browser" in out and propose(measure_curves(dataset, table), passing=0.4).why[0] in out
    found = content(tmp_path / "r.html")
    assert len(found["examples"]) == 3 and found["passing"] == 0.4
    assert main([*words, "-o", str(tmp_path / "nowhere" / "r.html")]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
    for wrong in ([*words, "-o", "r.pdf"], [*words, "--examples", "0", "-o", str(tmp_path / "r.html")]):
        with pytest.raises(SystemExit):
            main(wrong)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Generated data, their data set file and a table."""
    folder = tmp_path_factory.mktemp("generated")
    synthesize(folder / "data", images=40, seed=2)
    annotations = read_refer(folder / "data", dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=folder / "data/images/mscoco/images/train2014", output=folder / "a.ris.h5")
    write_ranked_table(folder / "a.neg.h5", Dataset.open(folder / "a.ris.h5"))
    return folder


def test_false_negatives_are_told_where_the_truth_is_known(generated, tmp_path, capsys):
    files = generated / "a.ris.h5", generated / "a.neg.h5"
    words = ["report", *map(str, files), "-o", str(tmp_path / "r.html"), "--examples", "1"]
    assert main(words) == 0
    assert content(tmp_path / "r.html")["truth"] == "" and "words fit" not in capsys.readouterr().out
    truth, proposed = (
        Truth.read(generated / "data"),
        propose(measure_curves(Dataset.open(files[0]), NegativeTable.open(files[1]))),
    )
    by_hand = MosaicPolicy(top_k=3, max_similarity=0.1)
    write_policy(tmp_path / "p.json", by_hand, tuned_for="a" * 64, why=[])
    for more, policy, named in (
        ([], proposed.policy, "the proposed policy"),
        (["--policy", str(tmp_path / "p.json")], by_hand, str(tmp_path / "p.json")),
    ):
        assert main([*words, "--truth", str(generated / "data"), *more]) == 0
        told, lines = str(false_negatives(*files, truth, policy=policy)), capsys.readouterr().out.splitlines()
        assert lines[-len(told.splitlines()) :] == told.splitlines()
        assert f"False negatives under {named}, " in lines[-len(told.splitlines()) - 1]
        assert content(tmp_path / "r.html")["truth"] == told


def test_a_truth_or_a_policy_that_cannot_be_used(generated, tmp_path, capsys):
    files = str(generated / "a.ris.h5"), str(generated / "a.neg.h5")
    words = ["report", *files, "-o", str(tmp_path / "r.html")]
    synthesize(tmp_path / "other", images=2, seed=3)
    (tmp_path / "p.json").write_text("[]")
    for more, told in (
        (["--truth", str(tmp_path)], "has no truth.json of a generated data set. Give the folder that"),
        (["--truth", str(tmp_path / "none")], "none cannot be read: No such file"),
        (["--truth", str(tmp_path / "other")], "does not have"),
        (["--truth", str(generated / "data"), "--policy", str(tmp_path / "p.json")], "p.json cannot be used"),
    ):
        assert main([*words, *more]) == 1
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--policy", str(tmp_path / "p.json")])
    assert "must be left out without --truth" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_another_data_set_is_refused_and_nothing_is_written(data, tmp_path):
    _, table = data
    other = index_refer(tmp_path / "other", photos=9) if (tmp_path / "other").mkdir() is None else None
    with pytest.raises(NemoError, match="a different data set"):
        report(other, table.path, output=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tab(browser, page):
    """The page, opened; what it complains of or asks for."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.problems = []
    tab.on("console", lambda message: tab.problems.append(message.text))
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on("request", lambda request: tab.problems.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.ready")
    yield tab
    assert tab.problems == []
    tab.close()


def slide(tab, slider, value):
    tab.evaluate(
        f"const s = document.getElementById('{slider}'); s.value = {value}; s.dispatchEvent(new Event('input'))"
    )


def window(tab, example):
    """The ranks of an example's candidates that are above tau, in the pool and beyond it."""
    boxes = tab.locator(".example").nth(example).locator(".strip div")
    classes = boxes.evaluate_all("boxes => boxes.map(box => [box.className, parseInt(box.innerText)])")
    return {name: [rank for kind, rank in classes if kind == name] for name in ("high", "in", "low")}


def call_on_page(function, calls, page, request):
    """What a function of the page gives for each list of arguments: in Chromium; where there is none, in Node.js."""
    if CHROMIUM:
        tab = request.getfixturevalue("browser").new_page()
        tab.goto(page.as_uri())
        results = tab.evaluate(f"calls => calls.map(given => {function}(...given))", calls)
        tab.close()
        return results
    node = shutil.which("node") or refuse("needs Chromium or Node.js")
    (source,) = re.findall(rf"(?ms)^function {function}\(.*?^}}$", page.read_text(encoding="utf-8"))
    script = f"{source}\nconsole.log(JSON.stringify({json.dumps(calls)}.map((given) => {function}(...given))))"
    return json.loads(subprocess.run([node, "-"], input=script, capture_output=True, text=True, check=True).stdout)


def test_the_page_shows_false_negatives_where_the_truth_is_known(generated, tmp_path, tab, browser):
    assert not tab.is_visible("#truth")
    files = generated / "a.ris.h5", generated / "a.neg.h5"
    told = report(*files, output=tmp_path / "r.html", examples=1, truth=generated / "data").false_negatives
    other = browser.new_page()
    other.goto((tmp_path / "r.html").as_uri())
    other.wait_for_function("document.body.dataset.ready")
    assert other.is_visible("#truth") and other.inner_text("#truth").strip() == str(told).strip()
    other.close()


def test_the_page_and_the_plan_have_one_window(page, request):
    """For ties, short and empty rows, any bound or none, any K, and a row that holds the sentence's own photo."""
    rng, calls, expected = np.random.default_rng(5), [], []
    taus = [-0.2, 0.0, 0.1, 0.2, 0.3, 0.5, np.inf]
    for _ in range(3000):
        width = int(rng.integers(1, 12))
        valid = int(rng.integers(0, width + 1))
        similarity = np.full(width, -np.inf, np.float32)
        similarity[:valid] = np.sort(rng.choice(np.float32([-0.1, 0.0, 0.1, 0.3, 0.30000001, 0.4]), valid))[::-1]
        neighbors = np.full(width, -1, np.int32)
        neighbors[:valid] = rng.permutation(20)[:valid]
        t, k, need, own = (int(rng.integers(most)) for most in (len(taus), 15, 9, 20))
        place = neighbors.tolist().index(own) if own in neighbors else -1
        begins = [int(pool_begins(similarity[None], tau)[0]) for tau in taus]
        calls.append([begins, t, int(valid_ends(similarity[None])[0]), k + 1, need, place])
        begin, end, _, short = window_of(neighbors, similarity, k + 1, taus[t], need, own)
        expected.append({"begin": begin, "end": end, "short": bool(short)})
    assert call_on_page("windowOf", calls, page, request) == expected
    assert 0.2 < np.mean([window["short"] for window in expected]) < 0.8


def test_the_window_and_the_mosaic_follow_the_sliders(tab, page):
    found = content(page)
    last = len(found["taus"]) - 1
    for t, c in ((found["proposal"]["t"], found["proposal"]["c"]), (last, 0), (last // 2, 4), (last // 3, 7), (0, 1)):
        slide(tab, "tau", t)
        slide(tab, "k", c)
        assert tab.locator("#k-value").inner_text() == str(found["ks"][c])
        shown = tab.locator("#tau-value").inner_text()
        assert shown == "none" if t == last else float(shown) == found["taus"][t]
        for number in (0, 5):
            example = found["examples"][number]
            begin = example["begins"][t]
            end = min(begin + found["ks"][c], example["valid"])
            ranks = [rank for rank, *_ in example["candidates"]]
            assert window(tab, number) == {
                "high": [rank for rank in ranks if rank <= begin],
                "in": [rank for rank in ranks if begin < rank <= end],
                "low": [rank for rank in ranks if rank > max(end, begin)],
            }
            mosaic = tab.locator(".example").nth(number).locator(".mosaic img")
            cells = mosaic.evaluate_all("images => images.map(image => [image.dataset.rank, image.src])")
            of_rank = {str(rank): found["thumbs"][str(photo)] for rank, _, photo in example["candidates"]}
            assert sorted(rank == "own" for rank, _ in cells) == [False, False, False, True]
            for rank, source in cells:
                assert source == (example["photo"] if rank == "own" else of_rank[rank])
            inside = [rank for rank in ranks if begin < rank <= end]
            if len(inside) >= 3:
                assert all(rank == "own" or int(rank) in inside for rank, _ in cells)
        facts = tab.locator("#facts").inner_text()
        assert f"{100 * found['true_below'][t]:.1f} %" in facts
        assert f"{100 * found['metrics']['short'][t][c]:.1f} %" in facts
        value = "None" if t == last else f"{found['taus'][t]:g}"
        use = tab.locator("#use").inner_text()
        assert float(re.search(r"max_similarity=([\d.-]+)", use)[1]) == found["taus"][t] if t < last else value in use
        assert f"top_k={found['ks'][c]})" in use
        policy = json.loads(use.splitlines()[-1])
        assert policy["top_k"] == found["ks"][c] and policy["p_mined"] == 0.5


def test_sentences_without_a_target_have_a_slider_of_their_own(browser, tmp_path):
    dataset = Dataset.open(index_grefs(tmp_path, photos=40))
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset)
    report(dataset.path, table.path, output=tmp_path / "r.html", examples=8)
    found = content(tmp_path / "r.html")
    tab = browser.new_page()
    tab.goto((tmp_path / "r.html").as_uri())
    tab.wait_for_function("document.body.dataset.ready")
    assert tab.locator("#other").is_visible()
    slide(tab, "tau", len(found["taus"]) - 1)
    for n in (0, len(found["taus"]) // 2):
        slide(tab, "n", n)
        for number, example in enumerate(found["examples"]):
            begin = example["begins"][n if example["no_target"] else -1]
            assert window(tab, number)["high"] == [rank for rank, *_ in example["candidates"] if rank <= begin]
        policy = json.loads(tab.locator("#use").inner_text().splitlines()[-1])
        assert policy["max_similarity_no_target"] == found["taus"][n] and policy["max_similarity"] is None
    tab.close()


def test_other_negatives_can_be_drawn_and_the_proposal_comes_back(tab, page):
    found = content(page)
    slide(tab, "k", len(found["ks"]) - 1)
    slide(tab, "tau", len(found["taus"]) - 1)
    images = tab.locator(".example").first.locator(".mosaic img")
    before = images.evaluate_all("images => images.map(image => image.dataset.rank)")
    seen = {tuple(before)}
    for _ in range(5):
        tab.locator("#again").click()
        seen.add(tuple(images.evaluate_all("images => images.map(image => image.dataset.rank)")))
    assert len(seen) > 3
    tab.locator("#back").click()
    ready = tab.evaluate("document.body.dataset.ready").split(",")
    assert [int(x) for x in ready[:2]] == [found["proposal"]["t"], found["proposal"]["c"]]


def test_charts_are_drawn_and_a_click_on_the_map_chooses(tab, page):
    found = content(page)
    for chart in ("distribution", "ranks", "wrong", "draws", "map"):
        assert tab.locator(f"#{chart} .main-svg").count() >= 1
        assert tab.locator(f"#{chart} path, #{chart} image").count() > 2
    for metric in tab.locator("#metric option").evaluate_all("options => options.map(option => option.value)"):
        tab.locator("#metric").select_option(metric)
        z = tab.evaluate("document.getElementById('map').data[0].z")
        assert [list(column) for column in zip(*z, strict=True)] == found["metrics"][metric]
    tab.locator("#map").scroll_into_view_if_needed()
    box = tab.locator("#map .nsewdrag").first.bounding_box()
    tab.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 0.2 * box["height"])
    tab.wait_for_function("Number(document.getElementById('k').value) > document.getElementById('k').max / 2")
    t, c = int(tab.locator("#tau").input_value()), int(tab.locator("#k").input_value())
    assert t > 0.6 * len(found["taus"]) and c > 0.6 * len(found["ks"])


def test_a_sentence_is_text_and_nothing_else(tab, page):
    assert tab.title() == "How hard are the negatives?"
    quotes = tab.locator(".own q").evaluate_all("quotes => quotes.map(quote => quote.textContent)")
    assert NASTY in quotes and len(quotes) == 20


def test_the_page_fits_a_phone(browser, page):
    tab = browser.new_page(viewport={"width": 420, "height": 800})
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.ready")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 420
    tab.close()
