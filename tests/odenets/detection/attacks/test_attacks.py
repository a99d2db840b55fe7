import copy
import itertools
import json
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from odenets.checkpoints import fingerprint
from odenets.detection.attacks import art, generation
from odenets.detection.attacks.generation import PRESETS, Attack, Attacked, attack, preset
from odenets.detection.isolation import frozen
from tests.odenets.detection.victims import digits, victim

CUT = {
    "FGM": {},
    "BIM": {"max_iter": 5},
    "APGD": {"max_iter": 5, "nb_random_init": 1},
    "AA": {"apgd_iter": 5, "apgd_restarts": 1, "deepfool_iter": 5, "square_iter": 5, "square_restarts": 1},
    "DF": {"max_iter": 30},
    "CW": {"learning_rate": 0.1, "initial_const": 10.0, "binary_search_steps": 2},
    "HSJ": {"max_iter": 2, "max_eval": 50, "init_eval": 10},
    "BA": {"max_iter": 5},
}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def batch():
    _, test = digits()
    return test.x[:12], test.y[:12]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in Attacked.__slots__)


def counted(network):
    """The network, counting its calls."""
    network = copy.deepcopy(network)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return network, calls


@pytest.mark.parametrize("eps", [0.03, 0.2])
def test_fgm_is_one_step_along_the_sign_of_the_gradient(batch, eps):
    x, y = batch
    found = attack(victim(), preset("FGM", eps=eps), x, y, batch_size=5)
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(victim()(moving), y, reduction="sum"), moving)
    torch.testing.assert_close(found.images, (x + eps * gradient.sign()).clamp(0, 1))
    assert torch.equal(found.predicted, victim()(found.images).argmax(1))
    assert torch.equal(found.clean, victim()(x).argmax(1))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_images(batch, name):
    x, y = batch
    found = attack(victim(), preset(name, **CUT[name]), x[:8], y[:8], batch_size=8)
    assert found.images.shape == x[:8].shape
    assert found.images.dtype == torch.float32
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    torch.testing.assert_close(found.linf, (found.images - x[:8]).abs().flatten(1).max(1).values)
    torch.testing.assert_close(found.l2, (found.images - x[:8]).square().sum((1, 2, 3)).sqrt())
    if name in ("FGM", "BIM", "APGD", "AA"):
        assert found.linf.max() <= 0.03 + 1e-6
    else:
        assert found.success_rate > 0.5


def test_the_presets_are_the_settings_of_the_thesis():
    assert set(PRESETS) == {"FGM", "APGD", "BIM", "AA", "DF", "CW", "HSJ", "BA"}
    assert {dict(PRESETS[name].settings)["eps"] for name in ("FGM", "APGD", "BIM", "AA")} == {0.03}
    assert dict(PRESETS["HSJ"].settings) == {"norm": 2, "max_iter": 50, "max_eval": 10000, "init_eval": 100}
    assert dict(preset("FGM", eps=0.1).settings) == {"norm": "inf", "eps": 0.1}


def test_only_a_right_prediction_that_became_wrong_is_a_success():
    y = torch.tensor([0, 0, 0, 0])
    clean, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2])
    found = Attacked(torch.zeros(4, 1, 8, 8), y, clean, predicted, torch.zeros(4), torch.arange(4.0))
    assert found.clean_accuracy == 0.5
    assert found.success.tolist() == [False, True, False, False]
    assert found.success_rate == 0.5
    fooled = found.subset(found.success)
    assert (len(fooled), fooled.l2.tolist(), fooled.success_rate) == (1, [1.0], 1.0)
    assert np.isnan(found.subset(torch.tensor([2, 3])).success_rate)


