/* SPDX-License-Identifier: Apache-2.0 */
#include "core/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static enum log_level log_level = LOG_INFO;
static int log_rank;

static const double QUIET_S = 2.0;
static const double REDRAW_S = 0.2;

void log_set_level(enum log_level level)
{
    log_level = level;
}

void log_set_rank(int rank)
{
    log_rank = rank;
}

void log_print(enum log_level level, const char *fmt, ...)
{
    if (level > log_level || (log_rank != 0 && level >= LOG_INFO && log_level < LOG_DEBUG)) {
        return;
    }
    static const char *const words[] = {"error: ", "warning: ", "", "debug: "};
    char text[4096];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (log_rank != 0) {
        fprintf(stderr, "pmpd: [rank %d] %s%s\n", log_rank, words[level], text);
    } else {
        fprintf(stderr, "pmpd: %s%s\n", words[level], text);
    }
}

double clock_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void progress_begin(struct progress *p, const char *what, const char *unit, double total)
{
    *p = (struct progress){.what = what, .unit = unit, .total = total, .start_s = clock_s()};
}

void progress_update(struct progress *p, double done)
{
    double now = clock_s(), spent = now - p->start_s;
    if (log_rank != 0 || log_level < LOG_INFO || spent < QUIET_S || p->total <= 0) {
        return;
    }
    double share = done / p->total;
    double rate = done / spent;
    double eta = rate > 0 ? (p->total - done) / rate : 0;
    if (isatty(STDERR_FILENO)) {
        if (now - p->shown_s < REDRAW_S && share < 1) {
            return;
        }
        fprintf(stderr, "\r\033[Kpmpd: %s %3.0f %%  %.0f of %.0f %s, %.1f %s/s, ETA %.0f s",
                p->what, 100 * share, done, p->total, p->unit, rate, p->unit, eta);
        fflush(stderr);
    } else {
        int tenths = (int)(10 * share);
        if (tenths <= p->shown_tenths) {
            return;
        }
        p->shown_tenths = tenths;
        fprintf(stderr, "pmpd: %s %3.0f %%  %.0f of %.0f %s, %.1f %s/s, ETA %.0f s\n", p->what,
                100 * share, done, p->total, p->unit, rate, p->unit, eta);
    }
    p->shown_s = now;
}

void progress_drop(struct progress *p)
{
    if (p->shown_s > 0 && isatty(STDERR_FILENO)) {
        fprintf(stderr, "\r\033[K");
    }
}

void progress_end(struct progress *p)
{
    progress_drop(p);
    if (p->shown_s > 0) {
        log_info("%s: done in %.1f s", p->what, clock_s() - p->start_s);
    }
}
