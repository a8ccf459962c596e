/* SPDX-License-Identifier: Apache-2.0 */
#include "core/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "core/json.h"
#include "core/mem.h"

/* Limits far above any model, so that no later product of two sizes overflows 64 bits and hostile
 * numbers are refused where they can be named. */
enum {
    CONFIG_BYTES_MAX = 64 << 20, /* a nested folder lists every linear */
    HIDDEN_MAX = 1 << 20,
    WIDTH_MAX = 1 << 22, /* of a matrix: ffn, or all heads together */
    LAYERS_MAX = 1024,
    HEADS_MAX = 1 << 16,
    HEAD_DIM_MAX = 4096,
    VOCAB_MAX = 1 << 24,
    CONTEXT_MAX = 1 << 26,
    PATH_BYTES = 4096,
    SHOWN_BYTES = 96
};

/* What Hugging Face's LlamaConfig assumes where config.json is silent. */
static const int32_t DEFAULT_CONTEXT = 2048;
static const double DEFAULT_THETA = 10000.0;
static const double DEFAULT_EPS = 1e-6;

static enum status config_path(char out[PATH_BYTES], const char *folder, const char *file)
{
    int n = snprintf(out, PATH_BYTES, "%s/%s", folder, file);
    if (n < 0 || n >= PATH_BYTES) {
        FAIL(ST_IO, "the path of the model folder is longer than %d bytes", (int)PATH_BYTES - 64);
    }
    return ST_OK;
}

/* "WHERE: KEY is VALUE, which is not supported; expected EXPECTED" */
static enum status refuse(const char *where, const char *key, const json_t *value,
                          const char *expected)
{
    char found[SHOWN_BYTES];
    FAIL(ST_UNSUPPORTED, "%s: %s is %s, which is not supported; expected %s", where, key,
         json_describe(value, found, sizeof found), expected);
}

/* ---- what makes another model of it ---- */

static enum status check_architecture(const json_t *json, const char *where)
{
    const json_t *type = json_member(json, "model_type");
    if (!json_is_string(type)) {
        char found[SHOWN_BYTES];
        FAIL(ST_FORMAT,
             "%s: \"model_type\" is %s, expected \"llama\"; is this a model's config.json?", where,
             json_describe(type, found, sizeof found));
    }
    if (strcmp(json_string_value(type), "llama") != 0) {
        return refuse(where, "model_type", type, "\"llama\"");
    }
    const json_t *list = json_member(json, "architectures");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (!name ||
            (strcmp(name, "LlamaForCausalLM") != 0 && strcmp(name, "LLaMAForCausalLM") != 0)) {
            return refuse(where, "architectures", json_array_get(list, i), "\"LlamaForCausalLM\"");
        }
    }
    return ST_OK;
}

static enum status check_features(const json_t *json, const char *where)
{
    static const char *const off[] = {"attention_bias", "mlp_bias"};
    bool on = false;
    for (size_t i = 0; i < sizeof off / sizeof off[0]; i++) {
        TRY(json_get_bool_or(&on, json, off[i], false, where));
        if (on) {
            return refuse(where, off[i], json_member(json, off[i]), "false");
        }
    }
    static const char *const absent[] = {"num_experts", "num_local_experts", "n_routed_experts",
                                         "compression_config"};
    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++) {
        const json_t *value = json_member(json, absent[i]);
        if (value && !(json_is_integer(value) && json_integer_value(value) == 0)) {
            return refuse(where, absent[i], value, "a dense model without this key");
        }
    }
    bool use_window = true;
    TRY(json_get_bool_or(&use_window, json, "use_sliding_window", true, where));
    if (json_member(json, "sliding_window") && use_window) {
        return refuse(where, "sliding_window", json_member(json, "sliding_window"),
                      "null (full attention)");
    }
    const json_t *types = json_member(json, "layer_types");
    for (size_t i = 0; i < json_array_size(types); i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (!type || strcmp(type, "full_attention") != 0) {
            return refuse(where, "layer_types", json_array_get(types, i), "\"full_attention\"");
        }
    }
    const char *act = NULL;
    TRY(json_get_string_or(&act, json, "hidden_act", "silu", where));
    if (strcmp(act, "silu") != 0) {
        return refuse(where, "hidden_act", json_member(json, "hidden_act"), "\"silu\"");
    }
    return ST_OK;
}

/* ---- rotary embedding ---- */

