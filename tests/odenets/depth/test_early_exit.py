"""Samples leave behind the first head that is sure of them; what is computed is what the others need."""

import copy
import math
from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import odenets
from odenets.depth import EarlyExit, fit_heads, pooled_head
from odenets.depth.exit_heads import _fit_linear
from odenets.module_wise import fit_modules, linear_head, split_into_modules

X, Y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10


def network(depth=6, **options):
    return odenets.models.small_network(features=4, solver="euler", depth=depth, **options).eval()


def modules(K=3, **options):
    return split_into_modules(network(), K, X[:2], **({"head": pooled_head} | options))


class Seen(nn.Module):
    """Counts the samples that pass a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.samples = layer, 0

    def forward(self, t, x):
        self.samples += len(x)
        return self.layer(t, x)


def test_no_sample_leaves_early_without_a_threshold():
    whole = network()
    early = EarlyExit(split_into_modules(whole, 3, X[:2], head=pooled_head))
    logits, exit, cost = early(X)
    torch.testing.assert_close(logits, whole(X))
    assert (exit == 3).all()
    assert (cost == 6).all()


@pytest.mark.parametrize("by", ["confidence", "entropy"])
def test_each_sample_has_the_logits_of_the_first_head_that_is_sure(by):
    parts = modules()
    fit_heads(parts, [(X, Y)])
    early = EarlyExit(parts, by=by)
    early.calibrate([X[:20], X[20:]], 3.5)
    logits, exit, cost = early(X)
    every = torch.stack([*parts.outputs(X)])
    probabilities = every.softmax(2)
    sure = probabilities.amax(2) >= early.threshold
    if by == "entropy":
        sure = -(probabilities * probabilities.log()).sum(2) <= early.threshold
    sure[-1] = True
    first = sure.int().argmax(0)
    assert len(set(first.tolist())) > 1
    assert torch.equal(exit, first + 1)
    torch.testing.assert_close(logits, every[first, torch.arange(40)], rtol=1e-4, atol=1e-5)
    assert torch.equal(cost, torch.tensor(early.costs)[first])
    assert cost.mean() <= 3.5
    for i in range(3):
        alone = early(X[i : i + 1])
        assert alone.exit.item() == exit[i]
        torch.testing.assert_close(alone.logits[0], logits[i], rtol=1e-4, atol=1e-5)


def test_only_the_samples_that_have_not_left_are_computed():
    fields = [Seen(odenets.ConvField(4)) for _ in range(4)]
    flow = odenets.Flow.of([odenets.Block([field], 1.0) for field in fields], solver="euler")
    whole = odenets.Network(nn.Conv2d(1, 4, 3, padding=1), flow, nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
    whole(X[:2])
    parts = split_into_modules(whole.eval(), [1, 2, 4], X[:2], head=pooled_head)
    fit_heads(parts, [(X, Y)])
    early = EarlyExit(parts)
    early.calibrate([X], 2.0)
    for field in fields:
        field.samples = 0
    exit = early(X).exit
    assert [field.samples for field in fields] == [40, *[int((exit > k).sum()) for k in (1, 2, 2)]]
    assert 0 < fields[-1].samples < 40


def test_a_threshold_that_is_no_confidence_is_refused():
    with pytest.raises(ValueError, match=r"at most 1, or infinity, where none leaves, got 5"):
        EarlyExit(modules(), 5.0)
    assert EarlyExit(modules(), 5.0, by="entropy").threshold == 5.0


def test_the_threshold_is_the_largest_that_the_cost_allows():
    parts = modules()
    fit_heads(parts, [(X, Y)])
    early = EarlyExit(parts)
    before = -1.0
    for cost in (2.0, 2.5, 3.5, 5.0, 6.0):
        threshold = early.calibrate([X], cost)
        mean = early(X).cost.mean().item()
        assert before <= mean <= cost
        assert cost in (2.0, 6.0) or mean > cost - 0.3
        assert early.threshold == threshold
        before = mean
    with pytest.raises(ValueError, match="cost must be at least that of the first exit, 2, got 1"):
        early.calibrate([X], 1.0)
    with pytest.raises(ValueError, match="cost must be at most that of the last exit, 6, got 1000"):
        early.calibrate([X], 1e15)
    with pytest.raises(ValueError, match="at least one batch"):
        early.calibrate([], 3.0)


def test_at_the_cost_of_the_last_exit_none_leaves_before_whatever_the_mean_rounds_to():
    parts = modules()
    fit_heads(parts, [(X, Y)])
    early = EarlyExit(parts, costs=(0.02, 0.05, 0.1))
    assert torch.full((12,), 0.1, dtype=torch.float64).mean() > 0.1
    assert early.calibrate([X[:12]], 0.1) == math.inf
    assert (early(X).exit == 3).all()


def test_heads_are_logistic_regressions_and_the_network_stays():
    parts = modules()
    before = copy.deepcopy(parts.state_dict())
    assert fit_heads(parts, [(X[:25], Y[:25]), (X[25:], Y[25:])], penalty=1e-2, iterations=1000) == 2
    changed = {name for name, value in parts.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"parts.{k}.head.1.{name}" for k in (0, 1) for name in ("weight", "bias")}
    state = parts.modules_in_order[0].part(X)
    features = state.mean((2, 3)).detach()
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    theirs = LogisticRegression(C=1 / (2 * 1e-2 * 40), tol=1e-8, max_iter=10_000).fit(standard, Y.numpy())
    ours = parts.modules_in_order[0].head(state).softmax(1).detach()
    torch.testing.assert_close(ours, torch.tensor(theirs.predict_proba(standard)).float(), rtol=1e-2, atol=1e-3)


def test_heads_that_were_trained_with_the_network_are_taken_as_they_are():
    parts = split_into_modules(network(4), 2, X[:2])
    fit_modules(parts, [(X, Y)], epochs=1, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert EarlyExit(parts.eval(), 0.2)(X).logits.shape == (40, 10)
    with pytest.raises(ValueError, match="the head of module 1 must be a linear layer behind layers without weights"):
        fit_heads(parts, [(X, Y)])


def test_macs_count_the_heads_that_are_passed():
    early = EarlyExit(modules())
    first, second, last = early.macs(X[:3])
    block = 2 * 4 * 4 * 9 * 64  # two convolutions of 4 channels at 8 x 8 places
    assert first == 4 * 9 * 64 + 2 * block + 40
    assert second == first + 2 * block + 40
    assert last == second + 2 * block + 4 * 64 * 10
    early.costs = early.macs(X[:3])
    assert (early(X).cost == last).all()


@pytest.mark.parametrize("shape", [(2, 6, 5, 5), (2, 7, 6), (2, 6)])
def test_heads_are_for_images_tokens_and_features(shape):
    state = torch.rand(*shape)
    head = pooled_head(state, 3)
    mean = {4: lambda: state.mean((2, 3)), 3: lambda: state.mean(1), 2: lambda: state}[len(shape)]()
    torch.testing.assert_close(head(state), head[-1](mean))
    with pytest.raises(ValueError, match="state must be"):
        pooled_head(torch.rand(2, 3, 4, 5, 6), 3)
    with pytest.raises(ValueError, match="places must be at least 1"):
        pooled_head(state, 3, places=0)


def exits_of(model, inputs, labels):
    """What leaves, beside the outputs of every module for the whole batch."""
    parts = split_into_modules(odenets.adapt(model.eval(), inputs), 3, inputs, head=pooled_head, outputs=6)
    fit_heads(parts, [(inputs, labels)])
    early = EarlyExit(parts)
    every = torch.stack([*parts.outputs(*parts.arguments(inputs))]).detach()
    scores = every.softmax(2).amax(2)
    for early.threshold in (scores[0].max().item(), scores[0].min().item() + 1e-6, 0.0):
        logits, exit, _ = early(inputs)
        torch.testing.assert_close(logits, every[exit - 1, torch.arange(len(exit))], rtol=1e-3, atol=1e-4)
        yield exit.tolist()


def test_adapted_networks_of_torchvision_leave_early():
    torchvision = pytest.importorskip("torchvision")
    found = [*exits_of(torchvision.models.resnet18(num_classes=6), torch.randn(5, 3, 32, 32), torch.arange(5))]
    assert found[0].count(1) == 1
    assert found[1].count(1) == 4  # one sample goes on alone
    assert found[2] == [1] * 5


class LastToken(nn.Module):
    """A classifier on the last token of GPT-2."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            n_layer=3, n_head=2, n_embd=8, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=2
        )
        self.gpt, self.out = transformers.GPT2Model(config), nn.Linear(8, 6)

    def forward(self, input_ids, attention_mask):
        states = self.gpt(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.out(states[:, -1])


@pytest.mark.slow
def test_transformers_leave_early_with_their_masks():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=6, depth=3)
    found = [*exits_of(vit, torch.randn(5, 3, 32, 32), torch.arange(5))]
    assert found[1].count(1) == 4
    tokens = {"input_ids": torch.randint(3, 20, (5, 8)), "attention_mask": torch.ones(5, 8, dtype=torch.long)}
    tokens["attention_mask"][0, :3] = 0
    found = [*exits_of(LastToken(), tokens, torch.arange(5))]
    assert found[0].count(1) == 1


