"""Every preset against the contract of its repository: structure, dtypes, pixels, masks and tokens.

What the original loaders do is written out here with torchvision, OpenCV 4, Pillow and pycocotools, as their sources do
it; tokens come from the independent tokenizers. Where ``NEMO_DALI_TEST_REFER`` names a folder with RefCOCO's layout
(``refcoco/refs(unc).p``, ``images/mscoco/images/train2014``), pixels and masks are compared on its val split too.
"""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from nemo_dali import presets
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import StateError
from nemo_dali.loader.format import BatchFormat, format_of
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.presets import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from nemo_dali.synthetic import synthesize
from tests.helpers.files import Files
from tests.helpers.independent_tokenizers import bert_row, bert_vocabulary, clip_row
from tests.helpers.oracles import letterbox_matrix
from tests.helpers.refer import write_refer
from tests.helpers.tables import write_random_table

AWKWARD = [  # raw; "sent" is in small letters and without punctuation
    "Woman in front of the wall",
    "the 2nd man's hat, left-most!",
    "a very long sentence that goes on and on and on until no tokenizer with twenty places can hold all of its words",
    "café — naïve façade",
    "漢字 sign on the right",
    "emoji \N{DOG FACE} dog",
    "&quot;STOP&quot; sign",
    "zzyzx qqq",
    "it's the dog's bowl",
    "  many   spaces  ",
    "100% of #1",
    "(bottom) left/right",
    "o'clock... 12:30",
    "UPPER lower",
    "x",
    "?!",
    "semi;colon, comma",
    "under_score",
    "1234567890",
    "tall-ish person w/ bag & hat",
]
BERTS = ("lavt", "rmsin", "caris", "maskris", "cgformer", "rela", "dmmi")
RAW = ("lavt", "rmsin", "rela", "dmmi")
CLIPS = {"cris": 416, "etris": 416, "detris": 448, "nemo": 416}
SIZES = {"lavt": 480, "rmsin": 480, "caris": 448, "maskris": 448, "cgformer": 480, "rela": 480, "dmmi": 480} | CLIPS
MIXED = MosaicPolicy(p_mined=0.4, p_random=0.2, grids={2: 1.0, 3: 1.0}, top_k=10)


def awkward(refs, instances):
    count = 0
    for ref in refs:
        for sentence in ref["sentences"]:
            sentence["raw"] = AWKWARD[count % len(AWKWARD)]
            plain = "".join(c if c.isalnum() or c == " " else " " for c in sentence["raw"].lower())
            sentence["sent"] = plain if plain.strip() else "punctuation"
            count += 1
    assert count >= len(AWKWARD)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets")
    refer = write_refer(folder, photos=14, refs_per_photo=2, edit=awkward)
    files = Files(folder / "data.ris.h5", folder / "data.neg.h5", refer.photos)
    index_dataset(
        read_refer(refer.root, dataset="refcoco", split_by="unc", split="train"),
        images=refer.photos,
        output=files.dataset,
    )
    write_random_table(files.negatives, Dataset.open(files.dataset))
    return files


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    words = "woman in front of the wall man hat left most very long sentence that goes on and dog bowl sign right until"
    path.write_text("\n".join(bert_vocabulary(words.split())) + "\n", "utf-8")
    return path


def nouns(sentence):
    """Places of the words with three letters, for a test a sort of noun."""
    return [place for place, word in enumerate(sentence.split(), 1) if len(word) == 3]


def options_of(name, vocabulary):
    options = {} if name in CLIPS else {"vocabulary": str(vocabulary)}
    return getattr(presets, name)(**options, **({"nouns": nouns} if name == "dmmi" else {}))


def load(data, name, vocabulary, **options):
    defaults = {"batch_size": 7, "policy": MIXED, "seed": 3, "infinite": False}
    return Loader(data.dataset, data.negatives, preset=options_of(name, vocabulary), **defaults | options)


def test_every_preset_is_held_against_its_repository():
    assert set(SIZES) == set(presets.PRESETS) and {*presets.PRESETS} <= {*presets.__all__}


# --- structure -------------------------------------------------------------------------------------------------------


