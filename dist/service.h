/* The scheduler service: plans and amendments of policies whose requests are worth gathering
 * (policy_ops.answer: a classifier). A replica's first rank sends what the policy wants to see; the
 * service, on rank 0, takes what has arrived from all replicas, has it answered together, and sends
 * the answers back. When an answer takes effect is core/planner.h's business, so tokens depend
 * neither on the company of a request nor on its way. The service keeps what the policy remembers
 * of each slot's turn.
 *
 * Rank 0 also decodes (its own replica then asks by a direct call, and the others are served
 * between its passes), or is a rank of its own (env->n_service). service_poll is called from
 * lease_owner_poll (lease_hooks.poll). Nothing is allocated after creation. All ranks are one
 * executable, so structs travel as bytes.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_SERVICE_H
#define PMPD_DIST_SERVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/planner.h"
#include "dist/env.h"

struct service;
struct service_client;

/* The same on every rank. */
struct service_options {
    int32_t n_clients; /* replicas */
    int32_t n_slots;   /* of each */
    int32_t n_levels;
    int32_t max_new_tokens;
    int32_t lag;
    size_t max_text_bytes;      /* of prompt_facts.id and .task together, without their ends */
    size_t n_activation_floats; /* of signals.activation; 0: never there */
    size_t max_feature_floats;  /* of signals.features; 0: never there */
    double timeout_s;           /* > 0: a client that waits longer for an answer ends the job */
};

/* What a service has done. */
struct service_counts {
    int64_t n_requests, n_batches;
    int32_t largest_batch;
};

/* On rank 0. env and policy are borrowed; the policy has an `answer` slot or not. Errors: ST_NOMEM,
 * ST_SHAPE (requests too large to send: says of what). */
MUST_CHECK enum status service_create(struct service **out, struct env *env,
                                      const struct policy *policy,
                                      const struct service_options *options);
void service_destroy(struct service **s);
/* Receives, answers and sends all that is there; sets *any when there was something, else leaves
 * it. Never blocks. Errors: ST_MPI, ST_FORMAT (not a request: a defect), those of the policy. */
MUST_CHECK enum status service_poll(struct service *s, bool *any);
struct service_counts service_counted(const struct service *s);

/* On the first rank of replica number `client`; several clients may live on one rank. service: on
 * rank 0 its own (calls are direct), else NULL. */
MUST_CHECK enum status service_client_create(struct service_client **out, struct env *env,
                                             struct service *service, int32_t client,
                                             const struct service_options *options,
                                             size_t state_bytes);
void service_client_destroy(struct service_client **c);
/* For core/planner.h: ask and take fail with ST_MPI, ST_SHAPE (a request larger than announced). */
struct planner_remote service_client_remote(struct service_client *c);
/* Whether an answer of the slot is there to be taken; looks for messages, does not wait. */
MUST_CHECK enum status service_client_look(struct service_client *c, int32_t slot, bool *there);
/* At the end: takes and drops answers that are still to come. The service must still be polled. */
MUST_CHECK enum status service_client_leave(struct service_client *c);

#endif
