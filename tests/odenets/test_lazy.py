"""A flow without a field, where other libraries hold its parameters before its first batch."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from odenets import Flow, Network

X = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
Y = (X.norm(dim=1) > 1).long()


def network():
    return nn.Sequential(nn.Linear(2, 8), Flow(depth=3), nn.Linear(8, 2))


@pytest.mark.filterwarnings("ignore")  # of Lightning itself
def test_under_lightning_too():
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.02)

    torch.manual_seed(0)
    classifier = Classifier()
    held = list(classifier.parameters())
    trainer = lightning.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(classifier, torch.utils.data.DataLoader([*zip(X, Y, strict=True)], 32))
    assert {*classifier.parameters()} <= {*held}
    assert nn.functional.cross_entropy(classifier.network(X), Y) < 0.6  # a linear network has 0.69


def test_moved_before_its_first_batch_it_is_of_the_kind_of_that():
    flow = Flow().double()
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    flow(X.double())
    assert {p.dtype for p in flow.parameters()} == {torch.float64}


def test_frozen_before_its_first_batch_it_stays_so():
    net = network()
    for p in net[1].parameters():
        p.requires_grad = False
    net(X).sum().backward()
    assert all(p.grad is None for p in net[1].parameters())


@pytest.mark.parametrize("flag", ["set_overwrite_module_params_on_conversion", "set_swap_module_params_on_conversion"])
def test_parameters_that_a_conversion_replaced_train(flag):
    change = getattr(torch.__future__, flag)
    change(True)
    try:
        flow = Flow().double()
    finally:
        change(False)
    optimizer = torch.optim.SGD(flow.parameters(), 0.1)
    before = flow(X.double())
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(flow(X.double()), before)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_after_the_meta_device_its_field_is_where_its_input_is(device):
    flow = Flow(depth=2).to("meta")
    assert flow(X.to(device)).device.type == device
    assert {p.device.type for p in flow.parameters()} == {device}


def test_parameters_without_a_field_are_not_told_apart_by_their_dimensions():
    net = network()
    with pytest.raises(RuntimeError, match="no ndim yet: call the network once"):
        [p for p in net.parameters() if p.ndim < 2]
    net(X)
    assert sum(p.ndim == 2 for p in net[1].parameters()) == 6


def test_an_optimizer_of_the_same_moment_resumes():
    def begun():
        net = network()
        return net, torch.optim.Adam(net.parameters(), 0.1)

    (net, optimizer), (other, resumed) = begun(), begun()
    net(X).sum().backward()
    optimizer.step()
    other(X)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, steps in ((net, optimizer), (other, resumed)):
        steps.zero_grad()
        one(X).square().sum().backward()
        steps.step()
    torch.testing.assert_close([*net.parameters()], [*other.parameters()], rtol=0, atol=0)


def test_threads_that_call_it_at_once_make_one_field():
    for _ in range(20):
        flow, barrier = Flow(depth=4), threading.Barrier(4)

        def call(_, flow=flow, barrier=barrier):
            barrier.wait()
            return flow(X)

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(call, range(4))
        assert all(torch.equal(first, other) for other in others)
        assert len(flow.blocks) == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
def test_a_compiled_flow_without_a_field_makes_one():
    net = network()
    assert torch.equal(torch.compile(net, backend="eager")(X), net(X))


def test_apply_warns_of_a_flow_without_a_field():
    network = Network(nn.Linear(2, 3), Flow(), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="apply passes over a flow without a field: call the network once"):
        network.apply(lambda module: None)
    network(torch.ones(4, 2))
    network.apply(lambda module: None)
