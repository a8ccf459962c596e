/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE // POLLRDHUP, accept4
#include "dist/lifeline_hub.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/mem.h"
#include "dist/stop.h"

/* Any process may connect while the ranks do: so many of those that have not said the token are
 * heard, so long. */
enum { MAX_STRANGERS = 128, STRANGER_MS = 1000 };
/* A job that has failed is ended by the failing rank, through MPI, or by the launcher. Rank 0 ends
 * itself, and so the rest, when that does not come about: so long after the report, and after the
 * rank's own end. */
enum { OVER_MS = 10000, GONE_MS = 3000 };

struct line {
    int fd; /* -1: none */
    char host[LINE_HOST_BYTES];
};

/* A connection before its hello is complete. */
struct stranger {
    int fd; /* -1: none */
    size_t n_in;
    int64_t until_ms;
    unsigned char in[sizeof(struct line_head) + sizeof(struct line_hello)];
};

struct hub {
    int n_ranks, listener, control[2];
    uint64_t token[2];
    struct line *lines; /* (n_ranks) owned */
    struct stranger strangers[MAX_STRANGERS];
    struct pollfd *fds; /* (n_ranks + MAX_STRANGERS + 2) owned */
    lifeline_fault_fn *on_fault;
    void *ctx;
    pthread_t thread;
    atomic_bool opened, closing;
    bool deaths_count;         /* opened was seen */
    bool heard, heard_prompts; /* why the job ends; a fault that named prompts */
    int64_t over_ms;           /* when this process ends itself; 0: not */
    struct line_fault fault;   /* the latest */
    char text[1024];
};

// write and not stdio: the main thread may hold the lock of stderr
static void say(struct hub *h, int n)
{
    size_t bytes = n < 0 ? 0 : (size_t)n < sizeof h->text ? (size_t)n : sizeof h->text - 1;
    ssize_t written = write(STDERR_FILENO, h->text, bytes);
    (void)written;
}

static void tell_others(struct hub *h, int rank, enum line_kind kind)
{
    for (int r = 1; r < h->n_ranks; r++) {
        if (r != rank && h->lines[r].fd >= 0) {
            line_send(h->lines[r].fd, kind, NULL, 0);
        }
    }
}

static void end_within(struct hub *h, int64_t ms)
{
    int64_t at = line_now_ms() + ms;
    h->over_ms = h->over_ms == 0 || at < h->over_ms ? at : h->over_ms;
}

/* ---- what a rank says ---- */

/* A launcher that sees a rank die ends the others with SIGTERM, which here looks like a wish to
 * stop. It is not taken for one: the journal's END{STOPPED} is written after all other replicas
 * have left (dist/lease.h), which a replica with a dead rank does not, and this process ends as
 * soon as its thread sees the death. */
static void rank_died(struct hub *h, int rank, enum line_event how)
{
    struct line *l = &h->lines[rank];
    line_close(&l->fd);
    if (!h->deaths_count) {
        return; // it tries another address
    }
    if (h->heard) {
        end_within(h, GONE_MS); // the cause is known already
        return;
    }
    const char *stop = stop_asked() ? stop_reason() : "";
    const char *why = how != LINE_CLOSED ? "its connection carried rubbish"
                      : stop[0] ? "it was killed (mpirun waits a second after SIGTERM: send "
                                  "SIGUSR1), ran out of memory, or its host is down"
                                : "it was killed, ran out of memory, or its host is down";
    int n = 0;
    if (how == LINE_SILENT) {
        n = snprintf(
            h->text, sizeof h->text,
            "pmpd: error: no sign of life from rank %d (host %s) for %d s: its host or the "
            "link to it is down; ending the job, start it again to resume\n",
            rank, l->host, LIFELINE_DEAD_S);
    } else {
        n = snprintf(h->text, sizeof h->text,
                     "pmpd: error: rank %d (host %s) died without a word%s%s: %s; ending the job, "
                     "start it again to resume\n",
                     rank, l->host, stop[0] ? " while the run was stopping after " : "", stop, why);
    }
    say(h, n);
    tell_others(h, rank, LINE_OVER);
    if (how != LINE_SILENT) {
        _exit(LIFELINE_EXIT_CODE);
    }
    // mpirun, too, needs time to find out about its daemon there; told to end the job before that,
    // it waits for that daemon's answer
    h->heard = h->heard_prompts = true; // whatever fails now fails because of this
    end_within(h, OVER_MS);
}

