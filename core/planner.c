/* SPDX-License-Identifier: Apache-2.0 */
#include "core/planner.h"

#include "core/log.h"
#include "core/mem.h"

/* A request whose effect is to come. */
struct pending {
    int32_t asked;              /* step; -1: the plan */
    struct amendment amendment; /* the first rank's, when it was answered here */
    float latency_us;
};

struct slot {
    struct prompt_facts facts;
    struct plan plan;            /* owned: in force */
    struct plan answer;          /* owned: asked for, not yet in force */
    void *state;                 /* owned: the policy's; NULL when it keeps none */
    struct pending *ring;        /* (lag + 1) owned */
    int32_t first, n;            /* of ring */
    int32_t settled;             /* the step for which it was settled last; -1: none */
    int32_t probe;               /* of that step */
    struct decision_record *log; /* (max_decisions) owned */
    int32_t n_log;
};

struct planner {
    const struct policy *policy; /* borrowed */
    struct collective *coll;     /* borrowed */
    struct planner_options opt;
    const struct planner_remote *remote; /* NULL: asked here */
    size_t max_decisions;
    struct slot *slots; /* (n_slots) owned */
    int32_t *message;   /* (2 * n_slots * (max_new_tokens + 1)) owned: broadcasts */
};

enum status planner_max_decisions(size_t *out, int32_t max_turns, int32_t max_new_tokens)
{
    /* each step of a turn has at most one level of the plan and one amendment */
    size_t steps = 0;
    TRY(mem_mul(&steps, (size_t)max_turns, (size_t)max_new_tokens));
    TRY(mem_mul(out, steps, 2));
    if (*out > INT32_MAX) {
        FAIL(ST_SHAPE, "%d turns of %d new tokens make too many decisions to record", max_turns,
             max_new_tokens);
    }
    return ST_OK;
}

static enum status slot_create(struct slot *s, const struct planner *p)
{
    if (p->policy->ops->state_bytes > 0) {
        TRY(mem_alloc_array(&s->state, 1, p->policy->ops->state_bytes));
    }
    TRY(plan_create(&s->plan, p->opt.max_new_tokens));
    TRY(plan_create(&s->answer, p->opt.max_new_tokens));
    TRY(MEM_NEW(&s->ring, p->opt.lag + 1));
    return MEM_NEW(&s->log, p->max_decisions);
}

enum status planner_create(struct planner **out, const struct policy *policy,
                           struct collective *coll, const struct planner_options *options)
{
    struct planner *p = NULL;
    enum status st = ST_OK;
    size_t ints = 0;
    INVARIANT(options->lag >= 1);
    TRY(MEM_NEW(&p, 1));
    *p = (struct planner){.policy = policy, .coll = coll, .opt = *options};
    p->remote = policy->ops->answer ? options->remote : NULL;
    TRY_GOTO(st,
             planner_max_decisions(&p->max_decisions, options->max_turns, options->max_new_tokens),
             failed);
    TRY_GOTO(st, MEM_NEW(&p->slots, options->n_slots), failed);
    for (int32_t i = 0; i < options->n_slots; i++) {
        TRY_GOTO(st, slot_create(&p->slots[i], p), failed);
    }
    TRY_GOTO(st, mem_mul(&ints, 2 * (size_t)options->n_slots, (size_t)options->max_new_tokens + 1),
             failed);
    TRY_GOTO(st, MEM_NEW(&p->message, ints), failed);
    *out = p;
    return ST_OK;
failed:
    planner_destroy(&p);
    return st;
}

void planner_destroy(struct planner **planner)
{
    struct planner *p = planner ? *planner : NULL;
    if (!p) {
        return;
    }
    for (int32_t i = 0; p->slots && i < p->opt.n_slots; i++) {
        struct slot *s = &p->slots[i];
        plan_free(&s->plan);
        plan_free(&s->answer);
        mem_free(s->state);
        mem_free(s->ring);
        mem_free(s->log);
    }
    mem_free(p->slots);
    mem_free(p->message);
    mem_free(p);
    *planner = NULL;
}

/* n ints from the first rank to all. */
static enum status broadcast(struct planner *p, int32_t *ints, int32_t n)
{
    struct tensor t = tensor_1d(ints, DT_I32, n);
    return collective_broadcast(p->coll, &t, 0);
}

