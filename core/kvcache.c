/* SPDX-License-Identifier: Apache-2.0 */
#include "core/kvcache.h"

#include <string.h>

#include "core/mem.h"

enum status kvcache_create(struct kvcache *out, struct backend *be,
                           const struct model_config *config, const struct model_shard *shard,
                           int32_t n_slots, int32_t max_tok, int32_t n_spare, enum dtype dtype)
{
    enum status st = ST_OK;
    *out = (struct kvcache){.be = be,
                            .n_layers = config->n_layers,
                            .n_slots = n_slots,
                            .n_kv_local = shard->kv_end - shard->kv_begin,
                            .n_rows = max_tok + n_spare,
                            .head_dim = config->head_dim,
                            .max_tok = max_tok,
                            .dtype = dtype};
    size_t one = dtype_bytes(dtype);
    const int32_t factors[] = {n_slots, out->n_kv_local, out->n_rows, out->head_dim};
    for (int i = 0; i < 4; i++) {
        TRY(mem_mul(&one, one, (size_t)factors[i]));
    }
    TRY(mem_mul(&out->bytes, one, 2 * (size_t)config->n_layers));
    TRY_GOTO(st, MEM_NEW(&out->layers, config->n_layers), fail);
    TRY_GOTO(st, MEM_NEW(&out->n_filled, n_slots), fail);
    st = backend_alloc(be, &out->block, out->bytes);
    if (st != ST_OK) {
        status_prefix(st,
                      "KV cache of %.1f MB (%d slots of %d tokens); fewer decode.slots or a "
                      "smaller decode.context need less: ",
                      1e-6 * (double)out->bytes, n_slots, max_tok);
        goto fail;
    }
    int32_t per_kv = config->n_heads / config->n_kv_heads;
    for (int l = 0; l < config->n_layers; l++) {
        char *k = (char *)out->block + 2 * (size_t)l * one;
        out->layers[l].heads_per_kv = per_kv;
        out->layers[l].head_in_group = shard->head_begin - shard->kv_begin * per_kv;
        out->layers[l].k =
            tensor_4d(k, dtype, n_slots, out->n_kv_local, out->n_rows, out->head_dim);
        out->layers[l].v =
            tensor_4d(k + one, dtype, n_slots, out->n_kv_local, out->n_rows, out->head_dim);
    }
    return ST_OK;
fail:
    kvcache_free(out);
    return st;
}

void kvcache_free(struct kvcache *kv)
{
    if (kv->be) {
        backend_release(kv->be, kv->block);
    }
    mem_free(kv->layers);
    mem_free(kv->n_filled);
    *kv = (struct kvcache){0};
}

/* n numbers between -1 and 1. */
static void fill_numbers(void *out, enum dtype dtype, size_t n, uint32_t *state)
{
    for (size_t i = 0; i < n; i++) {
        *state = *state * 1664525u + 1013904223u; /* Numerical Recipes, "quick and dirty" */
        float f = (float)(int32_t)*state * 0x1p-31f;
        if (dtype == DT_F16) {
            ((uint16_t *)out)[i] = f32_to_f16(f);
        } else {
            ((float *)out)[i] = f;
        }
    }
}

enum status kvcache_fill(struct kvcache *kv, int32_t slot, int32_t n_tok, uint32_t seed)
{
    int32_t have = kv->n_filled[slot];
    if (n_tok < 0 || n_tok > kv->max_tok) {
        FAIL(ST_SHAPE, "slot %d is to hold %d tokens, expected 0 to %d", slot, n_tok, kv->max_tok);
    }
    enum status st = ST_OK;
    size_t row = (size_t)kv->head_dim * dtype_bytes(kv->dtype);
    size_t more = n_tok > have ? (size_t)(n_tok - have) : 0;
    char *numbers = NULL;
    TRY(mem_alloc_array((void **)&numbers, more, row));
    for (int l = 0; more > 0 && l < kv->n_layers; l++) {
        for (int32_t h = 0; h < 2 * kv->n_kv_local; h++) {
            const struct tensor *t = h % 2 ? &kv->layers[l].v : &kv->layers[l].k;
            size_t head = (size_t)slot * (size_t)kv->n_kv_local + (size_t)(h / 2);
            size_t at = (head * (size_t)kv->n_rows + (size_t)have) * row;
            fill_numbers(numbers, kv->dtype, more * (size_t)kv->head_dim, &seed);
            TRY_GOTO(st, backend_upload(kv->be, (char *)t->data + at, numbers, more * row), done);
        }
    }
    kv->n_filled[slot] = n_tok;
done:
    mem_free(numbers);
    return st;
}

