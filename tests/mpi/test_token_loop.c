/* The token loop, driven as `pmpd run` drives it (leases, session, journal), on a tiny nested
 * model: our own objects allocate nothing in it (the linker sends their allocations through here),
 * and a sequence's bits do not depend on what shares its passes. Runs on any number of ranks: they
 * form one replica. SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/session.h"
#include "experiments/engine.h"
#include "experiments/quantise/nested_write.h"
#include "experiments/replica.h"
#include "sched/registry.h"
#include "tests/gen.h"

enum { N_PROMPTS = 5, N_NEW = 65, PROMPT_TOK = 9, MOST_PASSES = 600 };

/* ---- allocations of our objects, counted ---- */

static atomic_long n_allocated;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *ptr, size_t bytes);
void *__real_aligned_alloc(size_t align, size_t bytes);
int __real_posix_memalign(void **out, size_t align, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *ptr, size_t bytes);
void *__wrap_aligned_alloc(size_t align, size_t bytes);
int __wrap_posix_memalign(void **out, size_t align, size_t bytes);

void *__wrap_malloc(size_t bytes)
{
    atomic_fetch_add(&n_allocated, 1);
    return __real_malloc(bytes);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    atomic_fetch_add(&n_allocated, 1);
    return __real_calloc(n, bytes);
}

void *__wrap_realloc(void *ptr, size_t bytes)
{
    atomic_fetch_add(&n_allocated, 1);
    return __real_realloc(ptr, bytes);
}

void *__wrap_aligned_alloc(size_t align, size_t bytes)
{
    atomic_fetch_add(&n_allocated, 1);
    return __real_aligned_alloc(align, bytes);
}

int __wrap_posix_memalign(void **out, size_t align, size_t bytes)
{
    atomic_fetch_add(&n_allocated, 1);
    return __real_posix_memalign(out, align, bytes);
}

/* ---- one run ---- */

/* What the callbacks see. */
struct watch {
    long at_first, at_last; /* n_allocated when the first and the latest token came out */
    long n_tokens, n_gathered;
    int n_finished, finished[N_PROMPTS]; /* ordinals as they came */
    int32_t company[MOST_PASSES];        /* slots that decoded in each pass */
    struct lease_client *client;
    struct step_record steps[N_PROMPTS][N_NEW]; /* of the finished prompts */
    int32_t n_steps[N_PROMPTS];
    float logprob0[N_PROMPTS];
};

static void on_token(void *ctx, int32_t slot, int32_t token)
{
    struct watch *w = ctx;
    (void)slot;
    (void)token;
    if (w->n_tokens++ == 0) {
        w->at_first = atomic_load(&n_allocated);
    }
    w->at_last = atomic_load(&n_allocated);
}

static enum status on_finished(void *ctx, const struct finished_record *record)
{
    struct watch *w = ctx;
    w->n_steps[record->ordinal] = record->n_steps;
    w->logprob0[record->ordinal] = record->turns[0].logprob0;
    memcpy(w->steps[record->ordinal], record->steps,
           (size_t)record->n_steps * sizeof *record->steps);
    for (int32_t i = 0; i < record->n_passes; i++) {
        w->n_gathered += record->passes[i].n_gathered;
        if (CHECK(record->passes[i].pass < MOST_PASSES)) {
            w->company[record->passes[i].pass] = record->passes[i].n_slots;
        }
    }
    w->finished[w->n_finished++] = (int)record->ordinal;
    enum status st = w->client ? lease_client_finish(w->client, record) : ST_OK;
    w->at_last = atomic_load(&n_allocated);
    return st;
}

static void make_prompts(struct prompts *p)
{
    struct gen_rng rng = {7};
    *p = (struct prompts){.n = N_PROMPTS};
    CHECK_OK(MEM_NEW(&p->prompt, N_PROMPTS));
    for (int i = 0; i < N_PROMPTS; i++) {
        struct prompt *q = &p->prompt[i];
        q->n_turns = 1;
        q->n_ids[0] = PROMPT_TOK + i;
        CHECK_OK(MEM_NEW(&q->ids[0], q->n_ids[0]));
        for (int t = 0; t < q->n_ids[0]; t++) {
            q->ids[0][t] = (int32_t)gen_below(&rng, 250);
        }
    }
}

static enum status no_records(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    (void)ctx;
    (void)kind;
    (void)payload;
    (void)bytes;
    return ST_OK;
}

static bool by_level;    /* of the next runs */
static bool mixed_dials; /* the same: prompts at different levels at a time */

/* A run of all prompts with the given slots; the first n_suspects are suspects. Steps and
 * allocations go to w. */
