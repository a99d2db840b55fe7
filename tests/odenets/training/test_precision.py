import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch.nn import functional as F

from odenets.least_action import ActionPenalty, LeastAction
from odenets.training.loop import fit
from odenets.training.runs import Run
from tests.counting import NoDouble
from tests.odenets.checks import assert_same
from tests.odenets.training.small import TENS, on_cpu, sgd, tiny, trained

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def test_mixed_precision_trains_with_measures_in_float32(parts):
    seen, calls = [], []

    class Seeing(LeastAction):
        def loss(self, network, batch, output, records):
            if not seen:
                conv = network.flows[0].blocks[0].fields[0].conv1
                conv.register_forward_hook(lambda m, i, out: calls.append(out.dtype))
            seen.append({records["action"].dtype, output.dtype})
            return super().loss(network, batch, output, records)

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    objective = Seeing(update="after")
    half = trained(parts, 2, objective=objective, fabric=fabric, validation=None)
    full = trained(parts, 2, objective=LeastAction(update="after"))
    assert seen[0] == {torch.float32}
    assert set(calls) == {torch.bfloat16}
    assert not torch.equal(next(half.network.parameters()), next(full.network.parameters()))
    assert all(p.dtype == torch.float32 for p in half.network.parameters())
    assert half.rows[-1]["train_loss"] == pytest.approx(full.rows[-1]["train_loss"], rel=0.05)


@pytest.mark.parametrize(
    ("precision", "objective"),
    [
        ("64-true", lambda: LeastAction(update="after", every=2)),
        ("bf16-true", LeastAction),
        ("16-true", lambda: LeastAction(update="after", every=2)),
        ("16-true", lambda: ActionPenalty(0.1, cost="norm")),
    ],
)
def test_true_precisions_train_and_validate_as_a_network_of_that_dtype_does(precision, objective):
    """With parts of batches, clipping and validation; once converted by Fabric, once a network of the dtype."""
    converted, direct = tiny(norm="batch"), tiny(DTYPES[precision], norm="batch")
    options = {"epochs": 2, "optimizer": sgd, "validation": TENS, "clip_norm": 1.0, "accumulate": 2}
    one, two = [fit(converted, TENS, **options, objective=objective(), fabric=on_cpu(precision)),
             fit(direct, TENS, **options, objective=objective())]  # fmt: skip
    assert one.rows[1]["train_loss"] == pytest.approx(two.rows[1]["train_loss"], rel=1e-3)
    assert one.rows[1]["validation_loss"] < one.rows[0]["train_loss"]
    for p, q in zip(converted.parameters(), direct.parameters(), strict=True):
        assert p.dtype == q.dtype == DTYPES[precision]
        torch.testing.assert_close(p, q, rtol=0, atol=0.02 if precision != "64-true" else 1e-12)


@pytest.mark.parametrize("fabric", [None, "64-true"])
def test_a_training_in_float64_is_one_throughout(fabric):
    """Outputs, losses and costs in float32 would show at 1e-8."""
    one, two = tiny(torch.float64 if fabric is None else torch.float32), tiny(torch.float64)
    objective = ActionPenalty(0.5)
    fit(one, TENS, epochs=2, optimizer=sgd, objective=objective, fabric=fabric and on_cpu(fabric))
    optimizer = sgd(two.parameters())
    for x, y in (batch for epoch in range(2) for batch in TENS.epoch(epoch)):
        x = x.double()
        cost = sum((step.x1 - step.x0).square().mean() for step in two.steps(x))
        optimizer.zero_grad()
        (F.cross_entropy(two(x), y) + 0.5 * cost).backward()
        optimizer.step()
    assert_same(one, two, atol=1e-13)


def test_a_resumed_training_goes_on_with_the_scale_of_its_losses(tmp_path):
    """Which doubles every three steps; also one that goes back to the snapshot from before an epoch."""

    def scaling():
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    run, whole, resumed = Run(tmp_path / "run", {}), tiny(), tiny()
    training = fit(whole, TENS, epochs=3, optimizer=sgd, fabric=scaling())
    fit(tiny(), TENS, epochs=1, optimizer=sgd, fabric=scaling(), run=run)
    again = fit(resumed, TENS, epochs=3, optimizer=sgd, fabric=scaling(), run=run)
    assert_same(whole, resumed)
    assert training.precision.state_dict() == again.precision.state_dict()
    assert training.precision.state_dict()["scale"] == 16.0
    before = training.snapshot()
    training.precision.scaler.update(1.0)
    training.load_state_dict(before, sgd)
    assert training.precision.state_dict()["scale"] == 16.0


def test_mixed_precision_of_a_float64_network_is_refused():
    with pytest.raises(ValueError, match="precision 'bf16-mixed' mixes float32 weights"):
        fit(tiny(torch.float64), TENS, epochs=1, optimizer=sgd, fabric=on_cpu("bf16-mixed"))


@pytest.mark.parametrize("update", ["before", "after"])
def test_a_device_without_float64_trains_and_validates(update):
    outside, objective = LeastAction(update=update), LeastAction(update=update)
    expected = fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=outside, validation=TENS)
    with NoDouble():
        training = fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=objective, validation=TENS)
    assert objective.multiplier.dtype == torch.float32
    assert objective.multiplier.item() == pytest.approx(outside.multiplier.item(), rel=1e-5)
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        assert training.rows[0][name] == pytest.approx(expected.rows[0][name], rel=1e-5)
