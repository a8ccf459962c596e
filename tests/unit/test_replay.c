/* A run file read back (core/recorded.h) and its plans made again (the policies replay and
 * replay_slots): every number of a run made by hand, other ids for the same levels, cells changed
 * one by one, tables of other shapes and types, tables that claim more than is there.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <hdf5.h>
#include <unistd.h>

#include "core/invariance.h"
#include "core/recorded.h"
#include "core/runfile.h"
#include "sched/registry.h"
#include "tests/check.h"

/* ---- a run: prompt 0 has two turns, the second of one token; 1 failed; 2 has one turn ---- */

static struct prompt prompt[3] = {
    {.id = "first", .task = "", .split = "", .reference = "", .n_turns = 2},
    {.id = "second", .task = "", .split = "", .reference = "", .n_turns = 1},
    {.id = "", .task = "", .split = "", .reference = "", .n_turns = 1}};
static struct prompts prompts = {.n = 3, .prompt = prompt, .digest = "0123"};
static struct turn_record turns0[2] = {
    {.n_prompt_tok = 5,
     .n_new_tok = 4,
     .prefill_level = 0,
     .token0 = 10,
     .logprob0 = -1.5f,
     .entropy0 = 0.5f,
     .margin0 = 2.5f,
     .n_steps = 3,
     .n_switches = 2},
    {.n_prompt_tok = 2, .n_new_tok = 1, .prefill_level = 1, .token0 = 20, .logprob0 = -0.25f}};
static struct step_record steps0[3] = {{0, 0, 0, 11, -0.5f, 0.25f, 1.0f, 0, 1, 0, 0, 0, 0, 0},
                                       {0, 1, 0, 12, -0.75f, 0.125f, 2.0f, 0, 1, 0, 0, 0, 0, 0},
                                       {0, 2, 1, 13, -1.0f, 0.5f, 3.0f, 0, 1, 0, 0, 0, 0, 0}};
static struct plan_switch switches0[2] = {{0, 0}, {2, 1}};
static struct turn_record turns2[1] = {{.n_prompt_tok = 3,
                                        .n_new_tok = 3,
                                        .prefill_level = 0,
                                        .token0 = 30,
                                        .n_steps = 2,
                                        .n_switches = 1}};
static struct step_record steps2[2] = {{0, 0, 1, 31, -2.0f, 0, 0, 0, 1, 0, 0, 0, 0, 0},
                                       {0, 1, 1, 32, -3.0f, 0, 0, 0, 1, 0, 0, 0, 0, 0}};
static struct plan_switch switches2[1] = {{0, 1}};
static struct finished_record finished[2] = {{.ordinal = 0,
                                              .n_turns = 2,
                                              .n_steps = 3,
                                              .n_switches = 2,
                                              .turns = turns0,
                                              .steps = steps0,
                                              .switches = switches0},
                                             {.ordinal = 2,
                                              .n_turns = 1,
                                              .n_steps = 2,
                                              .n_switches = 1,
                                              .turns = turns2,
                                              .steps = steps2,
                                              .switches = switches2}};
static struct failed_prompt failed[1] = {{.ordinal = 1, .attempts = 2, .reason = "no"}};
static struct run_fact facts[2] = {{"host", "here"}, {"product", "slots"}};

static const char path[] = "test_replay.h5";

static void write_run(void)
{
    static struct level_table levels;
    memset(&levels, 0, sizeof levels);
    levels.n = 2;
    strcpy(levels.level[0].text, "4");
    strcpy(levels.level[1].text, "3,0.down_proj=2");
    struct run_contents run = {.prompts = &prompts,
                               .levels = &levels,
                               .n_finished = 2,
                               .finished = finished,
                               .n_failed = 1,
                               .failed = failed,
                               .n_facts = 2,
                               .facts = facts,
                               .config_text = "decode: { slots = 1; };\n"};
    CHECK_OK(runfile_write(path, &run));
}

/* ---- reading ---- */