@pytest.mark.slow
def test_a_model_whose_head_reads_its_tokens_again_cannot_be_cut():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    tokens = torch.randint(1, 20, (2, 8))
    model = odenets.adapt(transformers.GPT2ForSequenceClassification(config).eval(), {"input_ids": tokens})
    with pytest.raises(ValueError, match="cannot be cut"):
        split_into_modules(model, 2, {"input_ids": tokens}, head=pooled_head, outputs=2)


@pytest.mark.parametrize(("by", "costs"), [("confidence", None), ("entropy", (1.0, 2.0, 5.0))])
def test_threshold_and_costs_are_saved_with_the_weights(tmp_path, by, costs):
    early, other = EarlyExit(modules(), 0.4, by=by, costs=costs), EarlyExit(modules(), 0.9, by=by)
    odenets.save_weights(early, tmp_path / "early.safetensors")
    odenets.load_weights(other, tmp_path / "early.safetensors")
    assert other.threshold == 0.4
    assert other.costs == early.costs
    assert torch.equal(other(X).exit, early(X).exit)
    wrong = EarlyExit(modules(), by="entropy" if by == "confidence" else "confidence")
    with pytest.raises(ValueError, match="by must be that of the saved threshold"):
        wrong.load_state_dict(early.state_dict())


@pytest.mark.parametrize("export", [torch.export.export, torch.jit.trace])
def test_an_export_is_refused(export):
    with pytest.raises(RuntimeError, match=r"EarlyExit takes a way for each sample.*export its parts"):
        export(EarlyExit(modules()), (X,))


