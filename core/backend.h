/* DOOR 1: a device. A backend is a table of typed function pointers with no empty slot; callers use
 * the backend_* wrappers, which check shapes, dtypes and resident planes once for all backends and
 * then call the slot. x and y are f32 everywhere; sums are f32 or better.
 *
 * Invariant of every product: a row of y depends on nothing but its own row of x, its own bits, the
 * matrix and `how`; neither on n_tok, nor on the other rows, nor on threads.
 * Pointers in tensors lie in the backend's memory unless a parameter says "host".
 * None of these functions is collective. Operations may be asynchronous: backend_sync waits and
 * reports what went wrong since.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_BACKEND_H
#define PMPD_CORE_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/bitplane.h"
#include "core/status.h"
#include "core/tensor.h"

struct backend {
    const struct backend_ops *ops;
    void *impl; /* owned by the backend */
};

struct backend_options {
    int n_threads;   /* CPU threads; 0 = as many as this process may use */
    int device;      /* this rank's number on its node: the GPU of that number, or the only one that
                        this rank can see; -1: the first. CPU backends ignore it. */
    const char *isa; /* instruction set of the cpu backend; NULL or "auto": the best one here */
};

/* One rank's shard of a nested matrix, in the backend's own layout. Zero it before the first
 * backend_planes_load; give it back with backend_planes_drop(be, w, 0). */
struct nested_matrix {
    enum level_kind kind[BITS_ALL]; /* per precision; NONE: not held */
    int32_t n_rows, n_cols, n_cols_padded, group_cols;
    int32_t n_planes;                /* planes of the source */
    int32_t n_resident;              /* planes loaded: 0..n_planes */
    void *planes, *levels[BITS_ALL]; /* owned by the backend */
};

/* Which part of a source matrix a rank holds. Columns begin at a multiple of group_cols and end at
 * one, or at n_cols. */
struct matrix_range {
    int32_t row_begin, row_end, col_begin, col_end;
};

/* How the decoder names a product: fixed by the run's configuration, never by what shares a pass.
 */
enum product {
    PRODUCT_ONE,   /* a decode pass of a run with one slot */
    PRODUCT_SLOTS, /* every other decode pass */
    PRODUCT_CHUNK  /* prefill */
};

/* Segments are column ranges with an f32 partial sum each, so that ranks can add them in one order
 * whatever their number. Column cut[s]..cut[s + 1] is segment s; cuts lie at multiples of
 * group_cols for a nested matrix. n_segments = 1 (and cut NULL): the whole row. The partial sums
 * are kept apart, or added up in f32 in their order, ((s0 + s1) + s2) + ... */
struct how {
    enum product product;
    int32_t n_segments;
    const int32_t *cut; /* (n_segments + 1), host; NULL when n_segments is 1 */
    bool add_up;
    uint32_t bits_used; /* host copy: bit b is set when precision b occurs in bits */
};

/* Where the tokens of a pass live: K and V of token i go to row kv_row[i] of slot[i]; it attends to
 * rows 0..pos[i]-1 and to kv_row[i]. kv_row = pos but for probes, which use a spare row. */
struct token_place {
    struct tensor slot, pos, kv_row; /* (n_tok) I32 each */
    int32_t max_pos;                 /* host: largest pos in the pass */
};

/* One layer's KV cache on this rank. heads_per_kv query heads of the model share a KV head; a
 * rank's query heads may begin and end in the middle of such a group: local query head h reads
 * local KV head (head_in_group + h) / heads_per_kv. */
struct kv_layer {
    struct tensor k, v; /* (n_slots, n_kv_heads_local, max_tok + n_spare, head_dim) F16 or F32 */
    int32_t heads_per_kv;
    int32_t head_in_group; /* place of local query head 0 in its group: 0..heads_per_kv - 1 */
};

/* Tables of rotary angles, f32, computed by core in double: entry (p, i) for position p and
 * frequency i. Rotate-half: dimension i pairs with i + rot_dim/2; dimensions >= rot_dim pass.
 * Source: RoFormer (arXiv 2104.09864), eq. 34; the pairing is Hugging Face's Llama's. */
struct rope_table {
    struct tensor cos, sin; /* (max_pos, rot_dim / 2) F32 */
    int32_t rot_dim;
};

/* SILU: x / (1 + exp(-x)), of gates. GELU: x P(a normal number <= x), by the error function or by
 * its tanh approximation. Source: Gaussian Error Linear Units (arXiv 1606.08415), section 2. */
