"""Modules trained at the same time in processes of their own, with buffers of activations between them."""
