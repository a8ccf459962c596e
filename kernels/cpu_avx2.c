/* Inner loops with AVX2, FMA and F16C; compiled into every x86-64 build by target attributes and
 * chosen at run time.
 *
 * Codes. A step is 32 columns, so one 32-bit word of each plane. With the word in all eight lanes
 * of a vector and the mask 0x01010101 << j in lane j, byte k of lane j holds bit 8k + j, i.e.
 * column 8k + j: an AND and a compare give that bit for 32 columns at once, in such an order that
 * lane j of vector k is column 8k + j. Codes of up to three bits then index eight f32 levels held
 * in one register, four bits two registers; wider codes are computed (or gathered, LUT). Levels are
 * evaluated in the order that core/bitplane.h defines, without fused multiply-add: the decoded
 * weights are the oracle's bit for bit, and only the order of the sums differs.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((target("avx2,fma,f16c"), always_inline))

enum { N_VEC = CPU_STEP / 8 };

/* ---- sums ---- */

AVX2_INLINE __m256 sum_step(const __m256 acc[N_VEC])
{
    return _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]));
}

AVX2_INLINE float sum_vector(__m256 v)
{
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

/* sum_vector of four at once: the same additions, so the same bits. */
AVX2_INLINE __m128 sum_vectors(const __m256 v[4])
{
    __m256 even = _mm256_add_ps(_mm256_permute2f128_ps(v[0], v[2], 0x20),
                                _mm256_permute2f128_ps(v[0], v[2], 0x31));
    __m256 odd = _mm256_add_ps(_mm256_permute2f128_ps(v[1], v[3], 0x20),
                               _mm256_permute2f128_ps(v[1], v[3], 0x31));
    __m256 pair =
        _mm256_add_ps(_mm256_shuffle_ps(even, odd, 0x44), _mm256_shuffle_ps(even, odd, 0xee));
    pair = _mm256_add_ps(pair, _mm256_movehdup_ps(pair));
    return _mm_shuffle_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1), 0x88);
}

