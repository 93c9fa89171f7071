"""One photo's file: opened only if it is one, and its header read in bounded time and memory."""

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nemo_dali.data.photo_file import MOST_HEADER, is_unfit, open_file, open_photo, orientation_of
from nemo_dali.data.photos import find_problem, read_header
from nemo_dali.errors import PhotoError
from tests.helpers import fork_server
from tests.helpers.counts import examples
from tests.helpers.hostile_photos import NO_PHOTOS, chunk, insert, png, segment
from tests.helpers.lanes import lanes


def photo(kind, **options):
    encoded = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(encoded, kind, **options)
    return encoded.getvalue()


def orientation(content):
    return orientation_of(open_photo(io.BytesIO(content)))


@pytest.mark.parametrize("what", NO_PHOTOS)
def test_what_is_no_photos_file_is_not_opened(tmp_path, what):
    put, words = NO_PHOTOS[what]
    path = tmp_path / "a.jpg"
    path.write_bytes(photo("JPEG"))
    with open_file(str(path)) as file:
        assert open_photo(file).size == (40, 30)
    assert not is_unfit(str(path)) and not is_unfit(str(tmp_path / "missing")) and not is_unfit("a\0b")
    put(path)
    assert is_unfit(str(path))
    with pytest.raises(OSError, match=words):
        open_file(str(path))
    assert find_problem(str(path), 40, 30).sentence() == f"A photo cannot be opened: {path} ({words})"


def test_a_link_to_a_photo_is_a_photo(tmp_path):
    (tmp_path / "a.jpg").write_bytes(photo("JPEG"))
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert find_problem(str(tmp_path / "b.jpg"), 40, 30) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("value", range(1, 9))
def test_the_orientation_is_pillows(kind, value):
    exif = Image.Exif()
    exif[0x10F], exif[0x112], exif[0x132] = "a maker", value, "2024:01:01 00:00:00"
    assert orientation(photo(kind, exif=exif)) == value
    swapped = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, value, 0, 0)
    assert orientation(photo(kind, exif=swapped)) == value


@settings(max_examples=examples(400), deadline=None)
@given(
    block=st.binary(max_size=60)
    | st.builds(
        lambda begin, entries, rest: (
            b"II*\0"
            + struct.pack("<IH", begin, len(entries))
            + b"".join(struct.pack("<HHII", *e) for e in entries)
            + rest
        ),
        st.sampled_from([0, 2, 8, 9, 2**32 - 1]),
        st.lists(
            st.tuples(
                st.sampled_from([0x112, 0x10F, 0]),
                st.sampled_from([3, 3, 4, 0, 99]),
                st.sampled_from([1, 1, 0, 2, 2**31]),
                st.sampled_from([0, 1, 6, 8, 9, 2**32 - 1]),
            ),
            max_size=3,
        ),
        st.binary(max_size=8),
    )
)
@pytest.mark.fuzz
def test_no_exif_block_fails_and_what_it_says_pillow_says_too(block):
    found = orientation(insert(photo("JPEG"), segment(0xE1, b"Exif\0\0" + block)))
    assert found == orientation(png(40, 30, chunks=chunk(b"eXIf", block)))
    assert 0 <= found <= 8
    if found:
        read = Image.Exif()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what comes behind may be cut short
            read.load(block)
        assert read.get(0x112) == found


def test_a_photo_without_exif_has_no_orientation(tmp_path):
    assert orientation(photo("JPEG")) == orientation(photo("PNG")) == 0
    assert orientation(photo("JPEG", exif=b"Exif\0\0")) == 0


READ = """
import io, resource, sys, time
from nemo_dali.data.photo_file import open_photo, orientation_of
from tests.helpers.hostile_photos import chunk, insert, png, segment
from tests.data.test_photo_file import photo, HEADERS
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
content = HEADERS[sys.argv[1]]()
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    print(orientation_of(open_photo(io.BytesIO(content))))
except Exception as error:
    print(error)
print(time.process_time() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
# Each entry of the directory is as long as the whole block: who copies them all copies 50 GB.
DIRECTORY = (
    b"II*\0" + struct.pack("<IH", 8, 65535) + b"".join(struct.pack("<HHII", tag, 1, 2**19, 0) for tag in range(65535))
)
HEADERS = {
    "a directory of 65,535 long entries": lambda: insert(photo("JPEG"), segment(0xE1, b"Exif\0\0" + DIRECTORY)),
    "the same in a PNG": lambda: png(40, 30, chunks=chunk(b"eXIf", DIRECTORY)),
    "200 MB of EXIF": lambda: insert(photo("JPEG"), segment(0xE1, b"Exif\0\0" + bytes(2 * 10**8))),
    "100 MB of rubbish": lambda: insert(photo("JPEG"), segment(0xFE, b"a") + bytes(10**8)),
    "100 MB of empty chunks": lambda: png(40, 30, chunks=chunk(b"abCd", b"") * (10**8 // 12)),
    "a text that expands to 200 MB": lambda: png(
        40, 30, chunks=chunk(b"zTXt", b"a\0\0" + zipped(2 * 10**8)) + chunk(b"iCCP", b"a\0\0" + zipped(2 * 10**8))
    ),
}


def zipped(length):
    import zlib

    compressor = zlib.compressobj(9)
    return b"".join(compressor.compress(bytes(10**6)) for _ in range(length // 10**6)) + compressor.flush()


@pytest.mark.process
@pytest.mark.parametrize("what", lanes(HEADERS, fast=["a directory of 65,535 long entries"]))
def test_a_header_is_read_in_bounded_time_and_memory(what):
    done = fork_server.run(READ, what)
    assert done.returncode == 0, done.stderr[-2000:]
    said, numbers = done.stdout.splitlines()
    seconds, grown = map(float, numbers.split())
    assert said in (
        "0",
        "its header is larger than 16 MiB",
        "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
    )
    assert seconds < 10 and grown < 200, (seconds, grown)


def test_profiles_of_usual_length_are_read():
    profile = np.random.default_rng(0).integers(0, 255, 3 * 2**20, np.uint8).tobytes()
    assert 4 * len(profile) < MOST_HEADER
    assert open_photo(io.BytesIO(photo("JPEG", icc_profile=profile))).info["icc_profile"] == profile


def test_a_photo_larger_than_any_that_is_read_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(png(20000, 20000))
    words = r"20000x20000 pixels, more than the limit of 178,956,970"
    problem = find_problem(str(tmp_path / "a.png"), 20000, 20000)
    assert problem.kind == "large" and problem.text.endswith(f"a.png ({words})")
    with pytest.raises(PhotoError, match=rf"a.png in {tmp_path} has {words}\. Replace it"):
        read_header(str(tmp_path), "a.png")
