/* What a model is: config.json of a Hugging Face folder (plain or nested), checked; and the names
 * that its tensors go by. A config that is not understood is refused by name, never run wrongly.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_MODEL_H
#define PMPD_CORE_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/bitplane.h"
#include "core/checkpoint.h"
#include "core/rope.h"
#include "core/status.h"

/* The linear layers of a block, in the order in which levels list them. */
enum matrix_role { M_Q = 0, M_K, M_V, M_O, M_GATE, M_UP, M_DOWN, M_N_ROLES };

enum model_family {
    FAMILY_LLAMA,
    FAMILY_MISTRAL,
    FAMILY_QWEN2,
    FAMILY_STABLELM,
    FAMILY_PHI,
    FAMILY_N
};

enum norm_kind { NORM_RMS, NORM_LAYER }; /* NORM_LAYER has a bias */
enum model_norm { NORM_ATTENTION, NORM_MLP, NORM_FINAL, MODEL_N_NORMS };

enum { MODEL_MAX_EOS = 8, MODEL_NAME_BYTES = 128 };

struct model_config {
    enum model_family family;
    int32_t hidden, n_layers, n_heads, n_kv_heads, head_dim, ffn, vocab;
    int32_t context; /* tokens: max_position_embeddings */
    int32_t rot_dim; /* rotary dimensions of a head */
    double rope_theta;
    struct rope_scaling rope_scaling;
    enum norm_kind norm;
    float norm_eps;
    enum activation act; /* of gate where the family has one, else of up */
    bool parallel;       /* one norm feeds attention and MLP, and both are added to its input */
    uint32_t biased;     /* bit r: the linears of role r have a bias */
    bool head_bias;
    bool tied_head;             /* lm_head is embed_tokens */
    int32_t bos;                /* -1: none */
    int32_t eos[MODEL_MAX_EOS]; /* from generation_config.json where it is there, else config */
    int32_t n_eos;
    /* nested models only: */
    bool nested;
    int32_t group_cols, n_planes;
    bool nested_head;              /* lm_head is nested (its own n_planes = n_planes) */
    char method[MODEL_NAME_BYTES]; /* quantization_config.method */
};

/* Reads folder/config.json (and generation_config.json for eos). Errors: ST_IO; ST_FORMAT (wrong
 * type, range, heads that do not divide); ST_UNSUPPORTED, naming key and value: another model_type,
 * rope type or hidden_act, a part that the family is not known to have (a bias, qk_layernorm,
 * experts), a sliding window shorter than the context, another quantization_config, or a newer
 * format_version. */
MUST_CHECK enum status model_config_read(struct model_config *out, const char *folder);
/* Kinds of each precision of one nested linear, from quantization_config of folder/config.json;
 * name without ".weight". Kept in a table read once: */
struct nested_index;
MUST_CHECK enum status nested_index_read(struct nested_index **out, const char *folder);
void nested_index_destroy(struct nested_index **index);
/* Errors: ST_FORMAT when the linear is not listed. n_cols: the width before padding. */
MUST_CHECK enum status nested_index_get(const struct nested_index *index, const char *name,
                                        int32_t *n_cols, enum level_kind kinds[BITS_ALL]);

/* Precisions b that every nested linear of the layers holds, as bit b of the mask. Errors:
 * ST_FORMAT: a linear is not listed, or no precision is left. */
MUST_CHECK enum status nested_index_common_bits(const struct nested_index *index,
                                                const struct model_config *config, uint32_t *mask);

/* "llama": config.json's model_type. */
const char *model_family_name(enum model_family family);
/* Whether a layer has this linear: without a gate, y = down(act(up(x))). */
bool model_has_role(const struct model_config *c, enum matrix_role role);
bool model_has_norm(const struct model_config *c, enum model_norm norm);
/* Global shape of a linear: rows are outputs; (0, 0) when the family has none. */
void model_matrix_shape(const struct model_config *c, enum matrix_role role, int32_t *n_rows,
                        int32_t *n_cols);
/* "q_proj"; NULL when the family has no such linear. */
const char *model_role_name(enum model_family family, enum matrix_role role);
/* "model.layers.3.self_attn.q_proj" into text (MODEL_NAME_BYTES). */
void model_matrix_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                       enum matrix_role role);
/* With ".weight" (the gain) or ".bias"; the layer of NORM_FINAL is not looked at. */
void model_norm_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                     enum model_norm norm);
void model_norm_bias_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                          enum model_norm norm);
/* Errors: ST_UNSUPPORTED: the checkpoint holds the bias of a linear or norm that config does not
 * tell of, so that the model would run without it. */
MUST_CHECK enum status model_check_biases(const struct model_config *c,
                                          const struct checkpoint *ckpt);
#define MODEL_EMBED_NAME "model.embed_tokens.weight"
#define MODEL_HEAD_NAME "lm_head"

/* The format of quantization_config in a nested folder's config.json:
 *   {"quant_method": "pmpd", "format_version": 1, "method": "joint-data-free", "group_size": 64,
 *    "n_planes": 4, "linears": {NAME: {"n_cols": 256, "levels": {"2": "tied", "3": "tied",
 *    "4": "tied"}}, ...}}
 * A nested head appears in "linears" as "lm_head". */
enum { NESTED_FORMAT_VERSION = 1 };

#endif
