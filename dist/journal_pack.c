/* The payloads of small records. SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "dist/journal.h"
#include "dist/journal_bytes.h"

enum {
    RUN_BYTES = 4 + 8,
    START_BYTES = 8 + 16 + 12,
    REASON_BYTES = sizeof(((struct journal_failed *)0)->reason),
    FAILED_BYTES = 8 + 16 + 4 + REASON_BYTES,
    FAULT_BYTES = 8 + 16 + 16 + REASON_BYTES,
    END_BYTES = 8 + 8 + REASON_BYTES,
    STATE_BYTES = 8 + 8 + 16 + 4 + 4 * 8
};
_Static_assert((int)FAULT_BYTES <= (int)JOURNAL_SMALL_BYTES, "the largest small record");

static void put_f64(unsigned char *p, double v)
{
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof bits);
    put_u64(p, bits);
}

static double get_f64(const unsigned char *p)
{
    uint64_t bits = get_u64(p);
    double v = 0;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Nothing that happened to lie behind the text gets into the file. */
static void put_reason(unsigned char *p, const char *reason)
{
    memset(p, 0, REASON_BYTES);
    memcpy(p, reason, strnlen(reason, REASON_BYTES - 1));
}

static enum status get_reason(char *reason, const unsigned char *p, const char *what)
{
    memcpy(reason, p, REASON_BYTES);
    if (reason[REASON_BYTES - 1] != '\0') {
        FAIL(ST_FORMAT, "journal: the reason of a %s record has no end", what);
    }
    return ST_OK;
}

size_t journal_pack_run(void *buf, const struct journal_run *r)
{
    unsigned char *p = buf;
    put_u32(p, (uint32_t)r->epoch);
    put_f64(p + 4, r->unix_s);
    return RUN_BYTES;
}

size_t journal_pack_start(void *buf, const struct journal_start *r)
{
    unsigned char *p = buf;
    put_u64(p, (uint64_t)r->ordinal);
    put_u64(p + 8, r->key[0]);
    put_u64(p + 16, r->key[1]);
    put_u32(p + 24, (uint32_t)r->attempt);
    put_u32(p + 28, (uint32_t)r->epoch);
    put_u32(p + 32, (uint32_t)r->replica);
    return START_BYTES;
}

size_t journal_pack_failed(void *buf, const struct journal_failed *r)
{
    unsigned char *p = buf;
    put_u64(p, (uint64_t)r->ordinal);
    put_u64(p + 8, r->key[0]);
    put_u64(p + 16, r->key[1]);
    put_u32(p + 24, (uint32_t)r->attempts);
    put_reason(p + 28, r->reason);
    return FAILED_BYTES;
}

size_t journal_pack_fault(void *buf, const struct journal_fault *r)
{
    unsigned char *p = buf;
    put_u64(p, (uint64_t)r->ordinal);
    put_u64(p + 8, r->key[0]);
    put_u64(p + 16, r->key[1]);
    put_u32(p + 24, (uint32_t)r->epoch);
    put_u32(p + 28, (uint32_t)r->rank);
    put_u32(p + 32, (uint32_t)r->n_company);
    put_u32(p + 36, (uint32_t)r->signal);
    put_reason(p + 40, r->reason);
    return FAULT_BYTES;
}

size_t journal_pack_end(void *buf, const struct journal_end *r)
{
    unsigned char *p = buf;
    put_u32(p, (uint32_t)r->epoch);
    put_u32(p + 4, (uint32_t)r->how);
    put_f64(p + 8, r->unix_s);
    put_reason(p + 16, r->reason);
    return END_BYTES;
}

static enum status check_bytes(const char *what, size_t found, size_t expected)
{
    if (found != expected) {
        FAIL(ST_FORMAT,
             "journal: a %s record of %zu bytes, expected %zu; was it written by "
             "another version of pmpd?",
             what, found, expected);
    }
    return ST_OK;
}

