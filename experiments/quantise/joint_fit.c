/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/joint_fit.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "experiments/quantise/group_fit.h"

static bool joint_row(const struct nested_buffer *out, struct fit_report *report,
                      const struct fit_spec *spec, int32_t row, const float *w, uint8_t *code)
{
    const struct nested_source *s = &out->source;
    int32_t n_groups = nested_n_groups(s);
    for (int32_t j = 0; j < n_groups; j++) {
        int32_t begin = j * s->group_cols, left = s->n_cols - begin;
        struct group_levels levels;
        double error[BITS_ALL] = {0};
        group_fit(code + begin, &levels, error, spec, w + begin,
                  left < s->group_cols ? left : s->group_cols);
        nested_buffer_put_levels(out, row, j, &levels);
        for (int b = 0; b < BITS_ALL; b++) {
            report->error[b] += error[b];
        }
        report->n_clamped += levels.clamped;
    }
    return true;
}

/* One row; w and code have room for n_cols_padded. False: out of memory. */
static bool fit_row(const struct nested_buffer *out, struct fit_report *report,
                    const struct fit_spec *spec, fit_row_fn *fit, int32_t row, const float *w,
                    uint8_t *code)
{
    const struct nested_source *s = &out->source;
    memset(code, 0, (size_t)s->n_cols_padded);
    *report = (struct fit_report){.n_weights = s->n_cols, .n_groups = nested_n_groups(s)};
    for (int32_t i = 0; i < s->n_cols; i++) {
        report->power += (double)w[i] * (double)w[i];
    }
    bool good = fit(out, report, spec, row, w, code);
    nested_buffer_put_codes(out, row, code);
    return good;
}

enum { NONE_BAD = -1, NO_MEMORY = -2 };

/* First column that is not finite; NONE_BAD: none. */
static int32_t find_not_finite(const float *w, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (!isfinite(w[i])) {
            return i;
        }
    }
    return NONE_BAD;
}

enum status fit_rows(struct nested_buffer *out, struct fit_report *report, const struct tensor *w,
                     const struct fit_spec *spec, int32_t begin, int32_t end, int n_threads)
{
    return fit_rows_by(out, report, w, spec, joint_row, begin, end, n_threads);
}

enum status fit_rows_by(struct nested_buffer *out, struct fit_report *report,
                        const struct tensor *w, const struct fit_spec *spec, fit_row_fn *fit,
                        int32_t begin, int32_t end, int n_threads)
{
    const struct nested_source *s = &out->source;
    INVARIANT(w->n_dims == 2 && w->dims[0] == s->n_rows && w->dims[1] == s->n_cols);
    INVARIANT(begin >= 0 && begin <= end && end <= s->n_rows && n_threads >= 1);
    enum status st = ST_OK;
    size_t width = (size_t)s->n_cols_padded;
    float *rows = NULL;
    uint8_t *codes = NULL;
    struct fit_report *parts = NULL; /* per row, added in order: no thread decides the rounding */
    int32_t *bad_col = NULL;
    size_t scratch;
    TRY_GOTO(st, mem_mul(&scratch, width, (size_t)n_threads), done);
    TRY_GOTO(st, MEM_NEW(&rows, scratch), done);
    TRY_GOTO(st, MEM_NEW(&codes, scratch), done);
    TRY_GOTO(st, MEM_NEW(&parts, end - begin), done);
    TRY_GOTO(st, MEM_NEW(&bad_col, end - begin), done);
    size_t row_bytes = (size_t)s->n_cols * dtype_bytes(w->dtype);
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1)
    for (int32_t i = begin; i < end; i++) {
        float *row = rows + width * (size_t)omp_get_thread_num();
        uint8_t *code = codes + width * (size_t)omp_get_thread_num();
        floats_from(row, (const char *)w->data + (size_t)i * row_bytes, w->dtype,
                    (size_t)s->n_cols);
        bad_col[i - begin] = find_not_finite(row, s->n_cols);
        if (bad_col[i - begin] == NONE_BAD &&
            !fit_row(out, &parts[i - begin], spec, fit, i, row, code)) {
            bad_col[i - begin] = NO_MEMORY;
        }
    }
    for (int32_t i = begin; i < end; i++) {
        int32_t col = bad_col[i - begin];
        if (col == NO_MEMORY) {
            FAIL_GOTO(st, ST_NOMEM, done, "out of memory for a row of %d weights", s->n_cols);
        }
        if (col >= 0) {
            float value;
            floats_from(&value,
                        (const char *)w->data + (size_t)i * row_bytes +
                            (size_t)col * dtype_bytes(w->dtype),
                        w->dtype, 1);
            FAIL_GOTO(st, ST_FORMAT, done,
                      "weight (%d, %d) is %s, expected a finite number; the file is damaged or the "
                      "training diverged",
                      i, col, isnan(value) ? "NaN" : "infinite");
        }
        fit_report_add(report, &parts[i - begin]);
    }
done:
    mem_free(rows);
    mem_free(codes);
    mem_free(parts);
    mem_free(bad_col);
    return st;
}
