"""The scaling and start-up benchmarks, once in small."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from multiprocessing import Pipe
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.helpers.files import make_files
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where a script finds what it shares with others
scaling, startup = map(importlib.import_module, ("scaling", "startup"))


@pytest.fixture
def plots():
    """Needs matplotlib, which a machine with a GPU may not have."""
    return importlib.import_module("plots")


POINT = scaling.Point(batch_size=4, size=64, photos=30, loaders=2)
PLAN = scaling.Plan({name: [POINT] for name in scaling.FULL.sweeps}, rounds=1, windows=2, seconds=0.1, distinct=20)


def test_the_command_in_small(plots, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "QUICK", PLAN)
    monkeypatch.setattr(
        sys, "argv", ["scaling.py", "--quick", f"--output={tmp_path}", f"--plot={tmp_path}/scaling.svg"]
    )
    scaling.main()
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [point["mode"] for point in result["points"]][:2] == ["stream", "host"]
    for point in result["points"]:
        assert {name: point[name] for name in asdict(POINT)} == asdict(POINT)
        assert 0 < point["samples_per_s"]["p25"] <= point["samples_per_s"]["median"] <= point["samples_per_s"]["p75"]
        assert point["own_mib"] > 50 and point["start_up_s"] > 0
    stream, host = result["points"][:2]
    assert (
        30 * 3 * 32 * 32 / 2**20 < host["mapped_mib"] - stream["mapped_mib"] + 0.1
    )  # the tiles, but for a page or two
    assert result["sweeps"].keys() == set(plots.AXES) and not result["left_out"]
    assert result.keys() >= {"machine", "versions", "revision", "config"}
    assert (tmp_path / "scaling.svg").stat().st_size < 150_000
    drawn = " ".join(ElementTree.parse(tmp_path / "scaling.svg").getroot().itertext())
    assert all(text in drawn for text in [*plots.AXES.values(), "samples/s", "GiB a process", "stream", "host"])
    assert "samples/s" in capsys.readouterr().out


def test_points_that_do_not_fit_into_memory_are_left_out_and_named(files, tmp_path):
    small, large = POINT, replace(POINT, photos=10**9)
    plan = replace(PLAN, sweeps={"photos": [large]})
    result = scaling.run(plan, files.dataset, tmp_path, modes=["stream", "host"], limit=10**9)
    assert result["points"] == [] and result["left_out"] == [asdict(large)]
    made = scaling.Files(tmp_path, files.dataset)
    jpegs = [path.stat().st_size for path in files.photos.glob("*.jpg")]
    assert made.nbytes(small) == pytest.approx(30 * (np.mean(jpegs) + 3 * 32 * 32), abs=30)


def test_modes_that_show_different_batches_are_not_timed(files, tmp_path, monkeypatch):
    result = {"rates": [1.0], "own_mib": 1.0}
    monkeypatch.setattr(scaling, "run_point", lambda point, mode, *_: ([mode] * 2, dict(result)))
    with pytest.raises(SystemExit, match="mode host"):
        scaling.run(PLAN, files.dataset, tmp_path, modes=["stream", "host"], limit=10**9)


def test_memory_beside_a_mapped_file(tmp_path):
    path = tmp_path / "f.h5"
    path.write_bytes(bytes(8 << 20))
    before, there = scaling.memory()
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() == 0
    own, pages = scaling.memory()
    assert pages - there == 8 << 20 and own < before + (4 << 20)


def test_every_sweep_varies_what_it_says_and_nothing_else(plots):
    for plan in (scaling.FULL, scaling.QUICK):
        assert plan.sweeps.keys() == set(plots.AXES)
        for axis, points in plan.sweeps.items():
            assert len({replace(point, **{axis: 1}) for point in points}) == 1
            assert [getattr(point, axis) for point in points] == sorted({getattr(point, axis) for point in points})


def test_a_picture_of_recorded_figures(plots, tmp_path):
    points = [replace(POINT, batch_size=n) for n in (1, 8)]
    recorded = {
        "points": [
            {
                "mode": mode,
                **asdict(point),
                "samples_per_s": {"median": rate * point.batch_size, "p25": rate, "p75": 20 * rate},
                "own_mib": 512 * point.batch_size,
            }
            for rate, mode in enumerate(plots.COLOURS, start=1)
            for point in points[::-1]
        ],
        "sweeps": {"batch_size": [asdict(point) for point in points], "size": [asdict(points[0])]},
    }
    figure = plots.draw_scaling(recorded)
    rate, memory, other, _ = figure.axes
    assert rate.get_title() == "64x64, 30 photos, 2 loaders" and other.get_title() == "batch 1, 30 photos, 2 loaders"
    for number, (mode, colour) in enumerate(plots.COLOURS.items()):
        line, band = rate.lines[number], rate.collections[number]
        assert (line.get_label(), line.get_color()) == (mode, colour)
        assert line.get_xydata().tolist() == [[1, number + 1], [8, 8 * (number + 1)]]
        extent = band.get_paths()[0].get_extents()
        assert (extent.x0, extent.x1, extent.y0, extent.y1) == (1, 8, number + 1, 20 * (number + 1))
        assert memory.lines[number].get_xydata().tolist() == [[1, 0.5], [8, 4]]
        assert other.lines[number].get_xydata().tolist() == [[64, number + 1]]
    plots.plt.close(figure)
    (tmp_path / "scaling.json").write_text(json.dumps(recorded))
    for name in ("one.svg", "other.svg"):
        plots.plot_scaling(tmp_path / "scaling.json", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


@pytest.mark.parametrize("mode", ["stream", "host"])
def test_a_loader_starts_with_generated_columns(tmp_path, mode):
    source = make_files(tmp_path / "source")
    files = startup.make_files(tmp_path, source.dataset, photos=600, sentences=2400, size=64)
    if mode == "stream":
        del files["tiles"]
    here, there = Pipe()
    startup.start_once(files, {"batch_size": 4, "size": 64}, there)
    found = here.recv()
    stages = found["stages_s"]
    assert stages.keys() == {*startup.STAGES, "all else"}
    assert sum(stages.values()) == pytest.approx(found["start_up_s"])
    assert {name for name, seconds in stages.items() if not seconds} == ({"open tiles"} if mode == "stream" else set())


@pytest.mark.gpu
def test_points_on_a_gpu(files, tmp_path):
    plan = replace(PLAN, sweeps={"loaders": [replace(POINT, loaders=1), POINT]})
    result = scaling.run(plan, files.dataset, tmp_path, modes=["stream", "pinned", "device"], limit=10**9)
    assert len(result["points"]) == 6
    assert all(point["gpu_mib"] > 0 for point in result["points"] if point["mode"] != "stream")
