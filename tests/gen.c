/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/gen.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "core/checkpoint.h"
#include "core/mem.h"
#include "core/model.h"

/* ---- numbers ---- */

uint64_t gen_next(struct gen_rng *rng)
{
    uint64_t z = rng->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint32_t gen_below(struct gen_rng *rng, uint32_t n)
{
    return (uint32_t)((gen_next(rng) >> 32) * n >> 32);
}

double gen_uniform(struct gen_rng *rng)
{
    return (double)(gen_next(rng) >> 11) * 0x1p-53;
}

double gen_normal(struct gen_rng *rng)
{
    // twelve uniforms: variance 1 by sums alone, so no libm can make two machines differ
    double sum = -6;
    for (int i = 0; i < 12; i++) {
        sum += gen_uniform(rng);
    }
    return sum;
}

/* ---- files ---- */

static void die(const char *what, const char *path)
{
    fprintf(stderr, "test set-up: cannot %s %s: %s\n", what, path, strerror(errno));
    exit(1);
}

void gen_folder(char path[GEN_PATH_BYTES])
{
    const char *base = getenv("TMPDIR");
    snprintf(path, GEN_PATH_BYTES, "%.400s/pmpd-test-XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(path)) {
        die("make", path);
    }
}

const char *gen_path(char path[GEN_PATH_BYTES], const char *folder, const char *file)
{
    int n = snprintf(path, GEN_PATH_BYTES, "%s/%s", folder, file);
    INVARIANT(n > 0 && n < GEN_PATH_BYTES);
    return path;
}

void gen_write_file(const char *path, const void *data, size_t bytes)
{
    unlink(path); // truncating an old file instead makes some file systems flush at once
    FILE *f = fopen(path, "wb");
    if (!f || (bytes && fwrite(data, 1, bytes, f) != bytes) || fclose(f) != 0) {
        die("write", path);
    }
}

char *gen_read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    struct stat info;
    if (!f || fstat(fileno(f), &info) != 0) {
        if (f) {
            fclose(f);
        }
        return NULL;
    }
    char *text = malloc((size_t)info.st_size + 1);
    if (!text || fread(text, 1, (size_t)info.st_size, f) != (size_t)info.st_size) {
        die("read", path);
    }
    text[info.st_size] = '\0';
    *bytes = (size_t)info.st_size;
    fclose(f);
    return text;
}

void gen_remove(const char *path)
{
    struct stat info;
    if (lstat(path, &info) != 0) {
        return;
    }
    DIR *dir = S_ISDIR(info.st_mode) ? opendir(path) : NULL;
    if (!dir) {
        unlink(path);
        return;
    }
    struct dirent *entry;
    while ((entry = readdir(dir))) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            char inner[GEN_PATH_BYTES + 256];
            snprintf(inner, sizeof inner, "%.500s/%s", path, entry->d_name);
            gen_remove(inner);
        }
    }
    closedir(dir);
    rmdir(path);
}

void gen_put_text(const char *folder, const char *file, const char *text)
{
    char path[GEN_PATH_BYTES];
    gen_write_file(gen_path(path, folder, file), text, strlen(text));
}

void gen_drop(const char *folder, const char *file)
{
    char path[GEN_PATH_BYTES];
    gen_remove(gen_path(path, folder, file));
}

size_t gen_safetensors(unsigned char *out, const char *header, size_t n_data, size_t shift)
{
    size_t n = strlen(header), padded = (n + 7) / 8 * 8 + shift;
    for (int i = 0; i < 8; i++) {
        out[i] = (unsigned char)((uint64_t)padded >> 8 * i);
    }
    memcpy(out + 8, header, n);
    memset(out + 8 + n, ' ', padded - n);
    for (size_t i = 0; i < n_data; i++) {
        out[8 + padded + i] = (unsigned char)(i + 1);
    }
    return 8 + padded + n_data;
}

/* ---- models ---- */

struct gen_model gen_model_default(void)
{
    return (struct gen_model){
        .hidden = 64,
        .n_layers = 2,
        .n_heads = 4,
        .n_kv_heads = 2,
        .head_dim = 16,
        .ffn = 160,
        .vocab = 288,
        .context = 128,
        .rope_theta = 10000,
        .norm_eps = 1e-5,
        .dtype = DT_F32,
        .tokenizer = true,
        .bos = 256,
        .eos = 257,
        .n_shards = 1,
        .seed = 1,
    };
}

struct weight {
    char name[MODEL_NAME_BYTES + 16];
    int32_t n_rows, n_cols; /* n_rows 0: a gain of n_cols */
    double spread;
};

static uint16_t f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static struct tensor weight_shape(const struct weight *w, enum dtype dtype)
{
    return w->n_rows ? tensor_2d(NULL, dtype, w->n_rows, w->n_cols)
                     : tensor_1d(NULL, dtype, w->n_cols);
}

