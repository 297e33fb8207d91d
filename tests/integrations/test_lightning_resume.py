"""Lightning: a checkpoint from the middle of an epoch, and a run that goes on from it as if it had never stopped."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from tests.passes import trainable, wrap
from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, Anchor, DriftBudget, ProtectInputs, TopK, mdgd_backward
from torch_mdgd.integrations.lightning import MDGDModuleMixin

pytestmark = pytest.mark.filterwarnings("ignore:Anchor holds linear layers")
BATCHES = [llava_batch(seed) for seed in range(6)]
SETTINGS = {
    "budget": {"rule": lambda model: DriftBudget(MDGD(), 0.05)},
    "inputs": {"rule": lambda model: ProtectInputs(model, refresh=3)},
    "anchor in the making": {"rule": lambda model: Anchor(model, 0.5, warmup=3)},
    "refreshed": {"mask": TopK(0.2, refresh=3)},
    "compact": {"mask": TopK(0.2), "compact": True},
}


class Loader:
    """The batches in order; Lightning saves where it is, and begins there."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < len(BATCHES):
            self.at += 1
            yield BATCHES[self.at - 1]
        self.at = 0

    def __len__(self):
        return len(BATCHES)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Module(MDGDModuleMixin, LightningModule):
    def __init__(self, settings, automatic):
        super().__init__()
        self.model, self.settings, self.seen = llava(dropout=0.2).train(), settings, []
        self.automatic_optimization = automatic

    def configure_optimizers(self):
        optimizer = wrap(torch.optim.AdamW(trainable(self.model), lr=0.02), self.model, **self.settings)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, batch_idx):
        self.seen.append(int(batch["input_ids"].sum()))
        # Dropout must not depend on where a run began.
        torch.manual_seed(self.seen[-1])
        if self.automatic_optimization:
            return self.mdgd_backward(self.model, batch)
        optimizer = self.optimizers()
        mdgd_backward(self.model, optimizer, batch)
        optimizer.step()
        optimizer.zero_grad()
        return self.lr_schedulers().step()


class Save(Callback):
    def __init__(self, path, after):
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.after and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(module, folder, micro_batches=1, resume=None, **options):
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        accumulate_grad_batches=micro_batches, **options,
    )  # fmt: skip
    trainer.fit(module, Loader(), ckpt_path=resume, weights_only=True)


# All that there is to load after steps of several micro-batches, and each other way to train once.
@pytest.mark.parametrize(
    ("name", "automatic", "micro_batches"),
    [*((name, True, 2) for name in SETTINGS), ("inputs", True, 1), ("budget", False, 1)],
)
def test_resumed_in_the_middle_of_an_epoch_is_uninterrupted_bit_for_bit(name, automatic, micro_batches, tmp_path):
    path = tmp_path / "middle.ckpt"
    whole = Module(SETTINGS[name], automatic)
    fit(whole, tmp_path, micro_batches, callbacks=[Save(path, after=2)])

    resumed = Module(SETTINGS[name], automatic)
    with torch.no_grad():
        for p in resumed.parameters():
            p.mul_(1.5)
    fit(resumed, tmp_path, micro_batches, resume=path)
    assert resumed.seen == whole.seen[2 * micro_batches :]
    assert_same_bits(list(resumed.model.parameters()), list(whole.model.parameters()))
