// Latent attention for sm_90a: what kernels of it share that are compiled with T_NAME ("bf16" or "f16"), NUM_HEADS, WIDTH,
// RANK, BLOCK_HEADS, BLOCK_SIZE, KEYS of a tile, STAGES: places for tiles.
//
// A program takes item after item: 64 rows, BLOCK_HEADS heads of one token or of some, through a stretch of the keys of
// their sequence. Of its four warpgroups one brings queries and latents, each latent once, as key and as value; one makes
// scores, and weights of them; two sum up latents by their weights, half of the columns each. All of them go through the
// items by themselves: Work says what the next one is.
#pragma once

#include "attention.cuh"

constexpr int ROWS = 64, WARPGROUP = 128;
constexpr int PANELS = (WIDTH + 63) / 64;  // of 64 columns, 128 bytes
constexpr int Q_PANEL = ROWS * 128, KEY_PANEL = KEYS * 128, TILE_BYTES = PANELS * KEY_PANEL;
constexpr int CHUNKS = WIDTH / 8, STEPS = WIDTH / 16;  // of 16 bytes, of a product
constexpr int COLUMNS = RANK / 2, PART = 128, PARTS = COLUMNS / PART;  // of a warpgroup that sums, of a product
constexpr int HEAD_TILES = (NUM_HEADS + ROWS - 1) / ROWS;
constexpr int AT_ONCE = WARPGROUP / 8, PASSES = KEYS / AT_ONCE;  // rows of a panel that are copied
constexpr u64 ROW_BYTES = WIDTH * 2, BLOCK_BYTES = BLOCK_SIZE * ROW_BYTES;

struct Tensors {
    const char *q, *cache;
    char* out;
    const int* block_table;
    long long table_stride;
    float *sums, *tops, *masses;  // of parts
    float scale;
};

struct Item {
    int sequence, first_token, num_tokens;  // tokens of the step
    int first_key, end_key, whole_keys;     // how many the first token sees; each one after it sees one more
    int part;                               // where the result belongs among those of parts; -1: it is whole
};

// What the warpgroup of scores tells those that sum, of each row: with a tile what sums so far must be multiplied by,
// with an item's last tile the sum of its weights and the score that they are relative to.
struct Row {
    float decay[ROWS], mass[ROWS], top[ROWS];
};

// Where things lie in shared memory, and barriers: of tiles STAGES each.
struct Places {
    u32 q, tiles, weights;
    u32 q_full, q_free, tile_full, tile_free, weights_full, weights_free;
    Row* rows;
};

// ---- the warpgroup that brings queries and latents ----

__device__ __forceinline__ void copy_row(u32 to, const char* from, int num_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void copy_queries(const Tensors& t, u32 to, const Item& item, int head_tile, int thread) {
    const int chunk = thread % 8;
#pragma unroll
    for (int pass = 0; pass < ROWS / AT_ONCE; ++pass) {
        const int row = pass * AT_ONCE + thread / 8;
        const int token = row / BLOCK_HEADS, head = head_tile * ROWS + row % BLOCK_HEADS;
        const bool inside = token < item.num_tokens && head < NUM_HEADS;
        const long long place = (long long)(item.first_token + token) * NUM_HEADS + head;
        const char* source = t.q + (inside ? place * ROW_BYTES + chunk * 16 : 0);
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
            if (panel * 8 + chunk < CHUNKS)
                copy_row(to + panel * Q_PANEL + swizzled(row, chunk), source + panel * 128, inside ? 16 : 0);
    }
}

template <class Work> __device__ __forceinline__ void bring(
    const Tensors& t, Work work, const Places& places, int head_tile, int thread) {
    const int row = thread / 8, chunk = thread % 8;
    const u32 to = places.tiles + swizzled(row, chunk);
    int tile = 0;
    Item item;
    for (int n = 0; work.next(item); ++n) {
        const int* table = t.block_table + item.sequence * t.table_stride;
        int key = item.first_key;
        do {
            // From the end on it is the last one over and over: weights of zero times what is there must be zero.
            const char* sources[PASSES];
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                const int from = max(min(key + pass * AT_ONCE + row, item.end_key - 1), 0);
                const u32 block = max(table[from / BLOCK_SIZE], 0);  // nobody has none
                sources[pass] = t.cache + block * BLOCK_BYTES + from % BLOCK_SIZE * ROW_BYTES + chunk * 16;
            }
            const int stage = tile % STAGES;
            wait(places.tile_free + stage * 8, tile / STAGES & 1 ^ 1);
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
#pragma unroll
                for (int pass = 0; pass < PASSES; ++pass)
                    if (panel * 8 + chunk < CHUNKS)
                        copy_row(to + stage * TILE_BYTES + panel * KEY_PANEL + pass * (AT_ONCE * 128),
                                 sources[pass] + panel * 128, 16);
            }
            arrive_with_copies(places.tile_full + stage * 8);
            if (key == item.first_key) {  // after its first tile, for which there may be room before
                wait(places.q_free, n & 1 ^ 1);
                copy_queries(t, places.q, item, head_tile, thread);
                arrive_with_copies(places.q_full);
            }
            key += KEYS, ++tile;
        } while (key < item.end_key);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- the warpgroup of scores ----

__device__ __forceinline__ void begin_scores(float (&scores)[KEYS / 2], const Places& places, int stage, u32 parity) {
    const u64 q = descriptor(places.q, 0), keys = descriptor(places.tiles + stage * TILE_BYTES, 0);
    wait(places.tile_full + stage * 8, parity);
    fence_async();
    begin_products();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int inside = step % 4 * 32;
        multiply_shared(scores, q + (step / 4 * Q_PANEL + inside) / 16, keys + (step / 4 * KEY_PANEL + inside) / 16,
                        step > 0);
    }
    commit_products();
}

