"""What kernels, solves and trainings cost on a GPU: ``python -m benchmarks.gpu``."""
