"""Photos on object storage: a real S3 server on loopback, DALI's own reader, the same bits as from local files."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.data.s3 import _raise_refusal, check_names, failed_address, image_root, read_object
from nemo_dali.errors import FileFormatError, NemoError, PhotoError
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.files import Files
from tests.helpers.forged import forge
from tests.helpers.refer import write_refer
from tests.helpers.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.helpers.tables import write_random_table

EVERY_KIND = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, jitter=0.5, top_k=8)
ROOT = "s3://photos/größer & kleiner/train 2014+x"
ODD = "ü 犬/a&b=c+d%20e {}~[0]$!*'(),;:@.jpg"  # {} is a photo's number


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """12 photos with odd names, in local files."""
    folder = tmp_path_factory.mktemp("odd")

    def rename(_refs, instances):
        for number, photo in enumerate(instances["images"]):
            new = folder / "photos" / ODD.format(number)
            new.parent.mkdir(exist_ok=True)
            (folder / "photos" / photo["file_name"]).rename(new)
            photo["file_name"] = ODD.format(number)

    refer = write_refer(folder, photos=12, edit=rename)
    made = Files(folder / "data.ris.h5", folder / "data.neg.h5", refer.photos)
    annotations = read_refer(refer.root, dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=made.dataset)
    write_random_table(made.negatives, Dataset.open(made.dataset))
    return made


@pytest.fixture(scope="session")
def only_server():
    """DALI's client is made once a process: its server must stay, also if this file's tests run in several parts."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(only_server, odd, files, tmp_path_factory):
    """The server where DALI looks for it, with the photos at ROOT."""
    empty = tmp_path_factory.mktemp("aws") / "empty"
    empty.touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "2")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(empty))
        patch.setenv("AWS_CONFIG_FILE", str(empty))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", only_server.endpoint)
        fill(only_server, odd)
        only_server.put_folder(files.photos, "plain", "")
        yield only_server


def fill(server, odd):
    server.put_folder(odd.photos, "photos", ROOT.removeprefix("s3://photos/") + "/")


@pytest.fixture(scope="module")
def recorded(server, odd):
    """A data set file that was indexed from the server."""
    refer = odd.photos.parent / "refer"
    output = odd.dataset.with_name("remote.ris.h5")
    command = ["index", str(refer), "--dataset", "refcoco", "--split-by", "unc", "--split", "train", "--verify"]
    assert main([*command, "--images", ROOT, "-o", str(output)]) == 0
    return output


