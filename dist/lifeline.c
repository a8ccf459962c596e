/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/lifeline.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/lifeline_hub.h"

_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_BOOL_LOCK_FREE == 2,
               "signal handlers use these");

enum { ACK_MS = 5000, OVER_MS = 10000, GONE_MS = 3000, STACK_BYTES = 1 << 16, N_FATAL = 5 };

static const int fatal[N_FATAL] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
static const char *const fatal_text[N_FATAL] = {
    "fatal signal SIGSEGV (invalid memory access)",
    "fatal signal SIGBUS (memory or a mapped file failed)",
    "fatal signal SIGFPE (division by zero)",
    "fatal signal SIGILL (an instruction that this processor does not know)",
    "fatal signal SIGABRT (a library gave up)"};

/* One lifeline per process: signal handlers have no other way to find it. */
static struct {
    int32_t rank, replica;
    lifeline_suspects_fn *suspects;
    void *ctx;
    atomic_int fd;   /* to rank 0; -1: none */
    struct hub *hub; /* rank 0 */
    /* other ranks: */
    char root_host[LINE_HOST_BYTES];
    pthread_t thread;
    bool watching; /* the thread runs */
    int control[2];
    atomic_bool closing;
    /* the one report of this process: */
    atomic_bool reporting, reported, answered;
    /* handlers: */
    bool armed, own_stack;
    struct sigaction former[N_FATAL];
} line = {.fd = -1, .control = {-1, -1}};

/* Static: a handler has no memory of its own, and a process reports once. */
static struct {
    struct line_head head;
    struct line_fault fault;
} frame;
_Static_assert(sizeof frame == sizeof frame.head + sizeof frame.fault, "one frame, no gaps");

/* ---- reports ---- */

static bool in_own_thread(void)
{
    return line.hub ? hub_is_self(line.hub)
                    : line.watching && pthread_equal(pthread_self(), line.thread);
}

static void wait_until(const atomic_bool *flag, int fd)
{
    int64_t until = line_now_ms() + ACK_MS;
    while (!atomic_load(flag) && line_now_ms() < until) {
        struct line_head head;
        // rank 0 has no thread that listens at this end
        if (fd >= 0 && line_receive(fd, &head, NULL, 0) == LINE_FRAME && head.kind == LINE_ACK) {
            return;
        }
        poll(NULL, 0, 1); // a sleep that a signal handler may take
    }
}

/* Async-signal-safe. text is borrowed. */
static void report(int signal, const char *text, bool by_prompt)
{
    int fd = atomic_load(&line.fd);
    if (fd < 0 || in_own_thread()) {
        return;
    }
    if (atomic_exchange(&line.reporting, true)) {
        wait_until(&line.reported, -1); // another thread does; the process must outlive that
        return;
    }
    struct line_fault *f = &frame.fault;
    f->replica = line.replica;
    f->signal = signal;
    f->n_prompts = by_prompt ? line.suspects(line.ctx, f->ordinals, LIFELINE_MAX_NAMED) : 0;
    f->n_prompts = f->n_prompts < 0 ? 0 : f->n_prompts;
    f->n_prompts = f->n_prompts > LIFELINE_MAX_NAMED ? LIFELINE_MAX_NAMED : f->n_prompts;
    size_t n = strnlen(text, sizeof f->text - 1);
    memcpy(f->text, text, n);
    f->text[n] = '\0';
    size_t bytes = offsetof(struct line_fault, ordinals);
    bytes += (size_t)f->n_prompts * sizeof f->ordinals[0];
    if (line_send_frame(fd, LINE_FAULT, &frame, sizeof frame.head + bytes)) {
        wait_until(&line.answered, line.hub ? fd : -1);
    }
    atomic_store(&line.reported, true);
}

void lifeline_report(const char *text, bool by_prompt)
{
    report(0, text, by_prompt);
}

void lifeline_pass_stop(int signal)
{
    int32_t number = signal;
    int fd = atomic_load(&line.fd);
    // a job that fails has nothing to stop, and the report's bytes stay together
    if (fd >= 0 && !atomic_load(&line.reporting)) {
        line_send(fd, LINE_STOP, &number, sizeof number);
    }
}

/* ---- fatal signals ---- */

