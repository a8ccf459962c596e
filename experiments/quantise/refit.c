/* The refit of hessian_fit.h: codes fixed, all levels of a row by least squares on H.
 *
 * With F (n, unknowns) the features of a row's codes, each group in columns of its own, the levels
 * x make (w - F x)^T H (w - F x) small: F^T H F x = F^T H w. F^T H is one product per group and
 * feature for all rows of the chunk; what is solved has only a few unknowns per group.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/quantise/group_moments.h"
#include "experiments/quantise/row_chunk.h"
#include "experiments/quantise/wide.h"

/* STRIP: columns of H at a time, a multiple of every group. */
enum { GAUSS_SEIDEL_SWEEPS = 8, GRAM_BYTES_MAX = 32 << 20, STRIP = 512 };
/* The diagonal of H is raised by this share of its mean, that of a group's equations by this share
 * of their trace: levels without weights keep what they have. */
static const double H_RIDGE = 1e-4, UNKNOWN_RIDGE = 1e-8;

struct refit {
    struct row_chunk *c; /* borrowed */
    int bits, m;         /* unknowns per group */
    enum level_kind kind;
    int32_t size;    /* unknowns of a row */
    int32_t rows;    /* at a time */
    float ridge;     /* on the diagonal of H */
    float *features; /* (m - 1, rows, n) */
    float *product;  /* (m - 1, rows, STRIP) */
    float *gram;     /* (rows, size, size) */
    double *right;   /* (size) */
};

/* Sixteen sums side by side, added in the same order at every width. */
enum { N_PARTS = 16 };

