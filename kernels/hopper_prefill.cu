// Prefill attention for sm_90a; contract and arguments: hopper_prefill.py, which compiles this with
//   T_NAME ("bf16" or "f16"), HEAD_DIM, NUM_KV_HEADS, GROUP, BLOCK_SIZE, HAS_CAP, HAS_WINDOW, HAS_SLOPES, HAS_SINKS,
//   KEYS of a tile, STAGES: places for tiles of keys, and of values; Q_SLOTS: places for tiles of queries.
//
// A program takes item after item, 128 rows each: the query heads of one KV head for some query tokens. Of its three
// warpgroups one brings queries, keys and values, these from the slots where they lie, as far ahead as there is room.
// The others multiply, 64 rows each, in turns: while one has the tensor cores, the other computes its softmax
// (FlashAttention-3, Shah et al. 2024).

#include "attention.cuh"

constexpr int ROWS = 128, GROUP_ROWS = 64, WARPGROUP = 128;
constexpr int BLOCK_GROUP = pow2(GROUP), TILE_TOKENS = ROWS / BLOCK_GROUP;
constexpr int PANELS = (HEAD_DIM + 63) / 64;  // of 64 elements, 128 bytes
constexpr int PART = PANELS % 2 ? 64 : 128, PARTS = PANELS * 64 / PART;  // columns of one product
constexpr int SLOT_STRIDE = NUM_KV_HEADS * HEAD_DIM, CHUNKS = HEAD_DIM / 8;  // 16 bytes each
constexpr int Q_PANEL = GROUP_ROWS * 128, Q_BYTES = ROWS * PANELS * 128;
constexpr int KV_PANEL = KEYS * 128, KV_BYTES = KV_PANEL * PANELS;

struct Item {  // in shared memory, one a place of queries; without tiles: there is no more to do
    int start, first_token, num_tokens;  // of the sequence in the step, of the tile in the sequence, of the sequence
    int first_position, first_key, end_key;  // first_key is a tile's
    int num_tiles, sequence, kv_head;
};

// Where things lie in shared memory, and barriers: of STAGES or Q_SLOTS each.
struct Places {
    u32 q, keys, values;
    u32 q_full, q_free, keys_full, keys_free, values_full, values_free;
};

struct Arguments {
    const char *q, *cache;
    char* out;
    const int *query_start, *seq_lens, *block_table, *work;
    const float *slopes, *sinks;
    int* counters;  // items taken, programs that have ended; zeros before and after
    long long q_stride, value_offset, table_stride;
    float scale, cap;
    int window, num_items;
};

// ---- the warpgroup that brings keys and values: tiles from the last to the first ----

