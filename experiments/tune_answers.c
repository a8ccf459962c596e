/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/tune_answers.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/invariance.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/session.h"

/* ---- packed answers: in journals and between ranks ---- */

enum { RECORD_ANSWER = 67 };

struct head {
    uint64_t key[2];
    double bits;
    int32_t n_turns, n_steps[PROMPT_MAX_TURNS], text_bytes;
};

/* Appends to fresh; *at is where the packed answer begins. */
static enum status pack(struct tune_answers *a, const struct tune_answer *answer, size_t *at)
{
    size_t text = strlen(answer->text), needed = a->n_fresh + sizeof(struct head) + text;
    struct head h;
    if (needed > INT_MAX) {
        FAIL(ST_UNSUPPORTED, "answers of more than 2 GiB; lower prompts.limit");
    }
    if (needed > a->fresh_capacity) {
        TRY(mem_grow_array((void **)&a->fresh, a->fresh_capacity, 2 * needed, 1));
        a->fresh_capacity = 2 * needed;
    }
    memset(&h, 0, sizeof h);
    memcpy(h.key, answer->key, sizeof h.key);
    memcpy(h.n_steps, answer->n_steps, sizeof h.n_steps);
    h.bits = answer->bits;
    h.n_turns = answer->n_turns;
    h.text_bytes = (int32_t)text;
    *at = a->n_fresh;
    memcpy(a->fresh + *at, &h, sizeof h);
    memcpy(a->fresh + *at + sizeof h, answer->text, text);
    a->n_fresh = needed;
    return ST_OK;
}

/* The answer at the beginning of bytes, not believed. */
static enum status unpack(struct tune_answer *out, size_t *used, const char *bytes, size_t n)
{
    struct head h = {.n_turns = 0};
    bool good = n >= sizeof h;
    if (good) {
        memcpy(&h, bytes, sizeof h);
        good = h.n_turns >= 1 && h.n_turns <= PROMPT_MAX_TURNS && h.text_bytes >= 0 &&
               (size_t)h.text_bytes <= n - sizeof h && h.bits >= 0;
    }
    for (int32_t i = 0; good && i < PROMPT_MAX_TURNS; i++) {
        good = h.n_steps[i] >= 0 && (i < h.n_turns || h.n_steps[i] == 0);
    }
    if (!good) {
        FAIL(ST_FORMAT, "a damaged answer (%zu bytes)", n);
    }
    *out = (struct tune_answer){.key = {h.key[0], h.key[1]}, .n_turns = h.n_turns, .bits = h.bits};
    memcpy(out->n_steps, h.n_steps, sizeof h.n_steps);
    TRY(MEM_NEW(&out->text, (size_t)h.text_bytes + 1));
    memcpy(out->text, bytes + sizeof h, (size_t)h.text_bytes);
    *used = sizeof h + (size_t)h.text_bytes;
    return ST_OK;
}

/* ---- known answers ---- */

static int by_key(const void *a, const void *b)
{
    return memcmp(((const struct tune_answer *)a)->key, ((const struct tune_answer *)b)->key,
                  sizeof((const struct tune_answer *)a)->key);
}

static enum status take(struct tune_answers *a, const char *bytes, size_t n)
{
    for (size_t at = 0, used = 0; at < n; at += used) {
        if (a->n == a->capacity) {
            int32_t more = a->capacity ? 2 * a->capacity : 64;
            TRY(mem_grow_array((void **)&a->answer, (size_t)a->capacity, (size_t)more,
                               sizeof *a->answer));
            a->capacity = more;
        }
        TRY(unpack(&a->answer[a->n], &used, bytes + at, n - at));
        a->n++;
    }
    return ST_OK;
}

static enum status share_bytes(struct tune_answers *a, int *sizes, int *starts)
{
    int own = (int)a->n_fresh;
    int64_t all = 0;
    char *bytes = NULL;
    TRY_MPI(MPI_Allgather(&own, 1, MPI_INT, sizes, 1, MPI_INT, a->env->world));
    for (int r = 0; r < a->env->size; r++) {
        starts[r] = (int)all;
        all += sizes[r];
        if (all > INT_MAX) {
            FAIL(ST_UNSUPPORTED, "answers of more than 2 GiB; lower prompts.limit");
        }
    }
    TRY(MEM_NEW(&bytes, all));
    enum status st = ST_OK;
    if (MPI_Allgatherv(a->fresh, own, MPI_BYTE, bytes, sizes, starts, MPI_BYTE, a->env->world) !=
        MPI_SUCCESS) {
        st = status_raise(ST_MPI, __FILE__, __LINE__, __func__,
                          "the ranks could not exchange their answers");
    }
    st = st ? st : take(a, bytes, (size_t)all);
    mem_free(bytes);
    return st;
}

