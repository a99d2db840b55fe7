"""Blocks that a flow takes several times: its last one unrolled, or its last ones sharing one field."""

from __future__ import annotations

from typing import cast

from odenets.blocks import Block
from odenets.errors import check_count
from odenets.flow import Flow

__all__ = ["share_last", "unroll_last"]


def unroll_last(flow: Flow, times: int, *, refine: bool = False) -> Flow:
    """A flow that takes the last block of another ``times`` times, to refine what that computes, without training.

    Reference: Jastrzebski, Arpit, Ballas, Verma, Che, Bengio. Residual connections encourage iterative inference. ICLR
    2018, section 4.4; [K24, section 2.4].

    Args:
        flow: one with blocks of their own; it stays as it is, and its weights are those of both.
        times: how often; 1 is the flow itself.
        refine: whether the repeated steps share the last step's time, ``h / times`` each, for the same equation over
            the same time; they have its h otherwise, and the total time grows.

    Returns:
        The flow, in the mode of the other.

    Raises:
        TypeError, ValueError: times below 1, a shared flow, or one without a field yet.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), solver="euler", depth=3, h=1.0)
    >>> unroll_last(flow, 4).h, unroll_last(flow, 4, refine=True).h
    ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.25, 0.25, 0.25, 0.25))
    """
    check_count("times", times, 1)
    *blocks, last = _blocks_of(flow)
    again = Block([*last.fields], last.h / times if refine else last.h)
    return _flow_of([*blocks, *[again] * times], flow)


def share_last(flow: Flow, count: int) -> Flow:
    """A flow whose last ``count`` blocks all have the fields of the first of them, for as many fewer parameters.

    Reference: Jastrzebski et al., as :func:`unroll_last`, section 4.5.

    Args:
        flow: one with blocks of their own; it stays as it is, and the weights that stay are those of both.
        count: how many share.

    Returns:
        The flow, with the same step sizes, in the mode of the other.

    Raises:
        TypeError, ValueError: a count that is not from 1 to the depth, a shared flow, or one without a field yet.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), solver="euler", depth=5)
    >>> len({id(block.fields[0]) for block in share_last(flow, 3).blocks})
    3
    """
    check_count("count", count, 1)
    blocks = _blocks_of(flow)
    if count > len(blocks):
        raise ValueError(f"count must be at most the depth, {len(blocks)}, got {count}")
    first = blocks[-count]
    shared = [Block([*first.fields], block.h) for block in blocks[-count:]]
    return _flow_of([*blocks[:-count], *shared], flow)


def _flow_of(blocks: list[Block], like: Flow) -> Flow:
    """A flow of blocks, whose fields keep their modes."""
    flow = type(like).of(blocks, start=like.start, **like.settings)
    for module in (flow, flow.blocks, *blocks, *(block.fields for block in blocks)):
        module.training = like.training
    flow.input_shape, flow.before, flow.passes_memory = like.input_shape, like.before, like.passes_memory
    return flow


def _blocks_of(flow: Flow) -> list[Block]:
    if not isinstance(flow, Flow):
        raise TypeError(
            f"flow must be an odenets.Flow, got {type(flow).__name__}: one of a network is network.flows[i]"
        )
    if flow.shared or flow.stage_fields == "chained":
        raise ValueError("flow must have blocks of their own, got one whose blocks share fields")
    if not len(flow.blocks):
        raise ValueError("flow has no field yet: call it once before")
    return [cast(Block, block) for block in flow.blocks]
