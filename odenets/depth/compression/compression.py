"""compress: a trained network with fewer blocks, without training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from odenets.adapting import AdaptedModel
from odenets.depth.compression.candidates import CHOICES, Candidate
from odenets.depth.compression.changes import known_to_hugging_face
from odenets.depth.compression.selection import Search, Settings
from odenets.depth.compression.units import Unit
from odenets.errors import check_count, check_number
from odenets.modes import device_of
from odenets.printing import table
from odenets.training.progress import counting

__all__ = ["Compression", "compress"]

OURS = ("divergence", "error")
BASELINES = ("influence", "residue", "replaceme")


class Compression:
    """A network with fewer blocks, and what it cost.

    Attributes:
        model: the compressed network.
        runs: what became of which blocks, in order.
        divergence: of its outputs from those of the whole network, on calibration data that was held out from the
            fits: of Kullback and Leibler in nats for logits, else the relative square error. It is that of the model as
            it was made: :func:`heal` does not change it.
        macs_kept: share of the multiplications of the blocks that it takes, seams counted.
        units: the blocks of the network.
        removable: numbers of blocks that may go, those for which :meth:`at` has a network.

    Args:
        search: what may become of the blocks; :func:`compress` makes it.
        runs: what does.

    >>> import torch
    >>> from odenets.depth import compress
    >>> from odenets.models import small_network
    >>> small = compress(small_network(solver="euler", h=1.0, depth=4), [torch.rand(60, 1, 8, 8)], remove=1)
    >>> [row["gone"] for row in small.curve]
    [1, 2, 3, 4]
    """

    def __init__(self, search: Search, runs: Sequence[Candidate]) -> None:
        self._search, self.runs, self.units = search, tuple(runs), tuple(search.units)
        self.model, self.divergence = search.build(runs)
        self.macs_kept = search.macs_kept(runs)
        self.removable = tuple(search.removable)
        if hasattr(self.model, "save_pretrained") and not known_to_hugging_face(self.model):
            warnings.warn(
                "save_pretrained and from_pretrained would make another network of the compressed one, without its "
                "seams: odenets.save_weights(small.model, path) and odenets.depth.load_compressed(whole, path) keep "
                "it, and choices=['remove', 'fit'] leaves nothing that they do not know",
                stacklevel=3,
            )

    @property
    def gone(self) -> int:
        """How many blocks are gone."""
        return sum(run.gone for run in self.runs)

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each run that was changed, with names, what became of it, errors and the share of MACs saved."""
        total = self._search.macs
        return [
            {
                "blocks": _named(self.units, run),
                "choice": run.choice,
                "kept": "" if run.kept is None else self.units[run.kept].name,
                "gone": run.gone,
                "error": run.error,
                "divergence": run.divergence,
                "macs saved": run.saved / total,
            }
            for run in self.runs
        ]

    @property
    def curve(self) -> list[dict[str, Any]]:
        """A row for each number of blocks that may go, with ``macs kept`` and ``divergence`` before refitting."""
        return self._search.curve()

    def at(self, *, remove: int | None = None, keep: float | None = None) -> Compression:
        """Another point of the curve, from the same calibration; ``remove`` and ``keep`` as for :func:`compress`.

        Raises:
            TypeError, ValueError: as there.
        """
        _check_wanted(remove, keep)
        return Compression(self._search, self._search.runs(remove, keep))

    def __repr__(self) -> str:
        rows = [
            (row["blocks"], row["choice"], row["kept"], _number(row["error"]), _number(row["divergence"]),
             f"{100 * row['macs saved']:.1f} %")
            for row in self.table
        ]  # fmt: skip
        title = (
            f"Compression({self.gone} of {len(self.units)} blocks gone, {100 * self.macs_kept:.1f} % of MACs kept, "
            f"divergence {self.divergence:.3g})"
        )
        return "\n".join([title, *table(("blocks", "choice", "kept", "error", "divergence", "MACs saved"), rows)])


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _named(units: Sequence[Unit], run: Candidate) -> str:
    first, last = units[run.start].name, units[run.stop - 1].name
    return first if first == last else f"{first} to {last}"


def _check_wanted(remove: int | None, keep: float | None) -> None:
    """That one of both is given, and in its range.

    Raises:
        TypeError, ValueError: it is not.
    """
    if (keep is None) == (remove is None):
        raise ValueError(f"give one of keep and remove, got keep={keep} and remove={remove}")
    if keep is not None and not 0 < check_number("keep", keep) < 1:
        raise ValueError(f"keep must be a share between 0 and 1, got {keep}: remove= is a number of blocks")
    if remove is not None:
        check_count("remove", remove, 1)


