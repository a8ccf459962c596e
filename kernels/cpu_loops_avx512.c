/* The loops of cpu_loops_*.h with AVX-512 (F, BW, DQ, VL), chosen at run time.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define LANES 16
#define ISA __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#include "kernels/cpu_vector.h"

ISA_INLINE vec v_fma(vec a, vec b, vec c)
{
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

ISA_INLINE vec v_max(vec a, vec b)
{
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
}

ISA_INLINE vec v_min(vec a, vec b)
{
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
}

ISA_INLINE float v_sum(vec v)
{
    __m256 h =
        _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

/* Lanes are added as v_sum adds them, for the four at once. */
ISA_INLINE void v_sum_4(float *out, const vec *whole, float scale)
{
    __m256 v[4];
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)whole[i]),
                             _mm512_extractf32x8_ps((__m512)whole[i], 1));
    }
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
    return (vec)_mm512_cvtph_ps((__m256i)h);
}

ISA_INLINE halves v_to_f16(vec v)
{
    return (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}

ISA_INLINE words v_mul_wide(words *high, words a, uint32_t b)
{
    __m512i factor = _mm512_set1_epi32((int)b);
    __m512i even = _mm512_mul_epu32((__m512i)a, factor);
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    *high = (words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return (words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}

#define LOOPS cpu_loops_avx512
#include "kernels/cpu_loops_table.h"

#endif
