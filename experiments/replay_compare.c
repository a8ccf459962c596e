/* The comparison at the end of a replay: both run files read the same way, token by token; what
 * differs between their provenances; and what follows from it.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/invariance.h"
#include "core/mem.h"
#include "experiments/replay.h"

#define N_OF(a) ((int)(sizeof(a) / sizeof(a)[0]))

/* ---- what differs between the runs ---- */

enum matter { MATTERS_NOT, MATTERS_PROGRAM, MATTERS_ARITHMETIC, MATTERS_SAMPLING };
static const char *const matter_words[] = {"cannot change tokens", "program", "arithmetic",
                                           "sampling"};

enum { TRAITS_MAX = 80, TRAIT_BYTES = 128 };
struct trait {
    const char *name;
    enum matter matter;
    char recorded[TRAIT_BYTES], here[TRAIT_BYTES];
};
struct traits {
    int n;
    struct trait trait[TRAITS_MAX];
};

static void add_trait(struct traits *t, const char *name, enum matter matter, const char *recorded,
                      const char *here)
{
    if (strcmp(recorded, here) == 0) {
        return;
    }
    INVARIANT(t->n < TRAITS_MAX);
    struct trait *x = &t->trait[t->n++];
    x->name = name;
    x->matter = matter;
    snprintf(x->recorded, sizeof x->recorded, "%s", recorded[0] ? recorded : "-");
    snprintf(x->here, sizeof x->here, "%s", here[0] ? here : "-");
}

static bool starts_with(const char *text, const char *start)
{
    return strncmp(text, start, strlen(start)) == 0;
}

/* What a setting decides, between two runs in which it differs. */
static enum matter matter_of(const char *key, const struct settings *a, const struct settings *b,
                             bool same_product)
{
    static const char *const sampling[] = {
        "decode.max_new_tokens", "decode.temperature", "decode.top_k",      "decode.top_p",
        "decode.min_p",          "decode.seed",        "decode.stop_at_eos"};
    bool segments = a->parallel.reproducible && b->parallel.reproducible;
    for (int i = 0; i < N_OF(sampling); i++) {
        if (strcmp(key, sampling[i]) == 0) {
            return MATTERS_SAMPLING;
        }
    }
    if (strcmp(key, "parallel.tensor_ranks") == 0) {
        return segments ? MATTERS_NOT : MATTERS_ARITHMETIC;
    }
    if (strcmp(key, "parallel.segments") == 0) {
        return segments ? MATTERS_ARITHMETIC : MATTERS_NOT;
    }
    if (strcmp(key, "decode.slots") == 0) {
        return same_product ? MATTERS_NOT : MATTERS_ARITHMETIC;
    }
    bool other =
        strcmp(key, "parallel.reproducible") == 0 || strcmp(key, "decode.prefill_chunk") == 0;
    return other ? MATTERS_ARITHMETIC : MATTERS_NOT;
}

/* Settings that say something else in a replay, or that facts tell better. */
static bool is_left_out(const char *key)
{
    return starts_with(key, "policy.") || strcmp(key, "output.dir") == 0 ||
           strcmp(key, "backend.name") == 0 || strcmp(key, "kv.format") == 0;
}

static const char *product_of(const struct recorded *run, const struct settings *s)
{
    const char *product = recorded_fact(run, "product");
    return product[0] ? product : invariance_product(s, false);
}

