"""Any field times a scalar that trains: SkipInit's multiplier."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from odenets.errors import check_number
from odenets.fields.velocity_field import VelocityField, reset_modules
from odenets.normalization.stage_batch_norm import expand_stages

__all__ = ["ScaledField"]


class ScaledField(VelocityField):
    """Any field times a scalar that trains, ``alpha v(t, x)``: 0 at first, it is SkipInit (De and Smith 2020).

    A batch norm at initialization makes the branch of the l-th block smaller than its state by the square root of l,
    so that the network begins near the identity. Without norms a scalar does the same; with ``initial=0`` all steps
    begin as the identity, where the gradient of the scalars is not 0 and that of the field is.

    Args:
        field: a module ``v(t, x, *args)``, such as ``ConvField(16, norm=None)``.
        initial: alpha at first.

    Raises:
        TypeError: a field that is no module, or what is no number.
        ValueError: a number that is not finite.

    References:
        De, Smith. Batch normalization biases residual blocks towards the identity function in deep networks. NeurIPS
        2020, arXiv:2002.10444.

    >>> import odenets
    >>> flow = odenets.Flow(lambda: ScaledField(odenets.MLPField(3)), solver="euler", h=1.0, depth=4)
    >>> x = torch.randn(5, 3)
    >>> torch.equal(flow(x), x)
    True
    """

    def __init__(self, field: nn.Module, initial: float = 0.0) -> None:
        super().__init__()
        if not isinstance(field, nn.Module):
            raise TypeError(f"field must be a module v(t, x), got {type(field).__name__}")
        self.initial = check_number("initial", initial)
        if not math.isfinite(self.initial):
            raise ValueError(f"initial must be finite, got {initial}")
        self.field = field
        self.scale = nn.Parameter(torch.tensor(float(self.initial)))

    def forward(self, t: float | Tensor, x: Tensor, *args: Any, stage: int = 0) -> Tensor:
        """``alpha v(t, x, *args)``, of the shape of ``x``; ``stage`` is for the norms of the field."""
        if isinstance(self.field, VelocityField):
            return self.scale * self.field(t, x, *args, stage=stage)
        return self.scale * self.field(t, x, *args)

    def reset_parameters(self) -> None:
        """Draw the field anew, and set alpha to what it was at first.

        Raises:
            ValueError: some module in the field has parameters and no ``reset_parameters``.
        """
        if reset := getattr(self.field, "reset_parameters", None):
            reset()
        else:
            reset_modules(self.field)
        nn.init.constant_(self.scale, self.initial)

    def expand_stages(self, stages: int) -> None:
        """Give every batch norm of the field its own statistics for each of ``stages`` stages."""
        if isinstance(self.field, VelocityField):
            self.field.expand_stages(stages)
        else:
            expand_stages(self.field, stages)

    def extra_repr(self) -> str:
        """What alpha is at first, as ``print`` shows it."""
        return f"initial={self.initial:g}"
