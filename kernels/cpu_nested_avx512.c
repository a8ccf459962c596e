/* The loops of cpu_nested.h with AVX-512 (F, BW, VBMI, VNNI). Four bytes of a row lie side by side,
 * so one vector is 16 rows by 32 columns of a plane. One byte shuffle then looks up 64 nibbles in
 * four tables at once, and one multiply-add of bytes (vpdpbusd) adds up each row's four entries,
 * times the plane's weight, exactly. Expanded codes: vector (t, v) of a step holds columns 8i + t,
 * i < 4, of rows 16v..16v + 15; codes of activations have the same order within a step.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu_nested.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <string.h>

#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"
#define AVX512 __attribute__((target(TARGET)))
#define AVX512_INLINE static inline __attribute__((target(TARGET), always_inline))

enum {
    FETCH_AHEAD = 256,
    N_VEC = NESTED_ROWS / 16,
    STEP_BYTES = 64 * N_VEC, /* of a plane's step: 32 columns of all rows */
    SELECT = 0xCA,           /* ternary logic: a ? b : c, bit by bit */
    AND_OR = 0xEA            /* (a & b) | c */
};

AVX512_INLINE __m512i load64(const void *p)
{
    return _mm512_load_si512(p);
}

AVX512_INLINE __m512 halves(const uint16_t *h)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)h));
}

/* ---- look-ups ---- */

AVX512_INLINE void look_up_any(float *sum, const struct nested_tile *tile,
                               const struct nested_acts *acts, int32_t begin, int32_t end,
                               enum level_kind kind, int bits)
{
    const int n_terms = kind == LEVEL_FREE ? bits : kind == LEVEL_TAIL ? 2 : 1;
    const int per_term = bits / n_terms;
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i which = _mm512_set1_epi32(0x30201000); /* byte i of a row: table i */
    const uint8_t *plane[BITS_MAX];
    int32_t act_cols = tile->act_cols;
    __m512 y[N_VEC];
    for (int p = 0; p < bits; p++) {
        plane[p] = tile->plane[p];
    }
    for (int v = 0; v < N_VEC; v++) {
        y[v] = _mm512_setzero_ps();
    }
    for (int32_t act = begin / act_cols; act < end / act_cols; act++) {
        /* low and high nibbles apart: independent chains of additions */
        __m512i low[BITS_MAX][N_VEC], high[BITS_MAX][N_VEC];
        for (int t = 0; t < n_terms; t++) {
            for (int v = 0; v < N_VEC; v++) {
                low[t][v] = high[t][v] = _mm512_setzero_si512();
            }
        }
        size_t first = (size_t)act * (size_t)act_cols;
        for (size_t c = first; c < first + (size_t)act_cols; c += NESTED_STEP) {
            const int8_t *table = acts->values + c * 4;
            __m512i t_low = load64(table), t_high = load64(table + 64);
            for (int p = 0; p < bits; p++) {
                const uint8_t *from = plane[p] + c / NESTED_STEP * STEP_BYTES;
                const int t = p / per_term;
                __m512i weight = _mm512_set1_epi8((char)(1 << (per_term - 1 - p % per_term)));
                for (int v = 0; v < N_VEC; v++) {
                    __m512i w = load64(from + 64 * v);
                    _mm_prefetch((const char *)from + 64 * v + FETCH_AHEAD, _MM_HINT_T0);
                    __m512i i_low = _mm512_ternarylogic_epi32(w, mask, which, AND_OR);
                    __m512i i_high =
                        _mm512_ternarylogic_epi32(_mm512_srli_epi16(w, 4), mask, which, AND_OR);
                    low[t][v] = _mm512_dpbusd_epi32(low[t][v], weight,
                                                    _mm512_permutexvar_epi8(i_low, t_low));
                    high[t][v] = _mm512_dpbusd_epi32(high[t][v], weight,
                                                     _mm512_permutexvar_epi8(i_high, t_high));
                }
            }
        }
        const uint16_t *levels =
            tile->levels + first / (size_t)tile->group_cols * (size_t)(n_terms + 1) * NESTED_ROWS;
        __m512 h = _mm512_set1_ps(acts->scale[act] * (kind == LEVEL_FREE ? 1.0f : 0.5f));
        __m512 x = _mm512_set1_ps(acts->sum[act]);
        _mm_prefetch((const char *)levels + FETCH_AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)levels + FETCH_AHEAD + 64, _MM_HINT_T0);
        for (int v = 0; v < N_VEC; v++) {
            for (int t = 0; t < n_terms; t++) {
                __m512 total = _mm512_cvtepi32_ps(_mm512_add_epi32(low[t][v], high[t][v]));
                y[v] = _mm512_fmadd_ps(halves(levels + t * NESTED_ROWS + 16 * v),
                                       _mm512_mul_ps(total, h), y[v]);
            }
            y[v] = _mm512_fmadd_ps(halves(levels + n_terms * NESTED_ROWS + 16 * v), x, y[v]);
        }
    }
    for (int v = 0; v < N_VEC; v++) {
        _mm512_storeu_ps(sum + 16 * v, y[v]);
    }
}

