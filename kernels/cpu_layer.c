/* The operations of the cpu backend between products and attention: residual, embedding, norms,
 * rotary embedding, activations. For one token they are cheaper than waking a thread.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/cpu.h"

enum {
    SUM_BLOCK = 128,
    ACT_BLOCK = 64 /* values: whole vectors and cache lines for each thread */
};

static void add_floats(float *to, const float *from, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        to[i] += from[i];
    }
}

enum status cpu_add_parts(struct backend *be, struct tensor *x, const struct tensor *parts,
                          const struct tensor *bias)
{
    (void)be;
    size_t n_tok = (size_t)x->dims[0], n = (size_t)x->dims[1], all = n_tok * n;
    size_t n_parts = parts->n_dims == 3 ? (size_t)parts->dims[0] : 1;
    const float *part = parts->data, *b = bias ? bias->data : NULL;
    /* The order is fixed to the bit by the header: part by part, then the bias, then x. A block of
     * sums at a time, so that neighbours are added together. */
    for (size_t t = 0; t < n_tok; t++) {
        for (size_t begin = 0; begin < n; begin += SUM_BLOCK) {
            size_t n_now = n - begin < SUM_BLOCK ? n - begin : SUM_BLOCK;
            float *to = (float *)x->data + t * n + begin, sum[SUM_BLOCK];
            memcpy(sum, part + t * n + begin, n_now * sizeof *sum);
            for (size_t p = 1; p < n_parts; p++) {
                add_floats(sum, part + p * all + t * n + begin, n_now);
            }
            if (b) {
                add_floats(sum, b + begin, n_now);
            }
            add_floats(to, sum, n_now);
        }
    }
    return ST_OK;
}

enum status cpu_embed(struct backend *be, struct tensor *x, const struct tensor *table,
                      const struct tensor *ids)
{
    const struct cpu *cpu = be->impl;
    TRY(host_check_ids(ids, table->dims[0]));
    const int32_t *id = ids->data;
    size_t n = (size_t)x->dims[1], row_bytes = n * dtype_bytes(table->dtype);
    for (int32_t t = 0; t < x->dims[0]; t++) {
        const char *row = (const char *)table->data + (size_t)id[t] * row_bytes;
        cpu->isa->convert((float *)x->data + (size_t)t * n, row, table->dtype, x->dims[1]);
    }
    return ST_OK;
}

/* What the rows of a norm need. */
struct norm {
    const struct cpu_loops *loops;
    float *to;
    const float *from, *gain, *bias;
    int32_t n;
    float eps;
};

static void rms_rows(void *context, size_t begin, size_t end)
{
    const struct norm *c = context;
    for (size_t at = begin * (size_t)c->n; at < end * (size_t)c->n; at += (size_t)c->n) {
        c->loops->rmsnorm(c->to + at, c->from + at, c->gain, c->n, c->eps);
    }
}

static void layer_rows(void *context, size_t begin, size_t end)
{
    const struct norm *c = context;
    for (size_t at = begin * (size_t)c->n; at < end * (size_t)c->n; at += (size_t)c->n) {
        c->loops->layernorm(c->to + at, c->from + at, c->gain, c->bias, c->n, c->eps);
    }
}

enum status cpu_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                        const struct tensor *gain, float eps)
{
    const struct cpu *cpu = be->impl;
    struct norm c = {cpu->isa->loops, y->data, x->data, gain->data, NULL, x->dims[1], eps};
    cpu_share(cpu_threads(cpu, tensor_count(x)), (size_t)x->dims[0], 1, rms_rows, &c);
    return ST_OK;
}

enum status cpu_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                          const struct tensor *gain, const struct tensor *bias, float eps)
{
    const struct cpu *cpu = be->impl;
    struct norm c = {cpu->isa->loops,          y->data,    x->data, gain->data,
                     bias ? bias->data : NULL, x->dims[1], eps};
    cpu_share(cpu_threads(cpu, tensor_count(x) * 2), (size_t)x->dims[0], 1, layer_rows, &c);
    return ST_OK;
}

