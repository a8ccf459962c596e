/* config.json: what is understood and with which defaults, what is refused by name, the table of
 * nested linears, names and shapes; mutations that must never give an impossible model.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdint.h>
#include <sys/stat.h>

#include "core/json.h"
#include "core/model.h"
#include "tests/check.h"
#include "tests/gen.h"

static char folder[GEN_PATH_BYTES];

static void put_text(const char *file, const char *text)
{
    gen_put_text(folder, file, text);
}

static void drop(const char *file)
{
    gen_drop(folder, file);
}

/* The keys that every llama config has. A test adds members behind them. */
#define SIZES                                                               \
    "\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":4," \
    "\"intermediate_size\":96,\"vocab_size\":100"
#define LLAMA(more) "{\"model_type\":\"llama\"," SIZES more "}"

static enum status read_text(const char *text, struct model_config *c)
{
    put_text("config.json", text);
    return model_config_read(c, folder);
}

/* ---- what is understood ---- */

static void test_defaults(void)
{
    struct model_config c;
    CHECK_OK(read_text(LLAMA(""), &c));
    CHECK(c.family == FAMILY_LLAMA && c.hidden == 64 && c.n_layers == 2 && c.n_heads == 4);
    CHECK(c.n_kv_heads == 4 && c.head_dim == 16 && c.rot_dim == 16 && c.ffn == 96);
    CHECK(c.vocab == 100 && c.context == 2048 && c.act == ACT_SILU && !c.tied_head);
    CHECK(c.rope_theta == 10000.0 && c.norm_eps == 1e-6f);
    CHECK(c.bos == -1 && c.n_eos == 0 && !c.nested && !c.nested_head);
}

static void test_all_keys(void)
{
    struct model_config c;
    CHECK_OK(read_text(
        LLAMA(",\"architectures\":[\"LlamaForCausalLM\"],\"num_key_value_heads\":2,\"head_dim\":32,"
              "\"max_position_embeddings\":77,\"rope_theta\":500000,\"rms_norm_eps\":1e-5,"
              "\"tie_word_embeddings\":true,\"bos_token_id\":1,\"eos_token_id\":[2,99],"
              "\"hidden_act\":\"silu\",\"attention_bias\":false,\"mlp_bias\":false,"
              "\"sliding_window\":null,\"rope_scaling\":null,\"quantization_config\":null,"
              "\"num_local_experts\":null,\"pretraining_tp\":1,\"layer_types\":[\"full_attention\","
              "\"full_attention\"]"),
        &c));
    CHECK(c.n_kv_heads == 2 && c.head_dim == 32 && c.rot_dim == 32 && c.context == 77);
    CHECK(c.rope_theta == 500000.0 && c.norm_eps == 1e-5f && c.tied_head);
    CHECK(c.bos == 1 && c.n_eos == 2 && c.eos[0] == 2 && c.eos[1] == 99);
    CHECK_OK(read_text(LLAMA(",\"sliding_window\":4096,\"use_sliding_window\":false"), &c));
    CHECK_OK(
        read_text(LLAMA(",\"num_experts\":0,\"bos_token_id\":null,\"eos_token_id\":null"), &c));
    CHECK(c.bos == -1 && c.n_eos == 0);
}

static void test_rope(void)
{
    struct model_config c;
    CHECK_OK(read_text(LLAMA(",\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":5e5}"),
                       &c));
    CHECK(c.rope_theta == 500000.0);
    CHECK_OK(read_text(LLAMA(",\"rope_parameters\":{\"rope_theta\":20000}"), &c));
    CHECK(c.rope_theta == 20000.0);
    CHECK_OK(read_text(LLAMA(",\"rope_theta\":7,\"rope_parameters\":{\"rope_type\":\"default\","
                             "\"rope_theta\":7.0,\"partial_rotary_factor\":1.0}"),
                       &c));
    CHECK(c.rope_theta == 7.0);
    CHECK_OK(read_text(LLAMA(",\"rope_theta\":3e4,\"rope_scaling\":{\"type\":\"default\"}"), &c));
    CHECK(c.rope_theta == 30000.0);
    CHECK_STATUS(read_text(LLAMA(",\"rope_theta\":7,\"rope_parameters\":{\"rope_theta\":8}"), &c),
                 ST_FORMAT, "rope_parameters.rope_theta is 8, but another rope_theta is 7");
}