static void say_fault(struct hub *h, int rank)
{
    const struct line_fault *f = &h->fault;
    char where[256] = "";
    size_t used = 0;
    for (int32_t i = 0; i < f->n_prompts && used < sizeof where - 32; i++) {
        used += (size_t)snprintf(where + used, sizeof where - used, "%s%" PRId64,
                                 i > 0              ? ", "
                                 : f->n_prompts > 1 ? ", at one of the prompts "
                                                    : ", at prompt ",
                                 f->ordinals[i]);
        if (i == 7 && f->n_prompts > 8) {
            snprintf(where + used, sizeof where - used, ", ... (%d)", f->n_prompts);
            break;
        }
    }
    say(h, snprintf(h->text, sizeof h->text, "pmpd: error: rank %d (host %s)%s: %s\n", rank,
                    h->lines[rank].host, where, f->text));
}

/* The first report is the cause, later ones are mostly its consequences on other ranks. They are
 * journalled only if they name prompts and the first did not: an error that MPI met because its
 * neighbour is about to report may come first. */
static void rank_failed(struct hub *h, int rank, size_t bytes)
{
    struct line_fault *f = &h->fault;
    size_t fixed = offsetof(struct line_fault, ordinals);
    if (bytes < fixed || f->n_prompts < 0 || f->n_prompts > LIFELINE_MAX_NAMED ||
        bytes != fixed + (size_t)f->n_prompts * sizeof f->ordinals[0]) {
        rank_died(h, rank, LINE_RUBBISH);
        return;
    }
    f->text[sizeof f->text - 1] = '\0';
    f->text[strcspn(f->text, "\n")] = '\0';
    struct lifeline_fault fault = {.rank = rank,
                                   .replica = f->replica,
                                   .signal = f->signal,
                                   .n_prompts = f->n_prompts,
                                   .ordinals = f->ordinals};
    memcpy(fault.text, f->text, sizeof fault.text);
    if (!h->heard || (!h->heard_prompts && f->n_prompts > 0)) {
        // rank 0 prints an error of its own itself; the prompt is what it does not say
        if (rank != 0 || f->signal != 0 || f->n_prompts > 0) {
            say_fault(h, rank);
        }
        tell_others(h, rank, LINE_OVER);
        if (h->on_fault) {
            h->on_fault(h->ctx, &fault);
        }
        h->heard = true;
        h->heard_prompts = h->heard_prompts || f->n_prompts > 0;
    }
    line_send(h->lines[rank].fd, LINE_ACK, NULL, 0);
    end_within(h, OVER_MS);
}

static void listen_to_rank(struct hub *h, int rank)
{
    struct line *l = &h->lines[rank];
    while (l->fd >= 0) {
        struct line_head head;
        enum line_event e = line_receive(l->fd, &head, &h->fault, sizeof h->fault);
        if (e == LINE_NOTHING) {
            return;
        }
        if (e != LINE_FRAME) {
            rank_died(h, rank, e);
        } else if (head.kind == LINE_BYE) {
            line_close(&l->fd);
        } else if (head.kind == LINE_FAULT) {
            rank_failed(h, rank, head.bytes);
        } else if (head.kind == LINE_STOP && head.bytes == sizeof(int32_t)) {
            int32_t signal = 0;
            memcpy(&signal, &h->fault, sizeof signal);
            stop_ask(signal, rank);
        } else {
            rank_died(h, rank, LINE_RUBBISH);
        }
    }
}

/* ---- strangers ---- */

static struct stranger *free_place(struct hub *h)
{
    for (int i = 0; i < MAX_STRANGERS; i++) {
        if (h->strangers[i].fd < 0) {
            return &h->strangers[i];
        }
    }
    return NULL;
}

