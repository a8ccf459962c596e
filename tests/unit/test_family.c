/* The families: what each assumes where config.json is silent, what its switches add, what is
 * refused by name; the stretched rotations against values worked out from their formulas.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/model.h"
#include "core/rope.h"
#include "tests/check.h"
#include "tests/gen.h"

static char folder[GEN_PATH_BYTES];

#define SIZES                                                               \
    "\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":4," \
    "\"intermediate_size\":96,\"vocab_size\":100"
#define MODEL(type, more) "{\"model_type\":\"" type "\"," SIZES more "}"
#define KV2 ",\"num_key_value_heads\":2"

static enum status read_text(const char *text, struct model_config *c)
{
    gen_put_text(folder, "config.json", text);
    return model_config_read(c, folder);
}

enum { QKV = 1 << M_Q | 1 << M_K | 1 << M_V };

/* The values of the config classes of Hugging Face transformers. */
static void test_defaults(void)
{
    struct model_config c;
    CHECK_OK(read_text(MODEL("mistral", KV2 ",\"sliding_window\":null"), &c));
    CHECK(c.family == FAMILY_MISTRAL && c.context == 131072 && c.norm == NORM_RMS);
    CHECK(c.norm_eps == 1e-6f && c.biased == 0 && c.rot_dim == 16 && !c.parallel);
    CHECK_OK(
        read_text(MODEL("mistral", ",\"num_key_value_heads\":null,\"sliding_window\":null"), &c));
    CHECK(c.n_kv_heads == 4); /* null is as many as query heads; silence is 8 */
    CHECK_OK(read_text(MODEL("qwen2", KV2), &c));
    CHECK(c.family == FAMILY_QWEN2 && c.context == 32768 && c.biased == QKV && !c.head_bias);
    CHECK_OK(read_text(MODEL("stablelm", KV2), &c));
    CHECK(c.family == FAMILY_STABLELM && c.context == 4096 && c.norm == NORM_LAYER);
    CHECK(c.norm_eps == 1e-5f && c.biased == 0 && c.rot_dim == 4 && c.act == ACT_SILU);
    CHECK(!c.parallel && model_has_role(&c, M_GATE) && model_has_norm(&c, NORM_MLP));
    CHECK_OK(read_text(MODEL("phi", ""), &c));
    CHECK(c.family == FAMILY_PHI && c.context == 2048 && c.norm == NORM_LAYER && c.parallel);
    CHECK(c.n_kv_heads == 4 && c.rot_dim == 8 && c.act == ACT_GELU_TANH && c.head_bias);
    CHECK(c.biased == (QKV | 1 << M_O | 1 << M_UP | 1 << M_DOWN));
    CHECK(!model_has_role(&c, M_GATE) && !model_has_norm(&c, NORM_MLP));
    CHECK(strcmp(model_family_name(c.family), "phi") == 0);
}

static void test_switches(void)
{
    struct model_config c;
    CHECK_OK(read_text(MODEL("llama", ",\"attention_bias\":true"), &c));
    CHECK(c.biased == (QKV | 1 << M_O));
    CHECK_OK(read_text(MODEL("llama", ",\"mlp_bias\":true"), &c));
    CHECK(c.biased == (1 << M_GATE | 1 << M_UP | 1 << M_DOWN));
    CHECK_OK(read_text(MODEL("stablelm", KV2 ",\"use_qkv_bias\":true"), &c));
    CHECK(c.biased == QKV && !c.parallel);
    CHECK_OK(read_text(MODEL("stablelm", KV2 ",\"use_parallel_residual\":true"), &c));
    CHECK(c.biased == 0 && c.parallel && !model_has_norm(&c, NORM_MLP));
    CHECK_OK(read_text(MODEL("phi", ",\"hidden_act\":\"gelu\",\"partial_rotary_factor\":0.4"), &c));
    CHECK(c.act == ACT_GELU_ERF && c.rot_dim == 6); /* 6.4 rounded down */
    CHECK_OK(read_text(MODEL("phi", ",\"rope_parameters\":{\"partial_rotary_factor\":1.0}"), &c));
    CHECK(c.rot_dim == 16);
    /* a window that cuts nothing off */
    CHECK_OK(read_text(MODEL("llama", ",\"sliding_window\":2048"), &c));
    CHECK_OK(read_text(MODEL("mistral", KV2 ",\"max_position_embeddings\":4096"), &c));
    CHECK_OK(read_text(MODEL("qwen2", KV2 ",\"sliding_window\":64"), &c));
}

