/* The small operations of a layer: norms, rotary embedding, activations, the residual's sums, the
 * embedding's rows, K and V into the cache.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cuda_kernels.h"
#include "kernels/device.cuh"

enum { BLOCK = 256, N_WARPS = BLOCK / WARP };

/* The sum over a block, the same bits in every thread. parts: N_WARPS shared floats. */
static __device__ float block_sum(float v, shared_ptr_of(float) parts)
{
    v = warp_sum(v);
    __syncthreads(); /* parts may still be read from the last call */
    if (threadIdx.x % WARP == 0) {
        parts[(int)threadIdx.x / WARP] = v;
    }
    __syncthreads();
    float sum = parts[0];
    for (int i = 1; i < N_WARPS; i++) {
        sum += parts[i];
    }
    return sum;
}

/* One block per token. */
__global__ void k_norm(float *y, const float *x, const float *gain, const float *bias, int n,
                       float eps, bool layer)
{
    SHARED(float, parts, N_WARPS);
    const float *from = x + (size_t)blockIdx.x * (size_t)n;
    float *to = y + (size_t)blockIdx.x * (size_t)n, mean = 0, squares = 0;
    if (layer) {
        float sum = 0;
        for (int i = (int)threadIdx.x; i < n; i += BLOCK) {
            sum += from[i];
        }
        mean = block_sum(sum, parts) / (float)n;
    }
    for (int i = (int)threadIdx.x; i < n; i += BLOCK) {
        squares = fmaf(from[i] - mean, from[i] - mean, squares);
    }
    float inverse = 1.0f / sqrtf(block_sum(squares, parts) / (float)n + eps);
    for (int i = (int)threadIdx.x; i < n; i += BLOCK) {
        float v = (from[i] - mean) * inverse * gain[i];
        to[i] = bias ? v + bias[i] : v;
    }
}

/* One block per token and head; thread i turns the pair (i, i + half). */
__global__ void k_rope(float *x, const int32_t *pos, const float *cosines, const float *sines,
                       int half, int head_dim)
{
    float *v = x + ((size_t)blockIdx.y * (size_t)gridDim.x + (size_t)blockIdx.x) * (size_t)head_dim;
    size_t angle = (size_t)pos[blockIdx.y] * (size_t)half;
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        float a = v[i], b = v[i + half], c = cosines[angle + (size_t)i],
              s = sines[angle + (size_t)i];
        v[i] = fmaf(a, c, -(b * s));
        v[i + half] = fmaf(b, c, a * s);
    }
}

template <bool HALF>
__global__ void k_kv_append(void *cache, const float *from, const int32_t *slot,
                            const int32_t *kv_row, int n_rows, int head_dim)
{
    size_t head = blockIdx.x, n_heads = gridDim.x, tok = blockIdx.y;
    size_t to = (((size_t)slot[tok] * n_heads + head) * (size_t)n_rows + (size_t)kv_row[tok]) *
                (size_t)head_dim;
    const float *value = from + (tok * n_heads + head) * (size_t)head_dim;
    for (int i = (int)threadIdx.x; i < head_dim; i += (int)blockDim.x) {
        if (HALF) {
            ((uint16_t *)cache)[to + (size_t)i] = float_to_half(value[i]);
        } else {
            ((float *)cache)[to + (size_t)i] = value[i];
        }
    }
}

/* f32 in this order is the definition: gathered partial sums add up alike everywhere. */
__global__ void k_add_parts(float *x, const float *parts, const float *bias, int n_parts,
                            size_t count, int n)
{
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= count) {
        return;
    }
    float sum = parts[i];
    for (int p = 1; p < n_parts; p++) {
        sum += parts[(size_t)p * count + i];
    }
    if (bias) {
        sum += bias[i % (size_t)n];
    }
    x[i] += sum;
}

/* An id outside the table would read somebody else's memory: its row becomes NaN. */
template <int D>
__global__ void k_embed(float *x, const void *table, const int32_t *ids, int n_vocab, int n)
{
    int id = ids[blockIdx.x];
    float *to = x + (size_t)blockIdx.x * (size_t)n;
    for (int i = (int)threadIdx.x; i < n; i += BLOCK) {
        size_t at = (size_t)id * (size_t)n + (size_t)i;
        if (id < 0 || id >= n_vocab) {
            to[i] = __uint_as_float(0x7fc00000u);
        } else if (D == DT_F32) {
            to[i] = ((const float *)table)[at];
        } else if (D == DT_F16) {
            to[i] = half_to_float(((const uint16_t *)table)[at]);
        } else {
            to[i] = bfloat_to_float(((const uint16_t *)table)[at]);
        }
    }
}

template <int ACT> static __device__ __forceinline__ float activation_of(float v)
{
    if (ACT == ACT_SILU) {
        return v / (1.0f + expf(-v));
    }
    if (ACT == ACT_GELU_ERF) {
        return 0.5f * v * erfcf(-v * 0.70710678118654752f);
    }
    return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * fmaf(0.044715f * v * v, v, v)));
}

