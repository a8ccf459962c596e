/* SPDX-License-Identifier: Apache-2.0 */
#include "sched/search.h"

#include <math.h>
#include <stdlib.h>

#include "core/h5.h"
#include "core/sampler.h"

int32_t search_n_rungs(int32_t n, int32_t max_epochs)
{
    int32_t rungs = 1;
    while (n >= SEARCH_FACTOR && max_epochs >= SEARCH_FACTOR) {
        n /= SEARCH_FACTOR;
        max_epochs /= SEARCH_FACTOR;
        rungs++;
    }
    return rungs;
}

int32_t search_epochs(int32_t rung, int32_t n_rungs, int32_t max_epochs)
{
    for (int32_t r = n_rungs - 1; r > rung; r--) {
        max_epochs /= SEARCH_FACTOR;
    }
    return max_epochs;
}

/* [0, 1) */
static double uniform(uint64_t seed, int32_t number, uint32_t which)
{
    uint32_t out[4];
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t counter[4] = {(uint32_t)number, which, 0x5EA7C4, 0};
    philox4x32(out, counter, key);
    return (double)out[0] / 4294967296.0;
}

static double log_uniform(double u, double least, double most)
{
    return least * pow(most / least, u);
}

void search_sample(struct trial *out, int32_t number, uint64_t seed, enum classifier_kind kind,
                   int32_t head_dim, int32_t n_in, int32_t max_epochs_of_rung)
{
    static const int32_t batches[] = {8, 16, 32, 64}, heads[] = {1, 2, 4, 8};
    static const double widths[] = {0.5, 1, 2};
    double u[8];
    for (uint32_t i = 0; i < 8; i++) {
        u[i] = uniform(seed, number, i);
    }
    *out = (struct trial){.number = number,
                          .n_groups = heads[(int)(u[0] * 4)],
                          .n_queries = heads[(int)(u[1] * 4)],
                          .batch = batches[(int)(u[2] * 4)],
                          .max_epochs = max_epochs_of_rung,
                          .learning_rate = log_uniform(u[3], 1e-4, 1e-2),
                          .weight_decay = log_uniform(u[4], 1e-3, 0.3),
                          .dropout = 0.5 * u[5]};
    int32_t in = kind == CLASSIFIER_KV ? out->n_groups * head_dim : n_in;
    double width = in * widths[(int)(u[6] * 3)];
    out->n_hidden = width < 4                      ? 4
                    : width > CLASSIFIER_MAX_WIDTH ? CLASSIFIER_MAX_WIDTH
                                                   : (int32_t)width;
}

static int compare(const void *a, const void *b)
{
    const struct trial *x = a, *y = b;
    return x->loss < y->loss       ? -1
           : x->loss > y->loss     ? 1
           : x->number < y->number ? -1
                                   : x->number > y->number;
}

int32_t search_rank(struct trial *trials, int32_t n)
{
    qsort(trials, (size_t)n, sizeof *trials, compare);
    return n < SEARCH_FACTOR ? 1 : n / SEARCH_FACTOR;
}

struct classifier_shape search_shape(const struct trial *t, enum classifier_kind kind,
                                     int32_t n_kv_heads, int32_t head_dim, int32_t n_in,
                                     int32_t n_classes)
{
    if (kind == CLASSIFIER_STEP) {
        return (struct classifier_shape){
            .kind = kind, .n_in = n_in, .n_hidden = t->n_hidden, .n_classes = n_classes};
    }
    int32_t groups = n_kv_heads > 1 ? n_kv_heads : t->n_groups;
    return (struct classifier_shape){.kind = kind,
                                     .head_dim = head_dim,
                                     .n_kv_heads = n_kv_heads,
                                     .n_groups = groups,
                                     .n_queries = t->n_queries,
                                     .n_in = groups * head_dim,
                                     .n_hidden = t->n_hidden,
                                     .n_classes = n_classes};
}

struct train_options search_options(const struct trial *t, const struct train_options *base)
{
    struct train_options o = *base;
    o.learning_rate = t->learning_rate;
    o.weight_decay = t->weight_decay;
    o.dropout = t->dropout;
    o.batch = t->batch;
    o.max_epochs = t->max_epochs;
    return o;
}

enum status search_write(const char *path, const struct trial *trials, int32_t n, const char *about)
{
#define COLUMN(name, kind, unit, about)                           \
    {                                                             \
#name, kind, offsetof(struct trial, name), 0, unit, about \
    }
    static const struct h5_column columns[] = {
        COLUMN(number, COL_I32, "1", "trial"),
        COLUMN(rung, COL_I32, "1", "round of the halving"),
        COLUMN(n_hidden, COL_I32, "1", "width of the MLP"),
        COLUMN(n_groups, COL_I32, "1", "pooled vectors; kv only"),
        COLUMN(n_queries, COL_I32, "1", "queries of each; kv only"),
        COLUMN(batch, COL_I32, "samples", "of an update"),
        COLUMN(max_epochs, COL_I32, "epochs", "of this rung"),
        COLUMN(learning_rate, COL_F64, "1", "of AdamW"),
        COLUMN(weight_decay, COL_F64, "1", "of AdamW"),
        COLUMN(dropout, COL_F64, "1", "of hidden units"),
        COLUMN(n_epochs, COL_I32, "epochs", "trained"),
        COLUMN(best_epoch, COL_I32, "1", "whose parameters count"),
        COLUMN(loss, COL_F64, "nats", "of validation; infinite: it diverged"),
        COLUMN(accuracy, COL_F64, "1", "of validation"),
        COLUMN(seconds, COL_F64, "s", "of training"),
    };
#undef COLUMN
    hid_t file = H5I_INVALID_HID;
    struct h5_table t;
    h5_quiet();
    TRY(h5_create(&file, path));
    enum status st = h5_attribute(file, "format", "pmpd trials");
    st = st ? st : h5_scalar_text(file, "search", about, "how the trials were made");
    if (st == ST_OK) {
        st = h5_table_begin(&t, file, "trials", "one per training", columns,
                            (int)(sizeof columns / sizeof *columns), sizeof *trials, (uint64_t)n);
        for (int32_t i = 0; st == ST_OK && i < n; i++) {
            st = h5_table_put(&t, &trials[i]);
        }
        st = st ? st : h5_table_end(&t);
        h5_table_close(&t);
    }
    st = st ? st : h5_save(file, path);
    H5Fclose(file);
    return st;
}
