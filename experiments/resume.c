/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/resume.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "core/mem.h"

void resume_key(uint64_t key[2], const struct prompt *prompt, int64_t ordinal,
                const char *model_digest, const char *policy_files, const char *budget,
                const struct settings *s, const struct engine *e, bool policy_adds_tokens)
{
    char text[4 * SETTINGS_TEXT_BYTES + 2048];
    bool one = s->decode.slots == 1 && !policy_adds_tokens;
    int n = snprintf(
        text, sizeof text,
        "format %d\nmodel %s\nordinal %lld\nnew %d\ntemperature %.17g\n"
        "top_k %d\ntop_p %.17g\nmin_p %.17g\nseed %lld\neos %d\n"
        "policy %s\nprefill %s\nlevel %s\nswitches %s\nalternate %s\ndial %.17g\n"
        "backend %s %s\nproduct %s\nchunk %d\nkv %s\nfeatures %d\n%s %d\n",
        RESUME_FORMAT_VERSION, model_digest, (long long)ordinal, s->decode.max_new_tokens,
        s->decode.temperature, s->decode.top_k, s->decode.top_p, s->decode.min_p,
        (long long)s->decode.seed, s->decode.stop_at_eos, s->policy.name, s->policy.prefill,
        s->policy.level, s->policy.switches, s->policy.alternate, s->policy.dial, e->backend,
        e->arithmetic, one ? "one" : "slots", s->decode.prefill_chunk, dtype_name(e->kv_dtype),
        s->output.kv_features, s->parallel.reproducible ? "segments" : "tensor_ranks",
        s->parallel.reproducible ? s->parallel.segments : s->parallel.tensor_ranks);
    INVARIANT(n > 0 && (size_t)n < sizeof text);
    if (policy_files[0]) { // keys of runs without such files stay as they always were
        n += snprintf(text + n, sizeof text - (size_t)n, "policy files %s\n", policy_files);
        INVARIANT((size_t)n < sizeof text);
    }
    if (s->service.lag > 1) {
        n += snprintf(text + n, sizeof text - (size_t)n, "lag %d\n", s->service.lag);
        INVARIANT((size_t)n < sizeof text);
    }
    if (budget[0]) {
        n += snprintf(text + n, sizeof text - (size_t)n, "budget %s\n", budget);
        INVARIANT((size_t)n < sizeof text);
    }
    XXH3_state_t *state = XXH3_createState();
    INVARIANT(state != NULL);
    XXH3_128bits_reset(state);
    XXH3_128bits_update(state, text, (size_t)n);
    if (s->output.signals) {
        XXH3_128bits_update(state, "signals", strlen("signals"));
    }
    if (s->policy.levels[0]) { // keys of policies without a list stay as they always were
        n = snprintf(text, sizeof text,
                     "levels %s\nwindow %d\ndeviations %.17g\nactivation %s\nclasses %s\nprior %s\n"
                     "every %d\ndivergence %.17g\n",
                     s->policy.levels, s->policy.window, s->policy.deviations, s->policy.activation,
                     s->policy.classes, s->policy.prior, s->policy.every, s->policy.divergence);
        INVARIANT(n > 0 && (size_t)n < sizeof text);
        XXH3_128bits_update(state, text, (size_t)n);
    }
    for (int32_t t = 0; t < prompt->n_turns; t++) {
        XXH3_128bits_update(state, &prompt->n_ids[t], sizeof prompt->n_ids[t]);
        XXH3_128bits_update(state, prompt->ids[t], (size_t)prompt->n_ids[t] * sizeof(int32_t));
    }
    XXH128_hash_t h = XXH3_128bits_digest(state);
    XXH3_freeState(state);
    key[0] = h.low64;
    key[1] = h.high64;
}

enum status resume_create(struct resume_state *out, int64_t n, bool keep_records)
{
    *out = (struct resume_state){.n = n, .keep_records = keep_records};
    return MEM_NEW(&out->prompts, n);
}

void resume_free(struct resume_state *r)
{
    for (int64_t i = 0; r->prompts && i < r->n; i++) {
        trace_free(&r->prompts[i].record);
    }
    mem_free(r->prompts);
    *r = (struct resume_state){0};
}

/* The prompt that a record is about, or NULL when its settings were others. */
static struct resume_prompt *find(struct resume_state *r, int64_t ordinal, const uint64_t key[2])
{
    if (ordinal < 0 || ordinal >= r->n) {
        return NULL;
    }
    struct resume_prompt *p = &r->prompts[ordinal];
    return p->key[0] == key[0] && p->key[1] == key[1] ? p : NULL;
}

static void forgive(struct resume_state *r, struct resume_prompt *p)
{
    r->n_failed -= p->failed;
    p->failed = false;
    p->n_faults = 0;
}

