// Attention of one new token a sequence, for few sequences, on sm_90; contract and arguments: cluster_decode.py, which
// compiles this with
//   T_NAME ("bf16" or "f16"), HEAD_DIM, NUM_KV_HEADS, GROUP, BLOCK_SIZE, HAS_CAP, HAS_WINDOW, HAS_SLOPES, HAS_SINKS,
//   KEPT_AS: 0 for T, 1 for f8e4m3, 2 for f8e5m2, 3 for int8; BLOCK_ROWS: BLOCK_SIZE and those that hold scales;
//   PARTS: programs of a cluster; NUM_THREADS of each.
//
// A cluster takes the query heads of one KV head, and each of its programs a stretch of the keys. Threads stand side by
// side along a key; those of different keys keep maxima and sums of their own, which are put together at the end: in a
// program, and then in the cluster's first.

#include "attention.cuh"

constexpr int NUM_WARPS = NUM_THREADS / 32, PASSES = 4;
constexpr int CHUNKS = HEAD_DIM / 8, ACROSS = pow2(CHUNKS);  // of 16 bytes, a thread each
constexpr int AT_ONCE = NUM_THREADS / ACROSS, TILE = AT_ONCE * PASSES;  // keys
constexpr int SLOT_STRIDE = NUM_KV_HEADS * HEAD_DIM, ELEMENTS = GROUP * HEAD_DIM;
constexpr bool IS_T = KEPT_AS == 0, HAS_SCALES = KEPT_AS == 3;
constexpr int ITEM_BYTES = IS_T ? 2 : 1;
template <bool> struct ChunkOf { using Type = uint4; };
template <> struct ChunkOf<false> { using Type = uint2; };
using Chunk = ChunkOf<IS_T>::Type;  // 8 numbers
struct Tile {
    Chunk chunks[PASSES];
    float scales[PASSES];  // of int8
};

struct Arguments {
    const char *q, *cache;
    char* out;
    const int *seq_lens, *block_table;
    const float *slopes, *sinks;
    long long q_stride, value_offset, table_stride;
    float scale, cap, value_scale;
    int window;
};

struct Part {  // of the sums, for each query head: relative to 2^top
    float top[GROUP], mass[GROUP], sums[ELEMENTS];
};

#define UNPACKED(name)                                                                                              \
    "{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32." name " %0, low;\ncvt.f32." name " %1, high;\n}"
