import math

import pytest
import torch

from odenets import Flow, initialize
from odenets.fields import AttentionField, FeedForwardField
from tests.odenets.fields.published import check_step_is_block, randomize, take_weights


@pytest.mark.parametrize("heads", [1, 4])
def test_two_euler_steps_are_the_block_of_a_vision_transformer(heads):
    published = pytest.importorskip("torchvision").models.vision_transformer
    block = randomize(published.EncoderBlock(heads, 8, 32, 0.0, 0.0)).double()
    fields = iter([AttentionField(8, heads), FeedForwardField(8)])
    flow = Flow(lambda: next(fields), depth=2, solver="euler", h=1.0).double()
    take_weights(flow, block)
    check_step_is_block(flow, flow, block, torch.randn(3, 5, 8, dtype=torch.float64))


def test_attention_is_its_formula():
    field = AttentionField(6, heads=2, norm=None).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = (x @ field.project_in.weight.T + field.project_in.bias).split(6, -1)
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(3)
        heads.append(scores.softmax(-1) @ v[..., head])
    torch.testing.assert_close(field(0.0, x), field.project_out(torch.cat(heads, -1)))


@pytest.mark.parametrize("fused", [True, False])
def test_the_formula_has_the_derivatives_that_fused_attention_lacks(fused):
    """torch's has no second and no forward derivatives (pytorch/pytorch issues 116350 and 128971)."""
    field, formula = AttentionField(6, 2, fused=fused).double(), AttentionField(6, 2, fused=False).double()
    formula.load_state_dict(field.state_dict())
    x, u = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    x.requires_grad_()
    torch.testing.assert_close(field(0.0, x), formula(0.0, x))
    jacobian = torch.autograd.functional.jacobian(lambda x: formula(0.0, x), x.detach())
    expected = torch.einsum("bndBND,BND->bnd", jacobian, u)
    torch.testing.assert_close(torch.func.jvp(lambda x: field(0.0, x), (x,), (u,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, u)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(field(0.0, dual)).tangent, expected)
    each = torch.func.vmap(lambda x: field(0.0, x[None])[0])(x)
    torch.testing.assert_close(each, field(0.0, x))
    if not fused:
        (gradient,) = torch.autograd.grad(field(0.0, x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("make", [AttentionField, FeedForwardField])
@pytest.mark.parametrize("norm", ["layer", "group", "batch", None])
def test_places_of_images_are_tokens(make, norm):
    field = make(8, 2, norm=norm).eval()
    images = torch.randn(2, 8, 3, 4)
    tokens = images.reshape(2, 8, 12).transpose(1, 2)
    expected = field(0.0, tokens).transpose(1, 2).reshape(images.shape)
    torch.testing.assert_close(field(0.0, images), expected)


def test_the_order_of_tokens_does_not_matter():
    field, x = AttentionField(8, heads=2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    order = torch.randperm(5)
    torch.testing.assert_close(field(0.0, x[:, order]), field(0.0, x)[:, order])


def test_its_weights_are_drawn_by_initializers():
    weight = initialize(AttentionField(8, 2), "orthogonal").project_out.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(8))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="heads must divide features, got 3 and 8"):
        AttentionField(8, heads=3)
    with pytest.raises(ValueError, match=r"x must be tokens \(B, N, D\) or images .* got shape \(2, 8\)"):
        AttentionField(8)(0.0, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="norm must be 'group', 'layer', 'batch' or None"):
        FeedForwardField(8, norm="rms")