static void test_names(void)
{
    struct model_config c;
    char text[MODEL_NAME_BYTES];
    int32_t n_rows, n_cols;
    CHECK_OK(read_text(MODEL("phi", ""), &c));
    static const char *const expected[M_N_ROLES] = {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", NULL,
        "mlp.fc1",          "mlp.fc2"};
    for (int r = 0; r < M_N_ROLES; r++) {
        const char *name = model_role_name(FAMILY_PHI, (enum matrix_role)r);
        CHECK(!name == !expected[r]);
        if (name && expected[r]) {
            char full[MODEL_NAME_BYTES];
            CHECK(strcmp(name, strchr(expected[r], '.') + 1) == 0);
            snprintf(full, sizeof full, "model.layers.11.%s", expected[r]);
            model_matrix_name(text, &c, 11, (enum matrix_role)r);
            CHECK(strcmp(text, full) == 0);
        }
    }
    model_matrix_shape(&c, M_GATE, &n_rows, &n_cols);
    CHECK(n_rows == 0 && n_cols == 0);
    model_matrix_shape(&c, M_DOWN, &n_rows, &n_cols);
    CHECK(n_rows == 64 && n_cols == 96);
    model_norm_name(text, &c, 3, NORM_ATTENTION);
    CHECK(strcmp(text, "model.layers.3.input_layernorm.weight") == 0);
    model_norm_name(text, &c, 3, NORM_FINAL);
    CHECK(strcmp(text, "model.final_layernorm.weight") == 0);
    c.family = FAMILY_STABLELM;
    c.parallel = false;
    model_norm_bias_name(text, &c, 3, NORM_MLP);
    CHECK(strcmp(text, "model.layers.3.post_attention_layernorm.bias") == 0);
    model_norm_bias_name(text, &c, 3, NORM_FINAL);
    CHECK(strcmp(text, "model.norm.bias") == 0);
}

/* ---- what is refused ---- */

#define SCALED(body) MODEL("llama", ",\"rope_scaling\":{" body "}")
#define LLAMA3(low, high, original)                                         \
    SCALED("\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":" low \
           ",\"high_freq_factor\":" high ",\"original_max_position_embeddings\":" original)