static void test_eos(void)
{
    struct model_config c;
    put_text("generation_config.json", "{\"eos_token_id\":[5,6,7]}");
    CHECK_OK(read_text(LLAMA(",\"eos_token_id\":2"), &c));
    CHECK(c.n_eos == 3 && c.eos[0] == 5 && c.eos[2] == 7);
    put_text("generation_config.json", "{\"eos_token_id\":0}");
    CHECK_OK(read_text(LLAMA(",\"eos_token_id\":2"), &c));
    CHECK(c.n_eos == 1 && c.eos[0] == 0);
    put_text("generation_config.json", "{\"temperature\":0.6}");
    CHECK_OK(read_text(LLAMA(",\"eos_token_id\":2"), &c));
    CHECK(c.n_eos == 1 && c.eos[0] == 2);
    put_text("generation_config.json", "{\"eos_token_id\":100}");
    CHECK_STATUS(read_text(LLAMA(""), &c), ST_FORMAT,
                 "generation_config.json: eos_token_id is 100");
    put_text("generation_config.json", "{\"eos_token_id\":");
    CHECK_STATUS(read_text(LLAMA(""), &c), ST_FORMAT, "generation_config.json: not valid JSON");
    drop("generation_config.json");
}

/* ---- what is refused ---- */

#define QUANT(body) LLAMA(",\"quantization_config\":{" body "}")

