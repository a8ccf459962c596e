/* pmpd inspect: what a model folder, a nested model, a run file or directory, a dataset or a
 * classifier holds.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "core/mem.h"
#include "core/runfile.h"
#include "core/tokenizer.h"
#include "core/weights.h"
#include "experiments/cmd.h"
#include "experiments/inspect_journal.h"
#include "experiments/inspect_learn.h"

static const char usage[] =
    "usage: pmpd inspect PATH [--json]\n"
    "PATH is a model folder (plain or nested), a run file (run.h5), a run directory (then also "
    "what\n"
    "its journal says: starts, finished and failed prompts, suspects), a dataset or a classifier.\n"
    "Prints contents, sizes, bits and digest. Examples:\n"
    "  pmpd inspect experiments/tiny\n"
    "  pmpd inspect results/run/run.h5 --json\n";

static bool exists(const char *dir, const char *name)
{
    char path[4096];
    struct stat st;
    int n = snprintf(path, sizeof path, "%s/%s", dir, name);
    return n > 0 && (size_t)n < sizeof path && stat(path, &st) == 0;
}

/* Weights of all linear layers of the blocks, and bytes of all tensors. */
struct model_sizes {
    double linear_weights, parameters, tensor_bytes;
    double read_bits[BITS_ALL]; /* bits read per linear weight at each precision, levels included */
};

static void add_nested_read(struct model_sizes *z, const struct model_source *src, int layer,
                            int role)
{
    const struct model_config *c = &src->config;
    char name[MODEL_NAME_BYTES];
    enum level_kind kinds[BITS_ALL];
    int32_t n_rows, n_cols, listed;
    if (!model_has_role(c, (enum matrix_role)role)) {
        return;
    }
    model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
    model_matrix_name(name, c, layer, (enum matrix_role)role);
    if (nested_index_get(src->index, name, &listed, kinds) != ST_OK) {
        return;
    }
    int32_t padded = (n_cols + c->group_cols - 1) / c->group_cols * c->group_cols;
    for (int b = 1; b <= BITS_MAX; b++) {
        if (src->held >> b & 1) {
            z->read_bits[b] +=
                8 * (double)nested_bytes_read(kinds, n_rows, padded, c->group_cols, b, 1u << b);
        }
    }
}

/* Of norms and biases. */
static double vector_parameters(const struct model_config *c)
{
    int n_norms = c->n_layers * (model_has_norm(c, NORM_MLP) ? 2 : 1) + 1;
    double n = (double)c->hidden * n_norms * (c->norm == NORM_LAYER ? 2 : 1);
    for (int role = 0; role < M_N_ROLES; role++) {
        int32_t n_rows, n_cols;
        model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
        n += c->biased >> role & 1 ? (double)c->n_layers * n_rows : 0;
    }
    return n + (c->head_bias ? c->vocab : 0);
}

static void measure(struct model_sizes *z, const struct model_source *src)
{
    const struct model_config *c = &src->config;
    *z = (struct model_sizes){0};
    for (int role = 0; role < M_N_ROLES; role++) {
        int32_t n_rows, n_cols;
        model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
        z->linear_weights += (double)c->n_layers * n_rows * n_cols;
        for (int l = 0; c->nested && l < c->n_layers; l++) {
            add_nested_read(z, src, l, role);
        }
    }
    for (int b = 1; b <= BITS_MAX; b++) {
        z->read_bits[b] /= z->linear_weights;
    }
    z->parameters = z->linear_weights + vector_parameters(c) +
                    (double)c->vocab * c->hidden * (c->tied_head ? 1 : 2);
    for (int i = 0; i < checkpoint_n_tensors(src->ckpt); i++) {
        struct tensor t = checkpoint_tensor(src->ckpt, i);
        z->tensor_bytes += (double)tensor_bytes(&t);
    }
}

static void print_text(const struct model_source *src, const struct model_sizes *z,
                       const char *folder, const char *digest, const char *tokenizer)
{
    const struct model_config *c = &src->config;
    printf("%s\n", folder);
    printf("  kind         %s model, family %s\n", c->nested ? "nested" : "dense",
           model_family_name(c->family));
    printf("  shape        %d layers, hidden %d, ffn %d, vocabulary %d\n", c->n_layers, c->hidden,
           c->ffn, c->vocab);
    printf("  attention    %d heads, %d KV heads, head_dim %d, rope_theta %g\n", c->n_heads,
           c->n_kv_heads, c->head_dim, c->rope_theta);
    if (c->rope_scaling.kind != ROPE_DEFAULT || c->rot_dim != c->head_dim) {
        printf("  rotation     %d of %d dimensions, %s scaling\n", c->rot_dim, c->head_dim,
               rope_kind_name(c->rope_scaling.kind));
    }
    printf("  context      %d tokens\n", c->context);
    printf("  head         %s%s\n", c->tied_head ? "tied to the embedding" : "separate",
           c->nested_head ? ", stored nested" : "");
    printf("  tokenizer    %s\n", tokenizer);
    printf("  parameters   %.0f (%.0f in linear layers)\n", z->parameters, z->linear_weights);
    printf("  tensors      %d, %.0f bytes\n", checkpoint_n_tensors(src->ckpt), z->tensor_bytes);
    if (c->nested) {
        printf("  method       %s, group %d, %d planes\n", c->method, c->group_cols, c->n_planes);
        for (int b = 1; b <= BITS_MAX; b++) {
            if (src->held >> b & 1) {
                printf("  level %d      reads %.3f bits per linear weight\n", b, z->read_bits[b]);
            }
        }
    } else {
        printf("  weights      %d bits\n", src->dense_bits);
    }
    printf("  digest       %s\n", digest);
}

