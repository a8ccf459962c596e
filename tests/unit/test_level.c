/* Levels, plans and the policies that make them.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/level.h"
#include "core/plan.h"
#include "core/policy.h"
#include "sched/registry.h"

/* 2 layers; o is 4 x 4, the MLP 8 wide: weights per layer q 16, k 8, v 8, o 16, gate, up, down 32.
 */
static const struct model_config small = {.hidden = 4,
                                          .n_layers = 2,
                                          .n_heads = 2,
                                          .n_kv_heads = 1,
                                          .head_dim = 2,
                                          .ffn = 8,
                                          .vocab = 16};
enum { LAYER_WEIGHTS = 16 + 8 + 8 + 16 + 3 * 32 };

static const uint32_t HELD = 1u << 2 | 1u << 3 | 1u << 4;

static int32_t add(struct level_table *t, const char *text)
{
    int32_t id = -1;
    CHECK_OK(level_table_add(t, text, &id));
    return id;
}

static void test_levels(void)
{
    struct level_table t;
    int32_t id;
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK(add(&t, "4") == 0);
    CHECK(add(&t, " 4 ") == 0);
    CHECK(add(&t, "3,1.down_proj=4,*.o_proj=2") == 1);
    CHECK(add(&t, "max") == 2);
    const struct level *l = &t.level[1];
    CHECK(l->bits[0 * M_N_ROLES + M_Q] == 3);
    CHECK(l->bits[0 * M_N_ROLES + M_O] == 2 && l->bits[1 * M_N_ROLES + M_O] == 2);
    CHECK(l->bits[0 * M_N_ROLES + M_DOWN] == 3 && l->bits[1 * M_N_ROLES + M_DOWN] == 4);
    CHECK_NEAR(l->avg_bits, (3.0 * 2 * LAYER_WEIGHTS - 2 * 16 + 32) / (2 * LAYER_WEIGHTS), 1e-6);
    CHECK(l->max_bits == 4 && l->head_bits == 0 && l->head_avg_bits == 16);
    CHECK(t.level[2].avg_bits == 4);
    CHECK_STATUS(level_table_add(&t, "5", &id), ST_USER, "they hold 2, 3, 4");
    CHECK_STATUS(level_table_add(&t, "3,2.down_proj=4", &id), ST_USER, "within 0-1, found \"2\"");
    CHECK_STATUS(level_table_add(&t, "3,1-0.down_proj=4", &id), ST_USER, "found \"1-0\"");
    CHECK_STATUS(level_table_add(&t, "3,*.w2=4", &id), ST_USER, "unknown matrix \"w2\"");
    CHECK_STATUS(level_table_add(&t, "3,o_proj=4", &id), ST_USER, "LAYERS.MATRIX");
    CHECK_STATUS(level_table_add(&t, "3,*.o_proj", &id), ST_USER, "LAYERS.MATRIX=BITS");
    CHECK_STATUS(level_table_add(&t, "fast", &id), ST_USER, "found \"fast\"");
    CHECK_STATUS(level_table_add(&t, " ", &id), ST_USER, "an empty level");
    CHECK_STATUS(level_table_add(&t, "3,head=3", &id), ST_USER,
                 "head's weights of this model are not nested");
    CHECK(t.n == 3);
    level_table_release(&t);

    level_table_init(&t, &small, HELD, 1u << 2 | 1u << 4, 16, 0);
    CHECK(t.level[add(&t, "2")].head_bits == 2);
    CHECK(t.level[add(&t, "3")].head_bits == 4); /* a head without 3 bits stays at its best */
    CHECK(t.level[add(&t, "4,head=2")].head_bits == 2);
    level_table_release(&t);

    level_table_init(&t, &small, 0, 0, 32, 32);
    CHECK(t.level[add(&t, "max")].avg_bits == 32);
    CHECK_STATUS(level_table_add(&t, "4", &id), ST_USER, "use the level \"max\"");
    level_table_release(&t);
}

/* Levels name the family's own matrices; a matrix that it lacks counts for nothing. */
static void test_family(void)
{
    struct level_table t;
    int32_t id;
    struct model_config phi = small;
    phi.family = FAMILY_PHI;
    level_table_init(&t, &phi, HELD, 0, 16, 16);
    const struct level *l = &t.level[add(&t, "3,1.fc2=4,*.dense=2")];
    CHECK(l->bits[0 * M_N_ROLES + M_O] == 2 && l->bits[1 * M_N_ROLES + M_DOWN] == 4);
    const int n = LAYER_WEIGHTS - 32; /* no gate */
    CHECK_NEAR(l->avg_bits, (3.0 * 2 * n - 2 * 16 + 32) / (2 * n), 1e-6);
    CHECK(l->max_bits == 4);
    CHECK(t.level[add(&t, "2,*.*=3")].avg_bits == 3);
    CHECK_STATUS(
        level_table_add(&t, "3,*.o_proj=4", &id), ST_USER,
        "unknown matrix \"o_proj\"; expected q_proj, k_proj, v_proj, dense, fc1, fc2, * or");
    CHECK_STATUS(level_table_add(&t, "3,*.gate_proj=4", &id), ST_USER, "unknown matrix");
    level_table_release(&t);
}

