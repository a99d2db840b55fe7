"""The field that a flow takes where none is given."""

from __future__ import annotations

import torch
from torch import Tensor

from odenets.fields.convolution import ConvField
from odenets.fields.perceptron import MLPField
from odenets.fields.velocity_field import VelocityField

__all__ = ["field_for"]


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
