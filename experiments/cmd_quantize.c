/* pmpd quantize: a dense Hugging Face folder becomes a nested one. Command line and report; the
 * work is experiments/quantise. SPDX-License-Identifier: Apache-2.0
 */
#include <getopt.h>
#include <inttypes.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "core/mem.h"
#include "experiments/cmd.h"
#include "experiments/provenance.h"
#include "experiments/quantise/nested_write.h"

enum { THREADS_MAX = 1024, NUMBERS_MAX = 16 };

static const char usage[] =
    "usage: pmpd quantize MODEL OUT [--bits 2,3,4] [--tail 8] [--group 64] [--alphas tied]\n"
    "Stores a model once for several precisions: every weight becomes one code, cut into "
    "bit-planes;\n"
    "the first B planes with the levels of B are the B-bit model. No calibration data are needed.\n"
    "  MODEL            Hugging Face folder: config.json, *.safetensors (F32, F16, BF16), "
    "tokenizer\n"
    "  OUT              folder to make; it appears when all of it is written\n"
    "  --bits LIST      precisions to hold, of 2, 3 and 4 (default 2,3,4)\n"
    "  --tail 8         also 8 bits, as four more planes on top of 4: for prefill\n"
    "  --group N        columns that share levels: 32, 64 (default) or 128; smaller is better and\n"
    "                   larger: the levels cost 32/N bits per weight and precision when tied\n"
    "  --alphas KIND    tied (default): scale and offset per group; free: a number per plane and "
    "an\n"
    "                   offset, better for heavy tails at 16(B+1)/N bits per weight\n"
    "  --head-bits LIST nest the head too, up to the same precision as --bits; none (default): "
    "the\n"
    "                   head stays F16. A head tied to the embedding is stored beside it\n"
    "  --lambda LIST    weight of each precision's error, lowest first (default 1,4,16: an error\n"
    "                   about halves per bit); 1,1,1 favours 2 bits, 1,8,64 favours 4\n"
    "  --threads N      CPU threads (default: all this process may use); the result is the same\n"
    "  --force          replace OUT if it is a nested model\n"
    "  --json           print the result as JSON\n"
    "Examples:\n"
    "  pmpd quantize ~/models/llama ~/models/llama-nested\n"
    "  pmpd quantize ~/models/llama ~/models/llama-g32 --bits 3,4 --tail 8 --group 32 --head-bits "
    "4\n";

struct request {
    const char *model, *out;               /* borrowed from argv */
    const char *bits, *head_bits, *lambda; /* lists as written; NULL: default */
    enum level_kind levels;
    int tail, group, threads;
    bool force, json, help;
};

/* ---- command line ---- */

static enum status parse_whole(int *out, const char *option, const char *text, int min, int max)
{
    char *end;
    long v = strtol(text, &end, 10);
    if (end == text || *end || v < min || v > max) {
        FAIL(ST_USER, "%s is \"%s\", expected a whole number from %d to %d", option, text, min,
             max);
    }
    *out = (int)v;
    return ST_OK;
}

/* "2,3,4" -> numbers; at most NUMBERS_MAX. */
static enum status parse_list(double out[NUMBERS_MAX], int *n, const char *option, const char *text)
{
    const char *at = text;
    for (*n = 0; *n < NUMBERS_MAX; at++) {
        char *end;
        out[(*n)++] = strtod(at, &end);
        if (end == at || (*end && *end != ',')) {
            break;
        }
        if (!*end) {
            return ST_OK;
        }
        at = end;
    }
    FAIL(ST_USER, "%s is \"%s\", expected numbers with commas between them, such as 2,3,4", option,
         text);
}

static enum status parse_bits(uint32_t *mask, const char *option, const char *text)
{
    double number[NUMBERS_MAX];
    int n;
    *mask = 0;
    TRY(parse_list(number, &n, option, text));
    for (int i = 0; i < n; i++) {
        if (!(number[i] >= 1 && number[i] <= 16) || number[i] != (double)(int)number[i]) {
            FAIL(ST_USER, "%s is \"%s\", expected precisions of 2, 3 and 4 bits, such as 2,3,4",
                 option, text);
        }
        if (*mask >> (int)number[i] & 1) {
            FAIL(ST_USER, "%s is \"%s\", which names %d bits twice", option, text, (int)number[i]);
        }
        *mask |= 1u << (int)number[i];
    }
    return ST_OK;
}

