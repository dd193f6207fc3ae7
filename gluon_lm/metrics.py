"""Figures derived from a loss, and their form in JSON."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean negative log-likelihood in nats; infinite where that overflows a float, NaN for NaN."""
    return math.inf if loss >= 709 else math.exp(loss)


def finite_or_none(number: float) -> float | None:
    """The number, or None for what JSON cannot express: infinities and NaN."""
    return number if math.isfinite(number) else None
