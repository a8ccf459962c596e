/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/quantise/fit_spec.h"

#include <math.h>

static enum status check_bits(uint32_t bits, enum level_kind kind, bool tail, int32_t group_cols)
{
    const uint32_t allowed = 1u << 2 | 1u << 3 | 1u << 4;
    if (bits >> 8 & 1) {
        FAIL(ST_USER, "8 bits are made as a tail on top of 4, not as a precision of the list; give "
                      "--bits 2,3,4 --tail 8");
    }
    if (bits & 0xe0) {
        FAIL(ST_USER, "5 to 7 bits cannot be stored: cut from the 8-bit tail they are worse than 4 "
                      "bits; choose from 2, 3, 4 and --tail 8");
    }
    if (bits == 0 || (bits & ~allowed) != 0) {
        FAIL(ST_USER, "the precisions must be chosen from 2, 3 and 4 bits");
    }
    if (kind != LEVEL_TIED && kind != LEVEL_FREE) {
        FAIL(ST_USER, "levels are '%s', expected tied or free", level_kind_name(kind));
    }
    if (tail && !(bits >> FIT_MAX_BITS & 1)) {
        FAIL(ST_USER, "the 8-bit tail is made of 4 planes on top of 4 bits; add 4 to --bits");
    }
    if (group_cols != 32 && group_cols != 64 && group_cols != 128) {
        FAIL(ST_USER, "a group is %d columns, expected 32, 64 or 128", group_cols);
    }
    return ST_OK;
}

enum status fit_spec_make(struct fit_spec *out, uint32_t bits, enum level_kind kind, bool tail,
                          int32_t group_cols, const double *lambda)
{
    TRY(check_bits(bits, kind, tail, group_cols));
    *out = (struct fit_spec){.group_cols = group_cols};
    for (int b = FIT_MIN_BITS; b <= FIT_MAX_BITS; b++) {
        if (!(bits >> b & 1)) {
            continue;
        }
        if (out->lo == 0) {
            out->lo = b;
        }
        out->hi = b;
        out->kind[b] = kind;
        out->lambda[b] = lambda ? *lambda++ : (double)(1 << 2 * (b - out->lo));
        if (!(out->lambda[b] >= 1e-6 && out->lambda[b] <= 1e6)) {
            FAIL(ST_USER, "the weight of %d bits is %g, expected a number from 1e-6 to 1e6", b,
                 out->lambda[b]);
        }
    }
    out->n_planes = out->hi;
    if (tail) {
        out->kind[FIT_TAIL_BITS] = LEVEL_TAIL;
        out->n_planes = FIT_TAIL_BITS;
    }
    return ST_OK;
}

double fit_report_relative(const struct fit_report *report, int bits)
{
    return report->power > 0 ? sqrt(report->error[bits] / report->power) : 0;
}

double fit_report_output(const struct fit_report *report, int bits)
{
    double error = report->output_error[bits];
    return report->output_power > 0 && error > 0 ? sqrt(error / report->output_power) : 0;
}

void fit_report_add(struct fit_report *sum, const struct fit_report *part)
{
    sum->power += part->power;
    sum->output_power += part->output_power;
    for (int b = 0; b < BITS_ALL; b++) {
        sum->error[b] += part->error[b];
        sum->output_error[b] += part->output_error[b];
    }
    sum->n_weights += part->n_weights;
    sum->n_groups += part->n_groups;
    sum->n_clamped += part->n_clamped;
}
