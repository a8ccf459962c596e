/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/inspect_learn.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "core/h5.h"

struct label_table label_table_count(const struct dataset *d)
{
    struct label_table t = {0};
    for (int32_t i = 0; i < d->n; i++) {
        enum dataset_split split = dataset_split_of(d->rows[i].prompt_hash);
        t.count[split][d->rows[i].label]++;
        t.total[split]++;
        t.high_score += (double)d->rows[i].high_score / d->n;
    }
    return t;
}

void label_table_print(const struct label_table *t, const struct dataset *d)
{
    printf("%d rows; %s of the high level %.4f on average\n\nswitch at  ", d->n, d->facts.criterion,
           t->high_score);
    for (int32_t k = 0; k < d->facts.n_candidates; k++) {
        printf("%8.3f", d->facts.class_at[k]);
    }
    printf("   never\n");
    for (int s = 0; s < SPLIT_N; s++) {
        printf("%-11s", dataset_split_name[s]);
        for (int32_t k = 0; k <= d->facts.n_candidates; k++) {
            printf("%8d", t->count[s][k]);
        }
        printf("  of %d\n", t->total[s]);
    }
}

static json_t *numbers(const double *x, int32_t n)
{
    json_t *list = json_array();
    for (int32_t i = 0; i < n; i++) {
        json_array_append_new(list, json_real(x[i]));
    }
    return list;
}

static enum status print(json_t *all)
{
    if (!all || json_dumpf(all, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) != 0) {
        json_decref(all);
        FAIL(ST_FORMAT, "it cannot be described as JSON: a text in it is not UTF-8");
    }
    printf("\n");
    json_decref(all);
    return ST_OK;
}

static enum status print_dataset(const struct dataset *d, const char *path, bool as_json)
{
    const struct dataset_facts *f = &d->facts;
    struct label_table t = label_table_count(d);
    if (!as_json) {
        printf(
            "%s\n  kind       dataset of pmpd dataset\n  model      %s\n  reference  %s, level %s\n"
            "  levels     %s, then %s\n  tokens     %d at most, K and V %d x %d\n",
            path, f->model_digest, f->reference_digest, f->reference, f->high, f->low,
            f->max_new_tokens, f->n_kv_heads, f->head_dim);
        label_table_print(&t, d);
        return ST_OK;
    }
    json_t *splits = json_object();
    for (int s = 0; s < SPLIT_N; s++) {
        json_t *counts = json_array();
        for (int32_t k = 0; k <= f->n_candidates; k++) {
            json_array_append_new(counts, json_integer(t.count[s][k]));
        }
        json_object_set_new(splits, dataset_split_name[s], counts);
    }
    return print(json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:f, s:i, s:i, s:i, s:i, s:f, s:o, s:o}", "path",
        path, "kind", "dataset", "model_digest", f->model_digest, "reference_digest",
        f->reference_digest, "reference_level", f->reference, "high", f->high, "low", f->low,
        "criterion", f->criterion, "tolerance", f->tolerance, "max_new_tokens",
        (int)f->max_new_tokens, "n_kv_heads", (int)f->n_kv_heads, "head_dim", (int)f->head_dim,
        "rows", (int)d->n, "high_score", t.high_score, "class_at",
        numbers(f->class_at, f->n_candidates + 1), "labels", splits));
}

static enum status print_classifier(const struct classifier *c, const char *path, bool as_json)
{
    const struct classifier_shape *s = &c->shape;
    bool kv = s->kind == CLASSIFIER_KV;
    char digest[DIGEST_TEXT];
    classifier_digest(c, digest);
    if (as_json) {
        return print(json_pack(
            "{s:s, s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:o}", "path",
            path, "kind", kv ? "classifier (kv)" : "classifier (step)", "digest", digest,
            "model_digest", c->facts.model_digest, "high", c->facts.high, "low", c->facts.low,
            "n_kv_heads", (int)s->n_kv_heads, "head_dim", (int)s->head_dim, "n_groups",
            (int)s->n_groups, "n_queries", (int)s->n_queries, "n_in", (int)s->n_in, "n_hidden",
            (int)s->n_hidden, "n_classes", (int)s->n_classes, "training", c->training, "class_at",
            numbers(c->facts.class_at, s->n_classes)));
    }
    printf("%s\n  kind       classifier of %s\n  model      %s\n  levels     %s, then %s\n", path,
           kv ? "K and V after prefill (learned)" : "the steps' signals (step-learned)",
           c->facts.model_digest[0] ? c->facts.model_digest : "any", c->facts.high, c->facts.low);
    if (kv) {
        printf("  features   K and V %d x %d, %d vectors of %d queries each\n", s->n_kv_heads,
               s->head_dim, s->n_groups, s->n_queries);
    }
    printf("  network    %d in, %d hidden, %d classes, %zu parameters\n  classes   ", s->n_in,
           s->n_hidden, s->n_classes, c->n_params);
    for (int32_t i = 0; i < s->n_classes; i++) {
        printf(" %.4g", c->facts.class_at[i]);
    }
    printf("\n  digest     %s\n  training   %.2000s\n", digest, c->training);
    return ST_OK;
}

enum status inspect_learn(const char *path, bool as_json, bool *known)
{
    char format[64];
    enum status st = ST_OK;
    TRY(h5_format(format, sizeof format, path));
    bool dataset = strcmp(format, DATASET_FORMAT) == 0;
    *known = dataset || strcmp(format, CLASSIFIER_FORMAT) == 0;
    if (dataset) {
        struct dataset d;
        TRY(dataset_read(&d, path));
        st = print_dataset(&d, path, as_json);
        dataset_free(&d);
    } else if (*known) {
        struct classifier c;
        TRY(classifier_read(&c, path));
        st = print_classifier(&c, path, as_json);
        classifier_free(&c);
    }
    return st;
}
