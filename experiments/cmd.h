/* The subcommands of pmpd. Each gets its own argv (argv[0] is the subcommand's name) and returns a
 * status; main prints the message and ends the process. "--help" prints usage and returns ST_OK.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_CMD_H
#define PMPD_EXPERIMENTS_CMD_H

#include "core/status.h"
#include "dist/env.h"

/* One rank. */
MUST_CHECK enum status cmd_inspect(int argc, char **argv);
MUST_CHECK enum status cmd_help_config(int argc, char **argv);
MUST_CHECK enum status cmd_export(int argc, char **argv);
/* All ranks of the world together; every rank succeeds or fails. */
MUST_CHECK enum status cmd_quantize(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_run(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_generate(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_perplexity(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_tune(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_dataset(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_train(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_logits(struct env *env, int argc, char **argv);
MUST_CHECK enum status cmd_bench(struct env *env, int argc, char **argv);

#endif
