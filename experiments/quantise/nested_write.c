/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/nested_write.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <jansson.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/quantise/baseline_fit.h"
#include "experiments/quantise/block_fit.h"
#include "experiments/quantise/out_folder.h"

enum {
    CONFIG_BYTES_MAX = 64 << 20,
    DENSE_BLOCK = 1 << 18, /* values converted at a time */
    FIT_BLOCK = 1 << 21,   /* weights between two updates of the progress line */
    PART_NAME_BYTES = MODEL_NAME_BYTES + 16,
    STAMP_BYTES = 1024
};

struct job {
    const struct nested_options *options; /* borrowed, as all pointers here but those marked */
    struct nested_report *report;
    const char *model;
    struct model_config config;
    struct out_folder out;
    struct checkpoint *ckpt;          /* owned */
    struct checkpoint_writer *writer; /* owned */
    struct progress progress;
    double n_done; /* weights */
    struct collective *coll;
    bool writer_rank;         /* rank 0 of coll: has the output folder */
    struct calibrator *cal;   /* owned; NULL: without calibration */
    struct block_store store; /* with calibration */
    int n_used;               /* tensors of the source */
};

/* What is done, first for announcing all tensors and then, in the same order, for their bytes. */
enum phase { ANNOUNCE, WRITE };

static enum status name_error(enum status st, const struct job *job, const char *name)
{
    return st == ST_OK ? st : status_prefix(st, "tensor \"%s\" in %s: ", name, job->model);
}

/* ---- tensors that stay dense ---- */

static enum status convert_block(void *to, enum dtype dtype, float *block,
                                 const struct tensor *from, size_t at, size_t n)
{
    floats_from(block, (const char *)from->data + at * dtype_bytes(from->dtype), from->dtype, n);
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(block[i])) {
            FAIL(ST_FORMAT,
                 "value %zu is %s, expected a finite number; the file is damaged or the "
                 "training diverged",
                 at + i, isnan(block[i]) ? "NaN" : "infinite");
        }
    }
    if (dtype == DT_F32) {
        memcpy(to, block, n * sizeof *block);
        return ST_OK;
    }
    uint16_t *half = to;
    for (size_t i = 0; i < n; i++) {
        half[i] = f32_to_f16(block[i]);
        if ((half[i] & 0x7c00) == 0x7c00) {
            FAIL(ST_FORMAT, "value %zu is %g, beyond the range of F16 (65504)", at + i,
                 (double)block[i]);
        }
    }
    return ST_OK;
}

static enum status write_dense_bytes(struct job *job, const struct tensor *t, enum dtype dtype)
{
    float *block = NULL;
    void *to = NULL;
    enum status st = ST_OK;
    TRY_GOTO(st, MEM_NEW(&block, DENSE_BLOCK), done);
    TRY_GOTO(st, mem_alloc_array(&to, DENSE_BLOCK, sizeof(float)), done);
    size_t count = tensor_count(t);
    for (size_t at = 0; at < count; at += DENSE_BLOCK) {
        size_t n = count - at < DENSE_BLOCK ? count - at : DENSE_BLOCK;
        TRY_GOTO(st, convert_block(to, dtype, block, t, at, n), done);
        TRY_GOTO(st, checkpoint_writer_bytes(job->writer, to, n * dtype_bytes(dtype)), done);
    }
done:
    mem_free(block);
    mem_free(to);
    return st;
}

static enum status do_dense(struct job *job, enum phase phase, const char *name, int32_t d0,
                            int32_t d1, enum dtype dtype, uint64_t *bytes)
{
    struct tensor t;
    TRY(checkpoint_get_shape(job->ckpt, name, d0, d1, &t));
    struct tensor stored = t;
    stored.dtype = dtype;
    if (phase == ANNOUNCE) {
        job->n_used++;
        *bytes += tensor_bytes(&stored);
        return checkpoint_writer_announce(job->writer, name, &stored);
    }
    return name_error(write_dense_bytes(job, &t, dtype), job, name);
}