static float add_parts(const float part[N_PARTS])
{
    float sum[4];
    for (int j = 0; j < 4; j++) {
        sum[j] = (part[j] + part[j + 8]) + (part[j + 4] + part[j + 12]);
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

WIDE static float dot(const float *a, const float *b, int32_t n)
{
    float part[N_PARTS] = {0};
    int32_t i = 0;
    for (; i + N_PARTS <= n; i += N_PARTS) {
        for (int j = 0; j < N_PARTS; j++) {
            part[j] += a[i + j] * b[i + j];
        }
    }
    for (; i < n; i++) {
        part[i % N_PARTS] += a[i] * b[i];
    }
    return add_parts(part);
}

WIDE static float sum(const float *a, int32_t n)
{
    float part[N_PARTS] = {0};
    int32_t i = 0;
    for (; i + N_PARTS <= n; i += N_PARTS) {
        for (int j = 0; j < N_PARTS; j++) {
            part[j] += a[i + j];
        }
    }
    for (; i < n; i++) {
        part[i % N_PARTS] += a[i];
    }
    return add_parts(part);
}

static void make_features(struct refit *r, int32_t first)
{
    const struct row_chunk *c = r->c;
    float value[LEVELS_MAX];
    size_t n = (size_t)c->n;
    for (int f = 0; f < r->m - 1; f++) {
        for (uint32_t code = 0; code < 1u << r->bits; code++) {
            value[code] = level_feature(r->kind, r->bits, code, f);
        }
        for (int32_t row = 0; row < r->rows; row++) {
            float *to = r->features + ((size_t)f * (size_t)r->rows + (size_t)row) * n;
            for (int32_t k = 0; k < c->n; k++) {
                to[k] = value[chunk_code(c, r->bits, first + row, k)];
            }
        }
    }
}

static const float *feature(const struct refit *r, int f, int32_t row, int32_t col)
{
    return r->features + ((size_t)f * (size_t)r->rows + (size_t)row) * (size_t)r->c->n + col;
}

static void set_gram(struct refit *r, int32_t row, int32_t i, int32_t j, float v)
{
    float *gram = r->gram + (size_t)row * (size_t)r->size * (size_t)r->size;
    gram[(size_t)i * (size_t)r->size + (size_t)j] = v;
    gram[(size_t)j * (size_t)r->size + (size_t)i] = v;
}

/* Part of the row of equations of unknown (group, f) of one row of W: from `line` = its feature
 * times columns [begin, end) of H. begin is the first column of a group. */
static void fill_line(struct refit *r, int32_t row, int32_t group, int f, const float *line,
                      int32_t begin, int32_t end)
{
    int32_t width = r->c->job->spec->group_cols;
    for (int32_t at = begin; at < end; at += width) {
        int32_t cols = end - at < width ? end - at : width, to = at / width * r->m;
        for (int e = 0; e < r->m - 1; e++) {
            set_gram(r, row, group * r->m + f, to + e,
                     dot(line + (at - begin), feature(r, e, row, at), cols));
        }
        set_gram(r, row, group * r->m + f, to + r->m - 1, sum(line + (at - begin), cols));
    }
}

/* The products of the features of one group with columns [begin, end) of H, for all features and
 * rows at once: few enough columns that they stay in the cache until they are summed up. */
static double fill_strip(struct refit *r, int32_t group, int32_t begin, int32_t end)
{
    const struct chunk_job *job = r->c->job;
    int32_t width = job->spec->group_cols, n = r->c->n, own = group * width;
    int32_t cols = n - own < width ? n - own : width, left = end - begin;
    int32_t lines = (r->m - 1) * r->rows;
    blas_gemm(lines, left, cols, 1.0f, r->features + own, n,
              job->h->h + (size_t)own * (size_t)n + begin, n, 0.0f, r->product, left);
    for (int32_t i = 0; i < lines; i++) {
        float *line = r->product + (size_t)i * (size_t)left;
        const float *with = r->features + (size_t)i * (size_t)n + own;
        for (int32_t k = 0; begin == own && k < cols; k++) {
            line[k] += r->ridge * with[k];
        }
        fill_line(r, i % r->rows, group, i / r->rows, line, begin, end);
    }
    /* the offsets' line, a sum of rows of H, is the same for all rows */
    memcpy(r->product, job->group_sums + (size_t)group * (size_t)n + begin,
           (size_t)left * sizeof *r->product);
    for (int32_t k = 0; begin == own && k < cols; k++) {
        r->product[k] += r->ridge;
    }
    for (int32_t row = 0; row < r->rows; row++) {
        fill_line(r, row, group, r->m - 1, r->product, begin, end);
    }
    return 2.0 * lines * (double)left * cols;
}

static double fill_gram(struct refit *r)
{
    double flop = 0;
    for (int32_t g = 0; g < r->c->job->n_groups; g++) {
        int32_t first = g * r->c->job->spec->group_cols;
        for (int32_t begin = first; begin < r->c->n; begin += STRIP) {
            int32_t end = r->c->n - begin < STRIP ? r->c->n : begin + STRIP;
            flop += fill_strip(r, g, begin, end);
        }
    }
    return flop;
}

static void fill_right(struct refit *r, int32_t row, int32_t chunk_row)
{
    const struct row_chunk *c = r->c;
    int32_t width = c->job->spec->group_cols;
    const float *w = c->w + (size_t)chunk_row * (size_t)c->n;
    const float *wh = c->wh + (size_t)chunk_row * (size_t)c->n;
    memset(r->right, 0, (size_t)r->size * sizeof *r->right);
    for (int32_t k = 0; k < c->n; k++) {
        double *right = r->right + (size_t)(k / width) * (size_t)r->m;
        double v = (double)wh[k] + (double)r->ridge * (double)w[k];
        for (int f = 0; f < r->m - 1; f++) {
            right[f] += (double)*feature(r, f, row, k) * v;
        }
        right[r->m - 1] += v;
    }
}

static void solve_row(const struct refit *r, int32_t row, double *x)
{
    const float *gram = r->gram + (size_t)row * (size_t)r->size * (size_t)r->size;
    int m = r->m;
    for (int sweep = 0; sweep < GAUSS_SEIDEL_SWEEPS; sweep++) {
        for (int32_t g = 0; g < r->size / m; g++) {
            double a[N_UNKNOWNS_MAX][N_UNKNOWNS_MAX], b[N_UNKNOWNS_MAX];
            for (int f = 0; f < m; f++) {
                const float *line = gram + (size_t)(g * m + f) * (size_t)r->size;
                b[f] = r->right[g * m + f];
                for (int32_t j = 0; j < r->size; j++) {
                    b[f] -= (double)line[j] * x[j];
                }
                for (int e = 0; e < m; e++) {
                    a[f][e] = (double)line[g * m + e];
                }
            }
            if (!(a[m - 1][m - 1] > 0)) {
                continue; /* no activation at all in this group */
            }
            group_solve(a, b, m, UNKNOWN_RIDGE);
            for (int f = 0; f < m; f++) {
                x[g * m + f] += b[f];
            }
        }
    }
}

enum status chunk_refit(struct row_chunk *c, int bits)
{
    double begin = clock_s(), flop = 0;
    struct refit r = {.c = c, .bits = bits, .kind = c->job->spec->kind[bits]};
    r.m = level_unknowns(r.kind, bits);
    r.size = r.m * c->job->n_groups;
    r.ridge = (float)(H_RIDGE * c->job->h->mean_diag);
    size_t gram = (size_t)r.size * (size_t)r.size, n = (size_t)c->n;
    size_t most = GRAM_BYTES_MAX / (gram * sizeof *r.gram);
    int32_t step = most < 1 ? 1 : most < (size_t)c->rows ? (int32_t)most : c->rows;
    enum status st = ST_OK;
    TRY_GOTO(st, MEM_NEW(&r.gram, (size_t)step * gram), done);
    TRY_GOTO(st, MEM_NEW(&r.features, (size_t)(r.m - 1) * (size_t)step * n), done);
    TRY_GOTO(st, MEM_NEW(&r.product, (size_t)(r.m - 1) * (size_t)step * STRIP), done);
    TRY_GOTO(st, MEM_NEW(&r.right, r.size), done);
    for (int32_t first = 0; first < c->rows; first += step) {
        r.rows = c->rows - first < step ? c->rows - first : step;
        make_features(&r, first);
        flop += fill_gram(&r);
        for (int32_t row = 0; row < r.rows; row++) {
            fill_right(&r, row, first + row);
            solve_row(&r, row, chunk_level(c, bits, first + row, 0));
        }
    }
    chunk_time(c, FIT_REFIT, begin, flop);
done:
    mem_free(r.gram);
    mem_free(r.features);
    mem_free(r.product);
    mem_free(r.right);
    return st;
}
