"""Pages on the experiments: what they say is written from committed results, and a template types no figure."""

import re
from pathlib import Path

import pytest

from lab import evidence, reproduction
from lab.comparisons import comparisons
from lab.pages import EXPERIMENTS, pages
from lab.statistics import Interval
from lab.thesis import thesis

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "experiments/pages").glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FIGURE = re.compile(r"±|(?<![\w.])\d+\.\d+|(?<![\w.])\d+ (?:%|points)")
SETTINGS = {  # what templates may type: settings of a run and of the thesis, no outcome
    "0.004", "0.01", "0.03", "0.05", "0.1", "0.9", "40 %", "50 points", "95 %", "100 %",
}  # fmt: skip


@pytest.fixture(scope="module")
def written():
    return pages()


def test_the_pages_are_as_their_templates_and_the_results_make_them(written):
    stale = [str(path) for path, text in written.items() if (ROOT / path).read_text() != text]
    assert stale == [], "run: make pages"


def test_no_other_page_of_an_experiment_is_there(written):
    there = {path.relative_to(ROOT) for path in (ROOT / "docs/experiments").glob("*.md")}
    assert there == {path for path in written if path.parent == Path("docs/experiments")}
    assert {template.stem for template in TEMPLATES} == {*EXPERIMENTS, "README", "index", "reproduction", "benchmarks"}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_types_no_figure(template):
    prose = re.sub(r"\{[{%].*?[%}]\}", "", template.read_text(), flags=re.DOTALL)
    prose = re.sub(r"\[[^\]]*\]|`[^`]*`|section [A-Z\d.]+", "", prose)  # citations, commands and sections
    assert [figure for figure in FIGURE.findall(prose) if figure not in SETTINGS] == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_an_expression_names_settings_and_computes_no_figure(template):
    expressions = re.findall(r"\{\{.*?\}\}|\{%.*?%\}", template.read_text(), re.DOTALL)
    numbers = {n for e in expressions for n in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", re.sub(r'"[^"]*"', "", e))}
    assert numbers <= {"1.0", "8.0", "0.05", "0.9"}  # total times, a level of significance, batch norm's momentum


def test_links_lead_to_files(written):
    for path, text in written.items():
        if path == Path("README.md"):  # of which one table is made here
            continue
        targets = [target for target in LINK.findall(text) if "://" not in target]
        assert [target for target in targets if not (ROOT / path.parent / target).exists()] == [], path


def test_tables_are_tables(written):
    for path, text in written.items():
        for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            heading, rule, *body = lines.splitlines()
            assert re.fullmatch(r"(\| *:?-+:? *)+\|", rule), (path, heading)
            assert {line.count("|") for line in (heading, *body)} == {rule.count("|")}, (path, heading)


def test_every_committed_result_has_a_page(written):
    text = "".join(text for path, text in written.items() if path.parent == Path("docs/experiments"))
    results = {path.parent.name for path in (ROOT / "experiments/results").glob("*/summary.json")}
    assert {name for name in results if f"results/{name}/summary.json" not in text} == set()


def test_a_figure_of_a_page_has_words_that_say_what_is_seen(written):
    shown = [m for path, text in written.items() if path.name != "README.md" for m in re.findall(r"!\[(.*?)\]\(", text)]
    assert len(shown) >= 15
    assert [alt for alt in shown if len(alt) < 50] == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Interval(a, b, 20), Interval(c, d, 50))
        for a in (-4, 1, 9)
        for b in (0.5, 3)
        for c in (-5, 0, 5)
        for d in (1, 6)
    ],
)
def test_an_effect_is_judged_alike_whichever_method_comes_first(ours, theirs):
    turned = (Interval(-each.mean, each.half_width, each.n) for each in (ours, theirs))
    assert reproduction.effect(ours, theirs) == reproduction.effect(*turned)


@pytest.mark.parametrize("gain", [0.2, 1.0, 3.0, 9.0])
def test_an_interval_that_holds_0_and_one_that_does_not_are_apart_only_if_they_do_not_meet(gain):
    none, some = Interval(0.1, 1.0, 20), Interval(gain, 0.5, 20)
    verdicts = reproduction.effect(none, some), reproduction.effect(some, none)
    if not some.sign:
        assert verdicts == ("none in either", "none in either")
    else:
        assert verdicts == (("open", "open") if none.meets(some) else ("not reproduced", "differs"))


