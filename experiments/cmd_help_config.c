/* pmpd help-config: every setting with its meaning, as a configuration file.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/settings.h"
#include "experiments/cmd.h"
#include "sched/registry.h"

static const char usage[] =
    "usage: pmpd help-config [--json]\n"
    "Prints every setting with meaning, unit, range and default, as a file that "
    "pmpd run reads.\n";

static enum status print_json(void)
{
    struct settings s;
    json_t *list = json_array();
    settings_default(&s);
    for (int i = 0; settings_row(i); i++) {
        const struct setting_row *row = settings_row(i);
        json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:s}", "key", row->key, "default",
                                              row->fallback, "unit", row->unit, "help", row->help));
    }
    json_dumpf(list, stdout, JSON_INDENT(1));
    json_decref(list);
    printf("\n");
    return ST_OK;
}

/* Name and help, words of which are kept within a line's width. */
static void print_policy(const struct policy_ops *policy)
{
    enum { INDENT = 20, WIDTH = 100 };
    int column = printf("#   %-15s", policy->name);
    for (const char *at = policy->help; *at; at += strspn(at, " ")) {
        int n = (int)strcspn(at, " ");
        if (column + 1 + n > WIDTH) {
            column = printf("\n#%*s", INDENT - 2, "") - 1;
        }
        column += printf(" %.*s", n, at);
        at += n;
    }
    printf("\n");
}

enum status cmd_help_config(int argc, char **argv)
{
    struct settings s;
    char *text = NULL;
    if (argc == 2 && strcmp(argv[1], "--json") == 0) {
        return print_json();
    }
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(usage, stdout);
        return ST_OK;
    }
    if (argc != 1) {
        FAIL(ST_USER, "help-config does not know \"%s\"; %s", argv[1], usage);
    }
    settings_default(&s);
    TRY(settings_print(&text, &s, true));
    fputs(text, stdout);
    mem_free(text);
    printf("\n# Policies (policy.name):\n");
    for (int i = 0; registry_policy(i); i++) {
        print_policy(registry_policy(i));
    }
    return ST_OK;
}
