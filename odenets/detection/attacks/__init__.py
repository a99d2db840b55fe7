"""Attacks on a network, and on a network with its detector: what a detector is measured against."""
