/* The loop of one replica: leases in, passes, finished records out, until nothing is left or the
 * run stops. A suspect (lease_item.alone) is decoded with nothing beside it.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_REPLICA_H
#define PMPD_EXPERIMENTS_REPLICA_H

#include "core/prompts.h"
#include "core/session.h"
#include "dist/lease.h"
#include "dist/service.h"
#include "experiments/engine.h"

/* owner: on rank 0 of the world, else NULL; polled once per pass. client: on the first rank of each
 * replica, else NULL (it learns of leases by broadcast). service: of the first rank, where the
 * session asks one, else NULL. Collective over the replica. */
MUST_CHECK enum status replica_run(struct engine *e, struct session *session,
                                   const struct prompts *prompts, int32_t n_slots,
                                   struct lease_owner *owner, struct lease_client *client,
                                   struct service_client *service);

#endif
