"""structlog set-up: one event a line, with role, rank and pid on each; JSON for machines, columns for a terminal."""

import logging
import sys
from typing import Any

import structlog


def setup(role: str, rank: int = 0, *, level: str = "info", as_json: bool | None = None) -> Any:
    """Configure logging of this process to stderr and return its logger. `as_json` None: JSON unless on a terminal."""
    structlog.configure(**_settings(level, as_json), logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    return structlog.get_logger(role=role, rank=rank)


def private(role: str, rank: int = 0, *, level: str = "info", as_json: bool | None = None) -> Any:
    """A logger like `setup`'s for a part that runs in a program of somebody else, whose own logging stays as it is."""
    return structlog.wrap_logger(structlog.PrintLogger(sys.stderr), **_settings(level, as_json), role=role, rank=rank)


def _settings(level: str, as_json: bool | None) -> dict[str, Any]:
    if as_json is None:
        as_json = not sys.stderr.isatty()
    renderer: Any = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    return {
        "processors": [
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        "wrapper_class": structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        "cache_logger_on_first_use": True,
    }
