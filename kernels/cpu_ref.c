/* cpu_ref: the oracle. One thread, strict IEEE, every sum in double and rounded to f32 once; no
 * vector code, no reordering, nothing clever. Products with weights are in cpu_ref_matmul.c.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu_ref.h"

#include <math.h>

#include "core/mem.h"
#include "core/sampler.h"
#include "kernels/kernels.h"

static enum status ref_open(struct backend *be, const struct backend_options *options)
{
    (void)options; /* one thread, whatever is asked for */
    struct cpu_ref *ref = NULL;
    TRY(MEM_NEW(&ref, 1));
    be->impl = ref;
    return ST_OK;
}

static void ref_close(struct backend *be)
{
    struct cpu_ref *ref = be->impl;
    mem_free(ref->row.data);
    mem_free(ref->scores);
    mem_free(ref);
}

static const char *ref_arithmetic(const struct backend *be)
{
    (void)be;
    return "scalar";
}

static enum status ref_add_parts(struct backend *be, struct tensor *x, const struct tensor *parts,
                                 const struct tensor *bias)
{
    (void)be;
    size_t n = tensor_count(x), n_parts = parts->n_dims == 3 ? (size_t)parts->dims[0] : 1;
    size_t width = (size_t)x->dims[1];
    float *to = x->data;
    const float *part = parts->data, *b = bias ? bias->data : NULL;
    /* f32 in this order is the definition: gathered partials have to add up alike on all ranks */
    for (size_t i = 0; i < n; i++) {
        float sum = part[i];
        for (size_t p = 1; p < n_parts; p++) {
            sum += part[p * n + i];
        }
        if (b) {
            sum += b[i % width];
        }
        to[i] += sum;
    }
    return ST_OK;
}

static enum status ref_embed(struct backend *be, struct tensor *x, const struct tensor *table,
                             const struct tensor *ids)
{
    (void)be;
    TRY(host_check_ids(ids, table->dims[0]));
    const int32_t *id = ids->data;
    for (int32_t i = 0; i < x->dims[0]; i++) {
        struct tensor row = tensor_rows(table, id[i], id[i] + 1);
        struct tensor to = tensor_rows(x, i, i + 1);
        floats_from(to.data, row.data, table->dtype, (size_t)x->dims[1]);
    }
    return ST_OK;
}

static enum status ref_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                               const struct tensor *gain, float eps)
{
    (void)be;
    int32_t n = x->dims[1];
    const float *g = gain->data;
    for (int32_t t = 0; t < x->dims[0]; t++) {
        const float *from = (const float *)x->data + (size_t)t * (size_t)n;
        float *to = (float *)y->data + (size_t)t * (size_t)n;
        double sum = 0;
        for (int32_t i = 0; i < n; i++) {
            sum += (double)from[i] * (double)from[i];
        }
        double inverse = 1 / sqrt(sum / n + (double)eps);
        for (int32_t i = 0; i < n; i++) {
            to[i] = (float)((double)from[i] * inverse * (double)g[i]);
        }
    }
    return ST_OK;
}

static enum status ref_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                 const struct tensor *gain, const struct tensor *bias, float eps)
{
    (void)be;
    int32_t n = x->dims[1];
    const float *g = gain->data, *b = bias ? bias->data : NULL;
    for (int32_t t = 0; t < x->dims[0]; t++) {
        const float *from = (const float *)x->data + (size_t)t * (size_t)n;
        float *to = (float *)y->data + (size_t)t * (size_t)n;
        double sum = 0, squares = 0;
        for (int32_t i = 0; i < n; i++) {
            sum += (double)from[i];
        }
        double mean = sum / n;
        for (int32_t i = 0; i < n; i++) {
            squares += ((double)from[i] - mean) * ((double)from[i] - mean);
        }
        double inverse = 1 / sqrt(squares / n + (double)eps);
        for (int32_t i = 0; i < n; i++) {
            double v = ((double)from[i] - mean) * inverse * (double)g[i];
            to[i] = (float)(b ? v + (double)b[i] : v);
        }
    }
    return ST_OK;
}

/* Rotates the heads of one tensor (n_tok, n_heads, head_dim). */
static void rotate(struct tensor *x, const int32_t *pos, const struct rope_table *table)
{
    int32_t half = table->rot_dim / 2, n_heads = x->dims[1], head_dim = x->dims[2];
    for (int32_t t = 0; t < x->dims[0]; t++) {
        size_t angle = (size_t)pos[t] * (size_t)half;
        const float *c = (const float *)table->cos.data + angle;
        const float *s = (const float *)table->sin.data + angle;
        for (int32_t h = 0; h < n_heads; h++) {
            size_t head = (size_t)t * (size_t)n_heads + (size_t)h;
            float *v = (float *)x->data + head * (size_t)head_dim;
            for (int32_t i = 0; i < half; i++) {
                double a = (double)v[i], b = (double)v[i + half];
                v[i] = (float)(a * (double)c[i] - b * (double)s[i]);
                v[i + half] = (float)(b * (double)c[i] + a * (double)s[i]);
            }
        }
    }
}