#define LOOK_UP(kind, bits)                                       \
    case bits:                                                    \
        look_up_any(sum, tile, acts, begin, end, (kind), (bits)); \
        return;
#define LOOK_UP_BITS(kind)                                                                   \
    switch (tile->bits) {                                                                    \
        LOOK_UP(kind, 1)                                                                     \
        LOOK_UP(kind, 2)                                                                     \
        LOOK_UP(kind, 3)                                                                     \
        LOOK_UP(kind, 4) LOOK_UP(kind, 5) LOOK_UP(kind, 6) LOOK_UP(kind, 7) LOOK_UP(kind, 8) \
    }

AVX512 static void avx512_look_up(float *sum, const struct nested_tile *tile,
                                  const struct nested_acts *acts, int32_t begin, int32_t end)
{
    if (tile->kind == LEVEL_TIED) {
        LOOK_UP_BITS(LEVEL_TIED)
    } else if (tile->kind == LEVEL_FREE) {
        LOOK_UP_BITS(LEVEL_FREE)
    } else {
        look_up_any(sum, tile, acts, begin, end, LEVEL_TAIL, 8);
    }
}

/* ---- dots ---- */

AVX512 static void avx512_codes(const struct nested_acts *out, const float *x, int32_t act,
                                int32_t act_cols)
{
    const __m256i by_bit =
        _mm256_setr_epi8(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20, 28, 5,
                         13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
    int8_t *code = out->values + (size_t)act * (size_t)act_cols;
    avx2_codes(out, x, act, act_cols);
    for (int32_t i = 0; i < act_cols; i += NESTED_STEP) {
        __m256i *at = (__m256i *)(void *)(code + i);
        _mm256_storeu_si256(at, _mm256_permutexvar_epi8(by_bit, _mm256_loadu_si256(at)));
    }
}

/* out[t], t < 8: four planes' bits t as a number 0..15 in every byte, plane 0 on top. */
AVX512_INLINE void nibbles(__m512i out[8], const __m512i plane[4])
{
    const __m512i m_aa = _mm512_set1_epi8((char)0xAA), m_cc = _mm512_set1_epi8((char)0xCC);
    const __m512i m_0f = _mm512_set1_epi8(15);
    __m512i even[2],
        odd[2]; /* of planes 0 and 1, of 2 and 3: two bits for t = 0, 2, 4, 6 and 1, 3, ... */
    for (int i = 0; i < 2; i++) {
        __m512i top = plane[2 * i], low = plane[2 * i + 1];
        even[i] = _mm512_ternarylogic_epi32(m_aa, _mm512_add_epi8(top, top), low, SELECT);
        odd[i] = _mm512_ternarylogic_epi32(m_aa, top, _mm512_srli_epi16(low, 1), SELECT);
    }
    for (int i = 0; i < 2; i++) { /* t = i, i + 4 and i + 2, i + 6 */
        __m512i top = i ? odd[0] : even[0], low = i ? odd[1] : even[1];
        __m512i first = _mm512_ternarylogic_epi32(m_cc, _mm512_slli_epi16(top, 2), low, SELECT);
        __m512i second = _mm512_ternarylogic_epi32(m_cc, top, _mm512_srli_epi16(low, 2), SELECT);
        out[i] = _mm512_and_si512(first, m_0f);
        out[i + 4] = _mm512_and_si512(_mm512_srli_epi16(first, 4), m_0f);
        out[i + 2] = _mm512_and_si512(second, m_0f);
        out[i + 6] = _mm512_and_si512(_mm512_srli_epi16(second, 4), m_0f);
    }
}

AVX512_INLINE void expand_any(uint8_t *out, const struct nested_tile *tile, int32_t begin,
                              int32_t n_cols, int bits)
{
    int pad = bits > 4 ? 8 - bits : 4 - bits;
    for (int32_t c = begin; c < begin + n_cols; c += NESTED_STEP) {
        size_t at = (size_t)(c / NESTED_STEP) * STEP_BYTES;
        for (int v = 0; v < N_VEC; v++) {
            __m512i plane[BITS_MAX], code[8], top[8];
            for (int p = 0; p < pad; p++) {
                plane[p] = _mm512_setzero_si512();
            }
            for (int p = 0; p < bits; p++) {
                plane[pad + p] = load64(tile->plane[p] + at + (size_t)(64 * v));
            }
            nibbles(bits > 4 ? top : code, plane);
            if (bits > 4) {
                nibbles(code, plane + 4);
            }
            for (int t = 0; t < 8; t++) {
                if (bits > 4) {
                    code[t] = _mm512_or_si512(_mm512_slli_epi16(top[t], 4), code[t]);
                }
                _mm512_store_si512(out + 64 * (t * N_VEC + v), code[t]);
            }
        }
        out += NESTED_STEP * NESTED_ROWS;
    }
}

AVX512 static void avx512_expand(uint8_t *out, const struct nested_tile *tile, int32_t begin,
                                 int32_t n_cols)
{
    switch (tile->bits) {
    case 1:
        expand_any(out, tile, begin, n_cols, 1);
        return;
    case 2:
        expand_any(out, tile, begin, n_cols, 2);
        return;
    case 3:
        expand_any(out, tile, begin, n_cols, 3);
        return;
    case 4:
        expand_any(out, tile, begin, n_cols, 4);
        return;
    default:
        expand_any(out, tile, begin, n_cols, tile->bits);
    }
}

AVX512_INLINE void dots_any(float *const *sum, const uint8_t *codes, const struct nested_tile *tile,
                            const struct nested_acts *const *acts, int n_tok, int32_t begin,
                            int32_t end)
{
    int32_t act_cols = tile->act_cols, most = (1 << tile->bits) - 1;
    for (int32_t act = begin / act_cols; act < end / act_cols; act++) {
        size_t first = (size_t)act * (size_t)act_cols;
        const uint8_t *code = codes + (first - (size_t)begin) * NESTED_ROWS;
        __m512i total[NESTED_DOT_TOKENS][N_VEC];
        for (int j = 0; j < n_tok; j++) {
            for (int v = 0; v < N_VEC; v++) {
                total[j][v] = _mm512_setzero_si512();
            }
        }
        for (int32_t c = 0; c < act_cols; c += 4, code += 64 * N_VEC) {
            __m512i w[N_VEC];
            for (int v = 0; v < N_VEC; v++) {
                w[v] = load64(code + 64 * v);
            }
            for (int j = 0; j < n_tok; j++) {
                int32_t four;
                memcpy(&four, acts[j]->values + first + (size_t)c, sizeof four);
                __m512i x = _mm512_set1_epi32(four);
                for (int v = 0; v < N_VEC; v++) {
                    total[j][v] = _mm512_dpbusd_epi32(total[j][v], w[v], x);
                }
            }
        }
        const uint16_t *levels = tile->levels + first / (size_t)tile->group_cols * 2 * NESTED_ROWS;
        __m512 scale[N_VEC], offset[N_VEC];
        for (int v = 0; v < N_VEC; v++) {
            scale[v] = halves(levels + 16 * v);
            offset[v] = halves(levels + NESTED_ROWS + 16 * v);
        }
        for (int j = 0; j < n_tok; j++) {
            __m512i centre = _mm512_set1_epi32(most * acts[j]->total[act]);
            __m512 h = _mm512_set1_ps(acts[j]->scale[act] * 0.5f);
            __m512 x = _mm512_set1_ps(acts[j]->sum[act]);
            for (int v = 0; v < N_VEC; v++) {
                __m512i i = _mm512_sub_epi32(_mm512_add_epi32(total[j][v], total[j][v]), centre);
                __m512 y = _mm512_fmadd_ps(scale[v], _mm512_mul_ps(_mm512_cvtepi32_ps(i), h),
                                           _mm512_loadu_ps(sum[j] + 16 * v));
                _mm512_storeu_ps(sum[j] + 16 * v, _mm512_fmadd_ps(offset[v], x, y));
            }
        }
    }
}

/* One copy per number of tokens, whose sums then stay in registers. */
#define DOTS(n)                                            \
    case n:                                                \
        dots_any(sum, codes, tile, acts, (n), begin, end); \
        return;

AVX512 static void avx512_dots(float *const *sum, const uint8_t *codes,
                               const struct nested_tile *tile,
                               const struct nested_acts *const *acts, int n_tok, int32_t begin,
                               int32_t end)
{
    switch (n_tok) {
        DOTS(1)
        DOTS(2)
        DOTS(3)
        DOTS(4)
        DOTS(5)
        DOTS(6)
        DOTS(7)
        DOTS(8)
    }
}

const struct nested_loops nested_loops_avx512 = {
    .together = 4,
    .tables = avx2_tables_by_nibble,
    .codes = avx512_codes,
    .look_up = avx512_look_up,
    .expand = avx512_expand,
    .dots = avx512_dots,
};

#endif
