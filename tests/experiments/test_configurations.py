"""What the configurations of the experiments refuse."""

from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("action_histogram", {"epsilons": (0.0,)}, "epsilons must be positive"),
        ("action_histogram", {"seeds": 1}, "seeds must be at least 2"),
        ("adaptive_depth", {"seeds": ()}, "seeds must hold at least one"),
        ("adaptive_depth", {"parts": ("depths",)}, "parts must be among depth, long, orders, action"),
        ("adaptive_depth", {"budget": 10}, "budget must be a multiple of 12"),
        ("depth_search", {"depths": ()}, "depths"),
        ("bespoke_solver", {"budgets": ()}, "budgets must be multiples of 5"),
        ("circles", {"tables": ("18",)}, "tables must be among"),
        ("circles", {"instances": 0}, "at least 1"),
        ("detection", {"methods": ("plain",)}, "methods must be among vanilla"),
        ("detection", {"modes": ("special",)}, "modes must be among general, conditional, ensemble, got special"),
        ("detection", {"seeds": 1}, "seeds must be at least 2"),
        ("detection", {"setting": "unseen", "attacks": ("FGM",)}, "for setting 'unseen' two or more"),
        ("detection", {"attacks": ("PGD",)}, "PGD"),
        ("detection", {"setting": "ood", "foreign": ()}, "foreign must name a set from elsewhere for setting 'ood'"),
        ("detection", {"setting": "ood", "foreign": ("fotos",)}, "or a FILE.npz that is there, got 'fotos'"),
        ("detection", {"magnitudes": ()}, "modes and magnitudes must hold"),
        ("detection", {"magnitudes": (-1.0,)}, "magnitude must not be negative"),
        ("detection", {"eps": -0.1}, "eps must be positive, or 0"),
        ("detection", {"test": 1.5}, "test and validation must be shares"),
        ("module_depth", {"conditions": ("deep",)}, "conditions must be among standard; sequential"),
        ("module_depth", {"tuning": 1}, "seeds and tuning"),
        ("module_memory", {"networks": ("resnet9",)}, "networks must be among resnet110"),
        ("module_memory", {"batch_size": 1}, "batch_size"),
        ("module_wise", {"setting": "table 25"}, "setting must be one of digits"),
        ("module_wise", {"seeds": 1}, "seeds and tuning"),
        ("module_wise", {"schedules": ("random",)}, "schedules must be among"),
        ("module_wise", {"rivals": ("DGL",)}, "rivals must be among InfoPro"),
        ("small_data", {"conditions": ("noise",)}, "conditions must be among standard, label noise"),
        ("small_data", {"instances": 1}, "instances and tuning"),
        ("small_data", {"sizes": (5,)}, "sizes"),
        ("small_data", {"together": 0}, "together must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(script, settings, message):
    with pytest.raises(ValueError, match=message):
        import_module(script).Config(**settings)
