/* pmpd bench service: how fast the scheduler service decides. Simulated replicas take leases, ask
 * for a plan as a learned policy does (a classifier over K and V of a prompt), hand in a record and
 * pause; leases are journalled with fdatasync as in a run. Under mpirun rank 0 is the service and
 * the other ranks play the replicas; alone, one process plays both and sends messages to itself.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/lease.h"
#include "dist/service.h"
#include "experiments/bench/bench.h"
#include "experiments/bench/statistics.h"
#include "experiments/engine.h"
#include "sched/classifier.h"

const struct column bench_service_columns[] = {
    {"replicas", "replicas", 0},       {"leases", "leases", 0},
    {"pause_ms", "pause ms", 0},       {"decisions_s", "decisions/s", 0},
    {"mean_batch", "mean batch", 2},   {"largest_batch", "largest", 0},
    {"plan_p50_us", "plan us p50", 0}, {"plan_p99_us", "p99", 0},
    {"plan_max_us", "max", 0},         {"lease_p50_us", "lease us p50", 0},
    {"lease_p99_us", "p99", 0},        {NULL, NULL, 0},
};

/* The classifier's size: a head of 64, four queries, MLP of 128, four classes. */
enum { HEAD_DIM = 64, QUERIES = 4, HIDDEN = 128, CLASSES = 4, NEW_TOK = 256, TOGETHER = 64 };

/* ---- the policy ---- */

struct stand_in {
    struct classifier classifier; /* owned */
    float *scratch;               /* owned */
};

static enum status stand_in_answer(const void *impl, struct policy_request *requests, int32_t n)
{
    const struct stand_in *s = impl;
    struct classifier_item items[TOGETHER];
    float probabilities[TOGETHER][CLASSES];
    for (int32_t from = 0; from < n; from += TOGETHER) {
        int32_t m = n - from < TOGETHER ? n - from : TOGETHER;
        for (int32_t i = 0; i < m; i++) {
            const struct signals *g = requests[from + i].signals;
            items[i] = (struct classifier_item){g->features, g->n_feature_tok, probabilities[i]};
        }
        TRY(classifier_evaluate_batch(&s->classifier, items, m, s->scratch));
        for (int32_t i = 0; i < m; i++) {
            int32_t best = classifier_argmax(probabilities[i], CLASSES);
            TRY(plan_add(requests[from + i].plan, 0, 0));
            if (best > 0) {
                TRY(plan_add(requests[from + i].plan, best * NEW_TOK / CLASSES, 1));
            }
        }
    }
    return ST_OK;
}

static const struct policy_ops stand_in_ops = {
    .name = "stand-in", .needs = SIGNAL_KV_FEATURES, .answer = stand_in_answer};

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static float uniform(uint64_t *state)
{
    return (float)next_random(state) / 2147483648.0f;
}

static enum status stand_in_open(struct stand_in *s, int32_t n_tok)
{
    const struct classifier_shape shape = {.kind = CLASSIFIER_KV,
                                           .head_dim = HEAD_DIM,
                                           .n_kv_heads = 1,
                                           .n_groups = QUERIES,
                                           .n_queries = QUERIES,
                                           .n_in = QUERIES * HEAD_DIM,
                                           .n_hidden = HIDDEN,
                                           .n_classes = CLASSES};
    uint64_t state = 1;
    TRY(classifier_create(&s->classifier, &shape));
    for (size_t i = 0; i < s->classifier.n_params; i++) {
        s->classifier.params[i] = 0.1f * (uniform(&state) - 0.5f);
    }
    return MEM_NEW(&s->scratch, classifier_scratch(&shape, n_tok));
}

static void stand_in_close(struct stand_in *s)
{
    classifier_free(&s->classifier);
    mem_free(s->scratch);
}

/* ---- replicas ---- */

enum stage { STAGE_PAUSE, STAGE_LEASE, STAGE_PLAN, STAGE_FINISH, STAGE_DONE };
struct replica {
    enum stage stage;
    struct service_client *client; /* owned */
    struct planner_remote remote;
    struct plan plan; /* owned */
    struct lease_item item;
    double until_s; /* end of the pause */
};

/* The replicas that this rank plays. */
struct cast {
    struct replica *replicas; /* (n) owned */
    int32_t n;
    struct lease_client *leases; /* owned; one request at a time: */
    int32_t asking;              /* the replica that asks; -1: none */
    double asked_s;
    double pause_s;
    int32_t n_tok;
    float *features; /* owned: (2, n_tok, HEAD_DIM) */
    uint64_t random;
    struct samples plan_us, lease_us;
};

