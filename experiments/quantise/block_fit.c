/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/block_fit.h"

#include <stdio.h>

enum { STEP_ROWS = 4 * FIT_CHUNK_ROWS, TENSOR_NAME_BYTES = MODEL_NAME_BYTES + 16 };

enum status block_fit_matrix(struct nested_buffer *out, struct fit_report *report,
                             struct block_job *job, const struct fit_spec *spec,
                             const struct tensor *w, const struct hessian *h, const char *name)
{
    int32_t n_rows = w->dims[0], first, last;
    enum status st = nested_buffer_create(out, spec, n_rows, w->dims[1]);
    share_rows(&first, &last, n_rows, FIT_CHUNK_ROWS, job->coll, job->coll->rank);
    /* steps of so many rows that every thread has its share, for a progress line that moves */
    int32_t step = job->n_threads > 4 ? FIT_CHUNK_ROWS * job->n_threads : STEP_ROWS;
    for (int32_t begin = first; st == ST_OK && begin < last; begin += step) {
        int32_t end = last - begin < step ? last : begin + step;
        st = hessian_fit_rows(out, report, job->times, w, h, spec, job->options, begin, end,
                              job->n_threads);
        *job->n_done += (double)(end - begin) * n_rows / (last - first) * w->dims[1];
        progress_update(job->progress, *job->n_done);
    }
    if (st != ST_OK) {
        status_prefix(st, "tensor \"%s\": ", name);
    }
    TRY(share_agree(job->coll, st));
    TRY(share_gather(job->coll, out, FIT_CHUNK_ROWS));
    TRY(share_report(job->coll, report));
    if (report->n_clamped) {
        log_warn("%s: %lld of %lld groups have levels beyond the range of F16, which were cut to "
                 "65504",
                 name, (long long)report->n_clamped, (long long)report->n_groups);
    }
    return ST_OK;
}

static enum status fit_role(struct fitted_block *out, struct block_job *job, int layer,
                            enum matrix_role role)
{
    char name[MODEL_NAME_BYTES], tensor[TENSOR_NAME_BYTES], what[64];
    int32_t n_rows, n_cols;
    struct tensor w;
    const struct hessian *h;
    model_matrix_shape(job->config, role, &n_rows, &n_cols);
    model_matrix_name(name, job->config, layer, role);
    snprintf(tensor, sizeof tensor, "%s.weight", name);
    snprintf(what, sizeof what, "block %d of %d, %s", layer + 1, job->config->n_layers,
             model_role_name(job->config->family, role));
    job->progress->what = what;
    TRY(checkpoint_get_shape(job->ckpt, tensor, n_rows, n_cols, &w));
    enum status st = calibrator_moments(job->cal, layer, role, &h);
    if (st != ST_OK) {
        status_prefix(st, "the input of \"%s\": ", tensor);
    }
    TRY(share_agree(job->coll, st));
    st = block_fit_matrix(&out->buffer[role], &out->report[role], job, job->spec, &w, h, tensor);
    job->progress->what = "quantize";
    TRY(st);
    checkpoint_done_with(job->ckpt, tensor);
    return share_agree(job->coll, calibrator_put(job->cal, layer, role, &out->buffer[role].source));
}

/* A block of an earlier run. */
static enum status take_stored(struct fitted_block *out, struct block_job *job, int layer,
                               bool *found)
{
    for (int role = 0; role < M_N_ROLES; role++) {
        int32_t n_rows, n_cols;
        if (!model_has_role(job->config, (enum matrix_role)role)) {
            continue;
        }
        model_matrix_shape(job->config, (enum matrix_role)role, &n_rows, &n_cols);
        TRY(nested_buffer_create(&out->buffer[role], job->spec, n_rows, n_cols));
    }
    bool keeper = job->coll->rank == 0;
    TRY(share_agree(job->coll, keeper ? block_store_get(job->store, layer, out, found) : ST_OK));
    TRY(share_broadcast(job->coll, found, sizeof *found));
    for (int role = 0; *found && role < M_N_ROLES; role++) {
        if (!model_has_role(job->config, (enum matrix_role)role)) {
            continue;
        }
        struct nested_buffer *buffer = &out->buffer[role];
        TRY(share_broadcast(job->coll, buffer->block, buffer->total_bytes));
        TRY(share_broadcast(job->coll, &out->report[role], sizeof out->report[role]));
        TRY(calibrator_put(job->cal, layer, (enum matrix_role)role, &buffer->source));
        job->progress->total -= (double)out->report[role].n_weights;
    }
    return ST_OK;
}

enum status block_fit(struct fitted_block *out, struct block_job *job, int layer)
{
    bool found = false;
    double begin = clock_s();
    *out = (struct fitted_block){0};
    TRY(take_stored(out, job, layer, &found));
    if (found) {
        job->n_resumed++;
        return ST_OK;
    }
    fitted_block_free(out);
    for (int role = 0; role < M_N_ROLES; role++) {
        if (model_has_role(job->config, (enum matrix_role)role)) {
            TRY(fit_role(out, job, layer, (enum matrix_role)role));
        }
    }
    TRY(share_agree(job->coll,
                    job->coll->rank == 0 ? block_store_put(job->store, layer, out) : ST_OK));
    double spent = clock_s() - begin;
    if (spent > 2) {
        log_info("block %d of %d done in %.1f s", layer + 1, job->config->n_layers, spent);
    }
    return ST_OK;
}
