/* SPDX-License-Identifier: Apache-2.0 */
#include "core/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/json.h"
#include "core/mem.h"
#include "core/model_internal.h"

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
    PATH_BYTES = 4096,
    SHOWN_BYTES = MODEL_SHOWN_BYTES
};

static enum status config_path(char out[PATH_BYTES], const char *folder, const char *file)
{
    int n = snprintf(out, PATH_BYTES, "%s/%s", folder, file);
    if (n < 0 || n >= PATH_BYTES) {
        FAIL(ST_IO, "the path of the model folder is longer than %d bytes", (int)PATH_BYTES - 64);
    }
    return ST_OK;
}

enum status model_refuse(const char *where, const char *key, const json_t *value,
                         const char *expected)
{
    char found[SHOWN_BYTES];
    FAIL(ST_UNSUPPORTED, "%s: %s is %s, which is not supported; expected %s", where, key,
         json_describe(value, found, sizeof found), expected);
}

/* ---- what makes another model of it ---- */

static enum status read_family(struct model_config *out, const struct family **family,
                               const json_t *json, const char *where)
{
    char list[SHOWN_BYTES], expected[SHOWN_BYTES];
    const json_t *type = json_member(json, "model_type");
    model_family_list(list, sizeof list);
    if (!json_is_string(type)) {
        char found[SHOWN_BYTES];
        FAIL(ST_FORMAT, "%s: \"model_type\" is %s, expected %s; is this a model's config.json?",
             where, json_describe(type, found, sizeof found), list);
    }
    *family = model_family_find(&out->family, json_string_value(type));
    if (!*family) {
        return model_refuse(where, "model_type", type, list);
    }
    const json_t *all = json_member(json, "architectures");
    for (size_t i = 0; i < json_array_size(all); i++) {
        const char *name = json_string_value(json_array_get(all, i));
        bool known = false;
        for (int k = 0; k < FAMILY_ARCHITECTURES && name && (*family)->architectures[k]; k++) {
            known = known || strcmp(name, (*family)->architectures[k]) == 0;
        }
        if (!known) {
            snprintf(expected, sizeof expected, "\"%s\"", (*family)->architectures[0]);
            return model_refuse(where, "architectures", json_array_get(all, i), expected);
        }
    }
    return ST_OK;
}

static enum status read_switches(struct model_config *out, const struct family *family,
                                 const json_t *json, const char *where)
{
    /* switches that some family knows, or that make a model nobody here knows */
    static const char *const all[] = {"attention_bias",        "mlp_bias",     "use_qkv_bias",
                                      "use_parallel_residual", "qk_layernorm", "use_qk_norm"};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        bool on = false, known = false;
        TRY(json_get_bool_or(&on, json, all[i], false, where));
        for (int k = 0; on && k < FAMILY_SWITCHES && family->switches[k].key; k++) {
            if (strcmp(all[i], family->switches[k].key) == 0) {
                known = true;
                out->biased |= family->switches[k].biased;
                out->parallel = out->parallel || family->switches[k].parallel;
            }
        }
        if (on && !known) {
            return model_refuse(where, all[i], json_member(json, all[i]), "false");
        }
    }
    return ST_OK;
}

static enum status read_activation(struct model_config *out, const struct family *family,
                                   const json_t *json, const char *where)
{
    const char *act = NULL;
    char expected[SHOWN_BYTES];
    TRY(json_get_string_or(&act, json, "hidden_act", family->acts[0].name, where));
    for (int k = 0; k < FAMILY_ACTS && family->acts[k].name; k++) {
        if (strcmp(act, family->acts[k].name) == 0) {
            out->act = family->acts[k].act;
            return ST_OK;
        }
    }
    snprintf(expected, sizeof expected, "\"%s\"", family->acts[0].name);
    return model_refuse(where, "hidden_act", json_member(json, "hidden_act"), expected);
}

/* Every token sees all before it: a window as long as the context cuts nothing off. */
static enum status check_window(const struct model_config *c, const struct family *family,
                                const json_t *json, const char *where)
{
    static const char key[] = "sliding_window";
    bool use = true;
    int32_t window = 0;
    TRY(json_get_bool_or(&use, json, "use_sliding_window", family->use_window, where));
    TRY(json_get_i32_or(&window, json, key, 0, INT32_MAX,
                        json_object_get(json, key) ? 0 : family->window, where));
    if (use && window && window < c->context) {
        FAIL(ST_UNSUPPORTED,
             "%s: sliding_window is %d%s, which is not supported below the context of %d; "
             "for texts of at most %d tokens set max_position_embeddings to %d",
             where, window, json_member(json, key) ? "" : " (the family's default)", c->context,
             window, window);
    }
    const json_t *types = json_member(json, "layer_types");
    for (size_t i = 0; i < json_array_size(types); i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (!type || strcmp(type, "full_attention") != 0) {
            return model_refuse(where, "layer_types", json_array_get(types, i),
                                "\"full_attention\"");
        }
    }
    return ST_OK;
}