static void test_read(void)
{
    struct recorded r;
    write_run();
    CHECK_OK(recorded_read(&r, path, true));
    CHECK(r.n_levels == 2 && strcmp(r.level[1], "3,0.down_proj=2") == 0);
    CHECK(r.n_turns == 3 && r.n_failed == 1 && r.failed[0] == 1);
    CHECK(strcmp(r.config, "decode: { slots = 1; };\n") == 0);
    CHECK(strcmp(recorded_fact(&r, "host"), "here") == 0);
    CHECK(strcmp(recorded_fact(&r, "backend"), "") == 0);
    CHECK(strcmp(recorded_fact(&r, "prompts_digest"), "0123") == 0);
    const struct recorded_turn *u = recorded_find(&r, 0, 0);
    if (CHECK(u && u->n_tokens == 4 && u->n_switches == 2 && u->prefill_level == 0)) {
        CHECK(u->n_prompt_tok == 5 && strcmp(u->id, "first") == 0);
        CHECK(u->switches[1].step == 2 && u->switches[1].level == 1);
        CHECK(u->tokens[0].token == 10 && u->tokens[0].level == 0);
        CHECK_NEAR(u->tokens[0].logprob, -1.5, 0);
        CHECK_NEAR(u->tokens[0].entropy, 0.5, 0);
        CHECK_NEAR(u->tokens[0].margin, 2.5, 0);
        CHECK(u->tokens[3].token == 13 && u->tokens[3].level == 1);
        CHECK_NEAR(u->tokens[2].logprob, -0.75, 0);
        CHECK_NEAR(u->tokens[2].entropy, 0.125, 0);
        CHECK_NEAR(u->tokens[3].margin, 3, 0);
    }
    u = recorded_find(&r, 0, 1);
    CHECK(u && u->n_tokens == 1 && u->n_switches == 0 && u->tokens[0].token == 20);
    u = recorded_find(&r, 2, 0);
    CHECK(u && u->n_tokens == 3 && u->tokens[2].token == 32 && strcmp(u->id, "") == 0);
    CHECK(!recorded_find(&r, 1, 0) && !recorded_find(&r, 0, 2) && !recorded_find(&r, 3, 0));
    recorded_free(&r);
    CHECK_OK(recorded_read(&r, path, false));
    CHECK(r.n_turns == 3 && !r.tokens && !r.config);
    recorded_free(&r);
    CHECK_STATUS(recorded_read(&r, "test_replay_none.h5", true), ST_IO, "No such file");
}

/* ---- files that were changed ---- */

/* One cell of a table, through HDF5 alone. */
static void set_cell(const char *table, const char *field, hsize_t row, double value)
{
    hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    hid_t set = H5Dopen2(file, table, H5P_DEFAULT), space = H5Dget_space(set);
    hid_t type = H5Tcreate(H5T_COMPOUND, sizeof value);
    hsize_t one = 1;
    hid_t here = H5Screate_simple(1, &one, NULL);
    CHECK(H5Tinsert(type, field, 0, H5T_NATIVE_DOUBLE) >= 0);
    CHECK(H5Sselect_hyperslab(space, H5S_SELECT_SET, &row, NULL, &one, NULL) >= 0);
    CHECK(H5Dwrite(set, type, here, space, H5P_DEFAULT, &value) >= 0);
    H5Sclose(here);
    H5Tclose(type);
    H5Sclose(space);
    H5Dclose(set);
    H5Fclose(file);
}

