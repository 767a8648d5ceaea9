"""The first step of a bare DistributedDataParallel script, to compare a start of dtrain with; started by torchrun.

`first_step.py MODEL ROWS.npz DONE`: rank 0 writes the file DONE after its first update.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM


def main(folder: str, rows: str, done: str) -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = np.load(rows)
    mine = slice(2 * rank, 2 * rank + 2)
    loss = ddp(
        input_ids=torch.from_numpy(data["tokens"][mine]), position_ids=torch.from_numpy(data["positions"][mine]),
        labels=torch.from_numpy(data["labels"][mine]), use_cache=False,
    ).loss  # fmt: skip
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if rank == 0:
        Path(done).write_text(f"{loss.item()}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
