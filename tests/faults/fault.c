/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/faults/fault.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FAULTS = 8, POINT_BYTES = 24, SPEC_BYTES = 1024, BAD_SPEC = 99 };
enum { SLOW_NS = 20 * 1000 * 1000 };

struct fault {
    char point[POINT_BYTES];
    int64_t call;
    bool onwards;
    enum fault_action action;
    int64_t rank, tensor, prompt; /* -1: any */
    atomic_int_fast64_t n_calls;
};

static const char *const action_names[] = {"none", "kill",   "segv",  "abort", "term", "stop",
                                           "slow", "parent", "error", "nan",   "torn", "enospc"};
enum { N_ACTIONS = sizeof action_names / sizeof *action_names };

static struct fault faults[MAX_FAULTS];
static int n_faults;
static pthread_once_t parsed = PTHREAD_ONCE_INIT;
static int my_rank = -1, my_tensor = -1, my_replica = -1;

// real calls: fault.c is linked with the wrapped program
ssize_t __real_write(int fd, const void *data, size_t bytes);
int __real_close(int fd);

static void refuse(const char *spec)
{
    fprintf(stderr, "pmpd_faulty: PMPD_FAULT: cannot understand \"%s\"; see tests/faults/fault.h\n",
            spec);
    _exit(BAD_SPEC);
}

static void parse_condition(struct fault *f, const char *text)
{
    const struct {
        const char *name;
        int64_t *to;
    } known[] = {{"rank=", &f->rank}, {"tensor=", &f->tensor}, {"prompt=", &f->prompt}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t n = strlen(known[i].name);
        if (strncmp(text, known[i].name, n) == 0) {
            *known[i].to = atoll(text + n);
            return;
        }
    }
    refuse(text);
}

static void parse_one(struct fault *f, const char *spec)
{
    char text[SPEC_BYTES], *rest = NULL;
    snprintf(text, sizeof text, "%s", spec);
    char *conditions = strchr(text, '@');
    if (conditions) {
        *conditions++ = '\0';
    }
    const char *point = strtok_r(text, ":", &rest);
    const char *call = strtok_r(NULL, ":", &rest), *action = strtok_r(NULL, ":", &rest);
    if (!point || !call || !action || strlen(point) >= POINT_BYTES) {
        refuse(spec);
    }
    f->rank = f->tensor = f->prompt = -1;
    strcpy(f->point, point);
    f->onwards = strchr(call, '+') || strcmp(call, "*") == 0;
    f->call = strcmp(call, "*") == 0 ? 1 : atoll(call);
    for (int i = 1; i < N_ACTIONS; i++) {
        if (strcmp(action, action_names[i]) == 0) {
            f->action = (enum fault_action)i;
        }
    }
    if (f->action == FAULT_NONE || f->call < 1) {
        refuse(spec);
    }
    for (char *c = conditions ? strtok_r(conditions, ",", &rest) : NULL; c;
         c = strtok_r(NULL, ",", &rest)) {
        parse_condition(f, c);
    }
}

static void parse(void)
{
    char text[SPEC_BYTES], *rest = NULL;
    const char *spec = getenv("PMPD_FAULT");
    if (!spec) {
        return;
    }
    snprintf(text, sizeof text, "%s", spec);
    for (char *one = strtok_r(text, " ", &rest); one; one = strtok_r(NULL, " ", &rest)) {
        if (n_faults == MAX_FAULTS) {
            refuse(spec);
        }
        parse_one(&faults[n_faults++], one);
    }
}

void fault_set_rank(int rank)
{
    my_rank = rank;
}

void fault_set_grid(int tensor_rank, int replica)
{
    my_tensor = tensor_rank;
    my_replica = replica;
}

int fault_rank(void)
{
    return my_rank;
}

bool fault_is_idle(void)
{
    const char *replica = getenv("PMPD_FAULT_IDLE");
    return replica && atoi(replica) == my_replica;
}

void fault_log(const char *format, ...)
{
    const char *path = getenv("PMPD_FAULT_LOG");
    char line[256];
    if (!path) {
        return;
    }
    va_list ap;
    va_start(ap, format);
    int n = vsnprintf(line, sizeof line, format, ap);
    va_end(ap);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd >= 0 && n > 0) {
        ssize_t written = __real_write(fd, line, (size_t)n < sizeof line ? (size_t)n : sizeof line);
        (void)written;
        __real_close(fd);
    }
}

static bool holds(const struct fault *f, const char *point, const int64_t *ordinals, int n,
                  int *which)
{
    if (strcmp(f->point, point) != 0 || (f->rank >= 0 && f->rank != my_rank) ||
        (f->tensor >= 0 && f->tensor != my_tensor)) {
        return false;
    }
    *which = 0;
    if (f->prompt < 0) {
        return true;
    }
    for (int i = 0; i < n; i++) {
        if (ordinals[i] == f->prompt) {
            *which = i;
            return true;
        }
    }
    return false;
}

enum fault_action fault_due(const char *point, const int64_t *ordinals, int n, int *which)
{
    int at = 0;
    pthread_once(&parsed, parse);
    for (int i = 0; i < n_faults; i++) {
        struct fault *f = &faults[i];
        if (!holds(f, point, ordinals, n, &at)) {
            continue;
        }
        int64_t call = atomic_fetch_add(&f->n_calls, 1) + 1;
        if (call == f->call || (f->onwards && call > f->call)) {
            if (f->action != FAULT_SLOW) {
                fault_log("fault %d %s %lld %s\n", my_rank, point, (long long)call,
                          action_names[f->action]);
            }
            if (which) {
                *which = at;
            }
            return f->action;
        }
    }
    return FAULT_NONE;
}

void fault_kill(void)
{
    kill(getpid(), SIGKILL);
    pause();
}

static int *volatile nowhere = NULL;

enum fault_action fault_act(enum fault_action action)
{
    switch (action) {
    case FAULT_PARENT:
        kill(getppid(), SIGKILL);
        fault_kill();
        break;
    case FAULT_KILL:
        fault_kill();
        break;
    case FAULT_SEGV:
        *nowhere = 1;
        break;
    case FAULT_ABORT:
        abort();
    case FAULT_TERM:
        kill(getpid(), SIGTERM);
        break;
    case FAULT_STOP:
        kill(getpid(), SIGSTOP);
        break;
    case FAULT_SLOW:
        nanosleep(&(struct timespec){.tv_nsec = SLOW_NS}, NULL);
        break;
    default:
        return action;
    }
    return FAULT_NONE;
}

enum fault_action fault_at(const char *point, const int64_t *ordinals, int n, int *which)
{
    return fault_act(fault_due(point, ordinals, n, which));
}
