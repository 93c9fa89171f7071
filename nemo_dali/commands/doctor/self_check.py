"""Whether a small pipeline gives the right pixels on this machine: a batch of mosaics compared with the oracle.

All libraries are imported inside the functions: ``doctor`` uses the types where a library may be broken.
"""

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_dali._choices import Resample

if TYPE_CHECKING:
    from nemo_dali.data.columns import Annotations

PhotoKind = Literal["JPEG", "PNG"]
# Up- and downscaling, odd numbers, and rows of a cell long enough for every way that the kernels store them.
SIZES = ((120, 160), (211, 97), (96, 300), (240, 240))  # height, width
FRAME = 256  # pixels


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How a batch differs from the oracle; differences are in the frame's own units, levels where ``exact`` is False.

    On the CPU, and from PNG everywhere, every bit must be the oracle's. nvJPEG decodes to different pixels than Pillow.
    """

    device: str
    resample: str
    photos: str
    exact: bool
    values: int  # of all frames
    wrong_values: int
    wrong_mask: int  # pixels
    mean_difference: float
    largest_difference: float


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """How the pixels of a GPU's hardware decoder differ from those of its other decoder, in levels of 0 to 255."""

    values: int
    differing: int
    largest_difference: int


def compare_decoders(device_id: int = 0) -> Decoders:
    """Decode a few JPEGs with and without the hardware decoder. Without one in the GPU both are the same."""
    import numpy as np
    from nvidia.dali import Pipeline, fn, types
    from PIL import Image

    from nemo_dali.data.decoding import DECODING

    random, encoded = np.random.default_rng(0), []
    for height, width in SIZES:  # of noise, on which decoders differ most
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG", quality=90)
        encoded.append(np.frombuffer(file.getvalue(), np.uint8))

    def decoded(hw_decoder_load: float) -> list[Any]:
        pipe = Pipeline(batch_size=len(SIZES), num_threads=1, device_id=device_id, prefetch_queue_depth=1)
        options = {"hw_decoder_load": hw_decoder_load, "jpeg_fancy_upsampling": True, **DECODING}
        with pipe:
            source = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
            pipe.set_outputs(fn.decoders.image(source, device="mixed", **options))
        pipe.build()
        pipe.feed_input("encoded", encoded)
        (images,) = pipe.run()
        return [np.asarray(image).astype(np.int16) for image in images.as_cpu()]

    difference = [np.abs(one - other) for one, other in zip(decoded(0.0), decoded(1.0), strict=True)]
    return Decoders(
        values=sum(one.size for one in difference),
        differing=sum(int(np.count_nonzero(one)) for one in difference),
        largest_difference=max(int(one.max()) for one in difference),
    )


