/* The scheduler service and the planner before it, without a model: invented prompts whose plans
 * and amendments must be those of a plain loop over the rules, whoever answers (directly, rank 0
 * between two passes, a rank of its own), at every lag, with answers that come late, slots that
 * decode together, turns that end before their answers come, and several turns.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "dist/service.h"

#include <string.h>
#include <time.h>

#include "core/mem.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { N_PROMPTS = 24, N_TURNS = 2, N_NEW = 12, N_LEVELS = 4, N_SLOTS = 3, MOST_FEATURES = 40000 };

struct scene {
    int32_t lag;
    bool own;       /* rank 0 decodes nothing */
    double sleep_s; /* of rank 0 between two polls */
    bool remote;    /* the policy is asked at the service; else by each replica */
};

static void pause_s(double s)
{
    struct timespec t = {.tv_nsec = (long)(1e9 * s)};
    nanosleep(&t, NULL);
}

/* ---- a policy that uses everything it is given ---- */

struct memory {
    int64_t seen; /* of this turn */
};

static uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}

static int64_t look_at(const struct prompt_facts *f, const struct signals *g)
{
    int64_t sum = f->ordinal * 1000 + f->turn * 100 + g->step + g->level * 7 + g->token;
    for (int32_t i = 0; g->features && i < 2 * g->n_feature_tok; i++) {
        sum += (int64_t)g->features[i];
    }
    for (int32_t i = 0; g->activation && i < 6; i++) {
        sum += (int64_t)g->activation[i];
    }
    sum += f->task[0] + 3 * (int64_t)strlen(f->id) + (int64_t)(f->dial * 16);
    return sum;
}

static enum status fake_begin(const void *impl, const struct prompt_facts *facts, void *state,
                              int32_t *prefill_level)
{
    (void)impl;
    ((struct memory *)state)->seen = facts->ordinal + 1;
    *prefill_level = (int32_t)(facts->ordinal % N_LEVELS);
    return ST_OK;
}

static enum status fake_plan(const void *impl, const struct prompt_facts *facts,
                             const struct signals *signals, void *state, struct plan *plan)
{
    struct memory *m = state;
    (void)impl;
    CHECK(m->seen == facts->ordinal + 1 && signals->features && plan->n == 0);
    CHECK(plan->prefill == (int32_t)(facts->ordinal % N_LEVELS));
    m->seen += look_at(facts, signals);
    for (int32_t step = 0; step < N_NEW; step += 2) {
        TRY(plan_add(plan, step, (int32_t)(mix((uint64_t)(m->seen + step)) % N_LEVELS)));
    }
    return ST_OK;
}

static enum status fake_observe(const void *impl, const struct prompt_facts *facts,
                                const struct signals *signals, void *state,
                                struct amendment *amendment)
{
    struct memory *m = state;
    (void)impl;
    m->seen += look_at(facts, signals);
    uint64_t x = mix((uint64_t)m->seen);
    amendment->level = x % 5 == 0 ? (int32_t)(x / 8 % N_LEVELS) : -1;
    amendment->probe = x % 3 == 0 ? (int32_t)(x / 64 % N_LEVELS) : -1;
    return ST_OK;
}

static enum status fake_answer(const void *impl, struct policy_request *requests, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        struct policy_request *r = &requests[i];
        for (int32_t j = 0; j < i; j++) { // never two of one turn together
            CHECK(r->facts->ordinal != requests[j].facts->ordinal);
        }
        if (r->signals->step < 0) {
            TRY(fake_plan(impl, r->facts, r->signals, r->state, r->plan));
        } else {
            TRY(fake_observe(impl, r->facts, r->signals, r->state, &r->amendment));
        }
    }
    return ST_OK;
}

static const struct policy_ops fake = {.name = "fake",
                                       .needs = SIGNAL_LOGITS,
                                       .adds_tokens = true,
                                       .state_bytes = sizeof(struct memory),
                                       .begin = fake_begin,
                                       .plan = fake_plan,
                                       .observe = fake_observe,
                                       .answer = fake_answer};

