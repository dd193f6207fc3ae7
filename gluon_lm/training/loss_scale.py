"""A scale for the loss that keeps gradients within the range of float16."""

from __future__ import annotations

from typing import Any

_LARGEST = 2.0**24
_GROWS_AFTER = 2000


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2), with MXNet's constants.

    The loss of a window is multiplied by a power of two, which is exact in float32. If a gradient overflows, the
    step is not taken and the scale is halved; after 2,000 steps in a row that were taken it is doubled. MXNet's own
    scaler checks one device only, uses a new scale one step late, and cannot be saved.

    Attributes
    ----------
    scale : float
        Of the mean loss, up to the factor of at most two by which a number of targets is rounded up to a power of two.
    taken : int
        Steps that were taken since the scale last changed.
    """

    def __init__(self) -> None:
        self.scale, self.taken = 2.0**16, 0

    def factor(self, num_targets: int) -> float:
        """The factor by which the summed loss of `num_targets` targets is multiplied."""
        return self.scale / 2 ** (num_targets - 1).bit_length()

    @property
    def is_smallest(self) -> bool:
        """Whether a smaller scale would not help, because the gradient of the unscaled loss overflows."""
        return self.scale <= 1

    def update(self, has_overflowed: bool) -> None:
        """Choose the scale of the next step."""
        self.taken += 1
        if has_overflowed:
            self.scale, self.taken = self.scale / 2, 0
        elif self.taken == _GROWS_AFTER:
            self.scale, self.taken = min(2 * self.scale, _LARGEST), 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs (plain JSON values)."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of another run."""
        self.scale, self.taken = state["scale"], state["taken"]
