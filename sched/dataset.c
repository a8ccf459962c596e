/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/dataset.h"

#include <math.h>
#include <string.h>
#include <xxhash.h>

#include "core/mem.h"
#include "sched/step_window.h"

const char *const dataset_split_name[SPLIT_N] = {"train", "validation", "test"};

enum dataset_split dataset_split_of(uint64_t prompt_hash)
{
    uint64_t percent = prompt_hash % 100;
    return percent < 70 ? SPLIT_TRAIN : percent < 85 ? SPLIT_VALIDATION : SPLIT_TEST;
}

uint64_t dataset_prompt_hash(const char *text)
{
    return XXH3_64bits(text, strlen(text));
}

/* ---- memory ---- */

void dataset_row_free(struct dataset_row *row)
{
    mem_free(row->id);
    mem_free(row->task);
    mem_free(row->prompt);
    mem_free(row->reference);
    mem_free(row->high);
    for (int i = 0; i < DATASET_MAX_CANDIDATES; i++) {
        mem_free(row->candidate[i]);
    }
    mem_free(row->features);
    mem_free(row->signals);
    *row = (struct dataset_row){0};
}

void dataset_free(struct dataset *d)
{
    for (int32_t i = 0; i < d->n; i++) {
        dataset_row_free(&d->rows[i]);
    }
    mem_free(d->rows);
    mem_free(d->provenance);
    *d = (struct dataset){0};
}

enum status dataset_add(struct dataset *d, struct dataset_row *row)
{
    enum status st = ST_OK;
    if (d->n == d->capacity) {
        int32_t more = d->capacity ? 2 * d->capacity : 256;
        st = mem_grow_array((void **)&d->rows, (size_t)d->n, (size_t)more, sizeof *d->rows);
        if (st != ST_OK) {
            dataset_row_free(row);
            return status_trace(st, __FILE__, __LINE__, __func__);
        }
        d->capacity = more;
    }
    d->rows[d->n++] = *row;
    *row = (struct dataset_row){0};
    return ST_OK;
}

/* ---- labels ---- */

int32_t dataset_switch_step(const struct dataset_facts *facts, int32_t i)
{
    return (int32_t)(facts->class_at[i] * facts->max_new_tokens + 1e-6); /* as in classifier.c */
}

bool dataset_accepts(const struct dataset_facts *facts, float score, float high_score)
{
    return round(1e3 * (double)score) >= round(1e3 * ((double)high_score - facts->tolerance));
}

int32_t dataset_label(const struct dataset_facts *facts, const float *scores, float high_score)
{
    for (int32_t i = 0; i < facts->n_candidates; i++) {
        if (dataset_accepts(facts, scores[i], high_score)) {
            return i;
        }
    }
    return facts->n_candidates;
}

/* ---- packed rows ---- */

/* The plain part of a packed row: fixed fields, then texts with their end, then floats. */
struct packed {
    uint64_t key[2], prompt_hash;
    int64_t ordinal;
    int32_t prefix, label, n_tok, n_new, n_candidates, n_kv_heads, head_dim;
    float high_score, scores[DATASET_MAX_CANDIDATES];
};

enum { N_FIXED_TEXTS = 5 };

/* Text i of a row: the five fixed ones, then the candidates'. */
static char **text_of(struct dataset_row *r, int32_t i)
{
    char **const fixed[N_FIXED_TEXTS] = {&r->id, &r->task, &r->prompt, &r->reference, &r->high};
    return i < N_FIXED_TEXTS ? fixed[i] : &r->candidate[i - N_FIXED_TEXTS];
}

static size_t n_features(int32_t n_tok, const struct dataset_facts *f)
{
    return 2 * (size_t)f->n_kv_heads * (size_t)n_tok * (size_t)f->head_dim;
}