/* Gain and bias of a norm. */
static enum status do_norm(struct job *job, enum phase phase, int layer, enum model_norm norm)
{
    const struct model_config *c = &job->config;
    char name[MODEL_NAME_BYTES];
    if (!model_has_norm(c, norm)) {
        return ST_OK;
    }
    model_norm_name(name, c, layer, norm);
    TRY(do_dense(job, phase, name, c->hidden, 0, DT_F32, &job->report->norm_bytes));
    if (c->norm == NORM_LAYER) {
        model_norm_bias_name(name, c, layer, norm);
        TRY(do_dense(job, phase, name, c->hidden, 0, DT_F32, &job->report->norm_bytes));
    }
    return ST_OK;
}

static enum status do_biases(struct job *job, enum phase phase, int layer)
{
    const struct model_config *c = &job->config;
    char name[MODEL_NAME_BYTES], bias[PART_NAME_BYTES];
    for (int role = 0; role < M_N_ROLES; role++) {
        int32_t n_rows, n_cols;
        if (!(c->biased >> role & 1)) {
            continue;
        }
        model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
        model_matrix_name(name, c, layer, (enum matrix_role)role);
        snprintf(bias, sizeof bias, "%s.bias", name);
        TRY(do_dense(job, phase, bias, n_rows, 0, DT_F32, &job->report->norm_bytes));
    }
    return ST_OK;
}

/* F32 before F16 before U8, so that every tensor is aligned in the file. */
static enum status do_dense_tensors(struct job *job, enum phase phase)
{
    const struct model_config *c = &job->config;
    struct nested_report *r = job->report;
    for (int layer = 0; layer < c->n_layers; layer++) {
        TRY(do_norm(job, phase, layer, NORM_ATTENTION));
        TRY(do_norm(job, phase, layer, NORM_MLP));
        TRY(do_biases(job, phase, layer));
    }
    TRY(do_norm(job, phase, 0, NORM_FINAL));
    if (c->head_bias) {
        TRY(do_dense(job, phase, MODEL_HEAD_NAME ".bias", c->vocab, 0, DT_F32, &r->norm_bytes));
    }
    TRY(do_dense(job, phase, MODEL_EMBED_NAME, c->vocab, c->hidden, DT_F16, &r->embed_bytes));
    if (!c->tied_head && !job->options->nested_head) {
        TRY(do_dense(job, phase, MODEL_HEAD_NAME ".weight", c->vocab, c->hidden, DT_F16,
                     &r->head_bytes));
    }
    return ST_OK;
}

/* ---- nested matrices ---- */

/* One array of levels: NAME.what.bits */
static enum status do_level(struct job *job, enum phase phase, const char *name, const char *what,
                            int bits, const uint16_t *data, const struct tensor *shape)
{
    if (phase == WRITE) {
        return checkpoint_writer_bytes(job->writer, data, tensor_bytes(shape));
    }
    char full[PART_NAME_BYTES];
    snprintf(full, sizeof full, "%s.%s.%d", name, what, bits);
    return checkpoint_writer_announce(job->writer, full, shape);
}

