"""The tile file: its pixels, what is refused, and what an interrupted run leaves."""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shlex
import shutil

import h5py
import numpy as np
import pytest
from PIL import Image

from nemo_dali.commands.cli import main
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, PhotoError
from nemo_dali.kernels.reference import resize_cv2_linear, resize_pillow_bilinear
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.tiles import _decode as tile_decode
from nemo_dali.tiles import build as tile_build
from nemo_dali.tiles.build import make_tiles
from nemo_dali.tiles.file import TileFile, array_name
from tests.helpers import fork_server
from tests.helpers.files import make_files
from tests.helpers.forged import forge
from tests.helpers.h5_files import assert_views_agree

RESIZE = {"cv2-linear": resize_cv2_linear, "pillow-bilinear": resize_pillow_bilinear}
SIZE = 48


def make(files, output, **changes):
    return make_tiles(files.dataset, **({"size": SIZE, "output": output, "num_threads": 1} | changes))


def photo(dataset, row):
    with Image.open(dataset.photo_path(row)) as file:
        return np.asarray(file.convert("RGB"))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def partial_of(output):
    return output.with_name(output.name + ".partial")


@pytest.fixture
def small_batches(monkeypatch):
    """Six batches of the 24 photos, and no pause between two waits for the disk."""
    monkeypatch.setattr(tile_decode, "BATCH", 4)
    monkeypatch.setattr(tile_build, "SYNC_INTERVAL_S", 0)


@pytest.fixture
def interrupted(files, small_batches, tmp_path):
    """An output of which a part of the photos is done."""

    wait, raised = StreamPipeline.wait, []

    def interrupted_wait(self):
        if self.oldest[0][0] == 12 and not raised:
            raised.append(True)
            raise KeyboardInterrupt
        return wait(self)

    output = tmp_path / "half.tiles.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamPipeline, "wait", interrupted_wait)
        with pytest.raises(KeyboardInterrupt):
            make(files, output)
    return output


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("tiles") / "made.tiles.h5"
    make(files, output)
    return output


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", RESIZE)
@pytest.mark.parametrize("size, grids", [(48, [1, 2]), (50, [3, 1, 2, 1]), (51, [2]), (2, [3])])
def test_every_cell_of_every_grid_has_its_tile(files, tmp_path, resample, size, grids):
    report = make(files, tmp_path / "a.tiles.h5", size=size, grids=grids, resample=resample, num_threads=2)
    dataset, tiles = Dataset.open(files.dataset), TileFile.open(tmp_path / "a.tiles.h5")
    assert (tiles.size, tiles.resample, tiles.grids) == (size, resample, tuple(sorted(set(grids))))
    shapes = set()
    for grid in grids:
        edges = [size * j // grid for j in range(grid + 1)]
        shapes |= {(edges[y + 1] - edges[y], edges[x + 1] - edges[x]) for y in range(grid) for x in range(grid)}
    shapes = {shape for shape in shapes if 0 not in shape}
    assert set(tiles.arrays) == set(report.shapes) == shapes
    for row in range(24):
        original = photo(dataset, row)
        for (h, w), array in tiles.arrays.items():
            expected = RESIZE[resample](original, h, w).transpose(2, 0, 1)
            np.testing.assert_array_equal(array[row], expected, err_msg=f"photo {row}, {h}x{w}")


def test_each_photo_is_read_and_decoded_once(files, tmp_path, monkeypatch):
    from nvidia.dali import fn

    decoders, fed = [], []
    decode, feed = fn.decoders.image, StreamPipeline.feed
    monkeypatch.setattr(fn.decoders, "image", lambda *a, **k: decoders.append(decode(*a, **k)) or decoders[-1])
    monkeypatch.setattr(
        StreamPipeline, "feed", lambda self, paths, *a, **k: fed.extend(paths) or feed(self, paths, *a, **k)
    )
    report = make(files, tmp_path / "a.tiles.h5", size=50, grids=[1, 2, 3])
    assert len(report.shapes) == 6 and len(decoders) == 1
    dataset = Dataset.open(files.dataset)
    assert sorted(bytes(path).decode() for path in fed) == sorted(dataset.photo_path(row) for row in range(24))


def test_the_file_is_mapped_and_plain(files, made):
    tiles = TileFile.open(made)
    assert not any(array.flags.writeable or array.flags.owndata for array in tiles.arrays.values())
    assert all(array.ctypes.data % 4096 == 0 for array in tiles.arrays.values())
    pickled = pickle.dumps(tiles)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).arrays[48, 48], tiles.arrays[48, 48])
    with h5py.File(made) as file:
        attributes = {name: v.decode() if isinstance(v, bytes) else v for name, v in file.attrs.items()}
        assert (attributes["format"], attributes["version"]) == ("nemo-dali/tiles", 2)
        assert (attributes["dataset_fingerprint"], attributes["grids"]) == (tiles.dataset_fingerprint, "[1, 2]")
        assert re.fullmatch(r"DALI \S+ cpu", attributes["decoder"])
        assert re.fullmatch("[0-9a-f]{64}", attributes["fingerprint"])
        for name in ("tiles/48x48", "tiles/24x24"):
            assert (file[name].dtype, file[name].chunks, file[name].compression) == (np.uint8, None, None)
        large, small, digest = file["tiles/48x48"][:], file["tiles/24x24"][:], file["digest"][:]
    for row in range(24):
        assert digest[row].tobytes() == hashlib.sha256(large[row].tobytes() + small[row].tobytes()).digest()
    assert_views_agree(made)


