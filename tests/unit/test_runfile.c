/* The run file and answers.jsonl from records made by hand: every number read back by HDF5's own
 * calls and compared with what was worked out on paper; attributes on every dataset; failures that
 * leave nothing behind. The file stays as test_runfile.h5 for looking at.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <dirent.h>
#include <hdf5.h>
#include <signal.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/mem.h"
#include "core/metrics.h"
#include "core/replace.h"
#include "core/runfile.h"
#include "tests/check.h"

/* ---- a run of four prompts: 0 and 2 finished, 1 failed, 3 not yet done ---- */

static struct prompt prompt[4] = {
    {.id = "q-0", .task = "story", .split = "test", .reference = "", .n_turns = 2},
    {.id = "q-\xc3\xa9", .task = "", .split = "test", .reference = "", .n_turns = 1},
    {.id = "17", .task = "summary", .split = "validation", .reference = "", .n_turns = 1},
    {.id = "q-3", .task = "story", .split = "test", .reference = "", .n_turns = 1}};
static struct prompts prompts = {
    .n = 4, .prompt = prompt, .digest = "00112233445566778899aabbccddeeff"};

static struct turn_record turns0[2] = {{.n_prompt_tok = 10,
                                        .n_new_tok = 4,
                                        .finish = FINISH_LENGTH,
                                        .prefill_level = 0,
                                        .token0 = 100,
                                        .logprob0 = -1.0f,
                                        .entropy0 = 0.5f,
                                        .margin0 = 2.5f,
                                        .n_steps = 3,
                                        .n_switches = 2,
                                        .prefill_s = 0.25f,
                                        .decode_s = 0.5f},
                                       {.n_prompt_tok = 2,
                                        .n_new_tok = 2,
                                        .finish = FINISH_EOS,
                                        .prefill_level = 2,
                                        .token0 = 200,
                                        .logprob0 = -2.0f,
                                        .entropy0 = 0.25f,
                                        .margin0 = 1.5f,
                                        .n_steps = 1,
                                        .n_switches = 1,
                                        .prefill_s = 0.125f,
                                        .decode_s = 0.25f}};
static struct step_record steps0[4] = {
    {0, 0, 0, 101, -0.5f, 1.0f, 0.5f, 1, 0.5f, 2, 1, 2, 3, 4},
    {0, 1, 0, 102, -0.25f, 1.0f, 0.5f, 2, 0.25f, 0.125f, 1, 2, 3, 4},
    {0, 2, 1, 103, -0.25f, 1.0f, 0.5f, 3, 0.75f, 2, 1, 2, 3, 4},
    {1, 0, 2, 201, -1.0f, 1.0f, 0.5f, 5, 1.0f, 2, 1, 2, 3, 4}};
static struct plan_switch switches0[3] = {{0, 0}, {2, 1}, {0, 2}};
static struct pass_record passes0[3] = { // not in order: they are sorted when written
    {.pass = 2,
     .kind = PASS_DECODE,
     .n_slots = 1,
     .n_tok = 1,
     .max_bits = 4,
     .time_us = 250000.0f,
     .comm_us = 8.0f,
     .weight_bytes = 1000,
     .kv_bytes = 10},
    {.pass = 0,
     .kind = PASS_PREFILL,
     .n_slots = 1,
     .n_tok = 10,
     .n_gathered = 3,
     .max_bits = 4,
     .time_us = 500000.0f,
     .comm_us = 9.0f,
     .weight_bytes = 4000,
     .kv_bytes = 40},
    {.pass = 1,
     .kind = PASS_DECODE,
     .n_slots = 1,
     .n_tok = 1,
     .max_bits = 4,
     .time_us = 250000.0f,
     .comm_us = 8.0f,
     .weight_bytes = 1000,
     .kv_bytes = 10}};
static float features0[2 * 2 * 3] = {1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6};

static struct turn_record turns2[1] = {{.n_prompt_tok = 6,
                                        .n_new_tok = 3,
                                        .finish = FINISH_LENGTH,
                                        .prefill_level = 0,
                                        .token0 = 300,
                                        .logprob0 = -1.0f,
                                        .entropy0 = 0.5f,
                                        .margin0 = 2.0f,
                                        .n_steps = 2,
                                        .n_switches = 1,
                                        .prefill_s = 0.5f,
                                        .decode_s = 1.0f}};
static struct step_record steps2[2] = {{0, 0, 1, 301, -0.5f, 1.0f, 0.5f, 1, 0.5f, 2, 1, 2, 3, 4},
                                       {0, 1, 1, 302, -0.5f, 1.0f, 0.5f, 2, 0.5f, 2, 1, 2, 3, 4}};
