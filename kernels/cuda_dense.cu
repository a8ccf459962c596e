/* Products with dense weights (F32, F16, BF16), for single tokens and for many. Rows and columns
 * are shared out as in cuda_nested.cu.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cuda_kernels.h"
#include "kernels/device.cuh"

enum { ROWS_PER_BLOCK = 4, MAX_TOKENS = 8 };

template <int D> static __device__ __forceinline__ float weight_at(const void *w, size_t at)
{
    if (D == DT_F32) {
        return ((const float *)w)[at];
    }
    uint16_t h = ((const uint16_t *)w)[at];
    return D == DT_F16 ? half_to_float(h) : bfloat_to_float(h);
}

/* A warp per row; lane l adds columns l, l + 32, ... of a segment. */
template <int D>
__global__ void k_dense_tokens(float *y, const void *w, const float *x, const float *bias,
                               int n_rows, int n_cols, int n_tok, struct cuda_cuts cuts,
                               bool add_up)
{
    int row = (int)(blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP);
    int lane = (int)threadIdx.x % WARP, first = (int)blockIdx.y * MAX_TOKENS;
    int n = n_tok - first < MAX_TOKENS ? n_tok - first : MAX_TOKENS;
    if (row >= n_rows) {
        return; /* a whole warp */
    }
    const float *in = x + (size_t)first * (size_t)n_cols;
    float added[MAX_TOKENS] = {0};
    for (int s = 0; s < cuts.n; s++) {
        float sum[MAX_TOKENS];
        for (int t = 0; t < MAX_TOKENS; t++) {
            sum[t] = 0;
        }
        for (int c = cuts.at[s] + lane; c < cuts.at[s + 1]; c += WARP) {
            float v = weight_at<D>(w, (size_t)row * (size_t)n_cols + (size_t)c);
            for (int t = 0; t < n; t++) {
                sum[t] = fmaf(v, in[(size_t)t * (size_t)n_cols + (size_t)c], sum[t]);
            }
        }
        for (int t = 0; t < n; t++) {
            float total = warp_sum(sum[t]);
            if (add_up) {
                total = added[t] = s == 0 ? total : added[t] + total;
            }
            if (lane == 0) {
                size_t at = (size_t)(add_up ? 0 : s) * (size_t)n_tok + (size_t)(first + t);
                y[at * (size_t)n_rows + (size_t)row] = bias ? total + bias[row] : total;
            }
        }
    }
}

enum { TILE = 64, TILE_COLS = 32, TILE_THREADS = 256, PER_THREAD = 4, PITCH = TILE_COLS + 1 };

