/* Error feedback, coordinate descent and the tail: the stages that choose codes, column by column
 * with lazy updates of what follows a block of columns. SPDX-License-Identifier: Apache-2.0
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/log.h"
#include "experiments/quantise/baseline_fit.h"
#include "experiments/quantise/row_chunk.h"
#include "experiments/quantise/wide.h"

/* The diagonal of H is raised by this share of its mean in coordinate descent, so that columns with
 * little activation do not wander. */
static const double SWEEP_RIDGE = 1e-3;

/* What choosing codes in one group of one row needs: sum_s lambda_s (t_s - L_s)^2 is, but for the
 * part that all codes share, base - sum_s t_s slope_s. */
struct picker {
    float base[N_PICKS], slope[CHUNK_SLOTS][N_PICKS], level[CHUNK_SLOTS][N_PICKS];
};

static void picker_set(struct picker *p, const struct row_chunk *c, int32_t row, int32_t group)
{
    const struct fit_spec *spec = c->job->spec;
    *p = (struct picker){0};
    for (int i = 1 << spec->hi; i < N_PICKS; i++) {
        p->base[i] = FLT_MAX;
    }
    for (int s = 0; s < c->job->n_slots; s++) {
        int b = c->job->slot_bits[s];
        float table[N_PICKS];
        level_table_of(table, spec->kind[b], b, chunk_level(c, b, row, group));
        for (int i = 0; i < 1 << spec->hi; i++) {
            float v = table[i >> (spec->hi - b)];
            p->level[s][i] = v;
            p->slope[s][i] = (float)(2 * spec->lambda[b]) * v;
            p->base[i] += (float)spec->lambda[b] * v * v;
        }
    }
}

/* Unused slots have slope 0. Of equal codes the first. */
static inline int pick(const struct picker *p, float t0, float t1, float t2)
{
    float cost[N_PICKS];
    for (int i = 0; i < N_PICKS; i++) {
        cost[i] = p->base[i] - (t0 * p->slope[0][i] + t1 * p->slope[1][i] + t2 * p->slope[2][i]);
    }
    int best = 0;
    for (int i = 1; i < N_PICKS; i++) {
        best = cost[i] < cost[best] ? i : best;
    }
    return best;
}

/* t[k + 1..end) -= d * m[k][k + 1..end) */
static inline void spread(float *t, float d, const float *m, int32_t begin, int32_t end)
{
    for (int32_t j = begin; j < end; j++) {
        t[j] -= d * m[j];
    }
}

/* ---- starts ---- */

static void start_group(struct row_chunk *c, int32_t row, int32_t group, int32_t begin, int32_t n)
{
    const struct fit_spec *spec = c->job->spec;
    const float *weight = c->job->column_weight + begin, *target[FIT_MAX_BITS + 1] = {0};
    struct sign_levels start[FIT_MAX_BITS + 1];
    uint8_t code[FIT_MAX_GROUP];
    for (int s = 0; s < c->job->n_slots; s++) {
        target[c->job->slot_bits[s]] = c->t[s] + (size_t)row * (size_t)c->n + begin;
    }
    if (c->job->options->grid) {
        grid_fit(chunk_level(c, spec->hi, row, group), target[spec->hi], weight, n, spec->hi);
        return;
    }
    group_start(code, start, spec, target, weight, n);
    for (int s = 0; s < c->job->n_slots; s++) {
        int b = c->job->slot_bits[s];
        double *level = chunk_level(c, b, row, group);
        if (spec->kind[b] == LEVEL_TIED) {
            level[0] = 2 * start[b].alpha[b - 1];
            level[1] = start[b].offset;
        } else {
            memcpy(level, start[b].alpha, (size_t)b * sizeof *level);
            level[b] = start[b].offset;
        }
    }
}

/* ---- feedback ---- */

/* Columns [begin, end) of one row, all of one group; errors to d, from column `block` of the matrix
 * on; targets are moved up to column block_end. */
