"""Benchmarks: offline, serving, kernels, steps."""

from cableway import workers as workers  # says how OpenMP waits, which must be before torch is imported
