/* A tensor is a borrowed view: pointer, element type, row-major dimensions. It owns nothing.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_TENSOR_H
#define PMPD_CORE_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

enum dtype { DT_F32 = 0, DT_F16, DT_BF16, DT_U8, DT_I32, DT_I64, DT_N };

enum { TENSOR_MAX_DIMS = 4 };

struct tensor {
    void *data; /* borrowed; where it points (host, device) is the owner's business */
    enum dtype dtype;
    int32_t n_dims;
    int32_t dims[TENSOR_MAX_DIMS]; /* row-major: the last one is contiguous */
};

/* Bytes of one element. */
size_t dtype_bytes(enum dtype dtype);
/* "F32", as safetensors spells it. */
const char *dtype_name(enum dtype dtype);

struct tensor tensor_1d(void *data, enum dtype dtype, int32_t n);
struct tensor tensor_2d(void *data, enum dtype dtype, int32_t n_rows, int32_t n_cols);
struct tensor tensor_3d(void *data, enum dtype dtype, int32_t d0, int32_t d1, int32_t d2);
struct tensor tensor_4d(void *data, enum dtype dtype, int32_t d0, int32_t d1, int32_t d2,
                        int32_t d3);
/* Elements; an empty tensor (n_dims 0) has none. */
size_t tensor_count(const struct tensor *t);
size_t tensor_bytes(const struct tensor *t);
/* Rows [begin, end) of the first dimension. */
struct tensor tensor_rows(const struct tensor *t, int32_t begin, int32_t end);
/* "F16 (32, 64)" into text; returns text. */
const char *tensor_describe(const struct tensor *t, char *text, size_t text_bytes);

/* IEEE 754 binary16 and bfloat16, round to nearest even; NaN stays NaN. */
float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f);
float bf16_to_f32(uint16_t h);
/* n elements of a F32, F16 or BF16 array as f32. */
void floats_from(float *out, const void *src, enum dtype dtype, size_t n);

#endif