def parts_of(name, step):
    """The step's parts by name, once its structure is found to be the repository's."""
    if name in ("lavt", "rmsin", "cris", "etris", "detris", "nemo", "dmmi", "cgformer"):
        assert type(step) is tuple
    if name in ("lavt", "rmsin"):
        image, mask, tokens, attention = step
    elif name in CLIPS:
        image, tokens, mask = step
        attention = None
    elif name in ("caris", "maskris"):
        assert type(step) is list
        image, targets, tokens, *masked, attention = step
        assert list(targets) == ["mask", "cls"] and len(masked) == (name == "maskris")
        mask = targets["mask"]
        assert (targets["cls"].dtype, targets["cls"].shape) == (torch.int64, (len(image),))
    elif name == "cgformer":
        assert [type(part) for part in step] == [tuple] * 4
        image, tokens, mask, attention = map(torch.stack, step)  # as its engine does
    elif name == "dmmi":
        image, mask, source, tokens, masked, attention = step
        assert source == ["one"] * len(image) and masked.shape == tokens.shape and masked.dtype == torch.int64
    else:
        assert type(step) is list and all(type(sample) is dict for sample in step)
        for sample in step:
            size = tuple(sample["image"].shape[1:])
            assert (sample["height"], sample["width"]) == size == sample["instances"].image_size
            assert type(sample["empty"]) is bool and type(sample["sentence"]) is str
            assert sample["lang_tokens"].shape == sample["lang_mask"].shape == (1, 20)
            assert sample["instances"].gt_masks.shape == (1, *size) and len(sample["instances"].gt_classes) == 1
            assert sample["gt_mask_merged"].shape == (1, *size)
        names = ("image", "gt_mask_merged", "lang_tokens", "lang_mask")
        image, mask, tokens, attention = (torch.stack([sample[name] for sample in step]) for name in names)
        mask = mask[:, 0]
    return image, mask, tokens, attention


@pytest.mark.parametrize("name", SIZES)
def test_a_step_has_the_repositorys_structure_shapes_and_types(data, vocabulary, name):
    loader = load(data, name, vocabulary)
    image, mask, tokens, attention = parts_of(name, next(iter(loader)))
    size = SIZES[name]
    assert image.shape == (7, 3, size, size) and mask.shape == (7, size, size)
    assert image.dtype == (torch.uint8 if name == "rela" else torch.float32)
    assert mask.dtype == (torch.float32 if name in CLIPS else torch.int64)
    assert tokens.dtype == torch.int64
    assert tokens.shape == ((7, 17) if name in CLIPS else (7, 1, 20))
    if attention is not None:
        assert attention.shape == tokens.shape and attention.dtype == torch.int64
        assert set(attention.unique().tolist()) <= {0, 1}
    assert 0 <= mask.min() and mask.max() == 1
    assert loader.sampler.set_epoch(0) is None and len(loader.dataset) == len(
        loader.corpus.sent_id if name == "rela" else loader.corpus.ref_id
    )
    assert len(loader) == len(loader.dataset) // 7


def test_expressions_without_a_target_are_empty_in_relas_structure(vocabulary, tmp_path):
    synthesize(tmp_path / "data", images=40, layout="grefcoco")
    path = tmp_path / "data.ris.h5"
    photos = next((tmp_path / "data").rglob("*.jpg")).parent
    annotations = read_refer(tmp_path / "data", dataset="grefcoco", split_by="unc", split="train")
    index_dataset(annotations, images=photos, output=path)
    loader = Loader(
        path,
        preset=options_of("rela", vocabulary),
        size=64,
        batch_size=8,
        policy=MosaicPolicy(p_mined=0, p_random=0.5),
        infinite=False,
    )
    shown = {True: 0, False: 0}
    for step in loader:
        for sample in step:
            shown[sample["empty"]] += 1
            assert len(sample["instances"]) == (0 if sample["empty"] else 1)
            assert bool(sample["gt_mask_merged"].any()) is not sample["empty"]
            assert sample["instances"].to("cpu").gt_masks.shape[1:] == (64, 64)
    assert min(shown.values()) > 3


