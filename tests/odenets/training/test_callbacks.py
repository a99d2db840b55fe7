"""Callbacks: functions, early stopping, best weights, and the loggers of a Fabric."""

import csv
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger

from odenets.depth import AdaptiveDepth, DepthRule
from odenets.training import BestWeights, EarlyStopping, Run, evaluate, fit
from tests.odenets.checks import assert_same
from tests.odenets.training.small import TENS, sgd, tiny

LOSSES = [5.0, 3.0, 4.0, 3.5, 2.0, 9.0, 9.5, 9.9]


class Losing:
    """Puts losses of ours in the rows, as they would be validated."""

    def after_validation(self, training, row):
        row["quantity"] = LOSSES[training.epoch - 1]


def test_a_function_is_a_callback_and_may_end_the_training():
    seen = []

    def look(training, row):
        seen.append(row["epoch"])
        row["twice"] = 2 * row["train_loss"]
        training.stop = row["epoch"] == 2

    training = fit(tiny(), TENS, epochs=5, optimizer=sgd, callbacks=[look])
    assert seen == [1, 2]
    assert training.rows[1]["twice"] == 2 * training.rows[1]["train_loss"]


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"patience": 1}, 3), ({"patience": 2}, 4), ({"patience": 3}, 8), ({"patience": 3, "min_delta": 1.5}, 5)],
)
def test_a_training_ends_after_epochs_without_a_better_value(options, epochs):
    stopping = EarlyStopping("quantity", mode="min", **options)
    training = fit(tiny(), TENS, epochs=8, optimizer=sgd, callbacks=[Losing(), stopping])
    assert training.epoch == epochs
    assert stopping.best == min(LOSSES[: epochs - stopping.waited])


def test_the_mode_follows_from_the_name_of_a_loss_or_an_accuracy():
    assert EarlyStopping("train_accuracy").mode == BestWeights("validation_accuracy").mode == "max"
    assert EarlyStopping().mode == "min"
    with pytest.raises(ValueError, match=r"mode must be 'min' or 'max', and given where .* got None for 'depth'"):
        EarlyStopping("depth")
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match=r"quantity must be one of the row, .*train_loss.*: give validation="):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, callbacks=[EarlyStopping()])


def test_a_resumed_training_counts_on_and_ends_where_it_ended(tmp_path):
    def callbacks():
        return [Losing(), EarlyStopping("quantity", mode="min", patience=2), BestWeights("quantity", mode="min")]

    whole, resumed = tiny(), tiny()
    ended = fit(whole, TENS, epochs=8, optimizer=sgd, callbacks=callbacks())
    run = Run(tmp_path / "run", {})
    fit(tiny(), TENS, epochs=3, optimizer=sgd, callbacks=callbacks(), run=run)
    training = fit(resumed, TENS, epochs=8, optimizer=sgd, callbacks=callbacks(), run=run)
    assert training.epoch == ended.epoch == 4
    assert_same(whole, resumed)
    again = tiny()
    assert fit(again, TENS, epochs=8, optimizer=sgd, callbacks=callbacks(), run=run).epoch == 4
    assert_same(whole, again)
    patient = [Losing(), EarlyStopping("quantity", mode="min", patience=3), BestWeights("quantity", mode="min")]
    assert fit(tiny(), TENS, epochs=6, optimizer=sgd, callbacks=patient, run=run).epoch == 6
    with pytest.raises(
        ValueError, match=r"callbacks must be those of the checkpoint, .*'EarlyStopping', 'BestW.* \[\]"
    ):
        fit(tiny(), TENS, epochs=8, optimizer=sgd, run=run)


def test_a_callback_begins_anew_in_another_training():
    """The first training ends with no better value for as long as the second would wait."""
    stopping, best = EarlyStopping("quantity", mode="min", patience=2), BestWeights("quantity", mode="min")
    for _ in range(2):
        training = fit(tiny(), TENS, epochs=8, optimizer=sgd, callbacks=[Losing(), stopping, best])
        assert (training.epoch, stopping.best, stopping.epoch, best.epoch) == (4, 3.0, 2, 2)
    other = tiny()
    fit(other, TENS, epochs=1, optimizer=sgd, callbacks=[Losing(), best])
    assert (best.best, best.epoch) == (5.0, 1)  # though 3 was the best of another training
    last = tiny()
    best.load_into(last)
    assert_same(last, other)


