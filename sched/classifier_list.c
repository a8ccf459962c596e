/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/classifier_list.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "core/mem.h"

static enum status read_one(struct classifier *out, const char *path, const char *high,
                            const char *low, const struct level_table *levels,
                            const struct classifier_use *use)
{
    struct classifier_use mine = *use;
    mine.model_digest = levels->model_digest;
    mine.high = high;
    mine.low = low;
    TRY(classifier_read(out, path));
    enum status st = classifier_check_use(out, path, &mine);
    if (st != ST_OK) {
        classifier_free(out);
    }
    return st;
}

enum status classifier_list_read(struct classifier_list *out, const struct schedule *s,
                                 const struct level_table *levels, const struct settings *settings,
                                 const struct classifier_use *use)
{
    char text[SETTINGS_PATH_BYTES], *rest = text, *path = NULL;
    char digests[SCHEDULE_MAX_LEVELS][DIGEST_TEXT] = {{0}};
    enum status st = ST_OK;
    size_t scratch = 1;
    int32_t n = settings->policy.classifier[0] != '\0';
    *out = (struct classifier_list){0};
    memcpy(text, settings->policy.classifier, sizeof text);
    for (const char *c = text; *c; c++) {
        n += *c == ':';
    }
    if (n != s->n - 1) {
        FAIL(ST_USER,
             "policy.classifier names %d files, policy.levels has %d neighbouring pairs: one file "
             "for each pair, separated by colons",
             n, s->n - 1);
    }
    while ((path = strsep(&rest, ":")) != NULL) {
        int32_t p = out->n;
        TRY_GOTO(st,
                 read_one(&out->classifier[p], path, levels->level[s->level[p]].text,
                          levels->level[s->level[p + 1]].text, levels, use),
                 fail);
        out->n++;
        classifier_digest(&out->classifier[p], digests[p]);
        size_t floats = classifier_scratch(&out->classifier[p].shape, levels->config->context);
        scratch = floats > scratch ? floats : scratch;
    }
    TRY_GOTO(st, MEM_NEW(&out->scratch, scratch), fail);
    XXH128_hash_t h = XXH3_128bits(digests, sizeof digests);
    snprintf(out->digest, sizeof out->digest, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
    return ST_OK;
fail:
    classifier_list_free(out);
    return st;
}

void classifier_list_free(struct classifier_list *list)
{
    for (int32_t p = 0; p < list->n; p++) {
        classifier_free(&list->classifier[p]);
    }
    mem_free(list->scratch);
    *list = (struct classifier_list){0};
}
