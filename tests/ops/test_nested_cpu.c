/* The cpu backend's products of nested matrices, whose activations are quantised: every instruction
 * set gives the bits of the portable loops; these give what kernels/cpu_nested.h says, worked out
 * here in double from its words; and that is within a percent of the product it stands for.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include <math.h>

#include "kernels/kernels.h"
#include "tests/ops/rig.h"

static const enum level_kind tied[BITS_ALL] = {
    [1] = LEVEL_TIED, [2] = LEVEL_TIED, [3] = LEVEL_TIED, [4] = LEVEL_TIED,
    [5] = LEVEL_TIED, [6] = LEVEL_TIED, [7] = LEVEL_TIED, [8] = LEVEL_TIED,
};
static const enum level_kind free_levels[BITS_ALL] = {
    [1] = LEVEL_FREE, [2] = LEVEL_FREE, [3] = LEVEL_FREE, [4] = LEVEL_FREE,
    [5] = LEVEL_FREE, [6] = LEVEL_FREE, [7] = LEVEL_FREE, [8] = LEVEL_FREE,
};
static const enum level_kind mixed[BITS_ALL] = {
    [1] = LEVEL_LUT, [2] = LEVEL_TIED, [3] = LEVEL_FREE, [4] = LEVEL_TIED, [8] = LEVEL_TAIL,
};
static const enum level_kind *const families[] = {tied, free_levels, mixed};
enum { N_FAMILIES = 3, MOST_TOKENS = 70 };

static void random_bits(struct rig_rng *rng, uint8_t *bits, int n, const enum level_kind *kind)
{
    for (int t = 0; t < n; t++) {
        do {
            bits[t] = (uint8_t)(1 + rig_below(rng, 8));
        } while (kind[bits[t]] == LEVEL_NONE);
    }
}

static struct nested_matrix load(struct backend *be, const struct nested_source *src)
{
    struct nested_matrix w = {0};
    struct matrix_range whole = rig_whole(src);
    CHECK_OK(backend_planes_load(be, &w, src, &whole, src->n_planes));
    return w;
}

/* ---- every instruction set ---- */

/* TIED of up to seven bits, which every product takes in integers. (Rows that are decoded are added
 * up in f32, in an order of each instruction set's own.) */
static void compare_isas(struct backend *be, int n_be, const struct rig_matrix *m,
                         struct rig_rng *rng, int n_tok)
{
    int32_t n_rows = m->src.n_rows, n_cols = m->src.n_cols, group = m->src.group_cols;
    int32_t cut[3] = {0, n_cols / 2 / group * group, n_cols};
    int n_segments = cut[1] > 0 ? 2 : 1;
    size_t n_y = (size_t)(n_segments * n_tok * n_rows);
    float *x = rig_alloc((size_t)(n_tok * n_cols), sizeof *x), *y[2];
    uint8_t bits[MOST_TOKENS];
    rig_floats(rng, x, (size_t)(n_tok * n_cols));
    memset(x, 0, (size_t)(n_cols < 64 ? n_cols : 64) * sizeof *x); /* a group of nothing */
    random_bits(rng, bits, n_tok, m->src.kind);
    for (int p = PRODUCT_ONE; p <= PRODUCT_CHUNK; p++) {
        for (int i = 0; i < n_be; i++) {
            struct nested_matrix w = load(&be[i], &m->src);
            y[i > 0] = rig_alloc(n_y, sizeof **y);
            CHECK_OK(rig_nested(&be[i], y[i > 0], &w, bits, x, n_tok, NULL,
                                n_segments > 1 ? cut : NULL, n_segments, (enum product)p));
            if (i > 0) {
                CHECK(memcmp(y[0], y[1], n_y * sizeof **y) == 0);
                free(y[1]);
            }
            backend_planes_drop(&be[i], &w, 0);
        }
        free(y[0]);
    }
    free(x);
}

