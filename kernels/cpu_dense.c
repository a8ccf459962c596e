/* The dense product of the cpu backend: rows over threads, each row's weights converted to f32 once
 * for all tokens (or, for one token, on the way into the sum: the same values in the same order).
 * SPDX-License-Identifier: Apache-2.0
 */
#include <omp.h>

#include "core/mem.h"
#include "kernels/cpu.h"

struct pass {
    const struct cpu_isa *isa;
    const struct tensor *w;
    const float *x;
    size_t n_tok;
    const int32_t *cut;
    int32_t n_segments;
    struct cpu_output out;
};

static void row_for_one(const struct pass *pass, int32_t r, const char *row)
{
    for (int32_t first = 0; first < pass->n_segments; first += CPU_MAX_SEGMENTS) {
        float sum[CPU_MAX_SEGMENTS];
        int n_now = cpu_segments_now(pass->n_segments, first);
        pass->isa->dot_segments(sum, row, pass->w->dtype, pass->x, pass->cut + first, n_now);
        for (int s = 0; s < n_now; s++) {
            cpu_store(&pass->out, first + s, 0, r, sum[s]);
        }
    }
}

static void row_for_many(const struct pass *pass, int32_t r, const char *row, float *scratch)
{
    int32_t n_cols = pass->w->dims[1];
    const float *weights = (const float *)(const void *)row;
    if (pass->w->dtype != DT_F32) {
        pass->isa->convert(scratch, row, pass->w->dtype, n_cols);
        weights = scratch;
    }
    for (size_t t = 0; t < pass->n_tok; t += CPU_TILE) {
        int n = pass->n_tok - t < CPU_TILE ? (int)(pass->n_tok - t) : CPU_TILE;
        const float *x[CPU_TILE];
        size_t token[CPU_TILE];
        for (int j = 0; j < n; j++) {
            token[j] = t + (size_t)j;
            x[j] = pass->x + token[j] * (size_t)n_cols;
        }
        cpu_tile(pass->isa, &pass->out, weights, x, token, n, r, pass->cut, pass->n_segments);
    }
}

enum status cpu_matmul_dense(struct backend *be, struct tensor *y, const struct tensor *w,
                             const struct tensor *x, const struct tensor *bias,
                             const struct how *how)
{
    struct cpu *cpu = be->impl;
    size_t width = cpu_scratch_width((size_t)w->dims[1]), n = 0;
    TRY(mem_mul(&n, width, (size_t)cpu->n_threads));
    TRY(host_scratch_reserve(&cpu->rows, n));
    const int32_t whole[] = {0, w->dims[1]};
    struct pass pass = {
        .isa = cpu->isa,
        .w = w,
        .x = x->data,
        .n_tok = (size_t)x->dims[0],
        .cut = how->cut ? how->cut : whole,
        .n_segments = how->n_segments,
        .out = cpu_output(y, x, bias, how),
    };
    size_t row_bytes = (size_t)w->dims[1] * dtype_bytes(w->dtype);
    int n_threads = cpu_threads(cpu, tensor_count(w) * pass.n_tok);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int32_t r = 0; r < w->dims[0]; r++) {
        const char *row = (const char *)w->data + (size_t)r * row_bytes;
        if (pass.n_tok == 1) {
            row_for_one(&pass, r, row);
        } else {
            row_for_many(&pass, r, row, cpu->rows.data + (size_t)omp_get_thread_num() * width);
        }
    }
    return ST_OK;
}
