"""What the small-data experiment found: rows beside the thesis' figures, table, sentences."""

from __future__ import annotations

from typing import Any

from small_data_setup import METHODS, PROTOCOL, WAYS, Config

from lab.statistics import Interval, mean_interval, paired_p_value

# highest test accuracy over epochs, mean and half-width of the 95 % interval: table 1 (50 runs), tables 2 and 18 (20)
THESIS: dict[str, dict[int, dict[str, tuple[float, float]]]] = {
    "mnist": {
        500: {"vanilla": (90.8, 0.4), "least action": (90.9, 0.2)},
        400: {"vanilla": (88.4, 0.5), "least action": (88.4, 0.4)},
        300: {"vanilla": (83.5, 0.5), "least action": (86.2, 0.4)},
        200: {"vanilla": (74.9, 1.0), "least action": (82.0, 0.5)},
        100: {"vanilla": (56.4, 1.5), "least action": (70.0, 1.0)},
    },
    "cifar10": {
        50000: {"vanilla": (91.49, 0.1), "least action": (91.94, 0.1)},
        30000: {"vanilla": (88.61, 0.14), "least action": (89.41, 0.1)},
        20000: {"vanilla": (85.73, 0.14), "least action": (86.74, 0.13)},
        10000: {"vanilla": (79.25, 0.25), "least action": (80.9, 0.16)},
        5000: {"vanilla": (70.32, 0.32), "least action": (72.58, 0.21)},
        4000: {"vanilla": (67.8, 0.26), "least action": (70.12, 0.3)},
        1000: {"vanilla": (49.22, 0.52), "least action": (51.14, 0.45)},
        500: {"vanilla": (41.55, 0.41), "least action": (42.92, 0.37)},
        100: {"vanilla": (26.98, 0.99), "least action": (25.34, 0.76)},
    },
}


def summarize(
    config: Config,
    condition: str,
    size: int,
    chosen: dict[tuple[str, str], dict[str, Any]],
    results: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """One row per method and way, differences to the plain network paired over the instances."""

    def values(method: str, rate: float, weight: float, name: str) -> list[float]:
        key = (method, rate, weight)
        jobs = [r for r in results if (r["method"], r["learning_rate"], r["weight"]) == key]
        return [100 * v for r in sorted(jobs, key=lambda r: r["seeds"]) for v in r[name]]

    rows = []
    for way in WAYS if chosen else ():
        plain: list[float] = []
        for method in METHODS:
            best = chosen[method, way]
            key = (method, best["learning_rate"], best["weight"])
            found = values(*key, way)
            plain = plain or found
            row = {
                "condition": condition,
                "size": size,
                "method": method,
                "statistics": "running" if way == "last" else "recomputed",
            }
            row |= {"learning_rate": key[1], "weight": key[2], "accuracy": mean_interval(found)}
            row["action"] = mean_interval([v / 100 for v in values(*key, f"action_{way}")])
            rows.append(row | _difference(found, plain if method != "vanilla" else None))
    for way, shown in (("max", "running, max over epochs"), ("last", "running"), ("recalibrated", "recomputed")):
        plain = []
        for method in PROTOCOL:
            found = values(method, 0.01, 0.0, way)
            plain = plain or found
            row = {"condition": condition, "size": size, "method": method, "statistics": shown}
            row |= {"learning_rate": 0.01, "weight": 0.0, "accuracy": mean_interval(found)}
            actions = values(method, 0.01, 0.0, f"action_{'recalibrated' if way == 'recalibrated' else 'last'}")
            row["action"] = mean_interval([v / 100 for v in actions])
            figures = THESIS.get(config.dataset, {}).get(size, {})
            figure = figures.get(method.removeprefix("thesis: ").removesuffix(", divided"))
            if figure and condition == "standard" and way == "max":
                row |= {"thesis": Interval(*figure, 20), "meets": mean_interval(found).meets(Interval(*figure, 20))}
            rows.append(row | _difference(found, plain if method != PROTOCOL[0] else None))
    return rows


def _difference(found: list[float], plain: list[float] | None) -> dict[str, Any]:
    if plain is None:
        return {}
    pairs = [a - b for a, b in zip(found, plain, strict=True)]
    return {"difference": mean_interval(pairs), "p": paired_p_value(found, plain)}


COLUMNS: dict[str, Any] = {
    "condition": "{condition}",
    "images": "{size}",
    "method": "{method}",
    "batch norm": "{statistics}",
    "lr": "{learning_rate:g}",
    "weight": lambda row: f"{row['weight']:g}" if row["weight"] else "",
    "test accuracy": "{accuracy:.2f}",
    "- vanilla": "{difference:.2f}",
    "p": "{p:.2g}",
    "action": "{action.mean:.3g}",
    "thesis": "{thesis:.2f}",
    "meets": "{meets}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for row in rows:
        if "difference" not in row:
            continue
        what = ("no difference to", "better than", "worse than")[row["difference"].sign]
        lines.append(
            f"{row['condition']}, {row['size']} images, {row['method']} ({row['statistics']} statistics): {what} the "
            f"plain network, {row['difference']:.2f} points, p = {row['p']:.2g}"
        )
    return lines