/* What any rank has in fresh becomes known to all. Collective over the world. */
static enum status share(struct tune_answers *a)
{
    int *sizes = NULL, *starts = NULL;
    enum status st = MEM_NEW(&sizes, a->env->size);
    st = st ? st : MEM_NEW(&starts, a->env->size);
    st = env_agree(a->env, st);
    st = st ? st : share_bytes(a, sizes, starts);
    a->n_fresh = 0;
    if (a->n > 0) {
        qsort(a->answer, (size_t)a->n, sizeof *a->answer, by_key);
    }
    mem_free(sizes);
    mem_free(starts);
    return env_agree(a->env, st);
}

/* ---- the folder ---- */

static enum status visit(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct tune_answers *a = ctx;
    struct tune_answer answer = {.text = NULL};
    size_t used = 0, at = 0;
    if (kind != RECORD_ANSWER) {
        FAIL(ST_FORMAT, "a record of kind %u, expected the answers of pmpd tune plan", kind);
    }
    TRY(unpack(&answer, &used, payload, bytes));
    enum status st = ST_OK;
    if (used != bytes) {
        st = status_raise(ST_FORMAT, __FILE__, __LINE__, __func__, "%zu bytes after an answer",
                          bytes - used);
    }
    st = st ? st : pack(a, &answer, &at);
    mem_free(answer.text);
    return st;
}

static enum status read_folder(struct tune_answers *a)
{
    struct dirent **names = NULL;
    enum status st = ST_OK;
    int n = scandir(a->dir, &names, NULL, alphasort);
    if (n < 0 && errno != ENOENT) {
        FAIL(ST_IO, "%s: cannot be read: %s", a->dir, strerror(errno));
    }
    for (int i = 0; i < n; i++) {
        char dir[sizeof a->dir + sizeof names[i]->d_name + 1], file[sizeof dir + 16];
        snprintf(dir, sizeof dir, "%s/%s", a->dir, names[i]->d_name);
        snprintf(file, sizeof file, "%s/journal.bin", dir);
        if (st == ST_OK && strncmp(names[i]->d_name, "replica-", 8) == 0 &&
            access(file, F_OK) == 0) {
            size_t n_bad = 0;
            st = journal_read(dir, visit, a, &n_bad);
            if (st == ST_FORMAT) {
                status_prefix(st,
                              "%s is not what this program wrote (choose another --out, or "
                              "remove it): ",
                              file);
            }
        }
        free(names[i]);
    }
    free(names);
    return st;
}

enum status tune_answers_open(struct tune_answers *a, struct env *env, const char *dir)
{
    *a = (struct tune_answers){.env = env};
    snprintf(a->dir, sizeof a->dir, "%s/trials", dir);
    TRY(env_agree(env, env->rank == 0 ? read_folder(a) : ST_OK));
    return share(a);
}

void tune_answers_close(struct tune_answers *a)
{
    journal_close(&a->journal);
    for (int32_t i = 0; i < a->n; i++) {
        mem_free(a->answer[i].text);
    }
    mem_free(a->answer);
    mem_free(a->fresh);
    *a = (struct tune_answers){.env = NULL};
}

/* ---- keys ---- */

void tune_model_describe(struct tune_model *m, const char *digest)
{
    const struct settings *s = m->settings;
    int n = snprintf(m->depends, sizeof m->depends,
                     "tune 1\nmodel %s\nnew %d\neos %d\nlag %d\nbackend %s %s\nproduct %s\n"
                     "chunk %d\nkv %s\n%s %d\n",
                     digest, s->decode.max_new_tokens, s->decode.stop_at_eos, s->service.lag,
                     m->e->backend, m->e->arithmetic, invariance_product(s, false),
                     s->decode.prefill_chunk, dtype_name(m->e->kv_dtype),
                     s->parallel.reproducible ? "segments" : "tensor_ranks",
                     s->parallel.reproducible ? s->parallel.segments : s->parallel.tensor_ranks);
    INVARIANT(n > 0 && (size_t)n < sizeof m->depends);
}

static void set_key(uint64_t key[2], const struct tune_model *m, const struct tune_request *r)
{
    XXH128_hash_t h = XXH3_128bits(m->depends, strlen(m->depends));
    h = XXH3_128bits_withSeed(r->plan, strlen(r->plan), h.low64 ^ (3 * h.high64));
    for (int32_t t = 0; t < r->prompt->n_turns; t++) {
        h = XXH3_128bits_withSeed(r->prompt->ids[t],
                                  (size_t)r->prompt->n_ids[t] * sizeof *r->prompt->ids[t],
                                  h.low64 ^ (3 * h.high64));
    }
    key[0] = h.low64;
    key[1] = h.high64;
}

