/* Packed records: the exact bytes of a small one, round trips, every refusal, and random damage
 * (worth most under AddressSanitizer).
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdint.h>

#include "core/mem.h"
#include "core/trace.h"
#include "tests/check.h"

/* Two turns (2 and 1 steps), three switches, two passes, features of 3 tokens x 2. */
static struct turn_record turns[2] = {{.n_prompt_tok = 5,
                                       .n_new_tok = 3,
                                       .finish = FINISH_LENGTH,
                                       .prefill_level = 0,
                                       .token0 = 11,
                                       .logprob0 = -0.5f,
                                       .entropy0 = 1.5f,
                                       .margin0 = 2.0f,
                                       .n_steps = 2,
                                       .n_switches = 2,
                                       .prefill_s = 0.25f,
                                       .decode_s = 0.5f},
                                      {.n_prompt_tok = 2,
                                       .n_new_tok = 2,
                                       .finish = FINISH_EOS,
                                       .prefill_level = 1,
                                       .token0 = 12,
                                       .logprob0 = -1.0f,
                                       .entropy0 = 0.5f,
                                       .margin0 = 1.0f,
                                       .n_steps = 1,
                                       .n_switches = 1,
                                       .prefill_s = 0.125f,
                                       .decode_s = 0.25f}};
static struct step_record steps[3] = {
    {0, 0, 0, 21, -0.25f, 0.5f, 3.0f, 7, 0.75f, 0.125f, 1, 2, 3, 4},
    {0, 1, 1, 22, -2.0f, 1.0f, 0.5f, 8, 0.5f, 0, 5, 6, 7, 8},
    {1, 0, 1, -1, -0.125f, 0.25f, 4.0f, 4294967295u, 1, 2, 9, 10, 11, 12}};
static struct plan_switch switches[3] = {{0, 0}, {1, 1}, {0, 1}};
static struct pass_record passes[2] = {{.pass = 7,
                                        .kind = PASS_PREFILL,
                                        .n_slots = 1,
                                        .n_tok = 5,
                                        .n_gathered = 1,
                                        .max_bits = 4,
                                        .time_us = 100.0f,
                                        .comm_us = 1.0f,
                                        .weight_bytes = 0x0102030405060708u,
                                        .kv_bytes = 9},
                                       {.pass = 8,
                                        .kind = PASS_DECODE,
                                        .n_slots = 2,
                                        .n_tok = 2,
                                        .max_bits = 3,
                                        .time_us = 50.0f,
                                        .comm_us = 2.0f,
                                        .weight_bytes = 1000,
                                        .kv_bytes = 2000}};
static struct decision_record decisions[] = {
    {.asked = -1, .step = 2, .level = 1, .probe = -1, .dial = 0.25f, .latency_us = 7.5f},
    {.turn = 1, .asked = 3, .step = 4, .level = -1, .probe = 2, .dial = 0.25f, .latency_us = 3}};
static float features[12] = {1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6};

static struct finished_record sample(void)
{
    return (struct finished_record){.ordinal = 0x123456789a,
                                    .key = {0x1122334455667788u, 2},
                                    .attempt = 1,
                                    .epoch = 3,
                                    .replica = 5,
                                    .started_unix_s = 1.5,
                                    .wall_s = 0.75,
                                    .n_turns = 2,
                                    .n_steps = 3,
                                    .n_switches = 3,
                                    .n_passes = 2,
                                    .n_decisions = 2,
                                    .n_feature_tok = 3,
                                    .feature_dim = 2,
                                    .turns = turns,
                                    .steps = steps,
                                    .switches = switches,
                                    .passes = passes,
                                    .decisions = decisions,
                                    .features = features};
}

