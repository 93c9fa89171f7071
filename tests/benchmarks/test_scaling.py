"""The scaling and start-up benchmarks, once in small."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from multiprocessing import Pipe
from xml.etree import ElementTree

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.mining.table import NegativeTable
from tests.helpers.files import make_files
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where a script finds what it shares with others
scaling, scaling_points, startup = map(importlib.import_module, ("scaling", "scaling_points", "startup"))


@pytest.fixture
def plots():
    """Needs matplotlib, which a machine with a GPU may not have."""
    return importlib.import_module("plots")


POINT = scaling.Point(batch_size=4, size=64, photos=30, loaders=2)
PLAN = scaling.Plan({name: [POINT] for name in scaling.FULL.sweeps}, rounds=1, windows=2, seconds=0.1, distinct=20)


def test_the_command_in_small(plots, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "QUICK", PLAN)
    monkeypatch.setattr(
        sys,
        "argv",
        ["scaling.py", "--quick", f"--output={tmp_path}", f"--plot={tmp_path}/scaling.svg", f"--work={tmp_path}/work"],
    )
    scaling.main()
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [point["mode"] for point in result["points"]][:2] == ["stream", "host"]
    for point in result["points"]:
        assert {name: point[name] for name in asdict(POINT)} == asdict(POINT)
        assert 0 < point["samples_per_s"]["p25"] <= point["samples_per_s"]["median"] <= point["samples_per_s"]["p75"]
        assert (
            point["own_mib"] > 50 and point["start_up_s"] > 0 and 0 < point["waiting"] <= 1 and point["cpu_cores"] > 0
        )
        assert 50 < point["pss_mib"] < 2 * (point["own_mib"] + point["mapped_mib"])  # of both loaders
        assert point["plan_krows_per_s"] > 0 and point["plan_krows_per_s_new"] > 0
    stream, host = result["points"][:2]
    assert (
        30 * 3 * 32 * 32 / 2**20 < host["mapped_mib"] - stream["mapped_mib"] + 0.1
    )  # the tiles, but for a page or two
    assert result["sweeps"].keys() == set(plots.AXES) and not result["left_out"]
    assert result.keys() >= {"machine", "versions", "revision", "config"}
    assert (tmp_path / "scaling.svg").stat().st_size < 150_000
    drawn = " ".join(ElementTree.parse(tmp_path / "scaling.svg").getroot().itertext())
    below = [called.split("\n")[0] for _, _, called in (plots.OWN, *plots.BELOW.values())]
    assert all(text in drawn for text in [*plots.AXES.values(), *below, "samples/s", "stream", "host"])
    assert "samples/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--sweeps", "size", "--seconds=0"])  # all is measured already
    scaling.main()
    part = json.loads((tmp_path / "scaling.json").read_text())
    assert part["sweeps"].keys() == {"size"} and part["points"] == result["points"]


def test_points_that_do_not_fit_into_memory_are_left_out_and_named(files, tmp_path):
    small, large = POINT, replace(POINT, photos=10**9)
    plan = replace(PLAN, sweeps={"photos": [large]})
    result = scaling.run(plan, files.dataset, tmp_path, modes=["stream", "host"], limit=10**9)
    assert result["points"] == [] and result["left_out"] == [asdict(large)]
    made = scaling.Files(tmp_path, files.dataset)
    jpegs = [path.stat().st_size for path in files.photos.glob("*.jpg")]
    assert made.nbytes(small) == pytest.approx(30 * (np.mean(jpegs) + 3 * 32 * 32 + 7 * 8 * 29), abs=30)
    more = replace(small, sentences=1000, top_k=20)
    assert made.nbytes(more) - made.nbytes(small) == 8 * (1000 - 210) * 29


def test_a_run_that_was_ended_goes_on(files, tmp_path, monkeypatch):
    asked = []

    def point(point, mode, files, plan, number):
        asked.append((mode, number))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ["same"] * 2, {"rates": [float(number)], "own_mib": 1.0}

    monkeypatch.setattr(scaling, "run_point", point)
    plan, path = replace(PLAN, rounds=2), tmp_path / "progress.jsonl"

    def run(of="one", **options):
        progress = scaling.Progress(path, {"revision": of})
        return scaling.run(
            plan, files.dataset, tmp_path, modes=["stream", "host"], limit=10**9, progress=progress, **options
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    path.write_text(path.read_text() + '["cut')  # killed while it wrote
    assert run(until=0) is None and len(asked) == 3
    result = run()
    assert asked == [("stream", 1), ("host", 2), ("stream", 3), ("stream", 3), ("host", 4)]
    assert [one["samples_per_s"]["median"] for one in result["points"]] == [2, 3]
    assert run() == result and len(asked) == 5
    run("another revision")
    assert len(asked) == 9


def test_a_loader_at_a_trainings_pace_is_asked_for_no_more(monkeypatch):
    class Size:
        batch_size = 4

    def batches(seconds):
        while True:
            scaling.time.sleep(seconds)
            yield None

    for seconds, rate, waiting in ((0.0, 100, 0), (0.03, 0, 1), (0.04, 100, 0.5)):
        pace = scaling.Pace(batches(seconds), Size, rate, False)
        start = scaling.time.monotonic()
        found = pace.run(start + 0.5)
        spent = scaling.time.monotonic() - start
        assert pace.waited / spent == pytest.approx(waiting, abs=0.15)
        assert found <= 4 / (seconds + (4 / rate if rate else 0)) * 1.01


def test_a_point_is_a_policy_and_a_data_set(files, tmp_path):
    point = replace(POINT, top_k=7, max_similarity=0.4, sentences=300)
    theirs = scaling.Files(tmp_path, files.dataset).of(point, "stream")
    assert len(Dataset.open(theirs["dataset"]).sentences.ref) == 300
    assert NegativeTable.open(theirs["negatives"]).neighbors.shape == (300, 29)
    assert (point.policy.top_k, point.policy.max_similarity, point.policy.p_mined) == (7, 0.4, 1)
    made = scaling.Files(tmp_path, files.dataset)
    tiles = made.of(point, "host")["tiles"]
    made.discard(point, least=tiles.stat().st_size + 1)
    assert tiles.exists()
    made.discard(point, least=tiles.stat().st_size)
    assert not tiles.exists() and made.of(point, "host")["tiles"] == tiles
    assert scaling.Point(top_k=1000).depth == 1000 and scaling.Point().depth == scaling_points.DEPTH


def test_modes_that_show_different_batches_are_not_timed(files, tmp_path, monkeypatch):
    result = {"rates": [1.0], "own_mib": 1.0}
    monkeypatch.setattr(scaling, "run_point", lambda point, mode, *_: ([mode] * 2, dict(result)))
    with pytest.raises(SystemExit, match="mode host"):
        scaling.run(PLAN, files.dataset, tmp_path, modes=["stream", "host"], limit=10**9)


def test_memory_beside_a_mapped_file(tmp_path):
    path = tmp_path / "f.h5"
    path.write_bytes(bytes(8 << 20))
    before, there, _ = scaling.memory()
    mapped = np.memmap(path, np.uint8, "r")
    assert mapped.sum() == 0
    own, pages, share = scaling.memory()
    assert 8 << 20 < share < own + pages
    assert pages - there == 8 << 20 and own < before + (4 << 20)


def test_every_sweep_varies_what_it_says_and_nothing_else(plots):
    for plan in (scaling.FULL, scaling.QUICK):
        assert plan.sweeps.keys() == set(plots.AXES)
        for axis, points in plan.sweeps.items():
            assert len({replace(point, **{axis: 1}) for point in points}) == 1 and hasattr(points[0], axis)
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
