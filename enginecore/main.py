"""The engine-core process: `python -m cableway.enginecore.main --config RUNTIME_DIR/config.json`."""

import sys
from collections.abc import Sequence

import zmq

from cableway.enginecore.loop import EngineCore
from cableway.ipc import config, garbage, log
from cableway.ipc.lifeline import Lifeline, child_arguments


def main(argv: Sequence[str]) -> None:
    """Serve until told to drain. A fault of the core's own ends the process with a traceback."""
    arguments = child_arguments(argv)
    settings = config.read(arguments.config_path).core
    lifeline = Lifeline(arguments.lifeline_fd, settings.patience)
    logger = log.setup("enginecore", arguments.rank, level=settings.log.level, as_json=settings.log.as_json)
    if arguments.standby:
        lifeline.stand_by()
    core = EngineCore(settings, lifeline, logger)
    garbage.settle()
    lifeline.on_drain(core.drain)
    lifeline.on_abort(lambda: core.drain(0.0))
    lifeline.ready({"epoch": core.epoch})
    core.run()
    zmq.Context.instance().term()  # waits, for a moment, until the last words have left


if __name__ == "__main__":
    main(sys.argv[1:])
