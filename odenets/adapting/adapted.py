"""AdaptedModel: a network as it is, each of its residual blocks seen as an Euler step with h = 1."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odenets.adapting.blocks import Blocks, BlockSpec, find_blocks
from odenets.adapting.forward_pass import ForwardPass, Visited, flow_starts, step_names
from odenets.adapting.hooks import Hooks
from odenets.measures import StepFunction
from odenets.recording import Records, is_recorder
from solvers import Step
from solvers.validation import check_state

__all__ = ["AdaptedModel", "adapt"]


def adapt(
    model: nn.Module, blocks: Blocks | None = None, *, residue: Literal["displacement", "branch"] = "displacement"
) -> AdaptedModel:
    """A torchvision or timm classifier, or one like it, with the ``record`` of an :class:`odenets.Network`.

    Every residual block is a step ``x1 = x0 + r`` of the Euler method with h = 1, where r is what the block truly adds:
    ``x1 - x0``, after its last activation if it has one, or else what its branch gives before that.

    - A block that keeps the shape: x0 is its input, x1 its output. With a ReLU at the end, as in ResNet, ResNeXt and
      RegNet, ``r = relu(x0 + f) - x0 = max(f, -x0)`` for a branch f. (The ResNeXt of [K24] adds ``relu(f)``, so that
      its residues are not negative; torchvision's may be.)
    - A block with a projection (ResNet, RegNet): x0 is the projection's output. It may be negative, and then r is not
      zero where the branch is.
    - A transformer block (ViT, Swin) is two steps, attention and MLP, each after its stochastic depth.
    - A block without shortcut (MobileNet, stride 2) is no step; neither are layers between the blocks.
    - A plain network (VGG): each convolution or linear layer that keeps the shape, with the norm and activation after
      it, from the input x0 of the layer to the output x1 of the last of them.

    Args:
        model: used as it is, not copied. Hooks on its modules do nothing but in :meth:`AdaptedModel.record`.
        blocks: which modules are blocks; those that fit :data:`odenets.adapting.RULES`, or else the layers of a plain
            network, if not given. Names, ``["layer1.0", "layer1.1"]``: what a rule that fits says of such a module, or
            else one step from its input to its output; ``"features.2:features.4"`` is one from the input of the first
            to the output of the last. A dictionary, ``{"layer1.0": None, "layer2.0": "layer2.0.downsample"}``: one step
            each, from the output of the shortcut named, or from the input. A class, ``MyBlock``: all modules of it.
            Rules, ``[*RULES, Rule(...)]``.
        residue: "displacement", ``x1 - x0``; or "branch", of blocks with an activation behind the addition (ResNet,
            RegNet) the output of their branch instead, as the published code of [K24] has it. A branch that ends
            in a batch norm has, in training, the mean square ``gamma^2 + beta^2`` per channel whatever goes into it: a
            penalty on it acts on these two vectors alone, and a warning says so.

    Returns:
        The model with ``record``, ``steps`` and what else an :class:`odenets.Recorder` has.

    Raises:
        TypeError: the model is no module, or blocks are neither names nor rules.
        ValueError: no block found, no module of such a name, blocks within blocks, or another residue.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from odenets import measures
    >>> network = adapt(resnet18().eval())
    >>> output, records = network.record(torch.randn(2, 3, 32, 32), action=measures.action)
    >>> records["action"].shape, records.starts
    (torch.Size([8, 2]), (0, 2, 4, 6))
    >>> records.blocks[:3]
    ('layer1.0', 'layer1.1', 'layer2.0')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if is_recorder(model):
        raise TypeError(f"model records its steps as it is, got {type(model).__name__}: nothing is to be adapted")
    if residue not in ("displacement", "branch"):
        raise ValueError(f"residue must be 'displacement' or 'branch', got {residue!r}")
    specs = find_blocks(model, blocks)
    if residue == "displacement":
        specs = tuple(replace(spec, branch=None) for spec in specs)
    if normed := [s.name for s in specs if s.branch and _ends_in_batch_norm(model.get_submodule(s.branch))]:
        warnings.warn(
            f"the branches of {len(normed)} blocks ({normed[0]}, ...) end in a batch norm: in training the mean square "
            "of their residues is gamma^2 + beta^2 of that layer, and a penalty on it moves nothing else; "
            'adapt(model, residue="displacement") takes what the block truly adds',
            stacklevel=2,
        )
    return AdaptedModel(model, specs)


def _ends_in_batch_norm(module: nn.Module) -> bool:
    last = [m for m in module.modules() if not any(m.children())][-1]
    return isinstance(last, nn.modules.batchnorm._BatchNorm)


class AdaptedModel(nn.Module):
    """A model and where the states of its blocks pass; :func:`~odenets.adapt` makes it and shows its use.

    Its ``state_dict`` is that of the model under ``model.``: ``plain.load_state_dict(adapted.model.state_dict())``.
    ``print(adapted)`` lists the steps, after the first pass with the shapes of their states, and the shortcuts whose
    outputs they begin at, where that is not the input. Activation checkpointing inside the model must be off where
    measures are recorded with gradients. Several threads may record at once.

    A block may add in place to its input, ``x += branch(x)``; one that changes its input and returns another tensor,
    as with a first ``ReLU(inplace=True)``, is refused. Which blocks do so is learned in the first pass, which copies
    their inputs.

    Attributes:
        hooks: what passes through them.

    Args:
        model: the model itself, not a copy.
        blocks: where its states pass.
        part_of: the whole of which this is a part; inputs of a part are states, which are not checked.

    >>> from odenets.adapting import adapt
    >>> layers = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    >>> adapt(nn.Sequential(*layers))
    AdaptedModel(Sequential, 2 steps)
      0  0:1  layer
      1  2:3  layer
    """

    def __init__(self, model: nn.Module, blocks: Sequence[BlockSpec], *, part_of: AdaptedModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.blocks = tuple(blocks)
        self.training = model.training
        self._visited: list[Visited] | None = None
        self._warned = False
        self._whole = part_of is None
        self.hooks = Hooks() if part_of is None else part_of.hooks  # the modules of a part have the hooks of the whole
        if part_of is None:
            for block in self.blocks:
                self.hooks.attach(model, block)

    @property
    def depth(self) -> int:
        """Number of steps, the rows of ``record``.

        They are those of the last pass that was looked at, where each call of a block counts; before the first, one
        call of each block.
        """
        return len(self._last_visited())

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each step, which is 1."""
        return (1.0,) * self.depth

    @property
    def evaluations(self) -> int:
        """Evaluations of a branch in one forward pass, one per step."""
        return self.depth

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each step, as in ``records.blocks``.

        That is its module, "layer1.0", and the half of a transformer's block, "blocks.0 attention" and "blocks.0 mlp";
        with the number of the call where a block is called several times. In the order of the rows of ``record`` from
        the first pass on.
        """
        return step_names(self._last_visited())

    def forward(self, x: Tensor, /, *args: Any) -> Tensor:
        """The model's output for inputs ``x`` ``(B, ...)`` and what it takes besides, ``args``."""
        return self.record(x, *args)[0]

    def record(self, x: Tensor, /, *args: Any, **measures: StepFunction) -> tuple[Tensor, Records]:
        """The model's output, and one ``(blocks, B)`` tensor per measure, in the order in which the blocks are called.

        Each step is measured as its block ends, and nothing of it is kept but what gradients need. ``records.starts``
        holds the rows at which the shape of the state changes, ``records.blocks`` the names of the steps, as
        :attr:`names`.

        Args:
            x: inputs, ``(B, ...)``.
            args: what the model takes besides.
            measures: functions ``Step -> (B,)`` by name.

        Returns:
            The output, and the records, ``(steps, B)`` by name.

        Raises:
            TypeError, ValueError: x is no batch of finite inputs, a measure does not return ``(B,)``, or a block is
                none: it takes or returns no tensor, changes the shape or its input in place; or none is called.

        Warns:
            UserWarning: once, if some blocks are not called, or in another order or number than in earlier passes: the
                rows are the steps of this pass; if a block with weights is computed without gradients though they are
                enabled; if an output is changed in place after its block, so that it cannot be differentiated.
        """
        for name, measure in measures.items():
            if not callable(measure):
                raise TypeError(f"measure {name!r} must be a function Step -> (B,), got {type(measure).__name__}")
        if not measures and (self._visited is not None or torch.compiler.is_exporting()):
            self._check_input(x)
            with self.hooks.running(None):
                return self.model(x, *args), Records({}, flow_starts(self._last_visited()), self.names)
        output, current = self._run(x, args, measures)
        return output, current.records()

    def steps(self, x: Tensor, *args: Any, closing: bool = True) -> list[Step]:
        """Every step for inputs ``x``, with its states; warns as :meth:`record` does.

        ``args`` are what the model takes besides; ``closing`` changes nothing, for no step has a closing stage.

        Raises:
            TypeError, ValueError: as there.
        """
        return self._run(x, args, {}, keep=True)[1].steps

    def output_and_steps(self, x: Tensor, /, *args: Any) -> tuple[Any, list[Step]]:
        """The model's output, and every step, in one pass; ``x`` and ``args`` as in :meth:`steps`."""
        output, current = self._run(x, args, {}, keep=True)
        return output, current.steps

    def differentiable_steps(self, x: Tensor) -> tuple[Any, list[Step], list[Tensor]]:
        """The model's output, every step, and the states x0 through which a loss of the output can be differentiated.

        These are as they pass for inputs ``x``, which may be another shape than the block's.

        Raises:
            ValueError: such a state is changed in place.
        """
        output, current = self._run(x, (), {}, keep=True)
        return output, current.steps, list(current.sources())

    def _run(
        self, x: Tensor, args: tuple[Any, ...], measures: dict[str, StepFunction], keep: bool = False
    ) -> tuple[Tensor, ForwardPass]:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # where changes in place are counted
                return self._run(x.clone() if isinstance(x, Tensor) else x, args, measures, keep)
        self._check_input(x)
        current = ForwardPass(measures, x, keep, self.hooks.in_place)
        with self.hooks.running(current):
            output = self.model(x, *args)
        if not current.visited:
            names = [block.name for block in self.blocks]
            raise ValueError(f"none of the blocks was called: {', '.join(names[:4])}{' ...' * (len(names) > 4)}")
        if not torch.compiler.is_compiling():
            self._warn(current)
            self._visited = current.visited
        return output, current

    def _check_input(self, x: Any) -> None:
        """Inputs are checked here; states are not, so that a diverging network can be measured."""
        if self._whole and isinstance(x, Tensor) and x.is_floating_point():
            check_state(x)

    def _warn(self, current: ForwardPass) -> None:
        """Warn of what records lack."""
        if later := current.close():
            warnings.warn(
                f"the outputs of {len(later)} blocks ({later[0]}, ...) are changed in place after them: torch may "
                "refuse gradients of this pass' records; from the next pass on copies are measured",
                stacklevel=4,
            )
        block = current.without_gradients
        if block and any(p.requires_grad for p in self.model.get_submodule(block.first).parameters()):
            warnings.warn(
                f"block {block.name!r} is computed without gradients, so that its records have none: under no_grad, or "
                "by activation checkpointing with use_reentrant=True, which is to be off while records are trained on",
                stacklevel=4,
            )
        calls = [(step.block, step.part) for step in current.visited]
        before = [(step.block, step.part) for step in self._last_visited()]
        if calls == before or self._warned:
            return
        unused = [block.name for block in self.blocks if block not in dict(calls)]
        if unused or self._visited is not None:
            self._warned = True
            what = "blocks are called in another order or number than before"
            if unused:
                what = f"{len(unused)} of {len(self.blocks)} blocks are not called, {', '.join(unused[:4])}"
            warnings.warn(
                f"{what}: the rows of records are the steps of this pass, in the order of names (said once)",
                stacklevel=4,
            )

    def _last_visited(self) -> list[Visited]:
        return self._visited or [Visited(block, part, ()) for block in self.blocks for part in range(block.steps)]

    def extra_repr(self) -> str:
        """The blocks, for the fingerprint of the network."""
        return "; ".join(map(str, self.blocks))

    def __repr__(self) -> str:
        rows = []
        for m, (block, part, shape) in enumerate(self._last_visited()):
            kind = f"{block.kind} {part + 1} of 2" if block.mid else block.kind
            shortcut = f"shortcut {block.shortcut}" if block.shortcut and part == 0 else ""
            rows.append((f"{m:>{len(str(self.depth - 1))}}", block.name, kind, " x ".join(map(str, shape)), shortcut))
        columns = [column for column in zip(*rows, strict=True) if any(column)]
        widths = [max(map(len, column)) for column in columns]
        lines = ["".join(map("  {:{}}".format, row, widths)).rstrip() for row in zip(*columns, strict=True)]
        return "\n".join([f"AdaptedModel({type(self.model).__name__}, {len(rows)} steps)", *lines])
