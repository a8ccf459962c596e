/* pmpd bench decode: decode steps of a random model at a context, against the memory bandwidth
 * measured around them.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/bench/profile.h"
#include "experiments/bench/rig.h"
#include "experiments/bench/statistics.h"
#include "experiments/engine.h"

enum { WARM_UP_STEPS = 1, SHAPE_TEXT_BYTES = 32 };

const struct column bench_decode_columns[] = {
    {"bits", "bits", 0},
    {"threads", "threads", 0},
    {"ranks", "ranks", 0},
    {"context", "context", 0},
    {"slots", "slots", 0},
    {"tok_s_min", "tok/s min", 2},
    {"tok_s", "median", 2},
    {"tok_s_max", "max", 2},
    {"gb_per_step", "GB/step", 4},
    {"gb_s", "GB/s", 2},
    {"bandwidth_gb_s", "memory GB/s", 2},
    {"bandwidth_fraction_min", "fraction min", 3},
    {"bandwidth_fraction", "median", 3},
    {"bandwidth_fraction_max", "max", 3},
    {NULL, NULL, 0},
};

const struct column bench_profile_columns[] = {
    {"bits", "bits", 0},       {"threads", "threads", 0},  {"op", "operation", 0},
    {"matrix", "matrix", 0},   {"calls", "calls/step", 1}, {"us", "us/step", 1},
    {"share", "% of step", 2}, {"gb_s", "GB/s", 2},        {NULL, NULL, 0},
};

const struct column bench_profile_sum_columns[] = {
    {"bits", "bits", 0},
    {"threads", "threads", 0},
    {"context", "context", 0},
    {"slots", "slots", 0},
    {"step_us", "us/step", 1},
    {"nested_share", "% nested products", 2},
    {"attention_share", "% attention", 2},
    {"comm_share", "% collectives", 2},
    {"rest_share", "% everything else", 2},
    {NULL, NULL, 0},
};

/* One context, number of slots and number of bits, and what is measured of it. */
struct decode_case {
    int account, slots_at, bits; /* slots_at: for rig_use */
    int32_t context;
    struct samples step;                /* seconds, every step */
    struct samples fraction, bandwidth; /* every block */
    struct pass_record pass;            /* of the step in the middle of a block: its bytes */
    double total_s, comm_s;
    int n_steps;
};

static enum status case_create(struct decode_case *t, const struct bench_options *o)
{
    TRY(samples_create(&t->step, o->rounds * o->steps));
    TRY(samples_create(&t->fraction, o->rounds));
    TRY(samples_create(&t->bandwidth, o->rounds));
    return ST_OK;
}

static void case_free(struct decode_case *t)
{
    samples_free(&t->step);
    samples_free(&t->fraction);
    samples_free(&t->bandwidth);
}

static double pass_bytes(const struct pass_record *p)
{
    return (double)p->weight_bytes + (double)p->kv_bytes;
}

/* A block of steps from the context on. *median_s: of its steps. */
static enum status run_block(struct rig *rig, const struct bench_options *o, int32_t *tokens,
                             struct decode_case *t, double *median_s)
{
    struct pass_record pass;
    double seconds;
    int first = t->step.n;
    rig_use(rig, t->slots_at);
    TRY(rig_fill(rig, t->context));
    profile_keep(&rig->be, -1);
    for (int i = 0; i < WARM_UP_STEPS; i++) {
        TRY(rig_step(rig, t->bits, o->temperature, tokens, &seconds, &pass));
    }
    TRY(rig_fill(rig, t->context));
    profile_keep(&rig->be, t->account);
    for (int32_t i = 0; i < o->steps; i++) {
        TRY(rig_step(rig, t->bits, o->temperature, tokens, &seconds, &pass));
        samples_add(&t->step, seconds);
        t->total_s += seconds;
        t->comm_s += 1e-6 * (double)pass.comm_us;
        t->n_steps++;
        if (i == o->steps / 2) {
            t->pass = pass;
        }
    }
    profile_keep(&rig->be, -1);
    *median_s = spread_of(t->step.value + first, t->step.n - first).median;
    return ST_OK;
}