static enum status do_parts(struct job *job, enum phase phase, const char *name,
                            const struct nested_source *s)
{
    int32_t n_groups = nested_n_groups(s);
    struct tensor planes = tensor_3d(NULL, DT_U8, s->n_planes, s->n_rows, s->n_cols_padded / 8);
    struct tensor grid = tensor_2d(NULL, DT_F16, s->n_rows, n_groups);
    if (phase == WRITE) {
        TRY(checkpoint_writer_bytes(job->writer, s->planes, tensor_bytes(&planes)));
    } else {
        char full[PART_NAME_BYTES];
        snprintf(full, sizeof full, "%s.planes", name);
        TRY(checkpoint_writer_announce(job->writer, full, &planes));
    }
    for (int b = 1; b <= BITS_MAX; b++) {
        struct tensor alphas = tensor_3d(NULL, DT_F16, s->n_rows, n_groups, b);
        if (s->kind[b] == LEVEL_FREE) {
            TRY(do_level(job, phase, name, "alpha", b, s->alpha[b], &alphas));
        }
        if (s->kind[b] == LEVEL_TIED || s->kind[b] == LEVEL_TAIL) {
            TRY(do_level(job, phase, name, "scale", b, s->scale[b], &grid));
        }
        if (s->kind[b] == LEVEL_TAIL) {
            TRY(do_level(job, phase, name, "tail", b, s->tail, &grid));
        }
        if (s->kind[b] == LEVEL_LUT) {
            struct tensor table = tensor_2d(NULL, DT_F16, s->n_rows, 1 << b);
            TRY(do_level(job, phase, name, "lut", b, s->lut[b], &table));
        } else if (s->kind[b] != LEVEL_NONE) {
            TRY(do_level(job, phase, name, "offset", b, s->offset[b], &grid));
        }
    }
    return ST_OK;
}

static enum status announce_nested(struct job *job, const char *name, const struct fit_spec *spec,
                                   int32_t n_rows, int32_t n_cols, struct role_report *role)
{
    int32_t n_groups = (n_cols + spec->group_cols - 1) / spec->group_cols;
    struct nested_source s = {.n_rows = n_rows,
                              .n_cols = n_cols,
                              .group_cols = spec->group_cols,
                              .n_cols_padded = n_groups * spec->group_cols,
                              .n_planes = spec->n_planes};
    memcpy(s.kind, spec->kind, sizeof s.kind);
    uint64_t rows = (uint64_t)n_rows;
    role->planes_bytes += rows * (uint64_t)(s.n_cols_padded / 8) * (uint64_t)s.n_planes;
    for (int b = 1; b <= BITS_MAX; b++) {
        role->levels_bytes[b] += rows * level_values_per_row(s.kind[b], b, n_groups) * 2;
        if (s.kind[b] != LEVEL_NONE) {
            role->read_bytes[b] +=
                nested_bytes_read(s.kind, n_rows, s.n_cols_padded, s.group_cols, b, 1u << b);
        }
    }
    return do_parts(job, ANNOUNCE, name, &s);
}

static fit_row_fn *const fitters[N_METHODS] = {[METHOD_RTN] = baseline_rtn_row,
                                               [METHOD_GREEDY] = baseline_greedy_row,
                                               [METHOD_KMEANS] = baseline_kmeans_row};

static enum status fit_matrix(struct job *job, struct nested_buffer *buffer,
                              struct fit_report *report, const struct tensor *w,
                              const struct fit_spec *spec)
{
    int32_t n_rows = w->dims[0], n_cols = w->dims[1];
    int32_t step = n_cols < FIT_BLOCK ? FIT_BLOCK / n_cols : 1;
    double start = clock_s();
    for (int32_t begin = 0; begin < n_rows; begin += step) {
        int32_t end = n_rows - begin < step ? n_rows : begin + step;
        fit_row_fn *by = fitters[job->options->method];
        enum status st =
            by ? fit_rows_by(buffer, report, w, spec, by, begin, end, job->options->n_threads)
               : fit_rows(buffer, report, w, spec, begin, end, job->options->n_threads);
        TRY(st);
        job->n_done += (double)(end - begin) * n_cols;
        progress_update(&job->progress, job->n_done);
    }
    job->report->fit_s += clock_s() - start;
    return ST_OK;
}

