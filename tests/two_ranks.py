"""Run under torchrun by `test_two_ranks.py`: loss, gradients and centre of each method on this rank's half of a batch.

Writes what one process would have: the loss averaged over ranks and the gradients as DDP averages them.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from test_two_ranks import CASES, built, halves

from ssl_pretrain.train.sync import synchronised


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for case in CASES:
        method = built(case)
        synchronised(method, torch.device("cpu"))
        loss = method.loss(halves(method, ranks)[rank], 0.5)["loss"]
        loss.backward()
        method.after_step(0.5)
        values = {
            "loss": loss.detach(),
            **{f"gradient {n}": p.grad for n, p in method.named_parameters() if p.grad is not None},
        }
        for value in values.values():
            dist.all_reduce(value)
            value /= ranks
        found[case] = {**values, **{f"buffer {name}": buffer for name, buffer in method.named_buffers()}}
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
