/* Properties of the nested and dense products, for the oracle and for both sets of inner loops of
 * cpu: what DESIGN.md calls invariants, exactly (bit for bit) unless a bound is named.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include <math.h>

#include "core/mem.h"
#include "kernels/kernels.h"
#include "tests/ops/rig.h"

static const enum level_kind all_tied[BITS_ALL] = {
    [1] = LEVEL_TIED, [2] = LEVEL_TIED, [3] = LEVEL_TIED, [4] = LEVEL_TIED,
    [5] = LEVEL_TIED, [6] = LEVEL_TIED, [7] = LEVEL_TIED, [8] = LEVEL_TIED,
};
static const enum level_kind all_free[BITS_ALL] = {
    [1] = LEVEL_FREE, [2] = LEVEL_FREE, [3] = LEVEL_FREE, [4] = LEVEL_FREE,
    [5] = LEVEL_FREE, [6] = LEVEL_FREE, [7] = LEVEL_FREE, [8] = LEVEL_FREE,
};
static const enum level_kind all_lut[BITS_ALL] = {
    [1] = LEVEL_LUT, [2] = LEVEL_LUT, [3] = LEVEL_LUT, [4] = LEVEL_LUT,
    [5] = LEVEL_LUT, [6] = LEVEL_LUT, [7] = LEVEL_LUT, [8] = LEVEL_LUT,
};
static const enum level_kind with_tail[BITS_ALL] = {
    [2] = LEVEL_TIED,
    [3] = LEVEL_FREE,
    [4] = LEVEL_LUT,
    [8] = LEVEL_TAIL,
};
static const enum level_kind *const families[] = {all_tied, all_free, all_lut, with_tail};
static const char *const backends[] = {"cpu_ref", "cpu/scalar", "cpu/avx2", "cpu/avx512"};
enum { N_FAMILIES = 4, N_BACKENDS = 4 };

static struct nested_matrix load(struct backend *be, const struct nested_source *src,
                                 struct matrix_range range, int n_planes)
{
    struct nested_matrix w = {0};
    CHECK_OK(backend_planes_load(be, &w, src, &range, n_planes));
    return w;
}

static bool same(const float *a, const float *b, size_t n)
{
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* The first b planes with the levels of b are the b-bit model. */
static void test_first_planes(struct backend *be, double bound)
{
    enum { ROWS = 9, N_TOK = 2 };
    static const int32_t shapes[][2] = {{32, 32}, {100, 32}, {65, 64}, {256, 128}, {130, 128}};
    struct rig_rng rng = {RIG_SEED};
    float x[N_TOK * 256], y_all[N_TOK * ROWS], y_few[N_TOK * ROWS];
    for (int f = 0; f < N_FAMILIES; f++) {
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            int32_t n_cols = shapes[s][0];
            struct rig_matrix m;
            rig_matrix_make(&m, &rng, ROWS, n_cols, shapes[s][1], 8, families[f]);
            rig_floats(&rng, x, (size_t)(N_TOK * n_cols));
            struct nested_matrix all = load(be, &m.src, rig_whole(&m.src), 8);
            CHECK(all.n_resident == 8 && all.n_planes == 8);
            for (int b = 1; b <= 8; b++) {
                if (families[f][b] == LEVEL_NONE) {
                    continue;
                }
                struct nested_matrix few = load(be, &m.src, rig_whole(&m.src), b);
                const uint8_t bits[N_TOK] = {(uint8_t)b, (uint8_t)b};
                CHECK_OK(rig_nested(be, y_all, &all, bits, x, N_TOK, NULL, NULL, 1, PRODUCT_SLOTS));
                CHECK_OK(rig_nested(be, y_few, &few, bits, x, N_TOK, NULL, NULL, 1, PRODUCT_SLOTS));
                CHECK(same(y_all, y_few, N_TOK * ROWS));
                float expected[N_TOK * ROWS];
                for (int t = 0; t < N_TOK; t++) {
                    for (int r = 0; r < ROWS; r++) {
                        double sum = 0;
                        for (int32_t c = 0; c < n_cols; c++) {
                            sum += rig_weight(&m.src, r, c, b) * (double)x[t * n_cols + c];
                        }
                        expected[t * ROWS + r] = (float)sum;
                    }
                }
                CHECK_CLOSE(y_all, expected, N_TOK * ROWS,
                            families[f][b] == LEVEL_LUT ? fmin(bound, 1e-11) : bound);
                backend_planes_drop(be, &few, 0);
            }
            backend_planes_drop(be, &all, 0);
            rig_matrix_free(&m);
        }
    }
}

