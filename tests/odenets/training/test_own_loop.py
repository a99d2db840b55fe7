"""A loop of one's own: ``loss = objective(network, x, y)`` counts the steps of whatever optimizer, each once."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, MLPField
from odenets.least_action import ActionPenalty, LeastAction
from odenets.recording import Recording
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Task
from tests.odenets.checks import assert_same
from tests.odenets.training import own_loop_in_processes
from tests.odenets.training.small import TENS, tiny

X, Y = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def flow(**options):
    torch.manual_seed(0)
    return Flow(partial(MLPField, 3, 4), depth=2, solver="euler", h=1.0, **options)


def sgd(network, lr=0.05):
    return torch.optim.SGD(network.parameters(), lr)


def take_steps(network, objective, optimizer, n=1, x=X, y=Y):
    for _ in range(n):
        optimizer.zero_grad()
        objective(network, x, y).backward()
        optimizer.step()


def counted(objective):
    """The steps that were counted, with the one that no loss has noticed yet."""
    return objective.state_dict()["_extra_state"].item()


@pytest.mark.parametrize("update", ["before", "next", "after"])
@pytest.mark.parametrize("weigh", ["divide", "multiply"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_loop_of_ones_own_trains_as_fit_does(update, weigh, every):
    options = {"update": update, "weigh": weigh, "every": every, "tau": 0.3}
    ours, theirs = (LeastAction(**options) for _ in range(2))
    network, twin = tiny(torch.float64, norm="batch"), tiny(torch.float64, norm="batch")
    make = lambda of: sgd(of) if isinstance(of, nn.Module) else torch.optim.SGD(of, 0.05)  # noqa: E731
    fit(twin, TENS, epochs=5, optimizer=make, objective=theirs)
    optimizer = sgd(network)
    for epoch in range(5):
        for x, y in TENS.epoch(epoch):
            take_steps(network, ours, optimizer, x=x.double(), y=y)
    state = ours.state_dict()
    assert state["_extra_state"] == theirs.steps == 10
    torch.testing.assert_close(ours.multiplier, theirs.multiplier, rtol=1e-12, atol=0)
    assert_same(network, twin, 1e-12, 1e-12)


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "foreach": True}),
    (torch.optim.SGD, {"lr": 0.1, "fused": True}),
    (torch.optim.Adam, {"foreach": False}),
    (torch.optim.Adam, {"foreach": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adagrad, {"fused": True}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.LBFGS, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_the_steps_of_every_optimizer_are_counted(kind, options):
    """Fused ones leave the versions of weights as they are; LBFGS takes twenty losses in a step, with one lambda."""
    network, objective = flow(), LeastAction()
    optimizer, lambdas = kind(network.parameters(), **options), []
    for n in range(4):

        def closure():
            optimizer.zero_grad()
            loss = objective(network, X, Y)
            lambdas.append(objective.multiplier.item())
            loss.backward()
            return loss

        closure() if kind is not torch.optim.LBFGS else None
        optimizer.step(closure if kind is torch.optim.LBFGS else None)
        assert counted(objective) == n + 1
        assert len(set(lambdas)) == n + 1


class Old(torch.optim.Optimizer):
    """Writes through ``data``, which leaves no version either."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)


class Sharpness(torch.optim.Optimizer):
    """Takes its step from a second loss, in weights that are moved for it."""

    def __init__(self, params):
        super().__init__(params, {})
        self.base = torch.optim.SGD(self.param_groups, 0.1)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        moves = [[0.1 * p.grad for p in group["params"]] for group in self.param_groups]
        for group, by in zip(self.param_groups, moves, strict=True):
            torch._foreach_add_(group["params"], by)
        with torch.enable_grad():
            closure()  # type: ignore[misc]
        for group, by in zip(self.param_groups, moves, strict=True):
            torch._foreach_sub_(group["params"], by)
        self.base.step()


def test_the_steps_of_optimizers_of_ones_own_are_counted():
    network, objective = flow(), LeastAction()
    take_steps(network, objective, Old(network.parameters()), 3)
    assert counted(objective) == 3
    optimizer = Sharpness(network.parameters())
    for _ in range(3):
        for p in network.parameters():
            p.grad = None
        objective(network, X, Y).backward()
        optimizer.step(lambda: objective(network, X, Y).backward())  # type: ignore[arg-type]
    assert counted(objective) == 6


def test_steps_without_an_optimizer_are_counted():
    network, objective = flow(), LeastAction()
    for _ in range(3):
        gradients = torch.autograd.grad(objective(network, X, Y), list(network.parameters()))
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients, strict=True):
                p -= 0.1 * g
    assert counted(objective) == 3


