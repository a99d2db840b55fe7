"""Attacks that know of a detector: on the network and on the detector at once (section 5.4.5)."""

from odenets.detection.adaptive.descending import surrogate_attack
from odenets.detection.adaptive.evasion import Evasion
from odenets.detection.adaptive.matching import feature_attack
from odenets.detection.adaptive.querying import black_box

__all__ = ["Evasion", "black_box", "feature_attack", "surrogate_attack"]
