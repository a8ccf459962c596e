/* What the sampler asks of logits, on the cpu backend. A part of the vocabulary is taken in blocks
 * that begin where it begins, whatever threads there are; blocks merge as ranks' parts do.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <omp.h>

#include "core/candidates.h"
#include "core/sampler.h"
#include "kernels/cpu.h"

enum { N_BLOCKS = 31 /* that are merged at a time */ };

struct part {
    const struct cpu_loops *loops;
    const float *logits; /* (n) */
    int32_t n, first_id;
    const struct logit_want *want;
    struct logit_stats block[1 + N_BLOCKS]; /* all before, then the blocks of now */
};

/* Blocks begin..end of the logits that are left. */
static void block_stats(void *context, size_t begin, size_t end)
{
    struct part *p = context;
    for (size_t b = begin; b < end; b++) {
        int32_t at = (int32_t)b * CPU_LOGIT_BLOCK, left = p->n - at;
        p->loops->stats(&p->block[1 + b], p->logits + at,
                        left < CPU_LOGIT_BLOCK ? left : CPU_LOGIT_BLOCK, p->first_id + at, p->want);
    }
}

static void part_stats(struct logit_stats *out, struct part *p, int n_threads)
{
    sampler_merge(&p->block[0], NULL, 0, p->want); /* nothing yet */
    while (p->n > 0) {
        int32_t n_now = p->n < N_BLOCKS * CPU_LOGIT_BLOCK ? p->n : N_BLOCKS * CPU_LOGIT_BLOCK;
        int32_t n_blocks = (n_now + CPU_LOGIT_BLOCK - 1) / CPU_LOGIT_BLOCK;
        cpu_share(n_threads, (size_t)n_blocks, 1, block_stats, p);
        sampler_merge(&p->block[0], p->block, 1 + n_blocks, p->want);
        p->logits += n_now;
        p->first_id += n_now;
        p->n -= n_now;
    }
    *out = p->block[0];
}

struct pass {
    const struct cpu *cpu;
    struct logit_stats *out;
    const struct tensor *logits;
    int32_t first_id, n_cuts;
    const int32_t *cut;
    const struct logit_want *want;
    int n_threads; /* of one part */
};

/* Parts begin..end of all tokens' n_cuts each. */
static void pass_parts(void *context, size_t begin, size_t end)
{
    const struct pass *c = context;
    size_t n_vocab = (size_t)c->logits->dims[1];
    for (size_t i = begin; i < end; i++) {
        size_t t = i / (size_t)c->n_cuts;
        int32_t from = c->cut[i % (size_t)c->n_cuts];
        struct part part = {
            .loops = c->cpu->isa->loops,
            .logits = (const float *)c->logits->data + t * n_vocab + (size_t)from,
            .n = c->cut[i % (size_t)c->n_cuts + 1] - from,
            .first_id = c->first_id + from,
            .want = &c->want[t],
        };
        part_stats(&c->out[i], &part, c->n_threads);
    }
}

enum status cpu_logit_stats(struct backend *be, struct logit_stats *out,
                            const struct tensor *logits, int32_t first_id, const int32_t *cut,
                            int32_t n_cuts, const struct logit_want *want)
{
    const struct cpu *cpu = be->impl;
    int32_t n_vocab = logits->dims[1], n_tok = logits->dims[0];
    const int32_t whole[] = {0, n_vocab};
    bool is_greedy = true;
    for (int32_t t = 0; t < n_tok; t++) {
        is_greedy = is_greedy && !(want[t].temperature > 0);
    }
    /* an exponential, or noise too, or an exponential in double */
    int n_threads = cpu_threads(cpu, tensor_count(logits) * (is_greedy ? 4 : 64));
    struct pass c = {cpu, out, logits, first_id, n_cuts, cut ? cut : whole, want, 1};
    size_t n_parts = (size_t)n_tok * (size_t)n_cuts;
    if (n_parts < (size_t)n_threads) {
        c.n_threads = n_threads;
        n_threads = 1;
    }
    cpu_share(n_threads, n_parts, 1, pass_parts, &c);
    return ST_OK;
}

struct choice {
    struct logit_candidate *out;
    const float *logits;
    int32_t n_vocab, first_id, k;
};

static void choose_rows(void *context, size_t begin, size_t end)
{
    const struct choice *c = context;
    for (size_t t = begin; t < end; t++) {
        candidates_select(c->out + t * (size_t)c->k, c->k, c->logits + t * (size_t)c->n_vocab,
                          c->n_vocab, c->first_id);
    }
}

enum status cpu_top_k(struct backend *be, struct logit_candidate *out, const struct tensor *logits,
                      int32_t first_id, int32_t k)
{
    const struct cpu *cpu = be->impl;
    struct choice c = {out, logits->data, logits->dims[1], first_id, k};
    cpu_share(cpu_threads(cpu, tensor_count(logits) * 16), (size_t)logits->dims[0], 1, choose_rows,
              &c);
    return ST_OK;
}
