/* The answers that `pmpd tune plan` compares: texts of prompts under plans, decoded on all
 * replicas, kept in DIR/trials, known to all ranks. An answer's key hashes model, arithmetic,
 * limits, plan and prompt, so that a later search (another grid, another loss) reuses it. Each
 * replica appends to its own DIR/trials/replica-N/journal.bin as soon as an answer is there; rank 0
 * reads all of them at the start. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_TUNE_ANSWERS_H
#define PMPD_EXPERIMENTS_TUNE_ANSWERS_H

#include <stdint.h>

#include "core/prompts.h"
#include "core/tokenizer.h"
#include "dist/journal.h"
#include "experiments/engine.h"

enum { TUNE_PLAN_BYTES = 8192 };

struct tune_answer {
    uint64_t key[2];
    int32_t n_turns, n_steps[PROMPT_MAX_TURNS]; /* decode steps of each turn */
    double bits;                                /* sum over the steps of their level's average */
    char *text;                                 /* owned; turns one after the other, a line each */
};

struct tune_answers {
    struct env *env; /* borrowed */
    char dir[SETTINGS_PATH_BYTES + 16];
    struct tune_answer *answer; /* owned: (n) by key */
    int32_t n, capacity;
    struct journal *journal; /* first rank of a replica */
    char *fresh;             /* owned: (n_fresh) packed answers that the other ranks lack */
    size_t n_fresh, fresh_capacity;
    int32_t n_decoded; /* by this start, all replicas */
};

/* Reads DIR/trials. Collective over the world, whose grid need not be there yet. Errors: ST_FORMAT
 * (a damaged or foreign file, named), ST_IO. Back with tune_answers_close, also after a failure. */
MUST_CHECK enum status tune_answers_open(struct tune_answers *a, struct env *env, const char *dir);
void tune_answers_close(struct tune_answers *a);

/* A loaded model that answers. */
struct tune_model {
    struct engine *e;                /* borrowed */
    const struct settings *settings; /* borrowed; its model.path is e's */
    const struct tokenizer *tok;     /* borrowed */
    char depends[1024];              /* what its answers depend on beside plan and prompt */
};
/* Fills depends. digest: of the model. */
void tune_model_describe(struct tune_model *m, const char *digest);

/* One answer that is wanted. */
struct tune_request {
    const struct prompt *prompt; /* borrowed; encoded */
    const char *plan;            /* borrowed; "prefill:4 0:4 80:2", of levels that the engine has */
};
/* The known answer, or NULL. Borrowed until the next tune_decode. */
const struct tune_answer *tune_find(const struct tune_answers *a, const struct tune_model *m,
                                    const struct tune_request *request);
/* Decodes those of n requests that are not known, dealt to the replicas in order; then all ranks
 * know all. Collective over the world. A failure while decoding ends the job (engine_loop_end) with
 * prompt and plan; what was finished is kept. */
MUST_CHECK enum status tune_decode(struct tune_answers *a, struct tune_model *m,
                                   const struct tune_request *requests, int32_t n);

#endif
