"""Trainings of networks that take their inputs by keyword."""

import copy
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F
from torch.utils.data import DataLoader

from odenets import measures, models
from odenets.least_action import ActionPenalty, LeastAction
from odenets.training import CrossEntropy, Task, accuracy, evaluate, fit, fit_instances
from odenets.training.data import Batches
from odenets.training.sources import Source, part
from tests.odenets.keywords import Encoding, Reader, reader, sentences

INPUTS, LABELS = sentences(40)
SGD = partial(torch.optim.SGD, lr=0.5)


def logits(network, inputs=INPUTS):
    return network(**inputs)["logits"]


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_an_objective_takes_inputs_by_keyword(kind):
    network, action = reader(), measures.action
    loss = ActionPenalty(0.5)(network, kind(INPUTS), LABELS)
    output, records = network.record(**INPUTS, action=action)
    expected = F.cross_entropy(output["logits"], LABELS) + 0.5 * records["action"].sum(0).mean()
    torch.testing.assert_close(loss, expected)


def test_the_loss_that_a_network_computes_of_labels_among_its_inputs_is_not_used():
    network = reader()
    loss = CrossEntropy()(network, {**INPUTS, "labels": LABELS}, LABELS)
    torch.testing.assert_close(loss, F.cross_entropy(logits(network), LABELS))
    own = Task(lambda output, y: output["loss"])(network, {**INPUTS, "labels": LABELS}, None)
    torch.testing.assert_close(own, 1000 * loss)


@pytest.mark.parametrize("update", ["before", "next", "after"])
def test_lambda_grows_in_a_loop_of_ones_own(update):
    network, objective = reader(), LeastAction(lambda0=1.0, tau=0.5, every=2, update=update)
    optimizer = SGD(network.parameters())
    for _ in range(4):
        objective(network, INPUTS, LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.state_dict()["multiplier"] > 1
    assert objective.steps == 4


def test_fit_on_keywords_is_a_loop_of_ones_own():
    batches = [({name: x[i : i + 8] for name, x in INPUTS.items()}, LABELS[i : i + 8]) for i in range(0, 40, 8)]
    network = reader()
    own, optimizer = copy.deepcopy(network), None
    optimizer = SGD(own.parameters())
    for inputs, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(logits(own, inputs), y).backward()
        optimizer.step()
    fit(network, batches, epochs=1, optimizer=SGD)
    for p, q in zip(network.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_fit_takes_batches_as_tokenizers_make_them():
    rows = [{name: x[i] for name, x in INPUTS.items()} | {"labels": LABELS[i]} for i in range(40)]
    loader = DataLoader(
        rows, 16, collate_fn=lambda rows: Encoding({k: torch.stack([r[k] for r in rows]) for k in rows[0]})
    )

    def collate(batch):
        return Encoding({name: x for name, x in batch.items() if name != "labels"}), batch["labels"]

    network = reader()
    result = fit(
        network,
        loader,
        epochs=30,
        optimizer=SGD,
        objective=LeastAction(tau=1.0),
        validation=loader,
        collate=collate,
        accumulate=2,
    )
    assert result.rows[-1]["validation_accuracy"] > 0.9 > result.rows[0]["train_accuracy"]
    assert result.rows[-1]["lambda"] > 1
    evaluation = evaluate(network, loader, collate=collate)
    assert evaluation.accuracy == pytest.approx(result.rows[-1]["validation_accuracy"])
    with torch.no_grad():
        assert evaluation.loss == pytest.approx(F.cross_entropy(logits(network), LABELS).item(), rel=1e-5)
        assert evaluation.accuracy == pytest.approx(accuracy(network(**INPUTS), LABELS).mean().item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_batches_and_outputs_of_hugging_face_pass_in_any_precision(precision):
    transformers = pytest.importorskip("transformers")

    class Returning(Reader):
        def record(self, **inputs):
            output, records = super().record(**inputs)
            return transformers.modeling_outputs.SequenceClassifierOutput(**output), records

    torch.manual_seed(0)
    network, batches = Returning(), [(transformers.BatchEncoding(dict(INPUTS)), LABELS)] * 3
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    options = {"validation": batches, "fabric": fabric, "objective": LeastAction()}
    rows = fit(network, batches, epochs=5, optimizer=SGD, **options).rows
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert evaluate(network, batches).loss == pytest.approx(rows[-1]["validation_loss"], rel=0.02)


def test_floating_inputs_by_keyword_come_in_the_precision_of_the_network():
    source = Source.of([(Encoding(**INPUTS, scale=torch.ones(40)), LABELS)])
    source.move_to(reader().double())
    inputs, y = source.first()
    assert (inputs["input_ids"].dtype, inputs["scale"].dtype, y.dtype) == (torch.int64, torch.float64, torch.int64)
    fit(reader().double(), source, epochs=1, optimizer=SGD)


def test_a_part_of_a_batch_is_taken_of_inputs_by_keyword():
    inputs, y = part((dict(INPUTS), LABELS), slice(0, 3))
    assert [x.shape[0] for x in (*inputs.values(), y)] == [3, 3, 3]


def test_batches_that_hold_their_labels_are_told_how_to_part_them():
    with pytest.raises(
        TypeError, match=r'got Encoding with .*: give collate=lambda batch: \(\{name: x .*batch\["labels'
    ):
        fit(reader(), [Encoding(**INPUTS, labels=LABELS)], epochs=1, optimizer=SGD)


def test_an_error_says_of_which_shapes_a_batch_is():
    bad = {**INPUTS, "attention_mask": INPUTS["attention_mask"][:, :2]}
    with pytest.raises(RuntimeError) as error:
        fit(reader(), [(dict(INPUTS), LABELS), (bad, LABELS)], epochs=1, optimizer=SGD)
    assert "in batch 2 of batches, of 40 samples [(5,), (2,)]" in "".join(error.value.__notes__)


def test_where_inputs_come_by_position_a_mapping_is_refused():
    with pytest.raises(TypeError, match=r"inputs must come by position, x or \(x, \*args\), to a network that takes x"):
        fit(models.points_network(depth=1), [({"x": torch.rand(4, 2)}, LABELS[:4])], epochs=1, optimizer=SGD)
    networks = [models.points_network(depth=1) for _ in range(2)]
    batches = [[({"x": torch.rand(4, 2)}, LABELS[:4] % 2)]] * 2
    with pytest.raises(TypeError, match="must come by position"):
        fit_instances(networks, batches, epochs=1, optimizer=SGD, objective=CrossEntropy)
    with pytest.raises(TypeError, match="x must be a tensor, got Encoding"):
        Batches((INPUTS, LABELS), 4)