def test_an_optimizer_in_the_backward_pass_is_counted():
    network, objective = flow(), LeastAction()
    for p in network.parameters():
        optimizer = torch.optim.SGD([p], 0.1)
        p.register_post_accumulate_grad_hook(lambda p, o=optimizer: (o.step(), o.zero_grad())[1])
    for _ in range(3):
        objective(network, X, Y).backward()
    assert counted(objective) == 3


@pytest.mark.parametrize("update", ["before", "next", "after"])
def test_a_batch_in_parts_is_a_step(update):
    """lambda grows by the first part's loss, or after the step by that of the last one."""
    network, objective = flow(), LeastAction(update=update)
    optimizer = sgd(network)
    for _ in range(3):
        for part in range(3):
            (objective(network, X[2 * part :][:2], Y[2 * part :][:2]) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update == "after":
            expected = objective.multiplier + F.cross_entropy(network(X[4:]), Y[4:]).double()
            objective.state_dict()
            torch.testing.assert_close(objective.multiplier, expected)
    assert counted(objective) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_counted(fused):
    """A fused optimizer's ``step`` is called then too, and its kernel does nothing."""
    network, objective = flow(), LeastAction()
    optimizer, scaler = torch.optim.Adam(network.parameters(), fused=fused), torch.amp.GradScaler("cpu", 4.0)
    for n, factor in enumerate([1.0, torch.inf, torch.inf, 1.0, torch.inf, 1.0]):
        scaler.scale(objective(network, X, Y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert counted(objective) == [1, 1, 1, 2, 2, 3][n]


def test_what_takes_no_step_is_not_counted():
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    take_steps(network, objective, optimizer)
    assert objective.steps == 0  # until the next loss notices, or the state is asked for
    with torch.no_grad():
        objective(network, X, Y)
    with torch.inference_mode():
        objective(network, X, Y)
    objective.eval()
    objective(network, X, Y)
    objective.train()
    assert objective.steps == 0
    network.eval()
    objective(network, X, Y)
    network.train()
    assert objective.multiplier == 1 + F.cross_entropy(flow()(X), Y).double()
    assert counted(objective) == 1
    average = torch.optim.swa_utils.AveragedModel(network)
    average.update_parameters(network)
    objective(average.module, X, Y)
    network.load_state_dict(flow().state_dict())
    objective(network, X, Y)
    other = flow()
    optimizer_of_other = sgd(other)
    other(X).sum().backward()
    objective(network, X, Y).backward()
    optimizer_of_other.step()
    objective(network, X, Y)
    assert counted(objective) == 1


def test_weights_that_are_loaded_between_two_steps_are_no_step():
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    for _ in range(3):
        take_steps(network, objective, optimizer)
        network.load_state_dict(flow().state_dict())
    objective(network, X, Y).backward()
    network.load_state_dict(flow().state_dict())
    assert counted(objective) == 3


@pytest.mark.parametrize("optimizers", ["one", "each"])
def test_steps_of_several_networks_with_one_objective(optimizers):
    """One optimizer takes one step of both; two take two."""
    networks, objective = [flow(), flow()], LeastAction()
    if optimizers == "one":
        optimizer = sgd(nn.ModuleList(networks))
        for _ in range(3):
            sum(objective(network, X, Y) for network in networks).backward()  # type: ignore[union-attr]
            optimizer.step()
        assert counted(objective) == 3
    else:
        both = [sgd(network) for network in networks]
        for _ in range(3):
            for network, optimizer in zip(networks, both, strict=True):
                take_steps(network, objective, optimizer)
        assert counted(objective) == 6


def test_a_step_that_is_told_is_not_counted_twice():
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    for _ in range(3):
        take_steps(network, objective, optimizer)
        objective.after_step(network, (X, Y))
    take_steps(network, objective, optimizer)
    assert objective.steps == 3
    assert counted(objective) == 4


@pytest.mark.parametrize("update", ["before", "after"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_count_on_by_themselves(update, copied):
    network, objective = flow(), LeastAction(update=update)
    take_steps(network, objective, sgd(network), 2)
    network, twin = copied((network, objective))
    assert twin.steps == objective.steps == 2
    assert twin.multiplier == objective.multiplier
    take_steps(network, twin, sgd(network), 2)
    assert (counted(twin), counted(objective)) == (4, 2)
    assert twin.multiplier > objective.multiplier


@pytest.mark.parametrize("update", ["before", "next", "after"])
def test_a_loop_goes_on_from_a_state_as_if_it_had_not_stopped(update):
    whole, objective = flow().double(), LeastAction(update=update, every=2)
    take_steps(whole, objective, sgd(whole), 6, x=X.double())
    first, half = flow().double(), LeastAction(update=update, every=2)
    take_steps(first, half, sgd(first), 3, x=X.double())
    again, resumed = flow().double(), LeastAction(update=update, every=2)
    resumed.load_state_dict(half.state_dict())
    again.load_state_dict(first.state_dict())
    take_steps(again, resumed, sgd(again), 3, x=X.double())
    assert_same(again, whole)
    assert_same(resumed, objective)


def test_the_state_after_a_step_is_of_training_mode():
    """In which the batch's own statistics count, also where the state is taken in eval mode, after validation."""
    network, objective = tiny(norm="batch"), LeastAction(update="after")
    x, y = next(TENS.epoch(0))
    take_steps(network, objective, sgd(network), x=x, y=y)
    network.eval()
    objective.state_dict()
    assert not any(module.training for module in network.modules())
    expected = F.cross_entropy(network.train()(x), y).item()
    assert objective.multiplier.item() == pytest.approx(1 + expected, rel=1e-6)


def test_no_batch_is_kept_that_nobody_looks_at_again():
    for options, kept in (({}, False), ({"update": "after", "every": 3}, False), ({"update": "after"}, True)):
        network, objective = flow(), LeastAction(**options)
        x = X.clone()
        reference = weakref.ref(x)
        take_steps(network, objective, sgd(network), x=x)
        del x
        assert (reference() is not None) == kept


def test_an_objective_is_let_go_with_its_watch():
    network, objective = flow(), LeastAction()
    take_steps(network, objective, sgd(network), 2)
    references = weakref.ref(network), weakref.ref(objective)
    del network, objective
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_network_that_is_trained_in_eval_mode_is_told():
    network, objective = flow().eval(), LeastAction()
    with pytest.raises(
        RuntimeError, match=r"trained in eval mode, in which an objective changes nothing: call network"
    ):
        take_steps(network, objective, sgd(network), 2)
    take_steps(network.train(), objective, sgd(network), 2)
    assert counted(objective) == 2


class Looking(CrossEntropy):
    def __init__(self):
        super().__init__()
        self.seen = []

    def after_step(self, network, batch):
        self.seen.append((network, batch[0]))


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: ActionPenalty(0.1, o), LeastAction])
def test_what_an_objective_of_ones_own_does_after_a_step_is_done(wrap):
    network, looking = flow(), Looking()
    objective = wrap(looking)
    take_steps(network, objective, sgd(network), 3)
    objective.state_dict()
    assert [net is network and x is X for net, x in looking.seen] == [True] * 3


def test_an_objective_within_another_counts_each_step_once():
    network, inner = flow(), LeastAction(tau=0.1, cost="residue")
    outer = LeastAction(inner)
    take_steps(network, outer, sgd(network), 3)
    assert (counted(outer), inner.steps) == (3, 3)


def test_who_has_output_and_records_counts_too():
    """In parts also; the steps of an optimizer are noticed."""
    network, objective = flow(), LeastAction()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for _ in range(3):
        for _ in range(2):
            output, records = network.record(X, **objective.measures)
            objective.loss(network, (X, Y), output, records).backward()
        optimizer.step()
    assert counted(objective) == 3


@pytest.mark.parametrize("what", ["record", "recording", "loop"])
def test_a_compiled_record_counts(what):
    torch.compiler.reset()
    network, objective = flow(), LeastAction()
    optimizer, called = sgd(network), network
    if what == "record":
        network.record = torch.compile(network.record, backend="eager")  # type: ignore[method-assign]
    if what == "recording":
        called = torch.compile(Recording(network, objective.measures), backend="eager", fullgraph=True)
    loss = torch.compile(objective, backend="eager") if what == "loop" else objective
    take_steps(called, loss, optimizer, 3)
    assert counted(objective) == 3
    eager, expected = flow(), LeastAction()
    take_steps(eager, expected, sgd(eager), 3)
    torch.testing.assert_close(objective.multiplier, expected.multiplier)


def test_a_recording_of_the_moment_counts():
    network, objective = flow(), LeastAction(update="after")
    optimizer = sgd(network)
    for _ in range(3):
        optimizer.zero_grad()
        objective(Recording(network, objective.measures), X, Y).backward()
        optimizer.step()
    assert counted(objective) == 3
    assert objective.multiplier > 1


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(how, network, measures):
    """A network in what wraps networks, so that it records."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(Recording(network, measures))
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in network.modules():
            if isinstance(block, MLPField):
                fully_shard(block)
        return fully_shard(Recording(network, measures))
    if how == "registered":
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        fully_shard(network)
        register_fsdp_forward_method(network, "record")
        return network
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup(Recording(network, measures))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("update", ["before", "after"])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "registered", "fabric"])
def test_wrapped_networks_train_as_plain_ones(process_group, how, update, parts):
    if how in ("fsdp", "registered"):
        torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    results = []
    for wrap in (False, True):
        network, objective = flow(), LeastAction(update=update)
        called = wrapped(how, network, objective.measures) if wrap else network
        optimizer = torch.optim.Adam(called.parameters(), fused=wrap)
        for _ in range(3):
            for _ in range(parts):
                objective(called, X, Y).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = network.state_dict()
        full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
        assert counted(objective) == 3
        results.append((full, objective.multiplier.clone()))
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Each with its share of every batch, gradients averaged, lambda grown by the mean of their losses."""
    script = Path(own_loop_in_processes.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    subprocess.run(launch, check=True, capture_output=True, timeout=1200)
    for update in ("before", "next", "after"):
        one = own_loop_in_processes.train(update, 0, 1)
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt")[update], one, rtol=1e-9, atol=1e-10)


def test_a_state_that_all_processes_must_look_for_says_so(monkeypatch):
    network, objective = flow(), LeastAction(update="after")
    take_steps(network, objective, sgd(network))
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match=r"call objective.after_step\(network, \(x, y\)\) on each before"):
            objective.state_dict()
    objective.after_step(network, (X, Y))
    assert counted(objective) == 1


REMEDY = r"put odenets.recording.Recording\(network, objective.measures\) into {} instead"


def test_wrappers_that_would_be_bypassed_are_named(process_group):
    from lightning_fabric import Fabric
    from torch.distributed.fsdp import fully_shard

    objective = LeastAction()
    for wrapper, name in [
        (nn.parallel.DistributedDataParallel(flow()), "DistributedDataParallel"),
        (torch.compile(flow()), "OptimizedModule"),
        (Fabric(accelerator="cpu", devices=1).setup(flow()), "_FabricModule"),
        (torch.optim.swa_utils.AveragedModel(flow()), "AveragedModel"),
        (nn.Sequential(flow()), "Sequential"),
    ]:
        with pytest.raises(TypeError, match=REMEDY.format(name)):
            objective(wrapper, X, Y)
    with pytest.raises(TypeError, match=r"must not be in DataParallel.*take DistributedDataParallel"):
        objective(nn.DataParallel(flow()), X, Y)
    with pytest.raises(TypeError, match=r"sharded by its forward pass.*fully_shard\(Recording\(network"):
        objective(fully_shard(flow()), X, Y)
    with pytest.raises(ValueError, match=r"must have the measures of the objective, got none named \['action'\]"):
        objective(Recording(flow(), {}), X, Y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, n: o(nn.Linear(3, 3), X, Y), TypeError, "got Linear: odenets.adapt makes one"),
        (lambda o, n: o(X, n, Y), TypeError, "network must be a module that records its steps, got Tensor"),
        (lambda o, n: o(n, Y, X), TypeError, r"called with \(network, x, y\), got torch.int64 \(6,\) as inputs x"),
        (
            lambda o, n: o(n, (X, Y), *n.record(X)),
            TypeError,
            r"take objective.loss\(network, \(x, y\), output, records",
        ),
        (lambda o, n: o(n.requires_grad_(False), X, Y), ValueError, "depends on no parameter that requires a gradient"),
    ],
)
def test_calls_that_go_wrong_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(LeastAction(), flow())


def test_an_objective_written_for_the_old_call_is_told():
    with pytest.raises(
        TypeError, match=r"overrides loss\(self, network, batch, output, records\), got Old with forward"
    ):

        class Old(CrossEntropy):
            def forward(self, network, batch, output, records):
                return records["action"].mean()


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, x, c):
        return self.linear(x) + c


