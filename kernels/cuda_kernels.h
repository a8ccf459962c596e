/* The launchers of the cuda backend's kernels: plain pointers into device memory, shapes already
 * checked by the backend door, everything on the GPU's one stream. Every launch is checked; errors
 * are ST_CUDA with the kernel's name. C and C++ include this.
 *
 * Every sum is f32 (statistics of logits: f64) in an order fixed by the row or column alone: no
 * atomics, no dependence on the number of tokens or blocks.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CUDA_KERNELS_H
#define PMPD_KERNELS_CUDA_KERNELS_H

#include "kernels/gpu.h"

#ifdef __cplusplus
extern "C" {
#endif
#include "core/backend.h"

enum { CUDA_MAX_CUTS = 65, CUDA_MAX_HEAD_DIM = 256 };

/* Segments, by value into the kernel. */
struct cuda_cuts {
    int32_t n;
    int32_t at[CUDA_MAX_CUTS];
};

/* A nested matrix as kernels see it. Plane words: 32 columns each, bit c the c-th; a row has
 * n_words. values of a precision: as level_values_per_row lists them, per row:
 * TIED scale (g), offset (g); FREE alpha (g, b), offset (g); LUT (2^b); TAIL scale, offset, tail (g
 * each). */
struct cuda_matrix {
    const uint32_t *plane[BITS_MAX]; /* (n_rows, n_words) */
    int32_t n_rows, n_cols, n_words, n_groups, group_cols;
    struct {
        enum level_kind kind;
        const uint16_t *scale, *offset, *alpha, *lut, *tail; /* F16 */
    } level[BITS_ALL];
};

/* y (n_segments, n_tok, n_rows), or (1, n_tok, n_rows) where segments are added up; bits (n_tok) in
 * device memory; bias NULL: none. */
MUST_CHECK enum status cuda_nested_tokens(struct gpu *g, float *y, const struct cuda_matrix *w,
                                          const uint8_t *bits, const float *x, const float *bias,
                                          int32_t n_tok, const struct cuda_cuts *cuts, bool add_up);
/* The same for many tokens: tiles of dequantised weights. Precisions in bits_used one after the
 * other. */
MUST_CHECK enum status cuda_nested_chunk(struct gpu *g, float *y, const struct cuda_matrix *w,
                                         const uint8_t *bits, uint32_t bits_used, const float *x,
                                         const float *bias, int32_t n_tok,
                                         const struct cuda_cuts *cuts, bool add_up);
/* w (n_rows, n_cols) F32, F16 or BF16. */
MUST_CHECK enum status cuda_dense_tokens(struct gpu *g, float *y, const void *w, enum dtype dtype,
                                         const float *x, const float *bias, int32_t n_rows,
                                         int32_t n_cols, int32_t n_tok,
                                         const struct cuda_cuts *cuts, bool add_up);
MUST_CHECK enum status cuda_dense_chunk(struct gpu *g, float *y, const void *w, enum dtype dtype,
                                        const float *x, const float *bias, int32_t n_rows,
                                        int32_t n_cols, int32_t n_tok, const struct cuda_cuts *cuts,
                                        bool add_up);

/* x (n_tok, n) += parts (n_parts, n_tok, n) in order, + bias (n). */
MUST_CHECK enum status cuda_add_parts(struct gpu *g, float *x, const float *parts,
                                      const float *bias, int32_t n_parts, int32_t n_tok, int32_t n);
MUST_CHECK enum status cuda_embed(struct gpu *g, float *x, const void *table, enum dtype dtype,
                                  const int32_t *ids, int32_t n_vocab, int32_t n_tok, int32_t n);
/* bias may be NULL; layer: subtract the mean (layer norm), else RMS norm. */
MUST_CHECK enum status cuda_norm(struct gpu *g, float *y, const float *x, const float *gain,
                                 const float *bias, int32_t n_tok, int32_t n, float eps,
                                 bool layer);
/* x (n_tok, n_heads, head_dim) in place. */
MUST_CHECK enum status cuda_rope(struct gpu *g, float *x, const int32_t *pos, const float *cos,
                                 const float *sin, int32_t rot_dim, int32_t n_tok, int32_t n_heads,
                                 int32_t head_dim);
/* from (n_tok, n_heads, head_dim) into cache (n_slots, n_heads, n_rows, head_dim). */
MUST_CHECK enum status cuda_kv_append(struct gpu *g, void *cache, enum dtype dtype,
                                      const float *from, const int32_t *slot, const int32_t *kv_row,
                                      int32_t n_tok, int32_t n_heads, int32_t n_rows,
                                      int32_t head_dim);
/* y, q (n_tok, n_heads, head_dim); head_dim <= CUDA_MAX_HEAD_DIM. */
MUST_CHECK enum status cuda_attention(struct gpu *g, float *y, const float *q,
                                      const struct kv_layer *kv, const struct token_place *place,
                                      int32_t n_tok, int32_t n_heads, float scale);
/* act(gate) * up, or act(gate) where up is NULL; n values. */
MUST_CHECK enum status cuda_activate(struct gpu *g, float *y, const float *gate, const float *up,
                                     size_t n, enum activation act);
/* out (n_tok, cuts->n, 2): sum and sum of squares of each part of x (n_tok, n). */
MUST_CHECK enum status cuda_moments(struct gpu *g, float *out, const float *x, int32_t n_tok,
                                    int32_t n, const struct cuda_cuts *cuts);
/* out (n_tok, cuts->n) and want (n_tok) in device memory. */
MUST_CHECK enum status cuda_logit_stats(struct gpu *g, struct logit_stats *out, const float *logits,
                                        int32_t n_tok, int32_t n, int32_t first_id,
                                        const struct cuda_cuts *cuts,
                                        const struct logit_want *want);
MUST_CHECK enum status cuda_top_k(struct gpu *g, struct logit_candidate *out, const float *logits,
                                  int32_t n_tok, int32_t n, int32_t first_id, int32_t k);

#ifdef __cplusplus
}
#endif

#endif