static struct plan_switch switches2[1] = {{0, 1}};
static struct pass_record passes2[3] = {{.pass = 1,
                                         .kind = PASS_DECODE,
                                         .n_slots = 1,
                                         .n_tok = 1,
                                         .max_bits = 2,
                                         .time_us = 100000.0f,
                                         .comm_us = 1.0f,
                                         .weight_bytes = 500,
                                         .kv_bytes = 20},
                                        {.pass = 2,
                                         .kind = PASS_DECODE,
                                         .n_slots = 1,
                                         .n_tok = 1,
                                         .max_bits = 2,
                                         .time_us = 100000.0f,
                                         .comm_us = 1.0f,
                                         .weight_bytes = 500,
                                         .kv_bytes = 20},
                                        {.pass = 1,
                                         .kind = PASS_DECODE,
                                         .n_slots = 1,
                                         .n_tok = 1,
                                         .max_bits = 2,
                                         .time_us = 100000.0f,
                                         .comm_us = 1.0f,
                                         .weight_bytes = 500,
                                         .kv_bytes = 20}}; // the first again
static float features2[2 * 1 * 3] = {7, 8, 9, -7, -8, -9};

static struct finished_record finished[2] = {{.ordinal = 0,
                                              .key = {0x0123456789abcdefu, 0xfu},
                                              .attempt = 1,
                                              .epoch = 0,
                                              .replica = 0,
                                              .started_unix_s = 1000.5,
                                              .wall_s = 2.0,
                                              .n_turns = 2,
                                              .n_steps = 4,
                                              .n_switches = 3,
                                              .n_passes = 3,
                                              .n_feature_tok = 2,
                                              .feature_dim = 3,
                                              .turns = turns0,
                                              .steps = steps0,
                                              .switches = switches0,
                                              .passes = passes0,
                                              .features = features0},
                                             {.ordinal = 2,
                                              .key = {2, 3},
                                              .attempt = 2,
                                              .epoch = 0,
                                              .replica = 1,
                                              .started_unix_s = 2000,
                                              .wall_s = 1.5,
                                              .n_turns = 1,
                                              .n_steps = 2,
                                              .n_switches = 1,
                                              .n_passes = 3,
                                              .n_feature_tok = 1,
                                              .feature_dim = 3,
                                              .turns = turns2,
                                              .steps = steps2,
                                              .switches = switches2,
                                              .passes = passes2,
                                              .features = features2}};
static struct failed_prompt failed[1] = {{.ordinal = 1, .attempts = 2, .reason = "out of memory"}};
static struct run_fact facts[2] = {{"git_revision", "abc123"}, {"seed", "0"}};
static struct level_table levels;

static struct run_contents sample(void)
{
    memset(&levels, 0, sizeof levels);
    levels.n = 3;
    strcpy(levels.level[0].text, "4");
    levels.level[0].avg_bits = 4;
    levels.level[0].head_avg_bits = 16;
    levels.level[0].max_bits = 4;
    strcpy(levels.level[1].text, "2");
    levels.level[1].avg_bits = 2;
    levels.level[1].head_avg_bits = 16;
    levels.level[1].max_bits = 2;
    strcpy(levels.level[2].text, "3,0.down_proj=4");
    levels.level[2].avg_bits = 3.5f;
    levels.level[2].head_avg_bits = 16;
    levels.level[2].max_bits = 4;
    return (struct run_contents){.prompts = &prompts,
                                 .levels = &levels,
                                 .model_id = "tiny",
                                 .n_finished = 2,
                                 .finished = finished,
                                 .n_failed = 1,
                                 .failed = failed,
                                 .n_facts = 2,
                                 .facts = facts,
                                 .config_text = "decode:\n{\n    slots = 1;\n};\n"};
}

/* ---- reading by HDF5's own calls ---- */

static int64_t n_rows(hid_t file, const char *name)
{
    hid_t set = H5Dopen2(file, name, H5P_DEFAULT), space = H5Dget_space(set);
    int64_t n = H5Sget_simple_extent_npoints(space);
    H5Sclose(space);
    H5Dclose(set);
    return n;
}

/* One numeric column of a table as doubles. */
static bool column(hid_t file, const char *table, const char *field, double *out, int64_t n)
{
    if (!CHECK(n_rows(file, table) == n)) {
        return false;
    }
    hid_t set = H5Dopen2(file, table, H5P_DEFAULT);
    hid_t type = H5Tcreate(H5T_COMPOUND, sizeof(double));
    H5Tinsert(type, field, 0, H5T_NATIVE_DOUBLE);
    bool good = H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, out) >= 0;
    H5Tclose(type);
    H5Dclose(set);
    return CHECK(good);
}

#define COLUMN(table, field, ...)                             \
    do {                                                      \
        static const double expected_[] = {__VA_ARGS__};      \
        enum { N_ = sizeof expected_ / sizeof expected_[0] }; \
        double found_[N_];                                    \
        if (column(file, table, field, found_, N_)) {         \
            for (int i_ = 0; i_ < N_; i_++) {                 \
                CHECK_NEAR(found_[i_], expected_[i_], 0);     \
            }                                                 \
        }                                                     \
    } while (0)

