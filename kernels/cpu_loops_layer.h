/* Norms, rotary embedding, activations and conversion, for the instruction set of cpu_vector.h.
 * Included once per set.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_LOOPS_LAYER_H
#define PMPD_KERNELS_CPU_LOOPS_LAYER_H

#include "kernels/cpu_vector.h"

/* One vector's worth of a row: whole, or its end filled up with zeros. */
ISA_INLINE vec row_load(const float *p, int32_t i, int32_t n)
{
    return n - i >= LANES ? v_load(p + i) : v_load_part(p + i, n - i, 0);
}

ISA_INLINE void row_store(float *p, vec v, int32_t i, int32_t n)
{
    if (n - i >= LANES) {
        v_store(p + i, v);
    } else {
        v_store_part(p + i, v, n - i);
    }
}

/* sum (from[i] - minus)^power, power 1 or 2, in four sums that are added at the end */
ISA_INLINE float row_sum(const float *from, int32_t n, float minus, int power)
{
    vec sum[4] = {{0}};
    int32_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        for (int k = 0; k < 4; k++) {
            vec d = v_load(from + i + k * LANES) - minus;
            sum[k] = power == 1 ? sum[k] + d : v_fma(d, d, sum[k]);
        }
    }
    for (; i + LANES <= n; i += LANES) {
        vec d = v_load(from + i) - minus;
        sum[0] = power == 1 ? sum[0] + d : v_fma(d, d, sum[0]);
    }
    if (i < n) {
        vec d = v_load_part(from + i, n - i, minus) - minus;
        sum[1] = power == 1 ? sum[1] + d : v_fma(d, d, sum[1]);
    }
    return v_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

ISA static void rmsnorm(float *to, const float *from, const float *gain, int32_t n, float eps)
{
    float inverse = 1.0f / sqrtf(row_sum(from, n, 0, 2) / (float)n + eps);
    for (int32_t i = 0; i < n; i += LANES) {
        row_store(to, row_load(from, i, n) * inverse * row_load(gain, i, n), i, n);
    }
}

/* A mean far from 0 would drown the deviations in f32: they are taken from a first mean, exactly or
 * nearly so, and their own mean then corrects it. */
ISA static void layernorm(float *to, const float *from, const float *gain, const float *bias,
                          int32_t n, float eps)
{
    float first = row_sum(from, n, 0, 1) / (float)n;
    float rest = row_sum(from, n, first, 1) / (float)n;
    for (int32_t i = 0; i < n; i += LANES) {
        row_store(to, (row_load(from, i, n) - first) - rest, i, n);
    }
    float inverse = 1.0f / sqrtf(row_sum(to, n, 0, 2) / (float)n + eps);
    for (int32_t i = 0; i < n; i += LANES) {
        vec y = row_load(to, i, n) * inverse * row_load(gain, i, n);
        row_store(to, bias ? y + row_load(bias, i, n) : y, i, n);
    }
}

ISA static void moments(float out[2], const float *x, int32_t n)
{
    out[0] = row_sum(x, n, 0, 1);
    out[1] = row_sum(x, n, 0, 2);
}

ISA static void rotate(float *head, int32_t n_heads, int32_t head_dim, int32_t half, const float *c,
                       const float *s)
{
    for (int32_t h = 0; h < n_heads; h++, head += head_dim) {
        for (int32_t i = 0; i < half; i += LANES) {
            vec a = row_load(head, i, half), b = row_load(head + half, i, half);
            vec cos_now = row_load(c, i, half), sin_now = row_load(s, i, half);
            row_store(head, a * cos_now - b * sin_now, i, half);
            row_store(head + half, b * cos_now + a * sin_now, i, half);
        }
    }
}

ISA_INLINE vec silu_times(vec gate, vec up)
{
    return gate / (1.0f + v_exp(-gate)) * up;
}

/* 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), which keeps its digits for negative u */
ISA_INLINE vec gelu(vec x)
{
    vec u = 0.79788456f * (x + 0.044715f * x * x * x);
    return x / (1.0f + v_exp(-2.0f * u));
}

ISA static void silu_gate(float *to, const float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(to + i, silu_times(v_load(gate + i), v_load(up + i)));
    }
    if (i < n) {
        int32_t rest = (int32_t)(n - i);
        vec y = silu_times(v_load_part(gate + i, rest, 0), v_load_part(up + i, rest, 0));
        v_store_part(to + i, y, rest);
    }
}

ISA static void gelu_tanh(float *to, const float *from, size_t n)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(to + i, gelu(v_load(from + i)));
    }
    if (i < n) {
        int32_t rest = (int32_t)(n - i);
        v_store_part(to + i, gelu(v_load_part(from + i, rest, 0)), rest);
    }
}

ISA static void exps(float *to, const float *from, size_t n)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(to + i, v_exp(v_load(from + i)));
    }
    if (i < n) {
        int32_t rest = (int32_t)(n - i);
        v_store_part(to + i, v_exp(v_load_part(from + i, rest, 0)), rest);
    }
}

ISA static void to_f16(uint16_t *to, const float *from, int32_t n)
{
    for (int32_t i = 0; i < n; i += LANES) {
        halves h = v_to_f16(row_load(from, i, n));
        memcpy(to + i, &h, (size_t)(n - i < LANES ? n - i : LANES) * sizeof *to);
    }
}

#endif