static void test_isas_agree(void)
{
    static const int32_t shapes[][3] = {/* rows, columns, group */
                                        {1, 1, 32},     {31, 33, 32},  {33, 100, 64}, {64, 256, 64},
                                        {65, 200, 128}, {40, 300, 96}, {35, 600, 256}};
    struct rig_rng rng = {RIG_SEED + 20};
    struct backend be[3];
    int n_be = 0;
    static const char *const names[] = {"cpu/scalar", "cpu/avx2", "cpu/avx512"};
    for (int i = 0; i < 3; i++) {
        if (rig_has(names[i])) {
            be[n_be++] = rig_open(names[i], 1 + i);
        }
    }
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        struct rig_matrix m;
        rig_matrix_make(&m, &rng, shapes[s][0], shapes[s][1], shapes[s][2], 8, tied);
        m.src.kind[8] = LEVEL_NONE; /* more than the integer dots take */
        for (int n_tok = 1; n_tok <= 9; n_tok++) {
            compare_isas(be, n_be, &m, &rng, n_tok);
        }
        compare_isas(be, n_be, &m, &rng, MOST_TOKENS); /* more than are quantised together */
        rig_matrix_free(&m);
    }
    for (int i = 0; i < n_be; i++) {
        backend_close(&be[i]);
    }
}

/* Look-ups of every kind, one token: FREE and TAIL too. */
static void test_look_ups_agree(void)
{
    enum { ROWS = 37, COLS = 224, GROUP = 32 };
    struct rig_rng rng = {RIG_SEED + 21};
    float x[COLS], want[ROWS], got[ROWS];
    static const char *const names[] = {"cpu/avx2", "cpu/avx512"};
    rig_floats(&rng, x, COLS);
    for (int f = 0; f < N_FAMILIES; f++) {
        struct rig_matrix m;
        rig_matrix_make(&m, &rng, ROWS, COLS, GROUP, 8, families[f]);
        struct backend ref = rig_open("cpu/scalar", 1);
        struct nested_matrix w = load(&ref, &m.src);
        for (int i = 0; i < 2; i++) {
            if (!rig_has(names[i])) {
                continue;
            }
            struct backend be = rig_open(names[i], 2);
            struct nested_matrix v = load(&be, &m.src);
            for (uint8_t b = 1; b <= 8; b++) {
                if (families[f][b] == LEVEL_NONE || families[f][b] == LEVEL_LUT) {
                    continue;
                }
                CHECK_OK(rig_nested(&ref, want, &w, &b, x, 1, NULL, NULL, 1, PRODUCT_ONE));
                CHECK_OK(rig_nested(&be, got, &v, &b, x, 1, NULL, NULL, 1, PRODUCT_ONE));
                CHECK(memcmp(want, got, sizeof want) == 0);
            }
            backend_planes_drop(&be, &v, 0);
            backend_close(&be);
        }
        backend_planes_drop(&ref, &w, 0);
        backend_close(&ref);
        rig_matrix_free(&m);
    }
}

/* Tables are kept from product to product, by thread: one of other activations, or by a thread that
 * sat one out, must not be taken for them. */
static void test_tables_kept(void)
{
    enum { ROWS = 1024, COLS = 1024, FEW = 32 };
    static const enum level_kind lut[BITS_ALL] = {[2] = LEVEL_LUT};
    static float x[2][COLS], want[ROWS], got[ROWS], few[FEW];
    const uint8_t b = 2;
    struct rig_rng rng = {RIG_SEED + 24};
    struct rig_matrix large, small, rows;
    rig_matrix_make(&large, &rng, ROWS, COLS, 64, 2, tied);
    rig_matrix_make(&small, &rng, FEW, COLS, 64, 2, tied);
    rig_matrix_make(&rows, &rng, ROWS, COLS, 64, 2, lut);
    rig_floats(&rng, x[0], 2 * COLS);
    struct backend fresh = rig_open("cpu", 1), be = rig_open("cpu", 2);
    struct nested_matrix alone = load(&fresh, &large.src), w = load(&be, &large.src);
    struct nested_matrix one_thread = load(&be, &small.src), decoded = load(&be, &rows.src);
    CHECK_OK(rig_nested(&fresh, want, &alone, &b, x[0], 1, NULL, NULL, 1, PRODUCT_ONE));
    for (int i = 0; i < 20; i++) {
        CHECK_OK(rig_nested(&be, got, &w, &b, x[1], 1, NULL, NULL, 1, PRODUCT_ONE));
        CHECK_OK(rig_nested(&be, few, &one_thread, &b, x[0], 1, NULL, NULL, 1, PRODUCT_ONE));
        CHECK_OK(rig_nested(&be, got, &decoded, &b, x[1], 1, NULL, NULL, 1, PRODUCT_ONE));
        CHECK_OK(rig_nested(&be, got, &w, &b, x[0], 1, NULL, NULL, 1, PRODUCT_ONE));
        CHECK(memcmp(want, got, sizeof want) == 0);
    }
    backend_planes_drop(&fresh, &alone, 0);
    backend_planes_drop(&be, &w, 0);
    backend_planes_drop(&be, &one_thread, 0);
    backend_planes_drop(&be, &decoded, 0);
    rig_matrix_free(&large);
    rig_matrix_free(&small);
    rig_matrix_free(&rows);
    backend_close(&fresh);
    backend_close(&be);
}

