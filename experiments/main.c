/* pmpd: one program. Starts MPI, dispatches to a subcommand, prints the error if there is one, ends
 * the process.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "dist/stop.h"
#include "experiments/cmd.h"
#include "experiments/provenance.h"

enum { EXIT_FAILED = 1, EXIT_USAGE = 2 };

struct subcommand {
    const char *name, *help;
    enum status (*alone)(int argc, char **argv);                     /* one rank ... */
    enum status (*together)(struct env *env, int argc, char **argv); /* ... or the whole world */
};

static const struct subcommand subcommands[] = {
    {"quantize", "make a nested model (bit-planes) from a Hugging Face folder", NULL, cmd_quantize},
    {"run", "decode a file of prompts under a precision policy (mpirun)", NULL, cmd_run},
    {"generate", "continue one prompt", NULL, cmd_generate},
    {"perplexity", "how well a model predicts a text, at any bits or plan", NULL, cmd_perplexity},
    {"tune",
     "find the lowest precision (tune high) or the cheapest plan (tune plan) that loses nothing",
     NULL, cmd_tune},
    {"dataset", "training data for learned schedulers (mpirun)", NULL, cmd_dataset},
    {"train", "a learned scheduler from such data (mpirun)", NULL, cmd_train},
    {"export", "datasets of many jobs as one", cmd_export, NULL},
    {"logits", "logits of a list of ids as a NumPy file", NULL, cmd_logits},
    {"bench", "time products, decoding, prefill and level changes against memory", NULL, cmd_bench},
    {"inspect", "what a model folder, a nested model or a run file holds", cmd_inspect, NULL},
    {"help-config", "every setting with its meaning", cmd_help_config, NULL},
};
enum { N_SUBCOMMANDS = sizeof subcommands / sizeof *subcommands };

static void print_usage(FILE *to)
{
    fprintf(to,
            "%s: progressive mixed-precision decoding at cluster scale\n"
            "usage: pmpd SUBCOMMAND ... (pmpd SUBCOMMAND --help explains each)\n\n",
            provenance_version());
    for (int i = 0; i < N_SUBCOMMANDS; i++) {
        fprintf(to, "  %-12s %s\n", subcommands[i].name, subcommands[i].help);
    }
    fprintf(to, "\nMODEL is a Hugging Face folder or a nested one everywhere. Start with:\n"
                "  pmpd quantize experiments/tiny results/nested\n"
                "  pmpd generate results/nested --prompt \"Task: story\" --bits 3\n");
}

static const struct subcommand *find(const char *name)
{
    for (int i = 0; i < N_SUBCOMMANDS; i++) {
        if (strcmp(subcommands[i].name, name) == 0) {
            return &subcommands[i];
        }
    }
    return NULL;
}

static enum status dispatch(struct env *env, const struct subcommand *s, int argc, char **argv)
{
    if (s->together) {
        return s->together(env, argc, argv);
    }
    return env_agree(env, env->rank == 0 ? s->alone(argc, argv) : ST_OK);
}

static int exit_code(enum status st)
{
    return st == ST_OK        ? 0
           : st == ST_USER    ? EXIT_USAGE
           : st == ST_STOPPED ? STOP_EXIT_CODE
                              : EXIT_FAILED;
}

int main(int argc, char **argv)
{
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) {
        print_usage(argc < 2 ? stderr : stdout);
        return argc < 2 ? EXIT_USAGE : 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("%s\n", provenance_version());
        return 0;
    }
    const struct subcommand *s = find(argv[1]);
    if (!s) {
        fprintf(stderr, "pmpd: error: unknown subcommand \"%s\"\n\n", argv[1]);
        print_usage(stderr);
        return EXIT_USAGE;
    }
    struct env env = {0};
    enum status st = env_start(&env, &argc, &argv);
    if (st == ST_OK) {
        st = dispatch(&env, s, argc - 1, argv + 1);
    }
    if (st == ST_STOPPED && env.rank == 0) {
        fprintf(stderr, "pmpd: %s\n", status_message());
    } else if (st != ST_OK && env.rank == 0) {
        log_error("%s", status_message());
        if (st != ST_USER && st != ST_DIFFERS) {
            fputs(status_traceback(), stderr);
        }
    }
    env_end(&env);
    return exit_code(st);
}