const struct tune_answer *tune_find(const struct tune_answers *a, const struct tune_model *m,
                                    const struct tune_request *request)
{
    struct tune_answer wanted = {.text = NULL};
    set_key(wanted.key, m, request);
    return a->n ? bsearch(&wanted, a->answer, (size_t)a->n, sizeof wanted, by_key) : NULL;
}

/* ---- decoding ---- */

/* A finished prompt, as its record said. */
struct done {
    int32_t own; /* place in the batch's requests */
    struct tune_answer answer;
    int32_t *ids; /* (max_turns, max_new_tokens) */
};

/* This replica's share of the missing requests. */
struct batch {
    struct tune_answers *a;
    struct tune_model *m;
    const struct tune_request **request; /* (n) */
    struct plan *plan;                   /* (n) */
    int32_t n, max_turns, n_done;
    struct done *done; /* (slots) since the last pass */
};

static enum status batch_begin(const void *impl, const struct prompt_facts *facts, void *state,
                               int32_t *prefill_level)
{
    (void)state;
    *prefill_level = ((const struct batch *)impl)->plan[facts->ordinal].prefill;
    return ST_OK;
}

static enum status batch_plan(const void *impl, const struct prompt_facts *facts,
                              const struct signals *signals, void *state, struct plan *plan)
{
    const struct plan *from = &((const struct batch *)impl)->plan[facts->ordinal];
    (void)signals;
    (void)state;
    for (int32_t i = 0; i < from->n; i++) {
        TRY(plan_add(plan, from->at[i].step, from->at[i].level));
    }
    return ST_OK;
}

/* The policy "static" with a plan for each prompt of the batch: what it decodes has the tokens of
 * a run under that plan. */
static const struct policy_ops batch_policy = {
    .name = "tune", .help = "", .needs = SIGNAL_NONE, .begin = batch_begin, .plan = batch_plan};

static enum status on_finished(void *ctx, const struct finished_record *record)
{
    struct batch *b = ctx;
    int32_t most = b->m->settings->decode.max_new_tokens;
    INVARIANT(b->n_done < b->m->settings->decode.slots);
    struct done *d = &b->done[b->n_done++];
    d->own = (int32_t)record->ordinal;
    d->answer = (struct tune_answer){.n_turns = record->n_turns};
    for (int32_t t = 0; t < record->n_turns; t++) {
        d->answer.n_steps[t] = record->turns[t].n_steps;
        d->ids[t * most] = record->turns[t].token0;
    }
    for (int32_t i = 0; i < record->n_steps; i++) {
        const struct step_record *step = &record->steps[i];
        d->ids[step->turn * most + step->step + 1] = step->token;
        d->answer.bits += (double)b->m->e->levels.level[step->level].avg_bits;
    }
    return ST_OK;
}

static enum status join_turns(struct batch *b, struct done *d, char **out)
{
    enum status st = ST_OK;
    size_t n = 0;
    for (int32_t t = 0; t < d->answer.n_turns; t++) {
        char *text = NULL, *more = *out;
        const int32_t *ids = d->ids + t * b->m->settings->decode.max_new_tokens;
        TRY(tokenizer_decode(b->m->tok, ids, d->answer.n_steps[t] + 1, true, &text));
        size_t length = strlen(text);
        st = mem_grow_array((void **)&more, n, n + length + 2, 1);
        if (st == ST_OK) {
            *out = more;
            memcpy(*out + n, text, length);
            (*out)[n + length] = t + 1 < d->answer.n_turns ? '\n' : '\0';
            n += length + 1;
        }
        mem_free(text);
        TRY(st);
    }
    return ST_OK;
}

/* What finished in the last pass: into the journal and fresh. */
static enum status keep_done(struct batch *b)
{
    enum status st = ST_OK;
    for (int32_t i = 0; i < b->n_done && b->a->env->tensor_rank == 0; i++) {
        struct done *d = &b->done[i];
        size_t at = 0;
        set_key(d->answer.key, b->m, b->request[d->own]);
        st = st ? st : join_turns(b, d, &d->answer.text);
        st = st ? st : pack(b->a, &d->answer, &at);
        st = st ? st
                : journal_append(b->a->journal, RECORD_ANSWER, b->a->fresh + at, b->a->n_fresh - at,
                                 true);
        mem_free(d->answer.text);
    }
    b->n_done = 0;
    return st;
}

static enum status decode_all(struct batch *b, struct session *session)
{
    const uint64_t key[2] = {0, 0};
    for (int32_t next = 0; next < b->n || session_n_active(session) > 0;) {
        while (next < b->n && session_n_free(session) > 0) {
            TRY(session_start(session, b->request[next]->prompt, next, key, 1, 0.5F));
            next++;
        }
        TRY(session_advance(session));
        TRY(keep_done(b));
    }
    return ST_OK;
}

