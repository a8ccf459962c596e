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

#include "core/log.h"
#include "experiments/cmd.h"
#include "experiments/provenance.h"
#include "experiments/quantise/nested_write.h"
#include "experiments/quantise/share.h"
#include "experiments/windows.h"
#include "kernels/kernels.h"

enum { THREADS_MAX = 1024, NUMBERS_MAX = 16, SWEEPS_MAX = 100, TOKENS_PER_COLUMN = 16 };

static const char usage[] =
    "usage: pmpd quantize MODEL OUT [--calib FILE] [--bits 2,3,4] [--tail 8] [--group 64]\n"
    "Stores a model once for several precisions: every weight becomes one code, cut into "
    "bit-planes;\n"
    "the first B planes with the levels of B are the B-bit model. It works without data; with\n"
    "--calib the outputs of the matrices are fitted instead of the weights, which is better.\n"
    "  MODEL            Hugging Face folder: config.json, *.safetensors (F32, F16, BF16), "
    "tokenizer\n"
    "  OUT              folder to make; it appears when all of it is written\n"
    "  --calib FILE     text like what the model will read, or {\"ids\": [[...], ...]} in a .json "
    "file;\n"
    "                   at least 16 tokens per column of the widest matrix. A killed run goes on\n"
    "                   at the block it was at when it is started again\n"
    "  --window N       tokens of a window of text (default: the context, at most 2048)\n"
    "  --sweeps N       with --calib: rounds of coordinate descent over the codes (default 1)\n"
    "  --damp X         with --calib: share of the mean input power added to every column's\n"
    "                   (default 0.01)\n"
    "  --method NAME    joint (default), or for comparison rtn, bcq-greedy, kmeans (nested, from\n"
    "                   weights alone) or gptq (with --calib; one precision, such as --bits 3)\n"
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
    "  pmpd quantize ~/models/llama ~/models/llama-nested --calib wiki.txt\n"
    "  pmpd quantize ~/models/llama ~/models/llama-g32 --bits 3,4 --tail 8 --group 32 --head-bits "
    "4\n";

