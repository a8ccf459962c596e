/* Which prompts a session names as suspects at every moment, and logits that are no numbers: the
 * prompt, step and level are named, and nobody else is suspected. On any number of ranks, which
 * form one replica. SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/log.h"
#include "core/session.h"
#include "experiments/engine.h"
#include "tests/gen.h"

enum { N_SLOTS = 3, N_NEW = 6, FIRST = 40, POISON = 250 };

static struct session *session;
static struct engine engine;
static bool decoding;   /* the next gathering belongs to a decode pass */
static int64_t at_work; /* the ordinal that is at work by itself */
static int n_begun, n_planned, n_observed, n_gathered_alone, n_gathered_all;
static uint64_t observed_mask; /* ordinals (- FIRST) named since the last pass */
static int64_t spoil;          /* the next token of this ordinal leads to NaN; -1: of none */

static bool is_only(int64_t ordinal)
{
    int64_t named[N_SLOTS + 1];
    return session_suspects(session, named, N_SLOTS + 1) == 1 && named[0] == ordinal;
}

/* ---- a policy that looks around ---- */

static enum status look_begin(const void *impl, const struct prompt_facts *facts, void *state,
                              int32_t *prefill_level)
{
    (void)impl;
    (void)state;
    n_begun++;
    CHECK(is_only(facts->ordinal));
    *prefill_level = 0;
    return ST_OK;
}

static enum status look_plan(const void *impl, const struct prompt_facts *facts,
                             const struct signals *signals, void *state, struct plan *plan)
{
    (void)impl;
    (void)signals;
    (void)state;
    n_planned++;
    CHECK(is_only(facts->ordinal));
    return plan_add(plan, 0, 0);
}

static enum status look_observe(const void *impl, const struct prompt_facts *facts,
                                const struct signals *signals, void *state,
                                struct amendment *amendment)
{
    int64_t named[N_SLOTS + 1] = {0};
    (void)impl;
    (void)facts;
    (void)signals;
    (void)state;
    (void)amendment;
    n_observed++;
    CHECK(session_suspects(session, named, N_SLOTS + 1) == 1);
    observed_mask |= 1ull << (named[0] - FIRST);
    return ST_OK;
}

static const struct policy_ops look_ops = {.name = "look",
                                           .help = "looks around",
                                           .needs = SIGNAL_LOGITS,
                                           .begin = look_begin,
                                           .plan = look_plan,
                                           .observe = look_observe};

/* ---- what else is called from inside ---- */

static const struct collective_ops *real_ops;

static enum status look_gather(struct collective *c, struct tensor *whole,
                               const struct tensor *part, const size_t *counts)
{
    int64_t named[N_SLOTS + 1];
    if (decoding) {
        n_gathered_all++;
        CHECK(session_suspects(session, named, N_SLOTS + 1) == session_n_active(session));
    } else {
        n_gathered_alone++;
        CHECK(is_only(at_work));
    }
    return real_ops->all_gather(c, whole, part, counts);
}

static int64_t in_slot[N_SLOTS];

static void on_token(void *ctx, int32_t slot, int32_t token)
{
    (void)ctx;
    CHECK(is_only(in_slot[slot]));
    if (in_slot[slot] == spoil) {
        float *row = (float *)engine.weights.embed.data +
                     (size_t)token * (size_t)engine.source.config.hidden;
        row[3] = NAN;
    }
}

static enum status on_finished(void *ctx, const struct finished_record *record)
{
    int64_t *finished = ctx;
    *finished = record->ordinal;
    CHECK(is_only(record->ordinal)); /* until the record is out of hand */
    return ST_OK;
}

/* ---- the tests ---- */

static void start(struct prompt *p, int64_t ordinal, int32_t slot)
{
    const uint64_t key[2] = {1, (uint64_t)ordinal};
    in_slot[slot] = ordinal;
    CHECK_OK(session_start(session, p, ordinal, key, 1, 0.5f));
}

/* Prefills what was started last, which at_work names. */
static void prefill(int64_t ordinal, const struct prompt *p)
{
    at_work = ordinal;
    decoding = false;
    for (int32_t n = 0; n < p->n_ids[0]; n += 4) {
        CHECK_OK(session_advance(session));
    }
    decoding = true;
}