def test_autoattack_leaves_misclassified_images_and_they_are_no_success(batch):
    x, y = batch
    wrong = (y + 1) % 10
    labels = torch.where(torch.arange(len(y)) < 6, wrong, y)
    found = attack(victim(), preset("AA", eps=0.2, **CUT["AA"]), x, labels, batch_size=12)
    assert torch.equal(found.images[:6], x[:6])
    assert not found.success[:6].any()
    assert (found.predicted != labels)[:6].all()
    right = found.clean == labels
    assert not right[:6].any()
    assert found.success_rate == pytest.approx(found.success[right].double().mean().item())
    assert found.success_rate > 0.5


@pytest.mark.parametrize("damage", ["cut", "too few", "too bright"])
def test_a_damaged_batch_is_made_anew(batch, tmp_path, damage):
    x, y = batch
    whole = attack(victim(), "FGM", x, y, batch_size=5, cache=tmp_path)
    path = next(tmp_path.glob("*/batch-00001.safetensors"))
    held = load(path.read_bytes())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "too few":
        path.write_bytes(save(held | {"predicted": held["predicted"][:2].clone()}))
    else:
        path.write_bytes(save(held | {"images": held["images"] + 2}))
    assert same(attack(victim(), "FGM", x, y, batch_size=5, cache=tmp_path), whole)
    assert torch.equal(load(path.read_bytes())["predicted"], held["predicted"])


@pytest.mark.parametrize("name", ["APGD", "HSJ", "BA"])
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(batch, name, tmp_path, monkeypatch):
    x, y = batch
    chosen = preset(name, **CUT[name])
    whole = attack(victim(), chosen, x, y, batch_size=5)
    assert same(whole, attack(victim(), chosen, x, y, batch_size=5))

    right = generation._attack_batch
    done = []

    def killed(*arguments):
        if len(done) == 1:
            raise Killed
        done.append(1)
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_attack_batch", killed)
        with pytest.raises(Killed):
            attack(victim(), chosen, x, y, batch_size=5, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["attack.json", "batch-00000.safetensors"]
    first = (folder / "batch-00000.safetensors").stat().st_mtime_ns
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the state that ART draws from
    assert same(attack(victim(), chosen, x, y, batch_size=5, cache=tmp_path), whole)
    assert (folder / "batch-00000.safetensors").stat().st_mtime_ns == first


def test_nothing_is_attacked_twice(batch, tmp_path):
    x, y = batch
    network, calls = counted(victim())
    whole = attack(network, "FGM", x, y, batch_size=5, cache=tmp_path)
    assert calls
    calls.clear()
    assert same(attack(network, "FGM", x, y, batch_size=5, cache=str(tmp_path)), whole)
    assert not calls
    (folder,) = tmp_path.iterdir()
    about = json.loads((folder / "attack.json").read_text())
    assert folder.name == f"FGM-{about['key'][:24]}"
    assert about["settings"] == {"norm": "inf", "eps": 0.03}
    assert (about["class"], about["network"]) == ("FastGradientMethod", "Network")
    assert about["weights"] == fingerprint(network)


@pytest.mark.parametrize("change", ["seed", "settings", "images", "labels", "weights"])
def test_another_attack_has_a_folder_of_its_own(batch, change, tmp_path):
    x, y = batch
    attack(victim(), "FGM", x, y, cache=tmp_path)
    network, chosen = copy.deepcopy(victim()), preset("FGM", **({"eps": 0.1} if change == "settings" else {}))
    if change == "weights":
        with torch.no_grad():
            network.head[1].bias[0] += 1e-3
    if change == "images":
        x = torch.cat([x[:-1], x[-1:].flip(2)])
    if change == "labels":
        y = y.flip(0)
    attack(network, chosen, x, y, cache=tmp_path, seed=int(change == "seed"))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["FGM", "CW", "HSJ"])