static void weight_fill(const struct weight *w, const struct gen_model *m, void *out)
{
    struct gen_rng rng = {.state = m->seed};
    for (const char *c = w->name; *c; c++) {
        rng.state = gen_next(&rng) ^ (unsigned char)*c;
    }
    size_t n = (size_t)(w->n_rows ? w->n_rows : 1) * (size_t)w->n_cols;
    for (size_t i = 0; i < n; i++) {
        float value = (float)((w->n_rows ? 0 : 1) + w->spread * gen_normal(&rng));
        if (m->dtype == DT_F32) {
            ((float *)out)[i] = value;
        } else {
            ((uint16_t *)out)[i] = m->dtype == DT_F16 ? f32_to_f16(value) : f32_to_bf16(value);
        }
    }
}

static void add_weight(struct weight *list, int *n, const char *name, const char *suffix,
                       int32_t n_rows, int32_t n_cols, double spread)
{
    struct weight *w = &list[(*n)++];
    snprintf(w->name, sizeof w->name, "%s%s", name, suffix);
    w->n_rows = n_rows;
    w->n_cols = n_cols;
    w->spread = spread;
}

static int list_weights(struct weight *list, const struct gen_model *m)
{
    const struct model_config c = {.family = FAMILY_LLAMA,
                                   .hidden = m->hidden,
                                   .ffn = m->ffn,
                                   .n_layers = m->n_layers,
                                   .n_heads = m->n_heads,
                                   .n_kv_heads = m->n_kv_heads,
                                   .head_dim = m->head_dim};
    int n = 0;
    char name[MODEL_NAME_BYTES];
    double wide = 1 / sqrt((double)m->hidden);
    add_weight(list, &n, MODEL_EMBED_NAME, "", m->vocab, m->hidden, m->tied ? 2 * wide : 1);
    for (int layer = 0; layer < m->n_layers; layer++) {
        for (int role = 0; role < M_N_ROLES; role++) {
            int32_t rows = 0, cols = 0;
            model_matrix_shape(&c, (enum matrix_role)role, &rows, &cols);
            model_matrix_name(name, &c, layer, (enum matrix_role)role);
            add_weight(list, &n, name, ".weight", rows, cols, 1 / sqrt((double)cols));
        }
        for (int norm = NORM_ATTENTION; norm < NORM_FINAL; norm++) {
            model_norm_name(name, &c, layer, (enum model_norm)norm);
            add_weight(list, &n, name, "", 0, m->hidden, 0.2);
        }
    }
    model_norm_name(name, &c, 0, NORM_FINAL);
    add_weight(list, &n, name, "", 0, m->hidden, 0.2);
    if (!m->tied) {
        add_weight(list, &n, MODEL_HEAD_NAME, ".weight", m->vocab, m->hidden, 2 * wide);
    }
    return n;
}

/* Shard s holds every n_shards-th tensor, so that no shard is a run of neighbours. */
static enum status write_shard(const char *path, const struct gen_model *m,
                               const struct weight *list, int n, int s)
{
    struct checkpoint_writer *writer = NULL;
    void *data = NULL;
    enum status st = ST_OK;
    size_t largest = 0;
    TRY(checkpoint_writer_create(&writer, path));
    for (int i = s; i < n; i += m->n_shards) {
        struct tensor t = weight_shape(&list[i], m->dtype);
        TRY_GOTO(st, checkpoint_writer_announce(writer, list[i].name, &t), done);
        largest = tensor_bytes(&t) > largest ? tensor_bytes(&t) : largest;
    }
    TRY_GOTO(st, mem_alloc_array(&data, largest, 1), done);
    for (int i = s; i < n; i += m->n_shards) {
        struct tensor t = weight_shape(&list[i], m->dtype);
        weight_fill(&list[i], m, data);
        TRY_GOTO(st, checkpoint_writer_bytes(writer, data, tensor_bytes(&t)), done);
    }
    TRY_GOTO(st, checkpoint_writer_finish(writer), done);
done:
    mem_free(data);
    checkpoint_writer_destroy(&writer);
    return st;
}

static enum status write_json(const char *folder, const char *file, json_t *json)
{
    char path[GEN_PATH_BYTES];
    int failed = json ? json_dump_file(json, gen_path(path, folder, file), JSON_INDENT(2)) : -1;
    json_decref(json);
    if (failed) {
        FAIL(ST_IO, "cannot write %s/%s", folder, file);
    }
    return ST_OK;
}

static enum status write_weights(const char *folder, const struct gen_model *m,
                                 const struct weight *list, int n)
{
    char path[GEN_PATH_BYTES], file[64];
    if (m->n_shards == 1) {
        TRY(write_shard(gen_path(path, folder, "model.safetensors"), m, list, n, 0));
        return ST_OK;
    }
    json_t *map = json_object();
    enum status st = ST_OK;
    for (int s = 0; s < m->n_shards; s++) {
        snprintf(file, sizeof file, "model-%05d-of-%05d.safetensors", s + 1, m->n_shards);
        TRY_GOTO(st, write_shard(gen_path(path, folder, file), m, list, n, s), failed);
        for (int i = s; i < n; i += m->n_shards) {
            json_object_set_new(map, list[i].name, json_string(file));
        }
    }
    return write_json(folder, "model.safetensors.index.json",
                      json_pack("{s:{}, s:o}", "metadata", "weight_map", map));
failed:
    json_decref(map);
    return st;
}