/* ---- invented prompts ---- */

static const char *const tasks[] = {"", "translation", "a task with a longer name"};
static float *features; /* (MOST_FEATURES) */

static struct prompt_facts facts_of(int32_t ordinal, int32_t turn)
{
    return (struct prompt_facts){.ordinal = ordinal,
                                 .turn = turn,
                                 .id = ordinal % 2 ? "an id" : "",
                                 .task = tasks[ordinal % 3],
                                 .max_new_tokens = N_NEW,
                                 .dial = (float)(ordinal % 16) / 16};
}

/* Some requests are long: those do not fit into one packet. */
static int32_t feature_tok(int32_t ordinal)
{
    return ordinal % 4 == 0 ? MOST_FEATURES / 2 : 1 + ordinal;
}

static struct signals signals_of(int32_t ordinal, int32_t step, int32_t level)
{
    static const float activation[6] = {1, 2, 3, 4, 5, 6};
    struct signals g = {.step = step, .level = level, .token = ordinal * 31 + step};
    if (step < 0) {
        g.features = features;
        g.n_feature_heads = g.feature_dim = 1;
        g.n_feature_tok = feature_tok(ordinal);
    } else if (ordinal % 2) {
        g.activation = activation;
    }
    return g;
}

/* Steps that a turn takes: some end early, some have none. */
static int32_t n_steps_of(int32_t ordinal, int32_t turn)
{
    int32_t n = (int32_t)(mix((uint64_t)(ordinal * 10 + turn)) % (3 * N_NEW));
    return n < N_NEW ? n : N_NEW - 1;
}

struct outcome {
    int32_t level[N_TURNS][N_NEW], probe[N_TURNS][N_NEW];
    int32_t n_log;
    struct decision_record log[4 * N_TURNS * N_NEW]; /* latencies 0 */
};

/* The rules, plainly: everything that was asked after step s counts from step s + lag on. */
static void expect(struct outcome *out, int32_t ordinal, int32_t lag)
{
    *out = (struct outcome){0};
    for (int32_t turn = 0; turn < N_TURNS; turn++) {
        struct prompt_facts f = facts_of(ordinal, turn);
        struct memory m;
        struct plan plan;
        struct amendment said[N_NEW];
        int32_t prefill = 0, amended = -1;
        CHECK_OK(plan_create(&plan, N_NEW));
        CHECK_OK(fake_begin(NULL, &f, &m, &prefill));
        plan.prefill = prefill;
        struct signals g = signals_of(ordinal, -1, prefill);
        CHECK_OK(fake_plan(NULL, &f, &g, &m, &plan));
        for (int32_t s = 0; s < n_steps_of(ordinal, turn); s++) {
            int32_t asked = s - lag, level = asked < -1 ? prefill : plan_level(&plan, s);
            struct amendment now = {-1, -1};
            if (asked >= 0) {
                now = said[asked];
                amended = now.level >= 0 ? now.level : amended;
            }
            out->level[turn][s] = amended >= 0 ? amended : level;
            out->probe[turn][s] = now.probe;
            g = signals_of(ordinal, s, out->level[turn][s]);
            CHECK_OK(fake_observe(NULL, &f, &g, &m, &said[s]));
        }
        plan_free(&plan);
    }
}

/* ---- a replica ---- */

struct sequence {
    int32_t ordinal, turn, step, prefill; /* ordinal -1: free */
};

static struct outcome got[N_PROMPTS];

/* Ends turns (some have no steps at all), frees the slot after the last. */
static void end_turns(struct planner *p, struct sequence *q, int32_t slot)
{
    while (q->ordinal >= 0 && q->step == n_steps_of(q->ordinal, q->turn)) {
        planner_end(p, slot);
        if (++q->turn < N_TURNS) {
            struct prompt_facts f = facts_of(q->ordinal, q->turn);
            q->step = 0;
            CHECK_OK(planner_begin(p, slot, &f, &q->prefill));
            struct signals g = signals_of(q->ordinal, -1, q->prefill);
            CHECK_OK(planner_ask(p, slot, -1, &g));
            continue;
        }
        struct outcome *out = &got[q->ordinal];
        const struct decision_record *log = planner_log(p, slot, &out->n_log);
        for (int32_t i = 0; i < out->n_log; i++) {
            CHECK(log[i].latency_us >= 0);
            out->log[i] = log[i];
            out->log[i].latency_us = 0;
        }
        q->ordinal = -1;
    }
}