static enum status check_partial(const json_t *object, const char *where)
{
    double share = 1.0;
    TRY(json_get_f64_or(&share, object, "partial_rotary_factor", 1.0, where));
    if (!(share == 1.0)) {
        return refuse(where, "partial_rotary_factor", json_member(object, "partial_rotary_factor"),
                      "1.0 (all dimensions rotate)");
    }
    return ST_OK;
}

/* rope_scaling or, as newer files call it, rope_parameters: the plain rotation or nothing. */
static enum status read_rope_object(double *theta, bool *has_theta, const json_t *json,
                                    const char *key, const char *where)
{
    const json_t *rope = json_member(json, key);
    if (!rope) {
        return ST_OK;
    }
    if (!json_is_object(rope)) {
        return refuse(where, key, rope, "null or {\"rope_type\": \"default\"}");
    }
    char name[64];
    bool typed = false;
    static const char *const type_keys[] = {"rope_type", "type"};
    for (int i = 0; i < 2; i++) {
        const json_t *type = json_member(rope, type_keys[i]);
        if (!type) {
            continue;
        }
        if (!json_is_string(type) || strcmp(json_string_value(type), "default") != 0) {
            snprintf(name, sizeof name, "%s.%s", key, type_keys[i]);
            return refuse(where, name, type, "\"default\"");
        }
        typed = true;
    }
    json_t *object = (json_t *)(uintptr_t)rope; // jansson's iterators take no const
    for (void *it = json_object_iter(object); it; it = json_object_iter_next(object, it)) {
        const char *member = json_object_iter_key(it);
        bool plain = strcmp(member, "rope_theta") == 0 || strcmp(member, "type") == 0 ||
                     strcmp(member, "rope_type") == 0 ||
                     strcmp(member, "partial_rotary_factor") == 0;
        if (!typed && !plain && !json_is_null(json_object_iter_value(it))) {
            snprintf(name, sizeof name, "%s.%.32s", key, member);
            return refuse(where, name, json_object_iter_value(it),
                          "only rope_theta where no rope_type is given");
        }
    }
    TRY(check_partial(rope, where));
    double value = 0;
    TRY(json_get_f64_or(&value, rope, "rope_theta", 0, where));
    if (json_member(rope, "rope_theta")) {
        if (*has_theta && !(*theta == value)) {
            FAIL(ST_FORMAT, "%s: %s.rope_theta is %g, but another rope_theta is %g; keep one",
                 where, key, value, *theta);
        }
        *theta = value;
        *has_theta = true;
    }
    return ST_OK;
}

static enum status read_rope(struct model_config *out, const json_t *json, const char *where)
{
    double theta = DEFAULT_THETA;
    bool has_theta = json_member(json, "rope_theta") != NULL;
    TRY(json_get_f64_or(&theta, json, "rope_theta", DEFAULT_THETA, where));
    TRY(read_rope_object(&theta, &has_theta, json, "rope_parameters", where));
    TRY(read_rope_object(&theta, &has_theta, json, "rope_scaling", where));
    TRY(check_partial(json, where));
    if (!(theta > 0) || !isfinite(theta)) {
        FAIL(ST_FORMAT, "%s: rope_theta is %g, expected a number above 0", where, theta);
    }
    out->rope_theta = theta;
    out->rot_dim = out->head_dim;
    return ST_OK;
}

/* ---- sizes and tokens ---- */