def test_ratios_near_1_are_compared_by_what_they_are_above_1():
    claim = reproduction.Claim("section 4.5.4", "", "", digits=0)
    verdicts = {claim.overhead(("4.5.4", 2, "parallel"), ratio).ours.verdict for ratio in (1.056, 1.064)}
    assert (verdicts, thesis("4.5.4", 2, "parallel")) == ({"reproduced"}, 1.06)
    assert claim.overhead(("4.5.4", 2, "parallel"), 1.08).ours == reproduction.Figure("8", "higher")
    assert claim.overhead(("4.5.4", 2, "parallel"), 0.98).ours == reproduction.Figure("-2", "lower")


def all_comparisons():
    return [comparison for group in comparisons().values() for comparison in group]


def numbers(text):
    return [float(n) for n in re.findall(r"-?\d+\.?\d*", text.split(" (")[0])]


def test_verdicts_are_those_of_the_figures_that_are_shown():
    for comparison in all_comparisons():
        for figure in filter(None, (comparison.ours, comparison.control)):
            theirs, ours = numbers(comparison.theirs), numbers(figure.text)
            if figure.verdict == "reproduced" and len(theirs) == len(ours) == 2:
                assert abs(theirs[0] - ours[0]) <= theirs[1] + ours[1] + 0.2, comparison.claim
            if figure.verdict == "not reproduced" and len(ours) == 2:
                assert abs(ours[0]) <= ours[1] + 0.1, comparison.claim
            if figure.verdict in ("open", "differs") and len(theirs) == len(ours) == 2:
                apart = abs(theirs[0] - ours[0]) - theirs[1] - ours[1]
                assert apart <= 0.2 if figure.verdict == "open" else apart >= -0.2, comparison.claim
            if figure.verdict == "opposite" and theirs:
                assert theirs[0] * ours[0] < 0, comparison.claim


def test_a_comparison_is_of_differences_in_the_thesis_and_in_a_result():
    (gain,) = (c for c in all_comparisons() if c.claim.words.startswith("MNIST, 100 images, the thesis' protocol: l"))
    assert gain.theirs.startswith(f"{thesis('1', 100, 'least action').mean - thesis('1', 100, 'vanilla').mean:.1f}")
    row = evidence.row("small_data_mnist_protocol_100", method="thesis: least action", statistics="recomputed")
    assert gain.control is not None
    assert gain.control.text == f"{row['difference']:.1f}"


def test_a_run_on_another_machine_is_named_with_it(written):
    runs = written[Path("docs/experiments/small_data.md")].split("## Runs")[1]
    assert "`small_data_mnist_protocol_400_500`: NVIDIA H200, torch 2.11.0" in " ".join(runs.split())
    machines = {evidence.environment(path.parent.name)["device"] for path in evidence.RESULTS.glob("*/summary.json")}
    assert machines == {"AMD EPYC", "Intel(R) Xeon(R) Processor", "NVIDIA H200"}


def test_readme_shows_what_the_comparisons_say(written):
    between = written[Path("README.md")].split("<!-- results: begin -->")[1].split("<!-- results: end -->")[0]
    shown = [comparison for comparison in all_comparisons() if comparison.claim.headline]
    assert between.count("\n|") == 2 + len(shown)
    assert [comparison.claim.headline for comparison in shown if not comparison.claim.conditions] == []


def test_memory_stands_beside_backpropagation_that_computes_twice():
    saved = [comparison.claim for comparison in all_comparisons() if "memory saved" in comparison.claim.words]
    assert len(saved) == 18
    for claim in saved:
        network = claim.words.partition(",")[0].lower().replace("resnet-", "resnet").replace("vgg-", "vgg")
        count = int(re.findall(r"(\d+) (?:equally heavy )?modules", claim.words)[0])
        rival = evidence.row("module_memory", network=network.replace("-", "_"), method="checkpointed", K=count)
        assert claim.beside.endswith(f" {rival['saved']:.0f}"), claim


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: evidence.row("circles", table="19"), "one row"),
        (lambda: evidence.rows("circles", table="99"), "must have a row"),
        (lambda: evidence.sentence("detection_seen", "vanilla"), "one sentence"),
    ],
)
def test_what_is_not_there_or_not_one_is_named(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()
