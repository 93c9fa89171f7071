"""The libraries that people train with save and restore a Loader by their own means."""

import pytest
import torch

from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # torch.distributed.checkpoint's own
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),  # Lightning's own
    # The runs that go on save nothing, so that they leave the checkpoints as they are.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning"),
]

STEPS = 12
POLICY = MosaicPolicy(max_similarity=0.4)


def make(files, **options):
    return Loader(files.dataset, files.negatives, batch_size=4, size=16, policy=POLICY, context_length=16, **options)


@pytest.fixture(scope="module")
def positions(files):
    """Epoch and plan of every step of two epochs."""
    loader = make(files)
    return [(epoch, batch.plan.tobytes()) for epoch in range(2) for batch in loader]


def rest(loader):
    """What a loader still shows of epochs 0 and 1, in a loop without set_epoch."""
    shown = []
    while loader.epoch < 2:
        epoch = loader.epoch
        shown += [(epoch, batch.plan.tobytes()) for batch in loader]
    return shown


def taken(loader, steps):
    """The loader in the middle of a pass, and the pass."""
    passing = iter(loader)
    for _ in range(steps):
        next(passing)
    return loader, passing


def test_a_loader_is_stateful_in_torchdatas_and_torchs_sense(files):
    from torch.distributed.checkpoint.stateful import Stateful as TorchStateful
    from torchdata.stateful_dataloader import Stateful

    assert isinstance(make(files), Stateful) and isinstance(make(files), TorchStateful)


@pytest.mark.parametrize("steps", [0, 5, STEPS - 1])
def test_torchdata_nodes_go_on_behind_the_saved_step(files, positions, steps):
    from torchdata.nodes import IterableWrapper
    from torchdata.nodes import Loader as Nodes

    nodes, passing = taken(Nodes(IterableWrapper(make(files))), steps)
    again = Nodes(IterableWrapper(make(files)))
    again.load_state_dict(nodes.state_dict())
    assert [batch.plan.tobytes() for batch in again] == [plan for _, plan in positions[steps:STEPS]]
    del passing


@pytest.mark.parametrize("steps", [0, 5, STEPS - 1])
def test_a_distributed_checkpoint_restores_a_loader(files, positions, tmp_path, steps):
    from torch.distributed import checkpoint

    loader, passing = taken(make(files), steps)
    checkpoint.save({"loader": loader, "weight": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    again = make(files)
    checkpoint.load({"loader": again, "weight": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    assert rest(again) == positions[steps:]
    del passing


def test_accelerate_saves_a_registered_loader(files, positions, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = make(files)
    model = torch.nn.Linear(2, 2)
    model, optimizer, prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters()), loader)
    assert prepared is loader  # neither wrapped nor sharded a second time
    accelerator.register_for_checkpointing(loader)
    _, passing = taken(loader, 7)
    accelerator.save_state(tmp_path)
    del passing

    again, accelerator = make(files), Accelerator(cpu=True)
    accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(again)
    accelerator.load_state(tmp_path)
    assert rest(again) == positions[7:]


def trainer(**options):
    """A Lightning trainer of two epochs, its model, and epoch and plan of every batch that the model is shown."""
    import lightning

    shown = []

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, _):
            shown.append((self.current_epoch, batch.plan.tobytes()))
            return self.layer(batch.image.mean((2, 3))).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", max_epochs=2, **quiet, **options), Model(), shown


@pytest.fixture(scope="module")
def checkpoints(files, positions, tmp_path_factory):
    """A checkpoint of every step of an uninterrupted Lightning run."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    folder = tmp_path_factory.mktemp("lightning")
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit, model, shown = trainer(callbacks=[saving])
    fit.fit(model, make(files))
    assert shown == positions
    return folder


@pytest.mark.parametrize("steps", [1, 5, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS - 1])
def test_lightning_goes_on_behind_the_saved_step(files, positions, checkpoints, steps):
    fit, model, shown = trainer(enable_checkpointing=False)
    fit.fit(model, make(files, prefetch=3), ckpt_path=checkpoints / f"step={steps}.ckpt")
    assert shown == positions[steps:]
