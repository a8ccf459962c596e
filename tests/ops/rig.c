/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/ops/rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/kernels.h"

static void must(enum status st, const char *what)
{
    if (st != ST_OK) {
        fprintf(stderr, "%s: %s: %s\n%s", what, status_name(st), status_message(),
                status_traceback());
        exit(1);
    }
}

uint64_t rig_next(struct rig_rng *rng)
{
    uint64_t z = rng->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

float rig_float(struct rig_rng *rng)
{
    return (float)(rig_next(rng) >> 40) * 0x1p-23f - 1.0f;
}

void rig_floats(struct rig_rng *rng, float *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = rig_float(rng);
    }
}

int rig_below(struct rig_rng *rng, int n)
{
    return (int)(rig_next(rng) % (uint64_t)n);
}

void *rig_alloc(size_t n, size_t size)
{
    void *block = calloc(n ? n : 1, size);
    if (!block) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return block;
}

extern const struct backend_ops cuda_emulated_ops;

void rig_register(void)
{
    kernels_register_all();
    backend_register(&cuda_emulated_ops);
}

enum status rig_try_open(struct backend *out, const char *name, int n_threads)
{
    struct backend_options options = {.n_threads = n_threads, .device = -1};
    const char *isa = strncmp(name, "cpu/", 4) == 0 ? name + 4 : NULL;
    options.isa = isa;
    return backend_open(out, isa ? "cpu" : name, &options);
}

struct backend rig_open(const char *name, int n_threads)
{
    struct backend be;
    must(rig_try_open(&be, name, n_threads), name);
    return be;
}

bool rig_has(const char *name)
{
    struct backend be;
    enum status st = rig_try_open(&be, name, 1);
    backend_close(&be);
    return st == ST_OK;
}

/* ---- matrices ---- */

static void *block(struct rig_matrix *m, size_t n, size_t size)
{
    return m->blocks[m->n_blocks++] = rig_alloc(n, size);
}

static uint16_t *halves(struct rig_matrix *m, struct rig_rng *rng, size_t n)
{
    uint16_t *out = block(m, n, sizeof *out);
    for (size_t i = 0; i < n; i++) {
        /* sign, exponents 2^-6..2^0, any mantissa */
        uint64_t r = rig_next(rng);
        out[i] = (uint16_t)((r & 0x83ff) | (9 + (r >> 32) % 7) << 10);
    }
    return out;
}

void rig_matrix_make(struct rig_matrix *m, struct rig_rng *rng, int32_t n_rows, int32_t n_cols,
                     int32_t group_cols, int n_planes, const enum level_kind kind[BITS_ALL])
{
    *m = (struct rig_matrix){0};
    struct nested_source *src = &m->src;
    src->n_rows = n_rows;
    src->n_cols = n_cols;
    src->group_cols = group_cols;
    src->n_cols_padded = (n_cols + group_cols - 1) / group_cols * group_cols;
    src->n_planes = n_planes;
    size_t n_bytes = (size_t)n_planes * (size_t)n_rows * (size_t)src->n_cols_padded / 8;
    uint8_t *planes = block(m, n_bytes, 1);
    for (size_t i = 0; i < n_bytes; i++) {
        planes[i] = (uint8_t)rig_next(rng);
    }
    src->planes = planes;
    size_t n = (size_t)n_rows * (size_t)(src->n_cols_padded / group_cols);
    for (int b = 1; b <= n_planes; b++) {
        src->kind[b] = kind[b];
        if (kind[b] == LEVEL_TIED || kind[b] == LEVEL_TAIL) {
            src->scale[b] = halves(m, rng, n);
        }
        if (kind[b] == LEVEL_FREE) {
            src->alpha[b] = halves(m, rng, n * (size_t)b);
        }
        if (kind[b] == LEVEL_LUT) {
            src->lut[b] = halves(m, rng, (size_t)n_rows << b);
        } else if (kind[b] != LEVEL_NONE) {
            src->offset[b] = halves(m, rng, n);
        }
        if (kind[b] == LEVEL_TAIL) {
            src->tail = halves(m, rng, n);
        }
    }
}

void rig_matrix_free(struct rig_matrix *m)
{
    for (int i = 0; i < m->n_blocks; i++) {
        free(m->blocks[i]);
    }
    *m = (struct rig_matrix){0};
}

double rig_f16(uint16_t h)
{
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double sign = h >> 15 ? -1 : 1;
    if (exponent == 31) {
        return mantissa ? (double)NAN : sign * HUGE_VAL;
    }
    return exponent ? sign * ldexp(1024 + mantissa, exponent - 25) : sign * ldexp(mantissa, -24);
}

static int plane_bit(const struct nested_source *src, int plane, int32_t row, int32_t col)
{
    size_t at =
        ((size_t)plane * (size_t)src->n_rows + (size_t)row) * (size_t)(src->n_cols_padded / 8) +
        (size_t)(col / 8);
    return src->planes[at] >> (col % 8) & 1;
}

