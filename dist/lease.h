/* Leases: rank 0 hands prompts to replicas, takes back finished records, appends them to the
 * journal (fdatasync), and only then counts the lease done. The owner decodes too, and is polled
 * once per pass and per prefill chunk (lease_owner_poll), or it is a rank of its own
 * (env->n_service). The first rank of a replica is a client; a replica's other ranks learn of
 * leases from it.
 * Order: suspects last, largest cost first, lowest ordinal. Where a budget sets the policy's dial
 * (lease_hooks.dial), suspects keep their place, and a prompt whose dial is not yet known is not
 * granted: who asked for it waits.
 * A replica says now and then that it lives; one that is silent for long ends the run.
 * Stopping: when rank 0 is asked to (dist/stop.h) or the deadline has come, the owner grants
 * nothing more and tells every client; replicas leave what they are at, hand over what is finished,
 * and say that they leave. Messages are of fixed maximum size; nothing is allocated after creation.
 * The owner holds a record buffer for every other replica. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_LEASE_H
#define PMPD_DIST_LEASE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "core/trace.h"
#include "dist/env.h"
#include "dist/journal.h"

/* A prompt to be done. */
struct lease_item {
    int64_t ordinal;
    uint64_t key[2];
    int32_t attempt; /* of the coming start, from 1 */
    int32_t cost;    /* tokens; longer prompts are handed out first */
    float dial;      /* of the policy; set when the lease is granted, where a budget moves it */
    int32_t alone;   /* 1: a suspect: handed out last, to share no pass with another prompt, so that
                        a second fault names it and nothing else */
};

struct lease_owner;
struct lease_client;

/* What the owner tells and asks; each may be NULL. Borrowed by lease_owner_create. */
struct lease_hooks {
    void *ctx;
    /* A record is durable: how many of this start are, whose it is, and the record, packed. */
    enum status (*done)(void *ctx, int64_t n_done, int64_t n_total, int64_t ordinal,
                        const void *packed, size_t bytes);
    /* The dial of the next prompt in order, journalled where it must be; *known false: not yet,
     * ask again when another record is done. NULL: item->dial as it was given. */
    enum status (*dial)(void *ctx, const struct lease_item *item, bool *known, float *dial);
    /* Part of every poll, and called again and again while a record goes to disk: serves other
     * messages; sets *any when there were some. Never blocks, and makes no call of this header. */
    enum status (*poll)(void *ctx, bool *any);
};

/* On rank 0. items (n) are copied and ordered. max_record_bytes bounds a packed finished record;
 * the same on every rank. journal and env are borrowed. hooks: NULL: none. Errors: ST_SHAPE (an
 * ordinal twice; records too large to send), ST_NOMEM. */
MUST_CHECK enum status lease_owner_create(struct lease_owner **out, struct env *env,
                                          struct journal *journal, const struct lease_item *items,
                                          int64_t n, int32_t epoch, size_t max_record_bytes,
                                          const struct lease_hooks *hooks);
void lease_owner_destroy(struct lease_owner **owner);
/* The run stops when it has lasted this long from now; 0 or less: never. */
void lease_owner_set_deadline(struct lease_owner *owner, double seconds);
/* A replica that has sent nothing for one and a half of these seconds (parallel.timeout_s) is given
 * up: lease_owner_poll fails. 0: never. */
void lease_owner_set_timeout(struct lease_owner *owner, double seconds);
/* Why the run is stopping before all is done: "SIGTERM on rank 3", "run.deadline_s"; NULL: it is
 * not. */
const char *lease_owner_stopping(const struct lease_owner *owner);
/* Serves all waiting messages; never blocks. Errors: ST_IO (journal), ST_MPI, ST_FORMAT (a record
 * of a prompt that its replica does not hold, or an unknown message: a defect), ST_TIMEOUT (a
 * silent replica: names it), those of the hooks. */
MUST_CHECK enum status lease_owner_poll(struct lease_owner *owner);
/* Serves until every other replica has left, and then every item is done, unless the run is
 * stopping. Where rank 0 decodes, its own client must have left: nobody else could do what it held.
 */
MUST_CHECK enum status lease_owner_serve(struct lease_owner *owner);

/* On the first rank of each replica. owner: on rank 0 its own owner (calls are direct), else NULL.
 */
MUST_CHECK enum status lease_client_create(struct lease_client **out, struct env *env,
                                           struct lease_owner *owner, size_t max_record_bytes,
                                           double timeout_s);
void lease_client_destroy(struct lease_client **client);

enum lease_state { LEASE_WAIT, LEASE_GRANTED, LEASE_NONE_LEFT, LEASE_STOP };
/* Asks for one prompt (if no request is under way) and looks whether an answer has come. Never
 * blocks. LEASE_GRANTED: *item is the prompt, whose start is journalled. LEASE_NONE_LEFT is final,
 * except that LEASE_STOP may follow it; LEASE_STOP is final: leave at once what is being decoded.
 */
MUST_CHECK enum status lease_client_poll(struct lease_client *client, enum lease_state *state,
                                         struct lease_item *item);
/* Hands a finished record over (packed: it may change at once). Does not wait for the owner unless
 * the record before it is still under way. Errors: ST_SHAPE (larger than max_record_bytes), ST_MPI;
 * on rank 0 also those of lease_owner_poll. */
MUST_CHECK enum status lease_client_finish(struct lease_client *client,
                                           const struct finished_record *record);
/* A record is still under way (as of the last progress): handing over another would wait for it. */
bool lease_client_is_sending(const struct lease_client *client);
/* Moves a record that is under way and looks whether the run stops (*stop); never blocks.
 * lease_client_poll does this too: to be called once per pass by a replica that has no free slot
 * and so does not poll. */
MUST_CHECK enum status lease_client_progress(struct lease_client *client, bool *stop);
/* The end of a replica's loop: waits until everything handed over has arrived, and tells the owner
 * that this replica leaves. */
MUST_CHECK enum status lease_client_leave(struct lease_client *client);

#endif