static enum status read_sizes(struct model_config *out, const json_t *json, const char *where)
{
    TRY(json_get_i32(&out->hidden, json, "hidden_size", 1, HIDDEN_MAX, where));
    TRY(json_get_i32(&out->n_layers, json, "num_hidden_layers", 1, LAYERS_MAX, where));
    TRY(json_get_i32(&out->n_heads, json, "num_attention_heads", 1, HEADS_MAX, where));
    TRY(json_get_i32_or(&out->n_kv_heads, json, "num_key_value_heads", 1, HEADS_MAX, out->n_heads,
                        where));
    TRY(json_get_i32(&out->ffn, json, "intermediate_size", 1, WIDTH_MAX, where));
    TRY(json_get_i32(&out->vocab, json, "vocab_size", 2, VOCAB_MAX, where));
    TRY(json_get_i32_or(&out->context, json, "max_position_embeddings", 1, CONTEXT_MAX,
                        DEFAULT_CONTEXT, where));
    if (out->n_heads % out->n_kv_heads != 0) {
        FAIL(ST_FORMAT, "%s: %d attention heads are not a multiple of %d key-value heads", where,
             out->n_heads, out->n_kv_heads);
    }
    TRY(json_get_i32_or(&out->head_dim, json, "head_dim", 1, HEAD_DIM_MAX, 0, where));
    if (!out->head_dim) {
        if (out->hidden % out->n_heads != 0) {
            FAIL(ST_FORMAT,
                 "%s: hidden_size %d is not a multiple of %d heads and there is no head_dim", where,
                 out->hidden, out->n_heads);
        }
        out->head_dim = out->hidden / out->n_heads;
    }
    if (out->head_dim % 2 != 0 || out->head_dim > HEAD_DIM_MAX) {
        FAIL(ST_FORMAT, "%s: a head has %d dimensions, expected an even number of at most %d",
             where, out->head_dim, (int)HEAD_DIM_MAX);
    }
    if ((int64_t)out->n_heads * out->head_dim > WIDTH_MAX) {
        FAIL(ST_FORMAT, "%s: %d heads of %d dimensions are wider than %d", where, out->n_heads,
             out->head_dim, (int)WIDTH_MAX);
    }
    double eps = DEFAULT_EPS;
    TRY(json_get_f64_or(&eps, json, "rms_norm_eps", DEFAULT_EPS, where));
    if (!(eps > 0 && eps < 1)) {
        FAIL(ST_FORMAT, "%s: rms_norm_eps is %g, expected a number between 0 and 1", where, eps);
    }
    out->norm_eps = (float)eps;
    TRY(json_get_bool_or(&out->tied_head, json, "tie_word_embeddings", false, where));
    return ST_OK;
}

static enum status add_eos(struct model_config *out, const json_t *id, const char *where)
{
    char found[SHOWN_BYTES];
    if (!json_is_integer(id) || json_integer_value(id) < 0 ||
        json_integer_value(id) >= out->vocab) {
        FAIL(ST_FORMAT, "%s: eos_token_id is %s, expected ids from 0 to %d", where,
             json_describe(id, found, sizeof found), out->vocab - 1);
    }
    if (out->n_eos == MODEL_MAX_EOS) {
        FAIL(ST_UNSUPPORTED, "%s: eos_token_id has more than %d ids", where, (int)MODEL_MAX_EOS);
    }
    out->eos[out->n_eos++] = (int32_t)json_integer_value(id);
    return ST_OK;
}

static enum status read_eos(struct model_config *out, const json_t *json, const char *where)
{
    const json_t *eos = json_member(json, "eos_token_id");
    if (!eos) {
        return ST_OK;
    }
    if (!json_is_array(eos)) {
        TRY(add_eos(out, eos, where));
        return ST_OK;
    }
    for (size_t i = 0; i < json_array_size(eos); i++) {
        TRY(add_eos(out, json_array_get(eos, i), where));
    }
    return ST_OK;
}

/* Generation is what generation_config.json is about, so its end tokens are the ones that count. */
static enum status read_tokens(struct model_config *out, const json_t *json, const char *where,
                               const char *folder)
{
    TRY(json_get_i32_or(&out->bos, json, "bos_token_id", 0, out->vocab - 1, -1, where));
    char path[PATH_BYTES];
    TRY(config_path(path, folder, "generation_config.json"));
    if (access(path, F_OK) == 0) {
        json_t *generation = NULL;
        TRY(json_read_file(&generation, path, CONFIG_BYTES_MAX));
        enum status st = read_eos(out, generation, path);
        json_release(&generation);
        TRY(st);
    }
    if (out->n_eos == 0) {
        TRY(read_eos(out, json, where));
    }
    return ST_OK;
}

/* ---- the nested format ---- */

static enum status read_nested(struct model_config *out, const json_t *json, const char *where)
{
    const json_t *quant = json_member(json, "quantization_config");
    if (!quant) {
        return ST_OK;
    }
    const json_t *method = json_member(quant, "quant_method");
    if (!json_is_string(method) || strcmp(json_string_value(method), "pmpd") != 0) {
        return refuse(
            where, "quantization_config.quant_method", method,
            "\"pmpd\" or an unquantised model: take the original and run `pmpd quantize`");
    }
    const json_t *version = json_member(quant, "format_version");
    if (!json_is_integer(version) || json_integer_value(version) != NESTED_FORMAT_VERSION) {
        return refuse(where, "quantization_config.format_version", version,
                      "1; quantise the model again, or use a newer pmpd");
    }
    TRY(json_get_i32(&out->group_cols, quant, "group_size", 1, WIDTH_MAX, where));
    if (out->group_cols != 32 && out->group_cols != 64 && out->group_cols != 128) {
        return refuse(where, "quantization_config.group_size", json_member(quant, "group_size"),
                      "32, 64 or 128");
    }
    TRY(json_get_i32(&out->n_planes, quant, "n_planes", 1, BITS_MAX, where));
    const char *how = NULL;
    TRY(json_get_string(&how, quant, "method", where));
    if (strlen(how) >= sizeof out->method) {
        FAIL(ST_FORMAT, "%s: quantization_config.method has %zu bytes, at most %zu fit", where,
             strlen(how), sizeof out->method - 1);
    }
    strcpy(out->method, how);
    const json_t *linears = json_member(quant, "linears");
    if (!json_is_object(linears)) {
        FAIL(ST_FORMAT, "%s: quantization_config.linears is missing; quantise the model again",
             where);
    }
    out->nested = true;
    out->nested_head = json_member(linears, MODEL_HEAD_NAME) != NULL;
    return ST_OK;
}