WIDE static void feed_row(const struct row_chunk *c, const struct picker *p, int32_t row,
                          int32_t begin, int32_t end, int32_t block, int32_t block_end)
{
    size_t n = (size_t)c->n, at = (size_t)row * n;
    int n_slots = c->job->n_slots;
    float *t[CHUNK_SLOTS] = {0};
    uint8_t *code = c->code + (size_t)row * (size_t)c->code_stride;
    for (int s = 0; s < n_slots; s++) {
        t[s] = c->t[s] + at;
    }
    for (int32_t k = begin; k < end; k++) {
        const float *u = c->job->h->u + (size_t)k * n;
        int best = pick(p, t[0][k], n_slots > 1 ? t[1][k] : 0, n_slots > 2 ? t[2][k] : 0);
        code[k] = (uint8_t)best;
        for (int s = 0; s < n_slots; s++) {
            float e = (t[s][k] - p->level[s][best]) / u[k];
            c->d[s][(size_t)row * CHUNK_BLOCK + (size_t)(k - block)] = e;
            spread(t[s], e, u, k + 1, block_end);
        }
    }
}

/* What a block of columns does to all columns behind it: t -= d m. Returns its operations. */
static double spread_block(struct row_chunk *c, int s, const float *m, int32_t begin, int32_t end)
{
    int32_t left = c->n - end;
    if (left == 0) {
        return 0;
    }
    blas_gemm(c->rows, left, end - begin, -1.0f, c->d[s], CHUNK_BLOCK,
              m + (size_t)begin * (size_t)c->n + end, c->n, 1.0f, c->t[s] + end, c->n);
    return 2.0 * c->rows * (double)left * (end - begin);
}

void chunk_feedback(struct row_chunk *c)
{
    const struct chunk_job *job = c->job;
    int32_t width = job->spec->group_cols, n = c->n;
    double begin_s = clock_s(), start_s = 0, flop = 0;
    for (int s = 0; s < job->n_slots; s++) {
        memcpy(c->t[s], c->w, (size_t)c->rows * (size_t)n * sizeof *c->w);
    }
    for (int32_t block = 0; block < n; block += CHUNK_BLOCK) {
        int32_t end = n - block < CHUNK_BLOCK ? n : block + CHUNK_BLOCK;
        for (int32_t row = 0; row < c->rows; row++) {
            for (int32_t at = block; at < end; at += width) {
                int32_t stop = end - at < width ? end : at + width;
                struct picker p;
                double start = clock_s();
                start_group(c, row, at / width, at, stop - at);
                start_s += clock_s() - start;
                picker_set(&p, c, row, at / width);
                feed_row(c, &p, row, at, stop, block, end);
            }
        }
        for (int s = 0; s < job->n_slots; s++) {
            flop += spread_block(c, s, job->h->u, block, end);
        }
    }
    c->times->thread_s[FIT_START] += start_s;
    chunk_time(c, FIT_FEEDBACK, begin_s + start_s, flop);
}

/* ---- coordinate descent ---- */

/* The output error as a function of one code is a parabola in its level for every precision, with
 * its lowest point at level + gradient / H[k][k]: choosing a code is as in feedback, with that
 * target. */
WIDE static void sweep_row(const struct row_chunk *c, const struct picker *p, int32_t row,
                           int32_t begin, int32_t end, int32_t block, int32_t block_end,
                           float ridge)
{
    size_t n = (size_t)c->n, at = (size_t)row * n;
    int n_slots = c->job->n_slots;
    uint8_t *code = c->code + (size_t)row * (size_t)c->code_stride;
    for (int32_t k = begin; k < end; k++) {
        const float *h = c->job->h->h + (size_t)k * n;
        int now = code[k];
        float target[CHUNK_SLOTS] = {0};
        for (int s = 0; s < n_slots; s++) {
            target[s] = p->level[s][now] + c->t[s][at + (size_t)k] / (h[k] + ridge);
        }
        int best = pick(p, target[0], target[1], target[2]);
        code[k] = (uint8_t)best;
        for (int s = 0; s < n_slots; s++) {
            float change = p->level[s][best] - p->level[s][now];
            c->d[s][(size_t)row * CHUNK_BLOCK + (size_t)(k - block)] = change;
            if (best != now) {
                spread(c->t[s] + at, change, h, k + 1, block_end);
            }
        }
    }
}

