/* SPDX-License-Identifier: Apache-2.0 */
#include "core/divergence.h"

#include <math.h>

#include "core/log.h"
#include "core/mem.h"

struct divergence {
    struct backend *be;              /* borrowed */
    struct collective *coll;         /* borrowed */
    const struct model_shard *shard; /* borrowed */
    int32_t max_probes;
    float *rows;       /* (2, n_vocab_local) owned; NULL: the backend's memory is the
                          host's */
    float *mine, *all; /* owned: (probes, segments of this rank, or of all) */
    size_t counts[SHARD_MAX_SEGMENTS];
};

enum status divergence_create(struct divergence **out, struct backend *be, struct collective *coll,
                              const struct model_shard *shard, int32_t max_probes)
{
    enum status st = ST_OK;
    struct divergence *d = NULL;
    size_t n = (size_t)max_probes;
    TRY(MEM_NEW(&d, 1));
    *d = (struct divergence){.be = be, .coll = coll, .shard = shard, .max_probes = max_probes};
    if (!backend_is_host(be)) {
        TRY_GOTO(st, MEM_NEW(&d->rows, 2 * (size_t)(shard->vocab_end - shard->vocab_begin)), fail);
    }
    TRY_GOTO(st, MEM_NEW(&d->mine, n * (size_t)(shard->vocab.end - shard->vocab.begin)), fail);
    TRY_GOTO(st, MEM_NEW(&d->all, n * (size_t)shard->vocab.total), fail);
    *out = d;
    return ST_OK;
fail:
    divergence_destroy(&d);
    return st;
}

void divergence_destroy(struct divergence **divergence)
{
    struct divergence *d = *divergence;
    if (!d) {
        return;
    }
    mem_free(d->rows);
    mem_free(d->mine);
    mem_free(d->all);
    mem_free(d);
    *divergence = NULL;
}

/* sum exp(p - max p) ((p - max p) - (q - max q)) over n logits. */
static double part_of(const float *p, const float *q, int32_t n, float max_p, float max_q)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++) {
        float above = p[i] - max_p, other = q[i] - max_q;
        if (above > -INFINITY) { /* p = 0 adds nothing */
            sum += (double)expf(above) * ((double)above - (double)other);
        }
    }
    return sum;
}

enum status divergence_run(struct divergence *d, const struct tensor *logits,
                           const struct logit_stats *merged, const bool *is_probe,
                           struct token_result *results)
{
    const struct segment_share *share = &d->shard->vocab;
    int32_t n = logits->dims[0], width = logits->dims[1], own = share->end - share->begin, k = 0;
    for (int32_t i = 0; i < n; i++) {
        if (!is_probe[i]) {
            continue;
        }
        INVARIANT(i > 0 && k < d->max_probes);
        float *q = (float *)logits->data + ((size_t)i - 1) * (size_t)width;
        if (d->rows) {
            TRY(backend_download(d->be, d->rows, q, 2 * (size_t)width * sizeof *q));
            q = d->rows;
        }
        const float *p = q + width;
        for (int32_t s = 0; s < own; s++) {
            int32_t from = share->cut[s], to = share->cut[s + 1];
            d->mine[k * own + s] =
                (float)part_of(p + from, q + from, to - from, merged[i].max, merged[i - 1].max);
        }
        k++;
    }
    for (int r = 0; r < d->coll->size; r++) {
        d->counts[r] = (size_t)k * (size_t)(split_at(share->total, d->coll->size, r + 1) -
                                            split_at(share->total, d->coll->size, r));
    }
    struct tensor part = tensor_1d(d->mine, DT_F32, k * own);
    struct tensor whole = tensor_1d(d->all, DT_F32, k * share->total);
    TRY(collective_all_gather(d->coll, &whole, &part, d->counts));
    k = 0;
    for (int32_t i = 0; i < n; i++) {
        if (!is_probe[i]) {
            continue;
        }
        const float *from = d->all;
        double sum = 0;
        for (int r = 0; r < d->coll->size; r++) {
            int32_t of_rank = split_at(share->total, d->coll->size, r + 1) -
                              split_at(share->total, d->coll->size, r);
            const float *at = from + (size_t)k * (size_t)of_rank;
            for (int32_t s = 0; s < of_rank; s++) {
                sum += (double)at[s];
            }
            from += d->counts[r];
        }
        double kl = sum / (double)merged[i].sum_exp - log((double)merged[i].sum_exp) +
                    log((double)merged[i - 1].sum_exp);
        results[i].probe_kl = kl > 0 ? (float)kl : 0; /* rounding */
        k++;
    }
    return ST_OK;
}
