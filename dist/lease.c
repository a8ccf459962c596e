/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/lease.h"

#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/stop.h"
#include "dist/watchdog.h"

/* Client to owner: TAG_REQUEST (empty), TAG_RECORD (struct record_head, packed record), TAG_LEAVE
 * (empty, the last one), TAG_ALIVE (empty). Owner to client: TAG_ANSWER (struct answer), one for
 * every request; TAG_STOP (empty), exactly one for every client: when the run begins to stop, or
 * else when the client leaves. A client waits for it, so that no message is ever left over and none
 * is awaited in vain. Records are sent with the synchronous mode: the send ends only when the owner
 * has matched it, so no acknowledgement is needed. All ranks are one executable, so structs travel
 * as bytes. */
enum {
    TAG_REQUEST = 1,
    TAG_RECORD = 2,
    TAG_ANSWER = 3,
    TAG_LEAVE = 4,
    TAG_STOP = 5,
    TAG_ALIVE = 6
};

static const long IDLE_NS = 200 * 1000, IDLE_OWN_NS = 20 * 1000;
/* A replica that has said nothing else for this part of the time-out, or so long, says that it
 * lives; the owner waits a little longer than the time-out, so that a replica whose own watchdog
 * knows more speaks first. */
static const double ALIVE_PART = 0.25, ALIVE_S = 10, PATIENCE = 1.5;

struct record_head {
    int64_t ordinal;
    uint64_t key[2];
    uint64_t bytes; /* of the packed record behind it */
};

struct answer {
    int32_t granted, unused;
    struct lease_item item;
};

enum item_state { ITEM_WAITING = 0, ITEM_OUT, ITEM_DONE };

/* What the owner keeps for one other replica. A record buffer each: a replica that is slow in
 * sending its record must not hold up the others. */
struct peer {
    MPI_Request recv; /* of the record under way */
    MPI_Request send; /* of the last answer */
    MPI_Request stop; /* of the one TAG_STOP */
    size_t recv_bytes;
    unsigned char *record; /* (record_bytes) owned */
    struct answer answer;
    double heard_s; /* clock_s of its last message */
    bool waiting;   /* for an answer to its request */
    bool told;      /* TAG_STOP is sent */
    bool left;
};

struct lease_owner {
    struct env *env;                   /* borrowed, must outlive this */
    struct journal *journal;           /* borrowed, must outlive this */
    struct lease_item *items;          /* (n) owned, in the order of handing out */
    int32_t *by_ordinal;               /* (n) owned: indices into items, ascending ordinals */
    unsigned char *states;             /* (n) owned: enum item_state */
    int32_t *holders;                  /* (n) owned: replica */
    struct peer *peers;                /* (n_replicas) owned; [0] is not used if rank 0 decodes */
    int64_t n, n_given, n_done, n_own; /* n_own: given to replica 0, not done */
    int32_t epoch, n_left, n_receiving;
    bool own_left;        /* rank 0's own client */
    double deadline_s;    /* of clock_s; 0: none */
    const char *stopping; /* why; NULL: it is not. Static text */
    size_t record_bytes;  /* head and packed record */
    struct lease_hooks hooks;
    double timeout_s, looked_s; /* looked_s: clock_s of the last look at who is silent */
    int32_t first_peer;         /* 1 if rank 0 decodes, else 0 */
};

struct lease_client {
    struct env *env;           /* borrowed, must outlive this */
    struct lease_owner *owner; /* borrowed; NULL on other ranks than 0 */
    unsigned char *record;     /* (record_bytes) owned */
    size_t record_bytes;
    double timeout_s;
    MPI_Request request, reply, send, stop, alive;
    double said_s; /* clock_s of the last message to the owner */
    struct answer answer;
    bool asked, none_left, stopped;
};

static void idle(long ns)
{
    struct timespec t = {.tv_nsec = ns};
    nanosleep(&t, NULL);
}

static enum status check_record_bytes(size_t *out, size_t max_record_bytes)
{
    TRY(mem_add(out, max_record_bytes, sizeof(struct record_head)));
    if (*out > JOURNAL_MAX_PAYLOAD) {
        FAIL(ST_SHAPE,
             "a finished record may have %zu bytes, at most %d can be sent; record fewer "
             "features (output.kv_features) or tokens (decode.max_new_tokens)",
             max_record_bytes, JOURNAL_MAX_PAYLOAD);
    }
    return ST_OK;
}

