"""Attacks by name, and their settings."""

import sys

import numpy as np
from torch import nn

from odenets.detection import PRESETS, Attack, preset, run_attack
from tests.odenets.detection.victims import refused, victim


def test_the_presets_are_the_settings_of_k24():
    assert set(PRESETS) == {"FGM", "APGD", "BIM", "AA", "DF", "CW", "HSJ", "BA"}
    assert {dict(PRESETS[name].settings)["eps"] for name in ("FGM", "APGD", "BIM", "AA")} == {0.03}
    assert dict(PRESETS["HSJ"].settings) == {"norm": 2, "max_iter": 50, "max_eval": 10000, "init_eval": 100}
    assert dict(preset("FGM", eps=0.1).settings) == {"norm": "inf", "eps": 0.1}


def test_attacks_and_settings_are_checked(batch):
    x, y = batch
    refused(r"unknown attack 'PGD'.*; known are FGM, BIM, APGD", preset, "PGD")
    refused("unknown attack 'PGD'", run_attack, victim(), "PGD", x, y)
    refused(r"FGM has no setting epsilon; known are norm, eps, eps_step", preset, "FGM", epsilon=0.1)
    loud = Attack("BA", (("verbose", True),))
    refused("BA has no setting verbose; known are delta, epsilon", run_attack, victim(), loud, x, y)
    match = "eps of FGM must be a number, a bool or a string, got array"
    refused(match, preset, "FGM", eps=np.ones(2), error=TypeError)
    refused('settings must be pairs, .*: preset."FGM", eps=0.1.', Attack, "FGM", {"eps": 0.1}, error=TypeError)
    refused("batch_size must be at least 1, got 0", run_attack, victim(), "FGM", x, y, batch_size=0)
    refused("seed must not be negative, got -1", run_attack, victim(), "FGM", x, y, seed=-1)
    two, lazy = (nn.Sequential(nn.Flatten(), last) for last in (nn.Linear(64, 2), nn.LazyLinear(2)))
    refused("AA compares three logits of a network, got one with 2", run_attack, two, "AA", x, y % 2)
    refused("network has a flow without a field", run_attack, lazy, "FGM", x, y)


def test_settings_out_of_range_are_refused():
    refused(
        r"eps of FGM must be at most 1, in units of pixels in \[0, 1\], got 8: 8 / 255 if bytes", preset, "FGM", eps=8
    )
    refused("eps of BIM must be at most 1", preset, "BIM", eps=1.5)
    refused("eps of AA must be at most 1", preset, "AA", eps=2)
    refused("eps of FGM must be finite and not negative, got -0.1", preset, "FGM", eps=-0.1)
    refused("eps_step of FGM must be at most eps where it is minimal, got 0.1 and 0.03", preset, "FGM", minimal=True)
    refused("eps_step of APGD must be finite", preset, "APGD", eps_step=np.nan)
    refused("learning_rate of CW must be finite and not negative", preset, "CW", learning_rate=-1.0)
    refused("norm of FGM must be 'inf', 1 or 2, got 3", preset, "FGM", norm=3)
    refused("norm of FGM must be 'inf', 1 or 2, got '2'", preset, "FGM", norm="2")
    refused("max_iter of BIM must be a whole number, at least 1, got 0", preset, "BIM", max_iter=0)
    refused("max_iter of BIM must be a whole number", preset, "BIM", max_iter=2.5)
    refused("init_size of HSJ must be a whole number, at least 1", preset, "HSJ", init_size=0)
    refused("square_iter of AA must be a whole number", preset, "AA", square_iter=0)


def test_a_ball_of_l2_may_be_larger_than_a_pixel(batch):
    assert run_attack(victim(), preset("FGM", eps=1.5, norm=2), *batch).l2.max() > 1


def test_missing_art_names_the_extra(batch, monkeypatch):
    monkeypatch.setitem(sys.modules, "art", None)
    refused(r"pip install 'odenets\[detection\]'", run_attack, victim(), "FGM", *batch, error=ModuleNotFoundError)
    refused(r"pip install 'odenets\[detection\]'", preset, "FGM", eps=0.1, error=ModuleNotFoundError)