static enum status config_parse(struct model_config *out, const json_t *json, const char *where,
                                const char *folder)
{
    *out = (struct model_config){.family = FAMILY_LLAMA, .act = ACT_SILU, .bos = -1};
    TRY(check_architecture(json, where));
    TRY(check_features(json, where));
    TRY(read_sizes(out, json, where));
    TRY(read_rope(out, json, where));
    TRY(read_tokens(out, json, where, folder));
    TRY(read_nested(out, json, where));
    return ST_OK;
}

enum status model_config_read(struct model_config *out, const char *folder)
{
    *out = (struct model_config){.bos = -1};
    char path[PATH_BYTES];
    TRY(config_path(path, folder, "config.json"));
    json_t *json = NULL;
    TRY(json_read_file(&json, path, CONFIG_BYTES_MAX));
    struct model_config config;
    enum status st = config_parse(&config, json, path, folder);
    json_release(&json);
    TRY(st);
    *out = config;
    return ST_OK;
}

/* ---- kinds of the nested linears ---- */

struct linear {
    char *name; /* owned */
    int32_t n_cols;
    enum level_kind kinds[BITS_ALL];
};

struct nested_index {
    char *where;            /* owned; the config.json, for messages */
    struct linear *linears; /* (n) in order of name */
    size_t n;
};

