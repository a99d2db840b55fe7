"""What velocity fields share: parameters drawn anew, and statistics per stage."""

from __future__ import annotations

from torch import nn

from odenets.normalization.stage_batch_norm import expand_stages

__all__ = ["VelocityField", "reset_modules"]


def reset_modules(field: nn.Module) -> None:
    """Draw the parameters of every module in a ``field`` anew.

    Raises:
        ValueError: a module has parameters and no ``reset_parameters``.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> before = layer.weight.clone()
    >>> reset_modules(nn.Sequential(layer))
    >>> torch.equal(layer.weight, before)
    False
    """
    for name, module in field.named_modules():
        if module is not field and (reset := getattr(module, "reset_parameters", None)):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"field: {name or type(field).__name__!r} has parameters but no reset_parameters(), so no further "
                "field can be drawn from it: pass a function that makes one, field=lambda: MyField(...)"
            )


class VelocityField(nn.Module):
    """What the fields of this package share: reset, and statistics per stage where one field serves all stages.

    A field of one's own needs not inherit from it: any module called as ``v(t, x)`` is one, and a
    :class:`~odenets.normalization.StageBatchNorm` in it learns the stage from the block. One that does is called as
    ``v(t, x, stage=i)``.

    >>> import odenets
    >>> import torch
    >>> class Linear(VelocityField):
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.layer = nn.Linear(features, features)
    ...
    ...     def forward(self, t, x, stage=0):
    ...         return self.layer(x)
    >>> odenets.Flow(Linear(3), depth=2)(torch.randn(4, 3)).shape
    torch.Size([4, 3])
    """

    def reset_parameters(self) -> None:
        """Draw all parameters anew.

        Raises:
            ValueError: some module has parameters and no ``reset_parameters``, which the field then needs itself.
        """
        reset_modules(self)

    def expand_stages(self, stages: int) -> None:
        """Give every batch norm its own statistics for each of ``stages`` stages."""
        expand_stages(self, stages)
