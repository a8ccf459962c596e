/* pmpd bench decode: decode steps of a random model at a context, against the memory bandwidth
 * measured around them.
 * SPDX-License-Identifier: Apache-2.0
 */
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
    {"step_us", "us/step", 1},
    {"nested_share", "% nested products", 2},
    {"attention_share", "% attention", 2},
    {"comm_share", "% collectives", 2},
    {"rest_share", "% everything else", 2},
    {NULL, NULL, 0},
};

/* What is measured of one number of bits. */
struct level_times {
    struct samples step;                /* seconds, every step */
    struct samples fraction, bandwidth; /* every block */
    struct pass_record pass;            /* of the step in the middle of a block: its bytes */
    double total_s, comm_s;
    int n_steps;
};

static enum status times_create(struct level_times *t, const struct bench_options *o)
{
    TRY(samples_create(&t->step, o->rounds * o->steps));
    TRY(samples_create(&t->fraction, o->rounds));
    TRY(samples_create(&t->bandwidth, o->rounds));
    return ST_OK;
}

static void times_free(struct level_times *t)
{
    samples_free(&t->step);
    samples_free(&t->fraction);
    samples_free(&t->bandwidth);
}

static double pass_bytes(const struct pass_record *p)
{
    return (double)p->weight_bytes + (double)p->kv_bytes;
}

