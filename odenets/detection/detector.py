"""The detector: a classifier of features, general, by predicted class, or both [K24, section 5.4.2]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np

from odenets.detection.estimators import (
    BaseEstimator,
    ClassifierMixin,
    RandomForestClassifier,
    accuracy_score,
    check_classification_targets,
    check_is_fitted,
    clone,
    validate_data,
)

__all__ = ["MODES", "Detector"]

Mode = Literal["general", "conditional", "ensemble"]
MODES = get_args(Mode)


class Detector(ClassifierMixin, BaseEstimator):
    """Tells adversarial features (1) from clean ones (0).

    The *general* detector is one classifier for all inputs. The *conditional* one has a classifier for each class that
    the network predicts, fitted on the inputs of that class; a class without clean or without adversarial inputs falls
    back on the general one. The *ensemble* detects what either does: its score is the larger of theirs.

    In ``cross_val_score``, ``cross_validate``, searches and pipelines the predicted classes travel by scikit-learn's
    metadata routing: after ``sklearn.set_config(enable_metadata_routing=True)`` a detector with
    ``set_fit_request(predicted=True)`` and ``set_score_request(predicted=True)`` is scored by
    ``cross_val_score(detector, X, y, params={"predicted": predicted})``. Functions that pass no metadata on when they
    predict (``cross_val_predict``, scorers by name such as "roc_auc") work with the general detector alone.

    Args:
        estimator: any classifier of scikit-learn's kind with ``predict_proba``; a random forest with scikit-learn's
            defaults if not given, as in [K24]. A clone of it is fitted.
        mode: "general", "conditional" or "ensemble"; the latter two need the predicted classes.
        random_state: seed of the forest, where ``estimator`` is not given.

    Attributes:
        classes_: the two labels, clean first.
        fitted_mode_: the mode when it was fitted.
        general_: the fitted general classifier.
        conditional_: fitted classifiers by predicted class, without those that fall back.

    >>> import numpy as np
    >>> X, y = np.array([[0.0], [0.1], [1.0], [1.1]]), np.array([0, 0, 1, 1])
    >>> Detector(random_state=0).fit(X, y).predict([[0.05], [1.05]])
    array([0, 1])
    """

    def __init__(self, estimator: Any = None, *, mode: Mode = "general", random_state: int | None = None) -> None:
        self.estimator = estimator
        self.mode = mode
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any, predicted: Any = None) -> Detector:
        """Fit the classifiers.

        Args:
            X: features, ``(N, F)``.
            y: labels, ``(N,)``, of two kinds; the larger is adversarial.
            predicted: classes that the network predicts, ``(N,)``; needed unless the mode is "general".

        Returns:
            Itself.

        Raises:
            ValueError: labels of one class only or of more than two, an unknown mode, no predicted classes where they
                are needed, features that are not finite, or a class whose samples are too few for the estimator.
        """
        if self.mode not in MODES:
            raise ValueError(f"mode must be among {', '.join(MODES)}, got {self.mode!r}")
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold clean and adversarial samples, got one class only: {self.classes_[0]!r}")
        if len(self.classes_) > 2:
            rule = "Only binary classification is supported: y must be clean or adversarial"
            raise ValueError(f"{rule}, got {len(self.classes_)} classes")
        predicted = self._checked(predicted, len(X))
        self.fitted_mode_ = self.mode
        self.general_ = self._new().fit(X, labels)
        self.conditional_: dict[Any, Any] = {}
        if predicted is not None and self.mode != "general":
            for c in np.unique(predicted).tolist():
                members = predicted == c
                if len(np.unique(labels[members])) == 2:
                    with _of_class(c, int(members.sum())):
                        self.conditional_[c] = self._new().fit(X[members], labels[members])
                        _adversarial(self.conditional_[c], X[members][:1])
        return self

    def decision_function(self, X: Any, predicted: Any = None) -> np.ndarray:
        """Probability of being adversarial minus 1/2, ``(N,)``; positive where ``predict`` says adversarial.

        ``X`` and ``predicted`` are as for :meth:`fit`.

        Raises:
            ValueError: no predicted classes where they are needed, another number of features or of classes than of
                samples, a mode that it was not fitted for, or an estimator whose probabilities are NaN.
        """
        check_is_fitted(self)
        if self.mode not in MODES or (self.mode != "general" and self.fitted_mode_ == "general"):
            raise ValueError(f"mode is {self.mode!r} and was {self.fitted_mode_!r} when fitted: fit it again")
        X = validate_data(self, X, reset=False)
        predicted = self._checked(predicted, len(X))
        general = _adversarial(self.general_, X)
        if predicted is None or self.mode == "general":
            return general - 0.5
        conditional = general.copy()
        for c, classifier in self.conditional_.items():
            members = predicted == c
            if members.any():
                conditional[members] = _adversarial(classifier, X[members])
        return (conditional if self.mode == "conditional" else np.maximum(general, conditional)) - 0.5

    def predict_proba(self, X: Any, predicted: Any = None) -> np.ndarray:
        """Probabilities of clean and adversarial, ``(N, 2)``; ``X`` and ``predicted`` are as for :meth:`fit`."""
        adversarial = self.decision_function(X, predicted) + 0.5
        return np.stack([1 - adversarial, adversarial], 1)

    def predict(self, X: Any, predicted: Any = None) -> np.ndarray:
        """Labels, ``(N,)``, of ``classes_``; ``X`` and ``predicted`` are as for :meth:`fit`."""
        adversarial = self.decision_function(X, predicted) > 0
        return self.classes_[adversarial.astype(int)]

    def score(  # type: ignore[override] - the third argument is that of the other methods here
        self, X: Any, y: Any, predicted: Any = None, *, sample_weight: Any = None
    ) -> float:
        """Accuracy of :meth:`predict`, in [0, 1], of samples weighted by ``sample_weight``, ``(N,)``.

        ``X``, ``y`` and ``predicted`` are as for :meth:`fit`.
        """
        return float(accuracy_score(y, self.predict(X, predicted), sample_weight=sample_weight))

    def _new(self) -> Any:
        if self.estimator is None:
            return RandomForestClassifier(random_state=self.random_state)
        if not hasattr(self.estimator, "predict_proba"):
            raise ValueError(f"estimator must have predict_proba, got {type(self.estimator).__name__}")
        return clone(self.estimator)

    def _checked(self, predicted: Any, samples: int) -> np.ndarray | None:
        """Predicted classes ``(N,)`` int64; None where none are needed."""
        if predicted is None:
            if self.mode == "general":
                return None
            raise ValueError(
                f"predicted must hold the predicted class of each sample where mode is {self.mode!r}; in "
                "cross-validation it is routed: sklearn.set_config(enable_metadata_routing=True) and "
                "set_fit_request(predicted=True).set_score_request(predicted=True) of the detector"
            )
        predicted = np.asarray(predicted)
        if predicted.shape != (samples,):
            raise ValueError(f"predicted must hold one class per sample, ({samples},), got {predicted.shape}")
        with np.errstate(invalid="ignore"):
            classes = predicted.astype(np.int64) if predicted.dtype.kind in "biuf" else None
        if classes is None or (classes != predicted).any():
            raise ValueError(f"predicted must hold classes as whole numbers, got {predicted.dtype}")
        return classes


def _adversarial(classifier: Any, X: np.ndarray) -> np.ndarray:
    """Probabilities of the second class, ``(N,)``, if they are some: NaN would pass for clean."""
    probabilities = np.asarray(classifier.predict_proba(X), dtype=float)[:, 1]
    if not np.isfinite(probabilities).all():
        raise ValueError(f"estimator must give finite probabilities, got NaN from {type(classifier).__name__}")
    return probabilities


@contextmanager
def _of_class(c: int, samples: int) -> Iterator[None]:
    """Errors of a classifier say that it is that of predicted class c, and has so many samples."""
    try:
        yield
    except ValueError as error:
        rule = f"estimator must serve the {samples} samples of predicted class {c}: choose another or mode='general'"
        raise ValueError(f"{rule} ({error})") from error
