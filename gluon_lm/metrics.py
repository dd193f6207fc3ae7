"""Sums and what is derived from them."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """``exp(loss)``, of a mean negative log-likelihood in nats; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf
