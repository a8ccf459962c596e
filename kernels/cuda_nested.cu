/* Products with nested weights. For one token at a time (k_nested_tokens): a warp takes a row, each
 * lane every 32nd word of it; a word is 32 columns of one plane and lies in one group. With S_p the
 * sum of x over the columns whose bit p is set and S the sum of all x of the word,
 *     sum w x = offset S + sum_p a_p (2 S_p - S),
 * where a_p is alpha[p] (FREE), scale 2^(b-1-p) / 2 (TIED), or the same of scale and tail (TAIL):
 * the definitions of core/bitplane.h with the sum over columns taken first. LUT weights are looked
 * up. For many tokens (k_nested_chunk): tiles of weights are decoded into shared memory.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cuda_kernels.h"
#include "kernels/device.cuh"

enum { ROWS_PER_BLOCK = 4, MAX_TOKENS = 8, WORD = 32 };

/* The step of plane p: what its bit adds or takes away. */
static __device__ __forceinline__ float plane_step(const struct cuda_matrix *w, int b, int row,
                                                   int group, int p)
{
    size_t at = (size_t)row * (size_t)w->n_groups + (size_t)group;
    if (w->level[b].kind == LEVEL_FREE) {
        return half_to_float(w->level[b].alpha[at * (size_t)b + (size_t)p]);
    }
    if (w->level[b].kind == LEVEL_TAIL) {
        return p < 4 ? half_to_float(w->level[b].scale[at]) * (float)(1 << (3 - p)) * 0.5f
                     : half_to_float(w->level[b].tail[at]) * (float)(1 << (7 - p)) * 0.5f;
    }
    return half_to_float(w->level[b].scale[at]) * (float)(1 << (b - 1 - p)) * 0.5f;
}

static __device__ __forceinline__ float level_offset(const struct cuda_matrix *w, int b, int row,
                                                     int group)
{
    return half_to_float(w->level[b].offset[(size_t)row * (size_t)w->n_groups + (size_t)group]);
}

/* Sum over one word's columns of weight times x, at b bits. x: the token's, at the first column. */
static __device__ float word_product(const struct cuda_matrix *w, const uint32_t *planes, int b,
                                     int row, int group, const float *x, int n_cols)
{
    float sums[BITS_MAX], all = 0, total = 0;
    if (w->level[b].kind == LEVEL_LUT) {
        const uint16_t *lut = w->level[b].lut + ((size_t)row << b);
        for (int c = 0; c < n_cols; c++) {
            uint32_t code = 0;
            for (int p = 0; p < b; p++) {
                code = code << 1 | (planes[p] >> c & 1);
            }
            total = fmaf(half_to_float(lut[code]), x[c], total);
        }
        return total;
    }
    for (int p = 0; p < BITS_MAX; p++) {
        sums[p] = 0;
    }
    for (int c = 0; c < n_cols; c++) {
        float v = x[c];
        all += v;
        for (int p = 0; p < b; p++) {
            sums[p] += planes[p] >> c & 1 ? v : 0.0f;
        }
    }
    total = level_offset(w, b, row, group) * all;
    for (int p = 0; p < b; p++) {
        total = fmaf(plane_step(w, b, row, group, p), 2.0f * sums[p] - all, total);
    }
    return total;
}

/* Tokens T * blockIdx.y and on. A token's arithmetic is the same for every T. */
template <int T>
__global__ void k_nested_tokens(float *y, struct cuda_matrix w, const uint8_t *bits, const float *x,
                                const float *bias, int n_tok, struct cuda_cuts cuts, bool add_up)
{
    int row = (int)(blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP);
    int lane = (int)threadIdx.x % WARP, first = (int)blockIdx.y * T;
    if (row >= w.n_rows) {
        return; /* a whole warp */
    }
    int b[T], most = 0;
    for (int t = 0; t < T; t++) {
        b[t] = first + t < n_tok ? bits[first + t] : 0;
        most = b[t] > most ? b[t] : most;
    }
    float added[T] = {0};
    for (int s = 0; s < cuts.n; s++) {
        float sum[T];
        for (int t = 0; t < T; t++) {
            sum[t] = 0;
        }
        int end = (cuts.at[s + 1] + WORD - 1) / WORD;
        for (int i = cuts.at[s] / WORD + lane; i < end; i += WARP) {
            uint32_t planes[BITS_MAX];
            for (int p = 0; p < most; p++) {
                planes[p] = w.plane[p][(size_t)row * (size_t)w.n_words + (size_t)i];
            }
            int col = i * WORD, group = col / w.group_cols;
            int n_cols = w.n_cols - col < WORD ? w.n_cols - col : WORD;
            for (int t = 0; t < T; t++) {
                if (b[t] > 0) {
                    sum[t] +=
                        word_product(&w, planes, b[t], row, group,
                                     x + (size_t)(first + t) * (size_t)w.n_cols + col, n_cols);
                }
            }
        }
        for (int t = 0; t < T; t++) {
            float total = warp_sum(sum[t]);
            if (add_up) {
                total = added[t] = s == 0 ? total : added[t] + total;
            }
            if (lane == 0 && first + t < n_tok) {
                size_t at = (size_t)(add_up ? 0 : s) * (size_t)n_tok + (size_t)(first + t);
                y[at * (size_t)w.n_rows + (size_t)row] = bias ? total + bias[row] : total;
            }
        }
    }
}

