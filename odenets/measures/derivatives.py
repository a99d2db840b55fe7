"""Measures of a step's derivative in its state, by backward passes through the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from odenets.errors import check_count
from odenets.measures.marking import measure
from odenets.measures.quantities import wide_residue
from solvers import Step

__all__ = ["jacobian", "probes_like", "projected_jacobian"]

DISTRIBUTIONS = ("rademacher", "gaussian")


@measure(closing=False, gradient=True)
def jacobian(step: Step, *, probes: int = 1, distribution: str = "rademacher") -> Tensor:
    """Estimate of ``|dr/dx0|_F^2 / D``, the squared Frobenius norm of the residue's Jacobian over D features, ``(B,)``.

    That of Hutchinson: the mean over the probes e of ``|e^T dr/dx0|^2 / D``, whose expectation is the norm. Each probe
    takes one backward pass through the step. ``Flow.record`` and the like need states that require a gradient, as
    :func:`odenets.recording.record` and objectives provide them. Where a batch norm mixes samples, sample i has what
    the residues of all change with its state.

    The numbers are drawn by torch's generator, as those of dropout are.

    Args:
        step: the step.
        probes: how many vectors e are drawn.
        distribution: of their entries, "rademacher", -1 or 1, or "gaussian"; the variance of the first is less.

    Returns:
        One number per sample, ``(B,)``, in float32 or wider, per time squared; gradients flow through it.

    Raises:
        TypeError: probes that are no whole number.
        ValueError: no probe, an unknown distribution, or a step that was taken without gradients of its state.

    References:
        Hoffman, Roberts, Yaida. Robust learning with Jacobian regularization. arXiv:1908.02729.
        Finlay, Jacobsen, Nurbekyan, Oberman. How to train your neural ODE. ICML 2020, arXiv:2002.02798.

    >>> import odenets
    >>> flow, x = odenets.Flow(odenets.MLPField(3), depth=2), torch.randn(4, 3, requires_grad=True)
    >>> _, records = flow.record(x, jacobian=jacobian.bind(probes=4))
    >>> records["jacobian"].shape
    torch.Size([2, 4])
    """
    check_count("probes", probes, 1)
    squares = [projected_jacobian(step, e) for e in probes_like(step.x0, probes, distribution)]
    return torch.stack(squares).mean(0)


def probes_like(x: Tensor, probes: int, distribution: str = "rademacher") -> Tensor:
    """So many vectors for states ``x`` ``(B, *S)``, ``(probes, B, *S)`` in float32 or wider, of mean 0 and variance 1.

    Raises:
        ValueError: an unknown ``distribution``.

    >>> probes_like(torch.zeros(4, 2), 3).abs().unique()
    tensor([1.])
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {distribution!r}")
    e = torch.empty((probes, *x.shape), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return e.normal_() if distribution == "gaussian" else e.bernoulli_().mul_(2).sub_(1)


def projected_jacobian(step: Step, e: Tensor) -> Tensor:
    """``|e^T dr/dx0|^2 / D`` of a ``step`` for vectors ``e`` ``(B, *S)``, ``(B,)``.

    Raises:
        ValueError: the step was taken without gradients, of a state that requires none, or its stages do not depend on
            the state x0.

    >>> import odenets
    >>> x = torch.randn(4, 3, requires_grad=True)
    >>> step = next(iter(odenets.Flow(odenets.MLPField(3)).steps(x)))
    >>> projected_jacobian(step, torch.ones(4, 3)).shape
    torch.Size([4])
    """
    if torch.compiler.is_compiling():
        raise ValueError("the Jacobian of a step takes a backward pass within the pass: it is not compiled")
    if not torch.is_grad_enabled() or not step.x0.requires_grad:
        raise ValueError(
            "the Jacobian needs states that require a gradient, outside of torch.no_grad: "
            "network.record(x.requires_grad_(), ...), or odenets.recording.record(network, x, measures)"
        )
    if isinstance(step.h, Tensor) and step.h.ndim:
        raise ValueError("the Jacobian is that of steps of the batch, got one with a size for each sample")
    r = wide_residue(step)
    (slope,) = torch.autograd.grad(r, step.x0, e, create_graph=True, allow_unused=True) if r.requires_grad else (None,)
    if slope is None:
        raise ValueError(
            "the stages of the step do not depend on its state x0, so that it has no Jacobian: a ReversibleFlow takes "
            "them at another state, and a field may leave its state out"
        )
    return slope.to(r.dtype).square().flatten(1).sum(1) / math.prod(r.shape[1:])
