"""A child process that does nothing but be supervised: `python fake_child.py BEHAVIOUR [standard arguments]`."""

import os
import sys
import threading
import time

from cableway.ipc.lifeline import Lifeline, Patience, child_arguments


def main(behaviour: str, argv: list[str]) -> None:
    arguments = child_arguments(argv)
    if behaviour == "dies":
        print("some noise\nthe last words", file=sys.stderr)
        raise SystemExit(1)
    if behaviour == "exits-3":
        print("model.gguf: not a GGUF file", file=sys.stderr)
        raise SystemExit(3)
    lifeline = Lifeline(arguments.lifeline_fd, Patience(heartbeat_timeout_s=0.5, step_timeout_s=2.0))
    if behaviour == "gives-up":
        lifeline.give_up("model.gguf: not a GGUF file")
    stopping = threading.Event()
    lifeline.on_drain(lambda deadline_s: None if behaviour == "never-drains" else stopping.set())
    lifeline.on_retire(lambda deadline_s: stopping.set())
    if arguments.standby == "loaded" and behaviour == "has-no-heir":
        raise SystemExit("no room for two")
    if arguments.standby == "loaded" and behaviour == "slow-heir":
        time.sleep(3600)
    if arguments.standby:
        lifeline.stand_by()
    lifeline.ready({"pid": os.getpid()})
    print("at work", flush=True)
    lifeline.beat(share=0.01 if behaviour == "hangs-in-a-small-step" else 1.0)
    if behaviour == "dies-when-ready":
        time.sleep(0.05)
        os.abort()
    if behaviour.startswith("hangs"):
        time.sleep(3600)
    lifeline.idle()
    while behaviour != "idles" and not stopping.wait(0.5):
        lifeline.beat()
    stopping.wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