static enum status ref_rope(struct backend *be, struct tensor *q, struct tensor *k,
                            const struct token_place *place, const struct rope_table *table)
{
    (void)be;
    TRY(host_check_place("rope", place, 0, 0));
    rotate(q, place->pos.data, table);
    rotate(k, place->pos.data, table);
    return ST_OK;
}

/* Where row `row` of one head of one slot begins in a cache, in elements. */
static size_t kv_at(const struct tensor *cache, int32_t slot, int32_t head, int32_t row)
{
    size_t at = (size_t)slot * (size_t)cache->dims[1] + (size_t)head;
    return (at * (size_t)cache->dims[2] + (size_t)row) * (size_t)cache->dims[3];
}

static double kv_value(const struct tensor *cache, size_t at)
{
    if (cache->dtype == DT_F16) {
        return (double)f16_to_f32(((const uint16_t *)cache->data)[at]);
    }
    return (double)((const float *)cache->data)[at];
}

static void kv_write(struct tensor *cache, const struct tensor *from,
                     const struct token_place *place)
{
    const int32_t *slot = place->slot.data, *row = place->kv_row.data;
    const float *value = from->data;
    for (int32_t t = 0; t < from->dims[0]; t++) {
        for (int32_t h = 0; h < from->dims[1]; h++) {
            size_t at = kv_at(cache, slot[t], h, row[t]);
            for (int32_t i = 0; i < from->dims[2]; i++, at++, value++) {
                if (cache->dtype == DT_F16) {
                    ((uint16_t *)cache->data)[at] = f32_to_f16(*value);
                } else {
                    ((float *)cache->data)[at] = *value;
                }
            }
        }
    }
}

static enum status ref_kv_append(struct backend *be, struct kv_layer *kv, const struct tensor *k,
                                 const struct tensor *v, const struct token_place *place)
{
    (void)be;
    TRY(host_check_place("kv_append", place, kv->k.dims[0], kv->k.dims[2]));
    kv_write(&kv->k, k, place);
    kv_write(&kv->v, v, place);
    return ST_OK;
}

/* The j-th row that a token at pos attends to: 0..pos-1, then its own. */
static int32_t attended_row(int32_t j, int32_t pos, int32_t kv_row)
{
    return j < pos ? j : kv_row;
}

static void attend(float *y, const float *q, double *scores, const struct kv_layer *kv,
                   int32_t slot, int32_t kv_head, int32_t pos, int32_t kv_row, double scale)
{
    int32_t head_dim = kv->k.dims[3];
    double max = -HUGE_VAL, sum = 0;
    for (int32_t j = 0; j <= pos; j++) {
        size_t at = kv_at(&kv->k, slot, kv_head, attended_row(j, pos, kv_row));
        double dot = 0;
        for (int32_t i = 0; i < head_dim; i++) {
            dot += (double)q[i] * kv_value(&kv->k, at + (size_t)i);
        }
        scores[j] = dot * scale;
        max = scores[j] > max ? scores[j] : max;
    }
    for (int32_t j = 0; j <= pos; j++) {
        scores[j] = exp(scores[j] - max);
        sum += scores[j];
    }
    for (int32_t i = 0; i < head_dim; i++) {
        double dot = 0;
        for (int32_t j = 0; j <= pos; j++) {
            size_t at = kv_at(&kv->v, slot, kv_head, attended_row(j, pos, kv_row));
            dot += scores[j] * kv_value(&kv->v, at + (size_t)i);
        }
        y[i] = (float)(dot / sum);
    }
}

static enum status ref_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                                 const struct kv_layer *kv, const struct token_place *place,
                                 float scale)
{
    struct cpu_ref *ref = be->impl;
    const struct tensor *cache = &kv->k;
    TRY(host_check_place("attention", place, cache->dims[0], cache->dims[2]));
    TRY(cpu_ref_reserve(&ref->scores, &ref->n_scores, (size_t)cache->dims[2] + 1));
    const int32_t *slot = place->slot.data, *pos = place->pos.data, *row = place->kv_row.data;
    int32_t n_heads = q->dims[1], head_dim = q->dims[2];
    for (int32_t t = 0; t < q->dims[0]; t++) {
        for (int32_t h = 0; h < n_heads; h++) {
            size_t at = ((size_t)t * (size_t)n_heads + (size_t)h) * (size_t)head_dim;
            attend((float *)y->data + at, (const float *)q->data + at, ref->scores, kv, slot[t],
                   (kv->head_in_group + h) / kv->heads_per_kv, pos[t], row[t], (double)scale);
        }
    }
    return ST_OK;
}