/* t[s] = gradients (W - W_s) (H + ridge I); what is behind the column of the sweep is kept up to
 * date. */
void chunk_sweep(struct row_chunk *c)
{
    const struct chunk_job *job = c->job;
    int32_t width = job->spec->group_cols, n = c->n;
    size_t count = (size_t)c->rows * (size_t)n;
    double mean = job->h->mean_diag > 0 ? job->h->mean_diag : 1.0, begin_s = clock_s(), flop = 0;
    float ridge = (float)(SWEEP_RIDGE * mean);
    for (int s = 0; s < job->n_slots; s++) {
        chunk_difference(c->scratch, c, job->slot_bits[s]);
        blas_gemm(c->rows, n, n, 1.0f, c->scratch, n, job->h->h, n, 0.0f, c->t[s], n);
        flop += 2.0 * (double)count * n;
        for (size_t i = 0; i < count; i++) {
            c->t[s][i] += ridge * c->scratch[i];
        }
    }
    for (int32_t block = 0; block < n; block += CHUNK_BLOCK) {
        int32_t end = n - block < CHUNK_BLOCK ? n : block + CHUNK_BLOCK;
        for (int32_t row = 0; row < c->rows; row++) {
            for (int32_t at = block; at < end; at += width) {
                struct picker p;
                picker_set(&p, c, row, at / width);
                sweep_row(c, &p, row, at, end - at < width ? end : at + width, block, end, ridge);
            }
        }
        for (int s = 0; s < job->n_slots; s++) {
            flop += spread_block(c, s, job->h->h, block, end);
        }
    }
    chunk_time(c, FIT_SWEEP, begin_s, flop);
}

/* ---- the tail ---- */

WIDE static void tail_row(const struct row_chunk *c, const double level[3], int32_t row,
                          int32_t begin, int32_t end, int32_t block, int32_t block_end)
{
    size_t n = (size_t)c->n;
    float *t = c->t[0] + (size_t)row * n;
    uint8_t *code = c->code + (size_t)row * (size_t)c->code_stride;
    for (int32_t k = begin; k < end; k++) {
        const float *u = c->job->h->u + (size_t)k * n;
        double base = level[2] + level[0] * ((double)code[k] - 7.5);
        double step = rint(((double)t[k] - base) / level[1] + 7.5);
        step = step > 0 ? step < 15 ? step : 15 : 0; /* 0 for 0 / 0, too */
        code[k] = (uint8_t)(code[k] << 4 | (int)step);
        float e = (t[k] - (float)(base + level[1] * (step - 7.5))) / u[k];
        c->d[0][(size_t)row * CHUNK_BLOCK + (size_t)(k - block)] = e;
        spread(t, e, u, k + 1, block_end);
    }
}

void chunk_tail(struct row_chunk *c)
{
    int32_t width = c->job->spec->group_cols, n = c->n;
    double begin_s = clock_s(), flop = 0;
    memcpy(c->t[0], c->w, (size_t)c->rows * (size_t)n * sizeof *c->w);
    for (int32_t block = 0; block < n; block += CHUNK_BLOCK) {
        int32_t end = n - block < CHUNK_BLOCK ? n : block + CHUNK_BLOCK;
        for (int32_t row = 0; row < c->rows; row++) {
            for (int32_t at = block; at < end; at += width) {
                int32_t stop = end - at < width ? end : at + width;
                double *level = chunk_level(c, FIT_TAIL_BITS, row, at / width);
                group_start_tail(level, c->code + (size_t)row * (size_t)c->code_stride + at,
                                 c->t[0] + (size_t)row * (size_t)n + at, stop - at);
                tail_row(c, level, row, at, stop, block, end);
            }
        }
        flop += spread_block(c, 0, c->job->h->u, block, end);
    }
    c->code_bits = FIT_TAIL_BITS;
    chunk_time(c, FIT_TAIL, begin_s, flop);
}
