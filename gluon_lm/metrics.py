"""Figures derived from a loss, and what JSON can hold of them."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """``exp(loss)``, of a mean negative log-likelihood in nats; infinite where that is beyond a float, NaN of NaN."""
    return math.inf if loss >= 709 else math.exp(loss)


def finite_or_none(number: float) -> float | None:
    """The number, or None for what JSON has no word for: infinities and NaN."""
    return number if math.isfinite(number) else None
