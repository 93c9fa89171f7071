"""SPDL and DALI, which have pipelines and decoders of their own, and the Loader in its modes."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from nemo_dali.commands.peers.work import Setting, Work
from nemo_dali.pipeline.paths import encode_path

# --- the Loader ------------------------------------------------------------------------------------------------------


def stream(work: Work, setting: Setting) -> Iterator[Any]:
    """Photos are decoded for each sample, resampled as OpenCV does."""
    return _delivered(work.loader())


def stream_antialiased(work: Work, setting: Setting) -> Iterator[Any]:
    """The same, resampled as Pillow does."""
    return _delivered(work.loader("pillow-bilinear"))


def host(work: Work, setting: Setting) -> Iterator[Any]:
    """From tiles in a mapped file."""
    return _delivered(work.loader(tiles=work.tiles, placement="host"))


def _delivered(loader: Any) -> Iterator[Any]:
    while True:
        loader.set_epoch(0)
        for batch in loader:
            yield batch.image, batch.mask


# --- SPDL ------------------------------------------------------------------------------------------------------------


def spdl_stages(work: Work) -> list[Setting]:
    """Two settings: threads make sample after sample, then batches of these; or whole batches."""
    return [{"threads": work.cores, "task": what} for what in ("a sample", "a batch")]


class _Spdl:
    """Photos and masks decoded and scaled by FFmpeg, without the GIL, and copied into one buffer."""

    def __init__(self, work: Work) -> None:
        import torch
        from spdl.io import get_video_filter_desc

        self.work = work
        scale = {"scale_width": work.cell, "scale_height": work.cell, "scale_mode": None}
        self.photo = get_video_filter_desc(**scale, scale_algo="bilinear", pix_fmt="rgb24")
        self.own = get_video_filter_desc(**scale, scale_algo="neighbor", pix_fmt="gray")
        self.mean, self.std = (255 * torch.tensor(values)[:, None, None] for values in (work.mean, work.std))

    def decoded(self, index: int) -> Any:
        """The four photos of a sample, and the target's mask."""
        return [self._frames(path, self.photo) for path in self.work.paths(index)], self._mask(index)

    @staticmethod
    def _frames(path: str, filter_desc: str) -> Any:
        from spdl import io

        return io.decode_packets(io.demux_image(path), filter_desc=filter_desc)

    def _mask(self, index: int) -> Any:
        from spdl import io

        buffer = io.convert_frames(self._frames(self.work.mask(index), self.own))
        return self.work.target(index), io.to_torch(buffer).reshape(self.work.cell, self.work.cell)

    def batch(self, samples: list[Any]) -> Any:
        """Image [B, 3, S, S] and mask [B, S, S] of what ``decoded`` gave."""
        import torch
        from spdl import io

        size, side = self.work.size, self.work.cell
        cells = io.to_torch(io.convert_frames([frame for photos, _ in samples for frame in photos]))
        rows = cells.view(-1, 2, 2, side, side, 3).permute(0, 5, 1, 3, 2, 4)  # [B, 3, row, y, column, x]
        dtype = torch.uint8 if self.work.dtype == "uint8" else torch.float32
        image = torch.empty((len(samples), 3, size, size), dtype=dtype)
        image.view(rows.shape).copy_(rows)
        if dtype == torch.float32:
            image.sub_(self.mean).div_(self.std)
        mask = torch.zeros((len(samples), size, size), dtype=torch.uint8)
        for i, (_, (cell, own)) in enumerate(samples):
            mask[i][self.work.place(cell)] = own
        return image, mask

    def whole(self, indices: list[int]) -> Any:
        """Image and mask of a batch."""
        return self.batch([self.decoded(index) for index in indices])


