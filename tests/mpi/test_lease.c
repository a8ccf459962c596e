/* Leases and the journal behind them with faked records, for any number of ranks: every prompt
 * once, longest first and suspects last, starts durable before grants, records durable before they
 * count; a run that is stopped keeps what was handed in and starts nothing more.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "dist/lease.h"

#include <limits.h>
#include <sys/resource.h>
#include <signal.h>
#include <time.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/stop.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { NOBODY = -1, ALL = -2 };
enum { MAX_ITEMS = 64, SLOTS = 2, MAX_STEPS = 400, LARGE_FEATURES = 1 << 20 };
enum { MAX_RECORD = 1 << 16, MAX_LARGE_RECORD = LARGE_FEATURES * 8 + (1 << 16) };

struct scene {
    const char *name;
    int64_t n;
    int tensor_ranks;   /* 0: 1 */
    int slow;           /* this replica's passes take 20 ms; NOBODY; ALL */
    int absent;         /* this replica sends a large record, then sleeps without MPI; NOBODY */
    bool look;          /* compare with the journal's file all the time (allocates) */
    int suspect_every;  /* every so manieth item is one; 0: none */
    double deadline_s;  /* of the owner; 0: none */
    int64_t stop_after; /* so many prompts are done: somebody asks rank 0 to stop; 0: nobody does */
    bool stops;         /* before all is done */
    bool own;           /* rank 0 decodes nothing */
    int64_t window;     /* the dial of place i is known when places 0..i-window are done; 0: none */
};

static char dir[GEN_PATH_BYTES];
static struct scene scene;
static struct lease_item items[MAX_ITEMS];
static int64_t n_counted;
static int64_t places[128]; /* by ordinal: place in the order of a budget */
static bool is_done[128];   /* by place; on the owner */
static int64_t n_polls;
static int64_t n_dials; /* that were given */

static void pause_ms(double ms)
{
    struct timespec t = {.tv_sec = (time_t)(ms / 1000)};
    t.tv_nsec = (long)((ms - 1000.0 * (double)t.tv_sec) * 1e6);
    nanosleep(&t, NULL);
}

/* ---- faked prompts and records ---- */

static void make_items(int64_t n)
{
    struct gen_rng rng = {7};
    for (int64_t i = 0; i < n; i++) {
        // ordinals scattered, costs with ties
        items[i] = (struct lease_item){.ordinal = (i * 37 + 5) % 101,
                                       .key = {gen_next(&rng), gen_next(&rng)},
                                       .attempt = 1 + (int32_t)(i % 2),
                                       .cost = (int32_t)gen_below(&rng, 10)};
        items[i].alone = scene.suspect_every > 0 && i % scene.suspect_every == 0;
    }
}

/* Longest first, then in the order of the file; suspects where they stand. */
static void find_places(int64_t n)
{
    memset(is_done, 0, sizeof is_done);
    n_dials = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t before = 0;
        for (int64_t j = 0; j < n; j++) {
            before += items[j].cost > items[i].cost ||
                      (items[j].cost == items[i].cost && items[j].ordinal < items[i].ordinal);
        }
        places[items[i].ordinal] = before;
    }
}

static float dial_of(int64_t place)
{
    return (float)place / 256;
}

/* The hook: asked for the places in order. */
static enum status find_dial(void *ctx, const struct lease_item *item, bool *known, float *dial)
{
    CHECK(ctx == &n_counted);
    int64_t place = places[item->ordinal];
    CHECK(place == n_dials);
    *known = true;
    for (int64_t i = 0; i <= place - scene.window; i++) {
        *known = *known && is_done[i];
    }
    n_dials += *known;
    *dial = dial_of(place);
    return ST_OK;
}

/* Something else to serve: never while a lease is half given. */
static enum status count_poll(void *ctx, bool *any)
{
    CHECK(ctx == &n_counted && !*any);
    n_polls++;
    return ST_OK;
}

static bool is_large(int64_t ordinal, int32_t replica)
{
    (void)ordinal;
    return scene.absent >= 0 && replica == scene.absent;
}

