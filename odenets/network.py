"""Flows one after another: as a chain, and as a network with an encoder and a head (``F . T . E`` of [K24])."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odenets.coarsening import at_depth
from odenets.flow import Flow, check_readout
from odenets.measures import StepFunction
from odenets.modes import device_of, dtype_of
from odenets.neural_ode import NeuralODE
from odenets.observing import observed, observed_steps
from odenets.recording import Joined, Records
from solvers import Step
from solvers.validation import check_state

__all__ = ["Chain", "Network"]


class Chain(Joined):
    """Flows and other layers, one after another; states are not checked, so that a diverging network can be measured.

    Attributes:
        readout: that of the last flow, where it is the last layer.
    """

    readout = "solution"
    at_depth = at_depth

    @property
    def layers(self) -> list[nn.Module]:
        """The flows and other layers in order."""
        raise NotImplementedError

    @property
    def flows(self) -> list[Any]:
        """The flows and neural ODEs, first to last."""
        return [layer for layer in self.layers if isinstance(layer, (Flow, NeuralODE))]

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each step, as records have it, after that of its flow where there are several."""
        flows = self.flows
        parts = [f"flows.{i} " if len(flows) > 1 else "" for i in range(len(flows))]
        return tuple(f"{part}{name}" for part, flow in zip(parts, flows, strict=True) for name in flow.names)

    @property
    def recorders(self) -> list[Any]:
        """The flows, whose steps are those of the whole."""
        return self.flows

    def forward(self, x: Tensor, /, *args: Any) -> Tensor:
        """The output for inputs ``x`` ``(B, ...)``, that of :meth:`record`; ``args`` go to the velocity fields."""
        return self.record(x, *args)[0]

    @observed
    def record(self, x: Tensor, /, *args: Any, **measures: StepFunction) -> tuple[Tensor, Records]:
        """The last state, and the flows' records joined: per measure ``(blocks of all flows, B)``.

        ``args`` go to the velocity fields of all flows, ``v(t, x, *args)``, and to no other layer.

        ``records.starts`` holds the row at which each flow begins; where there are several, ``records.blocks`` name
        the flow before its block.

        Raises:
            TypeError: an argument that only a flow's own record takes.
        """
        if wrong := [name for name in ("check", "readout") if name in measures]:
            raise TypeError(
                f"record takes measures by name, and {wrong.pop()!r} is an argument of a Flow's record alone"
            )
        layers, parts = self.layers, []
        for i, layer in enumerate(layers, 1):
            if isinstance(layer, (Flow, NeuralODE)):
                flow: Any = layer
                options: dict[str, Any] = {"check": False}
                if isinstance(layer, Flow):
                    options["readout"] = self.readout if i == len(layers) else "solution"
                x, records = flow.record(x, *args, **options, **measures)
                parts.append(records)
            else:
                x = layer(x)
        return x, Records.join(parts, [f"flows.{i}" if len(parts) > 1 else "" for i in range(len(parts))])

    def inverse(self, x: Tensor, /, *args: Any) -> Tensor:
        """The first state, ``(B, *S)``, that leads to a last state ``x``, where all layers can be undone.

        Flows of a :class:`~odenets.schemes.ReversibleScheme` can be undone, and layers that have an ``inverse``, as
        :class:`~odenets.schemes.SpaceToDepth` has. ``args`` are those of the velocity fields.

        Raises:
            TypeError: a layer has no inverse.
            ValueError: as :meth:`Flow.inverse`.
        """
        for layer in reversed(self.layers):
            x = _undone(layer, x, args)
        return x

    @observed_steps
    def steps(self, x: Tensor, *args: Any, closing: bool = True) -> Iterator[Step]:
        """Every step of every flow for inputs ``x``; ``args`` and ``closing`` as :meth:`Flow.steps` takes them."""
        for layer in self.layers:
            if isinstance(layer, (Flow, NeuralODE)):
                for step in layer.steps(x, *args, closing=closing, check=False):
                    yield step
                    x = step.x1
            else:
                x = layer(x)