template <int D>
__global__ void k_dense_chunk(float *y, const void *w, const float *x, const float *bias,
                              int n_rows, int n_cols, int n_tok, struct cuda_cuts cuts, bool add_up)
{
    SHARED(float, weights, TILE *PITCH);
    SHARED(float, inputs, TILE *PITCH);
    int first_row = (int)blockIdx.x * TILE, first_tok = (int)blockIdx.y * TILE;
    int r = (int)threadIdx.x % (TILE / PER_THREAD), t = (int)threadIdx.x / (TILE / PER_THREAD);
    float added[PER_THREAD][PER_THREAD] = {{0}};
    for (int s = 0; s < cuts.n; s++) {
        float sum[PER_THREAD][PER_THREAD] = {{0}};
        for (int col = cuts.at[s]; col < cuts.at[s + 1]; col += TILE_COLS) {
            for (int i = (int)threadIdx.x; i < TILE * TILE_COLS; i += TILE_THREADS) {
                int line = i / TILE_COLS, c = i % TILE_COLS;
                bool inside = col + c < cuts.at[s + 1];
                size_t row = (size_t)(first_row + line), tok = (size_t)(first_tok + line);
                size_t at = (size_t)(col + c);
                weights[line * PITCH + c] = inside && first_row + line < n_rows
                                                ? weight_at<D>(w, row * (size_t)n_cols + at)
                                                : 0.0f;
                inputs[line * PITCH + c] =
                    inside && first_tok + line < n_tok ? x[tok * (size_t)n_cols + at] : 0.0f;
            }
            __syncthreads();
            for (int c = 0; c < TILE_COLS; c++) {
                float left[PER_THREAD], right[PER_THREAD];
                for (int i = 0; i < PER_THREAD; i++) {
                    left[i] = weights[(r + i * (TILE / PER_THREAD)) * PITCH + c];
                    right[i] = inputs[(t + i * (TILE / PER_THREAD)) * PITCH + c];
                }
                for (int i = 0; i < PER_THREAD; i++) {
                    for (int j = 0; j < PER_THREAD; j++) {
                        sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
                    }
                }
            }
            __syncthreads();
        }
        for (int i = 0; i < PER_THREAD; i++) {
            for (int j = 0; j < PER_THREAD; j++) {
                if (add_up) {
                    sum[i][j] = added[i][j] = s == 0 ? sum[i][j] : added[i][j] + sum[i][j];
                }
                int row = first_row + r + i * (TILE / PER_THREAD);
                int tok = first_tok + t + j * (TILE / PER_THREAD);
                if (row < n_rows && tok < n_tok) {
                    size_t at = (size_t)(add_up ? 0 : s) * (size_t)n_tok + (size_t)tok;
                    y[at * (size_t)n_rows + (size_t)row] = bias ? sum[i][j] + bias[row] : sum[i][j];
                }
            }
        }
    }
}

enum status cuda_dense_tokens(struct gpu *g, float *y, const void *w, enum dtype dtype,
                              const float *x, const float *bias, int32_t n_rows, int32_t n_cols,
                              int32_t n_tok, const struct cuda_cuts *cuts, bool add_up)
{
    dim3 grid((unsigned)((n_rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK),
              (unsigned)((n_tok + MAX_TOKENS - 1) / MAX_TOKENS));
    unsigned block = ROWS_PER_BLOCK * WARP;
    const struct cuda_cuts parts = *cuts;
    if (dtype == DT_F32) {
        LAUNCH((k_dense_tokens<DT_F32>), grid, block, g, y, w, x, bias, n_rows, n_cols, n_tok,
               parts, add_up);
    } else if (dtype == DT_F16) {
        LAUNCH((k_dense_tokens<DT_F16>), grid, block, g, y, w, x, bias, n_rows, n_cols, n_tok,
               parts, add_up);
    } else {
        LAUNCH((k_dense_tokens<DT_BF16>), grid, block, g, y, w, x, bias, n_rows, n_cols, n_tok,
               parts, add_up);
    }
    return gpu_launched(g, "k_dense_tokens");
}

enum status cuda_dense_chunk(struct gpu *g, float *y, const void *w, enum dtype dtype,
                             const float *x, const float *bias, int32_t n_rows, int32_t n_cols,
                             int32_t n_tok, const struct cuda_cuts *cuts, bool add_up)
{
    dim3 grid((unsigned)((n_rows + TILE - 1) / TILE), (unsigned)((n_tok + TILE - 1) / TILE));
    const struct cuda_cuts parts = *cuts;
    if (dtype == DT_F32) {
        LAUNCH((k_dense_chunk<DT_F32>), grid, TILE_THREADS, g, y, w, x, bias, n_rows, n_cols, n_tok,
               parts, add_up);
    } else if (dtype == DT_F16) {
        LAUNCH((k_dense_chunk<DT_F16>), grid, TILE_THREADS, g, y, w, x, bias, n_rows, n_cols, n_tok,
               parts, add_up);
    } else {
        LAUNCH((k_dense_chunk<DT_BF16>), grid, TILE_THREADS, g, y, w, x, bias, n_rows, n_cols,
               n_tok, parts, add_up);
    }
    return gpu_launched(g, "k_dense_chunk");
}