static const struct refused {
    const char *text;
    enum status st;
    const char *part;
} refused[] = {
    {"{" SIZES "}", ST_FORMAT, "\"model_type\" is nothing, expected \"llama\""},
    {"{\"model_type\":1," SIZES "}", ST_FORMAT, "\"model_type\" is 1"},
    {"{\"model_type\":\"gpt2\"," SIZES "}", ST_UNSUPPORTED, "model_type is \"gpt2\""},
    {LLAMA(",\"architectures\":[\"LlamaForSequenceClassification\"]"), ST_UNSUPPORTED,
     "architectures is \"LlamaForSequenceClassification\""},
    {LLAMA(",\"rope_scaling\":{\"rope_type\":\"default\",\"type\":\"yarn\"}"), ST_UNSUPPORTED,
     "rope_scaling.type is \"yarn\""},
    {LLAMA(",\"rope_scaling\":{\"factor\":2.5}"), ST_UNSUPPORTED, "rope_scaling.factor is 2.5"},
    {LLAMA(",\"rope_scaling\":2"), ST_UNSUPPORTED, "rope_scaling is 2"},
    {LLAMA(",\"rope_parameters\":{\"rope_type\":\"yarn\"}"), ST_UNSUPPORTED,
     "rope_parameters.rope_type is \"yarn\""},
    {LLAMA(",\"rope_parameters\":{\"full_attention\":{\"rope_theta\":1}}"), ST_UNSUPPORTED,
     "rope_parameters.full_attention is an object"},
    {LLAMA(",\"rope_parameters\":{\"partial_rotary_factor\":0.5}"), ST_UNSUPPORTED,
     "partial_rotary_factor is 0.5"},
    {LLAMA(",\"partial_rotary_factor\":0.25"), ST_UNSUPPORTED, "partial_rotary_factor is 0.25"},
    {LLAMA(",\"rope_theta\":0"), ST_FORMAT, "rope_theta is 0"},
    {LLAMA(",\"rope_theta\":-1e4"), ST_FORMAT, "rope_theta is -10000"},
    {LLAMA(",\"rope_theta\":\"10000\""), ST_FORMAT,
     "\"rope_theta\" is \"10000\", expected a number"},
    {LLAMA(",\"rope_parameters\":{\"rope_theta\":\"x\"}"), ST_FORMAT, "\"rope_theta\" is \"x\""},
    {LLAMA(",\"hidden_act\":\"gelu\""), ST_UNSUPPORTED, "hidden_act is \"gelu\""},
    {LLAMA(",\"mlp_bias\":1"), ST_FORMAT, "\"mlp_bias\" is 1, expected true or false"},
    {LLAMA(",\"layer_types\":[\"full_attention\",\"sliding_attention\"]"), ST_UNSUPPORTED,
     "layer_types is \"sliding_attention\""},
    {LLAMA(",\"num_experts\":8"), ST_UNSUPPORTED, "num_experts is 8"},
    {LLAMA(",\"num_local_experts\":8"), ST_UNSUPPORTED, "num_local_experts is 8"},
    {QUANT("\"quant_method\":\"gptq\",\"bits\":4"), ST_UNSUPPORTED,
     "quantization_config.quant_method is \"gptq\""},
    {QUANT("\"bits\":4"), ST_UNSUPPORTED, "quantization_config.quant_method is nothing"},
    {LLAMA(",\"quantization_config\":4"), ST_UNSUPPORTED, "quantization_config.quant_method"},
    {QUANT("\"quant_method\":\"pmpd\",\"format_version\":2"), ST_UNSUPPORTED,
     "quantization_config.format_version is 2"},
    {QUANT("\"quant_method\":\"pmpd\""), ST_UNSUPPORTED, "format_version is nothing"},
    {QUANT("\"quant_method\":\"pmpd\",\"format_version\":1,\"group_size\":48"), ST_UNSUPPORTED,
     "group_size is 48"},
    {QUANT("\"quant_method\":\"pmpd\",\"format_version\":1,\"group_size\":32,\"n_planes\":9"),
     ST_FORMAT, "\"n_planes\" is 9, expected an integer from 1 to 8"},
    {QUANT("\"quant_method\":\"pmpd\",\"format_version\":1,\"group_size\":32,\"n_planes\":4,"
           "\"method\":\"m\""),
     ST_FORMAT, "quantization_config.linears is missing"},
    {LLAMA(",\"num_key_value_heads\":3"), ST_FORMAT, "4 attention heads are not a multiple of 3"},
    {LLAMA(",\"num_key_value_heads\":8"), ST_FORMAT, "4 attention heads are not a multiple of 8"},
    {LLAMA(",\"num_key_value_heads\":0"), ST_FORMAT, "\"num_key_value_heads\" is 0"},
    {LLAMA(",\"head_dim\":15"), ST_FORMAT, "a head has 15 dimensions"},
    {LLAMA(",\"head_dim\":100000"), ST_FORMAT, "\"head_dim\" is 100000"},
    {LLAMA(",\"rms_norm_eps\":0"), ST_FORMAT, "rms_norm_eps is 0"},
    {LLAMA(",\"max_position_embeddings\":0"), ST_FORMAT, "\"max_position_embeddings\" is 0"},
    {LLAMA(",\"max_position_embeddings\":1e9"), ST_FORMAT, "\"max_position_embeddings\" is 1e+09"},
    {LLAMA(",\"tie_word_embeddings\":\"no\""), ST_FORMAT, "\"tie_word_embeddings\" is \"no\""},
    {LLAMA(",\"bos_token_id\":100"), ST_FORMAT,
     "\"bos_token_id\" is 100, expected an integer from 0"},
    {LLAMA(",\"eos_token_id\":100"), ST_FORMAT, "eos_token_id is 100, expected ids from 0 to 99"},
    {LLAMA(",\"eos_token_id\":[1,-1]"), ST_FORMAT, "eos_token_id is -1"},
    {LLAMA(",\"eos_token_id\":\"</s>\""), ST_FORMAT, "eos_token_id is \"</s>\""},
    {LLAMA(",\"eos_token_id\":[1,2,3,4,5,6,7,8,9]"), ST_UNSUPPORTED, "more than 8 ids"},
    {LLAMA(",\"vocab_size\":100"), ST_FORMAT, "duplicate"},
    {"{\"model_type\":\"llama\"}", ST_FORMAT, "\"hidden_size\" is missing, expected an integer"},
    {"{\"model_type\":\"llama\",\"hidden_size\":1048577}", ST_FORMAT, "\"hidden_size\" is 1048577"},
    {"{\"model_type\":\"llama\",\"hidden_size\":-64}", ST_FORMAT, "\"hidden_size\" is -64"},
    {"{\"model_type\":\"llama\",\"hidden_size\":\"64\\n\"}", ST_FORMAT,
     "\"hidden_size\" is \"64?\""},
    {"{\"model_type\":\"llama\",\"hidden_size\":64,\"num_hidden_layers\":1025}", ST_FORMAT, "1025"},
    {"{\"model_type\":\"llama\",\"hidden_size\":65,\"num_hidden_layers\":1,\"num_attention_heads\":"
     "4,"
     "\"intermediate_size\":9,\"vocab_size\":9}",
     ST_FORMAT, "65 is not a multiple of 4 heads"},
    {"{\"model_type\":\"llama\",\"hidden_size\":36,\"num_hidden_layers\":1,\"num_attention_heads\":"
     "4,"
     "\"intermediate_size\":9,\"vocab_size\":9}",
     ST_FORMAT, "a head has 9 dimensions"},
    {"{\"model_type\":\"llama\",\"hidden_size\":65536,\"num_hidden_layers\":1,"
     "\"num_attention_heads\":65536,\"head_dim\":4096,\"intermediate_size\":9,\"vocab_size\":9}",
     ST_FORMAT, "65536 heads of 4096 dimensions"},
    {"{\"model_type\":\"llama\",\"hidden_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":"
     "4,"
     "\"intermediate_size\":9,\"vocab_size\":1}",
     ST_FORMAT, "\"vocab_size\" is 1"},
    {"[]", ST_FORMAT, "expected a JSON object"},
    {"", ST_FORMAT, "not valid JSON"},
    {"{\"model_type\":", ST_FORMAT, "not valid JSON at line 1"},
};

