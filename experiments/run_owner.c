/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/run_owner.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/mem.h"

static double unix_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The people's version of what the journal says. */
static void tell_history(const struct run_owner *o, const struct settings *s,
                         const struct prompts *prompts)
{
    const struct resume_state *r = &o->resume;
    int64_t n_suspects = 0;
    if (r->n_other > 0) {
        log_warn("%s holds %lld finished prompts of other settings; they are kept in the journal "
                 "and not used here",
                 s->output.dir, (long long)r->n_other);
    }
    for (int64_t i = 0; i < r->n; i++) {
        const struct resume_prompt *p = &r->prompts[i];
        if (p->failed) {
            log_warn("prompt %lld (%s) has failed: %s", (long long)i, prompts->prompt[i].id,
                     p->failure.reason);
        }
        n_suspects += !p->failed && p->n_faults > 0;
    }
    if (n_suspects > 0) {
        log_warn("earlier starts failed at %lld prompt%s: decoded last, each by itself",
                 (long long)n_suspects, n_suspects == 1 ? "" : "s");
    }
    if (r->n_epochs > 0) {
        char failed[48] = "";
        if (r->n_failed > 0) {
            snprintf(failed, sizeof failed, ", %lld failed", (long long)r->n_failed);
        }
        log_info("resuming: %lld of %d prompts are done%s, %lld left", (long long)r->n_finished,
                 prompts->n, failed, (long long)o->n_left);
    }
}

/* What decides the dials, for the prompts' keys. */
static void describe_budget(char *text, size_t bytes, const struct run_owner *o,
                            const struct settings *s, const struct prompts *prompts)
{
    text[0] = '\0';
    if (o->has_budget) {
        snprintf(text, bytes, "bits %.17g ms %.17g window %d costs %s prompts %s split %s limit %d",
                 s->budget.average_bits, s->budget.ms_per_token, s->budget.window, o->costs.digest,
                 prompts->digest, s->prompts.split, s->prompts.limit);
    }
}

static void make_keys(struct run_owner *o, const struct engine *e, const struct settings *s,
                      const struct prompts *prompts, const struct policy *policy,
                      const char *replayed)
{
    char files[128], budget[512];
    snprintf(files, sizeof files, "%s%s", policy_digest(policy), replayed);
    describe_budget(budget, sizeof budget, o, s, prompts);
    for (int32_t i = 0; i < prompts->n; i++) {
        resume_key(o->resume.prompts[i].key, &prompts->prompt[i], i, o->digest, files, budget, s, e,
                   policy->ops->adds_tokens);
    }
}

/* Is there a budget, and are the costs that it needs known from an earlier start? */
static enum status open_budget(struct run_owner *o, const struct engine *e,
                               const struct settings *s)
{
    const char *unit = NULL;
    TRY(run_budget_unit(&unit, s));
    o->has_budget = unit != NULL;
    o->has_costs = true;
    if (unit && strcmp(unit, "ms") == 0) {
        TRY(cost_table_read(&o->costs, &o->has_costs, s->output.dir, &e->levels));
    }
    if (o->has_budget && o->has_costs) {
        TRY(run_budget_law(&o->budget, s, &e->levels, &o->costs));
        o->resume.level_cost = o->budget.cost;
        o->resume.n_levels = o->budget.n_levels;
    }
    return ST_OK;
}

enum status run_owner_open(struct run_owner *o, const struct engine *e, const struct settings *s,
                           const struct prompts *prompts, const struct policy *policy,
                           const struct replay *replay, bool retry)
{
    struct resume_state *r = &o->resume;
    TRY(resume_create(r, prompts->n, false));
    TRY(open_budget(o, e, s));
    make_keys(o, e, s, prompts, policy, replay ? replay->earlier : "");
    TRY(journal_open(&o->journal, s->output.dir, resume_visit, r));
    TRY(journal_reserve(o->journal, JOURNAL_SMALL_BYTES)); // a fault must not allocate
    if (retry) {
        TRY(resume_retry(r, o->journal));
    }
    TRY(resume_check_deaths(r, s->run.max_deaths, s->output.dir));
    TRY(resume_fail_broken(r, o->journal));
    if (replay) {
        replay_leave_out(replay, r);
        r->n_other = 0; // those of earlier replays
    }
    o->n_left = r->n - r->n_finished - r->n_failed;
    tell_history(o, s, prompts);
    unsigned char packed[JOURNAL_SMALL_BYTES];
    struct journal_run run = {.epoch = r->n_epochs, .unix_s = unix_s()};
    TRY(journal_append(o->journal, JOURNAL_RUN, packed, journal_pack_run(packed, &run), true));
    o->has_begun = true;
    return ST_OK;
}

static enum status on_done(void *ctx, int64_t n_done, int64_t n_total, int64_t ordinal,
                           const void *packed, size_t bytes)
{
    struct run_owner *o = ctx;
    (void)n_total;
    if (o->has_budget) {
        TRY(run_budget_done(&o->budget, ordinal, packed, bytes));
    }
    o->n_done = n_done;
    progress_update(&o->progress, (double)n_done);
    return ST_OK;
}

