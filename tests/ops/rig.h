/* What the tests of backends share: fixed-seed numbers, nested matrices made of them, an
 * independent reading of the nested format, and tensors in a backend's memory.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_TESTS_OPS_RIG_H
#define PMPD_TESTS_OPS_RIG_H

#include <stdint.h>

#include "core/backend.h"

enum { RIG_SEED = 20240731 };

/* SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014). */
struct rig_rng {
    uint64_t state;
};
uint64_t rig_next(struct rig_rng *rng);
/* Uniform in [-1, 1). */
float rig_float(struct rig_rng *rng);
void rig_floats(struct rig_rng *rng, float *out, size_t n);
int rig_below(struct rig_rng *rng, int n);

/* Zeroed host memory; a test that gets none ends at once. */
void *rig_alloc(size_t n, size_t size);

/* All backends of the build, and "cuda-emulated": the cuda backend's kernels run on the host. */
void rig_register(void);
/* A backend by name; "cpu/scalar" is cpu with the loops of that instruction set. rig_open ends the
 * test on error. */
enum status rig_try_open(struct backend *out, const char *name, int n_threads);
struct backend rig_open(const char *name, int n_threads);
/* Whether this machine and build have it. */
bool rig_has(const char *name);

/* A random matrix; padded columns hold random bits, too. kinds[b] for b = 1..n_planes. */
struct rig_matrix {
    struct nested_source src;
    void *blocks[4 * BITS_ALL];
    int n_blocks;
};
void rig_matrix_make(struct rig_matrix *m, struct rig_rng *rng, int32_t n_rows, int32_t n_cols,
                     int32_t group_cols, int n_planes, const enum level_kind kind[BITS_ALL]);
void rig_matrix_free(struct rig_matrix *m);
/* One weight by the formulas of the format, bit by bit and in double; shares no code with core. */
double rig_weight(const struct nested_source *src, int32_t row, int32_t col, int bits);
/* Value of an IEEE binary16 by its definition. */
double rig_f16(uint16_t h);
/* The whole matrix. */
struct matrix_range rig_whole(const struct nested_source *src);

/* A copy of a host tensor in the backend's memory, and back. */
struct tensor rig_put(struct backend *be, struct tensor host);
/* A tensor without data gets zeroed memory of the backend. */
struct tensor rig_room(struct backend *be, struct tensor shape);
void rig_get(struct backend *be, void *host, const struct tensor *from);
void rig_drop(struct backend *be, struct tensor *t);

/* One nested product with host memory at both ends. y (n_segments, n_tok, n_rows). */
enum status rig_nested(struct backend *be, float *y, const struct nested_matrix *w,
                       const uint8_t *bits, const float *x, int32_t n_tok, const float *bias,
                       const int32_t *cut, int32_t n_segments, enum product product);
/* The same for dense weights in host memory. */
enum status rig_dense(struct backend *be, float *y, const struct tensor *w_host, const float *x,
                      int32_t n_tok, const float *bias, const int32_t *cut, int32_t n_segments,
                      enum product product);

#endif
