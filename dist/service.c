/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/service.h"

#include <limits.h>
#include <string.h>
#include <time.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/watchdog.h"

/* Client to service: TAG_REQUEST (struct request_head, then what wire_bytes says). Service to
 * client c: TAG_ANSWER + c (struct answer_head, then n_switches struct plan_switch), one for every
 * request, in the order of a slot's requests. */
enum { TAG_REQUEST = 1, TAG_ANSWER = 2, MOST_CLIENTS = 32000 /* the least MPI_TAG_UB is 32767 */ };
enum { ALIGN = 16 };

static const long REST_NS = 20 * 1000;

/* Pointers in facts and signals are the sender's: the receiver sets them to what follows. */
struct request_head {
    int32_t client, slot;
    uint32_t serial;
    int32_t prefill; /* plan->prefill */
    struct prompt_facts facts;
    struct signals signals;
    uint64_t text_bytes; /* id and task, with their ends */
    uint64_t n_activation, n_features;
    uint64_t state_bytes; /* 0 but with a plan */
};

struct answer_head {
    int32_t slot;
    uint32_t serial;
    struct amendment amendment;
    int32_t n_switches, unused;
};

static size_t padded(size_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

/* Bytes of a request: head, state, activation, features, task, each padded. */
static size_t wire_bytes(const struct request_head *h)
{
    return padded(sizeof *h) + padded((size_t)h->state_bytes) +
           padded((size_t)h->n_activation * sizeof(float)) +
           padded((size_t)h->n_features * sizeof(float)) + padded((size_t)h->text_bytes);
}

static enum status check_options(size_t *request_bytes, size_t *answer_bytes,
                                 const struct service_options *o, size_t state_bytes)
{
    size_t floats = 0, bytes = 0, fixed = padded(sizeof(struct request_head)) + 4 * ALIGN;
    INVARIANT(o->n_clients >= 0 && o->n_clients <= MOST_CLIENTS && o->n_slots >= 1 && o->lag >= 1);
    TRY(mem_add(&floats, o->n_activation_floats, o->max_feature_floats));
    TRY(mem_mul(&bytes, floats, sizeof(float)));
    TRY(mem_add(&bytes, bytes, state_bytes));
    TRY(mem_add(&bytes, bytes, o->max_text_bytes + 2));
    TRY(mem_add(request_bytes, bytes, fixed));
    TRY(mem_mul(&bytes, (size_t)o->max_new_tokens, sizeof(struct plan_switch)));
    TRY(mem_add(answer_bytes, bytes, sizeof(struct answer_head)));
    if (*request_bytes > INT_MAX || *answer_bytes > INT_MAX) {
        FAIL(ST_SHAPE,
             "a request to the scheduler service may have %zu bytes, its answer %zu; at most %d "
             "can be sent: use features averaged over heads, a shorter decode.context or smaller "
             "decode.max_new_tokens",
             *request_bytes, *answer_bytes, INT_MAX);
    }
    return ST_OK;
}

/* ---- the service ---- */

/* What the service remembers of a turn. */
struct turn {
    struct prompt_facts facts; /* its texts are in text */
    char *text;                /* (max_text_bytes + 2) owned */
    void *state;               /* owned; NULL when the policy keeps none */
    bool in_batch;
};

/* A request on its way through. */
enum stage { STAGE_FREE, STAGE_BUSY, STAGE_LEAVING };
struct job {
    enum stage stage;
    int source; /* rank; -1: a direct call */
    size_t bytes;
    MPI_Request transfer;  /* of wire; LEAVING: of answer */
    unsigned char *wire;   /* (request_bytes) owned */
    unsigned char *answer; /* (answer_bytes) owned */
    struct plan plan;      /* owned */
    struct signals signals;
    struct request_head head;
};

struct service {
    struct env *env;             /* borrowed */
    const struct policy *policy; /* borrowed */
    struct service_options opt;
    size_t request_bytes, answer_bytes;
    struct turn *turns; /* (n_clients, n_slots) owned */
    struct job *jobs;   /* (n_jobs + 1) owned; the last is for direct calls */
    int32_t n_jobs;
    int32_t *queue; /* (n_jobs) owned: jobs whose requests are coming, as they were sent */
    int32_t n_queue;
    struct policy_request *batch; /* (n_jobs + 1) owned ... */
    int32_t *batch_job;           /* ... and whose they are */
    int32_t n_batch;
    struct service_counts counts;
};

static struct turn *turn_of(const struct service *s, int32_t client, int32_t slot)
{
    return &s->turns[(size_t)client * (size_t)s->opt.n_slots + (size_t)slot];
}

static enum status allocate(struct service *s)
{
    size_t n_turns = 0;
    TRY(mem_mul(&n_turns, (size_t)s->opt.n_clients, (size_t)s->opt.n_slots));
    TRY(MEM_NEW(&s->turns, n_turns));
    for (size_t i = 0; i < n_turns; i++) {
        TRY(MEM_NEW(&s->turns[i].text, s->opt.max_text_bytes + 2));
        if (s->policy->ops->state_bytes > 0) {
            TRY(mem_alloc_array(&s->turns[i].state, 1, s->policy->ops->state_bytes));
        }
    }
    TRY(MEM_NEW(&s->jobs, s->n_jobs + 1));
    for (int32_t i = 0; i <= s->n_jobs; i++) {
        s->jobs[i].transfer = MPI_REQUEST_NULL;
    }
    for (int32_t i = 0; i <= s->n_jobs; i++) {
        TRY(MEM_NEW(&s->jobs[i].wire, s->request_bytes));
        TRY(MEM_NEW(&s->jobs[i].answer, s->answer_bytes));
        TRY(plan_create(&s->jobs[i].plan, s->opt.max_new_tokens));
    }
    TRY(MEM_NEW(&s->queue, s->n_jobs));
    TRY(MEM_NEW(&s->batch, s->n_jobs + 1));
    return MEM_NEW(&s->batch_job, s->n_jobs + 1);
}

enum status service_create(struct service **out, struct env *env, const struct policy *policy,
                           const struct service_options *options)
{
    struct service *s = NULL;
    enum status st = ST_OK;
    INVARIANT(env->rank == 0);
    TRY(MEM_NEW(&s, 1));
    *s = (struct service){.env = env, .policy = policy, .opt = *options};
    s->n_jobs = options->n_clients;
    TRY_GOTO(st,
             check_options(&s->request_bytes, &s->answer_bytes, options, policy->ops->state_bytes),
             failed);
    TRY_GOTO(st, allocate(s), failed);
    *out = s;
    return ST_OK;
failed:
    service_destroy(&s);
    return st;
}

/* Only after a failure is anything still under way; the job ends then. */
static void drop_transfer(MPI_Request *request)
{
    if (*request != MPI_REQUEST_NULL) {
        MPI_Cancel(request);
        MPI_Request_free(request);
    }
}

void service_destroy(struct service **service)
{
    struct service *s = service ? *service : NULL;
    if (!s) {
        return;
    }
    size_t n_turns = (size_t)s->opt.n_clients * (size_t)s->opt.n_slots;
    for (size_t i = 0; s->turns && i < n_turns; i++) {
        mem_free(s->turns[i].text);
        mem_free(s->turns[i].state);
    }
    for (int32_t i = 0; s->jobs && i <= s->n_jobs; i++) {
        drop_transfer(&s->jobs[i].transfer);
        mem_free(s->jobs[i].wire);
        mem_free(s->jobs[i].answer);
        plan_free(&s->jobs[i].plan);
    }
    mem_free(s->turns);
    mem_free(s->jobs);
    mem_free(s->queue);
    mem_free(s->batch);
    mem_free(s->batch_job);
    mem_free(s);
    *service = NULL;
}

struct service_counts service_counted(const struct service *s)
{
    return s->counts;
}

/* The head of the job's request, held against what may come. */
static enum status read_head(const struct service *s, struct job *j)
{
    struct request_head *h = &j->head;
    bool whole = j->bytes >= sizeof *h;
    memcpy(h, j->wire, whole ? sizeof *h : 0);
    if (!whole || h->client < 0 || h->client >= s->opt.n_clients || h->slot < 0 ||
        h->slot >= s->opt.n_slots || h->text_bytes < 2 ||
        h->text_bytes > s->opt.max_text_bytes + 2 || h->n_activation > s->opt.n_activation_floats ||
        h->n_features > s->opt.max_feature_floats || h->state_bytes > s->policy->ops->state_bytes ||
        wire_bytes(h) != j->bytes) {
        FAIL(ST_FORMAT,
             "a message of %zu bytes from rank %d is no request to the scheduler service (at most "
             "%zu bytes); this is a defect of pmpd",
             j->bytes, j->source, s->request_bytes);
    }
    return ST_OK;
}

/* Puts a request whose head is read into the batch. Two of one turn are never in the same. */
static enum status answer_batch(struct service *s);
static enum status add_to_batch(struct service *s, int32_t job)
{
    struct job *j = &s->jobs[job];
    const struct request_head *h = &j->head;
    struct turn *t = turn_of(s, h->client, h->slot);
    if (t->in_batch) {
        TRY(answer_batch(s));
    }
    const unsigned char *at = j->wire + padded(sizeof *h);
    if (h->state_bytes > 0) {
        memcpy(t->state, at, (size_t)h->state_bytes);
    }
    at += padded((size_t)h->state_bytes);
    j->signals = h->signals;
    j->signals.activation = h->n_activation ? (const float *)(const void *)at : NULL;
    at += padded((size_t)h->n_activation * sizeof(float));
    j->signals.features = h->n_features ? (const float *)(const void *)at : NULL;
    at += padded((size_t)h->n_features * sizeof(float));
    memcpy(t->text, at, (size_t)h->text_bytes);
    t->text[h->text_bytes - 2] = t->text[h->text_bytes - 1] = '\0';
    t->facts = h->facts;
    t->facts.id = t->text;
    t->facts.task = t->text + strlen(t->text) + 1;
    plan_clear(&j->plan);
    j->plan.prefill = h->prefill;
    t->in_batch = true;
    s->batch_job[s->n_batch] = job;
    s->batch[s->n_batch++] = (struct policy_request){
        .facts = &t->facts, .signals = &j->signals, .state = t->state, .plan = &j->plan};
    return ST_OK;
}

static enum status send_answer(struct service *s, struct job *j, const struct policy_request *r)
{
    bool is_plan = j->signals.step < 0;
    struct answer_head head = {.slot = j->head.slot,
                               .serial = j->head.serial,
                               .amendment = r->amendment,
                               .n_switches = is_plan ? j->plan.n : 0};
    size_t bytes = (size_t)head.n_switches * sizeof *j->plan.at;
    memcpy(j->answer, &head, sizeof head);
    memcpy(j->answer + sizeof head, j->plan.at, bytes);
    if (j->source < 0) { // the caller takes it from there
        j->stage = STAGE_FREE;
        return ST_OK;
    }
    j->stage = STAGE_LEAVING;
    TRY_MPI(MPI_Isend(j->answer, (int)(sizeof head + bytes), MPI_BYTE, j->source,
                      TAG_ANSWER + j->head.client, s->env->service_comm, &j->transfer));
    return ST_OK;
}

static enum status answer_batch(struct service *s)
{
    int32_t n = s->n_batch;
    if (n == 0) {
        return ST_OK;
    }
    TRY(policy_answer(s->policy, s->batch, n, s->opt.n_levels));
    s->counts.n_requests += n;
    s->counts.n_batches++;
    s->counts.largest_batch = n > s->counts.largest_batch ? n : s->counts.largest_batch;
    s->n_batch = 0;
    for (int32_t i = 0; i < n; i++) {
        struct job *j = &s->jobs[s->batch_job[i]];
        turn_of(s, j->head.client, j->head.slot)->in_batch = false;
        TRY(send_answer(s, j, &s->batch[i]));
    }
    return ST_OK;
}

/* Requests that have arrived go into the batch, in the order in which they were sent: what comes
 * after one that is still under way waits for it. */
static enum status take_arrived(struct service *s)
{
    int32_t n_left = 0;
    for (int32_t i = 0; i < s->n_queue; i++) {
        struct job *j = &s->jobs[s->queue[i]];
        int here = 0;
        if (n_left == 0) {
            TRY_MPI(MPI_Test(&j->transfer, &here, MPI_STATUS_IGNORE));
        }
        if (!here) {
            s->queue[n_left++] = s->queue[i];
            continue;
        }
        TRY(read_head(s, j));
        TRY(add_to_batch(s, s->queue[i]));
    }
    s->n_queue = n_left;
    return ST_OK;
}

/* A job that nobody needs; -1: all are at work. */
static enum status find_free(struct service *s, int32_t *job)
{
    *job = -1;
    for (int32_t i = 0; i < s->n_jobs && *job < 0; i++) {
        struct job *j = &s->jobs[i];
        int gone = 0;
        if (j->stage == STAGE_LEAVING) {
            TRY_MPI(MPI_Test(&j->transfer, &gone, MPI_STATUS_IGNORE));
            j->stage = gone ? STAGE_FREE : j->stage;
        }
        *job = j->stage == STAGE_FREE ? i : -1;
    }
    return ST_OK;
}

/* Matches what waits with jobs, as long as there are any. */
static enum status receive(struct service *s, bool *any)
{
    for (;;) {
        int waiting = 0, bytes = 0;
        int32_t job = -1;
        MPI_Message message = MPI_MESSAGE_NULL;
        MPI_Status probed;
        TRY(find_free(s, &job));
        if (job < 0) {
            return ST_OK;
        }
        TRY_MPI(MPI_Improbe(MPI_ANY_SOURCE, TAG_REQUEST, s->env->service_comm, &waiting, &message,
                            &probed));
        if (!waiting) {
            return ST_OK;
        }
        TRY_MPI(MPI_Get_count(&probed, MPI_BYTE, &bytes));
        if (bytes < 0 || (size_t)bytes > s->request_bytes) {
            FAIL(ST_FORMAT,
                 "a request of %d bytes from rank %d to the scheduler service; at most %zu were "
                 "announced; this is a defect of pmpd",
                 bytes, probed.MPI_SOURCE, s->request_bytes);
        }
        struct job *j = &s->jobs[job];
        j->stage = STAGE_BUSY;
        j->source = probed.MPI_SOURCE;
        j->bytes = (size_t)bytes;
        // not MPI_Mrecv: a long message needs the sender's help, and the sender may be computing
        TRY_MPI(MPI_Imrecv(j->wire, bytes, MPI_BYTE, &message, &j->transfer));
        s->queue[s->n_queue++] = job;
        *any = true;
    }
}

enum status service_poll(struct service *s, bool *any)
{
    bool more = true;
    while (more) {
        more = false;
        TRY(receive(s, &more));
        *any = *any || more;
        TRY(take_arrived(s));
        TRY(answer_batch(s));
    }
    return ST_OK;
}

/* ---- a client ---- */

/* An answer that was asked for and is not yet taken. */
struct expected {
    uint32_t serial;
    bool here;
    double asked_s;
    float latency_us;
    struct amendment amendment;
    int32_t n_switches;
};

/* Requests of a slot, oldest first. */
struct line {
    struct expected *ring; /* (lag + 2) owned */
    int32_t first, n;
    struct plan_switch *plan; /* (max_new_tokens) owned: of the answer to step -1 */
};

struct service_client {
    struct env *env;         /* borrowed */
    struct service *service; /* borrowed; NULL on other ranks than 0 */
    struct service_options opt;
    int32_t client;
    size_t state_bytes, request_bytes, answer_bytes;
    unsigned char *wire, *answer; /* (request_bytes), (answer_bytes) owned */
    MPI_Request send;             /* of wire */
    struct line *lines;           /* (n_slots) owned */
    int32_t n_under_way;          /* answers that have not come, also those nobody takes */
    uint32_t next_serial;
};

enum status service_client_create(struct service_client **out, struct env *env,
                                  struct service *service, int32_t client,
                                  const struct service_options *options, size_t state_bytes)
{
    struct service_client *c = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&c, 1));
    *c = (struct service_client){.env = env,
                                 .service = service,
                                 .opt = *options,
                                 .client = client,
                                 .state_bytes = state_bytes,
                                 .send = MPI_REQUEST_NULL};
    TRY_GOTO(st, check_options(&c->request_bytes, &c->answer_bytes, options, state_bytes), failed);
    TRY_GOTO(st, MEM_NEW(&c->wire, c->request_bytes), failed);
    TRY_GOTO(st, MEM_NEW(&c->answer, c->answer_bytes), failed);
    TRY_GOTO(st, MEM_NEW(&c->lines, options->n_slots), failed);
    for (int32_t i = 0; i < options->n_slots; i++) {
        TRY_GOTO(st, MEM_NEW(&c->lines[i].ring, options->lag + 2), failed);
        TRY_GOTO(st, MEM_NEW(&c->lines[i].plan, options->max_new_tokens), failed);
    }
    if (options->timeout_s > 0) {
        TRY_GOTO(st, watchdog_start(env->rank), failed);
    }
    *out = c;
    return ST_OK;
