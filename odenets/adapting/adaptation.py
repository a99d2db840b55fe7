"""adapt: any residual network with the ``record`` of an :class:`odenets.Network`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from odenets.adapting.adapted import AdaptedModel
from odenets.adapting.blocks import BlockSpec
from odenets.adapting.chains import layers_of
from odenets.adapting.masking import Mask, Masking, Per
from odenets.adapting.rules import Blocks, find_blocks
from odenets.adapting.verification import check_example
from odenets.recording import is_recorder

__all__ = ["adapt"]


def adapt(
    model: nn.Module,
    example: Any = None,
    *,
    blocks: Blocks | None = None,
    residue: Literal["displacement", "branch"] = "displacement",
    displacement: bool = False,
    partial: bool = False,
    mask: Mask = "auto",
    per: Per = "sample",
) -> AdaptedModel:
    """Any residual network, as it is, with the ``record`` of an :class:`odenets.Network`.

    Its residual additions are found in the program of a batch: every place where a state meets a branch that is
    computed from it with parameters and keeps its shape. Each is a step ``x1 = x0 + r`` of the Euler method with h = 1,
    where r is what the block truly adds: ``x1 - x0``, after its last activation if it has one.

    - x0 is the state that is added to, and x1 the sum, or what an elementwise function makes of it within the same
      module where nothing else reads the sum. With a ReLU at the end, as in ResNet, ResNeXt and RegNet,
      ``r = relu(x0 + f) - x0 = max(f, -x0)`` for a branch f. (The ResNeXt of [K24] adds ``relu(f)``, so that its
      residues are not negative; torchvision's may be.)
    - Where the shape changes x0 is the projection, what convolutions, norms, pooling or padding make of the state that
      the branch starts from. It may be negative, and then r is not zero where the branch is.
    - A transformer block is two steps, attention and MLP, each after its stochastic depth. A norm behind the addition,
      as in BERT, is a layer between steps.
    - Of additions within the branch of another the outermost is a step. Sums of linear maps of one state (RepVGG) are
      none, nor are biases, masks and position embeddings.
    - A :class:`~odenets.Flow`, :class:`~odenets.NeuralODE` or :class:`~odenets.Network` anywhere in it, called or
      recorded, is recorded by its own steps with its own h, "flow blocks.0", in the order in which they are taken; what
      it adds up inside is its own. With an error-controlled neural ODE passes may take different numbers of steps.
    - A plain network (VGG), with ``displacement=True``: each convolution or linear layer that keeps the shape, with the
      norm and activation after it, from the input x0 of the layer to the output x1 of the last of them.

    Args:
        model: used as it is, not copied. Hooks on its modules do nothing but in :meth:`AdaptedModel.record`.
        example: a batch, by which the blocks are found, of at least one sample: a tensor, a tuple of inputs or a
            mapping of inputs by keyword. It takes up to three forward passes in eval mode without gradients, which
            leave no trace. Without one they are found at the first batch.
        blocks: what is taken instead of what is found. Names, ``["layer1.0", "layer1.1"]``: what a rule that fits says
            of such a module, or else one step from its input to its output; ``"features.2:features.4"`` is one from the
            input of the first to the output of the last. A dictionary, ``{"layer1.0": None, "layer2.0":
            "layer2.0.downsample"}``: one step each, from the output of the shortcut named, or from the input. A class,
            ``MyBlock``: all modules of it. Rules, ``[*RULES, Rule(...)]``.
        residue: "displacement", ``x1 - x0``; or "branch", of blocks with an activation behind the addition (ResNet,
            RegNet) the output of their branch instead, as the published code of [K24] has it. A branch that ends
            in a batch norm has, in training, the mean square ``gamma^2 + beta^2`` per channel whatever goes into it: a
            penalty on it acts on these two vectors alone, and a warning says so.
        displacement: whether the layers of a chain, which adds nothing, are steps.
        partial: whether additions that cannot be seen are left out, and passes may take other steps than those found,
            as where layers are dropped at random; otherwise both are errors.
        mask: which tokens are padding and not measured, so that the measures of a sample are those of its states
            without them. "auto", an input called ``attention_mask``, 1 where there is a token, or
            ``src_key_padding_mask``, ``key_padding_mask`` or ``padding_mask``, True where there is padding, ``(B, T)``;
            the name of another input, 1 where there is a token; a function of the inputs by name to such a mask; None,
            padding is measured too.
        per: "sample"; or "token", measures are of each token that is no padding, taken on steps ``(N, D)``, and
            ``records.tokens`` are their samples and positions.

    Returns:
        The model with ``record``, ``steps`` and what else an :class:`odenets.Recorder` has.

    Raises:
        TypeError: the model is no module, blocks are neither names nor rules, or the mask is neither.
        ValueError: no residual addition, with the reason; some that cannot be seen; a program that goes another way for
            a part of the batch; outputs of two passes that differ; an example that the model does not take; no module
            of such a name, blocks within blocks, or another residue.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from odenets import measures
    >>> network = adapt(resnet18().eval(), torch.randn(2, 3, 32, 32))
    >>> network.depth
    8
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
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "model must not be compiled, which leaves its modules out: adapt the plain model, and compile what comes "
            "of it, torch.compile(adapted)"
        )
    if residue not in ("displacement", "branch"):
        raise ValueError(f"residue must be 'displacement' or 'branch', got {residue!r}")
    if displacement and blocks is not None:
        raise ValueError("displacement=True takes the layers of a chain, and blocks names others: give one of them")
    inputs, keywords = _inputs(example)
    specs: tuple[BlockSpec, ...] | None = None
    if displacement:
        specs = layers_of(model)
        if not specs:
            raise ValueError(
                f"displacement=True takes the layers of a chain, and {type(model).__name__} is none: most of its "
                "layers stand in no Sequential under it"
            )
    elif blocks is not None:
        specs = find_blocks(model, blocks)
        if residue == "displacement":
            specs = tuple(replace(spec, branch=None) for spec in specs)
    adapted = AdaptedModel(model, specs, partial=partial, residue=residue, masking=Masking(mask, per))
    if example is not None:
        check_example(adapted, inputs, keywords)
    return adapted


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as inputs by position and by keyword.

    Raises:
        TypeError: it is no inputs, but names of blocks.
    """
    if isinstance(example, Mapping) and any(isinstance(one, Tensor) for one in example.values()):
        return (), dict(example)
    several = example if isinstance(example, list | tuple | Mapping) else [example]
    if example is not None and (
        isinstance(example, type | list | Mapping) or not any(isinstance(one, Tensor) for one in several)
    ):
        raise TypeError(
            "example must be a tensor, a tuple of inputs or a mapping of inputs by keyword, got "
            f"{type(example).__name__}: blocks are named by keyword, adapt(model, blocks=...)"
        )
    return (example if isinstance(example, tuple) else () if example is None else (example,)), {}
