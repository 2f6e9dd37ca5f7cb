// A gated linear layer of many tokens for sm_90a; contract and arguments: hopper_gated.py, which compiles this with
//   T_NAME ("bf16" or "f16"), TOKENS of a tile, STAGES, HAS_BIAS.
//
// A program takes tile after tile: 128 rows of the matrix, 64 of each half, by some tokens. Two warpgroups
// multiply 64 rows each with all of them; one thread brings both operands through a ring of stages. Programs of a cluster
// take neighbouring rows, and bring a share of the tokens each, for all of them. Results turn from rows to tokens on their
// way to shared memory, from where they leave as boxes while the next tile is multiplied.
//
// Where tiles do not fill their rounds, the first of them, more than one a cluster, are shared out evenly along num_in:
// each cluster takes as many steps, of a tile and the next ("stream-K", Osama et al. 2023). Who has a tile's first steps
// adds what the cluster after it has summed of the rest.

#include "hopper.cuh"

constexpr int ROWS = 128, WARPGROUP = 128, DEPTH = 64;  // DEPTH: of num_in, 128 bytes, in a stage
constexpr int MATRIX_BYTES = ROWS * 128, STAGE_BYTES = MATRIX_BYTES + TOKENS * 128;
constexpr int CLUSTER = 2, SHARE = TOKENS / CLUSTER;
constexpr int OUT_ROWS = ROWS / 2, COLUMNS = OUT_ROWS / 2;  // results of a tile, of a warpgroup
constexpr int NUM_RESULTS = TOKENS / 8, OUT_BYTES = TOKENS * COLUMNS * 2;  // of a thread, two in each; of a warpgroup

struct Arguments {
    // Tensor maps: of the matrix as [num_out / 8, 2, 8, num_in] in boxes of 128 rows, of tokens in boxes SHARE x 64, of
    // results in boxes TOKENS x COLUMNS.
    alignas(64) char matrix[128], tokens[128], out[128];
    const char* bias;
    float4* parts;  // [programs, 2, TOKENS / 8, WARPGROUP]: sums of a tile's later steps
    int* are_there;  // [programs, 2]: zeros, which are left as zeros
    int num_in, num_out, num_tokens;
    int across;  // tiles of tokens that are gone through for some rows of the matrix before the next rows
    int num_shared;  // tiles that are shared out
};

struct Tile {
    int first_out, first_token;
};

// Tiles that are computed at the same time share as many rows and tokens as may be, so that they come from the L2 cache.
struct Tiles {
    int across, num_token_tiles, num_row_tiles;
    __device__ __forceinline__ Tiles(const Arguments& a)
        : across(a.across),
          num_token_tiles((a.num_tokens + TOKENS - 1) / TOKENS),
          num_row_tiles((a.num_out + OUT_ROWS * CLUSTER - 1) / (OUT_ROWS * CLUSTER)) {}
    __device__ __forceinline__ int num() const { return num_token_tiles * num_row_tiles; }
    __device__ __forceinline__ Tile at(int index) const {
        const int band = index / (across * num_row_tiles), rest = index % (across * num_row_tiles);
        const int width = min(across, num_token_tiles - band * across);
        return {(rest / width * CLUSTER + (int)blockIdx.x % CLUSTER) * OUT_ROWS,
                (band * across + rest % width) * TOKENS};
    }
};

struct Piece {
    int tile, begin, end;  // steps
};