static enum status ref_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                           const struct tensor *up, enum activation act)
{
    (void)be, (void)act; /* the wrapper lets only SiLU through */
    const float *g = gate->data, *u = up->data;
    float *to = y->data;
    size_t n = tensor_count(y);
    for (size_t i = 0; i < n; i++) {
        double v = (double)g[i];
        to[i] = (float)(v / (1 + exp(-v)) * (double)u[i]);
    }
    return ST_OK;
}

static enum status ref_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                                enum activation act)
{
    (void)be;
    const double root_half = 0.70710678118654752440, root_2_over_pi = 0.79788456080286535588;
    const float *from = x->data;
    float *to = y->data;
    size_t n = tensor_count(y);
    for (size_t i = 0; i < n; i++) {
        double v = (double)from[i];
        double share = act == ACT_GELU_ERF ? erfc(-v * root_half)
                                           : 1 + tanh(root_2_over_pi * (v + 0.044715 * v * v * v));
        to[i] = (float)(0.5 * v * share);
    }
    return ST_OK;
}

static enum status ref_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                               const int32_t *cut, int32_t n_cuts)
{
    (void)be;
    const int32_t whole[] = {0, x->dims[1]};
    float *to = out->data;
    cut = cut ? cut : whole;
    for (int32_t t = 0; t < x->dims[0]; t++) {
        const float *row = (const float *)x->data + (size_t)t * (size_t)x->dims[1];
        for (int32_t c = 0; c < n_cuts; c++, to += 2) {
            double sum = 0, squares = 0;
            for (int32_t i = cut[c]; i < cut[c + 1]; i++) {
                sum += (double)row[i];
                squares += (double)row[i] * (double)row[i];
            }
            to[0] = (float)sum;
            to[1] = (float)squares;
        }
    }
    return ST_OK;
}

static enum status ref_logit_stats(struct backend *be, struct logit_stats *out,
                                   const struct tensor *logits, int32_t first_id,
                                   const int32_t *cut, int32_t n_cuts,
                                   const struct logit_want *want)
{
    (void)be;
    const int32_t whole[] = {0, logits->dims[1]};
    cut = cut ? cut : whole;
    for (int32_t t = 0; t < logits->dims[0]; t++) {
        const float *row = (const float *)logits->data + (size_t)t * (size_t)logits->dims[1];
        for (int32_t c = 0; c < n_cuts; c++) {
            sampler_part_stats(out++, row + cut[c], cut[c + 1] - cut[c], first_id + cut[c],
                               &want[t]);
        }
    }
    return ST_OK;
}

/* Insertion in the order of ids: an equal logit goes behind those before it. */
static enum status ref_top_k(struct backend *be, struct logit_candidate *out,
                             const struct tensor *logits, int32_t first_id, int32_t k)
{
    (void)be;
    const float *l = logits->data;
    for (int32_t t = 0; t < logits->dims[0]; t++, out += k) {
        for (int32_t j = 0; j < k; j++) {
            out[j] = (struct logit_candidate){-HUGE_VALF, -1};
        }
        for (int32_t i = 0, n = 0; i < logits->dims[1]; i++, l++) {
            int32_t at = n < k ? n++ : k; /* k: the last one falls out, or this one */
            for (; at > 0 && *l > out[at - 1].logit; at--) {
                if (at < k) {
                    out[at] = out[at - 1];
                }
            }
            if (at < k) {
                out[at] = (struct logit_candidate){*l, first_id + i};
            }
        }
    }
    return ST_OK;
}

const struct backend_ops cpu_ref_ops = {
    .name = "cpu_ref",
    .help = "scalar oracle: strict IEEE, one thread, sums in double; slow",
    .open = ref_open,
    .close = ref_close,
    .arithmetic = ref_arithmetic,
    .is_host = host_is_host,
    .device = host_device,
    .alloc = host_alloc,
    .release = host_release,
    .upload = host_upload,
    .download = host_download,
    .zero = host_zero,
    .sync = host_sync,
    .planes_load = cpu_ref_planes_load,
    .planes_drop = cpu_ref_planes_drop,
    .matmul_nested = cpu_ref_matmul_nested,
    .matmul_dense = cpu_ref_matmul_dense,
    .add_parts = ref_add_parts,
    .embed = ref_embed,
    .rmsnorm = ref_rmsnorm,
    .layernorm = ref_layernorm,
    .rope = ref_rope,
    .kv_append = ref_kv_append,
    .attention = ref_attention,
    .glu = ref_glu,
    .activate = ref_activate,
    .moments = ref_moments,
    .logit_stats = ref_logit_stats,
    .top_k = ref_top_k,
};
