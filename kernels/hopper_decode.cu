// Attention of one new token a sequence for sm_90a; contract and arguments: hopper_decode.py, which compiles this with
//   T_NAME ("bf16" or "f16"), HEAD_DIM, NUM_KV_HEADS, GROUP, BLOCK_SIZE, HAS_CAP, HAS_WINDOW, HAS_SLOPES, HAS_SINKS,
//   HEADS: KV heads of a program, KEYS of a tile, STAGES: places for tiles, PROGRAMS of a processor.
//
// A program takes a share of all keys, for some KV heads: stretches of one sequence after another (level_work.py). One
// warp brings tiles of keys and values through a ring, pieces of blocks at a time; of the others each has a KV head,
// whose query heads are the rows of its products.

#include "attention.cuh"

constexpr int BOX_KEYS = 16, BUNDLES = NUM_KV_HEADS / HEADS;
constexpr int PANELS = HEAD_DIM / 64, CHUNKS = HEAD_DIM / 8;  // of a head, 128 bytes and 16
constexpr int HEAD_BYTES = PANELS * BOX_KEYS * 128;           // keys, or values, of a head in a box
constexpr int PLANE_BYTES = HEADS * HEAD_BYTES, BOX_BYTES = 2 * PLANE_BYTES;
constexpr int BOXES = KEYS / BOX_KEYS, STAGE_BYTES = BOXES * BOX_BYTES;
constexpr int ROWS = GROUP > 8 ? 2 : 1;     // that a thread has some of
constexpr int COLUMNS = HEAD_DIM / 8;       // pieces of a thread's sums, of two numbers of each row
constexpr int NEWEST = (2 * CHUNKS + 31) / 32;
constexpr int AT_ONCE = COLUMNS * ROWS <= 16 ? 2 : 1;  // parts that are on their way

struct Arguments {
    alignas(64) char boxes[128];  // tensor map of the cache: planes, panels, slots, 64 numbers
    const char *q, *cache;
    char* out;
    const int *seq_lens, *block_table, *items, *shares;
    int* arrivals;
    const float *slopes, *sinks;
    float *sums, *tops, *masses;  // of parts
    long long q_stride, value_offset, table_stride;
    float scale, cap;
    int window, is_first;
};

struct Item {
    int sequence, first_key, end_key, first_item, num_stretches;
    Item() = default;
    __device__ __forceinline__ Item(const int* items, int place) {
        const int* from = items + place * 5;
        sequence = from[0], first_key = from[1], end_key = from[2], first_item = from[3], num_stretches = from[4];
    }
};

// ---- the warp that brings keys and values ----

__device__ __forceinline__ void copy_box(u32 to, const char* map, int slot, int panel, int plane, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
        ::"r"(to), "l"(map), "r"(0), "r"(slot), "r"(panel), "r"(plane), "r"(barrier) : "memory");
}
// PERF: nothing here waits for the kernel before, which makes the newest key of each sequence: what was in its place is
// brought, and whoever multiplies puts the newest there.
__device__ __forceinline__ void bring(const Arguments& a, u32 ring, u32 full, u32 free, int place, int end, int panel) {
    const int lane = threadIdx.x % 32;
    int tile = 0;
    Item item, next(a.items, place);
    for (; place < end; ++place) {
        item = next, next = Item(a.items, min(place + 1, end - 1));
        const int* table = a.block_table + item.sequence * a.table_stride;
        int slots = 0;  // of 32 boxes, one a lane
        for (int key = item.first_key, box = 0; key < item.end_key; key += KEYS, box += BOXES, ++tile) {
            if (box % 32 == 0) {
                const int from = key + lane * BOX_KEYS;
                slots = from < item.end_key ? table[from / BLOCK_SIZE] * BLOCK_SIZE + from % BLOCK_SIZE : 0;
            }
            const int stage = tile % STAGES, num_boxes = min((item.end_key - key + BOX_KEYS - 1) / BOX_KEYS, BOXES);
            wait(free + stage * 8, tile / STAGES & 1 ^ 1);
            if (lane == 0) expect_bytes(full + stage * 8, num_boxes * BOX_BYTES);
#pragma unroll
            for (int i = 0; i < BOXES; ++i) {
                const int slot = __shfl_sync(~0u, slots, (box + i) % 32);
                if (lane != 0 || i >= num_boxes) continue;
                const u32 to = ring + stage * STAGE_BYTES + i * BOX_BYTES;
                copy_box(to, a.boxes, slot, panel, 0, full + stage * 8);
                copy_box(to + PLANE_BYTES, a.boxes, slot, panel, 1, full + stage * 8);
            }
        }
    }
}

