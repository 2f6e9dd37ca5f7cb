"""One file a kernel: contract, reference, Triton, launcher, cases."""
