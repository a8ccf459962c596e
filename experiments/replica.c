/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/replica.h"

#include <string.h>
#include <time.h>

#include "core/log.h"
#include "core/mem.h"

/* What the first rank tells the others before each pass: how many prompts come in, whether no more
 * will, whether the run stops, then (ordinal, attempt, key, key, dial) of each. */
enum { N_IN = 0, NO_MORE = 1, STOP = 2, HEADER = 3, PER_LEASE = 5 };

/* Longest silence towards the other ranks, who wait in a collective, while no prompt is granted. */
static const double SILENCE_S = 1;

/* A replica's first rank: a suspect waits for an empty replica, and then has it for itself. */
struct intake {
    struct lease_owner *owner; /* borrowed; rank 0 of the world */
    struct lease_client *client;
    struct lease_item held; /* a suspect that waits */
    bool holds, alone;      /* alone: a suspect is being decoded */
};

static void rest(void)
{
    struct timespec t = {.tv_nsec = 200 * 1000};
    nanosleep(&t, NULL);
}

/* Puts a granted prompt into the message, or holds it back; false: no more beside it. */
static bool admit(struct intake *in, const struct lease_item *item, int32_t n_busy,
                  int64_t *message)
{
    in->holds = item->alone && n_busy > 0;
    if (in->holds) {
        in->held = *item;
        return false;
    }
    int64_t *to = message + HEADER + PER_LEASE * message[N_IN]++;
    to[0] = item->ordinal;
    to[1] = item->attempt;
    to[2] = (int64_t)item->key[0];
    to[3] = (int64_t)item->key[1];
    to[4] = 0;
    memcpy(&to[4], &item->dial, sizeof item->dial);
    in->alone = item->alone != 0;
    return !in->alone;
}

/* As many leases as there are free slots and answers. Waits only when there is nothing else to do;
 * the owner goes on being served meanwhile. */
static enum status collect(struct intake *in, const struct session *session, int64_t *message)
{
    int32_t n_active = session_n_active(session), n_free = session_n_free(session);
    enum lease_state state = LEASE_WAIT;
    struct lease_item item;
    bool stop = false, more = true;
    double start = clock_s();
    message[N_IN] = message[NO_MORE] = message[STOP] = 0;
    if (in->owner) {
        TRY(lease_owner_poll(in->owner));
    }
    TRY(lease_client_progress(in->client, &stop));
    message[STOP] = stop;
    if (stop || (n_active > 0 && (in->alone || in->holds))) {
        return ST_OK;
    }
    if (in->holds) {
        item = in->held;
        more = admit(in, &item, 0, message);
    }
    while (more && message[N_IN] < n_free) {
        TRY(lease_client_poll(in->client, &state, &item));
        if (state == LEASE_GRANTED) {
            more = admit(in, &item, n_active + (int32_t)message[N_IN], message);
        } else if (state == LEASE_WAIT && n_active == 0 && message[N_IN] == 0 &&
                   clock_s() - start < SILENCE_S) {
            rest();
        } else {
            more = false;
        }
        if (in->owner) {
            TRY(lease_owner_poll(in->owner));
        }
    }
    message[NO_MORE] = state == LEASE_NONE_LEFT;
    message[STOP] = state == LEASE_STOP;
    return ST_OK;
}

enum status replica_run(struct engine *e, struct session *session, const struct prompts *prompts,
                        int32_t n_slots, struct lease_owner *owner, struct lease_client *client,
                        struct service_client *service)
{
    struct intake in = {.owner = owner, .client = client};
    int64_t *message = NULL;
    int32_t n_ints = HEADER + PER_LEASE * n_slots;
    enum status st = ST_OK;
    TRY(MEM_NEW(&message, n_ints));
    struct tensor t = tensor_1d(message, DT_I64, n_ints);
    do {
        if (client) {
            TRY_GOTO(st, collect(&in, session, message), done);
        }
        TRY_GOTO(st, collective_broadcast(&e->coll, &t, 0), done);
        if (message[STOP]) {
            break; // prompts under way are left: a resumed run does them again
        }
        for (int64_t i = 0; i < message[N_IN]; i++) {
            const int64_t *from = message + HEADER + PER_LEASE * i;
            const uint64_t key[2] = {(uint64_t)from[2], (uint64_t)from[3]};
            float dial = 0;
            memcpy(&dial, &from[4], sizeof dial);
            INVARIANT(from[0] >= 0 && from[0] < prompts->n);
            TRY_GOTO(st,
                     session_start(session, &prompts->prompt[from[0]], from[0], key,
                                   (int32_t)from[1], dial),
                     done);
        }
        TRY_GOTO(st, session_advance(session), done);
    } while (session_n_active(session) > 0 || !message[NO_MORE]);
    if (service) {
        TRY_GOTO(st, service_client_leave(service), done); // it is served until leases are left
    }
    if (client) {
        TRY_GOTO(st, lease_client_leave(client), done);
    }
done:
    mem_free(message);
    return st;
}
