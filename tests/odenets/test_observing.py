"""Who watches a forward pass is handed the records of the flows in it."""

import threading

import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, Network, NeuralODE, measures
from odenets.module_wise import split_into_modules
from odenets.observing import keeping, observing, running_recorder
from odenets.recording import Recording
from solvers import Tolerance
from tests.odenets.networks import Calling, Velocity

ACTION = {"action": measures.action}


class Watch:
    """An observer that remembers what it receives; of some recorders, or of all."""

    def __init__(self, measures=None, only=None):
        self.measures, self.only, self.received = ACTION if measures is None else measures, only, []

    def measures_of(self, recorder):
        return self.measures if self.only is None or recorder in self.only else None

    def receive(self, recorder, output, records):
        self.received.append((recorder, output, records))

    def records(self):
        (received,) = self.received
        return received[2]


def field(width=3):
    return MLPField(width)


RECORDERS = {
    "euler": lambda: Flow(field, solver="euler", depth=3, h=1.0),
    "bs23": lambda: Flow(field, solver="bs23", depth=2),
    "untied": lambda: Flow(field, solver="bs23", depth=2, stage_fields="untied"),
    "shared": lambda: Flow(field(), solver="heun", depth=3, shared=True),
    "fixed": lambda: NeuralODE(field(), solver="rk4", steps=4),
    "adaptive": lambda: NeuralODE(field(), tolerance=Tolerance(rtol=1e-3)),
    "by sample": lambda: NeuralODE(field(), tolerance=Tolerance(rtol=1e-3), control="sample"),
    "backsolve": lambda: NeuralODE(field(), gradient="backsolve"),
    "checkpoint": lambda: NeuralODE(field(), gradient="checkpoint", steps=3),
    "network": lambda: Network(
        nn.Linear(3, 3), [Flow(field, depth=2), NeuralODE(field(), steps=2)], nn.Linear(3, 3), transitions=[nn.Tanh()]
    ),
    "ensemble": lambda: Network(nn.Identity(), Flow(field, depth=2), nn.Linear(3, 3), readout="ensemble"),
}


@pytest.fixture(params=RECORDERS)
def recorder(request):
    return RECORDERS[request.param]().eval()


