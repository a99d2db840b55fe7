"""What detectors take from scikit-learn; in an install without it, what raises and names the extra when it is used."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from odenets.errors import needs

if TYPE_CHECKING or find_spec("sklearn"):
    with needs("detection"):
        from sklearn.base import BaseEstimator, ClassifierMixin, OutlierMixin, clone, is_outlier_detector
        from sklearn.covariance import LedoitWolf
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.metrics import accuracy_score, roc_auc_score, roc_curve
        from sklearn.utils.multiclass import check_classification_targets
        from sklearn.utils.validation import check_is_fitted, validate_data
else:

    def _missing(*args: Any, **kwargs: Any) -> Any:
        with needs("detection"):
            import sklearn  # noqa: F401

    class BaseEstimator:
        """In the place of scikit-learn's, where that is not installed."""

        __new__ = _missing

    class ClassifierMixin:
        """Likewise."""

    class OutlierMixin:
        """Likewise."""

    LedoitWolf = _missing
    RandomForestClassifier = accuracy_score = check_classification_targets = check_is_fitted = clone = _missing
    is_outlier_detector = roc_auc_score = roc_curve = validate_data = _missing