@pytest.mark.parametrize("make", [tuple, list])
def test_inputs_may_have_conditions(make):
    torch.manual_seed(0)
    network, objective = Flow(Conditioned, depth=2, solver="euler", h=1.0), LeastAction(update="after")
    c = torch.ones(6, 1)
    output, records = network.record(X, c, **objective.measures)
    expected = F.cross_entropy(output, Y) + records["action"].sum(0).mean()
    torch.testing.assert_close(objective(network, make((X, c)), Y), expected)
    take_steps(network, objective, sgd(network), 2, x=make((X, c)))
    assert counted(objective) == 2


def test_the_context_of_a_loss_does_not_matter():
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        network, objective = flow(), LeastAction(update="after")
        optimizer = sgd(network)
        for _ in range(2):
            with context:
                loss = objective(network, X, Y)
            loss.backward()
            optimizer.step()
        assert counted(objective) == 2


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, output, y):
        return F.mse_loss(output, y) * self.log_scale.exp() - self.log_scale


def test_any_function_is_a_task():
    network, y = flow(), torch.rand(6, 3)
    expected = F.mse_loss(network(X), y)
    cost = network.record(X, **LeastAction().measures)[1]["action"].sum(0).mean()
    for function in (F.mse_loss, nn.MSELoss(), Weighted(), lambda output, y: (output - y).square().mean()):
        task = Task(function)
        torch.testing.assert_close(task(network, X, y), expected)
        torch.testing.assert_close(ActionPenalty(0.1, task)(network, X, y), expected + 0.1 * cost)
        torch.testing.assert_close(LeastAction(task, lambda0=2.0, update="next")(network, X, y), expected + cost / 2)
        assert LeastAction(task).task is task
        assert task.task is task
    assert dict(LeastAction(Task(Weighted())).named_parameters()).keys() == {"task.function.log_scale"}
    moved = LeastAction(Task(Weighted())).double()
    assert next(moved.parameters()).dtype == torch.float64


