"""Modules are in the backward pass as they were in the forward pass, in every way that calls the field again."""

import collections
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

from solvers.gradients.captured import tensors_of
from tests.solvers.gradients.ways import SOLVES, X0, D, Held, Net, close, directly, every, gradients


def replace_data(net):
    for p in net.parameters():
        p.data = p.data + 1


CHANGES = {
    "the module is replaced": lambda net: setattr(net, "a", nn.Linear(2, 2, dtype=D)),
    "it is deleted": lambda net: delattr(net, "a"),
    "a parameter is replaced": lambda net: setattr(net.a, "weight", nn.Parameter(torch.ones(2, 2, dtype=D))),
    "other weights are assigned": lambda net: net.load_state_dict(nn.Module.state_dict(Other()), assign=True),
    "the data is replaced": replace_data,
}


class Other(Net):
    def __init__(self):
        super().__init__()
        nn.init.ones_(self.a.weight)


FIELDS = {
    "module": lambda net: net,
    "method": lambda net: net.velocity,
    "partial": lambda net: functools.partial(net.velocity),
    "closure": lambda net: lambda t, x: net(t, x),
}


@every
@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_a_module_after_the_forward_pass_does_not_matter(way, change):
    expected = gradients(Net, lambda net: directly(net, X0))
    close(gradients(Net, lambda net: SOLVES[way](net, X0), CHANGES[change]), expected)


@every
@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_hold_modules(way, kind):
    """The parameters of methods and partials are known; a closure says them. Replaced modules are found in all."""
    expected = gradients(Net, lambda net: directly(net, X0))

    def solve(net):
        parameters = net.parameters() if kind == "closure" and not way.startswith("checkpoint") else None
        return SOLVES[way](FIELDS[kind](net), X0, parameters)

    close(gradients(Net, solve, CHANGES["the module is replaced"]), expected)


@every
@pytest.mark.parametrize("change", ["step", "load_state_dict"])
def test_weights_changed_in_place_are_noticed(way, change):
    net = Net()
    x1 = SOLVES[way](net, X0)
    if change == "step":
        with torch.no_grad():
            net.a.weight += 1
    else:
        net.load_state_dict(Other().state_dict())
    with pytest.raises(RuntimeError, match=r"changed in place since the forward pass.*call backward\(\) before"):
        x1.sum().backward()


@every
def test_a_closure_whose_tensor_is_replaced_is_noticed(way):
    w = torch.ones(2, dtype=D, requires_grad=True)
    parameters = None if way.startswith("checkpoint") else [w]
    x1 = SOLVES[way](lambda t, x: -x * w, X0, parameters)
    w.data = torch.zeros(2, dtype=D)
    with pytest.raises(RuntimeError, match="was replaced since the forward pass"):
        x1.sum().backward()


@every
@pytest.mark.parametrize("leaves", [True, False])
def test_functional_calls(way, leaves):
    net = Held(SOLVES[way])
    other = {name: (1.1 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
    x1 = functional_call(net, {name: p if leaves else p * 1 for name, p in other.items()}, (X0,))
    result = torch.autograd.grad(x1.sum(), list(other.values()))
    net.load_state_dict({name: p.detach() for name, p in other.items()})
    close(result, torch.autograd.grad(net.head(directly(net.field, X0)).sum(), list(net.parameters())))


def replica(module):
    """As ``nn.parallel.replicate`` wires them: weights are tensors on a graph, and no parameters."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, copy in copies.items():
        copy._former_parameters = collections.OrderedDict()
        for name, child in m._modules.items():
            setattr(copy, name, copies[child])
        for name, p in m._parameters.items():
            copy._former_parameters[name] = w = p * 1.0
            setattr(copy, name, w)
    return copies[module]


@every
@pytest.mark.parametrize("part", ["field", "method", "network"])
def test_replicas_of_data_parallel(way, part):
    net = Held(SOLVES[way])
    expected = torch.autograd.grad(net.head(directly(net.field, X0)).sum(), list(net.parameters()))
    copy = replica(net)
    if part == "network":
        x1 = copy(X0)
    else:
        x1 = copy.head(SOLVES[way](copy.field if part == "field" else copy.field.velocity, X0))
    close(torch.autograd.grad(x1.sum(), list(net.parameters())), expected)


@every
@pytest.mark.parametrize("kept", ["x1", "loss", "by a method", "by a closure"])
def test_a_solution_kept_on_its_module_is_freed_with_it(way, kept):
    net = Net()
    if kept == "by a closure":
        parameters = None if way.startswith("checkpoint") else tensors_of("parameters", net)
        net.kept = [(lambda m: SOLVES[way](lambda t, x: m(t, x), X0, parameters))(net)]
    else:
        net.kept = SOLVES[way](net.velocity if kept == "by a method" else net, X0)
        net.kept = net.kept if kept == "x1" else net.kept.sum()
    reference = weakref.ref(net)
    del net
    if reference() is not None:  # only a cycle waits for the collector
        gc.collect()
    assert reference() is None


@every
@pytest.mark.parametrize("kind", ["module", "method", "closure"])
def test_a_module_that_nobody_holds_any_more_still_gives_its_gradient(way, kind):
    expected = gradients(Net, lambda net: directly(net, X0))
    net = Net()
    tensors = list(net.parameters())
    x1 = SOLVES[way](FIELDS[kind](net), X0, None if kind != "closure" or way.startswith("checkpoint") else tensors)
    del net
    close(torch.autograd.grad(x1.square().sum(), tensors), expected)


@every
def test_the_module_itself_is_called_again_and_left_as_it_is(way):
    net = Net()
    x1 = SOLVES[way](net, X0)
    calls, before = net.calls, {name: id(p) for name, p in net.named_parameters()}
    net.eval()
    x1.sum().backward(retain_graph=True)
    assert net.calls > calls
    assert not net.training
    assert {name: id(p) for name, p in net.named_parameters()} == before
    first = net.a.weight.grad.clone()
    x1.sum().backward()
    torch.testing.assert_close(net.a.weight.grad, 2 * first)
