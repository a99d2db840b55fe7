"""Attacks of the Adversarial Robustness Toolbox (ART): by gradients of a network, or by decisions alone."""

from __future__ import annotations

import inspect
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from odenets.detection.attacks.log_odds import LogOdds
from odenets.detection.network_state import treats_apart
from odenets.errors import needs
from odenets.modes import device_of

__all__ = [
    "BY_CROSS_ENTROPY", "CLASSES", "DECISION_BASED", "check_squares", "decision_attack", "gradient_attack",
    "known_settings", "load_art",
]  # fmt: skip

CLASSES = {
    "FGM": "FastGradientMethod",
    "BIM": "BasicIterativeMethod",
    "APGD": "AutoProjectedGradientDescent",
    "AA": "AutoAttack",
    "DF": "DeepFool",
    "CW": "CarliniL2Method",
    "HSJ": "HopSkipJump",
    "BA": "BoundaryAttack",
}
DECISION_BASED = ("HSJ", "BA")
"""Those that use the predicted class alone."""
BY_CROSS_ENTROPY = ("FGM", "BIM", "APGD", "AA")
"""Those that climb it, by default in the exact direction of its gradient."""

# arguments of ART's constructors that are set here, or that are no numbers, bools or strings
_NOT_SETTINGS = (
    *("estimator", "classifier", "batch_size", "verbose", "targeted", "summary_writer"),
    *("attacks", "estimator_orig", "parallel_pool_size"),
)
# settings of AutoAttack that are arguments of the attacks in it
_INNER = {
    "AutoProjectedGradientDescent": {"apgd_iter": "max_iter", "apgd_restarts": "nb_random_init"},
    "DeepFool": {"deepfool_iter": "max_iter"},
    "SquareAttack": {"square_iter": "max_iter", "square_restarts": "nb_restarts"},
}
_SQUARE = 0.8  # share of an image that Square changes at first
_STUCK_AFTER = 1000  # batches of queries in vain; ART's loops that end need fewer


class _StuckError(Exception):
    """ART repeats its queries and no answer is adversarial."""


def load_art() -> ModuleType:
    """ART, with the parts that are used here."""
    with needs("detection"):
        import art
        import art.attacks.evasion
        import art.estimators.classification
    return art


def known_settings(name: str) -> list[str]:
    """Settings of an attack: the arguments of ART's class, for AutoAttack also of the attacks in it, and "exact"."""
    more = [setting for settings in _INNER.values() for setting in settings] if name == "AA" else []
    more += ["exact"] if name in BY_CROSS_ENTROPY else []
    return [parameter for parameter in _parameters(name) if parameter not in _NOT_SETTINGS] + more


def check_squares(settings: Mapping[str, Any], height: int, width: int) -> None:
    """That images are large enough for the squares that AutoAttack's last attack, Square, moves about in them.

    Raises:
        ValueError: they are too narrow or too small.
    """
    side, enough = max(1, round((_SQUARE * height * width) ** 0.5)), 6
    if settings.get("norm", "inf") == 2:
        side, enough = max(3, side + 1 - side % 2), 14
    if side >= min(height, width):
        raise ValueError(
            f"AA moves squares of {side} pixels about in images, got images of {height} x {width}: pad them to squares "
            f"of {enough} pixels or more, or choose another attack"
        )


def gradient_attack(
    network: nn.Module, name: str, settings: Mapping[str, Any], images: np.ndarray, labels: np.ndarray, classes: int
) -> np.ndarray:
    """Images of a batch ``(B, C, H, W)`` float32, moved away from their labels ``(B,)`` by an attack by gradients.

    The network is frozen, on a CPU or a CUDA device, and gives float32 logits, as many as ``classes``, of such pixels.
    """
    art, device, exact = load_art(), device_of(network), settings.get("exact", True)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"network must be on a CPU or a CUDA device to be attacked by ART, got {device}")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # ART takes the current one
        estimator = art.estimators.classification.PyTorchClassifier(
            network,
            loss=LogOdds() if exact else nn.CrossEntropyLoss(),
            input_shape=images.shape[1:],
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="cpu" if device.type == "cpu" else "gpu",
        )
        if name in ("DF", "AA") and treats_apart(network):
            estimator.class_gradient = _of_moved(estimator.class_gradient)
        parameters = _parameters(name)
        quiet = {"verbose": False} if "verbose" in parameters else {}
        own = {setting: value for setting, value in settings.items() if setting in parameters}
        attack = _class_of(name)(estimator, batch_size=len(images), **quiet, **own)
        for part in attack.attacks if name == "AA" else ():
            inner = _INNER[type(part).__name__].items()
            part.set_params(verbose=False, **{to: settings[setting] for setting, to in inner if setting in settings})
        for part in attack.attacks if name == "AA" else (attack,):
            if exact and getattr(part, "loss_type", None) == "cross_entropy":  # with an estimator of its own
                part.estimator.loss.ce_loss = LogOdds("none")
        with _multiprocess():
            return attack.generate(images.copy(), np.eye(classes, dtype=np.float32)[labels])