__device__ __forceinline__ float2 unpacked(u32 both) {
    float2 x;
    asm(UNPACKED(T_NAME) : "=f"(x.x), "=f"(x.y) : "r"(both));
    return x;
}
__device__ __forceinline__ void unpack(float (&x)[8], const uint4& from) {
    const u32 pairs[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpacked(pairs[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}
// Of 8 bits each.
__device__ __forceinline__ float2 unpacked_bytes(unsigned short both) {
    if (HAS_SCALES) return make_float2((signed char)both, (signed char)(both >> 8));
    u32 halves;
    float2 x;
    if (KEPT_AS == 1)
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(both));
    else
        asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(both));
    asm(UNPACKED("f16") : "=f"(x.x), "=f"(x.y) : "r"(halves));
    return x;
}
__device__ __forceinline__ void unpack(float (&x)[8], const uint2& from) {
    const u32 words[2] = {from.x, from.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpacked_bytes((unsigned short)(words[i / 2] >> i % 2 * 16));
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}
// The weight of a part whose maximum is `top` beside one whose maximum is `most`.
__device__ __forceinline__ float share(float top, float most) { return top == NONE ? 0 : exp2_of(top - most); }

// A head's chunk of a key, or value, and what it is to be multiplied by.
__device__ __forceinline__ void fetch(
    Tile& tile, int pass, const char* head, const int* table, int key, int chunk, int kv_head) {
    const long long block = (long long)table[key / BLOCK_SIZE] * BLOCK_ROWS, slot = block + key % BLOCK_SIZE;
    tile.chunks[pass] = *(const Chunk*)(head + slot * (SLOT_STRIDE * ITEM_BYTES) + chunk * 8 * ITEM_BYTES);
    if (HAS_SCALES) {
        const char* scales = head - kv_head * HEAD_DIM + (block + BLOCK_SIZE) * SLOT_STRIDE;
        tile.scales[pass] = ((const float*)scales)[kv_head * BLOCK_SIZE + key % BLOCK_SIZE];
    }
}

// Keys, or values, first … first + TILE of a head as far as `end`, but not that at `skip`: where there are none, what was
// there stays.
__device__ __forceinline__ void load(
    Tile& tile, const char* head, const int* table, int first, int end, int kv_head, int skip = -1) {
    const int chunk = threadIdx.x % ACROSS, row = threadIdx.x / ACROSS;
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
        const int key = first + p * AT_ONCE + row;
        if (key < end && key != skip && chunk < CHUNKS) fetch(tile, p, head, table, key, chunk, kv_head);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) cluster_decode(const __grid_constant__ Arguments a) {
    __shared__ Part parts[PARTS];  // used in the cluster's first program
    __shared__ Part own[NUM_WARPS];
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");  // all have begun before one writes to another
    const int rank = blockIdx.x % PARTS, kv_head = blockIdx.x / PARTS % NUM_KV_HEADS;
    const int sequence = blockIdx.x / (PARTS * NUM_KV_HEADS);
    const int chunk = threadIdx.x % ACROSS, row = threadIdx.x / ACROSS;
    const int length = a.seq_lens[sequence], first_seen = HAS_WINDOW ? max(length - a.window, 0) : 0;
    const int stretch = ((length - first_seen + PARTS - 1) / PARTS + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    const int first = first_seen + rank * stretch, end = min(first + stretch, length);
    const char* key_head = a.cache + kv_head * HEAD_DIM * ITEM_BYTES;
    const char* value_head = key_head + a.value_offset * ITEM_BYTES;
    const int* table = a.block_table + sequence * a.table_stride;
    Tile keys = {}, values = {};
    // PERF: of all keys only the newest is made by the kernel before; the others need not wait for it.
    const int newest = length - 1;
    load(keys, key_head, table, first, end, kv_head, newest);
    load(values, value_head, table, first, end, kv_head, newest);
    asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
        if (first + p * AT_ONCE + row != newest || newest >= end || chunk >= CHUNKS) continue;
        fetch(keys, p, key_head, table, newest, chunk, kv_head);
        fetch(values, p, value_head, table, newest, chunk, kv_head);
    }
    float q[GROUP][8], sums[GROUP][8] = {}, top[GROUP], mass[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        uint4 x = make_uint4(0, 0, 0, 0);
        const long long place = sequence * a.q_stride + (kv_head * GROUP + g) * HEAD_DIM + chunk * 8;
        if (chunk < CHUNKS) x = *(const uint4*)(a.q + place * 2);
        unpack(q[g], x);
        top[g] = NONE, mass[g] = 0;
    }
    for (int key = first; key < end; key += TILE) {
        float scores[PASSES][GROUP];
#pragma unroll
        for (int p = 0; p < PASSES; ++p) {
            float k[8];
            unpack(k, keys.chunks[p]);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < 8; ++i) sum += k[i] * q[g][i];
                scores[p][g] = HAS_SCALES ? sum * keys.scales[p] : sum;
            }
        }
        load(keys, key_head, table, key + TILE, end, kv_head);
#pragma unroll
        for (int p = 0; p < PASSES; ++p)
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
#pragma unroll
                for (int far = ACROSS / 2; far > 0; far /= 2)
                    scores[p][g] += __shfl_xor_sync(~0u, scores[p][g], far);
                const int at = key + p * AT_ONCE + row;
                float score = scores[p][g] * a.scale;
                if (HAS_CAP) score = a.cap - 2 * a.cap / (1 + exp2_of(score));
                if (HAS_SLOPES) score += a.slopes[kv_head * GROUP + g] * LOG2_E * (at - length + 1);
                scores[p][g] = at < end ? score : NONE;
            }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float most = top[g];
#pragma unroll
            for (int p = 0; p < PASSES; ++p) most = fmaxf(most, scores[p][g]);
            const float decay = share(top[g], most);
            mass[g] *= decay;
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[g][i] *= decay;
            top[g] = most;
#pragma unroll
            for (int p = 0; p < PASSES; ++p) mass[g] += scores[p][g] = share(scores[p][g], most);
        }
