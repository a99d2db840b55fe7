"""A report of a monitor: a page with its figures and the images that it is surest of, whole in one file."""

from __future__ import annotations

import base64
import heapq
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from odenets.errors import check_count
from odenets.files import write_atomically
from odenets.inputs import check_batches, inputs_in, is_by_keyword
from odenets.plotting.figures import save
from odenets.plotting.monitoring import monitor_scores, surest_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from odenets.detection import Assessment, Monitor

__all__ = ["monitor_report"]

PAGE = Template("""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>$title</title>
<style>
body { font-family: sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; line-height: 1.4 }
img { max-width: 100% } table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right }
td.name, th.name { text-align: left } tr.flagged { background: #fbe3e0 } thead { border-bottom: 1px solid #888 }
</style></head>
<body>
<h1>$title</h1>
<ul>$facts</ul>
<img src="data:image/png;base64,$scores" alt="scores, p-values and flags">
<h2>The images that it is surest of</h2>
$pictures
<table><thead><tr><th>image</th><th class="name">name</th><th>predicted</th><th>score</th><th>p-value</th></tr></thead>
<tbody>$rows</tbody></table>
</body></html>
""")


def monitor_report(
    monitor: Monitor,
    images: Any,
    folder: str | Path,
    *,
    foreign: Any = None,
    names: Sequence[str] | None = None,
    window: int = 200,
    surest: int = 12,
    title: str = "Monitor",
) -> Assessment:
    """Write ``report.html``, ``scores.png`` and ``surest.png`` to a folder: what a monitor says of images.

    Scores stand beside those of the calibration images and the threshold, p-values beside the uniform distribution,
    the share that is flagged over time, and a line says whether it drifts. With images that are known to be foreign
    there is the receiver operating characteristic too, of these against those checked. The page holds its figures.

    Args:
        monitor: fitted.
        images: a tensor, a mapping of inputs by keyword, or a loader, which may be larger than memory: no more images
            are kept than are shown.
        folder: which is made if it is not there.
        foreign: images likewise, or none.
        names: of the images, such as their files; their places if not given.
        window: images in a test of drift.
        surest: how many images are shown.
        title: of the page.

    Returns:
        What the monitor says of the images.

    Raises:
        TypeError, ValueError: as :meth:`odenets.detection.Monitor.stream`; or not one name for each image.

    >>> import tempfile, torch
    >>> from odenets.detection import Monitor
    >>> from odenets.models import small_network
    >>> monitor = Monitor(small_network(depth=2)).fit(torch.rand(100, 1, 8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     assessment = monitor_report(monitor, torch.rand(30, 1, 8, 8), folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['report.html', 'scores.png', 'surest.png']
    """
    check_count("surest", surest, 1)
    kept = _Surest(surest)
    parts = [kept.add(part) for part in monitor.stream(kept.passing(images, monitor.batch_size))]
    assessment = parts[0].joined(parts)
    if names is not None and len(names) != len(assessment):
        raise ValueError(f"names must hold one for each of {len(assessment)} images, got {len(names)}")
    name_of = [str(i) for i in range(len(assessment))] if names is None else [*map(str, names)]
    scores = monitor_scores(
        monitor.calibration_scores,
        assessment.scores,
        assessment.p_values,
        threshold=monitor.threshold(),
        false_positive_rate=monitor.false_positive_rate,
        foreign=None if foreign is None else monitor.scores(foreign),
        window=window,
    )
    places = [int(i) for i in assessment.surest[:surest]]
    figures = {"scores": scores}
    if kept.images:
        titles = [f"{_short(name_of[i])}\np = {assessment.p_values[i]:.3g}" for i in places]
        figures["surest"] = surest_images([kept.images[i] for i in places], titles)
    save(figures, folder)
    page = PAGE.substitute(
        title=escape(title),
        facts="".join(f"<li>{escape(fact)}</li>" for fact in _facts(monitor, assessment, window)),
        scores=_encoded(figures["scores"]),
        pictures=f'<img src="data:image/png;base64,{_encoded(figures["surest"])}" alt="">' if kept.images else "",
        rows="".join(_row(assessment, i, name_of[i]) for i in places),
    )
    write_atomically(Path(folder) / "report.html", page.encode())
    return assessment


class _Surest:
    """The images of the largest scores among batches that pass, and no others.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count, self.batch = count, None
        self.heap: list[tuple[float, int]] = []
        self.images: dict[int, np.ndarray] = {}

    def passing(self, images: Any, batch_size: int) -> Any:
        """The same images, a batch at a time; those by keyword as they are, of which no picture is shown."""
        if is_by_keyword(images):
            return images
        if not isinstance(images, Tensor):
            check_batches(images, "images")
        return self._passing(images.split(batch_size) if isinstance(images, Tensor) else images)

    def _passing(self, batches: Iterable[Any]) -> Iterator[Any]:
        for self.batch in batches:
            yield self.batch

    def add(self, part: Assessment) -> Assessment:
        """Keep the images of a batch that are among the surest so far."""
        x = None if self.batch is None else inputs_in(self.batch, "images")
        if isinstance(x, Tensor) and x.ndim == 4:
            for k in part.surest[: self.count]:
                entry = float(part.scores[k]), -int(part.index[k])  # of equal scores the first stays
                if len(self.heap) == self.count:
                    out = heapq.heappushpop(self.heap, entry)
                    if out == entry:
                        continue
                    del self.images[-out[1]]
                else:
                    heapq.heappush(self.heap, entry)
                self.images[-entry[1]] = x[int(k)].detach().float().cpu().numpy().copy()
        return part


def _facts(monitor: Monitor, assessment: Assessment, window: int) -> list[str]:
    """What the page says in words."""
    rate, n, size = monitor.false_positive_rate, len(monitor.calibration_scores), len(assessment)
    low, high = monitor.interval()
    flagged = int(assessment.flags.sum())
    discovered = int(assessment.discoveries().sum())
    return [
        f"{flagged} of {size} images are flagged ({100 * flagged / size:.1f} %), where {100 * rate:g} % of clean ones "
        "are in the mean",
        f"with {n} calibration images this monitor's own share is between {100 * low:.1f} and {100 * high:.1f} % of "
        "clean images, with a probability of 90 %",
        f"{discovered} are flagged where at most 5 % of those flagged may be clean (Benjamini and Hochberg)",
        str(monitor.drift(assessment.p_values, window=window)),
    ]


def _row(assessment: Assessment, i: int, name: str) -> str:
    kind = ' class="flagged"' if assessment.flags[i] else ""
    cells = (
        f"<td>{assessment.predicted[i]}</td><td>{assessment.scores[i]:.4g}</td><td>{assessment.p_values[i]:.3g}</td>"
    )
    return f'<tr{kind}><td>{i}</td><td class="name">{escape(name)}</td>{cells}</tr>'


def _short(name: str, longest: int = 20) -> str:
    name = Path(name).name or name
    name = name.replace("$", r"\$")  # which begins a formula
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


def _encoded(figure: Figure) -> str:
    opened = BytesIO()
    figure.savefig(opened, format="png", dpi=100)
    return base64.b64encode(opened.getvalue()).decode()
