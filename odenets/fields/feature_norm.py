"""Normalization of states whose features are their last dimension."""

from __future__ import annotations

from torch import Tensor, nn

from odenets.normalization import make_norm

__all__ = ["FeatureNorm"]


class FeatureNorm(nn.Module):
    """A normalization of ``(B, ..., D)``, called as ``norm(x, stage)``; "layer" is over the features of each token.

    Args:
        kind: "layer", that of transformers (Ba et al. 2016, with eps = 1e-6 as they have it); "batch" (own statistics
            per stage where stages share the field) or "group", in which the tokens of a sample are its places; or None.
        features: size D of the last dimension.

    Raises:
        ValueError: an unknown kind.

    >>> import torch
    >>> x = FeatureNorm("layer", 8)(torch.randn(2, 5, 8))
    >>> bool(x.mean(-1).abs().max() < 1e-6)
    True
    """

    def __init__(self, kind: str | None, features: int) -> None:
        super().__init__()
        self.by_token = kind == "layer"
        self.norm = nn.LayerNorm(features, eps=1e-6) if self.by_token else make_norm(kind, features)

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        """The normalized tokens ``x`` ``(B, ..., D)``, of its shape; ``stage`` is for batch norm."""
        return self.norm(x) if self.by_token else self.norm(x.movedim(-1, 1), stage).movedim(1, -1)