static void test_at_every_moment(struct prompt *p, const int64_t *finished, bool first_rank)
{
    int64_t named[N_SLOTS];
    CHECK(session_suspects(session, named, N_SLOTS) == 0);
    for (int i = 0; i < N_SLOTS; i++) {
        start(&p[i], FIRST + i, i);
        CHECK(session_suspects(session, named, N_SLOTS) == i + 1); /* at rest: whoever is there */
        prefill(FIRST + i, &p[i]);
        CHECK(session_suspects(session, named, N_SLOTS) == i + 1);
        CHECK(named[i] == FIRST + i);
    }
    CHECK(session_suspects(session, named, 2) == 2); /* no more than there is room for */
    for (int step = 0; step < N_NEW - 1; step++) {
        observed_mask = 0;
        CHECK_OK(session_advance(session));
        CHECK(!first_rank || observed_mask == 7);
    }
    CHECK(session_n_active(session) == 0 && *finished == FIRST + N_SLOTS - 1);
    CHECK(session_suspects(session, named, N_SLOTS) == 0);
    CHECK(n_gathered_all > 0 && n_gathered_alone > 0);
    if (first_rank) {
        CHECK(n_begun == N_SLOTS && n_planned == N_SLOTS && n_observed == N_SLOTS * (N_NEW - 1));
    }
}

static void test_no_number_at_a_step(struct prompt *p)
{
    for (int i = 0; i < N_SLOTS; i++) {
        start(&p[i], FIRST + i, i);
        prefill(FIRST + i, &p[i]);
    }
    CHECK_OK(session_advance(session));
    spoil = FIRST + 1;
    CHECK_OK(session_advance(session)); /* its token is now one that cannot be fed */
    spoil = -1;
    CHECK_STATUS(session_advance(session), ST_NUMERIC,
                 "prompt 41, turn 0, step 2 at level max: the logits are not numbers");
    CHECK(is_only(FIRST + 1));
}

static void test_no_number_at_prefill(struct prompt *p)
{
    start(p, FIRST + 9, 0);
    at_work = FIRST + 9;
    decoding = false;
    CHECK_OK(session_advance(session));
    CHECK_STATUS(session_advance(session), ST_NUMERIC,
                 "prompt 49, turn 0, prefill at level max: the logits are not numbers");
    CHECK(is_only(FIRST + 9));
}

int main(int argc, char **argv)
{
    struct env env = {0};
    struct settings s;
    struct policy policy = {.ops = &look_ops};
    struct prompt prompts[N_SLOTS] = {0};
    int32_t ids[N_SLOTS][8], level = 0;
    int64_t finished = -1;
    char folder[GEN_PATH_BYTES];
    CHECK_OK(env_start(&env, &argc, &argv));
    log_set_level(LOG_ERROR);
    if (env.rank == 0) {
        struct gen_model m = gen_model_default();
        gen_folder(folder);
        CHECK_OK(gen_model_write(folder, &m));
    }
    MPI_Bcast(folder, sizeof folder, MPI_CHAR, 0, env.world);
    settings_default(&s);
    snprintf(s.model.path, sizeof s.model.path, "%s", folder);
    s.parallel.tensor_ranks = env.size;
    s.decode.slots = N_SLOTS;
    s.decode.prefill_chunk = 4;
    CHECK_OK(engine_open(&engine, &env, &s));
    CHECK_OK(level_table_add(&engine.levels, "max", &level));
    CHECK_OK(engine_load(&engine, &s, false));
    struct collective_ops ops = *engine.coll.ops;
    real_ops = engine.coll.ops;
    ops.all_gather = look_gather;
    struct session_options o = {.n_slots = N_SLOTS,
                                .prefill_chunk = 4,
                                .max_tok = engine.context,
                                .max_turns = 1,
                                .max_new_tokens = N_NEW,
                                .on_token = on_token,
                                .on_finished = on_finished,
                                .ctx = &finished};
    for (int i = 0; i < N_SLOTS; i++) {
        prompts[i].n_turns = 1;
        prompts[i].ids[0] = ids[i];
        prompts[i].n_ids[0] = 8;
        for (int t = 0; t < 8; t++) {
            ids[i][t] = 10 + 31 * i + 7 * t;
        }
    }
    spoil = -1;
    for (int test = 0; test < 3; test++) {
        CHECK_OK(session_create(&session, engine.dec, &engine.coll, &policy, &engine.levels,
                                &engine.source.config, &o));
        engine.coll.ops = &ops;
        if (test == 0) {
            test_at_every_moment(prompts, &finished, env.rank == 0);
        } else if (test == 1) {
            ids[0][5] = POISON;
            ((float *)engine.weights.embed.data)[POISON * engine.source.config.hidden] = NAN;
            test_no_number_at_prefill(&prompts[0]);
            ids[0][5] = 9;
        } else {
            test_no_number_at_a_step(prompts);
        }
        engine.coll.ops = real_ops;
        session_destroy(&session);
    }
    engine_close(&engine);
    MPI_Barrier(env.world);
    if (env.rank == 0) {
        gen_remove(folder);
    }
    int failed = check_report();
    env_end(&env);
    return failed;
}