static void print_json(const struct model_source *src, const struct model_sizes *z,
                       const char *folder, const char *digest, const char *tokenizer)
{
    const struct model_config *c = &src->config;
    json_t *levels = json_object();
    for (int b = 1; b <= BITS_MAX; b++) {
        char key[8];
        snprintf(key, sizeof key, "%d", b);
        if (src->held >> b & 1) {
            json_object_set_new(levels, key, json_real(z->read_bits[b]));
        }
    }
    json_t *out = json_pack(
        "{s:s, s:s, s:s, s:b, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:b, s:s, "
        "s:f, s:f, s:i, s:f, "
        "s:i, s:i, s:o, s:s}",
        "path", folder, "kind", c->nested ? "nested" : "dense", "family",
        model_family_name(c->family), "nested", c->nested, "n_layers", c->n_layers, "hidden",
        c->hidden, "ffn", c->ffn, "vocab", c->vocab, "n_heads", c->n_heads, "n_kv_heads",
        c->n_kv_heads, "head_dim", c->head_dim, "context", c->context, "rope_theta", c->rope_theta,
        "tied_head", c->tied_head, "tokenizer", tokenizer, "parameters", z->parameters,
        "linear_weights", z->linear_weights, "n_tensors", checkpoint_n_tensors(src->ckpt),
        "tensor_bytes", z->tensor_bytes, "group", c->nested ? c->group_cols : 0, "planes",
        c->nested ? c->n_planes : 0, "bits_read_per_weight", levels, "digest", digest);
    json_dumpf(out, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    json_decref(out);
    printf("\n");
}

static enum status inspect_model(const char *folder, bool as_json)
{
    struct model_source src;
    struct model_sizes sizes;
    struct tokenizer *tok = NULL;
    char digest[DIGEST_TEXT];
    enum status st = ST_OK;
    TRY(model_source_open(&src, folder));
    TRY_GOTO(st, checkpoint_digest(src.ckpt, folder, digest), done);
    measure(&sizes, &src);
    const char *kind = "none (no tokenizer that is understood)";
    if (tokenizer_open(&tok, folder, src.config.vocab) == ST_OK) {
        kind = tokenizer_kind(tok);
    }
    (as_json ? print_json : print_text)(&src, &sizes, folder, digest, kind);
    tokenizer_close(&tok);
done:
    model_source_close(&src);
    return st;
}

static enum status inspect_file(const char *path, bool as_json)
{
    char *text = NULL;
    bool known = false;
    enum status st = inspect_learn(path, as_json, &known);
    if (known) {
        return st;
    }
    TRY(runfile_describe(&text, path, as_json));
    printf("%s\n", text);
    mem_free(text);
    return ST_OK;
}

/* The run file, where there is one already, and the journal, where it was left. */
static enum status inspect_directory(const char *dir, bool as_json)
{
    char file[4096], *text = NULL;
    json_t *journal = NULL, *all = NULL;
    enum status st = ST_OK;
    if (exists(dir, "run.h5")) {
        snprintf(file, sizeof file, "%s/run.h5", dir);
        TRY_GOTO(st, runfile_describe(&text, file, as_json), done);
    }
    if (exists(dir, "journal.bin")) {
        TRY_GOTO(st, inspect_journal(&journal, dir), done);
    }
    if (!as_json) {
        printf("%s%s", text ? text : "", text ? "\n" : "");
        if (journal) {
            inspect_journal_print(journal, dir);
        }
        goto done;
    }
    all = text ? json_loads(text, 0, NULL) : json_pack("{s:s, s:s}", "kind", "run", "path", dir);
    if (all && journal) {
        json_object_set(all, "journal", journal);
    }
    json_dumpf(all, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    printf("\n");
done:
    json_decref(all);
    json_decref(journal);
    mem_free(text);
    return st;
}

enum status cmd_inspect(int argc, char **argv)
{
    const char *path = NULL;
    bool as_json = false;
    struct stat st;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(usage, stdout);
            return ST_OK;
        }
        if (strcmp(argv[i], "--json") == 0) {
            as_json = true;
        } else if (argv[i][0] == '-' || path) {
            FAIL(ST_USER, "inspect takes one PATH and --json, found \"%s\"", argv[i]);
        } else {
            path = argv[i];
        }
    }
    if (!path) {
        FAIL(ST_USER, "inspect needs a PATH: a model folder, a run file or a run directory");
    }
    if (stat(path, &st) != 0) {
        FAIL(ST_IO, "cannot read %s: %m", path);
    }
    if (!S_ISDIR(st.st_mode)) {
        return inspect_file(path, as_json);
    }
    if (exists(path, "config.json")) {
        return inspect_model(path, as_json);
    }
    if (exists(path, "run.h5") || exists(path, "journal.bin")) {
        return inspect_directory(path, as_json);
    }
    FAIL(ST_USER, "%s holds neither config.json (a model) nor run.h5 or journal.bin (a run)", path);
}
