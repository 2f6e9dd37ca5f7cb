"""Worker processes: one a GPU (or one on the CPU), the only ones that import torch."""