/* ---- the definition ---- */

static int bit_of(const struct nested_source *src, int p, int32_t row, int32_t col)
{
    size_t row_bytes = (size_t)src->n_cols_padded / 8;
    const uint8_t *byte = src->planes + ((size_t)p * (size_t)src->n_rows + (size_t)row) * row_bytes;
    return byte[col / 8] >> col % 8 & 1;
}

/* sum over the group of (2 bit - 1) x, as look-ups round it. */
static double plane_by_look_up(const struct nested_source *src, int p, int32_t row, const double *x,
                               int32_t begin, int32_t n)
{
    double most = 0, sum = 0;
    for (int32_t c = 0; c < n; c += 4) {
        double s = 0;
        for (int k = 0; k < 4; k++) {
            s += fabs(x[begin + c + k]);
        }
        most = fmax(most, s);
    }
    for (int32_t c = 0; c < n && most > 0; c += 4) {
        double entry = 0;
        for (int k = 0; k < 4; k++) {
            entry += (2 * bit_of(src, p, row, begin + c + k) - 1) * x[begin + c + k];
        }
        sum += nearbyint(entry * 127 / most) * most / 127;
    }
    return sum;
}

/* The same with x rounded by itself. */
static double plane_by_dot(const struct nested_source *src, int p, int32_t row, const double *x,
                           int32_t begin, int32_t n)
{
    double most = 0, sum = 0;
    for (int32_t c = 0; c < n; c++) {
        most = fmax(most, fabs(x[begin + c]));
    }
    for (int32_t c = 0; c < n && most > 0; c++) {
        double q = nearbyint(x[begin + c] * 127 / most) * most / 127;
        sum += (2 * bit_of(src, p, row, begin + c) - 1) * q;
    }
    return sum;
}

static double by_definition(const struct nested_source *src, int32_t row, const double *x, int b,
                            bool look_up)
{
    int32_t n_groups = src->n_cols_padded / src->group_cols, n = src->group_cols;
    double y = 0;
    for (int32_t g = 0; g < n_groups; g++) {
        size_t at = (size_t)row * (size_t)n_groups + (size_t)g;
        double sum = 0;
        for (int32_t c = 0; c < n; c++) {
            sum += x[g * n + c];
        }
        y += rig_f16(src->offset[b][at]) * sum;
        for (int p = 0; p < b; p++) {
            double s = look_up ? plane_by_look_up(src, p, row, x, g * n, n)
                               : plane_by_dot(src, p, row, x, g * n, n);
            double a = src->kind[b] == LEVEL_FREE
                           ? rig_f16(src->alpha[b][at * (size_t)b + (size_t)p])
                           : rig_f16(src->scale[b][at]) * ldexp(1, b - 2 - p);
            y += a * s;
        }
    }
    return y;
}

