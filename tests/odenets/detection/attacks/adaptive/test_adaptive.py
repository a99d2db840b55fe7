"""Attacks on a network and its detector."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from odenets.detection import Trajectory, preset, run_attack
from odenets.detection.attacks.adaptive import ProjectedDescent, black_box, distill, feature_attack, surrogate_attack
from tests.odenets.detection.victims import detection, digits, features_of, refused, unchanged, victim

HSJ = {"max_iter": 3, "max_eval": 100, "init_eval": 20}
LIMIT = 0.345


def quadrants(network, x):
    """Mean gray of the four quadrants of an image."""
    return torch.nn.functional.avg_pool2d(x, 4).flatten(1)


def too_bright(z):
    """A detector on these: attacks on digits brighten the ground, which cannot be darker than black."""
    return z.mean(1) > LIMIT


def score(z):
    return 1 / (1 + np.exp(-100 * (z.mean(1) - LIMIT)))


def too_bright_image(x):
    return too_bright(quadrants(None, x))


@pytest.fixture(scope="module")
def attacked():
    _, test = digits()
    fgm = run_attack(victim(), preset("FGM", eps=0.15), test.x, test.y)
    index = (fgm.success & too_bright_image(fgm.images) & ~too_bright_image(test.x)).nonzero()[:4, 0]
    return fgm.subset(index), test.x[index]


def check(result, start, images, detector):
    """Against network and detector; what did not evade is the start."""
    predicted = victim()(result.images).argmax(1)
    assert torch.equal(result.wrong, predicted != start.labels)
    assert torch.equal(result.detected, detector(result.images))
    assert torch.equal(result.evaded, (predicted != start.labels) & ~detector(result.images))
    assert result.share == result.evaded.float().mean()
    assert torch.equal(result.images[~result.evaded], start.images[~result.evaded])
    torch.testing.assert_close(result.l2, (result.images - images).flatten(1).norm(dim=1))
    assert result.images.min() >= 0
    assert result.images.max() <= 1


def test_the_black_box_is_led_to_the_wrong_class_undetected(attacked):
    result, again = (black_box(victim(), too_bright_image, *attacked, pool=attacked[1], **HSJ) for _ in range(2))
    check(result, *attacked, too_bright_image)
    assert result.share >= 0.25
    assert torch.equal(result.images, again.images)


def test_hop_skip_jump_comes_nearer_than_the_image_that_it_began_at(attacked):
    """An image of the wrong class that is not detected is among the pool."""
    start, images = attacked
    train, _ = digits()
    result = black_box(victim(), too_bright_image, start, images, pool=train.x[:300], trials=1, **HSJ)
    check(result, start, images, too_bright_image)
    assert result.share == 1
    predicted, undetected = victim()(train.x[:300]).argmax(1), ~too_bright_image(train.x[:300])
    for i in range(len(start)):
        allowed = train.x[:300][undetected & (predicted == start.predicted[i])]
        begun = (allowed - start.images[i]).flatten(1).norm(dim=1).min()
        assert (result.images[i] - start.images[i]).norm() < begun
        assert victim()(result.images[i : i + 1]).argmax() == start.predicted[i]


def test_the_start_remains_where_nothing_evades(attacked):
    start, images = attacked
    result = black_box(victim(), lambda x: torch.ones(len(x)), start, images, trials=5, **HSJ)
    assert (result.share, result.wrong.all(), result.detected.all()) == (0, True, True)
    assert torch.equal(result.images, start.images)
    result = feature_attack(victim(), quadrants, lambda z: torch.ones(len(z)), start, images, **HSJ)
    assert torch.equal(result.images, start.images)


def test_features_are_matched_and_the_network_stays_fooled(attacked):
    options = {"weights": [(10.0, 0.1)], "rounds": 3, "steps": 8, **HSJ}
    result = feature_attack(victim(), quadrants, too_bright, *attacked, **options)
    check(result, *attacked, too_bright_image)
    assert result.share >= 0.5


@pytest.mark.parametrize(("norm", "eps"), [("inf", 0.15), (2, 1.0)])
def test_the_surrogate_leads_past_the_detector_inside_the_ball(attacked, norm, eps):
    start, images = attacked
    known = np.concatenate([quadrants(None, x).numpy() for x in (images, start.images)])
    surrogate = distill(score, known, copies=20, epochs=30)
    descent = ProjectedDescent(eps=eps, norm=norm, steps=20)
    result = surrogate_attack(victim(), quadrants, score, surrogate, start, images, descent=descent, batch_size=3)
    check(result, start, images, too_bright_image)
    assert result.share >= 0.75
    moved = (result.images - images)[result.evaded].flatten(1)
    assert torch.linalg.vector_norm(moved, float(norm), dim=1).max() <= eps + 1e-5


def test_a_forest_on_the_trajectory_is_evaded():
    _, test = digits()

    def of_image(x):
        return torch.from_numpy(detection().predict(features_of(x).numpy())).bool()

    fgm = run_attack(victim(), preset("FGM", eps=0.15), test.x, test.y)
    index = (fgm.success & of_image(fgm.images)).nonzero()[:4, 0]
    start, images = fgm.subset(index), test.x[index]
    chances = lambda z: detection().predict_proba(z)[:, 1]  # noqa: E731
    surrogate = distill(chances, features_of(torch.cat([fgm.images, test.x])).numpy(), copies=2, epochs=15)
    descent = ProjectedDescent(eps=0.15, steps=20)
    result = surrogate_attack(victim(), Trajectory(), chances, surrogate, start, images, descent=descent)
    check(result, start, images, of_image)
    assert result.share >= 0.5


def test_starts_and_detectors_are_checked(attacked):
    start, images = attacked

    def attack(detector=too_bright_image, start=start, images=images, **options):
        return black_box(victim(), detector, start, images, **options)

    refused(r"images must be the clean ones of start, \(4, 1, 8, 8\), got shape \(3", attack, images=images[:3])
    refused("start must be Attacked, .* got Tensor", attack, start=images, error=TypeError)
    undetected = lambda x: torch.zeros(len(x))  # noqa: E731
    refused("start must hold detected images, got 4 that the detector does not tell", attack, detector=undetected)
    other = copy.deepcopy(victim())
    other.head[-1].bias.data[start.labels[0]] += 1e3
    message = r"start must hold images that fool this network, got \d that it has right"
    refused(message, black_box, other, too_bright_image, *attacked)
    refused("detector must be a function, .* got a object", attack, detector=object(), error=TypeError)
    unsure = lambda x: torch.full((len(x),), 0.3)  # noqa: E731
    refused(r"detector must say 0 or 1 of each of 4 samples, got shape \(4,\) and values", attack, detector=unsure)
    larger = torch.zeros(2, 1, 9, 9)
    refused(r"pool must hold images \(1, 8, 8\), got shape \(2, 1, 9, 9\)", attack, pool=larger)
    refused("trials must be at least 1, got 0", attack, trials=0)
    refused("HSJ has no setting iterations; known are norm, max_iter", attack, iterations=5)
    refused("rounds must be at least 1, got 0", feature_attack, victim(), quadrants, too_bright, *attacked, rounds=0)
    x, y = (part[:20] for part in (digits()[1].x, digits()[1].y))
    everything = run_attack(victim(), preset("FGM", eps=0.01), x, y)
    refused(r"start must hold successful adversarial images, got \d+ others", attack, start=everything, images=x)


def attacks_on(network):
    """The three attacks, cut short, on a network with the start images of :func:`attacked`."""
    surrogate = distill(score, np.random.default_rng(0).random((20, 4)), copies=1, epochs=1)
    return {
        "black box": lambda start, x: black_box(network, too_bright_image, start, x, pool=x, **HSJ),
        "features": lambda start, x: feature_attack(
            network, quadrants, too_bright, start, x, weights=[(1.0, 1.0)], rounds=1, steps=2, **HSJ
        ),
        "surrogate": lambda start, x: surrogate_attack(
            network, quadrants, score, surrogate, start, x, descent=ProjectedDescent(eps=0.15, steps=3, weights=[1.0])
        ),
    }


NAMES = ["black box", "features", "surrogate"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_of_any_precision_are_attacked(attacked, name, dtype):
    start, images = attacked
    network = copy.deepcopy(victim()).to(dtype)
    fooled = network(start.images.to(dtype)).argmax(1) != start.labels
    start, images = start.subset(fooled), images[fooled]
    result = attacks_on(network)[name](start, images.to(dtype).clamp(0, 1))
    assert result.images.dtype == torch.float32
    assert result.images.isfinite().all()
    assert torch.equal(result.wrong, network(result.images.to(dtype)).argmax(1) != start.labels)
    assert {p.dtype for p in network.parameters()} == {dtype}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_does_not_matter(attacked, name, mode):
    expected = attacks_on(victim())[name](*attacked)
    with mode():
        result = attacks_on(victim())[name](attacked[0], attacked[1].clone())
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.detected, expected.detected)


@pytest.mark.parametrize("name", NAMES)
def test_network_and_random_states_are_restored(attacked, name):
    network = copy.deepcopy(victim()).train()
    network.head.eval()
    with unchanged(network):
        attacks_on(network)[name](*attacked)


def test_a_network_of_the_features_gets_no_gradients(attacked):
    reader = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.eye_(reader.weight)
    options = {"weights": [(1.0, 1.0)], "rounds": 1, "steps": 1, **HSJ}
    feature_attack(victim(), lambda network, x: reader(quadrants(network, x)), too_bright, *attacked, **options)
    assert reader.weight.grad is None


def test_what_a_surrogate_attack_is_given_is_checked(attacked):
    surrogate = distill(score, np.random.default_rng(0).random((20, 4)), copies=1, epochs=1)
    start, images = attacked
    given = {"features": quadrants, "score": score, "surrogate": surrogate, "start": start, "images": images}

    def attack(**changed):
        return surrogate_attack(victim(), **(given | {"descent": ProjectedDescent(steps=1)} | changed))

    assert len(attack().images) == 4
    for message, changed in {
        "start must be Attacked, as run_attack returns them, got Tensor": {"start": start.images},
        "features must be an instance, got the class Trajectory: call it": {"features": Trajectory},
        "features must be a function of network and images, .* got NoneType": {"features": None},
        r"score must be a function .*predict_proba\(z\)\[:, 1\], got object": {"score": object()},
        "surrogate must be a Surrogate, as distill makes it, got NoneType": {"surrogate": None},
        r"descent must be a ProjectedDescent, got dict: ProjectedDescent\(eps=0.03\)": {"descent": {"eps": 0.03}},
        "threshold must be a number, got '5 %'": {"threshold": "5 %"},
    }.items():
        refused(message, attack, **changed, error=TypeError)
    for message, changed in {
        r"surrogate must return logits \(B,\), got shape \(4, 1\)": {"surrogate": torch.nn.Linear(4, 1)},
        r"features must be \(B, 4\), as those that the surrogate was fitted to, got shape \(4, 5\)": {
            "features": lambda network, x: F.pad(quadrants(network, x), (0, 1)),
            "score": lambda z: score(z[:, :4]),
        },
        r"threshold must lie in \[0, 1\), as scores do, got 5": {"threshold": 5},
        r"threshold must lie in \[0, 1\), as scores do, got nan": {"threshold": torch.nan},
        "batch_size must be at least 1, got 0": {"batch_size": 0},
        "start must hold successful adversarial images that are detected, got none": {
            "start": start.subset(torch.zeros(4, dtype=torch.bool)),
            "images": images[:0],
        },
    }.items():
        refused(message, attack, **changed)


@pytest.mark.parametrize("name", ["black box", "features", "surrogate"])
def test_clean_images_of_others_are_refused_and_rounded_attacks_are_not(attacked, name):
    start, images = attacked
    message = (
        "images must be the clean ones of start, in its order, got 4 of 4 farther from theirs than the attack went"
    )
    refused(message, attacks_on(victim())[name], start, images.roll(1, 0))
    rounded = dataclasses.replace(start, images=(255 * start.images).round() / 255)
    assert len(attacks_on(victim())[name](rounded, images).images) == 4


def test_a_gradient_that_is_not_finite_is_no_attack(attacked):
    def rooted(network, x):
        return quadrants(network, x) + (x - x.detach()).square().flatten(1).sum(1, keepdim=True).sqrt()

    surrogate = distill(score, np.random.default_rng(0).random((20, 4)), copies=1, epochs=1)
    options = {"descent": ProjectedDescent(steps=1)}
    message = "features and network must have finite gradients"
    refused(message, surrogate_attack, victim(), rooted, score, surrogate, *attacked, **options)


def test_settings_of_the_descent_are_checked():
    refused("eps must be at most 1, in units of pixels", ProjectedDescent, eps=8.0)
    refused("eps must be positive and weights not empty, got 0", ProjectedDescent, eps=0)
    refused("steps must be at least 1, got 0", ProjectedDescent, steps=0)
    refused("norm must be 'inf' or 2, got 1", ProjectedDescent, norm=1)
    refused("step_size must be positive", ProjectedDescent, step_size=0.0)


def test_features_that_are_not_finite_or_do_not_vary(attacked):
    def with_constant(network, x):
        return torch.cat([quadrants(network, x), torch.full((len(x), 1), 1e8 + 0.1)], 1)

    def bright(z):
        return z.nan_to_num(1)[:, :4].mean(1) > LIMIT

    options = {"weights": [(10.0, 0.1)], "rounds": 2, "steps": 4, **HSJ}
    result = feature_attack(victim(), with_constant, bright, *attacked, **options)
    assert result.share >= 0.5
    with_nan = lambda network, x: with_constant(network, x) * torch.nan  # noqa: E731
    refused("features must be finite", feature_attack, victim(), with_nan, bright, *attacked, **options)