static void run(struct env *env, const char *model, const char *out, int32_t n_slots,
                int n_suspects, double top_p, float temperature, struct watch *w)
{
    struct settings s;
    struct engine e;
    struct policy policy = {0};
    struct prompts prompts;
    struct session *session = NULL;
    struct journal *journal = NULL;
    struct lease_owner *owner = NULL;
    struct lease_item items[N_PROMPTS] = {0};
    size_t max_record = 0;
    memset(w, 0, sizeof *w);
    settings_default(&s);
    snprintf(s.model.path, sizeof s.model.path, "%s", model);
    snprintf(s.policy.name, sizeof s.policy.name, "static");
    snprintf(s.policy.switches, sizeof s.policy.switches,
             "prefill:4 0:4 9:3 30:2 50:3,1.down_proj=4");
    s.parallel.tensor_ranks = env->size;
    s.decode.slots = n_slots;
    s.decode.prefill_chunk = 4;
    s.decode.top_p = top_p;
    s.backend.threads = 2;
    make_prompts(&prompts);
    CHECK_OK(engine_open(&e, env, &s));
    CHECK_OK(registry_open_policy(&policy, &s, &e.levels));
    CHECK_OK(engine_load(&e, &s, false));
    struct session_options o = {.n_slots = n_slots,
                                .prefill_chunk = 4,
                                .max_tok = e.context,
                                .max_turns = 1,
                                .max_new_tokens = N_NEW,
                                .temperature = temperature,
                                .by_level = by_level,
                                .seed = 3,
                                .on_token = on_token,
                                .on_finished = on_finished,
                                .ctx = w};
    CHECK_OK(session_max_record_bytes(&max_record, &o, e.source.config.head_dim));
    CHECK_OK(session_create(&session, e.dec, &e.coll, &policy, &e.levels, &e.source.config, &o));
    for (int i = 0; i < N_PROMPTS; i++) {
        items[i] = (struct lease_item){.ordinal = i,
                                       .attempt = 1,
                                       .cost = prompts.prompt[i].n_ids[0],
                                       .dial = mixed_dials ? 0.3f + 0.1f * (float)i : 0.5f,
                                       .alone = i < n_suspects};
    }
    if (env->rank == 0) {
        CHECK_OK(journal_open(&journal, out, no_records, NULL));
        CHECK_OK(journal_reserve(journal, max_record));
        CHECK_OK(lease_owner_create(&owner, env, journal, items, N_PROMPTS, 0, max_record, NULL));
        CHECK_OK(lease_client_create(&w->client, env, owner, max_record, 60));
    }
    CHECK_OK(replica_run(&e, session, &prompts, n_slots, owner, w->client, NULL));
    if (owner) {
        CHECK_OK(lease_owner_serve(owner));
    }
    lease_client_destroy(&w->client);
    lease_owner_destroy(&owner);
    journal_close(&journal);
    session_destroy(&session);
    policy_close(&policy);
    prompts_free(&prompts);
    engine_close(&e);
}

/* The journal's last records: a suspect is taken when the one before it is done. */
static enum status last_three(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    uint32_t *last = ctx;
    (void)payload;
    (void)bytes;
    memmove(last, last + 1, 2 * sizeof *last);
    last[2] = kind;
    return ST_OK;
}

static void check_alone(const struct watch *w, const char *dir)
{
    uint32_t last[3] = {0};
    CHECK_OK(journal_read(dir, last_three, last, NULL));
    CHECK(last[0] == JOURNAL_FINISHED && last[1] == JOURNAL_START && last[2] == JOURNAL_FINISHED);
    CHECK(w->finished[N_PROMPTS - 2] == 1 && w->finished[N_PROMPTS - 1] == 0); /* last */
    for (int i = 0; i < N_PROMPTS; i++) {
        for (int32_t t = 0; t < w->n_steps[i]; t++) {
            CHECK((w->company[w->steps[i][t].pass] == 1) == (i < 2));
        }
    }
}

/* The same bits in other company. */
static void check_same(const struct watch *a, const struct watch *b)
{
    for (int i = 0; i < N_PROMPTS; i++) {
        CHECK(a->logprob0[i] == b->logprob0[i]);
        for (int32_t t = 0; t < N_NEW - 1; t++) {
            const struct step_record *x = &a->steps[i][t], *y = &b->steps[i][t];
            CHECK(x->token == y->token && x->logprob == y->logprob);
            CHECK(x->entropy == y->entropy && x->margin == y->margin);
        }
    }
}

/* Passes that are shared have one level each (is_one), or some have several. */
static void check_cohorts(const struct watch *w, bool is_one)
{
    static int32_t level[MOST_PASSES];
    int n_shared = 0, n_mixed = 0;
    memset(level, -1, sizeof level);
    for (int i = 0; i < N_PROMPTS; i++) {
        for (int32_t t = 0; t < w->n_steps[i]; t++) {
            const struct step_record *r = &w->steps[i][t];
            n_shared += level[r->pass] >= 0;
            n_mixed += level[r->pass] >= 0 && level[r->pass] != r->level;
            level[r->pass] = r->level;
        }
    }
    CHECK(n_shared > N_NEW && (n_mixed == 0) == is_one);
}

