"""Load a model: checkpoint tensors -> name map -> each rank's share -> format -> slot. Strict, and slot by slot.

Names and shapes are settled before a weight is read: every tensor of the checkpoint fills a slot or is known not to be
needed, and every slot is filled. Then slots are loaded from mapped files, a few at a time, so that memory holds the
model and a few slots' worth of work.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from cableway.ipc.modelfiles import ModelError, ModelFiles
from cableway.workers import models
from cableway.workers.blocks.block import Slot
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.checkpoint import open_files
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import PLAIN, Stored
from cableway.workers.models.names import Names, Target
from cableway.workers.parallel import Mesh

_NUM_NAMES_SHOWN = 8
_MAX_LOADERS = 8

Filling = dict[str, dict[str, dict[str, Stored]]]
"""slot path -> part -> leaf -> tensor"""


def load(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_model_len: int,
    invariant: bool = False,
    mesh: Mesh | None = None,
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """The model of `files`, ready to run.

    Args:
        max_model_len: positions that a sequence may have.
        invariant: a row's results never depend, to the bit, on what else is in the batch.
        load_format: `dummy` draws random weights from `seed` and reads nothing but the config.

    Raises:
        ModelError: config or weights are broken, not complete, or not supported.
    """
    place = Place(dtype, torch.device(device), max_model_len, invariant, mesh or Mesh())
    decoder, filling = _find(files, place, load_format, seed)
    return _fill(decoder, dict(decoder.slots()), filling, place)


def outline(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    max_model_len: int,
    invariant: bool = False,
    mesh: Mesh | None = None,
    load_format: str = "auto",
) -> Decoder:
    """The model of `files` without its weights, on the meta device, abridged: it can be run, and computes nothing."""
    place = Place(dtype, torch.device("meta"), max_model_len, invariant, mesh or Mesh())
    decoder, filling = _find(files, place, load_format, 0)
    slots = dict(decoder.slots())
    decoder.abridge()
    left = {id(slot) for _, slot in decoder.slots()}
    slots = {path: slot for path, slot in slots.items() if id(slot) in left}
    outlines = {
        path: {
            part: {leaf: _outline(stored, place) for leaf, stored in leaves.items()}
            for part, leaves in filling[path].items()
        }
        for path in slots
    }
    return _fill(decoder, slots, outlines, place)


def _find(files: ModelFiles, place: Place, load_format: str, seed: int) -> tuple[Decoder, Filling]:
    """The model, and what fills its slots."""
    architecture = models.find(files.config)
    decoder = architecture.build(files.config)
    slots = dict(decoder.slots())
    if load_format == "dummy":
        return decoder, _random(slots, decoder.tied, place, seed)
    if files.kind not in architecture.schemes:
        raise ModelError(f"{files.path}: {architecture.name} is not known in {files.kind} files")
    names = architecture.names(files.kind, files.config)
    return decoder, _match(slots, decoder.tied, open_files(files), names, files.path)


def _fill(decoder: Decoder, slots: Mapping[str, Slot], filling: Filling, place: Place) -> Decoder:
    with torch.inference_mode():
        if place.device.type == "meta":  # nothing is read, and torch's threads are left alone
            for path, slot in slots.items():
                slot.load(filling[path], place)
        else:
            _load_slots(slots, filling, place)
        decoder.prepare(place)
    return decoder


def _load_slots(slots: Mapping[str, Slot], filling: Filling, place: Place) -> None:
    """Load slots side by side: the work on one is many small steps, which gain nothing from torch's own threads."""

    def load_one(path: str) -> None:
        with torch.inference_mode():
            slots[path].load(filling[path], place)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(num_threads, _MAX_LOADERS)) as pool:
            try:
                for loaded in [pool.submit(load_one, path) for path in slots]:
                    loaded.result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(num_threads)


