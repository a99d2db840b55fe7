"""What a model computes: its program as a graph, and the residual additions in it; it knows no blocks."""