static void test_refused(void)
{
    struct model_config c;
    char path[GEN_PATH_BYTES];
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        c.hidden = 7;
        enum status st = read_text(refused[i].text, &c);
        const char *message = status_message();
        if (!CHECK(st == refused[i].st && strstr(message, refused[i].part) &&
                   strstr(message, "/config.json") && !strchr(message, '\n') && c.hidden == 0)) {
            fprintf(stderr, "    %s\n    gives %s: %s\n", refused[i].text, status_name(st),
                    message);
        }
    }
    drop("config.json");
    CHECK_STATUS(model_config_read(&c, folder), ST_IO, "/config.json: No such file");
    CHECK_STATUS(model_config_read(&c, gen_path(path, folder, "nowhere")), ST_IO, "nowhere/config");
    json_t *json = NULL;
    put_text("long.json", "{\"a\": 12345}");
    CHECK_STATUS(json_read_file(&json, gen_path(path, folder, "long.json"), 11), ST_FORMAT,
                 "long.json has 12 bytes, at most 11 are read");
    CHECK(!json);
    CHECK_OK(json_read_file(&json, path, 12));
    json_release(&json);
    drop("long.json");
    CHECK(mkdir(gen_path(path, folder, "config.json"), 0700) == 0);
    CHECK_STATUS(model_config_read(&c, folder), ST_IO, "it is a folder");
    drop("config.json");
}

/* ---- nested ---- */

#define NESTED(n_planes, linears)                                                          \
    QUANT("\"quant_method\":\"pmpd\",\"format_version\":1,\"method\":\"joint-data-free\"," \
          "\"group_size\":64,\"n_planes\":" n_planes ",\"linears\":{" linears "}")
#define LINEAR(name, levels) "\"" name "\":{\"n_cols\":64,\"levels\":{" levels "}}"

