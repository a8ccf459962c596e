/* pmpd bench: what its subcommands are asked, and the subcommands. Each fills rows of `root`; the
 * caller (cmd_bench.c) prints. All are collective over the world, which is one replica (but for
 * service: bench/service.c).
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_BENCH_H
#define PMPD_EXPERIMENTS_BENCH_BENCH_H

#include "core/settings.h"
#include "core/status.h"
#include "dist/env.h"
#include "experiments/bench/report.h"

enum { BENCH_LIST = 32 };

struct bench_list {
    int n;
    int32_t value[BENCH_LIST]; /* (n) */
};

struct bench_options {
    const struct settings *settings; /* backend, isa, KV format, segments */
    const char *shape;               /* a name or a folder; NULL: none */
    struct bench_list bits, threads, tokens;
    struct bench_list rows, cols;     /* ops: (n) each, when shape is NULL */
    struct bench_list context, slots; /* switch: the first of each */
    struct bench_list to;             /* switch */
    int32_t from, steps, rounds, group, chunk;
    size_t probe_bytes;       /* of a node's probe buffers; copies of a matrix take half */
    int32_t replicas, leases; /* service: simulated ones; of each pause */
    struct bench_list pause;  /* service: ms on average between a plan and the next lease */
    const char *dir;          /* service: where the journal lies */
    bool free_levels, profile;
    double temperature;
};

MUST_CHECK enum status bench_ops(struct env *env, const struct bench_options *o, json_t *root);
MUST_CHECK enum status bench_decode(struct env *env, const struct bench_options *o, json_t *root);
MUST_CHECK enum status bench_prefill(struct env *env, const struct bench_options *o, json_t *root);
MUST_CHECK enum status bench_switch(struct env *env, const struct bench_options *o, json_t *root);
MUST_CHECK enum status bench_service(struct env *env, const struct bench_options *o, json_t *root);

/* Columns of the tables of each. */
extern const struct column bench_ops_columns[], bench_decode_columns[], bench_prefill_columns[],
    bench_switch_columns[], bench_service_columns[], bench_memory_columns[],
    bench_profile_columns[], bench_profile_sum_columns[];

#endif