/* Says at which prompts and plans it happened. */
static enum status blame(const struct batch *b, const struct session *session, enum status st)
{
    int64_t ordinal[1];
    if (session && session_suspects(session, ordinal, 1) > 0) {
        const struct tune_request *r = b->request[ordinal[0]];
        return status_prefix(st, "prompt %.60s under \"%.60s\": ", r->prompt->id, r->plan);
    }
    return st;
}

static enum status decode_batch(struct batch *b)
{
    const struct settings *s = b->m->settings;
    struct engine *e = b->m->e;
    struct session *session = NULL;
    struct policy policy = {.ops = &batch_policy, .impl = b, .dial = 0.5F};
    struct session_options o = {.n_slots = s->decode.slots,
                                .prefill_chunk = s->decode.prefill_chunk,
                                .max_tok = e->context,
                                .max_turns = b->max_turns,
                                .max_new_tokens = s->decode.max_new_tokens,
                                .stop_at_eos = s->decode.stop_at_eos,
                                .seed = (uint64_t)s->decode.seed,
                                .by_level = strcmp(s->decode.cohort, "level") == 0,
                                .lag = s->service.lag,
                                .replica = e->env->replica,
                                .on_finished = on_finished,
                                .ctx = b};
    TRY(session_create(&session, e->dec, &e->coll, &policy, &e->levels, &e->source.config, &o));
    enum status st = decode_all(b, session);
    st = st ? blame(b, session, st) : ST_OK;
    session_destroy(&session);
    return st;
}

static enum status batch_create(struct batch *b, const struct tune_request **missing, int32_t n)
{
    const struct env *env = b->a->env;
    const struct settings *s = b->m->settings;
    TRY(MEM_NEW(&b->request, n));
    TRY(MEM_NEW(&b->plan, n));
    TRY(MEM_NEW(&b->done, s->decode.slots));
    for (int32_t i = 0; i < n; i++) {
        int32_t turns = missing[i]->prompt->n_turns;
        b->max_turns = turns > b->max_turns ? turns : b->max_turns;
        if (i % env->n_replicas == env->replica) {
            TRY(plan_create(&b->plan[b->n], s->decode.max_new_tokens + 1));
            b->request[b->n] = missing[i];
            TRY(plan_parse(&b->plan[b->n++], &b->m->e->levels, missing[i]->plan, ""));
        }
    }
    for (int32_t i = 0; i < s->decode.slots; i++) {
        TRY(MEM_NEW(&b->done[i].ids, (size_t)b->max_turns * (size_t)s->decode.max_new_tokens));
    }
    return ST_OK;
}

static void batch_free(struct batch *b)
{
    for (int32_t i = 0; i < b->n; i++) {
        plan_free(&b->plan[i]);
    }
    for (int32_t i = 0; b->done && i < b->m->settings->decode.slots; i++) {
        mem_free(b->done[i].ids);
    }
    mem_free(b->request);
    mem_free(b->plan);
    mem_free(b->done);
}

static enum status read_nothing(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    (void)ctx;
    (void)kind;
    (void)payload;
    (void)bytes;
    return ST_OK;
}

static enum status open_journal(struct tune_answers *a)
{
    char dir[sizeof a->dir + 32];
    if (a->journal || a->env->tensor_rank != 0) {
        return ST_OK;
    }
    snprintf(dir, sizeof dir, "%s/replica-%04d", a->dir, a->env->replica);
    return journal_open(&a->journal, dir, read_nothing, NULL);
}

enum status tune_decode(struct tune_answers *a, struct tune_model *m,
                        const struct tune_request *requests, int32_t n)
{
    const struct tune_request **missing = NULL;
    struct batch b = {.a = a, .m = m};
    int32_t n_missing = 0;
    enum status st = MEM_NEW(&missing, n);
    for (int32_t i = 0; st == ST_OK && i < n; i++) {
        if (!tune_find(a, m, &requests[i])) {
            missing[n_missing++] = &requests[i];
        }
    }
    st = env_agree(a->env, st);
    if (st == ST_OK && n_missing > 0) {
        st = open_journal(a);
        st = st ? st : batch_create(&b, missing, n_missing);
        st = env_agree(a->env, st);
        if (st == ST_OK) {
            st = engine_loop_end(a->env, b.n > 0 ? decode_batch(&b) : ST_OK);
            st = env_agree(a->env, st);
        }
        st = st ? st : share(a);
        a->n_decoded += n_missing;
    }
    batch_free(&b);
    mem_free(missing);
    return st;
}
