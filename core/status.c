/* SPDX-License-Identifier: Apache-2.0 */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MESSAGE_BYTES = 2048, TRACE_BYTES = 4096 };

static _Thread_local char message[MESSAGE_BYTES];
static _Thread_local char trace[TRACE_BYTES];
static status_abort_fn *abort_hook;

static const char *base_name(const char *file)
{
    const char *base = strrchr(file, '/');
    return base ? base + 1 : file;
}

static void trace_add(const char *file, int line, const char *func)
{
    size_t used = strlen(trace);
    snprintf(trace + used, sizeof trace - used, "    at %s (%s:%d)\n", func, base_name(file), line);
}

/* Names and texts in a message may come from a hostile file: they must neither end its line nor
 * steer the terminal. */
static void show_controls(void)
{
    for (char *c = message; *c; c++) {
        if ((unsigned char)*c < 0x20 || *c == 0x7f) {
            *c = '?';
        }
    }
}

enum status status_raise(enum status st, const char *file, int line, const char *func,
                         const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(message, sizeof message, fmt, ap);
    va_end(ap);
    show_controls();
    trace[0] = '\0';
    trace_add(file, line, func);
    return st;
}

enum status status_trace(enum status st, const char *file, int line, const char *func)
{
    trace_add(file, line, func);
    return st;
}

enum status status_prefix(enum status st, const char *fmt, ...)
{
    char old[MESSAGE_BYTES];
    memcpy(old, message, sizeof old);
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(message, sizeof message, fmt, ap);
    va_end(ap);
    if (n < 0) {
        n = 0;
    }
    size_t used = (size_t)n < sizeof message ? (size_t)n : sizeof message - 1;
    snprintf(message + used, sizeof message - used, "%s", old);
    show_controls();
    return st;
}

const char *status_message(void)
{
    return message;
}

const char *status_traceback(void)
{
    return trace;
}

void status_clear(void)
{
    message[0] = '\0';
    trace[0] = '\0';
}

const char *status_name(enum status st)
{
    static const char *const names[ST_N] = {
        [ST_OK] = "ST_OK",           [ST_USER] = "ST_USER",
        [ST_IO] = "ST_IO",           [ST_FORMAT] = "ST_FORMAT",
        [ST_SHAPE] = "ST_SHAPE",     [ST_NOMEM] = "ST_NOMEM",
        [ST_CUDA] = "ST_CUDA",       [ST_UNSUPPORTED] = "ST_UNSUPPORTED",
        [ST_MPI] = "ST_MPI",         [ST_NCCL] = "ST_NCCL",
        [ST_HDF5] = "ST_HDF5",       [ST_TIMEOUT] = "ST_TIMEOUT",
        [ST_NUMERIC] = "ST_NUMERIC", [ST_STOPPED] = "ST_STOPPED",
        [ST_DIFFERS] = "ST_DIFFERS",
    };
    return (unsigned)st < ST_N ? names[st] : "ST_?";
}

void status_set_abort(status_abort_fn *hook)
{
    abort_hook = hook;
}

void status_invariant_failed(const char *file, int line, const char *func, const char *what)
{
    snprintf(message, sizeof message,
             "broken invariant `%s` in %s (%s:%d); this is a defect of pmpd: please report it",
             what, func, base_name(file), line);
    fprintf(stderr, "pmpd: %s\n", message);
    if (abort_hook) {
        abort_hook();
    }
    abort();
}