static void test_cells(void)
{
    static const struct {
        const char *table, *field;
        int row;
        double value;
        const char *says;
    } cases[] = {
        {"levels", "id", 1, 7, "row 1 of /levels"},
        {"plans", "prompt", 0, -1, "row 0 of /plans is about prompt -1"},
        {"plans", "prompt", 2, 0, "row 2 of /plans is about prompt 0, turn 0"},
        {"plans", "turn", 1, 2, "row 1 of /plans is about prompt 0, turn 2"},
        {"plans", "turn", 2, 1, "row 2 of /plans is about prompt 2, turn 1"},
        {"plans", "prefill_level", 1, 2, "row 1 of /plans names level 2; the file has 2"},
        {"plans", "prefill_level", 1, -1, "names level -1"},
        {"plans", "prefill_level", 1, 0, "row 1 of /prompts is prompt 0, turn 1, prefill at level"},
        {"plans", "first_switch", 2, 1, "from row 1; expected them from row 2"},
        {"plans", "first_switch", 0, -1, "from row -1"},
        {"plans", "n_switches", 0, -2, "row 0 of /plans has -2 switches"},
        {"plans", "n_switches", 2, 2147483647, "/plan_switches has 3 rows; /plans expects"},
        {"plans", "n_switches", 2, 0, "row 2 of /plan_switches is about prompt 2"},
        {"plan_switches", "prompt", 1, 2, "row 1 of /plan_switches is about prompt 2"},
        {"plan_switches", "turn", 0, 1, "row 0 of /plan_switches is about prompt 0, turn 1"},
        {"plan_switches", "step", 0, 1, "a switch at step 1; expected step 0 first"},
        {"plan_switches", "step", 1, 0, "a switch at step 0"},
        {"plan_switches", "step", 1, -5, "a switch at step -5"},
        {"plan_switches", "step", 1, 1, "step 1 ran at level 0, its plan says 1"},
        {"plan_switches", "step", 1, 3, "step 2 ran at level 1, its plan says 0"},
        {"plan_switches", "level", 1, 9, "row 1 of /plan_switches names level 9"},
        {"plan_switches", "level", 2, 0,
         "prompt 2, turn 0, step 0 ran at level 1, its plan says 0"},
        {"failed", "prompt", 0, 2, "row 0 of /failed names prompt 2"},
        {"failed", "prompt", 0, -1, "row 0 of /failed names prompt -1"},
        {"prompts", "turn", 1, 0, "row 1 of /prompts is prompt 0, turn 0"},
        {"prompts", "n_new_tok", 0, 0, "5 prompt and 0 new tokens"},
        {"prompts", "n_new_tok", 0, 2147483647, "/steps has 5 rows; /prompts expects 2147483648"},
        {"prompts", "n_new_tok", 0, 5, "/steps has 5 rows; /prompts expects 6"},
        {"steps", "prompt", 3, 1, "row 3 of /steps is prompt 1, turn 0, step 0"},
        {"steps", "turn", 0, 1, "row 0 of /steps is prompt 0, turn 1"},
        {"steps", "step", 2, 3, "row 2 of /steps is prompt 0, turn 0, step 3"},
        {"steps", "level", 0, 1, "step 0 ran at level 1, its plan says 0"},
        {"steps", "level", 4, 99, "ran at level 99"},
    };
    struct recorded r;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_run();
        set_cell(cases[i].table, cases[i].field, (hsize_t)cases[i].row, cases[i].value);
        CHECK_STATUS(recorded_read(&r, path, true), ST_FORMAT, cases[i].says);
        CHECK(strstr(status_message(), path) == status_message() && !r.turns && !r.tokens);
    }
    // a plan that goes on behind the last step
    write_run();
    switches0[1].step = 3;
    steps0[2].level = 0;
    write_run();
    CHECK_STATUS(recorded_read(&r, path, true), ST_FORMAT,
                 "a switch at step 3 of prompt 0, turn 0, which took 3 steps");
    switches0[1].step = 2;
    steps0[2].level = 1;
}

/* In place of a table: n rows of one type. */
static void put_table(const char *name, hid_t type, int rank, hsize_t n, hid_t create)
{
    hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    hsize_t dims[2] = {n, 1};
    CHECK(H5Ldelete(file, name, H5P_DEFAULT) >= 0);
    hid_t space = H5Screate_simple(rank, dims, NULL);
    hid_t set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, create, H5P_DEFAULT);
    CHECK(set >= 0);
    H5Dclose(set);
    H5Sclose(space);
    H5Fclose(file);
}

static hid_t switch_type(hid_t level, bool with_turn)
{
    size_t at = 0;
    hid_t type = H5Tcreate(H5T_COMPOUND, 32);
    H5Tinsert(type, "prompt", at, H5T_STD_I32LE);
    if (with_turn) {
        H5Tinsert(type, "turn", at += 4, H5T_STD_I32LE);
    }
    H5Tinsert(type, "step", at += 4, H5T_STD_I32LE);
    H5Tinsert(type, "level", at + 4, level);
    return type;
}

static void refuse_switches(hid_t type, int rank, hsize_t n, hid_t create, const char *says)
{
    struct recorded r;
    write_run();
    put_table("plan_switches", type, rank, n, create);
    H5Tclose(type);
    CHECK_STATUS(recorded_read(&r, path, false), ST_FORMAT, says);
}