// Scores to weights, in place; rows see `num_keys` of the tile's.
__device__ __forceinline__ void softmax(
    float (&scores)[KEYS / 2], float (&decay)[2], float (&top)[2], float (&mass)[2], const int (&num_keys)[2],
    bool is_cut, float scale) {
    if (is_cut) {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i)
            if (column + i / 4 * 8 + i % 2 >= num_keys[i / 2 % 2]) scores[i] = NONE;
    }
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float most = fmaxf(top[r], most_of_row(scores, r) * scale);
        shift[r] = most == NONE ? 0 : most;  // of no keys: keep differences finite
        decay[r] = exp2_of(top[r] - shift[r]);
        top[r] = most;
        mass[r] *= decay[r];
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
        scores[i] = exp2_of(scores[i] * scale - shift[i / 2 % 2]);
        mass[i / 2 % 2] += scores[i];
    }
}

template <class Work> __device__ __forceinline__ void weigh(
    const Tensors& t, Work work, const Places& places, int thread) {
    const int my_row = thread / 32 * 16 + thread % 32 / 4;
    int tile = 0;
    Item item;
    for (int n = 0; work.next(item); ++n) {
        float top[2] = {NONE, NONE}, mass[2] = {0, 0};
        wait(places.q_full, n & 1);
        int key = item.first_key;
        do {
            float scores[KEYS / 2], decay[2];
            begin_scores(scores, places, tile % STAGES, tile / STAGES & 1);
            wait_products<0>();
            hold(scores);
            const bool is_last = key + KEYS >= item.end_key;
            if (is_last && thread % 32 == 0) arrive(places.q_free);
            const int seen = item.whole_keys - key;
            const int num_keys[2] = {seen + my_row / BLOCK_HEADS, seen + (my_row + 8) / BLOCK_HEADS};
            softmax(scores, decay, top, mass, num_keys, seen < KEYS, t.scale);
            u32 weights[KEYS / 4];
#pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) weights[i] = packed(scores[2 * i], scores[2 * i + 1]);
            if (is_last) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    mass[r] += __shfl_xor_sync(~0u, mass[r], 1);
                    mass[r] += __shfl_xor_sync(~0u, mass[r], 2);
                }
            }
            wait(places.weights_free, tile & 1 ^ 1);
#pragma unroll
            for (int i = 0; i < KEYS / 4; ++i)
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(
                                 places.weights + swizzled(my_row + i % 2 * 8, i / 2) + thread % 4 * 4),
                             "r"(weights[i]) : "memory");
            if (thread % 4 == 0) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    places.rows->decay[my_row + 8 * r] = decay[r];
                    if (is_last) places.rows->mass[my_row + 8 * r] = mass[r], places.rows->top[my_row + 8 * r] = top[r];
                }
            }
            fence_async();
            arrive(places.weights_full);
            key += KEYS, ++tile;
        } while (key < item.end_key);
    }
}

// ---- the warpgroups that sum ----

