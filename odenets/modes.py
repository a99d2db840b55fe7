"""Modes, buffers and random state of a network, restored after a look at it; its device and its dtype."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from odenets.inputs import plain
from solvers import LearnedTableau

__all__ = [
    "device_of",
    "dtype_of",
    "evaluating",
    "in_eval_mode",
    "inputs_for",
    "keeping_attributes",
    "keeping_modes",
    "keeping_state",
    "random_state",
    "set_random_state",
    "to_training_mode",
    "total_dtype",
]


@contextmanager
def keeping_modes(*networks: nn.Module) -> Iterator[None]:
    """Restore the mode of every module on leaving, also after an exception.

    Each module has its own mode back, so that a part frozen in eval mode stays frozen. A module that comes meanwhile
    (by a flow from its first input) gets the mode of the module that holds it.
    """
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        yield
    finally:
        for network in networks:
            _restore(network, modes, network.training)


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Eval mode for a while: :func:`keeping_modes` around ``network.eval()``.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
    >>> with evaluating(network):
    ...     network[0].training
    False
    >>> network[0].training, network[1].training
    (True, False)
    """
    with keeping_modes(*networks):
        for network in networks:
            network.eval()
        yield


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode by the flags alone: ``eval`` of modules that change weights by it, as to fold them, is not called.

    >>> layer = nn.Dropout()
    >>> with in_eval_mode(layer):
    ...     layer.training
    False
    """
    with keeping_modes(network):
        for module in network.modules():
            module.training = False
        yield


@contextmanager
def keeping_state(*networks: nn.Module) -> Iterator[None]:
    """:func:`keeping_modes` and, besides, buffers and random state: passes in training mode leave no trace either.

    Meanwhile each buffer, a running statistic or the vector of a power iteration, is a copy of itself. Random state is
    that of torch's generators of the CPU and of the networks' devices.

    >>> norm = nn.BatchNorm1d(2)
    >>> with keeping_state(norm):
    ...     _ = norm(torch.randn(4, 2))
    >>> norm.num_batches_tracked
    tensor(0)
    """
    slots, copies = [], {}
    for module in {module: None for network in networks for module in network.modules()}:
        for name, buffer in module._buffers.items():
            if buffer is not None and not nn.parameter.is_lazy(buffer):
                slots.append((module, name, buffer))
                if buffer not in copies:
                    copies[buffer] = buffer.clone()
    with keeping_modes(*networks), _keeping_random_state({device_of(network) for network in networks}):
        try:
            for module, name, buffer in slots:
                module._buffers[name] = copies[buffer]
            yield
        finally:
            for module, name, buffer in slots:
                module._buffers[name] = buffer


@contextmanager
def keeping_attributes(network: nn.Module) -> Iterator[None]:
    """:func:`keeping_state` and, besides, plain attributes of modules: what a pass counts or caches in them is undone.

    Containers, dictionaries, lists and sets, get back what they held. A module that gets parameters or parts meanwhile,
    as torch's lazy modules do, keeps its attributes.

    >>> class Counting(nn.Module):
    ...     calls, seen = 0, None
    ...
    ...     def forward(self, x):
    ...         self.calls += 1
    ...         return x
    >>> module = Counting()
    >>> with keeping_attributes(module):
    ...     _ = module(torch.zeros(1))
    >>> module.calls
    0
    """
    before = [(module, _parts(module), _attributes(module)) for module in _of_python(network)]
    containers = [one for *_, values in before for one in _containers(values)]
    contents = [copy(value) for value in containers]
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002 - what models draw from
    try:
        with keeping_state(network):
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        for value, content in zip(containers, contents, strict=True):
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(content)
        for module, parts, values in before:
            if _parts(module) == parts:
                for name in _attributes(module).keys() - values.keys():
                    del vars(module)[name]
                vars(module).update(values)


def _containers(value: Any) -> Iterator[Any]:
    """The dictionaries, lists, sets and queues in the values of a dictionary, and in those."""
    for one in [*(value.values() if isinstance(value, dict) else value)]:
        if type(one) in (dict, defaultdict, OrderedDict, list, set, deque):
            yield one
            yield from _containers(one)


def _of_python(network: nn.Module) -> Iterator[nn.Module]:
    """Its modules but scripts, which hold their attributes elsewhere."""
    return (module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule))


_OF_TORCH = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides what torch does, its plain attributes."""
    return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}


