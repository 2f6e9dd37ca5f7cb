"""A softmax that several programs have computed, each over a stretch of a sequence's keys: parts, and what they make.

A part is the top score and mass of each of some heads, and its weighted sums, in float32 in the GPU's memory.
"""

from __future__ import annotations

from cableway.kernels.lang import jit, tl


@jit
def leave_part(
    out_ptr, tops_ptr, masses_ptr, sums_ptr, arrival_ptr, item, first_item, num_parts, first_head, top, mass, sums,
    value_scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Store part `item` of GROUP heads; whoever finds that the others, from first_item on, are there writes `out`.

    arrival: how many are there, 0 before the first and after the last.
    """
    head, dim = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)
    part = item.to(tl.int64) * NUM_HEADS + first_head
    tl.store(tops_ptr + part + head, top, mask=head < GROUP)
    tl.store(masses_ptr + part + head, mass, mask=head < GROUP)
    inside = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(sums_ptr + part * HEAD_DIM + head[:, None] * HEAD_DIM + dim[None, :], sums, mask=inside)
    tl.debug_barrier()  # every thread has stored before one of them tells
    if tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        tl.store(arrival_ptr, 0)  # for the next layer
        part = first_item.to(tl.int64) * NUM_HEADS + first_head
        _put_together(
            out_ptr, tops_ptr + part, masses_ptr + part, sums_ptr + part * HEAD_DIM, num_parts,
            NUM_HEADS, value_scale, GROUP, HEAD_DIM, BLOCK_PARTS, BLOCK_GROUP, BLOCK_DIM,
        )  # fmt: skip


@jit
def _put_together(
    out_ptr, tops_ptr, masses_ptr, sums_ptr, num_parts, part_stride, value_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Write the softmax over all of a sequence's keys [GROUP, HEAD_DIM] from its parts, `part_stride` heads apart."""
    head, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    top = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_GROUP,), tl.float32)
    sums = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for first_part in range(0, num_parts, BLOCK_PARTS):
        part = first_part + tl.arange(0, BLOCK_PARTS)
        inside = (part < num_parts)[:, None] & (head < GROUP)[None, :]
        place = part[:, None].to(tl.int64) * part_stride + head[None, :]
        # Other programs wrote these: not to be looked for in this processor's own cache.
        tops = tl.load(tops_ptr + place, mask=inside, other=float("-inf"), cache_modifier=".cg")
        masses = tl.load(masses_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
        element = place[:, :, None] * HEAD_DIM + dim[None, None, :]
        element_inside = inside[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        parts = tl.load(sums_ptr + element, mask=element_inside, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # that of heads past the last
        weights = tl.exp(tops - shift[None, :])
        decay = tl.exp(top - shift)
        mass = mass * decay + tl.sum(weights * masses, 0)
        sums = sums * decay[:, None] + tl.sum(weights[:, :, None] * parts, 0)
        top = new_top
    y = sums * value_scale / tl.where(mass == 0, 1.0, mass)[:, None]
    inside = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out_ptr + head[:, None] * HEAD_DIM + dim[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