// ---- the warps that multiply ----

// d [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32." T_NAME "." T_NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : F4(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void load_four(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void load_four_transposed(u32 (&x)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ u32 chunk_in_box(u32 head, int row, int chunk) {
    return head + chunk / 8 * (BOX_KEYS * 128) + swizzled(row, chunk % 8);
}

// The query heads of a KV head, and the key and value of its newest token: 16 bytes a lane, keys first.
struct Token {
    u32 q[HEAD_DIM / 16][4];
    uint4 newest[NEWEST];

    __device__ __forceinline__ void load(const Arguments& a, const Item& item, int length, int kv_head) {
        const int lane = threadIdx.x % 32;
        const char* from = a.q + (item.sequence * a.q_stride + (kv_head * GROUP + lane / 4) * HEAD_DIM + lane % 4 * 2) * 2;
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i % 2 * 8;
                q[step][i] = row < GROUP ? *(const u32*)(from + i % 2 * (8 * HEAD_DIM * 2) + (step * 16 + i / 2 * 8) * 2) : 0;
            }
        if (item.end_key != length || length == 0) return;
        const int block = a.block_table[item.sequence * a.table_stride + (length - 1) / BLOCK_SIZE];
        const long long slot = (long long)block * BLOCK_SIZE + (length - 1) % BLOCK_SIZE;
        const char* key = a.cache + (slot * NUM_KV_HEADS + kv_head) * (HEAD_DIM * 2);
#pragma unroll
        for (int i = 0; i < NEWEST; ++i) {
            const int chunk = i * 32 + lane;
            if (chunk < 2 * CHUNKS)
                newest[i] = *(const uint4*)(key + chunk / CHUNKS * a.value_offset * 2 + chunk % CHUNKS * 16);
        }
    }
};

__device__ __forceinline__ void store_shared(u32 to, const uint4& x) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// A sequence's last tile, of `num` keys: the newest comes to its place, and values past it, which weights of zero are
// multiplied with, become zeros.
__device__ __forceinline__ void complete(u32 head, const Token& token, int num) {
    const int lane = threadIdx.x % 32;
    const auto value = [&](int row, int chunk) {
        return chunk_in_box(head + row / BOX_KEYS * BOX_BYTES + PLANE_BYTES, row % BOX_KEYS, chunk);
    };
    for (int i = num * CHUNKS + lane; i < KEYS * CHUNKS; i += 32)
        store_shared(value(i / CHUNKS, i % CHUNKS), make_uint4(0, 0, 0, 0));
    const int row = num - 1;
#pragma unroll
    for (int i = 0; i < NEWEST; ++i) {
        const int chunk = i * 32 + lane;
        if (chunk < CHUNKS) store_shared(value(row, chunk) - PLANE_BYTES, token.newest[i]);
        else if (chunk < 2 * CHUNKS) store_shared(value(row, chunk - CHUNKS), token.newest[i]);
    }
    fence_async();  // the ring's next copy comes after these stores
    __syncwarp();
}

