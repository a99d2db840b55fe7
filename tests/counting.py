"""Counts what a piece of code does: tensor operations, host synchronizations, field evaluations; refuses float64."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {torch.ops.aten.detach.default, torch.ops.aten.view.default, torch.ops.aten.alias.default}
SYNCHRONIZATIONS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Operations(TorchDispatchMode):
    """Counts dispatched operations, views aside."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in VIEWS:
            self.counts[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.counts.values())

    @property
    def synchronizations(self):
        return sum(self.counts[func] for func in SYNCHRONIZATIONS)


class NoDouble(TorchDispatchMode):
    """A device without float64, as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        wide = (torch.float64, torch.complex128)
        if any(isinstance(x, torch.Tensor) and x.dtype in wide for x in tree_leaves(out)):
            raise TypeError(f"this device has no float64, which {func} makes")
        return out


class Counted:
    """A velocity field that counts its calls."""

    def __init__(self, field):
        self.field, self.calls = field, 0

    def __call__(self, t, x):
        self.calls += 1
        return self.field(t, x)