__device__ __forceinline__ void copy_row(u32 to, const char* from, int num_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void copy_tile(
    u32 tile, const char* head, const int* table, int first_key, int end_key, int thread) {
    constexpr int ACROSS = PANELS * 8, AT_ONCE = WARPGROUP / ACROSS;  // threads a row, rows
    constexpr u64 BLOCK_STRIDE = (u64)BLOCK_SIZE * SLOT_STRIDE * 2;
    const int chunk = thread % ACROSS, row = thread / ACROSS;
    const u32 panel = tile + chunk / 8 * KV_PANEL;
    const int num_bytes = chunk < CHUNKS ? 16 : 0;  // the rest becomes zeros
    const char* source = head + (chunk < CHUNKS ? chunk * 16 : 0);
    if (KEYS % BLOCK_SIZE == 0 && BLOCK_SIZE % AT_ONCE == 0 && first_key + KEYS <= end_key) {
        // PERF: one look-up a block, and what is added to its address is constant.
        source += row * (SLOT_STRIDE * 2);
#pragma unroll
        for (int i = 0; i < KEYS; i += BLOCK_SIZE) {
            const char* block = source + (u64)(u32)table[(first_key + i) / BLOCK_SIZE] * BLOCK_STRIDE;
#pragma unroll
            for (int j = 0; j < BLOCK_SIZE; j += AT_ONCE)
                copy_row(panel + swizzled(i + j + row, chunk % 8), block + j * (SLOT_STRIDE * 2), num_bytes);
        }
        return;
    }
    if (row >= AT_ONCE) return;
#pragma unroll 1
    for (int i = row; i < KEYS; i += AT_ONCE) {
        // From the end on it is the last one over and over: weights of zero times what is there must be zero.
        const int key = min(first_key + i, end_key - 1);
        const char* block = source + (u64)(u32)max(table[key / BLOCK_SIZE], 0) * BLOCK_STRIDE;  // nobody has none
        copy_row(panel + swizzled(i, chunk % 8), block + key % BLOCK_SIZE * (SLOT_STRIDE * 2), num_bytes);
    }
}

__device__ __forceinline__ void copy_queries(const Arguments& a, const Item& item, u32 slot, int thread) {
    for (int i = thread; i < ROWS * PANELS * 8; i += WARPGROUP) {
        const int row = i / (PANELS * 8), chunk = i % (PANELS * 8);
        const int token = item.first_token + row / BLOCK_GROUP, head = row % BLOCK_GROUP;
        const bool inside = token < item.num_tokens && head < GROUP && chunk < CHUNKS;
        const long long place =
            (item.start + token) * a.q_stride + (item.kv_head * GROUP + head) * HEAD_DIM + chunk * 8;
        const u32 panel = slot + row / GROUP_ROWS * (Q_BYTES / 2) + chunk / 8 * Q_PANEL;
        copy_row(panel + swizzled(row % GROUP_ROWS, chunk % 8), a.q + (inside ? place * 2 : 0), inside ? 16 : 0);
    }
}

__device__ __forceinline__ Item item_at(const Arguments& a, int index) {
    Item item;
    item.num_tiles = 0;
    if (index >= a.num_items) return item;
    item.sequence = a.work[index / NUM_KV_HEADS * 2];
    if (item.sequence < 0) return item;
    item.kv_head = index % NUM_KV_HEADS;
    item.first_token = a.work[index / NUM_KV_HEADS * 2 + 1];
    item.start = a.query_start[item.sequence];
    item.num_tokens = a.query_start[item.sequence + 1] - item.start;
    const int length = a.seq_lens[item.sequence];
    item.first_position = length - item.num_tokens + item.first_token;
    item.first_key = HAS_WINDOW ? max(item.first_position - a.window + 1, 0) / KEYS * KEYS : 0;
    item.end_key = max(min(length, item.first_position + TILE_TOKENS), item.first_key + 1);
    item.num_tiles = (item.end_key - item.first_key + KEYS - 1) / KEYS;
    return item;
}

__device__ __forceinline__ void bring(const Arguments& a, const Places& places, Item* items, int thread) {
    int index = blockIdx.x, tile = 0;
    for (int n = 0;; ++n) {
        const int slot = n % Q_SLOTS;
        wait(places.q_free + slot * 8, n / Q_SLOTS & 1 ^ 1);
        if (thread == 0) {
            const int after = gridDim.x + atomicAdd(a.counters, 1);
            items[slot] = item_at(a, index);
            index = after;
            arrive(places.q_full + slot * 8);
        }
        sync_named(5, WARPGROUP);
        const Item item = items[slot];
        if (item.num_tiles) copy_queries(a, item, places.q + slot * Q_BYTES, thread);
        arrive_with_copies(places.q_full + slot * 8);
        if (!item.num_tiles) break;
        const char* keys = a.cache + item.kv_head * HEAD_DIM * 2;
        const int* table = a.block_table + item.sequence * a.table_stride;
        const int end = tile + item.num_tiles;
        for (const int first = tile; tile <= end; ++tile) {
            const int first_key = item.first_key + (end - 1 - tile) * KEYS;
            if (tile < end) {
                const int stage = tile % STAGES;
                wait(places.keys_free + stage * 8, tile / STAGES & 1 ^ 1);
                copy_tile(places.keys + stage * KV_BYTES, keys, table, first_key, item.end_key, thread);
                arrive_with_copies(places.keys_full + stage * 8);
            }
            if (tile > first) {
                const int stage = (tile - 1) % STAGES;
                wait(places.values_free + stage * 8, (tile - 1) / STAGES & 1 ^ 1);
                copy_tile(places.values + stage * KV_BYTES, keys + a.value_offset * 2, table, first_key + KEYS,
                          item.end_key, thread);
                arrive_with_copies(places.values_full + stage * 8);
            }
        }
        tile = end;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (thread == 0) {
        __threadfence();
        if (atomicAdd(a.counters + 1, 1) == gridDim.x - 1) a.counters[0] = a.counters[1] = 0;
    }
}

// ---- the warpgroups that multiply: named barriers 1 and 2 are their turns, 3 and 4 their own ----

// What one thread of those that multiply has of two rows.
struct Rows {
    int position[2];
    float slope[2], top[2], mass[2], decay[2];
};

// Scores to weights, in place; `decay` is what sums so far must be multiplied by.
template <bool IS_CUT> __device__ __forceinline__ void softmax(
    float (&scores)[KEYS / 2], Rows& rows, int first_key, float scale, float cap, int window) {
    const int column = first_key + threadIdx.x % 4 * 2;
    float factor = scale;
    if (HAS_CAP) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) scores[i] = cap - 2 * cap / (1 + exp2_of(scores[i] * scale));
        factor = 1;
    }
    if (HAS_SLOPES) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i)
            scores[i] += rows.slope[i / 2 % 2] * (float)(column + i / 4 * 8 + i % 2 - rows.position[i / 2 % 2]);
    }
    if (IS_CUT) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            const int key = column + i / 4 * 8 + i % 2, at = rows.position[i / 2 % 2];
            if (key > at || (HAS_WINDOW && key <= at - window)) scores[i] = NONE;
        }
    }
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float most = fmaxf(rows.top[r], most_of_row(scores, r) * factor);
        // A row that has seen nothing yet has no maximum: keep its differences finite.
        shift[r] = most == NONE ? 0 : most;
        rows.decay[r] = exp2_of(rows.top[r] - shift[r]);
        rows.top[r] = most;
        rows.mass[r] *= rows.decay[r];
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
        scores[i] = exp2_of(scores[i] * factor - shift[i / 2 % 2]);
        rows.mass[i / 2 % 2] += scores[i];
    }
}