enum activation { ACT_SILU, ACT_GELU_TANH, ACT_GELU_ERF };

/* What the sampler needs from logits, per token. Statistics are of one contiguous part of the
 * vocabulary; parts merge exactly in vocabulary order (core/sampler.h). */
struct logit_stats {
    float max, second; /* largest and second largest logit (-inf when there is none) */
    int32_t argmax;    /* global id of max; the lowest id wins ties */
    float sum_exp;     /* sum exp(l - max) */
    float sum_exp_l;   /* sum exp(l - max) * (l - max) */
    float target;      /* logit of the target id; -inf when it is not in this part */
    float pick_score;  /* max of l / temperature + Gumbel noise of the id */
    int32_t pick;      /* its id: an exact sample of softmax(l / temperature) */
    float pick_logit;  /* its logit */
    double sum_exp_t;  /* sum exp((l - max) / temperature) of a restricted want; else 0 */
};

/* Per token: what to compute beside the statistics. Host memory, copied by the call. */
struct logit_want {
    int32_t target;    /* global vocabulary id to report, or -1 */
    float temperature; /* 0: greedy (pick = argmax) */
    uint64_t key[2];   /* of the counter-based generator: sampler_key() */
    bool restricted;   /* the token will come from core/candidates.h: sum_exp_t is wanted, and the
                          pick is not (it is as for greedy). Needs a temperature above 0. */
};

/* One id of the vocabulary that may be chosen. */
struct logit_candidate {
    float logit;
    int32_t id; /* global; -1: no candidate (its logit is -inf) */
};

struct backend_ops {
    const char *name; /* "cpu_ref", "cpu", "cuda" */
    const char *help; /* one line for people */
    enum status (*open)(struct backend *be, const struct backend_options *options);
    void (*close)(struct backend *be);
    /* Instruction set or device class, part of the arithmetic class of a run: "avx2". */
    const char *(*arithmetic)(const struct backend *be);
    /* true: the backend's memory is the host's, which collectives and callers may read. */
    bool (*is_host)(const struct backend *be);
    /* What no two ranks may share, by a name that is unique in the world: "GPU-6c1c..."; "": such a
     * thing does not exist. */
    const char *(*device)(const struct backend *be);

    enum status (*alloc)(struct backend *be, void **out, size_t bytes);
    void (*release)(struct backend *be, void *ptr);
    enum status (*upload)(struct backend *be, void *dst, const void *src_host, size_t bytes);
    enum status (*download)(struct backend *be, void *dst_host, const void *src, size_t bytes);
    enum status (*zero)(struct backend *be, void *dst, size_t bytes);
    enum status (*sync)(struct backend *be);

    enum status (*planes_load)(struct backend *be, struct nested_matrix *w,
                               const struct nested_source *src, const struct matrix_range *range,
                               int n_planes);
    void (*planes_drop)(struct backend *be, struct nested_matrix *w, int keep);

    enum status (*matmul_nested)(struct backend *be, struct tensor *y,
                                 const struct nested_matrix *w, const struct tensor *bits,
                                 const struct tensor *x, const struct tensor *bias,
                                 const struct how *how);
    enum status (*matmul_dense)(struct backend *be, struct tensor *y, const struct tensor *w,
                                const struct tensor *x, const struct tensor *bias,
                                const struct how *how);
    enum status (*add_parts)(struct backend *be, struct tensor *x, const struct tensor *parts,
                             const struct tensor *bias);
    enum status (*embed)(struct backend *be, struct tensor *x, const struct tensor *table,
                         const struct tensor *ids);
    enum status (*rmsnorm)(struct backend *be, struct tensor *y, const struct tensor *x,
                           const struct tensor *gain, float eps);
    enum status (*layernorm)(struct backend *be, struct tensor *y, const struct tensor *x,
                             const struct tensor *gain, const struct tensor *bias, float eps);
    enum status (*rope)(struct backend *be, struct tensor *q, struct tensor *k,
                        const struct token_place *place, const struct rope_table *table);
    enum status (*kv_append)(struct backend *be, struct kv_layer *kv, const struct tensor *k,
                             const struct tensor *v, const struct token_place *place);
    enum status (*attention)(struct backend *be, struct tensor *y, const struct tensor *q,
                             const struct kv_layer *kv, const struct token_place *place,
                             float scale);
    enum status (*glu)(struct backend *be, struct tensor *y, const struct tensor *gate,
                       const struct tensor *up, enum activation act);
    enum status (*activate)(struct backend *be, struct tensor *y, const struct tensor *x,
                            enum activation act);
    enum status (*moments)(struct backend *be, struct tensor *out, const struct tensor *x,
                           const int32_t *cut_host, int32_t n_cuts);
    enum status (*logit_stats)(struct backend *be, struct logit_stats *out_host,
                               const struct tensor *logits, int32_t first_id,
                               const int32_t *cut_host, int32_t n_cuts,
                               const struct logit_want *want_host);
    enum status (*top_k)(struct backend *be, struct logit_candidate *out_host,
                         const struct tensor *logits, int32_t first_id, int32_t k);
};

