"""The comparison with peers by its script, once in small, and its picture."""

import importlib
import json
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # where a script finds what it shares with others
peers = importlib.import_module("peers")


@pytest.fixture
def plots():
    """Needs matplotlib, which a machine with a GPU may not have."""
    return importlib.import_module("plots")


@pytest.mark.slow
@pytest.mark.process
def test_the_command_in_small(plots, files, tmp_path, monkeypatch, capsys):
    pages = {name: (ROOT / name).read_bytes() for name in ("README.md", "docs/peers.md")}
    small = ["--peers", "opencv", "dali", "--pairs=1", "--steps=1", "--batch-size=8", "--size=96"]
    places = [f"--output={tmp_path}", f"--plot={tmp_path}/peers.svg"]
    data = [str(files.dataset), str(files.negatives)]
    monkeypatch.setattr(sys, "argv", ["peers.py", *data, "--quick", *small, *places])
    peers.main()
    result = json.loads((tmp_path / "peers.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["host", "stream", "stream-antialiased", "opencv", "dali"]
    assert [len(row["tried"]) for row in result["rows"]] == [1] * 5 and result["revision"]
    drawn = " ".join(ElementTree.parse(tmp_path / "peers.svg").getroot().itertext())
    out = capsys.readouterr().out
    for row in result["rows"]:
        assert row["label"] in drawn and row["label"] in out
    assert pages == {name: (ROOT / name).read_bytes() for name in pages}


def test_part_of_the_rows_is_not_recorded(tmp_path, monkeypatch, capsys):
    rows = [{"name": row.name} for row in peers.ROWS]
    monkeypatch.setattr("nemo_dali.commands.peers.comparison.lines_of", lambda result: [])
    written = []
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(importlib.import_module("peers_tables"), "write_tables", written.append)
    monkeypatch.setattr(importlib.import_module("common"), "ROOT", tmp_path)
    monkeypatch.setattr(importlib.import_module("common"), "revision", lambda: "abc")
    monkeypatch.setitem(sys.modules, "plots", SimpleNamespace(plot_peers=lambda result, path: written.append(path)))
    monkeypatch.setattr(sys, "argv", ["peers.py", "a.ris.h5", "a.neg.h5"])
    for shown in (rows[:-1], rows):
        result = {"rows": shown, "config": {}}
        monkeypatch.setattr("nemo_dali.commands.peers.comparison.compare", lambda *_, result=result, **__: result)
        peers.main()
        assert len(written) == (0 if shown is not rows else 2)
        assert (tmp_path / "results" / "peers.json").exists() == (shown is rows)


def test_a_picture_of_recorded_figures(plots, tmp_path):
    names = ["host", "stream", "stream-antialiased", "opencv"]
    rows = [
        {
            "name": name,
            "label": f"Row {name}",
            "is_peer": name == "opencv",
            "samples_per_s": {"median": 1000.0 / 2**i, "p25": 900.0 / 2**i, "p75": 1100.0 / 2**i},
        }
        for i, name in enumerate(names)
    ]
    figure = plots.draw_peers({"rows": rows})
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [125, 250, 500, 1000]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"Row {name}" for name in names[::-1]]
    assert [line.get_xdata().tolist() for line in axes.lines][-1] == [900, 1100]
    plots.plt.close(figure)
    for name in ("one.svg", "other.svg"):
        plots.plot_peers({"rows": rows}, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert (tmp_path / "one.svg").stat().st_size < 50_000