static void test_plans(void)
{
    struct level_table t;
    struct plan p;
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK_OK(plan_create(&p, 3));
    CHECK_OK(plan_parse(&p, &t, "prefill:4 0:4  16:2 40:3", "max"));
    CHECK(p.n == 3 && strcmp(t.level[p.prefill].text, "4") == 0);
    const int32_t steps[] = {0, 15, 16, 39, 40, 1000}, bits[] = {4, 4, 2, 2, 3, 3};
    for (int i = 0; i < 6; i++) {
        CHECK(t.level[plan_level(&p, steps[i])].max_bits == bits[i]);
    }
    int32_t four = p.at[0].level;
    CHECK_OK(plan_amend(&p, 20, four));
    CHECK(p.n == 3 && plan_level(&p, 19) == p.at[1].level && plan_level(&p, 20) == four);
    CHECK_OK(plan_amend(&p, 0, four));
    CHECK(p.n == 1);
    CHECK_OK(plan_parse(&p, &t, "0:2", "3"));
    CHECK(strcmp(t.level[p.prefill].text, "3") == 0);
    CHECK_OK(plan_parse(&p, &t, "0:2 5:2", "3"));
    CHECK(p.n == 1);
    CHECK_STATUS(plan_parse(&p, &t, "1:2", "3"), ST_USER, "begins at step 0, found 1");
    CHECK_STATUS(plan_parse(&p, &t, "0:2 5:3 5:4", "3"), ST_USER, "found 5 after 5");
    CHECK_STATUS(plan_parse(&p, &t, "0:2 1:3 2:2 3:3", "3"), ST_USER, "more than 3 switch points");
    CHECK_STATUS(plan_parse(&p, &t, "0:2 x:3", "3"), ST_USER, "found \"x\"");
    CHECK_STATUS(plan_parse(&p, &t, "0:7", "3"), ST_USER, "do not hold 7 bits");
    CHECK_STATUS(plan_parse(&p, &t, "16", "3"), ST_USER, "STEP:LEVEL");
    CHECK_STATUS(plan_parse(&p, &t, "", "3"), ST_USER, "has no step");
    CHECK_STATUS(plan_parse(&p, &t, "prefill:2 prefill:3 0:2", "3"), ST_USER, "found two");
    plan_free(&p);
    level_table_release(&t);
}

/* Bits of steps 0.. of a policy's plan, as digits; the prefill level's in front of a bar. */
static void check_policy(const char *name, const char *key, const char *value, const char *want)
{
    struct level_table t;
    struct settings s;
    struct policy policy;
    struct plan plan;
    char assignment[128], got[32] = "";
    settings_default(&s);
    snprintf(assignment, sizeof assignment, "policy.name=%s", name);
    CHECK_OK(settings_set(&s, assignment));
    CHECK_OK(settings_set(&s, "policy.prefill=4"));
    snprintf(assignment, sizeof assignment, "%s=%s", key, value);
    CHECK_OK(settings_set(&s, assignment));
    level_table_init(&t, &small, HELD, 0, 16, 16);
    CHECK_OK(plan_create(&plan, 8));
    CHECK_OK(registry_open_policy(&policy, &s, &t));
    struct prompt_facts facts = {
        .task = "", .n_prompt_tok = 5, .max_new_tokens = 8, .dial = policy.dial};
    struct signals signals = {.step = -1};
    CHECK_OK(policy_begin(&policy, &facts, NULL, t.n, &plan.prefill));
    CHECK_OK(policy_plan(&policy, &facts, &signals, NULL, t.n, &plan));
    got[0] = (char)('0' + t.level[plan.prefill].max_bits);
    got[1] = '|';
    for (int32_t i = 0; i < 8; i++) {
        got[2 + i] = (char)('0' + t.level[plan_level(&plan, i)].max_bits);
    }
    if (!CHECK(strcmp(got, want) == 0)) {
        fprintf(stderr, "    %s: found %s, expected %s\n", name, got, want);
    }
    struct amendment amendment = {0};
    CHECK_OK(policy_observe(&policy, &facts, &signals, NULL, t.n, &amendment));
    CHECK(amendment.level == -1 && amendment.probe == -1);
    policy_close(&policy);
    plan_free(&plan);
    level_table_release(&t);
}

static void test_policies(void)
{
    check_policy("fixed", "policy.level", "2", "4|22222222");
    check_policy("static", "policy.switches", "0:4 3:3 6:2", "4|44433322");
    check_policy("static", "policy.switches", "prefill:3 0:4 100:2", "3|44444444");
    check_policy("reversed", "policy.switches", "0:4 3:3 6:2", "4|22233344");
    check_policy("alternate", "policy.alternate", "4 2", "4|42424242");
    check_policy("alternate", "policy.alternate", "4 3 2", "4|43243243");
    struct level_table t;
    struct settings s;
    struct policy policy;
    level_table_init(&t, &small, HELD, 0, 16, 16);
    settings_default(&s);
    CHECK_OK(settings_set(&s, "policy.name=clever"));
    CHECK_STATUS(registry_open_policy(&policy, &s, &t), ST_USER,
                 "known: fixed, static, reversed, alternate");
    CHECK_OK(settings_set(&s, "policy.name=static"));
    CHECK_STATUS(registry_open_policy(&policy, &s, &t), ST_USER, "policy.switches is empty");
    CHECK_OK(settings_set(&s, "policy.switches=0:9"));
    CHECK_STATUS(registry_open_policy(&policy, &s, &t), ST_USER, "policy \"static\": level \"9\"");
    CHECK_OK(settings_set(&s, "policy.name=alternate"));
    CHECK_STATUS(registry_open_policy(&policy, &s, &t), ST_USER, "policy.alternate is empty");
    level_table_release(&t);
}

int main(void)
{
    test_levels();
    test_family();
    test_plans();
    test_policies();
    return check_report();
}
