/* The loops of cpu_nested.h with AVX2, FMA and F16C. Tables and codes of activations are in column
 * order. Expanded codes: for every four columns, 8 rows x 4 columns per vector, in the order of
 * rows that unpacking gives: vector v holds rows 4v..4v + 3 and 16 + 4v..16 + 4v + 3.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu_nested.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((target("avx2,fma,f16c"), always_inline))

/* How far ahead of a stream of planes to fetch. Measured on Zen 3 and 4: without it one core reads
 * up to a quarter less. */
enum { FETCH_AHEAD = 512, ROW_BYTES = NESTED_ROWS, N_VEC = NESTED_ROWS / 8, MOST_SUMS = 8 };

/* ---- activations ---- */

AVX2_INLINE float sum_lanes(__m256 v)
{
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

AVX2_INLINE float max_lanes(__m256 v)
{
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

/* out[i]: lane l is column 4l + i of the 32 columns at x. */
AVX2_INLINE void load_fours(__m256 out[4], const float *x)
{
    __m256 r[4];
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_set_m128(_mm_loadu_ps(x + 4 * i + 16), _mm_loadu_ps(x + 4 * i));
    }
    __m256 t0 = _mm256_unpacklo_ps(r[0], r[1]), t1 = _mm256_unpackhi_ps(r[0], r[1]);
    __m256 t2 = _mm256_unpacklo_ps(r[2], r[3]), t3 = _mm256_unpackhi_ps(r[2], r[3]);
    out[0] = _mm256_shuffle_ps(t0, t2, 0x44);
    out[1] = _mm256_shuffle_ps(t0, t2, 0xEE);
    out[2] = _mm256_shuffle_ps(t1, t3, 0x44);
    out[3] = _mm256_shuffle_ps(t1, t3, 0xEE);
}

AVX2_INLINE __m256 magnitude(__m256 v)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
}

AVX2_INLINE float begin_group(const struct nested_acts *out, int32_t act, float most, float sum)
{
    bool is_finite = isfinite(sum) && isfinite(most);
    out->scale[act] = is_finite ? most / 127.0f : 0.0f;
    out->sum[act] = is_finite ? sum : NAN; /* not a number anywhere: every row says so */
    return is_finite && most > NESTED_LEAST ? 127.0f / most : 0.0f;
}

/* Sum over a group and the largest of `fours`: of sums of four magnitudes, or of single ones. */
AVX2_INLINE float measure(const struct nested_acts *out, const float *x, int32_t act,
                          int32_t act_cols, bool fours)
{
    __m256 most = _mm256_setzero_ps(), sum = most, v[4];
    for (int32_t i = 0; i < act_cols; i += NESTED_STEP) {
        load_fours(v, x + i);
        sum =
            _mm256_add_ps(sum, _mm256_add_ps(_mm256_add_ps(v[0], v[1]), _mm256_add_ps(v[2], v[3])));
        __m256 a = magnitude(v[0]), b = magnitude(v[1]), c = magnitude(v[2]), d = magnitude(v[3]);
        __m256 now = fours ? _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d))
                           : _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
        most = _mm256_max_ps(most, now);
    }
    return begin_group(out, act, max_lanes(most), sum_lanes(sum));
}

/* The eight tables of 32 columns. place[q]: where the table of four q goes, in tables of 16. */
AVX2_INLINE void eight_tables(int8_t *out, const float *x, float inverse, const int place[8])
{
    const __m256 sign = _mm256_set1_ps(-0.0f), scale = _mm256_set1_ps(inverse);
    /* bytes (entry e, four q) -> (q, e), within a half */
    const __m256i turn = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256 v[4];
    load_fours(v, x);
    __m256 p01 = _mm256_mul_ps(scale, _mm256_add_ps(v[0], v[1]));
    __m256 m01 = _mm256_mul_ps(scale, _mm256_sub_ps(v[0], v[1]));
    __m256 p23 = _mm256_mul_ps(scale, _mm256_add_ps(v[2], v[3]));
    __m256 m23 = _mm256_mul_ps(scale, _mm256_sub_ps(v[2], v[3]));
    const __m256 low[4] = {_mm256_xor_ps(sign, p01), m01, _mm256_xor_ps(sign, m01), p01};
    const __m256 high[4] = {_mm256_xor_ps(sign, p23), m23, _mm256_xor_ps(sign, m23), p23};
    __m256i part[4]; /* dword q of part t: entries 4t..4t + 3 of four q */
    for (int t = 0; t < 4; t++) {
        __m256i e[4];
        for (int k = 0; k < 4; k++) {
            e[k] = _mm256_cvtps_epi32(_mm256_add_ps(low[k], high[t]));
        }
        __m256i packed =
            _mm256_packs_epi16(_mm256_packs_epi32(e[0], e[1]), _mm256_packs_epi32(e[2], e[3]));
        part[t] = _mm256_shuffle_epi8(packed, turn);
    }
    __m256i a0 = _mm256_unpacklo_epi32(part[0], part[1]),
            a1 = _mm256_unpackhi_epi32(part[0], part[1]);
    __m256i a2 = _mm256_unpacklo_epi32(part[2], part[3]),
            a3 = _mm256_unpackhi_epi32(part[2], part[3]);
    const __m256i pair[4] = {_mm256_unpacklo_epi64(a0, a2), _mm256_unpackhi_epi64(a0, a2),
                             _mm256_unpacklo_epi64(a1, a3), _mm256_unpackhi_epi64(a1, a3)};
    for (int q = 0; q < 4; q++) {
        _mm_storeu_si128((__m128i *)(void *)(out + 16 * place[q]), _mm256_castsi256_si128(pair[q]));
        _mm_storeu_si128((__m128i *)(void *)(out + 16 * place[q + 4]),
                         _mm256_extracti128_si256(pair[q], 1));
    }
}

