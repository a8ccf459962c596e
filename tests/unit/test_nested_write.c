/* pmpd quantize from folder to folder: what is stored, what is refused, and that nothing
 * half-written is left. The last part needs a real model: PMPD_TEST_DATA.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "core/mem.h"
#include "experiments/cmd.h"
#include "experiments/provenance.h"
#include "experiments/quantise/nested_write.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { BITS_234 = 1 << 2 | 1 << 3 | 1 << 4, WORDS_MAX = 24 };

/* The program's own comes with its build. */
const char *provenance_version(void)
{
    return "pmpd test";
}

static struct nested_options make_options(enum level_kind kind, bool tail, int32_t group,
                                          uint32_t head_bits)
{
    struct nested_options o = {
        .n_threads = 2, .version = "pmpd test", .nested_head = head_bits != 0};
    CHECK_OK(fit_spec_make(&o.spec, BITS_234, kind, tail, group, NULL));
    if (head_bits) {
        CHECK_OK(fit_spec_make(&o.head_spec, head_bits, kind, tail, group, NULL));
    }
    return o;
}

/* Entries of a folder; -1 when there is no such folder. */
static int count_entries(const char *folder)
{
    DIR *dir = opendir(folder);
    if (!dir) {
        return -1;
    }
    int n = 0;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        n += e->d_name[0] != '.';
    }
    closedir(dir);
    return n;
}