static enum status write_config(const char *folder, const struct gen_model *m)
{
    static const char *const dtypes[DT_N] = {
        [DT_F32] = "float32",
        [DT_F16] = "float16",
        [DT_BF16] = "bfloat16",
    };
    json_t *json = json_pack(
        "{s:[s], s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:s, s:b, s:s, s:b, s:b, "
        "s:n}",
        "architectures", "LlamaForCausalLM", "model_type", "llama", "hidden_size", m->hidden,
        "num_hidden_layers", m->n_layers, "num_attention_heads", m->n_heads, "num_key_value_heads",
        m->n_kv_heads, "head_dim", m->head_dim, "intermediate_size", m->ffn, "vocab_size", m->vocab,
        "max_position_embeddings", m->context, "rope_theta", m->rope_theta, "rms_norm_eps",
        m->norm_eps, "hidden_act", "silu", "tie_word_embeddings", m->tied, "torch_dtype",
        dtypes[m->dtype], "attention_bias", false, "mlp_bias", false, "rope_scaling");
    json_t *generation = json_object();
    if (m->bos >= 0) {
        json_object_set_new(json, "bos_token_id", json_integer(m->bos));
        json_object_set_new(generation, "bos_token_id", json_integer(m->bos));
    }
    if (m->eos >= 0) {
        json_object_set_new(json, "eos_token_id", json_integer(m->eos));
        json_object_set_new(generation, "eos_token_id", json_integer(m->eos));
    }
    enum status st = write_json(folder, "config.json", json);
    enum status st_generation = write_json(folder, "generation_config.json", generation);
    return st != ST_OK ? st : st_generation;
}

/* GPT-2's printable stand-ins: bytes that print stand for themselves, the others follow 255. */
static void byte_token(char text[4], int byte)
{
    int code = byte;
    bool prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    if (!prints) {
        code = 256;
        for (int b = 0; b < byte; b++) {
            code += !((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174);
        }
    }
    if (code < 0x80) {
        text[0] = (char)code;
        text[1] = '\0';
    } else {
        text[0] = (char)(0xc0 | code >> 6);
        text[1] = (char)(0x80 | (code & 0x3f));
        text[2] = '\0';
    }
}

static json_t *added_token(int id, const char *text)
{
    return json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", id, "content", text,
                     "single_word", false, "lstrip", false, "rstrip", false, "normalized", false,
                     "special", true);
}

static enum status write_tokenizer(const char *folder, const struct gen_model *m)
{
    if (m->vocab < 258) {
        FAIL(ST_USER, "a byte tokenizer needs a vocabulary of 258, found %d", m->vocab);
    }
    json_t *vocab = json_object();
    char text[4];
    for (int b = 0; b < 256; b++) {
        byte_token(text, b);
        json_object_set_new(vocab, text, json_integer(b));
    }
    json_object_set_new(vocab, "<s>", json_integer(256));
    json_object_set_new(vocab, "</s>", json_integer(257));
    json_t *split = json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space",
                              false, "trim_offsets", true, "use_regex", true);
    json_t *model =
        json_pack("{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:o, s:[]}", "type", "BPE", "dropout",
                  "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", false,
                  "byte_fallback", false, "vocab", vocab, "merges");
    json_t *post =
        json_pack("{s:s, s:[{s:{s:s, s:i}}, {s:{s:s, s:i}}], s:[{s:{s:s, s:i}}, {s:{s:s, s:i}}],"
                  " s:{s:{s:s, s:[i], s:[s]}}}",
                  "type", "TemplateProcessing", "single", "SpecialToken", "id", "<s>", "type_id", 0,
                  "Sequence", "id", "A", "type_id", 0, "pair", "Sequence", "id", "A", "type_id", 0,
                  "Sequence", "id", "B", "type_id", 1, "special_tokens", "<s>", "id", "<s>", "ids",
                  256, "tokens", "<s>");
    return write_json(folder, "tokenizer.json",
                      json_pack("{s:s, s:n, s:n, s:[o, o], s:n, s:o, s:o, s:O, s:o}", "version",
                                "1.0", "truncation", "padding", "added_tokens",
                                added_token(256, "<s>"), added_token(257, "</s>"), "normalizer",
                                "pre_tokenizer", split, "post_processor", post, "decoder", split,
                                "model", model));
}

enum status gen_model_write(const char *folder, const struct gen_model *m)
{
    struct weight *list = NULL;
    TRY(MEM_NEW(&list, 3 + (M_N_ROLES + 2) * m->n_layers));
    int n = list_weights(list, m);
    enum status st = write_weights(folder, m, list, n);
    mem_free(list);
    TRY(st);
    TRY(write_config(folder, m));
    if (m->tokenizer) {
        TRY(write_tokenizer(folder, m));
    }
    return ST_OK;
}
