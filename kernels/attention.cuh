// What kernels of attention for sm_90 share: weights as powers of two.
#pragma once

#include "hopper.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
#define NONE __int_as_float(0xff800000)  // minus infinity

__device__ constexpr int pow2(int n) { return n <= 1 ? 1 : 2 * pow2((n + 1) / 2); }  // the next from n on

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Of one of the two rows that a thread has some of, after a product: four neighbours have all of it.
template <int N> __device__ __forceinline__ float most_of_row(const float (&scores)[N], int r) {
    float most = scores[2 * r];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) most = fmaxf(most, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    return fmaxf(most, __shfl_xor_sync(~0u, most, 2));
}