AVX2_INLINE void tables_in(const int place[8], const struct nested_acts *out, const float *x,
                           int32_t act, int32_t act_cols)
{
    int8_t *table = out->values + (size_t)act * (size_t)act_cols * 4;
    float inverse = measure(out, x, act, act_cols, true);
    if (inverse == 0) {
        memset(table, 0, (size_t)act_cols * 4);
        return;
    }
    for (int32_t i = 0; i < act_cols; i += NESTED_STEP) {
        eight_tables(table + (size_t)i * 4, x + i, inverse, place);
    }
}

AVX2 static void avx2_tables(const struct nested_acts *out, const float *x, int32_t act,
                             int32_t act_cols)
{
    static const int in_order[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    tables_in(in_order, out, x, act, act_cols);
}

/* Low nibbles' tables first: look-ups of four bytes at a time. */
AVX2 void avx2_tables_by_nibble(const struct nested_acts *out, const float *x, int32_t act,
                                int32_t act_cols)
{
    static const int by_nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    tables_in(by_nibble, out, x, act, act_cols);
}

AVX2 void avx2_codes(const struct nested_acts *out, const float *x, int32_t act, int32_t act_cols)
{
    int8_t *code = out->values + (size_t)act * (size_t)act_cols;
    float inverse = measure(out, x, act, act_cols, false);
    if (inverse == 0) {
        memset(code, 0, (size_t)act_cols);
        out->total[act] = 0;
        return;
    }
    const __m256 scale = _mm256_set1_ps(inverse);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i total = _mm256_setzero_si256();
    for (int32_t i = 0; i < act_cols; i += NESTED_STEP) {
        __m256i e[4];
        for (int k = 0; k < 4; k++) {
            e[k] = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i + 8 * k)));
            total = _mm256_add_epi32(total, e[k]);
        }
        __m256i packed =
            _mm256_packs_epi16(_mm256_packs_epi32(e[0], e[1]), _mm256_packs_epi32(e[2], e[3]));
        _mm256_storeu_si256((__m256i *)(void *)(code + i),
                            _mm256_permutevar8x32_epi32(packed, in_order));
    }
    __m128i q = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4E));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0xB1));
    out->total[act] = _mm_cvtsi128_si32(q);
}

/* ---- look-ups ---- */

AVX2_INLINE __m256 halves(const uint16_t *h)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)h));
}

/* Into how many 16-bit sums the planes of a term go, at most three planes each, and how many are in
 * the i-th. */
AVX2_INLINE int sums_of(int per_term)
{
    return (per_term + 2) / 3;
}

AVX2_INLINE int planes_in(int per_term, int i)
{
    int n = sums_of(per_term);
    return (per_term + n - 1 - i) / n;
}

