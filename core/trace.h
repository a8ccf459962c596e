/* Records of what happened: steps, passes, turns, and the packed form in which a finished prompt
 * travels to the lease owner and lies in the journal. Plain data, fixed-size fields, little endian.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_TRACE_H
#define PMPD_CORE_TRACE_H

#include <stddef.h>
#include <stdint.h>

#include "core/plan.h"
#include "core/status.h"

enum pass_kind { PASS_PREFILL = 0, PASS_DECODE = 1 };
enum finish { FINISH_EOS = 0, FINISH_LENGTH = 1 };

/* One decode forward of one sequence: step t consumes generated token t and yields token t + 1. */
struct step_record {
    int32_t turn, step, level; /* level: id in the run's level table */
    int32_t token;             /* the token it yields */
    float logprob;             /* nats, of that token at temperature 1 */
    float entropy;             /* nats */
    float margin;              /* largest minus second largest logit */
    uint32_t pass;             /* number of its pass within (epoch, replica) */
    float max_prob;            /* of the most likely token */
    float probe_kl;            /* nats, KL(probe || step); NaN: no probe */
    /* core/policy.h, struct signals; NaN where nobody asked for them: */
    float hidden_mean, hidden_rms, k_norm, v_norm;
};

/* One run through the layers for all tokens that share it. Bytes are those that all ranks of the
 * replica read together: what two ranks hold of the same KV head counts twice. */
struct pass_record {
    uint32_t pass; /* number within (epoch, replica), from 0 */
    int32_t kind;  /* enum pass_kind */
    int32_t n_slots, n_tok;
    int32_t n_gathered; /* tokens for which all logits were gathered (core/chooser.h) */
    int32_t max_bits;   /* planes read by the widest product; dense: bits of the dtype */
    float time_us, comm_us;
    uint64_t weight_bytes; /* planes, levels and head read */
    uint64_t kv_bytes;     /* K and V rows read */
};

struct turn_record {
    int32_t n_prompt_tok; /* tokens fed at prefill of this turn */
    int32_t n_new_tok;    /* generated: token 0 and one per step */
    int32_t finish;       /* enum finish */
    int32_t prefill_level;
    int32_t token0; /* yielded by prefill */
    float logprob0, entropy0, margin0;
    int32_t n_steps;    /* in steps, turns one after the other */
    int32_t n_switches; /* of the realised plan, in switches */
    float prefill_s, decode_s;
};

/* One level of a plan or amendment that took effect. */
struct decision_record {
    int32_t turn;
    int32_t asked;    /* after this step; -1: after prefill */
    int32_t step;     /* it took effect at */
    int32_t level;    /* in force from there on; -1: as planned (a probe only) */
    int32_t probe;    /* level of a probe at that step; -1: none */
    float dial;       /* of the policy */
    float latency_us; /* from the request until the replica had the answer in hand; it looks
                         between two passes */
};

/* A finished prompt. Pointers are owned by whoever made it (the session's slot, or
 * trace_unpack). */
struct finished_record {
    int64_t ordinal; /* of the prompt in its file */
    uint64_t key[2]; /* resume key */
    int32_t attempt; /* from 1 */
    int32_t epoch;   /* starts of the program on this run directory, from 0 */
    int32_t replica;
    double started_unix_s, wall_s;
    int32_t n_turns, n_steps, n_switches, n_passes, n_decisions;
    int32_t n_feature_tok, feature_dim; /* 0 without KV features */
    struct turn_record *turns;          /* (n_turns) */
    struct step_record *steps;          /* (n_steps) */
    struct plan_switch *switches;       /* (n_switches) realised, all turns */
    struct pass_record *passes;         /* (n_passes) passes of the replica not yet sent */
    struct decision_record *decisions;  /* (n_decisions) in the order of their requests */
    float *features;                    /* (2, n_feature_tok, feature_dim): K then V */
};

/* Bytes of the packed form. */
size_t trace_packed_bytes(const struct finished_record *r);
/* Packs into buf (capacity bytes >= trace_packed_bytes). No allocation. */
void trace_pack(void *buf, size_t capacity, const struct finished_record *r);
/* The other way, from untrusted bytes: every count is checked against bytes. The arrays of *out are
 * one block, given back with trace_free. Errors: ST_FORMAT. */
MUST_CHECK enum status trace_unpack(struct finished_record *out, const void *buf, size_t bytes);
void trace_free(struct finished_record *r);
/* How many steps of a packed record ran at each level: adds to n_steps (n_levels). No allocation.
 * Errors: ST_FORMAT (as trace_unpack; a level beyond n_levels). */
MUST_CHECK enum status trace_count_levels(int64_t *n_steps, int32_t n_levels, const void *buf,
                                          size_t bytes);

#endif
