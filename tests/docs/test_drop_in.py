"""docs/drop-in: its snippets run, its calls name options that exist, and its table of equal pixels is true."""

import ast
import inspect
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from nemo_dali import Loader, MosaicPolicy, presets
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.metrics import Segmentation
from nemo_dali.presets import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, PRESETS
from tests.helpers.files import make_files
from tests.helpers.independent_tokenizers import bert_vocabulary
from tests.helpers.lanes import lanes
from tests.helpers.paths import ROOT
from tests.helpers.refer import write_refer
from tests.helpers.tables import write_random_table

PAGES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs/drop-in").glob("*.md"))}
INDEX, TEXT = PAGES["index.md"], "\n".join(PAGES.values())
SNIPPETS = dict(re.findall(r"<!-- run ([\w-]+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))
CODE = re.findall(r"```(?:python|diff)\n(.*?)```", TEXT, re.DOTALL)
SINGLE = MosaicPolicy(p_mined=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """4 photos, 8 refs: the presets' frames are large."""
    return make_files(tmp_path_factory.mktemp("few"), photos=4)


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """A folder with the files that the snippets name."""
    made = tmp_path_factory.mktemp("drop-in")
    for name, path in (("refcoco.ris", files.dataset), ("val.ris", files.dataset), ("refcoco.neg", files.negatives)):
        (made / f"{name}.h5").symlink_to(path)

    def generalise(refs, instances):
        for number, ref in enumerate(refs):
            empty = number % 3 == 0
            ref["ann_id"], ref["category_id"] = ([-1], [-1]) if empty else ([ref["ann_id"]], [ref["category_id"]])

    refer = write_refer(made / "grefcoco", photos=4, dataset="grefcoco", refs_file="grefs(unc).json", edit=generalise)
    annotations = read_refer(refer.root, dataset="grefcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=made / "grefcoco.ris.h5")
    write_random_table(made / "grefcoco.neg.h5", Dataset.open(made / "grefcoco.ris.h5"))
    (made / "grefcoco-val.ris.h5").symlink_to(made / "grefcoco.ris.h5")
    (made / "vocab.txt").write_text("\n".join(bert_vocabulary(["thing", "no"])) + "\n", "utf-8")
    return made


class Oracle:
    """A model that knows the answers, in a repository's own form: it reads the same batches as the snippet."""

    def __init__(self, name):
        dataset = "grefcoco-val.ris.h5" if name == "rela" else "val.ris.h5"
        vocabulary = {} if name == "cris" else {"vocabulary": "vocab.txt"}
        self.name, preset = name, PRESETS[name](**vocabulary)
        self.batches = iter(Loader(dataset, split_mode="eval", batch_size=8, preset=preset))

    def eval(self):
        return self

    def __call__(self, image, *text, return_probs=False):
        batch = next(self.batches)
        mask = batch.mask.float()[:, None]
        if self.name == "rela":
            assert torch.equal(torch.stack([sample["image"] for sample in image]), batch.image)
            empty = torch.from_numpy(batch.empty).float()
            return [
                {"ref_seg": torch.cat([1 - one, one]), "nt_label": torch.stack([1 - none, none])}
                for one, none in zip(mask, empty, strict=True)
            ]
        assert torch.equal(image, batch.image) and torch.equal(text[0], batch.tokens)
        if self.name in ("cris", "cgformer"):
            return torch.nn.functional.interpolate(mask, scale_factor=0.5, mode="area") * 20 - 10
        if self.name == "caris" and not return_probs:
            return mask.long()
        return torch.cat([1 - mask, mask], dim=1)


@pytest.mark.parametrize("name", lanes(["lavt", "caris", "cris", "cgformer", "rela"], fast=["caris", "cris"]))
def test_an_evaluation_finds_a_perfect_model_nearly_perfect(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    space = {"model": Oracle(name)}
    exec(SNIPPETS[name], space)
    result = space["result"]
    overall, mean = ("cIoU", "gIoU") if name == "rela" else ("oIoU", "mIoU")
    least = 1.0 if name in ("lavt", "rela") else 0.9  # the others go through the photo's own size
    assert result[overall] >= least and result[mean] >= least
    if name == "rela":
        assert result["N-acc"] == result["T-acc"] == 1


def test_validation_returns_what_criss_training_script_unpacks(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model, said = Oracle("cris"), []
    space = {"model": model, "logger": SimpleNamespace(info=said.append)}
    exec(SNIPPETS["cris"], space)
    exec(SNIPPETS["validate"], space)
    loader = Loader("val.ris.h5", split_mode="eval", batch_size=8, preset="cris")
    model.batches = iter(Loader("val.ris.h5", split_mode="eval", batch_size=8, preset="cris"))
    iou, prec_dict = space["validate"](loader, SimpleNamespace(module=model), 1, None)
    assert type(iou) is float and iou == space["result"]["mIoU"] and said == [space["result"]]
    assert [*prec_dict] == [f"Pr@{x}" for x in (50, 60, 70, 80, 90)] and prec_dict["Pr@50"] == 1


def test_validation_returns_what_cgformers_training_script_unpacks(folder, monkeypatch):
    monkeypatch.chdir(folder)
    preset, oracle = presets.cgformer(vocabulary="vocab.txt"), Oracle("cgformer")

    def module(*batch):
        return torch.nn.functional.interpolate(oracle(*batch), scale_factor=2), None

    said = []
    space = {"torch": torch, "Segmentation": Segmentation, "logger": SimpleNamespace(info=said.append)}
    exec(SNIPPETS["validate-cgformer"], space)
    loader = Loader("val.ris.h5", split_mode="eval", batch_size=8, preset=preset)
    model = SimpleNamespace(module=module, eval=lambda: None)
    iou, prec_dict = space["validate"](loader, model, 1, None)
    assert type(iou) is float and iou == said[0]["oIoU"] > 0.9
    assert [*prec_dict] == [f"Pr@{x}" for x in (50, 60, 70, 80, 90)] and prec_dict["Pr@50"] == 1


def test_several_data_sets(folder, monkeypatch):
    monkeypatch.chdir(folder)
    space = {}
    exec(SNIPPETS["mix"], space)
    assert space["image"].shape == (8, 3, 448, 448) and space["targets"]["mask"].shape == (8, 448, 448)
    assert len(space["loader"].dataset) == sum(
        len(Dataset.open(f"{name}.ris.h5").refs.ref_id) for name in ("refcoco", "grefcoco")
    )


def test_transforms_behind_the_loader(folder, monkeypatch):
    monkeypatch.chdir(folder)
    space = {}
    exec(SNIPPETS["transforms"], space)
    assert space["image"].shape == (8, 3, 480, 480) and space["image"].dtype == torch.float32
    assert -2.2 < space["image"].min() < space["image"].max() < 2.7


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own
def test_lightning(folder, monkeypatch):
    import lightning

    monkeypatch.chdir(folder)
    space = {}
    exec(SNIPPETS["lightning"], space)
    seen = []

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, _):
            seen.append(("train", batch.image.shape))
            return self.layer(batch.image.mean((2, 3))).mean()

        def validation_step(self, batch, _):
            seen.append(("val", len(batch.original_masks())))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    few = {"limit_train_batches": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0, "max_epochs": 1}
    lightning.Trainer(accelerator="cpu", **quiet, **few).fit(Model(), datamodule=space["Data"]())
    assert seen == [("train", (8, 3, 480, 480)), ("val", 8)]


def calls(code, name):
    """Every call of a name in a snippet or the added lines of a diff."""
    text = "\n".join(line.removeprefix("+") for line in code.splitlines() if not line.startswith("-"))
    for found in re.finditer(rf"(?<!\w){re.escape(name)}\(", text):
        depth, end = 0, found.start()
        for end in range(found.end() - 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                break
        yield ast.parse(" ".join(text[found.start() : end + 1].split()), mode="eval").body


def test_every_call_names_options_that_exist():
    for name, function in {"Loader": Loader, **{f"presets.{key}": value for key, value in PRESETS.items()}}.items():
        found = [call for code in CODE for call in calls(code, name)]
        assert found or name in ("presets.etris", "presets.detris")
        for call in found:
            names = [keyword.arg for keyword in call.keywords]
            assert None not in names, f"{ast.unparse(call)} spreads options"
            assert set(names) <= inspect.signature(function).parameters.keys(), ast.unparse(call)


def test_every_argument_of_a_dataloader_has_its_row():
    table = INDEX.partition("### Arguments of a DataLoader")[2].partition("\n### ")[0]
    named = {name for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(inspect.signature(torch.utils.data.DataLoader).parameters) | {"in_order"}


def test_every_preset_has_its_row_and_its_page():
    rows = re.findall(r"^\| \[[^]|]+\]\(([\w.]+)\) \| `(\w+)` \|", INDEX, re.MULTILINE)
    assert sorted(preset for _, preset in rows) == sorted(PRESETS)
    assert {page for page, _ in rows} == PAGES.keys() - {"index.md"}
    for page, preset in rows:
        assert f"presets.{preset}" in PAGES[page], page


def test_every_snippet_has_a_name_of_its_own():
    assert len(SNIPPETS) == TEXT.count("<!-- run ")


def photos_and_masks(preset, files):
    """Of a loader without mosaics: each sample's photo and mask as stored, and what the loader made of them."""
    loader = Loader(files.dataset, policy=SINGLE, batch_size=8, preset=preset, style="batch")
    for batch in loader:
        for row, image, mask in zip(batch.plan, batch.image, batch.mask, strict=True):
            yield loader.corpus.photo_path(row["images"][0]), loader.corpus.mask(row["ref"]), image, mask


def test_frames_are_those_of_torchvision_on_pil_images(files, folder):
    from torchvision.transforms import functional

    for path, whole, image, mask in photos_and_masks(presets.lavt(vocabulary=str(folder / "vocab.txt")), files):
        photo = functional.resize(Image.open(path).convert("RGB"), [480, 480])
        assert torch.equal(image, functional.normalize(functional.to_tensor(photo), IMAGENET_MEAN, IMAGENET_STD))
        resized = Image.fromarray(whole).resize((480, 480), Image.Resampling.NEAREST)
        assert torch.equal(mask, torch.from_numpy(np.array(resized, np.int64)))


def test_letterboxed_frames_are_those_of_warp_affine(files):
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    for path, whole, image, mask in photos_and_masks("cris", files):
        photo = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
        height, width = photo.shape[:2]
        scale = min(416 / height, 416 / width)
        x, y = (416 - width * scale) / 2, (416 - height * scale) / 2
        box = np.float32([[x, y], [x + width * scale, y], [x, y + height * scale]])
        to_frame = cv2.getAffineTransform(np.float32([[0, 0], [width, 0], [0, height]]), box)
        border = [255 * value for value in CLIP_MEAN]
        warped = cv2.warpAffine(photo, to_frame, (416, 416), flags=cv2.INTER_CUBIC, borderValue=border)
        warped = torch.from_numpy(warped).permute(2, 0, 1).float()
        assert torch.equal(image, warped.div(255).sub(mean).div(std))
        soft = cv2.warpAffine(whole * 255, to_frame, (416, 416), flags=cv2.INTER_LINEAR)
        assert torch.equal(mask, torch.from_numpy(soft / 255).float())
