#!/usr/bin/env bash
# Lightning: a training resumed from a checkpoint in mid-epoch sees the epoch's first data again and never the rest.
#
# The checkpoint counts two of four steps as done, so that two more are taken; the loader of a new process starts at its
# beginning. One expects the loader to be advanced, or an error; a warning about mid-epoch checkpoints is all that is said.
# Loaders with state_dict and load_state_dict are resumed rightly.
# Seen with lightning 2.6.6 and torch 2.13.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check lightning==2.6.6 torch==2.13.0
cd "$folder"; "$folder/env/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import lightning
import torch
from torch.utils.data import DataLoader

seen = []


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        seen.append([int(value) for value in batch.flatten()])
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Interrupt(lightning.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            trainer.save_checkpoint("half.ckpt")
            raise KeyboardInterrupt


options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
options |= {"enable_progress_bar": False, "enable_model_summary": False}


def loader():
    return DataLoader(torch.arange(8.0).reshape(8, 1), batch_size=2)


try:
    lightning.Trainer(callbacks=[Interrupt()], **options).fit(Model(), loader())
except BaseException:
    pass
before, seen[:] = list(seen), []
lightning.Trainer(**options).fit(Model(), loader(), ckpt_path="half.ckpt")
print("lightning", lightning.__version__, "before:", before, "after the resume:", seen)
assert before == [[0, 1], [2, 3]] and seen == [[0, 1], [2, 3]]
PYTHON
