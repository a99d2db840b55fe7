"""A flow without a field, where other libraries hold its parameters before its first batch."""

import pytest
import torch
from torch import nn

from odenets import Flow

X = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
Y = (X.norm(dim=1) > 1).long()


def network():
    return nn.Sequential(nn.Linear(2, 8), Flow(depth=3), nn.Linear(8, 2))


@pytest.mark.filterwarnings("ignore")  # of Lightning itself
def test_under_lightning_too():
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.02)

    torch.manual_seed(0)
    classifier = Classifier()
    held = list(classifier.parameters())
    trainer = lightning.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(classifier, torch.utils.data.DataLoader([*zip(X, Y, strict=True)], 32))
    assert {*classifier.parameters()} <= {*held}
    assert nn.functional.cross_entropy(classifier.network(X), Y) < 0.6  # a linear network has 0.69


def test_moved_before_its_first_batch_it_is_of_the_kind_of_that():
    flow = Flow().double()
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    flow(X.double())
    assert {p.dtype for p in flow.parameters()} == {torch.float64}


def test_frozen_before_its_first_batch_it_stays_so():
    net = network()
    for p in net[1].parameters():
        p.requires_grad = False
    net(X).sum().backward()
    assert all(p.grad is None for p in net[1].parameters())
