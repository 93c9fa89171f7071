"""What was put in a photo's place to do harm ends in a sentence, soon and in little memory, wherever it is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo_dali.data.dataset import Dataset
from tests.helpers import fork_server
from tests.helpers.files import make_files
from tests.helpers.hostile_photos import NO_PHOTOS, png, resized
from tests.helpers.lanes import lanes

pytestmark = pytest.mark.process

# Everything that reads photos, in a process that may take no more than a minute of a core and may not grow much.
PROGRAM = """
import json, logging, resource, sys
from pathlib import Path
from nemo_dali import Loader, MosaicPolicy, NemoError
from nemo_dali.commands.report.page import _picture
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.mining._inputs import Photos
from nemo_dali.mining.clip import load_clip
from nemo_dali.tiles.build import make_tiles

resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
logging.disable()
folder, clip, row = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
files, dataset = (str(folder / "data.ris.h5"), str(folder / "data.neg.h5")), Dataset.open(folder / "data.ris.h5")
model = load_clip(str(clip / "tiny.json"), str(clip / "tiny.pt"), device="cpu")
said = {}

def loader(**options):
    made = Loader(*files, batch_size=4, size=64, policy=MosaicPolicy(p_mined=1), context_length=16, **options)
    list(made)
    return made

def index(verify):
    annotations = read_refer(folder / "refer", dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=folder / "photos", output=folder / "b.ris.h5", verify=verify)

def record(what, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except NemoError as error:
        said[what] = f"{type(error).__name__}: {error}"

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record("loader", loader)
record("tiles", make_tiles, files[0], size=32, output=folder / "a.tiles.h5")
record("mine", lambda: list(Photos(model, dataset, batch_size=4, num_threads=1).batches(range(3))))
record("index", index, False)
record("index --verify", index, True)
said["report"] = _picture(dataset, row, None)
said["substitute"] = "".join(loader(on_error="substitute").substituted.photos.values())
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""
LARGEST_GROWTH = 300  # MiB; the libraries' own share is 100


def jpeg_of(width, height, **options):
    def write(path: Path):
        noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(path, "JPEG", **options)
        path.write_bytes(resized(path.read_bytes(), width, height))

    return write


BOMBS = {
    "a PNG of 20000x20000": (lambda path: path.write_bytes(png(20000, 20000)), "20000x20000 pixels, not "),
    "a JPEG of 65500x65500": (jpeg_of(65500, 65500), "65500x65500 pixels, not "),
    "a progressive JPEG of 65500x65500": (jpeg_of(65500, 65500, progressive=True), "65500x65500 pixels, not "),
}


@pytest.mark.parametrize("what", lanes([*NO_PHOTOS, *BOMBS], fast=["a FIFO", "a PNG of 20000x20000"]))
def test_everything_that_reads_photos_names_it(tmp_path, clip, what):
    put, words = (NO_PHOTOS | BOMBS)[what]
    files = make_files(tmp_path, photos=12)
    dataset = Dataset.open(files.dataset)
    path = Path(dataset.photo_path(3))
    put(path)
    done = fork_server.run(PROGRAM, tmp_path, clip[0], 3)
    assert done.returncode == 0, done.stderr[-2000:]
    said, grown = json.loads(done.stdout)
    assert grown < LARGEST_GROWTH
    assert said.pop("report") == ""
    assert said.keys() == {"loader", "tiles", "mine", "index", "index --verify", "substitute"}
    for where, sentence in said.items():
        assert f"{path.name} ({words}" in sentence, (where, sentence)
        assert where == "substitute" or sentence.startswith("PhotoError")
