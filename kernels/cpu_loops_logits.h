/* Statistics of a block of logits, for the instruction set of cpu_vector.h. Included once per set.
 *
 * The pick of a sample is the definition's to the bit: scores with approximate noise, off by less
 * than PICK_MARGIN, name the few ids that can be the largest, and sampler_score decides.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_LOOPS_LOGITS_H
#define PMPD_KERNELS_CPU_LOOPS_LOGITS_H

#include "core/sampler.h"
#include "kernels/cpu_vector.h"

/* Error of noise() is below 2e-6 (a relative error of 1e-6 of -log u is an absolute one of its log;
 * the log of at most 23 adds 1e-6); the sum with the logit rounds by 2^-24 of itself on both sides.
 */
#define PICK_MARGIN 1e-5f
#define PICK_MARGIN_RELATIVE 1e-6f

ISA_INLINE vec logits_at(const float *logits, int32_t i, int32_t n)
{
    return n - i >= LANES ? v_load(logits + i) : v_load_part(logits + i, n - i, -INFINITY);
}

/* The largest and second largest of lanes with their own; NaN counts for nothing. */
ISA_INLINE void two_largest(struct logit_stats *s, const float *logits, int32_t n)
{
    vec none = v_set(-INFINITY), max = none, second = none;
    for (int32_t i = 0; i < n; i += LANES) {
        vec l = v_max(logits_at(logits, i, n), none);
        second = v_max(second, v_min(max, l));
        max = v_max(l, max);
    }
    for (int k = 0; k < LANES; k++) {
        float smaller = max[k] < s->max ? max[k] : s->max;
        s->second = s->second > second[k] ? s->second : second[k];
        s->second = s->second > smaller ? s->second : smaller;
        s->max = max[k] > s->max ? max[k] : s->max;
    }
}

/* The place of the first logit that equals value; n when there is none */
ISA_INLINE int32_t first_equal(const float *logits, int32_t n, float value)
{
    vec wanted = v_set(value);
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        ints equal = v_load(logits + i) == wanted, any = {0};
        if (memcmp(&equal, &any, sizeof any) != 0) {
            break;
        }
    }
    while (i < n && !(logits[i] >= value && logits[i] <= value)) {
        i++;
    }
    return i;
}

ISA_INLINE void sums(struct logit_stats *s, const float *logits, int32_t n)
{
    vec sum = {0}, sum_l = {0};
    float from = s->max > -INFINITY ? s->max : 0;
    for (int32_t i = 0; i < n; i += LANES) {
        vec d = logits_at(logits, i, n) - from, e = v_exp(d);
        sum += e;
        sum_l += v_select(e > 0, e * d, (vec){0}); /* 0 times -inf is 0 here */
    }
    s->sum_exp = v_sum(sum);
    s->sum_exp_l = v_sum(sum_l);
}

/* Philox-4x32-10 as core/sampler.c has it: the first word for ids in c0. */
ISA_INLINE words philox_words(words c0, const uint64_t key[2])
{
    words zero = {0}, c1 = zero, c2 = zero + (uint32_t)key[1], c3 = zero + (uint32_t)(key[1] >> 32);
    uint32_t k0 = (uint32_t)key[0], k1 = (uint32_t)(key[0] >> 32);
    for (int round = 0; round < 10; round++) {
        words a_high, b_high;
        words a = v_mul_wide(&a_high, c0, 0xD2511F53u), b = v_mul_wide(&b_high, c2, 0xCD9E8D57u);
        c0 = b_high ^ c1 ^ k0;
        c2 = a_high ^ c3 ^ k1;
        c1 = b;
        c3 = a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

/* -log(-log(u)) of u = (r + 0.5) 2^-32, nearly. Above one half, -log(u) is taken from w = 1 - u,
 * whose digits u has lost: log(y) w / (1 - y) with y = 1 - w as it rounds.
 * Source: the correction is Kahan's log1p, in Goldberg, "What every computer scientist should know
 * about floating-point arithmetic" (1991), theorem 4. */
ISA_INLINE vec noise(words r)
{
    ints high = (ints)r >> 31;
    ints distance = (ints)(r ^ (words)high); /* from the nearer end: 0..2^31 - 1 */
    vec w = (__builtin_convertvector(distance, vec) + 0.5f) * 0x1p-32f, y = 1.0f - w;
    vec one = v_set(1), off = 1.0f - y;
    vec correction = v_select(high, w / v_select(off > 0, off, one), one);
    vec e = -v_log(v_select(high, y, w)) * correction;
    e = v_select(high & (off <= 0), w, e);
    return -v_log(e);
}

ISA_INLINE void pick(struct logit_stats *s, const float *logits, int32_t n, int32_t first_id,
                     const struct logit_want *want)
{
    float score[CPU_LOGIT_BLOCK + LANES], inverse_t = 1.0f / want->temperature;
    vec largest = v_set(-INFINITY);
    words id;
    for (int k = 0; k < LANES; k++) {
        id[k] = (uint32_t)(first_id + k);
    }
    for (int32_t i = 0; i < n; i += LANES, id += LANES) {
        vec now = logits_at(logits, i, n) * inverse_t + noise(philox_words(id, want->key));
        v_store(score + i, now);
        largest = v_max(now, largest);
    }
    float best = v_largest(largest),
          least = best - PICK_MARGIN - PICK_MARGIN_RELATIVE * fabsf(best);
    least = least <= best ? least : best; /* infinite: no margin */
    for (int32_t i = 0; i < n; i++) {
        if (score[i] >= least) {
            float exact = sampler_score(want, logits[i], first_id + i);
            if (exact > s->pick_score) {
                s->pick_score = exact;
                s->pick = first_id + i;
                s->pick_logit = logits[i];
            }
        }
    }
}

ISA static void stats(struct logit_stats *out, const float *logits, int32_t n, int32_t first_id,
                      const struct logit_want *want)
{
    struct logit_stats s = {.max = -INFINITY,
                            .second = -INFINITY,
                            .argmax = -1,
                            .target = -INFINITY,
                            .pick_score = -INFINITY,
                            .pick = -1,
                            .pick_logit = -INFINITY};
    two_largest(&s, logits, n);
    if (s.max > -INFINITY) {
        int32_t at = first_equal(logits, n, s.max);
        s.max = logits[at]; /* the first of 0 and -0 */
        s.argmax = first_id + at;
    }
    sums(&s, logits, n);
    if (want->target >= first_id && want->target < first_id + n) {
        s.target = logits[want->target - first_id];
    }
    if (want->restricted) { /* in double: top-p compares sums to 1e-9 (core/candidates.h) */
        double from = s.max > -INFINITY ? (double)s.max : 0;
        for (int32_t i = 0; i < n; i++) {
            s.sum_exp_t += exp(((double)logits[i] - from) / (double)want->temperature);
        }
    }
    if (want->temperature > 0 && !want->restricted) {
        pick(&s, logits, n, first_id, want);
    } else {
        s.pick_score = s.pick_logit = s.max;
        s.pick = s.argmax;
    }
    *out = s;
}

#endif
