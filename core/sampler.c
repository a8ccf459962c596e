/* SPDX-License-Identifier: Apache-2.0 */
#include "core/sampler.h"

#include <math.h>

void philox4x32(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

void sampler_key(uint64_t key[2], uint64_t seed, uint64_t prompt_ordinal, uint32_t turn,
                 uint32_t step)
{
    /* Two Philox blocks under the seed: distinct (ordinal, turn, step) give independent keys. */
    const uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t counter[4] = {(uint32_t)prompt_ordinal, (uint32_t)(prompt_ordinal >> 32), turn,
                                 step};
    uint32_t r[4];
    philox4x32(r, counter, k);
    key[0] = (uint64_t)r[1] << 32 | r[0];
    key[1] = (uint64_t)r[3] << 32 | r[2];
}

float sampler_gumbel(const uint64_t key[2], int32_t id)
{
    const uint32_t k[2] = {(uint32_t)key[0], (uint32_t)(key[0] >> 32)};
    const uint32_t counter[4] = {(uint32_t)id, 0, (uint32_t)key[1], (uint32_t)(key[1] >> 32)};
    uint32_t r[4];
    philox4x32(r, counter, k);
    double u = ((double)r[0] + 0.5) * 0x1p-32;
    return (float)-log(-log(u));
}

float sampler_score(const struct logit_want *want, float logit, int32_t id)
{
    return logit * (1.0f / want->temperature) + sampler_gumbel(want->key, id);
}

static struct logit_stats nothing(void)
{
    return (struct logit_stats){.max = -INFINITY,
                                .second = -INFINITY,
                                .argmax = -1,
                                .target = -INFINITY,
                                .pick_score = -INFINITY,
                                .pick = -1,
                                .pick_logit = -INFINITY};
}

void sampler_part_stats(struct logit_stats *out, const float *logits, int32_t n, int32_t first_id,
                        const struct logit_want *want)
{
    struct logit_stats s = nothing();
    for (int32_t i = 0; i < n; i++) {
        float l = logits[i];
        if (l > s.max) {
            s.second = s.max;
            s.max = l;
            s.argmax = first_id + i;
        } else if (l > s.second) {
            s.second = l;
        }
    }
    double sum = 0, sum_l = 0;
    for (int32_t i = 0; i < n; i++) {
        /* a part of nothing but -inf adds nothing; one with a NaN must not pass for it */
        bool adds = s.max > -INFINITY || isnan(logits[i]);
        double d = (double)logits[i] - (double)s.max, e = adds ? exp(d) : 0;
        sum += e;
        sum_l += e > 0 ? e * d : 0;
    }
    s.sum_exp = (float)sum;
    s.sum_exp_l = (float)sum_l;
    if (want->target >= first_id && want->target < first_id + n) {
        s.target = logits[want->target - first_id];
    }
    if (want->restricted) {
        for (int32_t i = 0; i < n; i++) {
            s.sum_exp_t += exp(((double)logits[i] - (double)s.max) / (double)want->temperature);
        }
    }
    if (want->temperature > 0 && !want->restricted) {
        for (int32_t i = 0; i < n; i++) {
            float score = sampler_score(want, logits[i], first_id + i);
            if (score > s.pick_score) {
                s.pick_score = score;
                s.pick = first_id + i;
                s.pick_logit = logits[i];
            }
        }
    } else {
        s.pick_score = s.pick_logit = s.max;
        s.pick = s.argmax;
    }
    *out = s;
}

void sampler_merge(struct logit_stats *out, const struct logit_stats *parts, int n_parts,
                   const struct logit_want *want)
{
    struct logit_stats s = nothing();
    for (int p = 0; p < n_parts; p++) {
        const struct logit_stats *q = &parts[p];
        if (q->max > s.max) {
            s.second = s.max > q->second ? s.max : q->second;
            s.max = q->max;
            s.argmax = q->argmax;
        } else if (q->max > s.second) {
            s.second = q->max;
        }
        if (q->target > s.target) {
            s.target = q->target;
        }
        if (q->pick_score > s.pick_score) {
            s.pick_score = q->pick_score;
            s.pick = q->pick;
            s.pick_logit = q->pick_logit;
        }
    }
    double sum = 0, sum_l = 0;
    for (int p = 0; p < n_parts; p++) {
        /* with m the new maximum: sum e^(l-m) (l-m) = e^d (sum_l + d sum), d = part max - m */
        double d = (double)parts[p].max - (double)s.max, e = exp(d);
        if (e > 0 || isnan(parts[p].sum_exp)) {
            sum += e * (double)parts[p].sum_exp;
            sum_l += e * ((double)parts[p].sum_exp_l + d * (double)parts[p].sum_exp);
        }
        if (want->restricted && parts[p].sum_exp_t > 0) {
            s.sum_exp_t += exp(d / (double)want->temperature) * parts[p].sum_exp_t;
        }
    }
    s.sum_exp = (float)sum;
    s.sum_exp_l = (float)sum_l;
    *out = s;
}

void sampler_result(struct token_result *out, const struct logit_stats *merged,
                    const struct logit_want *want)
{
    double log_sum = log((double)merged->sum_exp); /* relative to max */
    float logit = want->target >= 0 ? merged->target : merged->pick_logit;
    *out = (struct token_result){
        .token = merged->pick,
        .argmax = merged->argmax,
        .logprob = (float)((double)logit - (double)merged->max - log_sum),
        .entropy = (float)(log_sum - (double)merged->sum_exp_l / (double)merged->sum_exp),
        .margin = merged->max - merged->second,
        .max_prob = 1 / merged->sum_exp,
    };
}
