/* One rank's share of a model: which rows and columns of every matrix it holds (plain data, filled
 * by dist/shard.h), and the weights loaded into a backend's memory.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_WEIGHTS_H
#define PMPD_CORE_WEIGHTS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/checkpoint.h"
#include "core/level.h"
#include "core/model.h"
#include "core/status.h"

enum { SHARD_MAX_SEGMENTS = 64 };

/* Part i of n things cut into n_parts nearly equal runs: [split_at(n, n_parts, i),
 * split_at(n, n_parts, i + 1)). */
static inline int32_t split_at(int32_t n, int32_t n_parts, int32_t i)
{
    return (int32_t)((int64_t)n * i / n_parts);
}

/* The input columns of a row-parallel product (o, down), or the vocabulary, cut into `total`
 * canonical segments; this rank owns segments [begin, end) of them. Their partial results are
 * gathered from all ranks and added (merged) in segment order. */
struct segment_share {
    int32_t total, begin, end;
    int32_t cut[SHARD_MAX_SEGMENTS + 1]; /* (end - begin + 1) relative to the rank's first column */
};

struct model_shard {
    int32_t rank, size;           /* within the replica */
    int32_t head_begin, head_end; /* query heads: rows of q, columns of o */
    int32_t kv_begin, kv_end;     /* KV heads that they use: rows of k and v */
    int32_t n_kv_held;            /* of all ranks together: a KV head that two hold counts twice */
    int32_t ffn_begin, ffn_end;   /* rows of gate and up, columns of down */
    int32_t vocab_begin, vocab_end; /* rows of the head */
    struct segment_share attn, mlp, vocab;
};

struct linear {
    bool is_nested;
    struct nested_matrix nested; /* owned (backend) */
    struct tensor dense;         /* (n_rows, n_cols) in backend memory, when not nested */
    /* F32; no data: none. Of a product by rows: this rank's rows. Of o and down, whose sums cross
     * the ranks: all rows, to be added once, after the sum. */
    struct tensor bias;
    /* of the whole matrix, for the accounting of bytes: */
    int32_t n_rows, n_cols, n_cols_padded;
};

struct norm_weights {
    struct tensor gain, bias; /* (hidden) F32; no data in bias: none */
};

struct layer_weights {
    struct norm_weights attn_norm, mlp_norm; /* no mlp_norm in parallel blocks */
    struct linear matrix[M_N_ROLES];         /* zeroed where the family has none */
};

struct weights {
    struct backend *be; /* borrowed, must outlive this */
    struct model_config config;
    struct model_shard shard;
    struct tensor embed; /* (vocab, hidden) F32, F16 or BF16; whole on every rank */
    struct norm_weights final_norm;
    struct linear head;           /* this rank's vocabulary rows; may be a view of embed */
    struct layer_weights *layers; /* (n_layers) owned */
    void **blocks;                /* owned backend blocks */
    int32_t n_blocks, capacity_blocks;
};

/* Everything a folder says without reading the weights. */
struct model_source {
    struct model_config config;
    struct checkpoint *ckpt;    /* owned */
    struct nested_index *index; /* owned; NULL for a dense model */
    uint32_t held, head_held;   /* as in struct level_table */
    int dense_bits, head_dense_bits;
};
/* Errors: those of model_config_read, checkpoint_open, nested_index_read. */
MUST_CHECK enum status model_source_open(struct model_source *out, const char *folder);
void model_source_close(struct model_source *src);

/* Loads the shard: nested matrices with n_planes planes (the most that any level of the run
 * needs; 0: all), the head with all of its planes, everything else whole. Progress is shown.
 * Errors: those of the checkpoint and the backend. */
MUST_CHECK enum status weights_load(struct weights *out, struct backend *be,
                                    const struct model_source *src, const struct model_shard *shard,
                                    int n_planes);
void weights_free(struct weights *w);

/* For those who fill a struct weights by other means: */
/* A zeroed backend block that weights_free gives back. */
MUST_CHECK enum status weights_new_block(struct weights *w, void **out, size_t bytes);
/* The rows and columns of a role that a shard holds. */
struct matrix_range weights_role_range(const struct model_config *c, const struct model_shard *s,
                                       enum matrix_role role);
#endif