static enum status find_traits(struct traits *t, char invariance[INVARIANCE_BYTES],
                               const struct recorded *recorded, const struct recorded *here)
{
    static const struct {
        const char *key;
        enum matter matter;
    } facts[] = {
        {"git_revision", MATTERS_PROGRAM},
        {"compiler", MATTERS_PROGRAM},
        {"compiler_flags", MATTERS_PROGRAM},
        {"backend", MATTERS_ARITHMETIC},
        {"arithmetic", MATTERS_ARITHMETIC},
        {"kv_format", MATTERS_ARITHMETIC},
        {"world_size", MATTERS_NOT},
        {"replicas", MATTERS_NOT},
        {"host", MATTERS_NOT},
        {"mpi", MATTERS_NOT},
        {"hdf5", MATTERS_NOT},
        {"libconfig", MATTERS_NOT},
    };
    struct settings a, b;
    settings_default(&a);
    settings_default(&b);
    TRY(settings_parse(&a, recorded->config, "the recorded settings"));
    TRY(settings_parse(&b, here->config, "the replay's settings"));
    const char *product_a = product_of(recorded, &a), *product_b = product_of(here, &b);
    invariance_text(invariance, &b, product_b);
    for (int i = 0; i < N_OF(facts); i++) {
        add_trait(t, facts[i].key, facts[i].matter, recorded_fact(recorded, facts[i].key),
                  recorded_fact(here, facts[i].key));
    }
    add_trait(t, "product", MATTERS_ARITHMETIC, product_a, product_b);
    const struct setting_row *row = NULL;
    for (int i = 0; (row = settings_row(i)) != NULL; i++) {
        char was[TRAIT_BYTES], is[TRAIT_BYTES];
        if (!is_left_out(row->key)) {
            settings_value(&a, row, was, sizeof was);
            settings_value(&b, row, is, sizeof is);
            add_trait(t, row->key, matter_of(row->key, &a, &b, strcmp(product_a, product_b) == 0),
                      was, is);
        }
    }
    return ST_OK;
}

static bool any_trait(const struct traits *t, enum matter matter)
{
    for (int i = 0; i < t->n; i++) {
        if (t->trait[i].matter == matter) {
            return true;
        }
    }
    return false;
}

/* "kv_format F16 -> F32, backend cpu -> cpu_ref": all that matter in one way. */
static void list_traits(char *text, size_t bytes, const struct traits *t, bool sampling)
{
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < t->n; i++) {
        const struct trait *x = &t->trait[i];
        if (x->matter != MATTERS_NOT && (x->matter == MATTERS_SAMPLING) == sampling &&
            used < bytes) {
            used += (size_t)snprintf(text + used, bytes - used, "%s%s %s -> %s", used ? ", " : "",
                                     x->name, x->recorded, x->here);
        }
    }
}

/* ---- tokens and values ---- */

enum { TOKENS, LEVELS, LOGPROBS, ENTROPIES, MARGINS, N_WHAT };
static const char *const what_words[] = {"tokens", "levels", "log-probabilities", "entropies",
                                         "margins"};
static const char *const what_keys[] = {"tokens", "levels", "logprobs", "entropies", "margins"};

struct difference {
    int64_t n, n_differ;
    double largest;                    /* of values */
    const struct recorded_turn *first; /* NULL: none */
    int32_t first_token;               /* of the turn: 0 is prefill's, i comes from step i - 1 */
    char recorded[LEVEL_TEXT_BYTES], here[LEVEL_TEXT_BYTES];
};

struct comparison {
    const struct recorded *recorded, *here; /* borrowed */
    struct difference what[N_WHAT];
    int64_t n_prompts, n_prompts_differ;
    int64_t n_left_out;   /* recorded prompts that this replay was not asked for */
    int64_t n_failed;     /* recorded prompts that failed here */
    int64_t n_uncompared; /* values behind a token that differs: they have another past */
    struct traits traits;
    char invariance[INVARIANCE_BYTES];
};

/* Counts one comparison; true: it is the first difference, whose two sides are to be written. */
static bool note(struct difference *d, bool same, const struct recorded_turn *turn, int32_t i)
{
    d->n++;
    if (same || d->n_differ++ > 0) {
        return false;
    }
    d->first = turn;
    d->first_token = i;
    return true;
}

static void note_level(struct difference *d, const struct recorded_turn *turn, int32_t i,
                       const char *recorded, const char *here)
{
    if (note(d, strcmp(recorded, here) == 0, turn, i)) {
        snprintf(d->recorded, sizeof d->recorded, "%s", recorded);
        snprintf(d->here, sizeof d->here, "%s", here);
    }
}

/* Bit for bit. */
static void note_value(struct difference *d, const struct recorded_turn *turn, int32_t i,
                       float recorded, float here)
{
    bool same = memcmp(&recorded, &here, sizeof here) == 0;
    if (note(d, same, turn, i)) {
        snprintf(d->recorded, sizeof d->recorded, "%.9g", (double)recorded);
        snprintf(d->here, sizeof d->here, "%.9g", (double)here);
    }
    double x = same ? 0 : fabs((double)recorded - (double)here);
    if (!(x <= d->largest)) {
        d->largest = isnan(x) ? (double)INFINITY : x;
    }
}

