import pytest
import torch
from torch import nn

from odenets.analysis.memory import memory

KB = 4 * 256  # bytes of 256 floats


@pytest.fixture
def x():
    return torch.zeros(256)


def test_what_is_freed_no_longer_counts(x):
    def chain():
        y = x
        for _ in range(5):
            y = y + 1
        return y

    assert memory(chain).peak == 2 * KB


def test_what_is_left(x):
    assert memory(lambda: x + 1 + 1).left == KB
    assert memory(lambda: x.add_(1)).left == 0
    graph = x.clone().requires_grad_()
    assert memory(lambda: graph.sigmoid().sigmoid().sum()).left == 2 * KB + 4


def test_what_is_kept_counts(x):
    assert memory(lambda: [x + i for i in range(5)]).peak == 5 * KB


def test_views_work_in_place_and_what_was_there_before_cost_nothing(x):
    assert memory(lambda: (x.reshape(16, 16).T, x.add_(1), x[:5])).peak == 0


def test_a_tensor_is_counted_once_by_its_storage(x):
    def views():
        y = x + 1
        return [y[i:].reshape(-1, 1) for i in range(5)]

    assert memory(views).peak == KB


def test_a_graph_keeps_what_backward_needs_and_gradients_count():
    layers = nn.Sequential(*[nn.Sigmoid() for _ in range(10)])
    x = torch.zeros(256, requires_grad=True)
    with torch.no_grad():
        assert memory(lambda: layers(x)).peak == 2 * KB
    assert memory(lambda: layers(x)).peak == 10 * KB

    def step():
        layers(x).sum().backward()

    assert 11 * KB <= memory(step).peak <= 13 * KB
    assert x.grad is not None


def test_each_measurement_begins_at_nothing(x):
    kept = []
    first = memory(lambda: kept.append(x + 1)).peak
    assert memory(lambda: kept.append(x + 1)).peak == first == KB
    kept.clear()


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_tells():
    x = torch.zeros(256, device="cuda")
    kept = []
    assert memory(lambda: kept.extend(x + i for i in range(5)), "cuda").peak == 5 * KB
