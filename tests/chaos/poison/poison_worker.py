"""A worker process that dies, as of a fault on its device, when it computes what `poison_pill` says."""

import os
import signal
import sys
from typing import Any

import numpy as np
from poison_pill import is_deadly

from cableway.workers import main, runner
from cableway.workers.rows import Chunks


class Runner(runner.Runner):
    def _run(self, chunks: Chunks, drawing: np.ndarray) -> Any:
        for row, begin, end in zip(chunks.rows, chunks.starts, chunks.ends, strict=True):
            if is_deadly(self._rows.tokens[row].tolist(), begin, end):
                os.kill(os.getpid(), signal.SIGKILL)
        return super()._run(chunks, drawing)


if __name__ == "__main__":
    runner.Runner = Runner  # type: ignore[misc]
    sys.exit(main.main(sys.argv[1:]))