def _match(
    slots: Mapping[str, Slot], tied: Mapping[str, str], tensors: Mapping[str, Stored], names: Names, source: str
) -> Filling:
    """Find each tensor's slot; ModelError that names both sides where they do not meet."""
    filling: Filling = {path: {part: {} for part in slot.parts} for path, slot in slots.items()}
    owners = {f"{path}.{part}": (path, [part]) for path, slot in slots.items() for part in slot.parts}
    owners |= {path: (path, list(slot.parts)) for path, slot in slots.items()}
    unknown = []
    for name, stored in tensors.items():
        target = names.find(name)
        if names.ignores(name) or (target and target.path in tied and target.leaf == "weight"):
            continue
        path, parts = owners.get(target.path, ("", [])) if target else ("", [])
        if not parts or target.leaf not in slots[path].leaves:
            unknown.append(name)
            continue
        if target.parts:
            parts = [part for part in parts if part.rpartition(".")[2] in target.parts]
        for part, tensor in _unfuse(stored, slots[path], parts, target, source).items():
            if target.leaf in filling[path][part]:
                raise ModelError(f"{source}: tensor {name!r} fills {path!r} a second time")
            filling[path][part][target.leaf] = tensor
    for path, other in tied.items():
        filling[path] = {part: leaves | filling[path].get(part, {}) for part, leaves in filling[other].items()}
    missing = [name for path, slot in slots.items() for name in _missing(path, slot, filling[path])]
    if unknown or missing:
        raise ModelError(
            f"{source}: weights and model do not fit: tensors without a slot: {_listed(unknown)}; "
            f"slots without a tensor: {_listed(missing)}"
        )
    return filling


def _unfuse(stored: Stored, slot: Slot, parts: list[str], target: Target, source: str) -> dict[str, Stored]:
    """One tensor as the parts that it holds; ModelError when its shape is not theirs."""
    axes, dims = {part: slot.parts[part] for part in parts}, slot.leaves[target.leaf]
    try:
        cut = target.layout(stored, axes)
        if any(tensor.shape != (axes[part].size, *dims) for part, tensor in cut.items()):
            raise ValueError
    except (ValueError, IndexError):
        shape = (sum(axis.size for axis in axes.values()), *dims)
        raise ModelError(
            f"{source}: tensor {stored.name!r} has shape {stored.shape}, slot {target.path!r} takes {shape}"
        ) from None
    if target.row_order is None:
        return cut
    return {part: replace(tensor, row_order=target.row_order(part, axes[part])) for part, tensor in cut.items()}


def _missing(path: str, slot: Slot, parts: Mapping[str, Mapping[str, Stored]]) -> list[str]:
    """What a slot still needs. A leaf that may be absent is so in all parts alike."""
    present = {leaf for leaves in parts.values() for leaf in leaves}
    needed = [leaf for leaf in slot.leaves if leaf in present or leaf not in slot.optional]
    return [f"{path}.{part}.{leaf}".replace("..", ".") for part in parts for leaf in needed if leaf not in parts[part]]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_NAMES_SHOWN} more" if len(names) > _NUM_NAMES_SHOWN else ""
    return (", ".join(names[:_NUM_NAMES_SHOWN]) or "none") + more


def _random(slots: Mapping[str, Slot], tied: Mapping[str, str], place: Place, seed: int) -> Filling:
    """Dummy weights: matrices N(0, 1 / in), norms 1, and nothing that is optional; the same whatever the mesh."""
    filling: Filling = {}
    for number, (path, slot) in enumerate(slots.items()):
        filling[path] = {
            part: {
                leaf: _random_tensor(f"{path}.{part}.{leaf}", (axis.size, *dims), place, (seed, number, index))
                for leaf, dims in slot.leaves.items()
                if leaf not in slot.optional
            }
            for index, (part, axis) in enumerate(slot.parts.items())
        }
    for path, other in tied.items():
        filling[path] = filling[other]
    return filling


def _random_tensor(name: str, shape: tuple[int, ...], place: Place, key: tuple[int, ...]) -> Stored:
    def read() -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=place.dtype, device=place.device)
        generator = torch.Generator(place.device).manual_seed(hash(key))
        values = torch.randn(shape, dtype=place.dtype, device=place.device, generator=generator)
        return values.mul_(shape[-1] ** -0.5)

    return Stored(name, shape, PLAIN, read)


def _outline(stored: Stored, place: Place) -> Stored:
    shape = stored.shape
    return Stored(stored.name, shape, PLAIN, lambda: torch.empty(shape, dtype=place.dtype, device=place.device))
