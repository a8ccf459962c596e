/* The KV cache and attention of the cpu backend: one head of one token is one unit of work. Rows
 * are visited as place says (0..pos-1, then kv_row), so that a probe in a spare row adds up exactly
 * as the token it stands for.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/cpu.h"

/* One head of one slot in a cache. */
static char *kv_head(const struct tensor *cache, int32_t slot, int32_t head)
{
    size_t rows = (size_t)cache->dims[2], row_bytes = (size_t)cache->dims[3];
    row_bytes *= dtype_bytes(cache->dtype);
    size_t at = (size_t)slot * (size_t)cache->dims[1] + (size_t)head;
    return (char *)cache->data + at * rows * row_bytes;
}

static void write_row(struct tensor *cache, int32_t slot, int32_t head, int32_t row,
                      const float *from)
{
    size_t n = (size_t)cache->dims[3];
    char *to = kv_head(cache, slot, head) + (size_t)row * n * dtype_bytes(cache->dtype);
    if (cache->dtype == DT_F32) {
        memcpy(to, from, n * sizeof *from);
        return;
    }
    uint16_t *half = (uint16_t *)(void *)to;
    for (size_t i = 0; i < n; i++) {
        half[i] = f32_to_f16(from[i]);
    }
}

enum status cpu_kv_append(struct backend *be, struct kv_layer *kv, const struct tensor *k,
                          const struct tensor *v, const struct token_place *place)
{
    (void)be;
    TRY(host_check_place("kv_append", place, kv->k.dims[0], kv->k.dims[2]));
    const int32_t *slot = place->slot.data, *row = place->kv_row.data;
    size_t head_dim = (size_t)k->dims[2];
    const float *k_from = k->data, *v_from = v->data;
    for (int32_t t = 0; t < k->dims[0]; t++) {
        for (int32_t h = 0; h < k->dims[1]; h++) {
            write_row(&kv->k, slot[t], h, row[t], k_from);
            write_row(&kv->v, slot[t], h, row[t], v_from);
            k_from += head_dim;
            v_from += head_dim;
        }
    }
    return ST_OK;
}

static void attend(const struct cpu_isa *isa, float *y, const float *q, float *scores,
                   const struct kv_layer *kv, int32_t slot, int32_t head, int32_t pos,
                   int32_t kv_row, float scale)
{
    int32_t n = kv->k.dims[3];
    size_t k_bytes = (size_t)n * dtype_bytes(kv->k.dtype);
    size_t v_bytes = (size_t)n * dtype_bytes(kv->v.dtype);
    const char *k = kv_head(&kv->k, slot, head), *v = kv_head(&kv->v, slot, head);
    float max = -HUGE_VALF, sum = 0;
    for (int32_t j = 0; j <= pos; j++) {
        size_t row = (size_t)(j < pos ? j : kv_row);
        scores[j] = isa->dot(k + row * k_bytes, kv->k.dtype, q, n) * scale;
        max = scores[j] > max ? scores[j] : max;
    }
    for (int32_t j = 0; j <= pos; j++) {
        scores[j] = expf(scores[j] - max);
        sum += scores[j];
    }
    memset(y, 0, (size_t)n * sizeof *y);
    for (int32_t j = 0; j <= pos; j++) {
        size_t row = (size_t)(j < pos ? j : kv_row);
        isa->axpy(y, scores[j], v + row * v_bytes, kv->v.dtype, n);
    }
    float inverse = 1.0f / sum;
    for (int32_t i = 0; i < n; i++) {
        y[i] *= inverse;
    }
}

enum status cpu_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                          const struct kv_layer *kv, const struct token_place *place, float scale)
{
    struct cpu *cpu = be->impl;
    TRY(host_check_place("attention", place, kv->k.dims[0], kv->k.dims[2]));
    /* Room for the whole cache at once: growing with the position would allocate at every step. */
    size_t width = cpu_scratch_width((size_t)kv->k.dims[2] + 1), n = 0;
    TRY(mem_mul(&n, width, (size_t)cpu->n_threads));
    TRY(host_scratch_reserve(&cpu->scores, n));
    const int32_t *slot = place->slot.data, *pos = place->pos.data, *row = place->kv_row.data;
    int32_t n_tok = q->dims[0], n_heads = q->dims[1], head_dim = q->dims[2];
    int n_threads = cpu_threads(cpu, tensor_count(q) * 2 * ((size_t)place->max_pos + 1));
    /* Later tokens of a prompt attend to more rows: hand them out as threads come free. */
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(n_threads) if (n_threads > 1)
    for (int32_t t = 0; t < n_tok; t++) {
        for (int32_t h = 0; h < n_heads; h++) {
            size_t at = ((size_t)t * (size_t)n_heads + (size_t)h) * (size_t)head_dim;
            float *scores = cpu->scores.data + (size_t)omp_get_thread_num() * width;
            attend(cpu->isa, (float *)y->data + at, (const float *)q->data + at, scores, kv,
                   slot[t], (kv->head_in_group + h) / kv->heads_per_kv, pos[t], row[t], scale);
        }
    }
    return ST_OK;
}
