/* First inputs for the entries whose formats are ours and binary, or too long to write by hand:
 * fuzz_seeds FOLDER writes the folders trace, journal and model in FOLDER. run.sh adds them to the
 * corpora, so that a new version of a format is known at once. SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "core/bitplane.h"
#include "core/trace.h"
#include "dist/journal.h"
#include "tests/fuzz/fuzz.h"
#include "tests/gen.h"

static const char *out;

static void put(const char *entry, const char *name, const void *data, size_t bytes)
{
    char folder[GEN_PATH_BYTES], path[GEN_PATH_BYTES];
    mkdir(gen_path(folder, out, entry), 0777);
    gen_write_file(gen_path(path, folder, name), data, bytes);
}

/* ---- records ---- */

static size_t pack(void *buf, size_t capacity, int64_t ordinal, int kind)
{
    struct turn_record turns[2] = {
        {.n_prompt_tok = 3, .n_new_tok = 3, .n_steps = 2, .n_switches = 1, .prefill_s = 1},
        {.n_prompt_tok = 2,
         .n_new_tok = 2,
         .finish = FINISH_LENGTH,
         .n_steps = 1,
         .n_switches = 2}};
    struct step_record steps[3] = {
        {.level = 1, .logprob = -1}, {.step = 1, .pass = 1}, {.turn = 1}};
    struct plan_switch switches[3] = {{0, 1}, {0, 0}, {1, 1}};
    struct pass_record passes[2] = {{.n_tok = 3, .time_us = 10, .weight_bytes = 100},
                                    {.pass = 1, .kind = PASS_DECODE, .n_slots = 1, .time_us = 5}};
    float features[2 * 2 * 3] = {1, 2, 3};
    struct finished_record r = {.ordinal = ordinal,
                                .key = {1, 2},
                                .attempt = 1,
                                .wall_s = 1,
                                .n_turns = kind ? 2 : 1,
                                .n_steps = kind ? 3 : 2,
                                .n_switches = kind ? 3 : 1,
                                .n_passes = kind ? 2 : 0,
                                .n_feature_tok = kind > 1 ? 2 : 0,
                                .feature_dim = kind > 1 ? 3 : 0,
                                .turns = turns,
                                .steps = steps,
                                .switches = switches,
                                .passes = passes,
                                .features = features};
    trace_pack(buf, capacity, &r);
    return trace_packed_bytes(&r);
}

static void add(struct journal *j, uint32_t kind, const void *payload, size_t bytes)
{
    INVARIANT(journal_append(j, kind, payload, bytes, false) == ST_OK);
}

static void journals(void)
{
    char folder[GEN_PATH_BYTES], path[GEN_PATH_BYTES];
    unsigned char buf[1024];
    struct journal *j = NULL;
    struct journal_run run = {.epoch = 0, .unix_s = 1};
    struct journal_start start = {.ordinal = 1, .key = {1, 2}, .attempt = 1};
    struct journal_failed failed = {.ordinal = 2, .key = {1, 2}, .attempts = 2, .reason = "why"};
    for (int kind = 0; kind < 3; kind++) {
        gen_folder(folder);
        INVARIANT(journal_open(&j, folder, NULL, NULL) == ST_OK);
        add(j, JOURNAL_RUN, buf, journal_pack_run(buf, &run));
        for (int64_t i = 0; i < kind; i++) {
            add(j, JOURNAL_START, buf, journal_pack_start(buf, &start));
            size_t n = pack(buf, sizeof buf, i, (int)i + 1);
            put("trace", i ? "features" : "turns", buf, n);
            add(j, JOURNAL_FINISHED, buf, n);
        }
        add(j, JOURNAL_FAILED, buf, journal_pack_failed(buf, &failed));
        add(j, JOURNAL_STATE, "state", 5);
        journal_close(&j);
        size_t bytes = 0;
        char *text = gen_read_file(gen_path(path, folder, "journal.bin"), &bytes);
        char name[2] = {(char)('0' + kind), '\0'};
        put("journal", name, text, bytes);
        free(text);
        gen_remove(folder);
    }
    put("trace", "steps", buf, pack(buf, sizeof buf, 0, 0));
}

/* ---- models ---- */

static void tensor(json_t *header, const char *name, const char *part, const char *dtype, int rank,
                   int d0, int d1, int d2)
{
    char full[192];
    json_t *shape = json_pack("[i, i, i]", d0, d1, d2);
    for (int i = 3; i > rank; i--) {
        json_array_remove(shape, (size_t)i - 1);
    }
    snprintf(full, sizeof full, "%s.%s", name, part);
    json_object_set_new(
        header, full,
        json_pack("{s:s, s:o, s:[i, i]}", "dtype", dtype, "shape", shape, "data_offsets", 0, 0));
}

/* One nested linear with a kind of levels for each precision from 2 to n_planes. */
static void nested(json_t *header, json_t *linears, const char *name, int rows, int cols,
                   int n_planes, const enum level_kind kinds[BITS_ALL])
{
    char part[32];
    int groups = (cols + 31) / 32;
    json_t *levels = json_object();
    tensor(header, name, "planes", "U8", 3, n_planes, rows, groups * 4);
    for (int b = 2; b <= n_planes; b++) {
        enum level_kind kind = kinds[b];
        if (kind == LEVEL_NONE) {
            continue;
        }
        snprintf(part, sizeof part, "%d", b);
        json_object_set_new(levels, part, json_string(level_kind_name(kind)));
        if (kind == LEVEL_LUT) {
            snprintf(part, sizeof part, "lut.%d", b);
            tensor(header, name, part, "F16", 2, rows, 1 << b, 0);
            continue;
        }
        snprintf(part, sizeof part, "offset.%d", b);
        tensor(header, name, part, "F16", 2, rows, groups, 0);
        snprintf(part, sizeof part, "%s.%d", kind == LEVEL_FREE ? "alpha" : "scale", b);
        tensor(header, name, part, "F16", kind == LEVEL_FREE ? 3 : 2, rows, groups, b);
        if (kind == LEVEL_TAIL) {
            tensor(header, name, "tail.8", "F16", 2, rows, groups, 0);
        }
    }
    json_object_set_new(linears, name, json_pack("{s:i, s:o}", "n_cols", cols, "levels", levels));
}

