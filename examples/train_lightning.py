"""Train in FP8 with Lightning: one line converts the module, records it, and keeps its scales.

    python examples/train_lightning.py runs/lightning
    unclamp report runs/lightning/run

The text is this file. Run it again with a larger number of epochs, and it goes on:

    python examples/train_lightning.py runs/lightning 4
"""

import sys
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import unclamp
from unclamp.integrations.lightning import UnclampCallback

WIDTH, CONTEXT = 64, 16


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.mix, self.up = nn.Linear(CONTEXT * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def training_step(self, text: Tensor, _: int) -> Tensor:
        x = self.embed(text[:, :-1]).flatten(1)
        loss = F.cross_entropy(self.head(self.up(F.silu(self.mix(x)))), text[:, -1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(folder: Path, epochs: int = 2) -> None:
    text = torch.tensor(list(Path(__file__).read_bytes()))
    loader = DataLoader(list(text.unfold(0, CONTEXT + 1, 1)), batch_size=64, shuffle=True)
    kept = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    recorded = UnclampCallback(unclamp.Recipe(), folder / "run", skip=["head"])  # the one line
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_epochs=epochs, callbacks=[kept, recorded],
        gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(Model(), loader, ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
