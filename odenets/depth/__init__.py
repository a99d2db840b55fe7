"""Adaptive depth: the embedded errors of Runge-Kutta blocks add and remove blocks [K24, section 6.2]."""

from odenets.depth.callback import AdaptiveDepth
from odenets.depth.edits import DepthReport, Edit, adapt_depth, refine
from odenets.depth.rule import DepthRule, block_errors, plan

__all__ = ["AdaptiveDepth", "DepthReport", "DepthRule", "Edit", "adapt_depth", "block_errors", "plan", "refine"]
