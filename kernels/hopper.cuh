// What kernels for sm_90a share: barriers, and tensor cores that read shared memory. T_NAME is bf16 or f16.
#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- barriers in shared memory: 64 bits each ----

__device__ __forceinline__ void init_barrier(u32 barrier, int num) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(num));
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// At the same barrier of the program `rank` of a cluster.
__device__ __forceinline__ void arrive_at(u32 barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory");
}
__device__ __forceinline__ void expect_bytes(u32 barrier, int num) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(num) : "memory");
}
__device__ __forceinline__ void copy_box(u32 to, const char* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void sync_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void meet_cluster() {  // as sync_cluster, without order between memory accesses
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What ordinary stores and cp.async wrote is seen by tensor cores and bulk copies.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Named barriers of threads: some of a program's warps.
__device__ __forceinline__ void sync_named(int name, int num) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(num) : "memory");
}
__device__ __forceinline__ void arrive_named(int name, int num) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(num) : "memory");
}

// ---- tensor cores: operands lie in panels of 128-byte rows, whose 16-byte chunks are swapped by row % 8 ----

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// `panel_bytes` from 64 columns to the next 64, where columns are contiguous; eight rows are 1024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address, int panel_bytes) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(panel_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {  // in registers, before what comes next
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F16(x, i) F4(x, i), F4(x, i + 4), F4(x, i + 8), F4(x, i + 12)
#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R96 R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define R128 R96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d [64, N] = or += a [64, 16] b [N, 16]^T, both in shared memory.
#define MULTIPLY_SHARED(N, REGISTERS, A, B, ADDS, ...)                                                            \
    __device__ __forceinline__ void multiply_shared(float (&d)[N / 2], u64 a, u64 b, int adds) {                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N      \
                     "k16.f32." T_NAME "." T_NAME " {" REGISTERS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"          \
                     : __VA_ARGS__ : "l"(a), "l"(b), "r"(adds));                                                  \
    }
MULTIPLY_SHARED(16, R8, 8, 9, 10, F4(d, 0), F4(d, 4))
MULTIPLY_SHARED(32, R16, 16, 17, 18, F16(d, 0))
MULTIPLY_SHARED(64, R32, 32, 33, 34, F16(d, 0), F16(d, 16))
MULTIPLY_SHARED(128, R64, 64, 65, 66, F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48))
MULTIPLY_SHARED(192, R96, 96, 97, 98, F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48), F16(d, 64), F16(d, 80))
MULTIPLY_SHARED(256, R128, 128, 129, 130, F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48), F16(d, 64), F16(d, 80),
                F16(d, 96), F16(d, 112))

// d [64, N] += a [64, 16] b [16, N]: a in registers, columns of b contiguous.
__device__ __forceinline__ void multiply(float (&d)[32], const u32* a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." T_NAME "." T_NAME " {" R32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
        : F16(d, 0), F16(d, 16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply(float (&d)[64], const u32* a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." T_NAME "." T_NAME " {" R64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d [64, N] += a [64, 16] b [16, N]: both in shared memory, columns of b contiguous.
__device__ __forceinline__ void multiply_columns(float (&d)[64], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." T_NAME "." T_NAME " {" R64 "}, %64, %65, 1, 1, 1, 0, 1;"
        : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48) : "l"(a), "l"(b));
}

__device__ __forceinline__ u32 packed(float low, float high) {
    u32 both;
    asm("cvt.rn." T_NAME "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ float from_T(unsigned short x) {
    float y;
    asm("{\n.reg .b16 h;\nmov.b16 h, %1;\ncvt.f32." T_NAME " %0, h;\n}" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Four matrices of 8 x 8, of which each lane has two neighbours of a row, columns first; a lane has a column's address.
__device__ __forceinline__ void store_turned(u32 to, const u32* x) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3]) : "memory");
}
