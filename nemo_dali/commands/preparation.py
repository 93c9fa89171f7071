"""The commands that make what a Loader reads: ``demo``, ``synth``, ``index``, ``mine`` and ``tiles``."""

import os
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_dali._checks import short_repr
from nemo_dali._choices import BoxFormat, Exif, LayoutName
from nemo_dali.commands.limits import check_address_space
from nemo_dali.commands.options import (
    BATCH,
    COUNT,
    SEED,
    SIDE,
    Dataset,
    ImageRoot,
    Resample,
    Threads,
    Verbose,
    argument,
    as_typed,
    flag,
    integer,
    number,
    option,
    output,
)
from nemo_dali.errors import NemoError
from nemo_dali.io.terminal import say

GRIDS = [1, 2]


def demo(
    out: Annotated[Path, option("DIR", "Folder to write into.")] = Path("demo"),
    steps: Annotated[int, option("N", "Training steps for the CLIP model.", COUNT)] = 400,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run every step on generated data, and end with a picture and a page that shows it."""
    check_address_space()
    from nemo_dali.commands.demo import run_demo

    _must_be_utf8(out)
    page = run_demo(out, steps=steps)
    if browser and not webbrowser.open(page.resolve().as_uri()):
        raise NemoError(f"There is no browser to open {page} in. Open it yourself, or copy {out} to where one is.")


def synth(
    folder: Annotated[Path, argument("DIR", "Folder to write into.")],
    images: Annotated[int, option("N", "Number of photos.", COUNT)] = 500,
    seed: Annotated[int, option("N", "Random seed; a different one gives different photos.", SEED)] = 0,
    layout: Annotated[LayoutName, typer.Option(help="Published data set whose files and keys to use.")] = "refcoco",
    distractors: Annotated[
        tuple[int, int], option("LEAST MOST", "Number of objects like the target in a photo.", integer(0))
    ] = (0, 3),
    expressions: Annotated[
        list[str] | None,
        option(
            "KIND=WEIGHT...",
            "How one object is described: weights of attribute, place, zone, rank, relation.",
            as_typed,
            default="the shortest expression first",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Generate a data set in the layout of a published one."""
    from nemo_dali.synthetic import synthesize
    from nemo_dali.synthetic.layouts import LAYOUTS

    weights = _weights(expressions) if expressions else None
    synthesize(folder, images=images, seed=seed, distractors=distractors, expressions=weights, layout=layout)
    its = LAYOUTS[layout]
    split_by = its.refs_file.partition("(")[2].partition(")")[0]
    say(
        f"{folder}: {images} photos. Next:",
        f"  nemo-dali index {folder} --dataset {its.folder} --split-by {split_by} --split train "
        f"--images {folder / its.photos} -o train.ris.h5",
    )


def index(
    source: Annotated[Path, argument("SOURCE", "Folder in REFER's layout, .jsonl file, CRIS's .lmdb, or Parquet.")],
    images: Annotated[list[str], option("DIR", "Folder of photos, or s3://...; may be repeated.", as_typed)],
    output: Annotated[Path, output("F.ris.h5", "Data set file to write.")],
    dataset: Annotated[str | None, option("NAME", "refcoco, refcoco+, refcocog, refclef, ...; for a folder.")] = None,
    split_by: Annotated[str | None, option("WHOM", "unc, umd, google, berkeley or final; for a folder.")] = None,
    split: Annotated[str | None, option("SPLIT", "train, val, test, testA, ...; for all but a .lmdb.")] = None,
    box_format: Annotated[
        BoxFormat | None,
        typer.Option(help="Format of the boxes in a .jsonl file.", show_default="as its lines say, else xywh"),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        option("WHAT...", "Photos to leave out: file names, for a folder, or all those of G.ris.h5.", as_typed),
    ] = None,
    exif: Annotated[
        Exif | None,
        typer.Option(
            help="EXIF orientation of photos: ignore it, apply it as viewers do, or refuse such photos.",
            show_default="refuse for a .jsonl file, else ignore",
        ),
    ] = None,
    verify: Annotated[bool, flag("--verify", "Decode every photo.")] = False,
    skip_empty: Annotated[
        bool, flag("--skip-empty", "Skip sentences without text, and refs without a sentence.")
    ] = False,
    skip_corrupt: Annotated[bool, flag("--skip-corrupt", "Leave out photos that cannot be used.")] = False,
    verbose: Verbose = False,
) -> None:
    """Build a data set file from annotations and photos."""
    from nemo_dali.data.annotations import read_annotations
    from nemo_dali.data.indexing import index_dataset

    _must_be_utf8(*images)
    others = [name for name in leave_out or [] if name.endswith(".ris.h5")]
    annotations = read_annotations(
        source,
        images=images,
        dataset=dataset,
        split_by=split_by,
        split=split,
        leave_out=[name for name in leave_out or [] if name not in others],
        skip_empty=skip_empty,
        box_format=box_format,
        exif=exif,
    )
    report = index_dataset(
        annotations, images=images, output=output, verify=verify, skip_corrupt=skip_corrupt, photos_of=others
    )
    say(*str(report).split("\n"))


def mine(
    dataset: Dataset,
    output: Annotated[Path, output("F.neg.h5", "Negative table to write.")],
    model: Annotated[
        list[str] | None,
        option("MODEL...", "open_clip model, or a model config .json; several are averaged.", as_typed),
    ] = None,
    pretrained: Annotated[
        list[str] | None,
        option("TAG_OR_FILE...", "Weights for each model: an open_clip tag, or a local file.", as_typed),
    ] = None,
    embeddings: Annotated[Path | None, option("F.neg.h5", "Use a table's embeddings instead of a model.")] = None,
    scores: Annotated[
        Path | None,
        option("FILE", "Use scores instead: .parquet, .csv or .tsv of sent_id, image_id, score, or an .lmdb."),
    ] = None,
    depth: Annotated[int, option("N", "Candidates kept per sentence.", COUNT)] = 1000,
    exclude_similar_photos: Annotated[
        float | None, option("S", "Exclude photos more similar than S to the target's photo.", number())
    ] = None,
    exclude_category: Annotated[
        bool, flag("--exclude-category", "Exclude photos that show the target's category.")
    ] = False,
    exclude_siblings: Annotated[
        float | None, option("S", "Exclude photos more similar than S to another sentence of the ref.", number())
    ] = None,
    exclude_crops: Annotated[
        float | None,
        option("MARGIN", "Exclude photos with a crop less than MARGIN below the target photo's best crop.", number()),
    ] = None,
    exclude_photos_of: Annotated[
        list[Path] | None, option("G.ris.h5...", "Exclude the photos of other data sets.")
    ] = None,
    approximate: Annotated[bool, flag("--approximate", "Search with FAISS, for millions of photos.")] = False,
    probes: Annotated[int | None, option("N", "FAISS lists to search.", COUNT, default="a sixteenth of them")] = None,
    batch_size: Annotated[int, option("N", "Photos or sentences per batch.", BATCH)] = 64,
    device: Annotated[str | None, option("DEVICE", "cuda, cuda:1 or cpu.", default="cuda if available")] = None,
    images: ImageRoot = None,
    verbose: Verbose = False,
) -> None:
    """Rank all photos for every sentence, by CLIP or by given scores."""
    check_address_space()
    from nemo_dali.mining import job
    from nemo_dali.mining.exclusions import Exclusions
    from nemo_dali.mining.given import mine_scores

    exclusions = Exclusions(
        similar_photos=exclude_similar_photos,
        category=exclude_category,
        siblings=exclude_siblings,
        crops=exclude_crops,
        photos_of=exclude_photos_of or (),
    )
    common: dict[str, Any] = {"output": output, "depth": depth, "exclusions": exclusions}
    by_model: dict[str, Any] = {
        "model": model or None,
        "pretrained": pretrained or None,
        "embeddings": embeddings,
        "approximate": approximate,
        "probes": probes,
    }
    if scores is not None:
        for name, value in by_model.items():
            if value:
                raise ValueError(f"--{name} ({value}) must be left out with --scores")
        report: object = mine_scores(dataset, scores, **common)
    else:
        report = job.mine(dataset, batch_size=batch_size, device=device, images=images, **by_model, **common)
    if os.environ.get("RANK", "0") == "0":
        say(*str(report).split("\n"))


def tiles(
    dataset: Dataset,
    size: Annotated[int, option("PIXELS", "Side length of the frames.", SIDE)],
    output: Annotated[Path, output("F.tiles.h5", "Tile file to write.")],
    grids: Annotated[
        list[int], option("GRID...", "Grids to use: 1 for single photos, 2 for 2x2, 3 for 3x3.", COUNT)
    ] = GRIDS,
    resample: Resample = "cv2-linear",
    images: ImageRoot = None,
    num_threads: Threads = None,
    device: Annotated[str | None, option("DEVICE", "cpu or cuda.", default="cuda if available")] = None,
    verbose: Verbose = False,
) -> None:
    """Decode and resample every photo once, ahead of training."""
    check_address_space()
    from nemo_dali.pipeline.gpu import default_device
    from nemo_dali.tiles.build import make_tiles

    report = make_tiles(
        dataset,
        size=size,
        output=output,
        resample=resample,
        grids=grids,
        images=images,
        num_threads=num_threads,
        device=device or default_device(),
        announce=say,
    )
    say(str(report))


def _weights(given: list[str]) -> dict[str, float]:
    """Weights by kind, from words like ``attribute=2``."""
    weights: dict[str, float] = {}
    for word in given:
        kind, _, weight = word.partition("=")
        if kind in weights:
            raise ValueError(f"--expressions ({short_repr(word)}) must name a kind once")
        try:
            weights[kind] = float(weight)
        except ValueError:
            raise ValueError(f"--expressions ({short_repr(word)}) must be KIND=WEIGHT, such as attribute=2") from None
    return weights


def _must_be_utf8(*paths: str | Path) -> None:
    """Raise a UnicodeEncodeError for names that a file will record, now rather than after the work."""
    "".join(map(os.path.abspath, paths)).encode()