static enum status check_absent(const json_t *json, const char *where)
{
    static const char *const absent[] = {"num_experts", "num_local_experts", "n_routed_experts",
                                         "compression_config"};
    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++) {
        const json_t *value = json_member(json, absent[i]);
        if (value && !(json_is_integer(value) && json_integer_value(value) == 0)) {
            return model_refuse(where, absent[i], value, "a dense model without this key");
        }
    }
    return ST_OK;
}

/* ---- sizes and tokens ---- */

static enum status read_heads(struct model_config *out, const struct family *family,
                              const json_t *json, const char *where)
{
    static const char kv_key[] = "num_key_value_heads";
    bool silent = !json_object_get(json, kv_key); /* null is as many as query heads */
    TRY(json_get_i32(&out->n_heads, json, "num_attention_heads", 1, HEADS_MAX, where));
    TRY(json_get_i32_or(&out->n_kv_heads, json, kv_key, 1, HEADS_MAX,
                        silent && family->n_kv_heads ? family->n_kv_heads : out->n_heads, where));
    if (out->n_heads % out->n_kv_heads != 0) {
        FAIL(ST_FORMAT, "%s: %d attention heads are not a multiple of %d key-value heads%s", where,
             out->n_heads, out->n_kv_heads,
             silent ? " (the default of this model_type; give num_key_value_heads)" : "");
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
    return ST_OK;
}

static enum status read_sizes(struct model_config *out, const struct family *family,
                              const json_t *json, const char *where)
{
    TRY(json_get_i32(&out->hidden, json, "hidden_size", 1, HIDDEN_MAX, where));
    TRY(json_get_i32(&out->n_layers, json, "num_hidden_layers", 1, LAYERS_MAX, where));
    TRY(read_heads(out, family, json, where));
    TRY(json_get_i32(&out->ffn, json, "intermediate_size", 1, WIDTH_MAX, where));
    TRY(json_get_i32(&out->vocab, json, "vocab_size", 2, VOCAB_MAX, where));
    TRY(json_get_i32_or(&out->context, json, "max_position_embeddings", 1, MODEL_CONTEXT_MAX,
                        family->context, where));
    double eps = family->eps;
    TRY(json_get_f64_or(&eps, json, family->eps_key, family->eps, where));
    if (!(eps > 0 && eps < 1)) {
        FAIL(ST_FORMAT, "%s: %s is %g, expected a number between 0 and 1", where, family->eps_key,
             eps);
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
        return model_refuse(
            where, "quantization_config.quant_method", method,
            "\"pmpd\" or an unquantised model: take the original and run `pmpd quantize`");
    }
    const json_t *version = json_member(quant, "format_version");
    if (!json_is_integer(version) || json_integer_value(version) != NESTED_FORMAT_VERSION) {
        return model_refuse(where, "quantization_config.format_version", version,
                            "1; quantise the model again, or use a newer pmpd");
    }
    TRY(json_get_i32(&out->group_cols, quant, "group_size", 1, WIDTH_MAX, where));
    if (out->group_cols != 32 && out->group_cols != 64 && out->group_cols != 128) {
        return model_refuse(where, "quantization_config.group_size",
                            json_member(quant, "group_size"), "32, 64 or 128");
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
    const struct family *family = NULL;
    *out = (struct model_config){.bos = -1};
    TRY(read_family(out, &family, json, where));
    out->norm = family->norm_kind;
    out->parallel = family->parallel;
    out->biased = family->biased;
    out->head_bias = family->head_bias;
    TRY(read_switches(out, family, json, where));
    TRY(read_activation(out, family, json, where));
    TRY(check_absent(json, where));
    TRY(read_sizes(out, family, json, where));
    TRY(check_window(out, family, json, where));
    TRY(model_read_rope(out, family, json, where));
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
            if (!model_has_role(config, (enum matrix_role)role)) {
                continue;
            }
            model_matrix_name(name, config, layer, (enum matrix_role)role);
            TRY(nested_index_get(index, name, &n_cols, kinds));
            uint32_t held = 0;
            for (int b = 1; b <= BITS_MAX; b++) {
                held |= kinds[b] != LEVEL_NONE ? 1u << b : 0;
            }
            common &= held;
        }
    }
    if (common == 0) {
        FAIL(ST_FORMAT,
             "%s: the linears of quantization_config have no precision in common; quantise the "
             "model again",
             index->where);
    }
    *mask = common;
    return ST_OK;
}
