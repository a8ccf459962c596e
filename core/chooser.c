/* SPDX-License-Identifier: Apache-2.0 */
#include "core/chooser.h"

#include "core/mem.h"

struct chooser {
    struct backend *be;              /* borrowed */
    struct collective *coll;         /* borrowed */
    const struct model_shard *shard; /* borrowed */
    struct candidate_filter filter;
    int32_t vocab, max_tok;
    int32_t width;                  /* candidates that a rank offers per token */
    struct logit_candidate *mine;   /* (max_tok, width) */
    struct logit_candidate *all;    /* (ranks, max_tok, width) */
    struct logit_candidate *choice; /* (max_tok); id -1: not settled */
    size_t *counts;                 /* (ranks) */
    struct candidate_list *lists;   /* (ranks), first rank only, as what follows */
    struct logit_candidate *kept;   /* room for all candidates of a token, twice the vocabulary */
    float *logits;                  /* (vocab) of one token, every rank */
};

enum status chooser_create(struct chooser **out, struct backend *be, struct collective *coll,
                           const struct model_shard *shard, int32_t vocab,
                           const struct candidate_filter *filter, int32_t max_tok)
{
    enum status st = ST_OK;
    struct chooser *c = NULL;
    size_t n = 0, n_all = 0, bytes = 0, n_kept = 0;
    int32_t width = candidate_filter_width(filter);
    TRY(mem_mul(&n, (size_t)max_tok, (size_t)width));
    TRY(mem_mul(&n_all, n, (size_t)coll->size));
    TRY(mem_mul(&bytes, n_all, sizeof *c->all));
    if (bytes > INT32_MAX) {
        FAIL(ST_USER,
             "%d candidates of %d slots on %d tensor ranks are more than one message takes: "
             "use fewer slots",
             width, max_tok, coll->size);
    }
    n_kept = (size_t)width * (size_t)coll->size;
    n_kept = n_kept > 2 * (size_t)vocab ? n_kept : 2 * (size_t)vocab;
    TRY(MEM_NEW(&c, 1));
    *c = (struct chooser){.be = be,
                          .coll = coll,
                          .shard = shard,
                          .filter = *filter,
                          .vocab = vocab,
                          .max_tok = max_tok,
                          .width = width};
    TRY_GOTO(st, MEM_NEW(&c->mine, n), fail);
    TRY_GOTO(st, MEM_NEW(&c->all, n_all), fail);
    TRY_GOTO(st, MEM_NEW(&c->choice, max_tok), fail);
    TRY_GOTO(st, MEM_NEW(&c->counts, coll->size), fail);
    TRY_GOTO(st, MEM_NEW(&c->logits, vocab), fail);
    if (coll->rank == 0) {
        TRY_GOTO(st, MEM_NEW(&c->lists, coll->size), fail);
        TRY_GOTO(st, MEM_NEW(&c->kept, n_kept), fail);
    }
    *out = c;
    return ST_OK;
fail:
    chooser_destroy(&c);
    return st;
}

void chooser_destroy(struct chooser **chooser)
{
    struct chooser *c = *chooser;
    if (!c) {
        return;
    }
    mem_free(c->mine);
    mem_free(c->all);
    mem_free(c->choice);
    mem_free(c->counts);
    mem_free(c->lists);
    mem_free(c->kept);
    mem_free(c->logits);
    mem_free(c);
    *chooser = NULL;
}

/* Rows of the vocabulary that a rank holds: whole segments (dist/shard.h). */
static int32_t rank_begin(const struct chooser *c, int rank)
{
    int32_t total = c->shard->vocab.total;
    return split_at(c->vocab, total, split_at(total, c->coll->size, rank));
}

/* Every rank's candidates for n tokens. */
static enum status gather_candidates(struct chooser *c, const struct tensor *logits, int32_t n)
{
    size_t bytes = (size_t)n * (size_t)c->width * sizeof *c->mine;
    TRY(backend_top_k(c->be, c->mine, logits, c->shard->vocab_begin, c->width));
    for (int r = 0; r < c->coll->size; r++) {
        c->counts[r] = bytes;
    }
    struct tensor part = tensor_1d(c->mine, DT_U8, (int32_t)bytes);
    struct tensor all = tensor_1d(c->all, DT_U8, (int32_t)(bytes * (size_t)c->coll->size));
    return collective_all_gather(c->coll, &all, &part, c->counts);
}

static enum status share_choices(struct chooser *c, int32_t n)
{
    struct tensor t = tensor_1d(c->choice, DT_U8, (int32_t)((size_t)n * sizeof *c->choice));
    return collective_broadcast(c->coll, &t, 0);
}

/* All logits of token i. */
static enum status gather_logits(struct chooser *c, const struct tensor *logits, int32_t i)
{
    size_t own = (size_t)logits->dims[1];
    float *part = c->logits + c->shard->vocab_begin;
    TRY(backend_download(c->be, part, (const float *)logits->data + (size_t)i * own,
                         own * sizeof *part));
    for (int r = 0; r < c->coll->size; r++) {
        c->counts[r] = (size_t)(rank_begin(c, r + 1) - rank_begin(c, r));
    }
    struct tensor whole = tensor_1d(c->logits, DT_F32, c->vocab);
    struct tensor mine = tensor_1d(part, DT_F32, logits->dims[1]);
    return collective_all_gather(c->coll, &whole, &mine, c->counts);
}

static void choose_from_candidates(struct chooser *c, int32_t i, int32_t n,
                                   const struct logit_stats *merged, const struct logit_want *want)
{
    if (!want->restricted) {
        c->choice[i] = (struct logit_candidate){merged->pick_logit, merged->pick};
        return;
    }
    for (int r = 0; r < c->coll->size; r++) {
        int32_t held = rank_begin(c, r + 1) - rank_begin(c, r);
        size_t row = (size_t)r * (size_t)n + (size_t)i;
        c->lists[r] = (struct candidate_list){.at = c->all + row * (size_t)c->width,
                                              .n = held < c->width ? held : c->width,
                                              .is_whole = held <= c->width};
    }
    c->choice[i] = (struct logit_candidate){.id = -1};
    candidates_choose(&c->choice[i], c->lists, c->coll->size, merged, &c->filter, want, c->kept);
}

enum status chooser_run(struct chooser *c, const struct tensor *logits, struct logit_stats *merged,
                        const struct logit_want *wants, int32_t *n_gathered)
{
    int32_t n = logits->dims[0];
    INVARIANT(n <= c->max_tok);
    *n_gathered = 0;
    TRY(gather_candidates(c, logits, n));
    for (int32_t i = 0; c->coll->rank == 0 && i < n; i++) {
        choose_from_candidates(c, i, n, &merged[i], &wants[i]);
    }
    TRY(share_choices(c, n));
    for (int32_t i = 0; i < n; i++) {
        if (c->choice[i].id >= 0) {
            continue;
        }
        ++*n_gathered;
        TRY(gather_logits(c, logits, i));
        if (c->coll->rank == 0) {
            candidates_choose_all(&c->choice[i], c->logits, c->vocab, &merged[i], &c->filter,
                                  &wants[i], c->kept);
        }
    }
    if (*n_gathered > 0) {
        TRY(share_choices(c, n));
    }
    for (int32_t i = 0; i < n; i++) {
        merged[i].pick = c->choice[i].id;
        merged[i].pick_logit = c->choice[i].logit;
    }
    return ST_OK;
}
