"""An adaptive solve as one graph: its loop is an operator of torch, which a compiler holds whole."""
