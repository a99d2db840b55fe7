"""Solvers beside their floor, the bare calls of a field: what ``odenets bench`` and ``benchmarks/`` time."""