def _parts(module: nn.Module) -> tuple[Any, ...]:
    """The class of a module and the names of its parameters, buffers and parts."""
    return type(module), *(tuple(held) for held in (module._parameters, module._buffers, module._modules))


@contextmanager
def _keeping_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            if device.type in ("cuda", "xpu"):
                stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        yield


def random_state() -> dict[str, Any]:
    """The states of the global generators as a checkpoint holds them: torch's, of CUDA too, Python's and NumPy's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - what datasets draw from
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": cuda,
        "python_rng": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy_rng": {
            "name": str(name),
            "keys": torch.tensor(np.asarray(keys).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take up :func:`random_state`.

    Warns:
        UserWarning: it is of another number of CUDA devices, of which the first are taken up.
    """
    torch.set_rng_state(state["rng"])
    if python := state.get("python_rng"):
        random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    if numpy := state.get("numpy_rng"):
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state((numpy["name"], keys, *numpy["rest"]))  # noqa: NPY002
    saved = state.get("cuda_rng")
    if not saved or not torch.cuda.is_available():
        return
    if (here := torch.cuda.device_count()) != len(saved):
        warnings.warn(
            f"the random state is of {len(saved)} CUDA devices, and there are {here}: that of the first "
            f"{min(here, len(saved))} is taken up",
            stacklevel=2,
        )
    torch.cuda.set_rng_state_all(saved[:here])


def _restore(module: nn.Module, modes: dict[nn.Module, bool], inherited: bool) -> None:
    module.training = modes.get(module, inherited)
    for child in module.children():
        _restore(child, modes, module.training)


def to_training_mode(network: nn.Module, frozen: Sequence[nn.Module] = ()) -> list[nn.Module]:
    """Put a network in training mode; the modules that are frozen in eval mode.

    Where it is in training mode already, those are the ones in eval mode, which stay so; otherwise those named. A new
    container around a network in eval mode, in which nothing that learns is in training mode, does not count.
    """
    learning = (m.training for m in network.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    if not network.training or not any(learning):
        network.train()
        for module in frozen:
            module.training = False
    return [module for module in network.modules() if not module.training]


def _tensors(modules: Callable[[], Iterable[nn.Module]]) -> Iterator[Tensor]:
    """The parameters and then the buffers of modules, one after the other as they are asked for."""
    for module in modules():
        yield from (p for p in module.parameters(recurse=False) if not nn.parameter.is_lazy(p))
    for module in modules():
        yield from (b for b in module.buffers(recurse=False) if not nn.parameter.is_lazy(b))


def device_of(network: nn.Module, default: torch.device | str = "cpu") -> torch.device:
    """The device of the first parameter, or buffer; ``default`` if the network holds none yet."""
    return next((tensor.device for tensor in _tensors(network.modules)), torch.device(default))


def dtype_of(network: nn.Module, default: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the first floating or complex parameter, or buffer; ``default``, or torch's own, without one.

    Coefficients of a :class:`~solvers.LearnedTableau`, which goes with every dtype, do not count.
    """
    tensors = _tensors(lambda: (m for m in network.modules() if not isinstance(m, LearnedTableau)))
    dtypes = (t.dtype for t in tensors if t.is_floating_point() or t.is_complex())
    return next(dtypes, default or torch.get_default_dtype())


def inputs_for(network: nn.Module, inputs: Any) -> Any:
    """Inputs on the device of a network and, where they are floating, in its precision.

    >>> inputs = {"x": torch.ones(1, 2), "mask": torch.ones(1, 2, dtype=torch.long)}
    >>> moved = inputs_for(nn.Linear(2, 2).double(), inputs)
    >>> moved["x"].dtype, moved["mask"].dtype
    (torch.float64, torch.int64)

    Args:
        network: whose they are; one without tensors leaves them as they are.
        inputs: a tensor, a tuple or a mapping; what is no tensor in it stays as it is.
    """

    def of_network(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        dtype = dtype_of(network, x.dtype).to_real() if x.is_floating_point() else x.dtype
        return x.to(device_of(network, x.device), dtype)

    return of_network(inputs) if isinstance(inputs, Tensor) else tree_map(of_network, plain(inputs))


def total_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for sums over a data set: float64, or float32 on a device that has none."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64
