"""Worker processes: one a GPU (or one on the CPU), the only ones that import torch."""

import os

# A thread of OpenMP that waits for the others turns on its core before it sleeps, for seconds by default: with one more
# busy process on the machine every product then takes a scheduler's turn.
# PERF: SmolLM2-135M, 2 cores, a token of one sequence: 13 ms; beside a busy process 1,830 ms, and 50 ms with this.
# OpenMP reads it when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
