"""Recording: what every network offers whose steps can be measured, and the numbers that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from odenets.inputs import call, check_keywords, is_by_keyword, plain
from odenets.measures import StepFunction, needs_gradient
from odenets.records import Records
from solvers import Step
from solvers.validation import is_transformed

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = [
    "Joined",
    "Recorder",
    "Recording",
    "Records",
    "check_compiled",
    "check_values",
    "is_recorder",
    "measure_steps",
    "named_measures",
    "record",
    "recorder_in",
]

_WRAPPED = {"", "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module"}
"""Where wrappers of torch and Fabric hold what they wrap; some hand on its attributes."""


@runtime_checkable
class Recorder(Protocol):
    """A network whose solver steps can be taken and measured: a flow, a network of flows, an adapted model, a part.

    Methods that measure take any of them; what a class of the user's offers under these names is one too: ``record``,
    ``steps``, ``depth``, ``h`` and ``evaluations``.

    >>> import odenets
    >>> isinstance(odenets.Flow(depth=2), Recorder), isinstance(nn.Linear(2, 2), Recorder)
    (True, False)
    """

    @property
    def depth(self) -> int:
        """Number of steps."""
        ...

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each step."""
        ...

    @property
    def evaluations(self) -> int:
        """Field evaluations of one forward pass."""
        ...

    def record(self, x: Tensor, /, *args: Any, **measures: Any) -> tuple[Tensor, Records]:
        """The output for inputs ``x``, and each of the ``measures`` by name, ``(depth, B)``.

        ``args`` go to the velocity fields. One that takes its inputs by keyword tells them from the measures, as
        ``record(self, input_ids, attention_mask=None, **measures)`` does.
        """
        ...

    def steps(self, x: Tensor, *args: Any, closing: bool = True) -> Iterable[Step]:
        """Every step for inputs ``x``, one after the other; ``args`` go to the velocity fields.

        Without ``closing``, steps may lack their closing stage.
        """
        ...


def is_recorder(network: object) -> TypeIs[Recorder]:
    """Whether a ``network`` records its steps; its properties, which may cost or raise, are not asked for.

    >>> import odenets
    >>> is_recorder(odenets.Flow()), is_recorder(nn.Linear(2, 2))
    (True, False)
    """
    return all(callable(getattr(network, name, None)) for name in ("record", "steps"))