__device__ __forceinline__ void begin_scores(float (&scores)[KEYS / 2], u64 q, u64 keys) {
#pragma unroll
    for (int step = 0; step < PANELS * 4; ++step)
        multiply_shared(scores, q + (step / 4 * Q_PANEL + step % 4 * 32) / 16,
                        keys + (step / 4 * KV_PANEL + step % 4 * 32) / 16, step > 0);
    commit_products();
}

__device__ __forceinline__ void begin_sums(float (&sums)[PARTS][PART / 2], const u32 (&weights)[KEYS / 4], u64 values) {
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step)
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            multiply(sums[part], weights + step * 4, values + (part * (PART / 64) * KV_PANEL + step * 2048) / 16);
    commit_products();
}

__device__ __forceinline__ void pack(u32 (&weights)[KEYS / 4], const float (&scores)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weights[i] = packed(scores[2 * i], scores[2 * i + 1]);
}

// Scores of tile `tile`, of those that this program goes through, and sums with the tile before; the last is an item's.
template <bool IS_CUT, bool IS_FIRST> __device__ __forceinline__ void next_tile(
    const int tile, const int first_key, const Arguments& a, const Places& places, const u64 q, const int warpgroup,
    Rows& rows, float (&scores)[KEYS / 2], u32 (&weights)[KEYS / 4], float (&sums)[PARTS][PART / 2]) {
    const bool releases = threadIdx.x % 32 == 0;  // once a warp
    const int stage = tile % STAGES, before = (tile + STAGES - 1) % STAGES;
    wait(places.keys_full + stage * 8, tile / STAGES & 1);
    fence_async();
    sync_named(1 + warpgroup, 2 * WARPGROUP);
    begin_products();
    begin_scores(scores, q, descriptor(places.keys + stage * KV_BYTES, 0));
    if (!IS_FIRST) {
        wait(places.values_full + before * 8, (tile - 1) / STAGES & 1);
        fence_async();
        begin_sums(sums, weights, descriptor(places.values + before * KV_BYTES, KV_PANEL));
    }
    arrive_named(2 - warpgroup, 2 * WARPGROUP);
    wait_products<!IS_FIRST>();
    hold(scores);
    if (releases) arrive(places.keys_free + stage * 8);
    softmax<IS_CUT>(scores, rows, first_key, a.scale, a.cap, a.window);
    if (!IS_FIRST) {
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < PARTS; ++part) hold(sums[part]);
        if (releases) arrive(places.values_free + before * 8);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int j = 0; j < PART / 2; ++j) sums[part][j] *= rows.decay[j / 2 % 2];
    }
    pack(weights, scores);
}