struct record_room {
    struct turn_record turn;
    struct step_record steps[MAX_STEPS];
    float *features; /* (2, LARGE_FEATURES) */
};
static struct record_room room;

/* The record that a replica makes of a prompt: a function of both. */
static struct finished_record make_record(const struct lease_item *item, int32_t replica)
{
    struct gen_rng rng = {(uint64_t)item->ordinal * 1000 + (uint64_t)replica};
    struct finished_record r = {.ordinal = item->ordinal,
                                .key = {item->key[0], item->key[1]},
                                .attempt = item->attempt,
                                .epoch = 4,
                                .replica = replica,
                                .wall_s = gen_uniform(&rng),
                                .n_turns = 1,
                                .turns = &room.turn,
                                .steps = room.steps,
                                .features = room.features};
    r.n_steps = (int32_t)gen_below(&rng, MAX_STEPS);
    room.turn = (struct turn_record){
        .n_prompt_tok = 3, .n_new_tok = r.n_steps + 1, .finish = FINISH_EOS, .n_steps = r.n_steps};
    for (int32_t i = 0; i < r.n_steps; i++) {
        room.steps[i] = (struct step_record){.step = i,
                                             .token = (int32_t)gen_below(&rng, 1000),
                                             .logprob = -(float)gen_uniform(&rng)};
    }
    if (is_large(item->ordinal, replica)) {
        r.n_feature_tok = LARGE_FEATURES;
        r.feature_dim = 1;
        for (size_t i = 0; i < 2 * (size_t)LARGE_FEATURES; i += 1000) {
            room.features[i] = (float)i;
        }
    }
    return r;
}

/* ---- what the journal says ---- */

struct found {
    int64_t n_started, n_finished;
    int64_t started[MAX_ITEMS]; /* ordinals in order */
    int32_t start_replica[MAX_ITEMS];
    int64_t finished[MAX_ITEMS];
    bool compare;            /* bytes of finished records */
    unsigned char *expected; /* (MAX_LARGE_RECORD) */
    const struct lease_item *by_ordinal[128];
};

static enum status look_at(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct found *f = ctx;
    if (kind == JOURNAL_START) {
        struct journal_start s;
        TRY(journal_unpack_start(&s, payload, bytes));
        if (f->n_started < MAX_ITEMS) {
            f->started[f->n_started] = s.ordinal;
            f->start_replica[f->n_started++] = s.replica;
        }
        if (f->compare) {
            const struct lease_item *item = f->by_ordinal[s.ordinal];
            CHECK(item && s.key[0] == item->key[0] && s.key[1] == item->key[1]);
            CHECK(item && s.attempt == item->attempt && s.epoch == 4);
        }
        return ST_OK;
    }
    CHECK(kind == JOURNAL_FINISHED);
    struct finished_record r;
    TRY(trace_unpack(&r, payload, bytes));
    if (f->n_finished < MAX_ITEMS) {
        f->finished[f->n_finished++] = r.ordinal;
    }
    int32_t replica = -1;
    for (int64_t i = 0; i < f->n_started; i++) {
        replica = f->started[i] == r.ordinal ? f->start_replica[i] : replica;
    }
    CHECK(replica == r.replica); // started before, by the same replica
    if (f->compare && r.ordinal < 128 && f->by_ordinal[r.ordinal]) {
        struct finished_record again = make_record(f->by_ordinal[r.ordinal], r.replica);
        size_t n = trace_packed_bytes(&again);
        CHECK(n == bytes && n <= MAX_LARGE_RECORD);
        trace_pack(f->expected, MAX_LARGE_RECORD, &again);
        CHECK(memcmp(f->expected, payload, bytes) == 0);
    }
    trace_free(&r);
    return ST_OK;
}

static int64_t n_finished_in_file(void)
{
    struct found f = {0};
    CHECK_OK(journal_read(dir, look_at, &f, NULL));
    return f.n_finished;
}