AVX2_INLINE __m256 load8(const void *v, enum dtype dtype, int32_t i)
{
    if (dtype == DT_F32) {
        return _mm256_loadu_ps((const float *)v + i);
    }
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)v + i));
    if (dtype == DT_F16) {
        return _mm256_cvtph_ps(half);
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* sum[j] (n_x) = w times x[j] over the columns begin..end, eight sums each. dtype and n_x are
 * constants where this is called. */
AVX2_INLINE void dots_vectors(__m256 *sum, const void *w, enum dtype dtype, const float *const *x,
                              int n_x, int32_t begin, int32_t end)
{
    __m256 acc[CPU_TILE][N_VEC];
    for (int j = 0; j < n_x; j++) {
        for (int k = 0; k < N_VEC; k++) {
            acc[j][k] = _mm256_setzero_ps();
        }
    }
    int32_t i = begin;
    for (; i + CPU_STEP <= end; i += CPU_STEP) {
        for (int k = 0; k < N_VEC; k++) {
            __m256 w8 = load8(w, dtype, i + 8 * k);
            for (int j = 0; j < n_x; j++) {
                acc[j][k] = _mm256_fmadd_ps(w8, _mm256_loadu_ps(x[j] + i + 8 * k), acc[j][k]);
            }
        }
    }
    if (i < end) {
        float w_step[CPU_STEP] = {0}, x_step[CPU_STEP] = {0};
        size_t size = dtype == DT_F32 ? 4 : 2, rest = (size_t)(end - i);
        memcpy(w_step, (const char *)w + (size_t)i * size, rest * size);
        for (int j = 0; j < n_x; j++) {
            memcpy(x_step, x[j] + i, rest * sizeof *x_step);
            for (int k = 0; k < N_VEC; k++) {
                acc[j][k] = _mm256_fmadd_ps(load8(w_step, dtype, 8 * k),
                                            _mm256_loadu_ps(x_step + 8 * k), acc[j][k]);
            }
        }
    }
    for (int j = 0; j < n_x; j++) {
        sum[j] = sum_step(acc[j]);
    }
}

AVX2_INLINE void dots_any(float *out, const float *w, const float *const *x, int n_x,
                          const int32_t *cut, int n_segments)
{
    __m256 sum[CPU_TILE_ROOM];
    for (int j = 0; j < CPU_TILE_ROOM; j++) {
        sum[j] = _mm256_setzero_ps();
    }
    for (int s = 0; s < n_segments; s++) {
        dots_vectors(sum, w, DT_F32, x, n_x, cut[s], cut[s + 1]);
        _mm_storeu_ps(out + s * CPU_TILE_ROOM, sum_vectors(sum));
    }
}

AVX2 static void avx2_dots(float *out, const float *w, const float *const *x, int n_x,
                           const int32_t *cut, int n_segments)
{
    switch (n_x) {
    case 1:
        dots_any(out, w, x, 1, cut, n_segments);
        return;
    case 2:
        dots_any(out, w, x, 2, cut, n_segments);
        return;
    case CPU_TILE:
        dots_any(out, w, x, CPU_TILE, cut, n_segments);
        return;
    }
    INVARIANT(!"a tile of 1..CPU_TILE tokens");
}

AVX2_INLINE void dot_segments_any(float *out, const void *w, enum dtype dtype, const float *x,
                                  const int32_t *cut, int n_segments)
{
    if (n_segments == 1) {
        __m256 sum;
        dots_vectors(&sum, w, dtype, &x, 1, cut[0], cut[1]);
        out[0] = sum_vector(sum);
        return;
    }
    for (int s = 0; s < n_segments; s += 4) {
        __m256 sum[4];
        for (int k = 0; k < 4; k++) {
            if (s + k < n_segments) {
                dots_vectors(&sum[k], w, dtype, &x, 1, cut[s + k], cut[s + k + 1]);
            } else {
                sum[k] = _mm256_setzero_ps();
            }
        }
        _mm_storeu_ps(out + s, sum_vectors(sum));
    }
}

AVX2 static void avx2_dot_segments(float *out, const void *w, enum dtype dtype, const float *x,
                                   const int32_t *cut, int n_segments)
{
    if (dtype == DT_F32) {
        dot_segments_any(out, w, DT_F32, x, cut, n_segments);
    } else if (dtype == DT_F16) {
        dot_segments_any(out, w, DT_F16, x, cut, n_segments);
    } else {
        dot_segments_any(out, w, DT_BF16, x, cut, n_segments);
    }
}

AVX2 static void avx2_convert(float *out, const void *v, enum dtype dtype, int32_t n)
{
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(out + i, load8(v, dtype, i));
    }
    size_t size = dtype == DT_F32 ? 4 : 2;
    floats_from(out + i, (const char *)v + (size_t)i * size, dtype, (size_t)(n - i));
}

/* ---- codes ---- */

/* Byte k of lane j: the code of column 8k + j. */
AVX2_INLINE __m256i step_codes(const uint8_t *const *plane, int bits, size_t byte)
{
    const __m256i pick = _mm256_setr_epi32(0x01010101, 0x02020202, 0x04040404, 0x08080808,
                                           0x10101010, 0x20202020, 0x40404040, (int)0x80808080u);
    __m256i codes = _mm256_setzero_si256();
    for (int p = 0; p < bits; p++) {
        int32_t word;
        memcpy(&word, plane[p] + byte, sizeof word);
        __m256i set = _mm256_and_si256(_mm256_set1_epi32(word), pick);
        __m256i is_one = _mm256_cmpeq_epi8(set, pick); /* -1 where the bit is set */
        codes = _mm256_sub_epi8(_mm256_add_epi8(codes, codes), is_one);
    }
    return codes;
}

