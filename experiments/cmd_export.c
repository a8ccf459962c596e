/* pmpd export: datasets of many jobs become one. SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/log.h"
#include "experiments/cmd.h"
#include "sched/dataset.h"

static const char usage[] =
    "usage: pmpd export DATASET.h5 [DATASET.h5...] OUT.h5\n"
    "Merges what several jobs of pmpd dataset made (other prompts, the same model, levels,\n"
    "criterion, tokens and candidates) into one dataset. A row that two files have is kept once; "
    "a\n"
    "prompt's split is the same in all of them.\n"
    "Example:\n"
    "  pmpd export results/data-*.h5 results/data.h5\n";

static enum status merge_all(struct dataset *d, int n, char **paths)
{
    for (int i = 1; i < n; i++) {
        struct dataset more;
        int32_t n_twice = 0;
        TRY(dataset_read(&more, paths[i]));
        enum status st = dataset_merge(d, &more, paths[i], &n_twice);
        dataset_free(&more);
        TRY(st);
        if (n_twice > 0) {
            log_info("%s: %d rows were there already", paths[i], n_twice);
        }
    }
    return ST_OK;
}

enum status cmd_export(int argc, char **argv)
{
    struct dataset d;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(usage, stdout);
            return ST_OK;
        }
        if (argv[i][0] == '-') {
            FAIL(ST_USER, "export does not know \"%s\"; pmpd export --help explains", argv[i]);
        }
    }
    if (argc < 3) {
        FAIL(ST_USER, "export needs at least one DATASET.h5 and OUT.h5; pmpd export --help "
                      "explains");
    }
    if (access(argv[argc - 1], F_OK) == 0) { /* a pattern without OUT.h5 ends in an input */
        FAIL(ST_USER, "%s is there already; the last argument is the new file that is written",
             argv[argc - 1]);
    }
    TRY(dataset_read(&d, argv[1]));
    enum status st = merge_all(&d, argc - 2, argv + 1);
    st = st ? st : dataset_write(&d, argv[argc - 1]);
    if (st == ST_OK) {
        printf("%s: %d rows\n", argv[argc - 1], d.n);
    }
    dataset_free(&d);
    return st;
}