static void test_nested(void)
{
    struct model_config c;
    struct nested_index *index = NULL;
    enum level_kind kinds[BITS_ALL];
    int32_t n_cols = 0;
    const char *text = NESTED("8", LINEAR("z", "\"2\":\"tied\",\"3\":\"free\"") "," LINEAR(
                                       "lm_head", "\"4\":\"lut\",\"8\":\"tail\""));
    CHECK_OK(read_text(text, &c));
    CHECK(c.nested && c.nested_head && c.group_cols == 64 && c.n_planes == 8);
    CHECK(strcmp(c.method, "joint-data-free") == 0);
    CHECK_OK(nested_index_read(&index, folder));
    if (index) {
        CHECK_OK(nested_index_get(index, "lm_head", &n_cols, kinds));
        CHECK(n_cols == 64 && kinds[4] == LEVEL_LUT && kinds[8] == LEVEL_TAIL && !kinds[2]);
        CHECK_OK(nested_index_get(index, "z", &n_cols, kinds));
        CHECK(kinds[2] == LEVEL_TIED && kinds[3] == LEVEL_FREE && !kinds[8] && !kinds[0]);
        CHECK_STATUS(nested_index_get(index, "y", &n_cols, kinds), ST_FORMAT,
                     "does not list \"y\"");
    }
    nested_index_destroy(&index);
    CHECK(!index);
    nested_index_destroy(NULL);
    static const struct refused bad[] = {
        {LLAMA(""), ST_FORMAT, "no nested model"},
        {QUANT("\"quant_method\":\"awq\""), ST_UNSUPPORTED, "\"awq\""},
        {NESTED("4", "\"z\":1"), ST_FORMAT, "linear \"z\": "},
        {NESTED("4", "\"z\":{\"levels\":{\"2\":\"tied\"}}"), ST_FORMAT, "\"n_cols\" is missing"},
        {NESTED("4", "\"z\":{\"n_cols\":0,\"levels\":{\"2\":\"tied\"}}"), ST_FORMAT,
         "\"n_cols\" is 0"},
        {NESTED("4", "\"z\":{\"n_cols\":64}"), ST_FORMAT, "linear \"z\": expected \"levels\""},
        {NESTED("4", LINEAR("z", "")), ST_FORMAT, "at least one precision"},
        {NESTED("4", LINEAR("z", "\"5\":\"tied\"")), ST_FORMAT, "not one of 1 to 4"},
        {NESTED("4", LINEAR("z", "\"0\":\"tied\"")), ST_FORMAT, "not one of 1 to 4"},
        {NESTED("8", LINEAR("z", "\"9\":\"tied\"")), ST_FORMAT, "not one of 1 to 8"},
        {NESTED("8", LINEAR("z", "\"22\":\"tied\"")), ST_FORMAT, "not one of 1 to 8"},
        {NESTED("8", LINEAR("z", "\"\":\"tied\"")), ST_FORMAT, "not one of 1 to 8"},
        {NESTED("4", LINEAR("z\\n", "\"2\":\"\\u0001tied\"")), ST_FORMAT,
         "linear \"z?\": levels of precision 2 are \"?tied\""},
        {NESTED("4", LINEAR("z", "\"2\":\"none\"")), ST_FORMAT, "are \"none\""},
        {NESTED("4", LINEAR("z", "\"2\":2")), ST_FORMAT, "precision 2 are 2"},
        {NESTED("4", LINEAR("z", "\"4\":\"tail\"")), ST_FORMAT, "are \"tail\""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        put_text("config.json", bad[i].text);
        CHECK_STATUS(nested_index_read(&index, folder), bad[i].st, bad[i].part);
        CHECK(!index && strstr(status_message(), "/config.json"));
    }
    drop("config.json");
    CHECK_STATUS(nested_index_read(&index, folder), ST_IO, "/config.json");
}

/* Every linear of two layers with these levels; the one named `other` gets `levels_other`; the one
 * named `missing` is left out. */
static void put_linears(const char *levels, const char *other, const char *levels_other,
                        const char *missing)
{
    static const char *const names[M_N_ROLES] = {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};
    char text[8192];
    int used = snprintf(text, sizeof text,
                        "{\"model_type\":\"llama\"," SIZES ",\"quantization_config\":{"
                        "\"quant_method\":\"pmpd\",\"format_version\":1,\"method\":\"m\","
                        "\"group_size\":32,\"n_planes\":4,\"linears\":{");
    const char *comma = "";
    for (int i = 0; i < 2 * M_N_ROLES; i++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s", i / M_N_ROLES, names[i % M_N_ROLES]);
        if (strcmp(name, missing) == 0) {
            continue;
        }
        used += snprintf(text + used, sizeof text - (size_t)used,
                         "%s\"%s\":{\"n_cols\":64,\"levels\":{%s}}", comma, name,
                         strcmp(name, other) == 0 ? levels_other : levels);
        comma = ",";
    }
    snprintf(text + used, sizeof text - (size_t)used, "}}}");
    put_text("config.json", text);
}

static void test_common_bits(void)
{
    struct model_config c;
    struct nested_index *index = NULL;
    uint32_t mask = 0;
    const char *all = "\"2\":\"tied\",\"3\":\"tied\",\"4\":\"free\"";
    put_linears(all, "", "", "");
    CHECK_OK(model_config_read(&c, folder));
    CHECK(c.nested && !c.nested_head);
    CHECK_OK(nested_index_read(&index, folder));
    if (index) {
        CHECK_OK(nested_index_common_bits(index, &c, &mask));
        CHECK(mask == (1u << 2 | 1u << 3 | 1u << 4));
    }
    nested_index_destroy(&index);
    put_linears(all, "model.layers.1.mlp.down_proj", "\"1\":\"tied\",\"4\":\"lut\"", "");
    CHECK_OK(nested_index_read(&index, folder));
    if (index) {
        CHECK_OK(nested_index_common_bits(index, &c, &mask));
        CHECK(mask == 1u << 4);
    }
    nested_index_destroy(&index);
    put_linears(all, "model.layers.0.self_attn.k_proj", "\"1\":\"tied\"", "");
    CHECK_OK(nested_index_read(&index, folder));
    if (index) {
        CHECK_STATUS(nested_index_common_bits(index, &c, &mask), ST_FORMAT,
                     "no precision in common");
    }
    nested_index_destroy(&index);
    put_linears(all, "", "", "model.layers.1.self_attn.v_proj");
    CHECK_OK(nested_index_read(&index, folder));
    if (index) {
        CHECK_STATUS(nested_index_common_bits(index, &c, &mask), ST_FORMAT,
                     "does not list \"model.layers.1.self_attn.v_proj\"");
    }
    nested_index_destroy(&index);
}

static void test_names(void)
{
    const struct model_config c = {.family = FAMILY_LLAMA,
                                   .hidden = 64,
                                   .n_heads = 4,
                                   .n_kv_heads = 2,
                                   .head_dim = 24,
                                   .ffn = 160};
    static const struct {
        const char *name;
        int32_t n_rows, n_cols;
    } expected[M_N_ROLES] = {
        {"self_attn.q_proj", 96, 64}, {"self_attn.k_proj", 48, 64}, {"self_attn.v_proj", 48, 64},
        {"self_attn.o_proj", 64, 96}, {"mlp.gate_proj", 160, 64},   {"mlp.up_proj", 160, 64},
        {"mlp.down_proj", 64, 160},
    };
    char text[MODEL_NAME_BYTES], full[MODEL_NAME_BYTES];
    for (int r = 0; r < M_N_ROLES; r++) {
        int32_t n_rows = 0, n_cols = 0;
        model_matrix_shape(&c, (enum matrix_role)r, &n_rows, &n_cols);
        CHECK(n_rows == expected[r].n_rows && n_cols == expected[r].n_cols);
        model_matrix_name(text, &c, 31, (enum matrix_role)r);
        snprintf(full, sizeof full, "model.layers.31.%s", expected[r].name);
        CHECK(strcmp(text, full) == 0);
        CHECK(strcmp(model_role_name(FAMILY_LLAMA, (enum matrix_role)r),
                     strchr(expected[r].name, '.') + 1) == 0);
    }
    model_norm_name(text, &c, 0, NORM_ATTENTION);
    CHECK(strcmp(text, "model.layers.0.input_layernorm.weight") == 0);
    model_norm_name(text, &c, 7, NORM_MLP);
    CHECK(strcmp(text, "model.layers.7.post_attention_layernorm.weight") == 0);
}

/* ---- whole folders ---- */

static void check_weights(const char *where, const struct gen_model *m)
{
    struct model_config c;
    struct checkpoint *ckpt = NULL;
    struct tensor t;
    char name[MODEL_NAME_BYTES], full[MODEL_NAME_BYTES + 8];
    CHECK_OK(model_config_read(&c, where));
    CHECK_OK(checkpoint_open(&ckpt, where));
    if (!ckpt) {
        return;
    }
    CHECK(c.hidden == m->hidden && c.head_dim == m->head_dim && c.n_kv_heads == m->n_kv_heads);
    CHECK(c.bos == m->bos && c.n_eos == 1 && c.eos[0] == m->eos && c.tied_head == m->tied);
    CHECK(c.norm_eps == (float)m->norm_eps && c.rope_theta == m->rope_theta);
    CHECK_OK(checkpoint_get_shape(ckpt, MODEL_EMBED_NAME, c.vocab, c.hidden, &t));
    CHECK(t.dtype == m->dtype);
    CHECK_OK(checkpoint_get_shape(ckpt, "model.norm.weight", c.hidden, 0, &t));
    for (int layer = 0; layer < c.n_layers; layer++) {
        for (int r = 0; r < M_N_ROLES; r++) {
            int32_t n_rows = 0, n_cols = 0;
            model_matrix_shape(&c, (enum matrix_role)r, &n_rows, &n_cols);
            model_matrix_name(name, &c, layer, (enum matrix_role)r);
            snprintf(full, sizeof full, "%s.weight", name);
            CHECK_OK(checkpoint_get_shape(ckpt, full, n_rows, n_cols, &t));
        }
        model_norm_name(name, &c, layer, NORM_MLP);
        CHECK_OK(checkpoint_get_shape(ckpt, name, c.hidden, 0, &t));
    }
    CHECK(checkpoint_has(ckpt, MODEL_HEAD_NAME ".weight") == !c.tied_head);
    CHECK(checkpoint_n_tensors(ckpt) == 2 + 9 * c.n_layers + !c.tied_head);
    checkpoint_close(&ckpt);
}

/* First value of a gain, as f32. */
static float first_gain(const char *where)
{
    struct checkpoint *ckpt = NULL;
    struct tensor t = {0};
    float value = NAN;
    CHECK_OK(checkpoint_open(&ckpt, where));
    if (ckpt) {
        CHECK_OK(checkpoint_get(ckpt, "model.norm.weight", &t));
        if (t.data) {
            floats_from(&value, t.data, t.dtype, 1);
        }
    }
    checkpoint_close(&ckpt);
    return value;
}

static void test_gen(void)
{
    char where[GEN_PATH_BYTES], inner[GEN_PATH_BYTES];
    float gains[3];
    static const enum dtype dtypes[] = {DT_F32, DT_F16, DT_BF16};
    json_t *json = NULL;
    for (int i = 0; i < 3; i++) {
        struct gen_model m = gen_model_default();
        m.dtype = dtypes[i];
        m.tied = i == 1;
        m.n_shards = 1 + i;
        m.n_kv_heads = i == 2 ? 4 : 2;
        m.head_dim = 10 + 2 * i;
        m.n_layers = 1 + i;
        CHECK(mkdir(gen_path(where, folder, "gen"), 0700) == 0);
        CHECK_OK(gen_model_write(where, &m));
        check_weights(where, &m);
        gains[i] = first_gain(where);
        if (i == 0) {
            CHECK_OK(json_read_file(&json, gen_path(inner, where, "tokenizer.json"), 1 << 20));
            json_release(&json);
        }
        gen_remove(where);
    }
    CHECK(gains[0] != 1 && fabsf(gains[0] - 1) < 1);
    CHECK_NEAR(gains[1], gains[0], 1e-3);
    CHECK_NEAR(gains[2], gains[0], 8e-3);
    struct gen_model small = gen_model_default();
    small.vocab = 200;
    CHECK(mkdir(gen_path(where, folder, "gen"), 0700) == 0);
    CHECK_STATUS(gen_model_write(where, &small), ST_USER, "vocabulary of 258");
    gen_remove(where);
}

/* What the rest of the program relies on, whatever the file says. */
static void check_possible(const struct model_config *c)
{
    CHECK(c->hidden > 0 && c->n_layers > 0 && c->n_layers <= 1024 && c->ffn > 0 && c->vocab >= 2);
    CHECK(c->n_kv_heads > 0 && c->n_heads % c->n_kv_heads == 0);
    CHECK(c->head_dim > 0 && c->head_dim % 2 == 0 && c->rot_dim == c->head_dim && c->context > 0);
    CHECK(c->norm_eps > 0 && c->rope_theta > 0 && c->bos >= -1 && c->bos < c->vocab);
    for (int i = 0; i < c->n_eos; i++) {
        CHECK(i < MODEL_MAX_EOS && c->eos[i] >= 0 && c->eos[i] < c->vocab);
    }
    CHECK(!c->nested || (c->n_planes >= 1 && c->n_planes <= BITS_MAX && c->group_cols % 32 == 0));
}

static void test_mutations(void)
{
    struct gen_rng rng = {.state = 7};
    char good[8192], text[8192], path[GEN_PATH_BYTES];
    put_linears("\"2\":\"tied\",\"4\":\"free\"", "", "", "");
    size_t n_good = 0;
    char *whole = gen_read_file(gen_path(path, folder, "config.json"), &n_good);
    CHECK(whole && n_good > 1000 && n_good < sizeof good);
    if (!whole || n_good >= sizeof good) {
        free(whole);
        return;
    }
    memcpy(good, whole, n_good);
    free(whole);
    int opened = 0, refused_n = 0;
    for (int round = 0; round < 5000; round++) {
        size_t n = n_good;
        memcpy(text, good, n);
        for (uint32_t k = gen_below(&rng, 4) + 1; k > 0; k--) {
            // half of the rounds hit the sizes at the front
            size_t at = gen_below(&rng, (uint32_t)(round % 2 ? 300 : n));
            text[at] = text[at] >= '0' && text[at] <= '9' && round % 3
                           ? (char)('0' + gen_below(&rng, 10))
                           : (char)(text[at] ^ 1 << gen_below(&rng, 8));
        }
        n = round % 7 == 0 ? gen_below(&rng, (uint32_t)n) : n;
        gen_write_file(path, text, n);
        struct model_config c;
        struct nested_index *index = NULL;
        uint32_t mask;
        if (model_config_read(&c, folder) == ST_OK) {
            opened++;
            check_possible(&c);
        } else {
            refused_n++;
        }
        if (nested_index_read(&index, folder) == ST_OK && c.hidden) {
            enum status st = nested_index_common_bits(index, &c, &mask);
            CHECK(st == ST_OK || st == ST_FORMAT);
        }
        nested_index_destroy(&index);
    }
    printf("mutations: %d opened, %d refused\n", opened, refused_n);
    CHECK(opened > 100 && refused_n > 1000);
}

static void test_stories(void)
{
    const char *data = getenv("PMPD_TEST_DATA");
    char path[GEN_PATH_BYTES];
    struct model_config c;
    if (!data) {
        printf("PMPD_TEST_DATA is not set: stories260k is not read\n");
        return;
    }
    CHECK_OK(model_config_read(&c, gen_path(path, data, "stories260k")));
    CHECK(c.hidden == 64 && c.n_layers == 5 && c.n_heads == 8 && c.n_kv_heads == 4);
    CHECK(c.head_dim == 8 && c.ffn == 172 && c.vocab == 512 && c.context == 512 && c.tied_head);
    CHECK(c.norm_eps == 1e-5f && c.rope_theta == 10000.0 && c.bos == 1);
    CHECK(c.n_eos == 1 && c.eos[0] == 2 && !c.nested);
}

int main(void)
{
    gen_folder(folder);
    test_defaults();
    test_all_keys();
    test_rope();
    test_eos();
    test_refused();
    test_nested();
    test_common_bits();
    test_names();
    test_gen();
    test_mutations();
    test_stories();
    gen_remove(folder);
    return check_report();
}