static bool started_in_file(int64_t ordinal)
{
    struct found f = {0};
    CHECK_OK(journal_read(dir, look_at, &f, NULL));
    bool found = false;
    for (int64_t i = 0; i < f.n_started; i++) {
        found = found || f.started[i] == ordinal;
    }
    return found;
}

static void check_journal(int64_t n)
{
    static struct found f;
    unsigned char *expected = f.expected ? f.expected : malloc(MAX_LARGE_RECORD);
    f = (struct found){.compare = true, .expected = expected};
    for (int64_t i = 0; i < n; i++) {
        f.by_ordinal[items[i].ordinal] = &items[i];
    }
    size_t bad = 99;
    CHECK_OK(journal_read(dir, look_at, &f, &bad));
    CHECK(bad == 0 && f.n_finished == n_counted && f.n_started >= f.n_finished);
    CHECK(scene.stops ? f.n_started < n : f.n_started == n && f.n_finished == n);
    if (scene.stops && scene.deadline_s > 0 && scene.deadline_s < 1e-3) {
        CHECK(f.n_started == 0);
    }
    bool seen[128] = {false};
    for (int64_t i = 0; i < f.n_finished; i++) {
        CHECK(!seen[f.finished[i]]);
        seen[f.finished[i]] = true;
    }
    // suspects last (not with a budget), longest first, then in the order of the file
    for (int64_t i = 1; i < f.n_started; i++) {
        const struct lease_item *a = f.by_ordinal[f.started[i - 1]];
        const struct lease_item *b = f.by_ordinal[f.started[i]];
        CHECK(a && b && (scene.window > 0 || a->alone <= b->alone));
        CHECK(a && b &&
              ((scene.window == 0 && a->alone < b->alone) || a->cost > b->cost ||
               (a->cost == b->cost && a->ordinal < b->ordinal)));
    }
    // records of those who did not sleep were taken while the large one was under way
    if (scene.absent >= 0 && f.n_finished > 0) {
        int64_t last = f.finished[f.n_finished - 1];
        for (int64_t i = 0; i < f.n_started; i++) {
            CHECK(f.started[i] != last || f.start_replica[i] == scene.absent);
        }
    }
}

/* ---- the run ---- */

static enum status count_done(void *ctx, int64_t n_done, int64_t n_total, int64_t ordinal,
                              const void *packed, size_t bytes)
{
    int64_t n_steps[1] = {0};
    CHECK_OK(trace_count_levels(n_steps, 1, packed, bytes)); // it is the whole record
    CHECK(ordinal >= 0 && ordinal < 101 && n_steps[0] < MAX_STEPS);
    is_done[places[ordinal]] = true;
    CHECK(ctx == &n_counted);
    n_counted++;
    CHECK(n_done == n_counted && n_total == scene.n);
    if (scene.look) {
        CHECK(n_finished_in_file() == n_done);
    }
    if (n_done == scene.stop_after) {
        stop_ask(SIGTERM, 3);
    }
    return ST_OK;
}

/* Without MPI, until all other prompts are in the journal: the owner must not wait for this one. */
static void wait_for_others(void)
{
    struct found f = {0};
    for (int i = 0; i < 600 && f.n_finished < scene.n - 1; i++) {
        pause_ms(50);
        f = (struct found){0};
        CHECK_OK(journal_read(dir, look_at, &f, NULL));
    }
}

struct slot {
    bool busy;
    int passes_left;
    struct lease_item item;
};

