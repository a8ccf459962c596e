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

enum { GAUSS_SEIDEL_SWEEPS = 8, GRAM_BYTES_MAX = 32 << 20 };
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
    float *product;  /* (rows, n) */
    float *gram;     /* (rows, size, size) */
    double *right;   /* (size) */
};

/* Eight sums side by side, added in the same order at every width. */
WIDE static float dot(const float *a, const float *b, int32_t n)
{
    float part[8] = {0};
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; j++) {
            part[j] += a[i + j] * b[i + j];
        }
    }
    for (; i < n; i++) {
        part[i % 8] += a[i] * b[i];
    }
    return ((part[0] + part[4]) + (part[2] + part[6])) +
           ((part[1] + part[5]) + (part[3] + part[7]));
}

static float sum(const float *a, int32_t n)
{
    float part[8] = {0};
    for (int32_t i = 0; i < n; i++) {
        part[i % 8] += a[i];
    }
    return ((part[0] + part[4]) + (part[2] + part[6])) +
           ((part[1] + part[5]) + (part[3] + part[7]));
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

/* The row of equations of unknown (group, f) of one row, from `line` = its feature times H, whose
 * first element is column `begin`. */
static void fill_line(struct refit *r, int32_t row, int32_t group, int f, const float *line,
                      int32_t begin)
{
    int32_t width = r->c->job->spec->group_cols, n = r->c->n;
    for (int32_t g = group; g < r->c->job->n_groups; g++) {
        int32_t at = g * width, cols = n - at < width ? n - at : width;
        for (int e = 0; e < r->m - 1; e++) {
            set_gram(r, row, group * r->m + f, g * r->m + e,
                     dot(line + (at - begin), feature(r, e, row, at), cols));
        }
        set_gram(r, row, group * r->m + f, g * r->m + r->m - 1, sum(line + (at - begin), cols));
    }
}

static double fill_gram(struct refit *r)
{
    const struct chunk_job *job = r->c->job;
    int32_t width = job->spec->group_cols, n = r->c->n;
    double flop = 0;
    for (int32_t g = 0; g < job->n_groups; g++) {
        int32_t begin = g * width, cols = n - begin < width ? n - begin : width, left = n - begin;
        for (int f = 0; f < r->m - 1; f++) {
            blas_gemm(r->rows, left, cols, 1.0f, feature(r, f, 0, begin), n,
                      job->h->h + (size_t)begin * (size_t)n + begin, n, 0.0f, r->product, left);
            flop += 2.0 * r->rows * (double)left * cols;
            for (int32_t row = 0; row < r->rows; row++) {
                float *line = r->product + (size_t)row * (size_t)left;
                const float *own = feature(r, f, row, begin);
                for (int32_t k = 0; k < cols; k++) {
                    line[k] += r->ridge * own[k];
                }
                fill_line(r, row, g, f, line, begin);
            }
        }
        /* the offsets' line, a sum of rows of H, is the same for all rows */
        memcpy(r->product, job->group_sums + (size_t)g * (size_t)n + begin,
               (size_t)left * sizeof *r->product);
        for (int32_t k = 0; k < cols; k++) {
            r->product[k] += r->ridge;
        }
        for (int32_t row = 0; row < r->rows; row++) {
            fill_line(r, row, g, r->m - 1, r->product, begin);
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
    TRY_GOTO(st, MEM_NEW(&r.product, (size_t)step * n), done);
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
