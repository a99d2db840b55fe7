"""Blocks by hand: modules by their names, their classes, or rules that know them by the names of their parts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from torch import nn

from odenets.adapting.blocks import BlockSpec, flow_spec, records_itself
from odenets.adapting.program.places import Place

__all__ = ["RULES", "Blocks", "Rule", "find_blocks", "kind_of"]

HALVES = ("first half", "second half")
TRANSFORMER = ("attention", "mlp")


@dataclass(frozen=True)
class Rule:
    """A kind of residual block, recognized by the names of its parts.

    Attributes:
        kind: its name where the blocks are listed.
        parts: attributes, all of which the block has, be they None.
        flag: an attribute that is true of the blocks with a shortcut; those without do not count.
        shortcut: the part whose output is x0, where the block has it and it is a module: the projection of a block that
            changes the shape.
        mid: parts, the first of which to be called is given the state between the block's two steps: before the
            MLP of a transformer that is its norm, or with norms after the branches the MLP itself.
        branch: parts, the first of which that the block has, and that does anything, ends its branch, where an
            activation follows the addition.
        halves: names of the two steps of a block with ``mid``, "attention" and "mlp" of transformers, as records have
            them.

    Raises:
        ValueError: neither parts nor a flag to know its blocks by.

    >>> Rule("mine", parts=("branch", "project"), shortcut="project").fits(nn.Linear(2, 2))
    False
    """

    kind: str
    parts: tuple[str, ...] = ()
    flag: str | None = None
    shortcut: str | None = None
    mid: tuple[str, ...] = ()
    branch: tuple[str, ...] = ()
    halves: tuple[str, str] = HALVES

    def __post_init__(self) -> None:
        if not self.parts and self.flag is None:
            raise ValueError(f"rule {self.kind!r} needs parts or a flag to know its blocks by")

    def fits(self, module: nn.Module) -> bool:
        """Whether the ``module`` is such a block."""
        if self.flag is not None and not getattr(module, self.flag, False):
            return False
        return all(hasattr(module, part) for part in self.parts)

    def specs(self, name: str, module: nn.Module) -> tuple[BlockSpec, ...]:
        """Where the states of the ``module`` called ``name`` pass, which is such a block: its one step or two."""
        shortcut = None
        if self.shortcut is not None and isinstance(getattr(module, self.shortcut, None), nn.Module):
            shortcut = f"{name}.{self.shortcut}"
        parts = {part: getattr(module, part, None) for part in self.branch}
        ends = [part for part, m in parts.items() if isinstance(m, nn.Module) and not isinstance(m, nn.Identity)]
        branch = Place(f"{name}.{ends[0]}", "output") if ends else None
        start = Place(shortcut, "output") if shortcut else Place(name, "input", (0,))
        end = (Place(name, "output"),)
        if not self.mid:
            return (BlockSpec(name, name, self.kind, start, end, shortcut, branch),)
        mid = tuple(Place(f"{name}.{part}", "input", (0,)) for part in self.mid)
        first, second = (f"{name} {half}" for half in self.halves)
        return (
            BlockSpec(first, name, self.kind, start, mid, shortcut, branch),
            BlockSpec(second, name, self.kind, None, end, None, branch),
        )


RULES = (
    Rule(
        "ResNet",
        parts=("conv1", "bn1", "downsample"),
        shortcut="downsample",
        branch=("drop_path", "se", "bn3", "bn2"),  # timm: the first two
    ),
    Rule(
        "RegNet",  # timm
        parts=("conv1", "conv3", "downsample"),
        shortcut="downsample",
        branch=("drop_path", "conv3"),
    ),
    Rule("ResNet", parts=("conv1", "shortcut"), shortcut="shortcut", branch=("bn3", "bn2")),  # as written for CIFAR
    Rule("RegNet", parts=("proj", "f", "activation"), shortcut="proj", branch=("f",)),
    Rule("inverted residual", flag="use_res_connect"),  # MobileNet, EfficientNet
    Rule("inverted residual", flag="apply_residual"),  # MNASNet
    Rule("inverted residual", flag="has_skip"),  # timm
    Rule("ConvNeXt", parts=("block", "layer_scale", "stochastic_depth")),
    Rule("transformer", parts=("ln_1", "self_attention", "ln_2", "mlp"), mid=("ln_2",), halves=TRANSFORMER),  # ViT
    Rule(
        "transformer",
        parts=("norm1", "attn", "norm2", "mlp"),
        shortcut="shortcut",
        mid=("norm2", "mlp"),
        halves=TRANSFORMER,
    ),
    Rule("residual", parts=("drop_path",), flag="shortcut", shortcut="shortcut"),  # timm: ConvNeXt, MaxViT
)
"""The kinds of blocks that have names; ``adapt(model, blocks=[*RULES, Rule(...)])`` takes modules that fit one."""


def kind_of(module: nn.Module) -> Rule | None:
    """The first rule that a ``module`` fits, by which its kind is named; None if there is none.

    >>> kind_of(nn.Linear(2, 2)) is None
    True
    """
    return next((rule for rule in RULES if rule.fits(module)), None)


Blocks = Iterable[str | Rule | type[nn.Module]] | Mapping[str, str | None] | type[nn.Module]


def find_blocks(model: nn.Module, blocks: Blocks) -> tuple[BlockSpec, ...]:
    """The blocks of a model that are named, in the order of its modules; :func:`odenets.adapt` says more.

    Args:
        model: any module.
        blocks: names of modules, classes or rules, as there.

    Returns:
        Where the states of each step pass.

    Raises:
        TypeError, ValueError: as there.

    >>> from torchvision.models import resnet18
    >>> [block.name for block in find_blocks(resnet18(), RULES)][:3]
    ['layer1.0', 'layer1.1', 'layer2.0']
    """
    modules = dict(model.named_modules())
    listed = [blocks] if isinstance(blocks, str | Rule | type) else list(blocks)
    entries = [one for entry in listed for one in (_of_class(modules, entry) if isinstance(entry, type) else [entry])]
    if not entries:
        raise ValueError("blocks must hold at least one name or rule")
    for block in entries:
        if not isinstance(block, str | Rule):
            raise TypeError(f"blocks must hold names of modules or rules, got {type(block).__name__}")
    rules = [block for block in entries if isinstance(block, Rule)]
    shortcuts = cast(Mapping[str, str | None], blocks) if isinstance(blocks, Mapping) else None
    named = [spec for block in entries if isinstance(block, str) for spec in _by_name(modules, block, shortcuts)]
    names = {spec.block.partition(":")[0] for spec in named}
    ruled = [spec for spec in _by_rules(modules, rules) if spec.block not in names]
    if rules and not ruled:
        _none(model, rules)
    order = {name: i for i, name in enumerate(modules)}
    specs = sorted([*named, *ruled], key=lambda spec: order[spec.block.partition(":")[0]])
    for outer, inner in pairwise(specs):
        last, first = outer.block.partition(":")[0], inner.block.partition(":")[0]
        if inner.start is not None and (first == last or first.startswith(last + ".")):
            raise ValueError(f"blocks must not overlap: {first!r} lies in {last!r}")
    return tuple(specs)


def _of_class(modules: Mapping[str, nn.Module], kind: type) -> list[str]:
    """The names of the outermost modules of a class.

    Raises:
        ValueError: there are none.
    """
    names: list[str] = []
    for name, module in modules.items():
        if name and isinstance(module, kind) and not _lies_in(name, names):
            names.append(name)
    if not names:
        raise ValueError(f"the model holds no {kind.__name__}: its modules are of {_classes(modules)}")
    return names


def _classes(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(sorted({type(module).__name__ for name, module in modules.items() if name}))


def _none(model: nn.Module, rules: Iterable[Rule]) -> None:
    kinds = "; ".join(f"{rule.kind} ({', '.join((*rule.parts, *filter(None, [rule.flag])))})" for rule in rules)
    children = ", ".join(name for name, _ in model.named_children())
    raise ValueError(
        f"no module of {type(model).__name__}, which has {children or 'no parts'}, fits one of the rules: {kinds}. "
        'Without blocks= they are found in the program; by hand they are adapt(model, blocks=["layer1.0", "layer1.1"])'
    )


def _by_rules(modules: Mapping[str, nn.Module], rules: Iterable[Rule]) -> list[BlockSpec]:
    """The outermost modules that fit a rule; the model itself is none of its blocks."""
    specs: list[BlockSpec] = []
    for name, module in modules.items():
        if not name or (specs and name.startswith(specs[-1].block + ".")):
            continue
        rule = next((rule for rule in rules if rule.fits(module)), None)
        if rule is not None:
            specs += rule.specs(name, module)
    return specs


def _lies_in(name: str, blocks: Iterable[str]) -> bool:
    """Whether a module is one of the blocks, or in one, as what a compiled block wraps."""
    return any(name == block or name.startswith(block + ".") for block in blocks)


def _by_name(
    modules: Mapping[str, nn.Module], name: str, shortcuts: Mapping[str, str | None] | None
) -> tuple[BlockSpec, ...]:
    first, _, last = name.partition(":")
    shortcut = shortcuts[name] if shortcuts is not None else None
    for part in filter(None, [first, last, shortcut]):
        if part not in modules:
            near = difflib.get_close_matches(part, modules, n=3, cutoff=0.4)
            hint = f"; near to it are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(f"the model has no module {part!r}{hint}")
    if not first:
        raise ValueError(f"blocks must be names of modules within the model, got {name!r}")
    if shortcuts is None and not last and records_itself(modules[first]):
        return (flow_spec(first),)
    rule = kind_of(modules[first])
    if shortcuts is None and not last and rule is not None:
        return rule.specs(first, modules[first])
    start = Place(shortcut, "output") if shortcut else Place(first, "input", (0,))
    return (BlockSpec(name, name, "by name", start, (Place(last or first, "output"),), shortcut),)