/* A block of steps at one level, from the context on. *median_s: of its steps. */
static enum status run_block(struct rig *rig, const struct bench_options *o, int bits,
                             int32_t *tokens, struct level_times *t, double *median_s)
{
    struct pass_record pass;
    double seconds;
    int first = t->step.n;
    TRY(rig_fill(rig, o->context));
    profile_keep(&rig->be, -1);
    for (int i = 0; i < WARM_UP_STEPS; i++) {
        TRY(rig_step(rig, bits, o->temperature, tokens, &seconds, &pass));
    }
    TRY(rig_fill(rig, o->context));
    profile_keep(&rig->be, bits);
    for (int32_t i = 0; i < o->steps; i++) {
        TRY(rig_step(rig, bits, o->temperature, tokens, &seconds, &pass));
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

/* Blocks of all levels in turn, a probe between any two: it is the one after and the one before. */
static enum status run_rounds(struct rig *rig, const struct bench_options *o, int32_t *tokens,
                              struct level_times *times)
{
    struct progress progress;
    double before, after, median_s = 0;
    int done = 0;
    progress_begin(&progress, "decoding", "blocks of steps", (double)o->rounds * o->bits.n);
    TRY(rig_probe(rig, &before));
    for (int32_t r = 0; r < o->rounds; r++) {
        for (int i = 0; i < o->bits.n; i++) {
            struct level_times *t = &times[i];
            TRY(run_block(rig, o, o->bits.value[i], tokens, t, &median_s));
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

static enum status add_row(struct rig *rig, const struct bench_options *o, int bits,
                           struct level_times *t, json_t *root)
{
    struct spread step = samples_spread(&t->step), f = samples_spread(&t->fraction),
                  bw = samples_spread(&t->bandwidth);
    double slots = rig->n_slots, bytes = pass_bytes(&t->pass);
    json_t *row = json_pack(
        "{s:s, s:i, s:i, s:i, s:i, s:i, s:s, s:i, s:i, s:f, s:f, s:f, s:f}", "shape", o->shape,
        "bits", bits, "threads", rig->n_threads, "ranks", rig->env->size, "context",
        (int)o->context, "slots", (int)rig->n_slots, "isa", rig->be.ops->arithmetic(&rig->be),
        "group", (int)o->group, "steps", t->n_steps, "tok_s_min", slots / step.max, "tok_s",
        slots / step.median, "tok_s_max", slots / step.min, "step_ms", 1e3 * step.median);
    json_t *more = json_pack(
        "{s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "weight_bytes",
        (json_int_t)t->pass.weight_bytes, "kv_bytes", (json_int_t)t->pass.kv_bytes, "gb_per_step",
        1e-9 * bytes, "gb_s", 1e-9 * bytes / step.median, "bandwidth_gb_s", bw.median,
        "bandwidth_gb_s_min", bw.min, "bandwidth_gb_s_max", bw.max, "bandwidth_fraction", f.median,
        "bandwidth_fraction_min", f.min, "bandwidth_fraction_max", f.max);
    json_object_update(row, more);
    json_decref(more);
    return report_add(root, "rows", row);
}

static int by_seconds(const void *a, const void *b)
{
    double x = ((const struct profile_entry *)a)->seconds,
           y = ((const struct profile_entry *)b)->seconds;
    return x > y ? -1 : x < y;
}

static enum status add_profile_row(int bits, int n_threads, const struct profile_entry *e,
                                   const struct level_times *t, json_t *root)
{
    double steps = t->n_steps;
    char matrix[SHAPE_TEXT_BYTES] = "";
    if (e->n_rows > 0) {
        snprintf(matrix, sizeof matrix, "%d x %d", e->n_rows, e->n_cols);
    }
    json_t *row =
        json_pack("{s:i, s:i, s:s, s:s, s:f, s:f, s:f}", "bits", bits, "threads", n_threads, "op",
                  e->op, "matrix", matrix, "calls", (double)e->calls / steps, "us",
                  1e6 * e->seconds / steps, "share", 100 * e->seconds / t->total_s);
    if (e->bytes > 0 && e->seconds > 0) {
        json_object_set_new(row, "gb_s", json_real(1e-9 * (double)e->bytes / e->seconds));
    }
    return report_add(root, "profile", row);
}

/* What is neither an operation nor a collective is the decoder's own work. */
static enum status add_profile(struct rig *rig, int bits, const struct level_times *t, json_t *root)
{
    enum { MOST = 64 };
    struct profile_entry e[MOST + 1];
    int n;
    const struct profile_entry *entries = profile_entries(&rig->be, bits, &n);
    double sum[3] = {0}, rest = t->total_s - t->comm_s;
    INVARIANT(n <= MOST);
    if (!entries) {
        return ST_OK;
    }
    memcpy(e, entries, (size_t)n * sizeof *e);
    for (int i = 0; i < n; i++) {
        rest -= e[i].seconds;
        sum[e[i].kind] += e[i].seconds;
    }
    e[n++] =
        (struct profile_entry){.op = "decoder", .calls = (uint64_t)t->n_steps, .seconds = rest};
    qsort(e, (size_t)n, sizeof *e, by_seconds);
    for (int i = 0; i < n; i++) {
        TRY(add_profile_row(bits, rig->n_threads, &e[i], t, root));
    }
    double all = t->total_s;
    return report_add(root, "profile_sum",
                      json_pack("{s:i, s:i, s:f, s:f, s:f, s:f, s:f}", "bits", bits, "threads",
                                rig->n_threads, "step_us", 1e6 * all / t->n_steps, "nested_share",
                                100 * sum[PROFILE_NESTED] / all, "attention_share",
                                100 * sum[PROFILE_ATTENTION] / all, "comm_share",
                                100 * t->comm_s / all, "rest_share",
                                100 * (sum[PROFILE_OTHER] + rest) / all));
}

/* ---- one number of threads ---- */

static enum status run_threads(struct rig *rig, const struct bench_options *o, json_t *root)
{
    struct level_times times[BITS_ALL] = {0};
    int32_t *tokens = NULL;
    struct pass_record pass;
    double seconds;
    enum status st = MEM_NEW(&tokens, rig->n_slots);
    for (int i = 0; st == ST_OK && i < o->bits.n; i++) {
        st = times_create(&times[i], o);
    }
    TRY_GOTO(st, st, done);
    for (int32_t i = 0; i < rig->n_slots; i++) {
        tokens[i] = (7 * i + 1) % rig->config.vocab;
    }
    TRY_GOTO(st, rig_fill(rig, o->context), done);
    for (int i = 0; i < o->bits.n; i++) { /* every page, table and scratch has been touched */
        TRY_GOTO(st, rig_step(rig, o->bits.value[i], o->temperature, tokens, &seconds, &pass),
                 done);
        TRY_GOTO(st, rig_fill(rig, o->context), done);
    }
    TRY_GOTO(st, rig_memory(rig, root), done);
    TRY_GOTO(st, run_rounds(rig, o, tokens, times), done);
    for (int i = 0; i < o->bits.n; i++) {
        TRY_GOTO(st, add_row(rig, o, o->bits.value[i], &times[i], root), done);
    }
    for (int i = 0; i < o->bits.n; i++) {
        TRY_GOTO(st, add_profile(rig, o->bits.value[i], &times[i], root), done);
    }
done:
    for (int i = 0; i < o->bits.n; i++) {
        times_free(&times[i]);
    }
    mem_free(tokens);
    return st;
}

enum status bench_decode(struct env *env, const struct bench_options *o, json_t *root)
{
    for (int i = 0; i < o->threads.n; i++) {
        struct rig rig;
        struct rig_needs needs = {.max_tok = o->context + o->steps + WARM_UP_STEPS,
                                  .n_slots = o->slots,
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