/* One text column; row i must be expected[i]. */
static void check_texts(hid_t file, const char *table, const char *field, const char **expected,
                        int64_t n)
{
    char *texts[8] = {NULL};
    if (!CHECK(n <= 8 && n_rows(file, table) == n)) {
        return;
    }
    hid_t set = H5Dopen2(file, table, H5P_DEFAULT), text = H5Tcopy(H5T_C_S1);
    H5Tset_size(text, H5T_VARIABLE);
    H5Tset_cset(text, H5T_CSET_UTF8);
    hid_t type = H5Tcreate(H5T_COMPOUND, sizeof(char *));
    H5Tinsert(type, field, 0, text);
    CHECK(H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, texts) >= 0);
    for (int64_t i = 0; i < n; i++) {
        CHECK(texts[i] && strcmp(texts[i], expected[i]) == 0);
        H5free_memory(texts[i]);
    }
    H5Tclose(type);
    H5Tclose(text);
    H5Dclose(set);
}

static double scalar(hid_t file, const char *name)
{
    double x = -1e300;
    hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    CHECK(H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, &x) >= 0);
    H5Dclose(set);
    return x;
}

static void test_tables(const char *path)
{
    hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    if (!CHECK(file >= 0)) {
        return;
    }
    COLUMN("prompts", "prompt", 0, 0, 2);
    COLUMN("prompts", "turn", 0, 1, 0);
    COLUMN("prompts", "n_prompt_tok", 10, 2, 6);
    COLUMN("prompts", "n_new_tok", 4, 2, 3);
    COLUMN("prompts", "finish", 1, 0, 1);
    COLUMN("prompts", "prefill_level", 0, 2, 0);
    COLUMN("prompts", "prefill_avg_bits", 4, 3.5, 4);
    COLUMN("prompts", "token0", 100, 200, 300);
    COLUMN("prompts", "logprob0", -1, -2, -1);
    COLUMN("prompts", "entropy0", 0.5, 0.25, 0.5);
    COLUMN("prompts", "margin0", 2.5, 1.5, 2);
    COLUMN("prompts", "prefill_s", 0.25, 0.125, 0.5);
    COLUMN("prompts", "decode_s", 0.5, 0.25, 1);
    COLUMN("prompts", "attempt", 1, 1, 2);
    COLUMN("prompts", "replica", 0, 0, 1);
    COLUMN("prompts", "started_unix_s", 1000.5, 1000.5, 2000);
    check_texts(file, "prompts", "id", (const char *[]){"q-0", "q-0", "17"}, 3);
    check_texts(file, "prompts", "task", (const char *[]){"story", "story", "summary"}, 3);
    check_texts(file, "prompts", "split", (const char *[]){"test", "test", "validation"}, 3);

    COLUMN("steps", "prompt", 0, 0, 0, 0, 2, 2);
    COLUMN("steps", "turn", 0, 0, 0, 1, 0, 0);
    COLUMN("steps", "step", 0, 1, 2, 0, 0, 1);
    COLUMN("steps", "level", 0, 0, 1, 2, 1, 1);
    COLUMN("steps", "avg_bits", 4, 4, 2, 3.5, 2, 2);
    COLUMN("steps", "token", 101, 102, 103, 201, 301, 302);
    COLUMN("steps", "logprob", -0.5, -0.25, -0.25, -1, -0.5, -0.5);
    COLUMN("steps", "max_prob", 0.5, 0.25, 0.75, 1, 0.5, 0.5);
    COLUMN("steps", "probe_kl", 2, 0.125, 2, 2, 2, 2);
    COLUMN("steps", "hidden_mean", 1, 1, 1, 1, 1, 1);
    COLUMN("steps", "hidden_rms", 2, 2, 2, 2, 2, 2);
    COLUMN("steps", "k_norm", 3, 3, 3, 3, 3, 3);
    COLUMN("steps", "v_norm", 4, 4, 4, 4, 4, 4);
    // passes 1 and 2 of replica 0 are rows 1 and 2; 3 and 5 were lost; replica 1 has rows 3 and 4
    COLUMN("steps", "pass", 1, 2, -1, -1, 3, 4);

    COLUMN("passes", "replica", 0, 0, 0, 1, 1);
    COLUMN("passes", "pass", 0, 1, 2, 1, 2);
    COLUMN("passes", "kind", 0, 1, 1, 1, 1);
    COLUMN("passes", "n_tok", 10, 1, 1, 1, 1);
    COLUMN("passes", "n_gathered", 3, 0, 0, 0, 0);
    COLUMN("passes", "max_bits", 4, 4, 4, 2, 2);
    COLUMN("passes", "weight_bytes", 4000, 1000, 1000, 500, 500);
    COLUMN("passes", "kv_bytes", 40, 10, 10, 20, 20);
    COLUMN("passes", "time_us", 500000, 250000, 250000, 100000, 100000);
    COLUMN("passes", "comm_us", 9, 8, 8, 1, 1);

    COLUMN("plans", "prompt", 0, 0, 2);
    COLUMN("plans", "turn", 0, 1, 0);
    COLUMN("plans", "prefill_level", 0, 2, 0);
    COLUMN("plans", "first_switch", 0, 2, 3);
    COLUMN("plans", "n_switches", 2, 1, 1);
    COLUMN("plan_switches", "turn", 0, 0, 1, 0);
    COLUMN("plan_switches", "step", 0, 2, 0, 0);
    COLUMN("plan_switches", "level", 0, 1, 2, 1);
    CHECK(n_rows(file, "decisions") == 0);

    COLUMN("levels", "id", 0, 1, 2);
    COLUMN("levels", "avg_bits", 4, 2, 3.5);
    COLUMN("levels", "head_avg_bits", 16, 16, 16);
    COLUMN("levels", "max_bits", 4, 2, 4);
    check_texts(file, "levels", "text", (const char *[]){"4", "2", "3,0.down_proj=4"}, 3);
    COLUMN("failed", "prompt", 1);
    COLUMN("failed", "attempts", 2);
    check_texts(file, "failed", "reason", (const char *[]){"out of memory"}, 1);
    check_texts(file, "failed", "id", (const char *[]){"q-\xc3\xa9"}, 1);

    char key[3][32];
    hid_t set = H5Dopen2(file, "prompts", H5P_DEFAULT), chars = H5Tcopy(H5T_C_S1);
    H5Tset_size(chars, 32);
    H5Tset_strpad(chars, H5T_STR_NULLPAD);
    hid_t type = H5Tcreate(H5T_COMPOUND, 32);
    H5Tinsert(type, "key", 0, chars);
    CHECK(H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, key) >= 0);
    CHECK(memcmp(key[0], "0123456789abcdef000000000000000f", 32) == 0);
    CHECK(memcmp(key[2], "00000000000000020000000000000003", 32) == 0);
    H5Tclose(type);
    H5Tclose(chars);
    H5Dclose(set);

    // K and V of a token lie together: (3 tokens, 2, 3)
    static const float expected[18] = {1,  2,  3,  -1, -2, -3, 4,  5,  6,
                                       -4, -5, -6, 7,  8,  9,  -7, -8, -9};
    float values[18] = {0};
    int64_t offset[3] = {-1, -1, -1}, with[2] = {-1, -1};
    CHECK(n_rows(file, "kv_features/values") == 18 && n_rows(file, "kv_features/offset") == 3);
    set = H5Dopen2(file, "kv_features/values", H5P_DEFAULT);
    CHECK(H5Dread(set, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
    CHECK(memcmp(values, expected, sizeof values) == 0);
    H5Dclose(set);
    set = H5Dopen2(file, "kv_features/offset", H5P_DEFAULT);
    CHECK(H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, offset) >= 0);
    CHECK(offset[0] == 0 && offset[1] == 2 && offset[2] == 3);
    H5Dclose(set);
    set = H5Dopen2(file, "kv_features/prompt", H5P_DEFAULT);
    CHECK(H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, with) >= 0);
    CHECK(with[0] == 0 && with[1] == 2);
    H5Dclose(set);

    CHECK_NEAR(scalar(file, "metrics/n_prompts"), 4, 0);
    CHECK_NEAR(scalar(file, "metrics/n_steps"), 6, 0);
    CHECK_NEAR(scalar(file, "metrics/avg_decode_bits"), 17.5 / 6, 1e-12);
    H5Fclose(file);
}

