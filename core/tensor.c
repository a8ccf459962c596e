/* SPDX-License-Identifier: Apache-2.0 */
#include "core/tensor.h"

#include <stdio.h>
#include <string.h>

size_t dtype_bytes(enum dtype dtype)
{
    static const size_t bytes[DT_N] = {
        [DT_F32] = 4, [DT_F16] = 2, [DT_BF16] = 2, [DT_U8] = 1, [DT_I32] = 4, [DT_I64] = 8,
    };
    return (unsigned)dtype < DT_N ? bytes[dtype] : 0;
}

const char *dtype_name(enum dtype dtype)
{
    static const char *const names[DT_N] = {
        [DT_F32] = "F32", [DT_F16] = "F16", [DT_BF16] = "BF16",
        [DT_U8] = "U8",   [DT_I32] = "I32", [DT_I64] = "I64",
    };
    return (unsigned)dtype < DT_N ? names[dtype] : "?";
}

struct tensor tensor_1d(void *data, enum dtype dtype, int32_t n)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 1, .dims = {n}};
}

struct tensor tensor_2d(void *data, enum dtype dtype, int32_t n_rows, int32_t n_cols)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 2, .dims = {n_rows, n_cols}};
}

struct tensor tensor_3d(void *data, enum dtype dtype, int32_t d0, int32_t d1, int32_t d2)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 3, .dims = {d0, d1, d2}};
}

struct tensor tensor_4d(void *data, enum dtype dtype, int32_t d0, int32_t d1, int32_t d2,
                        int32_t d3)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 4, .dims = {d0, d1, d2, d3}};
}

size_t tensor_count(const struct tensor *t)
{
    if (t->n_dims == 0) {
        return 0;
    }
    size_t n = 1;
    for (int i = 0; i < t->n_dims; i++) {
        n *= (size_t)t->dims[i];
    }
    return n;
}

size_t tensor_bytes(const struct tensor *t)
{
    return tensor_count(t) * dtype_bytes(t->dtype);
}

struct tensor tensor_rows(const struct tensor *t, int32_t begin, int32_t end)
{
    INVARIANT(t->n_dims >= 1 && begin >= 0 && begin <= end && end <= t->dims[0]);
    struct tensor part = *t;
    size_t row = t->dims[0] ? tensor_bytes(t) / (size_t)t->dims[0] : 0;
    part.data = (char *)t->data + (size_t)begin * row;
    part.dims[0] = end - begin;
    return part;
}

const char *tensor_describe(const struct tensor *t, char *text, size_t text_bytes)
{
    int used = snprintf(text, text_bytes, "%s (", dtype_name(t->dtype));
    for (int i = 0; i < t->n_dims && used > 0 && (size_t)used < text_bytes; i++) {
        used += snprintf(text + used, text_bytes - (size_t)used, "%s%d", i ? ", " : "", t->dims[i]);
    }
    if (used > 0 && (size_t)used < text_bytes) {
        snprintf(text + used, text_bytes - (size_t)used, ")");
    }
    return text;
}

static float float_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint32_t bits_of_float(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
    if (exponent == 0x1f) { /* infinity, NaN */
        return float_of_bits(sign | 0x7f800000 | mantissa << 13);
    }
    if (exponent == 0) { /* zero, subnormal: mantissa * 2^-24 is exact in f32 */
        float f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t f32_to_f16(float f)
{
    uint32_t bits = bits_of_float(f);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t a = bits & 0x7fffffff;
    if (a > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (a >= 0x477ff000) { /* rounds to 2^16 or more */
        return sign | 0x7c00;
    }
    if (a < 0x38800000) { /* below the smallest normal: adding 0.5 puts the unit at bit 0 */
        return sign | (uint16_t)(bits_of_float(float_of_bits(a) + 0.5f) - 0x3f000000);
    }
    return sign | (uint16_t)((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
}

float bf16_to_f32(uint16_t h)
{
    return float_of_bits((uint32_t)h << 16);
}

void floats_from(float *out, const void *src, enum dtype dtype, size_t n)
{
    const uint16_t *half = src;
    switch (dtype) {
    case DT_F32:
        memcpy(out, src, n * sizeof *out);
        break;
    case DT_F16:
        for (size_t i = 0; i < n; i++) {
            out[i] = f16_to_f32(half[i]);
        }
        break;
    case DT_BF16:
        for (size_t i = 0; i < n; i++) {
            out[i] = bf16_to_f32(half[i]);
        }
        break;
    case DT_U8:
    case DT_I32:
    case DT_I64:
    case DT_N:
        INVARIANT(!"a float dtype");
    }
}
