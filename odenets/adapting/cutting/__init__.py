"""Adapted networks as consecutive parts: cut by torch.fx where that can trace them, else in the graph of an export."""
