"""What of [K24] is compared with what of the committed results, by groups of claims."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import cache
from typing import Any

from lab.evidence import benchmark, row, rows, sentence
from lab.reproduction import Cell, Claim, Comparison
from lab.statistics import Interval

__all__ = ["CONTROLS", "comparisons"]

CIRCLES = "Least action in two dimensions"
FEW = "Least action on few images"
MODULES = "Module-wise training"
DETECTION = "Detection by the trajectory"
DEPTH = "Adaptive depth"
CONTROLS = {
    CIRCLES: "epoch chosen on validation points",
    FEW: "statistics recomputed",
    MODULES: "statistics recomputed",
    DETECTION: "",
    DEPTH: "",
}
"""Groups of claims, and the control that each has."""
NAMES = {"lap": "least action", "fixed lambda": "a fixed weight"}
TABLES = {
    "19": "one block",
    "21": "50 points, nine blocks",
    "22": "nine blocks that start at N(0, 5)",
    "20": "100 blocks",
}
NETWORKS = {
    "vgg19": "VGG-19",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
    "swin_t": "Swin-T",
}
MEASURE = "points of accuracy"


@cache
def comparisons() -> dict[str, tuple[Comparison, ...]]:
    """All comparisons by group."""
    groups = {CIRCLES: _circles(), FEW: _few_images(), MODULES: _modules(), DETECTION: _detection(), DEPTH: _depth()}
    return {group: tuple(each) for group, each in groups.items()}


def _circles() -> Iterator[Comparison]:
    for table, where in TABLES.items():
        result = "circles_20" if table == "20" else "circles"
        conditions = "20 instances of 100, 15 epochs of 100" if table == "20" else ""
        for norm, column in ((False, "plain"), (True, "batch norm")):
            for method, name in NAMES.items():
                words = f"{where}{', batch norm' * norm}: {name} less plain"
                first = (table, method, norm) == ("19", "lap", False)
                headline = "circles, one block: least action carries more points (%)" if first else ""
                counted = conditions or ("100 instances, best epoch on test, as in the thesis" if first else "")
                ours = row(result, table=table, method=method, norm=norm)
                yield Claim(f"table {table}", words, "circles", counted, headline).effect(
                    (table, method, column),
                    (table, "resnet", column),
                    ours["max_difference"],
                    ours["chosen_difference"],
                )
        cells = rows(result, table=table)
        yield Claim(f"table {table}", f"{where}: all cells", "circles", conditions).cells(cells, "maximum")
    for method, name in (("resnet", "plain"), ("fixed lambda", "fixed weight")):
        for norm, column in ((False, "plain"), (True, "batch norm")):
            words = f"two blocks{', batch norm' * norm}, {name}: epochs to a faultless network"
            ours = row("circles", table="epochs", method=method, norm=norm)
            conditions = f"of the {ours['arrived']} of {ours['instances']} that get there within 100 epochs"
            claim = Claim("section F.5.2", words, "circles", conditions, digits=0)
            yield claim.level(("F.5.2", method, column), ours["epochs"])


def _few_images() -> Iterator[Comparison]:
    best, own = "running, max over epochs", "learning rate and weight chosen for each method"
    headlines = {
        100: "MNIST, 100 images: least action gains (points)",
        200: "MNIST, 200 images: least action gains (points)",
    }
    for size in (100, 200, 300, 400, 500):
        cells: tuple[Cell, Cell] = ("1", size, "least action"), ("1", size, "vanilla")
        protocol = f"small_data_mnist_protocol_{size if size < 400 else '400_500'}"
        for method, words in (
            ("thesis: least action", "the thesis' protocol: least action less plain"),
            ("thesis: least action, divided", "lambda divides the action as in the text: least action less plain"),
        ):
            if size in (100, 300) and "divided" in method:
                continue
            ways = (_difference(protocol, size=size, method=method, statistics=s) for s in (best, "recomputed"))
            headline = "" if "divided" in method else headlines.get(size, "")
            conditions = "20 seeds of 50; best epoch on test, as in the thesis"
            claim = Claim("table 1", f"MNIST, {size} images, {words}", "small_data", conditions, headline)
            yield claim.effect(*cells, *ways)
        both = rows(protocol, size=size, method=["thesis: vanilla", "thesis: least action"], statistics=best)
        words = f"MNIST, {size} images, the thesis' protocol: both cells"
        yield Claim("table 1", words, "small_data", "20 seeds of 50").cells(both, "accuracy")
        if size > 300:
            continue
        chosen = f"small_data_mnist{f'_{size}' if size > 100 else ''}"
        conditions = "20 seeds of 50; last epoch for best on test" + ("; 20 epochs of 30" if size > 100 else "")
        headline = "the same with 100 images, a learning rate chosen for each method" if size == 100 else ""
        ours, control = (_difference(chosen, method="least action", statistics=s) for s in ("running", "recomputed"))
        claim = Claim("table 1", f"MNIST, {size} images, {own}", "small_data", conditions, headline)
        yield claim.effect(*cells, ours, control)
    cells = ("18", 100, "least action"), ("18", 100, "vanilla")
    words = "CIFAR-10, 100 images, the thesis' protocol, torch's own weights: least action less plain"
    ours = _difference("small_data_cifar10", method="thesis, torch's weights: least action")
    yield Claim("tables 2 and 18", words, "small_data", "16 channels of 100").effect(*cells, ours)
    conditions = "16 channels of 100, 30 epochs of 200"
    ways = (_difference("small_data_cifar10", method="least action", statistics=s) for s in ("running", "recomputed"))
    yield Claim("tables 2 and 18", f"CIFAR-10, 100 images, {own}", "small_data", conditions).effect(*cells, *ways)
    for method, subject in (("least action", "least action lets"), ("h = 0.1", "small steps let")):
        conditions = "digits, ten seeds; a first convolution that is alive"
        words = f"30 blocks without batch norm: {method.replace('h =', 'steps of h =')} less plain"
        ours = _difference("no_batchnorm", depth=30, method=method)
        claim = Claim("Fig. 14", words, "no_batchnorm", conditions, digits=2)
        yield claim.sign(1, ours, f"{subject} deep networks train")


def _difference(result: str, **where: Any) -> Any:
    return row(result, **where)["difference"]


def _modules() -> Iterator[Comparison]:
    for result, table, size, words, conditions in (
        ("mnist", "25", 150, "MNIST, 150 images", "5 seeds of 10, 30 epochs of 300; the encoder learns"),
        ("cifar10", "26", 500, "CIFAR-10, 500 images", "16 channels of 100, 5 seeds of 10, 12 epochs of 300"),
    ):
        name, words = f"module_wise_{result}", f"{words}, twenty modules"
        claim = Claim(f"table {table}", f"{words}: TRGL less VanGL, last module", "module_wise", conditions)
        cells: tuple[Cell, Cell] = (table, size, "parallel TRGL"), (table, size, "parallel VanGL")
        yield claim.effect(*cells, _difference(name, method="TRGL"))
        yield Claim(f"table {table}", f"{words}: all cells", "module_wise", conditions).cells(rows(name), "last")
    for schedule, words in (("sequential", "in sequence"), ("laps", "in laps"), ("parallel", "in parallel")):
        conditions = "200 digits for 5000 images of CIFAR-100; last module for the best"
        ours = row("module_wise", schedule=schedule, method="TRGL")
        yield Claim("table 10", f"ten modules {words}: TRGL less VanGL", "module_wise", conditions, digits=2).effect(
            ("10", 5000, f"{schedule} TRGL"), ("10", 5000, f"{schedule} VanGL"),
            ours["difference"], ours["recalibrated_difference"],
        )  # fmt: skip
    few = row("module_depth_20", condition="few images", method="TRGL")
    headline = "few images: the action helps late modules (points)"
    conditions = "50 digits for 1000 images of CIFAR-10; in parallel for in sequence; 20 seeds, last epoch"
    words = "few images, ten modules: the action helps the last one"
    yield Claim("table 11", words, "module_depth", conditions, headline, 2).effect(
        ("11", 1000, "sequential TRGL"), ("11", 1000, "sequential VanGL"),
        few["last_difference"], few["recalibrated_difference"],
    )  # fmt: skip
    claim = Claim("Fig. 18", "few images: TRGL less VanGL, first module", "module_depth", "50 digits", digits=2)
    yield claim.sign(-1, few["first_difference"], "early modules are held back")
    yield from _memory()


def _memory() -> Iterator[Comparison]:
    page, counted = "module_memory", "bytes of live tensors, not a GPU's"
    for count, method, kind in (
        *((count, method, "") for count in (4, 8, 16) for method in ("VanGL", "TRGL")),
        *((4, method, "equally heavy ") for method in ("VanGL*", "TRGL*")),
    ):
        words = f"ResNet-110, {count} {kind}modules, {method.strip('*')}: memory saved (%)"
        headline = "memory saved by 4 modules of ResNet-110 (%)" if (count, method) == (4, "TRGL") else ""
        saved, plain = (
            row("module_memory", network="resnet110", method=name, K=count)["saved"]
            for name in (method, "checkpointed")
        )
        beside = f"backpropagation with checkpoints saves {plain:.0f}"
        yield Claim("table 9", words, page, counted, headline, 0, beside).level(("9", count, method), saved)
    for network, title in NETWORKS.items():
        for method in ("VanGL", "TRGL"):
            saved, plain = (
                row("module_memory", network=network, method=name, K=4)["saved"] for name in (method, "checkpointed")
            )
            words, beside = (
                f"{title}, 4 modules, {method}: memory saved (%)",
                f"backpropagation with checkpoints saves {plain:.0f}",
            )
            claim = Claim("table 31", words, page, counted, digits=0, beside=beside)
            yield claim.level(("31", network, method), saved)
    times = {line["time"]: line for line in reversed(benchmark("module_wise"))}
    conditions = "ResNet-110 at 32 x 32 on a CPU"
    for count in (2, 16):
        words = f"time of {count} modules in parallel above backpropagation's (%)"
        claim = Claim("section 4.5.4", words, page, conditions, digits=0)
        yield claim.overhead(("4.5.4", count, "parallel"), float(times["VanGL / end-to-end"][f"K = {count}"]))
    ratios = [float(ratio) for name, ratio in times["TRGL / VanGL"].items() if name.startswith("K = ")]
    claim = Claim(
        "section 4.5.4", "time of TRGL above VanGL's (%)", page, f"{conditions}, mean of 2 to 16 modules", digits=0
    )
    yield claim.overhead(("4.5.4", "any", "TRGL"), statistics.fmean(ratios))


def _detection() -> Iterator[Comparison]:
    path, page, small = (
        "vanilla, trajectory",
        "detection_cifar10",
        "four blocks of 16 channels for ResNet-110; five seeds",
    )
    for attack in ("BIM", "APGD"):
        words = f"CIFAR-10, {attack} after FGM alone: accuracy of the trajectory (%)"
        ours = row("detection_cifar10_unseen", method="vanilla", kind="trajectory", tested=attack)
        yield Claim("table 13", words, page, small).level(("13", path, attack), ours["accuracy"])
    attacks = ("BIM", "APGD")
    words = "CIFAR-10, BIM and APGD after FGM alone: Mahalanobis less trajectory"
    ours = sentence("detection_cifar10_unseen", "vanilla: Mahalanobis").interval
    claim = Claim("table 13", words, page, f"{small}; area under the curve")
    yield claim.sign_of(("13", "vanilla, Mahalanobis", attacks), ("13", path, attacks), ours, MEASURE)
    for kind in ("trajectory", "Mahalanobis"):
        words = f"CIFAR-10 against CIFAR-100, seen: accuracy by {kind} (%)"
        foreign = "data/cifar100.npz"
        ours = row("detection_cifar10_ood", method="vanilla", kind=kind, seen=foreign, tested=foreign)["accuracy"]
        yield Claim("table 14", words, page, small).level(("14", f"vanilla, {kind}", "cifar100"), ours)
    yield from _seen_attacks(path)
    for attack in ("FGM", "BIM", "APGD", "DF"):
        words = f"digits, {attack}: successful images that the trajectory detects (%)"
        ours = row("detection_seen", method="vanilla", kind="trajectory", tested=attack)["detected_successful"]
        claim = Claim("table 38", words, "detection", "digits, four blocks of 16 channels")
        yield claim.level(("38", "vanilla", attack), ours)
    for method, attack, words in (
        ("vanilla", "black box", "plain, attack on the detector as a black box"),
        ("least action", "black box", "least action, attack on the detector as a black box"),
        ("least action", "features", "least action, attack on the features"),
    ):
        conditions = "four blocks on digits for ResNet-110 on CIFAR-10; FGM for CW; fewer iterations and queries"
        evaded = row("detection_adaptive", method=method, attack=attack)["evaded"]
        claim = Claim("section 5.4.5", f"{words}: detected images that evade it (%)", "detection_adaptive", conditions)
        yield claim.level(("5.4.5", method, attack), evaded)
    area = row("action_histogram", method="vanilla", images="eps = 0.1")["auroc"]
    above = Interval(area.mean - 50, area.half_width, area.n)
    words = "digits, FGM of 0.1: area under the curve of the action alone, above 50 %"
    yield Claim("Fig. 21", words, "action_histogram", "five seeds").sign(
        1, above, "the action sets attacked images apart"
    )


def _seen_attacks(path: str) -> Iterator[Comparison]:
    for attack in ("FGM", "BIM", "APGD"):
        name = f"{attack} 0.03"
        where = {"seen": name, "tested": name, "detector": "Mahalanobis"}
        ours, control = (row("detection_pretrained_resnet56", noisy=it, **where)["difference"] for it in (False, True))
        headline = "attacks are told worse by Mahalanobis than by the trajectory (points)" if attack == "FGM" else ""
        claim = Claim(
            "table 12", f"{attack}, seen: Mahalanobis less trajectory", "detection_pretrained",
            "ResNet-56 for ResNet-110; area under the curve; five splits", headline,
            beside=f"{control:.1f} where noise of that size counts as clean",
        )  # fmt: skip
        cells = ("12", "vanilla, Mahalanobis", attack), ("12", path, attack)
        yield claim.sign_of(*cells, ours, MEASURE)
    for result, data, page, attacks in (
        ("detection_seen", "digits, four blocks", "detection", ("FGM", "BIM", "APGD", "DF")),
        ("detection_mnist_seen", "MNIST, nine blocks", "detection_mnist", ("FGM", "BIM", "APGD")),
        ("detection_mnist_bs23_seen", "MNIST, four blocks", "detection_mnist", ("FGM", "BIM", "APGD")),
    ):
        for words, cell, start in (
            ("Mahalanobis less trajectory", "vanilla, Mahalanobis", "vanilla: Mahalanobis"),
            ("scenes less trajectory", "vanilla, scenes", "vanilla: scenes"),
            ("trajectory, least action less plain", "least action, trajectory", "trajectory: least action"),
        ):
            conditions = f"{data}, for ResNet-110 on CIFAR-10; area under the curve; five seeds"
            claim = Claim("table 12", f"seen attacks: {words}", page, conditions)
            ours = sentence(result, start).interval
            yield claim.sign_of(("12", cell, attacks), ("12", path, attacks), ours, MEASURE)
    mean = {"measure": "AUROC (%)", "images": "mean of the attacks", "detector": "eq. 34, forest"}
    ours, control = (row("detection_least_action", noisy=it, **mean)["difference"] for it in (False, True))
    claim = Claim(
        "table 12", "seen attacks: trajectory, least action less plain", "detection_least_action",
        f"{ours.n} pairs of ResNet-14 for ResNet-110; area under the curve",
        "least action makes attacks easier to tell (points)",
        beside=f"{control:.1f} where noise of that size counts as clean",
    )  # fmt: skip
    attacks = ("FGM", "BIM", "APGD")
    yield claim.sign_of(("12", "least action, trajectory", attacks), ("12", path, attacks), ours, MEASURE)


def _depth() -> Iterator[Comparison]:
    """Claims of section 6.2.1, which has no figures: those of a gain have a sign."""
    page, where, digits = "adaptive_depth", "section 6.2.1", "digits, for CIFAR-100; three seeds"
    untied = row(page, part="orders", network="order 3 untied, 4 blocks")["difference"]
    words = "four blocks of order 3 less twelve Euler blocks, of as many evaluations and fields (points)"
    yield Claim(where, words, page, digits, digits=2).sign(1, untied, "higher order is more efficient")
    whole = row(page, part="orders", network="eq. 43 on the ensemble, 3 blocks")
    for name, how in (("ensemble", "in one pass"), ("passes", "by a pass for each")):
        words = f"eq. 43, ensemble of its schemes {how} less what blocks carry on (points)"
        yield Claim(where, words, page, digits, digits=2).sign(1, whole[f"{name}_difference"], "ensembles gain")
    merged = row(page, part="depth", network="adaptive from 8")["share"]
    words = "eight blocks that merge: evaluations of training over those of eight fixed blocks"
    yield Claim(where, words, page, digits, digits=2).below_one(merged, "the size is reduced")
    action = row("adaptive_depth_action", network="adaptive from 8, weight 0.1")
    words = "adaptive, with the action (the weight chosen on validation images) less without (points)"
    yield Claim(where, words, page, f"{digits}; total time 4", digits=2).sign(1, action["difference"], "LAP gains")
