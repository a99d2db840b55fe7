"""IMEX-Net: Euler steps with a stiff linear part that is implicit, solved by the Fourier transform."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedParameter

from odenets.errors import check_count
from odenets.schemes.scheme import Learned, Memory, Scheme, Velocity
from solvers.validation import is_transformed

__all__ = ["ImplicitExplicit", "PositiveConvolution", "symbol"]

_MAKING = threading.Lock()
_CACHED = 2**17
"""Numbers that are transformed at once on CPUs, which stay in their caches."""
_GRID = 64
"""Angles in each dimension at which the symbol of a given operator is looked at."""
_ROUNDING = 1e-6
"""Share of the largest weight that is rounding in a kernel, and in its symbol."""


class PositiveConvolution(Learned):
    """The operator ``A = B^T B`` of a block, with a convolution B in each channel, and so never negative.

    Args:
        channels: of the state; None takes those of the first one.
        kernel_size: of B, in each dimension.
        dims: dimensions behind the channels, 2 for images.

    Attributes:
        kernel: B, ``(C, k, ..., k)``, a discrete Laplacian at first; for vectors the root of a diagonal A, of ones.
    """

    kernel: nn.Parameter | UninitializedParameter

    def __init__(self, channels: int | None, kernel_size: int, dims: int | None) -> None:
        super().__init__()
        self.kernel_size, self.dims = kernel_size, dims
        self.kernel, self.lazy = UninitializedParameter(), True
        if channels is not None:
            self._become(channels, cast(int, dims))

    def materialize(self, x: Tensor) -> None:
        """Take the channels and dimensions of a state ``(B, C, *S)`` where none are known.

        Raises:
            RuntimeError: in a graph, which holds no parameters that are not there yet.
        """
        if not self.lazy:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the operator of an IMEX step is made from the first state, which a graph cannot do: call the network "
                "once before torch.compile, or take ImplicitExplicit(channels=...)"
            )
        with _MAKING, torch.inference_mode(False):  # whose tensors could never be trained
            if self.lazy:  # no other thread has made it
                self._become(x.shape[1], x.ndim - 2 if self.dims is None else self.dims)

    def _become(self, channels: int, dims: int) -> None:
        cast(UninitializedParameter, self.kernel).materialize((channels, *[self.kernel_size] * dims))
        self.lazy = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Take the first values again."""
        if not self.lazy:
            with torch.no_grad():
                self.kernel.copy_(_laplacian(self.kernel_size, self.kernel.ndim - 1))

    def forward(self, sizes: Sequence[int]) -> Tensor:
        """The symbol of A for states of these sizes, ``(C, *sizes)``, of the last one half and one: ``|B^|^2``."""
        values = symbol(_wide(self.kernel), sizes, centered=False)
        return values.real.square() + values.imag.square()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.lazy and (value := state_dict.get(f"{prefix}kernel")) is not None:
            self._become(value.shape[0], value.ndim - 1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The shape of the kernel, as ``print`` shows it."""
        return f"kernel_size={self.kernel_size}" if self.lazy else f"{tuple(self.kernel.shape)}"


@dataclass(frozen=True)
class ImplicitExplicit(Scheme):
    """IMEX-Net: ``(I + h A) x1 = x0 + h A x0 + h v(x0)``, explicit Euler for ``v + A``, implicit Euler for ``-A``.

    That is ``x1 = x0 + h (I + h A)^-1 v(x0)``, whose residue is the velocity made smooth: consistent with ``x' = v`` to
    first order, stable where A outweighs half of a stiff v, and each pixel reads all others of its channel. A is a
    convolution of each channel by itself with edges that meet (periodic), which the Fourier transform makes diagonal,
    ``r^ = v^ / (1 + h A^)``; it must not be negative. Each block learns its own, see ``PositiveConvolution``.
    States are ``(B, C, *S)``; for vectors ``(B, D)`` A is diagonal. Transforms are in float32 or float64.
    Reference: Haber, Lensink, Treister, Ruthotto. IMEXnet: a forward stable deep neural network. ICML 2019,
    arXiv:1903.02639.

    Args:
        channels: of the state. If not given, each block makes its operator from the first state, as torch's lazy
            modules do.
        kernel_size: odd size of the kernel of B, at least 3.
        operator: an A for all blocks in place of a learned one: its kernel, with ``dims`` dimensions of odd sizes, or
            one more in front for a kernel per channel; symmetric about its middle, with a symbol that is not negative.
        dims: dimensions behind the channels, 2 for images; without channels or operator those of the first state.

    Raises:
        TypeError, ValueError: sizes out of range, or an operator whose symbol is not real or is negative.

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.ConvField(4), solver=ImplicitExplicit(channels=4), depth=2)
    >>> flow(torch.randn(2, 4, 8, 8)).shape, flow.blocks[0].fields[1].kernel.shape
    (torch.Size([2, 4, 8, 8]), torch.Size([4, 3, 3]))
    >>> laplacian = [[0, -1, 0], [-1, 4, -1], [0, -1, 0]]
    >>> smooth = odenets.Flow(odenets.ConvField(4), solver=ImplicitExplicit(operator=laplacian), depth=2)
    """

    name: str = field(init=False, repr=False, default="imex")
    channels: int | None = None
    kernel_size: int = 3
    operator: Any = None
    dims: int | None = None

    def __post_init__(self) -> None:
        if self.channels is not None:
            check_count("channels", self.channels, 1)
        check_count("kernel_size", self.kernel_size, 3)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, to have a middle, got {self.kernel_size}")
        if self.dims is not None:
            check_count("dims", self.dims, 0)
        if self.dims is None and not (self.channels is None and self.operator is None):
            object.__setattr__(self, "dims", 2)
        if self.operator is not None:
            object.__setattr__(self, "operator", _checked_operator(self.operator, cast(int, self.dims), self.channels))
        super().__post_init__()

    @property
    def learns(self) -> bool:
        """Whether a block learns its operator."""
        return self.operator is None

    @property
    def settings(self) -> str:
        """The operator, where it is given; what is learned is in the state."""
        return f"{self.name} {self.operator}"

    def of_channels(self, channels: int) -> ImplicitExplicit:
        """The scheme whose blocks have their operators, for so many channels, before the first state comes."""
        return replace(self, channels=channels)

    def learned(self, m: int, depth: int) -> nn.Module:
        """The operator of a block."""
        return PositiveConvolution(self.channels, self.kernel_size, self.dims)

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """``(I + h A)^-1 v(t, x)``."""
        v, sizes = fields[0](t, x), x.shape[2:]
        with torch.autocast(x.device.type, enabled=False):
            if learned is not None:
                learned.materialize(x)
                channels, dims = learned.kernel.shape[0], learned.kernel.ndim - 1
                self._check_state(x, channels, dims)
                values = learned(sizes)
            else:
                kernel = torch.tensor(self.operator, dtype=_wide(v).dtype, device=x.device)
                self._check_state(x, kernel.shape[0], cast(int, self.dims))
                values = symbol(kernel, sizes).real.clamp(min=0)
            damping = (1 + h * values).reciprocal().to(_wide(v).dtype)
            return _solved(v, damping, len(sizes))

    def _check_state(self, x: Tensor, channels: int, dims: int) -> None:
        """That a state is one of the operator.

        Raises:
            ValueError: it has other channels or dimensions.
        """
        if x.ndim - 2 != dims or channels not in (1, x.shape[1]):
            raise ValueError(
                f"x must be (B, {channels if channels > 1 else 'C'}) and {dims} more dimensions, as the operator A of "
                f"{self.name} is, got shape {tuple(x.shape)}: take ImplicitExplicit(channels={x.shape[1]}, "
                f"dims={x.ndim - 2})"
            )


def symbol(kernel: Tensor, sizes: Sequence[int], *, centered: bool = True) -> Tensor:
    """The Fourier transform of a kernel's convolution with edges that meet, ``sum_p k_p exp(-i w . p)``.

    Args:
        kernel: ``(C, *k)``, of odd sizes, whose middle is p = 0.
        sizes: of the states behind the channels; a larger kernel goes around them.
        centered: False takes the corner of the kernel for p = 0, which no absolute value tells.

    Returns:
        The values at the frequencies of :func:`torch.fft.rfftn`, ``(C, *sizes)``, of the last one half and one.

    >>> symbol(torch.tensor([[-1.0, 2.0, -1.0]]), (4,)).real
    tensor([[0., 2., 4.]])
    """
    if not sizes:
        return torch.complex(kernel, torch.zeros_like(kernel))
    over, middle = tuple(range(1, kernel.ndim)), [-(k // 2) for k in kernel.shape[1:]]
    for i, size in enumerate(sizes, 1):
        if kernel.shape[i] > size:
            around = -(-kernel.shape[i] // size)
            missing = [0] * (2 * (kernel.ndim - 1 - i)) + [0, around * size - kernel.shape[i]]
            kernel = nn.functional.pad(kernel, missing).unflatten(i, (around, size)).sum(i)
    if centered:
        missing = [n for i in reversed(over) for n in (0, sizes[i - 1] - kernel.shape[i])]
        kernel = nn.functional.pad(kernel, missing).roll(middle, over)
    return torch.fft.rfftn(kernel, s=tuple(sizes), dim=over)


def _solved(v: Tensor, damping: Tensor, dims: int) -> Tensor:
    """``v^ / (1 + h A^)`` back from the frequencies, in the dtype and memory format of v."""
    if not dims:
        return (v * damping).to(v.dtype)
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and (is_transformed(v) or is_transformed(damping))
    graph = compiling or transformed or forward_ad._current_level >= 0
    graph |= torch.is_grad_enabled() and (v.requires_grad or damping.requires_grad)
    last = not transformed and v.ndim == 4 and not v.is_contiguous()  # vmap tells of no memory format
    last = last and v.is_contiguous(memory_format=torch.channels_last)
    if graph:
        r = _transformed(_wide(v), damping, dims, True)
        if r.requires_grad and not (compiling or transformed):
            r.register_hook(Tensor.contiguous)  # of the gradient of a sum, which torch 2.8 does not transform
    else:
        damping = torch.stack((damping, damping), -1)  # of the real and the imaginary part
        some = max(1, _CACHED * len(v) // max(v.numel(), 1)) if v.device.type == "cpu" else max(len(v), 1)
        r = torch.empty(v.shape, dtype=damping.dtype, device=v.device)
        for i in range(0, len(v), some):
            _transformed(_wide(v[i : i + some]), damping, dims, False, out=r[i : i + some])
    return r.to(v.dtype, memory_format=torch.channels_last if last else torch.preserve_format)


def _transformed(v: Tensor, damping: Tensor, dims: int, graph: bool, out: Tensor | None = None) -> Tensor:
    spectrum = torch.fft.rfftn(v, dim=tuple(range(-dims, 0)))
    if graph:
        spectrum = spectrum * damping
    else:
        torch.view_as_real(spectrum).mul_(damping)
    if dims > 1:  # one after another, which takes two thirds of the time of irfftn on CPUs
        spectrum = torch.fft.ifftn(spectrum, dim=tuple(range(-dims, -1)))
    return torch.fft.irfft(spectrum, n=v.shape[-1], out=out)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _laplacian(size: int, dims: int) -> Tensor:
    """A discrete Laplacian with its diagonal neighbours (in two dimensions the nine-point one), or 1 without any."""
    if not dims:
        return torch.ones(())
    kernel = torch.zeros([3] * dims)
    for along in [*combinations(range(dims), 1), *combinations(range(dims), 2)]:
        product = torch.ones(())
        for i in range(dims):
            product = product[..., None] * torch.tensor([1.0, -2.0, 1.0] if i in along else [0.0, 1.0, 0.0])
        kernel -= product / (6 if len(along) == 2 else 1)
    return nn.functional.pad(kernel, [(size - 3) // 2] * (2 * dims))


def _checked_operator(operator: Any, dims: int, channels: int | None) -> Any:
    """A kernel as nested tuples of numbers, ``(C or 1, *k)``.

    Raises:
        TypeError, ValueError: it is none, or its symbol is not real or is negative.
    """
    try:
        kernel = torch.as_tensor(operator, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"operator must be a kernel of numbers, got {operator!r:.80}") from None
    kernel = kernel[None] if kernel.ndim == dims else kernel
    if kernel.ndim != dims + 1 or kernel.numel() == 0 or any(k % 2 == 0 for k in kernel.shape[1:]):
        raise ValueError(
            f"operator must be a kernel of {dims} dimensions of odd sizes, or one for each channel, got shape "
            f"{tuple(kernel.shape)}"
        )
    if channels is not None and len(kernel) not in (1, channels):
        raise ValueError(f"operator must have one kernel, or one for each of {channels} channels, got {len(kernel)}")
    if not kernel.isfinite().all():
        raise ValueError("operator must be finite")
    small = _ROUNDING * kernel.abs().max()
    flipped = kernel.flip(tuple(range(1, kernel.ndim)))
    if (kernel - flipped).abs().max() > small:
        raise ValueError(
            "operator must be symmetric about its middle: an IMEX solve with A whose symbol is not real has no "
            "positive A; take A + A^T, or the kernel of B^T B"
        )
    values = symbol(kernel, [_GRID] * dims).real
    if (least := values.min().item()) < -small * kernel[0].numel():
        raise ValueError(
            f"operator must not be negative: an IMEX solve with A not positive is unstable, and here the symbol of A "
            f"is {least:.3g} at some frequency; take -A if that is the Laplacian with its negative sign, the kernel "
            "of B^T B, or add to the middle weight"
        )
    return _nested(kernel.tolist())


def _nested(values: Any) -> Any:
    return tuple(map(_nested, values)) if isinstance(values, list) else values