static void start(struct planner *p, struct sequence *q, int32_t slot, int32_t ordinal)
{
    struct prompt_facts f = facts_of(ordinal, 0);
    *q = (struct sequence){.ordinal = ordinal};
    CHECK_OK(planner_begin(p, slot, &f, &q->prefill));
    struct signals g = signals_of(ordinal, -1, q->prefill);
    CHECK_OK(planner_ask(p, slot, -1, &g));
    end_turns(p, q, slot);
}

/* One pass of all slots that are at work. */
static void pass(struct planner *p, struct sequence *seq)
{
    int32_t slots[N_SLOTS], steps[N_SLOTS], n = 0;
    for (int32_t s = 0; s < N_SLOTS; s++) {
        if (seq[s].ordinal >= 0) {
            slots[n] = s;
            steps[n++] = seq[s].step;
        }
    }
    CHECK_OK(planner_settle(p, n, slots, steps));
    for (int32_t i = 0; i < n; i++) {
        struct sequence *q = &seq[slots[i]];
        int32_t level = planner_level(p, slots[i], q->step);
        got[q->ordinal].level[q->turn][q->step] = level;
        got[q->ordinal].probe[q->turn][q->step] = planner_probe(p, slots[i]);
        struct signals g = signals_of(q->ordinal, q->step, level);
        CHECK_OK(planner_ask(p, slots[i], q->step, &g));
        q->step++;
        end_turns(p, q, slots[i]);
    }
}

static bool is_busy(const struct sequence *seq)
{
    bool busy = false;
    for (int32_t s = 0; s < N_SLOTS; s++) {
        busy = busy || seq[s].ordinal >= 0;
    }
    return busy;
}

/* Decodes every n_replicas-th prompt. */
static void decode(const struct env *env, struct planner *p, struct service *service,
                   const struct scene *scene)
{
    struct sequence seq[N_SLOTS];
    struct gen_rng rng = {(uint64_t)env->rank + 77};
    int32_t next = env->replica;
    for (int32_t s = 0; s < N_SLOTS; s++) {
        seq[s].ordinal = -1;
    }
    while (next < N_PROMPTS || is_busy(seq)) {
        bool any = false;
        for (int32_t s = 0; s < N_SLOTS; s++) {
            if (seq[s].ordinal < 0 && next < N_PROMPTS) {
                start(p, &seq[s], s, next);
                next += env->n_replicas;
            }
        }
        pass(p, seq);
        pause_s(1e-4 * gen_uniform(&rng));
        if (service) {
            pause_s(scene->sleep_s);
            CHECK_OK(service_poll(service, &any));
        }
    }
}

/* ---- scenes ---- */

static void gather(const struct env *env)
{
    MPI_Datatype whole;
    MPI_Type_contiguous((int)sizeof got[0], MPI_BYTE, &whole);
    MPI_Type_commit(&whole);
    for (int32_t i = 0; i < N_PROMPTS; i++) {
        int from = env_first_rank(env, i % env->n_replicas);
        if (from != 0 && env->rank == from) {
            MPI_Send(&got[i], 1, whole, 0, i, env->world);
        } else if (from != 0 && env->rank == 0) {
            MPI_Recv(&got[i], 1, whole, from, i, env->world, MPI_STATUS_IGNORE);
        }
    }
    MPI_Type_free(&whole);
}