def test_relas_classes_are_the_annotations_category_ids(data, vocabulary, tmp_path):
    """Of two data sets that have their categories in other rows; -1 where several targets have several."""

    def several(refs, instances):
        instances["categories"] = instances["categories"][::-1]
        whole = [dict(ref) for ref in refs]
        for ref in refs[1:]:
            others = [one for one in whole if one["image_id"] == ref["image_id"]]
            ref |= {key: [one[key] for one in others] for key in ("ann_id", "category_id")}
        refs[0] |= {key: [refs[0][key]] for key in ("ann_id", "category_id")}

    refer = write_refer(tmp_path, photos=12, dataset="grefcoco", refs_file="grefs(unc).json", edit=several, seed=2)
    path = tmp_path / "several.ris.h5"
    annotations = read_refer(refer.root, dataset="grefcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=path)
    common = {"batch_size": 1, "policy": MosaicPolicy(p_mined=0), "size": 8, "infinite": False}
    loader = Loader([data.dataset, path], preset=options_of("rela", vocabulary), **common)
    first = Dataset.open(data.dataset)
    expected = {row: {int(first.category_id[category])} for row, category in enumerate(first.refs.category)}
    expected |= {len(expected) + row: set(ref["category_id"]) for row, ref in enumerate(refer.refs)}
    seen = set()
    for (sample,), plan in zip(loader, loader.plan(0, range(len(loader)))["ref"], strict=True):
        found = sample["instances"].gt_classes
        assert found.dtype == torch.int64
        ids = expected[int(plan)]
        assert found.tolist() == ([*ids] if len(ids) == 1 else [-1])
        seen.update(found.tolist())
    assert seen == {1, 18, -1}


def test_context_lengths_and_sizes_can_be_chosen(data, vocabulary):
    assert presets.cris(context_length=22)["context_length"] == 22
    loader = Loader(data.dataset, preset="cris", size=64, batch_size=2, policy=MosaicPolicy(p_mined=0))
    image, tokens, _ = next(iter(loader))
    assert image.shape == (2, 3, 64, 64) and tokens.shape == (2, 17)  # what is given beats the preset
    zom = Loader(
        data.dataset,
        preset=presets.dmmi(vocabulary=str(vocabulary), nouns=nouns, zom=True),
        batch_size=2,
        policy=MosaicPolicy(p_mined=0),
    )
    assert [part.shape for part in next(iter(zom))[3:]] == [(2, 20)] * 3
    assert len(zom.dataset) == len(zom.corpus.sent_id)


def test_presets_and_formats_refuse_what_they_do_not_know(data):
    for wrong, text in (
        ({"preset": "crs"}, "did you mean 'cris'"),
        ({"preset": {"batch_size": 3}}, "batch_size"),
        ({"fit": "crop"}, "fit"),
        ({"mask_dtype": "bool"}, "mask_dtype"),
        ({"text": "tokens"}, "text"),
        ({"samples": "all"}, "samples"),
        ({"style": "lisa"}, "style"),
        ({"style": "dmmi"}, "masked_words"),
        ({"masked_words": "verbs"}, "masked_words"),
        ({"masked_words": "tokens"}, "bert"),
        ({"split_mode": "test"}, "split_mode"),
        ({"split_mode": "eval", "on_error": "substitute"}, "on_error"),
        ({"split_mode": "eval", "policy": MosaicPolicy()}, "policy"),
        ({"split_mode": "eval", "infinite": True}, "infinite"),
        ({"fit": "letterbox", "tiles": "x.tiles.h5"}, "fit"),
        ({"erase": 1.5}, "erase"),
        ({"erase": 0.2, "tiles": "x.tiles.h5"}, r"erase \(0.2\) must be 0 with tiles"),
        ({"split_mode": "eval", "erase": 0.2}, "erase"),
    ):
        with pytest.raises(ValueError, match=text):
            Loader(
                data.dataset,
                batch_size=2,
                **{"policy": MosaicPolicy(p_mined=0), **wrong} if "split_mode" not in wrong else wrong,
            )


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_tokens_are_the_repositorys(data, vocabulary, name):
    """All sentences of the data set, the awkward ones, in the text that the repository reads."""
    dataset = Dataset.open(data.dataset)
    ids = {token: row for row, token in enumerate(vocabulary.read_text("utf-8").splitlines())}
    texts = dataset.sentences.raw if name in RAW else dataset.sentences.text
    loader = load(data, name, vocabulary, policy=MosaicPolicy(p_mined=0), style="batch", samples="sentences", size=16)
    seen, cut = {}, 0
    for batch in loader:
        for row, tokens, attention in zip(batch.plan["sentence"], batch.tokens, batch.attention_mask, strict=True):
            seen[int(row)] = (tokens.tolist(), int(attention.sum()))
            assert attention.tolist() == sorted(attention.tolist(), reverse=True)
    assert len(seen) >= len(dataset.sentences.ref) - 6
    for row, found in seen.items():
        expected = clip_row(texts[row], 17) if name in CLIPS else bert_row(texts[row], ids, 20, False)
        assert found == expected, texts[row]
        cut += found[1] == len(found[0])
    assert cut  # a sentence was too long: CLIP's end token stays, BERT's goes
    assert set(texts) >= {AWKWARD[0]} if name in RAW else AWKWARD[0] not in texts


def test_maskris_masks_tokens_and_dmmi_nouns(data, vocabulary):
    ids = {token: row for row, token in enumerate(vocabulary.read_text("utf-8").splitlines())}
    changed = 0
    for _, _, tokens, masked, attention in load(data, "maskris", vocabulary):
        differs = tokens != masked
        changed += int(differs.sum())
        assert not differs[attention == 0].any() and not differs[:, :, 0].any()
        assert (masked[differs] == ids["[MASK]"]).any() or not differs.any()
    assert changed
    first, again = (next(iter(load(data, "maskris", vocabulary)))[3] for _ in range(2))
    assert torch.equal(first, again)
    changed = 0
    for _, _, _, tokens, masked, _ in load(data, "dmmi", vocabulary):
        assert (masked[tokens != masked] == 0).all()
        changed += int((tokens != masked).sum())
    assert changed


# --- pixels ----------------------------------------------------------------------------------------------------------


def original(name, photo, mask):
    """What the repository's own transform makes of a photo (Pillow RGB) and a mask uint8 {0, 1}."""
    size = SIZES[name]
    if name == "nemo":
        return release([np.asarray(photo)], [mask], 0)
    if name in CLIPS:
        pixels, to_frame = np.asarray(photo), letterbox_matrix(*mask.shape, size)
        color = [value * 255 for value in CLIP_MEAN]
        warped = cv2.warpAffine(pixels, to_frame, (size, size), flags=cv2.INTER_CUBIC, borderValue=color)
        soft = cv2.warpAffine(mask * 255, to_frame, (size, size), flags=cv2.INTER_LINEAR, borderValue=0.0) / 255.0
        return converted(warped), torch.from_numpy(soft).float()
    mask = tv.resize(Image.fromarray(mask, mode="P"), [size, size], interpolation=InterpolationMode.NEAREST)
    mask = torch.as_tensor(np.asarray(mask).copy(), dtype=torch.int64)
    if name == "rela":  # detectron2's ResizeTransform
        pixels = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))
        return torch.as_tensor(pixels.transpose(2, 0, 1).copy()), mask
    return tv.normalize(tv.to_tensor(tv.resize(photo, [size, size])), mean=IMAGENET_MEAN, std=IMAGENET_STD), mask


