/* Packing of finished records: little-endian fields one after the other, so that neither padding
 * nor the machine's byte order shows; and unpacking that believes nothing.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/trace.h"

#include <stdbool.h>
#include <string.h>

#include "core/mem.h"
#include "core/prompts.h"

/* Sizes on disk. They are part of the format: change TRACE_VERSION with them. */
enum {
    TRACE_VERSION = 3,
    HEAD_BYTES = 4 + 8 + 16 + 3 * 4 + 16 + 7 * 4,
    TURN_BYTES = 12 * 4,
    STEP_BYTES = 14 * 4,
    SWITCH_BYTES = 2 * 4,
    PASS_BYTES = 8 * 4 + 16,
    DECISION_BYTES = 7 * 4,
    FLOAT_BYTES = 4
};

/* ---- fields ---- */

static void put_u32(unsigned char **at, uint32_t x)
{
    for (int i = 0; i < 4; i++) {
        *(*at)++ = (unsigned char)(x >> (8 * i));
    }
}

static void put_u64(unsigned char **at, uint64_t x)
{
    put_u32(at, (uint32_t)x);
    put_u32(at, (uint32_t)(x >> 32));
}

static void put_i32(unsigned char **at, int32_t x)
{
    put_u32(at, (uint32_t)x);
}

static void put_f32(unsigned char **at, float x)
{
    uint32_t bits = 0;
    memcpy(&bits, &x, sizeof bits);
    put_u32(at, bits);
}

static void put_f64(unsigned char **at, double x)
{
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof bits);
    put_u64(at, bits);
}

static uint32_t get_u32(const unsigned char **at)
{
    uint32_t x = 0;
    for (int i = 0; i < 4; i++) {
        x |= (uint32_t)(*(*at)++) << (8 * i);
    }
    return x;
}

static uint64_t get_u64(const unsigned char **at)
{
    uint64_t low = get_u32(at);
    return low | (uint64_t)get_u32(at) << 32;
}

