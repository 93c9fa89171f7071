"""What README.md and docs/peers.md say of the peers is what benchmarks/results/peers.json says."""

import importlib
import json
import sys
from copy import deepcopy

from nemo_dali.commands.peers.rows import ROWS
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # where a script finds what it shares with others
tables = importlib.import_module("peers_tables")
RECORD = ROOT / "benchmarks" / "results" / "peers.json"
RECORDED = json.loads(RECORD.read_text())


def test_the_pages_tables_are_those_of_the_record():
    for name, makers in tables.PLACES.items():
        text = (ROOT / name).read_text("utf-8")
        assert text.count(tables.BEGIN) == text.count(tables.END) == len(makers)
        assert tables.rewritten(text, [make(RECORDED) for make in makers]) == text


def test_the_record_is_whole_and_no_row_of_it_is_gone():
    names = [row["name"] for row in RECORDED["rows"]]
    assert names == [row.name for row in ROWS] and not RECORDED["skipped"]
    assert RECORDED["config"]["pairs"] >= 5 and RECORDED["revision"]
    assert RECORDED.keys() >= {"machine", "versions", "others"}
    for row in RECORDED["rows"]:
        for check in (row["check"], row["checked_again"]):
            assert check["iou"] >= 0.99 and check["difference"] <= check["allowed"] + 1e-3
            assert check["worst"] <= check["worst_allowed"] + 1e-3


def test_other_figures_make_other_tables():
    changed = deepcopy(RECORDED)
    for row in changed["rows"]:
        if row["is_peer"]:
            row["ratio_host"]["median"], row["ratio_stream"]["median"] = 21.0, 1.4
    verdict = tables.verdict(changed)
    assert f"the best DataLoader, which is {best(changed)}: it is 1.40 times." in verdict
    assert "as every peer, and are." in verdict and "not behind DALI" in verdict
    for row in changed["rows"]:
        if row["is_peer"]:
            row["ratio_host"]["median"], row["ratio_stream"]["median"] = 19.0, 0.9
    verdict = tables.verdict(changed)
    assert (
        "they fall short of that against OpenCV (19.0 times), " in verdict
        and "0.90 times, which falls short" in verdict
    )
    assert "The stream is behind DALI's own operators (0.90 times)" in verdict
    assert tables.rates(changed) != tables.rates(RECORDED)
    assert "0.9 to 0.9 times as many" in tables.speed(changed) and "19 to 19 times" in tables.speed(changed)


def test_what_is_between_marks_is_replaced_and_the_rest_stays():
    text = f"| Speed | {tables.BEGIN} old {tables.END} |\n\n{tables.BEGIN}\n\nold\n\n{tables.END}\n"
    assert tables.rewritten(text, ["a line\n", "a table\n"]) == (
        f"| Speed | {tables.BEGIN} a line {tables.END} |\n\n{tables.BEGIN}\n\na table\n\n{tables.END}\n"
    )


def test_the_conditions_say_what_the_tiles_took_and_that_photos_are_generated():
    config = {"cores": 2, "photos": 3, "megapixels_a_photo": 0.18, "kib_a_photo": 40.0, "size": 480, "dtype": "float32"}
    config |= {"batch_size": 16, "pairs": 5, "generated": True, "tiles": {"seconds": 2.5, "bytes": 69_000_000}}
    result = {"config": config, "machine": {"cpu": "A", "cores": 2}, "others": {"median": 0.0, "most": 0.1}}
    told = tables.conditions(result)
    assert "3 generated photos of 0.18 megapixels and 40 KiB" in told
    assert "Resident tiles were made before timing started, in 2.5 s: 69 MB." in told
    config |= {"generated": False, "tiles": {"seconds": None, "bytes": 69_000_000}}
    told = tables.conditions(result)
    assert "3 photos of" in told and "Resident tiles already existed: 69 MB." in told
    assert tables.conditions in tables.PLACES["docs/peers.md"]


def best(result):
    loaders = [row for row in result["rows"] if row["label"].startswith("DataLoader")]
    return max(loaders, key=lambda row: row["samples_per_s"]["median"])["label"].removeprefix("DataLoader, ")