// What a cluster computes: its share, then whole tiles.
struct Pieces {
    const Arguments& a;
    const int num_steps;
    int at;  // step, counted through all tiles
    __device__ __forceinline__ Pieces(const Arguments& a)
        : a(a), num_steps((a.num_in + DEPTH - 1) / DEPTH), at(share(blockIdx.x / CLUSTER)) {}
    __device__ __forceinline__ int share(int cluster) const {  // where that of a cluster begins
        return cluster * a.num_shared * num_steps / (int)(gridDim.x / CLUSTER);
    }
    __device__ __forceinline__ bool next(Piece& piece, int num_tiles) {
        const int cluster = blockIdx.x / CLUSTER, left = share(cluster + 1) - at;
        if (left == 0) at = (a.num_shared + cluster) * num_steps;
        piece = {at / num_steps, at % num_steps, num_steps};
        if (left > 0) piece.end = min(num_steps, piece.begin + left);
        at += left > 0 ? piece.end - piece.begin : (int)(gridDim.x / CLUSTER) * num_steps;
        return piece.tile < num_tiles;
    }
};

__device__ __forceinline__ void copy_rows(u32 to, const char* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %4}], [%5];"
        ::"r"(to), "l"(map), "r"(column), "r"(0), "r"(row / 8), "r"(barrier) : "memory");
}
// To the same place of every program of the cluster, and its barrier there.
__device__ __forceinline__ void copy_tokens(u32 to, const char* map, int column, int token, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(token), "r"(barrier),
        "h"((short)((1 << CLUSTER) - 1)) : "memory");
}

struct Ring {
    u32 stages, full, free;
    __device__ __forceinline__ u32 at(int n) const { return stages + n % STAGES * STAGE_BYTES; }
    __device__ __forceinline__ u32 full_at(int n) const { return full + n % STAGES * 8; }
    __device__ __forceinline__ u32 free_at(int n) const { return free + n % STAGES * 8; }
};

__device__ __forceinline__ void bring(const Arguments& a, const Ring& ring, const Tiles& tiles, Pieces pieces) {
    const int rank = blockIdx.x % CLUSTER;
    const auto rows = [&](int n, int step, Tile tile) {
        expect_bytes(ring.full_at(n), STAGE_BYTES);
        copy_rows(ring.at(n), a.matrix, step * DEPTH, tile.first_out, ring.full_at(n));
    };
    const auto tokens = [&](int n, int step, Tile tile) {
        copy_tokens(ring.at(n) + MATRIX_BYTES + rank * SHARE * 128, a.tokens, step * DEPTH,
                    tile.first_token + rank * SHARE, ring.full_at(n));
    };
    Piece piece;
    pieces.next(piece, tiles.num());
    // The first rows are on their way before the kernel that makes the tokens is done.
    const Tile first = tiles.at(piece.tile);
    const int early = min(STAGES, piece.end - piece.begin);
    for (int i = 0; i < early; ++i) rows(i, piece.begin + i, first);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = 0; i < early; ++i) tokens(i, piece.begin + i, first);
    piece.begin += early;
    int n = early;
    do {
        const Tile tile = tiles.at(piece.tile);
        for (int step = piece.begin; step < piece.end; ++step, ++n) {
            wait(ring.free_at(n), n / STAGES & 1 ^ 1);
            rows(n, step, tile);
            tokens(n, step, tile);
        }
    } while (pieces.next(piece, tiles.num()));
}

// A stage is free when both warpgroups of all programs are done with it, as each writes to all.
__device__ __forceinline__ void release(u32 barrier, int thread) {
    if (thread < CLUSTER) arrive_at(barrier, thread);
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
    }
    wait_products<0>();
    hold(sums);
    release(ring.free_at(n - 1), thread);
}

// Of a tile's later steps, for who has the first.
__device__ __forceinline__ void leave(const Arguments& a, const float (&sums)[TOKENS / 2]) {
    const int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP, place = blockIdx.x * 2 + warpgroup;
    float4* part = a.parts + (size_t)place * (TOKENS / 8) * WARPGROUP + thread;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i)
        __stcg(part + i * WARPGROUP, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    sync_named(1 + warpgroup, WARPGROUP);
    if (thread == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(a.are_there + place) : "memory");
}

