"""Benchmarks: offline, serving, kernels."""