enum status dataset_row_pack(const struct dataset_row *row, const struct dataset_facts *facts,
                             void **out, size_t *bytes)
{
    struct dataset_row r = *row;
    struct packed p = {.prompt_hash = r.prompt_hash,
                       .ordinal = r.ordinal,
                       .prefix = r.prefix,
                       .label = r.label,
                       .n_tok = r.n_tok,
                       .n_new = r.n_new,
                       .n_candidates = facts->n_candidates,
                       .n_kv_heads = facts->n_kv_heads,
                       .head_dim = facts->head_dim,
                       .high_score = r.high_score};
    memcpy(p.key, r.key, sizeof p.key);
    memcpy(p.scores, r.scores, sizeof p.scores);
    size_t feature_bytes = n_features(r.n_tok, facts) * sizeof(float);
    size_t signal_bytes = (size_t)r.n_new * DATASET_N_SIGNALS * sizeof(float);
    size_t total = sizeof p + feature_bytes + signal_bytes;
    for (int32_t i = 0; i < N_FIXED_TEXTS + facts->n_candidates; i++) {
        total += strlen(*text_of(&r, i)) + 1;
    }
    char *at = NULL;
    TRY(mem_alloc_array((void **)&at, total, 1));
    *out = at;
    *bytes = total;
    memcpy(at, &p, sizeof p);
    at += sizeof p;
    for (int32_t i = 0; i < N_FIXED_TEXTS + facts->n_candidates; i++) {
        size_t n = strlen(*text_of(&r, i)) + 1;
        memcpy(at, *text_of(&r, i), n);
        at += n;
    }
    memcpy(at, r.features, feature_bytes);
    memcpy(at + feature_bytes, r.signals, signal_bytes);
    return ST_OK;
}

static enum status unpack(struct dataset_row *out, const struct dataset_facts *facts,
                          const char *at, size_t left)
{
    struct packed p;
    if (left < sizeof p) {
        FAIL(ST_FORMAT, "a packed row of %zu bytes; expected at least %zu", left, sizeof p);
    }
    memcpy(&p, at, sizeof p);
    at += sizeof p;
    left -= sizeof p;
    if (p.n_candidates != facts->n_candidates || p.head_dim != facts->head_dim ||
        p.n_kv_heads != facts->n_kv_heads || p.n_tok < 1 || p.n_new < 1 ||
        p.n_new > facts->max_new_tokens || p.label < 0 || p.label > facts->n_candidates ||
        p.prefix < 0) {
        FAIL(ST_FORMAT,
             "a packed row contradicts its dataset: %d candidates, %d heads of %d, %d and %d "
             "tokens, class %d",
             p.n_candidates, p.n_kv_heads, p.head_dim, p.n_tok, p.n_new, p.label);
    }
    *out = (struct dataset_row){.prompt_hash = p.prompt_hash,
                                .ordinal = p.ordinal,
                                .prefix = p.prefix,
                                .label = p.label,
                                .n_tok = p.n_tok,
                                .n_new = p.n_new,
                                .high_score = p.high_score};
    memcpy(out->key, p.key, sizeof p.key);
    memcpy(out->scores, p.scores, sizeof p.scores);
    for (int32_t i = 0; i < N_FIXED_TEXTS + p.n_candidates; i++) {
        size_t n = strnlen(at, left);
        if (n == left) {
            FAIL(ST_FORMAT, "a packed row ends inside its texts");
        }
        TRY(mem_strdup(text_of(out, i), at));
        at += n + 1;
        left -= n + 1;
    }
    size_t n = n_features(p.n_tok, facts), m = (size_t)p.n_new * DATASET_N_SIGNALS;
    if (left != (n + m) * sizeof(float)) {
        FAIL(ST_FORMAT, "a packed row with %zu bytes of numbers; expected %zu", left,
             (n + m) * sizeof(float));
    }
    TRY(MEM_NEW(&out->features, n));
    TRY(MEM_NEW(&out->signals, m));
    memcpy(out->features, at, n * sizeof(float));
    memcpy(out->signals, at + n * sizeof(float), m * sizeof(float));
    return ST_OK;
}

enum status dataset_row_unpack(struct dataset_row *out, const struct dataset_facts *facts,
                               const void *buf, size_t bytes)
{
    *out = (struct dataset_row){0};
    enum status st = unpack(out, facts, buf, bytes);
    if (st != ST_OK) {
        dataset_row_free(out);
    }
    return st;
}

/* ---- merging ---- */

static enum status differ(const char *path, const char *what, const char *a, const char *b)
{
    if (strcmp(a, b) != 0) {
        FAIL(ST_USER, "%s was made with %s %s, the ones before it with %s; a dataset has one", path,
             what, b, a);
    }
    return ST_OK;
}

