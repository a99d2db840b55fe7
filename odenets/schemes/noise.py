"""Noise: Euler steps with a random displacement, and the mean over the paths that they take (Feynman and Kac)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odenets.errors import check_count, check_number
from odenets.schemes.scheme import Memory, Scheme, Velocity

__all__ = ["Noisy", "mean_over_paths"]


@dataclass(frozen=True)
class Noisy(Scheme):
    """Euler and Maruyama's step of ``dx = v(x) dt + sigma dW``, ``x1 = x + h v(x) + sigma sqrt(h) n`` with n normal.

    In training and in eval mode, so that two passes differ. What :func:`mean_over_paths` makes of the output is
    ``u(x) = E f(x_T)``, which by the formula of Feynman and Kac solves ``u_t + v . grad u + sigma^2 / 2 lap u = 0``
    from ``u(T, .) = f`` back to the start: diffusion makes it smoother in x than the output of one residual network.
    With h = 1 these are the blocks of EnResNet. Numbers are drawn by torch's generator of the state's device.
    Reference: Wang, Shi, Osher. ResNets ensemble via the Feynman-Kac formalism. NeurIPS 2019, arXiv:1811.10745.

    Args:
        sigma: the noise, in the unit of the state over the root of that of time.

    Raises:
        TypeError, ValueError: a sigma that is no number, negative or not finite.

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=Noisy(0.1), depth=3)
    >>> x = torch.randn(4, 2)
    >>> mean_over_paths(flow, x, paths=8, function=torch.tanh).shape
    torch.Size([4, 2])
    """

    name: str = field(init=False, repr=False, default="noisy")
    sigma: float = 0.1

    def __post_init__(self) -> None:
        sigma = check_number("sigma", self.sigma)
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma must be finite and not negative, got {sigma}")
        super().__post_init__()

    @property
    def draws(self) -> bool:
        """Where there is noise."""
        return self.sigma > 0

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """The velocity and ``sigma / sqrt(h) n``."""
        return fields[0](t, x).add(torch.randn_like(x), alpha=self.sigma / math.sqrt(h))


def mean_over_paths(
    network: nn.Module | Sequence[nn.Module], x: Tensor, *args: Any, paths: int,
    function: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The mean of a network's output over so many passes, or of several networks' outputs, ``(B, ...)``.

    Args:
        network: one whose passes differ, or several (an ensemble), all of which take as many passes.
        x, args: what it takes, in its modes.
        paths: passes of each network.
        function: of the output, whose mean is taken; the softmax over dimension 1, probabilities of classes, if not
            given.

    Returns:
        The mean; gradients flow to all passes.

    Raises:
        TypeError, ValueError: no network, or no passes.

    >>> import odenets, torch
    >>> network = odenets.Network(nn.Identity(), odenets.Flow(solver=Noisy(0.5), depth=2), nn.Linear(4, 3))
    >>> mean_over_paths(network, torch.randn(5, 4), paths=10).sum(1).round(decimals=4)
    tensor([1., 1., 1., 1., 1.], grad_fn=<RoundBackward1>)
    """
    check_count("paths", paths, 1)
    networks = [network] if isinstance(network, nn.Module) else [*network]
    if not networks:
        raise ValueError("network must be one, or several, got none")
    function = function or (lambda output: output.softmax(1))
    total: Any = sum(function(one(x, *args)) for one in networks for _ in range(paths))
    return total / (len(networks) * paths)
