"""Photos are found in one folder or several, under their own names and those of COCO's other release."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nemo_dali.commands.cli import main
from nemo_dali.data import photo_folders
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.photo_folders import locate
from nemo_dali.errors import PhotoError
from tests.helpers.refer import ReferFiles, write_refer

OLD, NEW = "COCO_train2014_000000005802.jpg", "000000005802.jpg"


def put(folder: Path, *names: str, content: str = "photo") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_names_in_one_folder_stay(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "sub/b.jpg", OLD)
    names = ["sub/b.jpg", OLD, "a.jpg"]
    assert locate(tmp_path, names) == (str(tmp_path), names, 0)
    assert locate([tmp_path, f"{tmp_path}/sub/.."], names) == (str(tmp_path), names, 0)


def test_several_folders_are_below_one_root(tmp_path: Path) -> None:
    one, two = put(tmp_path / "x/train", "a.jpg", "sub/b.jpg"), put(tmp_path / "y", "c.jpg")
    names = ["c.jpg", "sub/b.jpg", "a.jpg"]
    found = locate([one, two], names)
    assert found == (str(tmp_path), ["y/c.jpg", "x/train/sub/b.jpg", "x/train/a.jpg"], 0)
    shutil.move(tmp_path, moved := tmp_path.with_name("moved"))
    assert all((moved / name).is_file() for name in found.file_names)
    put(moved / "x", "d.jpg")
    for folders in ([moved / "x", moved / "x/train"], [moved / "x/train", moved / "x"]):
        assert locate(folders, ["a.jpg", "d.jpg"]) == (str(moved / "x"), ["train/a.jpg", "d.jpg"], 0)


@pytest.mark.parametrize(("there", "names"), [(NEW, [OLD, NEW]), (OLD, [NEW, OLD]), ("x/a.jpg", ["x/a.jpg", "a.jpg"])])
def test_a_photo_may_not_have_two_names(tmp_path: Path, there: str, names: list[str]) -> None:
    put(tmp_path, there, "x/b.jpg")
    with pytest.raises(
        PhotoError, match=f"^{names[0]} and {names[1]} in the annotations are one photo, {tmp_path}/{there}"
    ):
        locate([tmp_path, tmp_path / "x"], names)
    assert locate(tmp_path, [there, there]).file_names == [there, there]  # two records of one name


def test_folders_without_a_common_one_are_below_the_root_of_all(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    found = locate([tmp_path, "/usr"], ["a.jpg"])
    assert found.root == "/" and found.file_names == [f"{tmp_path}/a.jpg".lstrip("/")]


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        (OLD, NEW),
        ("COCO_val2014_000000005802.jpg", NEW),
        (NEW, OLD),
        (NEW, "COCO_val2014_000000005802.jpg"),
        (f"coco/{OLD}", f"coco/{NEW}"),
    ],
)
def test_photos_of_coco_are_found_under_their_other_name(tmp_path: Path, asked: str, there: str) -> None:
    one, two = put(tmp_path / "train", "a.jpg"), put(tmp_path / "val", there)
    assert locate(two, [asked]) == (str(two), [there], 1)
    assert locate([one, two], [asked, "a.jpg"]) == (str(tmp_path), [f"val/{there}", "train/a.jpg"], 1)
    put(two, asked)
    assert locate([one, two], [asked]) == (str(tmp_path), [f"val/{asked}"], 0)  # its own name goes first


@pytest.mark.parametrize(
    "name", ["COCO_test2014_000000005802.jpg", "000000005802.png", "5802.jpg", f"x{NEW}", f"{OLD}x"]
)
def test_other_names_are_not_guessed(tmp_path: Path, name: str) -> None:
    put(tmp_path, NEW, OLD)
    with pytest.raises(
        PhotoError, match=r"1 of 2 photos cannot be opened in .*: .* Check --images, which may be repeated"
    ):
        locate(tmp_path, [NEW, name])


def test_a_name_in_two_folders_must_be_one_photo(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", "1.jpg", NEW), put(tmp_path / "two", "1.jpg")
    put(two, NEW, content="stored again")
    assert locate([two, one], ["1.jpg", NEW]).file_names == ["two/1.jpg", f"two/{NEW}"]  # COCO's ids are of one photo
    put(two, "1.jpg", content="other")
    reason = rf"The photo 1\.jpg is in {one} and, with different content, in {two}\. Give only the folder"
    with pytest.raises(PhotoError, match=reason):
        locate([one, two], ["1.jpg"])
    (two / "1.jpg").unlink()
    (two / "1.jpg").symlink_to("nowhere")
    with pytest.raises(PhotoError, match=reason):
        locate([one, two], ["1.jpg"])


def test_missing_photos_are_told_with_what_was_looked_for(tmp_path: Path) -> None:
    one, two = put(tmp_path / "train2017", "a.jpg"), put(tmp_path / "other", "b.jpg")
    with pytest.raises(PhotoError) as caught:
        locate([one, two], ["a.jpg", "c.jpg", OLD])
    assert str(caught.value) == (
        f"2 of 3 photos cannot be opened in {one} or {two}: c.jpg (No such file or directory), {OLD} (No such file or "
        f"directory). COCO's photos were looked for under their other names too ({OLD} as {NEW}); its releases split "
        "them differently: give both train2017 and val2017, or both train2014 and val2014. Check --images, which may "
        "be repeated."
    )
    put(tmp_path / "val2017", NEW)
    with pytest.raises(PhotoError, match=rf"{NEW} is in {tmp_path}/val2017: give that folder with --images, once for"):
        locate(tmp_path, [OLD])
    with pytest.raises(PhotoError, match=r"60 of 60 .*: 0\.jpg .*, 49\.jpg \([^)]*\) and 10 more\. "):
        locate(tmp_path, [f"{i}.jpg" for i in range(60)])


def test_folders_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i % 3}/{i}.jpg" for i in range(300)]
    one, two = put(tmp_path / "one", *names[:200]), put(tmp_path / "two", *names[200:])
    listed, real = [], os.listdir
    monkeypatch.setattr(photo_folders.os, "listdir", lambda path: listed.append(path) or real(path))
    monkeypatch.setattr(photo_folders.os.path, "lexists", lambda path: pytest.fail("asked for one photo"))
    assert locate([one, two], names).file_names == [
        f"{'one' if i < 200 else 'two'}/{name}" for i, name in enumerate(names)
    ]
    assert sorted(listed) == [f"{folder}/{i}" for folder in (one, two) for i in range(3)]


def test_folders_that_may_not_be_listed_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, NEW, "a.jpg")

    def refuse(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(photo_folders.os, "listdir", refuse)
    assert locate(tmp_path, [OLD, "a.jpg"]) == (str(tmp_path), [NEW, "a.jpg"], 1)
    with pytest.raises(PhotoError, match=r"1 of 1 photos cannot be opened"):
        locate(tmp_path, ["b.jpg"])


def test_names_that_a_folder_lists_in_other_letters_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.jpg")
    monkeypatch.setattr(photo_folders.os, "listdir", lambda path: ["A.JPG"])  # as on a disk that ignores case
    assert locate(tmp_path, ["a.jpg"]).file_names == ["a.jpg"]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    for images in (tmp_path / "none", [tmp_path, tmp_path / "a.jpg"]):
        with pytest.raises(PhotoError, match=r"is not a folder of photos\. Say where they are with --images"):
            locate(images, ["a.jpg"])
    (tmp_path / "a\\b").mkdir()
    with pytest.raises(PhotoError, match=re.escape(r"a\b does not fit into a data set file. Rename it.")):
        locate([tmp_path, tmp_path / "a\\b"], ["a.jpg"])
    assert locate(put(tmp_path / "a\\b", "c.jpg"), ["c.jpg"]).file_names == ["c.jpg"]  # not in a name


def test_an_address_is_taken_alone_and_as_it_is(tmp_path: Path) -> None:
    assert locate("s3://bucket/train2014/", [OLD]) == ("s3://bucket/train2014", [OLD], 0)
    for images in (["s3://bucket/a", "s3://bucket/b"], [tmp_path, "s3://bucket/a"]):
        with pytest.raises(ValueError, match="images must be local folders, or else one address"):
            locate(images, [OLD])


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> ReferFiles:
    """RefCOCO's layout whose photos lie as in COCO 2017, a third of them in the other folder."""
    files = write_refer(tmp_path)
    for i, path in enumerate(sorted(files.photos.iterdir())):
        folder = tmp_path / "coco" / ("val2017" if i % 3 else "train2017")
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name[-16:])
    return files


def test_the_command_finds_photos_of_2014_among_those_of_2017(
    files: ReferFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco, output = tmp_path / "coco", tmp_path / "a.ris.h5"
    words = f"index {files.root} --dataset refcoco --split-by unc --split train -o {output}".split()
    assert main([*words, "--images", f"{coco}/train2017"]) == 1
    assert (
        "4 of 6 photos cannot be opened" in (said := capsys.readouterr().err) and "both train2017 and val2017" in said
    )
    assert main([*words, "--images", str(coco)]) == 1
    assert f"is in {coco}/" in capsys.readouterr().err
    assert main([*words, "--images", f"{coco}/train2017", "--images", f"{coco}/val2017"]) == 0
    assert "6 photos were found under the names of COCO's other release" in capsys.readouterr().out
    dataset = Dataset.open(output)
    assert dataset.image_root == str(coco) and dataset.photo_files.coco_id.tolist() == dataset.images.id.tolist()
    moved = coco.rename(tmp_path / "moved")
    dataset = Dataset.open(output, images=moved)
    for row in range(6):
        with Image.open(dataset.photo_path(row)) as photo:
            assert photo.size == (dataset.images.width[row], dataset.images.height[row])
