"""Velocity fields ``v(t, x)``: networks whose output has the shape of the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odenets.errors import check_count
from odenets.normalization import make_norm
from odenets.normalization.stage_batch_norm import expand_stages

__all__ = ["ConvField", "MLPField", "ResNeXtField", "VelocityField", "field_for", "reset_modules"]

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


def reset_modules(field: nn.Module) -> None:
    """Draw the parameters of every module in a ``field`` anew.

    Raises:
        ValueError: a module has parameters and no ``reset_parameters``.

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


class MLPField(VelocityField):
    """A perceptron with one hidden layer: ``v = W2 act(norm(W1 [x, t] + b1)) + b2``.

    Args:
        features: size of the last dimension of x.
        hidden: width of the hidden layer; ``max(64, 2 * features)`` if not given.
        activation: "relu", "silu", "gelu" or "tanh" (ten times slower on CPUs).
        time: whether t is an input.
        norm: "group", "layer", "batch" (own statistics per stage where stages share the field) or None; x is then
            ``(B, features)``.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, or an unknown activation or norm.

    >>> field = MLPField(2, hidden=16, time=True)
    >>> field(0.5, torch.randn(4, 2)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        activation: str = "silu",
        time: bool = False,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(features=features, hidden=hidden)
        hidden = hidden or max(64, 2 * features)
        self.time = time
        self.first = nn.Linear(features + time, hidden)
        self.norm = make_norm(norm, hidden)
        self.activation = _activation(activation)
        self.second = nn.Linear(hidden, features)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, ..., features)`` and time ``t``, of the shape of x; ``stage`` is for the norm."""
        inputs = torch.cat([x, _time_like(t, x[..., :1])], -1) if self.time else x
        return self.second(self.activation(self.norm(self.first(inputs), stage)))


class ConvField(VelocityField):
    """The branch of a pre-activation residual block: norm-act-conv3x3-norm-act-conv3x3 (He et al. 2016).

    Args:
        channels: channels of x.
        hidden: channels between the convolutions; ``channels`` if not given.
        norm: "group", "layer", "batch" (own statistics per stage where stages share the field) or None.
        activation: "relu", "silu", "gelu" or "tanh".
        time: whether t is an input, as a constant channel of both convolutions.
        kernel_size: odd size of the convolutions.
        bias: whether the convolutions have one.
        leading: whether the first norm and activation are there; a block right behind its encoder may do without.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an even kernel_size, or an unknown activation or norm.

    >>> field = ConvField(16, norm="batch")
    >>> field(0.0, torch.randn(4, 16, 8, 8)).shape
    torch.Size([4, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        *,
        norm: str | None = "group",
        activation: str = "relu",
        time: bool = False,
        kernel_size: int = 3,
        bias: bool = False,
        leading: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(channels=channels, hidden=hidden, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the shape of x, got {kernel_size}")
        hidden = hidden or channels
        self.time = time
        self.leading = leading
        self.norm1 = make_norm(norm if leading else None, channels)
        self.conv1 = nn.Conv2d(channels + time, hidden, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm2 = make_norm(norm, hidden)
        self.conv2 = nn.Conv2d(hidden + time, channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.activation = _activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)`` and time ``t``, of the shape of x; ``stage`` is for the norms."""
        x = self.conv1(self._with_time(t, self.activation(self.norm1(x, stage)) if self.leading else x))
        return self.conv2(self._with_time(t, self.activation(self.norm2(x, stage))))

    def _with_time(self, t: float | Tensor, x: Tensor) -> Tensor:
        return torch.cat([x, _time_like(t, x[:, :1])], 1) if self.time else x


class ResNeXtField(VelocityField):
    """The branch of a ResNeXt block with a ReLU behind it (Xie et al. 2017; published code of [K24]).

    conv1x1-norm-ReLU, grouped conv3x3-norm-ReLU, conv1x1-norm-ReLU: velocities are not negative, so that for a state
    that is not negative ``x + r`` is what the block's last ReLU would give.

    Args:
        channels: channels of x.
        hidden: channels of the grouped convolution.
        groups: its groups.
        norm: "group", "layer", "batch" (own statistics per stage where stages share the field) or None.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an unknown norm, or channels that the groups do not divide.

    >>> field = ResNeXtField(64, hidden=32, groups=8)
    >>> bool((field(0.0, torch.randn(2, 64, 8, 8)) >= 0).all())
    True
    """

    def __init__(self, channels: int, hidden: int, groups: int = 32, *, norm: str | None = "batch") -> None:
        super().__init__()
        _check_sizes(channels=channels, hidden=hidden, groups=groups)
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = make_norm(norm, hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.norm2 = make_norm(norm, hidden)
        self.conv3 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = make_norm(norm, channels)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)``, of its shape, not negative; ``t`` is not read, ``stage`` is for norms."""
        x = self.norm1(self.conv1(x), stage).relu()
        x = self.norm2(self.conv2(x), stage).relu()
        return self.norm3(self.conv3(x), stage).relu()


def _check_sizes(**sizes: int | None) -> None:
    """That sizes are whole numbers, at least 1; None is the size that a field chooses."""
    for name, size in sizes.items():
        if size is not None:
            check_count(name, size, 1)


def _time_like(t: float | Tensor, x: Tensor) -> Tensor:
    return t.to(x).expand_as(x) if isinstance(t, Tensor) else torch.full_like(x, t)


def field_for(x: Tensor) -> VelocityField:
    """The default field for states like ``x``: an MLP for ``(B, D)``, convolutional for ``(B, C, H, W)``.

    It has the device and dtype of x; under autocast, where states may be narrower than the weights, torch's own dtype.

    Raises:
        ValueError: x has another number of dimensions.

    >>> [type(field_for(x)).__name__ for x in (torch.zeros(4, 3), torch.zeros(4, 3, 8, 8))]
    ['MLPField', 'ConvField']
    """
    match x.ndim:
        case 2:
            field: VelocityField = MLPField(x.shape[1])
        case 4:
            field = ConvField(x.shape[1])
        case _:
            raise ValueError(f"no default field for x of shape {tuple(x.shape)}: pass Flow(field=...)")
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    narrow = autocast and x.dtype == torch.get_autocast_dtype(kind)
    return field.to(device=x.device, dtype=None if narrow else x.dtype)
