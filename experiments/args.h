/* What the model subcommands (generate, perplexity, logits) have in common on the command line: the
 * model, --bits, --backend, --threads, --isa, --kv, --segments, --json, --help; under mpirun all
 * ranks form one replica. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_ARGS_H
#define PMPD_EXPERIMENTS_ARGS_H

#include <getopt.h>
#include <stdbool.h>

#include "core/settings.h"
#include "dist/env.h"

struct args {
    struct settings settings; /* defaults, with what the options said */
    bool json, help;
    int n_words;   /* positional words */
    char *word[4]; /* borrowed from argv */
};

/* An option of one subcommand: its value (or NULL for a flag) goes to *text, a flag sets *flag. */
struct arg_option {
    const char *name; /* without dashes; "n" is also -n */
    const char **text;
    bool *flag;
};

/* Parses argv; `own` ends with a NULL name and may take over a common option by its name. Errors:
 * ST_USER (unknown option with the usage's first line; number of words not n_words; a value out of
 * range). --help sets help and checks nothing else. tensor_ranks is set to the world's size. */
MUST_CHECK enum status args_parse(struct args *out, const struct env *env, int argc, char **argv,
                                  const struct arg_option *own, int n_words, const char *usage);
/* The part of every usage text that args_parse understands. */
#define ARGS_COMMON_HELP                                                                         \
    "  --bits B         level: 2, 3, 4, ..., or a map such as \"3,0-1.down_proj=4,head=4\"\n"    \
    "                   (default: the most the model holds)\n"                                   \
    "  --backend NAME   cpu (default), cpu_ref (slow, exact), cuda\n"                            \
    "  --threads N      CPU threads per rank (default: what the rank may use)\n"                 \
    "  --isa NAME       auto (default), avx512, avx2, scalar: the cpu backend's instructions\n"  \
    "  --kv FORMAT      KV cache: f16 or f32 (default: f32 for an unquantised model on CPU)\n"   \
    "  --segments S     sum in S parts (parallel.reproducible): the same bits on every number\n" \
    "                   of ranks that fits, at most S\n"                                         \
    "  --json           print the result as JSON\n"

/* The words after a subcommand that takes one FILE.cfg: options with a value each (`options` ends
 * with a NULL name; names with dashes), and --set, which settings read. `word` is the subcommand as
 * it is written. Errors: ST_USER. */
struct arg_text {
    const char *name, **to;
};
MUST_CHECK enum status args_config(const char **config, const struct arg_text *options,
                                   const char *word, int argc, char **argv);

/* A whole number within a range, from an option's text. Errors: ST_USER. */
MUST_CHECK enum status args_number(long long *out, const char *name, const char *text,
                                   long long min, long long max);
/* "1,2,3" -> ids (mem_free). Errors: ST_USER. */
MUST_CHECK enum status args_ids(int32_t **ids, int32_t *n, const char *text, int32_t n_vocab);

#endif
