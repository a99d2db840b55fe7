"""The reductions on a CPU in torch's own operations, over blocks that stay in its caches.

Every operand is read from memory once, forward and backward, and temporaries are no larger than a block. Sums are taken
over segments that the shape alone decides, and do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from solvers.reductions.reference import HALF, Reductions, ReductionSpec, rows_of, wide, wide_dtype

__all__ = ["finish_step", "finish_step_backward", "row_moments", "row_moments_backward", "scaled_error"]

BLOCK = 1 << 18  # numbers of one operand that a thread works on at a time
OF_MOMENTS = 1 << 16  # the same where two sums alone are taken of them: with their operands in a cache of 1 MiB
LONGEST = 1 << 17  # numbers of a row of which the sums of all segments are added at once
SEGMENT = 1 << 9  # numbers of a row under one sum: torch's norms add in order, and lose a digit beyond
SHARED = 1 << 14  # sums of a row that are added at once: fewer than torch shares among threads

Block = tuple[slice, slice]
Factor = float | Tensor  # a number, or one per row, (rows, 1)
Term = tuple[Tensor, Factor]


def row_moments(
    rows: Sequence[Tensor], weights: Sequence[float], power: float, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`solvers.reductions.reference.row_moments`."""
    tables = [_table(x) for x in rows_of(rows)]
    if power == 2 and mean and _whole_segments(tables[0]):
        return _square_and_mean(tables, weights)
    powers, sums, scratch = _Sums(tables[0]), _Sums(tables[0]) if mean else None, _Scratch()
    for block in _blocks(tables[0], whole=len(rows) == 1 and power == 2 and not mean):
        r = _combination([x[block] for x in tables], weights, scratch)
        if power == 2:
            powers.add_squares(block, r)
        else:
            size = torch.abs(r, out=scratch("power", r))
            powers.add(block, size if power == 1 else size.pow_(power))
        if sums is not None:
            sums.add(block, r)
    return powers.mean(), None if sums is None else sums.mean()


def _whole_segments(table: Tensor) -> bool:
    """Whether rows lie whole in a block, in segments of one length, so that each sum has a place of its own."""
    n = table.shape[1]
    return 0 < n <= LONGEST and n % _segment(n) == 0