/* 16-bit sums of one group: low[s] rows 0..7 and 16..23, high[s] rows 8..15 and 24..31. */
AVX2_INLINE void add_planes(__m256i *low, __m256i *high, const uint8_t *const *plane,
                            const int8_t *tables, size_t at, int n_bytes, int n_terms, int per_term)
{
    const __m256i mask = _mm256_set1_epi8(15);
    for (int j = 0; j < n_bytes; j++) {
        const __m128i *table = (const __m128i *)(const void *)(tables + (size_t)j * 32);
        __m256i t0 = _mm256_broadcastsi128_si256(_mm_load_si128(table));
        __m256i t1 = _mm256_broadcastsi128_si256(_mm_load_si128(table + 1));
        int p = 0, s = 0;
        for (int t = 0; t < n_terms; t++) {
            for (int i = 0; i < sums_of(per_term); i++, s++) {
                for (int left = planes_in(per_term, i); left > 0; left--, p++) {
                    const uint8_t *from = plane[p] + at + (size_t)j * ROW_BYTES;
                    __m256i w = _mm256_load_si256((const __m256i *)(const void *)from);
                    if (j % 2 == 0) {
                        _mm_prefetch((const char *)from + FETCH_AHEAD, _MM_HINT_T0);
                    }
                    __m256i v0 = _mm256_shuffle_epi8(t0, _mm256_and_si256(w, mask));
                    __m256i v1 =
                        _mm256_shuffle_epi8(t1, _mm256_and_si256(_mm256_srli_epi16(w, 4), mask));
                    __m256i weight = _mm256_set1_epi8((char)(1 << (left - 1)));
                    low[s] = _mm256_add_epi16(
                        low[s], _mm256_maddubs_epi16(weight, _mm256_unpacklo_epi8(v0, v1)));
                    high[s] = _mm256_add_epi16(
                        high[s], _mm256_maddubs_epi16(weight, _mm256_unpackhi_epi8(v0, v1)));
                }
            }
        }
    }
}

/* Rows 8v..8v + 7 of the 16-bit sums as 32 bits. */
AVX2_INLINE __m256i rows_of(__m256i low, __m256i high, int v)
{
    __m256i from = v % 2 == 0 ? low : high;
    return _mm256_cvtepi16_epi32(v < 2 ? _mm256_castsi256_si128(from)
                                       : _mm256_extracti128_si256(from, 1));
}

AVX2_INLINE void look_up_any(float *sum, const struct nested_tile *tile,
                             const struct nested_acts *acts, int32_t begin, int32_t end,
                             enum level_kind kind, int bits)
{
    const int n_terms = kind == LEVEL_FREE ? bits : kind == LEVEL_TAIL ? 2 : 1;
    const int per_term = bits / n_terms, n_sums = n_terms * sums_of(per_term);
    const uint8_t *plane[BITS_MAX];
    int32_t act_cols = tile->act_cols;
    __m256 y[N_VEC];
    for (int p = 0; p < bits; p++) {
        plane[p] = tile->plane[p];
    }
    for (int v = 0; v < N_VEC; v++) {
        y[v] = _mm256_setzero_ps();
    }
    for (int32_t act = begin / act_cols; act < end / act_cols; act++) {
        __m256i low[MOST_SUMS], high[MOST_SUMS];
        for (int s = 0; s < n_sums; s++) {
            low[s] = high[s] = _mm256_setzero_si256();
        }
        size_t at = (size_t)act * (size_t)act_cols;
        add_planes(low, high, plane, acts->values + at * 4, at / 8 * ROW_BYTES, act_cols / 8,
                   n_terms, per_term);
        const uint16_t *levels =
            tile->levels + at / (size_t)tile->group_cols * (size_t)(n_terms + 1) * NESTED_ROWS;
        __m256 h = _mm256_set1_ps(acts->scale[act] * (kind == LEVEL_FREE ? 1.0f : 0.5f));
        __m256 x = _mm256_set1_ps(acts->sum[act]);
        _mm_prefetch((const char *)levels + FETCH_AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)levels + FETCH_AHEAD + 64, _MM_HINT_T0);
        for (int v = 0; v < N_VEC; v++) {
            int s = 0;
            for (int t = 0; t < n_terms; t++) {
                __m256i total = rows_of(low[s], high[s], v);
                s++;
                for (int i = 1; i < sums_of(per_term); i++, s++) {
                    total = _mm256_add_epi32(_mm256_slli_epi32(total, planes_in(per_term, i)),
                                             rows_of(low[s], high[s], v));
                }
                y[v] = _mm256_fmadd_ps(halves(levels + t * NESTED_ROWS + 8 * v),
                                       _mm256_mul_ps(_mm256_cvtepi32_ps(total), h), y[v]);
            }
            y[v] = _mm256_fmadd_ps(halves(levels + n_terms * NESTED_ROWS + 8 * v), x, y[v]);
        }
    }
    for (int v = 0; v < N_VEC; v++) {
        _mm256_storeu_ps(sum + 8 * v, y[v]);
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

AVX2 static void avx2_look_up(float *sum, const struct nested_tile *tile,
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

/* out[t], t < 8: four planes' bits t as a number 0..15 in every byte, plane 0 on top. */
AVX2_INLINE void nibbles(__m256i out[8], const __m256i plane[4])
{
    const __m256i m_aa = _mm256_set1_epi8((char)0xAA), m_cc = _mm256_set1_epi8((char)0xCC);
    const __m256i m_0f = _mm256_set1_epi8(15);
    __m256i even[2],
        odd[2]; /* of planes 0 and 1, of 2 and 3: two bits for t = 0, 2, 4, 6 and 1, 3, ... */
    for (int i = 0; i < 2; i++) {
        __m256i top = plane[2 * i], low = plane[2 * i + 1];
        even[i] = _mm256_or_si256(_mm256_and_si256(_mm256_add_epi8(top, top), m_aa),
                                  _mm256_andnot_si256(m_aa, low));
        odd[i] = _mm256_or_si256(_mm256_and_si256(top, m_aa),
                                 _mm256_andnot_si256(m_aa, _mm256_srli_epi16(low, 1)));
    }
    const __m256i *const half[2] = {even, odd};
    for (int i = 0; i < 2; i++) { /* t = i, i + 4 and i + 2, i + 6 */
        __m256i top = half[i][0], low = half[i][1];
        __m256i first = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(top, 2), m_cc),
                                        _mm256_andnot_si256(m_cc, low));
        __m256i second = _mm256_or_si256(_mm256_and_si256(top, m_cc),
                                         _mm256_andnot_si256(m_cc, _mm256_srli_epi16(low, 2)));
        out[i] = _mm256_and_si256(first, m_0f);
        out[i + 4] = _mm256_and_si256(_mm256_srli_epi16(first, 4), m_0f);
        out[i + 2] = _mm256_and_si256(second, m_0f);
        out[i + 6] = _mm256_and_si256(_mm256_srli_epi16(second, 4), m_0f);
    }
}