static enum status check_same(const struct dataset_facts *a, const struct dataset_facts *b,
                              const char *path)
{
    TRY(differ(path, "the model", a->model_digest, b->model_digest));
    TRY(differ(path, "the reference model", a->reference_digest, b->reference_digest));
    TRY(differ(path, "the high level", a->high, b->high));
    TRY(differ(path, "the low level", a->low, b->low));
    TRY(differ(path, "the reference level", a->reference, b->reference));
    TRY(differ(path, "the criterion", a->criterion, b->criterion));
    bool same = a->tolerance == b->tolerance && a->max_new_tokens == b->max_new_tokens &&
                a->head_dim == b->head_dim && a->n_kv_heads == b->n_kv_heads &&
                a->n_candidates == b->n_candidates;
    for (int32_t i = 0; same && i <= a->n_candidates; i++) {
        same = a->class_at[i] == b->class_at[i];
    }
    if (!same) {
        FAIL(ST_USER,
             "%s was made with another tolerance, max_new_tokens (%d, before it %d), heads "
             "or other candidates; a dataset has one of each",
             path, b->max_new_tokens, a->max_new_tokens);
    }
    return ST_OK;
}

static bool has_key(const struct dataset *d, int32_t n, const uint64_t key[2])
{
    for (int32_t i = 0; i < n; i++) {
        if (d->rows[i].key[0] == key[0] && d->rows[i].key[1] == key[1]) {
            return true;
        }
    }
    return false;
}

enum status dataset_merge(struct dataset *into, struct dataset *from, const char *from_path,
                          int32_t *n_twice)
{
    *n_twice = 0;
    TRY(check_same(&into->facts, &from->facts, from_path));
    int32_t n = into->n; /* one file has no row twice */
    for (int32_t i = 0; i < from->n; i++) {
        if (has_key(into, n, from->rows[i].key)) {
            *n_twice += 1;
        } else {
            TRY(dataset_add(into, &from->rows[i]));
        }
    }
    dataset_free(from);
    return ST_OK;
}

/* ---- samples ---- */

/* The first row with the same task. */
static int32_t task_of(const struct dataset *d, int32_t row)
{
    int32_t i = 0;
    while (strcmp(d->rows[i].task, d->rows[row].task) != 0) {
        i++;
    }
    return i;
}

static void add_steps(struct dataset_samples *out, const struct dataset *d, int32_t row)
{
    const struct dataset_row *r = &d->rows[row];
    struct step_window w;
    int32_t seen = 0;
    step_window_clear(&w);
    for (int32_t i = 0; i < d->facts.n_candidates; i++) {
        int32_t step = dataset_switch_step(&d->facts, i);
        if (step + 1 >= r->n_new) { /* no step is left to be lowered */
            return;
        }
        for (; seen <= step; seen++) { /* token `step` is the last known before it */
            const float *s = r->signals + (size_t)seen * DATASET_N_SIGNALS;
            step_window_add(&w, s[0], s[1], s[2]);
        }
        float *v = out->vectors + (size_t)out->n * STEP_WINDOW_N;
        step_window_vector(&w, step, d->facts.max_new_tokens, v);
        out->sample[out->n++] = (struct train_sample){
            v, 1, dataset_accepts(&d->facts, r->scores[i], r->high_score), task_of(d, row)};
    }
}

enum status dataset_samples(struct dataset_samples *out, const struct dataset *d,
                            enum dataset_split split, enum classifier_kind kind)
{
    enum status st = ST_OK;
    size_t most = (size_t)d->n;
    *out = (struct dataset_samples){0};
    if (kind == CLASSIFIER_STEP) {
        most *= (size_t)d->facts.n_candidates;
        TRY_GOTO(st, MEM_NEW(&out->vectors, most * STEP_WINDOW_N), fail);
    }
    TRY_GOTO(st, MEM_NEW(&out->sample, most), fail);
    for (int32_t i = 0; i < d->n; i++) {
        const struct dataset_row *r = &d->rows[i];
        if (dataset_split_of(r->prompt_hash) != split) {
            continue;
        }
        if (kind == CLASSIFIER_STEP) {
            add_steps(out, d, i);
        } else {
            out->sample[out->n++] =
                (struct train_sample){r->features, r->n_tok, r->label, task_of(d, i)};
        }
    }
    return ST_OK;
fail:
    dataset_samples_free(out);
    return st;
}

void dataset_samples_free(struct dataset_samples *s)
{
    mem_free(s->sample);
    mem_free(s->vectors);
    *s = (struct dataset_samples){0};
}