static enum status ask_plan(struct cast *c, struct replica *r)
{
    struct prompt_facts facts = {.ordinal = r->item.ordinal,
                                 .id = "",
                                 .task = "",
                                 .n_prompt_tok = c->n_tok,
                                 .max_new_tokens = NEW_TOK};
    struct signals signals = {.step = -1,
                              .features = c->features,
                              .n_feature_heads = 1,
                              .n_feature_tok = c->n_tok,
                              .feature_dim = HEAD_DIM};
    struct policy_request request = {.facts = &facts, .signals = &signals, .plan = &r->plan};
    plan_clear(&r->plan);
    r->stage = STAGE_PLAN;
    return r->remote.ask(r->remote.ctx, 0, &request);
}

static enum status ask_lease(struct cast *c, int32_t i)
{
    struct replica *r = &c->replicas[i];
    enum lease_state state = LEASE_WAIT;
    if (c->asking >= 0 && c->asking != i) {
        return ST_OK;
    }
    c->asked_s = c->asking < 0 ? clock_s() : c->asked_s;
    c->asking = i;
    TRY(lease_client_poll(c->leases, &state, &r->item));
    if (state == LEASE_WAIT) {
        return ST_OK;
    }
    c->asking = -1;
    if (state != LEASE_GRANTED) {
        r->stage = STAGE_DONE;
        return ST_OK;
    }
    samples_add(&c->lease_us, 1e6 * (clock_s() - c->asked_s));
    return ask_plan(c, r);
}

static enum status take_plan(struct cast *c, struct replica *r)
{
    struct signals signals = {.step = -1};
    struct policy_request request = {.signals = &signals, .plan = &r->plan};
    float latency_us = 0;
    bool there = false;
    TRY(service_client_look(r->client, 0, &there));
    if (!there) {
        return ST_OK;
    }
    TRY(r->remote.take(r->remote.ctx, 0, &request, &latency_us));
    samples_add(&c->plan_us, (double)latency_us);
    r->stage = STAGE_FINISH;
    return ST_OK;
}

/* As soon as the rank's last record is taken: waiting would hold up the others that it plays. */
static enum status finish(struct cast *c, struct replica *r)
{
    struct turn_record turn = {.n_new_tok = 1};
    if (lease_client_is_sending(c->leases)) {
        return ST_OK;
    }
    struct finished_record record = {.ordinal = r->item.ordinal,
                                     .key = {r->item.key[0], r->item.key[1]},
                                     .attempt = 1,
                                     .n_turns = 1,
                                     .turns = &turn};
    TRY(lease_client_finish(c->leases, &record));
    r->stage = STAGE_PAUSE;
    r->until_s = clock_s() + 2 * (double)uniform(&c->random) * c->pause_s;
    return ST_OK;
}

/* Until nothing is left. owner: where this rank is the service, too. */
static enum status play(struct cast *c, struct lease_owner *owner)
{
    int32_t n_done = 0;
    while (n_done < c->n) {
        bool stop = false;
        n_done = 0;
        for (int32_t i = 0; i < c->n; i++) {
            struct replica *r = &c->replicas[i];
            if (r->stage == STAGE_PAUSE && clock_s() >= r->until_s) {
                r->stage = STAGE_LEASE;
            }
            if (r->stage == STAGE_LEASE) {
                TRY(ask_lease(c, i));
            } else if (r->stage == STAGE_PLAN) {
                TRY(take_plan(c, r));
            } else if (r->stage == STAGE_FINISH) {
                TRY(finish(c, r));
                TRY(lease_client_progress(c->leases, &stop));
            }
            n_done += r->stage == STAGE_DONE;
        }
        TRY(lease_client_progress(c->leases, &stop));
        if (owner) {
            TRY(lease_owner_poll(owner));
        } else {
            struct timespec t = {.tv_nsec = 10 * 1000};
            nanosleep(&t, NULL); // the service's core may be this one
        }
    }
    for (int32_t i = 0; i < c->n; i++) {
        TRY(service_client_leave(c->replicas[i].client));
    }
    return lease_client_leave(c->leases);
}

