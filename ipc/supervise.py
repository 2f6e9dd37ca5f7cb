"""Supervision: starting, watching, restarting and stopping the processes."""

from cableway.ipc.lifeline import ChildArguments, Lifeline, child_arguments

__all__ = ["ChildArguments", "Lifeline", "child_arguments"]
