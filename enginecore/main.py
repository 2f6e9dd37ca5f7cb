"""The engine-core process: `python -m cableway.enginecore.main --config RUNTIME_DIR/config.json --rank 0`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from cableway.enginecore.loop import EngineCore
from cableway.ipc import log, supervise
from cableway.ipc.config import Config


def main(argv: Sequence[str]) -> None:
    """Serve until told to drain; a fault of the core's own ends the process with a traceback."""
    arguments = supervise.child_arguments(argv)
    settings = msgspec.json.decode(Path(arguments.config_path).read_bytes(), type=Config).core
    lifeline = supervise.Lifeline(arguments.lifeline_fd, settings.drain_timeout_s)
    logger = log.setup("enginecore", arguments.rank, level=settings.log.level, as_json=settings.log.as_json)
    core = EngineCore(settings, lifeline, logger)
    lifeline.on_drain(core.drain)
    lifeline.on_abort(lambda: core.drain(0.0))
    lifeline.ready({"epoch": core.epoch})
    core.run()
    zmq.Context.instance().term()  # waits for the last words to leave


if __name__ == "__main__":
    main(sys.argv[1:])