def _of_moved(class_gradient: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Gradients of classes, computed of the images that have moved since the call before: DeepFool asks for all of
    them again as long as one is not yet adversarial, and leaves the others where they are.
    """
    known: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # by class: the images, and their gradients

    def gradient(x: np.ndarray, label: int | None = None) -> np.ndarray:
        points, gradients = known.get(label, (x, None))
        if gradients is None or points.shape != x.shape:
            gradients = class_gradient(x, label)
        elif (moved := (points != x).reshape(len(x), -1).any(1)).any():
            gradients = gradients.copy()
            gradients[moved] = class_gradient(x[moved], label)
        known[label] = x.copy(), gradients
        return gradients

    return gradient


def decision_attack(
    name: str,
    settings: Mapping[str, Any],
    adversarial: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    first: Iterable[np.ndarray],
    *,
    clip: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
) -> np.ndarray | None:
    """An adversarial point near ``x``, ``(*S,)`` float32, by queries alone; None if no candidate is adversarial.

    ART's class attacks a black box of two classes, aiming at "adversarial". Its first adversarial point is an argument,
    because the one that ART draws depends on no seed. ART's HopSkipJump halves its step until the point is adversarial
    again, which never ends where rounding or a detector with corners has put it on the wrong side; then the result is
    the closest adversarial point among all queries.

    Args:
        name, settings: of "HSJ" or "BA".
        adversarial: of points ``(K, *S)`` float32, bool ``(K,)``; not of ``x``.
        x: start, ``(*S,)`` float32.
        first: candidates for the first adversarial point, each ``(*S,)``; the first that is adversarial is taken.
        clip: range of the entries.
        batch_size: points per query.
    """
    art = load_art()
    initial = next((point for point in first if adversarial(point[None])[0]), None)
    if initial is None:
        return None
    closest, distance, failures = initial, float(np.linalg.norm(initial - x)), 0

    def answer(points: np.ndarray) -> np.ndarray:
        nonlocal closest, distance, failures
        inside = np.asarray(adversarial(points), dtype=bool)
        failures = 0 if inside.any() else failures + 1
        if inside.any():
            norms = np.linalg.norm((points[inside] - x).reshape(inside.sum(), -1), axis=1)
            if norms.min() < distance:
                closest, distance = points[inside][norms.argmin()].copy(), float(norms.min())
        elif failures > _STUCK_AFTER:
            raise _StuckError
        return np.eye(2, dtype=np.float32)[inside.astype(int)]

    box = art.estimators.classification.BlackBoxClassifier(answer, x.shape, 2, clip_values=clip)
    attack = _class_of(name)(box, batch_size=batch_size, targeted=True, verbose=False, **settings)
    target = np.array([[0.0, 1.0]], dtype=np.float32)
    try:
        point = attack.generate(x[None], target, x_adv_init=initial[None])[0]
    except _StuckError:
        return closest
    return point if adversarial(point[None])[0] else closest


def _class_of(name: str) -> Any:
    return getattr(load_art().attacks.evasion, CLASSES[name])


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(_class_of(name)).parameters)


@contextmanager
def _multiprocess() -> Iterator[None]:
    """Stand in for ``multiprocess``, which AutoAttack imports without need and ART 1.20 does not install."""
    missing = find_spec("multiprocess") is None
    if missing:
        sys.modules["multiprocess"] = multiprocessing
    try:
        yield
    finally:
        if missing:
            del sys.modules["multiprocess"]
