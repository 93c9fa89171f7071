"""What a table excludes is shown by no Loader, whatever the mosaic, the mix, the ranks, a resume or the mode."""

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles
from tests.helpers.files import make_files
from tests.helpers.tables import write_excluding_table

SIZE, SIMILAR = 16, 0.8
POLICIES = {
    "both kinds": MosaicPolicy(p_mined=0.5, p_random=0.5, max_similarity=0.3),
    "warm-up": MosaicPolicy(p_mined=1, mine_after_epoch=1),
    "short pools": MosaicPolicy(p_mined=1, max_similarity=-0.9),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets, their tables and tiles, and bool [refs, photos] of both: what may not be shown."""
    folder = tmp_path_factory.mktemp("exclusions")
    third = make_files(folder / "third", photos=5, seed=2).dataset  # the first five of the others' photos
    sets, tables, tiles, forbidden = [], [], [], []
    for number, exclusions in enumerate(
        [Exclusions(category=True, photos_of=[third]), Exclusions(similar_photos=SIMILAR)]
    ):
        files = make_files(folder / str(number), photos=30 + 4 * number, seed=2)
        dataset = Dataset.open(files.dataset)
        table = folder / f"{number}.neg.h5"
        image = write_excluding_table(table, dataset, exclusions, seed=number).astype(np.float64)
        out = np.zeros((len(dataset.refs.ref_id), len(dataset.images.id)), bool)
        if exclusions.category:
            out |= dataset.shown_categories().T[dataset.refs.category]
            out[:, :5] = True
        else:
            out |= (image @ image.T > SIMILAR)[dataset.refs.image]
        assert 0.1 < out.mean() < 0.9
        make_tiles(files.dataset, size=SIZE, output=folder / f"{number}.tiles.h5", grids=(1, 2))
        sets.append(files.dataset)
        tables.append(table)
        tiles.append(folder / f"{number}.tiles.h5")
        forbidden.append(out)
    return sets, tables, tiles, forbidden


def make_loader(data, kind="both kinds", **options):
    sets, tables, _, _ = data
    shared = {"size": SIZE, "dtype": "uint8", "policy": POLICIES[kind], "seed": 5, "context_length": 16}
    return Loader(sets, tables, num_threads=1, **{"batch_size": 8, "rank": 0, "world_size": 1} | shared | options)


def cells(data, rows):
    """How many negatives were shown; each is looked up among what may not be."""
    first, second = data[3]
    for row in rows:
        own = row["images"][row["cell"]]
        for photo in set(row["images"].tolist()) - {own, -1}:
            if row["ref"] < len(first):
                assert photo < first.shape[1] and not first[row["ref"], photo]
            else:
                assert not second[row["ref"] - len(first), photo - first.shape[1]]
    return int((rows["images"] >= 0).sum()) - len(rows)


@pytest.mark.parametrize("mode", ["stream", "tiles"])
@pytest.mark.parametrize("kind", POLICIES)
def test_no_excluded_photo_is_shown_on_any_rank_or_after_a_resume(data, kind, mode):
    options = {"tiles": data[2]} if mode == "tiles" else {}
    shown, seen, state = 0, [], None
    for epoch in range(2):
        loaders = [make_loader(data, kind, rank=rank, world_size=2, **options) for rank in range(2)]
        for loader in loaders:
            loader.set_epoch(epoch)
            batches = iter(loader)
            for _ in range(3):
                rows = next(batches).plan
                shown += cells(data, rows)
                seen.append(rows)
            state = loader.state_dict()
            loader.close()
        resumed = make_loader(data, kind, batch_size=16, **options)  # on one rank now
        resumed.load_state_dict(state)
        for batch in resumed:
            shown += cells(data, batch.plan)
            seen.append(batch.plan)
        resumed.close()
    kinds = set(np.concatenate(seen)["kind"].tolist())
    assert shown > 300 and kinds >= {"both kinds": {1, 2}, "warm-up": {1, 2}, "short pools": {2}}[kind]


def test_mosaics_that_may_give_way_to_single_photos_need_tiles_for_those(data, tmp_path):
    sets, _, _, _ = data
    tiles = []
    for number, dataset in enumerate(sets):
        tiles.append(tmp_path / f"{number}.tiles.h5")
        make_tiles(dataset, size=SIZE, output=tiles[-1], grids=(2,))
    with pytest.raises(FileFormatError, match=r"no tiles for grid 1.*--grids 1 2"):
        make_loader(data, tiles=tiles)
