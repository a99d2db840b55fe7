"""Bounded buffers between modules that train in different processes, and the threads that fill and empty them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from odenets.errors import WorkerLostError

__all__ = ["Buffer", "Message", "Receiver", "Sender"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LARGEST = 8  # dimensions of a state


class Message(NamedTuple):
    """A batch on its way: state, images (none where nobody needs them) and labels; ``whole`` samples in all replicas'
    shares together.
    """

    state: Tensor
    images: Tensor
    y: Tensor
    whole: int


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
        header = self._tensor((LARGEST + 5,), torch.int64).tolist()
        whole, samples, code, image_code, image_dims, *dims = header
        if whole < 0:
            return None
        shape = tuple(n for n in dims if n >= 0)
        state = self._tensor((samples, *shape), DTYPES[code])
        y = self._tensor((samples,), torch.int64)
        images = torch.empty(0)
        if image_dims:
            sizes = self._tensor((image_dims,), torch.int64).tolist()
            images = self._tensor((samples, *sizes), DTYPES[image_code])
        return Message(state, images, y, whole)

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
            self._tensor(torch.full((LARGEST + 5,), -1))
            return
        state, images, y, whole = message
        dims = [*state.shape[1:], *[-1] * (LARGEST - state.ndim + 1)]
        image_dims = images.ndim - 1 if images.numel() else 0
        codes = DTYPES.index(state.dtype), DTYPES.index(images.dtype)
        self._tensor(torch.tensor([whole, len(y), *codes, image_dims, *dims]))
        self._tensor(state)
        self._tensor(y)
        if image_dims:
            self._tensor(torch.tensor(images.shape[1:]))
            self._tensor(images)

    def _tensor(self, tensor: Tensor) -> None:
        distributed.send(tensor.to(self.device).contiguous(), self.peer, group=self.group)
