/* core/bitplane: the nested layout, by hand-worked matrices and by a second reading of the format.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/bitplane.h"
#include "core/tensor.h"

/* Two rows, 40 columns padded to 64, groups of 32, 4 planes. */
enum { ROWS = 2, COLS = 40, PADDED = 64, GROUP = 32, GROUPS = 2, PLANES = 8 };
static uint8_t planes[PLANES][ROWS][PADDED / 8];
static uint16_t scale[BITS_ALL][ROWS][GROUPS], offset[BITS_ALL][ROWS][GROUPS];
static uint16_t alpha[BITS_ALL][ROWS * GROUPS * BITS_MAX], lut[BITS_ALL][ROWS << BITS_MAX];
static uint16_t tail[ROWS][GROUPS];

static struct nested_source source(enum level_kind kind)
{
    struct nested_source src = {.n_rows = ROWS,
                                .n_cols = COLS,
                                .n_cols_padded = PADDED,
                                .group_cols = GROUP,
                                .n_planes = PLANES,
                                .planes = planes[0][0],
                                .tail = tail[0]};
    for (int b = 1; b <= PLANES; b++) {
        src.kind[b] = kind == LEVEL_TAIL && b < 8 ? LEVEL_TIED : kind;
        src.scale[b] = scale[b][0];
        src.offset[b] = offset[b][0];
        src.alpha[b] = alpha[b];
        src.lut[b] = lut[b];
    }
    return src;
}

/* The weight of (row, col) has code (37 row + 11 col) mod 256 in eight planes. */
static unsigned full_code(int row, int col)
{
    return (unsigned)(37 * row + 11 * col) & 255;
}

static void fill(void)
{
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < PADDED; c++) {
            for (int p = 0; p < PLANES; p++) {
                if (full_code(r, c) >> (7 - p) & 1) {
                    planes[p][r][c / 8] |= (uint8_t)(1 << c % 8);
                }
            }
        }
    }
    for (int b = 1; b <= BITS_MAX; b++) {
        for (int r = 0; r < ROWS; r++) {
            for (int g = 0; g < GROUPS; g++) {
                scale[b][r][g] = f32_to_f16((float)(b + 8 * r + g + 1) / 16);
                offset[b][r][g] = f32_to_f16((float)(g - r) + (float)b / 4);
                tail[r][g] = f32_to_f16(0.03125f * (float)(1 + r + 2 * g));
                for (int p = 0; p < b; p++) {
                    alpha[b][(r * GROUPS + g) * b + p] =
                        f32_to_f16((float)(100 * r + 10 * g + p + 1) / 8);
                }
            }
            for (int c = 0; c < 1 << b; c++) {
                lut[b][(r << b) + c] = f32_to_f16((float)(1000 * r + 3 * c - b));
            }
        }
    }
}

static void test_codes(void)
{
    struct nested_source src = source(LEVEL_TIED);
    CHECK(nested_n_groups(&src) == 2);
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < PADDED; c++) {
            for (int b = 1; b <= PLANES; b++) { /* the first b planes are the top b bits */
                CHECK(bitplane_code(&src, r, c, b) == full_code(r, c) >> (8 - b));
            }
        }
    }
    /* by hand: bit t of byte j of a plane's row is column 8j + t */
    uint8_t two[2][1][4] = {{{0, 0x20, 0, 0}}, {{0, 0x60, 0, 0}}};
    struct nested_source hand = {.n_rows = 1,
                                 .n_cols = 32,
                                 .n_cols_padded = 32,
                                 .group_cols = 32,
                                 .n_planes = 2,
                                 .planes = two[0][0]};
    CHECK(bitplane_code(&hand, 0, 13, 2) == 3 && bitplane_code(&hand, 0, 14, 2) == 1);
    CHECK(bitplane_code(&hand, 0, 13, 1) == 1 && bitplane_code(&hand, 0, 12, 2) == 0);
}

static void test_tables_by_hand(void)
{
    float t[LEVELS_MAX];
    level_table_tied(t, 1, 4, 1);
    CHECK(t[0] == -1 && t[1] == 3);
    level_table_tied(t, 2, 2, 0.5f);
    CHECK(t[0] == -2.5f && t[1] == -0.5f && t[2] == 1.5f && t[3] == 3.5f);
    const float a[] = {4, 2, 1};
    level_table_free(t, 3, a, 10);
    for (int c = 0; c < 8; c++) { /* these alphas make it a ruler: 3, 5, ..., 17 */
        CHECK(t[c] == (float)(3 + 2 * c));
    }
    const float uneven[] = {-1, 8}; /* the first alpha belongs to plane 0, the top bit */
    level_table_free(t, 2, uneven, 0);
    CHECK(t[0] == -7 && t[1] == 9 && t[2] == -9 && t[3] == 7);
    level_table_tail(t, 16, 1, 3);
    for (int c = 0; c < 256; c++) { /* tail = scale / 16: a ruler again */
        CHECK(t[c] == (float)c - 124.5f);
    }
    level_table_tail(t, 2, 4, 0);
    CHECK(t[0] == -45 && t[0x0f] == 15 && t[0xf0] == -15 && t[0xff] == 45);
}