failed:
    service_client_destroy(&c);
    return st;
}

void service_client_destroy(struct service_client **client)
{
    struct service_client *c = client ? *client : NULL;
    if (!c) {
        return;
    }
    drop_transfer(&c->send);
    for (int32_t i = 0; c->lines && i < c->opt.n_slots; i++) {
        mem_free(c->lines[i].ring);
        mem_free(c->lines[i].plan);
    }
    mem_free(c->lines);
    mem_free(c->wire);
    mem_free(c->answer);
    mem_free(c);
    *client = NULL;
}

/* An answer: to the request that it belongs to, or nowhere when nobody takes it any more. */
static enum status keep_answer(struct service_client *c, const unsigned char *message, size_t bytes)
{
    struct answer_head h;
    memcpy(&h, message, bytes < sizeof h ? 0 : sizeof h);
    if (bytes < sizeof h || h.slot < 0 || h.slot >= c->opt.n_slots || h.n_switches < 0 ||
        h.n_switches > c->opt.max_new_tokens ||
        bytes != sizeof h + (size_t)h.n_switches * sizeof(struct plan_switch)) {
        FAIL(ST_FORMAT,
             "a message of %zu bytes is no answer of the scheduler service; this is a defect of "
             "pmpd",
             bytes);
    }
    struct line *l = &c->lines[h.slot];
    c->n_under_way--;
    for (int32_t i = 0; i < l->n; i++) {
        struct expected *e = &l->ring[(l->first + i) % (c->opt.lag + 2)];
        if (e->serial == h.serial) {
            e->here = true;
            e->latency_us = (float)(1e6 * (clock_s() - e->asked_s));
            e->amendment = h.amendment;
            e->n_switches = h.n_switches;
            memcpy(l->plan, message + sizeof h, bytes - sizeof h);
        }
    }
    return ST_OK;
}

