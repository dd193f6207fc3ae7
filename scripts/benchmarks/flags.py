"""Kinds of values that flags of several scripts have."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A flag's value as a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value
