/* SPDX-License-Identifier: Apache-2.0 */
#include "dist/stop.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "dist/lifeline.h"

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2,
               "signal handlers use these");

/* One wish may come twice: a launcher hands on a signal that the batch system sent to every process
 * anyway. */
static const int64_t SAME_WISH_NS = 1000 * 1000 * 1000;

enum { N_SIGNALS = 3 };
static const int signals[N_SIGNALS] = {SIGTERM, SIGINT, SIGUSR1};
static const char *const names[N_SIGNALS] = {"SIGTERM", "SIGINT", "SIGUSR1"};
static struct sigaction former[N_SIGNALS];
static bool installed;
static int own_rank;
static atomic_llong first_ns[N_SIGNALS]; /* when each was seen; 0: not yet */
static atomic_llong asked;               /* rank << 8 | signal; 0: nobody has */

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void on_signal(int signal)
{
    int saved = errno, i = 0;
    while (i < N_SIGNALS - 1 && signals[i] != signal) {
        i++;
    }
    long long now = now_ns(), first = 0;
    if (atomic_compare_exchange_strong(&first_ns[i], &first, now)) {
        stop_ask(signal, own_rank);
        if (own_rank != 0) {
            lifeline_pass_stop(signal);
        }
    } else if (now - first > SAME_WISH_NS) {
        struct sigaction at_once = {.sa_handler = SIG_DFL};
        sigaction(signal, &at_once, NULL);
        raise(signal); // comes when this handler returns
    }
    errno = saved;
}

void stop_install(int rank)
{
    own_rank = rank;
    if (installed) {
        return;
    }
    // nothing waits for the signal itself: the run looks once per pass. So system calls go on.
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < N_SIGNALS; i++) {
        atomic_store(&first_ns[i], 0);
        sigaction(signals[i], &action, &former[i]);
    }
    installed = true;
}

void stop_restore(void)
{
    for (int i = 0; i < N_SIGNALS && installed; i++) {
        sigaction(signals[i], &former[i], NULL);
    }
    installed = false;
}

void stop_ask(int signal, int rank)
{
    long long nobody = 0;
    atomic_compare_exchange_strong(&asked, &nobody, (long long)rank << 8 | (signal & 0xFF));
}

int stop_asked(void)
{
    return (int)(atomic_load_explicit(&asked, memory_order_relaxed) & 0xFF);
}

const char *stop_reason(void)
{
    static char text[64]; // the same whenever it is written
    long long who = atomic_load(&asked);
    if (who == 0) {
        return "";
    }
    for (int i = 0; i < N_SIGNALS; i++) {
        if (signals[i] == (who & 0xFF)) {
            snprintf(text, sizeof text, "%s on rank %lld", names[i], who >> 8);
            return text;
        }
    }
    snprintf(text, sizeof text, "signal %lld on rank %lld", who & 0xFF, who >> 8);
    return text;
}