static enum status cast_create(struct cast *c, struct env *env, struct lease_owner *owner,
                               const struct service_options *so, int32_t first, int32_t n_leases,
                               size_t record_bytes)
{
    c->asking = -1;
    c->random = 77 + (uint64_t)env->rank;
    TRY(samples_create(&c->plan_us, n_leases));
    TRY(samples_create(&c->lease_us, n_leases));
    TRY(MEM_NEW(&c->features, 2 * (size_t)c->n_tok * HEAD_DIM));
    for (size_t i = 0; i < 2 * (size_t)c->n_tok * HEAD_DIM; i++) {
        c->features[i] = uniform(&c->random) - 0.5f;
    }
    TRY(MEM_NEW(&c->replicas, c->n));
    for (int32_t i = 0; i < c->n; i++) {
        struct replica *r = &c->replicas[i];
        TRY(service_client_create(&r->client, env, NULL, first + i, so, 0));
        TRY(plan_create(&r->plan, NEW_TOK));
        r->remote = service_client_remote(r->client);
        r->until_s = clock_s() + 2 * (double)uniform(&c->random) * c->pause_s;
    }
    return lease_client_create(&c->leases, env, owner, record_bytes, 0);
}

static void cast_free(struct cast *c)
{
    for (int32_t i = 0; c->replicas && i < c->n; i++) {
        service_client_destroy(&c->replicas[i].client);
        plan_free(&c->replicas[i].plan);
    }
    mem_free(c->replicas);
    mem_free(c->features);
    lease_client_destroy(&c->leases);
    samples_free(&c->plan_us);
    samples_free(&c->lease_us);
}

/* ---- the owner ---- */

struct office {
    struct stand_in policy_impl;
    struct policy policy;
    struct service *service; /* owned */
    struct journal *journal; /* owned */
    struct lease_owner *owner;
    char dir[SETTINGS_PATH_BYTES]; /* of the journal; "": not made */
};

static enum status on_poll(void *ctx, bool *any)
{
    return service_poll(((struct office *)ctx)->service, any);
}

static enum status office_open(struct office *f, struct env *env, const struct bench_options *o,
                               const struct service_options *so, size_t record_bytes)
{
    const struct lease_hooks hooks = {.ctx = f, .poll = on_poll};
    struct lease_item *items = NULL;
    enum status st = ST_OK;
    snprintf(f->dir, sizeof f->dir, "%s/pmpd-bench-XXXXXX", o->dir);
    if (!mkdtemp(f->dir)) {
        char wanted[SETTINGS_PATH_BYTES];
        snprintf(wanted, sizeof wanted, "%s", o->dir);
        f->dir[0] = '\0';
        FAIL(ST_IO, "no folder can be made in %s for the journal; name another with --dir", wanted);
    }
    f->policy = (struct policy){.ops = &stand_in_ops, .impl = &f->policy_impl};
    TRY(stand_in_open(&f->policy_impl, o->tokens.value[0]));
    TRY(service_create(&f->service, env, &f->policy, so));
    TRY(journal_open(&f->journal, f->dir, NULL, NULL));
    TRY(MEM_NEW(&items, o->leases));
    for (int32_t i = 0; i < o->leases; i++) {
        items[i] = (struct lease_item){.ordinal = i, .key = {(uint64_t)i, 1}, .attempt = 1};
    }
    TRY_GOTO(
        st,
        lease_owner_create(&f->owner, env, f->journal, items, o->leases, 0, record_bytes, &hooks),
        done);
done:
    mem_free(items);
    return st;
}

static void office_close(struct office *f)
{
    char path[SETTINGS_PATH_BYTES + 16];
    lease_owner_destroy(&f->owner);
    service_destroy(&f->service);
    journal_close(&f->journal);
    stand_in_close(&f->policy_impl);
    if (f->dir[0]) {
        snprintf(path, sizeof path, "%s/journal.bin", f->dir);
        unlink(path);
        rmdir(f->dir);
    }
}

/* ---- the figures ---- */

/* All ranks' samples to rank 0, sorted. */
static enum status gather(struct samples *all, const struct samples *mine, struct env *env,
                          int32_t most)
{
    int *counts = NULL, *offsets = NULL;
    enum status st = ST_OK;
    TRY(samples_create(all, most));
    TRY_GOTO(st, MEM_NEW(&counts, env->size), done);
    TRY_GOTO(st, MEM_NEW(&offsets, env->size), done);
    int rc = MPI_Gather(&mine->n, 1, MPI_INT, counts, 1, MPI_INT, 0, env->world);
    for (int r = 1; r < env->size; r++) {
        offsets[r] = offsets[r - 1] + counts[r - 1];
    }
    all->n = offsets[env->size - 1] + counts[env->size - 1];
    rc = rc ? rc
            : MPI_Gatherv(mine->value, mine->n, MPI_DOUBLE, all->value, counts, offsets, MPI_DOUBLE,
                          0, env->world);
    st = env_mpi_check(rc, "MPI_Gatherv", __FILE__, __LINE__, __func__);
    if (all->n > 0) {
        samples_spread(all); // sorts
    }
done:
    mem_free(counts);
    mem_free(offsets);
    return st;
}