class Network(Chain):
    """Encoder, flows with transitions between them, and head, as a residual network for classification is.

    That is ``head . flow_n . transition_{n-1} . ... . flow_1 . encoder``, or ``F . T . E`` of [K24]. ``network(x)`` is
    the output; ``network.record(x, action=measures.action)`` measures the steps on the way.

    Args:
        encoder: maps an input to the first state.
        flows: one flow, or several.
        head: maps the last state to the output, logits for a classifier.
        transitions: one module between each flow and the next.
        readout: what the head reads: "solution", the last flow's end state, or "ensemble", the average of its last
            step's embedded outputs.

    Raises:
        ValueError: the number of transitions does not fit the number of flows, or the readout is unknown or
            one that the method of the last flow has not.
        TypeError: something else than modules, and flows where flows are.

    >>> import odenets
    >>> from odenets import measures
    >>> network = Network(nn.Flatten(), Flow(odenets.MLPField(64), depth=3), nn.Linear(64, 10))
    >>> logits, records = network.record(torch.rand(5, 1, 8, 8), action=measures.action)
    >>> logits.shape, records["action"].shape
    (torch.Size([5, 10]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        flows: Flow | NeuralODE | Sequence[Flow | NeuralODE],
        head: nn.Module,
        *,
        transitions: Sequence[nn.Module] = (),
        readout: str = "solution",
    ) -> None:
        super().__init__()
        flows = list(flows) if isinstance(flows, Iterable) else [flows]
        _check_layers(encoder, flows, head, transitions)
        if not flows:
            raise ValueError("flows must hold at least one flow")
        if len(transitions) != len(flows) - 1:
            raise ValueError(
                f"{len(flows)} flows need {len(flows) - 1} transitions, got {len(transitions)}: "
                "transitions=[...], nn.Identity() where the state stays as it is"
            )
        check_readout(readout, flows[-1].tableau)
        if readout == "ensemble" and not isinstance(flows[-1], Flow):
            raise ValueError("readout must be 'solution' where the last flow is a neural ODE, which has one output")
        self.encoder = encoder
        self._flows = nn.ModuleList(flows)
        self.transitions = nn.ModuleList(transitions)
        self.head = head
        self.readout = readout

    @property
    def flows(self) -> list[Any]:
        """The flows and neural ODEs, first to last."""
        return [*self._flows]

    @property
    def layers(self) -> list[nn.Module]:
        """The flows and the transitions between them."""
        first, *others = self._flows
        return [first, *(layer for pair in zip(self.transitions, others, strict=True) for layer in pair)]

    @property
    def evaluations(self) -> int:
        """Field evaluations of one forward pass."""
        *before, last = self.flows
        own = last.evaluations_per_pass(readout=self.readout) if isinstance(last, Flow) else last.evaluations
        return sum(f.evaluations for f in before) + own

    def extra_repr(self) -> str:
        """What the head reads, where it is not the solution, as ``print`` shows it."""
        return "" if self.readout == "solution" else f"readout={self.readout}"

    def encode(self, x: Tensor) -> Tensor:
        """The first state, that of the encoder for inputs ``x``, ``(B, ...)``.

        Inputs are checked here; states are not, so that a diverging network can be measured.

        Raises:
            TypeError, ValueError: x has not the dtype or the device of the network or is not finite.
        """
        if isinstance(x, Tensor) and x.is_floating_point():
            check_state(x)
            if not torch.compiler.is_compiling():
                return self._encode_floating(x)
        try:
            return self.encoder(x)
        except RuntimeError as error:
            if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
                raise
            raise TypeError(
                f"x must be of the floating dtype of the network, {dtype_of(self)}, where the encoder takes no "
                f"{x.dtype}: x.float(), or x.float() / 255 for bytes of images: {error}"
            ) from error

    def _encode_floating(self, x: Tensor) -> Tensor:
        try:
            return self.encoder(x)
        except RuntimeError as error:
            dtype, device = dtype_of(self), device_of(self)
            if x.dtype != dtype and not any(map(torch.is_autocast_enabled, {x.device.type, device.type} - {"meta"})):
                raise TypeError(f"x must have the dtype of the network, {dtype}, got {x.dtype}: {error}") from error
            if x.device != device:
                raise ValueError(
                    f"x must be on the device of the network, {device}, got {x.device}: {error}"
                ) from error
            raise

    def inverse(self, x: Tensor, /, *args: Any) -> Tensor:
        """The input that leads to a last state ``x``, that before the head, where encoder and layers can be undone.

        ``args`` are those of the velocity fields.

        Raises:
            TypeError: the encoder, a flow or a transition has no inverse.
            ValueError: as :meth:`Flow.inverse`.

        >>> import odenets
        >>> from odenets.schemes import InjectivePadding, SpaceToDepth
        >>> encoder = nn.Sequential(InjectivePadding(3, 4), SpaceToDepth())
        >>> flow = odenets.Flow(odenets.ConvField(8), solver="revnet", depth=3)
        >>> network, x = Network(encoder, flow, nn.Flatten()), torch.randn(2, 3, 8, 8)
        >>> torch.allclose(network.inverse(flow(encoder(x))), x, atol=1e-5)
        True
        """
        return _undone(self.encoder, super().inverse(x, *args), ())

    @observed
    def record(self, x: Tensor, /, *args: Any, **measures: StepFunction) -> tuple[Tensor, Records]:
        """The head's output, and the records of all flows as one.

        Args:
            x: inputs, ``(B, ...)``, as the encoder takes them.
            args: what the velocity fields of all flows take besides, ``v(t, x, *args)``; no other layer gets them.
            measures: functions ``Step -> (B,)`` by name, such as those of :mod:`odenets.measures`.

        Returns:
            The output, and per measure ``(blocks of all flows, B)``. ``records.starts`` holds the row at which each
            flow begins; where there are several, ``records.blocks`` name the flow before its block.

        Raises:
            TypeError, ValueError: x has not the dtype or the device of the network or is not finite, an argument that
                only a flow's own record takes, or a measure that does not return ``(B,)``.
        """
        x, records = super().record(self.encode(x), *args, **measures)
        return self.head(x), records

    @observed_steps
    def steps(self, x: Tensor, *args: Any, closing: bool = True) -> Iterator[Step]:
        """Every step of every flow for inputs ``x``, from the first to the last.

        Args:
            x: inputs, ``(B, ...)``.
            args: what the velocity fields take besides.
            closing: whether each step carries the closing stages of its method.

        Returns:
            The steps, each taken when it is asked for.
        """
        return super().steps(self.encode(x), *args, closing=closing)

    def outputs(self, x: Tensor, /, *args: Any, full_passes: bool = False) -> dict[str, Tensor]:
        """The head's output for every embedded scheme of the last flow, and for their average, "ensemble".

        Args:
            x: inputs.
            args: what the fields take besides.
            full_passes: let every block of the last flow carry the scheme on, one pass each, instead of reading all
                schemes off its last block.

        Returns:
            The outputs by name.

        Raises:
            ValueError: the last flow is a neural ODE, which has one output.
        """
        *before, last = self.flows
        x = self.encode(x)
        for flow, transition in zip(before, self.transitions, strict=True):
            x = transition(flow.record(x, *args, check=False)[0])
        states = last.outputs(x, *args, full_passes=full_passes, check=False)
        check_readout("ensemble", last.tableau)
        states["ensemble"] = torch.stack(tuple(states.values())).mean(0)
        return {name: self.head(state) for name, state in states.items()}

    def ensemble(self, x: Tensor, /, *args: Any, full_passes: bool = False) -> Tensor:
        """The head's output for the average of the last flow's embedded outputs [K24, section 6.2.1].

        The arguments ``x``, ``args`` and ``full_passes`` and what is raised are those of :meth:`outputs`.
        """
        return self.outputs(x, *args, full_passes=full_passes)["ensemble"]


def _undone(layer: Any, x: Tensor, args: Sequence[Any]) -> Tensor:
    """What a layer leads to ``x`` from."""
    if isinstance(layer, Flow):
        return layer.inverse(x, *args, check=False)
    if isinstance(layer, nn.Sequential):
        for one in reversed(layer):
            x = _undone(one, x, ())
        return x
    if isinstance(layer, nn.Identity):
        return x
    if not callable(getattr(layer, "inverse", None)):
        raise TypeError(
            f"inverse: {type(layer).__name__} has none; layers that have one are flows of reversible schemes, "
            "odenets.schemes.SpaceToDepth and InjectivePadding, and modules of your own with a method inverse(x)"
        )
    return layer.inverse(x)


def _check_layers(encoder: Any, flows: Iterable[Any], head: Any, transitions: Iterable[Any]) -> None:
    for name, layer in (("encoder", encoder), ("head", head), *(("transitions", layer) for layer in transitions)):
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{name} must be of modules, nn.Identity() for none, got {type(layer).__name__}")
    for flow in flows:
        if not isinstance(flow, Flow | NeuralODE):
            raise TypeError(
                f"flows must be Flows or NeuralODEs, got {type(flow).__name__}: odenets.Flow(field) makes one of a "
                "velocity field, and the order is Network(encoder, flows, head)"
            )
