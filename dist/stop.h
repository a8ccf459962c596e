/* The wish to stop. SIGTERM, SIGINT and SIGUSR1 ask a run to finish its pass, keep its journal and
 * end so that it can be resumed; the same signal again, more than a second later, ends it at once
 * (sooner, it is taken for the same wish by another way: batch systems and launchers both hand
 * signals on). A signal on any rank counts: on another rank than 0 the handler passes it on through
 * the lifeline (dist/lifeline.h).
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_STOP_H
#define PMPD_DIST_STOP_H

#include "core/status.h"

/* The program's exit code then (EX_TEMPFAIL of sysexits.h): the same command again resumes. */
enum { STOP_EXIT_CODE = 75 };

/* Installs the handlers (once; after MPI_Init; later calls only set the rank). rank: this one's. */
void stop_install(int rank);
/* Puts back what was there before. */
void stop_restore(void);
/* From any thread or a signal handler: `signal` was seen on `rank`. The first one is kept. */
void stop_ask(int signal, int rank);
/* The signal that asked this rank to stop; 0: none. */
int stop_asked(void);
/* Where it came from: "SIGTERM on rank 3"; "" when nobody asked. The text is static. */
const char *stop_reason(void);

#endif