/* A direct call: answered at once, together with what has arrived from others. */
static enum status call(struct service_client *c, size_t bytes)
{
    struct service *s = c->service;
    struct job *j = &s->jobs[s->n_jobs];
    bool any = false;
    memcpy(j->wire, c->wire, bytes);
    j->source = -1;
    j->bytes = bytes;
    TRY(receive(s, &any));
    TRY(take_arrived(s));
    TRY(read_head(s, j));
    TRY(add_to_batch(s, s->n_jobs));
    TRY(answer_batch(s));
    return keep_answer(c, j->answer,
                       sizeof(struct answer_head) + (j->signals.step < 0 ? (size_t)j->plan.n : 0) *
                                                        sizeof(struct plan_switch));
}

/* Takes what has come. */
static enum status look(struct service_client *c)
{
    while (!c->service && c->n_under_way > 0) {
        int waiting = 0, bytes = 0;
        MPI_Status probed;
        TRY_MPI(MPI_Iprobe(0, TAG_ANSWER + c->client, c->env->service_comm, &waiting, &probed));
        if (!waiting) {
            return ST_OK;
        }
        TRY_MPI(MPI_Recv(c->answer, (int)c->answer_bytes, MPI_BYTE, 0, TAG_ANSWER + c->client,
                         c->env->service_comm, &probed));
        TRY_MPI(MPI_Get_count(&probed, MPI_BYTE, &bytes));
        TRY(keep_answer(c, c->answer, (size_t)bytes));
    }
    return ST_OK;
}