static void test_tables(void)
{
    const hsize_t many = 1000000000;
    hsize_t chunk = 1024;
    struct recorded r;
    refuse_switches(H5Tcopy(H5T_STD_I32LE), 1, 3, H5P_DEFAULT, "/plan_switches is no table");
    refuse_switches(switch_type(H5T_STD_I32LE, true), 2, 3, H5P_DEFAULT,
                    "/plan_switches is no table");
    refuse_switches(switch_type(H5T_IEEE_F64LE, true), 1, 3, H5P_DEFAULT,
                    "column level of /plan_switches has another type than pmpd writes; expected "
                    "32-bit integers");
    refuse_switches(switch_type(H5T_STD_I64LE, true), 1, 3, H5P_DEFAULT, "column level of");
    refuse_switches(switch_type(H5T_STD_I32BE, true), 1, 3, H5P_DEFAULT, "column level of");
    refuse_switches(switch_type(H5T_STD_I32LE, false), 1, 3, H5P_DEFAULT,
                    "/plan_switches has no column turn");
    // never written, in one piece or in many; as many rows as no memory holds
    refuse_switches(switch_type(H5T_STD_I32LE, true), 1, many, H5P_DEFAULT,
                    "/plan_switches claims 1000000000 rows of 32 bytes, but the file holds 0");
    hid_t create = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(create, 1, &chunk);
    refuse_switches(switch_type(H5T_STD_I32LE, true), 1, many, create, "claims 1000000000 rows");
    refuse_switches(switch_type(H5T_STD_I32LE, true), 1, 1ull << 40, create,
                    "/plan_switches has 1099511627776 rows; at most 2147483647");
    H5Pclose(create);
    // from another file
    create = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_external(create, "/dev/zero", 0, H5F_UNLIMITED);
    refuse_switches(switch_type(H5T_STD_I32LE, true), 1, 3, create, "claims 3 rows");
    H5Pclose(create);
    // without a table
    static const char *const needed[] = {"levels", "plans",   "plan_switches", "failed",
                                         "steps",  "prompts", "provenance"};
    for (int i = 0; i < 7; i++) {
        write_run();
        hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
        CHECK(H5Ldelete(file, needed[i], H5P_DEFAULT) >= 0);
        H5Fclose(file);
        CHECK_STATUS(recorded_read(&r, path, true), ST_HDF5, needed[i]);
    }
    // another version
    write_run();
    hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    CHECK(H5Adelete(file, "format_version") >= 0);
    H5Fclose(file);
    CHECK_STATUS(recorded_read(&r, path, true), ST_FORMAT, "a run file of format version");
}

/* ---- the policies ---- */

static const struct model_config small = {.hidden = 4,
                                          .n_layers = 2,
                                          .n_heads = 2,
                                          .n_kv_heads = 1,
                                          .head_dim = 2,
                                          .ffn = 8,
                                          .vocab = 16};

/* Texts of the levels of prefill and of steps 0.. 3. */
static void check_plan(struct policy *p, const struct level_table *t, int32_t ordinal, int32_t turn,
                       int32_t most, const char *want)
{
    struct plan plan;
    char got[512] = "";
    struct prompt_facts facts_ = {
        .ordinal = ordinal, .turn = turn, .task = "", .max_new_tokens = most};
    struct signals signals = {.step = -1};
    CHECK_OK(plan_create(&plan, most));
    CHECK_OK(policy_begin(p, &facts_, NULL, t->n, &plan.prefill));
    CHECK_OK(policy_plan(p, &facts_, &signals, NULL, t->n, &plan));
    snprintf(got, sizeof got, "%s |", t->level[plan.prefill].text);
    for (int32_t i = 0; i < 4; i++) {
        size_t used = strlen(got);
        snprintf(got + used, sizeof got - used, " %s", t->level[plan_level(&plan, i)].text);
    }
    if (!CHECK(strcmp(got, want) == 0)) {
        fprintf(stderr, "    found    %s\n    expected %s\n", got, want);
    }
    plan_free(&plan);
}

static enum status open_policy(struct policy *p, struct level_table *t, const char *name,
                               const char *file)
{
    struct settings s;
    settings_default(&s);
    snprintf(s.policy.name, sizeof s.policy.name, "%s", name);
    snprintf(s.policy.replay, sizeof s.policy.replay, "%s", file);
    level_table_init(t, &small, 1u << 2 | 1u << 3 | 1u << 4, 0, 16, 16);
    int32_t id = 0;
    CHECK_OK(level_table_add(t, "2", &id)); // so that ids are not those of the file
    return registry_open_policy(p, &s, t);
}

