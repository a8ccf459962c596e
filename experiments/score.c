/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/score.h"

#include "core/log.h"
#include "core/mem.h"

static void add_score(struct score *sum, const struct token_result *r, int32_t target, float bits)
{
    sum->nll -= (double)r->logprob;
    sum->n_right += r->argmax == target;
    sum->bits += (double)bits;
    sum->n_tok++;
}

/* Feeds ids[0..n) of a window in chunks; every position whose successor is scored is. */
static enum status prefill_window(struct engine *e, const struct settings *s, int32_t slot,
                                  const int32_t *ids, int32_t n, int32_t first, int32_t level,
                                  struct logit_want *wants, struct token_result *results,
                                  struct score *sum)
{
    float bits = e->levels.level[level].avg_bits;
    for (int32_t at = 0; at < n; at += s->decode.prefill_chunk) {
        int32_t m = n - at < s->decode.prefill_chunk ? n - at : s->decode.prefill_chunk;
        int32_t from = at < first - 1 ? first - 1 - at : 0; /* rows before it are context */
        int32_t n_results = from < m ? m - from : 0;
        struct pass_record pass;
        for (int32_t i = 0; i < n_results; i++) {
            wants[i] = (struct logit_want){.target = ids[at + from + i + 1]};
        }
        TRY(decoder_prefill(e->dec, slot, ids + at, m, level, wants, n_results, results, &pass));
        for (int32_t i = 0; i < n_results; i++) {
            add_score(sum, &results[i], wants[i].target, bits);
        }
    }
    return ST_OK;
}

enum status score_by_prefill(struct engine *e, const struct settings *s, const struct windows *w,
                             int32_t level, struct score *sum)
{
    struct logit_want *wants = NULL;
    struct token_result *results = NULL;
    struct progress progress;
    enum status st = ST_OK;
    TRY_GOTO(st, MEM_NEW(&wants, s->decode.prefill_chunk), done);
    TRY_GOTO(st, MEM_NEW(&results, s->decode.prefill_chunk), done);
    progress_begin(&progress, "scoring", "tokens", (double)w->begin[w->n]);
    for (int32_t i = 0; i < w->n; i++) {
        decoder_clear_slot(e->dec, 0);
        TRY_GOTO(st,
                 prefill_window(e, s, 0, w->ids + w->begin[i], windows_length(w, i) - 1, w->first,
                                level, wants, results, sum),
                 done);
        progress_update(&progress, (double)w->begin[i + 1]);
    }
    progress_end(&progress);
done:
    mem_free(wants);
    mem_free(results);
    return st;
}

/* Up to SCORE_DECODE_WINDOWS windows side by side, each token fed by a step of its own. */
static enum status score_group(struct engine *e, const struct settings *s, const struct windows *w,
                               const struct plan *plan, int32_t begin, int32_t n,
                               struct logit_want *wants, struct token_result *results,
                               struct score *sum)
{
    struct decode_token tokens[SCORE_DECODE_WINDOWS];
    struct pass_record pass;
    for (int32_t i = 0; i < n; i++) {
        decoder_clear_slot(e->dec, i);
        TRY(prefill_window(e, s, i, w->ids + w->begin[begin + i], w->first, w->first, plan->prefill,
                           wants, results, sum));
    }
    for (int32_t step = 0;; step++) {
        int32_t level = plan_level(plan, step), m = 0;
        for (int32_t i = 0; i < n; i++) {
            int32_t at = w->first + step;
            if (at + 1 < windows_length(w, begin + i)) {
                const int32_t *ids = w->ids + w->begin[begin + i];
                tokens[m++] = (struct decode_token){
                    .slot = i, .id = ids[at], .level = level, .want = {.target = ids[at + 1]}};
            }
        }
        if (m == 0) {
            return ST_OK;
        }
        TRY(decoder_step(e->dec, tokens, m, results, &pass));
        for (int32_t i = 0; i < m; i++) {
            add_score(sum, &results[i], tokens[i].want.target, e->levels.level[level].avg_bits);
        }
    }
}

enum status score_by_decode(struct engine *e, const struct settings *s, const struct windows *w,
                            const struct plan *plan, struct score *sum)
{
    struct logit_want *wants = NULL;
    struct token_result *results = NULL;
    struct progress progress;
    enum status st = ST_OK;
    int32_t most = s->decode.prefill_chunk > SCORE_DECODE_WINDOWS ? s->decode.prefill_chunk
                                                                  : SCORE_DECODE_WINDOWS;
    TRY_GOTO(st, MEM_NEW(&wants, most), done);
    TRY_GOTO(st, MEM_NEW(&results, most), done);
    progress_begin(&progress, "scoring", "windows", w->n);
    for (int32_t i = 0; i < w->n; i += SCORE_DECODE_WINDOWS) {
        int32_t n = w->n - i < SCORE_DECODE_WINDOWS ? w->n - i : SCORE_DECODE_WINDOWS;
        TRY_GOTO(st, score_group(e, s, w, plan, i, n, wants, results, sum), done);
        progress_update(&progress, i + n);
    }
    progress_end(&progress);
done:
    mem_free(wants);
    mem_free(results);
    return st;
}
