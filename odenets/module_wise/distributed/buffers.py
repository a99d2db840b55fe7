"""Bounded buffers between modules that train in different processes, and the threads that fill and empty them."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from odenets.errors import WorkerLostError

__all__ = ["Buffer", "Message", "Receiver", "Sender", "check_sendable"]

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
LARGEST = 8  # dimensions of a tensor
MOST = 8  # tensors in a message
HEADER = 2 + MOST * (LARGEST + 1)  # samples and tensors, and for each its dtype and its shape, filled with -1


class Message(NamedTuple):
    """A batch on its way: state, images (none where nobody needs them), targets, and what conditions the fields;
    ``whole`` samples in all replicas' shares together.
    """

    state: Tensor
    images: Tensor
    y: Tensor
    whole: int
    args: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it but the number."""
        return self.state, self.images, self.y, *self.args

    def to(self, device: torch.device) -> Message:
        """The same on a device."""
        state, images, y, *args = (tensor.to(device) for tensor in self.tensors)
        return Message(state, images, y, self.whole, tuple(args))


def check_sendable(tensors: Sequence[Any]) -> None:
    """That inputs and targets can be sent.

    Raises:
        TypeError: they are no tensors, of types that are known, of at most 8 dimensions, at most 7 together.
    """
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.ndim > LARGEST:
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"batches must hold one tensor of targets, and tensors beside the inputs, to be sent, got {got}: "
                "fit_modules takes any in one process"
            )
    if len(tensors) >= MOST:
        raise TypeError(f"batches must hold fewer than {MOST} tensors to be sent, got {len(tensors)}")


class Buffer:
    """The newest batches that came, at most ``size`` of them.

    With one place, each batch is taken once and in order, and who puts waits until the place is free. With more, nobody
    waits but for the first: who puts drops the oldest, and who takes gets the newest that was taken least.

    Args:
        size: places.
        timeout: seconds to wait at most.
        who: the process at the other end, for errors.
    """

    def __init__(self, size: int, timeout: float, who: str) -> None:
        self.size, self.timeout, self.who = size, timeout, who
        self.entries: deque[list[Any]] = deque()  # how often it was taken, and the batch
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.ended = False

    def put(self, message: Message) -> None:
        """Add a batch."""
        with self.changed:
            if self.size == 1:
                self._wait(lambda: not self.entries or self.ended)
            if self.ended:
                return
            self.entries.append([0, message])
            if len(self.entries) > self.size:
                self.entries.popleft()
            self.changed.notify_all()

    def take(self) -> Message:
        """A batch to train on.

        Raises:
            WorkerLostError: the other process is gone, or nothing came in time.
        """
        with self.changed:
            self._wait(lambda: bool(self.entries))
            if self.error is not None and self.size > 1:  # what it has would be trained on for ever
                raise WorkerLostError(f"{self.who} is gone ({self.error})") from self.error
            if self.size == 1:
                message = self.entries.popleft()[1]
                self.changed.notify_all()
                return message
            entry = min(reversed(self.entries), key=lambda entry: entry[0])
            entry[0] += 1
            return entry[1]

    def end(self) -> None:
        """Nobody will take any more."""
        with self.changed:
            self.ended = True
            self.entries.clear()
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The other process is gone."""
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        came = self.changed.wait_for(lambda: ready() or self.error is not None, self.timeout)
        if not ready() and self.error is not None:
            raise WorkerLostError(f"{self.who} is gone ({self.error})") from self.error
        if not came:
            raise WorkerLostError(f"{self.who} sent nothing for {self.timeout:g} s")


@dataclass
class _Edge:
    """A pair of neighbors.

    Attributes:
        peer: rank of the other.
        group: of the two.
        device: where states are.
    """

    peer: int
    group: Any
    device: torch.device


class Receiver(_Edge):
    """Fills a buffer with what the process before sends, in a thread of its own."""

    def start(self, buffer: Buffer) -> None:
        """Begin."""
        self.buffer = buffer
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while (message := self.receive()) is not None:
                self.buffer.put(message)
        except BaseException as error:  # whatever ends the thread must end the training
            self.buffer.fail(error)

    def receive(self) -> Message | None:
        """The next batch, None at the end."""
        whole, number, *numbers = self._tensor((HEADER,), torch.int64).tolist()
        if whole < 0:
            return None
        tensors = []
        for i in range(number):
            code, *dims = numbers[i * (LARGEST + 1) : (i + 1) * (LARGEST + 1)]
            shape = tuple(n for n in dims if n >= 0)
            empty = not math.prod(shape)
            tensors.append(torch.empty(shape, dtype=DTYPES[code]) if empty else self._tensor(shape, DTYPES[code]))
        state, images, y, *args = tensors
        return Message(state, images, y, whole, tuple(args))

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        distributed.recv(tensor, self.peer, group=self.group)
        return tensor


class Sender(_Edge):
    """Sends what is put into a buffer to the process behind, in a thread of its own."""

    def start(self, lockstep: bool, timeout: float, who: str) -> None:
        """Begin; in lockstep every batch is sent, otherwise the newest."""
        self.lockstep, self.who, self.timeout = lockstep, who, timeout
        self.waiting: deque[Message | None] = deque()
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def send(self, message: Message | None) -> None:
        """Let a batch be sent, None at the end.

        Raises:
            WorkerLostError: the other process is gone, or took nothing in time.
        """
        with self.changed:
            if self.lockstep or message is None:
                free = self.changed.wait_for(lambda: not self.waiting or self.error is not None, self.timeout)
                if not free:
                    raise WorkerLostError(f"{self.who} took nothing for {self.timeout:g} s")
            if self.error is not None:
                raise WorkerLostError(f"{self.who} is gone ({self.error})") from self.error
            self.waiting.clear()
            self.waiting.append(message)
            self.changed.notify_all()

    def finish(self) -> None:
        """Say that nothing more comes, and wait until it is sent."""
        self.send(None)
        self.thread.join(self.timeout)

    def _run(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: bool(self.waiting))
                    message = self.waiting.popleft()
                    self.changed.notify_all()
                self.transmit(message)
                if message is None:
                    return
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def transmit(self, message: Message | None) -> None:
        """Send a batch, or that it was the last."""
        if message is None:
            self._tensor(torch.full((HEADER,), -1))
            return
        header = torch.full((HEADER,), -1)
        header[:2] = torch.tensor([message.whole, len(message.tensors)])
        for kind, tensor in zip(header[2:].view(MOST, LARGEST + 1), message.tensors, strict=False):
            kind[: tensor.ndim + 1] = torch.tensor([DTYPES.index(tensor.dtype), *tensor.shape])
        self._tensor(header)
        for tensor in message.tensors:
            if tensor.numel():
                self._tensor(tensor)

    def _tensor(self, tensor: Tensor) -> None:
        distributed.send(tensor.to(self.device).contiguous(), self.peer, group=self.group)