/* Those for whom there is no place wait in the listener's queue. */
static void accept_all(struct hub *h)
{
    struct stranger *s = NULL;
    while ((s = free_place(h)) != NULL) {
        int fd = accept4(h->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) {
            if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR &&
                errno != ECONNABORTED) {
                line_close(&h->listener); // no files left: who is not connected now stays so
            }
            return;
        }
        *s = (struct stranger){.fd = fd, .until_ms = line_now_ms() + STRANGER_MS};
    }
}

static void welcome(struct hub *h, struct stranger *s)
{
    struct line_head head;
    struct line_hello hello;
    memcpy(&head, s->in, sizeof head);
    memcpy(&hello, s->in + sizeof head, sizeof hello);
    if (head.kind != LINE_HELLO || head.bytes != sizeof hello || hello.token != h->token[0] ||
        hello.rank < 1 || hello.rank >= h->n_ranks) {
        line_close(&s->fd);
        return;
    }
    struct line *l = &h->lines[hello.rank];
    line_close(&l->fd); // it has given up an earlier attempt
    memcpy(l->host, hello.host, sizeof l->host);
    l->host[sizeof l->host - 1] = '\0';
    l->fd = s->fd;
    s->fd = -1;
    line_watch(l->fd);
    line_send(l->fd, LINE_WELCOME, &h->token[1], sizeof h->token[1]);
}

static void listen_to_stranger(struct hub *h, struct stranger *s)
{
    ssize_t n = recv(s->fd, s->in + s->n_in, sizeof s->in - s->n_in, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
        return;
    }
    if (n <= 0) {
        line_close(&s->fd);
        return;
    }
    s->n_in += (size_t)n;
    if (s->n_in == sizeof s->in) {
        welcome(h, s);
    }
}

static void stop_listening(struct hub *h)
{
    h->deaths_count = true;
    line_close(&h->listener);
    for (int i = 0; i < MAX_STRANGERS; i++) {
        line_close(&h->strangers[i].fd);
    }
}

/* ---- the thread ---- */

/* Sleeps until something has come; returns how many of h->fds are in use. The first is the control
 * pipe, the second the listener; then ranks, then strangers, in order. */
static int wait_for_any(struct hub *h)
{
    int n = 0;
    int64_t until = h->over_ms, now = line_now_ms();
    h->fds[n++] = (struct pollfd){.fd = h->control[0], .events = POLLIN};
    h->fds[n++] = (struct pollfd){.fd = free_place(h) ? h->listener : -1, .events = POLLIN};
    for (int r = 0; r < h->n_ranks; r++) {
        h->fds[n++] = (struct pollfd){.fd = h->lines[r].fd, .events = POLLIN | POLLRDHUP};
    }
    for (int i = 0; i < MAX_STRANGERS; i++) {
        const struct stranger *s = &h->strangers[i];
        h->fds[n++] = (struct pollfd){.fd = s->fd, .events = POLLIN};
        if (s->fd >= 0 && (until == 0 || s->until_ms < until)) {
            until = s->until_ms;
        }
    }
    int ms = until == 0 ? -1 : until > now ? (int)(until - now) : 0;
    if (poll(h->fds, (nfds_t)n, ms) < 0) {
        for (int i = 0; i < n; i++) {
            h->fds[i].revents = 0;
        }
    }
    return n;
}

static void serve_ranks(struct hub *h)
{
    const struct pollfd *ranks = h->fds + 2;
    // who is gone before who complains of it: a death makes others fail
    for (int pass = 0; pass < 2; pass++) {
        for (int r = 0; r < h->n_ranks; r++) {
            bool gone = ranks[r].revents & (POLLRDHUP | POLLHUP | POLLERR);
            if (ranks[r].revents && ranks[r].fd == h->lines[r].fd && gone == (pass == 0)) {
                listen_to_rank(h, r);
            }
        }
    }
}

