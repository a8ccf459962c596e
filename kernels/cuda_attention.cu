/* Attention of one token and head per block, over the KV cache in tiles of rows: scores by warps
 * (lanes share the columns of a row), a running maximum, then each thread adds up its columns of V.
 * The order of all sums is that of the rows, so a token's result depends on its own rows only.
 * Source of the running maximum: Milakov, Gimelshein, "Online normalizer calculation for softmax"
 * (arXiv 1805.02867), algorithm 3.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cuda_kernels.h"
#include "kernels/device.cuh"

enum { BLOCK = 128, N_WARPS = BLOCK / WARP, TILE = 128, PER_LANE = TILE / WARP };

/* A cache as kernels see it. */
struct cache_view {
    const void *k, *v;
    bool half_k, half_v;
    int n_kv_heads, n_rows, heads_per_kv, head_in_group;
};

static __device__ __forceinline__ float value_at(const void *cache, bool half, size_t at)
{
    return half ? half_to_float(((const uint16_t *)cache)[at]) : ((const float *)cache)[at];
}

/* The j-th row that a token attends to: those before it, then its own. */
static __device__ __forceinline__ size_t attended_row(int j, int pos, int kv_row)
{
    return (size_t)(j < pos ? j : kv_row);
}

__global__ void k_attention(float *y, const float *q, struct cache_view kv, const int32_t *slots,
                            const int32_t *positions, const int32_t *kv_rows, int head_dim,
                            float scale)
{
    SHARED(float, scores, TILE);
    SHARED(float, query, CUDA_MAX_HEAD_DIM);
    int head = (int)blockIdx.x, tok = (int)blockIdx.y, n_heads = (int)gridDim.x;
    int pos = positions[tok], kv_row = kv_rows[tok], lane = (int)threadIdx.x % WARP;
    size_t kv_head = (size_t)((kv.head_in_group + head) / kv.heads_per_kv);
    size_t first = ((size_t)slots[tok] * (size_t)kv.n_kv_heads + kv_head) * (size_t)kv.n_rows;
    size_t at = ((size_t)tok * (size_t)n_heads + (size_t)head) * (size_t)head_dim;
    float sum[CUDA_MAX_HEAD_DIM / BLOCK] = {0}, total = 0, max = -INFINITY;
    for (int d = (int)threadIdx.x; d < head_dim; d += BLOCK) {
        query[d] = q[at + (size_t)d];
    }
    for (int begin = 0; begin <= pos; begin += TILE) {
        int n = pos + 1 - begin < TILE ? pos + 1 - begin : TILE;
        __syncthreads(); /* the query is there; the last tile's scores have been read */
        for (int j = (int)threadIdx.x / WARP; j < TILE; j += N_WARPS) {
            float dot = 0;
            if (j < n) {
                size_t row = (first + attended_row(begin + j, pos, kv_row)) * (size_t)head_dim;
                for (int d = lane; d < head_dim; d += WARP) {
                    dot = fmaf(query[d], value_at(kv.k, kv.half_k, row + (size_t)d), dot);
                }
            }
            dot = warp_sum(dot);
            if (lane == 0) {
                scores[j] = j < n ? dot * scale : -INFINITY;
            }
        }
        __syncthreads();
        float mine[PER_LANE], tile_max = -INFINITY, tile_sum = 0;
        for (int i = 0; i < PER_LANE; i++) {
            mine[i] = scores[i * WARP + lane];
            tile_max = fmaxf(tile_max, mine[i]);
        }
        float new_max = fmaxf(max, warp_max(tile_max)), old = expf(max - new_max);
        for (int i = 0; i < PER_LANE; i++) {
            mine[i] = expf(mine[i] - new_max);
            tile_sum += mine[i];
        }
        total = fmaf(total, old, warp_sum(tile_sum));
        max = new_max;
        __syncthreads(); /* every warp has read the scores */
        if (threadIdx.x < WARP) {
            for (int i = 0; i < PER_LANE; i++) {
                scores[i * WARP + lane] = mine[i];
            }
        }
        __syncthreads();
        for (int i = 0, d = (int)threadIdx.x; d < head_dim; i++, d += BLOCK) {
            float part = 0;
            for (int j = 0; j < n; j++) {
                size_t row = first + attended_row(begin + j, pos, kv_row);
                part = fmaf(scores[j],
                            value_at(kv.v, kv.half_v, row * (size_t)head_dim + (size_t)d), part);
            }
            sum[i] = fmaf(sum[i], old, part);
        }
    }
    for (int i = 0, d = (int)threadIdx.x; d < head_dim; i++, d += BLOCK) {
        y[at + (size_t)d] = sum[i] / total;
    }
}

enum status cuda_attention(struct gpu *g, float *y, const float *q, const struct kv_layer *kv,
                           const struct token_place *place, int32_t n_tok, int32_t n_heads,
                           float scale)
{
    int head_dim = kv->k.dims[3];
    if (head_dim > CUDA_MAX_HEAD_DIM) {
        FAIL(ST_UNSUPPORTED, "attention with heads of %d dimensions, the cuda backend has up to %d",
             head_dim, (int)CUDA_MAX_HEAD_DIM);
    }
    struct cache_view view = {
        kv->k.data,    kv->v.data,    kv->k.dtype == DT_F16, kv->v.dtype == DT_F16,
        kv->k.dims[1], kv->k.dims[2], kv->heads_per_kv,      kv->head_in_group};
    const int32_t *slot = (const int32_t *)place->slot.data;
    const int32_t *pos = (const int32_t *)place->pos.data;
    const int32_t *row = (const int32_t *)place->kv_row.data;
    dim3 grid((unsigned)n_heads, (unsigned)n_tok);
    LAUNCH(k_attention, grid, BLOCK, g, y, q, view, slot, pos, row, head_dim, scale);
    return gpu_launched(g, "k_attention");
}
