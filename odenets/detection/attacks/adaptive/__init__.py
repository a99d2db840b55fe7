"""Attacks that know of a detector: on the network and on the detector at once (section 5.4.5)."""

from odenets.detection.attacks.adaptive.black_box import black_box
from odenets.detection.attacks.adaptive.evasion import Evasion
from odenets.detection.attacks.adaptive.feature_matching import feature_attack
from odenets.detection.attacks.adaptive.surrogate_gradient import surrogate_attack

__all__ = ["Evasion", "black_box", "feature_attack", "surrogate_attack"]