enum status planner_begin(struct planner *p, int32_t slot, const struct prompt_facts *facts,
                          int32_t *prefill_level)
{
    struct slot *s = &p->slots[slot];
    INVARIANT(s->n == 0);
    s->facts = *facts;
    s->n_log = facts->turn == 0 ? 0 : s->n_log;
    s->settled = s->probe = -1;
    plan_clear(&s->plan);
    plan_clear(&s->answer);
    if (p->coll->rank == 0) {
        TRY(policy_begin(p->policy, &s->facts, s->state, p->opt.n_levels, &p->message[0]));
    }
    TRY(broadcast(p, p->message, 1));
    s->plan.prefill = s->answer.prefill = *prefill_level = p->message[0];
    return ST_OK;
}

enum status planner_ask(struct planner *p, int32_t slot, int32_t step,
                        const struct signals *signals)
{
    struct slot *s = &p->slots[slot];
    if (step < 0 && p->opt.lag > 1) {
        TRY(plan_add(&s->plan, 0, s->plan.prefill));
    }
    struct pending nobodys, *a = &nobodys;
    bool comes = step + p->opt.lag <= p->opt.max_new_tokens - 2; // the turn's last step is that
    if (comes) {
        INVARIANT(s->n <= p->opt.lag);
        a = &s->ring[(s->first + s->n++) % (p->opt.lag + 1)];
    }
    *a = (struct pending){.asked = step};
    if (p->coll->rank != 0 || (p->remote && !comes)) {
        return ST_OK;
    }
    struct policy_request r = {
        .facts = &s->facts, .signals = signals, .state = s->state, .plan = &s->answer};
    if (p->remote) {
        return p->remote->ask(p->remote->ctx, slot, &r);
    }
    double start = clock_s();
    TRY(policy_answer(p->policy, &r, 1, p->opt.n_levels));
    a->amendment = r.amendment;
    a->latency_us = (float)(1e6 * (clock_s() - start));
    return ST_OK;
}

/* The oldest request of a slot, if it is due at a step. */
static struct pending *due(const struct planner *p, const struct slot *s, int32_t step)
{
    struct pending *a = &s->ring[s->first];
    return s->n > 0 && a->asked + p->opt.lag == step ? a : NULL;
}

/* On the first rank: the answer into p->message, which has two ints for it: the plan's number of
 * switches, or an amendment. */
static enum status collect(struct planner *p, int32_t slot, struct pending *a, int32_t *to)
{
    struct slot *s = &p->slots[slot];
    if (p->remote) {
        struct signals signals = {.step = a->asked};
        struct policy_request r = {.facts = &s->facts, .signals = &signals, .plan = &s->answer};
        TRY(p->remote->take(p->remote->ctx, slot, &r, &a->latency_us));
        a->amendment = r.amendment;
    }
    to[0] = a->asked < 0 ? s->answer.n : a->amendment.level;
    to[1] = a->asked < 0 ? 0 : a->amendment.probe;
    return ST_OK;
}

static void note(const struct planner *p, struct slot *s, const struct pending *a, int32_t step,
                 struct amendment what)
{
    INVARIANT((size_t)s->n_log < p->max_decisions);
    s->log[s->n_log++] = (struct decision_record){.turn = s->facts.turn,
                                                  .asked = a->asked,
                                                  .step = step,
                                                  .level = what.level,
                                                  .probe = what.probe,
                                                  .dial = s->facts.dial,
                                                  .latency_us = a->latency_us};
}

/* The answered plan is in force from `step` on. */
static enum status adopt_plan(struct planner *p, struct slot *s, const struct pending *a,
                              int32_t step)
{
    int32_t prefill = s->plan.prefill;
    plan_clear(&s->plan);
    s->plan.prefill = prefill;
    if (step > 0) {
        TRY(plan_add(&s->plan, 0, prefill));
    }
    int32_t level = plan_level(&s->answer, step);
    TRY(plan_add(&s->plan, step, level));
    note(p, s, a, step, (struct amendment){level, -1});
    for (int32_t i = 0; i < s->answer.n; i++) {
        const struct plan_switch *at = &s->answer.at[i];
        if (at->step > step && at->step <= p->opt.max_new_tokens - 2) {
            TRY(plan_add(&s->plan, at->step, at->level));
            note(p, s, a, at->step, (struct amendment){at->level, -1});
        }
    }
    return ST_OK;
}

