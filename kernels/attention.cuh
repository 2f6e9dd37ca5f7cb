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
