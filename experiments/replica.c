/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/replica.h"

#include <string.h>
#include <time.h>

#include "core/mem.h"

/* What the first rank tells the others before each pass: how many prompts come in, whether that
 * were all, whether the run stops, then (ordinal, attempt, key, key) of each. */
enum { N_NEW, NONE_LEFT, STOP, HEADER, PER_LEASE = 4 };

static void rest(void)
{
    struct timespec t = {.tv_nsec = 200 * 1000};
    nanosleep(&t, NULL);
}

/* First rank: as many leases as there are free slots and answers. Waits only when there is nothing
 * else to do; the owner goes on being served meanwhile. */
static enum status collect(struct session *session, struct lease_owner *owner,
                           struct lease_client *client, int64_t *message)
{
    int32_t n_free = session_n_free(session);
    enum lease_state state = LEASE_WAIT;
    bool stop = false;
    memset(message, 0, HEADER * sizeof *message);
    if (owner) {
        TRY(lease_owner_poll(owner));
    }
    TRY(lease_client_progress(client, &stop));
    message[STOP] = stop;
    while (!message[STOP] && message[N_NEW] < n_free) {
        struct lease_item item;
        if (owner) {
            TRY(lease_owner_poll(owner));
        }
        TRY(lease_client_poll(client, &state, &item));
        if (state == LEASE_GRANTED) {
            int64_t *to = message + HEADER + PER_LEASE * message[N_NEW]++;
            to[0] = item.ordinal;
            to[1] = item.attempt;
            to[2] = (int64_t)item.key[0];
            to[3] = (int64_t)item.key[1];
        } else if (state == LEASE_NONE_LEFT) {
            message[NONE_LEFT] = 1;
            return ST_OK;
        } else if (state == LEASE_STOP) {
            message[STOP] = 1;
        } else if (message[N_NEW] > 0 || session_n_active(session) > 0) {
            return ST_OK;
        } else {
            rest();
        }
    }
    return ST_OK;
}

enum status replica_run(struct engine *e, struct session *session, const struct prompts *prompts,
                        int32_t n_slots, struct lease_owner *owner, struct lease_client *client)
{
    int64_t *message = NULL;
    int32_t n_ints = HEADER + PER_LEASE * n_slots;
    enum status st = ST_OK;
    TRY(MEM_NEW(&message, n_ints));
    struct tensor t = tensor_1d(message, DT_I64, n_ints);
    do {
        if (client) {
            TRY_GOTO(st, collect(session, owner, client, message), done);
        }
        TRY_GOTO(st, collective_broadcast(&e->coll, &t, 0), done);
        if (message[STOP]) {
            break; // prompts under way are left: a resumed run does them again
        }
        for (int64_t i = 0; i < message[N_NEW]; i++) {
            const int64_t *from = message + HEADER + PER_LEASE * i;
            const uint64_t key[2] = {(uint64_t)from[2], (uint64_t)from[3]};
            INVARIANT(from[0] >= 0 && from[0] < prompts->n);
            TRY_GOTO(
                st,
                session_start(session, &prompts->prompt[from[0]], from[0], key, (int32_t)from[1]),
                done);
        }
        TRY_GOTO(st, session_advance(session), done);
    } while (session_n_active(session) > 0 || !message[NONE_LEFT]);
    if (client) {
        TRY_GOTO(st, lease_client_leave(client), done);
    }
done:
    mem_free(message);
    return st;
}