__device__ __forceinline__ void write(
    const Tensors& t, const Item& item, int head_tile, const float (&mass)[2], const float (&top)[2],
    const float (&sums)[PARTS][PART / 2], int first_column, int thread) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * r, column = first_column + thread % 4 * 2;
        const int token = row / BLOCK_HEADS, head = head_tile * ROWS + row % BLOCK_HEADS;
        if (token >= item.num_tokens || head >= NUM_HEADS) continue;
        if (item.part < 0) {
            const float inverse = mass[r] > 0 ? 1 / mass[r] : 0;
            char* to = t.out + (((long long)(item.first_token + token) * NUM_HEADS + head) * RANK + column) * 2;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i) {
                const float* two = sums[i / (PART / 8)] + i % (PART / 8) * 4 + 2 * r;
                // Nobody's, whose latents may be anything, are zeros.
                const float y = inverse == 0 ? 0 : two[0] * inverse, z = inverse == 0 ? 0 : two[1] * inverse;
                *(u32*)(to + i * 16) = packed(y, z);
            }
        } else {
            const long long part = (long long)item.part * NUM_HEADS + head;
            float* to = t.sums + part * RANK + column;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i) {
                const float* two = sums[i / (PART / 8)] + i % (PART / 8) * 4 + 2 * r;
                *(float2*)(to + i * 8) = make_float2(two[0], two[1]);
            }
            if (column == 0) t.tops[part] = top[r], t.masses[part] = mass[r];
        }
    }
}

template <class Work> __device__ __forceinline__ void sum(
    const Tensors& t, Work work, const Places& places, int head_tile, int half, int thread) {
    const int my_row = thread / 32 * 16 + thread % 32 / 4;
    const u64 weights = descriptor(places.weights, 0);
    int tile = 0;
    Item item;
    while (work.next(item)) {
        float sums[PARTS][PART / 2], mass[2], top[2];
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < PART / 2; ++i) sums[part][i] = 0;
        int key = item.first_key;
        do {
            const int stage = tile % STAGES;
            wait(places.weights_full, tile & 1);
            fence_async();
            const float decay[2] = {places.rows->decay[my_row], places.rows->decay[my_row + 8]};
#pragma unroll
            for (int r = 0; r < 2; ++r) mass[r] = places.rows->mass[my_row + 8 * r], top[r] = places.rows->top[my_row + 8 * r];
            if (__any_sync(~0u, decay[0] != 1 || decay[1] != 1)) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < PART / 2; ++i) sums[part][i] *= decay[i / 2 % 2];
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part) hold(sums[part]);
            begin_products();
            const u64 latents =
                descriptor(places.tiles + stage * TILE_BYTES + half * (COLUMNS / 64 * KEY_PANEL), KEY_PANEL);
#pragma unroll
            for (int step = 0; step < KEYS / 16; ++step)
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    multiply_columns(sums[part], weights + step * 2,
                                     latents + (part * (PART / 64 * KEY_PANEL) + step * 2048) / 16);
            commit_products();
            wait_products<0>();
#pragma unroll
            for (int part = 0; part < PARTS; ++part) hold(sums[part]);
            __syncwarp();
            if (thread % 32 == 0) arrive(places.weights_free), arrive(places.tile_free + stage * 8);
            key += KEYS, ++tile;
        } while (key < item.end_key);
        write(t, item, head_tile, mass, top, sums, half * COLUMNS, thread);
    }
}

// All of a program, of 4 * WARPGROUP threads.
template <class Work> __device__ __forceinline__ void attend(const Tensors& t, const Work& work, int head_tile) {
    extern __shared__ char unaligned[];
    __shared__ Row rows;
    __shared__ u64 barriers[4 + 2 * STAGES];
    Places places;
    places.q = (shared_address(unaligned) + 1023) & ~1023u;
    places.tiles = places.q + PANELS * Q_PANEL;
    places.weights = places.tiles + STAGES * TILE_BYTES;
    places.rows = &rows;
    places.q_full = shared_address(barriers);
    places.q_free = places.q_full + 8;
    places.weights_full = places.q_full + 16;
    places.weights_free = places.q_full + 24;
    places.tile_free = places.q_full + 32;
    places.tile_full = places.tile_free + STAGES * 8;
    if (threadIdx.x == 0) {
        init_barrier(places.q_full, WARPGROUP);
        init_barrier(places.q_free, 4);  // warps
        init_barrier(places.weights_full, WARPGROUP);
        init_barrier(places.weights_free, 8);
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(places.tile_free + i * 8, 8);
            init_barrier(places.tile_full + i * 8, WARPGROUP);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int thread = threadIdx.x % WARPGROUP;
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        bring(t, work, places, head_tile, thread);
    } else if (warpgroup == 1) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        weigh(t, work, places, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 176;");
        sum(t, work, places, head_tile, warpgroup - 2, thread);
    }
}
