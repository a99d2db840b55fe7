"""Objectives in Lightning's Trainer and Hugging Face's: the same steps, the same lambda, also after a resume."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from odenets.least_action import LeastAction
from tests.odenets.checks import assert_same
from tests.odenets.training.small import IMAGES, TWENTY, tiny

BATCHES = [(IMAGES[i : i + 5], TWENTY.y[i : i + 5]) for i in range(0, 20, 5)]


def by_hand(epochs, parts=1, **options):
    """The network and objective that plain steps give, parts of batches at a time."""
    network, objective = tiny(), LeastAction(**options)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(epochs):
        for i, (x, y) in enumerate(BATCHES, 1):
            (objective(network, x, y) / parts).backward()
            if i % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
    objective.state_dict()
    return network, objective


def assert_agree(network, objective, expected):
    assert_same(network, expected[0], 1e-5, 1e-6)
    assert objective.steps == expected[1].steps
    torch.testing.assert_close(objective.multiplier, expected[1].multiplier, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def lightning():
    return pytest.importorskip("pytorch_lightning")


def module_of(lightning, **options):
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.objective = tiny(), LeastAction(**options)

        def training_step(self, batch, number):
            return self.objective(self.network, *batch)

        def validation_step(self, batch, number):
            self.objective(self.network, *batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.network.parameters(), 1e-3, weight_decay=0.0)

    return Classifier()


def fit_by_lightning(lightning, folder, module, epochs, parts=1, **options):
    loader = DataLoader(TensorDataset(IMAGES, TWENTY.y), 5)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, accumulate_grad_batches=parts, default_root_dir=folder,
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=folder / "half.ckpt" if (folder / "half.ckpt").exists() else None)
    return trainer


IN_LIGHTNING = [
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The 'val_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
]


def quiet(test):
    for message in IN_LIGHTNING:
        test = pytest.mark.filterwarnings(message)(test)
    return test


@quiet
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("update", ["before", "next", "after"])
def test_lightning_trains_as_a_plain_loop(lightning, tmp_path, update, parts):
    module = module_of(lightning, update=update)
    fit_by_lightning(lightning, tmp_path, module, 2, parts, enable_checkpointing=False)
    module.objective.state_dict()
    assert_agree(module.network, module.objective, by_hand(2, parts, update=update))


@quiet
@pytest.mark.parametrize("update", ["before", "after"])
def test_lightning_resumes_with_its_lambda(lightning, tmp_path, update):
    first = module_of(lightning, update=update)
    fit_by_lightning(lightning, tmp_path, first, 1, enable_checkpointing=False).save_checkpoint(tmp_path / "half.ckpt")
    module = module_of(lightning, update=update)
    fit_by_lightning(lightning, tmp_path, module, 3, enable_checkpointing=False)
    module.objective.state_dict()
    assert_agree(module.network, module.objective, by_hand(3, update=update))


@quiet
def test_lightning_closures_of_lbfgs_are_one_step(lightning, tmp_path):
    module = module_of(lightning)
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.network.parameters(), 0.01, max_iter=5)
    fit_by_lightning(lightning, tmp_path, module, 1, enable_checkpointing=False)
    assert module.objective.state_dict()["_extra_state"] == len(BATCHES)


class Samples(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return {"x": IMAGES[i], "labels": TWENTY.y[i]}


class WithLoss(nn.Module):
    """What Hugging Face's Trainer trains: it returns its loss, and logits to evaluate."""

    def __init__(self, network, objective):
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, x, labels):
        output, records = self.network.record(x, **self.objective.measures)
        return {"loss": self.objective.loss(self.network, (x, labels), output, records), "logits": output}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


def fit_by_transformers(transformers, folder, model, epochs, parts=1, resume=False, **options):
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *arguments):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=5, gradient_accumulation_steps=parts,
        learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="epoch", use_cpu=True,
        report_to=[], disable_tqdm=True, eval_strategy="epoch", **options,
    )  # fmt: skip
    trainer = InOrder(model, arguments, train_dataset=Samples(), eval_dataset=Samples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@quiet
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("parts", [1, 2])
def test_hugging_face_trains_as_a_plain_loop(transformers, tmp_path, optim, parts):
    model = WithLoss(tiny(), LeastAction())
    trainer = fit_by_transformers(transformers, tmp_path, model, 2, parts, optim=optim)
    model.objective.state_dict()
    assert_agree(model.network, model.objective, by_hand(2, parts))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@quiet
def test_hugging_face_resumes_with_its_lambda(transformers, tmp_path):
    fit_by_transformers(transformers, tmp_path, WithLoss(tiny(), LeastAction()), 1)
    model = WithLoss(tiny(), LeastAction())
    fit_by_transformers(transformers, tmp_path, model, 3, resume=True)
    model.objective.state_dict()
    assert_agree(model.network, model.objective, by_hand(3))