class Joined(nn.Module):
    """A module that consists of recorders, whose steps are theirs, one after the other.

    A subclass says what these are, :attr:`recorders`, and defines ``record`` and ``steps``.

    >>> import odenets
    >>> class Pair(Joined):
    ...     def __init__(self, first, second):
    ...         super().__init__()
    ...         self.first, self.second = first, second
    ...
    ...     @property
    ...     def recorders(self):
    ...         return [self.first, self.second]
    >>> Pair(odenets.Flow(depth=2), odenets.Flow(depth=3)).depth
    5
    """

    @property
    def recorders(self) -> Sequence[Recorder]:
        """What it consists of, in the order of their steps."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of steps."""
        return sum(recorder.depth for recorder in self.recorders)

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each step."""
        return tuple(h for recorder in self.recorders for h in recorder.h)

    @property
    def evaluations(self) -> int:
        """Field evaluations of one forward pass."""
        return sum(recorder.evaluations for recorder in self.recorders)


class Recording(nn.Module):
    """A network whose forward pass is its ``record``, to be wrapped by what calls only that.

    ``DistributedDataParallel(Recording(network, objective.measures))`` averages the gradients of what was measured too,
    and ``torch.compile`` compiles it.

    Args:
        network: a module that records its steps.
        measures: what it records, by name.
        compile: whether ``record`` is compiled.

    Raises:
        ValueError: a measure that is not compiled.

    >>> import odenets
    >>> from odenets import measures
    >>> wrapped = Recording(odenets.Flow(depth=2), {"action": measures.action})
    >>> output, records = record(wrapped, torch.randn(4, 3), {"action": measures.action})
    >>> records["action"].shape
    torch.Size([2, 4])
    """

    def __init__(self, network: Recorder, measures: Mapping[str, StepFunction], compile: bool = False) -> None:
        super().__init__()
        self.network, self.measures = network, named_measures(measures)
        if compile:
            check_compiled(self.measures)
        self.record: Callable[..., tuple[Any, Records]] = torch.compile(network.record) if compile else network.record
        self.training = network.training  # type: ignore[attr-defined]  # a recorder that is a module

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Any, dict[str, Tensor], tuple[Any, ...]]:
        """The output for ``inputs``, the records as a plain dictionary, and their ``layout``.

        Inputs come by position, ``x, *args``, or by ``keywords``. Wrappers may rebuild the dictionary;
        ``Records(values, *layout)`` makes the records of it again.
        """
        output, records = self.record(*inputs, **keywords, **self.measures)
        return output, dict(records), records.layout


def check_compiled(measures: Mapping[str, StepFunction]) -> None:
    """That a pass that records some ``measures`` can be compiled.

    Raises:
        ValueError: one differentiates its steps, whose gradient torch does not compile.

    >>> from odenets.measures import action
    >>> check_compiled({"action": action})
    """
    if names := [name for name, one in measures.items() if needs_gradient(one)]:
        raise ValueError(
            f"measure {names[0]!r} differentiates its steps, and torch.compile has no second derivatives: compile=False"
        )


def record(network: nn.Module, inputs: Any, measures: Mapping[str, StepFunction]) -> tuple[Any, Records]:
    """The output and records of a network, or of what wraps a :class:`Recording` of it.

    Where a measure differentiates steps in their states, as :func:`~odenets.measures.jacobian`, the inputs are copies
    that require a gradient, and gradients are enabled meanwhile.

    Args:
        network: a network that records its steps, or ``DistributedDataParallel(Recording(...))`` and the like.
        inputs: x, ``(x, *args)``, or a mapping of what the network takes by keyword, such as a batch of Hugging Face's
            tokenizers: ``network.record(**inputs, **measures)``.
        measures: functions ``Step -> (B,)`` by name; of a Recording, some of those it has.

    Returns:
        The output, and the records, ``(blocks, B)`` by name.

    Raises:
        TypeError: as :func:`recorder_in`, or inputs by keyword for a network that takes them by position.
        ValueError: a Recording of other measures, an input and a measure of one name, or a measure that differentiates
            steps where torch.func maps the network.

    >>> import odenets
    >>> from odenets import measures
    >>> flow = odenets.Flow(depth=2)
    >>> output, records = record(flow, torch.randn(4, 3), {"action": measures.action})
    >>> output.shape, records["action"].shape
    (torch.Size([4, 3]), torch.Size([2, 4]))
    """
    if not any(map(needs_gradient, measures.values())):
        return _record(network, inputs, measures)
    enabled = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others have one derivative
        output, records = _record(network, tree_map(_requiring_gradient, plain(inputs)), measures)
    if enabled:
        return output, records
    values = {name: one.detach() for name, one in records.items()}
    return tree_map(lambda one: one.detach() if isinstance(one, Tensor) else one, output), Records(
        values, *records.layout
    )


def _requiring_gradient(x: Any) -> Any:
    """A floating input as one that requires a gradient, and may be changed in place."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or (x.requires_grad and not x.is_leaf):
        return x
    if is_transformed(x):
        raise ValueError(
            "a measure that differentiates its steps is not recorded where torch.func maps or differentiates the "
            "network, as odenets.training.fit_instances does: train one network after the other"
        )
    return (x if x.requires_grad else x.detach().clone().requires_grad_()).clone()


def _record(network: nn.Module, inputs: Any, measures: Mapping[str, StepFunction]) -> tuple[Any, Records]:
    inner: Any = recorder_in(network)
    if inner is network:
        return call(inner.record, inputs, **measures)
    recording = next(module for module in network.modules() if isinstance(module, Recording))
    if missing := [name for name in measures if name not in recording.measures]:
        raise ValueError(
            f"a Recording must have the measures of the objective, got none named {missing}: "
            "Recording(network, objective.measures)"
        )
    if is_by_keyword(inputs):
        check_keywords(inner.record, inputs, recording.measures)
    output, values, layout = call(network, inputs)
    return output, Records(values, *layout)