static void test_policies(void)
{
    struct level_table t;
    struct policy p;
    char digest[DIGEST_TEXT];
    struct prompt_facts none = {.ordinal = 1, .turn = 0, .max_new_tokens = 4};
    int32_t level = 0;
    write_run();
    CHECK_OK(open_policy(&p, &t, "replay", path));
    CHECK(t.n == 3 && !p.ops->adds_tokens);
    check_plan(&p, &t, 0, 0, 4, "4 | 4 4 3,0.down_proj=2 3,0.down_proj=2");
    check_plan(&p, &t, 0, 0, 2, "4 | 4 4 4 4"); // fewer tokens are asked for
    check_plan(&p, &t, 0, 1, 4,                 // no step was taken
               "3,0.down_proj=2 | 3,0.down_proj=2 3,0.down_proj=2 3,0.down_proj=2 3,0.down_proj=2");
    check_plan(&p, &t, 2, 0, 4,
               "4 | 3,0.down_proj=2 3,0.down_proj=2 3,0.down_proj=2 3,0.down_proj=2");
    CHECK_STATUS(policy_begin(&p, &none, NULL, t.n, &level), ST_USER,
                 "test_replay.h5 has no plan for prompt 1, turn 0; it holds the plans of 3 turns");
    snprintf(digest, sizeof digest, "%s", policy_digest(&p));
    CHECK(strlen(digest) == 32);
    policy_close(&p);
    level_table_release(&t);
    CHECK_OK(open_policy(&p, &t, "replay_slots", path));
    CHECK(p.ops->adds_tokens && strcmp(policy_digest(&p), digest) == 0);
    check_plan(&p, &t, 0, 0, 4, "4 | 4 4 3,0.down_proj=2 3,0.down_proj=2");
    policy_close(&p);
    level_table_release(&t);
    // other plans, another digest; tokens are not part of it
    set_cell("steps", "token", 0, 77);
    CHECK_OK(open_policy(&p, &t, "replay", path));
    CHECK(strcmp(policy_digest(&p), digest) == 0);
    policy_close(&p);
    level_table_release(&t);
    set_cell("plan_switches", "level", 2, 0);
    CHECK_OK(open_policy(&p, &t, "replay", path));
    CHECK(strcmp(policy_digest(&p), digest) != 0);
    policy_close(&p);
    level_table_release(&t);
    CHECK_STATUS(open_policy(&p, &t, "replay", ""), ST_USER, "policy.replay is empty");
    level_table_release(&t);
    CHECK_STATUS(open_policy(&p, &t, "replay", "none.h5"), ST_IO, "none.h5: cannot open");
    level_table_release(&t);
    CHECK_OK(open_policy(&p, &t, "fixed", ""));
    CHECK(strcmp(policy_digest(&p), "") == 0);
    policy_close(&p);
    level_table_release(&t);
    // a model that lacks a level
    struct settings s;
    settings_default(&s);
    CHECK_OK(settings_set(&s, "policy.name=replay"));
    CHECK_OK(settings_set(&s, "policy.replay=test_replay.h5"));
    level_table_init(&t, &small, 1u << 4, 0, 16, 16);
    CHECK_STATUS(registry_open_policy(&p, &s, &t), ST_USER,
                 "policy \"replay\": test_replay.h5: level \"3,0.down_proj=2\"");
    level_table_release(&t);
}

/* ---- what does not change tokens ---- */

static void check_invariance(const char *set, const char *product, const char *says)
{
    struct settings s;
    char text[INVARIANCE_BYTES];
    settings_default(&s);
    CHECK_OK(settings_set(&s, set));
    CHECK(strcmp(invariance_product(&s, false), s.decode.slots > 1 ? "slots" : "one") == 0);
    CHECK(strcmp(invariance_product(&s, true), "slots") == 0);
    invariance_text(text, &s, product);
    CHECK(strstr(text, "any number of replicas and threads, any service placement, ") == text);
    if (!CHECK(strstr(text, says) != NULL)) {
        fprintf(stderr, "    %s\n", text);
    }
}

static void test_invariance(void)
{
    check_invariance("decode.slots=1", "one", ", 1 slot only, 1 tensor rank only");
    check_invariance("decode.slots=1", "slots", ", any number of slots, ");
    check_invariance("decode.slots=4", "slots", ", any number of slots > 1, ");
    check_invariance("parallel.tensor_ranks=4", "one", ", 4 tensor ranks only");
    check_invariance("parallel.reproducible=true", "one",
                     ", any of 1..8 tensor ranks that fits (reproducible, 8 segments)");
}

int main(void)
{
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    test_read();
    test_cells();
    test_tables();
    test_policies();
    test_invariance();
    unlink(path);
    return check_report();
}
