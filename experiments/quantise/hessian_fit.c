/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/hessian_fit.h"

#include <math.h>
#include <string.h>

#include "core/log.h"
#include "core/mem.h"
#include "experiments/quantise/row_chunk.h"

static const char *const stage_names[N_FIT_STAGES] = {"start", "feedback", "refit",
                                                      "sweep", "tail",     "measure"};

const char *fit_stage_name(enum fit_stage stage)
{
    return stage_names[stage];
}

static void sum_groups(struct chunk_job *job)
{
    size_t n = (size_t)job->h->n, width = (size_t)job->spec->group_cols;
    for (size_t k = 0; k < n; k++) {
        float *to = job->group_sums + k / width * n;
        for (size_t j = 0; j < n; j++) {
            to[j] += job->h->h[k * n + j];
        }
    }
}

static enum status job_create(struct chunk_job *job, const struct hessian *h,
                              const struct fit_spec *spec, const struct hessian_options *options)
{
    *job = (struct chunk_job){.spec = spec, .options = options, .h = h};
    size_t n = (size_t)h->n;
    job->n_groups = (h->n + spec->group_cols - 1) / spec->group_cols;
    for (int b = spec->lo; b <= spec->hi; b++) {
        if (spec->kind[b] != LEVEL_NONE) {
            job->slot_bits[job->n_slots++] = b;
        }
    }
    TRY(MEM_NEW(&job->column_weight, n));
    TRY(MEM_NEW(&job->group_sums, (size_t)job->n_groups * n)); /* at most n * n, which exists */
    double mean = 0;
    for (size_t k = 0; k < n; k++) {
        double u = (double)h->u[k * n + k];
        mean += 1 / (u * u) / (double)n;
    }
    for (size_t k = 0; k < n; k++) {
        double u = (double)h->u[k * n + k];
        job->column_weight[k] = (float)(1 / (u * u) / mean);
    }
    sum_groups(job);
    return ST_OK;
}

static void job_free(struct chunk_job *job)
{
    mem_free(job->column_weight);
    mem_free(job->group_sums);
}

static enum status refit_all(struct row_chunk *c)
{
    for (int s = 0; s < c->job->n_slots; s++) {
        TRY(chunk_refit(c, c->job->slot_bits[s]));
    }
    return ST_OK;
}

/* Fills w; the position of the first value that is not finite goes to *bad (row * n + column). */
static void load_rows(struct row_chunk *c, const struct tensor *w, int32_t first, int64_t *bad)
{
    size_t n = (size_t)c->n, count = (size_t)c->rows * n, at = (size_t)first * n;
    floats_from(c->w, (const char *)w->data + at * dtype_bytes(w->dtype), w->dtype, count);
    *bad = -1;
    for (size_t i = 0; *bad < 0 && i < count; i++) {
        if (!isfinite(c->w[i])) {
            *bad = (int64_t)(at + i);
        }
    }
}

static enum status fit_chunk(const struct chunk_job *job, struct nested_buffer *out,
                             struct fit_report *report, struct fit_times *times,
                             const struct tensor *w, int32_t first, int32_t rows, int64_t *bad)
{
    struct row_chunk c;
    enum status st = ST_OK;
    TRY_GOTO(st, chunk_create(&c, job, rows, times), done);
    load_rows(&c, w, first, bad);
    if (*bad >= 0) {
        goto done;
    }
    double begin = clock_s();
    blas_gemm(rows, c.n, c.n, 1.0f, c.w, c.n, job->h->h, c.n, 0.0f, c.wh, c.n);
    chunk_time(&c, FIT_MEASURE, begin, 2.0 * rows * (double)c.n * c.n);
    chunk_feedback(&c);
    if (job->options->refit) {
        TRY_GOTO(st, refit_all(&c), done);
    }
    for (int i = 0; i < job->options->sweeps; i++) {
        chunk_sweep(&c);
        if (job->options->refit) {
            TRY_GOTO(st, refit_all(&c), done);
        }
    }
    if (job->spec->kind[FIT_TAIL_BITS] != LEVEL_NONE) {
        chunk_tail(&c);
        TRY_GOTO(st, chunk_refit(&c, FIT_TAIL_BITS), done);
    }
    chunk_store(&c, out, report, first);
done:
    chunk_free(&c);
    return st;
}

static void add_times(struct fit_times *to, const struct fit_times *from)
{
    for (int i = 0; i < N_FIT_STAGES; i++) {
        to->thread_s[i] += from->thread_s[i];
        to->flop[i] += from->flop[i];
    }
}

/* What one chunk leaves behind; added in the order of the rows. */
struct part {
    struct fit_report report;
    struct fit_times times;
    int64_t bad;
    enum status st;
};

static enum status collect(struct part *parts, int32_t n, struct fit_report *report,
                           struct fit_times *times, const struct tensor *w)
{
    for (int32_t i = 0; i < n; i++) {
        if (parts[i].st != ST_OK) { /* the message stayed with the thread that raised it */
            FAIL(parts[i].st, "out of memory for a chunk of %d rows of a matrix with %d columns",
                 FIT_CHUNK_ROWS, w->dims[1]);
        }
        if (parts[i].bad >= 0) {
            FAIL(ST_FORMAT,
                 "weight (%d, %d) is not a finite number; the file is damaged or the training "
                 "diverged",
                 (int)(parts[i].bad / w->dims[1]), (int)(parts[i].bad % w->dims[1]));
        }
        fit_report_add(report, &parts[i].report);
        add_times(times, &parts[i].times);
    }
    return ST_OK;
}

enum status hessian_fit_rows(struct nested_buffer *out, struct fit_report *report,
                             struct fit_times *times, const struct tensor *w,
                             const struct hessian *h, const struct fit_spec *spec,
                             const struct hessian_options *options, int32_t begin, int32_t end,
                             int n_threads)
{
    INVARIANT(w->n_dims == 2 && w->dims[1] == h->n && h->n_tok > 0 && n_threads >= 1);
    INVARIANT(begin % FIT_CHUNK_ROWS == 0 && begin <= end && end <= w->dims[0]);
    INVARIANT(!options->grid || (spec->lo == spec->hi && spec->kind[spec->hi] == LEVEL_TIED));
    struct chunk_job job;
    struct part *parts = NULL;
    int32_t n_parts = (end - begin + FIT_CHUNK_ROWS - 1) / FIT_CHUNK_ROWS;
    enum status st = ST_OK;
    TRY_GOTO(st, job_create(&job, h, spec, options), done);
    TRY_GOTO(st, MEM_NEW(&parts, n_parts), done);
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1)
    for (int32_t i = 0; i < n_parts; i++) {
        int32_t first = begin + i * FIT_CHUNK_ROWS;
        int32_t rows = end - first < FIT_CHUNK_ROWS ? end - first : FIT_CHUNK_ROWS;
        parts[i].bad = -1;
        parts[i].st =
            fit_chunk(&job, out, &parts[i].report, &parts[i].times, w, first, rows, &parts[i].bad);
    }
    TRY_GOTO(st, collect(parts, n_parts, report, times, w), done);
done:
    job_free(&job);
    mem_free(parts);
    return st;
}
