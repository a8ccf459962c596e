/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/branches.h"

#include <string.h>

#include "core/mem.h"

struct branches {
    struct engine *e;                 /* borrowed */
    const struct branches_options *o; /* borrowed */
    int32_t n_side, chunk;
    bool *ended;                  /* (n_side, 1 + n_branches) */
    struct decode_token *tokens;  /* (slots) */
    struct token_result *results; /* (slots) */
    float *logits;                /* (slots, vocab); NULL without on_logits */
};

enum status branches_create(struct branches **out, struct engine *e, int32_t n_side,
                            int32_t prefill_chunk, const struct branches_options *options)
{
    enum status st = ST_OK;
    struct branches *b = NULL;
    size_t n = (size_t)n_side * (size_t)(1 + options->n_branches), n_logits = 0;
    TRY(mem_alloc_array((void **)&b, 1, sizeof *b));
    *b = (struct branches){.e = e, .o = options, .n_side = n_side, .chunk = prefill_chunk};
    TRY_GOTO(st, MEM_NEW(&b->ended, n), fail);
    TRY_GOTO(st, MEM_NEW(&b->tokens, n), fail);
    TRY_GOTO(st, MEM_NEW(&b->results, n), fail);
    if (options->on_logits) {
        TRY_GOTO(st, mem_mul(&n_logits, n, (size_t)e->source.config.vocab), fail);
        TRY_GOTO(st, MEM_NEW(&b->logits, n_logits), fail);
    }
    *out = b;
    return ST_OK;
fail:
    branches_destroy(&b);
    return st;
}

void branches_destroy(struct branches **pb)
{
    struct branches *b = *pb;
    if (b) {
        mem_free(b->ended);
        mem_free(b->tokens);
        mem_free(b->results);
        mem_free(b->logits);
        mem_free(b);
    }
    *pb = NULL;
}

static bool is_eos(const struct model_config *c, int32_t token)
{
    for (int32_t i = 0; i < c->n_eos; i++) {
        if (c->eos[i] == token) {
            return true;
        }
    }
    return false;
}

static int32_t width(const struct branches *b)
{
    return 1 + b->o->n_branches;
}

/* A sequence has got its next token. */
static void take(struct branches *b, struct branches_prompt *p, int32_t which, int32_t sequence,
                 const struct token_result *r)
{
    int32_t *n = &p->n_new[sequence], token = p->forced ? p->forced[*n] : r->token;
    int32_t most = p->forced ? p->n_forced : b->o->max_new_tokens;
    p->tokens[(size_t)sequence * (size_t)b->o->max_new_tokens + (size_t)*n] = token;
    if (sequence == 0 && p->signals) {
        float *s = p->signals + 3 * (size_t)*n;
        s[0] = r->logprob;
        s[1] = r->entropy;
        s[2] = r->margin;
    }
    *n += 1;
    b->ended[which * width(b) + sequence] =
        *n >= most || (b->o->stop_at_eos && !p->forced && is_eos(&b->e->source.config, token));
}

static enum status show(struct branches *b, int32_t which, int32_t sequence, int32_t t,
                        const float *logits)
{
    return b->o->on_logits(b->o->ctx, which, sequence, t, logits);
}

static enum status prefill(struct branches *b, struct branches_prompt *p, int32_t which)
{
    struct decoder *dec = b->e->dec;
    const struct logit_want want = {.target = -1};
    struct pass_record pass;
    int32_t slot = which * width(b);
    for (int32_t s = 0; s < width(b); s++) {
        decoder_clear_slot(dec, slot + s);
        p->n_new[s] = 0;
        b->ended[slot + s] = false;
    }
    for (int32_t at = 0; at < p->n_ids; at += b->chunk) {
        int32_t left = p->n_ids - at, n = left < b->chunk ? left : b->chunk;
        TRY(decoder_prefill(dec, slot, p->ids + at, n, b->o->prefill, &want, at + n == p->n_ids,
                            b->results, &pass));
    }
    if (b->logits) {
        TRY(decoder_logits(dec, b->logits));
        TRY(show(b, which, 0, 0, b->logits));
    }
    if (p->features) {
        TRY(decoder_features(dec, slot, p->n_ids, b->o->all_heads, p->features));
    }
    take(b, p, which, 0, b->results);
    return ST_OK;
}

/* Branch s has what the main sequence has, and its cache where both go on. */
static enum status leave(struct branches *b, struct branches_prompt *p, int32_t which, int32_t s)
{
    int32_t slot = which * width(b);
    memcpy(p->tokens + (size_t)s * (size_t)b->o->max_new_tokens, p->tokens,
           (size_t)p->n_new[0] * sizeof *p->tokens);
    p->n_new[s] = p->n_new[0];
    b->ended[slot + s] = b->ended[slot];
    return b->ended[slot] ? ST_OK : decoder_fork_slot(b->e->dec, slot, slot + s);
}

/* Every sequence that is there and has not ended takes step t. */
static enum status step(struct branches *b, struct branches_prompt *prompts, int32_t n, int32_t t,
                        int32_t *n_tok)
{
    struct pass_record pass;
    *n_tok = 0;
    for (int32_t i = 0; i < n; i++) {
        struct branches_prompt *p = &prompts[i];
        for (int32_t s = 0; s < width(b); s++) {
            int32_t slot = i * width(b) + s;
            if (s > 0 && b->o->at[s - 1] == t) {
                TRY(leave(b, p, i, s));
            }
            if (b->ended[slot] || (s > 0 && b->o->at[s - 1] > t)) {
                continue;
            }
            b->tokens[(*n_tok)++] = (struct decode_token){
                .slot = slot,
                .id = p->tokens[(size_t)s * (size_t)b->o->max_new_tokens + (size_t)t],
                .level = s ? b->o->branch_level : b->o->level,
                .want = {.target = -1}};
        }
    }
    if (*n_tok == 0) {
        return ST_OK;
    }
    TRY(decoder_step(b->e->dec, b->tokens, *n_tok, b->results, &pass));
    if (b->logits) {
        TRY(decoder_logits(b->e->dec, b->logits));
    }
    for (int32_t j = 0; j < *n_tok; j++) {
        int32_t which = b->tokens[j].slot / width(b), s = b->tokens[j].slot % width(b);
        if (b->logits) {
            TRY(show(b, which, s, t + 1,
                     b->logits + (size_t)j * (size_t)b->e->source.config.vocab));
        }
        take(b, &prompts[which], which, s, &b->results[j]);
    }
    return ST_OK;
}

enum status branches_run(struct branches *b, struct branches_prompt *prompts, int32_t n)
{
    INVARIANT(n >= 1 && n <= b->n_side);
    int32_t n_tok = 1;
    for (int32_t i = 0; i < n; i++) {
        enum status st = prefill(b, &prompts[i], i);
        if (st != ST_OK) {
            return status_prefix(st, "prompt %d of a group of %d: ", i, n);
        }
    }
    int32_t t = 0;
    for (; n_tok > 0; t++) {
        TRY(step(b, prompts, n, t, &n_tok));
    }
    for (int32_t i = 0; i < n; i++) { /* switches after the end: the main sequence's text */
        for (int32_t s = 1; s < width(b); s++) {
            if (b->o->at[s - 1] >= t) {
                TRY(leave(b, &prompts[i], i, s));
            }
        }
    }
    return ST_OK;
}
