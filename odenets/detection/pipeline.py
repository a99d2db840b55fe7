"""A network, features of its inputs and a detector: fitted, applied, saved and loaded as one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odenets.checkpoints import fingerprint
from odenets.detection.detector import Detector
from odenets.detection.estimators import is_outlier_detector
from odenets.detection.evaluation import Scores, score
from odenets.detection.extraction import Inputs, check_kind, check_parts, check_shape, extract, sample_count, shape_of
from odenets.detection.features import Features, Trajectory
from odenets.detection.features.base import check_inputs
from odenets.detection.network_state import NetworkState, check_apart
from odenets.detection.persistence import read, stored_shape, write
from odenets.errors import check_count, check_number
from odenets.recording import is_recorder

__all__ = ["FEWEST", "Pipeline"]

FEWEST = 10
"""Fewest samples of either kind that a detector is fitted on."""


class Pipeline:
    """Detects adversarial images by features of the path they take through a network.

    With a :class:`Detector` it is fitted to clean and adversarial images, with a :class:`QuantileTest`, or an outlier
    detector of scikit-learn, to clean ones alone:

    >>> from odenets.detection import QuantileTest
    >>> from odenets.models import small_network
    >>> network, clean = small_network(solver="bs23", depth=3), torch.rand(100, 1, 8, 8)
    >>> test = QuantileTest(0.1, side="both")
    >>> pipeline = Pipeline(network, Trajectory("action"), test).fit(clean)
    >>> pipeline.predict(torch.zeros(1, 1, 8, 8))  # another path: 1 is detected
    array([1])

    Of a network that takes its inputs by keyword, as Hugging Face's do, all samples come as one mapping of tensors
    ``(N, ...)`` wherever images are spoken of: ``pipeline.fit({"input_ids": ids, "attention_mask": mask})``.

    Args:
        network: a flow, a network, an adapted model or one in modules, trained; images have pixels in [0, 1], so that
            normalization is a layer of the network.
        features: of an image; those of the trajectory [K24, eq. 34] if not given. Those that need statistics of
            training images have been fitted.
        detector: a classifier of features with ``decision_function``, or an outlier detector, which needs no
            adversarial images; a :class:`Detector` if not given.
        batch_size: images in a pass.

    Raises:
        TypeError: the network does not record its steps, the features are none, the detector has no
            ``decision_function``, or a class comes in place of an instance.
        ValueError: ``batch_size`` below 1.
    """

    def __init__(
        self, network: nn.Module, features: Features | None = None, detector: Any = None, *, batch_size: int = 256
    ) -> None:
        if not is_recorder(network):
            raise TypeError(f"network must record its steps, got {type(network).__name__}: pass odenets.adapt(network)")
        check_parts(features, detector)
        check_count("batch_size", batch_size, 1)
        self.network = network
        self.features = features or Trajectory()
        self.detector: Any = Detector() if detector is None else detector
        if not hasattr(self.detector, "decision_function"):
            kind = type(self.detector).__name__
            raise TypeError(f"detector must have a decision_function, got {kind}: pass Detector({kind}(...))")
        self.batch_size = batch_size
        self._shape: tuple[int, ...] | None = None
        self._fitted_on: NetworkState | None = None

    def __repr__(self) -> str:
        state = "not fitted" if self._fitted_on is None else "fitted"
        return f"Pipeline({type(self.network).__name__}, {self.features!r}, {self.detector!r}; {state})"

    def extract(self, images: Tensor | Inputs) -> tuple[np.ndarray, np.ndarray]:
        """Features ``(N, F)`` and predicted classes ``(N,)`` of ``images`` ``(N, C, H, W)``, in one pass.

        The output is logits ``(B, classes)``, or what holds them as "logits".

        Raises:
            TypeError, ValueError: no images in [0, 1], or of another shape than those of :meth:`fit`; a network that
                returns no logits ``(B, classes)``, features that are not ``(B, F)``, or logits or features that are not
                finite.
        """
        return self._extract(images, "images")

    def _extract(self, images: Tensor | Inputs, name: str) -> tuple[np.ndarray, np.ndarray]:
        check_shape(images, self._shape, name)
        return extract(self.network, self.features, images, self.batch_size, name=name)

    def fit(
        self,
        clean: Tensor | Inputs,
        adversarial: Tensor | Inputs | None = None,
        *,
        noisy: Tensor | Inputs | None = None,
    ) -> Pipeline:
        """Fit the detector.

        Args:
            clean, adversarial: images ``(N, C, H, W)``, at least 10 of each; an outlier detector needs and takes no
                adversarial ones.
            noisy: images that count as clean, such as copies of clean ones with noise of the attack's size.

        Returns:
            Itself.

        Raises:
            TypeError, ValueError: no images in [0, 1], too few of a kind, images of several shapes, no adversarial ones
                for a classifier, or a network whose features of an image depend on the others of its batch: a batch
                norm without running statistics, a neural ODE that chooses its steps.
        """
        check_apart(self.network)
        outliers = is_outlier_detector(self.detector)
        if outliers != (adversarial is None):
            what = "no adversarial images" if outliers else "adversarial images too"
            raise ValueError(f"{type(self.detector).__name__} is fitted on {what}")
        kinds: dict[str, Any] = {"clean": clean, "adversarial": adversarial, "noisy": noisy}
        kinds = {name: images for name, images in kinds.items() if images is not None or name == "clean"}
        shape = shape_of(clean)
        for name, images in kinds.items():
            check_kind(images, name)
            if sample_count(images) < FEWEST and name != "noisy":
                why = ": too few attacks were successful" if name == "adversarial" else ""
                raise ValueError(f"{name} must hold at least {FEWEST} images, got {sample_count(images)}{why}")
            check_inputs(images, name)
            check_shape(images, shape, name)
        parts = {
            name: extract(self.network, self.features, images, self.batch_size, name=name)
            for name, images in kinds.items()
        }
        X, predicted = (np.concatenate([part[i] for part in parts.values()]) for i in range(2))
        y = np.concatenate([np.full(len(part[0]), int(name == "adversarial")) for name, part in parts.items()])
        self.fit_features(X, y, predicted)
        self._shape = shape
        return self

    def fit_features(self, X: np.ndarray, y: np.ndarray, predicted: np.ndarray) -> None:
        """Fit the detector to features ``X`` and ``predicted`` classes of :meth:`extract`; ``y`` is 0 (clean) or 1.

        The network is from here on the one that the detector is for, as it is now.
        """
        if is_outlier_detector(self.detector):
            self.detector.fit(X[y == 0])
        elif isinstance(self.detector, Detector):
            self.detector.fit(X, y, predicted)
        else:
            self.detector.fit(X, y)
        self._shape, self._fitted_on = None, NetworkState(self.network)

    def score_features(self, X: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Scores of features ``X`` ``(N, F)`` and ``predicted`` classes, ``(N,)``; above 0 where they are detected.

        Raises:
            ValueError: a detector whose scores are not one finite number for each.
        """
        if isinstance(self.detector, Detector):
            return self.detector.decision_function(X, predicted)
        scores = np.asarray(self.detector.decision_function(X), dtype=float)
        if scores.shape != (len(X),) or not np.isfinite(scores).all():
            rule = f"{type(self.detector).__name__} must give a finite score of each of {len(X)} samples"
            raise ValueError(f"{rule}, got shape {scores.shape}, or NaN or infinity in it")
        return scores * (-1 if is_outlier_detector(self.detector) else 1)

    def scores(self, images: Tensor | Inputs) -> np.ndarray:
        """Scores of ``images`` ``(N, C, H, W)``, ``(N,)``; above 0 where they are called adversarial.

        Raises:
            TypeError, ValueError: as :meth:`extract`, or the network has changed since the detector was fitted.
        """
        return self._scores(images, "images")

    def _scores(self, images: Tensor | Inputs, name: str) -> np.ndarray:
        self._check_network()
        return self.score_features(*self._extract(images, name))

    def predict(self, images: Tensor | Inputs, *, threshold: float = 0.0) -> np.ndarray:
        """1 where one of the ``images`` ``(N, C, H, W)`` is called adversarial and 0 where clean, ``(N,)``.

        It is called so where its score is above the ``threshold``, such as that of :meth:`threshold`.

        Raises:
            ValueError: as :meth:`scores`, or a threshold that is not finite.
        """
        check_number("threshold", threshold)
        if not np.isfinite(threshold):
            raise ValueError(f"threshold must be finite, got {threshold}")
        return (self.scores(images) > threshold).astype(int)

    def threshold(self, clean: Tensor | Inputs, *, rate: float = 0.05) -> float:
        """The score above which a share of ``clean`` images lies: a threshold for a false-positive rate.

        >>> from odenets.detection import QuantileTest
        >>> from odenets.models import small_network
        >>> network, fitted, held_out = small_network(depth=2), *torch.rand(2, 100, 1, 8, 8)
        >>> pipeline = Pipeline(network, Trajectory("action"), QuantileTest()).fit(fitted)
        >>> threshold = pipeline.threshold(held_out, rate=0.2)
        >>> bool(pipeline.predict(held_out, threshold=threshold).mean() <= 0.2)
        True

        Args:
            clean: images ``(N, C, H, W)`` that the detector was not fitted on.
            rate: the share of them that may be called adversarial, in (0, 1).

        Returns:
            The lowest score of a clean image above which at most that share lies, for :meth:`predict`,
            :meth:`evaluate` and :func:`~odenets.detection.score`.

        Raises:
            ValueError: a rate outside (0, 1), or as :meth:`scores`.

        Warns:
            UserWarning: fewer images than ``1 / rate``, which have no such share.
        """
        check_number("rate", rate)
        if not 0 < rate < 1:
            raise ValueError(f"rate must lie in (0, 1), got {rate}")
        check_kind(clean, "clean")
        if (n := sample_count(clean)) < 1 / rate:
            warnings.warn(
                f"clean holds {n} images, fewer than the {1 / rate:.0f} that rate {rate} asks for: of new "
                "images more will be called adversarial",
                stacklevel=2,
            )
        scores = np.sort(self._scores(clean, "clean"))[::-1]
        return float(scores[int(rate * len(scores) + 1e-9)])

    def evaluate(
        self,
        clean: Tensor | Inputs,
        adversarial: Tensor | Inputs,
        *,
        successful: Tensor | None = None,
        threshold: float = 0.0,
    ) -> Scores:
        """The detector's :func:`~odenets.detection.score` on images that it was not fitted on.

        Args:
            clean, adversarial: images ``(N, C, H, W)`` and ``(M, C, H, W)``.
            successful: which adversarial images fool the network, ``(M,)`` of bool; all if not given.
            threshold: above which it detects, such as that of :meth:`threshold` of other clean images.

        Returns:
            Accuracy, area under the curve, and rates.

        Raises:
            ValueError: as :meth:`scores`.
        """
        mask = None if successful is None else torch.as_tensor(successful).cpu().numpy()
        scores = self._scores(clean, "clean"), self._scores(adversarial, "adversarial")
        return score(*scores, threshold=threshold, successful=mask)

    def _check_network(self, *, exactly: bool = False) -> None:
        if self._fitted_on is not None and not self._fitted_on.is_that_of(self.network, exactly=exactly):
            raise ValueError(
                "network has changed since the detector was fitted, its weights, buffers, blocks or dtype: fit the "
                "pipeline again, or load the weights that the network had"
            )

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write features and detector to the file ``path``, atomically, without pickle.

        Not the network: :func:`odenets.save_weights` writes that.

        Raises:
            ModuleNotFoundError: skops is not installed: ``pip install 'odenets[detection]'``.
            ValueError: the network has changed since the detector was fitted.
        """
        self._check_network(exactly=True)
        content = {"network": fingerprint(self.network), "features": self.features, "detector": self.detector}
        content["shape"] = None if self._shape is None else [*self._shape]
        write(Path(path), content)
        return Path(path)

    @classmethod
    def load(
        cls, path: str | Path, network: nn.Module, *, trusted: Sequence[str] = (), batch_size: int = 256
    ) -> Pipeline:
        """Load what :meth:`save` wrote; nothing of the file is run.

        Args:
            path: the file.
            network: with the weights it had.
            trusted: dotted names of further types that the file may hold, such as another classifier's.
            batch_size: images in a pass.

        Returns:
            The pipeline.

        Raises:
            FileNotFoundError: no such file.
            ModuleNotFoundError: skops is not installed.
            ValueError: a file of another kind, of another version or damaged, types that are not trusted, or another
                network.
        """
        content = read(Path(path), trusted)
        if set(content) - {"shape"} != {"network", "features", "detector"}:  # older files hold no shape
            raise ValueError(f"{path} holds no detector: it was not written by Pipeline.save")
        pipeline = cls(network, content["features"], content["detector"], batch_size=batch_size)
        state = NetworkState(network)
        if content["network"] != state.fingerprint:
            raise ValueError(f"{path} was fitted on another network, or on other weights of this one")
        pipeline._shape, pipeline._fitted_on = stored_shape(content.get("shape"), Path(path)), state
        return pipeline
