/* The cpu backend's state, its slots that have files of their own, and the inner loops that exist
 * once per instruction set. Private to cpu*.c.
 *
 * Data flow: cpu_nested.c and cpu_dense.c spread rows of a product over threads, cpu_attention.c
 * heads of tokens and blocks of rows, cpu_logits.c blocks of the vocabulary; all call inner loops
 * through struct cpu_isa. An inner loop sees one row and its inputs only, with a fixed number of
 * lanes and a fixed order of reduction: that is what makes a result independent of threads, of the
 * other tokens and of the other rows. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_H
#define PMPD_KERNELS_CPU_H

#include <stdatomic.h>

#include "core/backend.h"
#include "kernels/cpu_arena.h"
#include "kernels/cpu_nested.h"
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

/* Rows of one KV head that are taken together: the rows' partial results are merged block by block
 * in their order, so that no result depends on how blocks are shared out among threads. */
enum { CPU_KV_BLOCK = 256 };

struct cpu_kv_block {
    const char *k, *v; /* (n_rows, head_dim) of k_type and v_type */
    const char *k_last,
        *v_last;               /* (head_dim) row n_rows - 1, which may lie elsewhere (a probe's) */
    const char *next;          /* (next_rows, head_dim) of k_type that the caller comes to next */
    int32_t next_rows;         /* 0: none */
    enum dtype k_type, v_type; /* F32 or F16 */
    int32_t n_rows, head_dim;  /* n_rows 1..CPU_KV_BLOCK */
};

/* Logits whose statistics are taken together, for the same reason. */
enum { CPU_LOGIT_BLOCK = 2048 };

/* The loops of a step beside the products. Lengths are any. */
struct cpu_loops {
    /* Softmax attention of n_q query heads q (n_q, head_dim) to a block that they share, not yet
     * normalised: part (n_q, head_dim + 2) gets sum e_j v_j, then m, the largest score, and
     * sum e_j, with e_j = exp(scale q.k_j - m). score: room for (n_q, CPU_KV_BLOCK). */
    void (*attend)(float *part, float *score, const float *q, int32_t n_q, float scale,
                   const struct cpu_kv_block *block);
    /* into (n_q, head_dim + 2) becomes what attend would say of both blocks. Source: online
     * softmax, Milakov and Gimelshein (arXiv 1805.02867), theorem 1 and section 3.1. */
    void (*attend_merge)(float *into, const float *part, int32_t n_q, int32_t head_dim);
    /* to = f16 of from, to nearest, ties to even */
    void (*to_f16)(uint16_t *to, const float *from, int32_t n);
    /* One row each; to may be from. bias may be NULL. */
    void (*rmsnorm)(float *to, const float *from, const float *gain, int32_t n, float eps);
    void (*layernorm)(float *to, const float *from, const float *gain, const float *bias, int32_t n,
                      float eps);
    /* The sum, and the sum of squares. */
    void (*moments)(float out[2], const float *x, int32_t n);
    /* Turns dimension i with i + half by the angle of cosine c[i] and sine s[i], n_heads times. */
    void (*rotate)(float *head, int32_t n_heads, int32_t head_dim, int32_t half, const float *c,
                   const float *s);
    /* to = silu(gate) * up, and to = gelu(from) in its tanh form; to may be an input */
    void (*silu_gate)(float *to, const float *gate, const float *up, size_t n);
    void (*gelu_tanh)(float *to, const float *from, size_t n);
    /* exp, at most 1.5 ulp */
    void (*exp)(float *to, const float *from, size_t n);
    /* sampler_part_stats of n <= CPU_LOGIT_BLOCK logits. Maxima, ids, target and pick are equal to
     * its, sums differ by rounding. */
    void (*stats)(struct logit_stats *out, const float *logits, int32_t n, int32_t first_id,
                  const struct logit_want *want);
};
extern const struct cpu_loops cpu_loops_scalar, cpu_loops_avx2, cpu_loops_avx512;

/* Inner loops. Lengths are any: a last step that is not whole is filled up with zeros. Sums over
 * segments: n_segments <= CPU_MAX_SEGMENTS, segment s is the columns cut[s]..cut[s + 1]; each sum
 * is the same bit for bit as that of the segment alone. */
