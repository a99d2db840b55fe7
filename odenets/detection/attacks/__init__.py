"""Attacks on a network, which detectors are measured against; in ``adaptive`` those that know of the detector."""

from odenets.detection.attacks.generation import Attacked, run_attack
from odenets.detection.attacks.presets import PRESETS, Attack, preset

__all__ = ["PRESETS", "Attack", "Attacked", "preset", "run_attack"]