/* Blocks of all cases in turn, a probe between any two: it is the one after and the one before. */
static enum status run_rounds(struct rig *rig, const struct bench_options *o, int32_t *tokens,
                              struct decode_case *cases, int n)
{
    struct progress progress;
    double before, after, median_s = 0;
    int done = 0;
    progress_begin(&progress, "decoding", "blocks of steps", (double)o->rounds * n);
    TRY(rig_probe(rig, &before));
    for (int32_t r = 0; r < o->rounds; r++) {
        for (int i = 0; i < n; i++) {
            struct decode_case *t = &cases[i];
            TRY(run_block(rig, o, tokens, t, &median_s));
            TRY(rig_probe(rig, &after));
            double paired = (before + after) / 2;
            samples_add(&t->bandwidth, paired);
            samples_add(&t->fraction, 1e-9 * pass_bytes(&t->pass) / median_s / paired);
            before = after;
            progress_update(&progress, ++done);
        }
    }
    progress_end(&progress);
    return ST_OK;
}

/* ---- rows ---- */

/* A row of array `key`: what names the case, then `more`, whose reference is taken. */
static enum status add_case_row(const struct rig *rig, const struct bench_options *o,
                                const struct decode_case *t, json_t *root, const char *key,
                                json_t *more)
{
    json_t *row = json_pack("{s:s, s:i, s:i, s:i, s:i, s:i}", "shape", o->shape, "bits", t->bits,
                            "threads", rig->n_threads, "ranks", rig->env->size, "context",
                            (int)t->context, "slots", (int)rig->slots.value[t->slots_at]);
    if (json_object_update(row, more) != 0) {
        json_decref(row);
        row = NULL; /* report_add says why */
    }
    json_decref(more);
    return report_add(root, key, row);
}

static enum status add_row(const struct rig *rig, const struct bench_options *o,
                           struct decode_case *t, json_t *root)
{
    struct spread step = samples_spread(&t->step), f = samples_spread(&t->fraction),
                  bw = samples_spread(&t->bandwidth);
    double slots = rig->slots.value[t->slots_at], bytes = pass_bytes(&t->pass);
    return add_case_row(
        rig, o, t, root, "rows",
        json_pack(
            "{s:s, s:i, s:i, s:f, s:f, s:f, s:f, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, "
            "s:f}",
            "isa", rig->be.ops->arithmetic(&rig->be), "group", (int)o->group, "steps", t->n_steps,
            "tok_s_min", slots / step.max, "tok_s", slots / step.median, "tok_s_max",
            slots / step.min, "step_ms", 1e3 * step.median, "weight_bytes",
            (json_int_t)t->pass.weight_bytes, "kv_bytes", (json_int_t)t->pass.kv_bytes,
            "gb_per_step", 1e-9 * bytes, "gb_s", 1e-9 * bytes / step.median, "bandwidth_gb_s",
            bw.median, "bandwidth_gb_s_min", bw.min, "bandwidth_gb_s_max", bw.max,
            "bandwidth_fraction", f.median, "bandwidth_fraction_min", f.min,
            "bandwidth_fraction_max", f.max));
}

static int by_seconds(const void *a, const void *b)
{
    double x = ((const struct profile_entry *)a)->seconds,
           y = ((const struct profile_entry *)b)->seconds;
    return x > y ? -1 : x < y;
}

static enum status add_operation(const struct rig *rig, const struct bench_options *o,
                                 const struct decode_case *t, const struct profile_entry *e,
                                 json_t *root)
{
    double steps = t->n_steps;
    char matrix[SHAPE_TEXT_BYTES] = "";
    if (e->n_rows > 0) {
        snprintf(matrix, sizeof matrix, "%d x %d", e->n_rows, e->n_cols);
    }
    json_t *more = json_pack("{s:s, s:s, s:f, s:f, s:f}", "op", e->op, "matrix", matrix, "calls",
                             (double)e->calls / steps, "us", 1e6 * e->seconds / steps, "share",
                             100 * e->seconds / t->total_s);
    if (e->bytes > 0 && e->seconds > 0) {
        json_object_set_new(more, "gb_s", json_real(1e-9 * (double)e->bytes / e->seconds));
    }
    return add_case_row(rig, o, t, root, "profile", more);
}

