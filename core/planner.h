/* The plans of a replica's slots: asks the policy, here or at the scheduler service, and lets each
 * answer take effect at a fixed step. A request made after step s (prefill is step -1) takes effect
 * at step s + lag, whoever answers and however fast; until a plan does, the prefill level stays in
 * force. So tokens depend on the lag, never on timing or on where the policy is asked.
 *
 * Collective over the replica where said: the first rank has the answers and broadcasts them, so
 * that a rounding difference can never desynchronise the ranks. No allocation after creation.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_PLANNER_H
#define PMPD_CORE_PLANNER_H

#include "core/collective.h"
#include "core/policy.h"
#include "core/trace.h"

/* Where a policy with an `answer` slot is asked instead of here (dist/service.h fills it). All on
 * the first rank of a replica. Answers of a slot come in the order of its requests. */
struct planner_remote {
    void *ctx; /* borrowed */
    /* Sends a request (copied) of a slot; does not wait for its answer. */
    enum status (*ask)(void *ctx, int32_t slot, const struct policy_request *request);
    /* Waits for the answer to the slot's oldest request that is not yet taken: into request->plan
     * (which comes empty, prefill set; step -1) or request->amendment. latency_us: from the request
     * until the answer was here. */
    enum status (*take)(void *ctx, int32_t slot, struct policy_request *request, float *latency_us);
    /* Nobody takes the slot's answers that are still to come. */
    void (*forget)(void *ctx, int32_t slot);
};

struct planner_options {
    int32_t n_slots, n_levels;
    int32_t max_new_tokens;              /* of a turn */
    int32_t lag;                         /* steps, >= 1 */
    int32_t max_turns;                   /* of a prompt: bounds its decisions */
    const struct planner_remote *remote; /* NULL: asked here. Borrowed, must outlive the planner */
};

struct planner;
/* policy and coll are borrowed and outlive the planner. Errors: ST_NOMEM, ST_SHAPE. */
MUST_CHECK enum status planner_create(struct planner **out, const struct policy *policy,
                                      struct collective *coll,
                                      const struct planner_options *options);
void planner_destroy(struct planner **p);

/* The most decisions of one prompt. */
MUST_CHECK enum status planner_max_decisions(size_t *out, int32_t max_turns,
                                             int32_t max_new_tokens);

/* A turn begins: its prefill level. facts->task is borrowed until the turn is over. Turn 0 empties
 * the slot's log. Collective. Errors: those of the policy. */
MUST_CHECK enum status planner_begin(struct planner *p, int32_t slot,
                                     const struct prompt_facts *facts, int32_t *prefill_level);
/* Asks after prefill (step -1) or a step, every step of the turn at most once and in order.
 * signals: on the first rank, else NULL. Every rank calls it; an answer that could only take effect
 * after the turn's last step is not waited for. Errors: those of the policy. */
MUST_CHECK enum status planner_ask(struct planner *p, int32_t slot, int32_t step,
                                   const struct signals *signals);
/* What is due at the step that each of n slots runs next takes effect; a step may be settled more
 * than once. The replica waits here for answers that are late. Collective. Errors: those of the
 * policy and of the service. */
MUST_CHECK enum status planner_settle(struct planner *p, int32_t n, const int32_t *slots,
                                      const int32_t *steps);
/* The level of a step for which the slot is settled, and of its probe (-1: none). */
int32_t planner_level(const struct planner *p, int32_t slot, int32_t step);
int32_t planner_probe(const struct planner *p, int32_t slot);
/* A turn is over: requests whose step never came are forgotten. */
void planner_end(struct planner *p, int32_t slot);
/* The slot's decisions that took effect, all turns of its prompt; borrowed until the next
 * planner_begin of turn 0. Latencies are the first rank's. */
struct decision_record *planner_log(const struct planner *p, int32_t slot, int32_t *n);

#endif