/* By hand: bits 4+4+2+3.5+2+2 = 17.5 over 6 steps; prompt tokens 10 and 6 at 4 bits, 2 at 3.5;
 * log-probabilities -1-2-1 of first tokens and -3 of steps, over 9 tokens; replica 0: 4 steps in
 * 0.5 s, replica 1: 2 in 0.2 s; bytes (1010 * 2 + 520 * 2) / 6. */
static void test_metrics(void)
{
    struct run_contents run = sample();
    struct run_metrics m;
    run_metrics_compute(&m, &run);
    CHECK(m.n_prompts == 4 && m.n_finished == 2 && m.n_failed == 1);
    CHECK(m.n_prompt_tok == 18 && m.n_new_tok == 9 && m.n_steps == 6 && m.n_passes == 5);
    CHECK_NEAR(m.avg_decode_bits, 17.5 / 6, 1e-12);
    CHECK_NEAR(m.avg_prefill_bits, 71.0 / 18, 1e-12);
    CHECK_NEAR(m.mean_logprob, -7.0 / 9, 1e-12);
    CHECK_NEAR(m.decode_tok_s, 8 + 10, 1e-9);
    CHECK_NEAR(m.bytes_per_token, 510, 1e-9);
    CHECK_NEAR(m.decode_s, 0.7, 1e-9);
    CHECK_NEAR(m.prefill_s, 0.5, 1e-9);

    // the same work in two starts, one after the other: 4 steps in 0.5 s, then 2 in 0.2 s
    finished[1].epoch = 1;
    run_metrics_compute(&m, &run);
    CHECK_NEAR(m.decode_tok_s, 6 / 0.7, 1e-9);
    finished[1].epoch = 0;

    run.n_finished = 0;
    run_metrics_compute(&m, &run);
    CHECK(m.n_steps == 0);
    CHECK_NEAR(m.avg_decode_bits, 0, 0);
    CHECK_NEAR(m.decode_tok_s, 0, 0);
    CHECK_NEAR(m.mean_logprob, 0, 0);
}