template <int T>
static void launch_tokens(struct gpu *g, float *y, const struct cuda_matrix *w, const uint8_t *bits,
                          const float *x, const float *bias, int32_t n_tok,
                          const struct cuda_cuts *cuts, bool add_up)
{
    dim3 grid((unsigned)((w->n_rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK),
              (unsigned)((n_tok + T - 1) / T));
    const struct cuda_matrix matrix = *w;
    const struct cuda_cuts parts = *cuts;
    LAUNCH((k_nested_tokens<T>), grid, ROWS_PER_BLOCK * WARP, g, y, matrix, bits, x, bias, n_tok,
           parts, add_up);
}

enum status cuda_nested_tokens(struct gpu *g, float *y, const struct cuda_matrix *w,
                               const uint8_t *bits, const float *x, const float *bias,
                               int32_t n_tok, const struct cuda_cuts *cuts, bool add_up)
{
    if (n_tok == 1) {
        launch_tokens<1>(g, y, w, bits, x, bias, n_tok, cuts, add_up);
    } else if (n_tok <= 4) {
        launch_tokens<4>(g, y, w, bits, x, bias, n_tok, cuts, add_up);
    } else {
        launch_tokens<MAX_TOKENS>(g, y, w, bits, x, bias, n_tok, cuts, add_up);
    }
    return gpu_launched(g, "k_nested_tokens");
}

/* ---- many tokens ---- */

enum { TILE = 64, TILE_COLS = WORD, TILE_THREADS = 256, PER_THREAD = 4, PITCH = TILE_COLS + 1 };

static __device__ float decode_weight(const struct cuda_matrix *w, int b, int row, int col)
{
    size_t word = (size_t)row * (size_t)w->n_words + (size_t)(col / WORD);
    int group = col / w->group_cols, shift = col % WORD;
    if (w->level[b].kind == LEVEL_LUT) {
        uint32_t code = 0;
        for (int p = 0; p < b; p++) {
            code = code << 1 | (w->plane[p][word] >> shift & 1);
        }
        return half_to_float(w->level[b].lut[((size_t)row << b) + code]);
    }
    float v = level_offset(w, b, row, group);
    for (int p = 0; p < b; p++) {
        float step = plane_step(w, b, row, group, p);
        v += w->plane[p][word] >> shift & 1 ? step : -step;
    }
    return v;
}

/* Rows TILE * blockIdx.x, tokens TILE * blockIdx.y; each thread has PER_THREAD x PER_THREAD sums,
 * each added up column by column. Tokens of other precisions than b are left out. */
__global__ void k_nested_chunk(float *y, struct cuda_matrix w, const uint8_t *bits, int b,
                               const float *x, const float *bias, int n_tok, struct cuda_cuts cuts,
                               bool add_up)
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
                bool inside = col + c < w.n_cols;
                bool row_inside = inside && first_row + line < w.n_rows;
                bool tok_inside = inside && first_tok + line < n_tok;
                weights[line * PITCH + c] =
                    row_inside ? decode_weight(&w, b, first_row + line, col + c) : 0.0f;
                inputs[line * PITCH + c] =
                    tok_inside
                        ? x[(size_t)(first_tok + line) * (size_t)w.n_cols + (size_t)(col + c)]
                        : 0.0f;
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
                if (row < w.n_rows && tok < n_tok && bits[tok] == b) {
                    size_t at = (size_t)(add_up ? 0 : s) * (size_t)n_tok + (size_t)tok;
                    y[at * (size_t)w.n_rows + (size_t)row] =
                        bias ? sum[i][j] + bias[row] : sum[i][j];
                }
            }
        }
    }
}

enum status cuda_nested_chunk(struct gpu *g, float *y, const struct cuda_matrix *w,
                              const uint8_t *bits, uint32_t bits_used, const float *x,
                              const float *bias, int32_t n_tok, const struct cuda_cuts *cuts,
                              bool add_up)
{
    dim3 grid((unsigned)((w->n_rows + TILE - 1) / TILE), (unsigned)((n_tok + TILE - 1) / TILE));
    const struct cuda_matrix matrix = *w;
    const struct cuda_cuts parts = *cuts;
    for (int b = 1; b <= BITS_MAX; b++) {
        if (bits_used >> b & 1) {
            LAUNCH(k_nested_chunk, grid, TILE_THREADS, g, y, matrix, bits, b, x, bias, n_tok, parts,
                   add_up);
            TRY(gpu_launched(g, "k_nested_chunk"));
        }
    }
    return ST_OK;
}