def test_the_fingerprint_is_of_the_content(files, made, tmp_path):
    def of(name, **changes):
        return make(files, tmp_path / name, **changes).fingerprint

    first = TileFile.open(made)
    assert of("a.tiles.h5", num_threads=2, images=files.photos) == first.fingerprint == first.content_fingerprint()
    assert sha256(tmp_path / "a.tiles.h5") == sha256(made)
    others = {of("b.tiles.h5", size=50), of("c.tiles.h5", resample="pillow-bilinear"), of("d.tiles.h5", grids=[1])}
    assert len(others | {first.fingerprint}) == 4


# --- refused files ---------------------------------------------------------------------------------------------------


def remedied(error, dataset):
    """Run the command that a message ends with; its output."""
    command = shlex.split(str(error.value).partition("with: nemo-dali ")[2].replace("F.ris.h5", str(dataset)))
    assert main(command) == 0
    return command[-1]


@pytest.mark.parametrize(
    "wanted, words",
    [
        ({"size": 50}, "size 48, not 50"),
        ({"resample": "pillow-bilinear"}, "resample cv2-linear, not pillow-bilinear"),
        ({"grids": [3]}, "no tiles for grid 3"),
    ],
)
def test_frames_that_the_tiles_do_not_fill_are_refused_with_the_command(files, made, tmp_path, wanted, words):
    path = tmp_path / "a.tiles.h5"
    shutil.copy(made, path)
    fits = {"size": SIZE, "resample": "cv2-linear", "grids": [1, 2]}
    TileFile.open(path).check(**fits)
    TileFile.open(path).check(**fits | {"grids": iter([2])})
    with pytest.raises(FileFormatError, match=words) as error:
        TileFile.open(path).check(**fits | wanted)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    TileFile.open(remedied(error, files.dataset)).check(**fits | wanted)


def test_tiles_of_another_data_set_are_refused_with_the_command(files, made, tmp_path):
    other = Dataset.open(make_files(tmp_path, photos=24, seed=1).dataset)
    path = tmp_path / "a.tiles.h5"
    shutil.copy(made, path)
    TileFile.open(path).check_dataset(Dataset.open(files.dataset))
    with pytest.raises(FileFormatError, match="a different data set") as error:
        TileFile.open(path).check_dataset(other)
    assert other.fingerprint[:12] in str(error.value) and "\n" not in str(error.value)
    TileFile.open(remedied(error, other.path)).check_dataset(other)