static void rest(void)
{
    struct timespec t = {.tv_nsec = REST_NS};
    nanosleep(&t, NULL);
}

/* The wire is free again: what was sent has left it. */
static enum status wait_for_wire(struct service_client *c)
{
    int gone = 0;
    for (;;) {
        TRY_MPI(MPI_Test(&c->send, &gone, MPI_STATUS_IGNORE));
        if (gone) {
            return ST_OK;
        }
        TRY(look(c));
        rest();
    }
}

static unsigned char *put(unsigned char *at, const void *from, size_t bytes)
{
    if (bytes > 0) {
        memcpy(at, from, bytes);
    }
    return at + padded(bytes);
}

static enum status ask(void *ctx, int32_t slot, const struct policy_request *r)
{
    struct service_client *c = ctx;
    struct line *l = &c->lines[slot];
    const struct signals *g = r->signals;
    size_t n_id = strlen(r->facts->id) + 1, n_task = strlen(r->facts->task) + 1;
    struct request_head h = {.client = c->client,
                             .slot = slot,
                             .serial = c->next_serial++,
                             .prefill = r->plan->prefill,
                             .facts = *r->facts,
                             .signals = *g,
                             .text_bytes = n_id + n_task};
    h.state_bytes = g->step < 0 ? c->state_bytes : 0;
    h.n_activation = g->activation ? c->opt.n_activation_floats : 0;
    if (g->features) {
        h.n_features = 2 * (uint64_t)g->n_feature_heads * (uint64_t)g->n_feature_tok *
                       (uint64_t)g->feature_dim;
    }
    size_t bytes = wire_bytes(&h);
    INVARIANT(l->n <= c->opt.lag + 1);
    if (bytes > c->request_bytes) {
        FAIL(ST_SHAPE,
             "a request about prompt %lld to the scheduler service has %zu bytes; %zu were "
             "announced",
             (long long)r->facts->ordinal, bytes, c->request_bytes);
    }
    watchdog_enter("sending a request to the scheduler service", c->opt.timeout_s);
    enum status st = wait_for_wire(c);
    watchdog_leave();
    TRY(st);
    unsigned char *at = put(c->wire, &h, sizeof h);
    at = put(at, r->state, (size_t)h.state_bytes);
    at = put(at, g->activation, (size_t)h.n_activation * sizeof(float));
    at = put(at, g->features, (size_t)h.n_features * sizeof(float));
    memcpy(at, r->facts->id, n_id);
    memcpy(at + n_id, r->facts->task, n_task);
    l->ring[(l->first + l->n++) % (c->opt.lag + 2)] =
        (struct expected){.serial = h.serial, .asked_s = clock_s()};
    c->n_under_way++;
    if (c->service) {
        return call(c, bytes);
    }
    TRY_MPI(
        MPI_Isend(c->wire, (int)bytes, MPI_BYTE, 0, TAG_REQUEST, c->env->service_comm, &c->send));
    return look(c);
}

