"""Lightning: the Trainer accumulates, clips, schedules and saves as usual."""

from lightning.pytorch import LightningModule, Trainer
from tiny import make_model, make_samples
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from torch_mdgd import MDGDOptimizer
from torch_mdgd.integrations.lightning import MDGDModuleMixin


class FineTuning(MDGDModuleMixin, LightningModule):
    """Any module of yours, with the passes of MDGD in its training step."""

    def __init__(self):
        super().__init__()
        self.model = make_model()
        self.model.model.vision_tower.requires_grad_(False)

    def configure_optimizers(self):
        """Wrap first; the scheduler takes the wrapper."""
        optimizer = MDGDOptimizer(AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2))
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, T_max=4), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        """In place of ``return self.model(**batch).loss``."""
        loss = self.mdgd_backward(self.model, batch)
        print(f"loss {loss:.3f}")
        return loss


trainer = Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=1,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir="runs/lightning",
)
# ckpt_path=... goes on where a checkpoint was, bit for bit: the reference is in it.
trainer.fit(FineTuning(), DataLoader(make_samples(16), batch_size=2))

print(f"visual loss {trainer.optimizers[0].diagnostics['visual_loss']:.4f}")