static void test_definition(void)
{
    enum { ROWS = 34, COLS = 180, GROUP = 64, PADDED = 192 };
    struct rig_rng rng = {RIG_SEED + 22};
    for (int f = 0; f < 2; f++) {
        struct rig_matrix m;
        rig_matrix_make(&m, &rng, ROWS, COLS, GROUP, 8, families[f]);
        float x[COLS], y[ROWS], want[ROWS];
        double wide[PADDED] = {0};
        rig_floats(&rng, x, COLS);
        for (int c = 0; c < COLS; c++) {
            wide[c] = (double)x[c];
        }
        struct backend be = rig_open("cpu/scalar", 1);
        struct nested_matrix w = load(&be, &m.src);
        for (uint8_t b = 1; b <= 8; b++) {
            for (int look_up = 0; look_up < 2; look_up++) {
                if (!look_up && (f == 1 || b == 8)) {
                    continue; /* decoded to f32 */
                }
                CHECK_OK(rig_nested(&be, y, &w, &b, x, 1, NULL, NULL, 1,
                                    look_up ? PRODUCT_ONE : PRODUCT_SLOTS));
                for (int32_t r = 0; r < ROWS; r++) {
                    want[r] = (float)by_definition(&m.src, r, wide, b, look_up);
                }
                /* an entry that lies halfway in f32 may round the other way in double: one step of
                 * 127 of one four in a row's 45 */
                CHECK_CLOSE(y, want, ROWS, 1e-7);
            }
        }
        backend_planes_drop(&be, &w, 0);
        backend_close(&be);
        rig_matrix_free(&m);
    }
}

/* ---- how good that is ---- */

/* A normal number, by the sum of twelve. */
static float gauss(struct rig_rng *rng)
{
    float sum = 0;
    for (int i = 0; i < 12; i++) {
        sum += rig_float(rng) * 0.5f;
    }
    return sum;
}

/* Weights as a quantiser makes them: levels around zero, scales alike. */
static void centre_levels(struct rig_matrix *m, struct rig_rng *rng)
{
    size_t n = (size_t)m->src.n_rows * (size_t)(m->src.n_cols_padded / m->src.group_cols);
    for (int b = 2; b <= 4; b++) {
        for (size_t i = 0; i < n; i++) {
            float scale = (0.02f + 0.002f * rig_float(rng)) * (float)(1 << (4 - b));
            if (m->src.kind[b] == LEVEL_TIED) {
                ((uint16_t *)(uintptr_t)m->src.scale[b])[i] = f32_to_f16(scale);
            }
            for (int p = 0; p < b && m->src.kind[b] == LEVEL_FREE; p++) {
                ((uint16_t *)(uintptr_t)m->src.alpha[b])[i * (size_t)b + (size_t)p] =
                    f32_to_f16(scale * (float)(1 << (b - 1 - p)) * 0.5f);
            }
            ((uint16_t *)(uintptr_t)m->src.offset[b])[i] = f32_to_f16(0.002f * rig_float(rng));
        }
    }
}

static void test_error(void)
{
    enum { ROWS = 64, COLS = 2048 };
    static const int32_t groups[] = {32, 64, 128};
    static float x[COLS], y[ROWS];
    struct rig_rng rng = {RIG_SEED + 23};
    struct backend be = rig_open("cpu", 2);
    for (int f = 0; f < 2; f++) {
        for (int g = 0; g < 3; g++) {
            struct rig_matrix m;
            rig_matrix_make(&m, &rng, ROWS, COLS, groups[g], 8, families[f]);
            centre_levels(&m, &rng);
            struct nested_matrix w = load(&be, &m.src);
            for (int c = 0; c < COLS; c++) {
                x[c] = gauss(&rng);
            }
            for (uint8_t b = 2; b <= 4; b++) {
                for (int p = PRODUCT_ONE; p <= PRODUCT_SLOTS; p++) {
                    double error = 0, all = 0;
                    CHECK_OK(rig_nested(&be, y, &w, &b, x, 1, NULL, NULL, 1, (enum product)p));
                    for (int32_t r = 0; r < ROWS; r++) {
                        double want = 0;
                        for (int32_t c = 0; c < COLS; c++) {
                            want += rig_weight(&m.src, r, c, b) * (double)x[c];
                        }
                        error += ((double)y[r] - want) * ((double)y[r] - want);
                        all += want * want;
                    }
                    double rms = 100 * sqrt(error / all);
                    printf("  %s, group %3d, %d bits, %s: relative RMS error %.2f %%\n",
                           f ? "free" : "tied", groups[g], b, p ? "dots    " : "look-ups", rms);
                    CHECK(rms <= 1);
                }
            }
            backend_planes_drop(&be, &w, 0);
            rig_matrix_free(&m);
        }
    }
    backend_close(&be);
}

int main(void)
{
    rig_register();
    test_isas_agree();
    test_look_ups_agree();
    test_tables_kept();
    test_definition();
    test_error();
    return check_report();
}
