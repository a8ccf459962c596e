/* core/tensor: shapes and views; half formats against their definitions, for every half and around
 * every rounding boundary.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/tensor.h"

static void test_shapes(void)
{
    float data[24];
    struct tensor t = tensor_3d(data, DT_F32, 2, 3, 4);
    char text[64];
    CHECK(t.n_dims == 3 && tensor_count(&t) == 24 && tensor_bytes(&t) == 96);
    CHECK(strcmp(tensor_describe(&t, text, sizeof text), "F32 (2, 3, 4)") == 0);
    char tiny[8]; /* cut short, always ended */
    CHECK(strlen(tensor_describe(&t, tiny, sizeof tiny)) == 7);
    CHECK(strncmp(tiny, "F32 (2,", 7) == 0);
    struct tensor part = tensor_rows(&t, 1, 2);
    CHECK(part.data == data + 12 && part.dims[0] == 1 && part.dims[2] == 4);
    part = tensor_rows(&t, 2, 2);
    CHECK(tensor_count(&part) == 0);
    struct tensor empty = {0};
    CHECK(tensor_count(&empty) == 0 && tensor_bytes(&empty) == 0);
    t = tensor_1d(data, DT_U8, 5);
    CHECK(tensor_bytes(&t) == 5 && t.n_dims == 1);
    t = tensor_4d(data, DT_I64, 2, 1, 3, 2);
    CHECK(tensor_bytes(&t) == 96 && t.dims[3] == 2);
    t = tensor_2d(data, DT_BF16, 100000, 100000); /* counts are size_t, not int */
    CHECK(tensor_bytes(&t) == 20000000000u);
    CHECK(strcmp(tensor_describe(&t, text, sizeof text), "BF16 (100000, 100000)") == 0);
    static const size_t bytes[] = {4, 2, 2, 1, 4, 8};
    static const char *const names[] = {"F32", "F16", "BF16", "U8", "I32", "I64"};
    for (int d = 0; d < DT_N; d++) {
        CHECK(dtype_bytes((enum dtype)d) == bytes[d]);
        CHECK(strcmp(dtype_name((enum dtype)d), names[d]) == 0);
    }
    CHECK(dtype_bytes(DT_N) == 0);
}

/* The value of a binary16 by its definition. */
static double half_value(unsigned h)
{
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double sign = h >> 15 ? -1 : 1;
    return exponent ? sign * ldexp(1024 + mantissa, exponent - 25) : sign * ldexp(mantissa, -24);
}

static float float_of(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static void test_from_half(void)
{
    for (unsigned h = 0; h < 0x10000; h++) {
        float f = f16_to_f32((uint16_t)h);
        if ((h & 0x7c00) != 0x7c00) {
            CHECK((double)f == half_value(h) && !signbit(f) == !(h >> 15));
            CHECK(f32_to_f16(f) == h); /* and back, zeros with their sign */
        } else if (h & 0x3ff) {
            CHECK(isnan(f) && (f32_to_f16(f) & 0x7c00) == 0x7c00 && (f32_to_f16(f) & 0x3ff));
        } else {
            CHECK(isinf(f) && !signbit(f) == !(h >> 15) && f32_to_f16(f) == h);
        }
    }
    CHECK(f16_to_f32(0x3c00) == 1.0f && f16_to_f32(0x3555) == 0.333251953125f);
    CHECK(f16_to_f32(0x7bff) == 65504.0f && f16_to_f32(0x0001) == 0x1p-24f);
}

/* Round to nearest, ties to even: at the middle between neighbours and one unit off it. */
static void test_to_half(void)
{
    for (unsigned h = 0; h < 0x7bff; h++) {
        double middle = (half_value(h) + half_value(h + 1)) / 2;
        float f = (float)middle; /* exact: one bit more than a half has */
        unsigned even = h & 1 ? h + 1 : h;
        CHECK(f32_to_f16(f) == even && f32_to_f16(-f) == (even | 0x8000));
        CHECK(f32_to_f16(nextafterf(f, 0)) == h && f32_to_f16(nextafterf(f, 1e9f)) == h + 1);
    }
    CHECK(f32_to_f16(65519.996f) == 0x7bff && f32_to_f16(65520.0f) == 0x7c00);
    CHECK(f32_to_f16(1e30f) == 0x7c00 && f32_to_f16(-INFINITY) == 0xfc00);
    CHECK(f32_to_f16(0x1p-25f) == 0 && f32_to_f16(0x1.8p-25f) == 1 && f32_to_f16(1e-40f) == 0);
    CHECK(f32_to_f16(float_of(0x7f800001)) >> 10 == 31); /* a NaN with low bits only stays one */
    CHECK(f32_to_f16(float_of(0x7f800001)) & 0x3ff);
    CHECK(isnan(f16_to_f32(f32_to_f16(NAN))));
}

static void test_bf16(void)
{
    CHECK(bf16_to_f32(0x3f80) == 1.0f && bf16_to_f32(0xc049) == -3.140625f);
    CHECK(isinf(bf16_to_f32(0x7f80)) && isnan(bf16_to_f32(0x7fc0)) && bf16_to_f32(1) == 0x1p-133f);
}

static void test_floats_from(void)
{
    const float f[] = {1.5f, -2}, *cf = f;
    const uint16_t half[] = {0x3e00, 0xc000}, bf[] = {0x3fc0, 0xc000};
    float out[2];
    floats_from(out, cf, DT_F32, 2);
    CHECK(out[0] == 1.5f && out[1] == -2);
    out[0] = out[1] = 0;
    floats_from(out, half, DT_F16, 2);
    CHECK(out[0] == 1.5f && out[1] == -2);
    out[0] = out[1] = 0;
    floats_from(out, bf, DT_BF16, 1);
    CHECK(out[0] == 1.5f && out[1] == 0); /* n is kept to */
}

int main(void)
{
    test_shapes();
    test_from_half();
    test_to_half();
    test_bf16();
    test_floats_from();
    return check_report();
}