/* A token of one side, or "none" after its end. */
static void write_token(char *text, size_t bytes, const struct recorded_token *t)
{
    if (t) {
        snprintf(text, bytes, "%d", t->token);
    } else {
        snprintf(text, bytes, "none");
    }
}

/* *diverged: a token of the prompt has differed before, or does here. */
static void compare_turn(struct comparison *c, const struct recorded_turn *a,
                         const struct recorded_turn *b, bool *diverged)
{
    int32_t n = a->n_tokens > b->n_tokens ? a->n_tokens : b->n_tokens;
    for (int32_t i = 0; i < n; i++) {
        const struct recorded_token *x = i < a->n_tokens ? &a->tokens[i] : NULL;
        const struct recorded_token *y = i < b->n_tokens ? &b->tokens[i] : NULL;
        bool same = x && y && x->token == y->token;
        struct difference *tokens = &c->what[TOKENS];
        if (note(tokens, same, a, i)) {
            write_token(tokens->recorded, sizeof tokens->recorded, x);
            write_token(tokens->here, sizeof tokens->here, y);
        }
        *diverged = *diverged || !same;
        if (!x || !y) {
            continue;
        }
        note_level(&c->what[LEVELS], a, i, c->recorded->level[x->level], c->here->level[y->level]);
        if (*diverged) {
            c->n_uncompared++;
            continue;
        }
        note_value(&c->what[LOGPROBS], a, i, x->logprob, y->logprob);
        note_value(&c->what[ENTROPIES], a, i, x->entropy, y->entropy);
        note_value(&c->what[MARGINS], a, i, x->margin, y->margin);
    }
}

static int64_t all_differences(const struct comparison *c)
{
    int64_t n = 0;
    for (int i = 0; i < N_WHAT; i++) {
        n += c->what[i].n_differ;
    }
    return n;
}

static void compare_runs(struct comparison *c)
{
    bool diverged = false;
    int64_t before = 0, last = -1;
    for (int64_t i = 0; i < c->recorded->n_turns; i++) {
        const struct recorded_turn *a = &c->recorded->turns[i];
        const struct recorded_turn *b = recorded_find(c->here, a->prompt, a->turn);
        if (a->turn == 0) {
            diverged = false;
            before = all_differences(c);
            c->n_prompts += b != NULL;
            c->n_left_out += b == NULL;
            for (int64_t j = 0; !b && j < c->here->n_failed; j++) {
                if (c->here->failed[j] == a->prompt) {
                    c->n_failed++;
                    c->n_left_out--;
                }
            }
        }
        if (b) {
            compare_turn(c, a, b, &diverged);
        }
        if (all_differences(c) > before && last != a->prompt) {
            c->n_prompts_differ++;
            last = a->prompt;
        }
    }
}

/* ---- the verdict ---- */

/* What another order of sums, instruction set or KV format may change, in nats or units of a logit.
 * Seen: 0.0020 (order of sums, cpu against cpu_ref) and 0.0056 (f16 against f32 keys and values),
 * in 248 tokens of the embedded model at 4, 3 and 2 bits (2026-11-22, f32 activations: `pmpd run
 * --replay RUN.h5 --set kv.format=f32`). The cpu backend's products of nested matrices round
 * activations to 8 bits, and there a last bit more or less becomes one step of 127: 0.13 seen with
 * another number of tensor ranks; a few times that for larger models. */
static const double rounding = 0.5;

enum verdict { VERDICT_EQUAL, VERDICT_ROUNDING, VERDICT_DIFFERS };
static const char *const verdict_words[] = {"equal", "rounding", "differs"};