def spdl(work: Work, setting: Setting) -> Iterator[Any]:
    """``spdl.pipeline`` with threads; what is in flight is bounded by its sink and its stages."""
    import torch
    from spdl.pipeline import PipelineBuilder

    torch.set_num_threads(1)  # each stage has threads
    made, threads = _Spdl(work), setting["threads"]
    rows: Iterator[int] = itertools.cycle(range(len(work.rows)))
    builder = PipelineBuilder()
    if setting["task"] == "a sample":
        builder.add_source(rows).pipe(made.decoded, concurrency=threads, output_order="input")
        builder.aggregate(work.batch_size).pipe(made.batch)
    else:
        batches = (list(itertools.islice(rows, work.batch_size)) for _ in itertools.count())
        builder.add_source(batches).pipe(made.whole, concurrency=threads, output_order="input")
    pipeline = builder.add_sink(2).build(num_threads=threads, max_failures=0)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


# --- DALI by its own operators ---------------------------------------------------------------------------------------


def dali_readers(work: Work) -> list[Setting]:
    """Two settings: paths from a callback, or readers that are given the plan as lists of files."""
    return [{"threads": work.cores, "prefetch": 2, "files": what} for what in ("paths by a callback", "readers")]


def dali(work: Work, setting: Setting) -> Iterator[Any]:
    """``decoders.image``, ``resize``, ``multi_paste``, ``crop_mirror_normalize``, and DALI's iterator for PyTorch."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipeline = _dali_graph(work, setting)
    for (batch,) in DALIGenericIterator([pipeline], ["image", "mask"]):
        yield batch["image"], batch["mask"][..., 0]


def _dali_graph(work: Work, setting: Setting) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    size, side = work.size, work.cell
    corners = np.array([[0, 0], [0, side], [side, 0], [side, side]], np.int32)

    def paths_of(step: int) -> list[Any]:
        first = step * work.batch_size
        samples = range(first, first + work.batch_size)
        photos = zip(*([encode_path(path) for path in work.paths(i)] for i in samples), strict=True)
        masks = [encode_path(work.mask(i)) for i in samples]
        return [*map(list, photos), masks, [corners[[work.target(i)]] for i in samples]]

    fed = itertools.cycle([paths_of(step) for step in range(len(work.rows) // work.batch_size)])

    def read() -> tuple[list[Any], Any]:
        if setting["files"] == "readers":
            samples = range(len(work.rows))
            lists = [list(files) for files in zip(*map(work.paths, samples), strict=True)]
            lists.append([work.mask(i) for i in samples])
            targets = [work.target(i) for i in samples]
            files, labels = zip(*(fn.readers.file(files=one, labels=targets) for one in lists), strict=True)
            return list(files), fn.reshape(fn.cat(labels[4] // 2, labels[4] % 2) * side, shape=[1, 2])
        *paths, anchor = fn.external_source(lambda: next(fed), num_outputs=6)
        return [fn.io.file.read(path) for path in paths], anchor

    @pipeline_def  # type: ignore[untyped-decorator]
    def graph() -> Any:
        (*photos, mask), anchor = read()
        cells = [fn.decoders.image(photo, output_type=types.RGB, adjust_orientation=False) for photo in photos]
        scaling = {"interp_type": types.INTERP_LINEAR, "antialias": False}  # as OpenCV does it, and in less time
        cells = [fn.resize(cell, size=(side, side), **scaling) for cell in cells]
        frame = fn.multi_paste(*cells, output_size=(size, size), out_anchors=corners)
        own = fn.decoders.image(mask, output_type=types.GRAY)
        own = fn.resize(own, size=(side, side), interp_type=types.INTERP_NN)
        own = fn.multi_paste(own, output_size=(size, size), out_anchors=anchor)
        if work.dtype == "uint8":
            return fn.transpose(frame, perm=[2, 0, 1]), own
        mean, std = ([255 * value for value in values] for values in (work.mean, work.std))
        return fn.crop_mirror_normalize(frame, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std), own

    return graph(
        batch_size=work.batch_size,
        num_threads=setting["threads"],
        device_id=None,
        prefetch_queue_depth=setting["prefetch"],
    )