static void check_run(const struct watch *w)
{
    CHECK(w->n_tokens == (long)N_PROMPTS * N_NEW); /* at most max_new_tokens, never one more */
    if (!CHECK(w->at_last == w->at_first)) {
        fprintf(stderr, "    %ld allocations in the token loop\n", w->at_last - w->at_first);
    }
    for (int i = 0; i < N_PROMPTS; i++) {
        CHECK(w->n_steps[i] == N_NEW - 1);
        for (int32_t t = 0; t < w->n_steps[i]; t++) { /* every step is there, the first included */
            const struct step_record *r = &w->steps[i][t];
            CHECK(r->step == t && r->level == (t < 9 ? 0 : t < 30 ? 1 : t < 50 ? 2 : 3));
        }
    }
}

int main(int argc, char **argv)
{
    struct env env = {0};
    static struct watch two, three, again;
    char folder[GEN_PATH_BYTES], dense[GEN_PATH_BYTES], nested[GEN_PATH_BYTES], out[GEN_PATH_BYTES];
    CHECK_OK(env_start(&env, &argc, &argv));
    log_set_level(LOG_ERROR);
    if (env.rank == 0) {
        gen_folder(folder);
    }
    MPI_Bcast(folder, sizeof folder, MPI_CHAR, 0, env.world);
    gen_path(dense, folder, "dense");
    gen_path(nested, folder, "nested");
    if (env.rank == 0) {
        struct gen_model m = gen_model_default();
        struct nested_options o = {.n_threads = 1, .version = "test"};
        struct nested_report report;
        m.vocab = 700; /* more than a rank's candidates */
        m.ffn = 256;   /* groups of 32: every matrix splits over two ranks */
        CHECK_OK(fit_spec_make(&o.spec, 1u << 2 | 1u << 3 | 1u << 4, LEVEL_TIED, false, 32, NULL));
        CHECK(system(NULL) != 0);
        char command[GEN_PATH_BYTES + 16];
        snprintf(command, sizeof command, "mkdir %s", dense);
        CHECK(system(command) == 0);
        CHECK_OK(gen_model_write(dense, &m));
        CHECK_OK(nested_write(&report, dense, nested, &o));
    }
    MPI_Barrier(env.world);
    run(&env, nested, gen_path(out, folder, "two"), 2, 0, 1, 0.7f, &two);
    check_run(&two);
    run(&env, nested, gen_path(out, folder, "three"), 3, 0, 1, 0.7f, &three);
    check_run(&three);
    run(&env, nested, gen_path(out, folder, "again"), 5, 0, 1, 0.7f, &again);
    check_same(&two, &three); /* other passes */
    check_same(&two, &again);
    mixed_dials = true;
    run(&env, nested, gen_path(out, folder, "mixed"), 3, 0, 1, 0.7f, &three);
    by_level = true;
    run(&env, nested, gen_path(out, folder, "cohorts"), 3, 0, 1, 0.7f, &again);
    mixed_dials = by_level = false;
    check_cohorts(&three, false);
    check_cohorts(&again, true);
    check_same(&three, &again);
    CHECK(two.n_gathered == 0 && three.n_gathered == 0);
    /* suspects: last, with nothing beside them, and the same bits */
    run(&env, nested, gen_path(out, folder, "alone"), 4, 2, 1, 0.7f, &again);
    check_run(&again);
    check_same(&two, &again);
    if (env.rank == 0) {
        check_alone(&again, out);
    }
    /* restricted sampling, so hot that the candidates (more, where there are more ranks) suffice
     * for some tokens only */
    float hot = env.size == 1 ? 1.0f : 1.3f;
    run(&env, nested, gen_path(out, folder, "wide"), 2, 0, 0.97, hot, &two);
    check_run(&two);
    run(&env, nested, gen_path(out, folder, "wide5"), 5, 0, 0.97, hot, &three);
    check_run(&three);
    check_same(&two, &three);
    if (!CHECK(two.n_gathered > 0 && two.n_gathered < two.n_tokens &&
               two.n_gathered == three.n_gathered)) {
        fprintf(stderr, "    gathered: %ld and %ld\n", two.n_gathered, three.n_gathered);
    }
    CHECK(atomic_load(&n_allocated) > 100); /* the linker did send them here */
    MPI_Barrier(env.world);
    if (env.rank == 0) {
        gen_remove(folder);
    }
    int failed = check_report();
    env_end(&env);
    return failed;
}