def make(files, **options):
    defaults = {"batch_size": 4, "size": 64, "dtype": "uint8", "policy": EVERY_KIND, "context_length": 16}
    return Loader(files.dataset, files.negatives, **{**defaults, **options})


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        assert np.array_equal(batch.plan, other.plan)
        for name in ("image", "mask", "tokens", "attention_mask"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_the_loader_yields_the_bits_of_local_files(server, odd, recorded):
    local = make(odd)
    expected = [*local, *local]
    assert {(row["kind"], row["grid"]) for batch in expected for row in batch.plan} >= {(0, 1), (1, 2), (2, 2), (2, 3)}
    remote, by_record = make(odd, images=ROOT + "/"), make(odd._replace(dataset=recorded))
    passes = iter(remote)
    first = [next(passes), next(passes)]
    resumed = make(odd._replace(dataset=recorded))
    resumed.load_state_dict(remote.state_dict())
    assert_same([*first, *resumed], expected[: len(local)])
    assert_same([*by_record, *by_record], expected)


def test_a_data_set_indexed_at_an_address_is_that_of_the_local_photos(odd, recorded):
    there, here = Dataset.open(recorded), Dataset.open(odd.dataset)
    assert there.image_root == ROOT
    assert there.fingerprint == here.fingerprint
    assert there.photo_path(3) == f"{ROOT}/{here.images.file_name[3]}"
    assert Dataset.open(recorded, images=odd.photos).photo_path(3) == here.photo_path(3)


def test_index_names_what_is_wrong_at_an_address(server, odd, tmp_path):
    annotations = read_refer(odd.photos.parent / "refer", dataset="refcoco", split_by="unc", split="train")
    client = server.client()
    good = {name: (odd.photos / name).read_bytes() for name in annotations.images.file_name}
    server.put_folder(odd.photos, "damaged", "")

    def index(**options):
        return index_dataset(annotations, images="s3://damaged", output=tmp_path / "a.ris.h5", verify=True, **options)

    names = sorted(good)[:2]
    client.put_object(Bucket="damaged", Key=names[0], Body=good[names[0]][:-300])
    with pytest.raises(PhotoError, match="1 of 12 photos are corrupt: ") as error:
        index()
    assert names[0] in str(error.value)
    assert index(skip_corrupt=True).left_out == (names[0],)
    client.put_object(Bucket="damaged", Key=names[0], Body=good[names[1]])
    with pytest.raises(PhotoError, match="1 of 12 photos have a different size"):
        index(skip_corrupt=True)
    client.delete_object(Bucket="damaged", Key=names[0])
    with pytest.raises(PhotoError, match=r"1 of 12 photos cannot be opened in s3://damaged: .*No such object"):
        index(skip_corrupt=True)
    of_coco = replace(annotations.images, file_name=["000000005802.jpg", *annotations.images.file_name[1:]])
    with pytest.raises(
        PhotoError, match=r"000000005802.jpg \(No such .* other release in folders only, not at an addr"
    ):
        index_dataset(replace(annotations, images=of_coco), images="s3://damaged", output=tmp_path / "a.ris.h5")
    with pytest.raises(NemoError, match="no such bucket"):
        index_dataset(annotations, images="s3://nowhere", output=tmp_path / "b.ris.h5")
    assert not (tmp_path / "b.ris.h5").exists()


@pytest.mark.slow
def test_every_command_takes_an_address(odd, recorded, tmp_path, clip, capsys):
    folder, _ = clip
    model = ["--model", str(folder / "tiny.json"), "--pretrained", str(folder / "tiny.pt")]
    made = {}
    for name, dataset in (("local", odd.dataset), ("remote", recorded)):
        table, tiles, sheet = (tmp_path / f"{name}{suffix}" for suffix in (".neg.h5", ".tiles.h5", ".png"))
        for command in (
            ["inspect", dataset],
            ["mine", dataset, *model, "-o", table],
            ["tiles", dataset, "--size", 32, "-o", tiles],
            ["preview", dataset, table, "--size", 64, "--count", 2, "-o", sheet],
        ):
            assert main([str(part) for part in command]) == 0, capsys.readouterr().err
        made[name] = [path.read_bytes() for path in (table, tiles, sheet)]
    assert ROOT in capsys.readouterr().out
    assert made["local"] == made["remote"]


def test_the_baseline_wants_local_photos(odd, recorded, capsys):
    command = ["bench", "loader", recorded, odd.negatives, "--baseline", "--batch-size", 2, "--size", 64]
    assert main([str(part) for part in command]) == 1
    assert re.fullmatch("nemo-dali: The baseline reads local photos.*\n", capsys.readouterr().err)


def failing_step(loader):
    """The error that ends a pass, and the batches before it."""
    batches = []
    with pytest.raises(NemoError) as error:
        batches.extend(loader)
    assert "\n" not in str(error.value)
    for secret in (ACCESS_KEY, SECRET_KEY, os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in str(error.value)
    return error.value, batches


def test_a_missing_photo_is_named_and_the_loader_goes_on_after_its_repair(server, odd):
    loader = make(odd, images=ROOT, policy=MosaicPolicy(p_mined=0), batch_size=2)
    expected = list(make(odd, policy=MosaicPolicy(p_mined=0), batch_size=2))
    victim = Dataset.open(odd.dataset).images.file_name[expected[2].plan["images"][0, 0]]
    place = {"Bucket": "photos", "Key": f"{ROOT}/{victim}".removeprefix("s3://photos/")}
    server.client().delete_object(**place)
    try:
        error, batches = failing_step(loader)
    finally:
        server.client().put_object(**place, Body=(odd.photos / victim).read_bytes())
    assert isinstance(error, PhotoError) and f"{ROOT}/{victim} (No such object, or not visible to these" in str(error)
    assert_same(batches + list_from(loader, 2 * len(batches)), expected)


def list_from(loader, seen):
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "samples_seen": seen})
    return list(loader)


def test_a_corrupt_photo_is_named(server, odd):
    policy = MosaicPolicy(p_mined=0)
    first = make(odd, policy=policy).plan(0, [0])["images"][0, 0]
    victim = Dataset.open(odd.dataset).images.file_name[first]
    place = {"Bucket": "photos", "Key": f"{ROOT}/{victim}".removeprefix("s3://photos/")}
    good = (odd.photos / victim).read_bytes()
    try:
        for bad in (good[:-300], b"", b"not a photo" * 50):
            server.client().put_object(**place, Body=bad)
            error, batches = failing_step(make(odd, images=ROOT, policy=policy))
            assert isinstance(error, PhotoError) and f"is corrupt: {ROOT}/{victim} (" in str(error) and not batches
    finally:
        server.client().put_object(**place, Body=good)