static void serve_strangers(struct hub *h)
{
    const struct pollfd *fds = h->fds + 2 + h->n_ranks;
    int64_t now = line_now_ms();
    for (int i = 0; i < MAX_STRANGERS; i++) {
        struct stranger *s = &h->strangers[i];
        if (s->fd >= 0 && fds[i].fd == s->fd && fds[i].revents) {
            listen_to_stranger(h, s);
        }
        if (s->fd >= 0 && now >= s->until_ms) {
            line_close(&s->fd);
        }
    }
    if (h->listener >= 0 && h->fds[1].revents) {
        accept_all(h);
    }
}

static void *serve(void *ctx)
{
    struct hub *h = ctx;
    for (;;) {
        wait_for_any(h);
        serve_ranks(h);
        serve_strangers(h);
        if (h->over_ms > 0 && line_now_ms() >= h->over_ms) {
            _exit(LIFELINE_EXIT_CODE);
        }
        char byte = 0;
        if (h->fds[0].revents && read(h->control[0], &byte, 1) == 1) {
            if (atomic_load(&h->closing)) {
                tell_others(h, 0, LINE_BYE);
                return NULL;
            }
            if (atomic_load(&h->opened)) {
                stop_listening(h);
            }
        }
    }
}

static void hub_free(struct hub **hub)
{
    struct hub *h = *hub;
    for (int r = 0; h->lines && r < h->n_ranks; r++) {
        line_close(&h->lines[r].fd);
    }
    for (int i = 0; i < MAX_STRANGERS; i++) {
        line_close(&h->strangers[i].fd);
    }
    line_close(&h->listener);
    line_close(&h->control[0]);
    line_close(&h->control[1]);
    mem_free(h->lines);
    mem_free(h->fds);
    mem_free(h);
    *hub = NULL;
}

/* Room for a connection of every rank: the usual limit, 1024, is only where a process starts. */
static void allow_files(int n)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur < (rlim_t)n) {
        r.rlim_cur = r.rlim_max < (rlim_t)n ? r.rlim_max : (rlim_t)n;
        int rc = setrlimit(RLIMIT_NOFILE, &r);
        (void)rc; // the ranks that find no place are named in a warning
    }
}

static enum status hub_fill(struct hub *h, int own)
{
    allow_files(h->n_ranks + MAX_STRANGERS + 1024);
    TRY(MEM_NEW(&h->lines, h->n_ranks));
    for (int r = 0; r < h->n_ranks; r++) {
        h->lines[r].fd = -1;
    }
    h->lines[0].fd = own;
    line_host_name(h->lines[0].host);
    TRY(MEM_NEW(&h->fds, h->n_ranks + MAX_STRANGERS + 2));
    return line_start_thread(&h->thread, h->control, serve, h);
}

enum status hub_start(struct hub **out, int n_ranks, const struct line_place *place, int listener,
                      int own, lifeline_fault_fn *on_fault, void *ctx)
{
    struct hub *h = NULL;
    enum status st = MEM_NEW(&h, 1);
    if (st != ST_OK) {
        line_close(&own);
        line_close(&listener);
        return status_trace(st, __FILE__, __LINE__, __func__);
    }
    h->n_ranks = n_ranks;
    h->listener = listener;
    h->control[0] = h->control[1] = -1;
    memcpy(h->token, place->token, sizeof h->token);
    h->on_fault = on_fault;
    h->ctx = ctx;
    for (int i = 0; i < MAX_STRANGERS; i++) {
        h->strangers[i].fd = -1;
    }
    TRY_GOTO(st, hub_fill(h, own), failed);
    *out = h;
    return ST_OK;
failed:
    if (!h->lines) {
        line_close(&own);
    }
    hub_free(&h);
    return st;
}

void hub_opened(struct hub *h)
{
    atomic_store(&h->opened, true);
    line_wake_thread(h->control);
}

void hub_stop(struct hub **hub)
{
    if (!*hub) {
        return;
    }
    atomic_store(&(*hub)->closing, true);
    line_wake_thread((*hub)->control);
    pthread_join((*hub)->thread, NULL);
    hub_free(hub);
}

bool hub_is_self(const struct hub *h)
{
    return pthread_equal(pthread_self(), h->thread);
}
