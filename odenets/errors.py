"""Exceptions of trainings; those of solves are in :mod:`solvers`."""

__all__ = ["DivergedError", "WorkerLostError"]


class DivergedError(RuntimeError):
    """An epoch left a loss that is not finite or too large, or weights that are not finite, and no callback helped.

    The last checkpoint stands: what such an epoch left is not saved.
    """


class WorkerLostError(RuntimeError):
    """Another process of the group is gone; the checkpoints of the modules stand."""