/* What is neither an operation nor a collective is the decoder's own work. */
static enum status add_profile(const struct rig *rig, const struct bench_options *o,
                               const struct decode_case *t, json_t *root)
{
    struct profile_entry e[PROFILE_MOST_ENTRIES + 1];
    int n;
    const struct profile_entry *entries = profile_entries(&rig->be, t->account, &n);
    double sum[PROFILE_OTHER + 1] = {0}, rest = t->total_s - t->comm_s, all = t->total_s;
    memcpy(e, entries, (size_t)n * sizeof *e);
    for (int i = 0; i < n; i++) {
        rest -= e[i].seconds;
        sum[e[i].kind] += e[i].seconds;
    }
    e[n++] =
        (struct profile_entry){.op = "decoder", .calls = (uint64_t)t->n_steps, .seconds = rest};
    qsort(e, (size_t)n, sizeof *e, by_seconds);
    for (int i = 0; i < n; i++) {
        TRY(add_operation(rig, o, t, &e[i], root));
    }
    return add_case_row(rig, o, t, root, "profile_sum",
                        json_pack("{s:f, s:f, s:f, s:f, s:f}", "step_us", 1e6 * all / t->n_steps,
                                  "nested_share", 100 * sum[PROFILE_NESTED] / all,
                                  "attention_share", 100 * sum[PROFILE_ATTENTION] / all,
                                  "comm_share", 100 * t->comm_s / all, "rest_share",
                                  100 * (sum[PROFILE_OTHER] + rest) / all));
}

/* ---- one number of threads ---- */

static int count_cases(const struct bench_options *o)
{
    return o->context.n * o->slots.n * o->bits.n;
}

static enum status make_cases(struct decode_case *cases, const struct bench_options *o)
{
    int n = count_cases(o);
    for (int i = 0; i < n; i++) {
        struct decode_case *t = &cases[i];
        t->account = i;
        t->bits = o->bits.value[i % o->bits.n];
        t->slots_at = i / o->bits.n % o->slots.n;
        t->context = o->context.value[i / o->bits.n / o->slots.n];
        TRY(case_create(t, o));
    }
    return ST_OK;
}

/* Every page, table and scratch has been touched. */
static enum status warm_up(struct rig *rig, const struct bench_options *o, int32_t *tokens,
                           const struct decode_case *cases)
{
    struct pass_record pass;
    double seconds;
    int32_t longest = rig_most(&o->context);
    for (int32_t i = 0; i < rig_most(&o->slots); i++) {
        tokens[i] = (7 * i + 1) % rig->config.vocab;
    }
    for (int i = 0; i < count_cases(o); i++) {
        rig_use(rig, cases[i].slots_at);
        TRY(rig_fill(rig, longest));
        TRY(rig_step(rig, cases[i].bits, o->temperature, tokens, &seconds, &pass));
    }
    return ST_OK;
}

static enum status run_threads(struct rig *rig, const struct bench_options *o, json_t *root)
{
    int n = count_cases(o);
    struct decode_case *cases = NULL;
    int32_t *tokens = NULL;
    enum status st = ST_OK;
    TRY_GOTO(st, MEM_NEW(&cases, n), done);
    TRY_GOTO(st, MEM_NEW(&tokens, rig_most(&o->slots)), done);
    TRY_GOTO(st, make_cases(cases, o), done);
    TRY_GOTO(st, warm_up(rig, o, tokens, cases), done);
    TRY_GOTO(st, rig_memory(rig, root), done);
    TRY_GOTO(st, run_rounds(rig, o, tokens, cases, n), done);
    for (int i = 0; i < n; i++) {
        TRY_GOTO(st, add_row(rig, o, &cases[i], root), done);
    }
    for (int i = 0; o->profile && i < n; i++) {
        TRY_GOTO(st, add_profile(rig, o, &cases[i], root), done);
    }
done:
    for (int i = 0; cases && i < n; i++) {
        case_free(&cases[i]);
    }
    mem_free(cases);
    mem_free(tokens);
    return st;
}

enum status bench_decode(struct env *env, const struct bench_options *o, json_t *root)
{
    if (o->profile && count_cases(o) > PROFILE_ACCOUNTS) {
        FAIL(ST_USER, "--profile of %d cases (bits x contexts x slots): at most %d", count_cases(o),
             PROFILE_ACCOUNTS);
    }
    for (int i = 0; i < o->threads.n; i++) {
        struct rig rig;
        struct rig_needs needs = {.max_tok = rig_most(&o->context) + o->steps + WARM_UP_STEPS,
                                  .slots = o->slots,
                                  .chunk = 1,
                                  .bits = rig_bits(&o->bits),
                                  .n_threads = o->threads.value[i],
                                  .profile = o->profile};
        enum status st = rig_open(&rig, env, o, &needs);
        if (st == ST_OK) {
            st = engine_loop_end(env, run_threads(&rig, o, root));
        }
        rig_close(&rig);
        TRY(st);
    }
    return ST_OK;
}