static int in_fixed_order(const void *pa, const void *pb)
{
    const struct lease_item *a = pa, *b = pb;
    if (a->cost != b->cost) {
        return a->cost > b->cost ? -1 : 1;
    }
    return (a->ordinal > b->ordinal) - (a->ordinal < b->ordinal);
}

static int in_turn(const void *pa, const void *pb)
{
    const struct lease_item *a = pa, *b = pb;
    if ((a->alone != 0) != (b->alone != 0)) {
        return a->alone ? 1 : -1;
    }
    return in_fixed_order(pa, pb);
}

/* Sorting needs items and indices together; this pair is sorted, then taken apart. */
struct indexed {
    int64_t ordinal;
    int32_t index;
};

static int smaller_ordinal(const void *pa, const void *pb)
{
    const struct indexed *a = pa, *b = pb;
    return (a->ordinal > b->ordinal) - (a->ordinal < b->ordinal);
}

static enum status index_items(struct lease_owner *o)
{
    struct indexed *pairs = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&pairs, o->n));
    for (int64_t i = 0; i < o->n; i++) {
        pairs[i] = (struct indexed){o->items[i].ordinal, (int32_t)i};
    }
    qsort(pairs, (size_t)o->n, sizeof *pairs, smaller_ordinal);
    for (int64_t i = 0; i < o->n; i++) {
        if (i > 0 && pairs[i].ordinal == pairs[i - 1].ordinal) {
            FAIL_GOTO(st, ST_SHAPE, done, "prompt %" PRId64 " is listed twice", pairs[i].ordinal);
        }
        o->by_ordinal[i] = pairs[i].index;
    }
done:
    mem_free(pairs);
    return st;
}

static enum status owner_allocate(struct lease_owner *o, const struct lease_item *items)
{
    TRY(MEM_NEW(&o->items, o->n));
    TRY(MEM_NEW(&o->by_ordinal, o->n));
    TRY(MEM_NEW(&o->states, o->n));
    TRY(MEM_NEW(&o->holders, o->n));
    TRY(MEM_NEW(&o->peers, o->env->n_replicas));
    for (int r = 0; r < o->env->n_replicas; r++) {
        o->peers[r].recv = o->peers[r].send = o->peers[r].stop = MPI_REQUEST_NULL;
    }
    for (int r = o->first_peer; r < o->env->n_replicas; r++) {
        TRY(MEM_NEW(&o->peers[r].record, o->record_bytes));
    }
    if (o->n > 0) {
        memcpy(o->items, items, (size_t)o->n * sizeof *items);
        qsort(o->items, (size_t)o->n, sizeof *o->items, o->hooks.dial ? in_fixed_order : in_turn);
        TRY(index_items(o));
    }
    if (o->hooks.poll) {
        TRY(journal_writer_open(o->journal));
    }
    return journal_reserve(o->journal, o->record_bytes);
}

enum status lease_owner_create(struct lease_owner **out, struct env *env, struct journal *journal,
                               const struct lease_item *items, int64_t n, int32_t epoch,
                               size_t max_record_bytes, const struct lease_hooks *hooks)
{
    INVARIANT(env->rank == 0 && env->n_replicas > 0);
    if (n < 0 || n > INT32_MAX) {
        FAIL(ST_SHAPE, "%" PRId64 " prompts, at most %d can be leased in one run", n, INT32_MAX);
    }
    struct lease_owner *o = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&o, 1));
    o->env = env;
    o->journal = journal;
    o->n = n;
    o->epoch = epoch;
    o->hooks = hooks ? *hooks : (struct lease_hooks){0};
    o->first_peer = 1 - env->n_service;
    o->own_left = env->n_service > 0;
    TRY_GOTO(st, check_record_bytes(&o->record_bytes, max_record_bytes), failed);
    TRY_GOTO(st, owner_allocate(o, items), failed);
    *out = o;
    return ST_OK;
failed:
    lease_owner_destroy(&o);
    return st;
}