static void check_equal(const struct finished_record *a, const struct finished_record *b)
{
    CHECK(a->ordinal == b->ordinal && a->key[0] == b->key[0] && a->key[1] == b->key[1]);
    CHECK(a->attempt == b->attempt && a->epoch == b->epoch && a->replica == b->replica);
    CHECK_NEAR(a->started_unix_s, b->started_unix_s, 0);
    CHECK_NEAR(a->wall_s, b->wall_s, 0);
    CHECK(a->n_turns == b->n_turns && a->n_steps == b->n_steps);
    CHECK(a->n_switches == b->n_switches && a->n_passes == b->n_passes);
    CHECK(a->n_feature_tok == b->n_feature_tok && a->feature_dim == b->feature_dim);
    // no struct here has padding, so that bytes compare fields
    CHECK(memcmp(a->turns, b->turns, (size_t)a->n_turns * sizeof *a->turns) == 0);
    CHECK(!a->n_steps || memcmp(a->steps, b->steps, (size_t)a->n_steps * sizeof *a->steps) == 0);
    CHECK(!a->n_switches ||
          memcmp(a->switches, b->switches, (size_t)a->n_switches * sizeof *a->switches) == 0);
    for (int i = 0; i < a->n_passes; i++) {
        const struct pass_record *p = &a->passes[i], *q = &b->passes[i];
        CHECK(p->pass == q->pass && p->kind == q->kind && p->n_slots == q->n_slots &&
              p->n_tok == q->n_tok && p->n_gathered == q->n_gathered &&
              p->max_bits == q->max_bits && p->weight_bytes == q->weight_bytes &&
              p->kv_bytes == q->kv_bytes);
        CHECK_NEAR(p->time_us, q->time_us, 0);
        CHECK_NEAR(p->comm_us, q->comm_us, 0);
    }
    CHECK(a->n_decisions == b->n_decisions);
    CHECK(!a->n_decisions ||
          memcmp(a->decisions, b->decisions, (size_t)a->n_decisions * sizeof *a->decisions) == 0);
    for (int i = 0; i < 2 * a->n_feature_tok * a->feature_dim; i++) {
        CHECK_NEAR(a->features[i], b->features[i], 0);
    }
}

/* The format, byte by byte, for one prompt with one turn and nothing else. */
static void test_bytes(void)
{
    static const unsigned char expected[] = {
        3, 0, 0, 0,                                     // version
        0x9a, 0x78, 0x56, 0x34, 0x12, 0, 0, 0,          // ordinal
        0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // key
        2, 0, 0, 0, 0, 0, 0, 0,                         //
        1, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0,             // attempt, epoch, replica
        0, 0, 0, 0, 0, 0, 0xf8, 0x3f,                   // 1.5
        0, 0, 0, 0, 0, 0, 0xe8, 0x3f,                   // 0.75
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0,                                                 // 1 turn, no steps ... decisions
        0, 0, 0, 0, 0, 0, 0, 0,                            // no features
        2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0,    // turn:
                                                           // tokens,
                                                           // finish,
                                                           // prefill
                                                           // level
        0xfe, 0xff, 0xff, 0xff,                            // token0 -2
        0, 0, 0x80, 0xbf, 0, 0, 0, 0x3f, 0, 0, 0x80, 0x3f, // -1, 0.5, 1
        0, 0, 0, 0, 0, 0, 0, 0,                            // steps, switches
        0, 0, 0, 0x3e, 0, 0, 0x80, 0x3e,                   // 0.125, 0.25
    };
    struct turn_record turn = turns[1];
    turn.token0 = -2;
    turn.n_steps = 0;
    turn.n_switches = 0;
    struct finished_record r = sample();
    r.n_turns = 1;
    r.n_steps = r.n_switches = r.n_passes = r.n_decisions = 0;
    r.n_feature_tok = r.feature_dim = 0;
    r.turns = &turn;
    unsigned char buf[sizeof expected + 1];
    memset(buf, 0xee, sizeof buf);
    CHECK(trace_packed_bytes(&r) == sizeof expected);
    trace_pack(buf, sizeof buf, &r);
    CHECK(memcmp(buf, expected, sizeof expected) == 0);
    CHECK(buf[sizeof expected] == 0xee);
    struct finished_record back;
    CHECK_OK(trace_unpack(&back, expected, sizeof expected));
    check_equal(&r, &back);
    CHECK(back.steps == NULL && back.switches == NULL && back.passes == NULL && !back.features);
    trace_free(&back);
    CHECK(back.turns == NULL);
    trace_free(&back);
    trace_free(NULL);
}

static void test_round_trip(void)
{
    struct finished_record r = sample(), back;
    size_t n = trace_packed_bytes(&r);
    CHECK(n == 84 + 2 * 48 + 3 * 56 + 3 * 8 + 2 * 48 + 2 * 28 + 12 * 4);
    unsigned char *buf = malloc(n + 1), *again = malloc(n);
    uint64_t allocs = mem_alloc_count();
    trace_pack(buf + 1, n, &r); // no alignment is asked for
    CHECK(mem_alloc_count() == allocs);
    CHECK_OK(trace_unpack(&back, buf + 1, n));
    CHECK(mem_alloc_count() == allocs + 1);
    check_equal(&r, &back);
    CHECK((uintptr_t)back.passes % _Alignof(struct pass_record) == 0);
    CHECK(trace_packed_bytes(&back) == n);
    trace_pack(again, n, &back);
    CHECK(memcmp(again, buf + 1, n) == 0);
    trace_free(&back);
    for (size_t cut = 0; cut < n; cut++) { // an exact copy, so that one byte too far is seen
        unsigned char *part = malloc(cut ? cut : 1);
        memcpy(part, buf + 1, cut);
        CHECK(trace_unpack(&back, part, cut) == ST_FORMAT);
        CHECK(back.turns == NULL);
        free(part);
    }
    free(buf);
    free(again);
}