/* Runs `pmpd quantize ...` from words that end with NULL, with stdout in a file. */
static enum status run_cli(const char *stdout_path, const char *const *words)
{
    char *argv[WORDS_MAX + 1];
    int argc = 0;
    argv[argc++] = (char *)(uintptr_t) "quantize";
    for (int i = 0; words[i] && argc < WORDS_MAX; i++) {
        argv[argc++] = (char *)(uintptr_t)words[i];
    }
    argv[argc] = NULL;
    fflush(stdout);
    int keep = dup(STDOUT_FILENO), fd = open(stdout_path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(keep >= 0 && fd >= 0 && dup2(fd, STDOUT_FILENO) >= 0);
    struct env env = {.size = 1};
    enum status st = cmd_quantize(&env, argc, argv);
    fflush(stdout);
    dup2(keep, STDOUT_FILENO);
    close(keep);
    close(fd);
    return st;
}
#define CLI(...) run_cli("/dev/null", (const char *const[]){__VA_ARGS__, NULL})

/* ---- what is stored ---- */

struct pair { /* the dense model and the nested one made from it */
    struct checkpoint *dense, *nested;
    struct nested_index *index;
    struct model_config config;
};

static void open_pair(struct pair *p, const char *dense, const char *nested)
{
    *p = (struct pair){0};
    CHECK_OK(checkpoint_open(&p->dense, dense));
    CHECK_OK(checkpoint_open(&p->nested, nested));
    CHECK_OK(model_config_read(&p->config, nested));
    CHECK_OK(nested_index_read(&p->index, nested));
}

static void close_pair(struct pair *p)
{
    checkpoint_close(&p->dense);
    checkpoint_close(&p->nested);
    nested_index_destroy(&p->index);
}

/* Adds squared differences and powers of one matrix, by the stored weights of core/bitplane.h. */
static void add_error(const struct pair *p, const char *source, const char *name, int32_t n_rows,
                      const enum level_kind kinds[BITS_ALL], struct fit_report *sum)
{
    enum level_kind held[BITS_ALL];
    int32_t n_cols = 0;
    struct nested_source s;
    struct tensor w;
    float *row = NULL;
    CHECK_OK(nested_index_get(p->index, name, &n_cols, held));
    CHECK(memcmp(held, kinds, sizeof held) == 0);
    CHECK_OK(checkpoint_get_nested(p->nested, name, held, n_rows, n_cols, p->config.group_cols,
                                   p->config.n_planes, &s));
    CHECK_OK(checkpoint_get_shape(p->dense, source, n_rows, n_cols, &w));
    CHECK_OK(MEM_NEW(&row, n_cols));
    for (int32_t i = 0; i < n_rows; i++) {
        struct tensor one = tensor_rows(&w, i, i + 1);
        floats_from(row, one.data, one.dtype, (size_t)n_cols);
        for (int32_t j = 0; j < n_cols; j++) {
            sum->power += (double)row[j] * (double)row[j];
            for (int b = 1; b <= BITS_MAX; b++) {
                if (held[b] != LEVEL_NONE) {
                    double d = (double)row[j] - (double)bitplane_weight(&s, i, j, b);
                    sum->error[b] += d * d;
                }
            }
        }
    }
    mem_free(row);
}

/* The report of one role against the files. */
static void check_role(const struct pair *p, enum matrix_role role, const struct nested_report *r,
                       const struct fit_spec *spec)
{
    struct fit_report sum = {0};
    int32_t n_rows, n_cols;
    model_matrix_shape(&p->config, role, &n_rows, &n_cols);
    for (int layer = 0; layer < p->config.n_layers; layer++) {
        char name[MODEL_NAME_BYTES], source[MODEL_NAME_BYTES + 8];
        model_matrix_name(name, &p->config, layer, role);
        snprintf(source, sizeof source, "%s.weight", name);
        add_error(p, source, name, n_rows, spec->kind, &sum);
    }
    CHECK(r->role[role].fit.n_weights == (int64_t)n_rows * n_cols * p->config.n_layers);
    for (int b = 1; b <= BITS_MAX; b++) {
        CHECK_NEAR(fit_report_relative(&sum, b), fit_report_relative(&r->role[role].fit, b), 1e-6);
    }
    CHECK(fit_report_relative(&sum, 4) > 0.01 && fit_report_relative(&sum, 4) < 0.13);
}

/* Every value of a dense tensor of the nested model is the source's, rounded once. */
static void check_dense(const struct pair *p, const char *name, enum dtype dtype)
{
    struct tensor from, to;
    CHECK_OK(checkpoint_get(p->dense, name, &from));
    CHECK_OK(checkpoint_get(p->nested, name, &to));
    if (!CHECK(to.dtype == dtype && tensor_count(&from) == tensor_count(&to))) {
        return;
    }
    CHECK((uintptr_t)to.data % dtype_bytes(dtype) == 0);
    size_t n_bad = 0;
    for (size_t i = 0; i < tensor_count(&from); i++) {
        float x, y;
        floats_from(&x, (const char *)from.data + i * dtype_bytes(from.dtype), from.dtype, 1);
        floats_from(&y, (const char *)to.data + i * dtype_bytes(dtype), dtype, 1);
        x = dtype == DT_F16 ? f16_to_f32(f32_to_f16(x)) : x;
        n_bad += memcmp(&x, &y, sizeof x) != 0;
    }
    CHECK(n_bad == 0);
}

static void check_bytes(const char *folder, const struct nested_report *r)
{
    char path[GEN_PATH_BYTES];
    uint64_t total = 0;
    const char *const names[] = {"config.json", "generation_config.json", "tokenizer.json",
                                 "model.safetensors"};
    for (int i = 0; i < 4; i++) {
        struct stat info;
        CHECK(stat(gen_path(path, folder, names[i]), &info) == 0);
        total += (uint64_t)info.st_size;
    }
    CHECK(total == r->total_bytes);
    CHECK(count_entries(folder) == 4);
}

static void check_model(const struct gen_model *m, const struct nested_options *o)
{
    char root[GEN_PATH_BYTES], dense[GEN_PATH_BYTES], nested[GEN_PATH_BYTES], path[GEN_PATH_BYTES];
    char digest[DIGEST_TEXT];
    struct nested_report r;
    struct pair p;
    gen_folder(root);
    gen_path(dense, root, "dense");
    gen_path(nested, root, "nested");
    CHECK(mkdir(dense, 0777) == 0);
    CHECK_OK(gen_model_write(dense, m));
    CHECK_OK(nested_write(&r, dense, nested, o));
    open_pair(&p, dense, nested);
    CHECK(p.config.nested && p.config.nested_head == o->nested_head);
    CHECK(p.config.group_cols == o->spec.group_cols && p.config.n_planes == o->spec.n_planes);
    CHECK(p.config.tied_head == m->tied && p.config.hidden == m->hidden);
    CHECK(strcmp(p.config.method, nested_method_name(METHOD_JOINT, false)) == 0);
    for (int role = 0; role < M_N_ROLES; role++) {
        check_role(&p, (enum matrix_role)role, &r, &o->spec);
    }
    if (o->nested_head) {
        struct fit_report sum = {0};
        add_error(&p, m->tied ? MODEL_EMBED_NAME : MODEL_HEAD_NAME ".weight", MODEL_HEAD_NAME,
                  m->vocab, o->head_spec.kind, &sum);
        CHECK_NEAR(fit_report_relative(&sum, 4), fit_report_relative(&r.role[ROLE_HEAD].fit, 4),
                   1e-6);
        CHECK(!checkpoint_has(p.nested, MODEL_HEAD_NAME ".weight"));
    } else if (!m->tied) {
        check_dense(&p, MODEL_HEAD_NAME ".weight", DT_F16);
    }
    check_dense(&p, MODEL_EMBED_NAME, DT_F16);
    check_dense(&p, "model.norm.weight", DT_F32);
    check_dense(&p, "model.layers.1.input_layernorm.weight", DT_F32);
    CHECK_OK(checkpoint_digest(p.dense, dense, digest));
    CHECK(strcmp(digest, r.source_digest) == 0);
    size_t bytes;
    char *config = gen_read_file(gen_path(path, nested, "config.json"), &bytes);
    CHECK(config && strstr(config, digest) && strstr(config, "pmpd test"));
    free(config);
    check_bytes(nested, &r);
    close_pair(&p);
    gen_remove(root);
}

static void test_folders(void)
{
    struct gen_model m = gen_model_default();
    struct nested_options o = make_options(LEVEL_TIED, false, 64, 0);
    check_model(&m, &o); /* ffn of 160: padded to 192 */
    m.dtype = DT_BF16;
    m.n_shards = 3;
    m.tied = true;
    o = make_options(LEVEL_FREE, false, 32, BITS_234);
    check_model(&m, &o);
    m.dtype = DT_F16;
    m.tied = false;
    o = make_options(LEVEL_TIED, true, 128, 1 << 4);
    check_model(&m, &o);
}

/* Bits and bytes of the report, worked by hand for q_proj of the default model: 2 layers of 64 x
 * 64, one group of 64 per row; 3 planes: 2 * 64 * 8 * 3 bytes; tied levels of 2 and 3 bits. */
static void test_accounting(void)
{
    char root[GEN_PATH_BYTES], out[GEN_PATH_BYTES];
    struct gen_model m = gen_model_default();
    struct nested_options o = make_options(LEVEL_TIED, false, 64, 0);
    struct nested_report r;
    CHECK_OK(fit_spec_make(&o.spec, 1 << 2 | 1 << 3, LEVEL_TIED, false, 64, NULL));
    gen_folder(root);
    CHECK_OK(gen_model_write(root, &m));
    CHECK_OK(nested_write(&r, root, gen_path(out, root, "out"), &o));
    const struct role_report *q = &r.role[M_Q];
    CHECK(q->planes_bytes == 2 * 64 * 8 * 3);
    CHECK(q->levels_bytes[2] == 2 * 64 * 2 * 2 && q->levels_bytes[3] == 2 * 64 * 2 * 2);
    CHECK(q->levels_bytes[4] == 0 && q->read_bytes[4] == 0);
    CHECK(q->read_bytes[2] == 2 * 64 * (8 * 2 + 4) && q->read_bytes[3] == 2 * 64 * (8 * 3 + 4));
    CHECK(r.embed_bytes == 288 * 64 * 2 && r.head_bytes == 288 * 64 * 2);
    CHECK(r.norm_bytes == 5 * 64 * 4);
    gen_remove(root);
}

/* ---- refusals ---- */

static void write_text(const char *folder, const char *name, const char *text)
{
    char path[GEN_PATH_BYTES];
    gen_write_file(gen_path(path, folder, name), text, strlen(text));
}

static void test_existing_out(void)
{
    char root[GEN_PATH_BYTES], dense[GEN_PATH_BYTES], out[GEN_PATH_BYTES], path[GEN_PATH_BYTES];
    struct gen_model m = gen_model_default();
    struct nested_options o = make_options(LEVEL_TIED, false, 64, 0);
    struct nested_report r;
    gen_folder(root);
    gen_path(dense, root, "dense");
    gen_path(out, root, "out");
    CHECK(mkdir(dense, 0777) == 0);
    CHECK_OK(gen_model_write(dense, &m));
    CHECK_OK(nested_write(&r, dense, out, &o));
    CHECK_STATUS(nested_write(&r, dense, out, &o), ST_USER, "exists; choose another OUT");
    CHECK_STATUS(nested_write(&r, out, gen_path(path, root, "again"), &o), ST_USER,
                 "is nested already");
    CHECK(count_entries(root) == 2);

    o = make_options(LEVEL_FREE, false, 64, 0);
    o.force = true;
    CHECK_OK(nested_write(&r, dense, out, &o)); /* replaced: free levels now */
    struct pair p;
    open_pair(&p, dense, out);
    check_role(&p, M_DOWN, &r, &o.spec);
    close_pair(&p);
    CHECK(count_entries(root) == 2 && count_entries(out) == 4);

    CHECK_STATUS(nested_write(&r, dense, dense, &o), ST_USER, "is not a nested model");
    write_text(out, "notes.txt", "mine");
    CHECK_STATUS(nested_write(&r, dense, out, &o), ST_USER, "holds notes.txt");
    CHECK(count_entries(root) == 2 && count_entries(out) == 5);
    write_text(root, "file", "mine");
    CHECK_STATUS(nested_write(&r, dense, gen_path(path, root, "file"), &o), ST_USER,
                 "is not a nested model");
    gen_remove(root);
}

/* Fails with st and leaves nothing in root but the model. */
static void check_refused(const char *root, const char *dense, enum status st, const char *part)
{
    struct nested_options o = make_options(LEVEL_TIED, false, 64, 0);
    struct nested_report r;
    char out[GEN_PATH_BYTES];
    CHECK_STATUS(nested_write(&r, dense, gen_path(out, root, "out"), &o), st, part);
    CHECK(count_entries(root) == 1);
}

/* Puts four bytes over the first value of a tensor of a one-file F32 model. */
static void patch_tensor(const char *folder, const char *name, uint32_t bits)
{
    char path[GEN_PATH_BYTES];
    struct checkpoint *c = NULL;
    struct tensor t;
    size_t bytes;
    gen_path(path, folder, "model.safetensors");
    CHECK_OK(checkpoint_open(&c, folder));
    CHECK_OK(checkpoint_get(c, name, &t));
    char *file = gen_read_file(path, &bytes);
    INVARIANT(file);
    size_t at = 0, n = tensor_bytes(&t);
    while (at + n < bytes && memcmp(file + at, t.data, n) != 0) {
        at++;
    }
    checkpoint_close(&c);
    if (CHECK(at + n <= bytes)) {
        memcpy(file + at, &bits, sizeof bits);
        gen_write_file(path, file, bytes);
    }
    free(file);
}

static void test_bad_models(void)
{
    char root[GEN_PATH_BYTES], dense[GEN_PATH_BYTES], path[GEN_PATH_BYTES];
    struct gen_model m = gen_model_default();
    gen_folder(root);
    gen_path(dense, root, "dense");
    CHECK(mkdir(dense, 0777) == 0);
    check_refused(root, dense, ST_IO, "config.json");

    CHECK_OK(gen_model_write(dense, &m));
    patch_tensor(dense, "model.layers.1.mlp.down_proj.weight", 0x7fc00000);
    check_refused(root, dense, ST_FORMAT, "tensor \"model.layers.1.mlp.down_proj.weight\" in ");
    check_refused(root, dense, ST_FORMAT, "weight (0, 0) is NaN");
    CHECK_OK(gen_model_write(dense, &m));
    patch_tensor(dense, MODEL_EMBED_NAME, 0x7f800000);
    check_refused(root, dense, ST_FORMAT, "embed_tokens.weight\" in ");
    patch_tensor(dense, MODEL_EMBED_NAME, 0x47800000); /* 65536 */
    check_refused(root, dense, ST_FORMAT, "beyond the range of F16");

    CHECK_OK(gen_model_write(dense, &m));
    size_t bytes;
    char *config = gen_read_file(gen_path(path, dense, "config.json"), &bytes);
    char *at = config ? strstr(config, "160") : NULL;
    if (CHECK(at != NULL)) {
        memcpy(at, "192", 3);
        gen_write_file(path, config, bytes);
    }
    free(config);
    check_refused(root, dense, ST_SHAPE, "expected (192, 64) from config.json, found (160, 64)");

    struct nested_options o = make_options(LEVEL_TIED, false, 64, 0);
    struct nested_report r;
    CHECK_OK(gen_model_write(dense, &m));
    CHECK_STATUS(nested_write(&r, dense, gen_path(path, root, "no/such/out"), &o), ST_IO,
                 "cannot create the folder");
    CHECK_STATUS(nested_write(&r, dense, "", &o), ST_USER, "OUT is a path of 0 bytes");
    gen_remove(root);
}

/* ---- command line ---- */

static void test_cli_errors(void)
{
    CHECK_STATUS(CLI("a"), ST_USER, "takes 2 folders, MODEL and OUT, found 1");
    CHECK_STATUS(CLI("a", "b", "c"), ST_USER, "found 3");
    CHECK_STATUS(CLI("a", "b", "--bit-planes"), ST_USER, "does not know \"--bit-planes\"");
    CHECK_STATUS(CLI("a", "b", "--bits"), ST_USER, "needs a value after \"--bits\"");
    CHECK_STATUS(CLI("a", "b", "--bits", "2,3,5"), ST_USER, "5 to 7 bits cannot be stored");
    CHECK_STATUS(CLI("a", "b", "--bits", "4,8"), ST_USER, "--tail 8");
    CHECK_STATUS(CLI("a", "b", "--bits", "2;3"), ST_USER, "--bits is \"2;3\", expected numbers");
    CHECK_STATUS(CLI("a", "b", "--bits", ""), ST_USER, "--bits is \"\"");
    CHECK_STATUS(CLI("a", "b", "--bits", "2,3,"), ST_USER, "--bits is \"2,3,\"");
    CHECK_STATUS(CLI("a", "b", "--bits", "2.5"), ST_USER, "precisions of 2, 3 and 4 bits");
    CHECK_STATUS(CLI("a", "b", "--bits", "3,3"), ST_USER, "names 3 bits twice");
    CHECK_STATUS(CLI("a", "b", "--bits", "2,3,4,2,3,4,2,3,4,2,3,4,2,3,4,2,3"), ST_USER,
                 "expected numbers");
    CHECK_STATUS(CLI("a", "b", "--tail", "6"), ST_USER, "--tail is \"6\", expected 8");
    CHECK_STATUS(CLI("a", "b", "--bits", "2,3", "--tail", "8"), ST_USER, "add 4 to --bits");
    CHECK_STATUS(CLI("a", "b", "--group", "48"), ST_USER, "expected 32, 64 or 128");
    CHECK_STATUS(CLI("a", "b", "--group", "x"), ST_USER, "--group is \"x\"");
    CHECK_STATUS(CLI("a", "b", "--alphas", "lut"), ST_USER, "expected tied or free");
    CHECK_STATUS(CLI("a", "b", "--threads", "0"), ST_USER, "--threads is \"0\"");
    CHECK_STATUS(CLI("a", "b", "--lambda", "1,4"), ST_USER, "has 2 numbers, expected 3");
    CHECK_STATUS(CLI("a", "b", "--lambda", "1,4,nan"), ST_USER, "weight of 4 bits is nan");
    CHECK_STATUS(CLI("a", "b", "--head-bits", "2,3"), ST_USER, "up to 3 bits and --bits up to 4");
    CHECK_STATUS(CLI("a", "b", "--head-bits", "6"), ST_USER, "--head-bits \"6\": 5 to 7 bits");
    CHECK_STATUS(CLI("/no/such/model", "/tmp/never"), ST_IO, "/no/such/model/config.json");
    CHECK_OK(CLI("--help"));
}

static void test_cli_results(void)
{
    char root[GEN_PATH_BYTES], dense[GEN_PATH_BYTES], out[GEN_PATH_BYTES], text[GEN_PATH_BYTES];
    struct gen_model m = gen_model_default();
    gen_folder(root);
    gen_path(dense, root, "dense");
    gen_path(text, root, "stdout");
    CHECK(mkdir(dense, 0777) == 0);
    CHECK_OK(gen_model_write(dense, &m));
    const char *const json_words[] = {dense,    gen_path(out, root, "out/"),
                                      "--json", "--bits",
                                      "4,2",    "--head-bits",
                                      "4",      "--threads",
                                      "1",      NULL};
    CHECK_OK(run_cli(text, json_words));
    json_t *json = NULL;
    CHECK_OK(json_read_file(&json, text, 1 << 20));
    const char *levels = NULL;
    CHECK_OK(json_get_string(&levels, json, "levels", text));
    CHECK(levels && strcmp(levels, "tied") == 0);
    const json_t *layers = json_member(json, "layers"), *matrices = json_member(json, "matrices");
    double two = json_number_value(json_member(json_member(layers, "relative_error"), "2"));
    double read = json_number_value(json_member(json_member(layers, "read_bits_per_weight"), "2"));
    CHECK(two > 0.25 && two < 0.36 && read > 2.4 && read < 2.8);
    CHECK(!json_member(json_member(layers, "relative_error"), "3"));
    const json_t *head = json_member(json_member(matrices, "lm_head"), "relative_error");
    CHECK(json_member(head, "4") && !json_member(head, "2") && json_member(matrices, "o_proj"));
    json_release(&json);

    const char *const words[] = {dense, out, "--force", "--tail", "8", NULL};
    CHECK_OK(run_cli(text, words));
    size_t bytes;
    char *table = gen_read_file(text, &bytes);
    CHECK(table && strstr(table, "2 bits    3 bits    4 bits    8 bits") &&
          strstr(table, "\n  down_proj") && strstr(table, "\n  layers") && strstr(table, "total"));
    free(table);
    gen_remove(root);
}

/* ---- a real model ---- */

/* Relative error in percent over all linears and over down_proj, whose 172 columns are padded, of
 * an independent NumPy implementation with groups of 32. */
static void test_real_model(const char *data)
{
    static const double reference[2][2][3] = {
        {{30.223, 15.541, 8.252}, {30.935, 15.953, 8.423}},
        {{29.669, 15.593, 8.084}, {30.417, 16.067, 8.277}},
    };
    char model[GEN_PATH_BYTES], root[GEN_PATH_BYTES], out[GEN_PATH_BYTES];
    gen_folder(root);
    gen_path(model, data, "stories260k");
    for (int kind = LEVEL_TIED; kind <= LEVEL_FREE; kind++) {
        struct nested_options o = make_options((enum level_kind)kind, false, 32, 0);
        struct nested_report r;
        struct fit_report layers = {0};
        struct pair p;
        CHECK_OK(nested_write(&r, model,
                              gen_path(out, root, level_kind_name((enum level_kind)kind)), &o));
        for (int role = 0; role < M_N_ROLES; role++) {
            fit_report_add(&layers, &r.role[role].fit);
        }
        for (int b = 2; b <= 4; b++) {
            const double *all = reference[kind - LEVEL_TIED][0],
                         *down = reference[kind - LEVEL_TIED][1];
            CHECK(100 * fit_report_relative(&layers, b) < 1.03 * all[b - 2]);
            CHECK(100 * fit_report_relative(&r.role[M_DOWN].fit, b) < 1.03 * down[b - 2]);
        }
        open_pair(&p, model, out);
        check_role(&p, M_DOWN, &r, &o.spec);
        close_pair(&p);
    }
    gen_remove(root);
}

int main(void)
{
    test_folders();
    test_accounting();
    test_existing_out();
    test_bad_models();
    test_cli_errors();
    test_cli_results();
    const char *data = getenv("PMPD_TEST_DATA");
    if (data) {
        test_real_model(data);
    } else {
        printf("PMPD_TEST_DATA is not set: the part with a real model is left out\n");
    }
    return check_report();
}
