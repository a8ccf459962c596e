/* What the benchmarks of whole passes share: backend, random model, decoder and bandwidth probe for
 * one number of threads, on all ranks of the world as one replica.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_RIG_H
#define PMPD_EXPERIMENTS_BENCH_RIG_H

#include "core/decoder.h"
#include "core/level.h"
#include "core/weights.h"
#include "experiments/bench/bandwidth.h"
#include "experiments/bench/bench.h"

struct rig {
    struct env *env; /* borrowed */
    struct backend be;
    struct collective coll;
    struct model_config config;
    struct model_shard shard;
    struct level_table levels;
    struct weights weights;
    struct decoder *decs[BENCH_LIST]; /* (slots.n) one for each number of slots */
    struct decoder *dec;              /* the one in use: rig_use */
    struct bandwidth bw;
    int32_t level[BITS_ALL]; /* id of "b bits everywhere"; of the bits asked for */
    struct bench_list slots;
    int32_t max_tok, n_slots; /* n_slots: of dec */
    enum dtype kv_dtype;
    int n_threads, local_rank, n_local;
    size_t probe_bytes;
};

/* What differs between the benchmarks. */
struct rig_needs {
    struct bench_list slots;
    int32_t max_tok, chunk;
    uint32_t bits; /* mask */
    int n_threads;
    bool profile;
};

/* Everything but the probe. Collective over the world; all ranks succeed or fail together. Errors:
 * ST_USER: the model would not fit, with the sum and what would make it smaller. */
MUST_CHECK enum status rig_open(struct rig *rig, struct env *env, const struct bench_options *o,
                                const struct rig_needs *needs);
/* The backend alone, for products without a model. */
MUST_CHECK enum status rig_open_backend(struct rig *rig, struct env *env,
                                        const struct bench_options *o, int n_threads, bool profile);
/* Memory of all ranks beside what it should be, a row of `memory`; then the probe's buffer is made.
 * Call it when a pass has been through. Collective. */
MUST_CHECK enum status rig_memory(struct rig *rig, json_t *root);
void rig_close(struct rig *rig);

/* GB/s of the machine now, a few tenths of a second. Collective. */
MUST_CHECK enum status rig_probe(struct rig *rig, double *gb_s);
/* Takes the decoder of the ith number of slots; the first is in use at first. */
void rig_use(struct rig *rig, int i);
/* Mask of a list of bits, and the largest of a list. */
uint32_t rig_bits(const struct bench_list *bits);
int32_t rig_most(const struct bench_list *list);
/* Makes every slot of the decoder in use n_tok tokens long. */
MUST_CHECK enum status rig_fill(struct rig *rig, int32_t n_tok);

/* One decode step of all slots at b bits, and how long it took. What tokens[] holds goes in; it is
 * replaced by what comes out. tokens (n_slots). Collective. */
MUST_CHECK enum status rig_step(struct rig *rig, int bits, double temperature, int32_t *tokens,
                                double *seconds, struct pass_record *pass);

#endif