def test_a_wrong_bucket_is_told(server, odd):
    error, batches = failing_step(make(odd, images="s3://no-such-bucket/train"))
    assert "s3://no-such-bucket/train/ü 犬/a&b" in str(error) and "there is no such bucket. Say where" in str(error)
    assert not batches


@pytest.mark.slow
def test_refused_credentials_are_told_and_never_shown(server, files, monkeypatch, caplog):
    reader, stranger = server.add_user("reader", may_read=True), server.add_user("stranger", may_read=False)
    server.check_credentials(True)  # moto finds none right for odd names
    try:
        for credentials, words in (
            (reader | {"AWS_SECRET_ACCESS_KEY": "another+secret"}, "refuses the credentials (SignatureDoesNotMatch)"),
            ({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, "refuses the credentials (InvalidAccessKeyId)"),
            (stranger, "does not exist, or these credentials may not read it (AccessDenied)"),
        ):
            for name, value in credentials.items():
                monkeypatch.setenv(name, value)
            with caplog.at_level(logging.DEBUG):
                error, batches = failing_step(make(files, images="s3://plain"))
            assert words in str(error) and "s3://plain/COCO" in str(error) and not batches
            assert not isinstance(error, PhotoError)  # no photo is at fault, so none is to be replaced
            for secret in credentials.values():
                assert secret not in caplog.text and secret not in str(error)
        for name, value in reader.items():
            monkeypatch.setenv(name, value)
        assert_same(list(make(files, images="s3://plain")), list(make(files)))
    finally:
        server.check_credentials(False)


READ = """
import sys
from dataclasses import replace
from nemo_dali.data.s3 import read_object
sys.stdout.buffer.write(read_object(sys.argv[1]))
"""


@pytest.mark.slow
def test_credentials_may_lie_where_aws_keeps_them(server, files, tmp_path):
    photo = next(files.photos.iterdir())
    (tmp_path / ".aws").mkdir()
    user = server.add_user("somebody", may_read=True)
    lines = "".join(f"{name.lower()} = {value}\n" for name, value in user.items())
    (tmp_path / ".aws/credentials").write_text("[training]\n" + lines)
    unset = [*user, "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"]
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(tmp_path), "AWS_PROFILE": "training"}
    server.check_credentials(True)
    try:
        command = [sys.executable, "-c", READ, f"s3://plain/{photo.name}"]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    finally:
        server.check_credentials(False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == photo.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [503, 500, "hang"])
def test_a_short_fault_of_the_server_is_tried_again(server, odd, fault):
    loader = make(odd, images=ROOT, prefetch=1)
    passes = iter(loader)
    batches = [next(passes)]
    server.fail_next(fault)
    assert_same([*batches, *passes], list(make(odd)))


@pytest.mark.slow
@pytest.mark.timeout(120)  # no hang
def test_a_server_that_goes_away_is_told_and_one_that_returns_is_used(server, odd):
    options = {"batch_size": 2, "policy": MosaicPolicy(p_mined=0)}
    loader = make(odd, images=ROOT, **options)
    passes = iter(loader)
    batches = [next(passes)]
    server.stop()
    try:
        error, more = failing_step(passes)
        batches += more
    finally:
        server.start()
        fill(server, odd)
    assert f"{ROOT}/" in str(error) and "The server does not answer (could not connect to server)" in str(error)
    assert_same([*batches, *list_from(loader, 2 * len(batches))], list(make(odd, **options)))


def test_only_a_photo_that_is_missing_is_substituted(server, odd):
    options = {"on_error": "substitute", "policy": MosaicPolicy(p_mined=0)}
    victim = Dataset.open(odd.dataset).images.file_name[4]
    place = {"Bucket": "photos", "Key": f"{ROOT}/{victim}".removeprefix("s3://photos/")}
    server.client().delete_object(**place)
    try:
        loader = make(odd, images=ROOT, **options)
        assert not any((batch.plan["images"] == 4).any() for batch in loader)
        assert list(loader.substituted.photos) == [f"{ROOT}/{victim}"]
        loader = make(odd, images="s3://no-such-bucket", **options)
        failing_step(loader)
        assert not loader.substituted.photos
    finally:
        server.client().put_object(**place, Body=(odd.photos / victim).read_bytes())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a b/ü//", "s3://bucket/a b/ü"),
        (Path("s3://bucket/train"), "s3://bucket/train"),
        ("/a/b/", "/a/b"),
        ("/a/../b", "/b"),
        ("/", "/"),
    ],
)
def test_image_roots_as_they_are_kept(given, kept):
    assert image_root(given) == kept


