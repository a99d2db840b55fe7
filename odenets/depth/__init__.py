"""Adaptive depth: the embedded errors of Runge-Kutta blocks add and remove blocks (section 6.2)."""

from odenets.depth.rule import AdaptiveDepth, DepthReport, DepthRule, Edit, adapt_depth, block_errors, plan, refine

__all__ = ["AdaptiveDepth", "DepthReport", "DepthRule", "Edit", "adapt_depth", "block_errors", "plan", "refine"]
