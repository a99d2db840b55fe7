"""Fewer blocks in a trained network."""
