// A linear layer of some tokens for sm_90a; contract and arguments: hopper_linear.py, which compiles this with
//   T_NAME ("bf16" or "f16"), TOKENS of a tile, STAGES, PARTS: programs of a cluster, that share num_in; GATED, HAS_BIAS.
//
// Two warpgroups multiply 64 rows of the matrix each with a tile of tokens: rows are where tensor cores have 64 of them.
// One thread brings both through a ring of stages; the matrix's are on their way before the kernel that makes the tokens
// is done. At the end sums lie in shared memory by token, and each program of a cluster gets all parts of some tokens.

#include "hopper.cuh"

constexpr int PANEL = 64 * 128, ROWS = 128, WARPGROUP = 128, DEPTH = 64;  // DEPTH: of num_in, 128 bytes, in a stage
constexpr int MATRIX_BYTES = 2 * PANEL, STAGE_BYTES = MATRIX_BYTES + TOKENS * 128;
constexpr int STRIDE = ROWS + 4;  // floats of a token's sums: neighbours lie in different banks

struct Arguments {
    alignas(64) char matrix[128], tokens[128];  // tensor maps, of boxes 64 x 64 and TOKENS x 64
    const char* bias;
    char* out;
    int num_in, num_out, num_tokens;
};

struct Steps {  // of DEPTH, of this program
    int first, num;
};

__device__ __forceinline__ void bring(const Arguments& a, u32 ring, u32 full, u32 free, Steps steps, int row, int up_row, int token) {
    const auto matrix = [&](int t) {
        const u32 stage = ring + t % STAGES * STAGE_BYTES, barrier = full + t % STAGES * 8;
        expect_bytes(barrier, STAGE_BYTES);
        copy_box(stage, a.matrix, (steps.first + t) * DEPTH, row, barrier);
        copy_box(stage + PANEL, a.matrix, (steps.first + t) * DEPTH, up_row, barrier);
    };
    const auto tokens = [&](int t) {
        copy_box(ring + t % STAGES * STAGE_BYTES + MATRIX_BYTES, a.tokens, (steps.first + t) * DEPTH, token, full + t % STAGES * 8);
    };
    const int early = min(STAGES, steps.num);
    for (int t = 0; t < early; ++t) matrix(t);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int t = 0; t < early; ++t) tokens(t);
    for (int t = early; t < steps.num; ++t) {
        wait(free + t % STAGES * 8, t / STAGES & 1 ^ 1);
        matrix(t);
        tokens(t);
    }
}

__device__ __forceinline__ void multiply_all(
    float (&sums)[TOKENS / 2], u32 ring, u32 full, u32 free, int num_steps, int warpgroup) {
    const bool releases = threadIdx.x % 32 == 0;  // once a warp
    for (int t = 0; t < num_steps; ++t) {
        const u32 stage = ring + t % STAGES * STAGE_BYTES;
        wait(full + t % STAGES * 8, t / STAGES & 1);
        const u64 rows = descriptor(stage + warpgroup * PANEL, 0), tokens = descriptor(stage + MATRIX_BYTES, 0);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_shared(sums, rows + k * 2, tokens + k * 2, t > 0 || k > 0);
        commit_products();
        wait_products<1>();
        if (t > 0 && releases) arrive(free + (t - 1) % STAGES * 8);
    }
    wait_products<0>();
    hold(sums);
}

__device__ __forceinline__ void add_bias(float (&z)[8], const char* bias) {
    const uint4 eight = *(const uint4*)bias;
    const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) z[i] += from_T(pairs[i / 2] >> i % 2 * 16);
}
// Where sums of tokens lie in shared memory: this program's of all, and after them those of its own share of the tokens
// from the cluster's other programs, one after another.
struct Sums {
    u32 own, others;
    int rank, share;
    __device__ __forceinline__ u32 of(int part, int token) const {
        if (part == rank) return own + token * (STRIDE * 4);
        return others + ((part - (part > rank)) * share + token - rank * share) * (STRIDE * 4);
    }
};

// Each program sends each other one its part of their tokens' sums.
__device__ __forceinline__ void exchange(const Sums& sums, u32 arrived) {
    const int num_bytes = sums.share * STRIDE * 4;
    expect_bytes(arrived, (PARTS - 1) * num_bytes);
    for (int i = 1; i < PARTS; ++i) {
        const int to = (sums.rank + i) % PARTS;
        const u32 slot = sums.others + (sums.rank - (sums.rank > to)) * num_bytes;
        u32 remote_slot, remote_barrier;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_slot) : "r"(slot), "r"(to));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(arrived), "r"(to));
        asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         remote_slot), "r"(sums.own + to * num_bytes), "r"(num_bytes), "r"(remote_barrier) : "memory");
    }
}