/* Only after a failure is anything still under way; the job ends then. */
static void drop_request(MPI_Request *request)
{
    if (*request != MPI_REQUEST_NULL) {
        MPI_Cancel(request);
        MPI_Request_free(request);
    }
}

void lease_owner_destroy(struct lease_owner **owner)
{
    if (!owner || !*owner) {
        return;
    }
    struct lease_owner *o = *owner;
    for (int r = 0; o->peers && r < o->env->n_replicas; r++) {
        drop_request(&o->peers[r].recv);
        drop_request(&o->peers[r].send);
        drop_request(&o->peers[r].stop);
        mem_free(o->peers[r].record);
    }
    mem_free(o->peers);
    mem_free(o->holders);
    mem_free(o->states);
    mem_free(o->by_ordinal);
    mem_free(o->items);
    mem_free(o);
    *owner = NULL;
}

void lease_owner_set_deadline(struct lease_owner *owner, double seconds)
{
    owner->deadline_s = seconds > 0 ? clock_s() + seconds : 0;
}

void lease_owner_set_timeout(struct lease_owner *owner, double seconds)
{
    owner->timeout_s = seconds;
}

const char *lease_owner_stopping(const struct lease_owner *owner)
{
    return owner->n_done < owner->n ? owner->stopping : NULL;
}

static enum status tell_stop(struct lease_owner *o, int32_t replica)
{
    struct peer *p = &o->peers[replica];
    if (!p->told) {
        p->told = true;
        TRY_MPI(MPI_Isend(NULL, 0, MPI_BYTE, env_first_rank(o->env, replica), TAG_STOP,
                          o->env->lease_comm, &p->stop));
    }
    return ST_OK;
}

static enum status answer_waiting(struct lease_owner *o);

/* A wish to stop that comes when all is done changes nothing: the run ends as it would have. */
static enum status look_for_stop(struct lease_owner *o)
{
    if (o->stopping || o->n_done == o->n) {
        return ST_OK;
    }
    if (stop_asked()) {
        o->stopping = stop_reason();
    } else if (o->deadline_s > 0 && clock_s() >= o->deadline_s) {
        o->stopping = "run.deadline_s";
    } else {
        return ST_OK;
    }
    for (int r = o->first_peer; r < o->env->n_replicas; r++) {
        TRY(tell_stop(o, r));
    }
    return answer_waiting(o);
}

/* A record that is durable when this returns. Others than leases are served meanwhile: a plan does
 * not wait for the disk. */
static enum status append(struct lease_owner *o, uint32_t kind, const void *payload, size_t bytes)
{
    if (!o->hooks.poll) {
        return journal_append(o->journal, kind, payload, bytes, true);
    }
    journal_append_begin(o->journal, kind, payload, bytes);
    for (bool done = false;;) {
        bool any = false;
        TRY(journal_append_done(o->journal, &done));
        if (done) {
            return ST_OK;
        }
        TRY(o->hooks.poll(o->hooks.ctx, &any));
        if (!any) {
            idle(IDLE_OWN_NS);
        }
    }
}

/* The next prompt for a replica, its start journalled. LEASE_NONE_LEFT: none is left, or none is
 * given any more; LEASE_WAIT: its dial is not yet known. */
static enum status give_item(struct lease_owner *o, int32_t replica, enum lease_state *state,
                             struct lease_item *item)
{
    *state = LEASE_NONE_LEFT;
    if (o->n_given == o->n || o->stopping) {
        return ST_OK;
    }
    struct lease_item *next = &o->items[o->n_given];
    if (o->hooks.dial) {
        bool known = false;
        TRY(o->hooks.dial(o->hooks.ctx, next, &known, &next->dial));
        if (!known) {
            *state = LEASE_WAIT;
            return ST_OK;
        }
    }
    struct journal_start start = {.ordinal = next->ordinal,
                                  .key = {next->key[0], next->key[1]},
                                  .attempt = next->attempt,
                                  .epoch = o->epoch,
                                  .replica = replica};
    unsigned char packed[JOURNAL_SMALL_BYTES];
    size_t bytes = journal_pack_start(packed, &start);
    TRY(append(o, JOURNAL_START, packed, bytes));
    o->states[o->n_given] = ITEM_OUT;
    o->holders[o->n_given] = replica;
    o->n_given++;
    o->n_own += replica == 0;
    *item = *next;
    *state = LEASE_GRANTED;
    return ST_OK;
}

