"""A resumed training goes on as it was begun, or says what is another: settings, data, structure, a damaged file."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from odenets import MLPField, Network, NeuralODE
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.least_action import Cost, LeastAction
from odenets.training import CrossEntropy, Run, Task, fit
from odenets.training.descriptions import described_data
from tests.odenets.checks import assert_same
from tests.odenets.training.small import TENS, TWENTY, sgd, tiny


def cosine(optimizer):
    return schedulers.CosineAnnealingLR(optimizer, T_max=4)


def steps(optimizer):
    return schedulers.StepLR(optimizer, 2)


def in_turn(*makers):
    return lambda optimizer: schedulers.SequentialLR(optimizer, [make(optimizer) for make in makers], [1])


@pytest.mark.parametrize(
    ("begun", "now", "message"),
    [
        (cosine, steps, "CosineAnnealingLR, got StepLR"),
        (steps, schedulers.ReduceLROnPlateau, "StepLR, got ReduceLROnPlateau"),
        (
            in_turn(cosine, steps),
            in_turn(steps, cosine),
            r"SequentialLR\(CosineA\w+, StepLR\), got SequentialLR\(StepL",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # of torch, which SequentialLR calls so
def test_another_scheduler_is_refused(tmp_path, begun, now, message):
    run, options = Run(tmp_path / "run", {}), {"optimizer": sgd}
    fit(tiny(), TENS, epochs=1, run=run, lr_scheduler=begun, **options)
    with pytest.raises(ValueError, match=f"resume.pt: lr_scheduler must be that of the checkpoint, {message}"):
        fit(tiny(), TENS, epochs=2, run=run, lr_scheduler=now, **options)
    fit(tiny(), TENS, epochs=2, run=run, lr_scheduler=begun, **options)


def loader(x=TWENTY.x, size=10, **options):
    return DataLoader(TensorDataset(x, TWENTY.y[: len(x)]), size, **options)


def power(p):
    return LeastAction(cost=Cost(p=p))


def weighted(weight):
    return Task(nn.CrossEntropyLoss(label_smoothing=weight))


def always(output, y):
    return 1.0


ONE = {"batches": [(TWENTY.x, TWENTY.y)]}
LOADER, MARGIN = {"batches": loader()}, {"objective": Task(F.multi_margin_loss)}
FEWER, MOVED = TWENTY.subset(torch.arange(10)), replace(TWENTY, x=TWENTY.x + 1)
SETTINGS = [
    ({"batches": replace(TENS, seed=1)}, {}, "batches.seed=1 where it has 0"),
    ({"batches": replace(TENS, size=5)}, {}, "batches.size=5 where it has 10"),
    ({"batches": replace(TENS, flip=True)}, {}, "batches.flip=True where it has False"),
    ({"batches": replace(TENS, data=FEWER)}, {}, "batches.samples=10 where it has 20, .*x=10"),
    ({"batches": replace(TENS, data=MOVED)}, {}, r"batches.data.x=20 x .*checksum \w+\) where"),
    ({"batches": replace(TENS, data=replace(TWENTY, y=TWENTY.y.flip(0)))}, {}, r"batches.data.y=20 int64 \(checksum"),
    ({"batches": loader()}, {}, "batches=DataLoader where it has Batches"),
    ({"batches": loader(size=5)}, LOADER, "batches.batch_size=5 where it has 10"),
    ({"batches": loader(shuffle=True)}, LOADER, "batches.sampler=RandomSampler where it has Sequential"),
    ({"batches": loader(TWENTY.x + 1)}, LOADER, r"batches.dataset.tensors\[0\]=20 x"),
    ({"batches": loader(TWENTY.x[:10])}, LOADER, "batches.samples=10 where it has 20"),
    ({"batches": ONE["batches"] * 2}, ONE, "batches.length=2 where it has 1"),
    ({"validation": TENS}, {}, "validation=Batches where it has None"),
    ({"clip_norm": 1.0}, {}, "clip_norm=1.0 where it has None"),
    ({"accumulate": 2}, {}, "accumulate=2 where it has 1"),
    ({"lr_interval": "step"} | (begun := {"lr_scheduler": steps}), begun, "lr_interval=step where it has epoch"),
    ({"metric": always}, {}, "metric=always where it has accuracy"),
    ({"objective": CrossEntropy(0.1)}, {}, "objective.label_smoothing=0.1 where it has 0.0"),
    ({"objective": power(3.0)}, {"objective": power(2)}, r"objective.measures=\{action: <measure action, p=3.0"),
    ({"objective": LeastAction(CrossEntropy(0.1))}, {"objective": LeastAction()}, "objective.task.label_smoothing=0.1"),
    ({"objective": weighted(0.1)}, {"objective": weighted(0)}, "objective.function.label_smoothing=0.1 where it has 0"),
    ({"objective": Task(F.cross_entropy)}, MARGIN, "objective.function=cross_entropy"),
]  # fmt: skip


@pytest.mark.parametrize(("now", "begun", "message"), SETTINGS)
def test_what_is_another_than_it_began_with_is_named(tmp_path, now, begun, message):
    """And nothing is where nothing is."""
    options = {"optimizer": sgd, "batches": TENS, "run": Run(tmp_path / "run", {})}
    fit(tiny(), epochs=1, **options | begun)
    fit(tiny(), epochs=2, **options | begun)
    with pytest.warns(UserWarning, match=rf"resume.pt: .* than it began with, got .*{message}") as seen:
        fit(tiny(), epochs=3, **options | begun | now)
    assert [warning.filename for warning in seen] == [__file__]


def test_the_solver_of_a_neural_ode_is_one_of_its_settings(tmp_path):
    def make(steps):
        return Network(nn.Flatten(), NeuralODE(MLPField(64), steps=steps), nn.Linear(64, 10))

    run = Run(tmp_path / "run", {})
    fit(make(2), TENS, epochs=1, optimizer=sgd, run=run)
    fit(make(2), TENS, epochs=2, optimizer=sgd, run=run)
    with pytest.warns(UserWarning, match=r"steps=3, .* where it has .* steps=2"):
        fit(make(3), TENS, epochs=3, optimizer=sgd, run=run)


def test_no_batch_is_drawn_to_describe_data():
    class Refusing(list):
        def __iter__(self):
            raise AssertionError

        def __getitem__(self, index):
            raise AssertionError

    before = torch.get_rng_state()
    data = DataLoader(Refusing([1, 2, 3]), 2, shuffle=True)
    assert described_data(data, "batches")["batches.samples"] == 3
    assert described_data(iter([]), "batches")["batches.length"] is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_that_says_nothing_of_all_this_is_taken_up(tmp_path):
    """As one of an earlier version does."""
    run, options = Run(tmp_path / "run", {}), {"optimizer": sgd, "lr_scheduler": cosine}
    whole, resumed = tiny(), tiny()
    fit(whole, TENS, epochs=3, **options)
    fit(tiny(), TENS, epochs=1, run=run, **options)
    state = run.load_state()
    assert state is not None
    del state["described"], state["lr_scheduler"]["class"]
    for flow in state["structure"].values():
        del flow["solver"], flow["coefficients"], flow["stage_fields"]
    run.save_state(state)
    fit(resumed, TENS, epochs=3, run=run, **options)
    assert_same(whole, resumed)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"solver": "heun"}, "flow '_flows.0' must have the solver that it was saved with, euler, got heun"),
        ({"stage_fields": "untied"}, "must have the stage_fields that it was saved with, 'tied', got 'untied'"),
    ],
)
def test_other_steps_than_a_flow_took_are_refused(tmp_path, other, message):
    run = Run(tmp_path / "run", {})
    fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run)
    with pytest.raises(ValueError, match=f"resume.pt: .*{message}"):
        fit(tiny(**other), TENS, epochs=2, optimizer=sgd, run=run)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depth": 3}, "depth=3, h=1, and gets depth=2, h=1, as saved"),
        ({"h": 0.5}, "depth=2, h=0.5, and gets depth=2, h=1, as saved"),
    ],
)
def test_depth_and_step_sizes_that_do_not_hold_are_named(tmp_path, other, message):
    run, net = Run(tmp_path / "run", {}), tiny(**other)
    fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run)
    with pytest.warns(UserWarning, match=f"resume.pt: flow '_flows.0' has {message}") as seen:
        fit(net, TENS, epochs=2, optimizer=sgd, run=run)
    assert [warning.filename for warning in seen] == [__file__]
    assert net.h == (1.0, 1.0)


def test_a_depth_that_a_callback_changed_is_no_surprise(tmp_path):
    run, net = Run(tmp_path / "run", {}), tiny(solver="bs23")
    options = {"optimizer": sgd, "callbacks": [AdaptiveDepth(DepthRule(1e-9, max_depth=4), TENS.inputs)], "run": run}
    fit(tiny(solver="bs23"), TENS, epochs=1, **options)
    fit(net, TENS, epochs=2, **options)
    assert net.depth == 4


@pytest.mark.parametrize(
    "damage", [lambda x: b"", lambda x: b"e0: garbage", lambda x: x[: len(x) // 2], lambda x: x[1:]]
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, damage):
    run = Run(tmp_path / "run", {})
    fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run)
    path = run.folder / "resume.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint .*resume.pt is damaged \(.+\): .* delete it to begin anew"):
        fit(tiny(), TENS, epochs=2, optimizer=sgd, run=run)
    path.unlink()
    assert fit(tiny(), TENS, epochs=2, optimizer=sgd, run=run).epoch == 2


@pytest.mark.slow
def test_a_checkpoint_with_a_bit_flipped_is_refused_or_the_same(tmp_path):
    """Whatever torch is told of the checksums that it writes, and never reads."""
    run, state = Run(tmp_path / "run", {}), {"x": torch.randn(8), "rows": "[1, 2]", "epoch": 3}
    torch.serialization.set_crc32_options(False)
    try:
        run.save_state(state)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    path, refused = run.folder / "resume.pt", 0
    whole = path.read_bytes()
    for i in range(0, 8 * len(whole), 23):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        try:
            loaded = run.load_state()
        except ValueError:
            refused += 1
            continue
        assert torch.equal(loaded.pop("x"), state["x"])
        assert loaded == {key: value for key, value in state.items() if key != "x"}
    assert refused > 8 * 32 / 23  # of the numbers at least