static int linear_compare(const void *a, const void *b)
{
    const struct linear *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static enum status linear_parse(struct linear *out, const json_t *json, int32_t n_planes,
                                const char *where)
{
    char name[SHOWN_BYTES], found[SHOWN_BYTES];
    json_t *text = json_string(out->name);
    json_describe(text, name, sizeof name);
    json_decref(text);
    enum status st = json_get_i32(&out->n_cols, json, "n_cols", 1, WIDTH_MAX, where);
    if (st != ST_OK) {
        return status_prefix(st, "linear %s: ", name);
    }
    json_t *levels = json_object_get(json, "levels");
    if (json_object_size(levels) == 0) {
        FAIL(ST_FORMAT, "%s: linear %s: expected \"levels\" of at least one precision", where,
             name);
    }
    for (void *it = json_object_iter(levels); it; it = json_object_iter_next(levels, it)) {
        const char *key = json_object_iter_key(it);
        const char *word = json_string_value(json_object_iter_value(it));
        int bits = key[0] >= '1' && key[0] <= '0' + BITS_MAX && !key[1] ? key[0] - '0' : 0;
        enum level_kind kind = word ? level_kind_parse(word) : LEVEL_N;
        if (!bits || bits > n_planes) {
            FAIL(ST_FORMAT,
                 "%s: linear %s: a precision of \"levels\" is not one of 1 to %d (n_planes)", where,
                 name, n_planes);
        }
        if (kind == LEVEL_N || kind == LEVEL_NONE || (kind == LEVEL_TAIL && bits != BITS_MAX)) {
            FAIL(ST_FORMAT,
                 "%s: linear %s: levels of precision %d are %s, expected \"tied\", \"free\", "
                 "\"lut\" "
                 "or, of precision 8, \"tail\"",
                 where, name, bits, json_describe(json_object_iter_value(it), found, sizeof found));
        }
        out->kinds[bits] = kind;
    }
    return ST_OK;
}

static enum status index_parse(struct nested_index *index, const json_t *json)
{
    struct model_config config = {0};
    TRY(read_nested(&config, json, index->where));
    if (!config.nested) {
        FAIL(ST_FORMAT,
             "%s has no quantization_config: it is no nested model; make one with "
             "`pmpd quantize MODEL OUT`",
             index->where);
    }
    json_t *linears = json_object_get(json_object_get(json, "quantization_config"), "linears");
    TRY(MEM_NEW(&index->linears, json_object_size(linears)));
    for (void *it = json_object_iter(linears); it; it = json_object_iter_next(linears, it)) {
        struct linear *linear = &index->linears[index->n];
        TRY(mem_strdup(&linear->name, json_object_iter_key(it)));
        index->n++;
        TRY(linear_parse(linear, json_object_iter_value(it), config.n_planes, index->where));
    }
    if (index->n) {
        qsort(index->linears, index->n, sizeof index->linears[0], linear_compare);
    }
    return ST_OK;
}

enum status nested_index_read(struct nested_index **out, const char *folder)
{
    *out = NULL;
    char path[PATH_BYTES];
    struct nested_index *index = NULL;
    json_t *json = NULL;
    enum status st = ST_OK;
    TRY(config_path(path, folder, "config.json"));
    TRY_GOTO(st, json_read_file(&json, path, CONFIG_BYTES_MAX), done);
    TRY_GOTO(st, MEM_NEW(&index, 1), done);
    TRY_GOTO(st, mem_strdup(&index->where, path), done);
    TRY_GOTO(st, index_parse(index, json), done);
    *out = index;
    index = NULL;
done:
    nested_index_destroy(&index);
    json_release(&json);
    return st;
}

void nested_index_destroy(struct nested_index **index)
{
    if (!index || !*index) {
        return;
    }
    for (size_t i = 0; i < (*index)->n; i++) {
        mem_free((*index)->linears[i].name);
    }
    mem_free((*index)->linears);
    mem_free((*index)->where);
    mem_free(*index);
    *index = NULL;
}

enum status nested_index_get(const struct nested_index *index, const char *name, int32_t *n_cols,
                             enum level_kind kinds[BITS_ALL])
{
    const struct linear key = {.name = (char *)(uintptr_t)name}; // not written through
    const struct linear *linear =
        index->n ? bsearch(&key, index->linears, index->n, sizeof key, linear_compare) : NULL;
    if (!linear) {
        FAIL(ST_FORMAT,
             "%s: quantization_config.linears does not list \"%s\"; quantise the model again",
             index->where, name);
    }
    *n_cols = linear->n_cols;
    memcpy(kinds, linear->kinds, sizeof linear->kinds);
    return ST_OK;
}

enum status nested_index_common_bits(const struct nested_index *index,
                                     const struct model_config *config, uint32_t *mask)
{
    uint32_t common = UINT32_MAX;
    char name[MODEL_NAME_BYTES];
    for (int layer = 0; layer < config->n_layers; layer++) {
        for (int role = 0; role < M_N_ROLES; role++) {
            int32_t n_cols = 0;
            enum level_kind kinds[BITS_ALL];
            model_matrix_name(name, config, layer, (enum matrix_role)role);
            TRY(nested_index_get(index, name, &n_cols, kinds));
            uint32_t held = 0;
            for (int b = 1; b <= BITS_MAX; b++) {
                held |= kinds[b] != LEVEL_NONE ? 1u << b : 0;
            }
            common &= held;
        }
    }
    *mask = common;
    return ST_OK;
}

/* ---- names and shapes ---- */

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
    *n_rows = shapes[role][0];
    *n_cols = shapes[role][1];
}

static const char *const role_names[M_N_ROLES] = {
    [M_Q] = "q_proj",       [M_K] = "k_proj",   [M_V] = "v_proj",       [M_O] = "o_proj",
    [M_GATE] = "gate_proj", [M_UP] = "up_proj", [M_DOWN] = "down_proj",
};

const char *model_role_name(enum matrix_role role)
{
    return (unsigned)role < M_N_ROLES ? role_names[role] : "?";
}

void model_matrix_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer,
                       enum matrix_role role)
{
    INVARIANT(c->family == FAMILY_LLAMA && (unsigned)role < M_N_ROLES);
    snprintf(text, MODEL_NAME_BYTES, "model.layers.%d.%s.%s", layer,
             role <= M_O ? "self_attn" : "mlp", role_names[role]);
}

void model_norm_name(char text[MODEL_NAME_BYTES], const struct model_config *c, int layer, int norm)
{
    INVARIANT(c->family == FAMILY_LLAMA && (norm == 0 || norm == 1));
    snprintf(text, MODEL_NAME_BYTES, "model.layers.%d.%s.weight", layer,
             norm == 0 ? "input_layernorm" : "post_attention_layernorm");
}
