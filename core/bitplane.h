/* The nested layout, once: how bits and levels become weights. Everything that reads or writes a
 * nested matrix (loader, quantiser, kernels' oracle) agrees through this file.
 *
 * A matrix (n_rows, n_cols) is stored as n_planes bit-planes, plane 0 the most significant bit;
 * n_cols is padded with columns whose activations are zero up to n_cols_padded, a multiple of
 * group_cols. Bit t of byte j of a plane's row is column 8j + t. The b-bit code of a weight is its
 * first b planes read as a number, most significant first; the b-bit model is these codes with the
 * levels of precision b (all levels are F16 on disk and exact in f32):
 *   TIED  w = offset + scale * (2c - (2^b - 1)) / 2
 *   FREE  w = offset + sum_p alpha[p] * (2 bit_p - 1)
 *   LUT   w = lut[row][c]
 *   TAIL  (8 bits on top of 4) c = planes 0..3, t = planes 4..7:
 *         w = offset + scale * (2c - 15) / 2 + tail * (2t - 15) / 2
 * Source: AnyBCQ (arXiv 2510.10467) for FREE, Any-Precision LLM (arXiv 2402.10517) for LUT.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_BITPLANE_H
#define PMPD_CORE_BITPLANE_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

enum level_kind { LEVEL_NONE = 0, LEVEL_TIED, LEVEL_FREE, LEVEL_LUT, LEVEL_TAIL, LEVEL_N };

enum { BITS_MAX = 8, BITS_ALL = BITS_MAX + 1, LEVELS_MAX = 1 << BITS_MAX };

/* "tied" and back; level_kind_parse gives LEVEL_N for an unknown word. */
const char *level_kind_name(enum level_kind kind);
enum level_kind level_kind_parse(const char *word);

/* A whole matrix as it lies in memory or in a mapped file; all pointers borrowed. Indexed by
 * precision b; pointers of precisions with kind NONE are NULL. */
struct nested_source {
    enum level_kind kind[BITS_ALL];
    int32_t n_rows, n_cols, n_cols_padded, group_cols;
    int32_t n_planes;
    const uint8_t *planes;            /* (n_planes, n_rows, n_cols_padded / 8) */
    const uint16_t *scale[BITS_ALL];  /* (n_rows, n_groups) F16: TIED, TAIL */
    const uint16_t *offset[BITS_ALL]; /* (n_rows, n_groups) F16: TIED, FREE, TAIL */
    const uint16_t *alpha[BITS_ALL];  /* (n_rows, n_groups, b) F16: FREE */
    const uint16_t *lut[BITS_ALL];    /* (n_rows, 2^b) F16: LUT */
    const uint16_t *tail;             /* (n_rows, n_groups) F16: TAIL, precision 8 */
};

/* n_cols_padded / group_cols */
int32_t nested_n_groups(const struct nested_source *w);
/* F16 values of one row's levels of precision `bits`: TIED 2g, FREE (b + 1)g, LUT 2^b, TAIL 3g
 * with g the number of groups; 0 for NONE. */
size_t level_values_per_row(enum level_kind kind, int bits, int32_t n_groups);
/* Bytes that one product reads of a whole matrix when the highest precision in the pass is
 * max_bits and the set of precisions is bits_used (bit b set: precision b occurs). */
size_t nested_bytes_read(const enum level_kind kind[BITS_ALL], int32_t n_rows,
                         int32_t n_cols_padded, int32_t group_cols, int max_bits,
                         uint32_t bits_used);
/* Highest precision with levels; 0 if there is none. */
int nested_max_bits(const struct nested_source *w);

/* The b-bit code of one weight. col < n_cols_padded. */
uint32_t bitplane_code(const struct nested_source *w, int32_t row, int32_t col, int bits);
/* out[c], c < 2^bits: the weights that codes of this row and group stand for, in f32, evaluated
 * in exactly the order written above (this is the definition that every kernel reproduces). */
void bitplane_level_table(float *out, const struct nested_source *w, int32_t row, int32_t group,
                          int bits);
/* One weight at one precision. */
float bitplane_weight(const struct nested_source *w, int32_t row, int32_t col, int bits);

/* Level tables from bare F16 values, for backends that keep levels in a layout of their own. */
void level_table_tied(float *out, int bits, float scale, float offset);
void level_table_free(float *out, int bits, const float *alpha, float offset);
void level_table_tail(float *out, float scale, float tail, float offset);

#endif
