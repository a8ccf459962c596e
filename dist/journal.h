/* The journal: an append-only file of typed records, the truth after a crash. A frame is
 *   magic u32 "PMJ1", kind u32, length u32, crc u32 = CRC-32C of kind, length and payload; payload
 * little endian. A torn or damaged tail is cut when the file is opened, never believed. One process
 * holds the file (flock). Not collective: only the lease owner has one.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_JOURNAL_H
#define PMPD_DIST_JOURNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "core/trace.h"

enum journal_kind {
    JOURNAL_RUN = 1,      /* struct journal_run: the program started on this directory */
    JOURNAL_START = 2,    /* struct journal_start: an attempt at a prompt begins */
    JOURNAL_FINISHED = 3, /* trace_pack */
    JOURNAL_FAILED = 4,   /* struct journal_failed */
    JOURNAL_STATE = 5,    /* struct journal_state: the budget gave a lease its dial */
    JOURNAL_FAULT = 6,    /* struct journal_fault: an attempt ended the job, by error or signal */
    JOURNAL_END = 7,      /* struct journal_end: this start of the program ended as it should */
    JOURNAL_RETRY = 8     /* empty: faults, failures and deaths before this do not count */
};

struct journal_run {
    int32_t epoch; /* 0, 1, ... : starts of the program on this directory */
    double unix_s;
};
struct journal_start {
    int64_t ordinal;
    uint64_t key[2];
    int32_t attempt, epoch, replica;
};
struct journal_failed {
    int64_t ordinal;
    uint64_t key[2];
    int32_t attempts;
    char reason[256];
};
/* A rank died at this prompt, or at one of n_company prompts that it decoded together (each gets a
 * record). */
struct journal_fault {
    int64_t ordinal;
    uint64_t key[2];
    int32_t epoch, rank, n_company;
    int32_t signal; /* 0: an error */
    char reason[256];
};
/* The budget's controller (sched/budget.h) at one lease: comes before the lease's first start. */
struct journal_state {
    int64_t lease; /* in the fixed order of all prompts, from 0 */
    int64_t ordinal;
    uint64_t key[2];
    float dial;
    double target, offset, slope, account;
};
enum journal_how { JOURNAL_DONE = 0, JOURNAL_STOPPED = 1, JOURNAL_ERROR = 2 };
/* Without this record, and without a fault, a start of the program died silently. */
struct journal_end {
    int32_t epoch, how; /* enum journal_how; ERROR: an error that named no prompt */
    double unix_s;
    char reason[256];
};

struct journal;

/* One record as read back; payload borrowed for the call. */
typedef enum status journal_visit_fn(void *ctx, uint32_t kind, const void *payload, size_t bytes);

enum { JOURNAL_MAX_PAYLOAD = 1 << 30 };

/* Opens or creates dir/journal.bin, locks it, hands every whole record to visit in order, cuts a
 * damaged tail (logged: how many bytes). Creates dir and its parents. Errors: ST_IO (unwritable
 * directory, disk: names the path and what to do), ST_USER (another process holds it: names it),
 * ST_FORMAT (the file does not begin with a journal frame though it is not empty, or its first
 * record is damaged rather than torn: it is not touched), those of visit (nothing is cut). */
MUST_CHECK enum status journal_open(struct journal **out, const char *dir, journal_visit_fn *visit,
                                    void *ctx);
/* Reads without locking or cutting (pmpd inspect, the run file's writer). n_bad_tail: bytes not
 * believed; may be NULL. Errors: as journal_open; ST_IO when there is no journal. */
MUST_CHECK enum status journal_read(const char *dir, journal_visit_fn *visit, void *ctx,
                                    size_t *n_bad_tail);
/* Appends one record with one write() and, if durable, fdatasync. No allocation: the frame is put
 * together in a buffer that grows only when a payload is larger than any before (reserve first).
 * Errors: ST_IO (names path; disk full: what to do), ST_SHAPE (more than JOURNAL_MAX_PAYLOAD);
 * after a failed append the file is cut back. May be called from two threads. */
MUST_CHECK enum status journal_append(struct journal *j, uint32_t kind, const void *payload,
                                      size_t bytes, bool durable);
MUST_CHECK enum status journal_reserve(struct journal *j, size_t payload_bytes);
/* Appending durably beside other work, in a thread of the journal's: started once (open), ends with
 * the journal. Errors: ST_NOMEM. */
MUST_CHECK enum status journal_writer_open(struct journal *j);
/* journal_append(durable) that only begins; payload is borrowed until it is *done; the next one may
 * begin then. Errors: those of journal_append. */
void journal_append_begin(struct journal *j, uint32_t kind, const void *payload, size_t bytes);
MUST_CHECK enum status journal_append_done(struct journal *j, bool *done);
void journal_close(struct journal **j);

/* Fixed-size payloads, field by field. Unpacking checks the size: ST_FORMAT. */
enum { JOURNAL_SMALL_BYTES = 320 };
size_t journal_pack_run(void *buf, const struct journal_run *r);
size_t journal_pack_start(void *buf, const struct journal_start *r);
size_t journal_pack_failed(void *buf, const struct journal_failed *r);
size_t journal_pack_fault(void *buf, const struct journal_fault *r);
size_t journal_pack_end(void *buf, const struct journal_end *r);
size_t journal_pack_state(void *buf, const struct journal_state *r);
MUST_CHECK enum status journal_unpack_run(struct journal_run *out, const void *buf, size_t bytes);
MUST_CHECK enum status journal_unpack_start(struct journal_start *out, const void *buf,
                                            size_t bytes);
MUST_CHECK enum status journal_unpack_failed(struct journal_failed *out, const void *buf,
                                             size_t bytes);
MUST_CHECK enum status journal_unpack_fault(struct journal_fault *out, const void *buf,
                                            size_t bytes);
MUST_CHECK enum status journal_unpack_end(struct journal_end *out, const void *buf, size_t bytes);
/* Also ST_FORMAT: a negative lease, a dial outside [0, 1]. */
MUST_CHECK enum status journal_unpack_state(struct journal_state *out, const void *buf,
                                            size_t bytes);

#endif