static int64_t find_item(const struct lease_owner *o, int64_t ordinal)
{
    int64_t low = 0, high = o->n;
    while (low < high) {
        int64_t mid = low + (high - low) / 2;
        if (o->items[o->by_ordinal[mid]].ordinal < ordinal) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    bool found = low < o->n && o->items[o->by_ordinal[low]].ordinal == ordinal;
    return found ? o->by_ordinal[low] : -1;
}

/* message: struct record_head, packed record. */
static enum status take_record(struct lease_owner *o, int32_t replica, const unsigned char *message,
                               size_t bytes)
{
    struct record_head head = {0};
    if (bytes >= sizeof head) {
        memcpy(&head, message, sizeof head);
    }
    if (bytes < sizeof head || head.bytes != bytes - sizeof head) {
        FAIL(ST_FORMAT,
             "a finished record from replica %d has %zu bytes, its head announces "
             "%" PRIu64 "; this is a defect of pmpd",
             replica, bytes, head.bytes);
    }
    int64_t i = find_item(o, head.ordinal);
    if (i < 0 || o->states[i] != ITEM_OUT || o->holders[i] != replica ||
        o->items[i].key[0] != head.key[0] || o->items[i].key[1] != head.key[1]) {
        FAIL(ST_FORMAT,
             "replica %d handed in prompt %" PRId64 ", which it does not hold; this is "
             "a defect of pmpd",
             replica, head.ordinal);
    }
    TRY(append(o, JOURNAL_FINISHED, message + sizeof head, (size_t)head.bytes));
    o->states[i] = ITEM_DONE;
    o->n_done++;
    o->n_own -= replica == 0;
    if (o->hooks.done) {
        TRY(o->hooks.done(o->hooks.ctx, o->n_done, o->n, head.ordinal, message + sizeof head,
                          (size_t)head.bytes));
    }
    return answer_waiting(o);
}

static enum status answer_request(struct lease_owner *o, int32_t replica)
{
    struct peer *p = &o->peers[replica];
    enum lease_state state = LEASE_WAIT;
    struct lease_item item = {0};
    TRY(give_item(o, replica, &state, &item));
    p->waiting = state == LEASE_WAIT;
    if (p->waiting) {
        return ST_OK;
    }
    // the replica asks again only when it has the last answer, so this does not wait
    TRY_MPI(MPI_Wait(&p->send, MPI_STATUS_IGNORE));
    p->answer = (struct answer){.granted = state == LEASE_GRANTED, .item = item};
    TRY_MPI(MPI_Isend(&p->answer, (int)sizeof p->answer, MPI_BYTE, env_first_rank(o->env, replica),
                      TAG_ANSWER, o->env->lease_comm, &p->send));
    return ST_OK;
}

static enum status answer_waiting(struct lease_owner *o)
{
    for (int r = o->first_peer; r < o->env->n_replicas; r++) {
        if (o->peers[r].waiting) {
            TRY(answer_request(o, r));
        }
    }
    return ST_OK;
}

static enum status serve_message(struct lease_owner *o, MPI_Message *message,
                                 const MPI_Status *probed)
{
    int bytes = 0, source = probed->MPI_SOURCE;
    int32_t replica = (source - o->env->n_service) / o->env->tensor_size;
    TRY_MPI(MPI_Get_count(probed, MPI_BYTE, &bytes));
    INVARIANT(replica >= o->first_peer && source == env_first_rank(o->env, replica));
    struct peer *p = &o->peers[replica];
    p->heard_s = clock_s();
    if (probed->MPI_TAG == TAG_ALIVE && bytes == 0) {
        TRY_MPI(MPI_Mrecv(NULL, 0, MPI_BYTE, message, MPI_STATUS_IGNORE));
        return ST_OK;
    }
    if (probed->MPI_TAG == TAG_REQUEST && bytes == 0) {
        TRY_MPI(MPI_Mrecv(NULL, 0, MPI_BYTE, message, MPI_STATUS_IGNORE));
        return answer_request(o, replica);
    }
    if (probed->MPI_TAG == TAG_LEAVE && bytes == 0 && !p->left) {
        TRY_MPI(MPI_Mrecv(NULL, 0, MPI_BYTE, message, MPI_STATUS_IGNORE));
        p->left = true;
        o->n_left++;
        return tell_stop(o, replica);
    }
    if (probed->MPI_TAG != TAG_RECORD || bytes < 0 || (size_t)bytes > o->record_bytes) {
        FAIL(ST_FORMAT,
             "a message of %d bytes with tag %d from rank %d was not expected (records "
             "have at most %zu bytes); this is a defect of pmpd",
             bytes, probed->MPI_TAG, source, o->record_bytes);
    }
    if (p->recv != MPI_REQUEST_NULL) {
        // the replica sends the next record when the last has left it: no wait worth the name
        TRY_MPI(MPI_Wait(&p->recv, MPI_STATUS_IGNORE));
        o->n_receiving--;
        TRY(take_record(o, replica, p->record, p->recv_bytes));
    }
    // not MPI_Mrecv: a long message needs the sender's help, and the sender may be computing
    TRY_MPI(MPI_Imrecv(p->record, bytes, MPI_BYTE, message, &p->recv));
    p->recv_bytes = (size_t)bytes;
    o->n_receiving++;
    return ST_OK;
}

static enum status take_arrived(struct lease_owner *o, bool *any)
{
    for (int r = o->first_peer; r < o->env->n_replicas && o->n_receiving > 0; r++) {
        struct peer *p = &o->peers[r];
        int here = 0;
        if (p->recv == MPI_REQUEST_NULL) {
            continue;
        }
        TRY_MPI(MPI_Test(&p->recv, &here, MPI_STATUS_IGNORE));
        if (here) {
            o->n_receiving--;
            *any = true;
            TRY(take_record(o, r, p->record, p->recv_bytes));
        }
    }
    return ST_OK;
}

/* All that was sent has been looked at: is anybody silent? */
static enum status look_for_silence(struct lease_owner *o)
{
    double now = clock_s();
    if (o->timeout_s <= 0 || now - o->looked_s < o->timeout_s / 10) {
        return ST_OK;
    }
    bool first = o->looked_s <= 0; // the loop begins
    o->looked_s = now;
    for (int r = o->first_peer; r < o->env->n_replicas; r++) {
        struct peer *p = &o->peers[r];
        p->heard_s = first ? now : p->heard_s;
        if (!p->left && p->recv == MPI_REQUEST_NULL && now - p->heard_s > PATIENCE * o->timeout_s) {
            FAIL(ST_TIMEOUT,
                 "replica %d (rank %d) has not answered for %.0f s: is it stopped, or its node "
                 "overloaded? The same command resumes (parallel.timeout_s = %.0f s)",
                 r, env_first_rank(o->env, r), now - p->heard_s, o->timeout_s);
        }
    }
    return ST_OK;
}

static enum status serve_waiting(struct lease_owner *o, bool *any)
{
    *any = false;
    TRY(look_for_stop(o));
    if (o->hooks.poll) {
        TRY(o->hooks.poll(o->hooks.ctx, any));
    }
    if (o->env->n_replicas == o->first_peer) {
        return ST_OK;
    }
    // records first: a replica may have the next one ready, and its buffer must be free by then
    TRY(take_arrived(o, any));
    for (;;) {
        int waiting = 0;
        MPI_Message message = MPI_MESSAGE_NULL;
        MPI_Status probed;
        TRY_MPI(MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, o->env->lease_comm, &waiting, &message,
                            &probed));
        if (!waiting) {
            return look_for_silence(o);
        }
        *any = true;
        TRY(serve_message(o, &message, &probed));
        TRY(take_arrived(o, any));
    }
}

