"""Log-odds of attacks, beside the cross-entropy of torch in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets.detection import Attack, preset, run_attack
from odenets.detection.attacks.log_odds import LogOdds
from tests.odenets.detection.victims import victim


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_they_grow_with_the_cross_entropy_in_its_direction(reduction):
    z, y = (8 * torch.randn(50, 5, dtype=torch.float64)).requires_grad_(), torch.randint(5, (50,))
    each = LogOdds("none")(z, y)
    torch.testing.assert_close(F.softplus(each), F.cross_entropy(z, y, reduction="none"))
    loss = LogOdds(reduction)(z, y)
    torch.testing.assert_close(loss, {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction])
    (own,), (expected,) = torch.autograd.grad(loss.sum(), z), torch.autograd.grad(F.cross_entropy(z, y), z)
    torch.testing.assert_close(F.normalize(own), F.normalize(expected))


class Sure(nn.Module):
    """Logits times a gain."""

    def __init__(self, gain):
        super().__init__()
        self.network, self.gain = victim(), gain

    def forward(self, x):
        return self.gain * self.network(x)


def directions(gain, x, y):
    """Gradients in double precision of ``log sum exp`` of the other logits less that of the label."""
    moving = x.clone().requires_grad_()
    z = Sure(gain)(moving).double()
    d = torch.logsumexp(z.masked_fill(F.one_hot(y, 10).bool(), -torch.inf), 1) - z.gather(1, y[:, None])[:, 0]
    return torch.autograd.grad(d.sum(), moving)[0]


@pytest.mark.parametrize("gain", [4.0, 300.0])
def test_attacks_do_not_hang_on_how_sure_a_network_is(batch, gain):
    """At 4 softmax rounds to 1 in single precision, at 300 its gradient is 0."""
    x, y = batch
    assert Sure(gain)(x).softmax(1).amax(1).median() == 1
    result, gradient = run_attack(Sure(gain), preset("FGM", eps=0.1), x, y), directions(gain, x, y)
    clear = gradient.abs() > 1e-4 * gradient.abs().amax((1, 2, 3), keepdim=True)
    assert torch.equal((result.images - x)[clear].sign(), ((x + 0.1 * gradient.sign()).clamp(0, 1) - x)[clear].sign())
    ball = (("norm", 2), ("eps", 1.5))
    steps = (*ball, ("eps_step", 0.7), ("max_iter", 5), ("nb_random_init", 1))
    for attack in (
        Attack("FGM", ball),
        Attack("APGD", steps),
        Attack("APGD", (*steps, ("loss_type", "cross_entropy"))),
    ):
        assert run_attack(Sure(gain), attack, x, y).success_rate > 0.7


@pytest.mark.parametrize("batch_size", [1, 64])
def test_steps_go_on_where_the_loss_of_a_whole_batch_would_be_zero(batch, batch_size):
    x, y = batch
    steps = (("norm", 2), ("eps", 1.5), ("eps_step", 0.2), ("max_iter", 12), ("nb_random_init", 1))
    usual, sure = (run_attack(Sure(gain), Attack("APGD", steps), x, y, batch_size=batch_size) for gain in (1.0, 1e4))
    assert usual.success_rate > 0.9
    assert sure.success_rate > usual.success_rate - 0.05


def test_arts_own_loss_is_a_setting(batch, tmp_path):
    """It has no gradient where the network is sure, and its images are others on disk."""
    x, y = batch
    exact = run_attack(Sure(300.0), preset("FGM", eps=0.1), x, y, cache=tmp_path)
    with pytest.warns(UserWarning, match="FGM leaves .* images as they are"):
        rounded = run_attack(Sure(300.0), preset("FGM", eps=0.1, exact=False), x, y, cache=tmp_path)
    assert (exact.l2 > 0).all()
    assert (rounded.l2 == 0).any()
    assert len(list(tmp_path.iterdir())) == 2
    one = preset("FGM", eps=0.1, exact=True)
    assert torch.equal(run_attack(Sure(300.0), one, x, y, cache=tmp_path).images, exact.images)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(TypeError, match="exact of FGM must be True or False, got 1"):
        preset("FGM", exact=1)
    with pytest.raises(ValueError, match="CW has no setting exact"):
        preset("CW", exact=True)
