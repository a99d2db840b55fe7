"""The methods by name: published Runge-Kutta methods as tableaus."""

from solvers.methods.names import get_tableau, method_names

__all__ = ["get_tableau", "method_names"]
