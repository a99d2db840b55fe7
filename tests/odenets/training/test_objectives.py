"""Objectives without measures."""

import math
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import measures, models
from odenets.least_action import ActionPenalty, LeastAction
from odenets.module_wise import greedy, trgl, trgl_multipliers
from odenets.recording import Recording, Records
from odenets.training import data, datasets
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit
from odenets.training.metrics import accuracy
from odenets.training.objectives import CrossEntropy, Objective, ReverseCrossEntropy, Task

GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.rand(3, 1, 8, 8, generator=GENERATOR), torch.tensor([0, 1, 2])


def value(objective, output, y):
    return objective.loss(torch.nn.Identity(), (output, y), output, Records({}))


def test_reverse_cross_entropy_is_that_with_reversed_labels():
    # Pang et al.: cross-entropy with the uniform distribution over the other classes, of the negated outputs
    output, y = torch.randn(4, 3, generator=GENERATOR), torch.tensor([0, 1, 2, 1])
    reversed_labels = (1 - F.one_hot(y, 3)) / 2
    torch.testing.assert_close(value(ReverseCrossEntropy(), output, y), F.cross_entropy(-output, reversed_labels))


OUTPUT, TARGETS = torch.randn(6, 1, generator=GENERATOR), torch.randn(6, generator=GENERATOR)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.mse_loss, "mse_loss"),
        (torch.nn.L1Loss(), "L1Loss"),
        (F.smooth_l1_loss, "smooth_l1_loss"),
        (lambda output, y: (output - y).square().mean(), "<lambda>"),
        (lambda output, y: torch.where(output > y, output - y, 0.0).mean(), "<lambda>"),
    ],
)
def test_outputs_and_targets_that_would_be_paired_with_each_other_are_refused(function, name):
    message = re.escape(f"shape of the output, (6, 1), got (6,), which {name} pairs with each other: pass targets y[:")
    with pytest.raises(ValueError, match=message):
        value(Task(function), OUTPUT, TARGETS)
    with pytest.raises(ValueError, match=r"got \(6, 1\), which .* such as y.view_as\(output\)"):
        value(Task(function), OUTPUT[:, 0], TARGETS[:, None])


@pytest.mark.parametrize(
    "function",
    [
        lambda output, y: F.mse_loss(output[:, 0], y),
        lambda output, y: F.mse_loss(output.squeeze(1), y),
        lambda output, y: F.mse_loss(output, y[:, None]),
        lambda output, y: F.mse_loss(output, y.view_as(output)),
        lambda output, y: (output.flatten() - y.to(output)).square().mean(),
    ],
)
def test_a_function_may_take_them_to_one_shape(function):
    expected = ((OUTPUT.numpy()[:, 0] - TARGETS.numpy()) ** 2).mean()
    assert value(Task(function), OUTPUT, TARGETS).item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_one_and_classes_are_no_pairs():
    assert value(Task(F.mse_loss), OUTPUT[:1], TARGETS[:1, None]).ndim == 0
    labels = torch.arange(6)
    assert value(Task(F.cross_entropy), torch.eye(6), labels).item() > 0
    assert value(Task(F.nll_loss), torch.eye(6), labels).item() == -1


def test_lambda_is_in_the_rows_and_in_what_an_objective_prints():
    objective = LeastAction(LeastAction(lambda0=2.0, tau=0.5), lambda0=3.0)
    assert objective.figures() == {"lambda": 3.0}
    assert "lambda=3, tau=1, every=1, update='before', cost='action'" in repr(objective)
    assert "lambda=2, tau=0.5" in repr(objective)
    assert "weight=0.1, cost='residue'" in repr(ActionPenalty(0.1, cost="residue"))
    assert "(tau=1" in repr(LeastAction().to("meta")).replace("\n  ", "")
    batches = [(BATCH[0], BATCH[1])]
    for make in (LeastAction, lambda: ActionPenalty(0.1, LeastAction())):
        objective = make()
        network = models.small_network(solver="euler", h=1.0, depth=1)
        rows = fit(network, batches, epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1), objective=objective).rows
        assert 1 < rows[0]["lambda"] < rows[1]["lambda"] == objective.figures()["lambda"]
    assert CrossEntropy().figures() == {}


