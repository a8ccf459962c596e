/* Attention's inner loops, for the instruction set of cpu_vector.h. Included once per set.
 * A row's score and a row's share of the output depend on the row and the query head alone: rows
 * go through in tiles only so that several loads are on their way at once.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_LOOPS_ATTENTION_H
#define PMPD_KERNELS_CPU_LOOPS_ATTENTION_H

#include "kernels/cpu_vector.h"

enum { TILE_ROWS = 4 };

/* score[g * CPU_KV_BLOCK + r] = scale q_g . row r, for n_rows <= TILE_ROWS (a constant where
 * called). */
ISA_INLINE void score_tile(float *score, const float *q, int32_t n_q, int32_t head_dim,
                           const void *const *row, int n_rows, int32_t stride, enum dtype dtype,
                           float scale)
{
    for (int32_t g = 0; g < n_q; g++, q += head_dim, score += CPU_KV_BLOCK) {
        vec acc[TILE_ROWS] = {{0}};
        int32_t d = 0;
        for (; d + LANES <= head_dim; d += LANES) {
            vec q_now = v_load(q + d);
            for (int r = 0; r < n_rows; r++) {
                acc[r] = v_fma(q_now, v_load_as(row[r], dtype, d), acc[r]);
            }
        }
        if (d < head_dim) {
            vec q_now = v_load_part(q + d, head_dim - d, 0);
            for (int r = 0; r < n_rows; r++) {
                vec k = v_load_part_as(row[r], dtype, d, head_dim - d);
                acc[r] = v_fma(q_now, k, acc[r]);
            }
        }
        if (n_rows == 4) {
            float sum[4];
            v_sum_4(sum, acc, scale);
            for (int r = 0; r < 4; r++) {
                score[r * stride] = sum[r];
            }
        } else {
            score[0] = v_sum(acc[0]) * scale;
        }
    }
}

/* acc_g += weight[g * CPU_KV_BLOCK + r] * row r, row after row. */
ISA_INLINE void weigh_tile(float *acc, const float *weight, int32_t n_q, int32_t head_dim,
                           const void *const *row, int n_rows, int32_t stride, enum dtype dtype)
{
    for (int32_t g = 0; g < n_q; g++, acc += head_dim + 2, weight += CPU_KV_BLOCK) {
        vec w[TILE_ROWS];
        for (int r = 0; r < n_rows; r++) {
            w[r] = v_set(weight[r * stride]);
        }
        int32_t d = 0;
        for (; d + LANES <= head_dim; d += LANES) {
            vec sum = v_load(acc + d);
            for (int r = 0; r < n_rows; r++) {
                sum = v_fma(w[r], v_load_as(row[r], dtype, d), sum);
            }
            v_store(acc + d, sum);
        }
        if (d < head_dim) {
            vec sum = v_load_part(acc + d, head_dim - d, 0);
            for (int r = 0; r < n_rows; r++) {
                sum = v_fma(w[r], v_load_part_as(row[r], dtype, d, head_dim - d), sum);
            }
            v_store_part(acc + d, sum, head_dim - d);
        }
    }
}

/* Scores of a block -> weights exp(score - max), their largest score and their sum. A block of
 * nothing but -inf weighs nothing; a NaN stays visible in the sum. */
ISA_INLINE void block_softmax(float *score, int32_t n, float *max, float *sum)
{
    int32_t n_whole = (n + LANES - 1) / LANES * LANES;
    vec largest = v_set(-INFINITY), total = {0};
    for (int32_t j = n; j < n_whole; j++) {
        score[j] = -INFINITY;
    }
    for (int32_t j = 0; j < n_whole; j += LANES) {
        largest = v_max(v_load(score + j), largest);
    }
    *max = v_largest(largest);
    float from = *max > -INFINITY ? *max : 0;
    for (int32_t j = 0; j < n_whole; j += LANES) {
        vec e = v_exp(v_load(score + j) - from);
        v_store(score + j, e);
        total += e;
    }
    *sum = v_sum(total);
}

/* Asks for cache lines into L2, whose queue to memory is longer than L1's: one pass over a block
 * fetches what the next pass reads, so that memory and arithmetic overlap. AMD EPYC (family 25,
 * model 17), 1.4B shape, context 2048, 2026-11: 0.77 of a read probe's bandwidth; 0.64 without,
 * 0.47 into L1. */
ISA_INLINE void ask_for(const char *at, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i += 64) {
        __builtin_prefetch(at + i, 0, 2);
    }
}

