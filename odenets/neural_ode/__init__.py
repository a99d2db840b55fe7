"""Neural ODEs: one velocity field, integrated by the solvers of :mod:`solvers`."""

from odenets.neural_ode.module import NeuralODE

__all__ = ["NeuralODE"]