def converted(frame):
    """``RefDataset.convert`` of CRIS and of NeMo's release."""
    image = torch.from_numpy(frame.transpose(2, 0, 1)).float()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return image.div_(255.0).sub_(mean).div_(std)


def release(photos, masks, target):
    """What NeMo's release makes of one photo, or of four, uint8 [H, W, 3], and their masks uint8 [H, W] in {0, 1}: its
    ``dataloader.py``, where albumentations resizes by OpenCV and CRIS's affine map is then the identity."""
    rows = {1: 1, 4: 2}[len(photos)]
    cell, image, shown = 416 // rows, [], []
    for number, (photo, mask) in enumerate(zip(photos, masks, strict=True)):
        image.append(cv2.resize(photo, (cell, cell), interpolation=cv2.INTER_LINEAR))
        resized = cv2.resize(mask * 255 / 255.0, (cell, cell), interpolation=cv2.INTER_NEAREST)
        shown.append(resized if number == target else np.zeros_like(resized))
    image, shown = (
        np.concatenate([np.concatenate(cells[row * rows :][:rows], axis=1) for row in range(rows)], axis=0)
        for cells in (image, shown)
    )
    shown = shown.astype(np.int32).astype(np.uint8)
    shown[shown > 0] = 1
    to_frame, color = letterbox_matrix(416, 416, 416), [value * 255 for value in CLIP_MEAN]
    image = cv2.warpAffine(image, to_frame, (416, 416), flags=cv2.INTER_CUBIC, borderValue=color)
    shown = cv2.warpAffine(shown, to_frame, (416, 416), flags=cv2.INTER_LINEAR, borderValue=0.0)
    return converted(image), torch.from_numpy(shown).float()