AVX2_INLINE __m256 f16_lanes(uint16_t h)
{
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

/* half * (2c - (2^b - 1)) in f32, exact. */
AVX2_INLINE __m256 centred(__m256i code, int n_codes)
{
    __m256i odd = _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_set1_epi32(n_codes - 1));
    return _mm256_mul_ps(_mm256_set1_ps(0.5f), _mm256_cvtepi32_ps(odd));
}

/* a where bit `shift` of code is set, -a where it is not. */
AVX2_INLINE __m256 signed_by(__m256 a, __m256i code, int shift)
{
    __m256i sign = _mm256_slli_epi32(_mm256_srl_epi32(code, _mm_cvtsi32_si128(shift)), 31);
    __m256i flip = _mm256_xor_si256(sign, _mm256_set1_epi32((int)0x80000000u));
    return _mm256_xor_ps(a, _mm256_castsi256_ps(flip));
}

/* What a group needs, broadcast. */
struct group_levels {
    __m256 table[2]; /* up to 4 bits: levels of codes 0..7 and 8..15 */
    __m256 scale, offset, tail, alpha[BITS_MAX];
};

AVX2_INLINE __m256 level_of(const struct group_levels *g, enum level_kind kind, int bits,
                            __m256i code)
{
    __m256 w;
    if (kind == LEVEL_TIED) {
        return _mm256_add_ps(g->offset, _mm256_mul_ps(g->scale, centred(code, 1 << bits)));
    }
    if (kind == LEVEL_TAIL) {
        __m256 high = centred(_mm256_srli_epi32(code, 4), 16);
        __m256 low = centred(_mm256_and_si256(code, _mm256_set1_epi32(15)), 16);
        w = _mm256_add_ps(g->offset, _mm256_mul_ps(g->scale, high));
        return _mm256_add_ps(w, _mm256_mul_ps(g->tail, low));
    }
    w = g->offset;
    for (int p = 0; p < bits; p++) {
        w = _mm256_add_ps(w, signed_by(g->alpha[p], code, bits - 1 - p));
    }
    return w;
}

AVX2_INLINE void load_group(struct group_levels *g, const struct nested_row *row,
                            enum level_kind kind, int bits, int32_t group)
{
    if (kind == LEVEL_LUT) {
        return; /* loaded with the row */
    }
    const uint16_t *at;
    if (kind == LEVEL_TIED) {
        at = row->levels + 2 * (size_t)group;
        g->scale = f16_lanes(at[0]);
        g->offset = f16_lanes(at[1]);
    } else if (kind == LEVEL_TAIL) {
        at = row->levels + 3 * (size_t)group;
        g->scale = f16_lanes(at[0]);
        g->tail = f16_lanes(at[1]);
        g->offset = f16_lanes(at[2]);
    } else {
        at = row->levels + (size_t)(bits + 1) * (size_t)group;
        for (int p = 0; p < bits; p++) {
            g->alpha[p] = f16_lanes(at[p]);
        }
        g->offset = f16_lanes(at[bits]);
    }
    if (bits <= 4) {
        const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        g->table[0] = level_of(g, kind, bits, low);
        if (bits == 4) {
            g->table[1] = level_of(g, kind, bits, _mm256_add_epi32(low, _mm256_set1_epi32(8)));
        }
    }
}

/* Vector k of a step: columns 8k..8k + 7. */
AVX2_INLINE __m256 step_weights(const struct group_levels *g, const float *lut,
                                enum level_kind kind, int bits, __m256i codes, int k)
{
    __m256i index = _mm256_srli_epi32(codes, 8 * k); /* vpermps looks at the low three bits only */
    if (bits <= 3) {
        return _mm256_permutevar8x32_ps(g->table[0], index);
    }
    if (bits == 4) {
        __m256 low = _mm256_permutevar8x32_ps(g->table[0], index);
        __m256 high = _mm256_permutevar8x32_ps(g->table[1], index);
        __m256i top_bit = _mm256_slli_epi32(index, 28);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(top_bit));
    }
    __m256i code = _mm256_and_si256(index, _mm256_set1_epi32(0xff));
    if (kind == LEVEL_LUT) {
        return _mm256_i32gather_ps(lut, code, 4);
    }
    return level_of(g, kind, bits, code);
}

