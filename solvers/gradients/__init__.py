"""Gradients of a solve that keeps no steps: they are recomputed from checkpoints, or an adjoint is solved backward."""