static enum verdict judge(char *why, size_t bytes, const struct comparison *c)
{
    char list[768];
    const struct traits *t = &c->traits;
    double largest = 0;
    bool sampling = any_trait(t, MATTERS_SAMPLING);
    bool computes = any_trait(t, MATTERS_ARITHMETIC) || any_trait(t, MATTERS_PROGRAM);
    list_traits(list, sizeof list, t, sampling);
    for (int i = LOGPROBS; i < N_WHAT; i++) {
        largest = c->what[i].largest > largest ? c->what[i].largest : largest;
    }
    if (c->n_failed > 0) {
        snprintf(why, bytes, "prompts that the recorded run finished have failed here (/failed)");
        return VERDICT_DIFFERS;
    }
    if (all_differences(c) == 0) {
        snprintf(why, bytes, "%s%s",
                 sampling || computes
                     ? "equal bit for bit, which was not promised: "
                     : "equal bit for bit, as it must be: program, arithmetic, sampling, model and "
                       "prompts are the recorded ones",
                 list);
        return VERDICT_EQUAL;
    }
    if (!sampling && !computes) {
        snprintf(why, bytes,
                 "a difference was not to be expected: program, arithmetic, sampling, model and "
                 "prompts are the recorded ones; the run file was changed after it was written, "
                 "or a machine computes wrongly (recorded on %s, replayed on %s)",
                 recorded_fact(c->recorded, "host"), recorded_fact(c->here, "host"));
        return VERDICT_DIFFERS;
    }
    if (sampling) {
        snprintf(why, bytes, "a difference was to be expected: other tokens are asked for (%s)",
                 list);
        return VERDICT_DIFFERS;
    }
    if (largest > rounding) {
        snprintf(why, bytes,
                 "a difference of up to %.3g was not to be expected: it is more than rounding, "
                 "which is all that these may change: %s",
                 largest, list);
        return VERDICT_DIFFERS;
    }
    if (c->what[TOKENS].n_differ + c->what[LEVELS].n_differ == 0) {
        snprintf(why, bytes,
                 "equal but for rounding (at most %.3g), which was to be expected: the same bits "
                 "are promised for the same program and arithmetic only (%s)",
                 largest, list);
        return VERDICT_ROUNDING;
    }
    snprintf(why, bytes,
             "a difference was to be expected: program or arithmetic is another (%s), which "
             "rounds in another way, and that can decide between tokens that are almost as likely",
             list);
    return VERDICT_DIFFERS;
}

/* ---- output ---- */

static void print_where(const struct difference *d)
{
    const struct recorded_turn *u = d->first;
    printf("prompt %d (%s), turn %d, ", u->prompt, u->id, u->turn);
    if (d->first_token == 0) {
        printf("prefill");
    } else {
        printf("step %d", d->first_token - 1);
    }
    printf(": %s -> %s", d->recorded, d->here);
}

/* In columns as wide as what is in them. */
static void print_traits(const struct traits *t)
{
    static const char *const heads[] = {"differs between the runs", "recorded", "replay",
                                        "matters for"};
    int width[3];
    for (int i = 0; i < 3; i++) {
        width[i] = (int)strlen(heads[i]);
        for (int j = 0; j < t->n; j++) {
            const struct trait *x = &t->trait[j];
            int n = (int)strlen(i == 0 ? x->name : i == 1 ? x->recorded : x->here);
            width[i] = n > width[i] ? n : width[i];
        }
    }
    printf("\n%-*s  %-*s  %-*s  %s\n", width[0], heads[0], width[1], heads[1], width[2], heads[2],
           heads[3]);
    for (int j = 0; j < t->n; j++) {
        const struct trait *x = &t->trait[j];
        printf("%-*s  %-*s  %-*s  %s\n", width[0], x->name, width[1], x->recorded, width[2],
               x->here, matter_words[x->matter]);
    }
    printf("%s", t->n ? "" : "nothing\n");
}

static void print_text(const struct comparison *c, const char *path, const char *run_file,
                       const char *why)
{
    printf("recorded run  %s\nreplay        %s\n\n", path, run_file);
    printf("%-18s %10s %10s %12s  %s\n", "", "compared", "differ", "at most by",
           "first difference: recorded -> replayed");
    printf("%-18s %10lld %10lld %12s  -\n", "prompts", (long long)c->n_prompts,
           (long long)c->n_prompts_differ, "-");
    for (int i = 0; i < N_WHAT; i++) {
        const struct difference *d = &c->what[i];
        char largest[16] = "-";
        if (i >= LOGPROBS) {
            snprintf(largest, sizeof largest, "%.3g", d->largest);
        }
        printf("%-18s %10lld %10lld %12s  ", what_words[i], (long long)d->n, (long long)d->n_differ,
               largest);
        if (d->first) {
            print_where(d);
        } else {
            putchar('-');
        }
        putchar('\n');
    }
    if (c->n_uncompared > 0) {
        printf("not compared: the values of %lld tokens that follow a differing one\n",
               (long long)c->n_uncompared);
    }
    if (c->n_left_out > 0) {
        printf("not replayed: %lld recorded prompts (prompts.limit)\n", (long long)c->n_left_out);
    }
    if (c->recorded->n_failed > 0) {
        printf("not replayed: %lld prompts that failed in the recorded run\n",
               (long long)c->recorded->n_failed);
    }
    if (c->n_failed > 0) {
        printf("failed here:  %lld prompts\n", (long long)c->n_failed);
    }
    print_traits(&c->traits);
    printf("\nsame tokens for %s\n%s\n", c->invariance, why);
}