/* ---- registry ---- */

/* Adds a table; INVARIANT: no slot is NULL, the name is new. */
void backend_register(const struct backend_ops *ops);
/* Opens a registered backend by name. Errors: ST_USER (unknown name; the message lists the known
 * ones), ST_UNSUPPORTED (not compiled in, no device). The caller owns *out, back with
 * backend_close. */
MUST_CHECK enum status backend_open(struct backend *out, const char *name,
                                    const struct backend_options *options);
/* Takes a closed or zeroed backend too. */
void backend_close(struct backend *be);
/* Registered tables in order of registration; NULL past the end. */
const struct backend_ops *backend_registered(int i);

/* ---- memory ---- */

bool backend_is_host(const struct backend *be);

MUST_CHECK enum status backend_alloc(struct backend *be, void **out, size_t bytes); /* zeroed */
void backend_release(struct backend *be, void *ptr);                                /* NULL too */
MUST_CHECK enum status backend_upload(struct backend *be, void *dst, const void *src_host,
                                      size_t bytes);
MUST_CHECK enum status backend_download(struct backend *be, void *dst_host, const void *src,
                                        size_t bytes);
MUST_CHECK enum status backend_zero(struct backend *be, void *dst, size_t bytes);
MUST_CHECK enum status backend_sync(struct backend *be);

/* ---- nested weights ---- */

/* Makes planes 0..n_planes-1 of the range of src resident, with the levels of every precision
 * <= n_planes that src holds. Planes already resident stay where they are. src->group_cols is a
 * multiple of 32. Errors: ST_SHAPE (range, group, n_planes), ST_NOMEM; on failure w is as before.
 */
MUST_CHECK enum status backend_planes_load(struct backend *be, struct nested_matrix *w,
                                           const struct nested_source *src,
                                           const struct matrix_range *range, int n_planes);
/* Gives back planes keep.. and the levels of precisions above keep; keep 0 frees everything. */
void backend_planes_drop(struct backend *be, struct nested_matrix *w, int keep);

/* ---- operations ---- */

/* Partial sums of y = W[0..bits) x (+ bias), each token at its own bits.
 * Shapes: x (n_tok, w->n_cols) F32; y (how->n_segments, n_tok, w->n_rows) F32, or (n_tok,
 *         w->n_rows) when n_segments is 1 or they are added up; bits (n_tok) U8; bias (w->n_rows)
 * F32 or NULL, only with one segment. Errors: ST_SHAPE, ST_UNSUPPORTED (a precision in
 * how->bits_used is not resident or not held). Backends on the host also refuse (ST_SHAPE) bits
 * that bits_used does not name; a device does not look. */
MUST_CHECK enum status backend_matmul_nested(struct backend *be, struct tensor *y,
                                             const struct nested_matrix *w,
                                             const struct tensor *bits, const struct tensor *x,
                                             const struct tensor *bias, const struct how *how);
/* The same for a dense w (n_rows, n_cols) F32, F16 or BF16. */
MUST_CHECK enum status backend_matmul_dense(struct backend *be, struct tensor *y,
                                            const struct tensor *w, const struct tensor *x,
                                            const struct tensor *bias, const struct how *how);
/* x += ((parts[0] + parts[1]) + ...) (+ bias): the residual, with segments added in order.
 * Shapes: x (n_tok, n) F32; parts (n_parts, n_tok, n) or (n_tok, n) F32; bias (n) F32 or NULL. */
MUST_CHECK enum status backend_add_parts(struct backend *be, struct tensor *x,
                                         const struct tensor *parts, const struct tensor *bias);
/* x (n_tok, n) F32 = rows ids (n_tok) I32 of table (vocab, n) F32, F16 or BF16. The caller has
 * checked that the ids lie inside the table. */