def test_a_file_cut_short_is_refused(made, tmp_path):
    path, length = tmp_path / "a.tiles.h5", made.stat().st_size
    for cut in [0, 1, 100, 4096, 8192, 40000, length // 2, length - 32, length - 1]:
        path.write_bytes(made.read_bytes()[:cut])
        with pytest.raises(FileFormatError, match=r"(truncated|checksum).*nemo-dali tiles"):
            TileFile.open(path)


def test_other_and_damaged_files_are_refused(files, made, tmp_path):
    with pytest.raises(FileFormatError, match=r"does not exist.*nemo-dali tiles"):
        TileFile.open(tmp_path / "none.tiles.h5")
    with pytest.raises(FileFormatError, match="has format 'nemo-dali/ris', not 'nemo-dali/tiles'"):
        TileFile.open(files.dataset)

    def damage(change):
        path = tmp_path / "a.tiles.h5"
        forge(made, change, path)
        with pytest.raises(FileFormatError, match=r"damaged") as error:
            TileFile.open(path)
        assert "nemo-dali tiles" in str(error.value)

    def replaced(name, value):
        return lambda parts: parts.arrays.update({name: value})

    for name, value in {"size": 49, "grids": [4], "resample": "cubic"}.items():
        damage(lambda parts, name=name, value=value: parts.attributes.update({name: value}))
    for size in (0, -1, 2**62, 48.0, "48"):
        damage(lambda parts, size=size: parts.attributes.update(size=size))
    for grids in ([], [1, [2]], "[1, 2]", 1):
        damage(lambda parts, grids=grids: parts.attributes.update(grids=grids))
    damage(lambda parts: parts.attributes.pop("decoder"))
    damage(replaced("digest", np.zeros((23, 32), np.uint8)))
    damage(replaced("tiles/24x24", np.zeros((24, 3, 24, 24), np.int8)))
    damage(replaced("tiles/24x24", np.zeros((24, 3, 25, 24), np.uint8)))


def test_a_half_built_file_is_refused_with_the_command_that_goes_on(files, interrupted):
    with pytest.raises(FileFormatError, match=r"is half built: 12 of 24 photos are done\. Continue with: ") as error:
        TileFile.open(partial_of(interrupted))
    assert remedied(error, files.dataset) == str(interrupted)
    TileFile.open(interrupted)


# --- interrupted runs ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_one_was_interrupted(files, made, interrupted):
    assert not interrupted.exists()
    said = []
    report = make(files, interrupted, announce=said.append)
    assert (report.photos, report.decoded) == (24, 12)
    assert len(said) == 1 and "12 photos are done already" in said[0]
    assert sha256(interrupted) == sha256(made) and not partial_of(interrupted).exists()


KILLED = """
import json, os, random, sys, time
from pathlib import Path
import nvidia.dali
import nemo_dali.kernels.mosaic.cpu, nemo_dali.pipeline.operators
from nemo_dali.tiles import _decode as tile_decode
from nemo_dali.tiles import build as tile_build
from nemo_dali.io import writer

dataset, output = sys.argv[1], Path(sys.argv[2])
partial = Path(f"{output}.partial")
tile_decode.BATCH, tile_build.SYNC_INTERVAL_S = 4, 0


def start(name=None, number=0):
    '''Make the tiles in another process, which kills itself when it calls this function for the nth time, from 0.'''
    child = os.fork()
    if child:
        return child
    if name is not None:
        of_digests = name == "digest"
        name = "pwrite" if of_digests else name
        owner = next(owner for owner in (writer, os) if hasattr(owner, name))
        call, left = getattr(owner, name), [None] * number

        def dying(*arguments, **options):
            if not of_digests or len(arguments[1]) == 32:
                left.pop() if left else os.kill(os.getpid(), 9)
            return call(*arguments, **options)

        setattr(owner, name, dying)
    report = tile_build.make_tiles(dataset, size=48, output=output, num_threads=1)
    Path(f"{output}.decoded").write_text(str(report.decoded))
    os._exit(0)


def finish():
    '''Photos decoded by a run that nobody kills, and the file.'''
    assert os.waitpid(start(), 0)[1] == 0
    content = output.read_bytes()
    output.unlink()
    assert not partial.exists()
    return int(Path(f"{output}.decoded").read_text()), content


_, whole = finish()
for point in json.loads(sys.argv[3]):
    assert os.waitpid(start(*point), 0)[1] == 9, point
    assert not output.exists()
    decoded, content = finish()
    assert content == whole, point
    print(json.dumps(decoded))
random.seed(0)
for _ in range(5):
    child = start()
    time.sleep(random.uniform(0, 0.25))
    os.kill(child, 9)
    os.waitpid(child, 0)
    output.unlink(missing_ok=True)
    assert finish()[1] == whole
output.write_bytes(whole)
"""


@pytest.mark.slow
@pytest.mark.process
def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_bytes(files, made, tmp_path):
    output = tmp_path / "a.tiles.h5"
    nothing_done = [("ftruncate", 0), ("create", 0), ("posix_fallocate", 0), ("fsync", 0)]
    nothing_done += [("pwrite", writes) for writes in range(3)]
    some_done = [("digest", done) for done in (1, 6, 13, 23)]
    all_done = [("_finish", 0), ("checksum", 0), ("encode", 0), ("replace", 0)]
    points = [*nothing_done, *some_done, *all_done]
    run = fork_server.run(KILLED, files.dataset, output, json.dumps(points))
    assert run.returncode == 0, run.stderr
    decoded = [int(line) for line in run.stdout.split()]
    assert decoded == [24] * 7 + [23, 18, 11, 1] + [0] * 4
    assert sha256(output) == sha256(made)


def test_a_photo_is_recorded_only_when_its_tiles_were_synced(files, small_batches, tmp_path, monkeypatch):
    partial = partial_of(tmp_path / "a.tiles.h5")
    synced, recorded = set(), []
    fsync, pwrite = os.fsync, os.pwrite

    def spied_fsync(file):
        arrays = []
        if partial.exists():
            arrays = [np.array(array) for array in tile_build.read_tiles(partial).arrays.values()]
        fsync(file)
        for row in range(24):
            synced.add(hashlib.sha256(b"".join(array[row].tobytes() for array in arrays)).digest())

    def spied_pwrite(file, content, offset):
        if len(content) == 32:
            recorded.append(content)
            assert content in synced
        return pwrite(file, content, offset)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "pwrite", spied_pwrite)
    make(files, tmp_path / "a.tiles.h5")
    assert len(set(recorded)) == len(recorded) == 24


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"size": 50}, "size 48, not 50"),
        ({"resample": "pillow-bilinear"}, "resample cv2-linear, not pillow-bilinear"),
        ({"grids": [1, 2, 3]}, r"grids \[1, 2\], not \[1, 2, 3\]"),
    ],
)
def test_an_unfinished_file_of_other_options_is_kept(files, interrupted, changes, words):
    before = sha256(partial_of(interrupted))
    with pytest.raises(FileFormatError, match=f"12 of 24 photos are done for {words}.*start over, remove") as error:
        make(files, interrupted, **changes)
    assert str(partial_of(interrupted)) in str(error.value)
    assert sha256(partial_of(interrupted)) == before
    partial_of(interrupted).unlink()
    assert make(files, interrupted, **changes).decoded == 24