enum status lease_owner_poll(struct lease_owner *owner)
{
    bool any = false;
    return serve_waiting(owner, &any);
}

enum status lease_owner_serve(struct lease_owner *owner)
{
    struct lease_owner *o = owner;
    INVARIANT(o->own_left);
    while (o->n_left < o->env->n_replicas - o->first_peer || o->n_receiving > 0) {
        bool any = false;
        TRY(serve_waiting(o, &any));
        if (!any) {
            idle(o->first_peer == 0 ? IDLE_OWN_NS : IDLE_NS);
        }
    }
    for (int r = o->first_peer; r < o->env->n_replicas; r++) {
        TRY_MPI(MPI_Wait(&o->peers[r].send, MPI_STATUS_IGNORE));
        TRY_MPI(MPI_Wait(&o->peers[r].stop, MPI_STATUS_IGNORE));
    }
    if (o->n_done < o->n && !o->stopping) {
        FAIL(ST_FORMAT,
             "every replica has left, but only %" PRId64 " of %" PRId64
             " prompts came back; this is a defect of pmpd",
             o->n_done, o->n);
    }
    return ST_OK;
}

enum status lease_client_create(struct lease_client **out, struct env *env,
                                struct lease_owner *owner, size_t max_record_bytes,
                                double timeout_s)
{
    INVARIANT(env->replica >= 0 && env->tensor_rank == 0 && (env->rank == 0) == (owner != NULL));
    struct lease_client *c = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&c, 1));
    c->env = env;
    c->owner = owner;
    c->timeout_s = timeout_s;
    c->request = c->reply = c->send = c->stop = c->alive = MPI_REQUEST_NULL;
    c->said_s = clock_s();
    TRY_GOTO(st, check_record_bytes(&c->record_bytes, max_record_bytes), failed);
    TRY_GOTO(st, MEM_NEW(&c->record, c->record_bytes), failed);
    if (timeout_s > 0) {
        TRY_GOTO(st, watchdog_start(env->rank), failed);
    }
    if (!owner) {
        int rc = MPI_Irecv(NULL, 0, MPI_BYTE, 0, TAG_STOP, env->lease_comm, &c->stop);
        TRY_GOTO(st, env_mpi_check(rc, "MPI_Irecv", __FILE__, __LINE__, __func__), failed);
    }
    *out = c;
    return ST_OK;