def test_the_records_are_those_of_record_and_the_output_is_that_of_a_call(recorder):
    x = torch.randn(5, 3)
    expected = recorder(x)
    _, records = recorder.record(x, **ACTION)
    watch = Watch()
    with observing(watch):
        output = recorder(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(watch.records()["action"], records["action"])
    assert watch.records().layout == records.layout
    assert watch.received[0][0] is recorder
    assert watch.received[0][1] is output


def test_gradients_are_those_without_an_observer(recorder):
    x = torch.randn(5, 3)

    def gradients():
        recorder.zero_grad()
        recorder(x).square().sum().backward()
        return {name: p.grad for name, p in recorder.named_parameters() if p.grad is not None}

    expected = gradients()
    with observing(Watch()):
        observed = gradients()
    assert expected.keys() == observed.keys()
    torch.testing.assert_close(observed, expected)


def test_nothing_is_computed_twice():
    calls = []
    flow = Flow(Velocity(lambda _, t, x: calls.append(t) or -x), solver="rk4", depth=3, shared=True)
    with observing(Watch()):
        flow(torch.randn(2, 3))
    assert len(calls) == flow.evaluations == 12


def test_a_recorder_without_measures_tells_that_it_ran():
    flow, watch = Flow(field, depth=2), Watch({})
    with observing(watch):
        flow(torch.randn(2, 3))
    assert watch.records() == {}
    assert watch.records().blocks == ("blocks.0", "blocks.1")


def test_the_outermost_that_is_measured_tells_the_steps_of_all_within():
    inner = Flow(field, depth=2)
    network = Network(nn.Identity(), inner, nn.Identity())
    x, whole, part = torch.randn(4, 3), Watch(), Watch(only=[inner])
    for watch in (whole, part):
        with observing(watch):
            network(x)
    assert [recorder for recorder, *_ in whole.received] == [network]
    assert [recorder for recorder, *_ in part.received] == [inner]
    assert whole.records()["action"].equal(part.records()["action"])


def test_a_flow_within_a_field_is_part_of_the_field():
    inner = Flow(field, depth=2)
    outer, watch = Flow(Velocity(lambda self, t, x: self.inner(x), inner=inner), depth=3, shared=True), Watch()
    with observing(watch):
        outer(torch.randn(4, 3))
    assert [recorder for recorder, *_ in watch.received] == [outer]


def test_recorders_of_the_user_tell_what_they_call():
    """Their forward pass is their own, so it is looked into as that of any module."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = Flow(field, depth=2)

        def forward(self, x):
            return 2 * self.flow(x)

        def record(self, x, **measures):
            return self.flow.record(x, **measures)

        def steps(self, x, **options):
            return self.flow.steps(x, **options)

    mine, watch = Mine(), Watch()
    with observing(watch):
        mine(torch.randn(4, 3))
    assert [recorder for recorder, *_ in watch.received] == [mine.flow]


def test_a_subclass_that_extends_record_is_recorded_once_and_called_once():
    calls = []

    class Normalized(Flow):
        def record(self, x, /, *args, **options):
            calls.append(1)
            output, records = super().record(x / x.norm(dim=1, keepdim=True), *args, **options)
            return 2 * output, records

    flow, x, watch = Normalized(field, depth=2), torch.randn(4, 3), Watch()
    expected = flow(x)
    with observing(watch):
        assert flow(x).equal(expected)
    assert len(calls) == 2
    assert watch.records()["action"].equal(flow.record(x, **ACTION)[1]["action"])


def test_what_the_model_records_itself_is_told_too():
    """A penalty that the model's own forward pass computes, beside the observer's measure of the same name."""
    flow, watch, x = Flow(field, depth=2), Watch(ACTION | {"check": measures.residue}), torch.randn(4, 3)
    plain, own = flow.record(x, action=measures.error)
    with observing(watch):
        output, records = flow.record(x, action=measures.error)
    assert output.equal(plain)
    assert list(records) == ["action"]
    assert records.layout == own.layout
    torch.testing.assert_close(records["action"], own["action"])
    assert list(watch.records()) == ["action", "check"]
    torch.testing.assert_close(watch.records()["action"], flow.record(x, **ACTION)[1]["action"])


@pytest.mark.parametrize("name", ["euler", "bs23", "shared", "fixed", "adaptive", "network"])
def test_steps_that_the_model_takes_itself_are_told(name):
    recorder, x, watch = RECORDERS[name](), torch.randn(4, 3), Watch({"action": measures.action, "error": first_error})
    _, records = recorder.record(x, **watch.measures)
    with observing(watch):
        ends = [step.x1 for step in recorder.steps(x, closing=False)]
    assert watch.records().blocks == (records.blocks if name == "adaptive" else recorder.names)
    torch.testing.assert_close(watch.records()["action"], records["action"])
    torch.testing.assert_close(watch.records()["error"], records["error"])
    assert ends[0].equal(next(iter(recorder.steps(x))).x1)


def first_error(step):
    """A measure that may read the closing stage."""
    return step.stages[-1].square().mean(1)


def test_steps_that_are_not_taken_are_not_told():
    flow, x, watch = Flow(field, depth=3), torch.randn(4, 3), Watch()
    with observing(watch):
        for _, _step in zip(range(2), flow.steps(x), strict=False):
            assert running_recorder() is None  # what the loop does is no part of the flow
    assert watch.records().blocks == ("blocks.0", "blocks.1")


def test_a_recorder_of_modules_and_one_that_is_wrapped_are_recorded():
    network = Network(nn.Linear(3, 3), Flow(field, depth=4), nn.Linear(3, 2))
    x, watch = torch.randn(4, 3), Watch()
    _, records = network.record(x, **ACTION)
    modules = split_into_modules(network, 2, x)
    with observing(watch):
        modules(x)
    assert torch.cat([received[2]["action"] for received in watch.received]).equal(records["action"])
    watch = Watch()
    with observing(watch):
        Recording(network, ACTION)(x)
    assert [received[0] for received in watch.received] == [network]


@pytest.mark.parametrize("name", ["fixed", "adaptive", "by sample", "backsolve", "checkpoint"])
def test_output_times_leave_the_steps_as_they_are(name):
    ode, x, at = RECORDERS[name](), torch.randn(4, 3), torch.tensor([0.3, 0.7, 1.0])
    expected, (_, records), watch = ode(x, at=at), ode.record(x, **ACTION), Watch()
    with observing(watch):
        states = ode(x, at=at)
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-6)
    assert states.shape == (3, 4, 3)
    torch.testing.assert_close(watch.records()["action"], records["action"], rtol=1e-4, atol=1e-5)


def test_a_solution_is_measured_by_its_steps():
    for name in ("fixed", "adaptive", "by sample"):
        ode, x, watch = RECORDERS[name](), torch.randn(4, 3), Watch()
        expected, (_, records) = ode.solution(x), ode.record(x, **ACTION)
        with observing(watch):
            assert ode.solution(x).x1.equal(expected.x1)
        torch.testing.assert_close(watch.records()["action"], records["action"])
    ode = RECORDERS["backsolve"]()
    with observing(Watch()), pytest.raises(ValueError, match=r"gradient='direct' and no event: call ode\(x\)"):
        ode.solution(x)


@pytest.mark.parametrize("name", ["bs23", "untied", "shared"])
def test_embedded_outputs_are_of_a_pass_that_is_measured(name):
    flow, x, watch = RECORDERS[name](), torch.randn(4, 3), Watch()
    expected, (_, records) = flow.outputs(x), flow.record(x, **ACTION)
    with observing(watch):
        outputs = flow.outputs(x)
    assert all(outputs[one].equal(expected[one]) for one in expected)
    assert watch.records()["action"].equal(records["action"])


def test_an_event_ends_what_is_measured():
    ode = NeuralODE(
        Velocity(lambda self, t, x: torch.ones_like(x)), steps=4, event=lambda t, x: x.min() - 0.5, control="batch"
    )
    watch, x = Watch(), torch.zeros(2, 3)
    with observing(watch):
        assert ode(x).allclose(torch.full((2, 3), 0.5))
    torch.testing.assert_close(watch.records()["action"], torch.full((1, 2), 0.5))


def test_states_in_parts_are_refused_where_they_are_measured():
    ode, x = NeuralODE(lambda t, x: (-x[0], x[1]), steps=2), (torch.ones(2, 3), torch.ones(2, 1))
    with observing(Watch()), pytest.raises(TypeError, match=r"x must be one tensor .* join its parts"):
        ode(x)
    with observing(Watch({})):
        ode(x)


def test_kept_steps_are_those_of_steps(recorder):
    x, kept = torch.randn(4, 3), []
    if getattr(recorder, "gradient", "direct") != "direct":
        with pytest.raises(ValueError, match="no integral over time"):
            recorder.record(x, steps=keeping(kept))
        return
    if getattr(recorder, "control", "batch") == "sample":
        with pytest.raises(ValueError, match="steps are those of the batch"):
            recorder.record(x, steps=keeping(kept))
        return
    expected = list(recorder.steps(x))
    with observing(Watch({"steps": keeping(kept)})):
        recorder(x)
    assert [len(step.stages) for step in kept] == [len(step.stages) for step in expected]
    for one, other in zip(kept, expected, strict=True):
        assert one.x0.equal(other.x0)
        assert one.x1.equal(other.x1)
        assert all(map(torch.equal, one.stages, other.stages))


def test_kept_steps_that_a_field_writes_over_are_refused():
    buffer = torch.zeros(4, 3)

    def overwriting(self, t, x):
        return buffer.copy_(x) if t else buffer.copy_(-x)

    flow = Flow(Velocity(overwriting), solver="euler", depth=2, shared=True)
    with torch.no_grad(), pytest.raises(ValueError, match="field must not write into what it has returned"):
        flow.record(torch.randn(4, 3), steps=keeping([]))


def test_observers_nest_and_come_back_after_an_exception():
    flow, x, outer, inner = Flow(field), torch.randn(4, 3), Watch(), Watch()
    with observing(outer):
        with observing(None):
            flow(x)
        with pytest.raises(ValueError), observing(inner):
            flow(x * torch.nan)
        assert running_recorder() is None
        flow(x)
    flow(x)
    assert (len(outer.received), len(inner.received)) == (1, 0)


def test_each_thread_has_its_own_observer():
    flow, x, watches = Flow(field), torch.randn(4, 3), [Watch(), Watch(), Watch()]
    flow(x)
    barrier = threading.Barrier(2)

    def run(watch):
        with observing(watch):
            barrier.wait()
            flow(x)

    threads = [threading.Thread(target=run, args=(watch,)) for watch in watches[:2]]
    with observing(watches[2]):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(watch.received) for watch in watches] == [1, 1, 0]


def test_the_recorder_that_runs_is_known_while_it_runs():
    seen = []
    flow = Flow(Velocity(lambda self, t, x: seen.append(running_recorder()) or -x), solver="euler", depth=1)
    flow(torch.randn(4, 3))
    with observing(Watch()):
        flow(torch.randn(4, 3))
    assert seen == [None, flow]
    assert running_recorder() is None


def test_a_flow_without_a_field_makes_it_while_it_is_observed():
    flow, watch = Flow(depth=2), Watch()
    with observing(watch):
        flow(torch.randn(4, 3))
    assert watch.records()["action"].shape == (2, 4)


def test_a_compiled_flow_is_recorded_and_one_that_is_not_observed_compiles_as_before():
    flow, x, watch = Flow(field, depth=2).eval(), torch.randn(4, 3), Watch()
    compiled = torch.compile(flow, backend="eager", fullgraph=True)
    expected, records = flow.record(x, **ACTION)
    assert compiled(x).equal(expected)
    with observing(watch):
        assert compiled(x).equal(expected)
    torch.testing.assert_close(watch.records()["action"], records["action"])
    compiled(x)
    assert len(watch.received) == 1


def test_an_observed_pass_compiles():
    flow, x = Flow(field, depth=2).eval(), torch.randn(4, 3)

    @torch.compile(backend="eager", fullgraph=True)
    def watched(x):
        watch = Watch(ACTION)
        with observing(watch):
            output = model(x)
        return output, watch.received[0][2]["action"]

    model = nn.Sequential(nn.Linear(3, 3), flow)
    output, action = watched(x)
    assert output.equal(model(x))
    torch.testing.assert_close(action, flow.record(model[0](x), **ACTION)[1]["action"])


def test_a_flow_is_exported_as_before():
    model, x = nn.Sequential(nn.Linear(3, 3), Flow(field, depth=2)).eval(), torch.randn(4, 3)
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_flow_under_vmap_is_observed_as_it_is_not():
    flow, x, watch = Flow(field, depth=2).eval(), torch.randn(5, 4, 3), Watch({})
    expected = torch.vmap(flow)(x)
    with observing(watch):
        assert torch.vmap(flow)(x).equal(expected)
    assert len(watch.received) == 1


def test_a_model_with_flows_is_recorded_in_order():
    first, last = Flow(field, depth=2), NeuralODE(field(), steps=3)
    model = Calling(lambda self, x: self.last(self.first(self.first(x)) + x), first=first, last=last)
    watch = Watch()
    with observing(watch):
        model(torch.randn(4, 3))
    assert [recorder for recorder, *_ in watch.received] == [first, first, last]
    assert [len(records["action"]) for *_, records in watch.received] == [2, 2, 3]