def check_pixels(*, device: str, resample: Resample, photos: PhotoKind) -> Pixels:
    """Make one batch of 2x2 mosaics of small smooth photos and compare it with the oracle on Pillow's pixels.

    Raises:
        NemoError: what the Loader raises.
    """
    import numpy as np
    from PIL import Image

    from nemo_dali.data.indexing import index_dataset
    from nemo_dali.kernels import reference
    from nemo_dali.loader.loader import Loader
    from nemo_dali.plan.policy import MosaicPolicy
    from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD

    exact = device == "cpu" or photos == "PNG"
    table = reference.normalisation_table(IMAGENET_MEAN, IMAGENET_STD, "float32" if exact else "uint8")
    found = Pixels(
        device=device,
        resample=resample,
        photos=photos,
        exact=exact,
        values=len(SIZES) * 3 * FRAME**2,
        wrong_values=0,
        wrong_mask=0,
        mean_difference=0.0,
        largest_difference=0.0,
    )
    with tempfile.TemporaryDirectory(prefix="nemo-dali-doctor-") as name:
        folder, file = Path(name), Path(name) / "doctor.ris.h5"
        annotations = _write_photos(folder, photos)
        index_dataset(annotations, images=folder, output=file)
        loader = Loader(
            file,
            batch_size=len(SIZES),
            policy=MosaicPolicy(p_mined=0, p_random=1, jitter=0.25),
            device=device,
            size=FRAME,
            dtype="float32" if exact else "uint8",
            resample=resample,
            tokenizer=lambda sentences: np.ones((len(sentences), 3), np.int32),  # keeps out of the user's cache
            rank=0,
            world_size=1,
        )
        try:
            batch = next(iter(loader))
            frames, masks = batch.image.cpu().numpy(), batch.mask.cpu().numpy()
        finally:
            loader.close()
        decoded = [np.asarray(Image.open(folder / name).convert("RGB")) for name in annotations.images.file_name]
    for row, frame, mask in zip(batch.plan, frames, masks, strict=True):
        begin, count = annotations.refs.rle_begin[row["ref"]], annotations.refs.rle_count[row["ref"]]
        right_frame, right_mask = reference.mosaic(
            [decoded[photo] for photo in row["images"][: row["grid"] ** 2]],
            grid=int(row["grid"]),
            center=(int(row["center"][0]), int(row["center"][1])),
            counts=annotations.rle_counts[begin : begin + count],
            cell=int(row["cell"]),
            size=FRAME,
            resample=resample,
            table=table,
        )
        difference = np.abs(frame.astype(np.float64) - right_frame)
        found = replace(
            found,
            wrong_values=found.wrong_values + int((frame != right_frame).sum()),
            wrong_mask=found.wrong_mask + int((mask != right_mask).sum()),
            mean_difference=found.mean_difference + float(difference.mean()) / len(frames),
            largest_difference=max(found.largest_difference, float(difference.max())),
        )
    return found


def _write_photos(folder: Path, kind: PhotoKind) -> "Annotations":
    """Write a smooth photo for each of ``SIZES``, on which decoders differ little, with an ellipse as its mask."""
    import numpy as np
    from PIL import Image

    from nemo_dali.data.columns import Annotations, Images, Refs, Sentences, begins

    count = len(SIZES)
    names = [f"{number}.{kind.lower()}" for number in range(count)]
    runs = []
    for number, (height, width) in enumerate(SIZES):
        y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
        waves = [np.sin((number + 2) * x + (channel + 1) * y + number) for channel in range(3)]
        pixels = np.rint(127 + 90 * np.stack(waves, axis=2)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / names[number], quality=95)
        ellipse = (((y - 0.5) / 0.4) ** 2 + ((x - 0.4) / 0.3) ** 2 < 1).ravel(order="F")
        runs.append(np.diff([0, *np.flatnonzero(np.diff(ellipse)) + 1, ellipse.size]))
    rows, ones, zeros = np.arange(count, dtype=np.int32), np.ones(count, np.int32), np.zeros(count, np.int32)
    numbers = rows.astype(np.int64)
    run_count = np.array([len(counts) for counts in runs], np.int32)
    return Annotations(
        name="doctor",
        images=Images(
            id=numbers,
            width=np.array([width for _, width in SIZES], np.int32),
            height=np.array([height for height, _ in SIZES], np.int32),
            file_name=names,
            category_begin=begins(zeros),
            category_count=zeros,
        ),
        refs=Refs(
            ref_id=numbers,
            ann_id=numbers,
            image=rows,
            category=-ones,
            sentence_begin=begins(ones),
            sentence_count=ones,
            rle_begin=begins(run_count),
            rle_count=run_count,
            empty=zeros.astype(np.uint8),
            no_target=zeros.astype(np.int8),
            source=[""] * count,
            distractors=-ones,
        ),
        sentences=Sentences(sent_id=numbers, ref=rows, text=["ellipse"] * count, raw=["ellipse"] * count),
        image_categories=zeros[:0],
        category_id=numbers[:0],
        category_name=[],
        rle_counts=np.concatenate(runs).astype(np.uint32),
    )