__device__ __forceinline__ void add_rest(const Arguments& a, float (&sums)[TOKENS / 2]) {
    const int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
    const int place = (blockIdx.x + CLUSTER) * 2 + warpgroup;
    for (int is_there = 0; !is_there;)
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(is_there) : "l"(a.are_there + place) : "memory");
    sync_named(1 + warpgroup, WARPGROUP);
    if (thread == 0) a.are_there[place] = 0;
    const float4* part = a.parts + (size_t)place * (TOKENS / 8) * WARPGROUP + thread;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i) {
        const float4 more = __ldcg(part + i * WARPGROUP);
        sums[4 * i] += more.x, sums[4 * i + 1] += more.y, sums[4 * i + 2] += more.z, sums[4 * i + 3] += more.w;
    }
}

__device__ __forceinline__ float bias_at(const Arguments& a, int out) { return from_T(((const unsigned short*)a.bias)[out]); }

// Sums to results, two tokens in each: a thread has those of a gate, and of what it is for 8 rows after it.
__device__ __forceinline__ void finish(
    const Arguments& a, const float (&sums)[TOKENS / 2], u32 (&results)[NUM_RESULTS], int first_out) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float bias[2] = {};
    if (HAS_BIAS) {
        const int out = first_out + warp * 8 + lane / 4;
        if (out < a.num_out) bias[0] = bias_at(a, out), bias[1] = bias_at(a, a.num_out + out);
    }
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
        float y[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float gate = sums[j * 4 + i] + bias[0];
            y[i] = gate * inverse(1 + __expf(-gate)) * (sums[j * 4 + 2 + i] + bias[1]);
        }
        results[j] = packed(y[0], y[1]);
    }
}

// Through `staging`.
__device__ __forceinline__ void send(const Arguments& a, const u32 (&results)[NUM_RESULTS], u32 staging, Tile tile) {
    const int warpgroup = threadIdx.x / WARPGROUP, warp = threadIdx.x % WARPGROUP / 32, token = threadIdx.x % 32;
    const bool sends = threadIdx.x % WARPGROUP == 0;
    // Of four matrices of 8 x 8 each lane has the address of a row: a token's 8 results.
    const u32 to = staging + token * COLUMNS * 2 + ((warp ^ token / 2 % 4) << 4);
    if (sends) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    sync_named(1 + warpgroup, WARPGROUP);
#pragma unroll
    for (int i = 0; i < NUM_RESULTS; i += 4) store_turned(to + i * 8 * COLUMNS * 2, results + i);
    fence_async();
    sync_named(1 + warpgroup, WARPGROUP);
    if (sends) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(a.out),
                     "r"(tile.first_out + warpgroup * COLUMNS), "r"(tile.first_token), "r"(staging) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) hopper_gated(const __grid_constant__ Arguments a) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[2 * STAGES];
    const u32 out = (shared_address(unaligned) + 1023) & ~1023u;
    const Ring ring = {out + 2 * OUT_BYTES, shared_address(barriers), shared_address(barriers + STAGES)};
    const Tiles tiles(a);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(ring.full_at(i), 1);
            init_barrier(ring.free_at(i), 2 * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet_cluster();
    __syncthreads();
    Pieces pieces(a);
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 2 * WARPGROUP) bring(a, ring, tiles, pieces);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        int n = 0;
        for (Piece piece; pieces.next(piece, tiles.num());) {
            float sums[TOKENS / 2];
            multiply_tile(sums, ring, piece.end - piece.begin, n);
            if (piece.begin > 0) {
                leave(a, sums);
                continue;
            }
            if (piece.end < pieces.num_steps) add_rest(a, sums);
            const Tile tile = tiles.at(piece.tile);
            u32 results[NUM_RESULTS];
            finish(a, sums, results, tile.first_out);
            send(a, results, out + warpgroup * OUT_BYTES, tile);
        }
        if (threadIdx.x % WARPGROUP == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    meet_cluster();  // nobody leaves before what others send it has arrived
}