def recorder_in(network: nn.Module) -> nn.Module:
    """The module that records its steps: a ``network`` itself, or that in a :class:`Recording` in what wraps it.

    Raises:
        TypeError: no module, one that records nothing, or a wrapper whose own forward pass would be left out.

    >>> import odenets
    >>> flow = odenets.Flow()
    >>> recorder_in(flow) is flow, recorder_in(nn.Sequential(Recording(flow, {}))) is flow
    (True, True)
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module that records its steps, got {type(network).__name__}")
    kind = type(network).__name__.replace("OptimizedModule", "torch.compile")
    if isinstance(network, nn.DataParallel):
        raise TypeError(
            "network must not be in DataParallel, which cannot gather records: take DistributedDataParallel"
        )
    if (inner := unwrapped(network)) is not network:
        return inner
    if callable(getattr_static(network, "record", None)):  # its own: wrappers hand on what they wrap
        if hasattr(network, "unshard") and "record" not in vars(network):
            raise TypeError(
                "network is sharded by its forward pass, which record leaves out: fully_shard(Recording(network, "
                "objective.measures)), or torch.distributed.fsdp.register_fsdp_forward_method(network, 'record')"
            )
        return network
    inner = next((name for name, module in network.named_modules() if is_recorder(module)), None)
    if inner is not None and {*inner.split(".")} <= _WRAPPED:
        raise TypeError(
            f"network must record its steps, got a {kind} around one that does, whose own forward pass would be left "
            f"out: take {kind}(odenets.recording.Recording(network, objective.measures))"
        )
    if inner is not None:
        raise TypeError(
            f"network must record its steps, got {kind} with a {type(network.get_submodule(inner)).__name__} in it at "
            f"{inner!r}: write it as odenets.Network(encoder, flow, head), or give it record, steps, depth, h and "
            "evaluations"
        )
    raise TypeError(
        f"network must be a module that records its steps, an odenets.Recorder, got {kind}: odenets.adapt makes one of "
        "any residual network"
    )


def unwrapped(network: nn.Module) -> nn.Module:
    """The network of a :class:`Recording`, also of one in a wrapper; a network itself where there is none."""
    if is_recorder(network):
        return network
    return next(
        (cast(nn.Module, module.network) for module in network.modules() if isinstance(module, Recording)), network
    )


def measure_steps(
    steps: Iterable[Step], x: Tensor, measures: Mapping[str, StepFunction], blocks: Sequence[str] | None = None
) -> tuple[Step, Records]:
    """Measure each of some steps as it is taken.

    Args:
        steps: one after the other, at least one.
        x: the state from which they go, ``(B, *S)``.
        measures: functions ``Step -> (B,)`` by name.
        blocks: the names of the steps' blocks; "step 0" and so on if not given.

    Returns:
        The last step, and the records of all, ``(steps, B)`` by name.

    Raises:
        TypeError, ValueError: a measure is no function, or does not return ``(B,)``.

    >>> import odenets
    >>> from odenets import measures
    >>> flow, x = odenets.Flow(depth=2), torch.randn(4, 3)
    >>> last, records = measure_steps(flow.steps(x), x, {"action": measures.action})
    >>> last.x1.shape, records["action"].shape
    (torch.Size([4, 3]), torch.Size([2, 4]))
    """
    for name, measure in measures.items():
        if not callable(measure):
            raise TypeError(f"measure {name!r} must be a function Step -> (B,), got {type(measure).__name__}")
    rows: dict[str, list[Tensor]] = {name: [] for name in measures}
    last = None
    for last in steps:
        for name, measure in measures.items():
            rows[name].append(check_values(name, measure(last), x))
    assert last is not None  # a flow has at least one step
    return last, Records({name: torch.stack(values) for name, values in rows.items()}, blocks=blocks)


def named_measures(measures: Mapping[str, StepFunction]) -> dict[str, StepFunction]:
    """The ``measures`` as a dictionary of functions by name.

    Raises:
        TypeError: they come without names, or one is no function.

    >>> named_measures([measure_steps])
    Traceback (most recent call last):
        ...
    TypeError: measures must come by name, {'measure_steps': measure_steps}, got a list
    """
    if not isinstance(measures, Mapping):
        several = measures if isinstance(measures, list | tuple | set) else [measures]
        names = [str(getattr(one, "name", getattr(one, "__name__", "name"))) for one in several] or ["name"]
        example = ", ".join(f"{name!r}: {name if name != 'name' else 'measure'}" for name in names)
        raise TypeError(f"measures must come by name, {{{example}}}, got a {type(measures).__name__}")
    for name, measure in measures.items():
        if not isinstance(name, str):
            raise TypeError(f"measures must have names, got {name!r}")
        if not callable(measure):
            raise TypeError(f"measure {name!r} must be a function Step -> (B,), got {type(measure).__name__}")
    return dict(measures)


def check_values(name: str, value: Tensor, x: Tensor) -> Tensor:
    """The ``value`` of the measure ``name``, which is one number per sample of ``x``, ``(B,)``.

    Raises:
        ValueError: it is not.

    >>> check_values("mine", torch.zeros(3), torch.zeros(4, 2))
    Traceback (most recent call last):
        ...
    ValueError: measure 'mine' must return one number per sample, shape (4,), got (3,)
    """
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"measure {name!r} must return one number per sample, shape ({x.shape[0]},), got {got}")
    return value