static enum status on_dial(void *ctx, const struct lease_item *item, bool *known, float *dial)
{
    struct run_owner *o = ctx;
    return run_budget_dial(&o->budget, item->ordinal, known, dial);
}

static enum status on_poll(void *ctx, bool *any)
{
    struct run_owner *o = ctx;
    return service_poll(o->service, any);
}

enum status run_owner_set_costs(struct run_owner *o, const struct cost_table *costs,
                                const struct engine *e, const struct settings *s,
                                const struct prompts *prompts, const struct policy *policy)
{
    o->costs = *costs;
    o->has_costs = true;
    TRY(run_budget_law(&o->budget, s, &e->levels, &o->costs));
    TRY(cost_table_write(&o->costs, s->output.dir, &e->levels));
    make_keys(o, e, s, prompts, policy, "");
    return ST_OK;
}

enum status run_owner_lease(struct run_owner *o, struct env *env, const struct settings *s,
                            const struct prompts *prompts, size_t max_record_bytes)
{
    struct lease_item *items = NULL;
    const struct lease_hooks hooks = {.ctx = o,
                                      .done = on_done,
                                      .dial = o->has_budget ? on_dial : NULL,
                                      .poll = o->service ? on_poll : NULL};
    enum status st = ST_OK;
    int64_t n = 0;
    if (o->has_budget) {
        int32_t n_slots = env->n_replicas * s->decode.slots;
        if (s->budget.window < n_slots) {
            log_warn("budget.window = %d lets at most %d prompts be under way; %d replicas of %d "
                     "slots could take %d",
                     s->budget.window, s->budget.window, env->n_replicas, s->decode.slots, n_slots);
        }
        TRY(run_budget_start(&o->budget, prompts, s, &o->resume, o->journal));
    }
    TRY(MEM_NEW(&items, o->n_left));
    for (int32_t i = 0; i < prompts->n; i++) {
        const struct resume_prompt *p = &o->resume.prompts[i];
        if (p->finished || p->failed) {
            continue;
        }
        struct lease_item *item = &items[n++];
        *item = (struct lease_item){.ordinal = i,
                                    .attempt = p->attempts + 1,
                                    .dial = (float)s->policy.dial,
                                    .alone = p->n_faults > 0};
        memcpy(item->key, p->key, sizeof item->key);
        item->cost = run_budget_tokens(&prompts->prompt[i], s);
    }
    TRY_GOTO(st,
             lease_owner_create(&o->leases, env, o->journal, items, n, o->resume.n_epochs,
                                max_record_bytes, &hooks),
             done);
    lease_owner_set_timeout(o->leases, s->parallel.timeout_s);
    if (s->run.deadline_s > 0) {
        double left = s->run.deadline_s - (clock_s() - env->start_s);
        lease_owner_set_deadline(o->leases, left > 0 ? left : 1e-3); // 0 would be none
    }
    progress_begin(&o->progress, "prompts", "prompts", (double)n);
done:
    mem_free(items);
    return st;
}

void run_owner_take_fault(struct run_owner *o, const struct lifeline_fault *f)
{
    unsigned char packed[JOURNAL_SMALL_BYTES];
    enum status st = ST_OK;
    for (int32_t i = 0; i < f->n_prompts && st == ST_OK; i++) {
        struct journal_fault fault = {.ordinal = f->ordinals[i],
                                      .epoch = o->resume.n_epochs,
                                      .rank = f->rank,
                                      .n_company = f->n_prompts,
                                      .signal = f->signal};
        if (fault.ordinal < 0 || fault.ordinal >= o->resume.n) {
            continue;
        }
        memcpy(fault.key, o->resume.prompts[fault.ordinal].key, sizeof fault.key);
        snprintf(fault.reason, sizeof fault.reason, "%s", f->text);
        st = journal_append(o->journal, JOURNAL_FAULT, packed, journal_pack_fault(packed, &fault),
                            true);
    }
    if (f->n_prompts == 0) {
        char reason[LIFELINE_TEXT_BYTES];
        snprintf(reason, sizeof reason, "rank %d: %.200s", f->rank, f->text);
        st = run_owner_end(o, JOURNAL_ERROR, reason);
    }
    if (st != ST_OK) {
        log_warn("the journal does not take how rank %d failed: %s", f->rank, status_message());
    }
}

enum status run_owner_end(struct run_owner *o, enum journal_how how, const char *reason)
{
    unsigned char packed[JOURNAL_SMALL_BYTES];
    if (!o->has_begun) {
        return ST_OK;
    }
    struct journal_end end = {.epoch = o->resume.n_epochs, .how = (int32_t)how, .unix_s = unix_s()};
    snprintf(end.reason, sizeof end.reason, "%s", reason);
    return journal_append(o->journal, JOURNAL_END, packed, journal_pack_end(packed, &end), true);
}

void run_owner_close(struct run_owner *o)
{
    lease_owner_destroy(&o->leases);
    service_destroy(&o->service);
    run_budget_free(&o->budget);
    journal_close(&o->journal);
    resume_free(&o->resume);
}
