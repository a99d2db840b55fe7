"""The pages on the experiments, written from templates and committed results, so that no figure is typed.

    make pages

``experiments/pages`` holds a template for every page, in Markdown with expressions of Jinja that quote rows of results
(:mod:`lab.evidence`), figures of [K24] (:mod:`lab.thesis`) and verdicts on both (:mod:`lab.comparisons`). Written are
``docs/experiments/*.md``, ``docs/reproduction.md``, ``docs/benchmarks.md``, ``experiments/README.md`` and, between
comments, tables of ``README.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lab import evidence, markdown, tables
from lab.markdown import filled
from lab.reproduction_tables import compared, counts, headlines, not_run
from lab.statistics import Interval
from lab.thesis import thesis

__all__ = ["EXPERIMENTS", "main", "pages"]

EXPERIMENTS = (
    "circles", "small_data", "action_and_accuracy", "no_batchnorm", "decode", "module_wise", "module_depth",
    "module_memory", "detection", "detection_mnist", "detection_cifar10", "detection_pretrained",
    "detection_least_action", "ood", "detection_adaptive", "action_histogram", "architectures", "adaptive_depth",
    "sample_steps", "depth_search", "elastic_depth", "neural_ode", "evaluations", "bespoke_solver", "compress",
)  # fmt: skip
"""Templates of experiments, in the order of the contents."""
TEMPLATES = evidence.ROOT / "experiments/pages"
NOTICE = "<!-- Made by `make pages` from experiments/pages/{}.md and committed results: change those, not this. -->\n\n"
SHORT = ("ResNet (Euler)", "LM-ResNet", "FractalNet", "RevNet", "Hamiltonian", "Momentum ResNet")
"""Architectures of README's table, of several families."""
ATTACKS = (
    ("56", "FGM 0.01", "FGM 0.01"),
    ("56", "APGD 0.01", "APGD 0.01"),
    ("56", "FGM 0.01", "APGD 0.01"),
    ("20", "CW", "CW"),
)
"""Layers of the networks of README's table, and what detectors are fitted on and tested on."""
SPEED = {"bosh3": "bs23", "dopri5": "dopri5"}
"""Methods in README's table, by their names in the benchmarks (torchdiffeq calls bs23 bosh3)."""


def pages() -> dict[Path, str]:
    """The text of every page by its path."""
    written = {Path(f"docs/experiments/{name}.md"): _experiment(name) for name in EXPERIMENTS}
    contents = [_contents(name) for name in EXPERIMENTS]
    for name, path, up in (
        ("index", "docs/experiments/index.md", ""),
        ("README", "experiments/README.md", "../docs/experiments/"),
        ("reproduction", "docs/reproduction.md", "experiments/"),
        ("benchmarks", "docs/benchmarks.md", ""),
    ):
        rows = [row | {"link": f"[{row['title']}]({up}{row['name']}.md)"} for row in contents]
        written[Path(path)] = NOTICE.format(name) + filled(
            _environment().get_template(f"{name}.md").render(contents=rows)
        )
    readme = (evidence.ROOT / "README.md").read_text()
    made = {"speed": _speed(), "results": filled(headlines()), "architectures": _architectures()}
    for name, table in (made | {"detection": _detection()}).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{table.strip()}\n{end}{rest.split(end)[1]}"
    written[Path("README.md")] = readme
    return written


def main() -> None:
    """Write the pages that are not as they should be."""
    for path, text in pages().items():
        place = evidence.ROOT / path
        if not place.exists() or place.read_text() != text:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
            print(f"{path} is written", file=sys.stderr)


def _speed() -> str:
    """README's table of forward passes at a tolerance."""
    chosen = [
        row | {"method": SPEED[row["method"]], "field": row["field"].partition(": ")[2]}
        for row in evidence.benchmark("ratios")
        if row[""] == "forward" and row["method"] in SPEED and "64-128-64" not in row["field"]  # "": the last one
    ]
    columns = {"field": "{field}", "one call (µs)": "{one call (µs)}", "method": "{method}"}
    solvers = {"integrate": "`integrate`", "odeint": "`odeint`", "torchdiffeq": "torchdiffeq"}
    samples = {"integrate per sample": "`integrate`, a step per sample", "torchode": "torchode"}
    columns |= {heading: f"{{{name}}}" for name, heading in (solvers | samples).items()}
    return tables.table(chosen, columns)


def _architectures() -> str:
    """README's table of architectures with as many parameters."""
    columns = {
        "network": "{architecture}", "evaluations": "{evaluations}", "test accuracy (%)": "{accuracy:.1f}",
        "with noise (%)": "{noise:.1f}",
        "memory of a training step (KiB)": "{kib:.0f}", "can be undone to": "{inverse:.0e}",
    }  # fmt: skip
    chosen = [row for row in evidence.rows("architectures", budget="parameters") if row["architecture"] in SHORT]
    return tables.table(chosen, columns)


