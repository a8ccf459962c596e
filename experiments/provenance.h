/* How a run was made: facts for /provenance.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_PROVENANCE_H
#define PMPD_EXPERIMENTS_PROVENANCE_H

#include "core/prompts.h"
#include "core/runfile.h"
#include "experiments/engine.h"

enum { PROVENANCE_MAX = 32, PROVENANCE_BYTES = 512 };

struct provenance {
    int n;
    struct run_fact fact[PROVENANCE_MAX]; /* (n) values point into text */
    char text[PROVENANCE_MAX][PROVENANCE_BYTES];
};

void provenance_fill(struct provenance *out, const struct engine *e, const struct settings *s,
                     const struct prompts *prompts, const char *model_digest, int n_epochs);
/* "pmpd 0.1.0 (1a2b3c4)" */
const char *provenance_version(void);

#endif
