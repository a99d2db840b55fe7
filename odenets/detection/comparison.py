"""Kinds of features compared: how each decides is chosen on validation samples, and scored once on test samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odenets.detection.detector import MODES, Detector
from odenets.detection.evaluation import Parts, Scores, detection_rates, score

__all__ = ["Choice", "Samples", "choose_and_score"]


@dataclass(frozen=True)
class Samples:
    """What is known of some samples, in the order of the indices of their parts.

    Attributes:
        X: features by candidate, each ``(N, F)``: ways to see the samples among which is chosen.
        predicted: classes that the network predicts, ``(N,)``.
        parts: which samples serve what.
        successful: which fool the network, ``(N,)`` of bool; all if None.

    Raises:
        ValueError: no candidate, or arrays and parts that are not of one number of samples.
    """

    X: Mapping[str, np.ndarray]
    predicted: np.ndarray
    parts: Parts
    successful: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.X:
            raise ValueError("X must hold the features of at least one candidate")
        n = len(self.predicted)
        counts = {f"X[{name!r}]": len(x) for name, x in self.X.items()}
        if self.successful is not None:
            counts["successful"] = len(self.successful)
        for name, count in counts.items():
            if count != n:
                raise ValueError(f"{name} must hold one row for each of {n} predicted classes, got {count}")
        if (last := max(int(part.max()) for part in self._asked)) >= n:
            raise ValueError(f"parts must be of the {n} samples, got index {last}")

    @property
    def _asked(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parts.fit, self.parts.validation, self.parts.test

    def shares(self, other: Samples) -> bool:
        """Whether both are cut alike."""
        return all(torch.equal(a, b) for a, b in zip(self._asked, other._asked, strict=True))

    def of(self, candidate: str, index: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Features and predicted classes of a part."""
        return self.X[candidate][index.numpy()], self.predicted[index.numpy()]


@dataclass(frozen=True)
class Choice:
    """What was chosen and what it reaches.

    Attributes:
        candidate, mode: of features and of the detector.
        validation: its accuracy on validation samples.
        scores: on the test samples of each set.
        agnostic: area under the curve of the general detector on the same features and sets, as the thesis gives it.
        curves: detection rates by :func:`~odenets.detection.evaluation.detection_rates` on the same sets.
        noisy: share of the noisy test samples that are taken for adversarial, if there are any.
    """

    candidate: str
    mode: str
    validation: float
    scores: dict[str, Scores]
    agnostic: dict[str, float]
    curves: dict[str, np.ndarray]
    noisy: float | None = None


def choose_and_score(
    clean: Samples,
    seen: Samples,
    tested: Mapping[str, Samples],
    *,
    modes: Sequence[str] = ("general", "conditional", "ensemble"),
    estimator: Any = None,
    noisy: Samples | None = None,
    seed: int = 0,
) -> Choice:
    """Fit a detector for every candidate and mode, keep the one that is most accurate on validation, score it on test.

    Args:
        clean: clean samples.
        seen: those that the detector is fitted on beside them, and chosen on.
        tested: sets that it is scored on, each beside the clean test samples.
        modes: of the :class:`Detector`; "general" among them or not.
        estimator: its classifier; a random forest if not given.
        noisy: samples that count as clean where it is fitted.
        seed: of the forest.

    Raises:
        ValueError: no modes or unknown ones, sets without the candidates of the clean samples, or sets as large as the
            clean ones, such as their adversarial copies, that are cut otherwise, so that what is tested was fitted on.
    """
    if not modes or set(modes) - set(MODES):
        raise ValueError(f"modes must hold at least one of {', '.join(MODES)} and no others, got {tuple(modes)}")
    others = {"seen": seen, **tested} | ({} if noisy is None else {"noisy": noisy})
    for name, samples in others.items():
        if len(samples.predicted) == len(clean.predicted) and not samples.shares(clean):
            raise ValueError(f"{name} must have the parts of the clean samples, as many as it")
        if missing := set(clean.X) - set(samples.X):
            raise ValueError(f"{name} must have the features of the clean samples, it lacks {', '.join(missing)}")
    richest = "general" if set(modes) == {"general"} else "ensemble"  # whose classifiers are those of all modes
    best: tuple[float, str, str, Detector] | None = None
    general: dict[str, Detector] = {}
    for candidate in clean.X:
        sets = [(samples.of(candidate, samples.parts.fit), 0) for samples in (clean, noisy) if samples is not None]
        sets.append((seen.of(candidate, seen.parts.fit), 1))
        X, predicted = (np.concatenate([part[i] for part, _ in sets]) for i in range(2))
        y = np.concatenate([np.full(len(part[0]), label) for part, label in sets])
        fitted = Detector(estimator, mode=richest, random_state=seed).fit(X, y, predicted)
        for mode in dict.fromkeys(("general", *modes)):
            detector = copy.copy(fitted).set_params(mode=mode)
            if mode == "general":
                general[candidate] = detector
            if mode in modes:
                found = _score(*_said(detector, candidate, [clean, seen], "validation"), seen, "validation").accuracy
                if best is None or found > best[0]:
                    best = (found, candidate, mode, detector)
    assert best is not None  # there is a candidate and a mode
    accuracy, candidate, mode, detector = best
    names, sets = list(tested), [clean, *tested.values()]
    innocent, *said = _said(detector, candidate, sets, "test")
    of_general = [innocent, *said] if mode == "general" else _said(general[candidate], candidate, sets, "test")
    return Choice(
        candidate,
        mode,
        accuracy,
        scores={n: _score(innocent, x, tested[n], "test") for n, x in zip(names, said, strict=True)},
        agnostic={n: score(of_general[0], x).auroc for n, x in zip(names, of_general[1:], strict=True)},
        curves={n: detection_rates(innocent, x) for n, x in zip(names, said, strict=True)},
        noisy=None if noisy is None else float((_said(detector, candidate, [noisy], "test")[0] > 0).mean()),
    )


def _said(detector: Detector, candidate: str, sets: Sequence[Samples], part: str) -> list[np.ndarray]:
    """What the detector says of a part of some sets."""
    return [detector.decision_function(*samples.of(candidate, getattr(samples.parts, part))) for samples in sets]


def _score(clean: np.ndarray, other: np.ndarray, samples: Samples, part: str) -> Scores:
    """How well what was said of a part of some samples tells it from what was said of clean ones."""
    index = getattr(samples.parts, part)
    fooled = None if samples.successful is None else samples.successful[index.numpy()]
    return score(clean, other, successful=fooled)