def _detection() -> str:
    """README's table of what the path tells on a trained network, beside the best that does without it."""
    rows = []
    for layers, seen, tested in ATTACKS:
        found = evidence.rows(f"detection_pretrained_resnet{layers}", noisy=True, seen=seen, tested=tested)
        of = {row["detector"]: row["auroc"] for row in found}
        rival = max((name for name in of if not name.startswith(("eq. 34", "separation"))), key=lambda x: of[x].mean)
        rows.append(
            {
                "images": f"{tested}, {'seen' if seen == tested else f'after {seen}'}, ResNet-{layers}",
                "path": of["eq. 34, forest"],
            }
            | {"separation": of["separation"], "rival": f"{of[rival]:.1f} ({rival})"}
            | {"joined": of["separation and others"]}
        )
    for images, words in {"near": "CIFAR-100 (near)", "far": "GTSRB, blended digits, textures (far)"}.items():
        of = {row["score"]: row["auroc"] for row in evidence.rows("ood_resnet56", images=images)}
        path, joined = (of.pop(name) for name in ("trajectory", "joined"))
        rival = max(of.keys() - {"best of the last layer"}, key=lambda x: of[x].mean)
        rows.append({"images": words, "path": path, "rival": f"{of[rival]:.1f} ({rival})", "joined": joined})
    return tables.table(
        rows,
        {"images": "{images}", "path": "{path:.1f}", "and of the smoothed image": "{separation:.1f}"}
        | {"best without the path": "{rival}", "joined": "{joined:.1f}"},
    )


def _experiment(name: str) -> str:
    module: Any = _environment().get_template(f"{name}.md").module
    parts = [
        f"# {module.title}",
        str(module.question),
        f"**Answer.** {module.answer}",
        f"```sh\n{_command(module)}\n```",
        str(module),
        "## Runs",
        _runs(module.results),
    ]
    return NOTICE.format(name) + filled("\n\n".join(parts))


def _command(module: Any) -> str:
    return getattr(module, "command", None) or evidence.command(module.results[0])


def _contents(name: str) -> dict[str, str]:
    """The row of an experiment in the contents."""
    module: Any = _environment().get_template(f"{name}.md").module
    words = {key: " ".join(str(getattr(module, key)).split()) for key in ("title", "question", "answer")}
    return words | {"name": name, "command": f"`{_command(module)}`", "minutes": evidence.minutes(module.results[0])}


def _runs(results: Iterable[str]) -> str:
    """How the results of a page were made, and where they are."""
    rows, machines = [], dict[str, list[str]]()
    for result in results:
        run = evidence.environment(result)
        link = f"[`{result}`](../../experiments/results/{result}/summary.json)"
        seeds = max(len(run["seeds"]), evidence.config(result).get("instances", 0))
        row = {"result": link, "command": f"`{evidence.command(result)}`", "minutes": evidence.minutes(result)}
        rows.append(row | {"seeds": seeds or None, "commit": f"`{run['commit'][:7]}`" if "commit" in run else None})
        machines.setdefault(evidence.machine(result), []).append(f"`{result}`")
    columns = {name: f"{{{name}}}" for name in ("result", "command", "minutes", "seeds", "commit")}
    how = (
        "Links lead to the summary of a run (every row, commit, versions, seeds); beside it, in `experiments/results`, "
        "are its whole table, configuration and figures. "
        f"Minutes are those of the machine ({_machines(machines)}), where processors do other work at times; "
        '"at least" is a run that was resumed and tells of its last part alone.'
    )
    return f"{tables.table(rows, columns)}\n\n{how}"


def _machines(results: dict[str, list[str]]) -> str:
    """The machines, the usual one first, the others with the results that are of them."""
    usual, *others = sorted(results, key=lambda machine: -len(results[machine]))
    return "; ".join([usual, *(f"{', '.join(results[machine])}: {machine}" for machine in others)])


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"f": _fixed, "p": _p_value}
    quoted = {name: getattr(evidence, name) for name in evidence.__all__ if name.islower()}
    quoted |= {f.__name__: f for f in (markdown.figure, markdown.pivot, markdown.sections, tables.table, thesis)}
    environment.globals.update(quoted, comparisons=compared, counts=counts, not_run=not_run)
    return environment


def _fixed(value: Interval | float, digits: int) -> str:
    """A number or an interval with so many digits."""
    return f"{value:z.{digits}f}"


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


if __name__ == "__main__":
    main()