struct cpu_isa {
    const char *name; /* "avx512", "avx2", "scalar" */
    const struct cpu_loops *loops;
    /* out[s * CPU_TILE_ROOM + j] = sum w[i] x[j][i] over segment s, for n_x <= CPU_TILE vectors x;
     * the same bit for bit whatever n_x. */
    void (*dots)(float *out, const float *w, const float *const *x, int n_x, const int32_t *cut,
                 int n_segments);
    /* out[s] for one x and weights of type F32, F16 or BF16: equals converting first. out has room
     * for CPU_MAX_SEGMENTS. */
    void (*dot_segments)(float *out, const void *w, enum dtype dtype, const float *x,
                         const int32_t *cut, int n_segments);
    /* out[i] = v[i] in f32; exact. */
    void (*convert)(float *out, const void *v, enum dtype dtype, int32_t n);
    /* out[0..n) = weights of columns begin..begin + n, begin a multiple of group_cols; whole steps
     * are written, so that out has room for n rounded up to CPU_STEP. */
    void (*decode)(float *out, const struct nested_row *row, int32_t begin, int32_t n);
    const struct nested_loops *nested; /* products of nested matrices: kernels/cpu_nested.h */
};

extern const struct cpu_isa cpu_isa_scalar;
/* Loops of an instruction set, or NULL when this processor or build lacks it: AVX2, FMA and F16C;
 * AVX-512 with F, BW, DQ, VL, VBMI and VNNI. */
const struct cpu_isa *cpu_isa_avx2(void);
const struct cpu_isa *cpu_isa_avx512(void);

/* The activations that were quantised last: q, k and v, or gate and up, have the same. */
struct cpu_quantised {
    struct host_scratch x; /* a copy of them */
    uint64_t number;       /* of this content, from 1 */
    size_t n_tok;          /* 0: none */
    int32_t n_cols, group_cols;
    bool for_look_ups;
};

/* A thread's run of tiles; whoever is done with his own takes of another's. */
struct cpu_share {
    _Alignas(64) atomic_int next;
    int end;
    uint64_t tables; /* number of the content that the thread's look-up tables are of */
};

struct cpu {
    const struct cpu_isa *isa;
    int n_threads;
    struct host_scratch rows;   /* (n_threads, row_floats): decoded weights */
    struct host_scratch acts;   /* quantised activations of the last product */
    struct cpu_quantised last;  /* what they are of */
    struct cpu_share *shares;   /* (n_threads) tiles of a product */
    struct host_scratch scores; /* attention, see cpu_attention.c */
    /* of nested matrices: planes by number, levels by precision */
    struct cpu_arena planes[BITS_MAX], levels[BITS_ALL];
};

/* Threads worth starting for a number of multiply-adds. */
int cpu_threads(const struct cpu *cpu, size_t work);
/* Calls task for consecutive ranges that make up 0..n and begin at multiples of unit, one range for
 * each thread; with one thread on the spot. */
void cpu_share(int n_threads, size_t n, size_t unit,
               void (*task)(void *context, size_t begin, size_t end), void *context);
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
MUST_CHECK enum status cpu_add_parts(struct backend *be, struct tensor *x,
                                     const struct tensor *parts, const struct tensor *bias);
MUST_CHECK enum status cpu_embed(struct backend *be, struct tensor *x, const struct tensor *table,
                                 const struct tensor *ids);
MUST_CHECK enum status cpu_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                   const struct tensor *gain, float eps);
MUST_CHECK enum status cpu_layernorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                     const struct tensor *gain, const struct tensor *bias,
                                     float eps);
MUST_CHECK enum status cpu_rope(struct backend *be, struct tensor *q, struct tensor *k,
                                const struct token_place *place, const struct rope_table *table);
MUST_CHECK enum status cpu_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                               const struct tensor *up, enum activation act);
MUST_CHECK enum status cpu_activate(struct backend *be, struct tensor *y, const struct tensor *x,
                                    enum activation act);
MUST_CHECK enum status cpu_moments(struct backend *be, struct tensor *out, const struct tensor *x,
                                   const int32_t *cut, int32_t n_cuts);
MUST_CHECK enum status cpu_logit_stats(struct backend *be, struct logit_stats *out,
                                       const struct tensor *logits, int32_t first_id,
                                       const int32_t *cut, int32_t n_cuts,
                                       const struct logit_want *want);
MUST_CHECK enum status cpu_top_k(struct backend *be, struct logit_candidate *out,
                                 const struct tensor *logits, int32_t first_id, int32_t k);
MUST_CHECK enum status cpu_kv_append(struct backend *be, struct kv_layer *kv,
                                     const struct tensor *k, const struct tensor *v,
                                     const struct token_place *place);
MUST_CHECK enum status cpu_attention(struct backend *be, struct tensor *y, const struct tensor *q,
                                     const struct kv_layer *kv, const struct token_place *place,
                                     float scale);

#endif