/* out[0..n) = columns begin..begin + n of a row. kind and bits are constants where this is called.
 */
AVX2_INLINE void decode_any(float *out, const struct nested_row *row, enum level_kind kind,
                            int bits, int32_t begin, int32_t n)
{
    struct group_levels g;
    float lut[LEVELS_MAX] __attribute__((aligned(32)));
    if (kind == LEVEL_LUT) {
        memset(lut, 0, 16 * sizeof *lut);
        floats_from(lut, row->levels, DT_F16, (size_t)1 << bits);
        g.table[0] = _mm256_load_ps(lut);
        g.table[1] = _mm256_load_ps(lut + 8);
    }
    int32_t c = 0, group = begin / row->group_cols;
    while (c < n) {
        load_group(&g, row, kind, bits, group++);
        int32_t end = n - c < row->group_cols ? n : c + row->group_cols;
        for (; c < end; c += CPU_STEP) {
            __m256i codes = step_codes(row->plane, bits, (size_t)(begin + c) / 8);
            for (int k = 0; k < N_VEC; k++) {
                _mm256_storeu_ps(out + c + 8 * k, step_weights(&g, lut, kind, bits, codes, k));
            }
        }
    }
}

/* One copy per precision and kind, so that inside it both are constants. */
#define DECODE(kind, bits)                            \
    case bits:                                        \
        decode_any(out, row, kind, (bits), begin, n); \
        return;
#define DECODE_BITS(kind)                                                            \
    switch (row->bits) {                                                             \
        DECODE(kind, 1)                                                              \
        DECODE(kind, 2)                                                              \
        DECODE(kind, 3)                                                              \
        DECODE(kind, 4) default : INVARIANT(row->bits > 4 && row->bits <= BITS_MAX); \
        decode_any(out, row, kind, row->bits, begin, n);                             \
        return;                                                                      \
    }

AVX2 static void avx2_decode(float *out, const struct nested_row *row, int32_t begin, int32_t n)
{
    switch (row->kind) {
    case LEVEL_TIED:
        DECODE_BITS(LEVEL_TIED)
    case LEVEL_FREE:
        DECODE_BITS(LEVEL_FREE)
    case LEVEL_LUT:
        DECODE_BITS(LEVEL_LUT)
    case LEVEL_TAIL:
        decode_any(out, row, LEVEL_TAIL, 8, begin, n);
        return;
    case LEVEL_NONE:
    case LEVEL_N:
        break;
    }
    INVARIANT(!"levels of this precision are held");
}

static const struct cpu_isa isa_avx2 = {
    .name = "avx2",
    .loops = &cpu_loops_avx2,
    .dots = avx2_dots,
    .dot_segments = avx2_dot_segments,
    .convert = avx2_convert,
    .decode = avx2_decode,
    .nested = &nested_loops_avx2,
};

const struct cpu_isa *cpu_isa_avx2(void)
{
    __builtin_cpu_init();
    bool has_all = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    /* clang 14 knows no "f16c" here; every processor with AVX2 has it */
    return has_all ? &isa_avx2 : NULL;
}

const struct cpu_isa *cpu_isa_avx512(void)
{
    static const struct cpu_isa isa = {
        .name = "avx512",
        .loops = &cpu_loops_avx512,
        .dots = avx2_dots,
        .dot_segments = avx2_dot_segments,
        .convert = avx2_convert,
        .decode = avx2_decode,
        .nested = &nested_loops_avx512,
    };
    __builtin_cpu_init();
    bool has_all = cpu_isa_avx2() && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                   __builtin_cpu_supports("avx512vnni");
    return has_all ? &isa : NULL;
}

#else

const struct cpu_isa *cpu_isa_avx2(void)
{
    return NULL;
}

const struct cpu_isa *cpu_isa_avx512(void)
{
    return NULL;
}

#endif