static int32_t get_i32(const unsigned char **at)
{
    uint32_t bits = get_u32(at);
    int32_t x = 0;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float get_f32(const unsigned char **at)
{
    uint32_t bits = get_u32(at);
    float x = 0;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static double get_f64(const unsigned char **at)
{
    uint64_t bits = get_u64(at);
    double x = 0;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ---- sizes ---- */

/* Floats of the features; false when the counts make no sense. */
static bool feature_floats(const struct finished_record *r, size_t *n)
{
    *n = 0;
    if (r->n_feature_tok < 0 || r->feature_dim < 0 ||
        (r->n_feature_tok == 0) != (r->feature_dim == 0)) {
        return false;
    }
    size_t per_part = 0;
    return !__builtin_mul_overflow((size_t)r->n_feature_tok, (size_t)r->feature_dim, &per_part) &&
           !__builtin_mul_overflow(per_part, (size_t)2, n);
}

static bool add_array(size_t *total, int32_t n, size_t bytes_each)
{
    size_t part = 0;
    return n >= 0 && !__builtin_mul_overflow((size_t)n, bytes_each, &part) &&
           !__builtin_add_overflow(*total, part, total);
}

/* Bytes that the counts of *r ask for; false when they are negative or overflow. */
static bool packed_bytes(const struct finished_record *r, size_t *out)
{
    size_t floats = 0, feature_bytes = 0;
    *out = HEAD_BYTES;
    return add_array(out, r->n_turns, TURN_BYTES) && add_array(out, r->n_steps, STEP_BYTES) &&
           add_array(out, r->n_switches, SWITCH_BYTES) && add_array(out, r->n_passes, PASS_BYTES) &&
           add_array(out, r->n_decisions, DECISION_BYTES) && feature_floats(r, &floats) &&
           !__builtin_mul_overflow(floats, (size_t)FLOAT_BYTES, &feature_bytes) &&
           !__builtin_add_overflow(*out, feature_bytes, out);
}

size_t trace_packed_bytes(const struct finished_record *r)
{
    size_t bytes = 0;
    bool counts_fit = packed_bytes(r, &bytes);
    INVARIANT(counts_fit);
    return bytes;
}

/* ---- packing ---- */

void trace_pack(void *buf, size_t capacity, const struct finished_record *r)
{
    size_t bytes = trace_packed_bytes(r);
    INVARIANT(capacity >= bytes);
    unsigned char *at = buf;
    put_u32(&at, TRACE_VERSION);
    put_u64(&at, (uint64_t)r->ordinal);
    put_u64(&at, r->key[0]);
    put_u64(&at, r->key[1]);
    put_i32(&at, r->attempt);
    put_i32(&at, r->epoch);
    put_i32(&at, r->replica);
    put_f64(&at, r->started_unix_s);
    put_f64(&at, r->wall_s);
    put_i32(&at, r->n_turns);
    put_i32(&at, r->n_steps);
    put_i32(&at, r->n_switches);
    put_i32(&at, r->n_passes);
    put_i32(&at, r->n_decisions);
    put_i32(&at, r->n_feature_tok);
    put_i32(&at, r->feature_dim);
    for (int i = 0; i < r->n_turns; i++) {
        const struct turn_record *t = &r->turns[i];
        put_i32(&at, t->n_prompt_tok);
        put_i32(&at, t->n_new_tok);
        put_i32(&at, t->finish);
        put_i32(&at, t->prefill_level);
        put_i32(&at, t->token0);
        put_f32(&at, t->logprob0);
        put_f32(&at, t->entropy0);
        put_f32(&at, t->margin0);
        put_i32(&at, t->n_steps);
        put_i32(&at, t->n_switches);
        put_f32(&at, t->prefill_s);
        put_f32(&at, t->decode_s);
    }
    for (int i = 0; i < r->n_steps; i++) {
        const struct step_record *s = &r->steps[i];
        put_i32(&at, s->turn);
        put_i32(&at, s->step);
        put_i32(&at, s->level);
        put_i32(&at, s->token);
        put_f32(&at, s->logprob);
        put_f32(&at, s->entropy);
        put_f32(&at, s->margin);
        put_u32(&at, s->pass);
        put_f32(&at, s->max_prob);
        put_f32(&at, s->probe_kl);
        put_f32(&at, s->hidden_mean);
        put_f32(&at, s->hidden_rms);
        put_f32(&at, s->k_norm);
        put_f32(&at, s->v_norm);
    }
    for (int i = 0; i < r->n_switches; i++) {
        put_i32(&at, r->switches[i].step);
        put_i32(&at, r->switches[i].level);
    }
    for (int i = 0; i < r->n_passes; i++) {
        const struct pass_record *p = &r->passes[i];
        put_u32(&at, p->pass);
        put_i32(&at, p->kind);
        put_i32(&at, p->n_slots);
        put_i32(&at, p->n_tok);
        put_i32(&at, p->n_gathered);
        put_i32(&at, p->max_bits);
        put_f32(&at, p->time_us);
        put_f32(&at, p->comm_us);
        put_u64(&at, p->weight_bytes);
        put_u64(&at, p->kv_bytes);
    }
    for (int i = 0; i < r->n_decisions; i++) {
        const struct decision_record *d = &r->decisions[i];
        put_i32(&at, d->turn);
        put_i32(&at, d->asked);
        put_i32(&at, d->step);
        put_i32(&at, d->level);
        put_i32(&at, d->probe);
        put_f32(&at, d->dial);
        put_f32(&at, d->latency_us);
    }
    size_t floats = 0;
    feature_floats(r, &floats);
    for (size_t i = 0; i < floats; i++) {
        put_f32(&at, r->features[i]);
    }
    INVARIANT((size_t)(at - (unsigned char *)buf) == bytes);
}

/* ---- unpacking ---- */

static enum status unpack_head(struct finished_record *r, const unsigned char **at, size_t bytes)
{
    if (bytes < HEAD_BYTES) {
        FAIL(ST_FORMAT, "finished record: %zu bytes; its head alone has %d", bytes, HEAD_BYTES);
    }
    uint32_t version = get_u32(at);
    if (version != TRACE_VERSION) {
        FAIL(ST_FORMAT, "finished record: version %u; this program reads version %d", version,
             TRACE_VERSION);
    }
    uint64_t ordinal = get_u64(at);
    memcpy(&r->ordinal, &ordinal, sizeof r->ordinal);
    r->key[0] = get_u64(at);
    r->key[1] = get_u64(at);
    r->attempt = get_i32(at);
    r->epoch = get_i32(at);
    r->replica = get_i32(at);
    r->started_unix_s = get_f64(at);
    r->wall_s = get_f64(at);
    r->n_turns = get_i32(at);
    r->n_steps = get_i32(at);
    r->n_switches = get_i32(at);
    r->n_passes = get_i32(at);
    r->n_decisions = get_i32(at);
    r->n_feature_tok = get_i32(at);
    r->feature_dim = get_i32(at);
    if (r->ordinal < 0 || r->attempt < 0 || r->epoch < 0 || r->replica < 0) {
        FAIL(ST_FORMAT,
             "finished record: ordinal %lld, attempt %d, epoch %d, replica %d; none may "
             "be negative",
             (long long)r->ordinal, r->attempt, r->epoch, r->replica);
    }
    if (r->n_turns < 1 || r->n_turns > PROMPT_MAX_TURNS) {
        FAIL(ST_FORMAT, "finished record of prompt %lld: %d turns; expected 1 to %d",
             (long long)r->ordinal, r->n_turns, PROMPT_MAX_TURNS);
    }
    size_t expected = 0;
    if (!packed_bytes(r, &expected) || expected != bytes) {
        FAIL(ST_FORMAT,
             "finished record of prompt %lld: %d turns, %d steps, %d switches, %d passes, "
             "%d decisions, %d x %d features do not make %zu bytes",
             (long long)r->ordinal, r->n_turns, r->n_steps, r->n_switches, r->n_passes,
             r->n_decisions, r->n_feature_tok, r->feature_dim, bytes);
    }
    return ST_OK;
}

/* One block for all arrays, the turns first: it begins where r->turns points. Its size cannot
 * overflow: it is at most twice what the packed bytes in memory are. */
static enum status unpack_block(struct finished_record *r)
{
    size_t floats = 0;
    feature_floats(r, &floats);
    size_t turns = (size_t)r->n_turns * sizeof *r->turns;
    size_t passes = (size_t)r->n_passes * sizeof *r->passes;
    size_t steps = (size_t)r->n_steps * sizeof *r->steps;
    size_t switches = (size_t)r->n_switches * sizeof *r->switches;
    size_t decisions = (size_t)r->n_decisions * sizeof *r->decisions;
    _Static_assert(sizeof(struct turn_record) % _Alignof(struct pass_record) == 0,
                   "passes follow the turns without a gap");
    unsigned char *block = NULL;
    TRY(mem_alloc_array((void **)&block,
                        turns + passes + steps + switches + decisions + floats * sizeof(float), 1));
    r->turns = (struct turn_record *)(void *)block;
    block += turns;
    r->passes = r->n_passes ? (struct pass_record *)(void *)block : NULL;
    block += passes;
    r->steps = r->n_steps ? (struct step_record *)(void *)block : NULL;
    block += steps;
    r->switches = r->n_switches ? (struct plan_switch *)(void *)block : NULL;
    block += switches;
    r->decisions = r->n_decisions ? (struct decision_record *)(void *)block : NULL;
    block += decisions;
    r->features = floats ? (float *)(void *)block : NULL;
    return ST_OK;
}

static void unpack_arrays(struct finished_record *r, const unsigned char **at)
{
    for (int i = 0; i < r->n_turns; i++) {
        struct turn_record *t = &r->turns[i];
        t->n_prompt_tok = get_i32(at);
        t->n_new_tok = get_i32(at);
        t->finish = get_i32(at);
        t->prefill_level = get_i32(at);
        t->token0 = get_i32(at);
        t->logprob0 = get_f32(at);
        t->entropy0 = get_f32(at);
        t->margin0 = get_f32(at);
        t->n_steps = get_i32(at);
        t->n_switches = get_i32(at);
        t->prefill_s = get_f32(at);
        t->decode_s = get_f32(at);
    }
    for (int i = 0; i < r->n_steps; i++) {
        struct step_record *s = &r->steps[i];
        s->turn = get_i32(at);
        s->step = get_i32(at);
        s->level = get_i32(at);
        s->token = get_i32(at);
        s->logprob = get_f32(at);
        s->entropy = get_f32(at);
        s->margin = get_f32(at);
        s->pass = get_u32(at);
        s->max_prob = get_f32(at);
        s->probe_kl = get_f32(at);
        s->hidden_mean = get_f32(at);
        s->hidden_rms = get_f32(at);
        s->k_norm = get_f32(at);
        s->v_norm = get_f32(at);
    }
    for (int i = 0; i < r->n_switches; i++) {
        r->switches[i].step = get_i32(at);
        r->switches[i].level = get_i32(at);
    }
    for (int i = 0; i < r->n_passes; i++) {
        struct pass_record *p = &r->passes[i];
        p->pass = get_u32(at);
        p->kind = get_i32(at);
        p->n_slots = get_i32(at);
        p->n_tok = get_i32(at);
        p->n_gathered = get_i32(at);
        p->max_bits = get_i32(at);
        p->time_us = get_f32(at);
        p->comm_us = get_f32(at);
        p->weight_bytes = get_u64(at);
        p->kv_bytes = get_u64(at);
    }
    for (int i = 0; i < r->n_decisions; i++) {
        struct decision_record *d = &r->decisions[i];
        d->turn = get_i32(at);
        d->asked = get_i32(at);
        d->step = get_i32(at);
        d->level = get_i32(at);
        d->probe = get_i32(at);
        d->dial = get_f32(at);
        d->latency_us = get_f32(at);
    }
    size_t floats = 0;
    feature_floats(r, &floats);
    for (size_t i = 0; i < floats; i++) {
        r->features[i] = get_f32(at);
    }
}

/* What readers index by: the turns' parts of steps and switches, and the enums. Level ids are
 * checked by whoever has the table. */
static enum status check_turns(const struct finished_record *r)
{
    const long long ordinal = (long long)r->ordinal;
    int64_t n_steps = 0, n_switches = 0; // wide: sums of hostile counts
    for (int i = 0; i < r->n_turns; i++) {
        const struct turn_record *t = &r->turns[i];
        if (t->n_steps < 0 || t->n_switches < 0 || t->n_prompt_tok < 0 || t->n_new_tok < 0) {
            FAIL(ST_FORMAT, "finished record of prompt %lld: turn %d has a negative count", ordinal,
                 i);
        }
        if (t->finish != FINISH_EOS && t->finish != FINISH_LENGTH) {
            FAIL(ST_FORMAT,
                 "finished record of prompt %lld: turn %d has finish %d; expected %d or "
                 "%d",
                 ordinal, i, t->finish, FINISH_EOS, FINISH_LENGTH);
        }
        n_steps += t->n_steps;
        n_switches += t->n_switches;
    }
    if (n_steps != r->n_steps || n_switches != r->n_switches) {
        FAIL(ST_FORMAT,
             "finished record of prompt %lld: the turns add up to %lld steps and %lld "
             "switches; the record has %d and %d",
             ordinal, (long long)n_steps, (long long)n_switches, r->n_steps, r->n_switches);
    }
    int at = 0;
    for (int i = 0; i < r->n_turns; i++) {
        for (int j = 0; j < r->turns[i].n_steps; j++, at++) {
            const struct step_record *s = &r->steps[at];
            if (s->turn != i || s->step < 0 || (j > 0 && s->step <= r->steps[at - 1].step)) {
                FAIL(ST_FORMAT,
                     "finished record of prompt %lld: step %d of turn %d is out of "
                     "order (found turn %d, step %d)",
                     ordinal, j, i, s->turn, s->step);
            }
        }
    }
    for (int i = 0; i < r->n_passes; i++) {
        if (r->passes[i].kind != PASS_PREFILL && r->passes[i].kind != PASS_DECODE) {
            FAIL(ST_FORMAT,
                 "finished record of prompt %lld: pass %u has kind %d; expected %d or %d", ordinal,
                 r->passes[i].pass, r->passes[i].kind, PASS_PREFILL, PASS_DECODE);
        }
    }
    for (int i = 0; i < r->n_decisions; i++) {
        const struct decision_record *d = &r->decisions[i];
        if (d->turn < 0 || d->turn >= r->n_turns || d->asked < -1 || d->step <= d->asked ||
            d->level < -1 || d->probe < -1) {
            FAIL(ST_FORMAT,
                 "finished record of prompt %lld: decision %d of turn %d, asked after step %d, for "
                 "step %d, has level %d and probe %d: out of range",
                 ordinal, i, d->turn, d->asked, d->step, d->level, d->probe);
        }
    }
    return ST_OK;
}

enum status trace_count_levels(int64_t *n_steps, int32_t n_levels, const void *buf, size_t bytes)
{
    struct finished_record r;
    memset(&r, 0, sizeof r);
    const unsigned char *at = buf;
    TRY(unpack_head(&r, &at, bytes));
    at += (size_t)r.n_turns * TURN_BYTES;
    for (int i = 0; i < r.n_steps; i++) {
        const unsigned char *field = at + (size_t)i * STEP_BYTES + 2 * 4; // turn, step, level
        int32_t level = get_i32(&field);
        if (level < 0 || level >= n_levels) {
            FAIL(ST_FORMAT, "finished record of prompt %lld: step %d ran at level %d of %d",
                 (long long)r.ordinal, i, level, n_levels);
        }
        n_steps[level]++;
    }
    return ST_OK;
}

enum status trace_unpack(struct finished_record *out, const void *buf, size_t bytes)
{
    struct finished_record r;
    memset(&r, 0, sizeof r);
    memset(out, 0, sizeof *out);
    const unsigned char *at = buf;
    TRY(unpack_head(&r, &at, bytes));
    TRY(unpack_block(&r));
    unpack_arrays(&r, &at);
    enum status st = ST_OK;
    TRY_GOTO(st, check_turns(&r), failed);
    *out = r;
    return ST_OK;
failed:
    trace_free(&r);
    return st;
}

void trace_free(struct finished_record *r)
{
    if (r) {
        mem_free(r->turns);
        memset(r, 0, sizeof *r);
    }
}