enum change {
    VERSION,
    TURNS_0,
    TURNS_17,
    TURNS_NEGATIVE,
    STEPS_MANY,
    STEPS_NEGATIVE,
    FEATURES_HUGE,
    FEATURES_NEGATIVE,
    FEATURES_ONE,
    LONGER,
    ATTEMPT,
    TURN_SUM,
    SWITCH_SUM,
    STEP_TURN,
    STEP_ORDER,
    FINISH,
    KIND,
    NEW_TOK,
    WRAP,
    DECISIONS_NEGATIVE,
    DECISION_TURN,
    DECISION_STEP,
    DECISION_LEVEL
};

static void put_i32(unsigned char *at, int32_t x)
{
    for (int i = 0; i < 4; i++) {
        at[i] = (unsigned char)((uint32_t)x >> (8 * i));
    }
}

/* Offsets of the format, worked out by hand: head 84, turns 48, steps 56, switches 8, passes 48,
 * decisions 28. */
static void check_refused(enum change change, const char *part)
{
    struct finished_record r = sample(), back;
    size_t n = trace_packed_bytes(&r);
    unsigned char *buf = calloc(n + 1, 1);
    trace_pack(buf, n, &r);
    unsigned char *turn0 = buf + 84, *step0 = turn0 + 2 * 48, *pass0 = step0 + 3 * 56 + 3 * 8,
                  *decision0 = pass0 + 2 * 48;
    switch (change) {
    case VERSION:
        put_i32(buf, 2);
        break;
    case TURNS_0:
        put_i32(buf + 56, 0);
        break;
    case TURNS_17:
        put_i32(buf + 56, 17);
        break;
    case TURNS_NEGATIVE:
        put_i32(buf + 56, -2);
        break;
    case STEPS_MANY:
        put_i32(buf + 60, 0x7fffffff);
        break;
    case STEPS_NEGATIVE:
        put_i32(buf + 60, -3);
        break;
    case FEATURES_HUGE:
        put_i32(buf + 76, 0x7fffffff);
        put_i32(buf + 80, 0x7fffffff);
        break;
    case FEATURES_NEGATIVE: // the product is right, the factors are not
        put_i32(buf + 76, -3);
        put_i32(buf + 80, -2);
        break;
    case FEATURES_ONE:
        put_i32(buf + 80, 0);
        break;
    case LONGER:
        n++;
        break;
    case ATTEMPT:
        put_i32(buf + 28, -1);
        break;
    case TURN_SUM:
        put_i32(turn0 + 32, 1);
        break;
    case SWITCH_SUM:
        put_i32(turn0 + 48 + 36, 2);
        break;
    case STEP_TURN:
        put_i32(step0 + 112, 0);
        break;
    case STEP_ORDER:
        put_i32(step0 + 56 + 4, 0);
        break;
    case FINISH:
        put_i32(turn0 + 8, 2);
        break;
    case KIND:
        put_i32(pass0 + 48 + 4, -1);
        break;
    case NEW_TOK:
        put_i32(turn0 + 4, -1);
        break;
    case WRAP: // sums that wrap 32 bits back to the right ones
        put_i32(turn0 + 32, 0x7fffffff);
        put_i32(turn0 + 48 + 32, 0x7fffffff);
        break;
    case DECISIONS_NEGATIVE:
        put_i32(buf + 72, -1);
        break;
    case DECISION_TURN:
        put_i32(decision0, 2);
        break;
    case DECISION_STEP: // takes effect before it is asked for
        put_i32(decision0 + 28 + 8, 3);
        break;
    case DECISION_LEVEL:
        put_i32(decision0 + 12, -2);
        break;
    }
    CHECK_STATUS(trace_unpack(&back, buf, n), ST_FORMAT, part);
    CHECK(back.turns == NULL && back.n_turns == 0);
    free(buf);
}

