"""The attacks of [K24, section 5.4] by their names there, with the settings used there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from types import MappingProxyType

from odenets.detection.attacks.art import CLASSES, known_settings

__all__ = ["PRESETS", "Attack", "checked", "preset"]

Setting = bool | int | float | str

_COUNTS = ("max_iter", "apgd_iter", "deepfool_iter", "square_iter", "nb_grads", "max_eval", "init_eval", "init_size")


_ELSEWHERE = {
    "fgsm": "FGM", "fastgradientsignmethod": "FGM", "pgd": "BIM, or APGD with steps that adapt", "autopgd": "APGD",
    "projectedgradientdescent": "BIM, or APGD with steps that adapt", "ifgsm": "BIM", "autoattack": "AA",
    "carliniwagner": "CW", "carliniwagnerl2": "CW", "carlini": "CW", "cwl2": "CW", "hopskipjumpattack": "HSJ",
    "boundary": "BA",
}  # fmt: skip
"""Attacks by the names that they have elsewhere, in small letters."""


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack and its settings; those that are not set have ART's defaults. See also :func:`preset`.

    >>> Attack("FGM", (("norm", "inf"), ("eps", 0.1))).name
    'FGM'

    Attributes:
        name: of :data:`PRESETS`.
        settings: pairs of an argument of ART's class and its value; sizes are in units of pixels in [0, 1].

    Raises:
        ValueError: unknown name, a value out of range, or an L-infinity ball larger than all pixels.
        TypeError: settings that are no pairs, or a value that is no number, bool or string.
    """

    name: str
    settings: tuple[tuple[str, Setting], ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name, CLASSES)
        if isinstance(self.settings, Mapping) or any(isinstance(p, str) or len(p) != 2 for p in self.settings):
            raise TypeError(
                f'settings must be pairs, (("eps", 0.1),), got {self.settings!r}: preset("{self.name}", eps=0.1) makes '
                "them of keywords"
            )
        for setting, value in self.settings:
            title = f"{setting} of {self.name}"
            if not isinstance(value, Setting):
                raise TypeError(f"{title} must be a number, a bool or a string, got {value!r}")
            if setting == "norm":
                if value not in ("inf", inf, 1, 2):
                    raise ValueError(f"{title} must be 'inf', 1 or 2, got {value!r}")
            elif setting == "eps" and isinstance(value, str):
                raise TypeError(f"{title} must be a number, got {value!r}")
            elif setting == "exact":
                if not isinstance(value, bool):
                    raise TypeError(f"{title} must be True or False, got {value!r}")
            elif setting in _COUNTS:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{title} must be a whole number, at least 1, got {value!r}")
            elif isinstance(value, float | int) and not (isfinite(value) and value >= 0):
                raise ValueError(f"{title} must be finite and not negative, got {value}")
        settings = dict(self.settings)
        if settings.get("norm", "inf") in ("inf", inf) and float(eps := settings.get("eps", 0)) > 1:
            rule = f"eps of {self.name} must be at most 1, in units of pixels in [0, 1]"
            raise ValueError(f"{rule}, got {eps}: {eps} / 255 if bytes are meant")


def _check_name(name: str, known: Iterable[str]) -> None:
    """That an attack is known; by the name that it has in ART or in papers the error says what it is here."""
    if name in known:
        return
    plain = "".join(letter for letter in str(name).lower() if letter.isalnum())
    here = {one.lower(): one for one in CLASSES} | {value.lower(): one for one, value in CLASSES.items()} | _ELSEWHERE
    meant = f": that is {here[plain]}" if plain in here else ""
    raise ValueError(f"unknown attack {name!r}{meant}; known are {', '.join(known)}")


PRESETS = MappingProxyType(
    {
        "FGM": Attack("FGM", (("norm", "inf"), ("eps", 0.03))),
        "BIM": Attack("BIM", (("eps", 0.03), ("eps_step", 0.1), ("max_iter", 100))),
        "APGD": Attack("APGD", (("norm", "inf"), ("eps", 0.03), ("eps_step", 0.1), ("max_iter", 100))),
        "AA": Attack("AA", (("norm", "inf"), ("eps", 0.03), ("eps_step", 0.1), ("square_iter", 5000))),
        "DF": Attack("DF", (("max_iter", 100), ("nb_grads", 10), ("epsilon", 1e-6))),
        "CW": Attack("CW", (("max_iter", 10), ("binary_search_steps", 10), ("learning_rate", 0.01))),
        "HSJ": Attack("HSJ", (("norm", 2), ("max_iter", 50), ("max_eval", 10000), ("init_eval", 100))),
        "BA": Attack("BA", (("max_iter", 5000),)),
    }
)
"""The eight attacks of [K24] by their names there, seven with its settings, by ART, and ART's own "AA".

Within 0.03 of every pixel (L-infinity): the fast gradient method "FGM", the basic iterative method "BIM", Auto-PGD
"APGD" and AutoAttack "AA". As near as they get in L2: DeepFool "DF" (``epsilon`` is its overshoot), Carlini-Wagner
"CW", and, seeing predicted classes alone, HopSkipJump "HSJ" and the boundary attack "BA". [K24] calls DeepFool and
the boundary attack L-infinity; ART has them in L2. ART's step of 0.1, larger than the ball, takes BIM from corner to
corner. ART's Auto-PGD returns an image that it fails on as its last random start, which is noise of the ball's size.

[K24] runs the AutoAttack of its authors: APGD with cross-entropy, APGD with targeted differences of logits, FAB,
and Square. "AA" is ART's, which is weaker: APGD with either loss and no target, five random starts and 100 iterations
each, then DeepFool in FAB's place, an L2 attack with ART's overshoot of 1e-3 that counts only where it ends inside the
ball, then Square. An image against which all fail, or that was misclassified before, is returned unchanged. It is
slow: as long as one image of a batch is not adversarial, Square makes up to five times ``square_iter`` steps of three
passes with the batch.
"""


def preset(name: str, **settings: Setting) -> Attack:
    """One of :data:`PRESETS`, by its ``name``, with other ``settings``, arguments of ART's class.

    "FGM", "BIM", "APGD" and "AA" also have ``exact``, by default True: they climb the cross-entropy in the exact
    direction of its gradient. With ``exact=False``, as in [K24], it is ART's own in single precision, which pushes the
    logit of the label no more where that leads by about 17, and from about 104 on has no gradient at all.

    Raises:
        TypeError: a value that is no number, bool or string.
        ValueError: unknown name, a setting that the attack does not have, or a value out of range.
        ModuleNotFoundError: ART is not installed: ``pip install 'odenets[detection]'``.

    >>> preset("FGM", eps=0.1).settings
    (('norm', 'inf'), ('eps', 0.1))
    """
    _check_name(name, PRESETS)
    return checked(Attack(name, tuple((dict(PRESETS[name].settings) | settings).items())))


def checked(attack: Attack) -> Attack:
    """The attack, if ART's class knows its settings and has a step to take."""
    known = known_settings(attack.name)
    if unknown := [setting for setting, _ in attack.settings if setting not in known]:
        raise ValueError(f"{attack.name} has no setting {', '.join(unknown)}; known are {', '.join(known)}")
    settings = dict(attack.settings)
    if settings.get("minimal") and (step := float(settings.get("eps_step", 0.1))) > (
        eps := float(settings.get("eps", 0.3))
    ):
        raise ValueError(f"eps_step of {attack.name} must be at most eps where it is minimal, got {step} and {eps}")
    return attack