/* Columns 8j..8j + 7 of a tile: byte r of out[t] is the code of row r, column 8j + t. */
AVX2_INLINE void codes_of_byte(__m256i out[8], const struct nested_tile *tile, size_t j, int bits)
{
    __m256i plane[BITS_MAX], top[8];
    int pad = bits > 4 ? 8 - bits : 4 - bits;
    for (int p = 0; p < pad; p++) {
        plane[p] = _mm256_setzero_si256();
    }
    for (int p = 0; p < bits; p++) {
        const uint8_t *from = tile->plane[p] + j * ROW_BYTES;
        plane[pad + p] = _mm256_load_si256((const __m256i *)(const void *)from);
    }
    if (bits <= 4) {
        nibbles(out, plane);
        return;
    }
    nibbles(top, plane);
    nibbles(out, plane + 4);
    for (int t = 0; t < 8; t++) {
        out[t] = _mm256_or_si256(_mm256_slli_epi16(top[t], 4), out[t]);
    }
}

AVX2_INLINE void expand_any(uint8_t *out, const struct nested_tile *tile, int32_t begin,
                            int32_t n_cols, int bits)
{
    __m256i *to = (__m256i *)(void *)out;
    for (int32_t c = begin; c < begin + n_cols; c += 8) {
        __m256i code[8];
        codes_of_byte(code, tile, (size_t)c / 8, bits);
        for (int t = 0; t < 8; t += 4, to += 4) {
            __m256i a = _mm256_unpacklo_epi8(code[t], code[t + 1]);
            __m256i b = _mm256_unpackhi_epi8(code[t], code[t + 1]);
            __m256i d = _mm256_unpacklo_epi8(code[t + 2], code[t + 3]);
            __m256i e = _mm256_unpackhi_epi8(code[t + 2], code[t + 3]);
            _mm256_store_si256(to, _mm256_unpacklo_epi16(a, d));
            _mm256_store_si256(to + 1, _mm256_unpackhi_epi16(a, d));
            _mm256_store_si256(to + 2, _mm256_unpacklo_epi16(b, e));
            _mm256_store_si256(to + 3, _mm256_unpackhi_epi16(b, e));
        }
    }
}