struct Softmax {
    float sums[COLUMNS][4], top[2], mass[2];  // of rows lane / 4 and, 8 below it; masses of a thread's own columns

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
        top[0] = top[1] = NONE, mass[0] = mass[1] = 0;
    }
    __device__ __forceinline__ void scale_row(int r, float factor) {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sums[i][2 * r] *= factor, sums[i][2 * r + 1] *= factor;
    }

    // One more tile, whose keys and values of the head begin at `head`.
    __device__ __forceinline__ void add(
        const Arguments& a, const Token& token, const float (&slopes)[2], u32 head, int key, int length) {
        const int lane = threadIdx.x % 32;
        float scores[KEYS / 8][4] = {}, others[KEYS / 8][4] = {};  // of every other product: shorter chains of them
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; ++step)
#pragma unroll
            for (int box = 0; box < BOXES; ++box) {
                u32 keys[4];
                load_four(keys, chunk_in_box(head + box * BOX_BYTES, lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
                auto& sums = step % 2 ? others : scores;
                multiply(sums[box * 2], token.q[step], keys[0], keys[1]);
                multiply(sums[box * 2 + 1], token.q[step], keys[2], keys[3]);
            }
        const bool is_cut = key + KEYS > length || (HAS_WINDOW && key < length - a.window);
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
            for (int j = 0; j < 2 * ROWS; ++j) {
                const int at = key + i * 8 + lane % 4 * 2 + j % 2;
                float& score = scores[i][j];
                score = (score + others[i][j]) * a.scale;
                if (HAS_CAP) score = a.cap - 2 * a.cap / (1 + exp2_of(score));
                if (HAS_SLOPES) score += slopes[j / 2] * (at - length + 1);
                if (is_cut && (at >= length || (HAS_WINDOW && at < length - a.window))) score = NONE;
            }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float most = top[r];
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) most = fmaxf(most, fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float decay = exp2_of(top[r] - most);
            if (__any_sync(~0u, most > top[r])) scale_row(r, decay), mass[r] *= decay;
            top[r] = most;
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                for (int j = 2 * r; j < 2 * r + 2; ++j) mass[r] += scores[i][j] = exp2_of(scores[i][j] - most);
        }
#pragma unroll
        for (int box = 0; box < BOXES; ++box) {
            u32 weights[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    weights[2 * i + r] = packed(scores[box * 2 + i][2 * r], scores[box * 2 + i][2 * r + 1]);
#pragma unroll
            for (int two = 0; two < COLUMNS / 2; ++two) {
                u32 values[4];
                load_four_transposed(
                    values, chunk_in_box(head + box * BOX_BYTES + PLANE_BYTES, lane % 16, two * 2 + lane / 16));
                multiply(sums[two * 2], weights, values[0], values[1]);
                multiply(sums[two * 2 + 1], weights, values[2], values[3]);
            }
        }
    }

    __device__ __forceinline__ void end() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            mass[r] += __shfl_xor_sync(~0u, mass[r], 1);
            mass[r] += __shfl_xor_sync(~0u, mass[r], 2);
        }
    }

    __device__ __forceinline__ void write(const Arguments& a, int sequence, int kv_head) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = lane / 4 + 8 * r;
            if (row >= GROUP) continue;
            const float inverse = mass[r] > 0 ? 1 / mass[r] : 0;
            const long long head = (long long)sequence * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + row;
            u32* to = (u32*)(a.out + (head * HEAD_DIM + lane % 4 * 2) * 2);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) to[i * 4] = packed(sums[i][2 * r] * inverse, sums[i][2 * r + 1] * inverse);
        }
    }

    // Where a thread's numbers of a part are: sums as pairs of each piece, side by side with its neighbours'.
    static __device__ __forceinline__ long long row_of_part(int place, int kv_head, int r) {
        return (long long)place * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + threadIdx.x % 32 / 4 + 8 * r;
    }

    __device__ __forceinline__ void leave(const Arguments& a, int place, int kv_head) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (lane / 4 + 8 * r >= GROUP) continue;
            const long long row = row_of_part(place, kv_head, r);
            float2* to = (float2*)(a.sums + row * HEAD_DIM) + lane % 4;
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) to[i * 4] = make_float2(sums[i][2 * r], sums[i][2 * r + 1]);
            if (lane % 4 == 0) a.tops[row] = top[r], a.masses[row] = mass[r];
        }
    }

    // All parts of a sequence, in their order, in place of this one.
    __device__ __forceinline__ void put_together(const Arguments& a, int first_item, int num, int kv_head) {
        begin();
        for (int i = 0; i < num; i += AT_ONCE) add_parts(a, first_item + i, min(num - i, AT_ONCE), kv_head);
    }
    __device__ __forceinline__ void add_parts(const Arguments& a, int place, int num, int kv_head) {
        const int lane = threadIdx.x % 32;
        float2 its_sums[AT_ONCE][ROWS][COLUMNS];
        float its_top[AT_ONCE][ROWS], its_mass[AT_ONCE][ROWS];
#pragma unroll
        for (int p = 0; p < AT_ONCE; ++p)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                its_top[p][r] = NONE, its_mass[p][r] = 0;
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) its_sums[p][r][i] = make_float2(0, 0);
                if (p >= num || lane / 4 + 8 * r >= GROUP) continue;
                const long long row = row_of_part(place + p, kv_head, r);
                const float2* from = (const float2*)(a.sums + row * HEAD_DIM) + lane % 4;
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) its_sums[p][r][i] = __ldcg(from + i * 4);
                its_top[p][r] = __ldcg(a.tops + row), its_mass[p][r] = __ldcg(a.masses + row);
            }
