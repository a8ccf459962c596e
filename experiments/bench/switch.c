/* pmpd bench switch: what the first decode step after a change of level costs, against the steps
 * that follow it.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/bench/rig.h"
#include "experiments/bench/statistics.h"
#include "experiments/engine.h"

/* One repetition: steps at the old level, then the first of the new one, then steady ones. */
enum { OLD_STEPS = 2, STEADY_STEPS = 4 };

const struct column bench_switch_columns[] = {
    {"from", "from", 0},
    {"to", "to", 0},
    {"threads", "threads", 0},
    {"ranks", "ranks", 0},
    {"context", "context", 0},
    {"from_ms", "old step ms", 3},
    {"first_ms", "first ms", 3},
    {"steady_ms", "steady ms", 3},
    {"ratio_min", "first/steady min", 4},
    {"ratio", "median", 4},
    {"ratio_max", "max", 4},
    {NULL, NULL, 0},
};

struct switch_times {
    struct samples old, first, steady, ratio; /* (rounds) seconds, and first / steady */
};

static enum status times_create(struct switch_times *t, int n)
{
    TRY(samples_create(&t->old, n));
    TRY(samples_create(&t->first, n));
    TRY(samples_create(&t->steady, n));
    return samples_create(&t->ratio, n);
}

static void times_free(struct switch_times *t)
{
    samples_free(&t->old);
    samples_free(&t->first);
    samples_free(&t->steady);
    samples_free(&t->ratio);
}

static enum status run_once(struct rig *rig, const struct bench_options *o, int to, int32_t *tokens,
                            struct switch_times *t)
{
    struct pass_record pass;
    double old[OLD_STEPS], first, steady[STEADY_STEPS];
    TRY(rig_fill(rig, o->context.value[0]));
    for (int i = 0; i < OLD_STEPS; i++) {
        TRY(rig_step(rig, o->from, o->temperature, tokens, &old[i], &pass));
    }
    TRY(rig_step(rig, to, o->temperature, tokens, &first, &pass));
    for (int i = 0; i < STEADY_STEPS; i++) {
        TRY(rig_step(rig, to, o->temperature, tokens, &steady[i], &pass));
    }
    double s = spread_of(steady, STEADY_STEPS).median;
    samples_add(&t->old, old[OLD_STEPS - 1]);
    samples_add(&t->first, first);
    samples_add(&t->steady, s);
    samples_add(&t->ratio, first / s);
    return ST_OK;
}

static enum status add_row(const struct rig *rig, const struct bench_options *o, int to,
                           struct switch_times *t, json_t *root)
{
    struct spread ratio = samples_spread(&t->ratio);
    return report_add(
        root, "rows",
        json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:i, s:f, s:f, s:f, s:f, s:f, s:f}",
                  "shape", o->shape, "from", (int)o->from, "to", to, "threads", rig->n_threads,
                  "ranks", rig->env->size, "context", (int)o->context.value[0], "slots",
                  (int)rig->n_slots, "isa", rig->be.ops->arithmetic(&rig->be), "repetitions",
                  (int)o->rounds, "from_ms", 1e3 * samples_spread(&t->old).median, "first_ms",
                  1e3 * samples_spread(&t->first).median, "steady_ms",
                  1e3 * samples_spread(&t->steady).median, "ratio", ratio.median, "ratio_min",
                  ratio.min, "ratio_max", ratio.max));
}

static enum status run_threads(struct rig *rig, const struct bench_options *o, json_t *root)
{
    struct switch_times times[BITS_ALL] = {0}, unused = {0};
    struct progress progress;
    int32_t *tokens = NULL;
    int done = 0;
    enum status st = MEM_NEW(&tokens, rig->n_slots);
    TRY_GOTO(st, st, done);
    for (int i = 0; i < o->to.n; i++) {
        TRY_GOTO(st, times_create(&times[i], o->rounds), done);
    }
    TRY_GOTO(st, times_create(&unused, o->to.n), done);
    for (int i = 0; i < o->to.n; i++) { /* every page has been touched */
        TRY_GOTO(st, run_once(rig, o, o->to.value[i], tokens, &unused), done);
    }
    TRY_GOTO(st, rig_memory(rig, root), done);
    progress_begin(&progress, "switching", "repetitions", (double)o->rounds * o->to.n);
    for (int32_t r = 0; r < o->rounds; r++) {
        for (int i = 0; i < o->to.n; i++) {
            TRY_GOTO(st, run_once(rig, o, o->to.value[i], tokens, &times[i]), done);
            progress_update(&progress, ++done);
        }
    }
    progress_end(&progress);
    for (int i = 0; i < o->to.n; i++) {
        TRY_GOTO(st, add_row(rig, o, o->to.value[i], &times[i], root), done);
    }
done:
    for (int i = 0; i < o->to.n; i++) {
        times_free(&times[i]);
    }
    times_free(&unused);
    mem_free(tokens);
    return st;
}

enum status bench_switch(struct env *env, const struct bench_options *o, json_t *root)
{
    for (int i = 0; i < o->threads.n; i++) {
        struct rig rig;
        struct rig_needs needs = {.max_tok = o->context.value[0] + OLD_STEPS + 1 + STEADY_STEPS,
                                  .slots = {.n = 1, .value = {o->slots.value[0]}},
                                  .chunk = 1,
                                  .bits = rig_bits(&o->to) | 1u << o->from,
                                  .n_threads = o->threads.value[i]};
        enum status st = rig_open(&rig, env, o, &needs);
        if (st == ST_OK) {
            st = engine_loop_end(env, run_threads(&rig, o, root));
        }
        rig_close(&rig);
        TRY(st);
    }
    return ST_OK;
}