/* A replica's first rank: polls when a slot is free, decodes, hands in; leaves when told to. */
static int64_t decode_all(struct env *env, struct lease_client *client, struct lease_owner *owner)
{
    struct slot slots[SLOTS] = {0};
    struct gen_rng rng = {(uint64_t)env->rank + 1};
    int n_slots = env->replica == scene.absent ? 1 : SLOTS;
    int64_t n_done = 0;
    int n_busy = 0;
    bool more = true, stop = false;
    while (!stop && (more || n_busy > 0)) {
        for (int s = 0; s < n_slots && more && !stop; s++) {
            enum lease_state state = LEASE_WAIT;
            if (slots[s].busy) {
                continue;
            }
            CHECK_OK(lease_client_poll(client, &state, &slots[s].item));
            if (state == LEASE_GRANTED) {
                slots[s].busy = true;
                slots[s].passes_left = 1 + (int)gen_below(&rng, 4);
                n_busy++;
                CHECK(!scene.look || started_in_file(slots[s].item.ordinal));
                CHECK(scene.window == 0 ||
                      slots[s].item.dial == dial_of(places[slots[s].item.ordinal]));
            }
            more = state != LEASE_NONE_LEFT;
            stop = state == LEASE_STOP;
        }
        pause_ms(env->replica == scene.slow || scene.slow == ALL ? 20 : gen_uniform(&rng));
        if (owner) {
            CHECK_OK(lease_owner_poll(owner));
        }
        bool heard = false;
        CHECK_OK(lease_client_progress(client, &heard));
        CHECK(heard || !stop); // once told, always told
        stop = heard;
        for (int s = 0; s < n_slots && !stop; s++) {
            if (!slots[s].busy || --slots[s].passes_left > 0) {
                continue;
            }
            struct finished_record r = make_record(&slots[s].item, env->replica);
            CHECK_OK(lease_client_finish(client, &r));
            memset(room.steps, 0xEE, sizeof room.steps); // it was packed
            if (is_large(r.ordinal, r.replica)) {
                wait_for_others();
            }
            slots[s].busy = false;
            n_busy--;
            n_done++;
        }
    }
    enum lease_state state = LEASE_WAIT;
    CHECK_OK(lease_client_poll(client, &state, &slots[0].item));
    CHECK(state == (stop ? LEASE_STOP : LEASE_NONE_LEFT) ||
          (scene.stops && state == LEASE_STOP)); // final
    CHECK(!stop || scene.stops);
    return n_done;
}

static void play(struct env *env, const struct scene *what)
{
    scene = *what;
    env->n_service = scene.own;
    CHECK_OK(env_grid(env, scene.tensor_ranks > 0 ? scene.tensor_ranks : 1));
    struct journal *journal = NULL;
    struct lease_owner *owner = NULL;
    struct lease_client *client = NULL;
    size_t max_bytes = scene.absent >= 0 ? MAX_LARGE_RECORD : MAX_RECORD;
    make_items(scene.n);
    find_places(scene.n);
    n_counted = 0;
    if (env->rank == 0) {
        gen_folder(dir);
        CHECK_OK(journal_open(&journal, dir, NULL, NULL));
    }
    MPI_Bcast(dir, sizeof dir, MPI_CHAR, 0, env->world);
    if (env->rank == 0) {
        const struct lease_hooks hooks = {.ctx = &n_counted,
                                          .done = count_done,
                                          .dial = scene.window > 0 ? find_dial : NULL,
                                          .poll = scene.window > 0 ? count_poll : NULL};
        CHECK_OK(lease_owner_create(&owner, env, journal, items, scene.n, 4, max_bytes, &hooks));
        CHECK(lease_owner_stopping(owner) == NULL);
        lease_owner_set_deadline(owner, scene.deadline_s);
        lease_owner_set_timeout(owner, 60);
    }
    int64_t mine = 0, sum = 0;
    uint64_t allocs = mem_alloc_count();
    if (env->replica < 0) {
        CHECK_OK(lease_owner_serve(owner));
        CHECK(scene.stops ? n_counted < scene.n : n_counted == scene.n);
        CHECK(scene.look || mem_alloc_count() == allocs);
    } else if (env->tensor_rank == 0) {
        CHECK_OK(lease_client_create(&client, env, owner, max_bytes, 60));
        allocs = mem_alloc_count();
        mine = decode_all(env, client, owner);
        CHECK_OK(lease_client_leave(client));
        if (owner) {
            CHECK_OK(lease_owner_serve(owner));
            CHECK_OK(lease_owner_poll(owner));
            CHECK(scene.stops ? n_counted < scene.n : n_counted == scene.n);
            const char *why = lease_owner_stopping(owner);
            const char *expected = scene.stop_after > 0 ? "SIGTERM on rank 3" : "run.deadline_s";
            CHECK(scene.stops ? why && strcmp(why, expected) == 0 : why == NULL);
        }
        CHECK(scene.look || env->replica == scene.absent || mem_alloc_count() == allocs);
        lease_client_destroy(&client); // nothing comes for it any more
    }
    MPI_Allreduce(&mine, &sum, 1, MPI_INT64_T, MPI_SUM, env->world);
    MPI_Bcast(&n_counted, 1, MPI_INT64_T, 0, env->world);
    CHECK(sum == n_counted); // all that was handed in is durable
    if (scene.slow > 0 && env->replica == scene.slow) {
        CHECK(mine < scene.n / 2); // the quick ones do more (all wait for a slow owner)
    }
    int left = 0;
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, env->lease_comm, &left, MPI_STATUS_IGNORE);
    CHECK(!left);
    lease_client_destroy(&client);
    lease_owner_destroy(&owner);
    lease_owner_destroy(&owner);
    lease_client_destroy(&client);
    journal_close(&journal);
    if (env->rank == 0) {
        check_journal(scene.n);
        gen_remove(dir);
    }
    MPI_Barrier(env->world);
}