def test_an_unfinished_file_of_another_data_set_is_kept(interrupted, tmp_path):
    other = make_files(tmp_path, photos=24, seed=1)
    with pytest.raises(FileFormatError, match="12 of 24 photos are done for dataset fingerprint"):
        make(other, interrupted)
    assert partial_of(interrupted).exists()


@pytest.mark.parametrize("content", [b"", b"nemo-dali/tiles ", b"nemo-dali/tiles 2 " + bytes(100_000)])
def test_a_partial_file_without_photos_is_begun_anew(files, made, tmp_path, content):
    partial_of(tmp_path / "a.tiles.h5").write_bytes(content)
    assert make(files, tmp_path / "a.tiles.h5").decoded == 24
    assert sha256(tmp_path / "a.tiles.h5") == sha256(made)


# --- photos that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "is corrupt"),
        (lambda path: path.unlink(), "cannot be opened"),
        (lambda path: Image.new("RGB", (200, 33)).save(path), "has a different size than annotated"),
    ],
)
def test_a_bad_photo_is_named_and_nothing_done_is_lost(small_batches, tmp_path, spoil, words):
    files = make_files(tmp_path)
    output = tmp_path / "a.tiles.h5"
    make(files, output)
    whole = output.read_bytes()
    output.unlink()
    victim = files.photos / Dataset.open(files.dataset).images.file_name[13]
    good = victim.read_bytes()
    spoil(victim)
    with pytest.raises(PhotoError, match=f"A photo {words}.*{victim.name}") as error:
        make(files, output)
    assert "\n" not in str(error.value) and not output.exists()
    victim.write_bytes(good)
    assert make(files, output).decoded == 12  # its batch of four and what comes behind
    assert output.read_bytes() == whole


def test_a_run_without_a_photo_done_leaves_nothing(small_batches, tmp_path):
    files = make_files(tmp_path)
    (files.photos / Dataset.open(files.dataset).images.file_name[0]).unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PhotoError, match="cannot be opened"):
        make(files, tmp_path / "a.tiles.h5")
    shutil.rmtree(files.photos)
    with pytest.raises(PhotoError, match="does not exist"):
        make(files, tmp_path / "a.tiles.h5")
    assert sorted(tmp_path.iterdir()) == [path for path in before if path != files.photos]


# --- places that cannot be written -----------------------------------------------------------------------------------


def test_two_writers_refuse_each_other(files, made, tmp_path):
    output = tmp_path / "a.tiles.h5"
    refused = []

    def second(_):
        with pytest.raises(FileFormatError, match="another run is writing it") as error:
            make(files, output)
        refused.append(error)

    assert make(files, output, announce=second).decoded == 24
    assert len(refused) == 1 and sha256(output) == sha256(made)