template <int ACT>
__global__ void k_activate(float *y, const float *gate, const float *up, size_t n)
{
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i < n) {
        float v = activation_of<ACT>(gate[i]);
        y[i] = up ? v * up[i] : v;
    }
}

/* One block per part of a row and token. */
__global__ void k_moments(float *out, const float *x, int n, struct cuda_cuts cuts)
{
    SHARED(float, parts, N_WARPS);
    int part = (int)blockIdx.x;
    const float *row = x + (size_t)blockIdx.y * (size_t)n + (size_t)cuts.at[part];
    int width = cuts.at[part + 1] - cuts.at[part];
    float sum = 0, squares = 0;
    for (int i = (int)threadIdx.x; i < width; i += BLOCK) {
        sum += row[i];
        squares = fmaf(row[i], row[i], squares);
    }
    sum = block_sum(sum, parts);
    squares = block_sum(squares, parts);
    if (threadIdx.x == 0) {
        float *to = out + 2 * ((size_t)blockIdx.y * (size_t)gridDim.x + (size_t)part);
        to[0] = sum;
        to[1] = squares;
    }
}

static unsigned blocks_for(size_t n)
{
    return (unsigned)((n + BLOCK - 1) / BLOCK);
}

enum status cuda_norm(struct gpu *g, float *y, const float *x, const float *gain, const float *bias,
                      int32_t n_tok, int32_t n, float eps, bool layer)
{
    LAUNCH(k_norm, (unsigned)n_tok, BLOCK, g, y, x, gain, bias, n, eps, layer);
    return gpu_launched(g, "k_norm");
}

enum status cuda_rope(struct gpu *g, float *x, const int32_t *pos, const float *cos,
                      const float *sin, int32_t rot_dim, int32_t n_tok, int32_t n_heads,
                      int32_t head_dim)
{
    dim3 grid((unsigned)n_heads, (unsigned)n_tok);
    int half = rot_dim / 2;
    LAUNCH(k_rope, grid, 64, g, x, pos, cos, sin, half, head_dim);
    return gpu_launched(g, "k_rope");
}

enum status cuda_kv_append(struct gpu *g, void *cache, enum dtype dtype, const float *from,
                           const int32_t *slot, const int32_t *kv_row, int32_t n_tok,
                           int32_t n_heads, int32_t n_rows, int32_t head_dim)
{
    dim3 grid((unsigned)n_heads, (unsigned)n_tok);
    if (dtype == DT_F16) {
        LAUNCH((k_kv_append<true>), grid, 64, g, cache, from, slot, kv_row, n_rows, head_dim);
    } else {
        LAUNCH((k_kv_append<false>), grid, 64, g, cache, from, slot, kv_row, n_rows, head_dim);
    }
    return gpu_launched(g, "k_kv_append");
}

enum status cuda_add_parts(struct gpu *g, float *x, const float *parts, const float *bias,
                           int32_t n_parts, int32_t n_tok, int32_t n)
{
    size_t count = (size_t)n_tok * (size_t)n;
    LAUNCH(k_add_parts, blocks_for(count), BLOCK, g, x, parts, bias, n_parts, count, n);
    return gpu_launched(g, "k_add_parts");
}

enum status cuda_moments(struct gpu *g, float *out, const float *x, int32_t n_tok, int32_t n,
                         const struct cuda_cuts *cuts)
{
    dim3 grid((unsigned)cuts->n, (unsigned)n_tok);
    LAUNCH(k_moments, grid, BLOCK, g, out, x, n, *cuts);
    return gpu_launched(g, "k_moments");
}

enum status cuda_embed(struct gpu *g, float *x, const void *table, enum dtype dtype,
                       const int32_t *ids, int32_t n_vocab, int32_t n_tok, int32_t n)
{
    unsigned grid = (unsigned)n_tok;
    if (dtype == DT_F32) {
        LAUNCH((k_embed<DT_F32>), grid, BLOCK, g, x, table, ids, n_vocab, n);
    } else if (dtype == DT_F16) {
        LAUNCH((k_embed<DT_F16>), grid, BLOCK, g, x, table, ids, n_vocab, n);
    } else {
        LAUNCH((k_embed<DT_BF16>), grid, BLOCK, g, x, table, ids, n_vocab, n);
    }
    return gpu_launched(g, "k_embed");
}

enum status cuda_activate(struct gpu *g, float *y, const float *gate, const float *up, size_t n,
                          enum activation act)
{
    if (act == ACT_SILU) {
        LAUNCH((k_activate<ACT_SILU>), blocks_for(n), BLOCK, g, y, gate, up, n);
    } else if (act == ACT_GELU_ERF) {
        LAUNCH((k_activate<ACT_GELU_ERF>), blocks_for(n), BLOCK, g, y, gate, up, n);
    } else {
        LAUNCH((k_activate<ACT_GELU_TANH>), blocks_for(n), BLOCK, g, y, gate, up, n);
    }
    return gpu_launched(g, "k_activate");
}