def test_an_attack_leaves_no_trace(batch, name):
    x, y = batch
    network = copy.deepcopy(victim()).train()
    network.head.eval()
    network.head[1].weight.requires_grad_(False)
    F.cross_entropy(network(x), y).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    modes, asked = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    images = x.clone()
    attack(network, preset(name, **CUT[name]), x, y)
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == asked
    for p, gradient in zip(network.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    assert torch.equal(x, images)


def test_draws_follow_the_seed(batch):
    x, y = batch[0][:3], batch[1][:3]
    chosen = preset("HSJ", **CUT["HSJ"])
    assert not torch.equal(attack(victim(), chosen, x, y).images, attack(victim(), chosen, x, y, seed=1).images)


def test_hop_skip_jump_ends_where_rounding_lets_no_step_succeed():
    """The first point is adversarial until ART has taken it, and then nothing is: ART would halve without end."""
    first = np.ones((1, 2, 2), dtype=np.float32)
    asked = []

    def adversarial(points):
        asked.append(1)
        return np.full(len(points), len(asked) <= 3 and np.array_equal(points[0], first))

    settings = {"max_iter": 2, "max_eval": 10, "init_eval": 10}
    found = art.decision_attack("HSJ", settings, adversarial, np.zeros_like(first), [first])
    assert np.array_equal(found, first)


def test_without_a_first_adversarial_point_nothing_is_found():
    def never(points):
        return np.zeros(len(points), dtype=bool)

    assert art.decision_attack("BA", {}, never, np.zeros((1, 2, 2)), [np.ones((1, 2, 2))]) is None


@pytest.mark.parametrize(
    ("images", "labels", "error", "match"),
    [
        (torch.full((2, 1, 8, 8), 1.5), [0, 1], ValueError, r"images must have pixels in \[0, 1\], got \[1.5, 1.5\]"),
        (torch.full((2, 1, 8, 8), torch.nan), [0, 1], ValueError, "images must be finite, got NaN or infinity"),
        (torch.zeros(2, 64), [0, 1], ValueError, r"images must be a batch \(N, C, H, W\)"),
        (torch.zeros(2, 1, 8, 8), [0, 10], ValueError, r"labels must lie in \[0, classes\).*got 10.*\(1, 10\)"),
        (torch.zeros(2, 1, 8, 8), [0, -1], ValueError, "labels must not be negative, got -1"),
        (torch.zeros(2, 1, 8, 8), [0], ValueError, r"one entry for each of 2 images, got shape \(1,\)"),
        (torch.zeros(2, 1, 8, 8), [0.0, 1.0], TypeError, "labels must be an int64 tensor, got torch.float32"),
    ],
)
def test_images_and_labels_are_looked_at(images, labels, error, match):
    with pytest.raises(error, match=match):
        attack(victim(), "FGM", images, torch.tensor(labels))


def test_attacks_and_settings_are_looked_at(batch):
    x, y = batch
    with pytest.raises(ValueError, match=r"unknown attack 'PGD'; known are FGM, BIM, APGD"):
        preset("PGD")
    with pytest.raises(ValueError, match="unknown attack 'PGD'"):
        attack(victim(), "PGD", x, y)
    with pytest.raises(ValueError, match=r"FGM has no setting epsilon; known are norm, eps, eps_step"):
        preset("FGM", epsilon=0.1)
    with pytest.raises(ValueError, match=r"BA has no setting verbose; known are delta, epsilon"):
        attack(victim(), Attack("BA", (("verbose", True),)), x, y)
    with pytest.raises(TypeError, match=r"eps of FGM must be a number, a bool or a string, got array"):
        preset("FGM", eps=np.ones(2))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        attack(victim(), "FGM", x, y, batch_size=0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        attack(victim(), "FGM", x, y, seed=-1)
    with pytest.raises(ValueError, match=r"AA compares three logits of a network, got one with 2"):
        attack(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)), "AA", x, y % 2)
    with pytest.raises(ValueError, match="network has a flow without a field"):
        attack(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2)), "FGM", x, y)


def test_networks_of_two_classes_are_attacked(batch):
    x, _ = batch
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    found = attack(network, preset("FGM", eps=0.5), x, network(x).argmax(1))
    assert found.clean_accuracy == 1
    assert found.success_rate > 0.5