static enum status write_nested(struct job *job, const char *name, const struct tensor *w,
                                const struct fit_spec *spec, struct role_report *role)
{
    struct nested_buffer buffer;
    struct fit_report fit = {0};
    enum status st = ST_OK;
    TRY_GOTO(st, nested_buffer_create(&buffer, spec, w->dims[0], w->dims[1]), done);
    TRY_GOTO(st, fit_matrix(job, &buffer, &fit, w, spec), done);
    TRY_GOTO(st, do_parts(job, WRITE, name, &buffer.source), done);
    if (fit.n_clamped) {
        log_warn("%s: %lld of %lld groups have levels beyond the range of F16, which were cut to "
                 "65504",
                 name, (long long)fit.n_clamped, (long long)fit.n_groups);
    }
    fit_report_add(&role->fit, &fit);
done:
    nested_buffer_free(&buffer);
    return st;
}

/* tensor: the name of the source's tensor; name: of the nested matrix. */
static enum status do_nested(struct job *job, enum phase phase, const char *name,
                             const char *tensor, int32_t n_rows, int32_t n_cols,
                             const struct fit_spec *spec, struct role_report *role)
{
    struct tensor w;
    TRY(checkpoint_get_shape(job->ckpt, tensor, n_rows, n_cols, &w));
    if (w.dtype != DT_F32 && w.dtype != DT_F16 && w.dtype != DT_BF16) {
        FAIL(ST_FORMAT, "tensor \"%s\" in %s: expected F32, F16 or BF16, found %s", tensor,
             job->model, dtype_name(w.dtype));
    }
    if (phase == ANNOUNCE) {
        job->progress.total += (double)n_rows * n_cols;
        return announce_nested(job, name, spec, n_rows, n_cols, role);
    }
    TRY(name_error(write_nested(job, name, &w, spec, role), job, tensor));
    checkpoint_done_with(job->ckpt, tensor);
    return ST_OK;
}

/* The same matrices in the same order, block by block, with calibration. */
static enum status write_calibrated(struct job *job)
{
    const struct nested_options *o = job->options;
    const struct model_config *c = &job->config;
    struct nested_report *r = job->report;
    const struct hessian_options how = {.grid = o->method == METHOD_GPTQ,
                                        .refit = o->method == METHOD_JOINT,
                                        .sweeps = o->method == METHOD_JOINT ? o->sweeps : 0};
    struct block_job blocks = {.config = c,
                               .ckpt = job->ckpt,
                               .spec = &o->spec,
                               .options = &how,
                               .cal = job->cal,
                               .store = &job->store,
                               .coll = job->coll,
                               .progress = &job->progress,
                               .n_done = &job->n_done,
                               .times = &r->fit,
                               .n_threads = o->n_threads};
    char name[MODEL_NAME_BYTES];
    for (int layer = 0; layer < c->n_layers; layer++) {
        struct fitted_block block;
        enum status st = block_fit(&block, &blocks, layer);
        for (int role = 0; st == ST_OK && role < M_N_ROLES; role++) {
            if (!model_has_role(c, (enum matrix_role)role)) {
                continue;
            }
            model_matrix_name(name, c, layer, (enum matrix_role)role);
            st = job->writer_rank ? do_parts(job, WRITE, name, &block.buffer[role].source) : ST_OK;
            fit_report_add(&r->role[role].fit, &block.report[role]);
        }
        fitted_block_free(&block);
        TRY(share_agree(job->coll, st));
    }
    r->n_resumed = blocks.n_resumed;
    if (o->nested_head) {
        const char *source = c->tied_head ? MODEL_EMBED_NAME : MODEL_HEAD_NAME ".weight";
        const struct hessian *h;
        struct tensor w;
        struct nested_buffer buffer = {0};
        TRY(checkpoint_get_shape(job->ckpt, source, c->vocab, c->hidden, &w));
        enum status st = share_agree(job->coll, calibrator_moments(job->cal, c->n_layers, M_Q, &h));
        st = st ? st
                : block_fit_matrix(&buffer, &r->role[ROLE_HEAD].fit, &blocks, &o->head_spec, &w, h,
                                   source);
        if (st == ST_OK && job->writer_rank) {
            st = do_parts(job, WRITE, MODEL_HEAD_NAME, &buffer.source);
        }
        nested_buffer_free(&buffer);
        TRY(share_agree(job->coll, st));
    }
    r->calib = calibrator_times(job->cal);
    for (int i = 0; i < N_FIT_STAGES; i++) {
        r->fit_s += r->fit.thread_s[i] / o->n_threads;
    }
    return ST_OK;
}

