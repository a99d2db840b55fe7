"""Theorems 6 to 8 as numbers: how much residues change with states and inputs, on the data and off it.

Theorem 6 bounds the change of a residue between two states on the data, theorem 7 that of the residues along two paths
that begin on the data, and theorem 8 has a further term, the distance from the data times a constant that least action
does not bound. So least action is to lower the constants on the data, and less so off it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from odenets import Flow, Network

__all__ = ["CLEAN", "apart", "constants", "path_of", "singular_values", "slopes"]

CLEAN = "clean"
"""The name of the images on the data."""


def singular_values(f: Callable[[Tensor], Tensor], x: Tensor, iterations: int = 20, seed: int = 0) -> Tensor:
    """The largest singular value of the Jacobian of each sample, by power iteration on ``J^T J``.

    That is a lower bound of the local Lipschitz constant in the Euclidean norm, which grows with the iterations.

    Args:
        f: maps samples ``(B, ...)`` to ``(B, ...)``, each by itself.
        x: where, ``(B, ...)``.
        iterations: products with J and its transpose.
        seed: of the first direction.

    Returns:
        One per sample, ``(B,)``.

    >>> matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> singular_values(lambda x: x @ matrix.T, torch.zeros(2, 2))
    tensor([3., 3.])
    """
    draw = torch.Generator().manual_seed(seed)
    v = _unit(torch.randn(x.shape, generator=draw, dtype=x.dtype))
    pullback = torch.func.vjp(f, x)[1]
    w = v
    for _ in range(iterations):
        u = torch.func.jvp(f, (x,), (v,))[1]
        (w,) = pullback(u)
        v = _unit(w)
    return w.flatten(1).norm(dim=1).sqrt().detach()


def _unit(v: Tensor) -> Tensor:
    norms = v.flatten(1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
    return v / norms.reshape(-1, *[1] * (v.ndim - 1))


def _field(block: Any) -> nn.Module:
    """The only one of an Euler block."""
    return block.fields[0]


def path_of(network: Network, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """States before the blocks, residues there, and the last state, of a first state ``x``."""
    states, residues = [], []
    for layer in network.layers:
        for block in layer.blocks if isinstance(layer, Flow) else ():
            states.append(x)
            residues.append(_field(block)(0.0, x))
            x = x + residues[-1]
        x = x if isinstance(layer, Flow) else layer(x)
    return states, residues, x


def constants(network: Network, x: Tensor, iterations: int) -> dict[str, Tensor]:
    """Local Lipschitz constants along the paths of images ``x``, of ``B``.

    Returns:
        "block", those of the residue of each block where the path is, ``(blocks, B)``; "path", of the first state to
        all residues together, and "flow", of the first state to the last, ``(1, B)`` each.
    """
    fields = [_field(block) for flow in network.flows for block in flow.blocks]
    with torch.no_grad():
        first = network.encode(x)
        states, _, _ = path_of(network, first)

    def residues(x0: Tensor) -> Tensor:
        return torch.cat([r.flatten(1) for r in path_of(network, x0)[1]], 1)

    of_blocks = [
        singular_values(lambda state, field=field: field(0.0, state), state, iterations)
        for field, state in zip(fields, states, strict=True)
    ]
    return {
        "block": torch.stack(of_blocks),
        "path": singular_values(residues, first, iterations)[None],
        "flow": singular_values(lambda x0: path_of(network, x0)[2], first, iterations)[None],
    }


@torch.no_grad()
def _residues(network: Network, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    first = network.encode(x)
    return first.flatten(1), [r.flatten(1) for r in path_of(network, first)[1]]


def slopes(network: Network, sets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How much residues differ over how much first states do: ``|r_m(a_m) - r_m(b_m)| / |a_0 - b_0|``.

    Args:
        network: in eval mode.
        sets: clean images, under their name, and the same ones changed, ``(B, C, H, W)`` each.

    Returns:
        By name, for clean images between all pairs of them, for the others between each and the clean one it was,
        ``(blocks, pairs)``.
    """
    start, clean = _residues(network, sets[CLEAN])
    one, other = torch.triu_indices(len(start), len(start), 1)
    of = {
        CLEAN: torch.stack([(r[one] - r[other]).norm(dim=1) for r in clean]) / (start[one] - start[other]).norm(dim=1)
    }
    for name in (name for name in sets if name != CLEAN):
        there, residues = _residues(network, sets[name])
        moved = (there - start).norm(dim=1)
        steps = torch.stack([(a - b).norm(dim=1) for a, b in zip(residues, clean, strict=True)])
        of[name] = steps[:, moved > 0] / moved[moved > 0]  # an attack may leave images as they are
    return of


def apart(network: Network, sets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far changed images are from what they were, in residues, over how far clean images are from each other.

    Args:
        network: in eval mode.
        sets: as for :func:`slopes`.

    Returns:
        By name, of all but the clean images, the mean distance over that of all pairs of clean ones, ``(blocks, 1)``.
    """
    _, clean = _residues(network, sets[CLEAN])
    one, other = torch.triu_indices(len(clean[0]), len(clean[0]), 1)
    of = {}
    for name in (name for name in sets if name != CLEAN):
        _, residues = _residues(network, sets[name])
        of[name] = torch.stack(
            [
                (a - b).norm(dim=1).mean(0, keepdim=True) / (b[one] - b[other]).norm(dim=1).mean()
                for a, b in zip(residues, clean, strict=True)
            ]
        )
    return of