struct role {
    const char *name;
    int rows, cols;
};

/* Both files in one input, the header's offsets filled in. */
static void put_model(const char *name, json_t *config, json_t *header)
{
    char *a = json_dumps(config, JSON_COMPACT), *b = json_dumps(header, JSON_COMPACT);
    INVARIANT(a && b);
    size_t n_a = strlen(a), room = n_a + 1 + 2 * strlen(b);
    char *both = malloc(room);
    INVARIANT(both != NULL);
    memcpy(both, a, n_a);
    both[n_a] = (char)0xFF;
    memcpy(both + n_a + 1, b, strlen(b));
    size_t n = fuzz_mend_header(both + n_a + 1, strlen(b), room - n_a - 1);
    INVARIANT(n > 0);
    put("model", name, both, n_a + 1 + n);
    free(both);
    free(a);
    free(b);
    json_decref(header);
    json_decref(config);
}

static json_t *model_config(const char *type)
{
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:b}", "model_type", type,
                     "hidden_size", 32, "num_hidden_layers", 1, "num_attention_heads", 2,
                     "num_key_value_heads", 1, "head_dim", 4, "intermediate_size", 6, "vocab_size",
                     5, "tie_word_embeddings", 1);
}

/* kind 0: plain; 1: tied levels; 2: all kinds of levels, and a nested head. */
static void llama(int kind)
{
    static const enum level_kind tied[BITS_ALL] = {[2] = LEVEL_TIED, [3] = LEVEL_TIED};
    static const enum level_kind all[BITS_ALL] = {
        [2] = LEVEL_LUT, [3] = LEVEL_FREE, [8] = LEVEL_TAIL};
    static const struct role roles[] = {{"self_attn.q_proj", 8, 32}, {"self_attn.k_proj", 4, 32},
                                        {"self_attn.v_proj", 4, 32}, {"self_attn.o_proj", 32, 8},
                                        {"mlp.gate_proj", 6, 32},    {"mlp.up_proj", 6, 32},
                                        {"mlp.down_proj", 32, 6}};
    json_t *header = json_object(), *linears = json_object(), *config = model_config("llama");
    char name[128];
    int n_planes = kind == 2 ? 8 : 3;
    for (size_t r = 0; r < sizeof roles / sizeof roles[0]; r++) {
        snprintf(name, sizeof name, "model.layers.0.%s", roles[r].name);
        if (kind) {
            nested(header, linears, name, roles[r].rows, roles[r].cols, n_planes,
                   kind == 2 ? all : tied);
        } else {
            tensor(header, name, "weight", "F16", 2, roles[r].rows, roles[r].cols, 0);
        }
    }
    tensor(header, "model.embed_tokens", "weight", "F16", 2, 5, 32, 0);
    tensor(header, "model.layers.0.input_layernorm", "weight", "F16", 1, 32, 0, 0);
    tensor(header, "model.layers.0.post_attention_layernorm", "weight", "F16", 1, 32, 0, 0);
    tensor(header, "model.norm", "weight", "F32", 1, 32, 0, 0);
    if (kind == 2) {
        nested(header, linears, "lm_head", 5, 32, n_planes, tied);
    }
    if (kind) {
        json_object_set_new(config, "quantization_config",
                            json_pack("{s:s, s:i, s:s, s:i, s:i, s:O}", "quant_method", "pmpd",
                                      "format_version", 1, "method", "joint", "group_size", 32,
                                      "n_planes", n_planes, "linears", linears));
    }
    put_model(kind == 0 ? "plain" : kind == 1 ? "tied" : "kinds", config, header);
    json_decref(linears);
}

/* Layer norms, biases everywhere, no gate. */
static void phi(void)
{
    static const struct role roles[] = {
        {"layers.0.self_attn.q_proj", 8, 32}, {"layers.0.self_attn.k_proj", 4, 32},
        {"layers.0.self_attn.v_proj", 4, 32}, {"layers.0.self_attn.dense", 32, 8},
        {"layers.0.mlp.fc1", 6, 32},          {"layers.0.mlp.fc2", 32, 6},
        {"layers.0.input_layernorm", 32, 0},  {"final_layernorm", 32, 0}};
    json_t *header = json_object();
    char name[128];
    for (size_t r = 0; r < sizeof roles / sizeof roles[0]; r++) {
        snprintf(name, sizeof name, "model.%s", roles[r].name);
        tensor(header, name, "weight", "F32", roles[r].cols ? 2 : 1, roles[r].rows, roles[r].cols,
               0);
        tensor(header, name, "bias", "F16", 1, roles[r].rows, 0, 0);
    }
    tensor(header, "model.embed_tokens", "weight", "F16", 2, 5, 32, 0);
    tensor(header, "lm_head", "bias", "F16", 1, 5, 0, 0);
    put_model("phi", model_config("phi"), header);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: fuzz_seeds FOLDER\n");
        return 2;
    }
    out = argv[1];
    journals();
    for (int kind = 0; kind < 3; kind++) {
        llama(kind);
    }
    phi();
    return 0;
}
