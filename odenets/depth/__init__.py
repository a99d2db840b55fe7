"""Adaptive depth: the embedded errors of Runge-Kutta blocks add and remove blocks (section 6.2)."""

from odenets.depth.rule import Adapted, AdaptiveDepth, DepthRule, Edit, adapt_depth, block_errors, plan, refine

__all__ = ["Adapted", "AdaptiveDepth", "DepthRule", "Edit", "adapt_depth", "block_errors", "plan", "refine"]
