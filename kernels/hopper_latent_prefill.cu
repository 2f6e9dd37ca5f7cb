// Latent attention of prompts for sm_90a; contract and arguments: hopper_latent.py, which compiles this with what
// hopper_latent.cuh tells. A program takes items that lie a whole grid apart, in turns from its two ends, as those that come
// first see most keys.

#include "hopper_latent.cuh"

constexpr int TILE_TOKENS = ROWS / BLOCK_HEADS;

struct Arguments {
    Tensors tensors;
    const int *query_start, *seq_lens, *work;
    int num_items;
};

struct Tiles {
    const Arguments& a;
    int program, num_programs, round;

    __device__ __forceinline__ bool next(Item& item) {
        const int index = round * num_programs + (round % 2 ? num_programs - 1 - program : program);
        ++round;
        const int sequence = index < a.num_items ? a.work[index * 2] : -1;
        if (sequence < 0) return false;
        const int first = a.work[index * 2 + 1], start = a.query_start[sequence], length = a.seq_lens[sequence];
        const int num_tokens = a.query_start[sequence + 1] - start, whole_keys = length - num_tokens + first + 1;
        item = {sequence, start + first, min(num_tokens - first, TILE_TOKENS), 0,
                min(whole_keys + TILE_TOKENS - 1, length), whole_keys, -1};
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(4 * WARPGROUP, 1) hopper_latent_prefill(const __grid_constant__ Arguments a) {
    attend(a.tensors, Tiles{a, (int)blockIdx.x / HEAD_TILES, (int)gridDim.x / HEAD_TILES, 0}, blockIdx.x % HEAD_TILES);
}
