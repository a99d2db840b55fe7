"""Multiplications and additions of a pass, in the whole of a model or within some of its modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from odenets.modes import inputs_for, keeping_attributes

__all__ = ["count_macs"]


@torch.no_grad()
def count_macs(model: nn.Module, inputs: Any, *, within: nn.Module | Sequence[nn.Module] | None = None) -> int:
    """Multiply-accumulate operations of a pass in eval mode: matrix products, convolutions and attention.

    They are counted by operator, as ``torch.utils.flop_counter`` does, whatever module calls it;
    norms, activations and additions count as nothing, quantized and bilinear layers too, and a masked attention counts
    as a whole one. A module
    that is called twice counts twice.

    Args:
        model: left as it is; not compiled, exported or scripted.
        inputs: a tensor, a tuple of inputs or a mapping of inputs by keyword, taken to its device and precision.
        within: modules of it, of whose calls alone the operations count; those of a module inside another once.

    Returns:
        The count, for the whole batch.

    Raises:
        ValueError: a module of ``within`` is not called.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    >>> count_macs(model, torch.zeros(1, 3, 4, 4)), count_macs(model, torch.zeros(1, 3, 4, 4), within=model[2])
    (4736, 1280)
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    inputs = inputs_for(model, inputs)
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    keywords = inputs if isinstance(inputs, dict) else {}
    chosen = [within] if isinstance(within, nn.Module) else list(within or ())
    with (
        keeping_attributes(model),
        _without_gradients(model),
        _by_operator(),
        counter,
        _Spans(counter, chosen) as spans,
    ):
        model.eval()
        model(*args, **keywords)
    if within is None:
        return counter.get_total_flops() // 2
    if missing := [module for module in chosen if module not in spans.called]:
        raise ValueError(
            f"within holds {len(missing)} of {len(chosen)} modules that a pass of the model does not call, the first a "
            f"{type(missing[0]).__name__}"
        )
    return spans.total // 2


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of an attention on a CPU, from the shapes ``(B, H, T, D)`` of its inputs, as of torch's others."""
    batch, heads, tokens, features = query
    return 2 * batch * heads * tokens * key[-2] * (features + value[-1])


def _matrix_vector(matrix: Sequence[int], vector: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of a matrix times a vector, from their shapes."""
    return 2 * matrix[0] * matrix[1]


def _added_matrix_vector(added: Sequence[int], matrix: Sequence[int], vector: Sequence[int], *_: Any, **__: Any) -> int:
    """Those of one to which something is added."""
    return _matrix_vector(matrix, vector)


def _inner(x: Sequence[int], y: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of an inner product."""
    return 2 * x[0]


def _recurrent(x: Sequence[int], inputs: Sequence[int], hidden: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of a layer of an LSTM on a CPU, from the shapes of its input ``(T, B, D)`` and its two weights."""
    return 2 * x[0] * x[1] * (inputs[0] * inputs[1] + hidden[0] * hidden[1])


_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _added_matrix_vector,
    torch.ops.aten.dot: _inner,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
}
"""Operations by operator, of those that torch's counter does not know."""


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters that take no gradients: torch's counter fails on a view of one that does, made without gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextmanager
def _by_operator() -> Iterator[None]:
    """Without the fast path of torch's transformers, which is one operator of a whole layer."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Spans:
    """What a counter counts from the beginning to the end of the outermost call of some modules."""

    def __init__(self, counter: Any, modules: Sequence[nn.Module]) -> None:
        self.counter, self.modules = counter, dict.fromkeys(modules)
        self.called = set[nn.Module]()
        self.total = self.depth = self.start = 0

    def __enter__(self) -> _Spans:
        self.handles = [m.register_forward_pre_hook(self._begin, prepend=True) for m in self.modules]
        self.handles += [m.register_forward_hook(self._end) for m in self.modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, module: nn.Module, _: tuple[Tensor, ...]) -> None:
        self.called.add(module)
        if not self.depth:
            self.start = self.counter.get_total_flops()
        self.depth += 1

    def _end(self, *_: object) -> None:
        self.depth -= 1
        if not self.depth:
            self.total += self.counter.get_total_flops() - self.start
