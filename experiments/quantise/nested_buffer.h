/* A nested matrix being made: planes and levels in the layout of core/bitplane.h, in one block, and
 * how codes and levels are put there.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_NESTED_BUFFER_H
#define PMPD_EXPERIMENTS_QUANTISE_NESTED_BUFFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/bitplane.h"
#include "core/status.h"
#include "experiments/quantise/fit_spec.h"

/* A nested matrix being made. Fill with nested_buffer_create, give back with nested_buffer_free. */
struct nested_buffer {
    struct nested_source source; /* views of block: this is what is stored */
    void *block;                 /* owned */
    size_t planes_bytes, total_bytes;
    size_t level_values[BITS_ALL]; /* F16 values of all arrays of a precision */
};
/* Errors: ST_SHAPE (empty matrix, sizes overflow), ST_NOMEM. */
MUST_CHECK enum status nested_buffer_create(struct nested_buffer *out, const struct fit_spec *spec,
                                            int32_t n_rows, int32_t n_cols);
void nested_buffer_free(struct nested_buffer *buffer);

/* Levels of one group as they are stored (F16); entries of precisions not held are not written. */
struct group_levels {
    uint16_t scale[BITS_ALL], offset[BITS_ALL];
    uint16_t alpha[BITS_ALL][FIT_MAX_BITS];
    uint16_t tail;
    bool clamped; /* a level was outside the range of F16 and is now its end */
};
/* The nearest F16, or the end of its range, which sets *clamped. */
uint16_t nested_store_f16(bool *clamped, double value);

/* Rows are written by one thread each; different rows may be written at once. */
void nested_buffer_put_levels(const struct nested_buffer *out, int32_t row, int32_t group,
                              const struct group_levels *levels);
/* lut (2^bits) of a row whose precision is LUT. */
void nested_buffer_put_lut(const struct nested_buffer *out, int32_t row, int bits,
                           const uint16_t *lut);
/* code (n_cols_padded): n_planes bits each, the first plane the most significant. */
void nested_buffer_put_codes(const struct nested_buffer *out, int32_t row, const uint8_t *code);

#endif