failed:
    lease_client_destroy(&c);
    return st;
}

void lease_client_destroy(struct lease_client **client)
{
    if (!client || !*client) {
        return;
    }
    struct lease_client *c = *client;
    drop_request(&c->request);
    drop_request(&c->reply);
    drop_request(&c->send);
    drop_request(&c->stop);
    drop_request(&c->alive);
    mem_free(c->record);
    mem_free(c);
    *client = NULL;
}

/* Sends the request and posts the receive for its answer. */
static enum status ask(struct lease_client *c)
{
    TRY_MPI(MPI_Wait(&c->request, MPI_STATUS_IGNORE)); // long gone: it was answered
    TRY_MPI(MPI_Irecv(&c->answer, (int)sizeof c->answer, MPI_BYTE, 0, TAG_ANSWER,
                      c->env->lease_comm, &c->reply));
    TRY_MPI(MPI_Isend(NULL, 0, MPI_BYTE, 0, TAG_REQUEST, c->env->lease_comm, &c->request));
    c->asked = true;
    c->said_s = clock_s();
    return ST_OK;
}

/* Now and then, when nothing else was said. */
static enum status say_alive(struct lease_client *c)
{
    double now = clock_s();
    double every = c->timeout_s * ALIVE_PART < ALIVE_S ? c->timeout_s * ALIVE_PART : ALIVE_S;
    int gone = 0;
    if (c->timeout_s <= 0 || now - c->said_s < every) {
        return ST_OK;
    }
    TRY_MPI(MPI_Test(&c->alive, &gone, MPI_STATUS_IGNORE));
    if (gone) {
        TRY_MPI(MPI_Isend(NULL, 0, MPI_BYTE, 0, TAG_ALIVE, c->env->lease_comm, &c->alive));
        c->said_s = now;
    }
    return ST_OK;
}

bool lease_client_is_sending(const struct lease_client *client)
{
    return client->send != MPI_REQUEST_NULL;
}

