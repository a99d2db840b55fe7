"""Where the states of a network pass: its residual blocks, recognized by the names of their parts, or named by hand."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

from torch import nn

__all__ = ["RULES", "BlockSpec", "Blocks", "Rule", "find_blocks"]

HALVES = ("first half", "second half")
TRANSFORMER = ("attention", "mlp")


@dataclass(frozen=True)
class BlockSpec:
    """Where the states of one block pass, by dotted names of modules of the model.

    Attributes:
        first: its input is x0.
        last: its output is x1; the same module as ``first``, but for layers that stand one after another.
        kind: the kind of block that it is.
        shortcut: its output is x0 instead, or None.
        mid: the first of these to be called is given the state between the two steps of the block; empty where the
            block is one step.
        branch: its output is what the block adds before its last activation, or None.
        halves: names of the two steps.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> find_blocks(model)
    (BlockSpec(first='0', last='1', kind='layer', shortcut=None, mid=(), branch=None),)
    """

    first: str
    last: str
    kind: str
    shortcut: str | None = None
    mid: tuple[str, ...] = ()
    branch: str | None = None
    halves: tuple[str, str] = field(default=HALVES, repr=False)  # an adapted model is fingerprinted by its blocks' repr

    @property
    def name(self) -> str:
        """The name of the block, ``first`` or, where it is another module, ``first:last``."""
        return self.first if self.first == self.last else f"{self.first}:{self.last}"

    @property
    def steps(self) -> int:
        """Steps of one call."""
        return 2 if self.mid else 1

    def step_name(self, part: int) -> str:
        """The name of a step, that of the block and, where it has two, which half ``part`` 0 or 1 is."""
        return f"{self.name} {self.halves[part]}" if self.mid else self.name


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

    def spec(self, name: str, module: nn.Module) -> BlockSpec:
        """Where the states of the ``module`` called ``name`` pass, which is such a block."""
        shortcut = None
        if self.shortcut is not None and isinstance(getattr(module, self.shortcut, None), nn.Module):
            shortcut = f"{name}.{self.shortcut}"
        parts = {part: getattr(module, part, None) for part in self.branch}
        ends = [part for part, m in parts.items() if isinstance(m, nn.Module) and not isinstance(m, nn.Identity)]
        branch = f"{name}.{ends[0]}" if ends else None
        mid = tuple(f"{name}.{part}" for part in self.mid)
        return BlockSpec(name, name, self.kind, shortcut, mid, branch, self.halves)


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
"""The kinds of blocks that are known, as a tuple of rules; ``adapt(model, [*RULES, Rule(...)])`` knows one more."""

Blocks = Iterable[str | Rule | type[nn.Module]] | Mapping[str, str | None] | type[nn.Module]


def find_blocks(model: nn.Module, blocks: Blocks | None = None) -> tuple[BlockSpec, ...]:
    """The blocks of a model, in the order of its modules; :func:`odenets.adapt` says more.

    Args:
        model: any module.
        blocks: names of modules, or rules, as there; by the known rules if not given.

    Returns:
        Where the states of each block pass.

    Raises:
        TypeError, ValueError: as there.

    Warns:
        UserWarning: some modules of the class of a block are none by the rules.

    >>> from torchvision.models import resnet18
    >>> [block.name for block in find_blocks(resnet18())][:3]
    ['layer1.0', 'layer1.1', 'layer2.0']
    """
    modules = dict(model.named_modules())
    if blocks is None:
        specs = _by_rules(modules, RULES)
        _warn_of_others(modules, specs)
        return specs or _layers(model) or _none(model, RULES)
    listed = [blocks] if isinstance(blocks, str | Rule | type) else list(blocks)
    entries = [one for entry in listed for one in (_of_class(modules, entry) if isinstance(entry, type) else [entry])]
    if not entries:
        raise ValueError("blocks must hold at least one name or rule")
    for block in entries:
        if not isinstance(block, str | Rule):
            raise TypeError(f"blocks must hold names of modules or rules, got {type(block).__name__}")
    rules = [block for block in entries if isinstance(block, Rule)]
    shortcuts = cast(Mapping[str, str | None], blocks) if isinstance(blocks, Mapping) else None
    named = [_by_name(modules, block, shortcuts) for block in entries if isinstance(block, str)]
    names = {spec.first for spec in named}
    ruled = [spec for spec in _by_rules(modules, rules) if spec.first not in names]
    if rules and not ruled:
        _none(model, rules)
    order = {name: i for i, name in enumerate(modules)}
    specs = sorted([*named, *ruled], key=lambda spec: order[spec.first])
    for outer, inner in pairwise(specs):
        if inner.first == outer.first or inner.first.startswith(outer.first + "."):
            raise ValueError(f"blocks must not overlap: {inner.name!r} lies in {outer.name!r}")
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


def _none(model: nn.Module, rules: Iterable[Rule]) -> tuple[BlockSpec, ...]:
    kinds = "; ".join(f"{rule.kind} ({', '.join((*rule.parts, *filter(None, [rule.flag])))})" for rule in rules)
    children = ", ".join(name for name, _ in model.named_children())
    raise ValueError(
        f"no residual blocks found in {type(model).__name__}, which has {children or 'no parts'}. Looked for modules "
        f"with these parts: {kinds}; and for a plain chain of layers that keep the shape. Name the blocks by hand, "
        'adapt(model, ["layer1.0", "layer1.1"]), with the module of a projection where the shape changes, '
        'adapt(model, {"layer1.0": None, "layer2.0": "layer2.0.downsample"}), or give a Rule'
    )


def _by_rules(modules: Mapping[str, nn.Module], rules: Iterable[Rule]) -> tuple[BlockSpec, ...]:
    """The outermost modules that fit a rule; the model itself is none of its blocks."""
    specs: list[BlockSpec] = []
    for name, module in modules.items():
        if not name or (specs and name.startswith(specs[-1].first + ".")):
            continue
        rule = next((rule for rule in rules if rule.fits(module)), None)
        if rule is not None:
            specs.append(rule.spec(name, module))
    return tuple(specs)


def _warn_of_others(modules: Mapping[str, nn.Module], specs: Iterable[BlockSpec]) -> None:
    """Warn of modules that are of the class of a block but lack a part by which it is known."""
    names = {spec.first for spec in specs}
    kinds = {type(modules[name]): rule for name in names for rule in RULES[::-1] if rule.fits(modules[name])}
    others = [
        name
        for name, module in modules.items()
        if type(module) in kinds and kinds[type(module)].flag is None and not _lies_in(name, names)
    ]
    if others:
        kind = type(modules[others[0]])
        warnings.warn(
            f"{len(others)} modules such as {others[0]!r} are not taken for blocks, though others of the class "
            f"{kind.__name__} are: they lack one of {', '.join(kinds[kind].parts)}. Name all blocks, "
            "adapt(model, [...]), or give a Rule",
            stacklevel=4,
        )


def _lies_in(name: str, blocks: Iterable[str]) -> bool:
    """Whether a module is one of the blocks, or in one, as what a compiled block wraps."""
    return any(name == block or name.startswith(block + ".") for block in blocks)


def _by_name(modules: Mapping[str, nn.Module], name: str, shortcuts: Mapping[str, str | None] | None) -> BlockSpec:
    first, _, last = name.partition(":")
    shortcut = shortcuts[name] if shortcuts is not None else None
    for part in filter(None, [first, last, shortcut]):
        if part not in modules:
            near = difflib.get_close_matches(part, modules, n=3, cutoff=0.4)
            hint = f"; near to it are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(f"the model has no module {part!r}{hint}")
    if not first:
        raise ValueError(f"blocks must be names of modules within the model, got {name!r}")
    rule = next((rule for rule in RULES if rule.fits(modules[first])), None)
    if shortcuts is None and not last and rule is not None:
        return rule.spec(first, modules[first])
    return BlockSpec(first, last or first, "by name", shortcut)


# -- plain networks -----------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> tuple[BlockSpec, ...]:
    """The layers that keep the shape, each with the norm and activation after it, if the model is a plain network:
    one with most of its convolutions and linear layers in Sequentials that are the model or lie directly under it.
    """
    children = [("", model)] if isinstance(model, nn.Sequential) else model.named_children()
    chains = [(name, chain) for name, chain in children if isinstance(chain, nn.Sequential)]
    leaves = [leaf for name, chain in chains for leaf in _leaves(name, chain)]
    weights = sum(_is_weight(module) for module in model.modules())
    if 2 * sum(_is_weight(module) for _, module in leaves) < max(weights, 1):
        return ()
    specs = []
    for i, (name, module) in enumerate(leaves):
        if not _is_weight(module) or not _keeps_shape(module):
            continue
        last = name
        for name_after, after in leaves[i + 1 : i + 3]:
            if name_after.rpartition(".")[0] != name.rpartition(".")[0]:
                break
            if _is_of(after, "activation"):
                last = name_after
                break
            if last != name or not _is_of(after, "batchnorm", "instancenorm", "normalization"):
                break
            last = name_after
        specs.append(BlockSpec(name, last, "layer"))
    return tuple(specs)


def _leaves(name: str, chain: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """The modules of a Sequential and of those in it, in order, with their names in the model."""
    leaves: list[tuple[str, nn.Module]] = []
    for part, module in chain.named_modules(remove_duplicate=False):  # an activation may stand there several times
        if not part or "." in part:
            continue
        full = f"{name}.{part}" if name else part
        leaves += _leaves(full, module) if isinstance(module, nn.Sequential) else [(full, module)]
    return leaves


def _is_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)


def _keeps_shape(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features == module.out_features
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # what else _is_weight knows
    if module.in_channels != module.out_channels or any(stride != 1 for stride in module.stride):
        return False
    if isinstance(module.padding, str):
        return module.padding == "same"
    sizes = zip(module.padding, module.kernel_size, module.dilation, strict=True)
    return all(2 * padding == dilation * (kernel - 1) for padding, kernel, dilation in sizes)


def _is_of(module: nn.Module, *files: str) -> bool:
    """Whether a class of the module comes from one of these files of ``torch.nn.modules``."""
    return any(kind.__module__ in [f"torch.nn.modules.{file}" for file in files] for kind in type(module).__mro__)
