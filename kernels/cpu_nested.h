/* Nested matrices on the cpu: their layout, and the inner loops that exist once per instruction
 * set. Private to cpu*.c.
 *
 * Layout. Rows are taken NESTED_ROWS at a time, a tile; a plane of a tile is one run of bytes in
 * which `together` neighbouring bytes of a row lie side by side, then those of the next row:
 *   byte of (row r of the tile, byte j of the row) = (j / together * NESTED_ROWS + r) * together
 *                                                    + j % together
 * (byte j of a row is columns 8j..8j + 7, as in core/bitplane.h). The levels of one precision of a
 * tile are (n_groups, n_terms + 1, NESTED_ROWS) F16: the scales of the terms, then the offset. A
 * term is a run of planes with one scale: TIED one term of all planes, FREE a term per plane, TAIL
 * two terms of four planes. LUT levels are (row, 2^bits), and such rows are decoded to f32.
 *
 * Arithmetic. Activations are quantised by group: act_cols columns, a divisor of the scale group.
 *   ONE (look-ups): s = max over fours of columns (|x0| + |x1|) + (|x2| + |x3|); every four has a
 *     table of its 16 signed sums, rounded to multiples of s / 127 (nearest, ties to even). Per row
 *     and plane the entries that the plane's bits point at are added exactly, in integers.
 *   SLOTS and CHUNK (dots): s = max |x|; q = x * 127 / s rounded; codes times q are added exactly.
 * Then, in f32 and group after group from a sum of zero: for each term y = fma(scale, (float)I * h,
 * y), with I the exact integer sum of (2 bit - 1) or (2 code - most) and h = s / 127 (halved for
 * terms that are not FREE), then y = fma(offset, X, y), X the sum of the group's x. Every
 * instruction set does these same operations, so all of them give the same bits.
 * Source of the look-ups: T-MAC (arXiv 2407.00088), section 3, without its lossy aggregation.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_CPU_NESTED_H
#define PMPD_KERNELS_CPU_NESTED_H

#include <stdint.h>

#include "core/bitplane.h"

enum {
    NESTED_ROWS = 32,        /* of a tile */
    NESTED_STEP = 32,        /* columns of one step of an inner loop */
    NESTED_ACT_MAX = 128,    /* most columns of a group of activations: sums of three planes fit 16
                                bits */
    NESTED_TOKENS = 64,      /* most tokens that are quantised together */
    NESTED_BLOCK_COLS = 256, /* columns whose codes are expanded together, at least a group */
    NESTED_DOT_BITS = 7,     /* most bits of the integer dots */
    NESTED_DOT_TOKENS = 8,   /* most tokens of one call of dots */
};

/* Activations below this are taken for zero. */
#define NESTED_LEAST 0x1p-100f

/* One tile at one precision. */
struct nested_tile {
    const uint8_t *plane[BITS_MAX]; /* of the tile, the first `bits` of them */
    const uint16_t *levels;         /* (n_groups, n_terms + 1, NESTED_ROWS) F16 */
    enum level_kind kind;           /* TIED, FREE or TAIL */
    int bits;
    int32_t group_cols, act_cols;
};

/* A token's activations, quantised for look-ups or for dots; pointers into scratch. */
struct nested_acts {
    int8_t *values; /* look-ups: (n_cols_padded / 32, 128) tables; dots: (n_cols_padded) codes, in
                       an order of the instruction set's own */
    float *scale;   /* (n_acts) h of a FREE term */
    float *sum;     /* (n_acts) X */
    int32_t *total; /* (n_acts) dots only: sum of the codes */
};

struct nested_loops {
    int together; /* bytes of a row that lie side by side: divides 4 */
    /* Quantises the activations of one group: x (act_cols), a multiple of 32; writes entry `act` of
     * out. */
    void (*tables)(const struct nested_acts *out, const float *x, int32_t act, int32_t act_cols);
    void (*codes)(const struct nested_acts *out, const float *x, int32_t act, int32_t act_cols);
    /* sum (NESTED_ROWS) = the tile times the tables, over columns begin..end, both multiples of
     * group_cols. */
    void (*look_up)(float *sum, const struct nested_tile *tile, const struct nested_acts *acts,
                    int32_t begin, int32_t end);
    /* out (n_cols * NESTED_ROWS) = the tile's codes of columns begin..begin + n_cols, in an order
     * of the instruction set's own; bits <= NESTED_DOT_BITS, n_cols a multiple of 32. */
    void (*expand)(uint8_t *out, const struct nested_tile *tile, int32_t begin, int32_t n_cols);
    /* sum[j] (NESTED_ROWS) += codes times the activations of token j < n_tok, over the same columns
     * begin..end (multiples of group_cols); tile is TIED. */
    void (*dots)(float *const *sum, const uint8_t *codes, const struct nested_tile *tile,
                 const struct nested_acts *const *acts, int n_tok, int32_t begin, int32_t end);
};

extern const struct nested_loops nested_loops_scalar;
/* x86-64 only: */
extern const struct nested_loops nested_loops_avx2, nested_loops_avx512;
/* What AVX-512 shares with AVX2: tables with the four low nibbles' of a step first, codes in column
 * order. */
void avx2_tables_by_nibble(const struct nested_acts *out, const float *x, int32_t act,
                           int32_t act_cols);
void avx2_codes(const struct nested_acts *out, const float *x, int32_t act, int32_t act_cols);

static inline int nested_terms(enum level_kind kind, int bits)
{
    return kind == LEVEL_FREE ? bits : kind == LEVEL_TAIL ? 2 : 1;
}

#endif