def _square_and_mean(tables: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The moments of such rows with the power 2: the same numbers, in fewer calls of torch, a segment in each row."""
    batch, n = tables[0].shape
    length = _segment(n)
    tables = [x.reshape(x.numel() // length, length) for x in tables]
    norms, sums = tables[0].new_empty(2, len(tables[0]), dtype=wide_dtype(tables[0]))
    count, rows, scratch = len(tables[0]), max(1, OF_MOMENTS * torch.get_num_threads() // length), _Scratch()
    alone = (*weights,) == (1, -1) and tables[0].dtype not in HALF
    difference = tables[0].new_empty(min(rows, count), length) if alone else None
    for i in range(0, count, rows):
        block = slice(i, i + rows)
        parts, norm, total = [x[block] for x in tables], norms[block], sums[block]
        if difference is None:
            r = _combination(parts, weights, scratch)
        else:
            r = torch.sub(*parts, out=difference[: len(norm)])
        torch.linalg.vector_norm(r, 2, -1, out=norm)
        torch.sum(r, -1, out=total)
    return norms.square_().view(batch, n // length).sum(1) / n, sums.view(batch, n // length).sum(1) / n


def row_moments_backward(
    rows: Sequence[Tensor], weights: Sequence[float], power: float, grad_power: Tensor | None, grad_mean: Tensor | None,
    needs: Sequence[bool]
) -> list[Tensor | None]:  # fmt: skip
    """The gradient ``w_i (P sgn(r) |r|^(power-1) + M)`` of each operand that needs one, P and M by :func:`_pull`."""
    rows = rows_of(rows)
    tables = [_table(x) for x in rows]
    grads = [torch.empty_like(x) if need else None for x, need in zip(rows, needs, strict=True)]
    pull_power, pull_mean, scratch = _pull(grad_power, tables[0], power), _pull(grad_mean, tables[0]), _Scratch()
    for block in _blocks(tables[0], whole=len(rows) == 1):
        terms: list[Term] = []
        if pull_power is not None:
            r = _combination([x[block] for x in tables], weights, scratch)
            if power != 2:
                r = r.sgn() if power == 1 else r.sgn().mul_(r.abs().pow_(power - 1))
            terms.append((r, pull_power[block[0]]))
        if pull_mean is not None:
            terms.append((pull_mean[block[0]].expand_as(tables[0][block]), 1.0))
        terms = _shared(terms, needs, scratch)
        for grad, weight in zip(grads, weights, strict=True):
            if grad is not None:
                _sum(_times(weight, terms) if weight else [], _table(grad)[block], scratch)
    return grads


def finish_step(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec) -> Reductions:
    """As :func:`solvers.reductions.reference.finish_step`."""
    operands = rows_of([*stages, *([] if x0 is None else [x0])])
    tables = [_table(x) for x in operands]
    state = None if x0 is None else tables.pop()
    x1 = torch.empty_like(operands[0]) if spec.state else None
    computed = {"error": spec.error, "action": spec.action, "square": spec.residue}
    sums = {name: _Sums(tables[0]) for name, each in computed.items() if each}
    mean, scratch = _Sums(tables[0]) if spec.residue else None, _Scratch()
    e, scale = _error_weights(h, spec)
    for block in _blocks(tables[0], whole=state is None and not (spec.residue or spec.error)):
        p, size = [x[block] for x in tables], _size(h, block)
        many = spec.residue or (state is not None and isinstance(size, Tensor))
        r = _combination(p, spec.b, scratch) if many else None
        start = end = None
        if state is not None:
            start = wide(state[block])
            terms: list[Term] = [(start, 1.0)]
            terms += _times(size, [(q, b) for q, b in zip(p, spec.b, strict=True) if b]) if r is None else [(r, size)]
            end = _sum(terms, scratch("x1", start) if x1 is None else _table(x1)[block], scratch)
        if mean is not None and r is not None:
            sums["square"].add_squares(block, r)
            mean.add(block, r)
        if spec.action:
            for q, b in zip(p, spec.b, strict=True):
                if b:
                    sums["action"].add_squares(block, wide(q), b)
        if spec.error:
            d = _error(p, e, scale, block, scratch)
            if spec.scaled and start is not None and end is not None:
                d = torch.div(d, _scale(start, end, spec, scratch), out=scratch("q", d))
            sums["error"].add_squares(block, d)
    values = {name: each.mean() for name, each in sums.items()}
    if spec.action:
        values["action"] = values["action"] * h
    return Reductions(x1=x1, mean=None if mean is None else mean.mean(), **values)


def finish_step_backward(
    stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec, grads: Reductions, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient ``b (h g + R r + M) + A b p + e E eps`` of each stage that needs one; the error is not scaled.

    A, R, M and E are by :func:`_pull` from the ``grads`` of the action, the mean square, the mean and the error, None
    for 0.
    """
    operands = rows_of(list(stages) if grads.x1 is None else [*stages, grads.x1])
    out = [torch.empty_like(operands[0]) if need else None for need in needs]
    tables, scratch = [_table(x) for x in operands], _Scratch()
    outer = None if grads.x1 is None else tables.pop()
    action = None if grads.action is None else _pull(grads.action * h, tables[0], 2)
    square, mean = _pull(grads.square, tables[0], 2), _pull(grads.mean, tables[0])
    error, (weights, scale) = _pull(grads.error, tables[0], 2), _error_weights(h, spec)
    for block in _blocks(tables[0]):
        rows, p = block[0], [x[block] for x in tables]
        terms: list[Term] = []
        if square is not None:
            terms.append((_combination(p, spec.b, scratch), square[rows]))
        if outer is not None:
            terms.append((outer[block], _size(h, block)))
        if mean is not None:
            terms.append((mean[rows].expand_as(p[0]), 1.0))
        terms = _shared(terms, needs, scratch)
        d: list[Term] = []
        if error is not None:
            pull = error[rows] if scale is None else error[rows] * scale[rows].unsqueeze(1)
            d = _shared([(_error(p, weights, scale, block, scratch), pull)], needs, scratch, "e")
        for q, b, e, grad in zip(p, spec.b, weights, out, strict=True):
            if grad is not None:
                own: list[Term] = [(q, action[rows] * b)] if action is not None and b else []
                own += (_times(b, terms) if b else []) + (_times(e, d) if e else [])
                _sum(own, _table(grad)[block], scratch)
    return out


def scaled_error(x0: Tensor, x1: Tensor, stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec) -> Tensor:
    """``<(h sum_i e_i p_i / (atol + rtol max(|x0|, |x1|)))^2>``, ``(B,)``."""
    start, end, *tables = [_table(x) for x in rows_of([x0, x1, *stages])]
    sums, scratch, (e, size) = _Sums(start), _Scratch(), _error_weights(h, spec)
    for block in _blocks(start):
        d = _error([x[block] for x in tables], e, size, block, scratch)
        if spec.scaled:
            scale = _scale(wide(start[block]), wide(end[block]), spec, scratch)
            d = torch.div(d, scale, out=scale)
        sums.add_squares(block, d)
    return sums.mean()


class _Sums:
    """Sums over the segments of each row of a table, ``(B, segments)``."""

    def __init__(self, table: Tensor) -> None:
        batch, self.features = table.shape
        self.length = _segment(self.features)
        self.sums = table.new_zeros(batch, -(-self.features // self.length), dtype=wide_dtype(table))

    def add_squares(self, block: Block, x: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * x^2``."""
        for sums, part in self._segments(block, x):
            sums.add_(torch.linalg.vector_norm(part, 2, -1).square_(), alpha=weight)

    def add(self, block: Block, x: Tensor) -> None:
        """Add x."""
        for sums, part in self._segments(block, x):
            sums.add_(part.sum(-1))

    def mean(self) -> Tensor:
        """The mean over the features, ``(B,)``."""
        parts = [part.sum(1) for part in self.sums.split(SHARED, 1)]
        return (parts[0] if len(parts) == 1 else torch.stack(parts, 1).sum(1)) / self.features

    def _segments(self, block: Block, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The sums of the whole segments of a block beside their numbers, and of the rest."""
        if self.sums.shape[1] == 1:
            yield self.sums[block[0], 0], x
            return
        sums = self.sums[block[0], block[1].start // self.length :]
        whole = x.shape[1] // self.length
        if whole:
            yield sums[:, :whole], x[:, : whole * self.length].unflatten(1, (whole, self.length))
        if whole * self.length < x.shape[1]:
            yield sums[:, whole], x[:, whole * self.length :]


class _Scratch:
    """Memory for what is temporary in a block, the same for every block: new pages cost more than a pass over them."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        if name not in self.memory:  # the first block is the largest
            self.memory[name] = like.new_empty(like.numel(), dtype=wide_dtype(like))
        return self.memory[name][: like.numel()].view(like.shape)


def _table(x: Tensor) -> Tensor:
    """A tensor laid out by :func:`rows_of` as ``(B, features)``, in the order of its memory."""
    return x.flatten(1) if x.is_contiguous() else x.movedim(1, -1).flatten(1)


def _segment(n: int) -> int:
    """The length of the segments of a row: equal ones if n allows it."""
    count = max(1, -(-n // SEGMENT))
    return max(1, n // count) if n % count == 0 else SEGMENT


def _blocks(table: Tensor, size: int = BLOCK, whole: bool = False) -> Iterator[Block]:
    """Rows of a table, a few at a time, or whole segments of a long one; all at once if nothing is temporary."""
    batch, n = table.shape
    numbers = table.numel() if whole else size * torch.get_num_threads()
    rows, columns = max(1, numbers // max(1, n)), n if n <= numbers else numbers // _segment(n) * _segment(n)
    for row in range(0, batch, rows):
        for column in range(0, n, max(1, columns)):
            yield slice(row, row + rows), slice(column, column + columns)


def _size(h: float | Tensor, block: Block) -> Factor:
    return h[block[0]].unsqueeze(1) if isinstance(h, Tensor) else h


def _pull(grad: Tensor | None, table: Tensor, factor: float = 1.0) -> Tensor | None:
    """The gradient of a mean over the features as a factor of each number of a row, ``(B, 1)``."""
    return None if grad is None else (grad * (factor / max(1, table.shape[1]))).unsqueeze(1)


def _error_weights(h: float | Tensor, spec: ReductionSpec) -> tuple[list[float], Tensor | None]:
    """The weights of the error times the step size, over atol unless the states scale it; h where it is ``(B,)``.

    Sizes enter before squares are taken, which else overflow where the error does not.
    """
    factor = (1.0 if isinstance(h, Tensor) else h) / (1.0 if spec.scaled else spec.atol)
    return [e * factor for e in spec.e], h if isinstance(h, Tensor) else None


def _error(
    p: Sequence[Tensor], weights: Sequence[float], size: Tensor | None, block: Block, scratch: _Scratch
) -> Tensor:
    """The error of a block, with what :func:`_error_weights` gives."""
    d = _combination(p, weights, scratch, "d")
    return d if size is None else torch.mul(d, _size(size, block), out=scratch("d", d))


def _scale(start: Tensor, end: Tensor, spec: ReductionSpec, scratch: _Scratch) -> Tensor:
    low, high = torch.abs(start, out=scratch("|x0|", start)), torch.abs(end, out=scratch("|x1|", start))
    return torch.maximum(low, high, out=low).mul_(spec.rtol).add_(spec.atol)


def _combination(rows: Sequence[Tensor], weights: Sequence[float], scratch: _Scratch, name: str = "r") -> Tensor:
    """``sum_i w_i x_i`` over the weights that are not 0; the tensor itself where there is one, of weight 1."""
    terms: list[Term] = [(x, w) for x, w in zip(rows, weights, strict=True) if w]
    if len(terms) == 1 and terms[0][1] == 1:
        return wide(terms[0][0])
    return _sum(terms, scratch(name, rows[0]), scratch)


def _times(factor: Factor, terms: list[Term]) -> list[Term]:
    return [(x, own * factor) for x, own in terms]


def _shared(terms: list[Term], needs: Sequence[bool], scratch: _Scratch, name: str = "u") -> list[Term]:
    """The terms added up once where several gradients need them."""
    if sum(needs) < 2 or not terms or (len(terms) == 1 and not isinstance(terms[0][1], Tensor)):
        return terms
    return [(_sum(terms, scratch(name, terms[0][0]), scratch), 1.0)]


def _sum(terms: list[Term], out: Tensor, scratch: _Scratch) -> Tensor:
    """The sum of tensors times factors in float32 or wider, which is returned and written to ``out``."""
    to = scratch("wide", out) if out.dtype in HALF else out
    if not terms:
        return out.zero_()
    (x, factor), *rest = [(wide(x), factor) for x, factor in terms]
    if not isinstance(factor, Tensor) and factor == 1 and rest and not isinstance(rest[0][1], Tensor):
        torch.add(x, rest[0][0], alpha=rest[0][1], out=to)
        rest = rest[1:]
    else:
        torch.mul(x, factor, out=to)
    for x, factor in rest:
        if isinstance(factor, Tensor):
            to.add_(torch.mul(x, factor, out=scratch("product", x)))
        else:
            to.add_(x, alpha=factor)
    if to is not out:
        out.copy_(to)
    return to