def test_missing_art_names_the_extra(batch, monkeypatch):
    monkeypatch.setitem(sys.modules, "art", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install odenets\[detection\]"):
        attack(victim(), "FGM", *batch)
    with pytest.raises(ModuleNotFoundError, match=r"pip install odenets\[detection\]"):
        preset("FGM", eps=0.1)


# -- precision, outputs, modes of the caller ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in PRESETS),
        *itertools.product(["FGM", "APGD", "DF", "BA"], [torch.float64, torch.float16]),
    ],
)
def test_networks_of_any_precision_are_attacked_in_float32(batch, name, dtype):
    x, y = batch[0][:4], batch[1][:4]
    network = copy.deepcopy(victim()).to(dtype)
    result = attack(network, preset(name, **CUT[name]), x.to(dtype), y.int())
    assert result.images.dtype == result.l2.dtype == torch.float32
    assert torch.equal(result.predicted, network.eval()(result.images.to(dtype)).argmax(1))
    assert torch.equal(result.clean, network(x.to(dtype)).argmax(1))
    assert {p.dtype for p in network.parameters()} == {dtype}
    if name in ("FGM", "BIM", "APGD", "AA"):
        assert result.linf.max() <= 0.03 + 1e-6
    elif name != "DF" or dtype == torch.float64:  # it stops at a boundary that half precision blurs
        assert result.success_rate > 0.5


def test_a_network_in_double_precision_gives_the_images_of_its_own_gradient(batch):
    x, y = batch
    network = copy.deepcopy(victim()).double()
    moving = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(moving), y, reduction="sum"), moving)
    result = attack(network, preset("FGM", eps=0.1), x, y)
    clear = gradient.abs() > 1e-5 * gradient.abs().max()
    torch.testing.assert_close(result.images[clear], (x + 0.1 * gradient.sign().float()).clamp(0, 1)[clear])


