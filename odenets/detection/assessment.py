"""What a monitor says of images: scores, p-values, flags and predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from odenets.detection.conformal import check_rate
from odenets.errors import needs
from odenets.printing import shown

__all__ = ["Assessment"]


@dataclass(frozen=True)
class Assessment:
    """What a :class:`~odenets.detection.Monitor` says of N images; ``pandas.DataFrame(vars(assessment))`` is a table.

    Attributes:
        index: places of the images in what was checked, ``(N,)`` int64 from 0.
        scores: larger for what is foreign, ``(N,)`` float64.
        p_values: conformal p-values, ``(N,)`` float64 in (0, 1].
        flags: which are called foreign, ``(N,)`` of bool: the p-value is at most the false-positive rate.
        predicted: classes that the network predicts, ``(N,)`` int64.

    >>> one = Assessment(np.array([0]), np.array([3.0]), np.array([0.01]), np.array([True]), np.array([7]))
    >>> both = Assessment.joined([one, one])
    >>> len(both), both.flagged
    (2, 1.0)
    """

    index: np.ndarray
    scores: np.ndarray
    p_values: np.ndarray
    flags: np.ndarray
    predicted: np.ndarray

    __repr__ = shown

    def __len__(self) -> int:
        return len(self.index)

    @property
    def flagged(self) -> float:
        """The share of the images that are called foreign."""
        return float(self.flags.mean())

    @property
    def surest(self) -> np.ndarray:
        """Places in the arrays, from the image that is surest foreign to the one that is least, ``(N,)``."""
        return np.argsort(-self.scores, kind="stable")

    def discoveries(self, rate: float = 0.05) -> np.ndarray:
        """Which are called foreign, if a share ``rate`` of those called so may be clean, ``(N,)`` of bool.

        By Benjamini and Hochberg (1995), whose procedure holds that rate in the mean for conformal p-values
        (Bates et al. 2023, arXiv:2104.08279). It needs small p-values, and so many calibration images.

        Raises:
            ValueError: a rate outside (0, 1).
        """
        with needs("detection"):
            from scipy.stats import false_discovery_control
        return false_discovery_control(self.p_values) <= check_rate(rate, "rate") + 1e-9

    @classmethod
    def joined(cls, parts: Sequence[Assessment]) -> Assessment:
        """Several ``parts`` as one."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))
