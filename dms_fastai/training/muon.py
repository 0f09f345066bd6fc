"""timm's Muon, with the matrices of one shape moved together."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor

__all__ = ["COEFFICIENTS", "StackedMuon"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that is iterated (Jordan et al., 2024)


class StackedMuon(timm.optim.Muon):
    """`timm.optim.Muon`, which makes matrices of one shape orthogonal as a stack.

    One after another, they cost a GPU more time to be told what to do than to do it: `dmsresnet` has 28 matrices of 11
    shapes. On a CPU, one after another is faster, and that is what it does there. A Learner's parameters come to a GPU
    after its optimiser has been made, so that each step looks where they are.

    Of Muon's choices it has what `optimizers.Muon` asks for: Nesterov's momentum, the quintic of `COEFFICIENTS`, and
    convolutions as matrices of their filters, whose step grows where they are taller than wide.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters; timm's own step has those that are no matrices, and in the first step all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = []
        for group in self.param_groups:
            matrices = [p for p in group["params"] if self.stacks(p)]
            if matrices:
                self.move(matrices, group)
            moved += [(p, p.grad) for p in matrices]
        for p, _ in moved:
            p.grad = None  # timm's step leaves it alone
        super().step()
        for p, grad in moved:
            p.grad = grad
        return loss

    def stacks(self, p: Tensor) -> bool:
        """Whether a parameter moves in a stack: a matrix on a GPU that has moved before."""
        return p.device.type != "cpu" and p.grad is not None and bool(self.state[p].get("use_muon"))

    def move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Decay matrices and move them along their momenta, made orthogonal."""
        lr, momentum, grads = group["lr"], group["momentum"], [p.grad for p in matrices]
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, momenta, momentum)
        alike = defaultdict(list)
        for p, update in zip(matrices, ahead, strict=True):
            alike[p.shape].append((p, update.flatten(1)))
        for pairs in alike.values():
            same, updates = zip(*pairs, strict=True)
            stack = zeropower_via_newtonschulz(torch.stack(updates), group["ns_steps"], [COEFFICIENTS]).to(same[0])
            rows, columns = stack.shape[1:]
            moves = [update.view_as(p) for p, update in zip(same, stack, strict=True)]
            torch._foreach_add_(list(same), moves, alpha=-lr * max(1.0, rows / columns) ** 0.5)