__device__ __forceinline__ void attend(
    const Arguments& a, const Places& places, const Item& item, const u32 q_address, int& tile, const int warpgroup,
    Rows& rows, float (&sums)[PARTS][PART / 2]) {
    const u64 q = descriptor(q_address, 0);
    float scores[KEYS / 2];
    u32 weights[KEYS / 4];
    int first_key = item.first_key + (item.num_tiles - 1) * KEYS;
    next_tile<true, true>(tile++, first_key, a, places, q, warpgroup, rows, scores, weights, sums);
    // Tiles that some rows do not see whole, those that all do, and with a window again the former.
    for (first_key -= KEYS; first_key >= item.first_key && first_key + KEYS > item.first_position + 1; first_key -= KEYS)
        next_tile<true, false>(tile++, first_key, a, places, q, warpgroup, rows, scores, weights, sums);
    const int first_whole = HAS_WINDOW ? item.first_position + TILE_TOKENS - a.window : 0;
    for (; first_key >= max(first_whole, item.first_key); first_key -= KEYS)
        next_tile<false, false>(tile++, first_key, a, places, q, warpgroup, rows, scores, weights, sums);
    if (HAS_WINDOW)
        for (; first_key >= item.first_key; first_key -= KEYS)
            next_tile<true, false>(tile++, first_key, a, places, q, warpgroup, rows, scores, weights, sums);
    const int stage = (tile - 1) % STAGES;
    wait(places.values_full + stage * 8, (tile - 1) / STAGES & 1);
    fence_async();
    begin_products();
    begin_sums(sums, weights, descriptor(places.values + stage * KV_BYTES, KV_PANEL));
    wait_products<0>();
#pragma unroll
    for (int part = 0; part < PARTS; ++part) hold(sums[part]);
    if (threadIdx.x % 32 == 0) arrive(places.values_free + stage * 8);
}

// Sums by their weights, to the results of this warpgroup's rows.
__device__ __forceinline__ void write(
    const Arguments& a, const Item& item, const Rows& rows, const float (&sums)[PARTS][PART / 2], const u32 staging,
    const int warpgroup, const int thread) {
    const int my_row = thread / 32 * 16 + thread % 32 / 4;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float mass = rows.mass[r];
        mass += __shfl_xor_sync(~0u, mass, 1);
        mass += __shfl_xor_sync(~0u, mass, 2);
        const int head = (my_row + 8 * r) % BLOCK_GROUP;
        if (HAS_SINKS && head < GROUP && mass > 0)
            mass += exp2_of(a.sinks[item.kv_head * GROUP + head] * LOG2_E - rows.top[r]);
        inverse[r] = mass > 0 ? 1 / mass : 0;
    }
    // Through shared memory, where queries are done with, so that neighbouring threads write 16 bytes each of a row.
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int j = 0; j < PART / 2; j += 2) {
            const int r = j / 2 % 2, column = part * PART + j / 4 * 8;
            const bool is_empty = inverse[r] == 0;  // nobody's, whose values may be anything
            const float y = is_empty ? 0 : sums[part][j] * inverse[r];
            const float z = is_empty ? 0 : sums[part][j + 1] * inverse[r];
            const u32 to = staging + column / 64 * Q_PANEL + swizzled(my_row + 8 * r, column % 64 / 8);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + thread % 4 * 4), "r"(packed(y, z)) : "memory");
        }
    sync_named(3 + warpgroup, WARPGROUP);
    for (int i = thread; i < GROUP_ROWS * PANELS * 8; i += WARPGROUP) {
        const int row = i / (PANELS * 8), chunk = i % (PANELS * 8);
        const int token = item.first_token + (warpgroup * GROUP_ROWS + row) / BLOCK_GROUP, head = row % BLOCK_GROUP;
        if (token >= item.num_tokens || head >= GROUP || chunk >= CHUNKS) continue;
        int4 x;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(staging + chunk / 8 * Q_PANEL + swizzled(row, chunk % 8)) : "memory");
        const long long place = (long long)(item.start + token) * (NUM_KV_HEADS * GROUP * HEAD_DIM) +
                                (item.kv_head * GROUP + head) * HEAD_DIM + chunk * 8;
        *(int4*)(a.out + place * 2) = x;
    }
}