static enum status do_nested_tensors(struct job *job, enum phase phase)
{
    if (phase == WRITE && job->cal) {
        return write_calibrated(job);
    }
    const struct model_config *c = &job->config;
    char name[MODEL_NAME_BYTES], tensor[PART_NAME_BYTES];
    for (int layer = 0; layer < c->n_layers; layer++) {
        for (int role = 0; role < M_N_ROLES; role++) {
            int32_t n_rows, n_cols;
            if (!model_has_role(c, (enum matrix_role)role)) {
                continue;
            }
            model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
            model_matrix_name(name, c, layer, (enum matrix_role)role);
            snprintf(tensor, sizeof tensor, "%s.weight", name);
            job->n_used += phase == ANNOUNCE;
            TRY(do_nested(job, phase, name, tensor, n_rows, n_cols, &job->options->spec,
                          &job->report->role[role]));
        }
    }
    if (job->options->nested_head) {
        const char *source = c->tied_head ? MODEL_EMBED_NAME : MODEL_HEAD_NAME ".weight";
        job->n_used += phase == ANNOUNCE && !c->tied_head;
        TRY(do_nested(job, phase, MODEL_HEAD_NAME, source, c->vocab, c->hidden,
                      &job->options->head_spec, &job->report->role[ROLE_HEAD]));
    }
    return ST_OK;
}

/* ---- config.json ---- */

static json_t *linear_json(int32_t n_cols, const struct fit_spec *spec)
{
    json_t *levels = json_object();
    for (int b = 1; b <= BITS_MAX; b++) {
        const char key[2] = {(char)('0' + b), '\0'};
        if (spec->kind[b] != LEVEL_NONE) {
            json_object_set_new(levels, key, json_string(level_kind_name(spec->kind[b])));
        }
    }
    return json_pack("{s:i, s:o}", "n_cols", (int)n_cols, "levels", levels);
}

static json_t *lambda_json(const struct fit_spec *spec)
{
    json_t *lambda = json_object();
    for (int b = spec->lo; b <= spec->hi; b++) {
        const char key[2] = {(char)('0' + b), '\0'};
        if (spec->kind[b] != LEVEL_NONE) {
            json_object_set_new(lambda, key, json_real(spec->lambda[b]));
        }
    }
    return lambda;
}

static json_t *quantization_json(const struct job *job)
{
    const struct nested_options *o = job->options;
    const struct model_config *c = &job->config;
    json_t *linears = json_object();
    char name[MODEL_NAME_BYTES];
    for (int layer = 0; layer < c->n_layers; layer++) {
        for (int role = 0; role < M_N_ROLES; role++) {
            int32_t n_rows, n_cols;
            if (!model_has_role(c, (enum matrix_role)role)) {
                continue;
            }
            model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
            model_matrix_name(name, c, layer, (enum matrix_role)role);
            json_object_set_new(linears, name, linear_json(n_cols, &o->spec));
        }
    }
    if (o->nested_head) {
        json_object_set_new(linears, MODEL_HEAD_NAME, linear_json(c->hidden, &o->head_spec));
    }
    json_t *quant = json_pack("{s:s, s:i, s:s, s:s, s:s, s:s, s:i, s:i, s:o, s:o}", "quant_method",
                              "pmpd", "format_version", NESTED_FORMAT_VERSION, "method",
                              nested_method_name(o->method, o->calib != NULL), "version",
                              o->version, "source_digest", job->report->source_digest, "levels",
                              level_kind_name(o->spec.kind[o->spec.hi]), "group_size",
                              (int)o->spec.group_cols, "n_planes", o->spec.n_planes, "lambda",
                              lambda_json(&o->spec), "linears", linears);
    if (quant && o->calib) {
        json_object_set_new(quant, "calibration",
                            json_pack("{s:s, s:I, s:i, s:i, s:f}", "digest",
                                      job->report->calib_digest, "tokens",
                                      (json_int_t)o->calib->begin[o->calib->n], "windows",
                                      (int)o->calib->n, "sweeps", o->sweeps, "damping", o->damp));
    }
    return quant;
}