@pytest.mark.parametrize("make", [LeastAction, partial(ActionPenalty, 0.1)])
def test_loss_and_cost_of_the_last_batch_of_training_can_be_logged(make):
    objective, network = make(), models.small_network(solver="euler", h=1.0, depth=2)
    assert objective.batch_figures() == {}
    objective(network, *BATCH)
    output, records = network.record(BATCH[0], action=measures.action)
    figures = objective.batch_figures()
    assert figures["batch_loss"] == pytest.approx(F.cross_entropy(output, BATCH[1]).item())
    assert figures["batch_cost"] == pytest.approx(records["action"].sum(0).mean().item())
    objective(network.eval(), BATCH[0][:2], BATCH[1][:2])
    assert objective.batch_figures() == figures
    assert not figures.keys() & objective.figures().keys()  # rows are of epochs, and of all processes


def test_the_least_reverse_cross_entropy_is_where_the_other_classes_are_equally_likely():
    output = torch.tensor([[40.0, 0.0, 0.0, 0.0]])  # softmax of its negative: 0 for the right class, a third each
    assert value(ReverseCrossEntropy(), output, torch.tensor([0])).item() == pytest.approx(math.log(3))


def test_a_network_trained_by_it_has_its_largest_output_at_the_right_class():
    train, test = datasets.load("digits")
    torch.manual_seed(0)
    network = models.small_network(solver="euler", h=1.0, depth=2)

    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    fit(network, data.Batches(train, 64, seed=0), epochs=4, optimizer=sgd, objective=ReverseCrossEntropy())
    assert evaluate(network, data.Batches(test, 100)).accuracy > 0.85