def dense_mask(dataset, ref):
    row = dataset.refs.image[ref]
    height, width = int(dataset.images.height[row]), int(dataset.images.width[row])
    begin, count = int(dataset.refs.rle_begin[ref]), int(dataset.refs.rle_count[ref])
    runs = {"size": [height, width], "counts": dataset.rle_counts[begin : begin + count].tolist()}
    return coco.decode(coco.frPyObjects(runs, height, width))


def erased(photo, position, *, epoch, seed):
    """What RMSIN's ``add_random_boxes`` makes of a photo, its draws as ``plan.erasing`` has them; and how many."""
    words = [int(w) for w in np.random.Philox(key=[seed, epoch], counter=[0, position, 2, 0]).random_raw(122)]
    if words[0] / 2**64 >= 0.2:
        return photo, 0
    pixels = np.asarray(photo).copy()
    number, most = 20 + words[1] * 41 // 2**64, pixels.shape[1] - 32
    for i in range(number):
        y, x = (word * (most + 1) // 2**64 for word in words[2 + 2 * i : 4 + 2 * i])
        assert 0 <= x <= most and 0 <= y <= most
        pixels[y : y + 32, x : x + 32] = 0
    return Image.fromarray(pixels), number


def test_rmsins_squares_lie_on_targets_of_singles_and_of_mosaics(data, vocabulary):
    """Bit for bit, on photos that are not square too, and for any number of ranks and after a resume."""
    dataset = Dataset.open(data.dataset)
    assert (dataset.images.width >= 32).all() and (dataset.images.width != dataset.images.height).any()
    options = {"style": "batch", "dtype": "uint8", "batch_size": 4}
    loader, counts, grids, shown = load(data, "rmsin", vocabulary, **options), [], set(), {}
    for epoch in range(6):
        for batch in loader:
            for row, image in zip(batch.plan, batch.image.numpy().transpose(0, 2, 3, 1), strict=True):
                shown[epoch, int(row["position"])] = image
                grid, size = int(row["grid"]), 480 // int(row["grid"])
                for cell in range(grid * grid):
                    with Image.open(dataset.photo_path(row["images"][cell])) as photo:
                        pixels, number = photo.convert("RGB"), 0
                    if cell == row["cell"]:
                        pixels, number = erased(pixels, int(row["position"]), epoch=epoch, seed=3)
                        counts.append(number)
                    expected = np.asarray(pixels.resize((size, size), Image.Resampling.BILINEAR))
                    y, x = cell // grid * size, cell % grid * size
                    np.testing.assert_array_equal(image[y : y + size, x : x + size], expected)
                    if number:
                        grids.add(grid)
    assert grids == {1, 2, 3} and 0.1 < np.mean(np.array(counts) > 0) < 0.3
    ranks = [load(data, "rmsin", vocabulary, rank=rank, world_size=2, **options | {"batch_size": 2}) for rank in (0, 1)]
    ranks[1].set_epoch(3)
    ranks[1].load_state_dict(loader_state(data, vocabulary, options, epoch=3))
    batch = next(iter(ranks[1]))
    assert batch.plan["position"].tolist() == [10, 11]
    for row, image in zip(batch.plan, batch.image.numpy().transpose(0, 2, 3, 1), strict=True):
        np.testing.assert_array_equal(image, shown[3, int(row["position"])])
    other = load(data, "lavt", vocabulary, **options)
    with pytest.raises(StateError, match=r"erase 0\.2, here none"):
        other.load_state_dict(ranks[0].state_dict())


def loader_state(data, vocabulary, options, *, epoch):
    """After two steps."""
    loader = load(data, "rmsin", vocabulary, **options)
    loader.set_epoch(epoch)
    for _ in zip(range(2), loader, strict=False):
        pass
    return loader.state_dict()


def compare_singles(dataset, loader, name):
    compared = 0
    for batch in loader:
        for row, image, mask in zip(batch.plan, batch.image, batch.mask, strict=True):
            if row["grid"] > 1:
                continue
            with Image.open(dataset.photo_path(row["images"][0])) as photo:
                pixels = photo.convert("RGB")
            if loader.format.erase:
                pixels, _ = erased(pixels, int(row["position"]), epoch=loader.epoch, seed=loader.seed)
            expected = original(name, pixels, dense_mask(dataset, row["ref"]))
            assert torch.equal(image, expected[0]) and torch.equal(mask, expected[1])
            compared += 1
    return compared


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", SIZES)
def test_single_samples_are_the_original_transforms_to_the_bit(data, vocabulary, name):
    loader = load(data, name, vocabulary, style="batch")
    assert compare_singles(Dataset.open(data.dataset), loader, name) > 5


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.skipif("NEMO_DALI_TEST_REFER" not in os.environ, reason="NEMO_DALI_TEST_REFER names no folder")
@pytest.mark.parametrize("name", SIZES)
def test_single_samples_of_real_photos_are_the_original_transforms(vocabulary, tmp_path, name):
    root = Path(os.environ["NEMO_DALI_TEST_REFER"])
    annotations = read_refer(root, dataset="refcoco", split_by="unc", split="val")
    path = tmp_path / "val.ris.h5"
    index_dataset(annotations, images=root / "images/mscoco/images/train2014", output=path)
    loader = Loader(path, preset=options_of(name, vocabulary), batch_size=4, split_mode="eval", samples="first")
    assert compare_singles(Dataset.open(path), loader, name) == len(annotations.refs.ref_id)


def test_mosaics_are_the_releases_to_the_bit(data, vocabulary):
    """Of 2x2; its 3x3 have 414 pixels and are scaled again."""
    dataset, compared = Dataset.open(data.dataset), 0
    for batch in load(data, "nemo", vocabulary, style="batch"):
        for row, image, mask in zip(batch.plan, batch.image, batch.mask, strict=True):
            if row["grid"] != 2:
                continue
            photos, masks = [], []
            for photo in row["images"][:4]:
                with Image.open(dataset.photo_path(photo)) as opened:
                    photos.append(np.asarray(opened.convert("RGB")))
                masks.append(np.ones(photos[-1].shape[:2], np.uint8))
            masks[row["cell"]] = dense_mask(dataset, row["ref"])
            expected = release(photos, masks, row["cell"])
            assert torch.equal(image, expected[0]) and torch.equal(mask, expected[1])
            compared += 1
    assert compared > 3


@pytest.mark.parametrize("name", ["cris", "lavt"])
def test_cells_of_a_mosaic_are_stretched_and_their_masks_are_hard(data, vocabulary, name):
    """Also beside letterboxed singles in one batch."""
    dataset = Dataset.open(data.dataset)
    kinds = set()
    for batch in load(data, name, vocabulary, style="batch", dtype="uint8"):
        for row, image, mask in zip(batch.plan, batch.image, batch.mask, strict=True):
            kinds.add(int(row["grid"]))
            if row["grid"] != 2:
                continue
            half = SIZES[name] // 2
            assert set(mask.unique().tolist()) <= {0, 1}
            with Image.open(dataset.photo_path(row["images"][0])) as photo:
                pixels = photo.convert("RGB")
            if name == "cris":
                expected = cv2.resize(np.asarray(pixels), (half, half), interpolation=cv2.INTER_LINEAR)
            else:
                expected = np.asarray(pixels.resize((half, half), Image.Resampling.BILINEAR))
            assert np.array_equal(image[:, :half, :half].numpy().transpose(1, 2, 0), expected)
    assert kinds == {1, 2, 3}


def test_a_letterboxs_mask_in_whole_numbers(data):
    soft, hard = (
        next(
            iter(
                Loader(
                    data.dataset,
                    preset="cris",
                    mask_dtype=kind,
                    style="batch",
                    batch_size=8,
                    seed=1,
                    policy=MosaicPolicy(p_mined=0),
                )
            )
        ).mask
        for kind in ("float32", "uint8")
    )
    assert hard.dtype == torch.uint8 and torch.equal(hard == 1, soft >= 128 / 255)
    assert ((soft > 0) & (soft < 1)).any()


def test_the_default_format_is_the_loaders_old_one():
    look = BatchFormat()
    assert (look.size, look.dtype, look.resample, look.style) == (480, "float32", "cv2-linear", "batch")
    assert format_of(None, evaluate=False, size=None) == look