#pragma unroll
        for (int p = 0; p < PASSES; ++p) {
            float v[8];
            unpack(v, values.chunks[p]);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                const float weight = HAS_SCALES ? scores[p][g] * values.scales[p] : scores[p][g];
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[g][i] += weight * v[i];
            }
        }
        load(values, value_head, table, key + TILE, end, kv_head);
    }
    // A warp's threads of different keys, then the program's warps, then the cluster's programs.
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int far = ACROSS; far < 32; far *= 2) {
            const float its_top = __shfl_xor_sync(~0u, top[g], far), its_mass = __shfl_xor_sync(~0u, mass[g], far);
            const float most = fmaxf(top[g], its_top), mine = share(top[g], most), its = share(its_top, most);
            mass[g] = mass[g] * mine + its_mass * its;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                sums[g][i] = sums[g][i] * mine + __shfl_xor_sync(~0u, sums[g][i], far) * its;
            top[g] = most;
        }
        if (threadIdx.x % 32 < CHUNKS) {
#pragma unroll
            for (int i = 0; i < 8; ++i) own[warp].sums[g * HEAD_DIM + chunk * 8 + i] = sums[g][i];
        }
        if (threadIdx.x % 32 == 0) own[warp].top[g] = top[g], own[warp].mass[g] = mass[g];
    }
    __syncthreads();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    u32 to;
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(to) : "r"(shared_address(&parts[rank])));
    for (int i = threadIdx.x; i < ELEMENTS; i += NUM_THREADS) {
        const int g = i / HEAD_DIM;
        float most = NONE, sum = 0, total = 0;
#pragma unroll
        for (int w = 0; w < NUM_WARPS; ++w) most = fmaxf(most, own[w].top[g]);
#pragma unroll
        for (int w = 0; w < NUM_WARPS; ++w) {
            const float its = share(own[w].top[g], most);
            sum += own[w].sums[i] * its, total += own[w].mass[g] * its;
        }
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to + (2 * GROUP + i) * 4), "f"(sum) : "memory");
        if (i % HEAD_DIM == 0) {
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to + g * 4), "f"(most) : "memory");
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to + (GROUP + g) * 4), "f"(total) : "memory");
        }
    }
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    if (rank > 0) return;
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    char* out = a.out + (long long)(sequence * NUM_KV_HEADS + kv_head) * (ELEMENTS * 2);
    for (int i = threadIdx.x * 2; i < ELEMENTS; i += NUM_THREADS * 2) {
        const int g = i / HEAD_DIM;
        const float sink = HAS_SINKS ? a.sinks[kv_head * GROUP + g] * LOG2_E : NONE;
        float most = sink, y = 0, z = 0, total;
#pragma unroll
        for (int r = 0; r < PARTS; ++r) most = fmaxf(most, parts[r].top[g]);
        total = share(sink, most);
#pragma unroll
        for (int r = 0; r < PARTS; ++r) {
            const float its = share(parts[r].top[g], most);
            y += parts[r].sums[i] * its, z += parts[r].sums[i + 1] * its, total += parts[r].mass[g] * its;
        }
        const float inverse = length > 0 ? 1 / total * a.value_scale : 0;
        *(u32*)(out + i * 2) = packed(y * inverse, z * inverse);
    }
}