def test_label_smoothing_is_torch_s():
    output, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(value(CrossEntropy(0.1), output, y), F.cross_entropy(output, y, label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1"):
        CrossEntropy(1.0)


@pytest.mark.parametrize(
    "objective",
    [
        LeastAction(),
        LeastAction(update="after", cost="norm"),
        ActionPenalty(0.1, cost="residue"),
        ActionPenalty(0.1, LeastAction(), cost="residue"),
        trgl(1.0)(0, 2),
        trgl_multipliers(cost="norm")(1, 2),
        Objective({"error": measures.error}),
    ],
)
@pytest.mark.parametrize("recorded", [{}, {"displacement": measures.displacement}])
def test_measures_that_were_not_recorded_are_named(objective, recorded):
    network, (x, y) = models.small_network(solver="euler", h=1.0, depth=2), BATCH
    names = re.escape(str(list(objective.measures)))
    with pytest.raises(ValueError, match=rf"records must hold {names}, which .* reads, got") as error:
        objective.loss(network, (x, y), *network.record(x, **recorded))
    assert "network.record(x, **objective.measures)" in str(error.value)
    with pytest.raises(TypeError, match="records must hold measures by name, got tuple"):
        objective.loss(network, (x, y), network(x), ())


def test_an_objective_without_measures_needs_no_records():
    network, (x, y) = models.small_network(solver="euler", h=1.0, depth=2), BATCH
    assert greedy()(0, 2)(network, x, y) == F.cross_entropy(network(x), y)


@pytest.mark.parametrize("objective", [CrossEntropy(), CrossEntropy(0.1), ReverseCrossEntropy()])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_any_whole_numbers_are_classes(objective, dtype):
    output, y = torch.randn(5, 2, generator=GENERATOR), torch.tensor([0, 1, 1, 0, 1])
    assert torch.equal(value(objective, output, y.to(dtype)), value(objective, output, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shares_of_the_classes_are_labels_of_the_cross_entropy(dtype):
    output = torch.randn(6, 4, generator=GENERATOR).to(dtype)
    shares = torch.rand(6, 4, generator=GENERATOR).softmax(1)
    expected = -(shares.double() * output.double().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(value(CrossEntropy(), output, shares).double(), expected, rtol=1e-6, atol=1e-6)
    assert accuracy(output, shares).sum() == (output.argmax(1) == shares.argmax(1)).sum()


@pytest.mark.parametrize("objective", [CrossEntropy(), ReverseCrossEntropy()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_in_single(objective, dtype):
    output, y = torch.randn(7, 5, generator=GENERATOR).to(dtype), torch.arange(7) % 5
    torch.testing.assert_close(value(objective, output, y), value(objective, output.float(), y), rtol=0, atol=0)


LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("objective", [CrossEntropy(), ReverseCrossEntropy()])
@pytest.mark.parametrize(
    ("output", "y", "error", "message"),
    [
        ((torch.rand(3, 4), None), LABELS, TypeError, "the network must return logits.* got tuple"),
        ({"scores": torch.rand(3, 4)}, LABELS, TypeError, r"must return logits.* got dict: Task\(lambda output, y: F"),
        (
            {"logits": torch.rand(3, 5, 4)},
            LABELS,
            ValueError,
            r"got \(3, 5, 4\): Task\(lambda output, y: .*flatten\(0, 1",
        ),
        (torch.ones(3, 4, dtype=torch.long), LABELS, TypeError, "the network must return logits.* got torch.int64"),
        (torch.rand(3), LABELS, ValueError, r"logits \(B, classes\) of two classes or more, got \(3,\)"),
        (torch.rand(3, 1), LABELS * 0, ValueError, r"of two classes or more, got \(3, 1\)"),
        (torch.rand(3, 4, 2, 2), LABELS, ValueError, r"of two classes or more, got \(3, 4, 2, 2\)"),
        (torch.rand(3, 4), LABELS.float(), ValueError, r"labels must be classes \(B,\), whole numbers, or shares"),
        (torch.rand(3, 4), torch.rand(3, 3), ValueError, r"shares of all classes \(3, 4\), got torch.float32 \(3, 3\)"),
        (torch.rand(3, 4), LABELS[:2], ValueError, r"one class for each of 3 outputs, got \(2,\)"),
        (torch.rand(3, 4), LABELS[:, None], ValueError, r"one class for each of 3 outputs, got \(3, 1\)"),
        (torch.rand(3, 4), [0, 1, 2], TypeError, "labels must be a tensor, got list"),
    ],
)
def test_outputs_and_labels_that_fit_no_cross_entropy_are_named(objective, output, y, error, message):
    with pytest.raises(error, match=message):
        value(objective, output, y)


@pytest.mark.parametrize(("batch", "got"), [(LABELS, "Tensor"), ({"x": 1, "y": 2}, "dict"), ((1, 2, 3), "3 parts")])
def test_a_batch_that_is_no_pair_is_named(batch, got):
    for objective in (CrossEntropy(), ReverseCrossEntropy()):
        with pytest.raises(TypeError, match=rf"batch must be a pair \(inputs, targets\), got {got}"):
            objective.loss(torch.nn.Identity(), batch, torch.rand(3, 4), Records({}))


def test_shares_are_no_labels_of_the_reverse_cross_entropy():
    with pytest.raises(ValueError, match=r"whole numbers, got shares of the classes \(3, 4\)"):
        value(ReverseCrossEntropy(), torch.rand(3, 4), torch.rand(3, 4))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ([measures.action], r"measures must come by name, \{'action': action\}, got a list"),
        (measures.action, r"measures must come by name, \{'action': action\}, got a Measure"),
        ([], "measures must come by name"),
        ({"mine": 0.5}, r"measure 'mine' must be a function Step -> \(B,\), got float"),
        ({1: measures.action}, "measures must have names, got 1"),
    ],
)
@pytest.mark.parametrize("make", [Objective, partial(Recording, models.points_network())])
def test_measures_come_by_name(make, wrong, match):
    with pytest.raises(TypeError, match=match):
        make(wrong)


@pytest.mark.parametrize("function", [nn.CrossEntropyLoss(reduction="sum"), partial(F.mse_loss, reduction="sum")])
def test_a_loss_that_is_a_sum_is_refused(function):
    with pytest.raises(ValueError, match=r"function must return the mean over the batch.*reduction='mean'"):
        Task(function)