def test_targets_are_what_the_function_understands():
    network = flow()
    values = {"left": torch.zeros(6), "names": ["a"] * 6}
    loss = Task(lambda output, y: (output[:, 0] - y["left"]).abs().mean())(network, X, values)
    torch.testing.assert_close(loss, network(X)[:, 0].abs().mean())
    objective = LeastAction(Task(lambda output, y: output.square().mean()))
    take_steps(network, objective, sgd(network), 2, y=None)
    assert counted(objective) == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Task(nn.MSELoss), TypeError, r"must be of \(output, y\), such as F.mse_loss or nn.MSELoss\(\), got"),
        (lambda: Task("mse"), TypeError, "such as F.mse_loss or nn.MSELoss"),  # type: ignore[arg-type]
        (lambda: Task(CrossEntropy()), TypeError, "got the objective CrossEntropy: take it"),
        (lambda: LeastAction(F.mse_loss), TypeError, r"task must be an objective.*Task\(mse_loss\)"),
        (lambda: Task(nn.MSELoss(reduction="none"))(flow(), X, X), ValueError, r"MSELoss returns shape \(6, 3\)"),
        (lambda: Task(lambda output, y: 1.0)(flow(), X, X), TypeError, "<lambda> returns float"),
    ],
)
def test_tasks_that_are_none_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_validation_reports_is_the_task_without_smoothing_or_cost():
    network = flow()
    output, records = network.record(X, **LeastAction().measures)
    plain = F.cross_entropy(output, Y)
    for objective in (CrossEntropy(0.1), LeastAction(CrossEntropy(0.1)), ActionPenalty(2.0, LeastAction())):
        torch.testing.assert_close(objective.validation_loss(network, (X, Y), output, records), plain)
    task = LeastAction(Task(F.mse_loss))
    torch.testing.assert_close(task.validation_loss(network, (X, X), output, records), F.mse_loss(output, X))