def compress(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    keep: float | None = None,
    remove: int | None = None,
    by: Literal["divergence", "error", "influence", "residue", "replaceme"] = "divergence",
    choices: Sequence[str] = CHOICES,
    kernels: Sequence[int] = (1, 3),
    longest: int = 4,
    statistics: bool | None = None,
    refit: bool | None = None,
    samples: int = 500,
    outputs: Literal["auto", "logits", "values"] = "auto",
    held_out: Iterable[Any] | None = None,
    progress: str | None = None,
) -> Compression:
    """A trained residual network with fewer blocks, without training it.

    An integrator has words for what may become of its steps:

    - "remove": a step is left out;
    - "merge": one block takes the time of a run of blocks, its step is so many times as long;
    - "fit": the same, and the last linear map of the block is fitted by least squares so that its step ends where the
      whole run does, at no further cost;
    - "seam": one linear map stands for the run, as an exponential step of a linear equation does, 1x1 or 3x3.

    Each is fitted to the states of the network on the calibration data, with the ridge that does best on a fifth of
    them that is held out. Every run of up to ``longest`` blocks is tried alone, and what it costs, in the divergence of
    the outputs for samples that are held out, is taken to add up: dynamic programming finds the cheapest runs for every
    number of blocks. At last the linear maps that end the blocks are fitted once more from the first change on, each to
    the states of the whole network with what reaches it in the compressed one, so that it makes good what was lost
    before.

    Args:
        model: a module of residual blocks as :func:`odenets.adapt` finds them, adapted or not, or an
            :class:`odenets.Network`; left as it is. Forward hooks that change no output are called on the first batch
            alone; the modules that stay keep theirs.
        calibration: batches of inputs or pairs of inputs and labels, which are not read; some hundred samples or more,
            kept in memory, and none that a figure is reported on. Where an ``attention_mask`` ``(B, T)`` among them is
            0, states and outputs count for nothing.
        keep: the share of the blocks' multiplications that is kept at most.
        remove: or the number of blocks that go; seams may then add as many multiplications as one block has.
        by: what runs are chosen by: "divergence" of the outputs; "error", the relative error of the state behind a run,
            which takes no further passes; or, as others do, "influence", one minus the cosine of the states before and
            behind a block, and "residue", the size of its residue over that of its state, by which single blocks are
            removed; "replaceme", the run of so many blocks with the least cosine distance, and a linear map in the last
            map of the block before it (Shopkhoev et al. 2025).
        choices: what may become of runs, some of those above.
        kernels: widths of the linear maps that are tried on images.
        longest: blocks of the longest run.
        statistics: whether batch norms are recalibrated behind the changes; unless ``by`` is a baseline, only if
            outputs then diverge less. If not given, where nothing is fitted and ``by`` is no baseline: fits are made
            with the statistics that there are, and recalibrated ones harm them.
        refit: whether the linear maps are fitted once more; with "divergence" and "error" if not given.
        samples: of the calibration, on how many runs are fitted, and by how many of those held out they are judged; the
            last fit takes all.
        outputs: what the network returns: "logits" along the last axis, or "values", whose relative square error is the
            divergence; "auto", logits if they are called so or are a tensor ``(B, K)`` of more than one number.
        held_out: batches, as of the calibration, of samples that are held out from every fit: a fifth of the
            calibration's if not given. Give them where samples are not independent, as crops of the same photographs
            are not: others of the same would hide what fits do to new ones.
        progress: the label of a bar.

    Returns:
        The compressed network, what became of which blocks, and the whole curve.

    Raises:
        TypeError: no module, or no batches of inputs.
        ValueError: neither or both of ``keep`` and ``remove``, more than may go, unknown choices, fewer than two
            samples, a block that is called several times, no block that may go, with the reasons, or blocks that depend
            on their index, where others have gone.

    Warns:
        UserWarning: Hugging Face's ``save_pretrained`` does not know what has become of the model.

    >>> import torch
    >>> from odenets.models import small_network
    >>> network = small_network(solver="euler", h=1.0, depth=4)
    >>> small = compress(network, [torch.rand(60, 1, 8, 8)], remove=2)
    >>> small.gone, small.model(torch.rand(3, 1, 8, 8)).shape
    (2, torch.Size([3, 10]))
    """
    if isinstance(model, AdaptedModel):
        model = model.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if by not in (*OURS, *BASELINES):
        raise ValueError(f"by must be one of {[*OURS, *BASELINES]}, got {by!r}")
    if outputs not in ("auto", "logits", "values"):
        raise ValueError(f"outputs must be 'auto', 'logits' or 'values', got {outputs!r}")
    if isinstance(choices, str) or not isinstance(choices, Iterable) or not choices or {*choices} - {*CHOICES}:
        raise ValueError(f"choices must be some of {list(CHOICES)}, got {choices!r}")
    if not isinstance(kernels, Sequence) or not kernels or any(not isinstance(k, int) or k % 2 != 1 for k in kernels):
        raise ValueError(f"kernels must be odd widths, such as (1, 3), got {kernels!r}")
    _check_wanted(remove, keep)
    if any(map(torch.is_autocast_enabled, {"cpu", device_of(model).type} - {"meta"})):
        raise ValueError("compress fits in the precision of the weights: call it outside of autocast")
    check_count("longest", longest, 1)
    check_count("samples", samples, 2)
    refits = by in OURS if refit is None else refit
    if statistics is None:
        statistics = by in OURS and not refits and not {"fit", "seam"} & {*choices}
    settings = Settings(by, tuple(choices), tuple(kernels), longest, statistics, refits, samples, outputs)
    with torch.inference_mode(False), counting(progress, "candidate") as show:
        search = Search(model, calibration, settings, show, remove, held_out)
        return Compression(search, search.runs(remove, keep))
