"""Extraction: features and predicted classes of images, in one pass, a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odenets.adapting import adapt
from odenets.detection.features.base import Features, check_data, check_images, check_inputs, in_batches
from odenets.detection.isolation import checked_logits
from odenets.inputs import has_rows, inputs_of, is_by_keyword, plain, rows, samples_in, tensors_in
from odenets.recording import is_recorder

__all__ = [
    "Inputs", "batches_of", "check_features", "check_kind", "check_parts", "check_shape", "extract", "first_of_each",
    "recording", "sample_count", "shape_of",
]  # fmt: skip

Inputs = Mapping[str, Any]
"""What a network takes by keyword, such as token ids and their mask."""


def extract(
    network: nn.Module,
    features: Features,
    images: Tensor | Inputs,
    batch_size: int = 256,
    *,
    normalized: bool = False,
    name: str = "images",
) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(N, F)`` and predicted classes ``(N,)`` of ``images`` ``(N, C, H, W)``, in one pass.

    Args:
        network: whose output is logits ``(B, classes)``, or what holds them as "logits".
        features: of a batch.
        images: or a mapping of what the network takes by keyword.
        batch_size: images in a pass.
        normalized: whether images have any finite values, and not pixels in [0, 1].
        name: of the images, for errors.

    Returns:
        Features, float32 or wider, and classes, int64.

    Raises:
        TypeError, ValueError: no such images, a network that returns no logits ``(B, classes)``, features
            that are not ``(B, F)``, or logits or features that are not finite.

    >>> from odenets.detection import Trajectory
    >>> from odenets.models import small_network
    >>> X, predicted = extract(small_network(depth=3), Trajectory(), torch.rand(5, 1, 8, 8))
    >>> X.shape, predicted.shape
    ((5, 6), (5,))
    """
    dtypes: set[torch.dtype] = set()

    def classes_and_features(x: Any) -> Tensor:
        output, values = features.output_and_features(network, x)
        logits = checked_logits(output, n := samples_in(x))
        check_features(features, values, n)
        dtypes.add(values.dtype)
        predicted = logits.argmax(1, keepdim=True).double()
        predicted = predicted.masked_fill(logits.isnan().any(1, keepdim=True), torch.nan)
        return torch.cat([predicted, values.double()], 1)

    values = in_batches(classes_and_features, network, check_inputs(images, name, normalized=normalized), batch_size)
    values = values.numpy()
    predicted, X = values[:, 0], values[:, 1:]
    if torch.float64 not in dtypes:
        with np.errstate(over="ignore"):
            X = X.astype(np.float32)
    if not (np.isfinite(X).all() and np.isfinite(predicted).all()):
        rule = "features and logits must be finite, got NaN or infinity"
        raise ValueError(f"{rule}: does the network diverge on these images?")
    return X, predicted.astype(np.int64)


def batches_of(images: Any, batch_size: int, name: str = "images", network: nn.Module | None = None) -> Iterator[Any]:
    """The inputs of images, a batch at a time: of one tensor, one mapping of inputs by keyword, or a loader.

    Args:
        images: ``(N, C, H, W)``; a mapping of tensors ``(N, ...)``; or an iterable of batches, each inputs or a pair
            ``(inputs, labels)``, whose labels are not read. A loader's batches stay as they are.
        batch_size: images at a time of a tensor or a mapping.
        name: of the argument, for errors.
        network: what takes them, if that is known.

    Raises:
        TypeError: neither of these, or a tensor without its numbers.
        ValueError: no images.

    >>> [len(x) for x in batches_of(torch.rand(5, 1, 8, 8), 2)]
    [2, 2, 1]
    >>> [len(x) for x in batches_of([(torch.rand(3, 1, 8, 8), torch.zeros(3))], 2)]
    [3]
    """
    if not (isinstance(images, Tensor) or is_by_keyword(images)):
        yield from inputs_of(images, name, network)
        return
    n = samples_in(images, name)
    if n == 0:
        raise ValueError(f"{name} must not be empty, got no sample")
    for table in tensors_in(images):
        check_data(table, name)
    for i in range(0, n, batch_size):
        yield rows(plain(images), slice(i, i + batch_size), n)