struct request {
    const char *model, *out;               /* borrowed from argv */
    const char *bits, *head_bits, *lambda; /* lists as written; NULL: default */
    const char *calib;                     /* borrowed; NULL: without data */
    enum level_kind levels;                /* NONE: not said */
    enum nested_method method;
    double damp; /* 0: not said */
    int tail, group, threads;
    int sweeps, window; /* -1 and 0: not said */
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

static enum status parse_method(enum nested_method *method, const char *text)
{
    for (int i = 0; i < N_METHODS; i++) {
        if (strcmp(text, nested_method_name((enum nested_method)i, true)) == 0) {
            *method = (enum nested_method)i;
            return ST_OK;
        }
    }
    FAIL(ST_USER, "--method is \"%s\", expected joint, rtn, bcq-greedy, kmeans or gptq", text);
}

static enum status parse_damp(double *damp, const char *text)
{
    char *end;
    *damp = strtod(text, &end);
    if (end == text || *end || !(*damp >= 1e-6 && *damp <= 10)) {
        FAIL(ST_USER, "--damp is \"%s\", expected a number from 1e-6 to 10", text);
    }
    return ST_OK;
}

static enum status parse_option(struct request *q, int option, const char *value)
{
    switch (option) {
    case 'c':
        q->calib = value;
        return ST_OK;
    case 'w':
        return parse_whole(&q->window, "--window", value, 2, INT32_MAX);
    case 's':
        return parse_whole(&q->sweeps, "--sweeps", value, 0, SWEEPS_MAX);
    case 'd':
        return parse_damp(&q->damp, value);
    case 'm':
        return parse_method(&q->method, value);
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
        {"calib", required_argument, NULL, 'c'},
        {"window", required_argument, NULL, 'w'},
        {"sweeps", required_argument, NULL, 's'},
        {"damp", required_argument, NULL, 'd'},
        {"method", required_argument, NULL, 'm'},
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
    *q = (struct request){.group = 64, .sweeps = -1};
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

/* What does not go together with the method; sets the kind of levels that it makes. */
static enum status check_method(struct request *q, uint32_t bits)
{
    const char *name = nested_method_name(q->method, true);
    enum level_kind kind = q->method == METHOD_GREEDY ? LEVEL_FREE : LEVEL_TIED;
    if (q->method != METHOD_JOINT && (q->levels != LEVEL_NONE || q->tail || q->lambda)) {
        FAIL(ST_USER, "--method %s takes none of --alphas, --tail and --lambda", name);
    }
    if (q->method == METHOD_GPTQ && (!q->calib || __builtin_popcount(bits) != 1)) {
        FAIL(ST_USER, "--method gptq makes one precision from data: give --calib FILE and, for "
                      "instance, --bits 3");
    }
    if (q->calib && q->method != METHOD_JOINT && q->method != METHOD_GPTQ) {
        FAIL(ST_USER, "--method %s looks at the weights alone: leave out --calib", name);
    }
    if (!q->calib && (q->sweeps >= 0 || q->damp > 0 || q->window)) {
        FAIL(ST_USER,
             "--sweeps, --damp and --window say how to use --calib FILE, which is missing");
    }
    if (q->method == METHOD_GPTQ && q->sweeps >= 0) {
        FAIL(ST_USER, "--method gptq makes no --sweeps");
    }
    q->levels = q->levels == LEVEL_NONE ? kind : q->levels;
    q->damp = q->damp > 0 ? q->damp : 0.01;
    q->sweeps = q->sweeps >= 0 ? q->sweeps : q->method == METHOD_JOINT;
    return ST_OK;
}

/* kmeans: a table per row where the others have levels per group. */
static void use_tables(struct fit_spec *spec)
{
    for (int b = 1; b <= BITS_MAX; b++) {
        spec->kind[b] = spec->kind[b] != LEVEL_NONE ? LEVEL_LUT : LEVEL_NONE;
    }
}

static enum status make_options(struct nested_options *o, struct request *q, int n_threads)
{
    uint32_t bits, head_bits;
    double lambda[NUMBERS_MAX];
    int n_lambda = 0;
    *o = (struct nested_options){.force = q->force, .version = provenance_version()};
    o->n_threads = q->threads ? q->threads : n_threads ? n_threads : omp_get_max_threads();
    TRY(parse_bits(&bits, "--bits", q->bits ? q->bits : "2,3,4"));
    TRY(check_method(q, bits));
    o->method = q->method;
    o->sweeps = q->sweeps;
    o->damp = q->damp;
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
        if (q->method == METHOD_KMEANS) {
            use_tables(&o->spec);
        }
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
    if (q->method == METHOD_KMEANS) {
        use_tables(&o->spec);
        use_tables(&o->head_spec);
    }
    return ST_OK;
}

/* The text is read before any work is done. */
static enum status read_calibration(struct windows *out, const struct request *q)
{
    struct model_config config;
    TRY(model_config_read(&config, q->model));
    int window = q->window                         ? q->window
                 : config.context < WINDOW_DEFAULT ? (int)config.context
                                                   : WINDOW_DEFAULT;
    TRY(windows_read(out, q->calib, q->model, config.vocab, config.context, window));
    int32_t widest = config.ffn > config.hidden ? config.ffn : config.hidden;
    if (out->begin[out->n] < (size_t)widest * TOKENS_PER_COLUMN) {
        log_warn(
            "%s has %zu tokens; %d columns of the widest matrix ask for at least %d, or the fit "
            "follows the text more than the model",
            q->calib, out->begin[out->n], widest, widest * TOKENS_PER_COLUMN);
    }
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

static double output_of(const struct role_report *r, int bits)
{
    return fit_report_output(&r->fit, bits);
}

static double weight_of(const struct role_report *r, int bits)
{
    return fit_report_relative(&r->fit, bits);
}

static bool is_held(const struct nested_options *o, int bits)
{
    return o->spec.kind[bits] != LEVEL_NONE ||
           (o->nested_head && o->head_spec.kind[bits] != LEVEL_NONE);
}

/* One line of the table; spec: the precisions that this row holds. */
static void print_row(const char *name, const struct role_report *r, const struct fit_spec *spec,
                      const struct nested_options *o,
                      double (*what)(const struct role_report *r, int bits))
{
    printf("  %-12s%14" PRId64, name, r->fit.n_weights);
    for (int b = 1; b <= BITS_MAX; b++) {
        if (is_held(o, b) && spec->kind[b] != LEVEL_NONE) {
            printf("%10.3f", 100 * what(r, b));
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

static void print_errors(const char *title, const struct nested_report *r,
                         const struct role_report *layers, const struct nested_options *o,
                         double (*what)(const struct role_report *r, int bits))
{
    print_heading(title, "weights", o);
    for (int role = 0; role < M_N_ROLES; role++) {
        if (role_name(r, role)) {
            print_row(role_name(r, role), &r->role[role], &o->spec, o, what);
        }
    }
    print_row("layers", layers, &o->spec, o, what);
    if (o->nested_head) {
        print_row("lm_head", &r->role[ROLE_HEAD], &o->head_spec, o, what);
    }
}

static void print_stage(const char *name, double seconds, double flop)
{
    if (seconds > 0) {
        printf("  %-12s%14.2f%10.1f%10.1f\n", name, seconds, flop / 1e9, flop / seconds / 1e9);
    }
}

/* Seconds of the wall clock; where rows are shared out, of all threads together over their number.
 */
static void print_stages(const struct nested_report *r, const struct nested_options *o)
{
    const struct calibrator_times *c = &r->calib;
    printf("calibration: %zu tokens in %d windows; %d of the blocks from an earlier run\n"
           "  %-12s%14s%10s%10s\n",
           o->calib->begin[o->calib->n], o->calib->n, r->n_resumed, "stage", "seconds", "GFLOP",
           "GFLOP/s");
    print_stage("forward", c->forward_s, c->forward_flop);
    print_stage("moments", c->moments_s, c->moments_flop);
    print_stage("factor", c->factor_s, c->factor_flop);
    for (int i = 0; i < N_FIT_STAGES; i++) {
        print_stage(fit_stage_name((enum fit_stage)i), r->fit.thread_s[i] / o->n_threads,
                    r->fit.flop[i]);
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
    if (o->calib) {
        print_errors("relative output error, percent: ||X (W - stored)^T|| / ||X W^T||", r, &layers,
                     o, output_of);
    }
    print_errors("relative weight error, percent", r, &layers, o, weight_of);
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
    if (o->calib) {
        print_stages(r, o);
    }
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

static double read_of(const struct role_report *r, int bits)
{
    return per_weight(r, r->read_bytes[bits]);
}

static json_t *role_json(const struct role_report *r, const struct fit_spec *spec)
{
    return json_pack("{s:I, s:o, s:o*, s:f, s:o}", "weights", (json_int_t)r->fit.n_weights,
                     "relative_error", by_bits(spec, r, weight_of), "output_error",
                     r->fit.output_power > 0 ? by_bits(spec, r, output_of) : NULL,
                     "stored_bits_per_weight", per_weight(r, stored_bytes(r)),
                     "read_bits_per_weight", by_bits(spec, r, read_of));
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

static json_t *stage_json(double seconds, double flop)
{
    return json_pack("{s:f, s:f, s:f}", "seconds", seconds, "gflop", flop / 1e9, "gflop_s",
                     seconds > 0 ? flop / seconds / 1e9 : 0.0);
}

static json_t *calibration_json(const struct nested_report *r, const struct nested_options *o)
{
    const struct calibrator_times *c = &r->calib;
    json_t *stages =
        json_pack("{s:o, s:o, s:o}", "forward", stage_json(c->forward_s, c->forward_flop),
                  "moments", stage_json(c->moments_s, c->moments_flop), "factor",
                  stage_json(c->factor_s, c->factor_flop));
    for (int i = 0; i < N_FIT_STAGES; i++) {
        json_object_set_new(stages, fit_stage_name((enum fit_stage)i),
                            stage_json(r->fit.thread_s[i] / o->n_threads, r->fit.flop[i]));
    }
    return json_pack("{s:s, s:I, s:i, s:i, s:f, s:i, s:o}", "digest", r->calib_digest, "tokens",
                     (json_int_t)o->calib->begin[o->calib->n], "windows", (int)o->calib->n,
                     "sweeps", o->sweeps, "damping", o->damp, "resumed_blocks", r->n_resumed,
                     "stages", stages);
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
    json_t *json = json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:i, s:i, s:o, s:o, s:o, s:f, s:f, s:i}", "model", q->model,
        "out", q->out, "method", nested_method_name(o->method, o->calib != NULL), "source_digest",
        r->source_digest, "levels", level_kind_name(o->spec.kind[o->spec.hi]), "group_size",
        (int)o->spec.group_cols, "n_planes", o->spec.n_planes, "layers",
        role_json(&layers, &o->spec), "matrices", matrices, "bytes", bytes_json(r, &layers),
        "seconds", r->total_s, "fit_seconds", r->fit_s, "threads", o->n_threads);
    if (json && o->calib) {
        json_object_set_new(json, "calibration", calibration_json(r, o));
    }
    if (!json) {
        FAIL(ST_FORMAT,
             "the result cannot be written as JSON: a path is not UTF-8, or out of memory");
    }
    json_dumpf(json, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    printf("\n");
    json_decref(json);
    return ST_OK;
}

/* The ranks as one group that shares a calibrated fit; a matrix may take a rank long. */
static const double SHARE_TIMEOUT_S = 86400;

static enum status open_group(struct collective *coll, struct env *env)
{
    if (env->size == 1) {
        collective_local(coll);
        return ST_OK;
    }
    TRY(env_grid(env, env->size));
    return coll_mpi_open(coll, env, SHARE_TIMEOUT_S, 1 << 20);
}

static enum status quantize(struct env *env, struct request *q)
{
    struct nested_options options;
    struct nested_report report;
    struct windows calib = {0};
    struct collective coll = {0};
    int n_threads = 0;
    enum status st = ST_OK;
    if (env->size > 1) {
        TRY(env_default_threads(env, &n_threads));
        n_threads = q->threads ? q->threads : n_threads ? n_threads : omp_get_max_threads();
        TRY(env_check_threads(env, n_threads));
    }
    TRY(open_group(&coll, env));
    TRY_GOTO(st, make_options(&options, q, n_threads), done);
    options.coll = &coll;
    if (q->calib) {
        kernels_register_all();
        TRY_GOTO(st, share_agree(&coll, read_calibration(&calib, q)), done);
        options.calib = &calib;
    } else if (env->size > 1) {
        log_info("without --calib one rank does all of it; the others wait");
    }
    TRY_GOTO(st, nested_write(&report, q->model, q->out, &options), done);
    if (env->rank == 0 && q->json) {
        TRY_GOTO(st, print_json(&report, q, &options), done);
    } else if (env->rank == 0) {
        print_report(&report, q, &options);
    }
done:
    windows_free(&calib);
    collective_close(&coll);
    return st;
}

enum status cmd_quantize(struct env *env, int argc, char **argv)
{
    struct request q;
    TRY(parse_request(&q, argc, argv));
    if (q.help) {
        fputs(env->rank == 0 ? usage : "", stdout);
        return ST_OK;
    }
    enum status st = quantize(env, &q);
    return env->size > 1 ? env_agree(env, st) : st;
}