/* The value that a part of the sorted samples does not exceed. */
static double part_of(const struct samples *s, double part)
{
    int i = (int)(part * s->n);
    return s->n > 0 ? s->value[i < s->n ? i : s->n - 1] : 0;
}

static enum status add_row(json_t *root, const struct bench_options *o, const struct office *f,
                           const struct samples *plan, const struct samples *lease, double pause_ms,
                           double seconds)
{
    struct service_counts c = service_counted(f->service);
    return report_add(
        root, "rows",
        json_pack("{s:i, s:i, s:f, s:i, s:f, s:f, s:f, s:i, s:f, s:f, s:f, s:f, s:f, s:s, s:s}",
                  "replicas", o->replicas, "leases", o->leases, "pause_ms", pause_ms, "tokens",
                  o->tokens.value[0], "seconds", seconds, "decisions_s", plan->n / seconds,
                  "mean_batch", c.n_batches ? (double)c.n_requests / (double)c.n_batches : 0.0,
                  "largest_batch", c.largest_batch, "plan_p50_us", part_of(plan, 0.5),
                  "plan_p99_us", part_of(plan, 0.99), "plan_max_us", part_of(plan, 1),
                  "lease_p50_us", part_of(lease, 0.5), "lease_p99_us", part_of(lease, 0.99), "dir",
                  o->dir, "isa", "scalar"));
}

static enum status run_pause(struct env *env, const struct bench_options *o, int32_t pause_ms,
                             json_t *root)
{
    int n_ranks = env->size - env->n_service, mine = env->replica; // ranks that play, and which
    int32_t first = mine < 0 ? 0 : (int32_t)((int64_t)o->replicas * mine / n_ranks);
    int32_t end = mine < 0 ? 0 : (int32_t)((int64_t)o->replicas * (mine + 1) / n_ranks);
    struct cast cast = {
        .n = end - first, .n_tok = o->tokens.value[0], .pause_s = 1e-3 * (double)pause_ms};
    struct office office = {.dir = ""};
    struct samples plan = {0}, lease = {0};
    const struct service_options so = {.n_clients = o->replicas,
                                       .n_slots = 1,
                                       .n_levels = 2,
                                       .max_new_tokens = NEW_TOK,
                                       .lag = 1,
                                       .max_feature_floats = 2 * (size_t)cast.n_tok * HEAD_DIM};
    const struct finished_record empty = {.n_turns = 1};
    size_t record_bytes = trace_packed_bytes(&empty);
    enum status st = ST_OK;
    if (env->rank == 0) {
        st = office_open(&office, env, o, &so, record_bytes);
    }
    if (st == ST_OK && mine >= 0) {
        st = cast_create(&cast, env, office.owner, &so, first, o->leases, record_bytes);
    }
    TRY_GOTO(st, env_agree(env, st), done);
    double start = clock_s();
    if (mine >= 0) {
        st = play(&cast, office.owner);
    }
    if (st == ST_OK && office.owner) {
        st = lease_owner_serve(office.owner);
    }
    TRY_GOTO(st, engine_loop_end(env, st), done);
    double seconds = clock_s() - start;
    TRY_GOTO(st, gather(&plan, &cast.plan_us, env, o->leases), done);
    TRY_GOTO(st, gather(&lease, &cast.lease_us, env, o->leases), done);
    if (env->rank == 0) {
        TRY_GOTO(st, add_row(root, o, &office, &plan, &lease, (double)pause_ms, seconds), done);
    }
done:
    cast_free(&cast);
    office_close(&office);
    samples_free(&plan);
    samples_free(&lease);
    return st;
}

enum status bench_service(struct env *env, const struct bench_options *o, json_t *root)
{
    env->n_service = env->size > 1;
    TRY(env_grid(env, 1));
    for (int i = 0; i < o->pause.n; i++) {
        TRY(run_pause(env, o, o->pause.value[i], root));
    }
    return ST_OK;
}
