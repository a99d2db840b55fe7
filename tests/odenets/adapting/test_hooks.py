import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from odenets import measures
from odenets.adapting import adapt
from tests.odenets.adapting.models import FAMILIES, QUANTITIES, TINY, Repeated, X, small_resnet
from tests.odenets.checks import assert_same_gradients
from tests.odenets.networks import Calling, Unit


def test_a_pass_within_a_pass_is_its_own():
    adapted = adapt(Repeated(2), blocks=["block", "other"])
    expected = adapted.record(TINY, action=measures.action)[1]["action"]

    def needs_second_forward(step):
        adapted(TINY)
        return adapted.record(TINY, action=measures.action)[1]["action"].sum(0)

    records = adapted.record(TINY, action=measures.action, again=needs_second_forward)[1]
    torch.testing.assert_close(records["action"], expected)
    torch.testing.assert_close(records["again"], expected.sum(0).expand(3, 2))


def test_threads_record_at_once():
    """As the replicas of DataParallel do, which share the hooks."""
    adapted = adapt(small_resnet().eval())
    inputs = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    expected = [adapted.record(x, action=measures.action)[1]["action"] for x in inputs]
    barrier = threading.Barrier(len(inputs))

    def waits(step):
        barrier.wait(10)  # so that all are within their first block
        return measures.action(step)

    with ThreadPoolExecutor(len(inputs)) as pool:
        records = list(pool.map(lambda x: adapted.record(x, action=waits)[1]["action"], inputs))
    torch.testing.assert_close(records, expected)
    assert adapted.hooks.current is None


def test_blocks_may_be_called_by_keyword():
    adapted = adapt(Calling(lambda m, x: m.block(x=x), block=Unit(3, 3)), blocks=["block"])
    (step,) = adapted.steps(TINY)
    torch.testing.assert_close(step.x1 - step.x0, adapted.model.block.way(TINY))


def test_a_pass_that_fails_leaves_nothing_behind():
    adapted = adapt(small_resnet())

    def broken(step):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        adapted.record(X, broken=broken)
    assert adapted.hooks.current is None
    assert adapted.record(X, action=measures.action)[1]["action"].shape == (4, 2)


def test_the_same_model_adapted_twice():
    model = small_resnet().eval()
    all_blocks, one = adapt(model), adapt(model, blocks=["layer2.0"])
    expected = all_blocks.record(X, action=measures.action)[1]["action"]
    torch.testing.assert_close(one.record(X, action=measures.action)[1]["action"], expected[1:2])


def test_copies_record_themselves():
    adapted = adapt(small_resnet().eval())
    twin = copy.deepcopy(adapted)
    for p in twin.parameters():
        nn.init.zeros_(p)
    before = adapted.record(X, action=measures.action)[1]["action"]
    assert (twin.record(X, action=measures.action)[1]["action"] == 0).all()
    assert torch.equal(adapted.record(X, action=measures.action)[1]["action"], before)
    assert (before > 0).all()


def test_a_pickled_network_and_a_replica_record_the_same():
    """The replica is one as DataParallel makes them, whose weights are plain tensors."""
    adapted = adapt(Repeated(2), blocks=["block", "other"])
    expected = adapted.record(TINY, action=measures.action)[1]["action"]
    again = pickle.loads(pickle.dumps(adapted))
    torch.testing.assert_close(again.record(TINY, action=measures.action)[1]["action"], expected)
    copies = {module: module._replicate_for_data_parallel() for module in adapted.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            setattr(twin, name, child and copies[child])
        for name, p in module._parameters.items():
            setattr(twin, name, p * 1.0)
    copies[adapted].record(TINY, action=measures.action)[1]["action"].sum().backward()
    grads = [p.grad.clone() for p in adapted.parameters()]
    adapted.zero_grad()
    expected.sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in adapted.parameters()])


@pytest.mark.parametrize("family", ["resnet", pytest.param("vit", marks=pytest.mark.slow)])
def test_record_compiles_without_a_graph_break(family):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    output, records = adapted.record(x, action=measures.action, cosine=measures.cosine)
    compiled = torch.compile(adapted.record, fullgraph=True, backend="eager")
    compiled_output, values = compiled(x, action=measures.action, cosine=measures.cosine)
    torch.testing.assert_close(compiled_output, output)
    assert values.starts == records.starts
    for name in records:
        torch.testing.assert_close(values[name], records[name], atol=1e-5, rtol=1e-4)
    values["action"].sum().backward()
    torch.testing.assert_close(torch.compile(adapted, fullgraph=True, backend="eager")(x), output)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_under_autocast_records_stay_float32(family):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    expected = adapted.record(x, **QUANTITIES)[1]
    with torch.autocast("cpu", torch.bfloat16):
        output, records = adapted.record(x, **QUANTITIES)
        only = adapted.record(x, action=measures.action)[1]
    assert output.dtype == torch.bfloat16
    for name, values in records.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected[name], atol=0.02, rtol=0.05)
    torch.testing.assert_close(only["action"], records["action"])
    records["action"].sum().backward()
    assert next(adapted.parameters()).grad.isfinite().all()


def test_gradients_by_transforms():
    adapted = adapt(small_resnet().eval(), X)
    model = Calling(lambda m, x: m.adapted.record(x, action=measures.action)[1]["action"].sum(), adapted=adapted)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (X,)))(weights)
    adapted.record(X, action=measures.action)[1]["action"].sum().backward()
    for name, p in adapted.named_parameters():
        torch.testing.assert_close(gradients[f"adapted.{name}"], torch.zeros_like(p) if p.grad is None else p.grad)


def test_data_parallel_training_finds_the_same_gradients(tmp_path):
    def loss(model, x):
        output, records = model.network.record(x, action=measures.action)
        return output.square().mean() + records["action"].sum()

    adapted = adapt(small_resnet())
    twin = copy.deepcopy(adapted)
    Calling(loss, network=twin)(X).backward()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(Calling(loss, network=adapted))(X).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same_gradients(adapted, twin)
