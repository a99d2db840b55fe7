"""A monitor of a network in use: fitted to clean images alone, it says how foreign others are, as p-values."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odenets.checkpoints import fingerprint
from odenets.detection.assessment import Assessment
from odenets.detection.calibration import check_outlier_detector, fit_and_calibrate, score_features
from odenets.detection.conformal import check_rate, conformal_p_values, conformal_threshold, false_positive_interval
from odenets.detection.drift import Drift, drift_test
from odenets.detection.extraction import (
    Inputs,
    batches_of,
    check_parts,
    check_shape,
    extract,
    first_of_each,
    recording,
    shape_of,
)  # fmt: skip
from odenets.detection.features import Features, Trajectory
from odenets.detection.isolation import keeping_random_states
from odenets.detection.monitor_file import read_monitor
from odenets.detection.network_state import NetworkState, check_apart, check_blocks, check_company, check_repeatable
from odenets.detection.one_class import OneClassGaussian
from odenets.detection.persistence import write
from odenets.errors import check_count, check_number
from odenets.inputs import rows, samples_in
from odenets.modes import device_of, dtype_of

__all__ = ["Monitor"]


class Monitor:
    """Tells foreign and attacked images from clean ones by the path they take, fitted to clean images alone.

    Some of the clean images fit a Gaussian of the features, the others calibrate it: among their scores that of a new
    image has a rank, its conformal p-value, which no assumption on the features enters. An image is flagged where its
    p-value is at most the false-positive rate::

        P(flag | clean image) <= false_positive_rate

    over the draw of the calibration images and of the new one; where the new clean images are drawn as those were.
    :meth:`interval` says how far one monitor's rate may be from it. Of foreign images nothing is promised.

    >>> from odenets.models import small_network
    >>> _ = torch.manual_seed(0)
    >>> network, clean, new = small_network(depth=3), torch.rand(200, 1, 8, 8), torch.rand(50, 1, 8, 8)
    >>> monitor = Monitor(network).fit([clean[:100], clean[100:]])  # or a DataLoader
    >>> monitor.predict(torch.zeros(2, 1, 8, 8))
    array([1, 1])
    >>> assessment = monitor.check(new)
    >>> assessment.flagged < 0.2, assessment.p_values.shape
    (True, (50,))

    Images are one tensor ``(N, C, H, W)``, one mapping of what the network takes by keyword, ``(N, ...)``, or an
    iterable of batches of either, such as a DataLoader, with labels or without, which are not read.

    Args:
        model: a network that records its steps; or any torch module, whose blocks :func:`odenets.adapt` finds.
        features: of an image; those of the trajectory [K24, eq. 34] if not given. Those that need statistics of
            training images have been fitted, on other images than the clean ones of :meth:`fit`.
        detector: an outlier detector of scikit-learn's kind with ``score_samples``, of which :meth:`fit` takes a copy;
            a :class:`OneClassGaussian`, which has a mean for each predicted class, if not given.
        false_positive_rate: the share of clean images that may be flagged, in (0, 1).
        calibration: the share of the clean images that calibrate, in (0, 1).
        normalized: whether images come normalized, with any finite values, and not as pixels in [0, 1].
        batch_size: images in a pass, of a tensor or a mapping; batches of a loader stay as they are.
        seed: decides which clean images calibrate.
        preparation: how images are prepared, in words; it is saved with the monitor, for whoever loads it.

    Attributes:
        network: the model, or what adapts it.
        features: as given, and so are all other arguments.
        calibration_scores: sorted scores of the images that calibrate, ``(n,)``.

    Raises:
        TypeError: no module, features that are none, a detector that is none of outliers, a class in place of an
            instance, or a preparation that is no string.
        ValueError: a rate or a share outside (0, 1), a batch size below 1, or a negative seed.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Features | None = None,
        detector: Any = None,
        *,
        false_positive_rate: float = 0.05,
        calibration: float = 0.5,
        normalized: bool = False,
        batch_size: int = 64,
        seed: int = 0,
        preparation: str = "",
    ) -> None:
        network = recording(model)
        check_parts(features, detector)
        if not isinstance(preparation, str):
            raise TypeError(f"preparation must be words, got a {type(preparation).__name__}")
        detector = OneClassGaussian() if detector is None else detector
        check_outlier_detector(detector)
        if not 0 < check_number("calibration", calibration) < 1:
            raise ValueError(f"calibration must be a share in (0, 1), got {calibration}")
        check_count("batch_size", batch_size, 1)
        check_count("seed", seed, 0)
        self.network: Any = network
        self.features = features or Trajectory()
        self.detector: Any = detector
        self.false_positive_rate = check_rate(false_positive_rate)
        self.calibration, self.normalized, self.batch_size, self.seed = calibration, normalized, batch_size, seed
        self.preparation = preparation
        self.calibration_scores = np.empty(0)
        self._shape: tuple[int, ...] | None = None
        self._fitted_on: NetworkState | None = None

    def fit(self, clean: Tensor | Inputs | Iterable[Any]) -> Monitor:
        """Fit the detector to a part of ``clean`` images, and calibrate it with the others.

        They are new to the network, as later images will be: those that it was trained on take other paths. A loader
        that draws them anew, with augmentation or at random, should give each once.

        Returns:
            Itself.

        Warns:
            UserWarning: images that come a second time, to the last bit; they count once.

        Raises:
            TypeError: no images, or a model that returns no logits.
            ValueError: none, or too few for the features or the false-positive rate; pixels outside [0, 1]; images of
                several shapes; a network with one block, one whose passes differ, or whose features of an image depend
                on the others of its batch; or features that are not finite.
        """
        check_apart(self.network)
        self.calibration_scores, self._shape, self._fitted_on = np.empty(0), None, None
        parts, seen = [], set[bytes]()
        with keeping_random_states(device_of(self.network)):
            for x in batches_of(clean, self.batch_size, "clean", self.network):
                parts.append((*self._extract(x, "clean"), first_of_each(x, seen)))
                if len(parts) == 1:
                    self._check_path(x, parts[0][0])
        X, predicted, first = (np.concatenate([part[i] for part in parts]) for i in range(3))
        if again := len(first) - int(first.sum()):
            warnings.warn(
                f"clean holds {again} of {len(first)} images a second time, and they count once: what is fitted and "
                "calibrates too hides false alarms",
                stacklevel=2,
            )
            X, predicted = X[first], predicted[first]
        fitted, scores = fit_and_calibrate(
            self.detector, X, predicted, share=self.calibration, false_positive_rate=self.false_positive_rate,
            seed=self.seed,
        )  # fmt: skip
        self.detector, self.calibration_scores, self._fitted_on = fitted, scores, NetworkState(self.network)
        return self

    # -- what it says of images ---------------------------------------------------------------------------------

    def stream(
        self, images: Tensor | Inputs | Iterable[Any], *, false_positive_rate: float | None = None
    ) -> Iterator[Assessment]:
        """What it says of each batch of ``images``, as it comes; nothing of a batch is kept.

        Args:
            images: a tensor, a mapping, or batches, which may be without end.
            false_positive_rate: another one than the monitor's.

        Yields:
            The assessment of a batch; its ``index`` goes on from batch to batch.

        Raises:
            TypeError, ValueError: as :meth:`fit`; before it; or if the network has changed since.
        """
        threshold = self.threshold(false_positive_rate)
        self._check_network()
        return self._stream(images, threshold)

    def _stream(self, images: Any, threshold: float) -> Iterator[Assessment]:
        begin = 0
        for x in batches_of(images, self.batch_size, "images", self.network):
            if begin:
                self._check_network()
            X, predicted = self._extract(x)
            scores = score_features(self.detector, X, predicted)
            index = np.arange(begin, begin := begin + len(scores))
            p_values = conformal_p_values(scores, self.calibration_scores)
            yield Assessment(index, scores, p_values, scores > threshold, predicted)

    def check(self, images: Tensor | Inputs | Iterable[Any], *, false_positive_rate: float | None = None) -> Assessment:
        """What it says of all ``images``: :meth:`stream`, joined; five numbers of each are kept.

        ``false_positive_rate``: another one than the monitor's.
        """
        with keeping_random_states(device_of(self.network)):
            return Assessment.joined([*self.stream(images, false_positive_rate=false_positive_rate)])

    def scores(self, images: Tensor | Inputs | Iterable[Any]) -> np.ndarray:
        """Scores of ``images``, ``(N,)``, larger for what is foreign."""
        return self.check(images).scores

    def p_values(self, images: Tensor | Inputs | Iterable[Any]) -> np.ndarray:
        """Conformal p-values of ``images``, ``(N,)``, as :func:`conformal_p_values` has them: small is foreign."""
        return self.check(images).p_values

    def predict(
        self, images: Tensor | Inputs | Iterable[Any], *, false_positive_rate: float | None = None
    ) -> np.ndarray:
        """1 where one of ``images`` is flagged, at a ``false_positive_rate`` as in :meth:`stream`, and 0 elsewhere."""
        return self.check(images, false_positive_rate=false_positive_rate).flags.astype(int)

    def threshold(self, false_positive_rate: float | None = None) -> float:
        """The score above which images are flagged at a ``false_positive_rate``, the monitor's if not given.

        Raises:
            ValueError: the monitor is not fitted, or a rate outside (0, 1) or below ``1 / (n + 1)``.
        """
        return conformal_threshold(self.calibration_scores, self._rate(false_positive_rate))

    def interval(self, false_positive_rate: float | None = None, *, confidence: float = 0.9) -> tuple[float, float]:
        """Where this monitor's share of false alarms lies with some ``confidence``: :func:`false_positive_interval`.

        ``false_positive_rate``: that is chosen, the monitor's if not given.
        """
        return false_positive_interval(len(self.calibration_scores), self._rate(false_positive_rate), confidence)

    def drift(self, p_values: Any, *, window: int = 200, level: float = 0.01) -> Drift:
        """Whether ``p_values``, in the order in which they came, are still those of clean images: :func:`drift_test`.

        Args:
            p_values: of :meth:`p_values`, or of the assessments of a stream so far, ``(N,)``.
            window: p-values in a window.
            level: the probability that a stream of clean images, however long, is ever said to drift.

        Returns:
            The test of each window.
        """
        self._check_fitted()
        reference = conformal_p_values(self.calibration_scores, self.calibration_scores)
        return drift_test(p_values, reference, window=window, level=level)

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write features, detector and calibration to the file ``path``, atomically, without pickle; not the network.

        Raises:
            ModuleNotFoundError: skops is not installed: ``pip install 'odenets[detection]'``.
            ValueError: the monitor is not fitted, or the network has changed since.
        """
        self._check_fitted()
        self._check_network(exactly=True)
        names = ("false_positive_rate", "calibration", "normalized", "batch_size", "seed", "preparation")
        content = {
            "network": fingerprint(self.network),
            "features": self.features,
            "detector": self.detector,
            "settings": {name: getattr(self, name) for name in names},
            "calibration": self.calibration_scores,
            "shape": None if self._shape is None else [*self._shape],
        }
        write(Path(path), content)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, *, trusted: Sequence[str] = ()) -> Monitor:
        """Load what :meth:`save` wrote; nothing of the file is run.

        Args:
            path: the file.
            model: the network, with the weights that it had, adapted or not.
            trusted: dotted names of further types that the file may hold, such as another detector's.

        Returns:
            The monitor.

        Raises:
            FileNotFoundError: no such file.
            ModuleNotFoundError: skops is not installed.
            ValueError: a file of another kind, of another version or damaged, types that are not trusted, or another
                network.
        """
        content, network = read_monitor(Path(path), trusted), recording(model)
        try:
            monitor = cls(network, content["features"], content["detector"], **content["settings"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        state = NetworkState(network)
        if content["network"] != state.fingerprint:
            raise ValueError(f"{path} was fitted on another network, or on other weights or blocks of this one")
        monitor.calibration_scores, monitor._shape, monitor._fitted_on = content["calibration"], content["shape"], state
        return monitor

    def __repr__(self) -> str:
        n = len(self.calibration_scores)
        state = f"{n} calibration images" if n else "not fitted"
        rate = f"false_positive_rate={self.false_positive_rate:g}"
        return f"Monitor({type(self.network).__name__}, {self.features!r}, {self.detector!r}, {rate}; {state})"

    # -- within -------------------------------------------------------------------------------------------------

    def _extract(self, x: Any, name: str = "images") -> tuple[np.ndarray, np.ndarray]:
        """Features and predicted classes of a batch, in one pass."""
        check_shape(x, self._shape, name)
        count = samples_in(x, name)
        extracted = extract(self.network, self.features, x, count, normalized=self.normalized, name=name)
        self._shape = shape_of(x) if self._shape is None else self._shape
        return extracted

    def _check_path(self, x: Any, X: np.ndarray) -> None:
        """That paths have several blocks, and a second pass of the first images of x, with features X, takes them too.

        Raises:
            ValueError: they do not.
        """
        if isinstance(self.features, Trajectory):
            check_blocks(self.network.depth)
        few = rows(x, slice(0, 2), samples_in(x))
        alone = check_repeatable(lambda: self._extract(few)[0], device_of(self.network))
        check_company(alone, X, dtype_of(self.network, torch.float32))

    def _rate(self, false_positive_rate: float | None) -> float:
        self._check_fitted()
        return self.false_positive_rate if false_positive_rate is None else check_rate(false_positive_rate)

    def _check_fitted(self) -> None:
        if self._fitted_on is None:
            raise ValueError("the monitor is not fitted: monitor.fit(clean), with clean images or a loader of them")

    def _check_network(self, *, exactly: bool = False) -> None:
        if self._fitted_on is not None and not self._fitted_on.is_that_of(self.network, exactly=exactly):
            raise ValueError(
                "network has changed since the monitor was fitted, its weights, buffers, blocks or dtype: fit the "
                "monitor again, or load the weights that the network had"
            )
