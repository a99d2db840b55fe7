import pytest

from odenets.adapting import adapt
from odenets.adapting.cutting.cut import cut_adapted
from tests.odenets.adapting.models import SMALL, Repeated, small_resnet
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling, Unit


def test_to_be_cut_leaves_each_module_its_mode():
    adapted = adapt(small_resnet(), SMALL)
    adapted.model.bn1.eval()
    adapted.model.layer2.eval()
    with unchanged(adapted.model):
        parts, head = cut_adapted(adapted, [2, 4])
    assert all(part.training for part in (*parts, head))
    assert not parts[0].eval().model.training


def test_a_model_that_repeats_a_block_is_not_cut():
    adapted = adapt(Repeated(2), blocks=["block", "other"])
    with pytest.raises(ValueError, match="does not call its blocks once each"):
        cut_adapted(adapted, [1, 2])


@pytest.mark.parametrize(("name", "called"), [("layer2", "'layer2'"), ("", "ResNet")])
def test_a_model_with_hooks_outside_its_blocks_is_not_cut(name, called):
    adapted, inputs = adapt(small_resnet(), SMALL), []
    hook = adapted.model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args))
    with pytest.raises(ValueError, match=f"{called} has hooks, which would be lost where it is cut: make what they do"):
        cut_adapted(adapted, [2, 4])
    assert not inputs
    hook.remove()
    cut_adapted(adapted, [2, 4])


@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [
        (lambda model, x: model.block(x) if x.sum() > 0 else x, ValueError, "Calling cannot be cut: torch.fx cannot"),
        (lambda model, x: model.block(x) + len(x), ValueError, "Calling cannot be cut: torch.fx cannot trace"),
        (lambda model, x: model.block(x) + sum(range(x.ndim)), ValueError, "cannot be cut"),
        (lambda model, x: model.block({"cpu": x}[x.device.type]), ValueError, "cannot be cut"),
        (lambda model, x: model.blok(x), AttributeError, "has no attribute 'blok'"),
    ],
)
def test_what_tracing_cannot_follow_is_told_from_a_mistake(forward, error, message):
    with pytest.raises(error, match=message):
        cut_adapted(adapt(Calling(forward, block=Unit(3, 3)), blocks=["block"]), [1])
