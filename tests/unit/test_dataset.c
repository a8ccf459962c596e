/* Datasets: packed rows, the HDF5 file, merging, labels, splits, samples of both kinds, and files
 * that lie. SPDX-License-Identifier: Apache-2.0
 */
#include <hdf5.h>

#include "core/h5.h"
#include "core/mem.h"
#include "sched/dataset.h"
#include "sched/step_window.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { D = 3, HEADS = 2, N = 40, T = 30 };

static struct dataset_facts facts_of(void)
{
    struct dataset_facts f = {.model_digest = "aa",
                              .reference_digest = "bb",
                              .high = "4",
                              .low = "2",
                              .reference = "max",
                              .criterion = "rouge-l",
                              .max_new_tokens = T,
                              .n_kv_heads = HEADS,
                              .head_dim = D,
                              .n_candidates = 3};
    for (int i = 0; i < 4; i++) {
        f.class_at[i] = i / 3.0;
    }
    return f;
}

static char *text(const char *what, int32_t i)
{
    char buf[64], *out = NULL;
    snprintf(buf, sizeof buf, "%s %d \xc3\xa9", what, i);
    CHECK_OK(mem_strdup(&out, buf));
    return out;
}

static struct dataset_row make_row(const struct dataset_facts *f, int32_t i)
{
    struct gen_rng rng = {(uint64_t)i};
    struct dataset_row r = {.key = {(uint64_t)i, 7},
                            .ordinal = i,
                            .prefix = i % 3,
                            .n_tok = 1 + i % 5,
                            .n_new = 1 + i % T,
                            .high_score = 0.5f};
    r.prompt = text("prompt", i);
    r.prompt_hash = dataset_prompt_hash(r.prompt);
    r.id = text("id", i);
    r.task = text("", i);
    r.reference = text("reference", i);
    r.high = text("high", i);
    for (int32_t j = 0; j < f->n_candidates; j++) {
        r.candidate[j] = text("candidate", j);
        r.scores[j] = (float)gen_uniform(&rng);
    }
    r.label = dataset_label(f, r.scores, r.high_score);
    CHECK_OK(MEM_NEW(&r.features, 2 * HEADS * r.n_tok * D));
    CHECK_OK(MEM_NEW(&r.signals, r.n_new * DATASET_N_SIGNALS));
    for (int32_t j = 0; j < 2 * HEADS * r.n_tok * D; j++) {
        r.features[j] = (float)gen_normal(&rng);
    }
    for (int32_t j = 0; j < r.n_new * DATASET_N_SIGNALS; j++) {
        r.signals[j] = (float)gen_normal(&rng);
    }
    return r;
}

static void make(struct dataset *d, int32_t first, int32_t n)
{
    *d = (struct dataset){.facts = facts_of()};
    CHECK_OK(mem_strdup(&d->provenance, "made by hand"));
    for (int32_t i = first; i < first + n; i++) {
        struct dataset_row r = make_row(&d->facts, i);
        CHECK_OK(dataset_add(d, &r));
    }
}

static void check_same_row(const struct dataset_row *a, const struct dataset_row *b)
{
    CHECK(memcmp(a->key, b->key, sizeof a->key) == 0 && a->prompt_hash == b->prompt_hash);
    CHECK(a->ordinal == b->ordinal && a->prefix == b->prefix && a->label == b->label);
    CHECK(a->n_tok == b->n_tok && a->n_new == b->n_new && a->high_score == b->high_score);
    CHECK(memcmp(a->scores, b->scores, sizeof a->scores) == 0);
    CHECK(!strcmp(a->id, b->id) && !strcmp(a->task, b->task) && !strcmp(a->prompt, b->prompt));
    CHECK(!strcmp(a->reference, b->reference) && !strcmp(a->high, b->high));
    for (int i = 0; i < 3; i++) {
        CHECK(!strcmp(a->candidate[i], b->candidate[i]));
    }
    CHECK(memcmp(a->features, b->features, 2 * HEADS * (size_t)a->n_tok * D * sizeof(float)) == 0);
    CHECK(memcmp(a->signals, b->signals, 3 * (size_t)a->n_new * sizeof(float)) == 0);
}

static void test_packed(void)
{
    struct dataset_facts f = facts_of();
    struct dataset_row r = make_row(&f, 17), back;
    void *buf = NULL;
    size_t bytes = 0;
    CHECK_OK(dataset_row_pack(&r, &f, &buf, &bytes));
    CHECK_OK(dataset_row_unpack(&back, &f, buf, bytes));
    check_same_row(&r, &back);
    dataset_row_free(&back);
    for (size_t n = 0; n < bytes; n++) {
        CHECK(dataset_row_unpack(&back, &f, buf, n) == ST_FORMAT);
    }
    f.n_candidates = 2;
    CHECK_STATUS(dataset_row_unpack(&back, &f, buf, bytes), ST_FORMAT, "contradicts its dataset");
    mem_free(buf);
    dataset_row_free(&r);
}