/* ---- attributes ---- */

static bool has_text(hid_t object, const char *name, const char *part)
{
    if (H5Aexists(object, name) <= 0) {
        return false;
    }
    hid_t attribute = H5Aopen(object, name, H5P_DEFAULT), type = H5Aget_type(attribute);
    char *text = NULL;
    bool good = H5Tis_variable_str(type) > 0 && H5Tget_cset(type) == H5T_CSET_UTF8 &&
                H5Aread(attribute, type, &text) >= 0 && text && text[0] && strstr(text, part);
    H5free_memory(text);
    H5Tclose(type);
    H5Aclose(attribute);
    return good;
}

static herr_t visit(hid_t root, const char *name, const H5O_info_t *info, void *data)
{
    hid_t object = H5Oopen(root, name, H5P_DEFAULT);
    if (!check_that(has_text(object, "description", ""), __FILE__, __LINE__, "has a description")) {
        fprintf(stderr, "    %s\n", name);
    }
    CHECK(info->mtime == 0 && info->ctime == 0); // the same run gives the same bytes
    if (info->type == H5O_TYPE_DATASET) {
        ++*(int *)data;
        if (!check_that(has_text(object, "unit", ""), __FILE__, __LINE__, "has a unit")) {
            fprintf(stderr, "    %s\n", name);
        }
        hid_t type = H5Dget_type(object);
        if (H5Tget_class(type) == H5T_COMPOUND) {
            for (int i = 0; i < H5Tget_nmembers(type); i++) {
                char *field = H5Tget_member_name(type, (unsigned)i);
                if (!check_that(has_text(object, field, "[") && has_text(object, "unit", field),
                                __FILE__, __LINE__, "the column is explained")) {
                    fprintf(stderr, "    %s of %s\n", field, name);
                }
                H5free_memory(field);
            }
        }
        H5Tclose(type);
    }
    H5Oclose(object);
    return 0;
}

static void test_attributes(const char *path)
{
    hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    int n_sets = 0;
    CHECK(H5Ovisit2(file, H5_INDEX_NAME, H5_ITER_INC, visit, &n_sets,
                    H5O_INFO_BASIC | H5O_INFO_TIME) >= 0);
    CHECK(n_sets == 9 + 3 + 1 + 14); // tables, features, config, metrics
    CHECK(has_text(file, "format", "pmpd run"));
    hid_t group = H5Gopen2(file, "provenance", H5P_DEFAULT);
    CHECK(has_text(group, "git_revision", "abc123") && has_text(group, "seed", "0"));
    CHECK(has_text(group, "prompts_digest", "00112233445566778899aabbccddeeff"));
    H5Gclose(group);
    hid_t steps = H5Dopen2(file, "steps", H5P_DEFAULT);
    CHECK(has_text(steps, "logprob", "[nats]") && has_text(steps, "unit", "avg_bits: bits\n"));
    H5Dclose(steps);
    H5Fclose(file);
}

/* ---- whole files ---- */

static size_t read_file(const char *path, char **bytes)
{
    FILE *in = fopen(path, "rb");
    *bytes = NULL;
    if (!in) {
        return 0;
    }
    fseek(in, 0, SEEK_END);
    size_t n = (size_t)ftell(in);
    rewind(in);
    *bytes = calloc(n + 1, 1);
    CHECK(fread(*bytes, 1, n, in) == n);
    fclose(in);
    return n;
}

static bool leftovers(const char *folder)
{
    DIR *d = opendir(folder);
    bool found = false;
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        found |= strstr(e->d_name, ".tmp.") != NULL;
    }
    if (d) {
        closedir(d);
    }
    return found;
}

