"""Data parallelism on one host: a process (a rank) for each GPU, gradients summed over all of them.

    torchrun --standalone --nproc-per-node 2 -m examples.tiny_agent.train --out runs/tiny-agent

Every rank holds the whole model, trains on sequences of its own and makes the same update. Losses are divided by counts
over all ranks, so that two ranks move the model as one process does on all of their sequences.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn


class Ranks:
    """This process among those of a run; ``Ranks()`` is alone."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Meet the others that ``torchrun`` started, NCCL between GPUs and gloo between hosts' memories; alone where it
        started none. device: cuda or cpu; a rank's own GPU becomes the current one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        # GPUs that cannot reach each other say so here, not after a minute of compilation.
        distributed.all_reduce(torch.zeros(1, device=device))
        return cls(distributed.get_rank(), size)

    def leave(self) -> None:
        if self.size > 1:
            distributed.destroy_process_group()

    def share(self, count: int) -> int:
        """Of ``count`` things, how many are this rank's. Raises ValueError where they cannot be shared evenly."""
        if count % self.size:
            raise ValueError(f"{count} sequences cannot be shared by {self.size} ranks; use a number that divides them")
        return count // self.size

    def totals(self, *values: float) -> list[float]:
        """Each number, summed over all ranks."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(summed)
        return [float(value) for value in summed]

    def first(self, *values: float) -> list[float]:
        """The first rank's: what depends on the clock is the same for all."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        distributed.broadcast(told, 0)
        return [float(value) for value in told]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors, of the same shapes on all ranks, by their sums: one transfer for all of them."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(sums, tensors, strict=True)])

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """A parameter that this rank has no gradient of counts as one of gradient 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum([parameter.grad for parameter in parameters if parameter.grad is not None])