static enum status visit_finished(struct resume_state *r, const void *payload, size_t bytes)
{
    struct finished_record record;
    TRY(trace_unpack(&record, payload, bytes));
    struct resume_prompt *p = find(r, record.ordinal, record.key);
    r->n_other += p == NULL;
    r->n_deaths = 0; // whatever ends this start, it was good for something
    r->has_finished = true;
    if (!p || p->finished) {
        trace_free(&record);
        return ST_OK;
    }
    if (r->level_cost) {
        int64_t n_steps[LEVEL_TABLE_MAX] = {0};
        enum status st = trace_count_levels(n_steps, r->n_levels, payload, bytes);
        if (st != ST_OK) {
            trace_free(&record);
            return st;
        }
        p->outcome = budget_outcome_of(n_steps, r->level_cost, r->n_levels);
    }
    forgive(r, p);
    p->finished = true;
    r->n_finished++;
    if (r->keep_records) {
        p->record = record;
    } else {
        trace_free(&record);
    }
    return ST_OK;
}

static enum status visit_failed(struct resume_state *r, const void *payload, size_t bytes)
{
    struct journal_failed failed;
    TRY(journal_unpack_failed(&failed, payload, bytes));
    struct resume_prompt *p = find(r, failed.ordinal, failed.key);
    if (p && !p->failed && !p->finished) {
        p->failed = true;
        r->n_failed++;
        p->failure = (struct failed_prompt){.ordinal = failed.ordinal, .attempts = failed.attempts};
        memcpy(p->failure.reason, failed.reason, sizeof p->failure.reason);
    }
    return ST_OK;
}

/* Several ranks may report the same prompt when they fall together: that is one fault. */
static enum status visit_fault(struct resume_state *r, const void *payload, size_t bytes)
{
    struct journal_fault fault;
    TRY(journal_unpack_fault(&fault, payload, bytes));
    struct resume_prompt *p = find(r, fault.ordinal, fault.key);
    r->is_open = false;
    if (p && !p->finished && (p->n_faults == 0 || p->fault.epoch != fault.epoch)) {
        p->n_faults++;
        p->fault = fault;
    }
    return ST_OK;
}

int32_t resume_n_deaths(const struct resume_state *r)
{
    return r->n_deaths + (r->is_open && !r->has_finished);
}

static void visit_retry(struct resume_state *r)
{
    for (int64_t i = 0; i < r->n; i++) {
        forgive(r, &r->prompts[i]);
    }
    r->n_deaths = 0;
    r->is_open = false;
}

enum status resume_visit(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct resume_state *r = ctx;
    if (kind == JOURNAL_RUN) {
        struct journal_run run;
        TRY(journal_unpack_run(&run, payload, bytes));
        r->n_deaths = resume_n_deaths(r);
        r->n_epochs++;
        r->is_open = true;
        r->has_finished = false;
    } else if (kind == JOURNAL_START) {
        struct journal_start start;
        TRY(journal_unpack_start(&start, payload, bytes));
        struct resume_prompt *p = find(r, start.ordinal, start.key);
        if (p) {
            p->attempts++;
        }
    } else if (kind == JOURNAL_FINISHED) {
        TRY(visit_finished(r, payload, bytes));
    } else if (kind == JOURNAL_FAILED) {
        TRY(visit_failed(r, payload, bytes));
    } else if (kind == JOURNAL_FAULT) {
        TRY(visit_fault(r, payload, bytes));
    } else if (kind == JOURNAL_END) {
        struct journal_end end;
        TRY(journal_unpack_end(&end, payload, bytes));
        r->is_open = false;
    } else if (kind == JOURNAL_STATE) {
        struct journal_state state;
        TRY(journal_unpack_state(&state, payload, bytes));
        struct resume_prompt *p = find(r, state.ordinal, state.key);
        if (p) {
            p->has_dial = true;
            p->state = state;
        }
    } else if (kind == JOURNAL_RETRY) {
        visit_retry(r);
    }
    return ST_OK;
}

enum status resume_retry(struct resume_state *r, struct journal *journal)
{
    TRY(journal_append(journal, JOURNAL_RETRY, NULL, 0, true));
    visit_retry(r);
    return ST_OK;
}

enum status resume_check_deaths(const struct resume_state *r, int32_t max_deaths, const char *dir)
{
    int32_t n = resume_n_deaths(r);
    if (max_deaths == 0 || n < max_deaths) {
        return ST_OK;
    }
    FAIL(ST_USER,
         "%d start%s on %s in a row died without a word (killed, out of memory, a lost host) and "
         "finished no prompt; run.max_deaths = %d. Look for the cause (the kernel's or the "
         "scheduler's log), then start with --retry-failed",
         n, n == 1 ? "" : "s", dir, max_deaths);
}

enum status resume_fail_broken(struct resume_state *r, struct journal *journal)
{
    for (int64_t i = 0; i < r->n; i++) {
        struct resume_prompt *p = &r->prompts[i];
        if (p->finished || p->failed || p->n_faults < RESUME_MOST_FAULTS) {
            continue;
        }
        unsigned char packed[JOURNAL_SMALL_BYTES];
        struct journal_failed failed = {
            .ordinal = i, .key = {p->key[0], p->key[1]}, .attempts = p->attempts};
        int most = (int)sizeof failed.reason - 20; // of what follows "rank 123456: "
        snprintf(failed.reason, sizeof failed.reason, "rank %d: %.*s", p->fault.rank, most,
                 p->fault.reason);
        size_t bytes = journal_pack_failed(packed, &failed);
        TRY(journal_append(journal, JOURNAL_FAILED, packed, bytes, true));
        TRY(visit_failed(r, packed, bytes));
    }
    return ST_OK;
}