__device__ __forceinline__ void multiply_all(
    const Arguments& a, const Places& places, const Item* items, const int warpgroup, const int thread) {
    if (warpgroup == 1) arrive_named(1, 2 * WARPGROUP);
    int tile = 0;
    for (int n = 0;; ++n) {
        const int slot = n % Q_SLOTS;
        wait(places.q_full + slot * 8, n / Q_SLOTS & 1);
        const Item item = items[slot];
        if (!item.num_tiles) break;
        Rows rows;
        float sums[PARTS][PART / 2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warpgroup * GROUP_ROWS + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
            const int head = row % BLOCK_GROUP;
            rows.position[r] = item.first_position + row / BLOCK_GROUP;
            rows.slope[r] = rows.mass[r] = 0;
            rows.top[r] = NONE;
            if (HAS_SLOPES && head < GROUP)
                rows.slope[r] = a.slopes[item.kv_head * GROUP + head] * (HAS_CAP ? LOG2_E : LOG2_E / a.scale);
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int j = 0; j < PART / 2; ++j) sums[part][j] = 0;
        const u32 q = places.q + slot * Q_BYTES + warpgroup * (Q_BYTES / 2);
        attend(a, places, item, q, tile, warpgroup, rows, sums);
        write(a, item, rows, sums, q, warpgroup, thread);
        __syncwarp();
        if (thread % 32 == 0) arrive(places.q_free + slot * 8);
    }
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) hopper_prefill(const __grid_constant__ Arguments a) {
    extern __shared__ char unaligned[];
    __shared__ Item items[Q_SLOTS];
    __shared__ u64 barriers[2 * Q_SLOTS + 4 * STAGES];
    Places places;
    places.q = (shared_address(unaligned) + 1023) & ~1023u;
    places.keys = places.q + Q_SLOTS * Q_BYTES;
    places.values = places.keys + STAGES * KV_BYTES;
    places.q_full = shared_address(barriers);
    places.q_free = places.q_full + Q_SLOTS * 8;
    places.keys_full = places.q_free + Q_SLOTS * 8;
    places.keys_free = places.keys_full + STAGES * 8;
    places.values_full = places.keys_free + STAGES * 8;
    places.values_free = places.values_full + STAGES * 8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Q_SLOTS; ++i) {
            init_barrier(places.q_full + i * 8, WARPGROUP + 1);
            init_barrier(places.q_free + i * 8, 8);  // warps
        }
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(places.keys_full + i * 8, WARPGROUP);
            init_barrier(places.values_full + i * 8, WARPGROUP);
            init_barrier(places.keys_free + i * 8, 8);
            init_barrier(places.values_free + i * 8, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int thread = threadIdx.x % WARPGROUP;
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / WARPGROUP, 0) - 1;
    if (warpgroup < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        bring(a, places, items, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        multiply_all(a, places, items, warpgroup, thread);
    }
}