/* A token alone is the same token in any batch, at any number of threads. */
static void test_company(const char *name)
{
    enum { ROWS = 70, COLS = 300, N_TOK = 17 };
    struct rig_rng rng = {RIG_SEED + 1};
    static float x[N_TOK * COLS], y[N_TOK * ROWS], alone[ROWS], again[N_TOK * ROWS], bias[ROWS];
    rig_floats(&rng, x, N_TOK * COLS);
    rig_floats(&rng, bias, ROWS);
    x[5 * COLS + 7] = NAN; /* stays in its own token */
    x[6 * COLS + 250] = INFINITY;
    for (int f = 0; f < N_FAMILIES; f++) {
        struct rig_matrix m;
        rig_matrix_make(&m, &rng, ROWS, COLS, 64, 8, families[f]);
        uint8_t bits[N_TOK];
        for (int t = 0; t < N_TOK; t++) {
            do {
                bits[t] = (uint8_t)(1 + rig_below(&rng, 8));
            } while (families[f][bits[t]] == LEVEL_NONE);
        }
        for (int p = PRODUCT_ONE; p <= PRODUCT_CHUNK; p++) {
            for (int n_threads = 1; n_threads <= 3; n_threads++) {
                struct backend be = rig_open(name, n_threads);
                struct nested_matrix w = load(&be, &m.src, rig_whole(&m.src), 8);
                float *out = n_threads == 1 ? y : again;
                CHECK_OK(rig_nested(&be, out, &w, bits, x, N_TOK, bias, NULL, 1, (enum product)p));
                CHECK(same(y, out, N_TOK * ROWS));
                for (int t = 0; t < N_TOK; t++) {
                    CHECK_OK(rig_nested(&be, alone, &w, &bits[t], x + t * COLS, 1, bias, NULL, 1,
                                        (enum product)p));
                    CHECK(same(alone, y + t * ROWS, ROWS));
                }
                /* and in a batch of other sizes: tokens 3.. only */
                CHECK_OK(rig_nested(&be, again, &w, bits + 3, x + 3 * COLS, N_TOK - 3, bias, NULL,
                                    1, (enum product)p));
                CHECK(same(again, y + 3 * ROWS, (N_TOK - 3) * ROWS));
                backend_planes_drop(&be, &w, 0);
                backend_close(&be);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            CHECK(isnan(y[5 * ROWS + r]));
            CHECK(!isfinite(y[6 * ROWS + r]));
            CHECK(isfinite(y[4 * ROWS + r]) && isfinite(y[7 * ROWS + r]));
        }
        rig_matrix_free(&m);
    }
}

/* Segments: the same partial whoever computes it, as a segment of the whole row, as one of a
 * rank's segments, or as a shard of columns on its own. */
static void test_segments(struct backend *be)
{
    enum { ROWS = 12, COLS = 330, N_TOK = 3, N_SEG = 4 };
    static const int32_t cut[N_SEG + 1] = {0, 64, 192, 256, COLS};
    static const uint8_t bits[N_TOK] = {2, 4, 3};
    struct rig_rng rng = {RIG_SEED + 2};
    static float x[N_TOK * COLS], part_x[N_TOK * COLS];
    static float y[N_SEG * N_TOK * ROWS], part[N_SEG * N_TOK * ROWS];
    rig_floats(&rng, x, N_TOK * COLS);
    for (int f = 0; f < N_FAMILIES; f++) {
        struct rig_matrix m;
        rig_matrix_make(&m, &rng, ROWS, COLS, 64, 4, families[f]);
        struct nested_matrix w = load(be, &m.src, rig_whole(&m.src), 4);
        CHECK_OK(rig_nested(be, y, &w, bits, x, N_TOK, NULL, cut, N_SEG, PRODUCT_SLOTS));
        for (int first = 0; first < N_SEG; first++) {
            for (int end = first + 1; end <= N_SEG; end++) {
                int32_t n = end - first, n_cols = cut[end] - cut[first], own_cut[N_SEG + 1];
                for (int s = 0; s <= n; s++) {
                    own_cut[s] = cut[first + s] - cut[first];
                }
                for (int t = 0; t < N_TOK; t++) {
                    memcpy(part_x + t * n_cols, x + t * COLS + cut[first],
                           (size_t)n_cols * sizeof *x);
                }
                struct matrix_range range = rig_whole(&m.src);
                range.col_begin = cut[first];
                range.col_end = cut[end];
                struct nested_matrix shard = load(be, &m.src, range, 4);
                CHECK(shard.n_cols == n_cols && shard.n_cols_padded % 64 == 0);
                CHECK_OK(rig_nested(be, part, &shard, bits, part_x, N_TOK, NULL,
                                    n == 1 ? NULL : own_cut, n, PRODUCT_SLOTS));
                CHECK(same(part, y + first * N_TOK * ROWS, (size_t)(n * N_TOK * ROWS)));
                backend_planes_drop(be, &shard, 0);
            }
        }
        /* a shard of rows, too: rows 5..9, columns 64..256 */
        const struct matrix_range range = {5, 9, 64, 256};
        struct nested_matrix shard = load(be, &m.src, range, 4);
        for (int t = 0; t < N_TOK; t++) {
            memcpy(part_x + t * 192, x + t * COLS + 64, 192 * sizeof *x);
        }
        const int32_t own_cut[] = {0, 128, 192};
        CHECK_OK(
            rig_nested(be, part, &shard, bits, part_x, N_TOK, NULL, own_cut, 2, PRODUCT_SLOTS));
        for (int s = 0; s < 2; s++) {
            for (int t = 0; t < N_TOK; t++) {
                CHECK(same(part + (s * N_TOK + t) * 4, y + ((s + 1) * N_TOK + t) * ROWS + 5, 4));
            }
        }
        backend_planes_drop(be, &shard, 0);
        backend_planes_drop(be, &w, 0);
        rig_matrix_free(&m);
    }
}

static void test_drop_and_load(struct backend *be)
{
    enum { ROWS = 6, COLS = 96 };
    struct rig_rng rng = {RIG_SEED + 3};
    float x[COLS], before[BITS_ALL][ROWS], after[ROWS];
    rig_floats(&rng, x, COLS);
    for (int f = 0; f < N_FAMILIES; f++) {
        struct rig_matrix m;
        rig_matrix_make(&m, &rng, ROWS, COLS, 32, 8, families[f]);
        const struct matrix_range whole = rig_whole(&m.src);
        struct nested_matrix w = {0};
        /* plane by plane, upwards */
        for (int n = 1; n <= 8; n++) {
            CHECK_OK(backend_planes_load(be, &w, &m.src, &whole, n));
            CHECK(w.n_resident == n);
            CHECK(w.kind[n] == families[f][n]);
            for (int b = 1; b <= 8; b++) {
                uint8_t bits = (uint8_t)b;
                if (b > n || families[f][b] == LEVEL_NONE) {
                    CHECK_STATUS(rig_nested(be, after, &w, &bits, x, 1, NULL, NULL, 1, PRODUCT_ONE),
                                 ST_UNSUPPORTED, "asks for");
                } else {
                    CHECK_OK(
                        rig_nested(be, before[b], &w, &bits, x, 1, NULL, NULL, 1, PRODUCT_ONE));
                }
            }
        }
        /* down to 3, and up again; fewer planes than resident changes nothing */
        backend_planes_drop(be, &w, 3);
        CHECK(w.n_resident == 3 && w.kind[4] == LEVEL_NONE && w.kind[8] == LEVEL_NONE);
        CHECK(w.kind[3] == families[f][3]);
        CHECK_OK(backend_planes_load(be, &w, &m.src, &whole, 2));
        CHECK(w.n_resident == 3);
        backend_planes_drop(be, &w, 5);
        CHECK(w.n_resident == 3);
        for (int round = 0; round < 2; round++) {
            for (int b = 1; b <= w.n_resident; b++) {
                uint8_t bits = (uint8_t)b;
                if (families[f][b] != LEVEL_NONE) {
                    CHECK_OK(rig_nested(be, after, &w, &bits, x, 1, NULL, NULL, 1, PRODUCT_ONE));
                    CHECK(same(after, before[b], ROWS));
                }
            }
            CHECK_OK(backend_planes_load(be, &w, &m.src, &whole, 8));
        }
        backend_planes_drop(be, &w, 0);
        CHECK(w.n_resident == 0 && !w.planes && !w.levels[4]);
        backend_planes_drop(be, &w, 0);
        rig_matrix_free(&m);
    }
}

/* A token without levels at its bits, although the pass names them. */
static void test_bits_not_named(struct backend *be)
{
    struct rig_rng rng = {RIG_SEED + 4};
    struct rig_matrix m;
    rig_matrix_make(&m, &rng, 4, 32, 32, 4, all_tied);
    struct nested_matrix w = load(be, &m.src, rig_whole(&m.src), 4);
    float x[32], y[4];
    uint8_t bits = 4;
    rig_floats(&rng, x, 32);
    struct tensor bits_t = tensor_1d(&bits, DT_U8, 1), x_t = tensor_2d(x, DT_F32, 1, 32);
    struct tensor y_t = tensor_2d(y, DT_F32, 1, 4);
    const struct how how = {.n_segments = 1, .bits_used = 1u << 3};
    CHECK_STATUS(backend_matmul_nested(be, &y_t, &w, &bits_t, &x_t, NULL, &how), ST_SHAPE,
                 "token 0 has 4 bits");
    bits = 77;
    CHECK_STATUS(backend_matmul_nested(be, &y_t, &w, &bits_t, &x_t, NULL, &how), ST_SHAPE,
                 "token 0 has 77 bits");
    backend_planes_drop(be, &w, 0);
    rig_matrix_free(&m);
}

static void test_dense(const char *name)
{
    enum { ROWS = 61, COLS = 203, N_TOK = 11, N_SEG = 3 };
    static const int32_t cut[N_SEG + 1] = {0, 33, 130, COLS};
    struct rig_rng rng = {RIG_SEED + 5};
    static float w[ROWS * COLS], x[N_TOK * COLS], y[N_SEG * N_TOK * ROWS];
    static float again[N_SEG * N_TOK * ROWS], part_w[ROWS * COLS], part_x[N_TOK * COLS];
    static uint16_t half[ROWS * COLS], part_half[ROWS * COLS];
    rig_floats(&rng, w, ROWS * COLS);
    rig_floats(&rng, x, N_TOK * COLS);
    for (int i = 0; i < ROWS * COLS; i++) {
        half[i] = f32_to_f16(w[i]);
    }
    const struct tensor weights[] = {tensor_2d(w, DT_F32, ROWS, COLS),
                                     tensor_2d(half, DT_F16, ROWS, COLS),
                                     tensor_2d(half, DT_BF16, ROWS, COLS)};
    for (int d = 0; d < 3; d++) {
        for (int n_threads = 1; n_threads <= 3; n_threads++) {
            struct backend be = rig_open(name, n_threads);
            float *out = n_threads == 1 ? y : again;
            CHECK_OK(rig_dense(&be, out, &weights[d], x, N_TOK, NULL, cut, N_SEG, PRODUCT_SLOTS));
            CHECK(same(y, out, N_SEG * N_TOK * ROWS));
            for (int t = 0; t < N_TOK; t++) {
                CHECK_OK(rig_dense(&be, again, &weights[d], x + t * COLS, 1, NULL, cut, N_SEG,
                                   PRODUCT_SLOTS));
                for (int s = 0; s < N_SEG; s++) {
                    CHECK(same(again + s * ROWS, y + (s * N_TOK + t) * ROWS, ROWS));
                }
            }
            for (int s = 0; s < N_SEG; s++) { /* a rank with one segment only */
                int32_t n = cut[s + 1] - cut[s];
                for (int r = 0; r < ROWS; r++) {
                    memcpy(part_w + r * n, w + r * COLS + cut[s], (size_t)n * sizeof *w);
                    memcpy(part_half + r * n, half + r * COLS + cut[s], (size_t)n * sizeof *half);
                }
                for (int t = 0; t < N_TOK; t++) {
                    memcpy(part_x + t * n, x + t * COLS + cut[s], (size_t)n * sizeof *x);
                }
                struct tensor part =
                    tensor_2d(d ? (void *)part_half : (void *)part_w, weights[d].dtype, ROWS, n);
                CHECK_OK(rig_dense(&be, again, &part, part_x, N_TOK, NULL, NULL, 1, PRODUCT_SLOTS));
                CHECK(same(again, y + s * N_TOK * ROWS, N_TOK * ROWS));
            }
            backend_close(&be);
        }
    }
}

/* A product of host memory, straight to the door: nested where w is given, else dense. */
static void multiply(struct backend *be, float *y, const struct nested_matrix *w,
                     const struct tensor *dense, uint8_t *bits, float *x, int32_t n_tok,
                     int32_t n_rows, int32_t n_cols, struct how how)
{
    struct tensor x_t = tensor_2d(x, DT_F32, n_tok, n_cols), bits_t = tensor_1d(bits, DT_U8, n_tok);
    struct tensor y_t = how.add_up ? tensor_2d(y, DT_F32, n_tok, n_rows)
                                   : tensor_3d(y, DT_F32, how.n_segments, n_tok, n_rows);
    if (w) {
        CHECK_OK(backend_matmul_nested(be, &y_t, w, &bits_t, &x_t, NULL, &how));
    } else {
        CHECK_OK(backend_matmul_dense(be, &y_t, dense, &x_t, NULL, &how));
    }
}

/* Added up is kept apart and then added in order, also with more segments than an inner loop takes
 * at once; every partial sum is that of the token and of the segment alone. */
static void test_add_up(struct backend *be)
{
    enum { ROWS = 7, GROUP = 32, GROUPS = 37, COLS = GROUP * GROUPS - 5, MOST_TOK = 5 };
    static const int32_t n_segments[] = {1, 2, 3, 4, 5, 16, 17, 33, GROUPS};
    static float x[MOST_TOK * COLS], apart[GROUPS * MOST_TOK * ROWS], alone[GROUPS * ROWS];
    static float want[MOST_TOK * ROWS], sum[MOST_TOK * ROWS];
    static uint16_t half[ROWS * COLS], part[ROWS * COLS];
    struct rig_rng rng = {RIG_SEED + 7};
    struct rig_matrix m;
    rig_matrix_make(&m, &rng, ROWS, COLS, GROUP, 3, all_tied);
    struct nested_matrix w = load(be, &m.src, rig_whole(&m.src), 3);
    rig_floats(&rng, x, MOST_TOK * COLS);
    for (int i = 0; i < ROWS * COLS; i++) {
        half[i] = f32_to_f16(rig_float(&rng));
    }
    struct tensor dense = tensor_2d(half, DT_F16, ROWS, COLS);
    uint8_t bits[MOST_TOK] = {2, 3, 2, 2, 2};
    for (size_t i = 0; i < sizeof n_segments / sizeof *n_segments; i++) {
        int32_t n = n_segments[i], cut[GROUPS + 1];
        for (int32_t s = 0; s <= n; s++) {
            cut[s] = s == n ? COLS : GROUPS * s / n * GROUP;
        }
        for (int32_t n_tok = 1; n_tok <= MOST_TOK; n_tok++) {
            for (int is_nested = 0; is_nested < 2; is_nested++) {
                const struct nested_matrix *nested = is_nested ? &w : NULL;
                struct how how = {.n_segments = n, .cut = cut, .bits_used = 1u << 2 | 1u << 3};
                multiply(be, apart, nested, &dense, bits, x, n_tok, ROWS, COLS, how);
                for (int32_t t = 0; t < n_tok; t++) {
                    multiply(be, alone, nested, &dense, bits + t, x + t * COLS, 1, ROWS, COLS, how);
                    for (int32_t s = 0; s < n; s++) {
                        CHECK(same(alone + s * ROWS, apart + (s * n_tok + t) * ROWS, ROWS));
                    }
                }
                memcpy(want, apart, (size_t)(n_tok * ROWS) * sizeof *want);
                for (int32_t s = 1; s < n; s++) {
                    for (int32_t k = 0; k < n_tok * ROWS; k++) {
                        want[k] += apart[s * n_tok * ROWS + k];
                    }
                }
                how.add_up = true;
                multiply(be, sum, nested, &dense, bits, x, n_tok, ROWS, COLS, how);
                CHECK(same(sum, want, (size_t)(n_tok * ROWS)));
            }
        }
        for (int32_t s = 0; s < n; s++) { /* the segment as a matrix of its own */
            int32_t n_cols = cut[s + 1] - cut[s];
            for (int32_t r = 0; r < ROWS; r++) {
                memcpy(part + r * n_cols, half + r * COLS + cut[s], (size_t)n_cols * sizeof *part);
            }
            struct tensor own = tensor_2d(part, DT_F16, ROWS, n_cols);
            struct how how = {.n_segments = n, .cut = cut}, whole = {.n_segments = 1};
            multiply(be, apart, NULL, &dense, bits, x, 1, ROWS, COLS, how);
            multiply(be, alone, NULL, &own, bits, x + cut[s], 1, ROWS, n_cols, whole);
            CHECK(same(alone, apart + s * ROWS, ROWS));
        }
    }
    backend_planes_drop(be, &w, 0);
    rig_matrix_free(&m);
}

/* The steady state allocates nothing, whatever the mix of bits and tokens: calls straight to the
 * door, since the rig allocates. */
static void test_no_allocation(struct backend *be)
{
    enum { ROWS = 8, COLS = 64, N_TOK = 4 };
    struct rig_rng rng = {RIG_SEED + 6};
    struct rig_matrix m;
    rig_matrix_make(&m, &rng, ROWS, COLS, 32, 4, all_tied);
    struct nested_matrix w = load(be, &m.src, rig_whole(&m.src), 4);
    float x[N_TOK * COLS], y[N_TOK * ROWS];
    uint8_t bits[N_TOK] = {4, 2, 3, 4};
    rig_floats(&rng, x, N_TOK * COLS);
    uint64_t before = mem_alloc_count();
    for (int32_t n_tok = 1; n_tok <= N_TOK; n_tok++) {
        struct tensor bits_t = tensor_1d(bits, DT_U8, n_tok);
        struct tensor x_t = tensor_2d(x, DT_F32, n_tok, COLS);
        struct tensor y_t = tensor_2d(y, DT_F32, n_tok, ROWS);
        const struct how how = {.n_segments = 1, .bits_used = 1u << 2 | 1u << 3 | 1u << 4};
        CHECK_OK(backend_matmul_nested(be, &y_t, &w, &bits_t, &x_t, NULL, &how));
    }
    CHECK(mem_alloc_count() == before);
    backend_planes_drop(be, &w, 0);
    rig_matrix_free(&m);
}

static void test_backend(const char *name)
{
    struct backend be = rig_open(name, 2);
    printf("%s (%s)\n", name, be.ops->arithmetic(&be));
    /* cpu quantises activations to 8 bits: see test_ops.c */
    bool is_cpu = strcmp(be.ops->name, "cpu") == 0;
    test_first_planes(&be, is_cpu ? 4e-4 : strcmp(name, "cpu_ref") == 0 ? 1e-13 : 1e-11);
    test_segments(&be);
    test_drop_and_load(&be);
    test_add_up(&be);
    if (backend_is_host(&be)) { /* which reads the bits, and whose tensors lie in host memory */
        test_bits_not_named(&be);
        test_no_allocation(&be);
    }
    backend_close(&be);
    test_company(name);
    test_dense(name);
}

/* test_nested [--backend NAME]: all on the host without it. */
int main(int argc, char **argv)
{
    printf("seed %d\n", RIG_SEED);
    rig_register();
    if (argc == 3 && strcmp(argv[1], "--backend") == 0) {
        const struct backend_options options = {.n_threads = 2, .device = -1};
        struct backend be;
        if (backend_open(&be, argv[2], &options) == ST_UNSUPPORTED) {
            check_skip(status_message());
        }
        backend_close(&be);
        test_backend(argv[2]);
        return check_report();
    }
    for (int i = 0; i < N_BACKENDS; i++) {
        if (rig_has(backends[i])) {
            test_backend(backends[i]);
        }
    }
    return check_report();
}
