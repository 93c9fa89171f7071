"""The demo in small: every step of it runs, its numbers are those of its files, its training learns something."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from nemo_dali.commands import demo as module
from nemo_dali.commands import demo_page
from nemo_dali.commands.cli import main
from nemo_dali.commands.demo import MARKER, run_demo, train_clip
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import read_policy

SMALL = {"images": 60, "steps": 15, "loader_batches": 2}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "below" / "demo"
    with redirect_stdout(io.StringIO()) as said:
        run_demo(out, **SMALL)
    return out, said.getvalue()


@pytest.mark.slow
def test_a_demo_makes_everything_and_says_so(demo):
    out, said = demo
    made = {"clip.json", "clip.pt", "train.ris.h5", "val.ris.h5", "train.neg.h5", "val.neg.h5", "mosaics.png", "data"}
    made |= {"policy.json", "report.html", "index.html"}
    assert {path.name for path in out.iterdir()} == made | {MARKER}
    dataset, table = Dataset.open(out / "train.ris.h5"), NegativeTable.open(out / "train.neg.h5")
    table.check_dataset(dataset)
    assert len(dataset.images.id) == 47
    assert f"Mined negatives for {len(dataset.sentences.ref)} expressions" in said
    assert re.search(r"training split: +median rank \d+ of 47 \(by chance 24\), among the first ten for \d+% ", said)
    assert re.search(r"validation split: +median rank \d+ of 5 \(by chance 2\)", said)
    policy, tuned_for = read_policy(out / "policy.json")
    assert tuned_for == table.fingerprint and f"Proposed tau {policy.max_similarity} and K {policy.top_k}" in said
    assert (out / "report.html").stat().st_size > 1_000_000
    assert re.search(r"Loaded 2 batches .* \d+ samples/s", said)
    same, base = map(
        int,
        re.search(r"(\d+)% of an expression's first 20 negatives show .*, and (\d+)% of all photos do", said).groups(),
    )
    assert 0 <= same <= 100
    assert 10 <= base <= 60
    assert "nemo-dali index REFER_ROOT" in said
    with Image.open(out / "mosaics.png") as sheet:
        assert sheet.size[0] > 1000
    page = (out / "index.html").read_text()
    assert all((out / name).exists() for name in re.findall(r'(?:src|href)="([^"]+)"', page)) and "mosaics.png" in page
    assert f"<li>Mined negatives for {len(dataset.sentences.ref)} expressions" in page and "median rank" in page
    assert all(command in page and f"  {command}\n" in said for command in module.NEXT)
    cached = re.search("Compiled kernels are cached, the mosaic's in (.*): later", said)[1]
    assert any(Path(cached).glob("*.nbi"))
    assert f"Look at {out / 'index.html'} in a browser." in said and "benchmarks/effect.py" in said


@pytest.mark.slow
def test_training_learns_and_is_reproducible(demo, tmp_path):
    dataset = Dataset.open(demo[0] / "train.ris.h5")
    first = train_clip(dataset, tmp_path / "a.pt", steps=5)
    again = train_clip(dataset, tmp_path / "b.pt", steps=5)
    assert (first.steps, first.batch) == (5, 47)
    assert (first.first_loss, first.last_loss) == (again.first_loss, again.last_loss)
    longer = train_clip(dataset, tmp_path / "c.pt", steps=30)
    assert longer.last_loss < 0.85 * longer.first_loss


@pytest.mark.parametrize(("words", "steps"), [([], 400), (["--steps", "2000"], 2000)])
def test_the_clip_model_may_be_trained_longer(words, steps, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "run_demo", lambda out, **options: asked.append((out, options)) or out / "index.html")
    assert main(["demo", "--out", str(tmp_path), *words]) == 0
    assert asked == [(tmp_path, {"steps": steps})]
    assert module.longest_training(steps) == 110 * steps / 400 and module.longest_training(5) == 110


@pytest.mark.parametrize("there_is_one", [True, False])
def test_the_page_is_opened_in_a_browser(there_is_one, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(module, "run_demo", lambda out, **_: out / "index.html")
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or there_is_one)
    assert main(["demo", "--out", str(tmp_path), "--open"]) == (not there_is_one)
    assert opened == [(tmp_path / "index.html").as_uri()]
    assert ("There is no browser" in capsys.readouterr().err) != there_is_one
    assert main(["demo", "--out", str(tmp_path)]) == 0 and len(opened) == 1


def test_the_page_shows_lines_as_they_are():
    page = demo_page.page(["One <b> & two\x1b", "  of it", "Three"], ["nemo-dali index A > B"]).decode()
    assert "<li>One &lt;b&gt; &amp; two\\x1b<br>of it</li>\n<li>Three</li>" in page
    assert (
        "<pre>nemo-dali index A &gt; B</pre>" in page
        and "http" not in page.split("Content-Security")[1].split(">", 1)[1]
    )


@pytest.mark.slow
def test_an_earlier_demo_is_made_anew(demo, capsys):
    demo, _ = demo
    for name in ("mosaics.png", "report.html", "index.html", "policy.json"):
        (demo / name).write_bytes(b"old")
    (demo / "train.neg.h5.partial").touch()
    (demo / "data" / "left over").touch()
    (demo / "notes.txt").write_text("mine")
    (demo / "mine.ris.h5").write_text("mine")
    run_demo(demo, images=40, steps=2, loader_batches=1)
    assert f"Removing the earlier demo in {demo}" in capsys.readouterr().out
    assert (demo / "mosaics.png").stat().st_size > 1000
    assert not (demo / "data" / "left over").exists()
    assert not (demo / "train.neg.h5.partial").exists()
    assert len(list((demo / "data").rglob("*.jpg"))) == 40
    assert (demo / "notes.txt").read_text() == (demo / "mine.ris.h5").read_text() == "mine"


def test_other_peoples_folders_are_refused_untouched(tmp_path):
    (tmp_path / "clip.pt").write_bytes(b"mine")
    with pytest.raises(NemoError, match="is not an earlier demo"):
        run_demo(tmp_path, **SMALL)
    with pytest.raises(NemoError, match="is not an earlier demo"):
        run_demo(tmp_path / "clip.pt", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.pt"]
    assert (tmp_path / "clip.pt").read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"images \(10\) must be"):
        run_demo(tmp_path / "new", images=10)
    assert not (tmp_path / "new").exists()