static enum status adopt(struct planner *p, struct slot *s, const struct pending *a, int32_t step,
                         struct amendment what)
{
    if (a->asked < 0) {
        return adopt_plan(p, s, a, step);
    }
    s->probe = what.probe;
    if (what.level >= 0) {
        TRY(plan_amend(&s->plan, step, what.level));
    }
    if (what.level >= 0 || what.probe >= 0) {
        note(p, s, a, step, what);
    }
    return ST_OK;
}

/* The switches of the plans that are due, from the first rank to all. head: two ints of each due
 * request. */
static enum status spread_plans(struct planner *p, int32_t n, const int32_t *slots,
                                const int32_t *steps, const int32_t *head, int32_t *body)
{
    int32_t n_ints = 0, k = 0;
    bool first = p->coll->rank == 0;
    for (int32_t i = 0; i < n; i++) {
        struct slot *s = &p->slots[slots[i]];
        const struct pending *a = due(p, s, steps[i]);
        if (a && a->asked < 0) {
            INVARIANT(head[2 * k] > 0 && head[2 * k] <= s->answer.capacity);
            for (int32_t j = 0; first && j < s->answer.n; j++) {
                body[n_ints + 2 * j] = s->answer.at[j].step;
                body[n_ints + 2 * j + 1] = s->answer.at[j].level;
            }
            n_ints += 2 * head[2 * k];
        }
        k += a != NULL;
    }
    if (n_ints == 0) {
        return ST_OK;
    }
    TRY(broadcast(p, body, n_ints));
    n_ints = k = 0;
    for (int32_t i = 0; !first && i < n; i++) {
        struct slot *s = &p->slots[slots[i]];
        const struct pending *a = due(p, s, steps[i]);
        for (int32_t j = 0; a && a->asked < 0 && j < head[2 * k]; j++, n_ints += 2) {
            TRY(plan_add(&s->answer, body[n_ints], body[n_ints + 1]));
        }
        k += a != NULL;
    }
    return ST_OK;
}

enum status planner_settle(struct planner *p, int32_t n, const int32_t *slots, const int32_t *steps)
{
    int32_t n_due = 0;
    for (int32_t i = 0; i < n; i++) {
        struct slot *s = &p->slots[slots[i]];
        struct pending *a = due(p, s, steps[i]);
        s->probe = s->settled == steps[i] ? s->probe : -1;
        s->settled = steps[i];
        if (a && p->coll->rank == 0) {
            TRY(collect(p, slots[i], a, p->message + 2 * n_due));
        }
        n_due += a != NULL;
    }
    if (n_due == 0) {
        return ST_OK;
    }
    const int32_t *head = p->message;
    TRY(broadcast(p, p->message, 2 * n_due));
    TRY(spread_plans(p, n, slots, steps, head, p->message + 2 * (size_t)n_due));
    for (int32_t i = 0; i < n; i++) {
        struct slot *s = &p->slots[slots[i]];
        const struct pending *a = due(p, s, steps[i]);
        if (a) {
            TRY(adopt(p, s, a, steps[i], (struct amendment){head[0], head[1]}));
            head += 2;
            s->first = (s->first + 1) % (p->opt.lag + 1);
            s->n--;
        }
    }
    return ST_OK;
}

int32_t planner_level(const struct planner *p, int32_t slot, int32_t step)
{
    return plan_level(&p->slots[slot].plan, step);
}

int32_t planner_probe(const struct planner *p, int32_t slot)
{
    return p->slots[slot].probe;
}

void planner_end(struct planner *p, int32_t slot)
{
    struct slot *s = &p->slots[slot];
    if (p->remote && p->coll->rank == 0 && s->n > 0) {
        p->remote->forget(p->remote->ctx, slot);
    }
    s->n = 0;
}

struct decision_record *planner_log(const struct planner *p, int32_t slot, int32_t *n)
{
    *n = p->slots[slot].n_log;
    return p->slots[slot].log;
}