/* The log says when what came into force: from it alone the levels can be told. */
static void check_log(const struct outcome *o, int32_t ordinal, int32_t lag)
{
    int32_t level[N_TURNS][N_NEW], probe[N_TURNS][N_NEW];
    for (int32_t turn = 0; turn < N_TURNS; turn++) {
        for (int32_t s = 0; s < N_NEW; s++) {
            level[turn][s] = (int32_t)(ordinal % N_LEVELS);
            probe[turn][s] = -1;
        }
    }
    for (int32_t i = 0; i < o->n_log; i++) {
        const struct decision_record *d = &o->log[i];
        CHECK(d->asked < 0 ? d->step >= lag - 1 : d->step == d->asked + lag);
        CHECK_NEAR(d->dial, (ordinal % 16) / 16.0, 0);
        for (int32_t s = d->step; d->level >= 0 && s < N_NEW; s++) {
            level[d->turn][s] = d->level;
        }
        probe[d->turn][d->step] = d->probe;
    }
    for (int32_t turn = 0; turn < N_TURNS; turn++) {
        for (int32_t s = 0; s < n_steps_of(ordinal, turn); s++) {
            CHECK(o->level[turn][s] == level[turn][s] && o->probe[turn][s] == probe[turn][s]);
        }
    }
}

static void check_outcomes(const struct scene *scene)
{
    static struct outcome expected;
    int n_other = 0;
    for (int32_t i = 0; i < N_PROMPTS; i++) {
        expect(&expected, i, scene->lag);
        bool same = memcmp(expected.level, got[i].level, sizeof expected.level) == 0;
        for (int32_t turn = 0; turn < N_TURNS; turn++) {
            for (int32_t s = 0; s < n_steps_of(i, turn); s++) {
                same = same && expected.probe[turn][s] == got[i].probe[turn][s];
            }
        }
        n_other += !same;
        check_log(&got[i], i, scene->lag);
    }
    if (!CHECK(n_other == 0)) {
        fprintf(stderr, "    lag %d, %s: %d of %d prompts\n", scene->lag,
                scene->own ? "own" : "inline", n_other, N_PROMPTS);
    }
}

/* Everybody comes here; rank 0 serves until all are here. */
static void serve_to_end(const struct env *env, struct service *service, double sleep_s)
{
    MPI_Request all;
    int here = 0;
    MPI_Ibarrier(env->world, &all);
    while (!here) {
        bool any = false;
        if (service) {
            CHECK_OK(service_poll(service, &any));
        }
        pause_s(sleep_s > 0 ? sleep_s : 2e-5);
        MPI_Test(&all, &here, MPI_STATUS_IGNORE);
    }
}

static void play(struct env *env, const struct scene *scene)
{
    struct service *service = NULL;
    struct service_client *client = NULL;
    struct planner *planner = NULL;
    struct planner_remote remote;
    struct collective coll;
    const struct policy policy = {.ops = &fake};
    env->n_service = scene->own;
    CHECK_OK(env_grid(env, 1));
    collective_local(&coll);
    const struct service_options o = {.n_clients = env->n_replicas,
                                      .n_slots = N_SLOTS,
                                      .n_levels = N_LEVELS,
                                      .max_new_tokens = N_NEW,
                                      .lag = scene->lag,
                                      .max_text_bytes = 40,
                                      .n_activation_floats = 6,
                                      .max_feature_floats = MOST_FEATURES,
                                      .timeout_s = 60};
    memset(got, 0, sizeof got);
    if (env->rank == 0) {
        CHECK_OK(service_create(&service, env, &policy, &o));
    }
    if (env->replica >= 0) {
        struct planner_options po = {.n_slots = N_SLOTS,
                                     .n_levels = N_LEVELS,
                                     .max_new_tokens = N_NEW,
                                     .lag = scene->lag,
                                     .max_turns = N_TURNS};
        CHECK_OK(service_client_create(&client, env, service, env->replica, &o, fake.state_bytes));
        remote = service_client_remote(client);
        po.remote = scene->remote ? &remote : NULL;
        CHECK_OK(planner_create(&planner, &policy, &coll, &po));
    }
    uint64_t allocs = mem_alloc_count();
    if (planner) {
        decode(env, planner, service, scene);
        CHECK_OK(service_client_leave(client));
    }
    serve_to_end(env, service, scene->sleep_s);
    CHECK(mem_alloc_count() == allocs);
    int left = 0;
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, env->service_comm, &left, MPI_STATUS_IGNORE);
    CHECK(!left);
    gather(env);
    if (service) {
        struct service_counts c = service_counted(service);
        bool asks = scene->remote && scene->lag < N_NEW;
        CHECK(asks ? c.n_requests > 4 * N_PROMPTS : c.n_requests == 0);
        CHECK(c.n_batches <= c.n_requests && c.largest_batch <= env->n_replicas + 1);
        // who waits for a slow service is answered together with others
        CHECK(env->n_replicas < 3 || !asks || scene->sleep_s <= 0 || c.largest_batch > 1);
        check_outcomes(scene);
    }
    planner_destroy(&planner);
    planner_destroy(&planner);
    service_client_destroy(&client);
    service_destroy(&service);
    service_destroy(&service);
    collective_close(&coll);
    MPI_Barrier(env->world);
}