#pragma unroll
        for (int p = 0; p < AT_ONCE; ++p)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float most = fmaxf(top[r], its_top[p][r]);
                if (most == NONE) continue;
                const float decay = exp2_of(top[r] - most), its = exp2_of(its_top[p][r] - most);
                top[r] = most, mass[r] = mass[r] * decay + its_mass[p][r] * its;
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) {
                    float* to = sums[i] + 2 * r;
                    to[0] = to[0] * decay + its_sums[p][r][i].x * its, to[1] = to[1] * decay + its_sums[p][r][i].y * its;
                }
            }
    }
};

// Tell that this warp's part is there. -> whether all `num` parts are; then the count is zero again, for the next layer.
__device__ __forceinline__ bool is_last(int* arrivals, int num) {
    __syncwarp();
    int before = 0;
    if (threadIdx.x % 32 == 0) {
        asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
        if (before == num - 1) *arrivals = 0;
    }
    before = __shfl_sync(~0u, before, 0);
    __syncwarp();
    return before == num - 1;
}

__device__ __forceinline__ void attend(
    const Arguments& a, u32 ring, u32 full, u32 free, int share, int place, int end, int kv_head, int head) {
    const int lane = threadIdx.x % 32;
    int tile = 0;
    Item item, next(a.items, place);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    for (; place < end; ++place) {
        item = next, next = Item(a.items, min(place + 1, end - 1));
        const int length = a.seq_lens[item.sequence];
        Token token;
        token.load(a, item, length, kv_head);
        Softmax softmax;
        softmax.begin();
        float slopes[2] = {0, 0};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = lane / 4 + 8 * r;
            if (row >= GROUP) continue;
            if (HAS_SLOPES) slopes[r] = a.slopes[kv_head * GROUP + row] * LOG2_E;
            if (HAS_SINKS && place == item.first_item) {  // a score that one part has seen before all keys
                softmax.top[r] = a.sinks[kv_head * GROUP + row] * LOG2_E;
                softmax.mass[r] = lane % 4 == 0;
            }
        }
        for (int key = item.first_key; key < item.end_key; key += KEYS, ++tile) {
            const int stage = tile % STAGES;
            const u32 at = ring + stage * STAGE_BYTES + head * HEAD_BYTES;
            wait(full + stage * 8, tile / STAGES & 1);
            if (key + KEYS >= length) complete(at, token, length - key);
            softmax.add(a, token, slopes, at, key, length);
            __syncwarp();
            if (lane == 0) arrive(free + stage * 8);
        }
        softmax.end();
        if (item.num_stretches > 1) {
            softmax.leave(a, place, kv_head);
            const int first_share = share - (place - item.first_item);  // of those whose last stretch goes on, one each
            if (!is_last(a.arrivals + first_share * NUM_KV_HEADS + kv_head, item.num_stretches)) continue;
            softmax.put_together(a, item.first_item, item.num_stretches, kv_head);
        }
        softmax.write(a, item.sequence, kv_head);
    }
}

extern "C" __global__ void __launch_bounds__((HEADS + 1) * 32, PROGRAMS) hopper_decode(const __grid_constant__ Arguments a) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[2 * STAGES];
    const u32 ring = (shared_address(unaligned) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), free = full + STAGES * 8;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
    const int share = blockIdx.x / BUNDLES, first_head = blockIdx.x % BUNDLES * HEADS;
    if (a.is_first) asm volatile("griddepcontrol.wait;" ::: "memory");
    const int place = a.shares[share * 2], end = a.shares[share * 2 + 1];
    if (threadIdx.x == HEADS * 32) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(a.boxes));
        for (int i = 0; i < STAGES; ++i) init_barrier(full + i * 8, 1), init_barrier(free + i * 8, HEADS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == HEADS) bring(a, ring, full, free, place, end, first_head * PANELS);
    else attend(a, ring, full, free, share, place, end, first_head + warp, warp);
}