/* Rows j, j + stride, ... of a block; the last may lie elsewhere. */
ISA_INLINE void rows_at(const void **row, const char *rows, const char *last, size_t row_bytes,
                        int32_t j, int n_rows, int32_t stride, int32_t n)
{
    for (int r = 0; r < n_rows; r++, j += stride) {
        row[r] = j == n - 1 ? last : rows + (size_t)j * row_bytes;
    }
}

ISA_INLINE void attend_as(float *part, float *score, const float *q, int32_t n_q, float scale,
                          const struct cpu_kv_block *b, enum dtype k_type, enum dtype v_type)
{
    int32_t n = b->n_rows, head_dim = b->head_dim, j;
    size_t k_bytes = (size_t)head_dim * (k_type == DT_F32 ? 4 : 2);
    size_t v_bytes = (size_t)head_dim * (v_type == DT_F32 ? 4 : 2);
    /* The rows of a tile lie a quarter of the block apart: four streams for the prefetchers of a
     * processor, which see each to the end of its page only. */
    int32_t quarter = n / TILE_ROWS, rest = quarter * TILE_ROWS;
    const void *row[TILE_ROWS];
    for (j = 0; j < quarter; j++) {
        rows_at(row, b->k, b->k_last, k_bytes, j, TILE_ROWS, quarter, n);
        ask_for(b->v + (size_t)j * TILE_ROWS * v_bytes, TILE_ROWS * v_bytes);
        score_tile(score + j, q, n_q, head_dim, row, TILE_ROWS, quarter, k_type, scale);
    }
    for (j = rest; j < n; j++) {
        rows_at(row, b->k, b->k_last, k_bytes, j, 1, 0, n);
        score_tile(score + j, q, n_q, head_dim, row, 1, 0, k_type, scale);
    }
    for (int32_t g = 0; g < n_q; g++) {
        float *out = part + (size_t)g * (size_t)(head_dim + 2);
        memset(out, 0, (size_t)head_dim * sizeof *out);
        block_softmax(score + (size_t)g * CPU_KV_BLOCK, n, &out[head_dim], &out[head_dim + 1]);
    }
    for (j = 0; j < quarter; j++) {
        rows_at(row, b->v, b->v_last, v_bytes, j, TILE_ROWS, quarter, n);
        if (b->next && j * TILE_ROWS < b->next_rows) {
            ask_for(b->next + (size_t)j * TILE_ROWS * k_bytes, TILE_ROWS * k_bytes);
        }
        weigh_tile(part, score + j, n_q, head_dim, row, TILE_ROWS, quarter, v_type);
    }
    for (j = rest; j < n; j++) {
        rows_at(row, b->v, b->v_last, v_bytes, j, 1, 0, n);
        weigh_tile(part, score + j, n_q, head_dim, row, 1, 0, v_type);
    }
}

ISA static void attend(float *part, float *score, const float *q, int32_t n_q, float scale,
                       const struct cpu_kv_block *b)
{
    if (b->k_type == DT_F32 && b->v_type == DT_F32) {
        attend_as(part, score, q, n_q, scale, b, DT_F32, DT_F32);
    } else if (b->k_type == DT_F32) {
        attend_as(part, score, q, n_q, scale, b, DT_F32, DT_F16);
    } else if (b->v_type == DT_F32) {
        attend_as(part, score, q, n_q, scale, b, DT_F16, DT_F32);
    } else {
        attend_as(part, score, q, n_q, scale, b, DT_F16, DT_F16);
    }
}

/* What a part shrinks by when its largest score moves from `from` to `to`. */
ISA_INLINE float shrink(float from, float to)
{
    return from < to || from > to ? v_exp(v_set(from - to))[0] : 1; /* also both -inf */
}

ISA static void attend_merge(float *into, const float *part, int32_t n_q, int32_t head_dim)
{
    for (int32_t g = 0; g < n_q; g++, into += head_dim + 2, part += head_dim + 2) {
        float a_max = into[head_dim], b_max = part[head_dim], max = a_max > b_max ? a_max : b_max;
        float a = shrink(a_max, max), b = shrink(b_max, max);
        for (int32_t d = 0; d < head_dim; d++) {
            into[d] = into[d] * a + part[d] * b;
        }
        into[head_dim] = max;
        into[head_dim + 1] = into[head_dim + 1] * a + part[head_dim + 1] * b;
    }
}

#endif