enum status lease_client_progress(struct lease_client *client, bool *stop)
{
    struct lease_client *c = client;
    int here = 0;
    TRY_MPI(MPI_Test(&c->send, &here, MPI_STATUS_IGNORE));
    if (c->owner) {
        TRY(look_for_stop(c->owner));
        c->stopped = c->owner->stopping != NULL;
    } else if (!c->stopped) {
        TRY_MPI(MPI_Test(&c->stop, &here, MPI_STATUS_IGNORE));
        c->stopped = here != 0;
    }
    if (!c->owner) {
        TRY(say_alive(c));
    }
    *stop = c->stopped;
    return ST_OK;
}

enum status lease_client_poll(struct lease_client *client, enum lease_state *state,
                              struct lease_item *item)
{
    struct lease_client *c = client;
    bool stop = false;
    TRY(lease_client_progress(c, &stop));
    *state = stop ? LEASE_STOP : LEASE_NONE_LEFT;
    if (stop || c->none_left) {
        return ST_OK;
    }
    if (c->owner) {
        TRY(give_item(c->owner, 0, state, item));
    } else {
        if (!c->asked) {
            TRY(ask(c));
        }
        int here = 0;
        TRY_MPI(MPI_Test(&c->reply, &here, MPI_STATUS_IGNORE));
        if (!here) {
            *state = LEASE_WAIT;
            return ST_OK;
        }
        c->asked = false;
        *state = c->answer.granted ? LEASE_GRANTED : LEASE_NONE_LEFT;
        if (c->answer.granted) {
            *item = c->answer.item;
        }
    }
    c->none_left = *state == LEASE_NONE_LEFT;
    return ST_OK;
}

/* Rank 0 looks between two passes: sleep meanwhile, the core may be its own. */
static enum status wait_for(struct lease_client *c, MPI_Request *request, const char *what)
{
    int done = 0;
    watchdog_enter(what, c->timeout_s);
    while (!done) {
        int rc = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (rc != MPI_SUCCESS) {
            watchdog_leave();
            TRY_MPI(rc);
        }
        if (!done) {
            idle(IDLE_NS);
        }
    }
    watchdog_leave();
    return ST_OK;
}

enum status lease_client_leave(struct lease_client *client)
{
    struct lease_client *c = client;
    if (c->owner) {
        INVARIANT(c->owner->n_own == 0 || c->owner->stopping);
        c->owner->own_left = true;
        return ST_OK;
    }
    TRY(wait_for(c, &c->send, "waiting for rank 0 to take a finished record"));
    // a prompt that is granted now stays undone: only a stop leaves with a request under way
    TRY(wait_for(c, &c->reply, "waiting for rank 0 to answer a request"));
    TRY_MPI(MPI_Isend(NULL, 0, MPI_BYTE, 0, TAG_LEAVE, c->env->lease_comm, &c->send));
    TRY(wait_for(c, &c->send, "telling rank 0 that this replica leaves"));
    TRY(wait_for(c, &c->request, "telling rank 0 that this replica leaves"));
    TRY(wait_for(c, &c->alive, "telling rank 0 that this replica leaves"));
    return wait_for(c, &c->stop, "waiting for rank 0 to let this replica leave");
}

enum status lease_client_finish(struct lease_client *client, const struct finished_record *record)
{
    struct lease_client *c = client;
    struct record_head head = {.ordinal = record->ordinal,
                               .key = {record->key[0], record->key[1]},
                               .bytes = trace_packed_bytes(record)};
    if (head.bytes > c->record_bytes - sizeof head) {
        FAIL(ST_SHAPE,
             "the record of prompt %" PRId64 " has %" PRIu64 " bytes, %zu were "
             "announced",
             record->ordinal, head.bytes, c->record_bytes - sizeof head);
    }
    // the buffer is free again then
    TRY(wait_for(c, &c->send, "waiting for rank 0 to take a finished record"));
    memcpy(c->record, &head, sizeof head);
    trace_pack(c->record + sizeof head, c->record_bytes - sizeof head, record);
    size_t bytes = sizeof head + (size_t)head.bytes;
    if (c->owner) {
        return take_record(c->owner, 0, c->record, bytes);
    }
    TRY_MPI(
        MPI_Issend(c->record, (int)bytes, MPI_BYTE, 0, TAG_RECORD, c->env->lease_comm, &c->send));
    return ST_OK;
}