MUST_CHECK enum status backend_embed(struct backend *be, struct tensor *x,
                                     const struct tensor *table, const struct tensor *ids);
/* y = x / sqrt(mean(x^2) + eps) * gain; x, y (n_tok, n) F32, gain (n) F32; y may be x.
 * Source: RMSNorm (arXiv 1910.07467), eq. 4, with eps inside the root as Llama has it. */
MUST_CHECK enum status backend_rmsnorm(struct backend *be, struct tensor *y, const struct tensor *x,
                                       const struct tensor *gain, float eps);
/* y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * gain (+ bias); x, y (n_tok, n) F32, gain
 * (n) F32, bias (n) F32 or NULL; y may be x.
 * Source: Layer Normalization (arXiv 1607.06450), eq. 4, with eps inside the root. */
MUST_CHECK enum status backend_layernorm(struct backend *be, struct tensor *y,
                                         const struct tensor *x, const struct tensor *gain,
                                         const struct tensor *bias, float eps);
/* Rotates q (n_tok, n_heads_local, head_dim) and k (n_tok, n_kv_heads_local, head_dim) in place. */
MUST_CHECK enum status backend_rope(struct backend *be, struct tensor *q, struct tensor *k,
                                    const struct token_place *place,
                                    const struct rope_table *table);
/* Writes k, v (n_tok, n_kv_heads_local, head_dim) F32 to their rows, rounded to the cache's format.
 */
MUST_CHECK enum status backend_kv_append(struct backend *be, struct kv_layer *kv,
                                         const struct tensor *k, const struct tensor *v,
                                         const struct token_place *place);
/* y (n_tok, n_heads_local, head_dim) = softmax(scale q K^T) V over the rows of place; which KV head
 * a query head reads is kv's business, causality is place's. A head's y depends on its own q and KV
 * head only, not on which other heads are here.
 * Errors: ST_SHAPE (also when the query heads do not use the first and the last KV head). */
MUST_CHECK enum status backend_attention(struct backend *be, struct tensor *y,
                                         const struct tensor *q, const struct kv_layer *kv,
                                         const struct token_place *place, float scale);
/* y = act(gate) * up, all (n_tok, n) F32; y may be gate.
 * Errors: ST_SHAPE, ST_UNSUPPORTED (another activation than SILU). */
MUST_CHECK enum status backend_glu(struct backend *be, struct tensor *y, const struct tensor *gate,
                                   const struct tensor *up, enum activation act);
/* y = act(x), both (n_tok, n) F32; y may be x.
 * Errors: ST_SHAPE, ST_UNSUPPORTED (another activation than the two GELUs). */
MUST_CHECK enum status backend_activate(struct backend *be, struct tensor *y,
                                        const struct tensor *x, enum activation act);
/* out (n_tok, n_cuts, 2) F32: the sum and the sum of squares of each part of the rows of x (n_tok,
 * n) F32; part c is columns cut[c]..cut[c + 1] (n_cuts = 1 and cut NULL: the whole row). A part's
 * sums depend on its own numbers only, not on where it lies in the row.
 * Errors: ST_SHAPE. */
MUST_CHECK enum status backend_moments(struct backend *be, struct tensor *out,
                                       const struct tensor *x, const int32_t *cut_host,
                                       int32_t n_cuts);
/* Statistics of logits (n_tok, n_vocab_local) F32 whose first column is the global id first_id, in
 * n_cuts parts: part c is columns cut[c]..cut[c + 1] (n_cuts = 1 and cut NULL: one part).
 * out (n_tok, n_cuts) and want (n_tok) are host memory. Synchronises. */
MUST_CHECK enum status backend_logit_stats(struct backend *be, struct logit_stats *out_host,
                                           const struct tensor *logits, int32_t first_id,
                                           const int32_t *cut_host, int32_t n_cuts,
                                           const struct logit_want *want_host);
/* The k largest of each row of logits (n_tok, n_vocab_local) F32 with their global ids, largest
 * first; among equal logits the lower id first. out (n_tok, k) is host memory; where a row has
 * fewer than k logits the rest is {-inf, -1}. Logits that are not numbers may come out anywhere.
 * Synchronises. Errors: ST_SHAPE. */
MUST_CHECK enum status backend_top_k(struct backend *be, struct logit_candidate *out_host,
                                     const struct tensor *logits, int32_t first_id, int32_t k);

#endif