def test_a_dropout_is_refused_while_it_trains():
    parts = modules(head=lambda state, outputs: nn.Sequential(nn.Dropout(0.5), pooled_head(state, outputs)))
    with pytest.raises(ValueError, match="is a Dropout in training mode, which draws anew in each call"):
        EarlyExit(parts.train())(X)


def test_exits_are_numbers_of_modules():
    parts = modules()
    assert len(parts) == len([*parts]) == 3
    early = EarlyExit(parts, threshold=0.0)
    assert early(X).exit.unique().tolist() == [1]
    assert torch.equal(early(X).cost, torch.tensor(early.costs)[early(X).exit - 1])


def test_batch_norms_are_refused_while_they_train():
    parts = split_into_modules(network(norm="batch").train(), 2, X[:2], head=pooled_head)
    early = EarlyExit(parts)
    with pytest.raises(ValueError, match="batch norm in training mode"):
        early(X)
    assert early.eval()(X).logits.shape == (40, 10)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: EarlyExit(nn.Linear(2, 2)), TypeError, "modules must be a network in modules"),
        (lambda: fit_heads(network(), [(X, Y)]), TypeError, "modules must be a network in modules"),
        (lambda: EarlyExit(modules(), by="margin"), ValueError, "by must be 'confidence' or 'entropy'"),
        (lambda: EarlyExit(modules(), math.nan), ValueError, "got NaN"),
        (lambda: EarlyExit(modules(), "0.9"), TypeError, "threshold must be a number"),
        (lambda: EarlyExit(modules(), costs=[1, 2]), ValueError, "costs must hold one for each of 3 modules, got 2"),
        (lambda: EarlyExit(modules(), costs=[3, 2, 1]), ValueError, "costs must not fall"),
        (lambda: fit_heads(modules(), [X]), TypeError, r"a pair \(inputs, targets\), got one tensor"),
        (lambda: fit_heads(modules(), X), TypeError, "batches must be an iterable of batches, got Tensor"),
        (lambda: fit_heads(modules(), []), ValueError, "at least one batch"),
    ],
)
def test_refusals_name_the_argument(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_linear_heads_of_all_features_can_be_fitted():
    parts = modules(head=linear_head)
    assert fit_heads(parts, [(X, Y)]) == 2
    accuracy = (next(iter(parts.outputs(X))).argmax(1) == Y).float().mean()
    assert accuracy == 1


def modules_with(head):
    network = odenets.models.small_network(depth=4)
    return split_into_modules(network, 2, torch.rand(4, 1, 8, 8), head=[head])


def test_layers_of_heads_keep_their_modes():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 10))
    modules = modules_with(head).train()
    fit_heads(modules, [(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)])
    assert all(module.training for module in modules.modules())


def test_heads_whose_weights_are_computed_are_refused():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(16, 10))
    modules = modules_with(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear))
    with pytest.raises(ValueError, match="linear layer behind layers without weights"):
        fit_heads(modules, [(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)])


def test_labels_that_are_no_classes_are_refused():
    modules = modules_with(pooled_head(torch.zeros(1, 16, 8, 8), 10))
    x = torch.rand(20, 1, 8, 8)
    for labels in (torch.arange(20), torch.rand(20), torch.zeros(20, 10).long()):
        with pytest.raises(ValueError, match="labels must be whole numbers"):
            fit_heads(modules, [(x, labels)])


def test_a_default_device_that_is_another_changes_nothing():
    plain, early = EarlyExit(modules()), EarlyExit(modules())
    early.load_state_dict(plain.state_dict())
    plain.calibrate([X], 3.5)
    with torch.device("meta"):
        early.calibrate([X], 3.5)
    assert early.threshold == plain.threshold


def test_a_feature_that_is_constant_to_rounding_has_no_weight():
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 3e4 * (1 + 1e-7 * torch.randn(200, generator=torch.Generator().manual_seed(1)))
    linear = nn.Linear(4, 2)
    _fit_linear(linear, features, (features[:, 0] > 0).long(), 1e-3, 200)
    assert (linear.weight[:, 3] == 0).all()
    assert ((linear(features).argmax(1) == 1) == (features[:, 0] > 0)).float().mean() > 0.97
