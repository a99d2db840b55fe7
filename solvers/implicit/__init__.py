"""Steps whose stages are roots of equations: Newton's iteration, its linear systems, and gradients through the root."""
