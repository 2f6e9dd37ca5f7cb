"""Processes that compute one model together, over gloo: `python ranks.py RANK SIZE MEETING_PLACE` is one of them."""

import subprocess
import sys
import traceback
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


class Job(msgspec.Struct):
    """A model's folder, a prompt, and how `harness.load` is to load it."""

    folder: str
    token_ids: list[int]
    options: dict[str, Any]


class Ranks:
    """`size` processes that wait for jobs; each does its share of every one."""

    def __init__(self, size: int, folder: Path) -> None:
        self._results = [folder / f"logits-{rank}.pt" for rank in range(size)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", __file__, str(rank), str(size), str(folder / "meeting")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(size)
        ]

    def logits(self, folder: Path, token_ids: Tensor, **options: Any) -> list[Tensor]:
        """What each rank got for a prompt, [T, vocab]; RuntimeError with what one of them says."""
        job = msgspec.json.encode(Job(str(folder), token_ids.tolist(), options))
        for process, result in zip(self._processes, self._results, strict=True):
            process.stdin.write(job + b"\t" + str(result).encode() + b"\n")
            process.stdin.flush()
        said = [process.stdout.readline().decode().strip() for process in self._processes]
        for answer in said:
            if answer != "done":
                raise RuntimeError(answer or "a rank has ended")
        return [torch.load(result, weights_only=True) for result in self._results]

    def stop(self) -> None:
        for process in self._processes:
            process.communicate(timeout=30)


def main(rank: int, size: int, meeting_place: str) -> None:
    """Do jobs until there are no more."""
    tests = types.ModuleType("tests")  # the root must not be on the path: DESIGN §3
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    from cableway.ipc.modelfiles import ModelError
    from cableway.workers.parallel import Mesh
    from tests.models.harness import load, logits_of

    torch.set_num_threads(1)
    place, patience = f"file://{meeting_place}", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", place, rank=rank, world_size=size, timeout=patience)
    mesh = Mesh(rank, size, torch.distributed.group.WORLD)
    for line in sys.stdin.buffer:
        text, _, result = line.rstrip(b"\n").partition(b"\t")
        job = msgspec.json.decode(text, type=Job)
        try:
            logits = logits_of(load(job.folder, mesh=mesh, **job.options), torch.tensor(job.token_ids))
            torch.save(logits, result.decode())
            answer = "done"
        except ModelError as error:
            answer = str(error)
        except Exception:
            answer = " | ".join(traceback.format_exc().splitlines())
        print(answer, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
