"""The report: one page, without a network, on which a person chooses tau and K by eye.

table, data set ──▶ curves ──▶ tune ──┐
photos ──▶ thumbnails ────────────────┴──▶ page.html, Plotly's own script beside its data, in one file
"""

import base64
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from nemo_dali._checks import MOST, integer
from nemo_dali._lazy import extra
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.orientation import turned_pixels, turned_size
from nemo_dali.data.photo_file import open_file, open_photo
from nemo_dali.io.output import check_inputs, check_place, write_bytes
from nemo_dali.io.progress import progress
from nemo_dali.io.threads import thread_count
from nemo_dali.kernels.plan.pools import pool_begins, pools, valid_ends
from nemo_dali.loader.contact_sheet import outline
from nemo_dali.mining.pool_curves import DRAWN, Curves, measure_curves
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.tune import PASSING, PASSING_NO_TARGET, Proposal, depth_advice, propose
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.synthetic.false_negatives import FalseNegatives, false_negatives
from nemo_dali.synthetic.truth import Truth

FIRST_RANKS, SPREAD_RANKS = 48, 72  # candidates with a picture: the first, and some others, further and further apart
THUMB, OWN = 128, 320  # pixels of the longer side
MOST_BINS = 120  # of a distribution; fewer where there are few sentences
SHOWN_RANKS = (1, 10, 100)  # whose similarities the page compares, besides the last rank's
MOST_DRAWN = 12  # photos shown
PAGE = "a report of nemo-dali's"
MARK = b'<meta name="generator" content="nemo-dali report">'  # within the first bytes of a page


class Reported(NamedTuple):
    """What a page was made from; ``false_negatives`` is None where no truth was given."""

    proposal: Proposal
    false_negatives: FalseNegatives | None


def report(
    dataset_path: str | Path,
    table_path: str | Path,
    *,
    output: str | Path,
    examples: int = 12,
    seed: int = 0,
    images: str | Path | None = None,
    passing: float = PASSING,
    grid: int = 2,
    truth: str | Path | None = None,
    policy: MosaicPolicy | None = None,
) -> Reported:
    """Write the page.

    Args:
        dataset_path: a .ris.h5 file.
        table_path: its .neg.h5 file.
        output: the .html file; an earlier report is replaced when the new one is complete, anything else is not.
        examples: expressions with their candidates as pictures; about 0.4 MB each.
        seed: a different one gives other examples.
        images: where the photos are, if not where they were when the data set file was made.
        passing, grid: see ``tune.propose``.
        truth: for generated data, what ``Truth.read`` takes: the page then says how many negatives are false.
        policy: whose negatives the truth judges; None: the proposed one's.

    Returns:
        The proposal that the page starts with, and what the truth says.

    Raises:
        ValueError: an argument out of range, or ``output`` is not an .html.
        NemoError: a file cannot be read or written, or plotly is not installed.
    """
    output = Path(output)
    examples = integer("examples", examples, least=1, most=MOST)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output ({output}) must end in .html")
    seed = integer("seed", seed, least=0)
    check_inputs(output, (dataset_path, table_path))
    check_place(output, is_ours=_is_page, kind=PAGE)  # fail now, not after the work
    script = _plotly()
    dataset, table = Dataset.open(dataset_path, images=images), NegativeTable.open(table_path)
    known = None if truth is None else Truth.read(truth).of(dataset)
    curves = measure_curves(dataset, table)
    proposal = propose(curves, passing=passing, grid=grid)
    false = None
    if known is not None:
        false = false_negatives(dataset_path, table_path, known, policy=policy or proposal.policy)
    content = _curves(curves, proposal, passing, grid) | _pictures(dataset, curves, proposal, examples, seed)
    content["about"] = _about(dataset, table)
    content["truth"] = "" if false is None else str(false)
    template = (files("nemo_dali.commands.report") / "page.html").read_text(encoding="utf-8")
    parts = {"/*DATA*/": json_in_html(content), "/*PLOTLY*/": script}
    page = re.sub(r"/\*(DATA|PLOTLY)\*/", lambda place: parts[place[0]], template)  # in one pass: a part may hold these
    write_bytes(output, page.encode(), is_ours=_is_page, kind=PAGE)
    return Reported(proposal, false)