/* Errors that rank 0 meets by itself, in a grid of one replica. */
static void test_errors(struct env *env)
{
    env->n_service = 0;
    scene = (struct scene){.n = 3, .slow = NOBODY, .absent = NOBODY};
    CHECK_OK(env_grid(env, env->size));
    if (env->rank != 0) {
        return;
    }
    struct journal *journal = NULL;
    struct lease_owner *owner = NULL;
    struct lease_client *client = NULL;
    n_counted = 0;
    gen_folder(dir);
    CHECK_OK(journal_open(&journal, dir, NULL, NULL));
    make_items(3);
    CHECK_STATUS(lease_owner_create(&owner, env, journal, items, 3, 0, SIZE_MAX, NULL), ST_SHAPE,
                 "overflows");
    CHECK_STATUS(lease_owner_create(&owner, env, journal, items, 3, 0, (size_t)INT_MAX, NULL),
                 ST_SHAPE, "can be sent");
    CHECK_STATUS(lease_owner_create(&owner, env, journal, items, -1, 0, 100, NULL), ST_SHAPE,
                 "-1 prompts");
    items[2].ordinal = items[0].ordinal;
    CHECK_STATUS(lease_owner_create(&owner, env, journal, items, 3, 0, 100, NULL), ST_SHAPE,
                 "prompt 5 is listed twice");
    CHECK(owner == NULL);
    make_items(3);
    CHECK_OK(lease_owner_create(&owner, env, journal, items, 3, 4, MAX_RECORD, NULL));
    CHECK_OK(lease_client_create(&client, env, owner, 1000, 0));
    if (!owner || !client) {
        return;
    }
    struct lease_item item = {0};
    enum lease_state state = LEASE_WAIT;
    struct finished_record r = make_record(&items[0], 0);
    r.n_steps = 0;
    CHECK_STATUS(lease_client_finish(client, &r), ST_FORMAT, "prompt 5, which it does not hold");
    CHECK_OK(lease_client_poll(client, &state, &item));
    CHECK(state == LEASE_GRANTED);
    r = make_record(&item, 0);
    r.n_steps = MAX_STEPS;
    CHECK_STATUS(lease_client_finish(client, &r), ST_SHAPE, "1000 were announced");
    r.n_steps = 0;
    r.key[1]++;
    CHECK_STATUS(lease_client_finish(client, &r), ST_FORMAT, "does not hold");
    r.key[1]--;
    CHECK_OK(lease_client_finish(client, &r));
    CHECK_STATUS(lease_client_finish(client, &r), ST_FORMAT, "does not hold"); // once only
    // the disk fills up: no grant without a start on disk
    struct rlimit old, small = {.rlim_cur = 100};
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    small.rlim_max = old.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    state = LEASE_WAIT;
    CHECK_STATUS(lease_client_poll(client, &state, &item), ST_IO, "journal.bin");
    CHECK(state != LEASE_GRANTED);
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    lease_client_destroy(&client);
    lease_owner_destroy(&owner);
    journal_close(&journal);
    gen_remove(dir);
}

