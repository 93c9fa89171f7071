"""Damaged headers of every kind of photo: a problem or a photo, never a signal, a hang or another exception."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import fork_server
from tests.helpers.counts import examples

WIDTH, HEIGHT = 37, 29
KINDS = {  # Pillow's mode, format and options
    "JPEG": ("RGB", "JPEG", {"quality": 80}),
    "JPEG with EXIF": ("RGB", "JPEG", {"exif": True}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "CMYK JPEG": ("CMYK", "JPEG", {}),
    "grey JPEG": ("L", "JPEG", {"restart_marker_rows": 1}),
    "PNG": ("RGB", "PNG", {}),
    "PNG with EXIF": ("RGBA", "PNG", {"exif": True}),
    "palette PNG": ("P", "PNG", {}),
    "grey PNG": ("LA", "PNG", {}),
    "PNG of a bit": ("1", "PNG", {}),
}


def photo(kind):
    mode, name, options = KINDS[kind]
    if "exif" in options:
        exif = Image.Exif()
        exif[0x112], exif[0x10F] = 6, "a maker"
        options = {**options, "exif": exif}
    noise = np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).resize((WIDTH, HEIGHT)).convert(mode).save(encoded, name, **options)
    return encoded.getvalue()


def damaged(content, others, rng):
    """Bytes flipped, taken out, put in, cut off or from another photo; the header mostly."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(min(len(data), rng.choice((16, 64, 700, 10**9))) or 1)
        way = rng.randrange(6)
        if way == 0 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif way == 1 and data:
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif way == 2:
            del data[place:]
        elif way == 3:
            del data[place : place + rng.randrange(1, 40)]
        elif way == 4:
            data[place:place] = rng.randbytes(rng.randrange(1, 40))
        else:
            other = rng.choice(others)
            begin = rng.randrange(len(other))
            data[place : place + rng.randrange(1, 200)] = other[begin : begin + rng.randrange(1, 200)]
    return bytes(data)


# Looks at all photos of a folder by Pillow and by DALI's graph, in batches, as one batch of bad and good ones.
PROGRAM = """
import os, sys
own = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where DALI's decoders write, any bytes
sys.stderr = os.fdopen(own, "w")
import hashlib, json, resource
from pathlib import Path
import numpy as np
from PIL import Image
from nemo_dali.data.columns import Images
from nemo_dali.data.photo_file import open_file, open_photo
from nemo_dali.data.photos import check_photos, find_problem
from nemo_dali.pipeline.decoder_check import refused
from nemo_dali.mining._inputs import _PhotoPipeline
from nemo_dali.pipeline.paths import encode_path

resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30,) * 2)
folder, width, height = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
paths = sorted(map(str, folder.iterdir()))
row = np.arange(len(paths))
widths, heights = np.full(len(paths), width, np.int32), np.full(len(paths), height, np.int32)
images = Images(row, widths, heights, [Path(path).name for path in paths], row, row.astype(np.int32))

problems = [find_problem(path, width, height) for path in paths]
bad = [i for i, problem in enumerate(problems) if problem is not None]
assert all(problem.sentence() and problem.remedy() for problem in problems if problem)
soundsized = [i for i in range(len(paths)) if problems[i] is None or problems[i].kind != "size"]
kept = np.array(soundsized)
some = Images(*(column[kept] if isinstance(column, np.ndarray) else [column[i] for i in soundsized]
                for column in (images.id, widths, heights, images.file_name, row, images.category_count)))
checked = check_photos(some, str(folder), verify=True, skip_corrupt=True)
assert {soundsized[i] for i in checked.corrupt} >= {i for i in bad if problems[i].kind != "size"}
assert checked.orientation.max() <= 8
assert all(bytes(digest) == hashlib.sha256(Path(paths[i]).read_bytes()).digest()
           for digest, i in zip(checked.digest, soundsized, strict=True))

by_dali = refused(paths, widths, heights, num_threads=2)
sound = sorted(set(soundsized) - {soundsized[i] for i in checked.corrupt})
assert not set(sound) & set(by_dali), [paths[i] for i in set(sound) & set(by_dali)]
pipeline = _PhotoPipeline(max_cells=len(sound), num_threads=2, prefetch=1)
pipeline.feed([encode_path(paths[i]) for i in sound], np.array([[height, width]] * len(sound), np.int32), None)
for i, pixels in zip(sound, pipeline.wait(), strict=True):
    with open_file(paths[i]) as file:
        photo = open_photo(file)
        assert photo.mode == "CMYK" or np.array_equal(pixels, np.asarray(photo.convert("RGB"))), paths[i]
pipeline.close()
print(json.dumps([len(sound), len(bad), len(by_dali)]))
"""


@pytest.mark.fuzz
@pytest.mark.process
@pytest.mark.parametrize("seed", range(examples(100) // 10))
def test_damaged_photos_are_bad_or_good_and_nothing_else_happens(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    contents = [photo(kind) for kind in KINDS]
    for number in range(200):
        (tmp_path / f"{number:03}").write_bytes(damaged(contents[number % len(contents)], contents, rng))
    for number, content in enumerate(contents):
        (tmp_path / f"whole {number}").write_bytes(content)
    done = fork_server.run(PROGRAM, tmp_path, WIDTH, HEIGHT)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    sound, bad, by_dali = json.loads(done.stdout)
    assert sound >= len(KINDS) and bad > 50 and by_dali > 50