AVX2 static void avx2_expand(uint8_t *out, const struct nested_tile *tile, int32_t begin,
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

/* Eight values of two runs of four. */
AVX2_INLINE __m256 load_rows(const float *y, int v)
{
    return _mm256_set_m128(_mm_loadu_ps(y + 16 + 4 * v), _mm_loadu_ps(y + 4 * v));
}

AVX2_INLINE void store_rows(float *y, int v, __m256 rows)
{
    _mm_storeu_ps(y + 4 * v, _mm256_castps256_ps128(rows));
    _mm_storeu_ps(y + 16 + 4 * v, _mm256_extractf128_ps(rows, 1));
}

AVX2_INLINE __m256 level_rows(const uint16_t *levels, int v)
{
    __m128i low = _mm_loadl_epi64((const __m128i *)(const void *)(levels + 4 * v));
    __m128i high = _mm_loadl_epi64((const __m128i *)(const void *)(levels + 16 + 4 * v));
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}

/* One group of activations and n_tok <= 2 tokens. A 16-bit sum takes `run` fours of columns: with c
 * the largest code, run * 2 * 127 c stays below 2^15. */
AVX2_INLINE void dot_group(float *const *sum, const uint8_t *codes, const struct nested_tile *tile,
                           const struct nested_acts *const *acts, int n_tok, int32_t act, int run)
{
    const __m256i ones = _mm256_set1_epi16(1);
    int32_t act_cols = tile->act_cols;
    __m256i total[2][N_VEC];
    for (int j = 0; j < n_tok; j++) {
        for (int v = 0; v < N_VEC; v++) {
            total[j][v] = _mm256_setzero_si256();
        }
    }
    const __m256i *code = (const __m256i *)(const void *)codes;
    for (int32_t c = 0; c < act_cols; c += 4 * run) {
        __m256i part[2][N_VEC];
        for (int k = 0; k < run; k++, code += N_VEC) {
            for (int j = 0; j < n_tok; j++) {
                int32_t four;
                memcpy(&four, acts[j]->values + (size_t)act * (size_t)act_cols + c + 4 * k,
                       sizeof four);
                __m256i x = _mm256_set1_epi32(four);
                for (int v = 0; v < N_VEC; v++) {
                    __m256i product = _mm256_maddubs_epi16(_mm256_load_si256(code + v), x);
                    part[j][v] = k == 0 ? product : _mm256_add_epi16(part[j][v], product);
                }
            }
        }
        for (int j = 0; j < n_tok; j++) {
            for (int v = 0; v < N_VEC; v++) {
                total[j][v] = _mm256_add_epi32(total[j][v], _mm256_madd_epi16(part[j][v], ones));
            }
        }
    }
    const uint16_t *levels =
        tile->levels + (size_t)act * (size_t)act_cols / (size_t)tile->group_cols * 2 * NESTED_ROWS;
    int32_t most = (1 << tile->bits) - 1;
    for (int j = 0; j < n_tok; j++) {
        __m256i centre = _mm256_set1_epi32(most * acts[j]->total[act]);
        __m256 h = _mm256_set1_ps(acts[j]->scale[act] * 0.5f),
               x = _mm256_set1_ps(acts[j]->sum[act]);
        for (int v = 0; v < N_VEC; v++) {
            __m256i i = _mm256_sub_epi32(_mm256_add_epi32(total[j][v], total[j][v]), centre);
            __m256 y =
                _mm256_fmadd_ps(level_rows(levels, v), _mm256_mul_ps(_mm256_cvtepi32_ps(i), h),
                                load_rows(sum[j], v));
            store_rows(sum[j], v, _mm256_fmadd_ps(level_rows(levels + NESTED_ROWS, v), x, y));
        }
    }
}

AVX2_INLINE void dots_any(float *const *sum, const uint8_t *codes, const struct nested_tile *tile,
                          const struct nested_acts *const *acts, int n_tok, int32_t begin,
                          int32_t end, int run)
{
    int32_t act_cols = tile->act_cols;
    for (int32_t act = begin / act_cols; act < end / act_cols; act++) {
        const uint8_t *code = codes + (size_t)(act * act_cols - begin) * NESTED_ROWS;
        int j = 0;
        for (; j + 2 <= n_tok; j += 2) {
            dot_group(sum + j, code, tile, acts + j, 2, act, run);
        }
        if (j < n_tok) {
            dot_group(sum + j, code, tile, acts + j, 1, act, run);
        }
    }
}

AVX2 static void avx2_dots(float *const *sum, const uint8_t *codes, const struct nested_tile *tile,
                           const struct nested_acts *const *acts, int n_tok, int32_t begin,
                           int32_t end)
{
    if (tile->bits <= 4) {
        dots_any(sum, codes, tile, acts, n_tok, begin, end, 8);
    } else if (tile->bits == 5) {
        dots_any(sum, codes, tile, acts, n_tok, begin, end, 4);
    } else {
        dots_any(sum, codes, tile, acts, n_tok, begin, end, 1);
    }
}

const struct nested_loops nested_loops_avx2 = {
    .together = 1,
    .tables = avx2_tables,
    .codes = avx2_codes,
    .look_up = avx2_look_up,
    .expand = avx2_expand,
    .dots = avx2_dots,
};

#endif
