// A linear layer of many tokens for sm_90a; contract and arguments: hopper_matmul.py, which compiles this with
//   T_NAME ("bf16" or "f16"), TOKENS of a tile, STAGES, SHARERS and PARTS: programs of a cluster, that share tokens and
//   num_in; LAG: stages by which one warpgroup is behind; TURNS: in which a tile's results leave; GATED, HAS_BIAS.
//
// A program takes tile after tile: 128 rows of the matrix, where gated 64 of each half, by some tokens. Two warpgroups
// multiply 64 rows each with all of them; one thread brings both operands through a ring of stages. Programs that take
// neighbouring rows bring a share of the tokens each, for all of them. Results turn from rows to tokens on their way to
// shared memory, from where they leave as boxes. One warpgroup is behind the other, so that it has the tensor cores while
// that one's results leave. Where there are PARTS a program takes one tile, and adds up the sums of some tokens.

#include "hopper.cuh"

constexpr int ROWS = 128, WARPGROUP = 128, DEPTH = 64;  // DEPTH: of num_in, 128 bytes, in a stage
constexpr int MATRIX_BYTES = ROWS * 128, STAGE_BYTES = MATRIX_BYTES + TOKENS * 128;
constexpr int SHARE = TOKENS / SHARERS, CLUSTER = SHARERS * PARTS;
constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS, COLUMNS = OUT_ROWS / 2;  // results of a tile, of a warpgroup
constexpr int OWN = TOKENS / PARTS, NUM_RESULTS = OWN / 4 / (1 + GATED);  // tokens that it finishes; of a thread, by twos
constexpr int OUT_TOKENS = OWN / TURNS, OUT_BYTES = OUT_TOKENS * COLUMNS * 2;  // that leave at once
constexpr int PART_BYTES = OWN * ROWS * 4;  // of sums, from one program to another

struct Arguments {
    // Tensor maps: of the matrix as [num_out / 8, halves, 8, num_in] in boxes of 128 rows, of tokens in boxes SHARE x 64, of
    // results in boxes OUT_TOKENS x COLUMNS.
    alignas(64) char matrix[128], tokens[128], out[128];
    const char* bias;
    int num_in, num_out, num_tokens;
    int across;  // tiles of tokens that are gone through for some rows of the matrix before the next rows
};

struct Tile {
    int first_out, first_token;
};

struct Steps {  // of DEPTH, of this program
    int first, num;
};

// Tiles that are computed at the same time share as many rows and tokens as may be, so that they come from the L2 cache.
struct Tiles {
    int across, num_token_tiles, num_row_tiles;
    __device__ __forceinline__ Tiles(const Arguments& a)
        : across(a.across),
          num_token_tiles((a.num_tokens + TOKENS - 1) / TOKENS),
          num_row_tiles((a.num_out + OUT_ROWS * SHARERS - 1) / (OUT_ROWS * SHARERS)) {}
    __device__ __forceinline__ int num() const { return num_token_tiles * num_row_tiles; }
    __device__ __forceinline__ Tile at(int index) const {
        const int band = index / (across * num_row_tiles), rest = index % (across * num_row_tiles);
        const int width = min(across, num_token_tiles - band * across);
        return {(rest / width * SHARERS + (int)blockIdx.x % SHARERS) * OUT_ROWS,
                (band * across + rest % width) * TOKENS};
    }
};

__device__ __forceinline__ void copy_rows(u32 to, const char* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %4}], [%5];"
        ::"r"(to), "l"(map), "r"(column), "r"(0), "r"(row / 8), "r"(barrier) : "memory");
}
// To the same place of every program that shares them, and its barrier there.
__device__ __forceinline__ void copy_tokens(u32 to, const char* map, int column, int token, u32 barrier) {
    if (SHARERS == 1) return copy_box(to, map, column, token, barrier);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(token), "r"(barrier),
        "h"((short)(((1 << SHARERS) - 1) << blockIdx.x % CLUSTER / SHARERS * SHARERS)) : "memory");
}

struct Ring {
    u32 stages, full, free;
    __device__ __forceinline__ u32 at(int n) const { return stages + n % STAGES * STAGE_BYTES; }
    __device__ __forceinline__ u32 full_at(int n) const { return full + n % STAGES * 8; }
    __device__ __forceinline__ u32 free_at(int n) const { return free + n % STAGES * 8; }
};