/* What killed writers left goes, and nothing else. */
static void test_sweep(const char *folder)
{
    static const char *const names[] = {"a.h5.tmp.1", "a.h5.tmp.77", "a.h5",
                                        "b.h5.tmp.1", "a.h5.tmp",    "ba.h5.tmp.1"};
    char path[300];
    for (int i = 0; i < 6; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        FILE *f = fopen(path, "w");
        CHECK(f != NULL && fclose(f) == 0);
    }
    snprintf(path, sizeof path, "%s/a.h5", folder);
    replace_sweep(path);
    for (int i = 0; i < 6; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        CHECK((unlink(path) == 0) == (i >= 2));
    }
    CHECK(chdir(folder) == 0); /* a path without a folder */
    FILE *f = fopen("a.h5.tmp.1", "w");
    CHECK(f != NULL && fclose(f) == 0);
    replace_sweep("a.h5");
    CHECK(unlink("a.h5.tmp.1") != 0 && chdir("..") == 0);
    replace_sweep("no/such/folder/a.h5");
}

static void test_same_bytes(const char *path, const char *folder)
{
    struct run_contents run = sample();
    char other[300], *a = NULL, *b = NULL;
    snprintf(other, sizeof other, "%s/again.h5", folder);
    CHECK_OK(runfile_write(other, &run));
    size_t n = read_file(path, &a);
    CHECK(n > 0 && read_file(other, &b) == n && memcmp(a, b, n) == 0);
    free(a);
    free(b);
    // what stands there is replaced, here by a smaller run
    run.n_finished = 0;
    run.n_failed = 0;
    CHECK_OK(runfile_write(other, &run));
    hid_t file = H5Fopen(other, H5F_ACC_RDONLY, H5P_DEFAULT);
    CHECK(n_rows(file, "steps") == 0 && n_rows(file, "prompts") == 0 &&
          n_rows(file, "levels") == 3);
    CHECK(H5Lexists(file, "kv_features", H5P_DEFAULT) == 0);
    H5Fclose(file);
    CHECK(unlink(other) == 0 && !leftovers(folder));
}

