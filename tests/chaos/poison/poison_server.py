"""`cableway serve` whose worker or core dies of certain requests; run by tests alone, as a script.

First argument: which role dies (`worker` or `enginecore`); the others are those of `cableway`.
"""

import os
import sys

from cableway.frontend import cli
from cableway.ipc import server

if __name__ == "__main__":
    role = sys.argv.pop(1)
    server.MODULES[role] = f"poison_{role}"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    cli.main()