static enum status parse_option(struct request *q, int option, const char *value)
{
    switch (option) {
    case 'b':
        q->bits = value;
        return ST_OK;
    case 'H':
        q->head_bits = value;
        return ST_OK;
    case 'L':
        q->lambda = value;
        return ST_OK;
    case 't':
        if (strcmp(value, "8") != 0) {
            FAIL(ST_USER, "--tail is \"%s\", expected 8", value);
        }
        q->tail = 8;
        return ST_OK;
    case 'g':
        return parse_whole(&q->group, "--group", value, 1, FIT_MAX_GROUP);
    case 'l':
        q->levels = level_kind_parse(value);
        if (q->levels != LEVEL_TIED && q->levels != LEVEL_FREE) {
            FAIL(ST_USER, "--alphas is \"%s\", expected tied or free", value);
        }
        return ST_OK;
    case 'T':
        return parse_whole(&q->threads, "--threads", value, 1, THREADS_MAX);
    case 'f':
        q->force = true;
        return ST_OK;
    case 'j':
        q->json = true;
        return ST_OK;
    default:
        q->help = true;
        return ST_OK;
    }
}

static enum status parse_request(struct request *q, int argc, char **argv)
{
    static const struct option options[] = {
        {"bits", required_argument, NULL, 'b'},
        {"head-bits", required_argument, NULL, 'H'},
        {"lambda", required_argument, NULL, 'L'},
        {"tail", required_argument, NULL, 't'},
        {"group", required_argument, NULL, 'g'},
        {"alphas", required_argument, NULL, 'l'},
        {"threads", required_argument, NULL, 'T'},
        {"force", no_argument, NULL, 'f'},
        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    *q = (struct request){.levels = LEVEL_TIED, .group = 64};
    opterr = 0;
    optind = 0; /* glibc: forget an earlier command line */
    for (int c; (c = getopt_long(argc, argv, ":h", options, NULL)) != -1;) {
        if (c == '?' || c == ':') {
            FAIL(ST_USER, "quantize %s \"%s\"; pmpd quantize --help lists the options",
                 c == ':' ? "needs a value after" : "does not know", argv[optind - 1]);
        }
        TRY(parse_option(q, c, optarg));
    }
    if (q->help) {
        return ST_OK;
    }
    if (argc - optind != 2) {
        FAIL(ST_USER,
             "quantize takes 2 folders, MODEL and OUT, found %d; pmpd quantize --help "
             "explains",
             argc - optind);
    }
    q->model = argv[optind];
    q->out = argv[optind + 1];
    return ST_OK;
}

static enum status make_options(struct nested_options *o, const struct request *q)
{
    uint32_t bits, head_bits;
    double lambda[NUMBERS_MAX];
    int n_lambda = 0;
    *o = (struct nested_options){.force = q->force, .version = provenance_version()};
    o->n_threads = q->threads ? q->threads : omp_get_max_threads();
    TRY(parse_bits(&bits, "--bits", q->bits ? q->bits : "2,3,4"));
    if (q->lambda) {
        TRY(parse_list(lambda, &n_lambda, "--lambda", q->lambda));
        if (n_lambda != __builtin_popcount(bits)) {
            FAIL(ST_USER,
                 "--lambda \"%s\" has %d numbers, expected %d, one per precision of --bits",
                 q->lambda, n_lambda, __builtin_popcount(bits));
        }
    }
    TRY(fit_spec_make(&o->spec, bits, q->levels, q->tail != 0, q->group, n_lambda ? lambda : NULL));
    if (!q->head_bits || strcmp(q->head_bits, "none") == 0) {
        return ST_OK;
    }
    TRY(parse_bits(&head_bits, "--head-bits", q->head_bits));
    enum status st = fit_spec_make(&o->head_spec, head_bits, q->levels, q->tail != 0, q->group,
                                   n_lambda && head_bits == bits ? lambda : NULL);
    if (st != ST_OK) {
        return status_prefix(st, "--head-bits \"%s\": ", q->head_bits);
    }
    if (o->head_spec.hi != o->spec.hi) {
        FAIL(ST_USER,
             "--head-bits \"%s\" goes up to %d bits and --bits up to %d; both must end at "
             "the same precision, since all matrices have the same number of planes",
             q->head_bits, o->head_spec.hi, o->spec.hi);
    }
    o->nested_head = true;
    return ST_OK;
}

/* ---- report ---- */

/* NULL: the family has no such matrix */
static const char *role_name(const struct nested_report *r, int role)
{
    return role == ROLE_HEAD ? "lm_head" : model_role_name(r->family, (enum matrix_role)role);
}

/* All linears of the layers together. */
static void sum_layers(struct role_report *sum, const struct nested_report *r)
{
    *sum = (struct role_report){0};
    for (int role = 0; role < M_N_ROLES; role++) {
        const struct role_report *one = &r->role[role];
        fit_report_add(&sum->fit, &one->fit);
        sum->planes_bytes += one->planes_bytes;
        for (int b = 0; b < BITS_ALL; b++) {
            sum->levels_bytes[b] += one->levels_bytes[b];
            sum->read_bytes[b] += one->read_bytes[b];
        }
    }
}

static uint64_t stored_bytes(const struct role_report *r)
{
    uint64_t bytes = r->planes_bytes;
    for (int b = 0; b < BITS_ALL; b++) {
        bytes += r->levels_bytes[b];
    }
    return bytes;
}

static double per_weight(const struct role_report *r, uint64_t bytes)
{
    return r->fit.n_weights ? 8.0 * (double)bytes / (double)r->fit.n_weights : 0;
}

static bool is_held(const struct nested_options *o, int bits)
{
    return o->spec.kind[bits] != LEVEL_NONE ||
           (o->nested_head && o->head_spec.kind[bits] != LEVEL_NONE);
}

/* One line of the table; spec: the precisions that this row holds. */
static void print_row(const char *name, const struct role_report *r, const struct fit_spec *spec,
                      const struct nested_options *o)
{
    printf("  %-12s%14" PRId64, name, r->fit.n_weights);
    for (int b = 1; b <= BITS_MAX; b++) {
        if (is_held(o, b) && spec->kind[b] != LEVEL_NONE) {
            printf("%10.3f", 100 * fit_report_relative(&r->fit, b));
        } else if (is_held(o, b)) {
            printf("%10s", "-");
        }
    }
    printf("\n");
}

static void print_bits_row(const char *name, const struct role_report *r,
                           const struct fit_spec *spec, const struct nested_options *o)
{
    printf("  %-12s%14.3f", name, per_weight(r, stored_bytes(r)));
    for (int b = 1; b <= BITS_MAX; b++) {
        if (is_held(o, b) && spec->kind[b] != LEVEL_NONE) {
            printf("%10.3f", per_weight(r, r->read_bytes[b]));
        } else if (is_held(o, b)) {
            printf("%10s", "-");
        }
    }
    printf("\n");
}

static void print_heading(const char *title, const char *first, const struct nested_options *o)
{
    printf("%s\n  %-12s%14s", title, "", first);
    for (int b = 1; b <= BITS_MAX; b++) {
        if (is_held(o, b)) {
            printf("%5d bits", b);
        }
    }
    printf("\n");
}

static void print_bytes(const char *name, uint64_t bytes)
{
    if (bytes) {
        printf("  %-26s%14" PRIu64 "\n", name, bytes);
    }
}

static void print_report(const struct nested_report *r, const struct request *q,
                         const struct nested_options *o)
{
    struct role_report layers, all;
    const struct role_report *head = &r->role[ROLE_HEAD];
    sum_layers(&layers, r);
    all = layers;
    fit_report_add(&all.fit, &head->fit);
    print_heading("relative weight error, percent", "weights", o);
    for (int role = 0; role < M_N_ROLES; role++) {
        if (role_name(r, role)) {
            print_row(role_name(r, role), &r->role[role], &o->spec, o);
        }
    }
    print_row("layers", &layers, &o->spec, o);
    if (o->nested_head) {
        print_row("lm_head", head, &o->head_spec, o);
    }
    print_heading("bits per weight", "stored", o);
    print_bits_row("layers", &layers, &o->spec, o);
    if (o->nested_head) {
        print_bits_row("lm_head", head, &o->head_spec, o);
    }
    printf("bytes of %s\n", q->out);
    print_bytes("planes", layers.planes_bytes + head->planes_bytes);
    for (int b = 1; b <= BITS_MAX; b++) {
        char name[32];
        snprintf(name, sizeof name, "levels of %d bits", b);
        print_bytes(name, layers.levels_bytes[b] + head->levels_bytes[b]);
    }
    print_bytes("embedding (F16)", r->embed_bytes);
    print_bytes("head (F16)", r->head_bytes);
    print_bytes("norms, biases (F32)", r->norm_bytes);
    print_bytes("other files", r->files_bytes);
    print_bytes("total", r->total_bytes);
    printf("time %.1f s: %" PRId64 " weights fitted in %.1f s, %.2f M weights/s, %d thread%s\n",
           r->total_s, all.fit.n_weights, r->fit_s,
           r->fit_s > 0 ? (double)all.fit.n_weights / r->fit_s / 1e6 : 0, o->n_threads,
           o->n_threads == 1 ? "" : "s");
}

/* {"2": value, ...} of the precisions that spec holds: what(r, b) */
static json_t *by_bits(const struct fit_spec *spec, const struct role_report *r,
                       double (*what)(const struct role_report *r, int bits))
{
    json_t *out = json_object();
    for (int b = 1; b <= BITS_MAX; b++) {
        const char key[2] = {(char)('0' + b), '\0'};
        if (spec->kind[b] != LEVEL_NONE) {
            json_object_set_new(out, key, json_real(what(r, b)));
        }
    }
    return out;
}

static double error_of(const struct role_report *r, int bits)
{
    return fit_report_relative(&r->fit, bits);
}

static double read_of(const struct role_report *r, int bits)
{
    return per_weight(r, r->read_bytes[bits]);
}

static json_t *role_json(const struct role_report *r, const struct fit_spec *spec)
{
    return json_pack("{s:I, s:o, s:f, s:o}", "weights", (json_int_t)r->fit.n_weights,
                     "relative_error", by_bits(spec, r, error_of), "stored_bits_per_weight",
                     per_weight(r, stored_bytes(r)), "read_bits_per_weight",
                     by_bits(spec, r, read_of));
}

static json_t *bytes_json(const struct nested_report *r, const struct role_report *layers)
{
    const struct role_report *head = &r->role[ROLE_HEAD];
    json_t *levels = json_object();
    for (int b = 1; b <= BITS_MAX; b++) {
        const char key[2] = {(char)('0' + b), '\0'};
        uint64_t bytes = layers->levels_bytes[b] + head->levels_bytes[b];
        if (bytes) {
            json_object_set_new(levels, key, json_integer((json_int_t)bytes));
        }
    }
    return json_pack("{s:I, s:o, s:I, s:I, s:I, s:I, s:I}", "planes",
                     (json_int_t)(layers->planes_bytes + head->planes_bytes), "levels", levels,
                     "embedding", (json_int_t)r->embed_bytes, "head", (json_int_t)r->head_bytes,
                     "norms", (json_int_t)r->norm_bytes, "files", (json_int_t)r->files_bytes,
                     "total", (json_int_t)r->total_bytes);
}

static enum status print_json(const struct nested_report *r, const struct request *q,
                              const struct nested_options *o)
{
    struct role_report layers;
    sum_layers(&layers, r);
    json_t *matrices = json_object();
    for (int role = 0; role < M_N_ROLES; role++) {
        if (role_name(r, role)) {
            json_object_set_new(matrices, role_name(r, role), role_json(&r->role[role], &o->spec));
        }
    }
    if (o->nested_head) {
        json_object_set_new(matrices, "lm_head", role_json(&r->role[ROLE_HEAD], &o->head_spec));
    }
    json_t *json = json_pack("{s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:o, s:o, s:o, s:f, s:f, s:i}",
                             "model", q->model, "out", q->out, "method", NESTED_METHOD,
                             "source_digest", r->source_digest, "levels",
                             level_kind_name(q->levels), "group_size", (int)o->spec.group_cols,
                             "n_planes", o->spec.n_planes, "layers", role_json(&layers, &o->spec),
                             "matrices", matrices, "bytes", bytes_json(r, &layers), "seconds",
                             r->total_s, "fit_seconds", r->fit_s, "threads", o->n_threads);
    if (!json) {
        FAIL(ST_FORMAT,
             "the result cannot be written as JSON: a path is not UTF-8, or out of memory");
    }
    json_dumpf(json, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    printf("\n");
    json_decref(json);
    return ST_OK;
}

enum status cmd_quantize(int argc, char **argv)
{
    struct request q;
    struct nested_options options;
    struct nested_report report;
    TRY(parse_request(&q, argc, argv));
    if (q.help) {
        fputs(usage, stdout);
        return ST_OK;
    }
    TRY(make_options(&options, &q));
    TRY(nested_write(&report, q.model, q.out, &options));
    if (q.json) {
        return print_json(&report, &q, &options);
    }
    print_report(&report, &q, &options);
    return ST_OK;
}
