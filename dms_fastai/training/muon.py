"""timm's Muon, with matrices moved together, those of one shape and others that fit in beside them."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor

__all__ = ["COEFFICIENTS", "StackedMuon"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that is iterated (Jordan et al., 2024)


class StackedMuon(timm.optim.Muon):
    """`timm.optim.Muon`, which makes matrices orthogonal in stacks.

    One after another, they take a GPU longer to launch than to compute: `dmsresnet` has 28 matrices of 11 shapes, which
    make four stacks. On a CPU, one after another is faster, and that is what it does there. A Learner's
    parameters come to a GPU after its optimiser has been made, so that each step looks where they are.

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
        moves = orthogonal(ahead, group["ns_steps"])
        alike = defaultdict(list)
        for p, move in zip(matrices, moves, strict=True):
            rows = len(p)
            alike[-lr * max(1.0, rows**2 / p.numel()) ** 0.5].append((p, move))
        for alpha, pairs in alike.items():
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=alpha)


def orthogonal(updates: list[Tensor], steps: int) -> list[Tensor]:
    """Each update, as the matrix of its filters, with all its singular values near 1; of its own shape and strides."""
    rows_first = [as_matrix(update) for update in updates]
    wide = [m.mT if tall(m) else m for m in rows_first]
    found: list[Any] = [None] * len(updates)
    for shape, places in stacks_of([m.shape for m in wide]).items():
        stack = torch.stack([padded(wide[place], shape) for place in places])
        stack = zeropower_via_newtonschulz(stack, steps, [COEFFICIENTS]).to(updates[0])
        for place, moved in zip(places, stack, strict=True):
            rows, columns = wide[place].shape
            moved = moved[:rows, :columns]
            found[place] = as_update(moved.mT if tall(rows_first[place]) else moved, updates[place])
    return found


def stacks_of(shapes: list[torch.Size]) -> dict[torch.Size, list[int]]:
    """The places of the matrices in each stack. What is alone with its shape joins the smallest stack that can hold it.

    There it has rows and columns of zeros, which stay zero: the iteration is a sum of odd powers of the matrix.
    """
    counts = Counter(shapes)
    large = sorted((shape for shape, count in counts.items() if count > 1), key=math.prod)
    stacks = defaultdict(list)
    for place, shape in enumerate(shapes):
        hold = (one for one in large if one[0] >= shape[0] and one[1] >= shape[1])
        stacks[shape if counts[shape] > 1 else next(hold, shape)].append(place)
    return stacks


def as_matrix(x: Tensor) -> Tensor:
    """A row for each filter, whose columns are as they lie in memory: in what order, is nothing to the iteration."""
    return (x.permute(0, 2, 3, 1) if channels_last(x) else x).flatten(1)


def as_update(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_matrix`, in the strides of `like`, which many tensors must share to be added at once."""
    matrix = matrix.contiguous()
    if like.is_contiguous() or channels_last(like):
        return matrix.as_strided(like.shape, like.stride())
    return matrix.view(like.shape)


def channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def padded(matrix: Tensor, shape: torch.Size) -> Tensor:
    if matrix.shape == shape:
        return matrix
    return F.pad(matrix, (0, shape[1] - matrix.shape[1], 0, shape[0] - matrix.shape[0]))
