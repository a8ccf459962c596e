/* What a kernel's source includes: CUDA on a device, kernels/emulate.h on the host. The words that
 * CUDA has no portable form of:
 *   SHARED(float, tile, 256);   a shared array; emulated accesses are checked for bounds and races
 *   shared_ptr_of(float)        the type of a pointer into one, for __device__ functions
 *   LAUNCH((k_name<4>), grid, block, gpu, args...);   then TRY(gpu_launched(gpu, "k_name"))
 * Sums use fmaf explicitly and the files are compiled with -fmad=false, so that two instances of
 * one template round alike. No floating-point atomics anywhere. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_DEVICE_CUH
#define PMPD_KERNELS_DEVICE_CUH

#include <stdint.h>

extern "C" {
#include "core/tensor.h"
}
#include "kernels/gpu.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED(type, name, count) __shared__ type name[count]
#define shared_ptr_of(type) type *
#define LAUNCH(kernel, grid, block, gpu, ...) \
    kernel<<<(grid), (block), 0, (cudaStream_t)(gpu)->stream>>>(__VA_ARGS__)

static __device__ __forceinline__ float half_to_float(uint16_t h)
{
    return __half2float(__ushort_as_half(h));
}
static __device__ __forceinline__ uint16_t float_to_half(float f)
{
    return __half_as_ushort(__float2half_rn(f));
}
#else
#include "kernels/emulate.h"

static inline float half_to_float(uint16_t h)
{
    return f16_to_f32(h);
}
static inline uint16_t float_to_half(float f)
{
    return f32_to_f16(f);
}
#endif

#define WARP 32
#define ALL_LANES 0xffffffffu

static __device__ __forceinline__ float bfloat_to_float(uint16_t b)
{
    union {
        uint32_t u;
        float f;
    } v;
    v.u = (uint32_t)b << 16;
    return v.f;
}

/* The sum over a warp, the same bits in every lane: a butterfly adds pairs in a fixed order. */
static __device__ __forceinline__ float warp_sum(float v)
{
    for (int d = WARP / 2; d > 0; d /= 2) {
        v += __shfl_xor_sync(ALL_LANES, v, d);
    }
    return v;
}

static __device__ __forceinline__ float warp_max(float v)
{
    for (int d = WARP / 2; d > 0; d /= 2) {
        v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, d));
    }
    return v;
}

#endif
