"""The one door to the Adversarial Robustness Toolbox (ART): its classes, on a network or on mere decisions."""

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

from odenets.modes import device_of

__all__ = ["CLASSES", "DECISION_BASED", "decision_attack", "gradient_attack", "known_settings", "toolbox"]

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
"""Those that ask for the predicted class and nothing else."""

# arguments of ART's constructors that are set here, or that are no plain values
_NOT_SETTINGS = (
    *("estimator", "classifier", "batch_size", "verbose", "targeted", "summary_writer"),
    *("attacks", "estimator_orig", "parallel_pool_size"),
)
# settings of AutoAttack that are arguments of the attacks that it is made of
_INNER = {
    "AutoProjectedGradientDescent": {"apgd_iter": "max_iter", "apgd_restarts": "nb_random_init"},
    "DeepFool": {"deepfool_iter": "max_iter"},
    "SquareAttack": {"square_iter": "max_iter", "square_restarts": "nb_restarts"},
}
_STUCK_AFTER = 1000  # batches of queries; none of ART's loops that end takes as many in vain


class _StuckError(Exception):
    """ART asks again and again and none of the answers is adversarial."""


def toolbox() -> ModuleType:
    """ART.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import art
        import art.attacks.evasion
        import art.estimators.classification
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "attacks need the Adversarial Robustness Toolbox: pip install odenets[detection]", name=error.name
        ) from error
    return art


def known_settings(name: str) -> list[str]:
    """What can be set of an attack: the arguments of ART's class; of AutoAttack, also of those that it is made of."""
    inner = [setting for settings in _INNER.values() for setting in settings] if name == "AA" else []
    return [parameter for parameter in _parameters(name) if parameter not in _NOT_SETTINGS] + inner


def gradient_attack(
    network: nn.Module, name: str, settings: Mapping[str, Any], images: np.ndarray, labels: np.ndarray, classes: int
) -> np.ndarray:
    """Adversarial images of one that uses gradients, for a batch.

    Args:
        network: from float32 pixels in [0, 1] to float32 logits, frozen, on a CPU or a CUDA device.
        name: of :data:`CLASSES`, not :data:`DECISION_BASED`.
        settings: of ART's class.
        images: float32, ``(B, C, H, W)``.
        labels: ``(B,)``, what the prediction is led away from (DeepFool leads it away from itself).
        classes: number of logits.

    Returns:
        float32, ``(B, C, H, W)``.
    """
    art, device = toolbox(), device_of(network)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"network must be on a CPU or a CUDA device to be attacked by ART, got {device}")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # ART takes the current one
        estimator = art.estimators.classification.PyTorchClassifier(
            network,
            loss=nn.CrossEntropyLoss(),
            input_shape=images.shape[1:],
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="cpu" if device.type == "cpu" else "gpu",
        )
        parameters = _parameters(name)
        silent = {"verbose": False} if "verbose" in parameters else {}
        own = {setting: value for setting, value in settings.items() if setting in parameters}
        made = _class_of(name)(estimator, batch_size=len(images), **silent, **own)
        for part in made.attacks if name == "AA" else ():
            inner = _INNER[type(part).__name__].items()
            part.set_params(verbose=False, **{to: settings[setting] for setting, to in inner if setting in settings})
        with _multiprocess():
            return made.generate(images.copy(), np.eye(classes, dtype=np.float32)[labels])


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
    """A point near ``x`` that is adversarial, found by asking of points whether they are.

    ART's class attacks a black box of two classes, aiming at "adversarial". It is given its first adversarial point:
    the one that it would draw for itself follows no seed. ART's HopSkipJump halves its step until it is adversarial
    again, without end where rounding or a detector with corners has put the point on the wrong side; then the closest
    adversarial point asked for is the result.

    Args:
        name: "HSJ" or "BA".
        settings: of ART's class.
        adversarial: of points ``(K, *S)`` float32, bool ``(K,)``; not of ``x``.
        x: where it starts, ``(*S,)`` float32.
        first: candidates for the first adversarial point, each ``(*S,)``; the first that is one is taken.
        clip: range of the entries.
        batch_size: points asked for at a time.

    Returns:
        ``(*S,)`` float32; None if no candidate is adversarial.
    """
    art = toolbox()
    initial = next((point for point in first if adversarial(point[None])[0]), None)
    if initial is None:
        return None
    closest, distance, failures = initial, float(np.linalg.norm(initial - x)), 0

    def answer(points: np.ndarray) -> np.ndarray:
        nonlocal closest, distance, failures
        found = np.asarray(adversarial(points), dtype=bool)
        failures = 0 if found.any() else failures + 1
        if found.any():
            norms = np.linalg.norm((points[found] - x).reshape(found.sum(), -1), axis=1)
            if norms.min() < distance:
                closest, distance = points[found][norms.argmin()].copy(), float(norms.min())
        elif failures > _STUCK_AFTER:
            raise _StuckError
        return np.eye(2, dtype=np.float32)[found.astype(int)]

    box = art.estimators.classification.BlackBoxClassifier(answer, x.shape, 2, clip_values=clip)
    made = _class_of(name)(box, batch_size=batch_size, targeted=True, verbose=False, **settings)
    target = np.array([[0.0, 1.0]], dtype=np.float32)
    try:
        found = made.generate(x[None], target, x_adv_init=initial[None])[0]
    except _StuckError:
        return closest
    return found if adversarial(found[None])[0] else closest


def _class_of(name: str) -> Any:
    return getattr(toolbox().attacks.evasion, CLASSES[name])


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(_class_of(name)).parameters)


@contextmanager
def _multiprocess() -> Iterator[None]:
    """What AutoAttack imports and ART 1.20 does not ask for: for pools of processes, which are not used here."""
    missing = find_spec("multiprocess") is None
    if missing:
        sys.modules["multiprocess"] = multiprocessing
    try:
        yield
    finally:
        if missing:
            del sys.modules["multiprocess"]