struct turn {
    const struct cpu_loops *loops;
    const struct tensor *q, *k;
    const int32_t *pos;
    const struct rope_table *table;
};

static void turn_tokens(void *context, size_t begin, size_t end)
{
    const struct turn *c = context;
    int32_t q_heads = c->q->dims[1], k_heads = c->k->dims[1], head_dim = c->q->dims[2];
    int32_t half = c->table->rot_dim / 2;
    size_t q_floats = (size_t)q_heads * (size_t)head_dim,
           k_floats = (size_t)k_heads * (size_t)head_dim;
    for (size_t t = begin; t < end; t++) {
        size_t angle = (size_t)c->pos[t] * (size_t)half;
        const float *cosine = (const float *)c->table->cos.data + angle;
        const float *sine = (const float *)c->table->sin.data + angle;
        c->loops->rotate((float *)c->q->data + t * q_floats, q_heads, head_dim, half, cosine, sine);
        c->loops->rotate((float *)c->k->data + t * k_floats, k_heads, head_dim, half, cosine, sine);
    }
}

enum status cpu_rope(struct backend *be, struct tensor *q, struct tensor *k,
                     const struct token_place *place, const struct rope_table *table)
{
    const struct cpu *cpu = be->impl;
    TRY(host_check_place("rope", place, 0, 0));
    struct turn c = {cpu->isa->loops, q, k, place->pos.data, table};
    cpu_share(cpu_threads(cpu, tensor_count(q) + tensor_count(k)), (size_t)q->dims[0], 1,
              turn_tokens, &c);
    return ST_OK;
}

struct values {
    const struct cpu_loops *loops;
    float *to;
    const float *from, *up;
};

static void silu_values(void *context, size_t begin, size_t end)
{
    const struct values *c = context;
    c->loops->silu_gate(c->to + begin, c->from + begin, c->up + begin, end - begin);
}

static void gelu_tanh_values(void *context, size_t begin, size_t end)
{
    const struct values *c = context;
    c->loops->gelu_tanh(c->to + begin, c->from + begin, end - begin);
}

static void gelu_erf_values(void *context, size_t begin, size_t end)
{
    const struct values *c = context;
    for (size_t i = begin; i < end; i++) {
        c->to[i] = 0.5f * c->from[i] * erfcf(-0.70710678f * c->from[i]);
    }
}

enum status cpu_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                    const struct tensor *up, enum activation act)
{
    (void)act; /* the wrapper lets only SiLU through */
    const struct cpu *cpu = be->impl;
    struct values c = {cpu->isa->loops, y->data, gate->data, up->data};
    size_t n = tensor_count(y);
    cpu_share(cpu_threads(cpu, n * 8), n, ACT_BLOCK, silu_values, &c);
    return ST_OK;
}

enum status cpu_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                         enum activation act)
{
    const struct cpu *cpu = be->impl;
    struct values c = {cpu->isa->loops, y->data, x->data, NULL};
    size_t n = tensor_count(y);
    if (act == ACT_GELU_TANH) {
        cpu_share(cpu_threads(cpu, n * 8), n, ACT_BLOCK, gelu_tanh_values, &c);
    } else { /* libm's function, value by value: some 4 ns each */
        cpu_share(cpu_threads(cpu, n * 64), n, ACT_BLOCK, gelu_erf_values, &c);
    }
    return ST_OK;
}

enum status cpu_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                        const int32_t *cut, int32_t n_cuts)
{
    const struct cpu *cpu = be->impl;
    int32_t n_tok = x->dims[0], n = x->dims[1];
    const int32_t whole[] = {0, n};
    float *to = out->data;
    cut = cut ? cut : whole;
    for (int32_t t = 0; t < n_tok; t++) {
        const float *row = (const float *)x->data + (size_t)t * (size_t)n;
        for (int32_t c = 0; c < n_cuts; c++, to += 2) {
            cpu->isa->loops->moments(to, row + cut[c], cut[c + 1] - cut[c]);
        }
    }
    return ST_OK;
}