__device__ __forceinline__ void bring(const Arguments& a, const Ring& ring, const Tiles& tiles, Steps steps) {
    const int rank = blockIdx.x % SHARERS;
    const auto rows = [&](int n, int step, Tile tile) {
        expect_bytes(ring.full_at(n), STAGE_BYTES);
        copy_rows(ring.at(n), a.matrix, (steps.first + step) * DEPTH, tile.first_out, ring.full_at(n));
    };
    const auto tokens = [&](int n, int step, Tile tile) {
        copy_tokens(ring.at(n) + MATRIX_BYTES + rank * SHARE * 128, a.tokens, (steps.first + step) * DEPTH,
                    tile.first_token + rank * SHARE, ring.full_at(n));
    };
    int n = 0, step = min(STAGES, steps.num);
    // The first rows are on their way before the kernel that makes the tokens is done.
    const Tile first = tiles.at(blockIdx.x / CLUSTER);
    for (int i = 0; i < step; ++i) rows(i, i, first);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (; n < step; ++n) tokens(n, n, first);
    for (int i = blockIdx.x / CLUSTER; i < tiles.num(); i += gridDim.x / CLUSTER) {
        const Tile tile = tiles.at(i);
        for (; step < steps.num; ++step, ++n) {
            wait(ring.free_at(n), n / STAGES & 1 ^ 1);
            rows(n, step, tile);
            tokens(n, step, tile);
        }
        step = 0;
    }
}

// A stage is free when both warpgroups of all that share it are done, as each writes to all.
__device__ __forceinline__ void release(u32 barrier, int thread) {
    if (SHARERS == 1) {
        if (thread == 0) arrive(barrier);
    } else if (thread < SHARERS) {
        arrive_at(barrier, blockIdx.x % CLUSTER / SHARERS * SHARERS + thread);
    }
}

// Sums of 64 rows, `n` stages after the first.
__device__ __forceinline__ void multiply_tile(float (&sums)[TOKENS / 2], const Ring& ring, int num_steps, int& n) {
    const int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
    for (int step = 0; step < num_steps; ++step, ++n) {
        wait(ring.full_at(n), n / STAGES & 1);
        const u64 rows = descriptor(ring.at(n) + warpgroup * (MATRIX_BYTES / 2), 0);
        const u64 tokens = descriptor(ring.at(n) + MATRIX_BYTES, 0);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_shared(sums, rows + k * 2, tokens + k * 2, step > 0 || k > 0);
        commit_products();
        wait_products<1>();
        if (step > 0) release(ring.free_at(n - 1), thread);
        if (LAG && n == LAG && warpgroup == 0) arrive_named(3, 2 * WARPGROUP);
    }
    wait_products<0>();
    hold(sums);
    release(ring.free_at(n - 1), thread);
}

__device__ __forceinline__ float bias_at(const Arguments& a, int out) { return from_T(((const unsigned short*)a.bias)[out]); }

// Each program sends each other one of its parts that one's tokens' sums, as threads have them, and adds up what it gets.
// The first sums are those of its own tokens then.
__device__ __forceinline__ void exchange(float (&sums)[TOKENS / 2], u32 ring, u32 arrived) {
    const int sharer = blockIdx.x % SHARERS, part = blockIdx.x % CLUSTER / SHARERS;
    const auto slot = [&](int other, int me) { return ring + (other - (other > me)) * PART_BYTES; };
    float own[OWN / 2];
    sync_named(3, 2 * WARPGROUP);  // both are done with the ring, where sums go now
#pragma unroll
    for (int to = 0; to < PARTS; ++to)
#pragma unroll
        for (int i = 0; i < OWN / 2; i += 4) {
            const float* x = sums + to * (OWN / 2) + i;
            if (to == part) {
#pragma unroll
                for (int k = 0; k < 4; ++k) own[i + k] = x[k];
            } else {
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                                 slot(to, part) + (i / 4 * 2 * WARPGROUP + (int)threadIdx.x) * 16),
                             "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
            }
        }
    fence_async();
    sync_cluster();  // all are done with their rings
    if (threadIdx.x == 0) {
        expect_bytes(arrived, (PARTS - 1) * PART_BYTES);
        for (int i = 1; i < PARTS; ++i) {
            const int to = (part + i) % PARTS;
            copy_to(to * SHARERS + sharer, slot(part, to) + (PARTS - 1) * PART_BYTES, slot(to, part), PART_BYTES, arrived);
        }
    }
    wait(arrived, 0);
#pragma unroll 1
    for (int from = 0; from < PARTS - 1; ++from)
#pragma unroll
        for (int i = 0; i < OWN / 2; i += 4) {
            float4 x;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                         : "r"(ring + (PARTS - 1 + from) * PART_BYTES + (i / 4 * 2 * WARPGROUP + (int)threadIdx.x) * 16) : "memory");
            own[i] += x.x, own[i + 1] += x.y, own[i + 2] += x.z, own[i + 3] += x.w;
        }