def test_averaged_weights_that_are_swapped_in_and_out_are_no_step():
    """As callbacks do for validation, between the parts of a batch too."""
    network, objective = flow(), LeastAction()
    optimizer, average = sgd(network), flow()
    take_steps(network, objective, optimizer)
    for _ in range(3):
        for _ in range(2):
            objective(network, X, Y).backward()
            for p, q in zip(network.parameters(), average.parameters(), strict=True):
                for _ in range(2):
                    held = p.detach().clone()
                    p.detach().copy_(q.detach())
                    q.detach().copy_(held)
        optimizer.step()
    assert counted(objective) == 4


def test_two_optimizers_of_one_network_take_one_step_with_one_loss():
    network, objective = flow(), LeastAction()
    halves = [torch.optim.SGD(list(network.parameters())[i::2], 0.1) for i in range(2)]
    for _ in range(3):
        objective(network, X, Y).backward()
        for optimizer in halves:
            optimizer.step()
    assert counted(objective) == 3


def test_an_optimizer_that_fails_is_no_step_and_the_next_one_is():
    network, objective = flow(), LeastAction()
    optimizer = torch.optim.LBFGS(network.parameters())
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    take_steps(network, objective, sgd(network), 2)
    assert counted(objective) == 2
    fresh = LeastAction()
    for _ in range(2):
        gradients = torch.autograd.grad(fresh(network, X, Y), list(network.parameters()))
        torch._foreach_sub_([p.detach() for p in network.parameters()], gradients)
    assert counted(fresh) == 2