/* Weights by a second reading of the formulas, in double. */
static void test_weights(void)
{
    static const enum level_kind kinds[] = {LEVEL_TIED, LEVEL_FREE, LEVEL_LUT, LEVEL_TAIL};
    for (int k = 0; k < 4; k++) {
        struct nested_source src = source(kinds[k]);
        for (int r = 0; r < ROWS; r++) {
            for (int c = 0; c < COLS; c++) {
                for (int b = 1; b <= PLANES; b++) {
                    int g = c / GROUP, code = (int)(full_code(r, c) >> (8 - b));
                    double o = (double)f16_to_f32(offset[b][r][g]);
                    double s = (double)f16_to_f32(scale[b][r][g]), w = 0;
                    switch (src.kind[b]) {
                    case LEVEL_TIED:
                        w = o + s * (code - ((1 << b) - 1) / 2.0);
                        break;
                    case LEVEL_FREE:
                        w = o;
                        for (int p = 0; p < b; p++) {
                            double a = (double)(100 * r + 10 * g + p + 1) / 8;
                            w += full_code(r, c) >> (7 - p) & 1 ? a : -a;
                        }
                        break;
                    case LEVEL_LUT:
                        w = 1000 * r + 3 * code - b;
                        break;
                    case LEVEL_TAIL:
                        w = o + s * (code / 16 - 7.5) +
                            (double)f16_to_f32(tail[r][g]) * (code % 16 - 7.5);
                        break;
                    case LEVEL_NONE:
                    case LEVEL_N:
                        break;
                    }
                    CHECK_NEAR(bitplane_weight(&src, r, c, b), w, 1e-5 * (1 + fabs(w)));
                }
            }
        }
    }
}

static void test_sizes(void)
{
    CHECK(level_values_per_row(LEVEL_TIED, 3, 5) == 10);
    CHECK(level_values_per_row(LEVEL_FREE, 3, 5) == 20);
    CHECK(level_values_per_row(LEVEL_LUT, 3, 5) == 8);
    CHECK(level_values_per_row(LEVEL_TAIL, 8, 5) == 15);
    CHECK(level_values_per_row(LEVEL_NONE, 3, 5) == 0);
    /* (10, 256) in groups of 64: planes 32 bytes a row each; tied levels 4 groups * 2 * 2 bytes */
    enum level_kind kind[BITS_ALL] = {[2] = LEVEL_TIED, [3] = LEVEL_LUT, [4] = LEVEL_TIED};
    CHECK(nested_bytes_read(kind, 10, 256, 64, 2, 1u << 2) == 10 * (2 * 32 + 16));
    CHECK(nested_bytes_read(kind, 10, 256, 64, 4, 1u << 4) == 10 * (4 * 32 + 16));
    CHECK(nested_bytes_read(kind, 10, 256, 64, 3, 1u << 3) == 10 * (3 * 32 + 16));
    CHECK(nested_bytes_read(kind, 10, 256, 64, 4, 1u << 2 | 1u << 4) == 10 * (4 * 32 + 32));
    struct nested_source src = {.kind = {[2] = LEVEL_TIED, [4] = LEVEL_FREE}};
    CHECK(nested_max_bits(&src) == 4);
    src.kind[8] = LEVEL_TAIL;
    CHECK(nested_max_bits(&src) == 8);
    memset(src.kind, 0, sizeof src.kind);
    CHECK(nested_max_bits(&src) == 0);
}

static void test_names(void)
{
    static const char *const words[] = {"none", "tied", "free", "lut", "tail"};
    for (int k = 0; k < LEVEL_N; k++) {
        CHECK(strcmp(level_kind_name((enum level_kind)k), words[k]) == 0);
        CHECK(level_kind_parse(words[k]) == (enum level_kind)k);
    }
    CHECK(level_kind_parse("Tied") == LEVEL_N && level_kind_parse("") == LEVEL_N);
    CHECK(level_kind_parse("tie") == LEVEL_N);
    CHECK(strcmp(level_kind_name(LEVEL_N), "?") == 0);
}

int main(void)
{
    fill();
    test_codes();
    test_tables_by_hand();
    test_weights();
    test_sizes();
    test_names();
    return check_report();
}
