// What kernels of attention for sm_90 share: numbers in two formats, and weights as powers of two. T_NAME is bf16 or f16.

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr float LOG2_E = 1.4426950408889634f;
#define NONE __int_as_float(0xff800000)  // minus infinity

__device__ constexpr int pow2(int n) { return n <= 1 ? 1 : 2 * pow2((n + 1) / 2); }  // the next from n on

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 packed(float low, float high) {
    u32 both;
    asm("cvt.rn." T_NAME "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
