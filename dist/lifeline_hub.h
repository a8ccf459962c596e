/* Rank 0's end of the lifeline: one thread that hears faults, stops and deaths of all ranks.
 * Private to dist/lifeline*.c. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_LIFELINE_HUB_H
#define PMPD_DIST_LIFELINE_HUB_H

#include "dist/lifeline_net.h"

struct hub;

/* Starts the thread. own: rank 0's own connection (one end of a socket pair). listener: of
 * line_listen, or -1. Both belong to the hub from here on, also after a failure. Errors: ST_NOMEM.
 */
MUST_CHECK enum status hub_start(struct hub **out, int n_ranks, const struct line_place *place,
                                 int listener, int own, lifeline_fault_fn *on_fault, void *ctx);
/* All who can are connected: nobody else is let in, and a closed connection is a death. */
void hub_opened(struct hub *h);
/* Says good-bye to all ranks, ends the thread, frees everything. */
void hub_stop(struct hub **hub);
/* Whether the caller is the hub's thread. */
bool hub_is_self(const struct hub *h);

#endif
