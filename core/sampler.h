/* From logit statistics to a token: merging of parts in vocabulary order, and the counter-based
 * generator behind sampling. Temperature sampling uses the Gumbel-max trick: the largest of
 * l_i / T + g_i with independent standard Gumbel g_i is a sample of softmax(l / T), so that a
 * vocabulary split over ranks merges by a plain maximum and no logits travel.
 * Source: Gumbel-max: Maddison, Tarlow, Minka, "A* Sampling" (arXiv 1411.0030), section 2.
 *         Generator: Philox-4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
 *         (SC11), table 2 and section 3.3.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_SAMPLER_H
#define PMPD_CORE_SAMPLER_H

#include <stdint.h>

#include "core/backend.h"

/* One Philox-4x32 block of ten rounds. */
void philox4x32(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]);
/* The key of one token: what it depends on and nothing else. */
void sampler_key(uint64_t key[2], uint64_t seed, uint64_t prompt_ordinal, uint32_t turn,
                 uint32_t step);
/* Standard Gumbel noise of one vocabulary id under a key: -log(-log(u)), u in (0, 1). */
float sampler_gumbel(const uint64_t key[2], int32_t id);
/* What sampling maximises: logit / temperature + noise of the id. */
float sampler_score(const struct logit_want *want, float logit, int32_t id);

/* Statistics of one contiguous part of logits (host memory), ids first_id.. ; the definition that
 * backends reproduce. A NaN among the logits makes sum_exp NaN, also after merging. */
void sampler_part_stats(struct logit_stats *out, const float *logits, int32_t n, int32_t first_id,
                        const struct logit_want *want);
/* Parts in vocabulary order, all of the same want -> the whole vocabulary. out may be parts. */
void sampler_merge(struct logit_stats *out, const struct logit_stats *parts, int n_parts,
                   const struct logit_want *want);

/* What one position of a model's output says, from merged statistics. */
struct token_result {
    int32_t token; /* picked: argmax, or a sample when temperature > 0 */
    int32_t argmax;
    float logprob;  /* natural log of the model's probability (temperature 1) of token, or of the
                       target where one was given */
    float entropy;  /* nats */
    float margin;   /* largest minus second largest logit */
    float max_prob; /* the model's probability of argmax */
    float probe_kl; /* nats, of a decoder's probe (core/decoder.h): KL(probe || step); else 0 */
};
void sampler_result(struct token_result *out, const struct logit_stats *merged,
                    const struct logit_want *want);

#endif