def test_a_disk_without_room_is_told_before_anything_is_written(files, interrupted, tmp_path, monkeypatch):
    disk = shutil.disk_usage(tmp_path)
    free = 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=free))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileFormatError, match=r"it needs 0\.4 MB, and the disk has 0\.1 MB for it\. Free some space"):
        make(files, tmp_path / "a.tiles.h5")
    assert sorted(tmp_path.iterdir()) == before
    assert make(files, interrupted).decoded == 12  # what is there already needs no room


def test_a_system_that_refuses_the_space_is_told(files, made, tmp_path, monkeypatch):
    output = tmp_path / "a.tiles.h5"
    shutil.copy(made, output)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(FileFormatError, match=r"Cannot write .*: File too large\. Free some space"):
            make(files, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileFormatError, match=r"Cannot write .*: No space left on device\. Free some space"):
        make(files, output)
    assert list(tmp_path.iterdir()) == [output] and sha256(output) == sha256(made)


def test_a_file_larger_than_the_memory_is_warned_of(files, tmp_path, monkeypatch, caplog):
    make(files, tmp_path / "a.tiles.h5")
    assert caplog.text == ""
    monkeypatch.setattr(os, "sysconf", lambda name: 400)
    make(files, tmp_path / "a.tiles.h5")
    assert "larger than this machine's memory (0.2 MB)" in caplog.text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"size": 0}, r"size \(0\) must be at least 1"),
        ({"num_threads": 0}, r"num_threads \(0\) must be"),
        ({"resample": "cubic"}, r"resample \('cubic'\) must be one of"),
        ({"grids": []}, r"grids \(\) must be"),
        ({"grids": [1, 4]}, r"grids \(1, 4\) must be"),
    ],
)
def test_wrong_arguments(files, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        make(files, tmp_path / "a.tiles.h5", **changes)
    assert list(tmp_path.iterdir()) == []


# --- commands --------------------------------------------------------------------------------------------------------


def run(*words):
    return main([str(word) for word in words])


def test_from_a_data_set_to_tiles(files, made, tmp_path, capsys):
    output = tmp_path / "a.tiles.h5"
    assert run("tiles", files.dataset, "--size", SIZE, "-o", output) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{output}: 24 photos as 48x48, 24x24, {output.stat().st_size / 1e6:.1f} MB"
    assert last.startswith(first + "; 24 decoded in ")
    assert sha256(output) == sha256(made)

    assert run("inspect", "--json", output) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fingerprint"] == TileFile.open(output).fingerprint
    assert (found["format"], found["photos"], found["size"]) == ("nemo-dali/tiles", 24, SIZE)
    assert (found["grids"], found["cells"], found["resample"]) == ([1, 2], ["48x48", "24x24"], "cv2-linear")
    assert found["dataset_fingerprint"] == Dataset.open(files.dataset).fingerprint

    options = ("--grids", 3, "--resample", "pillow-bilinear", "--images", files.photos, "--num-threads", 2)
    assert run("tiles", files.dataset, "--size", 50, *options, "-o", output) == 0
    TileFile.open(output).check(size=50, resample="pillow-bilinear", grids=[3])


def test_mistakes_end_in_one_line(files, interrupted, tmp_path, capsys):
    def fails(*words):
        assert run(*words) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("nemo-dali: ") and err.count("\n") == 1, err
        return err

    assert "half built" in fails("inspect", partial_of(interrupted))
    assert "photos are done for size" in fails("tiles", files.dataset, "--size", 50, "-o", interrupted)
    assert "it is the input" in fails("tiles", files.dataset, "--size", 50, "-o", files.dataset)
    assert "its folder does not exist" in fails(
        "tiles", files.dataset, "--size", 50, "-o", tmp_path / "none" / "a.tiles.h5"
    )
    with pytest.raises(SystemExit) as usage:
        run("tiles", files.dataset, "--size", 50, "--grids", 4, "-o", tmp_path / "a.tiles.h5")
    assert usage.value.code == 2


def test_inspect_finds_a_single_changed_bit(made, tmp_path, capsys):
    path = tmp_path / "a.tiles.h5"
    for name, array in TileFile.open(made).arrays.items():
        content = bytearray(made.read_bytes())
        offset = TileFile.open(made).mapped.index.arrays[array_name(*name)].offset
        content[offset + random.Random(0).randrange(array.nbytes)] ^= 1
        path.write_bytes(content)
        assert run("inspect", path) == 1, name
        assert "does not match its fingerprint" in capsys.readouterr().err
