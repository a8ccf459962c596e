/* The cpu backend's state, its slots that have files of their own, and the inner loops that exist
 * once per instruction set. Private to cpu*.c.
 *
 * Data flow: cpu_nested.c and cpu_dense.c spread rows of a product over threads, cpu_attention.c
 * heads of tokens; all call inner loops through struct cpu_isa. An inner loop sees one row and its
 * inputs only, with a fixed number of lanes and a fixed order of reduction: that is what makes a
 * result independent of threads, of the other tokens and of the other rows.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_H
#define PMPD_KERNELS_CPU_H

#include "core/backend.h"
#include "kernels/host.h"

/* Columns that one step of an inner loop takes: 32 bits of each plane. Groups are multiples. */
enum { CPU_STEP = 32, CPU_TILE = 3, CPU_TILE_ROOM = 4, CPU_MAX_SEGMENTS = 16 };

/* One row of a nested matrix at one precision, ready to be decoded. */
struct nested_row {
    const uint8_t *plane[BITS_MAX]; /* (n_cols_padded / 8) each, the first `bits` of them */
    /* F16: TIED (n_groups, {scale, offset}), FREE (n_groups, {alpha[bits], offset}), LUT (2^bits),
     * TAIL (n_groups, {scale, tail, offset}) */
    const uint16_t *levels;
    enum level_kind kind;
    int bits;
    int32_t group_cols;
};

/* Inner loops. Lengths are any: a last step that is not whole is filled up with zeros. Sums over
 * segments: n_segments <= CPU_MAX_SEGMENTS, segment s is the columns cut[s]..cut[s + 1]; each sum
 * is the same bit for bit as that of the segment alone. */
struct cpu_isa {
    const char *name; /* "avx512", "avx2", "scalar" */
    /* out[s * CPU_TILE_ROOM + j] = sum w[i] x[j][i] over segment s, for n_x <= CPU_TILE vectors x;
     * the same bit for bit whatever n_x. */
    void (*dots)(float *out, const float *w, const float *const *x, int n_x, const int32_t *cut,
                 int n_segments);
    /* out[s] for one x and weights of type F32, F16 or BF16: equals converting first. out has room
     * for CPU_MAX_SEGMENTS. */
    void (*dot_segments)(float *out, const void *w, enum dtype dtype, const float *x,
                         const int32_t *cut, int n_segments);
    /* The same for one segment, 0..n. */
    float (*dot)(const void *w, enum dtype dtype, const float *x, int32_t n);
    /* y += a v, v of type F32, F16 or BF16. */
    void (*axpy)(float *y, float a, const void *v, enum dtype dtype, int32_t n);
    /* out[i] = v[i] in f32; exact. */
    void (*convert)(float *out, const void *v, enum dtype dtype, int32_t n);
    /* out[0..n) = weights of columns begin..begin + n, begin a multiple of group_cols; whole steps
     * are written, so that out has room for n rounded up to CPU_STEP. */
    void (*decode)(float *out, const struct nested_row *row, int32_t begin, int32_t n);
    /* sum of the decoded weights times x[0..n): equals decode, then dots, bit for bit. */
    float (*dot_nested)(const struct nested_row *row, int32_t begin, const float *x, int32_t n);
};

extern const struct cpu_isa cpu_isa_scalar;
/* Loops of an instruction set, or NULL when this processor or build lacks it: AVX2, FMA and F16C;
 * AVX-512 with F, BW, DQ, VL, VBMI and VNNI. */
const struct cpu_isa *cpu_isa_avx2(void);
const struct cpu_isa *cpu_isa_avx512(void);

struct cpu {
    const struct cpu_isa *isa;
    int n_threads;
    struct host_scratch rows;   /* (n_threads, row_floats): decoded weights */
    struct host_scratch scores; /* (n_threads, n_scores): attention weights of one head */
};

/* Threads worth starting for a number of multiply-adds. */
int cpu_threads(const struct cpu *cpu, size_t work);
/* Rounded up so that threads do not share cache lines. */
size_t cpu_scratch_width(size_t n_floats);

/* Where the sums of a product go. */
struct cpu_output {
    float *y;          /* (n_segments or 1, n_tok, n_rows) */
    const float *bias; /* (n_rows); NULL: none */
    size_t n_tok, n_rows;
    bool add_up;
};

static inline struct cpu_output cpu_output(struct tensor *y, const struct tensor *x,
                                           const struct tensor *bias, const struct how *how)
{
    return (struct cpu_output){.y = y->data,
                               .bias = bias ? bias->data : NULL,
                               .n_tok = (size_t)x->dims[0],
                               .n_rows = (size_t)y->dims[y->n_dims - 1],
                               .add_up = how->add_up};
}

/* A row's segments, CPU_MAX_SEGMENTS at a time. */
static inline int cpu_segments_now(int32_t n_segments, int32_t first)
{
    return n_segments - first < CPU_MAX_SEGMENTS ? (int)(n_segments - first) : CPU_MAX_SEGMENTS;
}

/* One segment's sum; a row's segments come in order. */
static inline void cpu_store(const struct cpu_output *out, int32_t segment, size_t token,
                             int32_t row, float sum)
{
    size_t at = (out->add_up ? token : (size_t)segment * out->n_tok + token) * out->n_rows;
    float *to = out->y + at + (size_t)row;
    if (out->bias) {
        sum += out->bias[row];
    }
    *to = out->add_up && segment > 0 ? *to + sum : sum;
}

/* One row of weights times n <= CPU_TILE tokens' x, every segment. */
static inline void cpu_tile(const struct cpu_isa *isa, const struct cpu_output *out,
                            const float *weights, const float *const *x, const size_t *token, int n,
                            int32_t row, const int32_t *cut, int32_t n_segments)
{
    for (int32_t first = 0; first < n_segments; first += CPU_MAX_SEGMENTS) {
        float sum[CPU_MAX_SEGMENTS * CPU_TILE_ROOM];
        int n_now = cpu_segments_now(n_segments, first);
        isa->dots(sum, weights, x, n, cut + first, n_now);
        for (int s = 0; s < n_now; s++) {
            for (int j = 0; j < n; j++) {
                cpu_store(out, first + s, token[j], row, sum[s * CPU_TILE_ROOM + j]);
            }
        }
    }
}

/* Slots of struct backend_ops. */
MUST_CHECK enum status cpu_planes_load(struct backend *be, struct nested_matrix *w,
                                       const struct nested_source *src,
                                       const struct matrix_range *range, int n_planes);
void cpu_planes_drop(struct backend *be, struct nested_matrix *w, int keep);
MUST_CHECK enum status cpu_matmul_nested(struct backend *be, struct tensor *y,
                                         const struct nested_matrix *w, const struct tensor *bits,
                                         const struct tensor *x, const struct tensor *bias,
                                         const struct how *how);
MUST_CHECK enum status cpu_matmul_dense(struct backend *be, struct tensor *y,
                                        const struct tensor *w, const struct tensor *x,
                                        const struct tensor *bias, const struct how *how);
MUST_CHECK enum status cpu_kv_append(struct backend *be, struct kv_layer *kv,
                                     const struct tensor *k, const struct tensor *v,
                                     const struct token_place *place);
MUST_CHECK enum status cpu_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                                     const struct kv_layer *kv, const struct token_place *place,
                                     float scale);

#endif
