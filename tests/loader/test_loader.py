import inspect
import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from PIL import Image

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError, PhotoError, StateError
from nemo_dali.loader._arguments import INSTEAD, INSTEAD_OF_DALI
from nemo_dali.loader.loader import Loader
from nemo_dali.plan import policy as policy_module
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers import fork_server
from tests.helpers.files import make_files
from tests.helpers.lanes import lanes
from tests.helpers.oracles import by_hand
from tests.helpers.tables import write_random_table

EVERY_KIND = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, jitter=0.5, top_k=15)


def make(files, **options):
    defaults = {"batch_size": 4, "size": 96, "dtype": "uint8", "policy": EVERY_KIND, "context_length": 16}
    return Loader(files.dataset, files.negatives, **{**defaults, **options})


@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
@pytest.mark.parametrize("size", [96, 97])
def test_pixels_and_masks_equal_an_independent_recomputation(files, resample, size):
    loader = make(files, resample=resample, size=size)
    dataset = Dataset.open(files.dataset)
    kinds = set()
    for _ in range(2):
        for batch in loader:
            for image, mask, row in zip(batch.image.numpy(), batch.mask.numpy(), batch.plan, strict=True):
                expected = by_hand(dataset, row, size, resample)
                assert np.array_equal(image, expected[0])
                assert np.array_equal(mask, expected[1])
                kinds.add((int(row["kind"]), int(row["grid"])))
    assert kinds == {(0, 1), (1, 2), (1, 3), (2, 2), (2, 3)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_normalised_values_are_torchs(files, dtype):
    raw, normalised = next(iter(make(files))), next(iter(make(files, dtype=dtype)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = raw.image.float().div(255).sub(mean).div(std).to(getattr(torch, dtype))
    assert normalised.image.dtype == getattr(torch, dtype)
    assert torch.equal(normalised.image, expected)
    assert torch.equal(normalised.mask, raw.mask)


def test_a_batch_is_what_the_docstring_says(files):
    loader = make(files, dtype="float32")
    batch = next(iter(loader))
    image, mask, tokens, attention_mask, plan = batch
    assert (image.shape, image.dtype) == ((4, 3, 96, 96), torch.float32)
    assert (mask.shape, mask.dtype) == ((4, 96, 96), torch.uint8)
    assert (tokens.shape, tokens.dtype) == ((4, 16), torch.int64)
    assert (attention_mask.shape, attention_mask.dtype) == ((4, 16), torch.int64)
    assert np.array_equal(plan, loader.plan(0, np.arange(4)))
    assert all(part.is_contiguous() for part in (image, mask, tokens, attention_mask))
    dataset = Dataset.open(files.dataset)
    assert batch.sentences == [dataset.sentences.text[row] for row in plan["sentence"]]
    assert batch.ref_ids == dataset.refs.ref_id[plan["ref"]].tolist()
    assert batch.image_ids == dataset.images.id[dataset.refs.image[plan["ref"]]].tolist()


def test_a_batch_moves_as_a_whole(files):
    batch = next(iter(make(files)))
    moved = batch.to("meta")
    assert [part.device.type for part in tuple(moved)[:4]] == ["meta"] * 4
    assert moved.plan is batch.plan and moved.sentences == batch.sentences


def test_tokens_are_open_clips(files):
    import open_clip

    batch = next(iter(make(files)))
    expected = open_clip.SimpleTokenizer(context_length=16)(batch.sentences)
    assert torch.equal(batch.tokens, expected)
    assert torch.equal(batch.attention_mask.sum(1), expected.argmax(1) + 1)  # the end token has the largest id


def test_style_dali(files):
    (first,) = next(iter(make(files, style="dali")))
    assert list(first) == ["image", "mask", "tokens", "attention_mask"]
    assert torch.equal(first["image"], next(iter(make(files))).image)


def plans(batches):
    return [batch.plan for batch in batches]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_length_and_epochs(files):
    loader = make(files, batch_size=5)
    assert len(loader) == 9  # 48 refs
    epochs = [plans(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [9, 9, 9] and loader.epoch == 3
    assert not same(epochs[0], epochs[1])
    for number, epoch in enumerate(epochs):
        loader.set_epoch(number)
        assert same(plans(loader), epoch)
    loader.sampler.set_epoch(1)
    assert same(plans(loader), epochs[1])


def test_the_last_step_is_padded_without_drop_last(files):
    loader = make(files, batch_size=5, drop_last=False)
    epoch = plans(loader)
    assert len(loader) == len(epoch) == 10
    seen = np.concatenate(epoch)
    assert np.array_equal(seen["position"], np.arange(50))
    assert np.array_equal(np.sort(seen["ref"][:48]), np.arange(48))
    assert np.array_equal(seen["ref"][48:], seen["ref"][:2])


def test_a_break_starts_the_same_epoch_anew(files):
    loader = make(files)
    whole = plans(loader)
    loader.set_epoch(0)
    for stop in (1, 3):
        for step, batch in enumerate(loader, 1):
            assert np.array_equal(batch.plan, whole[step - 1])
            if step == stop:
                break
        assert loader.epoch == 0
    assert same(plans(loader), whole)


def test_batches_stay_intact_when_kept(files):
    loader = make(files)
    kept = [(batch, batch.image.clone(), batch.mask.clone()) for batch in loader]
    for batch, image, mask in kept:
        assert torch.equal(batch.image, image) and torch.equal(batch.mask, mask)


@pytest.mark.parametrize("before", lanes(range(13), fast=[0, 1, 11, 12]))
def test_resume_at_every_step(files, before):
    loader = make(files)
    whole = [*loader, *loader]
    loader = make(files)
    passes = iter(loader)
    for _ in range(before):
        next(passes)
    state = json.loads(json.dumps(loader.state_dict()))
    assert list(state) == ["version", "seed", "epoch", "samples_seen", "fingerprints"]
    assert (state["epoch"], state["samples_seen"]) == (0, 4 * before)
    again = make(files)
    again.load_state_dict(state)
    assert len(again) == 12
    rest = [*again, *again] if before < 12 else [*again]
    for batch, expected in zip(rest, whole[before:], strict=True):
        assert torch.equal(batch.image, expected.image) and torch.equal(batch.mask, expected.mask)
        assert torch.equal(batch.tokens, expected.tokens) and np.array_equal(batch.plan, expected.plan)


def test_set_epoch_after_loading(files, caplog):
    loader = make(files)
    whole = plans(loader)
    state = {**make(files).state_dict(), "epoch": 0, "samples_seen": 8}
    loader.load_state_dict(state)
    loader.set_epoch(0)  # LAVT does this right after loading
    assert same(plans(loader), whole[2:])
    loader.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        loader.set_epoch(5)
    assert "drops the loaded position" in caplog.text
    assert len(plans(loader)) == 12 and loader.epoch == 6


@pytest.mark.parametrize(("world_before", "world_after"), [(1, 2), (4, 1), (2, 4)])
def test_any_number_of_ranks_sees_the_same_steps_also_after_a_resume(files, world_before, world_after):
    def ranks(world):
        return [make(files, batch_size=8 // world, rank=rank, world_size=world) for rank in range(world)]

    def steps(loaders):
        return [np.concatenate(step) for step in zip(*map(plans, loaders), strict=True)]

    whole = steps(ranks(1))
    before = ranks(world_before)
    assert [len(loader) for loader in before] == [6] * world_before
    assert same(steps(before), whole)
    interrupted = ranks(world_before)[-1]
    passes = iter(interrupted)
    for _ in range(2):
        next(passes)
    after = ranks(world_after)
    for loader in after:
        loader.load_state_dict(interrupted.state_dict())
    assert same(steps(after), whole[2:])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(files, tmp_path):
    loader = make(files)
    state = loader.state_dict()
    other = make(make_files(tmp_path, seed=5)).state_dict()
    wrong = [
        (other, "other files"),
        ({**state, "seed": 3}, "seed 3"),
        ({**state, "version": 9}, "version 9"),
        ({**state, "samples_seen": -4}, "samples_seen"),
        ({"epoch": 1}, "not a state"),
        ("state", "not a state"),
        (None, "not a state"),
        ({**state, "samples_seen": 2**63}, "samples_seen"),
        ({**state, "epoch": 2**62 + 1}, "out of range"),
        *({**state, "fingerprints": value} for value in (None, 5, [], {"dataset": 5}, {"dataset": [5]})),
        *(
            ({**state, "fingerprints": {**state["fingerprints"], "sampling": value}}, "sampling|different samples")
            for value in (5, "size=96", [5], [], ["size"], ["\n" * 500 + f"{n}=1" for n in range(99)])
        ),
    ]
    wrong = [one if isinstance(one, tuple) else (one, "other files") for one in wrong]
    deep = []
    for _ in range(10**5):
        deep = [deep]
    for value in (json.loads("1e999"), 1.5, 1.0, float("nan"), True, None, "1", [1], {}, 10**400, 10**5000, deep):
        wrong += [({**state, key: value}, f"'{key}'") for key in ("version", "seed", "epoch", "samples_seen")]
    for bad, reason in wrong:
        with pytest.raises(StateError, match=reason) as caught:
            loader.load_state_dict(bad)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert loader.state_dict() == state


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": MosaicPolicy(p_mined=0.25, top_k=15)}, ["p_mined 0.5, here 0.25", "grids", "jitter 0.5, here 0.0"]),
        ({"policy": replace(EVERY_KIND, max_similarity=0.2)}, ["max_similarity null, here 0.2"]),
        ({"samples": "first"}, ['samples "refs", here "first"']),
        ({"size": 64}, ["size 96, here 64"]),
        ({"size": None, "preset": "cris"}, ["size 96, here 416"]),
        ({"split_mode": "eval", "policy": None}, ['split_mode "train", here "eval"']),
    ],
)
def test_a_state_of_other_samples_is_refused_unless_it_is_accepted(files, caplog, options, named):
    state = make(files).state_dict() | {"samples_seen": 8}
    loader = make(files, **options)
    before = loader.state_dict()
    with pytest.raises(StateError, match="saved with different samples") as error:
        loader.load_state_dict(state)
    assert all(words in str(error.value) for words in (*named, "strict=False"))
    assert loader.state_dict() == before
    loader.load_state_dict(state, strict=False)
    assert loader.state_dict()["samples_seen"] == 8 and loader.state_dict()["fingerprints"] == before["fingerprints"]
    assert named[0] in caplog.text
    with pytest.raises(StateError, match="other files"):
        loader.load_state_dict({**state, "fingerprints": {"dataset": ["0"]}}, strict=False)


def test_what_decides_no_sample_may_differ(files, caplog):
    state = json.loads(json.dumps(make(files).state_dict()))
    for options in (
        {"batch_size": 8},
        {"num_threads": 1, "prefetch": 4},
        {"dtype": "float32"},
        {"world_size": 2, "rank": 1},
    ):
        make(files, **options).load_state_dict(state)
    assert not caplog.records


def test_a_state_from_before_sampling_was_recorded_is_accepted_with_a_warning(files, caplog):
    state = make(files).state_dict() | {"samples_seen": 8}
    del state["fingerprints"]["sampling"]
    loader = make(files)
    loader.load_state_dict(state)
    assert loader.state_dict()["samples_seen"] == 8 and "older nemo-dali" in caplog.text


def test_prefetch_depth_and_threads_change_nothing(files):
    reference = list(make(files, prefetch=1, num_threads=1))
    for batch, expected in zip(make(files, prefetch=4, num_threads=3), reference, strict=True):
        assert torch.equal(batch.image, expected.image) and np.array_equal(batch.plan, expected.plan)


def test_several_data_sets(files, tmp_path):
    other = make_files(tmp_path, photos=16, seed=7)
    loader = Loader(
        [files.dataset, other.dataset],
        [files.negatives, other.negatives],
        batch_size=8,
        size=64,
        dtype="uint8",
        policy=EVERY_KIND,
    )
    datasets = [Dataset.open(files.dataset), Dataset.open(other.dataset)]
    assert len(loader) == (48 + 32) // 8
    for batch in loader:
        for index, row in enumerate(batch.plan.copy()):
            second = int(row["ref"] >= 48)
            if second:
                row["ref"] -= 48
                row["images"][row["images"] >= 0] -= 24
            image, mask = by_hand(datasets[second], row, 64, "cv2-linear")
            assert np.array_equal(batch.image[index], image) and np.array_equal(batch.mask[index], mask)
            assert batch.sentences[index] in datasets[second].sentences.text
            assert batch.ref_ids[index] == datasets[second].refs.ref_id[row["ref"]]


def damage_missing(path):
    path.unlink()


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def damage_garbage(path):
    path.write_bytes(b"not a photo" * 50)


def damage_empty(path):
    path.write_bytes(b"")


def damage_size(path):
    Image.open(path).resize((33, 35)).save(path)


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_garbage, damage_empty, damage_size])
def test_a_bad_photo_is_named_and_the_loader_goes_on_after_its_repair(tmp_path, damage):
    files = make_files(tmp_path, photos=6)
    loader = make(files, policy=MosaicPolicy(p_mined=0), batch_size=2)
    whole = plans(loader)
    victim = sorted(files.photos.iterdir())[0]
    good = victim.read_bytes()
    damage(victim)
    dataset = Dataset.open(files.dataset)
    bad_row = dataset.images.file_name.index(victim.name)
    first_bad = next(i for i, plan in enumerate(whole) if bad_row in plan["images"][:, 0])
    loader.set_epoch(0)
    delivered = []
    with pytest.raises(PhotoError, match=victim.name):
        delivered.extend(batch.plan for batch in loader)
    assert same(delivered, whole[:first_bad])
    state = loader.state_dict()
    assert (state["epoch"], state["samples_seen"]) == (0, 2 * first_bad)
    victim.write_bytes(good)
    loader.load_state_dict(state)
    assert same(plans(loader), whole[first_bad:])


def test_grey_and_cmyk_photos_become_rgb_as_pillow_converts_them(tmp_path):
    files = make_files(tmp_path, photos=6)
    for path, mode in zip(sorted(files.photos.iterdir()), ["L", "CMYK"] * 3, strict=True):
        Image.open(path).convert(mode).save(path, quality=95)
    loader = make(files, policy=MosaicPolicy(p_mined=1))
    dataset = Dataset.open(files.dataset)
    for batch in loader:
        for image, row in zip(batch.image.numpy(), batch.plan, strict=True):
            assert np.array_equal(image, by_hand(dataset, row, 96, "cv2-linear")[0])


def test_an_exif_rotation_is_ignored(tmp_path):
    files = make_files(tmp_path, photos=6)
    for path in files.photos.iterdir():
        photo = Image.open(path)
        exif = photo.getexif()
        exif[0x0112] = 6  # rotate by 90 degrees when shown
        photo.save(path, exif=exif, quality=95)
    loader = make(files, policy=MosaicPolicy(p_mined=0), batch_size=2)
    dataset = Dataset.open(files.dataset)
    for batch in loader:
        for image, row in zip(batch.image.numpy(), batch.plan, strict=True):
            assert np.array_equal(image, by_hand(dataset, row, 96, "cv2-linear")[0])


def test_a_table_of_another_data_set_is_refused(files, tmp_path):
    other = make_files(tmp_path, seed=3)
    with pytest.raises(FileFormatError, match="a different data set") as error:
        make(files._replace(negatives=other.negatives))
    for path in (files.dataset, other.dataset):
        assert Dataset.open(path).fingerprint[:12] in str(error.value)


def test_the_photos_can_lie_elsewhere(files, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(files.photos)
    assert torch.equal(next(iter(make(files, images=moved))).image, next(iter(make(files))).image)
    with pytest.raises(NemoError, match="nowhere"):
        next(iter(make(files, images=tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"size": 0}, "size"),
        ({"prefetch": 0}, "prefetch"),
        ({"dtype": "float64"}, "dtype"),
        ({"resample": "nearest"}, "resample"),
        ({"style": "tuple"}, "style"),
        ({"device": "tpu"}, "device"),
        ({"rank": 1}, "world_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"seed": -1}, "seed"),
        ({"num_threads": -1}, "num_threads"),
        ({"num_threads": "4"}, "num_threads"),
        ({"rank": "0", "world_size": 1}, "rank"),
        ({"rank": 0, "world_size": "1"}, "world_size"),
        ({"rank": "0"}, "rank"),
        ({"rank": -1, "world_size": 1}, "rank"),
        ({"rank": 0, "world_size": 0}, "world_size"),
        ({"tiles": b"a.tiles.h5"}, "tiles"),
        ({"images": [3]}, "images"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.5, 0.5, 0.0)}, "std"),
        *(
            ({name: value}, name)
            for name in ("batch_size", "size", "prefetch", "num_threads", "context_length", "seed")
            for value in (10**30, 10**5000, float("inf"), float("nan"))
        ),
        ({"mean": (10**400, 0, 0)}, "mean"),
        ({"std": (1, float("nan"), 1)}, "std"),
        ({"num_threads": 100_000}, "num_threads"),
        ({"prefetch": 100_000}, "prefetch"),
        ({"size": 100_000}, "size"),
        ({"batch_size": 100_000}, "batch_size"),
        ({"context_length": 100_000}, "context_length"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(files, wrong, name):
    with pytest.raises(ValueError, match=rf"\b{name} ") as error:
        make(files, **wrong)
    assert len(str(error.value)) < 300


def test_lists_of_files_with_something_else_in_them_are_refused_by_name(files):
    with pytest.raises(ValueError, match=r"^negatives \(\['a', None\]\) must be a path or a list of paths, not None$"):
        Loader(files.dataset, ["a", None], batch_size=1)
    with pytest.raises(ValueError, match=r"^dataset \(.*object.*\) must be a path or a list of paths, not .*object"):
        Loader(torch.utils.data.Dataset(), batch_size=1)
    with pytest.raises(ValueError, match=r"^negatives \(3\) must be"):
        Loader(files.dataset, 3, batch_size=1)
    assert len(make(files, images=[None])) == len(make(files))


@pytest.mark.parametrize("none", [None, 0])
def test_no_threads_asked_for_are_this_processs_share(files, monkeypatch, none):
    monkeypatch.setattr("nemo_dali.loader.options.thread_count", lambda: 3)
    assert make(files, num_threads=none).num_threads == 3


def test_arguments_of_a_dataloader_are_told_what_takes_their_place(files):
    taken = inspect.signature(Loader).parameters
    theirs = set(inspect.signature(torch.utils.data.DataLoader).parameters) - set(taken)
    assert theirs <= INSTEAD.keys() and not INSTEAD.keys() & taken.keys()
    for name, instead in INSTEAD.items():
        with pytest.raises(TypeError) as error:
            make(files, **{name: 1})
        assert str(error.value) == f"Loader takes no {name}, an argument of torch's DataLoader. {instead}."
        arguments = set(re.findall(r"Give (\w+)", instead))
        assert arguments <= taken.keys() and (arguments or instead.startswith("Leave it out: "))


def test_arguments_of_dalis_iterators_are_told_what_takes_their_place(files):
    taken = inspect.signature(Loader).parameters
    theirs = set(inspect.signature(DALIGenericIterator).parameters) - {"size"}  # that of a frame here
    assert theirs == INSTEAD_OF_DALI.keys()
    for name, instead in INSTEAD_OF_DALI.items():
        with pytest.raises(TypeError, match=r"^Loader takes no .*, an argument of DALI's iterators") as error:
            make(files, **{name: 1})
        assert str(error.value).endswith(f" {instead}.")
        arguments = set(re.findall(r"(\w+)=", instead))
        assert arguments <= taken.keys() and (arguments or instead.startswith(("Leave it out: ", "Give dataset")))
    with pytest.raises(ValueError, match=r"^size \(-1\) must be"):
        make(files, size=-1)


def test_a_loop_for_dalis_iterators_shows_one_epoch_after_the_other(files):
    expected, loader = make(files), make(files, style="dali")
    for _ in range(3):
        for (data,), batch in zip(loader, expected, strict=True):
            assert list(data) == ["image", "mask", "tokens", "attention_mask"]
            assert all(torch.equal(data[name], getattr(batch, name)) for name in data)
        loader.reset()
    passing = iter(loader)
    next(passing)
    loader.reset()  # in mid-pass it is ignored, as DALI's is
    assert len(list(passing)) == len(loader) - 1 and loader.epoch == 4


def test_misspelt_arguments_are_told(files):
    with pytest.raises(TypeError, match=r"^Loader takes no argument 'num_treads'; did you mean 'num_threads'\?$"):
        make(files, num_treads=1)
    with pytest.raises(TypeError, match=r"^Loader takes no argument 'num_worker'; did you mean 'num_workers'\?$"):
        make(files, num_worker=1)
    with pytest.raises(TypeError, match=r"^Loader takes no argument 'xyz'; help\(Loader\) lists its arguments\.$"):
        make(files, xyz=1)


def test_batches_larger_than_the_memory_are_refused_before_it_is_taken(files, monkeypatch):
    monkeypatch.setattr("nemo_dali.loader._frames.memory_bytes", lambda: 3 * 4 * 64 * 64 * 13 - 1)
    with pytest.raises(NemoError, match=r"3 batches of 4 samples of 64x64 pixels .*Lower batch_size, size or prefetch"):
        make(files, batch_size=4, size=64, dtype="float32")
    make(files, batch_size=4, size=64, dtype="float32", prefetch=1)


TOO_LITTLE = """
import resource, sys
from nemo_dali.errors import NemoError
from nemo_dali.io.memory import address_space_left
from nemo_dali.pipeline import graphs, limits
assert address_space_left() == float("inf")
left, limits.PIPELINE_SPACE = (int(word) for word in sys.argv[1:])
mapped = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (mapped + left, mapped + left))
try:
    graphs.StreamPipeline(max_cells=4, num_threads=64, prefetch=2)
except NemoError as error:
    print(error)
"""


@pytest.mark.process
def test_too_little_room_for_a_pipeline_is_told():
    done = fork_server.run(TOO_LITTLE, 2**30, 2**30)
    assert "64 threads maps up to 5.5 GiB, and this process may map 1.0 GiB more" in done.stdout, done.stderr
    done = fork_server.run(TOO_LITTLE, 2**28, -(2**40))  # as if another limit, on threads, were in the way
    assert "cannot start the 64 threads" in done.stdout and not done.returncode, done.stderr


def test_an_epoch_without_a_single_step_is_refused(files):
    with pytest.raises(NemoError, match="batch_size"):
        make(files, batch_size=49)
    assert len(make(files, batch_size=49, drop_last=False)) == 1


def test_without_negatives_nothing_can_be_mined(files):
    with pytest.raises(NemoError, match="nemo-dali mine"):
        Loader(files.dataset, batch_size=4)
    assert len(Loader(files.dataset, batch_size=4, policy=MosaicPolicy(p_mined=0, p_random=1))) == 12


def test_short_pools_are_counted_and_told(files, tmp_path, caplog):
    shallow = tmp_path / "shallow.neg.h5"
    write_random_table(shallow, Dataset.open(files.dataset), depth=2)
    loader = make(files._replace(negatives=shallow), policy=MosaicPolicy(p_mined=1))
    list(loader)
    assert (loader.short_pools.last_valid, loader.short_pools.random) == (48, 48)
    assert "48 mined samples had fewer candidates" in caplog.text


def test_a_missing_bound_is_said_in_the_log(files, caplog):
    policy_module._warn_once.cache_clear()
    make(files, policy=MosaicPolicy(max_similarity=0.3))
    assert not caplog.text
    make(files)
    make(files)
    assert caplog.text.count("max_similarity is None") == 1  # in a process


def test_rank_comes_from_torch_distributed(files, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        assert (make(files).rank, make(files).world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


ENDINGS = {
    "break": "for batch in loader: break",
    "full pass": "for batch in loader: pass",
    "iterator kept": "it = iter(loader); next(it)",
    "batch kept": "kept = next(iter(loader)); del loader",
    "closed": "next(iter(loader)); loader.close(); loader.close(); next(iter(loader))",
    "two loaders": "other = make(); a, b = iter(loader), iter(other); next(a); next(b); next(a)",
    "exception": "try:\n    for batch in loader: raise KeyError\nexcept KeyError: pass",
}


@pytest.mark.process
@pytest.mark.parametrize("ending", lanes(ENDINGS, fast=["break", "exception"]))
def test_the_interpreter_ends_quietly(files, ending):
    code = f"""
from nemo_dali import Loader, MosaicPolicy
policy = MosaicPolicy(max_similarity=0.4)
def make(): return Loader({str(files.dataset)!r}, {str(files.negatives)!r}, batch_size=4, prefetch=3, policy=policy)
loader = make()
{ENDINGS[ending]}
"""
    run = fork_server.run(code)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_change_of_one_tensor_of_a_batch_is_none_of_another(files):
    """Though they share memory, autograd must not take it for one."""
    batch = next(iter(Loader(files.dataset, files.negatives, batch_size=2, size=40)))
    weights = torch.ones(1, requires_grad=True)
    products = weights * batch.image, weights * batch.tokens
    batch.mask.zero_(), batch.attention_mask.zero_()
    sum(product.sum() for product in products).backward()
    assert weights.grad is not None
