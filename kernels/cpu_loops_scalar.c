/* The loops of cpu_loops_*.h in portable C: vectors of four, which every processor of today has or
 * its compiler takes apart.
 * SPDX-License-Identifier: Apache-2.0
 */
#define LANES 4
#define ISA
#include "kernels/cpu_vector.h"

/* Rounded twice: a processor without fused multiply-add would be slow to do otherwise. */
ISA_INLINE vec v_fma(vec a, vec b, vec c)
{
    return a * b + c;
}

ISA_INLINE vec v_max(vec a, vec b)
{
    return v_select(a > b, a, b);
}

ISA_INLINE vec v_min(vec a, vec b)
{
    return v_select(a < b, a, b);
}

ISA_INLINE float v_sum(vec v)
{
    return (v[0] + v[2]) + (v[1] + v[3]);
}

ISA_INLINE void v_sum_4(float *out, const vec *v, float scale)
{
    for (int i = 0; i < 4; i++) {
        out[i] = v_sum(v[i]) * scale;
    }
}

/* The exponent of f16 moves by 112 through a multiplication, which is exact and brings subnormals
 * along; infinity and NaN then want the rest of the exponent set. */
ISA_INLINE vec v_from_f16(halves h)
{
    words wide = __builtin_convertvector(h, words), size = wide & 0x7fff;
    vec value = (vec)(size << 13) * 0x1p112f;
    words no_number = (words)(size >= 0x7c00) & 0x7f800000u;
    return (vec)((words)value | no_number | (wide & 0x8000) << 16);
}

ISA_INLINE halves v_to_f16(vec v)
{
    halves h;
    for (int i = 0; i < LANES; i++) {
        h[i] = f32_to_f16(v[i]);
    }
    return h;
}

ISA_INLINE words v_mul_wide(words *high, words a, uint32_t b)
{
    words low;
    for (int i = 0; i < LANES; i++) {
        uint64_t product = (uint64_t)a[i] * b;
        (*high)[i] = (uint32_t)(product >> 32);
        low[i] = (uint32_t)product;
    }
    return low;
}

#define LOOPS cpu_loops_scalar
#include "kernels/cpu_loops_table.h"