// Eight sums of a token, added up in the order of parts.
__device__ __forceinline__ void add_parts(float (&z)[8], const Sums& sums, int token, int row) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float4 x;
            asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                         : "r"(sums.of(part, token) + (row + i) * 4));
            z[i] += x.x, z[i + 1] += x.y, z[i + 2] += x.z, z[i + 3] += x.w;
        }
}

__device__ __forceinline__ void write(const Arguments& a, const Sums& sums, int first_out, int first_token, int num_tokens) {
    constexpr int ACROSS = (GATED ? 64 : ROWS) / 8;  // eight outputs a thread
    const int end = min(num_tokens, (sums.rank + 1) * sums.share);
    for (int i = sums.rank * sums.share * ACROSS + threadIdx.x; i < end * ACROSS; i += 2 * WARPGROUP) {
        const int token = i / ACROSS, row = i % ACROSS * 8, out = first_out + row;
        if (out >= a.num_out) continue;
        float z[8] = {};
        add_parts(z, sums, token, row);
        if (HAS_BIAS) add_bias(z, a.bias + out * 2);
        if (GATED) {
            float up[8] = {};
            add_parts(up, sums, token, 64 + row);
            if (HAS_BIAS) add_bias(up, a.bias + (a.num_out + out) * 2);
#pragma unroll
            for (int k = 0; k < 8; ++k) z[k] *= up[k] / (1 + __expf(-z[k]));
        }
        const long long place = (long long)(first_token + token) * a.num_out + out;
        *(uint4*)(a.out + place * 2) =
            make_uint4(packed(z[0], z[1]), packed(z[2], z[3]), packed(z[4], z[5]), packed(z[6], z[7]));
    }
}

extern "C" __global__ void __launch_bounds__(2 * WARPGROUP + 32)
    hopper_linear(const __grid_constant__ Arguments a) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[2 * STAGES + 1];
    const u32 ring = (shared_address(unaligned) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), free = full + STAGES * 8, arrived = free + STAGES * 8;
    const int num_token_tiles = (a.num_tokens + TOKENS - 1) / TOKENS;
    const int rank = blockIdx.x % PARTS, tile = blockIdx.x / PARTS / num_token_tiles;
    const int first_token = blockIdx.x / PARTS % num_token_tiles * TOKENS;
    const int row = tile * (GATED ? 64 : ROWS), up_row = row + (GATED ? a.num_out : 64);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(full + i * 8, 1);
            init_barrier(free + i * 8, 8);  // warps
        }
        init_barrier(arrived, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int num_steps = (a.num_in + DEPTH - 1) / DEPTH;
    const Steps steps = {num_steps * rank / PARTS, num_steps * (rank + 1) / PARTS - num_steps * rank / PARTS};
    const int warpgroup = threadIdx.x / WARPGROUP;
    if (warpgroup == 2) {
        if (threadIdx.x % 32 == 0) bring(a, ring, full, free, steps, row, up_row, first_token);
        __syncwarp();
    } else {
        float parts[TOKENS / 2];
        multiply_all(parts, ring, full, free, steps.num, warpgroup);
        sync_named(1, 2 * WARPGROUP);  // both are done with the ring, where sums go now
        const int thread = threadIdx.x % WARPGROUP;
        const int my_row = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) {
            const int token = i / 4 * 8 + thread % 4 * 2 + i % 2;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(ring + (token * STRIDE + my_row + i / 2 % 2 * 8) * 4), "f"(parts[i])
                         : "memory");
        }
        if (PARTS > 1) fence_async();  // they are to be copied
        sync_named(1, 2 * WARPGROUP);
    }
    const int num_tokens = min(a.num_tokens - first_token, TOKENS), share = (num_tokens + PARTS - 1) / PARTS;
    const Sums sums = {ring, ring + TOKENS * STRIDE * 4, rank, share};
    if (PARTS > 1) {
        sync_cluster();  // all are done with their rings
        if (threadIdx.x == 0) exchange(sums, arrived);
    }
    if (warpgroup < 2) {
        if (PARTS > 1) wait(arrived, 0);
        write(a, sums, row, first_token, num_tokens);
    }
    if (PARTS > 1) sync_cluster();  // nobody leaves before what it sent has arrived
}