/* ---- errors ---- */

static enum status empty_answer(const void *impl, struct policy_request *requests, int32_t n)
{
    (void)impl;
    (void)requests;
    (void)n;
    return ST_OK;
}

static void test_errors(struct env *env)
{
    struct service *service = NULL;
    struct service_client *client = NULL;
    struct policy_ops ops = fake;
    const struct policy policy = {.ops = &ops};
    struct service_options o = {.n_clients = 1,
                                .n_slots = 1,
                                .n_levels = N_LEVELS,
                                .max_new_tokens = N_NEW,
                                .lag = 1,
                                .max_text_bytes = 4,
                                .max_feature_floats = SIZE_MAX / 2};
    env->n_service = 0;
    CHECK_OK(env_grid(env, env->size));
    if (env->rank != 0) {
        return;
    }
    CHECK_STATUS(service_create(&service, env, &policy, &o), ST_SHAPE, "overflow");
    o.max_feature_floats = 1u << 30;
    CHECK_STATUS(service_create(&service, env, &policy, &o), ST_SHAPE, "averaged over heads");
    CHECK(service == NULL);
    o.max_feature_floats = 2;
    CHECK_OK(service_create(&service, env, &policy, &o));
    CHECK_OK(service_client_create(&client, env, service, 0, &o, fake.state_bytes));
    struct planner_remote remote = service_client_remote(client);
    struct prompt_facts f = facts_of(0, 0);
    struct signals g = signals_of(0, -1, 0); // more features than announced
    struct memory m = {1};
    struct plan plan;
    CHECK_OK(plan_create(&plan, N_NEW));
    struct policy_request r = {.facts = &f, .signals = &g, .state = &m, .plan = &plan};
    CHECK_STATUS(remote.ask(remote.ctx, 0, &r), ST_SHAPE, "were announced");
    ops.answer = empty_answer;
    g.features = NULL;
    CHECK_STATUS(remote.ask(remote.ctx, 0, &r), ST_USER, "gave an empty plan for prompt 0");
    plan_free(&plan);
    service_client_destroy(&client);
    service_destroy(&service);
}

int main(int argc, char **argv)
{
    struct env env;
    CHECK_OK(env_start(&env, &argc, &argv));
    features = calloc(MOST_FEATURES, sizeof *features);
    for (int i = 0; i < MOST_FEATURES; i++) {
        features[i] = (float)(i % 11);
    }
    for (int32_t lag = 1; lag <= 3; lag++) {
        for (int own = 0; own <= (env.size > 1); own++) {
            play(&env, &(struct scene){.lag = lag, .own = own != 0, .remote = true});
            play(&env,
                 &(struct scene){.lag = lag, .own = own != 0, .sleep_s = 2e-3, .remote = true});
        }
        play(&env, &(struct scene){.lag = lag, .remote = false});
    }
    play(&env, &(struct scene){.lag = N_NEW + 5, .remote = true}); // nothing takes effect
    test_errors(&env);
    MPI_Barrier(env.world);
    free(features);
    env_end(&env);
    return check_report();
}
