/* A chunk of rows on its way through the stages of hessian_fit.h: what they work on, and the
 * stages. Used by hessian_fit.c and the files of the stages only. One thread per chunk.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_ROW_CHUNK_H
#define PMPD_EXPERIMENTS_QUANTISE_ROW_CHUNK_H

#include "experiments/quantise/group_fit.h"
#include "experiments/quantise/hessian_fit.h"

enum {
    CHUNK_BLOCK = 128,                             /* columns between two lazy updates */
    CHUNK_SLOTS = FIT_MAX_BITS - FIT_MIN_BITS + 1, /* precisions held, the tail aside */
    N_PICKS = 1 << FIT_MAX_BITS
};

/* What all chunks of a matrix share. */
struct chunk_job {
    const struct fit_spec *spec; /* borrowed, as all pointers here but the last */
    const struct hessian_options *options;
    const struct hessian *h;
    int32_t n_groups;
    int n_slots, slot_bits[CHUNK_SLOTS];
    float *column_weight; /* (n) 1 / U[k][k]^2, mean 1 */
    float *group_sums;    /* (n_groups, n) owned: sums of H over the rows of a group */
};

/* Levels are kept as unknowns of least squares: w = sum_f level[f] * feature f of the code, in the
 * order tied scale, offset; free alpha (bits), offset; tail scale, tail, offset. */
struct row_chunk {
    const struct chunk_job *job; /* borrowed */
    int32_t rows, n;
    float *w, *wh;         /* (rows, n): weights; their product with H */
    float *t[CHUNK_SLOTS]; /* (rows, n): targets, or gradients */
    float *d[CHUNK_SLOTS]; /* (rows, CHUNK_BLOCK): errors, or changes of weights */
    float *scratch;        /* (rows, n) */
    uint8_t *code;         /* (rows, padded n): spec->hi bits, after the tail 8 */
    int32_t code_stride, code_bits;
    double *level[BITS_ALL]; /* (rows, n_groups, unknowns of that precision) */
    struct fit_times *times; /* borrowed */
    void *block;             /* owned: all arrays above */
};

MUST_CHECK enum status chunk_create(struct row_chunk *out, const struct chunk_job *job,
                                    int32_t rows, struct fit_times *times);
void chunk_free(struct row_chunk *c);

/* Unknowns per group. */
int level_unknowns(enum level_kind kind, int bits);
/* Feature f of a code of `bits` bits; the last one is always 1. */
float level_feature(enum level_kind kind, int bits, uint32_t code, int f);
/* table (2^bits) of one group's unknowns. */
void level_table_of(float *table, enum level_kind kind, int bits, const double *level);
double *chunk_level(const struct row_chunk *c, int bits, int32_t row, int32_t group);
/* The bits-bit code of a weight. */
uint32_t chunk_code(const struct row_chunk *c, int bits, int32_t row, int32_t col);
/* diff (rows, n) = weights - what the levels of `bits` make of the codes. */
void chunk_difference(float *diff, const struct row_chunk *c, int bits);

/* The stages. */
void chunk_feedback(struct row_chunk *c);
void chunk_sweep(struct row_chunk *c);
void chunk_tail(struct row_chunk *c);
MUST_CHECK enum status chunk_refit(struct row_chunk *c, int bits);
/* Rounds the levels, puts rows from `first` on into out, adds to *report. */
void chunk_store(struct row_chunk *c, struct nested_buffer *out, struct fit_report *report,
                 int32_t first);

/* begin: clock_s() when the stage began. */
void chunk_time(struct row_chunk *c, enum fit_stage stage, double begin, double flop);

#endif
