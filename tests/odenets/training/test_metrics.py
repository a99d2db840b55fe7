"""Metrics of an epoch: means over samples, and objects that compute of all samples together."""

from functools import partial

import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import r2_score
from torch import nn
from torch.nn import functional as F

from odenets import Flow, Network
from odenets.module_wise import fit_modules, split_into_modules
from odenets.training import Task, evaluate, fit, fit_instances

torchmetrics = pytest.importorskip("torchmetrics")
from torchmetrics.regression import PearsonCorrCoef, R2Score  # noqa: E402

X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, :1] * X[:, 1:2] + X[:, 2:]).contiguous()
BATCHES = [*zip(X.split(16), Y.split(16), strict=True)]  # the last is smaller
STILL = partial(torch.optim.SGD, lr=0.0)


class Explained:
    """R2 by its definition, of one's own and without a device."""

    def reset(self):
        self.seen = []

    def update(self, output, targets):
        self.seen.append((output.double(), targets.double()))

    def compute(self):
        output, targets = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        return 1 - ((output - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()


class Correlation(PearsonCorrCoef):
    """Of columns."""

    def update(self, preds, target):
        super().update(preds[:, 0], target[:, 0])


def network():
    torch.manual_seed(0)
    return Network(nn.Linear(3, 8), Flow(solver="euler", depth=2), nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("metric", "truth"),
    [
        (R2Score(), lambda output: r2_score(Y, output)),
        (Explained(), lambda output: r2_score(Y, output)),
        (Correlation(), lambda output: pearsonr(Y[:, 0], output[:, 0]).statistic),
    ],
)
def test_what_gathers_is_exact_of_batches_of_different_sizes(metric, truth):
    net = network()
    fit(net, BATCHES, epochs=3, optimizer=partial(torch.optim.Adam, lr=0.01), objective=Task(F.mse_loss))
    options = {"objective": Task(F.mse_loss), "metric": metric}
    row = fit(net, BATCHES, epochs=1, optimizer=STILL, validation=BATCHES, **options).rows[0]
    name = type(metric).__name__
    with torch.no_grad():
        expected = truth(net(X).numpy())
    assert abs(expected) > 0.01
    for value in (row[f"train_{name}"], row[f"validation_{name}"], evaluate(net, BATCHES, **options).metric):
        assert value == pytest.approx(expected, abs=1e-5)


def test_each_epoch_is_of_its_own_and_the_object_is_left_as_it_was():
    metric = R2Score()
    training = fit(network(), BATCHES, epochs=2, optimizer=STILL, objective=Task(F.mse_loss), metric=metric)
    assert training.rows[0]["train_R2Score"] == training.rows[1]["train_R2Score"]
    assert not metric.update_called


def test_each_module_gathers_for_itself():
    modules = split_into_modules(network(), 2, X[:4], outputs=1)
    options = {"objective": lambda k, K: Task(F.mse_loss), "metric": R2Score()}
    for order in ("parallel", "sequential", "end-to-end"):
        training = fit_modules(modules, BATCHES, epochs=1, optimizer=STILL, order=order, validation=BATCHES, **options)
        for row in training.rows:
            with torch.no_grad():
                expected = r2_score(Y, modules(X, module=row["module"]))
            assert row["train_R2Score"] == pytest.approx(expected, abs=1e-5)
            assert row["validation_R2Score"] == pytest.approx(expected, abs=1e-5)
    values = [r2_score(Y, modules(X, module=k).detach()) for k in (1, 2)]
    assert modules.evaluate(BATCHES, metric=R2Score()) == pytest.approx(values, abs=1e-5)


def test_each_instance_gathers_for_itself():
    networks = [network(), network()]
    nn.init.zeros_(networks[1].head.weight)
    result = fit_instances(
        networks, [BATCHES] * 2, epochs=1, optimizer=STILL, objective=partial(Task, F.mse_loss), metric=R2Score(),
        measured={"all": [(X, Y)] * 2},
    )  # fmt: skip
    expected = [r2_score(Y, net(X).detach()) for net in networks]
    assert result.metric["all"][:, -1].tolist() == pytest.approx(expected, abs=1e-5)


def test_what_computes_no_number_is_named():
    class Pair(Explained):
        def compute(self):
            return {"one": 1.0}

    with pytest.raises(TypeError, match="metric must compute a number, but Pair computes dict"):
        evaluate(network(), BATCHES, objective=Task(F.mse_loss), metric=Pair())
    with pytest.raises(ValueError, match="at least two samples") as caught:
        evaluate(network(), [(X[:1], Y[:1])], objective=Task(F.mse_loss), metric=R2Score())
    assert "in metric 'R2Score', which is to compute" in caught.value.__notes__[-1]