def first_of_each(x: Any, seen: set[bytes]) -> np.ndarray:
    """Which samples of a batch are not among those that were ``seen``, ``(B,)`` of bool; they are from now on.

    >>> seen = set()
    >>> first_of_each(torch.ones(2, 1, 8, 8), seen), first_of_each(torch.zeros(1, 1, 8, 8), seen)
    (array([ True, False]), array([ True]))
    """
    n, new = samples_in(x), []
    tables = [one.detach().cpu() for one in ([x] if isinstance(x, Tensor) else tensors_in(x)) if has_rows(one, n)]
    for i in range(n):
        told = hashlib.blake2b(digest_size=16)
        for table in tables:
            told.update(table[i].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        new.append(told.digest() not in seen)
        seen.add(told.digest())
    return np.array(new)


def shape_of(images: Any) -> tuple[int, ...] | None:
    """The shape of an image in a batch of them, ``(C, H, W)``; None of other inputs."""
    return tuple(images.shape[1:]) if isinstance(images, Tensor) and images.ndim == 4 else None


def check_shape(images: Any, shape: tuple[int, ...] | None, name: str) -> None:
    """That images have the ``shape`` of those of fit, if both have one.

    Raises:
        ValueError: they do not.

    >>> check_shape(torch.rand(2, 3, 8, 8), (3, 16, 16), "images")
    Traceback (most recent call last):
        ...
    ValueError: images must have one shape, 3 x 16 x 16 as the first of fit, got 3 x 8 x 8: resize them, as their ...
    """
    if (came := shape_of(images)) is None or shape in (None, came):
        return
    wanted, got = (" x ".join(map(str, dims)) for dims in (shape, came))
    last = "channels come first, x.permute(0, 3, 1, 2)" if shape[0] == came[2] else "their channels are others"
    remedy = "resize them, as their paths depend on it" if shape[0] == came[0] else last
    raise ValueError(f"{name} must have one shape, {wanted} as the first of fit, got {got}: {remedy}")


def check_kind(images: Any, name: str) -> None:
    """That images are a tensor or a mapping, whose samples can be counted.

    Raises:
        TypeError: they are not.
    """
    if not is_by_keyword(images) and not isinstance(images, Tensor):
        check_images(images, name)


def sample_count(images: Any) -> int:
    """Samples of a tensor or a mapping of inputs by keyword."""
    return samples_in(images) if is_by_keyword(images) else len(images)


def recording(model: Any) -> nn.Module:
    """A ``model`` that records its steps as it is, or any torch module adapted.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    return model if is_recorder(model) else adapt(model)


def check_parts(features: Any, detector: Any) -> None:
    """That ``features`` and ``detector``, where they are given, are instances, and features are some.

    Raises:
        TypeError: they are not.
    """
    for name, value in {"features": features, "detector": detector}.items():
        if isinstance(value, type):
            raise TypeError(f"{name} must be an instance, got the class {value.__name__}: call it")
    if features is not None and not hasattr(features, "output_and_features"):
        raise TypeError(f"features must be Features, such as Trajectory({features!r}), got {features!r}")


def check_features(features: Features, values: object, samples: int) -> None:
    """That features are a row for each image.

    Raises:
        TypeError, ValueError: they are not.
    """
    rule = f"{type(features).__name__} must return features (B, F), a row for each image"
    if not isinstance(values, Tensor):
        raise TypeError(f"{rule}, got {type(values).__name__}")
    if values.ndim != 2 or len(values) != samples:
        raise ValueError(f"{rule}, got shape {tuple(values.shape)} for {samples} images")