static void test_refused(void)
{
    static const struct {
        const char *text;
        enum status st;
        const char *part;
    } bad[] = {
        {MODEL("mixtral", ""), ST_UNSUPPORTED,
         "model_type is \"mixtral\", which is not supported; expected \"llama\", \"mistral\", "
         "\"qwen2\", \"stablelm\" or \"phi\""},
        {MODEL("stablelm_epoch", ""), ST_UNSUPPORTED, "model_type is \"stablelm_epoch\""},
        {MODEL("phi", ",\"architectures\":[\"LlamaForCausalLM\"]"), ST_UNSUPPORTED,
         "architectures is \"LlamaForCausalLM\", which is not supported; expected "
         "\"PhiForCausalLM\""},
        {MODEL("stablelm", KV2 ",\"qk_layernorm\":true"), ST_UNSUPPORTED, "qk_layernorm is true"},
        {MODEL("phi", ",\"qk_layernorm\":true"), ST_UNSUPPORTED, "qk_layernorm is true"},
        {MODEL("mistral", KV2 ",\"attention_bias\":true"), ST_UNSUPPORTED, "attention_bias is"},
        {MODEL("llama", ",\"use_parallel_residual\":true"), ST_UNSUPPORTED, "use_parallel_resid"},
        {MODEL("llama", ",\"use_qkv_bias\":true"), ST_UNSUPPORTED, "use_qkv_bias is true"},
        {MODEL("llama", ",\"use_qkv_bias\":\"yes\""), ST_FORMAT, "\"use_qkv_bias\" is \"yes\""},
        {MODEL("phi", ",\"hidden_act\":\"relu\""), ST_UNSUPPORTED, "hidden_act is \"relu\""},
        {MODEL("phi", ",\"hidden_act\":\"silu\""), ST_UNSUPPORTED, "hidden_act is \"silu\""},
        {MODEL("qwen2", KV2 ",\"hidden_act\":\"gelu\""), ST_UNSUPPORTED, "hidden_act is \"gelu\""},
        {MODEL("mistral", ""), ST_FORMAT, "4 attention heads are not a multiple of 8 key-value"},
        {MODEL("mistral", KV2), ST_UNSUPPORTED, "sliding_window is 4096 (the family's default)"},
        {MODEL("mistral", KV2 ",\"sliding_window\":512,\"max_position_embeddings\":1024"),
         ST_UNSUPPORTED, "sliding_window is 512, which is not supported below the context of 1024"},
        {MODEL("llama", ",\"sliding_window\":2047"), ST_UNSUPPORTED,
         "for texts of at most 2047 tokens set max_position_embeddings to 2047"},
        {MODEL("qwen2", KV2 ",\"use_sliding_window\":true"), ST_UNSUPPORTED,
         "sliding_window is 4096"},
        {MODEL("llama", ",\"sliding_window\":-1"), ST_FORMAT, "\"sliding_window\" is -1"},
        {MODEL("qwen2", KV2 ",\"num_experts\":60"), ST_UNSUPPORTED, "num_experts is 60"},
        {MODEL("qwen2", KV2 ",\"partial_rotary_factor\":0.5"), ST_UNSUPPORTED,
         "partial_rotary_factor is 0.5"},
        {MODEL("phi", ",\"partial_rotary_factor\":0.2"), ST_FORMAT,
         "partial_rotary_factor 0.2 of a head's 16 dimensions is 3, expected an even number"},
        {MODEL("phi", ",\"partial_rotary_factor\":0"), ST_FORMAT, "partial_rotary_factor 0 of"},
        {MODEL("phi", ",\"partial_rotary_factor\":1.5"), ST_FORMAT, "partial_rotary_factor 1.5 of"},
        {MODEL("phi", ",\"partial_rotary_factor\":0.5,\"rope_parameters\":{"
                      "\"partial_rotary_factor\":0.25}"),
         ST_FORMAT, "rope_parameters.partial_rotary_factor is 0.25, but another"},
        {MODEL("phi", ",\"rms_norm_eps\":1e-5,\"layer_norm_eps\":2"), ST_FORMAT,
         "layer_norm_eps is 2"},
        {SCALED("\"type\":\"dynamic\",\"factor\":2"), ST_UNSUPPORTED, "rope_scaling.type is \"dyn"},
        {SCALED("\"rope_type\":\"longrope\""), ST_UNSUPPORTED, "rope_type is \"longrope\""},
        {SCALED("\"type\":\"linear\""), ST_FORMAT, "rope_scaling.factor is nothing"},
        {SCALED("\"type\":\"linear\",\"factor\":\"2\""), ST_FORMAT, "factor is \"2\""},
        {SCALED("\"type\":\"linear\",\"factor\":0.5"), ST_FORMAT, "needs a number of at least 1"},
        {SCALED("\"type\":\"linear\",\"rope_type\":\"llama3\",\"factor\":2"), ST_FORMAT,
         "rope_scaling.type is \"linear\", but rope_type is \"llama3\""},
        {MODEL("llama", ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2},"
                        "\"rope_parameters\":{\"rope_type\":\"linear\",\"factor\":2}"),
         ST_FORMAT, "both rope_parameters and rope_scaling"},
        {SCALED("\"rope_type\":\"llama3\",\"factor\":8"), ST_FORMAT, "low_freq_factor is nothing"},
        {LLAMA3("4", "4", "8192"), ST_FORMAT, "high_freq_factor is 4, expected more than"},
        {LLAMA3("0", "4", "8192"), ST_FORMAT, "low_freq_factor is 0"},
        {LLAMA3("1", "4", "0.5"), ST_FORMAT, "original_max_position_embeddings is 0.5"},
        {LLAMA3("1", "4", "1.5"), ST_FORMAT, "is 1.5, expected an integer"},
        {LLAMA3("1", "4", "1e20"), ST_FORMAT, "is 1e+20, expected an integer"},
    };
    struct model_config c;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        enum status st = read_text(bad[i].text, &c);
        const char *message = status_message();
        if (!CHECK(st == bad[i].st && strstr(message, bad[i].part) &&
                   strstr(message, "/config.json") && !strchr(message, '\n'))) {
            fprintf(stderr, "    %s\n    gives %s: %s\n", bad[i].text, status_name(st), message);
        }
    }
}