#pragma unroll
    for (int i = 0; i < OWN / 2; ++i) sums[i] = own[i];
}

// Sums to results, two tokens in each: of a row and the one 8 after it, which where gated are a gate and what it is for.
__device__ __forceinline__ void finish(
    const Arguments& a, const float (&sums)[TOKENS / 2], u32 (&results)[NUM_RESULTS], int first_out) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float bias[2] = {};
    if (HAS_BIAS) {
        const int out = first_out + warp * (GATED ? 8 : 16) + lane / 4, other = GATED ? a.num_out + out : out + 8;
        if (out < a.num_out) bias[0] = bias_at(a, out);
        if (other < a.num_out * (1 + GATED)) bias[1] = bias_at(a, other);
    }
#pragma unroll
    for (int j = 0; j < OWN / 8; ++j) {
        const float* four = sums + j * 4;
        if (GATED) {
            float y[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float gate = four[i] + bias[0];
                y[i] = gate * (four[2 + i] + bias[1]) * inverse(1 + __expf(-gate));
            }
            results[j] = packed(y[0], y[1]);
        } else {
            results[2 * j] = packed(four[0] + bias[0], four[1] + bias[0]);
            results[2 * j + 1] = packed(four[2] + bias[1], four[3] + bias[1]);
        }
    }
}

// Through `staging`, in turns.
__device__ __forceinline__ void send(
    const Arguments& a, const u32 (&results)[NUM_RESULTS], u32 staging, Tile tile) {
    constexpr int EACH = NUM_RESULTS / TURNS, AT_ONCE = GATED ? 32 : 16;  // tokens of four matrices
    const int warpgroup = threadIdx.x / WARPGROUP, warp = threadIdx.x % WARPGROUP / 32, lane = threadIdx.x % 32;
    const bool sends = threadIdx.x % WARPGROUP == 0;
    // Of four matrices of 8 x 8 each lane has the address of a row: a token's 8 results.
    const int token = GATED ? lane : lane / 16 * 8 + lane % 8;
    const u32 to = staging + (GATED ? token * 64 + ((warp ^ token / 2 % 4) << 4) : swizzled(token, warp * 2 + lane / 8 % 2));
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        if (sends) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        sync_named(1 + warpgroup, WARPGROUP);
#pragma unroll
        for (int i = 0; i < EACH; i += 4) store_turned(to + i / 4 * AT_ONCE * COLUMNS * 2, results + turn * EACH + i);
        fence_async();
        sync_named(1 + warpgroup, WARPGROUP);
        if (sends) {
            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(a.out),
                         "r"(tile.first_out + warpgroup * COLUMNS), "r"(tile.first_token + turn * OUT_TOKENS), "r"(staging)
                         : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    }
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) hopper_matmul(const __grid_constant__ Arguments a) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[2 * STAGES + 1];
    const u32 out = (shared_address(unaligned) + 1023) & ~1023u;
    const Ring ring = {out + 2 * OUT_BYTES, shared_address(barriers), shared_address(barriers + STAGES)};
    const u32 arrived = shared_address(barriers + 2 * STAGES);
    const Tiles tiles(a);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(ring.full_at(i), 1);
            init_barrier(ring.free_at(i), 2 * SHARERS);
        }
        init_barrier(arrived, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (CLUSTER > 1) meet_cluster();
    __syncthreads();
    const int num_steps = (a.num_in + DEPTH - 1) / DEPTH, part = blockIdx.x % CLUSTER / SHARERS;
    const Steps steps = {num_steps * part / PARTS, num_steps * (part + 1) / PARTS - num_steps * part / PARTS};
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 2 * WARPGROUP) bring(a, ring, tiles, steps);
        if (PARTS > 1) sync_cluster();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        if (LAG && warpgroup == 1) sync_named(3, 2 * WARPGROUP);
        int n = 0;
        for (int i = blockIdx.x / CLUSTER; i < tiles.num(); i += gridDim.x / CLUSTER) {
            Tile tile = tiles.at(i);
            float sums[TOKENS / 2];
            u32 results[NUM_RESULTS];
            multiply_tile(sums, ring, steps.num, n);
            if (PARTS > 1) exchange(sums, ring.stages, arrived);
            finish(a, sums, results, tile.first_out);
            tile.first_token += part * OWN;
            send(a, results, out + warpgroup * OUT_BYTES, tile);
        }
        if (threadIdx.x % WARPGROUP == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    if (CLUSTER > 1) meet_cluster();  // nobody leaves before what others send it has arrived
}
