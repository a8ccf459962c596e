/* Messages for people, on stderr (results go to stdout), and progress with rate and ETA.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_LOG_H
#define PMPD_CORE_LOG_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

enum log_level { LOG_ERROR = 0, LOG_WARN, LOG_INFO, LOG_DEBUG };

void log_set_level(enum log_level level);
/* Messages of other ranks than 0 carry "[rank N]"; LOG_INFO and lower are printed by rank 0 only
 * unless the level is LOG_DEBUG. */
void log_set_rank(int rank);
void log_print(enum log_level level, const char *fmt, ...) PRINTF(2, 3);
#define log_error(...) log_print(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_print(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_print(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_print(LOG_DEBUG, __VA_ARGS__)

/* Seconds of a monotonic clock. */
double clock_s(void);

/* Progress of work with a known total. On a terminal one line that is rewritten at most five times
 * a second; elsewhere one line per 10 %. Nothing is printed for work that ends within two seconds.
 * Plain data: put it on the stack. `what` and `unit` are borrowed until progress_end. */
struct progress {
    const char *what, *unit;
    double total, start_s, shown_s;
    int shown_tenths;
};
void progress_begin(struct progress *p, const char *what, const char *unit, double total);
void progress_update(struct progress *p, double done);
void progress_end(struct progress *p);
/* Work that stops before its end: takes the line away and says nothing. */
void progress_drop(struct progress *p);

#endif
