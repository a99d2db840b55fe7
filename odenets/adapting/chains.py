"""Chains: networks without additions, each layer of which that keeps the shape is a step."""

from __future__ import annotations

from torch import nn

from odenets.adapting.blocks import BlockSpec, flow_spec, records_itself
from odenets.adapting.program.places import Place

__all__ = ["layers_of"]


def layers_of(model: nn.Module) -> tuple[BlockSpec, ...]:
    """The layers that keep the shape, each with the norm and activation after it, and flows, if ``model`` is a chain.

    That is one with most of its convolutions and linear layers in Sequentials that are the model or lie directly under
    it. Nothing if it is none.

    >>> [block.name for block in layers_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))]
    ['0:1']
    """
    children = [("", model)] if isinstance(model, nn.Sequential) else model.named_children()
    chains = [(name, chain) for name, chain in children if isinstance(chain, nn.Sequential)]
    leaves = [leaf for name, chain in chains for leaf in _leaves(name, chain)]
    flows = [module for module in model.modules() if records_itself(module)]
    within = {one for flow in flows for one in flow.modules()}
    weights = sum(_is_weight(module) for module in model.modules() if module not in within)
    if 2 * sum(_is_weight(module) for _, module in leaves) < max(weights, 1):
        return ()
    specs = []
    for i, (name, module) in enumerate(leaves):
        if records_itself(module):
            specs.append(flow_spec(name))
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
        block = name if name == last else f"{name}:{last}"
        ends = (Place(last, "output"),)
        specs.append(BlockSpec(block, block, "layer", Place(name, "input", (0,)), ends))
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
