"""The recipes' schedules: values over training, as functions of the share `pct` of it that is over."""

import math

__all__ = ["cosine", "cosine_annealing", "one_cycle"]


def cosine(start: float, end: float, pct: float) -> float:
    """From `start` to `end` along half a cosine."""
    return start + (1 - math.cos(math.pi * pct)) * (end - start) / 2


def cosine_annealing(lr: float, steps: int | None, pct: float) -> float:
    """From `lr` to 0, in `steps` steps where given: the paper's schedule."""
    if steps is not None:
        pct = math.floor(pct * steps + 1e-6) / steps  # fastai adds up pct, a little short of the whole
    return cosine(lr, 0.0, pct)


def one_cycle(start: float, middle: float, end: float, pct: float, pct_start: float = 0.25) -> float:
    """From `start` to `middle` in the share `pct_start` of training and on to `end`: `Learner.fit_one_cycle`'s."""
    if pct < pct_start:
        return cosine(start, middle, pct / pct_start)
    return cosine(middle, end, (pct - pct_start) / (1 - pct_start))
