"""Schemes of one's own, and what is refused of them and of the blocks that they get."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import odenets
from odenets import measures
from odenets.analysis import lesion_study
from odenets.depth import SampleSteps, share_last, unroll_last
from odenets.maximum_principle import SuccessiveApproximations
from odenets.penalties import JacobianPenalty
from odenets.schemes import Fractal, RevNet, Scheme, StochasticDepth
from odenets.schemes.names import SCHEMES
from odenets.training import fit

X = torch.randn(4, 6)


def flow_of(name, **settings):
    features = SCHEMES[name].fields_see(X).shape[1]
    return odenets.Flow(lambda: odenets.MLPField(features, 8), solver=name, depth=3, **settings)


@dataclass(frozen=True)
class Weighed(Scheme):
    """Two evaluations of one field."""

    name: str = field(init=False, repr=False, default="weighed")
    weight: float = 0.5

    @property
    def uses(self):
        return (2,)

    def residue(self, fields, learned, t, x, h, memory=None):
        v = fields[0](t, x)
        return (1 - self.weight) * v + self.weight * fields[1](t + h, x + h * v)


def test_a_scheme_of_a_few_lines_is_heuns_method():
    flow = odenets.Flow(odenets.MLPField(6), solver=Weighed(), depth=3)
    heun = odenets.Flow.of([*flow.blocks], solver="heun")
    torch.testing.assert_close(flow(X), heun(X))
    assert flow.evaluations == heun.evaluations == 6
    assert Weighed(0.3) != Weighed(0.5)


def with_residue(function, uses=(1,)):
    @dataclass(frozen=True)
    class Own(Scheme):
        def residue(self, fields, learned, t, x, h, memory=None):
            return function(fields, x)

    Own.uses = uses
    return odenets.Flow(lambda: odenets.MLPField(6), solver=Own(), depth=1)


@pytest.mark.parametrize(
    ("function", "uses", "message"),
    [
        (
            lambda fields, x: fields[0](0.0, x).mean(0, keepdim=True),
            (1,),
            r"of Own must have the shape.*\(4, 6\)",
        ),
        (lambda fields, x: fields[0](0.0, x).half(), (1,), r"got \(4, 6\), torch\.float16"),
        (lambda fields, x: [fields[0](0.0, x)], (1,), "got list"),
        (lambda fields, x: fields[0](0.0, x), (2,), r"by its uses \(2,\) .* 2 times, and called them 1 times"),
        (lambda fields, x: fields[0](0.0, x) + fields[0](0.0, x), (1,), "1 times, and called them 2 times"),
    ],
)
def test_a_residue_that_is_none_is_refused(function, uses, message):
    with pytest.raises(ValueError, match=message):
        with_residue(function, uses)(X)


def test_options_are_fields_of_a_dataclass_with_names_of_their_own():
    with pytest.raises(TypeError, match=r"and no __init__: @dataclass\(frozen=True\)"):

        class Plain(Scheme):
            def __init__(self, weight=0.5):
                pass

    for name in ("a", "b", "order", "stages", "memory", "uses"):
        with pytest.raises(TypeError, match=f"must name its option '{name}' otherwise"):
            type("Own", (Scheme,), {"__annotations__": {name: "float"}, name: 0.5})


def test_what_a_block_learns_may_be_nothing():
    @dataclass(frozen=True)
    class Own(Weighed):
        def learned(self, m, depth):
            return None

    assert odenets.Flow(odenets.MLPField(6), solver=Own(), depth=2)(X).shape == X.shape


PAIRS = [(a, b) for a, b in itertools.permutations(["euler", *SCHEMES], 2)]
SAME = [{"lie_trotter", "strang", "mpoly2", "two_way", "revnet", "hamiltonian", "hamiltonian_verlet"}]
SAME += [
    {"ab2", "poly2", "noisy", "two_step_midpoint", "second_order", "momentum", "heavy_ball", "equilibrium", "euler"}
]


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_blocks_go_with_the_solver_that_they_were_made_for(own, other):
    """Or with one that takes the same: as many fields, and the same that is learned besides."""
    flow = flow_of(own) if own != "euler" else odenets.Flow(lambda: odenets.MLPField(6), solver="euler", depth=3)
    if any({own, other} <= same for same in SAME):
        odenets.Flow.of([*flow.blocks], solver=other)
    else:
        with pytest.raises(ValueError, match=f"blocks of {other} must have .* got block 0 of"):
            odenets.Flow.of([*flow.blocks], solver=other)


def test_steps_per_sample_are_those_of_runge_kutta_methods():
    for name in ("poly2", "imex", "revnet", "fractal"):
        flow = odenets.Network(nn.Identity(), flow_of(name), nn.Linear(6, 2))
        with pytest.raises(ValueError, match="must hold Runge-Kutta flows"):
            SampleSteps(flow, 0.1).walk(X)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.memory])
def test_a_block_that_reads_the_one_before_is_not_removed_alone(name):
    network = odenets.Network(nn.Identity(), flow_of(name), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="whose steps read more than the state before them"):
        lesion_study(network, [(X, torch.arange(4) % 3)])


@pytest.mark.parametrize("scheme", [StochasticDepth(), "noisy", Fractal(2, drop=0.2)])
def test_the_maximum_principle_takes_no_steps_that_draw(scheme):
    network = odenets.models.points_network(solver=scheme, depth=2)
    with pytest.raises(ValueError, match="draw random numbers"):
        SuccessiveApproximations(network)


@pytest.mark.parametrize("settings", [{"drop": 0.5}, {"single": 0.5}])
def test_a_fractal_whose_paths_are_dropped_says_so(settings):
    flow = odenets.Flow(odenets.MLPField(6), solver=Fractal(3, **settings), depth=2)
    for _ in range(5):  # whatever is drawn
        with pytest.raises(ValueError, match="of which paths are dropped in training mode, carries no embedded error"):
            flow.record(X, error=measures.error)
    assert flow.eval().record(X, error=measures.error)[1]["error"].shape == (2, 4)


def test_full_passes_of_a_scheme_are_refused_with_a_remedy():
    flow = flow_of("fractal").eval()
    with pytest.raises(ValueError, match=r"take flow\.outputs\(x\), those of the last block"):
        flow.outputs(X, full_passes=True)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if hasattr(scheme, "reversible")])
def test_reversible_networks_train_in_mixed_precision(name):
    """Whose encoder makes narrow states."""
    network = odenets.models.network(name, channels=(8,), blocks=2)
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    nn.functional.cross_entropy(logits.float(), y).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        recorded, _ = network.record(x, action=measures.action)
    torch.testing.assert_close(recorded.float(), logits.float(), rtol=0.1, atol=0.1)


def test_attention_is_differentiated_twice():
    network = odenets.models.network("lie_trotter", channels=(8,), blocks=1)
    JacobianPenalty(0.1)(network, torch.rand(4, 3, 8, 8), torch.arange(4)).backward()


def test_a_part_that_is_repeated_hands_its_memory_on():
    flow = flow_of("lm")
    before, part = flow.part(0, 1), flow.part(1, 3)
    for same in (unroll_last(part, 1), share_last(part, 1)):
        torch.testing.assert_close(same(before(X)), flow(X))


def test_probabilities_fall_along_all_flows_of_a_network():
    network = odenets.models.network(StochasticDepth(0.4), channels=(4, 8), blocks=3)
    survival = [block.fields[1].probability.item() for flow in network.flows for block in flow.blocks]
    assert survival == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])


def test_what_only_training_reads_may_be_another_when_weights_are_loaded(tmp_path):
    for one, other in [(Fractal(2, drop=0.3), Fractal(2)), (StochasticDepth(0.5), StochasticDepth(0.9, by="batch"))]:
        flow = odenets.Flow(odenets.MLPField(6), solver=one, depth=2).eval()
        again = odenets.Flow(odenets.MLPField(6), solver=other, depth=2).eval()
        odenets.save_weights(flow, tmp_path / "weights.safetensors")
        odenets.load_weights(again, tmp_path / "weights.safetensors")
        torch.testing.assert_close(again(X), flow(X))


@pytest.mark.parametrize(
    ("name", "take"),
    [("RevNet", "revnet"), ("fractalnet", "fractal"), ("lie-trotter", "lie_trotter"), ("Momentum ResNet", "momentum")],
)
def test_names_near_a_scheme_are_told(name, take):
    with pytest.raises(ValueError, match=f"schemes are lm, .*: take '{take}'"):
        odenets.models.network(name)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: odenets.Flow(solver=RevNet), TypeError, r"got the class RevNet: solver=RevNet\(\)"),
        (lambda: odenets.models.network(["lm"]), TypeError, "solver must be the name"),
        (lambda: odenets.models.network("euler", ()), TypeError, "field must be a name"),
        (
            lambda: odenets.models.network("euler", odenets.ConvField(16)),
            TypeError,
            "a function of a number",
        ),
        (lambda: odenets.fields.make(["conv"], 8), TypeError, "name must be one of"),
        (
            lambda: odenets.models.network("revnet", ["conv"] * 3, blocks=1),
            ValueError,
            "at most the 2 of",
        ),
        (
            lambda: odenets.models.network("euler", ["attention", "feed_forward"], shared=True),
            ValueError,
            "at most the 1 of a flow's blocks",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_fit_takes_drop_path():
    flow = odenets.Flow(odenets.MLPField(6), solver=Fractal(2, drop=0.3), depth=2)
    network = odenets.Network(nn.Identity(), flow, nn.Linear(6, 2))
    batches = [(X, torch.arange(4) % 2)]
    assert fit(network, batches, epochs=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)).rows