@pytest.mark.parametrize(
    "given",
    [
        *("gs://bucket/a", "http://host/a", "file:///a", "s3://", "s3:///a", "s3://bucket/../other", "s3://bucket/./a"),
        *("s3://bucket//a", "s3://bucket/a?b", "s3://bucket/a#b", "s3://bucket/a\\b", "s3://bucket/a\nb", "s3://b c/a"),
    ],
)
def test_other_addresses_are_refused(odd, given):
    for use in (image_root, lambda images: Dataset.open(odd.dataset, images=images), lambda i: make(odd, images=i)):
        with pytest.raises(ValueError, match=r"images \(.* must be a folder or s3://bucket/prefix"):
            use(given)


@pytest.mark.parametrize(
    "given",
    [
        "s3://AKIAKEY:topsecret@bucket/a",
        "s3://AKIAKEY:a/topsecret@bucket/a",
        "s3://bucket/a?X-Amz-Signature=topsecret",
        "https://k:topsecret@host/b",
        Path("https://k:topsecret@host/b"),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(given):
    with pytest.raises(ValueError, match="without credentials") as error:
        image_root(given)
    assert "topsecret" not in str(error.value) and "AKIAKEY" not in str(error.value)


@pytest.mark.parametrize("name", ["a?b.jpg", "c/d#e.jpg"])
def test_names_that_dali_would_cut_are_refused_at_an_address(server, tmp_path, name):
    """Another object may have the shorter name."""

    def rename(_refs, instances):
        new = tmp_path / "photos" / name
        new.parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / instances["images"][1]["file_name"]).rename(new)
        instances["images"][1]["file_name"] = name

    refer = write_refer(tmp_path, photos=4, edit=rename)
    annotations = read_refer(refer.root, dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=tmp_path / "a.ris.h5")
    assert Dataset.open(tmp_path / "a.ris.h5").photo_path(0)
    for use in (
        lambda: Dataset.open(tmp_path / "a.ris.h5", images="s3://bucket"),
        lambda: index_dataset(annotations, images="s3://bucket", output=tmp_path / "b.ris.h5"),
    ):
        with pytest.raises(PhotoError, match="cannot be read from s3://bucket: DALI treats") as error:
            use()
        assert name in str(error.value)
    check_names("/local", [name])


def test_a_recorded_address_of_another_kind_is_damage(odd, tmp_path):
    copied = tmp_path / "a.ris.h5"
    forge(odd.dataset, lambda parts: parts.attributes.update(image_root="ftp://host/photos"), copied)
    with pytest.raises(FileFormatError, match=r"damaged: .*s3://bucket/prefix"):
        Dataset.open(copied)


@pytest.mark.slow
def test_what_is_read(server, odd):
    assert read_object(f"{ROOT}/{ODD.format(0)}") == (odd.photos / ODD.format(0)).read_bytes()
    for wrong in (f"{ROOT}/missing.jpg", ROOT, f"{ROOT}/ü 犬"):  # a folder is no object
        with pytest.raises(FileNotFoundError):
            read_object(wrong)
    server.fail_next(503, 503)  # both attempts of the first read; the listing is answered
    assert read_object(f"{ROOT}/{ODD.format(0)}") == (odd.photos / ODD.format(0)).read_bytes()
    server.fail_next(*[503] * 6)
    with pytest.raises(OSError, match="refuses to give it"):
        read_object(f"{ROOT}/{ODD.format(0)}")
    server.fail_next()


def test_a_certificate_that_cannot_be_checked_is_told_with_the_remedy():
    said = "curlCode: 77, Problem with the SSL CA cert (path? access rights?); Details: error adding trust anchors"
    with pytest.raises(NemoError, match=r"s3://b/k cannot be read: .*certificate.* link the system's there"):
        _raise_refusal("s3://b/k", said)


def test_the_object_that_dali_names():
    said = "encountered:\n\nS3 Object not found. bucket=b object=ü 犬/a b.jpg:\n: No response body.\nCurrent pipeline"
    assert failed_address(RuntimeError(said)) == "s3://b/ü 犬/a b.jpg"
    assert failed_address(RuntimeError("Cannot open file")) is None and failed_address(None) is None
