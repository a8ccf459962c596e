/* Vectors of f32 for the loops of a step's rest, and exp and log of them. Included once by each
 * cpu_loops_ISA.c, which has defined before it
 *   LANES    f32 in a vector: 4, 8 or 16
 *   ISA      what makes a function one of the instruction set (a target attribute, or nothing)
 * and defines after it the handful of operations that a compiler does not find by itself: v_fma,
 * v_max and v_min (the second operand where one is NaN), v_sum (one fixed order), v_sum_4,
 * v_from_f16, v_to_f16, v_mul_wide. Arithmetic is written in the vector extension of GCC and clang,
 * which every processor has instructions for. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_VECTOR_H
#define PMPD_KERNELS_CPU_VECTOR_H

#include <math.h>
#include <string.h>

#include "kernels/cpu.h"

#define ISA_INLINE static inline ISA __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

ISA_INLINE vec v_fma(vec a, vec b, vec c); /* a b + c */
ISA_INLINE vec v_max(vec a, vec b);        /* a > b ? a : b */
ISA_INLINE vec v_min(vec a, vec b);        /* a < b ? a : b */
ISA_INLINE float v_sum(vec v);
/* out[i] = v_sum(v[i]) scale, the same bits */
ISA_INLINE void v_sum_4(float *out, const vec *v, float scale);
ISA_INLINE vec v_from_f16(halves h);                           /* exact */
ISA_INLINE halves v_to_f16(vec v);                             /* to nearest, ties to even */
ISA_INLINE words v_mul_wide(words *high, words a, uint32_t b); /* the low words */

ISA_INLINE vec v_set(float f)
{
    return f - (vec){0}; /* -0 stays -0 */
}

ISA_INLINE vec v_load(const float *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* p[0..n), then fill; n < LANES */
ISA_INLINE vec v_load_part(const float *p, int32_t n, float fill)
{
    vec v = v_set(fill);
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}

ISA_INLINE void v_store(float *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

ISA_INLINE void v_store_part(float *p, vec v, int32_t n)
{
    memcpy(p, &v, (size_t)n * sizeof *p);
}

/* Values i.. of a row of type F32 or F16. */
ISA_INLINE vec v_load_as(const void *row, enum dtype dtype, int32_t i)
{
    if (dtype == DT_F32) {
        return v_load((const float *)row + i);
    }
    halves h;
    memcpy(&h, (const uint16_t *)row + i, sizeof h);
    return v_from_f16(h);
}

/* Values i..i + n, then zeros; n < LANES */
ISA_INLINE vec v_load_part_as(const void *row, enum dtype dtype, int32_t i, int32_t n)
{
    if (dtype == DT_F32) {
        return v_load_part((const float *)row + i, n, 0);
    }
    halves h = {0};
    memcpy(&h, (const uint16_t *)row + i, (size_t)n * sizeof(uint16_t));
    return v_from_f16(h);
}

ISA_INLINE vec v_select(ints mask, vec yes, vec no)
{
    return (vec)((mask & (ints)yes) | (~mask & (ints)no));
}

ISA_INLINE float v_largest(vec v)
{
    float largest = v[0];
    for (int i = 1; i < LANES; i++) {
        largest = v[i] > largest ? v[i] : largest;
    }
    return largest;
}

/* exp(x) with at most 1.5 ulp of error for every x (tests/ops/test_cpu.c): exp(n ln 2 + r) =
 * 2^n exp(r), |r| <= ln 2 / 2, with exp(r) = 1 + r + r^2 P(r). 2^n is applied in two factors, so
 * that results down to the subnormals are right. NaN stays.
 * Source of P: own fit of least largest relative error, 3.3e-9, on |r| <= 0.35. */
ISA_INLINE vec v_exp(vec x)
{
    const vec shift = v_set(0x1.8p23f);                /* adding it rounds to integers */
    x = v_min(v_set(89.0f), v_max(v_set(-104.0f), x)); /* infinity and 0 from there on */
    vec shifted = v_fma(x, v_set(0x1.715476p0f), shift), n = shifted - shift;
    vec r = v_fma(n, v_set(-0x1.62e4p-1f), x); /* ln 2 in two parts; n times the first is exact */
    r = v_fma(n, v_set(-0x1.7f7d1cp-20f), r);
    vec p = v_fma(v_set(0x1.6a1a72p-10f), r, v_set(0x1.123fc6p-7f));
    p = v_fma(p, r, v_set(0x1.555916p-5f));
    p = v_fma(p, r, v_set(0x1.55548ap-3f));
    p = v_fma(p, r, v_set(0x1.fffffcp-2f));
    p = v_fma(p, r * r, r) + 1.0f;
    ints power = (ints)shifted - (ints)shift, first = power >> 1;
    return p * (vec)((first + 127) << 23) * (vec)((power - first + 127) << 23);
}

/* log(x) of positive normal numbers, relative error below 4e-7: log(2^n m) = n ln 2 + log(1 + f),
 * m in [sqrt(1/2), sqrt(2)), log(1 + f) = f - f^2/2 + f^3 Q(f).
 * Source of Q: own fit of least largest relative error, 6e-9. */
ISA_INLINE vec v_log(vec x)
{
    ints bits = (ints)x - 0x3f3504f3; /* sqrt(1/2) */
    ints power = bits >> 23;
    vec f = (vec)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    vec n = __builtin_convertvector(power, vec);
    vec q = v_fma(v_set(-0x1.38b576p-4f), f, v_set(0x1.055b68p-3f));
    q = v_fma(q, f, v_set(-0x1.0d8542p-3f));
    q = v_fma(q, f, v_set(0x1.22da1ep-3f));
    q = v_fma(q, f, v_set(-0x1.547244p-3f));
    q = v_fma(q, f, v_set(0x1.99a008p-3f));
    q = v_fma(q, f, v_set(-0x1.000226p-2f));
    q = v_fma(q, f, v_set(0x1.555554p-2f));
    vec square = f * f;
    vec small = v_fma(q * f, square, v_fma(n, v_set(0x1.7f7d1cp-20f), square * -0.5f)) + f;
    return v_fma(n, v_set(0x1.62e4p-1f), small);
}

#endif