int main(int argc, char **argv)
{
    struct env env;
    CHECK_OK(env_start(&env, &argc, &argv));
    if (env.world == MPI_COMM_NULL) {
        return check_report();
    }
    room.features = calloc(2 * (size_t)LARGE_FEATURES, sizeof(float));
    const struct scene scenes[] = {
        {.name = "many prompts", .n = 60, .slow = NOBODY, .absent = NOBODY},
        {.name = "the file is right", .n = 12, .slow = NOBODY, .absent = NOBODY, .look = true},
        {.name = "one replica is slow", .n = 40, .slow = 1, .absent = NOBODY},
        {.name = "the owner is slow", .n = 30, .slow = 0, .absent = NOBODY},
        {.name = "more replicas than prompts", .n = 1, .slow = NOBODY, .absent = NOBODY},
        {.name = "nothing to do", .n = 0, .slow = NOBODY, .absent = NOBODY},
        {.name = "suspects", .n = 40, .slow = NOBODY, .absent = NOBODY, .suspect_every = 3},
        {.name = "a deadline far off", .n = 9, .slow = NOBODY, .absent = NOBODY, .deadline_s = 60},
    };
    for (size_t i = 0; i < sizeof scenes / sizeof scenes[0]; i++) {
        play(&env, &scenes[i]);
    }
    if (env.size > 1) {
        play(&env, &(struct scene){.name = "a large record", .n = 9, .slow = NOBODY, .absent = 1});
    }
    if (env.size % 2 == 0) {
        play(&env, &(struct scene){.n = 20, .tensor_ranks = 2, .slow = NOBODY, .absent = NOBODY});
    }
    for (int own = 0; own <= (env.size > 1); own++) {
        play(&env, &(struct scene){.name = "a budget",
                                   .n = 40,
                                   .slow = NOBODY,
                                   .absent = NOBODY,
                                   .own = own,
                                   .suspect_every = 7,
                                   .window = 3});
        play(&env, &(struct scene){.name = "one at a time",
                                   .n = 12,
                                   .slow = NOBODY,
                                   .absent = NOBODY,
                                   .own = own,
                                   .window = 1});
        play(&env, &(struct scene){
                       .name = "nothing to do", .slow = NOBODY, .absent = NOBODY, .own = own});
    }
    if (env.size > 1) {
        play(&env, &(struct scene){.name = "the file is right",
                                   .n = 12,
                                   .slow = NOBODY,
                                   .absent = NOBODY,
                                   .own = true,
                                   .look = true});
    }
    test_errors(&env);
    MPI_Barrier(env.world);
    const struct scene stops[] = {
        {.name = "no time", .n = 20, .slow = 0, .deadline_s = 1e-9},
        {.name = "a deadline", .n = 60, .slow = ALL, .deadline_s = 0.15},
        {.name = "a wish", .n = 60, .slow = ALL, .stop_after = 5},
        // nobody takes that wish back: from here on every run stops
        {.name = "a wish among those who wait", .n = 60, .slow = ALL, .stop_after = 5, .window = 2},
        {.name = "a wish from the start", .n = 20, .slow = NOBODY, .stop_after = 1},
    };
    for (size_t i = 0; i < sizeof stops / sizeof stops[0]; i++) {
        struct scene s = stops[i];
        s.absent = NOBODY;
        s.stops = true;
        play(&env, &s);
    }
    play(&env, &(struct scene){.name = "nothing to stop", .slow = NOBODY, .absent = NOBODY});
    MPI_Barrier(env.world);
    env_end(&env);
    free(room.features);
    return check_report();
}