def test_the_best_weights_are_those_that_were_validated_across_depth_edits(tmp_path):
    """The depth doubles after each epoch; whichever callback comes first."""
    networks = []
    for first in (True, False):
        best = BestWeights("quantity", mode="min")
        adaptive = AdaptiveDepth(DepthRule(1e-9, max_depth=16), TENS.inputs)
        callbacks = [Losing(), best, adaptive] if first else [Losing(), adaptive, best]
        net = tiny(solver="bs23", depth=1)
        training = fit(net, TENS, epochs=4, optimizer=sgd, callbacks=callbacks, validation=TENS)
        assert best.epoch == 2
        assert net.depth == training.rows[1]["depth"] == 2
        assert evaluate(net, TENS).loss == training.rows[1]["validation_loss"]
        networks.append(net)
    assert_same(*networks)


def test_best_weights_may_be_kept_beside_the_last_ones():
    best, net = BestWeights("quantity", mode="min", restore=False), tiny()
    with pytest.raises(ValueError, match="no epoch was trained"):
        best.load_into(net)
    training = fit(net, TENS, epochs=4, optimizer=sgd, callbacks=[Losing(), best], validation=TENS)
    assert evaluate(net, TENS).loss == training.rows[3]["validation_loss"]
    other = tiny()
    best.load_into(other)
    assert evaluate(other, TENS).loss == training.rows[1]["validation_loss"]


def test_rows_are_in_a_csv_file_whole_after_a_resume_too(tmp_path):
    def logged(name, epochs, run):
        fabric = Fabric(accelerator="cpu", devices=1, loggers=[CSVLogger(tmp_path, name=name)])
        return fit(tiny(), TENS, epochs=epochs, optimizer=sgd, validation=TENS, run=run, fabric=fabric)

    run = Run(tmp_path / "run", {})
    logged("begun", 1, run)
    training = logged("resumed", 3, run)
    with next((tmp_path / "resumed").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    for name in ("train_loss", "validation_accuracy", "learning_rate", "depth"):
        assert [float(row[name]) for row in rows] == [row[name] for row in training.rows]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_rows_from_before_a_resume_stay_in_a_csv_file_of_one_name(tmp_path):
    run = Run(tmp_path / "run", {})
    for epochs in (2, 3):
        fabric = Fabric(accelerator="cpu", devices=1, loggers=[CSVLogger(tmp_path, name="x", version="one")])
        fit(tiny(), TENS, epochs=epochs, optimizer=sgd, run=run, fabric=fabric)
    with (tmp_path / "x" / "one" / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3]


def test_a_row_with_other_columns_is_logged_too(tmp_path):
    def add(training, row):
        if row["epoch"] == 2:
            row["more"] = 1.5

    fabric = Fabric(accelerator="cpu", devices=1, loggers=[CSVLogger(tmp_path, name="x")])
    fit(tiny(), TENS, epochs=3, optimizer=sgd, callbacks=[add], fabric=fabric)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        assert [row["more"] for row in csv.DictReader(file)] == ["", "1.5", ""]


def test_rows_are_in_tensorboards_files(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning_fabric.loggers import TensorBoardLogger

    fabric = Fabric(accelerator="cpu", devices=1, loggers=[TensorBoardLogger(tmp_path)])
    training = fit(tiny(), TENS, epochs=2, optimizer=sgd, fabric=fabric)
    events = accumulator.EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert logged == [(row["epoch"], pytest.approx(row["train_loss"])) for row in training.rows]


class Saving:
    """Remembers how many epochs there were."""

    def __init__(self):
        self.count = torch.zeros(())

    def after_epoch(self, training, row):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_a_callback_of_ones_own_is_kept_in_the_checkpoint(tmp_path):
    run, one, two = Run(tmp_path / "run", {}), Saving(), Saving()
    train = partial(fit, tiny(), TENS, optimizer=sgd, run=run)
    train(epochs=1, callbacks=[one])
    train(epochs=3, callbacks=[two])
    assert two.count == 3
