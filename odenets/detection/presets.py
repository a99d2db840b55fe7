"""The attacks of section 5.4 by the thesis' names, with its settings."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from odenets.detection.toolbox import CLASSES, known_settings

__all__ = ["PRESETS", "Attack", "checked", "preset"]

Setting = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack and what is set of it; what is not has ART's default.

    Attributes:
        name: of :data:`PRESETS`.
        settings: pairs of an argument of ART's class and its value.

    Raises:
        ValueError: unknown name.
        TypeError: a value that is no number, bool or string.
    """

    name: str
    settings: tuple[tuple[str, Setting], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in CLASSES:
            raise ValueError(f"unknown attack {self.name!r}; known are {', '.join(CLASSES)}")
        for setting, value in self.settings:
            if not isinstance(value, Setting):
                raise TypeError(f"{setting} of {self.name} must be a number, a bool or a string, got {value!r}")


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
"""The eight attacks of the thesis by its names, with its settings.

Within 0.03 of every pixel (L-infinity): the fast gradient method "FGM", the basic iterative method "BIM", Auto-PGD
"APGD" and AutoAttack "AA" (APGD with two losses, DeepFool, Square). As near as they get in L2: DeepFool "DF"
(``epsilon`` is its overshoot), Carlini-Wagner "CW", and, seeing predicted classes alone, HopSkipJump "HSJ" and the
boundary attack "BA". The thesis calls DeepFool and the boundary attack L-infinity; ART has them in L2. ART's step of
0.1, larger than the ball, takes BIM from corner to corner. AutoAttack is slow: where an image of a batch withstands,
Square makes up to five times ``square_iter`` steps of three passes with the batch.
"""


def preset(name: str, **settings: Setting) -> Attack:
    """One of :data:`PRESETS` with other settings: ``preset("FGM", eps=0.1)``.

    Raises:
        ValueError: unknown name, or a setting that the attack does not have.
        ModuleNotFoundError: ART, which knows them, is not installed.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown attack {name!r}; known are {', '.join(PRESETS)}")
    return checked(Attack(name, tuple((dict(PRESETS[name].settings) | settings).items())))


def checked(attack: Attack) -> Attack:
    """The attack itself.

    Raises:
        ValueError: it has a setting that ART's class does not know.
        ModuleNotFoundError: ART is not installed.
    """
    known = known_settings(attack.name)
    if unknown := [setting for setting, _ in attack.settings if setting not in known]:
        raise ValueError(f"{attack.name} has no setting {', '.join(unknown)}; known are {', '.join(known)}")
    return attack