enum status journal_unpack_run(struct journal_run *out, const void *buf, size_t bytes)
{
    TRY(check_bytes("run", bytes, RUN_BYTES));
    const unsigned char *p = buf;
    *out = (struct journal_run){.epoch = (int32_t)get_u32(p), .unix_s = get_f64(p + 4)};
    return ST_OK;
}

enum status journal_unpack_start(struct journal_start *out, const void *buf, size_t bytes)
{
    TRY(check_bytes("start", bytes, START_BYTES));
    const unsigned char *p = buf;
    *out = (struct journal_start){.ordinal = (int64_t)get_u64(p),
                                  .key = {get_u64(p + 8), get_u64(p + 16)},
                                  .attempt = (int32_t)get_u32(p + 24),
                                  .epoch = (int32_t)get_u32(p + 28),
                                  .replica = (int32_t)get_u32(p + 32)};
    return ST_OK;
}

enum status journal_unpack_failed(struct journal_failed *out, const void *buf, size_t bytes)
{
    TRY(check_bytes("failed", bytes, FAILED_BYTES));
    const unsigned char *p = buf;
    *out = (struct journal_failed){.ordinal = (int64_t)get_u64(p),
                                   .key = {get_u64(p + 8), get_u64(p + 16)},
                                   .attempts = (int32_t)get_u32(p + 24)};
    return get_reason(out->reason, p + 28, "failed");
}

enum status journal_unpack_fault(struct journal_fault *out, const void *buf, size_t bytes)
{
    TRY(check_bytes("fault", bytes, FAULT_BYTES));
    const unsigned char *p = buf;
    *out = (struct journal_fault){.ordinal = (int64_t)get_u64(p),
                                  .key = {get_u64(p + 8), get_u64(p + 16)},
                                  .epoch = (int32_t)get_u32(p + 24),
                                  .rank = (int32_t)get_u32(p + 28),
                                  .n_company = (int32_t)get_u32(p + 32),
                                  .signal = (int32_t)get_u32(p + 36)};
    return get_reason(out->reason, p + 40, "fault");
}

enum status journal_unpack_end(struct journal_end *out, const void *buf, size_t bytes)
{
    TRY(check_bytes("end", bytes, END_BYTES));
    const unsigned char *p = buf;
    *out = (struct journal_end){
        .epoch = (int32_t)get_u32(p), .how = (int32_t)get_u32(p + 4), .unix_s = get_f64(p + 8)};
    return get_reason(out->reason, p + 16, "end");
}

size_t journal_pack_state(void *buf, const struct journal_state *r)
{
    unsigned char *p = buf;
    uint32_t dial = 0;
    memcpy(&dial, &r->dial, sizeof dial);
    put_u64(p, (uint64_t)r->lease);
    put_u64(p + 8, (uint64_t)r->ordinal);
    put_u64(p + 16, r->key[0]);
    put_u64(p + 24, r->key[1]);
    put_u32(p + 32, dial);
    put_f64(p + 36, r->target);
    put_f64(p + 44, r->offset);
    put_f64(p + 52, r->slope);
    put_f64(p + 60, r->account);
    return STATE_BYTES;
}

enum status journal_unpack_state(struct journal_state *out, const void *buf, size_t bytes)
{
    const unsigned char *p = buf;
    if (bytes != STATE_BYTES) {
        FAIL(ST_FORMAT, "journal: a controller state of %zu bytes; expected %d", bytes,
             STATE_BYTES);
    }
    uint32_t dial = get_u32(p + 32);
    memcpy(&out->dial, &dial, sizeof dial);
    out->lease = (int64_t)get_u64(p);
    out->ordinal = (int64_t)get_u64(p + 8);
    out->key[0] = get_u64(p + 16);
    out->key[1] = get_u64(p + 24);
    out->target = get_f64(p + 36);
    out->offset = get_f64(p + 44);
    out->slope = get_f64(p + 52);
    out->account = get_f64(p + 60);
    if (out->lease < 0 || !(out->dial >= 0 && out->dial <= 1)) {
        FAIL(ST_FORMAT, "journal: a controller state of lease %lld with dial %g; expected 0 to 1",
             (long long)out->lease, (double)out->dial);
    }
    return ST_OK;
}
