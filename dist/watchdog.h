/* Turns a hang into a message: a thread watches the operation that the rank is in; when it lasts
 * longer than its time-out the thread prints rank, operation and duration and ends the process with
 * _exit (no MPI call from this thread); mpirun then ends the rest.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_WATCHDOG_H
#define PMPD_DIST_WATCHDOG_H

#include "core/status.h"

enum { WATCHDOG_EXIT_CODE = 69 /* EX_UNAVAILABLE, as of dist/lifeline.h */ };

/* Starts the thread (once; later calls only set the rank). */
MUST_CHECK enum status watchdog_start(int rank);
/* The rank enters / leaves an operation; `what` is a string literal. Cheap: two atomic stores. */
void watchdog_enter(const char *what, double timeout_s);
void watchdog_leave(void);
void watchdog_stop(void);

#endif
