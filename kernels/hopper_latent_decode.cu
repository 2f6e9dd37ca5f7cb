// Latent attention of one new token a sequence for sm_90a; contract and arguments: hopper_latent.py, which compiles this
// with what hopper_latent.cuh tells. A program takes a share of all latents: stretches of one sequence after another.

#include "hopper_latent.cuh"

struct Arguments {
    Tensors tensors;
    const int *items, *shares;
};

struct Stretches {
    const int* items;
    int index, end;

    __device__ __forceinline__ bool next(Item& item) {
        if (index >= end) return false;
        const int *from = items + index * 5, num_stretches = from[4];
        item = {from[0], from[0], 1, from[1], from[2], from[2], num_stretches == 1 ? -1 : index};
        ++index;
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(4 * WARPGROUP, 1) hopper_latent_decode(const __grid_constant__ Arguments a) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    const int* share = a.shares + blockIdx.x / HEAD_TILES * 2;
    attend(a.tensors, Stretches{a.items, share[0], share[1]}, blockIdx.x % HEAD_TILES);
}
