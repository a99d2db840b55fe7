import pytest
import torch
from torch import nn

from odenets.analysis.memory import measure_memory

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

    assert measure_memory(chain).peak == 2 * KB


def test_what_is_left(x):
    assert measure_memory(lambda: x + 1 + 1).left == KB
    assert measure_memory(lambda: x.add_(1)).left == 0
    graph = x.clone().requires_grad_()
    assert measure_memory(lambda: graph.sigmoid().sigmoid().sum()).left == 2 * KB + 4


def test_what_is_kept_counts(x):
    assert measure_memory(lambda: [x + i for i in range(5)]).peak == 5 * KB


def test_views_work_in_place_and_what_was_there_before_cost_nothing(x):
    assert measure_memory(lambda: (x.reshape(16, 16).T, x.add_(1), x[:5])).peak == 0


def test_a_tensor_is_counted_once_by_its_storage(x):
    def views():
        y = x + 1
        return [y[i:].reshape(-1, 1) for i in range(5)]

    assert measure_memory(views).peak == KB


def test_a_graph_keeps_what_backward_needs_and_gradients_count():
    layers = nn.Sequential(*[nn.Sigmoid() for _ in range(10)])
    x = torch.zeros(256, requires_grad=True)
    with torch.no_grad():
        assert measure_memory(lambda: layers(x)).peak == 2 * KB
    assert measure_memory(lambda: layers(x)).peak == 10 * KB

    def step():
        layers(x).sum().backward()

    assert 11 * KB <= measure_memory(step).peak <= 13 * KB
    assert x.grad is not None


def test_each_measurement_begins_at_nothing(x):
    held = []
    first = measure_memory(lambda: held.append(x + 1)).peak
    assert measure_memory(lambda: held.append(x + 1)).peak == first == KB
    held.clear()


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_tells():
    x = torch.zeros(256, device="cuda")
    held = []
    assert measure_memory(lambda: held.extend(x + i for i in range(5)), "cuda").peak == 5 * KB