enum status service_client_look(struct service_client *c, int32_t slot, bool *there)
{
    int gone = 0;
    TRY_MPI(MPI_Test(&c->send, &gone, MPI_STATUS_IGNORE)); // moves a long request on
    TRY(look(c));
    *there = c->lines[slot].n > 0 && c->lines[slot].ring[c->lines[slot].first].here;
    return ST_OK;
}

static enum status wait_for_answer(struct service_client *c, int32_t slot)
{
    for (bool there = false;;) {
        TRY(service_client_look(c, slot, &there));
        if (there) {
            return ST_OK;
        }
        rest();
    }
}

static enum status take(void *ctx, int32_t slot, struct policy_request *r, float *latency_us)
{
    struct service_client *c = ctx;
    struct line *l = &c->lines[slot];
    INVARIANT(l->n > 0);
    struct expected *e = &l->ring[l->first];
    if (!e->here) {
        watchdog_enter("waiting for an answer of the scheduler service on rank 0",
                       c->opt.timeout_s);
        enum status st = wait_for_answer(c, slot);
        watchdog_leave();
        TRY(st);
    }
    r->amendment = e->amendment;
    *latency_us = e->latency_us;
    for (int32_t i = 0; r->signals->step < 0 && i < e->n_switches; i++) {
        TRY(plan_add(r->plan, l->plan[i].step, l->plan[i].level));
    }
    l->first = (l->first + 1) % (c->opt.lag + 2);
    l->n--;
    return ST_OK;
}

static void forget(void *ctx, int32_t slot)
{
    struct service_client *c = ctx;
    c->lines[slot].n = 0; // their serials are looked for in vain
}

struct planner_remote service_client_remote(struct service_client *c)
{
    return (struct planner_remote){.ctx = c, .ask = ask, .take = take, .forget = forget};
}

enum status service_client_leave(struct service_client *c)
{
    enum status st = ST_OK;
    watchdog_enter("waiting for the last answers of the scheduler service on rank 0",
                   c->opt.timeout_s);
    while (st == ST_OK && c->n_under_way > 0) {
        st = look(c);
        rest();
    }
    st = st ? st : wait_for_wire(c);
    watchdog_leave();
    return st;
}