/* ---- rotation ---- */

static void test_scaling_read(void)
{
    struct model_config c;
    CHECK_OK(read_text(SCALED("\"type\":\"linear\",\"factor\":2.5"), &c));
    CHECK(c.rope_scaling.kind == ROPE_LINEAR && c.rope_scaling.factor == 2.5);
    CHECK_OK(read_text(LLAMA3("1", "4.0", "8192"), &c));
    CHECK(c.rope_scaling.kind == ROPE_LLAMA3 && c.rope_scaling.factor == 8);
    CHECK(c.rope_scaling.low_freq_factor == 1 && c.rope_scaling.high_freq_factor == 4);
    CHECK(c.rope_scaling.original_context == 8192 && c.context == 2048);
    CHECK_OK(read_text(SCALED("\"rope_type\":\"default\",\"type\":\"default\""), &c));
    CHECK(c.rope_scaling.kind == ROPE_DEFAULT && c.rope_scaling.factor == 0);
}

static void test_frequencies(void)
{
    double f[4];
    const struct rope_scaling plain = {0}, linear = {.kind = ROPE_LINEAR, .factor = 4};
    rope_frequencies(f, 10000, 8, &plain); /* 10000^(-i/4) = 10^-i */
    CHECK_NEAR(f[0], 1, 0);
    CHECK_NEAR(f[1], 0.1, 1e-15);
    CHECK_NEAR(f[3], 0.001, 1e-17);
    rope_frequencies(f, 10000, 8, &linear);
    CHECK_NEAR(f[0], 0.25, 0);
    CHECK_NEAR(f[2], 0.0025, 1e-17);
    /* With an original context of 80 pi a frequency f turns 40 f times in it: 40, 4, 0.4, 0.04. Of
     * these 40 is above high = 5, 4 lies between (weight (4 - 1) / (5 - 1)), and 0.4 and 0.04 are
     * below low = 1. 251 is 80 pi cut to an integer: turns of 251 / (2 pi) f. */
    const struct rope_scaling llama3 = {.kind = ROPE_LLAMA3,
                                        .factor = 8,
                                        .low_freq_factor = 1,
                                        .high_freq_factor = 5,
                                        .original_context = 251};
    rope_frequencies(f, 10000, 8, &llama3);
    CHECK_NEAR(f[0], 1, 0);
    double keep = (251 / 6.283185307179586 * 0.1 - 1) / 4;
    CHECK_NEAR(keep, 0.75, 0.002);
    CHECK_NEAR(f[1], 0.1 * (keep + (1 - keep) / 8), 1e-15);
    CHECK_NEAR(f[2], 0.01 / 8, 1e-17);
    CHECK_NEAR(f[3], 0.001 / 8, 1e-17);
    for (int kind = 0; kind < ROPE_N; kind++) {
        CHECK(rope_kind_parse(rope_kind_name((enum rope_kind)kind)) == (enum rope_kind)kind);
    }
    CHECK(rope_kind_parse("yarn") == ROPE_N);
}

int main(void)
{
    gen_folder(folder);
    test_defaults();
    test_switches();
    test_names();
    test_refused();
    test_scaling_read();
    test_frequencies();
    gen_remove(folder);
    return check_report();
}
