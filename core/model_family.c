/* The families: what tells their models apart, and the names and shapes of their tensors.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <string.h>

#include "core/model_internal.h"

#define ROLE(role) (1u << (role))

enum {
    BIAS_QKV = ROLE(M_Q) | ROLE(M_K) | ROLE(M_V),
    BIAS_ATTENTION = BIAS_QKV | ROLE(M_O),
    BIAS_MLP = ROLE(M_GATE) | ROLE(M_UP) | ROLE(M_DOWN)
};

#define LLAMA_ROLES                                                                         \
    {                                                                                       \
        [M_Q] = "self_attn.q_proj", [M_K] = "self_attn.k_proj", [M_V] = "self_attn.v_proj", \
        [M_O] = "self_attn.o_proj", [M_GATE] = "mlp.gate_proj", [M_UP] = "mlp.up_proj",     \
        [M_DOWN] = "mlp.down_proj",                                                         \
    }
#define LLAMA_NORMS                                                                    \
    {                                                                                  \
        [NORM_ATTENTION] = "input_layernorm", [NORM_MLP] = "post_attention_layernorm", \
        [NORM_FINAL] = "model.norm",                                                   \
    }

static const struct family families[FAMILY_N] = {
    [FAMILY_LLAMA] =
        {
            .name = "llama",
            .architectures = {"LlamaForCausalLM", "LLaMAForCausalLM"},
            .role = LLAMA_ROLES,
            .norm = LLAMA_NORMS,
            .eps_key = "rms_norm_eps",
            .eps = 1e-6,
            .acts = {{"silu", ACT_SILU}},
            .switches = {{.key = "attention_bias", .biased = BIAS_ATTENTION},
                         {.key = "mlp_bias", .biased = BIAS_MLP}},
            .context = 2048,
            .use_window = true,
            .rotary = 1,
        },
    [FAMILY_MISTRAL] =
        {
            .name = "mistral",
            .architectures = {"MistralForCausalLM"},
            .role = LLAMA_ROLES,
            .norm = LLAMA_NORMS,
            .eps_key = "rms_norm_eps",
            .eps = 1e-6,
            .acts = {{"silu", ACT_SILU}},
            .context = 131072,
            .n_kv_heads = 8,
            .window = 4096,
            .use_window = true,
            .rotary = 1,
        },
    [FAMILY_QWEN2] =
        {
            .name = "qwen2",
            .architectures = {"Qwen2ForCausalLM"},
            .role = LLAMA_ROLES,
            .norm = LLAMA_NORMS,
            .eps_key = "rms_norm_eps",
            .eps = 1e-6,
            .acts = {{"silu", ACT_SILU}},
            .biased = BIAS_QKV,
            .context = 32768,
            .n_kv_heads = 32,
            .window = 4096,
            .rotary = 1,
        },
    [FAMILY_STABLELM] =
        {
            .name = "stablelm",
            .architectures = {"StableLmForCausalLM"},
            .role = LLAMA_ROLES,
            .norm = LLAMA_NORMS,
            .norm_kind = NORM_LAYER,
            .eps_key = "layer_norm_eps",
            .eps = 1e-5,
            .acts = {{"silu", ACT_SILU}},
            .switches = {{.key = "use_qkv_bias", .biased = BIAS_QKV},
                         {.key = "use_parallel_residual", .parallel = true}},
            .context = 4096,
            .n_kv_heads = 32,
            .use_window = true,
            .partial = true,
            .rotary = 0.25,
        },
    [FAMILY_PHI] =
        {
            .name = "phi",
            .architectures = {"PhiForCausalLM"},
            .role = {[M_Q] = "self_attn.q_proj",
                     [M_K] = "self_attn.k_proj",
                     [M_V] = "self_attn.v_proj",
                     [M_O] = "self_attn.dense",
                     [M_UP] = "mlp.fc1",
                     [M_DOWN] = "mlp.fc2"},
            .norm = {[NORM_ATTENTION] = "input_layernorm", [NORM_FINAL] = "model.final_layernorm"},
            .norm_kind = NORM_LAYER,
            .eps_key = "layer_norm_eps",
            .eps = 1e-5,
            .acts = {{"gelu_new", ACT_GELU_TANH},
                     {"gelu_pytorch_tanh", ACT_GELU_TANH},
                     {"gelu", ACT_GELU_ERF}},
            .parallel = true,
            .head_bias = true,
            .biased = BIAS_ATTENTION | ROLE(M_UP) | ROLE(M_DOWN),
            .context = 2048,
            .use_window = true,
            .partial = true,
            .rotary = 0.5,
        },
};

const struct family *model_family_get(enum model_family family)
{
    INVARIANT((unsigned)family < FAMILY_N);
    return &families[family];
}

const struct family *model_family_find(enum model_family *out, const char *name)
{
    for (int i = 0; i < FAMILY_N; i++) {
        if (strcmp(name, families[i].name) == 0) {
            *out = (enum model_family)i;
            return &families[i];
        }
    }
    return NULL;
}

const char *model_family_list(char *text, size_t text_bytes)
{
    size_t used = 0;
    for (int i = 0; i < FAMILY_N && used < text_bytes; i++) {
        const char *before = i == 0 ? "" : i == FAMILY_N - 1 ? " or " : ", ";
        int n = snprintf(text + used, text_bytes - used, "%s\"%s\"", before, families[i].name);
        used += n > 0 ? (size_t)n : 0;
    }
    return text;
}

const char *model_family_name(enum model_family family)
{
    return model_family_get(family)->name;
}

/* ---- names and shapes ---- */