static void test_refusals(void)
{
    check_refused(VERSION, "version 2; this program reads version 3");
    check_refused(TURNS_0, "0 turns; expected 1 to 16");
    check_refused(TURNS_17, "17 turns; expected 1 to 16");
    check_refused(TURNS_NEGATIVE, "-2 turns");
    check_refused(STEPS_MANY, "2147483647 steps");
    check_refused(STEPS_NEGATIVE, "-3 steps");
    check_refused(FEATURES_HUGE, "2147483647 x 2147483647 features");
    check_refused(FEATURES_NEGATIVE, "-3 x -2 features");
    check_refused(FEATURES_ONE, "3 x 0 features");
    check_refused(LONGER, "do not make");
    check_refused(ATTEMPT, "attempt -1");
    check_refused(TURN_SUM, "add up to 2 steps and 3 switches; the record has 3 and 3");
    check_refused(SWITCH_SUM, "add up to 3 steps and 4 switches");
    check_refused(STEP_TURN, "step 0 of turn 1 is out of order (found turn 0, step 0)");
    check_refused(STEP_ORDER, "step 1 of turn 0 is out of order");
    check_refused(FINISH, "finish 2");
    check_refused(KIND, "pass 8 has kind -1");
    check_refused(NEW_TOK, "turn 0 has a negative count");
    check_refused(WRAP, "add up to 4294967294 steps");
    check_refused(DECISIONS_NEGATIVE, "-1 decisions");
    check_refused(DECISION_TURN, "decision 0 of turn 2, asked after step -1, for step 2");
    check_refused(DECISION_STEP, "decision 1 of turn 1, asked after step 3, for step 3");
    check_refused(DECISION_LEVEL, "has level -2 and probe -1");
    struct finished_record back;
    CHECK_STATUS(trace_unpack(&back, "", 0), ST_FORMAT, "0 bytes; its head alone has 84");
}

static void test_count_levels(void)
{
    struct finished_record r = sample();
    size_t n = trace_packed_bytes(&r);
    unsigned char *buf = malloc(n);
    int64_t n_steps[8] = {100}, expected[8] = {100};
    for (int i = 0; i < r.n_steps; i++) {
        expected[r.steps[i].level]++;
    }
    trace_pack(buf, n, &r);
    CHECK_OK(trace_count_levels(n_steps, 8, buf, n)); // adds
    CHECK(memcmp(n_steps, expected, sizeof n_steps) == 0);
    CHECK_STATUS(trace_count_levels(n_steps, 8, buf, n - 1), ST_FORMAT, "do not make");
    int32_t most = 0;
    for (int i = 0; i < r.n_steps; i++) {
        most = r.steps[i].level > most ? r.steps[i].level : most;
    }
    CHECK_STATUS(trace_count_levels(n_steps, most, buf, n), ST_FORMAT, "ran at level");
    free(buf);
}

static void test_mutations(void)
{
    struct finished_record r = sample(), back;
    size_t n = trace_packed_bytes(&r);
    unsigned char *good = malloc(n);
    trace_pack(good, n, &r);
    uint64_t state = 2026;
    int n_good = 0;
    for (int round = 0; round < 200000; round++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        // counts are where it hurts: most of the damage goes to the head and the turns
        size_t range = round % 4 ? 84 + 2 * 48 : n;
        size_t where = (size_t)(state >> 33) % range;
        size_t bytes = round % 8 == 7 ? (size_t)(state >> 13) % (n + 1) : n;
        unsigned char *buf = malloc(bytes ? bytes : 1);
        memcpy(buf, good, bytes);
        for (size_t i = where; i < bytes && i < where + 1 + round % 3; i++) {
            buf[i] = (unsigned char)(state >> (8 * (i - where)) >> 8);
        }
        enum status st = trace_unpack(&back, buf, bytes);
        if (st == ST_OK) {
            n_good++;
            unsigned char *again = malloc(bytes);
            check_that(trace_packed_bytes(&back) == bytes, __FILE__, __LINE__, "same size");
            trace_pack(again, bytes, &back);
            CHECK(memcmp(again, buf, bytes) == 0);
            free(again);
            trace_free(&back);
        } else {
            CHECK(st == ST_FORMAT);
        }
        free(buf);
    }
    CHECK(n_good > 1000); // the damage leaves enough alone for the rest to mean something
    free(good);
}

int main(void)
{
    test_bytes();
    test_round_trip();
    test_refusals();
    test_count_levels();
    test_mutations();
    return check_report();
}
