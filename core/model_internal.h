/* What the readers of config.json share: the table of families and a way to refuse. Private to
 * model*.c.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_MODEL_INTERNAL_H
#define PMPD_CORE_MODEL_INTERNAL_H

#include <jansson.h>

#include "core/model.h"

enum { FAMILY_ARCHITECTURES = 2, FAMILY_SWITCHES = 2, FAMILY_ACTS = 3 };
/* Far above any model: see model.c. */
enum { MODEL_CONTEXT_MAX = 1 << 26, MODEL_SHOWN_BYTES = 96 };

/* What makes one family another model than the others: names, and what its config class assumes
 * where config.json is silent. */
struct family {
    const char *name; /* model_type */
    const char *architectures[FAMILY_ARCHITECTURES];
    const char *role[M_N_ROLES];     /* within a layer; NULL: the family has no such matrix */
    const char *norm[MODEL_N_NORMS]; /* the first two within a layer */
    enum norm_kind norm_kind;
    const char *eps_key;
    double eps;
    struct {
        const char *name; /* of hidden_act; the first is the default */
        enum activation act;
    } acts[FAMILY_ACTS];
    bool parallel, head_bias; /* always */
    uint32_t biased;          /* always: bit r for role r */
    struct {                  /* true or false in config.json, and what true adds */
        const char *key;
        uint32_t biased;
        bool parallel;
    } switches[FAMILY_SWITCHES];
    int32_t context;
    int32_t n_kv_heads; /* without the key num_key_value_heads; 0: as many as query heads */
    int32_t window;     /* without the key sliding_window; 0: none */
    bool use_window;    /* without the key use_sliding_window */
    bool partial;       /* partial_rotary_factor may be below 1 */
    double rotary;      /* without it */
};

const struct family *model_family_get(enum model_family family);
/* NULL: none of this name. */
const struct family *model_family_find(enum model_family *out, const char *name);
/* "llama, mistral or phi" into text. */
const char *model_family_list(char *text, size_t text_bytes);

/* "WHERE: KEY is VALUE, which is not supported; expected EXPECTED" */
MUST_CHECK enum status model_refuse(const char *where, const char *key, const json_t *value,
                                    const char *expected);

/* Fills rope_theta, rot_dim and rope_scaling; head_dim is known. */
MUST_CHECK enum status model_read_rope(struct model_config *out, const struct family *family,
                                       const json_t *json, const char *where);

#endif