bool model_has_role(const struct model_config *c, enum matrix_role role)
{
    return (unsigned)role < M_N_ROLES && model_family_get(c->family)->role[role] != NULL;
}

bool model_has_norm(const struct model_config *c, enum model_norm norm)
{
    return norm != NORM_MLP || !c->parallel;
}

void model_matrix_shape(const struct model_config *c, enum matrix_role role, int32_t *n_rows,
                        int32_t *n_cols)
{
    const int32_t q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const int32_t shapes[M_N_ROLES][2] = {
        [M_Q] = {q, c->hidden},         [M_K] = {kv, c->hidden},
        [M_V] = {kv, c->hidden},        [M_O] = {c->hidden, q},
        [M_GATE] = {c->ffn, c->hidden}, [M_UP] = {c->ffn, c->hidden},
        [M_DOWN] = {c->hidden, c->ffn},
    };
    INVARIANT((unsigned)role < M_N_ROLES);
    bool has = model_has_role(c, role);
    *n_rows = has ? shapes[role][0] : 0;
    *n_cols = has ? shapes[role][1] : 0;
}

const char *model_role_name(enum model_family family, enum matrix_role role)
{
    const char *name = (unsigned)role < M_N_ROLES ? model_family_get(family)->role[role] : NULL;
    return name ? strchr(name, '.') + 1 : NULL;
}

void model_matrix_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                       enum matrix_role role)
{
    INVARIANT(model_has_role(c, role));
    snprintf(text, MODEL_NAME_BYTES, "model.layers.%d.%s", layer,
             model_family_get(c->family)->role[role]);
}

static void norm_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                      enum model_norm norm, const char *part)
{
    const char *name = model_family_get(c->family)->norm[norm];
    INVARIANT(name && model_has_norm(c, norm));
    if (norm == NORM_FINAL) {
        snprintf(text, MODEL_NAME_BYTES, "%s.%s", name, part);
        return;
    }
    snprintf(text, MODEL_NAME_BYTES, "model.layers.%d.%s.%s", layer, name, part);
}

void model_norm_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                     enum model_norm norm)
{
    norm_name(text, c, layer, norm, "weight");
}

void model_norm_bias_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                          enum model_norm norm)
{
    norm_name(text, c, layer, norm, "bias");
}

static enum status check_no_bias(const struct model_config *c, const struct checkpoint *ckpt,
                                 const char *bias)
{
    if (checkpoint_has(ckpt, bias)) {
        FAIL(ST_UNSUPPORTED,
             "tensor \"%s\" is there, but config.json of this %s model tells of no such bias; is a "
             "key missing in config.json?",
             bias, model_family_name(c->family));
    }
    return ST_OK;
}

enum status model_check_biases(const struct model_config *c, const struct checkpoint *ckpt)
{
    char name[MODEL_NAME_BYTES], bias[MODEL_NAME_BYTES + 8];
    for (int layer = 0; layer < c->n_layers; layer++) {
        for (int role = 0; role < M_N_ROLES; role++) {
            if (model_has_role(c, (enum matrix_role)role) && !(c->biased >> role & 1)) {
                model_matrix_name(name, c, layer, (enum matrix_role)role);
                snprintf(bias, sizeof bias, "%s.bias", name);
                TRY(check_no_bias(c, ckpt, bias));
            }
        }
        for (int norm = 0; c->norm == NORM_RMS && norm < NORM_FINAL; norm++) {
            if (!model_has_norm(c, (enum model_norm)norm)) {
                continue;
            }
            model_norm_bias_name(name, c, layer, (enum model_norm)norm);
            TRY(check_no_bias(c, ckpt, name));
        }
    }
    return c->head_bias ? ST_OK : check_no_bias(c, ckpt, MODEL_HEAD_NAME ".bias");
}