static json_t *difference_json(const struct difference *d, bool is_value)
{
    json_t *first = NULL;
    if (d->first) {
        first = json_pack("{s:i, s:s, s:i, s:i, s:s, s:s}", "prompt", d->first->prompt, "id",
                          d->first->id, "turn", d->first->turn, "step", d->first_token - 1,
                          "recorded", d->recorded, "replayed", d->here);
    }
    json_t *out = json_pack("{s:I, s:I, s:o}", "compared", (json_int_t)d->n, "differ",
                            (json_int_t)d->n_differ, "first", first ? first : json_null());
    if (is_value) { // not finite: null
        json_t *largest = json_real(d->largest);
        json_object_set_new(out, "largest", largest ? largest : json_null());
    }
    return out;
}

static void print_json(const struct comparison *c, const char *path, const char *run_file,
                       const char *why, enum verdict verdict)
{
    json_t *compared = json_object(), *traits = json_object();
    for (int i = 0; i < N_WHAT; i++) {
        json_object_set_new(compared, what_keys[i], difference_json(&c->what[i], i >= LOGPROBS));
    }
    for (int i = 0; i < c->traits.n; i++) {
        const struct trait *t = &c->traits.trait[i];
        json_t *x = json_pack("{s:s, s:s, s:s}", "recorded", t->recorded, "replay", t->here,
                              "matters_for", matter_words[t->matter]);
        json_object_set_new(traits, t->name, x ? x : json_null());
    }
    json_t *out = json_pack(
        "{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:s}", "recorded_run", path,
        "run_file", run_file, "verdict", verdict_words[verdict], "why", why, "prompts",
        (json_int_t)c->n_prompts, "prompts_differ", (json_int_t)c->n_prompts_differ,
        "prompts_left_out", (json_int_t)c->n_left_out, "prompts_failed", (json_int_t)c->n_failed,
        "prompts_failed_recorded", (json_int_t)c->recorded->n_failed, "tokens_not_compared",
        (json_int_t)c->n_uncompared, "compared", compared, "differs_between_runs", traits,
        "invariant_under", c->invariance);
    json_dumpf(out ? out : json_null(), stdout, JSON_REAL_PRECISION(9));
    json_decref(out);
    printf("\n");
}

enum status replay_compare(const struct replay *r, const char *run_file, bool json)
{
    enum status st = ST_OK;
    struct recorded here = {0};
    struct comparison *c = NULL;
    char why[1024];
    TRY(mem_alloc_array((void **)&c, 1, sizeof *c));
    TRY_GOTO(st, recorded_read(&here, run_file, true), done);
    c->recorded = &r->run;
    c->here = &here;
    TRY_GOTO(st, find_traits(&c->traits, c->invariance, &r->run, &here), done);
    compare_runs(c);
    enum verdict verdict = judge(why, sizeof why, c);
    if (json) {
        print_json(c, r->path, run_file, why, verdict);
    } else {
        print_text(c, r->path, run_file, why);
    }
    fflush(stdout); // mpirun may end this rank as soon as another one has left with the exit code
    if (verdict == VERDICT_DIFFERS) {
        FAIL_GOTO(st, ST_DIFFERS, done, "the replay differs from %s in %lld of %lld prompts: %s",
                  r->path, (long long)(c->n_prompts_differ + c->n_failed),
                  (long long)(c->n_prompts + c->n_failed), why);
    }
done:
    recorded_free(&here);
    mem_free(c);
    return st;
}