/* One prompt of 40000 steps: chunked, compressed, all rows there. */
static void test_large(const char *folder)
{
    enum { N = 40000 };
    struct run_contents run = sample();
    struct step_record *steps = calloc(N, sizeof *steps);
    float *features = calloc((size_t)2 * N * 3, sizeof *features);
    double *found = calloc(N, sizeof *found);
    for (int i = 0; i < N; i++) {
        steps[i] =
            (struct step_record){0, i, i % 3, i * 7, -0.5f, 1, 1, (uint32_t)i, 1, 0, 0, 0, 0, 0};
        features[i * 3] = (float)i;
        features[(N + i) * 3 + 2] = (float)-i;
    }
    struct turn_record turn = turns2[0];
    turn.n_steps = N;
    struct finished_record r = finished[1];
    r.turns = &turn;
    r.steps = steps;
    r.n_steps = N;
    r.n_feature_tok = N;
    r.features = features;
    run.finished = &r;
    run.n_finished = 1;
    char path[300];
    snprintf(path, sizeof path, "%s/large.h5", folder);
    CHECK_OK(runfile_write(path, &run));
    hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    CHECK(column(file, "steps", "token", found, N));
    bool all = true;
    for (int i = 0; i < N; i++) {
        all = all && lrint(found[i]) == i * 7;
    }
    CHECK(all);
    static const char *const chunked[] = {"steps", "kv_features/values"};
    for (int i = 0; i < 2; i++) {
        hid_t set = H5Dopen2(file, chunked[i], H5P_DEFAULT), create = H5Dget_create_plist(set);
        CHECK(H5Pget_layout(create) == H5D_CHUNKED && H5Pget_nfilters(create) == 2);
        H5Pclose(create);
        H5Dclose(set);
    }
    float(*values)[2][3] = calloc(N, sizeof *values);
    hid_t set = H5Dopen2(file, "kv_features/values", H5P_DEFAULT);
    CHECK(H5Dread(set, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
    H5Dclose(set);
    all = true;
    for (int i = 0; i < N; i++) {
        all = all && lrintf(values[i][0][0]) == i && lrintf(values[i][1][2]) == -i &&
              lrintf(values[i][0][2]) == 0;
    }
    CHECK(all);
    H5Fclose(file);
    struct stat info;
    CHECK(stat(path, &info) == 0 && info.st_size < N * 20); // uncompressed: 44 and 24 bytes a row
    CHECK(unlink(path) == 0);
    free(values);
    free(found);
    free(features);
    free(steps);
}

/* ---- failures ---- */

static void test_bad_contents(const char *folder)
{
    char path[300];
    snprintf(path, sizeof path, "%s/bad.h5", folder);
    struct run_contents run = sample();
    steps2[1].level = 3;
    CHECK_STATUS(runfile_write(path, &run), ST_FORMAT, "prompt 2 names level 3; the run has 3");
    CHECK_STATUS(answers_write(path, &run), ST_FORMAT, "prompt 2 names level 3; the run has 3");
    steps2[1].level = 1;
    turns2[0].prefill_level = -1;
    CHECK_STATUS(runfile_write(path, &run), ST_FORMAT, "names level -1");
    turns2[0].prefill_level = 0;
    switches2[0].level = 99;
    CHECK_STATUS(runfile_write(path, &run), ST_FORMAT, "names level 99");
    switches2[0].level = 1;
    finished[1].ordinal = 4;
    CHECK_STATUS(runfile_write(path, &run), ST_FORMAT, "prompt 4; the prompt file has 4 prompts");
    finished[1].ordinal = 0;
    CHECK_STATUS(runfile_write(path, &run), ST_FORMAT, "expected one record of each prompt");
    finished[1].ordinal = 2;
    finished[1].feature_dim = 2;
    CHECK_STATUS(runfile_write(path, &run), ST_FORMAT,
                 "KV features of width 2; those before have 3");
    finished[1].feature_dim = 3;
    failed[0].ordinal = -1;
    CHECK_STATUS(runfile_write(path, &run), ST_FORMAT, "failed prompt -1");
    failed[0].ordinal = 1;
    facts[1].key = "git_revision"; // twice: an HDF5 error in the middle of the file
    CHECK_STATUS(runfile_write(path, &run), ST_HDF5, "git_revision: HDF5: ");
    CHECK(strstr(status_message(), path) != NULL);
    facts[1].key = "seed";
    CHECK(access(path, F_OK) != 0 && !leftovers(folder));
}

static void test_unwritable(const char *folder)
{
    struct run_contents run = sample();
    char path[300];
    snprintf(path, sizeof path, "%s/missing/run.h5", folder);
    CHECK_STATUS(runfile_write(path, &run), ST_IO, "No such file or directory");
    CHECK(strstr(status_message(), path) != NULL);
    CHECK_STATUS(answers_write(path, &run), ST_IO, "No such file or directory");
    snprintf(path, sizeof path, "%s/taken", folder); // a folder stands where the file should be
    CHECK(mkdir(path, 0777) == 0);
    CHECK_STATUS(runfile_write(path, &run), ST_IO, "cannot rename");
    CHECK_STATUS(answers_write(path, &run), ST_IO, "cannot rename");
    CHECK(rmdir(path) == 0 && !leftovers(folder));
    snprintf(path, sizeof path, "%s/closed", folder);
    CHECK(mkdir(path, 0555) == 0);
    if (geteuid() != 0) { // root writes everywhere
        char inside[320];
        snprintf(inside, sizeof inside, "%s/run.h5", path);
        CHECK_STATUS(runfile_write(inside, &run), ST_IO, "Permission denied");
        CHECK_STATUS(answers_write(inside, &run), ST_IO, "Permission denied");
    }
    CHECK(rmdir(path) == 0);
}

/* A disk that takes only so many bytes, by the limit on the size of a file. The older file stays.
 */
static void test_disk_full(const char *folder)
{
    struct run_contents run = sample();
    char path[300], lines[300], *before = NULL, *after = NULL;
    snprintf(path, sizeof path, "%s/run.h5", folder);
    snprintf(lines, sizeof lines, "%s/answers.jsonl", folder);
    CHECK_OK(runfile_write(path, &run));
    CHECK_OK(answers_write(lines, &run));
    size_t n = read_file(path, &before);
    struct rlimit old, small;
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    signal(SIGXFSZ, SIG_IGN);
    for (size_t limit = 0; limit < n; limit += n / 7) {
        small = old;
        small.rlim_cur = limit;
        CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
        enum status st = runfile_write(path, &run);
        CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
        CHECK(st == ST_IO);
        CHECK(strstr(status_message(), "File too large") && strstr(status_message(), path));
        CHECK(!leftovers(folder));
    }
    small.rlim_cur = 100;
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    enum status st = answers_write(lines, &run);
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    CHECK(st == ST_IO && strstr(status_message(), "File too large"));
    CHECK(read_file(path, &after) == n && memcmp(before, after, n) == 0);
    CHECK(!leftovers(folder));
    free(before);
    free(after);
    CHECK_OK(runfile_write(path, &run)); // and works again
    CHECK(unlink(path) == 0 && unlink(lines) == 0);
}

/* ---- answers and descriptions ---- */

static void test_answers(const char *folder)
{
    static const char expected[] =
        "{\"question_id\": \"q-0\", \"model_id\": \"tiny\", \"choices\": [{\"index\": 0, "
        "\"turns\": [\"\", \"\"], \"new_tokens\": [4, 2], \"wall_time\": [0.75, 0.375], "
        "\"precision_log\": [{\"4\": 2, \"2\": 1}, {\"3,0.down_proj=4\": 1}], "
        "\"prefill_level\": [\"4\", \"3,0.down_proj=4\"]}], \"tstamp\": 1002.5}\n"
        "{\"question_id\": \"17\", \"model_id\": \"tiny\", \"choices\": [{\"index\": 0, "
        "\"turns\": [\"\"], \"new_tokens\": [3], \"wall_time\": [1.5], "
        "\"precision_log\": [{\"2\": 2}], \"prefill_level\": [\"4\"]}], \"tstamp\": 2001.5}\n";
    struct run_contents run = sample();
    char path[300], *text = NULL;
    snprintf(path, sizeof path, "%s/answers.jsonl", folder);
    CHECK_OK(answers_write(path, &run));
    read_file(path, &text);
    if (!CHECK(text && strcmp(text, expected) == 0)) {
        fprintf(stderr, "%s", text ? text : "");
    }
    free(text);
    run.model_id = "models/\xff\xfe \"x\""; // no UTF-8: still a line of JSON
    turns2[0].decode_s = NAN;
    CHECK_OK(answers_write(path, &run));
    read_file(path, &text);
    CHECK(text && strstr(text, "\"models/?? \\\"x\\\"\"") && strstr(text, "\"wall_time\": [null]"));
    turns2[0].decode_s = 1;
    free(text);
    CHECK(unlink(path) == 0);
}

static void test_describe(const char *path, const char *folder)
{
    char *text = NULL;
    CHECK_OK(runfile_describe(&text, path, 0));
    CHECK(text && strstr(text, "git_revision       abc123\n") && strstr(text, "3,0.down_proj=4"));
    CHECK(text && strstr(text, "avg_decode_bits    2.91667 bits\n"));
    CHECK(text && strstr(text, "steps              6\n") && strstr(text, "kv_features        2\n"));
    CHECK(text && strstr(text, "decode_tok_s       18 tokens/s\n"));
    CHECK(text && strstr(text, "invariant_under    any number of replicas and threads, any service "
                               "placement, 1 slot only, 1 tensor rank only\n"));
    mem_free(text);
    text = NULL;
    CHECK_OK(runfile_describe(&text, path, 1));
    CHECK(text && strstr(text, "\"git_revision\": \"abc123\"") && strstr(text, "\"n_steps\": 6"));
    CHECK(text && strstr(text, "\"config\": \"decode:\\n{\\n    slots = 1;\\n};\\n\""));
    CHECK(text && strstr(text, "\"kind\": \"run\"") && strstr(text, "\"bytes_per_token\": 510.0"));
    mem_free(text);
    text = NULL;

    char other[300];
    snprintf(other, sizeof other, "%s/other.h5", folder);
    CHECK_STATUS(runfile_describe(&text, other, 0), ST_IO, "No such file");
    CHECK_STATUS(runfile_describe(&text, folder, 0), ST_FORMAT, "not an HDF5 file");
    FILE *out = fopen(other, "wb");
    fputs("not at all", out);
    fclose(out);
    CHECK_STATUS(runfile_describe(&text, other, 0), ST_FORMAT, "not an HDF5 file");
    H5Fclose(H5Fcreate(other, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT));
    CHECK_STATUS(runfile_describe(&text, other, 0), ST_FORMAT, "not a run file");

    // the head of a good file, cut at many places: refused, or read, but never a crash
    char *bytes = NULL;
    size_t n = read_file(path, &bytes);
    for (size_t cut = 0; cut < n; cut += n / 50 + 1) {
        out = fopen(other, "wb");
        CHECK(fwrite(bytes, 1, cut, out) == cut);
        fclose(out);
        enum status st = runfile_describe(&text, other, 0);
        CHECK(st == ST_FORMAT || st == ST_HDF5);
        CHECK(strstr(status_message(), other) != NULL && text == NULL);
    }
    free(bytes);
    // a run file that lacks a table
    struct run_contents run = sample();
    CHECK_OK(runfile_write(other, &run));
    hid_t file = H5Fopen(other, H5F_ACC_RDWR, H5P_DEFAULT);
    CHECK(H5Ldelete(file, "steps", H5P_DEFAULT) >= 0);
    H5Fclose(file);
    CHECK_STATUS(runfile_describe(&text, other, 0), ST_HDF5, "other.h5: steps: HDF5: ");
    // a name that JSON cannot have
    struct run_fact fact = {"a\xFF", "b"};
    run.facts = &fact;
    run.n_facts = 1;
    CHECK_OK(runfile_write(other, &run));
    CHECK_STATUS(runfile_describe(&text, other, 1), ST_FORMAT, "is not UTF-8");
    CHECK(text == NULL);
    CHECK(unlink(other) == 0);
}

int main(void)
{
    static const char path[] = "test_runfile.h5";
    char folder[] = "test_runfile_XXXXXX";
    CHECK(mkdtemp(folder) != NULL);
    struct run_contents run = sample();
    CHECK_OK(runfile_write(path, &run));
    test_tables(path);
    test_metrics();
    test_attributes(path);
    test_sweep(folder);
    test_same_bytes(path, folder);
    test_large(folder);
    test_bad_contents(folder);
    test_unwritable(folder);
    test_disk_full(folder);
    test_answers(folder);
    test_describe(path, folder);
    CHECK(rmdir(folder) == 0);
    return check_report();
}
