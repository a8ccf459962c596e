/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/watchdog.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "dist/lifeline.h"

static const int64_t LOOK_NS = 100 * 1000 * 1000;
static const int64_t SECOND_NS = 1000 * 1000 * 1000;

/* begin_ns is 0 outside any operation. It is written last on entry, so that a thread that reads the
 * same value before and after it read the other two has seen one operation, not a mixture. */
static _Atomic(const char *) op_what;
static atomic_int_fast64_t op_limit_ns;
static atomic_int_fast64_t op_begin_ns;
static atomic_int watched_rank;

static pthread_t thread;
static bool running;
static bool ending; /* under the lock */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * SECOND_NS + t.tv_nsec;
}

// write and not stdio: the thread that hangs may hold the lock of stderr
static void give_up(const char *what, int64_t spent_ns, int64_t limit_ns)
{
    char text[512];
    int n = snprintf(text, sizeof text,
                     "pmpd: [rank %d] error: %s has lasted %.1f s, the limit is %.1f s "
                     "(parallel.timeout_s): another rank hangs, has died or is much slower; "
                     "ending the job\n",
                     atomic_load(&watched_rank), what, (double)spent_ns / (double)SECOND_NS,
                     (double)limit_ns / (double)SECOND_NS);
    size_t bytes = n < 0 ? 0 : (size_t)n < sizeof text ? (size_t)n : sizeof text - 1;
    ssize_t written = write(STDERR_FILENO, text, bytes);
    (void)written;
    snprintf(text, sizeof text, "%s has lasted %.1f s, the limit of parallel.timeout_s is %.1f s",
             what, (double)spent_ns / (double)SECOND_NS, (double)limit_ns / (double)SECOND_NS);
    lifeline_report(text, false); // a hang is no prompt's doing: here it is seen, not made
    _exit(WATCHDOG_EXIT_CODE);
}

static void look(void)
{
    int64_t begin = atomic_load_explicit(&op_begin_ns, memory_order_acquire);
    if (begin == 0) {
        return;
    }
    const char *what = atomic_load_explicit(&op_what, memory_order_relaxed);
    int64_t limit = atomic_load_explicit(&op_limit_ns, memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire);
    if (atomic_load_explicit(&op_begin_ns, memory_order_relaxed) != begin || limit <= 0) {
        return;
    }
    int64_t spent = now_ns() - begin;
    if (spent > limit) {
        give_up(what, spent, limit);
    }
}

static void *watch(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    while (!ending) {
        int64_t until = now_ns() + LOOK_NS;
        struct timespec t = {.tv_sec = until / SECOND_NS, .tv_nsec = until % SECOND_NS};
        pthread_cond_timedwait(&wake, &lock, &t);
        if (!ending) {
            look();
        }
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

enum status watchdog_start(int rank)
{
    atomic_store(&watched_rank, rank);
    if (running) {
        return ST_OK;
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&wake, &attr);
    pthread_condattr_destroy(&attr);
    ending = false;
    // signals stay with the main thread, whose handlers save the run
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&thread, NULL, watch, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc != 0) {
        pthread_cond_destroy(&wake);
        FAIL(ST_NOMEM,
             "the watchdog thread does not start: %s; raise the limit on processes "
             "(ulimit -u)",
             strerror(rc));
    }
    running = true;
    return ST_OK;
}

void watchdog_enter(const char *what, double timeout_s)
{
    atomic_store_explicit(&op_what, what, memory_order_relaxed);
    atomic_store_explicit(&op_limit_ns, (int64_t)(timeout_s * (double)SECOND_NS),
                          memory_order_relaxed);
    atomic_store_explicit(&op_begin_ns, now_ns(), memory_order_release);
}

void watchdog_leave(void)
{
    atomic_store_explicit(&op_begin_ns, 0, memory_order_seq_cst);
}

void watchdog_stop(void)
{
    if (!running) {
        return;
    }
    pthread_mutex_lock(&lock);
    ending = true;
    pthread_cond_signal(&wake);
    pthread_mutex_unlock(&lock);
    pthread_join(thread, NULL);
    pthread_cond_destroy(&wake);
    running = false;
}