static void on_fatal(int signal, siginfo_t *info, void *context)
{
    int i = 0;
    (void)context;
    while (i < N_FATAL - 1 && fatal[i] != signal) {
        i++;
    }
    report(signal, fatal_text[i], true);
    sigaction(signal, &line.former[i], NULL);
    if (info->si_code <= 0) {
        raise(signal); // sent by somebody; one by the processor comes again by itself
    }
}

static void arm(void)
{
    static unsigned char stack[STACK_BYTES]; // after an overflow there is no other
    stack_t mine = {.ss_sp = stack, .ss_size = sizeof stack}, old = {0};
    if (sigaltstack(NULL, &old) == 0 && (old.ss_flags & SS_DISABLE)) {
        line.own_stack = sigaltstack(&mine, NULL) == 0;
    }
    struct sigaction action = {.sa_sigaction = on_fatal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < N_FATAL; i++) {
        sigaction(fatal[i], &action, &line.former[i]);
    }
    line.armed = true;
}

static void disarm(void)
{
    for (int i = 0; line.armed && i < N_FATAL; i++) {
        sigaction(fatal[i], &line.former[i], NULL);
    }
    if (line.own_stack) {
        stack_t none = {.ss_flags = SS_DISABLE};
        sigaltstack(&none, NULL);
    }
    line.armed = line.own_stack = false;
}

/* ---- the thread of the other ranks ---- */

static void end_without_root(enum line_event how)
{
    char text[512];
    int n = how == LINE_SILENT
                ? snprintf(text, sizeof text,
                           "pmpd: [rank %d] error: no sign of life from rank 0 (host %s) for %d s: "
                           "its host or the link to it is down; ending\n",
                           line.rank, line.root_host, LIFELINE_DEAD_S)
                : snprintf(text, sizeof text,
                           "pmpd: [rank %d] error: rank 0 (host %s) died without a word; ending\n",
                           line.rank, line.root_host);
    ssize_t written = write(STDERR_FILENO, text, n > 0 ? (size_t)n : 0);
    (void)written;
    _exit(LIFELINE_EXIT_CODE);
}

/* What the thread knows. */
struct watch {
    int fd;        /* -1: nothing more comes from rank 0 */
    bool told;     /* rank 0 has said why the job ends, or this rank has */
    bool silent;   /* rank 0 is not heard of any more */
    int64_t until; /* then this process ends, if nobody has ended it; 0: it goes on */
};

static void hear(struct watch *w, enum line_event e, uint32_t kind)
{
    if (e == LINE_FRAME && kind == LINE_ACK) {
        atomic_store(&line.answered, true);
    } else if (e == LINE_FRAME && kind == LINE_OVER) {
        w->told = true;
        w->until = line_now_ms() + OVER_MS;
    } else if (e == LINE_FRAME && kind == LINE_BYE) {
        w->fd = -1;
    } else if (w->told || atomic_load(&line.reporting)) {
        // the launcher is faster, and knows the exit code of the rank that began it
        w->fd = -1;
        w->told = true;
        w->until = line_now_ms() + GONE_MS;
        atomic_store(&line.answered, true); // no more than this
    } else if (e == LINE_SILENT) {
        // a word or an exit now would wait for ever on its way to mpirun, and keep its daemon on
        // this host from noticing that mpirun is cut off
        w->fd = -1;
        w->silent = true;
        w->until = line_now_ms() + OVER_MS;
    } else {
        end_without_root(e);
    }
}

static void *listen_to_root(void *unused)
{
    struct watch w = {.fd = atomic_load(&line.fd)};
    (void)unused;
    for (;;) {
        struct pollfd p[2] = {{.fd = w.fd, .events = POLLIN},
                              {.fd = line.control[0], .events = POLLIN}};
        int64_t left = w.until - line_now_ms();
        poll(p, 2, w.until == 0 ? -1 : left > 0 ? (int)left : 0);
        if (atomic_load(&line.closing)) {
            return NULL;
        }
        if (w.until > 0 && line_now_ms() >= w.until) {
            if (w.silent) {
                end_without_root(LINE_SILENT);
            }
            _exit(LIFELINE_EXIT_CODE);
        }
        struct line_head head = {0};
        enum line_event e = w.fd >= 0 ? line_receive(w.fd, &head, NULL, 0) : LINE_NOTHING;
        if (e != LINE_NOTHING) {
            hear(&w, e, head.kind);
        }
    }
}

