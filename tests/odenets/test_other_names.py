"""Names that arguments have in torchdiffeq, SciPy, torchvision and ART: each error says what takes their place."""

import doctest
import inspect

import pytest
import torch

import odenets
from odenets import Flow, MLPField, NeuralODE, measures
from odenets.detection import PRESETS, Attack, preset
from odenets.detection.attacks.art import CLASSES
from odenets.least_action import LeastAction
from odenets.measures import quantities
from odenets.models import points_network, resnet9, resnet110, resnet_km, resnext50, small_network, wide_resnet
from odenets.training import CrossEntropy
from solvers import integrate

X, FIELD = torch.ones(4, 3), MLPField(3)


def solve(**options):
    return integrate(lambda t, x: -x, X, 0.0, 1.0, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(rtol=1e-6), r"integrate\(\) takes no 'rtol': that is tolerance, as Tolerance\(rtol="),
        (lambda: solve(method="dopri5"), "no 'method': that is solver"),
        (lambda: solve(t_eval=[0.5]), "no 't_eval': that is at"),
        (lambda: solve(t_span=(0, 1)), "no 't_span': that is t0 and t1"),
        (lambda: solve(adjoint_params=()), "no 'adjoint_params': that is parameters"),
        (lambda: solve(max_steps=5), r"no 'max_steps': that is tolerance, as Tolerance\(max_steps="),
        (lambda: solve(nonsense=5), "no 'nonsense'$"),
        (lambda: NeuralODE(FIELD, rtol=1e-6), r"no 'rtol': that is tolerance=Tolerance\(rtol="),
        (lambda: NeuralODE(FIELD, adjoint=True), "no 'adjoint': that is gradient=\"backsolve\""),
        (lambda: NeuralODE(FIELD, method="rk4"), "no 'method': that is solver"),
        (lambda: NeuralODE(FIELD, max_num_steps=9), "no 'max_num_steps': that is tolerance=Tolerance.max_steps="),
        (lambda: Flow(FIELD, rtol=1e-6), "no 'rtol': that is one of odenets.NeuralODE"),
        (lambda: Flow(FIELD, num_blocks=3), "no 'num_blocks': that is depth"),
        (lambda: LeastAction(lam=1.0), "LeastAction takes no 'lam': that is lambda0"),
        (lambda: LeastAction(weight=1.0), "no 'weight': that is the weight of an ActionPenalty"),
        (lambda: CrossEntropy(weight=torch.ones(2)), r"no 'weight': that is Task\(nn.CrossEntropyLoss\(weight="),
        (lambda: resnet9(channels=8), r"resnet9\(\) takes no 'channels': that is features"),
        (lambda: resnet110(depth=110), "no 'depth': that is blocks, of each flow"),
        (lambda: resnet110(num_classes=10), "no 'num_classes': that is classes"),
        (lambda: resnet110(weights="DEFAULT"), r"no 'weights': that is of trained networks: odenets.adapt\("),
        (lambda: resnet_km(2, 2, features=8), "no 'features': that is channels"),
        (lambda: wide_resnet(widen_factor=2), "no 'widen_factor': that is widen"),
        (lambda: resnext50(cardinality=8), "no 'cardinality': that is groups"),
        (lambda: small_network(img_size=8), "no 'img_size': that is size"),
        (lambda: points_network(in_features=2), "no 'in_features': that is dimensions"),
        (lambda: measures.action(2), r"called with a Step, got int: record\(x, action=action\).* action.bind\(p=3\)"),
    ],
)
def test_arguments_by_other_names(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "make",
    [resnet9, resnet110, resnet_km, resnext50, wide_resnet, small_network, points_network],
    ids=lambda f: f.__name__,
)
def test_what_an_error_names_is_an_argument(make):
    """None of the names that are refused is one of the function's own, and what takes its place is one."""
    own = inspect.signature(make).parameters
    call = inspect.getclosurevars(make)
    names = call.nonlocals["names"]
    assert names.keys().isdisjoint(own)
    words = {place.replace(",", "").split()[0] for place in names.values()} - {"of"}
    assert words <= {*own}


@pytest.mark.parametrize(
    ("name", "here"),
    [("PGD", "BIM"), ("FGSM", "FGM"), ("fgm", "FGM"), ("DeepFool", "DF"), ("Auto-Attack", "AA"), ("C&W", "CW"),
     ("nonsense", None),
     ("HopSkipJump", "HSJ"), *((ours, short) for short, ours in CLASSES.items())],
)  # fmt: skip
def test_attacks_by_other_names(name, here):
    for make in (preset, Attack):
        with pytest.raises(ValueError, match=f"unknown attack {name!r}" + (f": that is {here}" if here else "; known")):
            make(name)
    assert here is None or here in PRESETS


def test_records_name_what_they_hold():
    _, records = Flow(FIELD, depth=2).record(X, action=measures.action)
    with pytest.raises(KeyError, match="records hold 'action', not 'length'"):
        records["length"]
    assert "length" not in records
    assert records.get("length") is None


def test_help_shows_what_a_measure_measures():
    assert inspect.getdoc(measures.action).startswith("Kinetic action")
    assert inspect.getdoc(measures.action.bind(p=3)) == inspect.getdoc(measures.action)
    assert inspect.getdoc(measures.action + measures.error) == inspect.getdoc(measures.Measure)
    assert odenets.measures.Measure.__doc__.startswith("A measure and what it reads")


def test_examples_of_measures_run():
    """As those of functions: the docstring of a measure is that of its function."""
    examples = {test.name: test.examples for test in doctest.DocTestFinder().find(quantities)}
    assert [len(examples[f"{quantities.__name__}.{name}"]) > 0 for name in ("action", "error")] == [True, True]