static enum status write_config(struct job *job)
{
    char path[OUT_PATH_BYTES];
    json_t *json = NULL;
    char *text = NULL;
    int n = snprintf(path, sizeof path, "%s/config.json", job->model);
    if (n < 0 || n >= OUT_PATH_BYTES) {
        FAIL(ST_IO, "the path of the model folder is longer than %d bytes", OUT_PATH_BYTES - 16);
    }
    enum status st = json_read_file(&json, path, CONFIG_BYTES_MAX);
    TRY_GOTO(st, st, done);
    json_t *quant = quantization_json(job);
    if (!quant || json_object_set_new(json, "quantization_config", quant) != 0 ||
        !(text = json_dumps(json, JSON_INDENT(2) | JSON_REAL_PRECISION(12)))) {
        FAIL_GOTO(st, ST_NOMEM, done, "out of memory for config.json");
    }
    size_t bytes = strlen(text);
    text[bytes] = '\n'; /* in the place of the end: the bytes are counted */
    TRY_GOTO(st, out_folder_write(&job->out, "config.json", text, bytes + 1), done);
    job->report->files_bytes += bytes + 1;
done:
    free(text); /* jansson allocates with malloc */
    json_release(&json);
    return st;
}

/* ---- the whole ---- */

/* Tensors that no model of this config uses; rotary tables of old files are computed. */
static void warn_unused(const struct job *job)
{
    int n_unused = checkpoint_n_tensors(job->ckpt) - job->n_used, n_known = 0;
    for (int i = 0; i < checkpoint_n_tensors(job->ckpt); i++) {
        const char *name = checkpoint_name(job->ckpt, i);
        n_known += strstr(name, "rotary_emb.inv_freq") != NULL;
        n_known += job->config.tied_head && strcmp(name, MODEL_HEAD_NAME ".weight") == 0;
    }
    if (n_unused > n_known) {
        log_warn("%s holds %d tensors that a %s model with this config.json does not use; they are "
                 "left out",
                 job->model, n_unused - n_known, model_family_name(job->config.family));
    }
}

static const char *const method_names[N_METHODS] = {"joint", "rtn", "bcq-greedy", "kmeans", "gptq"};

const char *nested_method_name(enum nested_method method, bool calibrated)
{
    return method == METHOD_JOINT && !calibrated ? "joint-data-free" : method_names[method];
}

/* Everything that decides what a block becomes, in one line. */
static void make_stamp(char stamp[STAMP_BYTES], const struct job *job)
{
    const struct nested_options *o = job->options;
    int n = snprintf(stamp, STAMP_BYTES,
                     "model %s calibration %s method %s group %d damp %.17g "
                     "sweeps %d levels",
                     job->report->source_digest, job->report->calib_digest,
                     nested_method_name(o->method, true), o->spec.group_cols, o->damp, o->sweeps);
    for (int b = 1; b <= BITS_MAX; b++) {
        if (o->spec.kind[b] != LEVEL_NONE) {
            n += snprintf(stamp + n, (size_t)(STAMP_BYTES - n), " %d:%s:%.17g", b,
                          level_kind_name(o->spec.kind[b]), o->spec.lambda[b]);
        }
    }
}