def json_in_html(content: Any) -> str:
    """JSON for a script element, in ASCII: nothing in it ends the element or begins another."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _is_page(head: bytes) -> bool:
    return MARK in head


def _plotly() -> str:
    with extra("report", "The report"):
        from plotly.offline import get_plotlyjs
    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _about(dataset: Dataset, table: NegativeTable) -> str:
    model, weights = (
        " + ".join(Path(name).name for name in names.split(" + ")) for names in (table.model, table.pretrained)
    )
    return (
        f"{dataset.name}: {len(dataset.sentences.ref):,} sentences, {len(dataset.images.id):,} photos. Ranked by "
        f"{model} with {weights} ({table.method}), {table.neighbors.shape[1]:,} photos a sentence. "
        f"Excluded: {'; '.join(table.exclusions)}."
    )


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(curves: Curves, proposal: Proposal, passing: float, grid: int) -> dict[str, Any]:
    short = curves.short3 if grid == 2 else curves.short8
    metrics = {
        "short": short,
        "empty": curves.empty,
        "cut": curves.cut,
        "size": curves.size,
        "hardness": curves.hardness,
        "drawn1": curves.drawn[:, :, DRAWN.index(0.01)],
        "never": curves.never,
    }
    if curves.labelled:
        metrics["shown"] = curves.shown
    bins, distributions = _distributions(curves)
    wrong = (
        "If photos that hold what a sentence describes are as similar to it as its own photo, tau lets this share pass."
    )
    if curves.labelled:
        wrong += " They show the target's category, so no larger share of the candidates than that are false negatives."
    if curves.labelled < 1:
        wrong += f" The category of {1 - curves.labelled:.0%} of the sentences is unknown."
    none, other, apart = curves.no_target, dict[str, npt.NDArray[Any]](), ""
    if none is not None:
        other = {"short": none.short3 if grid == 2 else none.short8, "size": none.size}
        apart = f"; {len(none.rows):,} without a target are apart from them, and their own photos are in no curve"
    return {
        "taus": curves.taus.tolist(),
        "ks": curves.ks.tolist(),
        "cells": grid**2 - 1,
        "passing": passing,
        "passing_no_target": min(passing, PASSING_NO_TARGET),
        "metrics": {name: _rounded(values) for name, values in metrics.items()},
        "true_below": _rounded(curves.true_below),
        "shown_by_chance": _rounded(np.array(curves.shown_by_chance)),
        "labelled": curves.labelled,
        "drawn": _rounded(curves.drawn),
        "drawn_shares": list(DRAWN),
        "ranks": curves.ranks.tolist(),
        "rank_quantiles": _rounded(curves.rank_quantiles),
        "bins": bins,
        "distributions": distributions,
        "policy": asdict(proposal.policy),
        "proposal": {
            "t": proposal.t,
            "c": proposal.c,
            "n": proposal.t_no_target,
            "why": [*proposal.why, depth_advice(curves, proposal)],
        },
        "no_target": None if none is None else {name: _rounded(values) for name, values in other.items()},
        "looked": f"From {len(curves.rows):,} of {len(curves.table.neighbors):,} sentences, evenly spread{apart}.",
        "wrong": wrong,
    }


def _rounded(values: npt.NDArray[Any]) -> Any:
    """Nested lists, NaN as None, to four places."""
    return json.loads(json.dumps(np.round(values, 4).tolist()).replace("NaN", "null"))


def _distributions(curves: Curves) -> tuple[list[float], list[dict[str, Any]]]:
    table, rows = curves.table, curves.rows
    similarity = np.asarray(table.similarity[rows], np.float64)
    width = similarity.shape[1]
    named = {"own photo": curves.true}
    named |= {f"rank {rank}": similarity[:, rank - 1] for rank in sorted({*SHOWN_RANKS, width}) if rank <= width}
    named["any photo"] = curves.chance
    named = {name: values[np.isfinite(values)] for name, values in named.items()}
    every = np.concatenate([*named.values()])
    bins = min(MOST_BINS, max(12, round(3 * len(rows) ** 0.5)))
    edges = np.linspace(every.min(), every.max() + 1e-6, bins + 1)
    densities = [
        {"name": name, "density": _rounded(np.histogram(values, edges, density=True)[0])}
        for name, values in named.items()
        if len(values)
    ]
    return _rounded((edges[1:] + edges[:-1]) / 2), densities


# --- pictures --------------------------------------------------------------------------------------------------------


def _pictures(dataset: Dataset, curves: Curves, proposal: Proposal, count: int, seed: int) -> dict[str, Any]:
    table = curves.table
    sentences = _examples(curves, count, seed)
    places = _shown_ranks(table.neighbors.shape[1])
    drawn = _most_drawn(dataset, curves, proposal)
    similarity = np.asarray(table.similarity[sentences], np.float32)
    begins = np.stack([pool_begins(similarity, tau) for tau in curves.taus], axis=1)
    ends = valid_ends(similarity)
    wanted = {photo for photo, _ in drawn}
    shown = []
    for i, sentence in enumerate(sentences):
        neighbors = table.neighbors[sentence]
        valid = int(ends[i])
        ref = int(dataset.sentences.ref[sentence])
        own = int(dataset.refs.image[ref])
        ranks = [rank for rank in places if rank <= valid]
        wanted |= {int(neighbors[rank - 1]) for rank in ranks}
        shown.append(
            {
                "row": int(sentence),
                "sentence": dataset.sentences.text[int(sentence)],
                "similarity": round(float(table.text_embedding[sentence] @ table.image_embedding[own]), 4),
                "own_rank": int(table.own_rank[sentence]),
                "valid": valid,
                "own_place": next(iter(np.flatnonzero(neighbors == own).tolist()), -1),  # -1, as it should be
                "begins": begins[i].tolist(),
                "candidates": [
                    [rank, round(float(similarity[i, rank - 1]), 4), int(neighbors[rank - 1])] for rank in ranks
                ],
                "no_target": bool(dataset.refs.empty[ref]),
                "ref": ref,
            }
        )
    jobs = [(photo, None) for photo in sorted(wanted)] + [(None, example["ref"]) for example in shown]
    with ThreadPoolExecutor(thread_count()) as pool:
        made = pool.map(lambda job: _picture(dataset, *job), jobs)
        pictures = list(progress(made, total=len(jobs), what="making pictures", unit="photo"))
    thumbs = dict(zip(sorted(wanted), pictures, strict=False))
    for example, photo in zip(shown, pictures[len(wanted) :], strict=True):
        example["photo"] = photo
        del example["ref"]
    unread = sum(picture == "" for picture in pictures)
    return {
        "photos": len(dataset.images.id),
        "examples": shown,
        "thumbs": {photo: picture for photo, picture in thumbs.items() if picture},
        "most_drawn": [{"photo": photo, "share": share} for photo, share in drawn],
        "unread": f"{unread} photos could not be read and are left blank." if unread else "",
    }


def _examples(curves: Curves, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Sentences to show, ascending; a quarter of them without a target, if there are any."""
    rng, others = np.random.default_rng(seed), np.empty(0, np.int64)
    if curves.no_target is not None:
        others = rng.permutation(curves.no_target.rows)[: max(1, count // 4)]
    sentences = rng.permutation(curves.rows)[: max(count - len(others), 0)]
    return np.sort(np.concatenate([sentences, others]))


def _shown_ranks(width: int) -> list[int]:
    """Ranks from 1 to ``width`` with a picture."""
    if width <= FIRST_RANKS:
        return list(range(1, width + 1))
    spread = np.geomspace(FIRST_RANKS, width, SPREAD_RANKS + 1).round().astype(int)
    return sorted({*range(1, FIRST_RANKS + 1), *spread.tolist()})


def _most_drawn(dataset: Dataset, curves: Curves, proposal: Proposal) -> list[tuple[int, float]]:
    """The photos drawn most often at the proposed values, with their shares of all draws."""
    from nemo_dali.kernels.ranking.pools import draws_reference

    table, rows = curves.table, curves.rows
    begin, end = pools(table.similarity[rows], curves.taus[proposal.t], int(curves.ks[proposal.c]))
    weight = 1.0 / dataset.refs.sentence_count[dataset.sentences.ref[rows]]
    counts = draws_reference(table.neighbors[rows], begin, end, weight, len(table.image_embedding))
    best = np.argsort(-counts, kind="stable")[:MOST_DRAWN]
    return [(int(photo), round(float(counts[photo] / counts.sum()), 6)) for photo in best if counts[photo] > 0]


def _picture(dataset: Dataset, photo: int | None, ref: int | None) -> str:
    """A photo, or a ref's photo with its mask outlined, as a data URL; "" if it cannot be read."""
    row = int(dataset.refs.image[ref]) if photo is None else photo
    side = THUMB if photo is not None else OWN
    try:
        with open_file(dataset.photo_path(row)) as file:
            opened = open_photo(file)
            turn = int(dataset.turn[row])
            if turned_size(*opened.size, turn) != (dataset.images.width[row], dataset.images.height[row]):
                return ""  # it may be of any size
            opened.draft("RGB", (2 * side, 2 * side))
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # what Pillow's decoders raise
        return ""
    image.thumbnail((side, side))
    image = Image.fromarray(turned_pixels(np.asarray(image), turn))
    if ref is not None:
        mask = Image.fromarray(dataset.mask(ref) * np.uint8(255)).resize(image.size, Image.Resampling.BILINEAR)
        outline(image, mask)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=78 if ref is None else 86)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
