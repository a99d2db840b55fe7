"""Attacks that know of a detector, on the network and on the detector at once [K24, section 5.4.5]."""

from odenets.detection.attacks.adaptive.black_box import black_box
from odenets.detection.attacks.adaptive.evasion import Evasion
from odenets.detection.attacks.adaptive.feature_matching import feature_attack
from odenets.detection.attacks.adaptive.surrogate import Surrogate, distill
from odenets.detection.attacks.adaptive.surrogate_gradient import ProjectedDescent, surrogate_attack

__all__ = ["Evasion", "ProjectedDescent", "Surrogate", "black_box", "distill", "feature_attack", "surrogate_attack"]
