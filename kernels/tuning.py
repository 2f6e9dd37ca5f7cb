"""Configurations of kernels: as measured on the GPU at hand where that was done, otherwise by a rule of the kernel's.

What was measured is data, tunings/*.json, a file a device, written by `cableway tune`:

    {"device": "NVIDIA H200", "capability": 90, "kernels": {"gemv": [{"key": {…}, "tuning": {…}, "us": 3.1}, …], …}}

A GPU without a file takes that of another one of its generation. A kernel names what its choice depends on (a key) and
what there is to choose (a tuning), two NamedTuples of numbers; whoever tunes finds kernels here, and keys by what
launchers have asked for.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cableway.kernels.lang import gpu_capability
from cableway.kernels.registry import Call

FOLDER = Path(__file__).parent / "tunings"

OF_BYTES = {2: torch.bfloat16, 4: torch.float32}
"""Dtypes that stand for all of their size."""

_tunables: dict[str, Tunable] = {}


class Tunable:
    """What a launcher asks for its configuration: `tunable(key)`.

    Args:
        kernel: its name.
        key, tuning: classes of what the choice depends on, and of what is chosen.
        rule: the tuning for a key that was not measured.
        candidates: tunings worth measuring for a key.
        make: arguments (key, device) -> a call that has this key.
        launch: takes a call's arguments, and `tuned`.
    """

    def __init__(
        self, kernel: str, key: type, tuning: type, *, rule: Callable[[Any], Any],
        candidates: Callable[[Any], Iterable[Any]], make: Callable[[Any, str], Call], launch: Callable,
    ):  # fmt: skip
        self.kernel, self.key, self.tuning = kernel, key, tuning
        self.rule, self._candidates, self.make, self.launch = rule, candidates, make, launch
        self._chosen: dict[tuple[int, Any], Any] = {}
        _tunables[kernel] = self

    def __call__(self, key: Any) -> Any:
        """The tuning for a key on the GPU at hand."""
        place = gpu_capability(), key
        if place not in self._chosen:
            table = at_hand(device_name(), place[0])
            measured = {entry.key: entry.tuning for entry in table.entries(self)} if table else {}
            self._chosen[place] = measured.get(key) or self.rule(key)
        return self._chosen[place]

    @property
    def asked(self) -> list[Any]:
        """Keys that launchers have asked for."""
        return list(dict.fromkeys(key for _, key in self._chosen))

    def candidates(self, key: Any) -> list[Any]:
        """Tunings worth measuring, that of the rule first."""
        return list(dict.fromkeys((self.rule(key), *self._candidates(key))))


def tunables() -> dict[str, Tunable]:
    """Every tunable kernel of this folder."""
    package = importlib.import_module("cableway.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"cableway.kernels.{module.name}")
    return dict(sorted(_tunables.items()))


class Entry(NamedTuple):
    """What one measurement found."""

    key: Any
    tuning: Any
    us: float | None  # None: measured in another way


class Table:
    """The file of one device."""

    def __init__(self, path: Path, device: str, capability: int, kernels: dict[str, list[dict[str, Any]]]) -> None:
        self.path, self.device, self.capability = path, device, capability
        self._kernels = kernels

    @classmethod
    def of(cls, device: str, capability: int) -> Table:
        """What is known of a device, which may be nothing."""
        path = FOLDER / f"{device.lower().replace(' ', '-')}.json"
        return cls.read(path) if path.exists() else cls(path, device, capability, {})

    @classmethod
    def read(cls, path: Path) -> Table:
        return cls(path, **json.loads(path.read_text()))

    def entries(self, tunable: Tunable) -> Iterator[Entry]:
        for row in self._kernels.get(tunable.kernel, ()):
            yield Entry(tunable.key(**row["key"]), tunable.tuning(**row["tuning"]), row["us"])

    def put(self, tunable: Tunable, found: Entry) -> None:
        """Add a measurement, in place of what was known of its key, and write the file, whole or not at all."""
        rows = {entry.key: entry for entry in self.entries(tunable)} | {found.key: found}
        self._kernels[tunable.kernel] = [
            {"key": key._asdict(), "tuning": entry.tuning._asdict(), "us": entry.us and round(entry.us, 2)}
            for key, entry in sorted(rows.items())
        ]
        lines = {
            kernel: "[\n      " + ",\n      ".join(json.dumps(row) for row in rows) + "\n    ]"
            for kernel, rows in sorted(self._kernels.items())
        }
        head = f'{{\n  "device": {json.dumps(self.device)},\n  "capability": {self.capability},\n  "kernels": {{\n    '
        body = ",\n    ".join(f"{json.dumps(kernel)}: {rows}" for kernel, rows in lines.items())
        draft = self.path.with_suffix(".draft")
        draft.parent.mkdir(exist_ok=True)
        draft.write_text(head + body + "\n  }\n}\n")
        draft.replace(self.path)


def device_name() -> str:
    """Of the GPU at hand; nothing where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@cache
def at_hand(device: str, capability: int) -> Table | None:
    """The table of that device, or else of one of its generation."""
    tables = [table for table in map(Table.read, sorted(FOLDER.glob("*.json"))) if table.capability == capability]
    return min(tables, key=lambda table: table.device != device, default=None)
