/* The loops of cpu_loops_*.h with AVX2, FMA and F16C, chosen at run time.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define LANES 8
#define ISA __attribute__((target("avx2,fma,f16c")))
#include "kernels/cpu_vector.h"

ISA_INLINE vec v_fma(vec a, vec b, vec c)
{
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

ISA_INLINE vec v_max(vec a, vec b)
{
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
}

ISA_INLINE vec v_min(vec a, vec b)
{
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
}

ISA_INLINE float v_sum(vec v)
{
    __m128 q = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

/* Lanes are added as v_sum adds them, for the four at once. */
ISA_INLINE void v_sum_4(float *out, const vec *v8, float scale)
{
    __m256 v[4] = {(__m256)v8[0], (__m256)v8[1], (__m256)v8[2], (__m256)v8[3]};
    __m256 even = _mm256_add_ps(_mm256_permute2f128_ps(v[0], v[2], 0x20),
                                _mm256_permute2f128_ps(v[0], v[2], 0x31));
    __m256 odd = _mm256_add_ps(_mm256_permute2f128_ps(v[1], v[3], 0x20),
                               _mm256_permute2f128_ps(v[1], v[3], 0x31));
    __m256 pair =
        _mm256_add_ps(_mm256_shuffle_ps(even, odd, 0x44), _mm256_shuffle_ps(even, odd, 0xee));
    pair = _mm256_add_ps(pair, _mm256_movehdup_ps(pair));
    __m128 sums =
        _mm_shuffle_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1), 0x88);
    _mm_storeu_ps(out, _mm_mul_ps(sums, _mm_set1_ps(scale)));
}

ISA_INLINE vec v_from_f16(halves h)
{
    return (vec)_mm256_cvtph_ps((__m128i)h);
}

ISA_INLINE halves v_to_f16(vec v)
{
    return (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}

ISA_INLINE words v_mul_wide(words *high, words a, uint32_t b)
{
    __m256i factor = _mm256_set1_epi32((int)b);
    __m256i even = _mm256_mul_epu32((__m256i)a, factor);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    *high = (words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    return (words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

#define LOOPS cpu_loops_avx2
#include "kernels/cpu_loops_table.h"

#endif
