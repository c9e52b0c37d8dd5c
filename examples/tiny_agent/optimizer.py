"""Muon for the matrices inside the layers, AdamW for the rest.

Muon (Keller Jordan, 2024; scaled as in Moonlight, arXiv 2502.16982) replaces a matrix' momentum by the nearest
semi-orthogonal matrix, so that every direction moves by the same amount:

    M = beta M + G;   U = NewtonSchulz(G + beta M);   W = W - lr (0.2 sqrt(max(out, in)) U + decay W)

The factor gives an update the size that AdamW's has, hence one learning rate for both. torch.optim.Muon takes one
matrix at a time, which for a hundred small ones is a thousand launches a step; here equal shapes are orthogonalised
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_RMS = 0.2


class Optimizer:
    """matrices: parameters for Muon, [out, in] or [count, out, in]; others: parameters for AdamW."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self._momentum, self._decay = momentum, weight_decay
        self._others = list(others)
        self._adam = torch.optim.AdamW(
            self._others, lr=0.0, betas=betas, eps=1e-10, weight_decay=0.0, fused=_all_cuda(self._others)
        )
        self._groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in matrices:
            shape = parameter.shape
            self._groups.setdefault((shape[-2], shape[-1]), []).append(parameter)
        self._moments = {shape: [torch.zeros_like(p) for p in group] for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, matrix_lr: float, other_lr: float) -> None:
        """Apply the gradients and drop them; a parameter without one stays as it is."""
        for group in self._adam.param_groups:
            group["lr"] = other_lr
        torch.nn.utils.clip_grads_with_norm_(self._others, 1.0, self._norm(), foreach=True)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        for shape, parameters in self._groups.items():
            used = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
            if used:
                moments = [self._moments[shape][i] for i in used]
                self._step_matrices([parameters[i] for i in used], moments, shape, matrix_lr)

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._others if p.grad is not None], foreach=True)

    def _step_matrices(
        self, parameters: list[nn.Parameter], moments: list[Tensor], shape: tuple[int, int], lr: float
    ) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(moments, self._momentum)
        torch._foreach_add_(moments, gradients)
        ahead = torch._foreach_add(gradients, moments, alpha=self._momentum)
        counts = [parameter.numel() // (shape[0] * shape[1]) for parameter in parameters]
        updates = orthogonalized(torch.cat([update.view(-1, *shape) for update in ahead])).split(counts)
        torch._foreach_mul_(parameters, 1 - lr * self._decay)
        shaped = [update.view_as(parameter) for update, parameter in zip(updates, parameters, strict=True)]
        torch._foreach_add_(parameters, shaped, alpha=-lr * _RMS * max(shape) ** 0.5)
        for parameter in parameters:
            parameter.grad = None


def orthogonalized(matrices: Tensor) -> Tensor:
    """Singular values pulled to about 1 (0.7 to 1.2) by five Newton-Schulz steps: [n, out, in] to the same, float32."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + torch.baddbmm(b * square, square, square, alpha=c) @ x
    return (x.mT if tall else x).float()


def _all_cuda(parameters: Sequence[Tensor]) -> bool:
    return all(parameter.is_cuda for parameter in parameters)
