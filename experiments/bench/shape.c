/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/bench/shape.h"

#include <string.h>
#include <sys/stat.h>

struct named {
    const char *name;
    struct model_config config;
};

#define QKVO (1u << M_Q | 1u << M_K | 1u << M_V | 1u << M_O)

/* From the models' config.json: mtgv/MobileLLaMA-1.4B-Base, lmsys/vicuna-7b-v1.5,
 * microsoft/phi-1_5, stabilityai/stablelm-3b-4e1t, meta-llama/Llama-3.1-8B; "tiny" is a toy for
 * tests. */
static const struct named shapes[] = {
    {"mobilellama-1.4b",
     {.family = FAMILY_LLAMA,
      .hidden = 2048,
      .n_layers = 24,
      .n_heads = 16,
      .n_kv_heads = 16,
      .head_dim = 128,
      .ffn = 5632,
      .vocab = 32000,
      .context = 2048,
      .rot_dim = 128,
      .rope_theta = 1e4,
      .norm = NORM_RMS,
      .norm_eps = 1e-6f,
      .act = ACT_SILU}},
    {"vicuna-7b",
     {.family = FAMILY_LLAMA,
      .hidden = 4096,
      .n_layers = 32,
      .n_heads = 32,
      .n_kv_heads = 32,
      .head_dim = 128,
      .ffn = 11008,
      .vocab = 32000,
      .context = 4096,
      .rot_dim = 128,
      .rope_theta = 1e4,
      .norm = NORM_RMS,
      .norm_eps = 1e-5f,
      .act = ACT_SILU}},
    {"phi-1.5",
     {.family = FAMILY_PHI,
      .hidden = 2048,
      .n_layers = 24,
      .n_heads = 32,
      .n_kv_heads = 32,
      .head_dim = 64,
      .ffn = 8192,
      .vocab = 51200,
      .context = 2048,
      .rot_dim = 32,
      .rope_theta = 1e4,
      .norm = NORM_LAYER,
      .norm_eps = 1e-5f,
      .act = ACT_GELU_TANH,
      .parallel = true,
      .biased = QKVO | 1u << M_UP | 1u << M_DOWN,
      .head_bias = true}},
    {"stablelm-3b",
     {.family = FAMILY_STABLELM,
      .hidden = 2560,
      .n_layers = 32,
      .n_heads = 32,
      .n_kv_heads = 32,
      .head_dim = 80,
      .ffn = 6912,
      .vocab = 50432,
      .context = 4096,
      .rot_dim = 20,
      .rope_theta = 1e4,
      .norm = NORM_LAYER,
      .norm_eps = 1e-5f,
      .act = ACT_SILU}},
    {"llama-3.1-8b",
     {.family = FAMILY_LLAMA,
      .hidden = 4096,
      .n_layers = 32,
      .n_heads = 32,
      .n_kv_heads = 8,
      .head_dim = 128,
      .ffn = 14336,
      .vocab = 128256,
      .context = 131072,
      .rot_dim = 128,
      .rope_theta = 5e5,
      .norm = NORM_RMS,
      .norm_eps = 1e-5f,
      .act = ACT_SILU,
      .rope_scaling = {.kind = ROPE_LLAMA3,
                       .factor = 8,
                       .low_freq_factor = 1,
                       .high_freq_factor = 4,
                       .original_context = 8192}}},
    {"tiny",
     {.family = FAMILY_LLAMA,
      .hidden = 256,
      .n_layers = 2,
      .n_heads = 4,
      .n_kv_heads = 2,
      .head_dim = 64,
      .ffn = 640,
      .vocab = 512,
      .context = 256,
      .rot_dim = 64,
      .rope_theta = 1e4,
      .norm = NORM_RMS,
      .norm_eps = 1e-5f,
      .act = ACT_SILU}},
};

enum status shape_get(struct model_config *out, const char *name)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        if (strcmp(shapes[i].name, name) == 0) {
            *out = shapes[i].config;
            out->bos = -1;
            return ST_OK;
        }
    }
    struct stat s;
    if (stat(name, &s) != 0) {
        FAIL(ST_USER,
             "--shape %s: neither a known shape nor a folder; expected one of " SHAPE_NAMES
             ", or a folder with a config.json",
             name);
    }
    return model_config_read(out, name);
}

static int add(struct shape_matrix *out, int n, int32_t n_rows, int32_t n_cols)
{
    for (int i = 0; i < n; i++) {
        if (out[i].n_rows == n_rows && out[i].n_cols == n_cols) {
            return n;
        }
    }
    INVARIANT(n < SHAPE_MATRICES_MAX);
    out[n] = (struct shape_matrix){n_rows, n_cols};
    return n + 1;
}

int shape_matrices(struct shape_matrix out[SHAPE_MATRICES_MAX], const struct model_config *c)
{
    int n = 0;
    for (int r = 0; r < M_N_ROLES; r++) {
        int32_t n_rows, n_cols;
        if (model_has_role(c, (enum matrix_role)r)) {
            model_matrix_shape(c, (enum matrix_role)r, &n_rows, &n_cols);
            n = add(out, n, n_rows, n_cols);
        }
    }
    return add(out, n, c->vocab, c->hidden);
}
