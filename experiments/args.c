/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/args.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"

enum { MOST_OPTIONS = 40 };

enum status args_config(const char **config, const struct arg_text *options, const char *word,
                        int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        bool has_value = i + 1 < argc, known = strcmp(argv[i], "--set") == 0;
        for (const struct arg_text *o = options; o->name && has_value; o++) {
            if (strcmp(argv[i], o->name) == 0) {
                *o->to = argv[i + 1];
                known = true;
            }
        }
        if (known && has_value) {
            i++;
        } else if (known || argv[i][0] == '-') {
            FAIL(ST_USER, "%s does not know \"%s\" (or it needs a value); pmpd %s --help explains",
                 word, argv[i], word);
        } else if (*config) {
            FAIL(ST_USER, "%s takes one FILE.cfg, found \"%s\" and \"%s\"", word, *config, argv[i]);
        } else {
            *config = argv[i];
        }
    }
    return ST_OK;
}

enum status args_number(long long *out, const char *name, const char *text, long long min,
                        long long max)
{
    char *end = NULL;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || errno || v < min || v > max) {
        FAIL(ST_USER, "%s: expected a whole number from %lld to %lld, found \"%s\"", name, min, max,
             text);
    }
    *out = v;
    return ST_OK;
}

enum status args_ids(int32_t **ids, int32_t *n, const char *text, int32_t n_vocab)
{
    int32_t most = 1;
    for (const char *c = text; *c; c++) {
        most += *c == ',';
    }
    char *copy = NULL, *rest, *word;
    enum status st = ST_OK;
    *n = 0;
    *ids = NULL;
    TRY(mem_strdup(&copy, text));
    TRY_GOTO(st, MEM_NEW(ids, most), done);
    rest = copy;
    while ((word = strsep(&rest, ",")) != NULL) {
        long long id = 0;
        TRY_GOTO(st, args_number(&id, "--ids", word, 0, n_vocab - 1), done);
        (*ids)[(*n)++] = (int32_t)id;
    }
done:
    mem_free(copy);
    if (st != ST_OK) {
        mem_free(*ids);
        *ids = NULL;
    }
    return st;
}

static enum status set_text(struct settings *s, const char *key, const char *value)
{
    char assignment[SETTINGS_PATH_BYTES + 64];
    int n = snprintf(assignment, sizeof assignment, "%s=%s", key, value);
    if (n < 0 || (size_t)n >= sizeof assignment) {
        FAIL(ST_USER, "%s: the value is too long", key);
    }
    return settings_set(s, assignment);
}

enum status args_parse(struct args *out, const struct env *env, int argc, char **argv,
                       const struct arg_option *own, int n_words, const char *usage)
{
    const char *bits = NULL, *backend = NULL, *threads = NULL, *kv = NULL, *segments = NULL,
               *isa = NULL;
    const struct arg_option common[] = {
        {"bits", &bits, NULL},      {"backend", &backend, NULL},   {"threads", &threads, NULL},
        {"kv", &kv, NULL},          {"segments", &segments, NULL}, {"isa", &isa, NULL},
        {"json", NULL, &out->json}, {"help", NULL, &out->help},    {NULL, NULL, NULL},
    };
    const struct arg_option *lists[] = {own, common}; /* the first of a name wins */
    struct arg_option known[MOST_OPTIONS];
    struct option options[MOST_OPTIONS + 1] = {0};
    int n = 0;
    memset(out, 0, sizeof *out);
    for (int l = 0; l < 2; l++) {
        for (const struct arg_option *o = lists[l]; o->name; o++) {
            INVARIANT(n < MOST_OPTIONS);
            known[n] = *o;
            options[n] =
                (struct option){o->name, o->text ? required_argument : no_argument, NULL, n + 256};
            n++;
        }
    }
    settings_default(&out->settings);
    int first_line = (int)strcspn(usage, "\n");
    opterr = 0;
    optind = 1;
    int c;
    while ((c = getopt_long(argc, argv, ":n:", options, NULL)) != -1) {
        const struct arg_option *o = c >= 256 ? &known[c - 256] : NULL;
        for (int i = 0; c == 'n' && i < n; i++) {
            o = strcmp(known[i].name, "n") == 0 ? &known[i] : o;
        }
        if (c == '?' || c == ':' || !o) {
            FAIL(ST_USER, "%s %s \"%s\"; %.*s (pmpd %s --help explains)", argv[0],
                 c == ':' ? "needs a value after" : "does not know", argv[optind - 1], first_line,
                 usage, argv[0]);
        }
        if (o->flag) {
            *o->flag = true;
        } else {
            *o->text = optarg;
        }
    }
    if (out->help) {
        return ST_OK;
    }
    if (argc - optind != n_words) {
        FAIL(ST_USER, "%s takes %d argument%s, found %d; %.*s", argv[0], n_words,
             n_words == 1 ? "" : "s", argc - optind, first_line, usage);
    }
    for (int i = 0; i < n_words && i < 4; i++) {
        out->word[out->n_words++] = argv[optind + i];
    }
    struct settings *s = &out->settings;
    s->parallel.tensor_ranks = env->size;
    TRY(set_text(s, "model.path", out->word[0] ? out->word[0] : ""));
    if (bits) {
        TRY(set_text(s, "policy.level", bits));
        TRY(set_text(s, "policy.prefill", bits));
    }
    if (backend) {
        TRY(set_text(s, "backend.name", backend));
    }
    if (threads) {
        TRY(set_text(s, "backend.threads", threads));
    }
    if (isa) {
        TRY(set_text(s, "backend.isa", isa));
    }
    if (kv) {
        TRY(set_text(s, "kv.format", kv));
    }
    if (segments) {
        TRY(set_text(s, "parallel.segments", segments));
        s->parallel.reproducible = true;
    }
    return ST_OK;
}