/* One head's first n_tok rows as f32. */
static enum status read_head(const struct kvcache *kv, const struct tensor *t, int32_t slot,
                             int32_t head, int32_t n_tok, float *out)
{
    size_t row = (size_t)kv->head_dim * dtype_bytes(kv->dtype),
           n = (size_t)n_tok * (size_t)kv->head_dim;
    size_t at = ((size_t)slot * (size_t)kv->n_kv_local + (size_t)head) * (size_t)kv->n_rows * row;
    TRY(backend_download(kv->be, out, (const char *)t->data + at, (size_t)n_tok * row));
    if (kv->dtype == DT_F16) { /* widen in place from the end */
        for (size_t i = n; i-- > 0;) {
            uint16_t h;
            memcpy(&h, (const char *)out + 2 * i, sizeof h);
            out[i] = f16_to_f32(h);
        }
    }
    return ST_OK;
}

enum status kvcache_features(const struct kvcache *kv, struct collective *coll,
                             const struct model_shard *shard, int32_t n_kv_heads, int32_t slot,
                             int32_t n_tok, bool all_heads, float *out, float *scratch)
{
    size_t n = (size_t)n_tok * (size_t)kv->head_dim;
    size_t counts[SHARD_MAX_SEGMENTS];
    int32_t first_own = shard->kv_begin;
    INVARIANT(coll->size <= SHARD_MAX_SEGMENTS); /* each owns a segment */
    /* A replicated head counts on the first rank that holds it: rank r's range begins where the
     * ranks before it end. The ranges come from the same arithmetic on every rank. */
    int64_t kv_range[2] = {shard->kv_begin, shard->kv_end}, all[2 * SHARD_MAX_SEGMENTS];
    struct tensor part = tensor_1d(kv_range, DT_I64, 2),
                  whole = tensor_1d(all, DT_I64, 2 * coll->size);
    for (int r = 0; r < coll->size; r++) {
        counts[r] = 2;
    }
    TRY(collective_all_gather(coll, &whole, &part, counts));
    int64_t seen = 0;
    for (int r = 0; r < coll->size; r++) {
        int64_t begin = all[2 * r] > seen ? all[2 * r] : seen, end = all[2 * r + 1];
        counts[r] = end > begin ? (size_t)(end - begin) * n : 0;
        if (r == coll->rank) {
            first_own = (int32_t)begin;
        }
        seen = end > seen ? end : seen;
    }
    const struct kv_layer *last = &kv->layers[kv->n_layers - 1];
    float *own = scratch, *heads = scratch + (size_t)kv->n_kv_local * n;
    for (int which = 0; which < 2; which++) {
        for (int32_t h = first_own; h < shard->kv_end; h++) {
            TRY(read_head(kv, which ? &last->v : &last->k, slot, h - shard->kv_begin, n_tok,
                          own + (size_t)(h - first_own) * n));
        }
        part = tensor_1d(own, DT_F32, (int32_t)counts[coll->rank]);
        float *to = all_heads ? out + (size_t)which * (size_t)n_kv_heads * n : heads;
        whole = tensor_1d(to, DT_F32, (int32_t)((size_t)n_kv_heads * n));
        TRY(collective_all_gather(coll, &whole, &part, counts));
        if (all_heads) {
            continue;
        }
        float *mean = out + (size_t)which * n;
        memset(mean, 0, n * sizeof *mean);
        for (int32_t h = 0; h < n_kv_heads; h++) {
            for (size_t i = 0; i < n; i++) {
                mean[i] += heads[(size_t)h * n + i];
            }
        }
        for (size_t i = 0; i < n; i++) {
            mean[i] /= (float)n_kv_heads;
        }
    }
    return ST_OK;
}

enum status kvcache_fork(struct kvcache *kv, int32_t from, int32_t to, void *bounce)
{
    INVARIANT(from >= 0 && from < kv->n_slots && to >= 0 && to < kv->n_slots && from != to);
    size_t row = (size_t)kv->head_dim * dtype_bytes(kv->dtype), head = (size_t)kv->n_rows * row;
    size_t bytes = (size_t)kv->n_filled[from] * row;
    for (int32_t l = 0; l < kv->n_layers; l++) {
        for (int32_t h = 0; h < 2 * kv->n_kv_local; h++) {
            const struct tensor *t = h < kv->n_kv_local ? &kv->layers[l].k : &kv->layers[l].v;
            size_t in_slot = (size_t)(h % kv->n_kv_local) * head;
            size_t slot = (size_t)kv->n_kv_local * head;
            const char *src = (const char *)t->data + (size_t)from * slot + in_slot;
            char *dst = (char *)t->data + (size_t)to * slot + in_slot;
            if (backend_is_host(kv->be)) {
                memcpy(dst, src, bytes);
            } else {
                TRY(backend_download(kv->be, bounce, src, bytes));
                TRY(backend_upload(kv->be, dst, bounce, bytes));
            }
        }
    }
    kv->n_filled[to] = kv->n_filled[from];
    return ST_OK;
}
