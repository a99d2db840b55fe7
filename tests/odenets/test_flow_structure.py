"""Parts of a flow, fields that come with the first input, step sizes in a state."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from odenets import Block, Flow, MLPField

VECTORS = torch.randn(5, 3)


@pytest.mark.parametrize("ends", [(1, 3), (0, 3)], ids=["part", "whole"])
def test_a_part_has_hooks_and_a_mode_of_its_own(ends):
    flow = Flow(MLPField(3), depth=3)
    fired = []
    part = flow.part(*ends)
    part.register_forward_hook(lambda *_: fired.append("part"))
    part.register_state_dict_post_hook(lambda *_: fired.append("state"))
    flow(VECTORS)
    flow.state_dict()
    assert fired == []
    part(VECTORS)
    assert fired == ["part"]
    flow.register_forward_pre_hook(lambda *_: fired.append("whole"))
    flow.register_full_backward_hook(lambda *_: fired.append("whole"))
    part(VECTORS).sum().backward()
    assert fired == ["part", "part"]
    part.register_buffer("extra", torch.zeros(1))
    assert not list(flow.buffers())
    assert [*map(id, part.parameters())] == [*map(id, flow.blocks[slice(*ends)].parameters())]
    part.eval()
    assert flow.training
    assert flow.blocks.training


def test_a_flow_is_cut_where_tensors_are_fake():
    flow = Flow(MLPField(3), depth=3)
    with FakeTensorMode():
        assert flow.part(0, 2).depth == 2


def test_a_part_of_a_frozen_flow_is_frozen():
    flow = Flow(MLPField(3), depth=3).eval()
    assert not any(module.training for module in flow.part(0, 2).modules())


def test_a_part_of_a_compiled_flow_is_the_part():
    flow = Flow(MLPField(3), depth=3)
    flow.compile(backend="eager")
    *_, last = flow.part(0, 2).steps(VECTORS)
    torch.testing.assert_close(flow.part(0, 2)(VECTORS), last.x1)


def test_a_part_keeps_what_a_class_overrides_and_lacks_no_setting_of_it():
    class Doubling(Flow):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    flow = Doubling(MLPField(3), depth=3)
    *_, last = flow.part(0, 2).steps(VECTORS)
    assert torch.equal(flow.part(0, 2)(VECTORS), 2 * last.x1)

    class Scaled(Flow):
        def __init__(self, *args, scale=1.0, **settings):
            super().__init__(*args, **settings)
            self.scale = scale

    with pytest.raises(TypeError, match="Scaled has settings of its own, which a part would lack: let it define part"):
        Scaled(MLPField(3), depth=3, scale=2.0).part(0, 2)


def test_the_whole_of_a_shared_flow_is_a_part():
    flow = Flow(MLPField(3), solver="bs23", total_time=2.0, shared=True, depth=3)
    part = flow.part(0, flow.depth)
    assert torch.equal(part(VECTORS), flow(VECTORS))
    assert part.h == flow.h


@pytest.mark.parametrize("blocks", [(), (MLPField(3),)])
def test_what_is_no_block_is_refused(blocks):
    got = "MLPField" if blocks else "none"
    for make in (Flow, Flow.of, Flow(MLPField(3)).replace_blocks):
        with pytest.raises(TypeError, match=rf"odenets.Block, Block\(\[field\], h\), got {got}"):
            make(blocks)


def test_step_sizes_of_blocks_are_their_own_unless_one_is_shared():
    block = Block([MLPField(3)], 0.5)
    with pytest.raises(ValueError, match=r"h must be each block's own, \(0.5,\), .* got \(0.25,\)"):
        Flow.of([block], [0.25])
    assert Flow.of([block], (0.5,)).h == (0.5,)
    assert Flow.of([block], [0.25, 0.5], shared=True).h == (0.25, 0.5)


def test_a_flow_without_a_field_has_no_parts():
    with pytest.raises(ValueError, match="call it once before it is cut"):
        Flow(depth=2).part(0, 2)


def test_a_field_made_in_inference_mode_can_be_trained():
    flow = Flow(depth=2)
    with torch.inference_mode():
        flow(VECTORS)
    flow(VECTORS).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_a_field_made_under_autocast_has_weights_of_full_precision():
    flow = Flow(depth=2)
    with torch.autocast("cpu", torch.bfloat16):
        flow(VECTORS.bfloat16())
    assert {p.dtype for p in flow.parameters()} == {torch.float32}
    flow = Flow(depth=2)
    flow(VECTORS.bfloat16())
    assert {p.dtype for p in flow.parameters()} == {torch.bfloat16}


def test_a_refused_first_input_leaves_a_lazy_flow_as_it_was():
    flow = Flow()
    with pytest.raises(ValueError, match="no default field"):
        flow(torch.rand(2, 3, 4))
    assert flow(torch.rand(2, 3)).shape == (2, 3)
    assert flow.input_shape == (3,)


def test_lazy_flow_shows_that_it_has_no_field_yet():
    flow = Flow()
    assert all(nn.parameter.is_lazy(p) for p in flow.parameters())
    flow(VECTORS.double())
    assert all(p.dtype == torch.float64 for p in flow.parameters())
    assert flow.input_shape == (3,)
    assert not any(nn.parameter.is_lazy(p) for p in copy.deepcopy(flow).parameters())


def test_step_sizes_travel_with_the_state():
    flow, other = Flow(MLPField(3), depth=2, h=[0.3, 0.7]), Flow(MLPField(3), depth=2)
    other.load_state_dict(flow.state_dict())
    assert other.h == (0.3, 0.7)
    assert torch.equal(other(VECTORS), flow(VECTORS))
    with pytest.raises((ValueError, RuntimeError)):
        Flow(MLPField(3), depth=3).load_state_dict(flow.state_dict())


def test_step_sizes_of_a_state_reach_shared_and_lazy_flows():
    flow, other = (Flow(MLPField(3), total_time=total, shared=True, depth=2) for total in (3.0, 1.0))
    other.load_state_dict(flow.state_dict())
    assert other.h == flow.h
    assert torch.equal(other(VECTORS), flow(VECTORS))
    lazy = Flow(depth=2)
    lazy.set_extra_state(torch.tensor([0.3, 0.7]))
    lazy(VECTORS)
    assert lazy.h == pytest.approx((0.3, 0.7))


@pytest.mark.parametrize(
    "settings", [{}, {"shared": True}, {"stage_fields": "untied", "solver": "rk4"}, {"stage_fields": "chained"}]
)
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_an_optimizer_built_before_the_first_batch_trains_the_field(settings, shape):
    x, flow = torch.randn(8, *shape), Flow(depth=3, **settings)
    held = [*flow.parameters()]
    optimizer = torch.optim.Adam(held, 0.1)
    copy.deepcopy(flow)
    assert not any(key.startswith("blocks") for key in flow.state_dict())
    flow(x)
    parameters = [*flow.parameters()]
    assert {*map(id, parameters)} <= {*map(id, held)}
    assert not any(map(torch.nn.parameter.is_lazy, held))
    before = [p.clone() for p in parameters]
    flow.record(x, readout="ensemble")[0].square().sum().backward()
    torch.nn.utils.clip_grad_norm_(held, 1.0)
    optimizer.step()
    assert all(p.grad is not None and not torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_lazy_flow_draws_the_fields_that_a_flow_of_its_field_draws():
    torch.manual_seed(3)
    lazy = Flow(depth=2)
    lazy(VECTORS)
    torch.manual_seed(3)
    flow = Flow(MLPField(3), depth=2)
    assert torch.equal(lazy(VECTORS), flow(VECTORS))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_for_a_flow_without_a_field_names_what_makes_it(strict):
    net = nn.Sequential(nn.Linear(3, 3), Flow(depth=2))
    net(VECTORS)
    fresh = nn.Sequential(nn.Linear(3, 3), Flow(depth=2))
    with pytest.raises(RuntimeError, match=r"flow '1' has no field yet: call the network once.*odenets.load_weights"):
        fresh.load_state_dict(net.state_dict(), strict=strict)
    fresh.load_state_dict(nn.Sequential(nn.Linear(3, 3), Flow(depth=2)).state_dict())
    fresh(VECTORS)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(VECTORS), net(VECTORS))