static enum status begin_calibration(struct job *job, const char *out)
{
    const struct nested_options *o = job->options;
    const struct calibrator_options options = {.damp = o->damp, .n_threads = o->n_threads};
    char stamp[STAMP_BYTES];
    windows_digest(o->calib, job->report->calib_digest);
    make_stamp(stamp, job);
    TRY(calibrator_create(&job->cal, &job->config, job->ckpt, o->calib, &options));
    return job->writer_rank ? block_store_begin(&job->store, out, stamp) : ST_OK;
}

/* Everything before the first weight is fitted. */
static enum status prepare_job(struct job *job, const char *out, char path[OUT_PATH_BYTES])
{
    TRY(model_config_read(&job->config, job->model));
    if (job->config.nested) {
        FAIL(ST_USER, "%s is nested already; quantize takes the dense model it was made from",
             job->model);
    }
    job->report->family = job->config.family;
    TRY(checkpoint_open(&job->ckpt, job->model));
    TRY(model_check_biases(&job->config, job->ckpt));
    progress_begin(&job->progress, "quantize", "weights", 0);
    if (job->writer_rank) {
        TRY(out_folder_begin(&job->out, out, job->options->force));
        TRY(out_folder_path(path, &job->out, "model.safetensors"));
        TRY(checkpoint_writer_create(&job->writer, path));
        TRY(do_dense_tensors(job, ANNOUNCE));
        TRY(do_nested_tensors(job, ANNOUNCE));
        warn_unused(job);
        TRY(checkpoint_digest(job->ckpt, job->model, job->report->source_digest));
    }
    return job->options->calib ? begin_calibration(job, out) : ST_OK;
}

static enum status run_job(struct job *job, const char *out)
{
    char path[OUT_PATH_BYTES];
    bool has_tokenizer;
    TRY(share_agree(job->coll, prepare_job(job, out, path)));
    TRY(share_agree(job->coll, job->writer_rank ? do_dense_tensors(job, WRITE) : ST_OK));
    if (job->writer_rank || job->cal) {
        TRY(do_nested_tensors(job, WRITE));
    }
    if (!job->writer_rank) {
        return ST_OK;
    }
    progress_end(&job->progress);
    TRY(checkpoint_writer_finish(job->writer));
    struct stat info;
    if (stat(path, &info) != 0) {
        FAIL(ST_IO, "cannot see %s: %s", path, strerror(errno));
    }
    job->report->weights_bytes = (uint64_t)info.st_size;
    TRY(write_config(job));
    TRY(out_folder_copy_files(&job->out, job->model, &job->report->files_bytes, &has_tokenizer));
    if (!has_tokenizer) {
        log_warn("%s has neither tokenizer.json nor tokenizer.model; the nested model can only be "
                 "used with token ids",
                 job->model);
    }
    TRY(out_folder_commit(&job->out));
    block_store_remove(&job->store);
    return ST_OK;
}

enum status nested_write(struct nested_report *report, const char *model, const char *out,
                         const struct nested_options *options)
{
    const struct fit_spec *head = &options->head_spec;
    INVARIANT(options->calib ? options->method == METHOD_JOINT || options->method == METHOD_GPTQ
                             : options->method != METHOD_GPTQ);
    INVARIANT(!options->nested_head || (head->n_planes == options->spec.n_planes &&
                                        head->group_cols == options->spec.group_cols));
    *report = (struct nested_report){0};
    struct job job = {.options = options, .report = report, .model = model, .coll = options->coll};
    struct collective alone;
    collective_local(&alone);
    job.coll = job.coll ? job.coll : &alone;
    job.writer_rank = job.coll->rank == 0;
    double start = clock_s();
    enum status st = run_job(&job, out);
    checkpoint_writer_destroy(&job.writer);
    out_folder_abandon(&job.out);
    calibrator_destroy(&job.cal);
    checkpoint_close(&job.ckpt);
    report->total_bytes = report->weights_bytes + report->files_bytes;
    report->total_s = clock_s() - start;
    return st;
}