double rig_weight(const struct nested_source *src, int32_t row, int32_t col, int bits)
{
    size_t n_groups = (size_t)(src->n_cols_padded / src->group_cols);
    size_t group = (size_t)row * n_groups + (size_t)(col / src->group_cols);
    int code = 0, high = 0, low = 0;
    double sum = 0;
    for (int p = 0; p < bits; p++) {
        int bit = plane_bit(src, p, row, col);
        code = 2 * code + bit;
        if (p < 4) {
            high = 2 * high + bit;
        } else {
            low = 2 * low + bit;
        }
        if (src->kind[bits] == LEVEL_FREE) {
            sum += rig_f16(src->alpha[bits][group * (size_t)bits + (size_t)p]) * (2 * bit - 1);
        }
    }
    switch (src->kind[bits]) {
    case LEVEL_TIED:
        return rig_f16(src->offset[bits][group]) +
               rig_f16(src->scale[bits][group]) * (2 * code - ((1 << bits) - 1)) / 2.0;
    case LEVEL_FREE:
        return rig_f16(src->offset[bits][group]) + sum;
    case LEVEL_LUT:
        return rig_f16(src->lut[bits][((size_t)row << bits) + (size_t)code]);
    case LEVEL_TAIL:
        return rig_f16(src->offset[bits][group]) +
               rig_f16(src->scale[bits][group]) * (2 * high - 15) / 2.0 +
               rig_f16(src->tail[group]) * (2 * low - 15) / 2.0;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    return (double)NAN;
}

struct matrix_range rig_whole(const struct nested_source *src)
{
    return (struct matrix_range){.row_end = src->n_rows, .col_end = src->n_cols};
}

/* ---- tensors ---- */

struct tensor rig_room(struct backend *be, struct tensor shape)
{
    must(backend_alloc(be, &shape.data, tensor_bytes(&shape)), "backend_alloc");
    return shape;
}

struct tensor rig_put(struct backend *be, struct tensor host)
{
    struct tensor t = rig_room(be, host);
    must(backend_upload(be, t.data, host.data, tensor_bytes(&host)), "backend_upload");
    return t;
}

void rig_get(struct backend *be, void *host, const struct tensor *from)
{
    must(backend_download(be, host, from->data, tensor_bytes(from)), "backend_download");
    must(backend_sync(be), "backend_sync");
}

void rig_drop(struct backend *be, struct tensor *t)
{
    backend_release(be, t->data);
    t->data = NULL;
}

static struct tensor room_for_y(struct backend *be, int32_t n_segments, int32_t n_tok,
                                int32_t n_rows)
{
    return rig_room(be, n_segments == 1 ? tensor_2d(NULL, DT_F32, n_tok, n_rows)
                                        : tensor_3d(NULL, DT_F32, n_segments, n_tok, n_rows));
}

enum status rig_nested(struct backend *be, float *y, const struct nested_matrix *w,
                       const uint8_t *bits, const float *x, int32_t n_tok, const float *bias,
                       const int32_t *cut, int32_t n_segments, enum product product)
{
    struct how how = {.product = product, .n_segments = n_segments, .cut = cut};
    for (int32_t i = 0; i < n_tok; i++) {
        how.bits_used |= 1u << bits[i];
    }
    uint8_t *own_bits = rig_alloc((size_t)n_tok, 1);
    float *own_x = rig_alloc((size_t)n_tok * (size_t)w->n_cols, sizeof *own_x);
    memcpy(own_bits, bits, (size_t)n_tok);
    memcpy(own_x, x, (size_t)n_tok * (size_t)w->n_cols * sizeof *x);
    struct tensor bits_t = rig_put(be, tensor_1d(own_bits, DT_U8, n_tok));
    struct tensor x_t = rig_put(be, tensor_2d(own_x, DT_F32, n_tok, w->n_cols));
    struct tensor y_t = room_for_y(be, n_segments, n_tok, w->n_rows), bias_t = {0};
    if (bias) {
        bias_t = rig_room(be, tensor_1d(NULL, DT_F32, w->n_rows));
        must(backend_upload(be, bias_t.data, bias, tensor_bytes(&bias_t)), "bias");
    }
    enum status st = backend_matmul_nested(be, &y_t, w, &bits_t, &x_t, bias ? &bias_t : NULL, &how);
    if (st == ST_OK) {
        rig_get(be, y, &y_t);
    }
    rig_drop(be, &bits_t);
    rig_drop(be, &x_t);
    rig_drop(be, &y_t);
    rig_drop(be, &bias_t);
    free(own_bits);
    free(own_x);
    return st;
}

enum status rig_dense(struct backend *be, float *y, const struct tensor *w_host, const float *x,
                      int32_t n_tok, const float *bias, const int32_t *cut, int32_t n_segments,
                      enum product product)
{
    const struct how how = {.product = product, .n_segments = n_segments, .cut = cut};
    int32_t n_rows = w_host->dims[0], n_cols = w_host->dims[1];
    struct tensor w_t = rig_put(be, *w_host);
    struct tensor x_t = rig_room(be, tensor_2d(NULL, DT_F32, n_tok, n_cols));
    must(backend_upload(be, x_t.data, x, tensor_bytes(&x_t)), "x");
    struct tensor y_t = room_for_y(be, n_segments, n_tok, n_rows), bias_t = {0};
    if (bias) {
        bias_t = rig_room(be, tensor_1d(NULL, DT_F32, n_rows));
        must(backend_upload(be, bias_t.data, bias, tensor_bytes(&bias_t)), "bias");
    }
    enum status st = backend_matmul_dense(be, &y_t, &w_t, &x_t, bias ? &bias_t : NULL, &how);
    if (st == ST_OK) {
        rig_get(be, y, &y_t);
    }
    rig_drop(be, &w_t);
    rig_drop(be, &x_t);
    rig_drop(be, &y_t);
    rig_drop(be, &bias_t);
    return st;
}