@pytest.mark.parametrize("gain", [1.0, 60.0])
def test_gradients_below_half_precision_reach_the_pixels(gain):
    """Confident predictions have gradients below 6e-8, a half's least number."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).half()
    with torch.no_grad():
        network[3].weight.mul_(gain)
    x = 0.2 + 0.6 * torch.rand(40, 1, 4, 4)
    wide = copy.deepcopy(network).double()
    y = wide(x.half().double()).argmax(1)
    moving = x.half().double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(wide(moving), y, reduction="sum"), moving)
    moved = attack(network, preset("FGM", eps=0.1), x, y).images - x
    clear = gradient.abs() > 1e-2 * gradient.abs().amax((1, 2, 3), keepdim=True)
    assert (gradient.abs().amax((1, 2, 3)) / 40 < 6e-8).any() == (gain > 1)
    assert (moved.sign() == gradient.sign())[clear & (gradient != 0)].double().mean() > 0.98


class Wrapped(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.network, self.how = victim(), how

    def forward(self, x):
        return self.how(self.network(x))


@pytest.mark.parametrize("name", ["FGM", "HSJ"])
@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        (lambda z: (z, None), TypeError, "got a tuple: wrap it in a module that returns the logits alone"),
        (lambda z: [z], TypeError, "got a list"),
        (lambda z: {"logits": z}, TypeError, "got a dict"),
        (lambda z: None, TypeError, "got a NoneType"),
        (lambda z: z.argmax(1), TypeError, "got a tensor of torch.int64"),
        (lambda z: z[:, 0], ValueError, r"got shape \(1,\) for 1 inputs"),
        (lambda z: z[:, :1], ValueError, r"with at least 2 classes, got shape \(1, 1\)"),
        (lambda z: z[:, :, None, None], ValueError, r"got shape \(1, 10, 1, 1\)"),
        (lambda z: z.repeat(2, 1), ValueError, r"got shape \(2, 10\) for 1 inputs"),
    ],
)
def test_what_a_network_must_return_is_named(batch, name, how, error, match):
    x, y = batch
    with pytest.raises(error, match="network must return logits, one floating tensor .*" + match):
        attack(Wrapped(how), preset(name, **CUT[name]), x, y)


def test_probabilities_are_no_logits_for_gradients(batch):
    x, y = batch[0][:2], batch[1][:2]
    with pytest.warns(UserWarning, match="network seems to return probabilities, .*FGM.*leave the softmax out"):
        attack(Wrapped(lambda z: z.softmax(1)), "FGM", x, y)
    attack(Wrapped(lambda z: z.softmax(1)), preset("HSJ", **CUT["HSJ"]), x, y)  # by predictions alone, as well as ever
    attack(Wrapped(lambda z: z.log_softmax(1)), "FGM", x, y)


def test_logits_and_gradients_that_are_not_finite_are_no_attack(batch):
    x, y = batch
    with pytest.raises(ValueError, match="network must return finite logits, got NaN"):
        attack(Wrapped(lambda z: z * torch.nan), "FGM", x, y)
    root = Wrapped(lambda z: z + 0 * (z - z.detach()).abs().sqrt())  # its gradient is 0 * infinity
    for name in ("FGM", "DF"):
        with pytest.raises(ValueError, match="network must have finite gradients to be attacked, got NaN"):
            attack(root, preset(name, **CUT[name]), x, y)


@pytest.mark.parametrize("name", ["FGM", "DF", "CW"])
def test_a_network_without_gradients_is_attacked_by_predictions_alone(batch, name):
    x, y = batch[0][:2], batch[1][:2]
    with pytest.raises(ValueError, match=r'network must pass gradients from its logits to the images.*"HSJ" or "BA"'):
        attack(Wrapped(torch.Tensor.detach), preset(name, **CUT[name]), x, y)
    attack(Wrapped(torch.Tensor.detach), preset("BA", **CUT["BA"]), x, y)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, torch.inference_mode) for name in PRESETS), ("FGM", torch.no_grad), ("APGD", torch.no_grad)],
)
def test_the_mode_of_the_caller_does_not_matter(batch, name, mode):
    x, y = batch[0][:2], batch[1][:2]
    expected = attack(victim(), preset(name, **CUT[name]), x, y)
    with mode():
        result = attack(victim(), preset(name, **CUT[name]), x.clone(), y.clone())
        assert not torch.is_grad_enabled()
    assert same(result, expected)


def test_a_network_made_in_inference_mode_is_attacked(batch):
    x, y = batch
    with torch.inference_mode():
        network = copy.deepcopy(victim())
        assert all(p.is_inference() for p in network.parameters())
        result = attack(network, "FGM", x, y)
    assert same(result, attack(victim(), "FGM", x, y))


class Drawing(nn.Module):
    """Draws in eval mode too."""

    def __init__(self):
        super().__init__()
        self.network = copy.deepcopy(victim())

    def forward(self, x):
        return self.network(x + 1e-3 * torch.rand_like(x) * np.random.rand() * random.random())  # noqa: NPY002


def test_the_draws_of_a_network_leave_the_random_states_as_they_were(batch):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    attack(Drawing(), "FGM", *batch)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_frozen_restores_each_module_also_after_an_exception():
    network = copy.deepcopy(victim()).train()
    network.head.eval()
    network.head[1].weight.requires_grad_(False)
    network.head[1].bias.grad = torch.ones_like(network.head[1].bias)
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()

    def killed():
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
        torch.rand(3)
        raise Killed

    with pytest.raises(Killed), frozen(network):
        killed()
    assert [module.training for module in network.modules()] == modes
    assert not network.head[1].weight.requires_grad
    assert all(p.requires_grad for p in network.parameters() if p is not network.head[1].weight)
    assert network.head[1].bias.grad.eq(1).all()
    assert torch.equal(torch.get_rng_state(), state)


class Tempered(nn.Module):
    """Numbers that no state dictionary holds."""

    def __init__(self):
        super().__init__()
        self.network = copy.deepcopy(victim())
        self.temperature = 1.0
        self.shifts = [0.0]
        self.more = torch.zeros(())
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.temperature * self.network(x + self.offset + self.shifts[0] + self.more)


@pytest.mark.parametrize("change", ["temperature", "shifts", "more", "offset", "dtype"])
def test_what_no_state_dictionary_holds_has_a_folder_of_its_own(batch, change, tmp_path):
    network = Tempered()
    attack(network, "FGM", *batch, cache=tmp_path)
    attack(Tempered().train(), "FGM", *batch, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    values = {"temperature": 2.0, "shifts": [0.1], "more": torch.ones(()) / 10, "offset": torch.ones(1) / 10}
    if change == "dtype":
        network.double()
    else:
        setattr(network, change, values[change])
    attack(network, "FGM", *batch, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_autocast_has_a_folder_of_its_own(batch, tmp_path):
    plain = attack(victim(), "FGM", *batch, cache=tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        attack(victim(), "FGM", *batch, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert same(attack(victim(), "FGM", *batch, cache=tmp_path), plain)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("FGM", {"eps": 8}, r"eps of FGM must be at most 1, in units of pixels in \[0, 1\], got 8: 8 / 255 if bytes"),
        ("BIM", {"eps": 1.5}, "eps of BIM must be at most 1"),
        ("AA", {"eps": 2}, "eps of AA must be at most 1"),
        ("FGM", {"eps": -0.1}, "eps of FGM must be finite and not negative, got -0.1"),
        ("APGD", {"eps_step": float("nan")}, "eps_step of APGD must be finite"),
        ("CW", {"learning_rate": -1.0}, "learning_rate of CW must be finite and not negative"),
        ("FGM", {"norm": 3}, "norm of FGM must be 'inf', 1 or 2, got 3"),
        ("FGM", {"norm": "2"}, "norm of FGM must be 'inf', 1 or 2, got '2'"),
        ("BIM", {"max_iter": 0}, "max_iter of BIM must be a whole number, at least 1, got 0"),
        ("BIM", {"max_iter": 2.5}, "max_iter of BIM must be a whole number"),
        ("HSJ", {"init_size": 0}, "init_size of HSJ must be a whole number, at least 1"),
        ("AA", {"square_iter": 0}, "square_iter of AA must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, match):
    with pytest.raises(ValueError, match=match):
        preset(name, **settings)


def test_a_ball_of_l2_may_be_larger_than_a_pixel(batch):
    assert attack(victim(), preset("FGM", eps=1.5, norm=2), *batch).l2.max() > 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers_serve(batch, dtype):
    x, y = batch
    result = attack(victim(), "FGM", x, y.to(dtype))
    assert result.labels.dtype == torch.int64
    assert same(result, attack(victim(), "FGM", x, y))


def test_bytes_are_told_of():
    with pytest.raises(TypeError, match=r"got torch\.uint8: divide bytes by 255"):
        attack(victim(), "FGM", torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"got \[0, 255\].*divide what is in \[0, 255\] by 255"):
        attack(victim(), "FGM", torch.tensor([0.0, 255.0]).repeat(32).reshape(1, 1, 8, 8), torch.tensor([0]))


def test_art_and_the_preset_agree_on_what_autoattack_is_made_of(batch):
    """As the docstring says: two Auto-PGDs without targets, DeepFool in L2 in the place of FAB, Square."""
    toolbox = art.toolbox()
    estimator = toolbox.estimators.classification.PyTorchClassifier(
        victim(),
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    parts = toolbox.attacks.evasion.AutoAttack(estimator).attacks
    names = [type(part).__name__ for part in parts]
    assert names == ["AutoProjectedGradientDescent", "AutoProjectedGradientDescent", "DeepFool", "SquareAttack"]
    assert [part.loss_type for part in parts[:2]] == ["cross_entropy", "difference_logits_ratio"]
    assert [(part.targeted, part.nb_random_init, part.max_iter) for part in parts[:2]] == [(False, 5, 100)] * 2
    assert (parts[2].epsilon, parts[3].nb_restarts) == (1e-3, 5)