static void test_labels(void)
{
    struct dataset_facts f = facts_of();
    CHECK(dataset_switch_step(&f, 0) == 0 && dataset_switch_step(&f, 1) == 10 &&
          dataset_switch_step(&f, 2) == 20 && dataset_switch_step(&f, 3) == 30);
    CHECK(dataset_label(&f, (const float[]){0.1f, 0.6f, 0.9f}, 0.5f) == 1);
    CHECK(dataset_label(&f, (const float[]){0.1f, 0.2f, 0.3f}, 0.5f) == 3);
    /* three digits: 0.4996 is as good as 0.5, 0.4994 is not */
    CHECK(dataset_label(&f, (const float[]){0.4994f, 0.4996f, 1}, 0.5f) == 1);
    f.tolerance = 0.1;
    CHECK(dataset_label(&f, (const float[]){0.39f, 0.4f, 1}, 0.5f) == 1);
    int32_t count[SPLIT_N] = {0};
    for (int32_t i = 0; i < 10000; i++) {
        char buf[32];
        snprintf(buf, sizeof buf, "prompt %d", i);
        count[dataset_split_of(dataset_prompt_hash(buf))]++;
    }
    CHECK_NEAR(count[0], 7000, 200);
    CHECK_NEAR(count[1], 1500, 150);
    CHECK_NEAR(count[2], 1500, 150);
}

static void test_file(const char *folder)
{
    struct dataset d, back, more;
    char path[GEN_PATH_BYTES];
    int32_t n_twice = -1;
    gen_path(path, folder, "d.h5");
    make(&d, 0, N);
    CHECK_OK(dataset_write(&d, path));
    CHECK_OK(dataset_read(&back, path));
    CHECK(back.n == N && memcmp(&back.facts, &d.facts, sizeof d.facts) == 0);
    CHECK(strcmp(back.provenance, "made by hand") == 0);
    for (int32_t i = 0; i < N && back.n == N; i++) {
        check_same_row(&d.rows[i], &back.rows[i]);
    }
    make(&more, N - 5, 12);
    CHECK_OK(dataset_merge(&back, &more, "more.h5", &n_twice));
    CHECK(n_twice == 5 && back.n == N + 7 && more.n == 0);
    make(&more, 100, 1);
    strcpy(more.facts.model_digest, "cc");
    CHECK_STATUS(dataset_merge(&back, &more, "more.h5", &n_twice), ST_USER,
                 "more.h5 was made with the model cc, the ones before it with aa");
    more.facts = back.facts;
    more.facts.class_at[1] = 0.25;
    CHECK_STATUS(dataset_merge(&back, &more, "more.h5", &n_twice), ST_USER, "other candidates");
    dataset_free(&more);
    dataset_free(&back);
    d.rows[3].features[0] = NAN;
    CHECK_OK(dataset_write(&d, path));
    CHECK_STATUS(dataset_read(&back, path), ST_FORMAT, "kv_features/values holds values that");
    d.rows[3].features[0] = 0;
    d.rows[3].label = 4;
    CHECK_OK(dataset_write(&d, path));
    CHECK_STATUS(dataset_read(&back, path), ST_FORMAT, "row 3 has class 4");
    dataset_free(&d);
    make(&d, 0, 0);
    CHECK_OK(dataset_write(&d, path));
    CHECK_OK(dataset_read(&back, path));
    CHECK(back.n == 0);
    dataset_free(&back);
    dataset_free(&d);
    hid_t file;
    CHECK_OK(h5_create(&file, path));
    CHECK_OK(h5_save(file, path));
    H5Fclose(file);
    CHECK_STATUS(dataset_read(&back, path), ST_FORMAT, "not a dataset");
}

static void test_samples(void)
{
    struct dataset d;
    struct dataset_samples s;
    int32_t n = 0, n_steps = 0;
    make(&d, 0, N);
    for (int split = 0; split < SPLIT_N; split++) {
        CHECK_OK(dataset_samples(&s, &d, (enum dataset_split)split, CLASSIFIER_KV));
        n += s.n;
        dataset_samples_free(&s);
    }
    CHECK(n == N);
    for (int32_t i = 0; i < N; i++) { /* candidates before the last token: steps 0, 10, 20 */
        int32_t steps = d.rows[i].n_new - 1;
        n_steps += (steps > 0) + (steps > 10) + (steps > 20);
    }
    n = 0;
    for (int split = 0; split < SPLIT_N; split++) {
        CHECK_OK(dataset_samples(&s, &d, (enum dataset_split)split, CLASSIFIER_STEP));
        n += s.n;
        dataset_samples_free(&s);
    }
    CHECK(n == n_steps);
    for (int32_t i = 0; i < N; i++) { /* one row: the vector by hand */
        struct dataset_row *r = &d.rows[i];
        if (dataset_split_of(r->prompt_hash) == SPLIT_TRAIN && r->n_new > 12) {
            CHECK_OK(dataset_samples(&s, &(struct dataset){.facts = d.facts, .n = 1, .rows = r},
                                     SPLIT_TRAIN, CLASSIFIER_STEP));
            struct step_window w;
            float v[STEP_WINDOW_N];
            step_window_clear(&w);
            for (int t = 0; t <= 10; t++) {
                step_window_add(&w, r->signals[3 * t], r->signals[3 * t + 1],
                                r->signals[3 * t + 2]);
            }
            step_window_vector(&w, 10, T, v);
            CHECK(s.n >= 2 && memcmp(s.sample[1].features, v, sizeof v) == 0);
            CHECK(s.sample[1].label == (r->scores[1] > 0.4995f));
            dataset_samples_free(&s);
        }
    }
    dataset_free(&d);
}

int main(void)
{
    char folder[GEN_PATH_BYTES];
    h5_quiet();
    gen_folder(folder);
    test_packed();
    test_labels();
    test_file(folder);
    test_samples();
    gen_remove(folder);
    return check_report();
}