/* ---- opening and closing ---- */

static enum status open_root(const struct env *env, struct line_place *place,
                             lifeline_fault_fn *on_fault, void *ctx)
{
    int pair[2], listener = -1;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
        FAIL(ST_NOMEM, "the lifeline gets no socket: %s; raise the limit on open files (ulimit -n)",
             strerror(errno));
    }
    memset(place, 0, sizeof *place);
    if (env->size > 1) {
        listener = line_listen(place);
        if (listener < 0) {
            snprintf(place->why_not, sizeof place->why_not, "rank 0 cannot listen: %s",
                     strerror(errno));
        }
    }
    enum status st = hub_start(&line.hub, env->size, place, listener, pair[0], on_fault, ctx);
    if (st != ST_OK) {
        close(pair[1]);
        return status_trace(st, __FILE__, __LINE__, __func__);
    }
    atomic_store(&line.fd, pair[1]);
    return ST_OK;
}

static enum status open_other(const struct env *env, const struct line_place *place,
                              char why[LINE_WHY_BYTES])
{
    memcpy(line.root_host, place->host, sizeof line.root_host);
    memcpy(why, place->why_not, LINE_WHY_BYTES);
    int fd = why[0] == '\0' ? line_connect(place, env->rank, why) : -1;
    if (fd < 0) {
        return ST_OK;
    }
    atomic_store(&line.fd, fd);
    TRY(line_start_thread(&line.thread, line.control, listen_to_root, NULL));
    line.watching = true;
    return ST_OK;
}

/* One warning for all who are not connected. */
static enum status count_missing(const struct env *env, bool connected, char why[LINE_WHY_BYTES])
{
    int missing = !connected, n_missing = 0, mine = connected ? env->size : env->rank, first = 0;
    TRY_MPI(MPI_Allreduce(&missing, &n_missing, 1, MPI_INT, MPI_SUM, env->world));
    TRY_MPI(MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, env->world));
    if (n_missing == 0) {
        return ST_OK;
    }
    TRY_MPI(MPI_Bcast(why, LINE_WHY_BYTES, MPI_CHAR, first, env->world));
    if (env->rank == 0) {
        log_warn("no lifeline to %d of %d ranks (rank %d: %s): if one of them dies, only mpirun or "
                 "srun may say so",
                 n_missing, env->size, first, why);
    }
    return ST_OK;
}

enum status lifeline_open(struct env *env, lifeline_fault_fn *on_fault,
                          lifeline_suspects_fn *suspects, void *ctx)
{
    struct line_place place = {0};
    char why[LINE_WHY_BYTES] = "";
    enum status st = ST_OK;
    INVARIANT(atomic_load(&line.fd) < 0 && suspects);
    line.rank = env->rank;
    line.replica = env->replica;
    line.suspects = suspects;
    line.ctx = ctx;
    atomic_store(&line.closing, false);
    atomic_store(&line.reporting, false);
    atomic_store(&line.reported, false);
    atomic_store(&line.answered, false);
    if (env->rank == 0) {
        st = open_root(env, &place, on_fault, ctx);
    }
    TRY_GOTO(st, env_agree(env, st), failed);
    int rc = MPI_Bcast(&place, (int)sizeof place, MPI_BYTE, 0, env->world);
    TRY_GOTO(st, env_mpi_check(rc, "MPI_Bcast", __FILE__, __LINE__, __func__), failed);
    if (env->rank != 0) {
        st = open_other(env, &place, why);
    }
    TRY_GOTO(st, env_agree(env, st), failed);
    TRY_GOTO(st, count_missing(env, atomic_load(&line.fd) >= 0, why), failed);
    if (line.hub) {
        hub_opened(line.hub);
    }
    if (atomic_load(&line.fd) >= 0) {
        arm();
    }
    return ST_OK;
failed:
    lifeline_close();
    return st;
}

void lifeline_close(void)
{
    disarm();
    atomic_store(&line.closing, true);
    int fd = atomic_exchange(&line.fd, -1);
    if (line.watching) {
        line_send(fd, LINE_BYE, NULL, 0);
        line_wake_thread(line.control);
        pthread_join(line.thread, NULL);
        line.watching = false;
    }
    hub_stop(&line.hub);
    line_close(&fd);
    line_close(&line.control[0]);
    line_close(&line.control[1]);
}
