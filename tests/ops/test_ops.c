/* Every operation of a backend against the oracle cpu_ref, over a table of shapes and formats, and
 * against values worked out by hand. `test_ops --backend NAME [--quick]`, default cpu.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "kernels/kernels.h"
#include "tests/ops/cases.h"

/* Bounds of the normalised mean squared error against the oracle, one place for all. f32 sums of a
 * few thousand terms stay near 1e-12; 1e-6 leaves room for other orders of summation and for
 * half-precision multiplications with f32 sums, and no room for a wrong weight. The cpu backend's
 * products of nested matrices quantise activations to 8 bits: half a percent of a wide row's sum,
 * and up to twice that where a row has few columns or levels are as random as here, squared. */
static struct {
    const char *name;
    double bound, worst;
} ops[OP_N] = {
    [OP_NESTED] = {"matmul_nested", 1e-6, 0},
    [OP_DENSE] = {"matmul_dense", 1e-6, 0},
    [OP_ADD_PARTS] = {"add_parts", 0, 0}, /* f32 in a stated order: exact */
    [OP_EMBED] = {"embed", 0, 0},         /* a conversion: exact */
    [OP_RMSNORM] = {"rmsnorm", 1e-6, 0},
    [OP_LAYERNORM] = {"layernorm", 1e-6, 0},
    [OP_ROPE] = {"rope", 1e-6, 0},
    [OP_KV] = {"kv_append", 0, 0}, /* one rounding: exact */
    [OP_ATTENTION] = {"attention", 1e-6, 0},
    [OP_GLU] = {"glu", 1e-6, 0},
    [OP_ACTIVATE] = {"activate", 1e-6, 0},
    [OP_MOMENTS] = {"moments", 1e-6, 0},
    [OP_STATS] = {"logit_stats", 1e-6, 0},
};

enum { CPU_PERCENT = 2 }; /* 2 %: NMSE 4e-4 */

struct backend ref, dut;
const char *dut_name = "cpu";
static bool quick; /* fewer shapes, for tools that slow the device down */
struct rig_rng rng = {RIG_SEED};

void compare(enum op op, const float *got, const float *expected, size_t n, int line)
{
    double e = check_nmse(got, expected, n);
    ops[op].worst = e > ops[op].worst || isnan(e) ? e : ops[op].worst;
    if (!CHECK(e <= ops[op].bound)) {
        fprintf(stderr, "    %s, case of line %d: NMSE %.3g, bound %.3g\n", ops[op].name, line, e,
                ops[op].bound);
    }
}

float *floats(size_t n)
{
    float *out = rig_alloc(n, sizeof *out);
    rig_floats(&rng, out, n);
    return out;
}

/* n even cuts of n_cols at multiples of unit. */
static void even_cuts(int32_t *cut, int32_t n, int32_t n_cols, int32_t unit)
{
    int32_t n_units = (n_cols + unit - 1) / unit;
    for (int32_t i = 0; i < n; i++) {
        cut[i] = n_units * i / n * unit;
    }
    cut[n] = n_cols;
}

/* ---- products ---- */

static void one_nested(const struct rig_matrix *m, int32_t n_tok, int32_t n_segments,
                       bool with_bias)
{
    const struct nested_source *src = &m->src;
    const struct matrix_range whole = rig_whole(src);
    struct nested_matrix w_ref = {0}, w_dut = {0};
    CHECK_OK(backend_planes_load(&ref, &w_ref, src, &whole, src->n_planes));
    CHECK_OK(backend_planes_load(&dut, &w_dut, src, &whole, src->n_planes));
    size_t n_y = (size_t)n_segments * (size_t)n_tok * (size_t)src->n_rows;
    float *x = floats((size_t)n_tok * (size_t)src->n_cols), *bias = floats((size_t)src->n_rows);
    float *expected = floats(n_y), *got = floats(n_y);
    uint8_t *bits = rig_alloc((size_t)n_tok, 1);
    for (int32_t t = 0; t < n_tok; t++) {
        do {
            bits[t] = (uint8_t)(1 + rig_below(&rng, src->n_planes));
        } while (src->kind[bits[t]] == LEVEL_NONE);
    }
    int32_t cut[9];
    even_cuts(cut, n_segments, src->n_cols, src->group_cols);
    const float *b = with_bias && n_segments == 1 ? bias : NULL;
    const int32_t *c = n_segments == 1 ? NULL : cut;
    enum product p = (enum product)(n_tok % 3); /* every one has its turn */
    CHECK_OK(rig_nested(&ref, expected, &w_ref, bits, x, n_tok, b, c, n_segments, p));
    CHECK_OK(rig_nested(&dut, got, &w_dut, bits, x, n_tok, b, c, n_segments, p));
    COMPARE(OP_NESTED, got, expected, n_y);
    backend_planes_drop(&ref, &w_ref, 0);
    backend_planes_drop(&dut, &w_dut, 0);
    free(x);
    free(bias);
    free(expected);
    free(got);
    free(bits);
}

static void test_nested(void)
{
    static const int32_t shapes[][3] = {/* rows, columns, group */
                                        {1, 1, 32},     {7, 32, 32},    {33, 100, 32}, {5, 65, 64},
                                        {64, 256, 128}, {17, 200, 128}, {96, 512, 64}};
    static const int32_t n_toks[] = {1, 2, 3, 5, 16, 33};
    static const struct {
        int n_planes;
        enum level_kind kind[BITS_ALL];
    } kinds[] = {
        {4, {[2] = LEVEL_TIED, [3] = LEVEL_TIED, [4] = LEVEL_TIED}},
        {4, {[1] = LEVEL_FREE, [2] = LEVEL_FREE, [3] = LEVEL_FREE, [4] = LEVEL_FREE}},
        {4, {[1] = LEVEL_LUT, [2] = LEVEL_LUT, [3] = LEVEL_LUT, [4] = LEVEL_LUT}},
        {8, {[2] = LEVEL_FREE, [3] = LEVEL_TIED, [4] = LEVEL_LUT, [8] = LEVEL_TAIL}},
        {8, {[5] = LEVEL_TIED, [6] = LEVEL_FREE, [7] = LEVEL_LUT, [8] = LEVEL_TIED}},
        {8, {[1] = LEVEL_TIED, [5] = LEVEL_LUT, [7] = LEVEL_FREE, [8] = LEVEL_FREE}},
        {8, {[3] = LEVEL_LUT, [8] = LEVEL_LUT}},
    };
    for (size_t s = quick ? 4 : 0; s < (quick ? 6 : sizeof shapes / sizeof *shapes); s++) {
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
            struct rig_matrix m;
            rig_matrix_make(&m, &rng, shapes[s][0], shapes[s][1], shapes[s][2], kinds[k].n_planes,
                            kinds[k].kind);
            int32_t n_groups = m.src.n_cols_padded / m.src.group_cols;
            for (size_t t = 0; t < sizeof n_toks / sizeof *n_toks; t++) {
                one_nested(&m, n_toks[t], 1, t % 2 == 0);
                if (n_groups > 1) {
                    one_nested(&m, n_toks[t], n_groups < 3 ? n_groups : 3, false);
                }
            }
            rig_matrix_free(&m);
        }
    }
}

static void test_dense(void)
{
    static const int32_t shapes[][2] = {{1, 1}, {3, 31}, {8, 32}, {40, 200}, {129, 257}};
    static const int32_t n_toks[] = {1, 2, 4, 19};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int32_t n_rows = shapes[s][0], n_cols = shapes[s][1], cut[9];
        size_t n = (size_t)n_rows * (size_t)n_cols;
        float *w = floats(n), *bias = floats((size_t)n_rows);
        uint16_t *f16 = rig_alloc(n, 2), *bf16 = rig_alloc(n, 2);
        for (size_t i = 0; i < n; i++) {
            f16[i] = f32_to_f16(w[i]);
            uint32_t word;
            memcpy(&word, &w[i], sizeof word);
            bf16[i] = (uint16_t)(word >> 16);
        }
        const struct tensor weights[] = {tensor_2d(w, DT_F32, n_rows, n_cols),
                                         tensor_2d(f16, DT_F16, n_rows, n_cols),
                                         tensor_2d(bf16, DT_BF16, n_rows, n_cols)};
        for (size_t d = 0; d < 3; d++) {
            for (size_t t = 0; t < 4; t++) {
                int32_t n_tok = n_toks[t];
                for (int32_t n_seg = 1; n_seg <= (n_cols > 8 ? 5 : 1); n_seg += 4) {
                    even_cuts(cut, n_seg, n_cols, 1);
                    size_t n_y = (size_t)n_seg * (size_t)n_tok * (size_t)n_rows;
                    float *x = floats((size_t)n_tok * (size_t)n_cols);
                    float *expected = floats(n_y), *got = floats(n_y);
                    const float *b = n_seg == 1 && t % 2 ? bias : NULL;
                    CHECK_OK(rig_dense(&ref, expected, &weights[d], x, n_tok, b, cut, n_seg,
                                       PRODUCT_SLOTS));
                    CHECK_OK(
                        rig_dense(&dut, got, &weights[d], x, n_tok, b, cut, n_seg, PRODUCT_SLOTS));
                    COMPARE(OP_DENSE, got, expected, n_y);
                    free(x);
                    free(expected);
                    free(got);
                }
            }
        }
        free(w);
        free(bias);
        free(f16);
        free(bf16);
    }
}

/* ---- the small operations ---- */

static void test_add_parts(void)
{
    for (int32_t n_parts = 1; n_parts <= 8; n_parts++) {
        int32_t n_tok = 1 + n_parts % 3, n = 37;
        size_t n_x = (size_t)n_tok * (size_t)n;
        float *x = floats(n_x), *parts = floats((size_t)n_parts * n_x), *bias = floats((size_t)n);
        float *y[2] = {floats(n_x), floats(n_x)};
        for (int i = 0; i < 2; i++) {
            struct backend *be = i ? &dut : &ref;
            struct tensor x_t = rig_put(be, tensor_2d(x, DT_F32, n_tok, n));
            struct tensor p_t = rig_put(be, tensor_3d(parts, DT_F32, n_parts, n_tok, n));
            struct tensor b_t = rig_put(be, tensor_1d(bias, DT_F32, n));
            CHECK_OK(backend_add_parts(be, &x_t, &p_t, n_parts % 2 ? &b_t : NULL));
            rig_get(be, y[i], &x_t);
            rig_drop(be, &x_t);
            rig_drop(be, &p_t);
            rig_drop(be, &b_t);
        }
        COMPARE(OP_ADD_PARTS, y[1], y[0], n_x);
        free(x);
        free(parts);
        free(bias);
        free(y[0]);
        free(y[1]);
    }
    /* The order is f32, part by part: (2^24 + 1) + (-2^24) is 0 in f32, other orders give 1. */
    float x = 0, parts[] = {0x1p24f, 1, -0x1p24f};
    struct tensor x_t = rig_put(&dut, tensor_2d(&x, DT_F32, 1, 1));
    struct tensor p_t = rig_put(&dut, tensor_3d(parts, DT_F32, 3, 1, 1));
    CHECK_OK(backend_add_parts(&dut, &x_t, &p_t, NULL));
    rig_get(&dut, &x, &x_t);
    CHECK_NEAR(x, 0, 0);
    rig_drop(&dut, &x_t);
    rig_drop(&dut, &p_t);
}

static void test_embed(void)
{
    enum { VOCAB = 11, N_TOK = 5 };
    static const int32_t ids[N_TOK] = {10, 0, 3, 3, 7};
    for (int32_t n = 1; n <= 45; n += 11) {
        uint16_t half[VOCAB * 45];
        float whole[VOCAB * 45], got[N_TOK * 45], expected[N_TOK * 45];
        for (int i = 0; i < VOCAB * n; i++) {
            half[i] = f32_to_f16(whole[i] = rig_float(&rng));
        }
        for (int dtype = DT_F32; dtype <= DT_BF16; dtype++) {
            void *data = dtype == DT_F32 ? (void *)whole : (void *)half;
            for (int i = 0; i < N_TOK * n; i++) {
                int at = ids[i / n] * n + i % n;
                expected[i] = dtype == DT_F32   ? whole[at]
                              : dtype == DT_F16 ? (float)rig_f16(half[at])
                                                : bf16_to_f32(half[at]);
            }
            struct tensor table = rig_put(&dut, tensor_2d(data, (enum dtype)dtype, VOCAB, n));
            struct tensor ids_t = rig_put(&dut, tensor_1d((void *)ids, DT_I32, N_TOK));
            struct tensor x = rig_room(&dut, tensor_2d(NULL, DT_F32, N_TOK, n));
            CHECK_OK(backend_embed(&dut, &x, &table, &ids_t));
            rig_get(&dut, got, &x);
            COMPARE(OP_EMBED, got, expected, (size_t)(N_TOK * n));
            rig_drop(&dut, &table);
            rig_drop(&dut, &ids_t);
            rig_drop(&dut, &x);
        }
    }
}

static void rmsnorm(struct backend *be, float *y, const float *x, const float *gain, int32_t n_tok,
                    int32_t n, float eps, bool in_place)
{
    struct tensor x_t = rig_put(be, tensor_2d((void *)x, DT_F32, n_tok, n));
    struct tensor g_t = rig_put(be, tensor_1d((void *)gain, DT_F32, n));
    struct tensor y_t = in_place ? x_t : rig_room(be, tensor_2d(NULL, DT_F32, n_tok, n));
    CHECK_OK(backend_rmsnorm(be, &y_t, &x_t, &g_t, eps));
    rig_get(be, y, &y_t);
    rig_drop(be, &x_t);
    rig_drop(be, &g_t);
    if (!in_place) {
        rig_drop(be, &y_t);
    }
}

static void test_rmsnorm(void)
{
    static const int32_t widths[] = {1, 7, 64, 1000};
    for (size_t i = 0; i < 4; i++) {
        int32_t n = widths[i], n_tok = 4;
        size_t n_x = (size_t)n * (size_t)n_tok;
        float *x = floats(n_x), *gain = floats((size_t)n), *a = floats(n_x), *b = floats(n_x);
        rmsnorm(&ref, a, x, gain, n_tok, n, 1e-5f, false);
        rmsnorm(&dut, b, x, gain, n_tok, n, 1e-5f, false);
        COMPARE(OP_RMSNORM, b, a, n_x);
        rmsnorm(&dut, a, x, gain, n_tok, n, 1e-5f, true);
        CHECK(memcmp(a, b, n_x * sizeof *a) == 0);
        rmsnorm(&dut, a, x + 2 * n, gain, 1, n, 1e-5f, false); /* the third token alone */
        CHECK(memcmp(a, b + 2 * n, (size_t)n * sizeof *a) == 0);
        free(x);
        free(gain);
        free(a);
        free(b);
    }
    /* mean((3, 4, 0, 0)^2) = 25/4; with eps 0: 3 / 2.5, 4 / 2.5, times the gain */
    const float x[] = {3, 4, 0, 0}, gain[] = {1, 2, 1, 1}, hand[] = {1.2f, 3.2f, 0, 0};
    float y[4];
    rmsnorm(&dut, y, x, gain, 1, 4, 0, false);
    COMPARE(OP_RMSNORM, y, hand, 4);
    /* eps inside the root: (0.5^2 + 0.75) = 1 */
    const float small[] = {0.5f}, one[] = {1}, hand_eps[] = {0.5f};
    rmsnorm(&dut, y, small, one, 1, 1, 0.75f, false);
    COMPARE(OP_RMSNORM, y, hand_eps, 1);
}

static void glu(struct backend *be, float *y, const float *gate, const float *up, int32_t n_tok,
                int32_t n)
{
    struct tensor g = rig_put(be, tensor_2d((void *)gate, DT_F32, n_tok, n));
    struct tensor u = rig_put(be, tensor_2d((void *)up, DT_F32, n_tok, n));
    CHECK_OK(backend_glu(be, &g, &g, &u, ACT_SILU)); /* in place, as the decoder does it */
    rig_get(be, y, &g);
    rig_drop(be, &g);
    rig_drop(be, &u);
}

static void test_glu(void)
{
    enum { N_TOK = 3, N = 5000 };
    float *gate = floats(N_TOK * N), *up = floats(N_TOK * N);
    float *a = floats(N_TOK * N), *b = floats(N_TOK * N);
    for (int i = 0; i < N_TOK * N; i++) {
        gate[i] *= 20;
    }
    glu(&ref, a, gate, up, N_TOK, N);
    glu(&dut, b, gate, up, N_TOK, N);
    COMPARE(OP_GLU, b, a, N_TOK * N);
    glu(&dut, a, gate + N, up + N, 1, N);
    CHECK(memcmp(a, b + N, N * sizeof *a) == 0);
    /* silu(0) = 0, silu(ln 3) = ln 3 * 3/4, silu(-ln 3) = -ln 3 / 4, silu(-200) = 0 */
    const float hand_gate[] = {0, 1.0986123f, -1.0986123f, -200}, hand_up[] = {5, 4, 4, 1};
    const float hand[] = {0, 3 * 1.0986123f, -1.0986123f, 0};
    glu(&dut, a, hand_gate, hand_up, 1, 4);
    COMPARE(OP_GLU, a, hand, 4);
    free(gate);
    free(up);
    free(a);
    free(b);
}

/* q and k in one array each; results over them. */
static void rope(struct backend *be, float *q, float *k, const int32_t *pos, int32_t n_tok,
                 int32_t n_heads, int32_t n_kv, int32_t head_dim, const struct tensor *cos_host,
                 const struct tensor *sin_host)
{
    struct token_place place = put_place(be, pos, pos, pos, n_tok);
    struct tensor q_t = rig_put(be, tensor_3d(q, DT_F32, n_tok, n_heads, head_dim));
    struct tensor k_t = rig_put(be, tensor_3d(k, DT_F32, n_tok, n_kv, head_dim));
    struct rope_table table = {rig_put(be, *cos_host), rig_put(be, *sin_host),
                               2 * cos_host->dims[1]};
    CHECK_OK(backend_rope(be, &q_t, &k_t, &place, &table));
    rig_get(be, q, &q_t);
    rig_get(be, k, &k_t);
    rig_drop(be, &q_t);
    rig_drop(be, &k_t);
    rig_drop(be, &table.cos);
    rig_drop(be, &table.sin);
    drop_place(be, &place);
}

static void test_rope(void)
{
    enum { MAX_POS = 20, N_TOK = 6, HEADS = 4, KV = 2, DIM = 16 };
    static const int32_t pos[N_TOK] = {0, 19, 3, 3, 11, 7};
    for (int rot_dim = 4; rot_dim <= DIM; rot_dim += 4) { /* partial, then full */
        int32_t half = rot_dim / 2;
        float c[MAX_POS * DIM], s[MAX_POS * DIM], q[2][N_TOK * HEADS * DIM], k[2][N_TOK * KV * DIM];
        for (int p = 0; p < MAX_POS; p++) {
            for (int i = 0; i < half; i++) {
                double angle = p * pow(10000, -2.0 * i / rot_dim);
                c[p * half + i] = (float)cos(angle);
                s[p * half + i] = (float)sin(angle);
            }
        }
        rig_floats(&rng, q[0], N_TOK * HEADS * DIM);
        rig_floats(&rng, k[0], N_TOK * KV * DIM);
        memcpy(q[1], q[0], sizeof q[0]);
        memcpy(k[1], k[0], sizeof k[0]);
        float before = q[0][DIM - 1];
        struct tensor cos_t = tensor_2d(c, DT_F32, MAX_POS, half);
        struct tensor sin_t = tensor_2d(s, DT_F32, MAX_POS, half);
        rope(&ref, q[0], k[0], pos, N_TOK, HEADS, KV, DIM, &cos_t, &sin_t);
        rope(&dut, q[1], k[1], pos, N_TOK, HEADS, KV, DIM, &cos_t, &sin_t);
        COMPARE(OP_ROPE, q[1], q[0], N_TOK * HEADS * DIM);
        COMPARE(OP_ROPE, k[1], k[0], N_TOK * KV * DIM);
        CHECK_NEAR(q[1][DIM - 1], before, rot_dim < DIM || pos[0] == 0 ? 0 : 1); /* passes */
    }
    /* A quarter turn of dimension 0 with dimension 2; dimensions 1 and 3 turn by 180 degrees;
     * dimension 4 passes. Position 0 is the identity. */
    float c[] = {1, 1, 0, -1}, s[] = {0, 0, 1, 0}, q[] = {1, 2, 3, 4, 5, 1, 2, 3, 4, 5};
    float k[] = {0, 0, 1, 0, 9, 0, 0, 1, 0, 9};
    const float hand_q[] = {1, 2, 3, 4, 5, -3, -2, 1, -4, 5};
    const float hand_k[] = {0, 0, 1, 0, 9, -1, 0, 0, 0, 9};
    const int32_t hand_pos[] = {0, 1};
    struct tensor cos_t = tensor_2d(c, DT_F32, 2, 2), sin_t = tensor_2d(s, DT_F32, 2, 2);
    rope(&dut, q, k, hand_pos, 2, 1, 1, 5, &cos_t, &sin_t);
    COMPARE(OP_ROPE, q, hand_q, 10);
    COMPARE(OP_ROPE, k, hand_k, 10);
}

/* ---- logit statistics ---- */

static void test_stats(void)
{
    enum { N_TOK = 4, N = 103, N_CUTS = 3, FIRST = 1000 };
    static const int32_t cut[N_CUTS + 1] = {0, 40, 41, N};
    struct logit_want want[N_TOK] = {{.target = -1},
                                     {.target = FIRST + 40, .temperature = 0.7f, .key = {1, 2}},
                                     {.target = FIRST + N, .temperature = 1, .key = {3, 4}},
                                     {.target = FIRST, .temperature = 1.6f, .restricted = true}};
    float *logits = floats(N_TOK * N);
    for (int i = 0; i < N_TOK * N; i++) {
        logits[i] *= 10;
    }
    logits[3 * N + 50] = logits[3 * N + 60] = 11; /* a tie: the lower id wins */
    struct logit_stats s[2][N_TOK * N_CUTS];
    for (int i = 0; i < 2; i++) {
        struct backend *be = i ? &dut : &ref;
        struct tensor t = rig_put(be, tensor_2d(logits, DT_F32, N_TOK, N));
        CHECK_OK(backend_logit_stats(be, s[i], &t, FIRST, cut, N_CUTS, want));
        rig_drop(be, &t);
    }
    for (int i = 0; i < N_TOK * N_CUTS; i++) {
        const struct logit_stats *a = &s[1][i], *b = &s[0][i];
        CHECK(a->argmax == b->argmax && a->pick == b->pick);
        CHECK(memcmp(&a->max, &b->max, sizeof a->max) == 0);
        CHECK(memcmp(&a->second, &b->second, sizeof a->max) == 0);
        CHECK(memcmp(&a->target, &b->target, sizeof a->max) == 0);
        CHECK(memcmp(&a->pick_logit, &b->pick_logit, sizeof a->max) == 0);
        const float got[] = {a->sum_exp, a->sum_exp_l, a->pick_score};
        const float expected[] = {b->sum_exp, b->sum_exp_l, b->pick_score};
        COMPARE(OP_STATS, got, expected, 3);
    }
    /* token by token and part by part, from the definition */
    for (int t = 0; t < N_TOK; t++) {
        for (int c = 0; c < N_CUTS; c++) {
            const struct logit_stats *a = &s[1][t * N_CUTS + c];
            int best = cut[c];
            for (int i = cut[c]; i < cut[c + 1]; i++) {
                best = logits[t * N + i] > logits[t * N + best] ? i : best;
            }
            double sum = 0;
            for (int i = cut[c]; i < cut[c + 1]; i++) {
                sum += exp((double)logits[t * N + i] - (double)logits[t * N + best]);
            }
            CHECK(a->argmax == FIRST + best);
            CHECK(want[t].temperature > 0 && !want[t].restricted ? true : a->pick == a->argmax);
            double sum_t = 0;
            for (int i = cut[c]; want[t].restricted && i < cut[c + 1]; i++) {
                double d = (double)logits[t * N + i] - (double)logits[t * N + best];
                sum_t += exp(d / (double)want[t].temperature);
            }
            CHECK_NEAR(a->sum_exp_t, sum_t, 1e-5 * sum_t);
            CHECK_NEAR(a->sum_exp, sum, 1e-5 * sum);
        }
    }
    CHECK_NEAR(s[1][1 * N_CUTS + 1].target, logits[N + 40], 0);
    CHECK(isinf(s[1][1 * N_CUTS].target) && isinf(s[1][2 * N_CUTS + 2].target));
    CHECK(s[1][3 * N_CUTS + 2].argmax == FIRST + 50);
    free(logits);
}

/* ---- the k largest logits ---- */

static int by_order(const void *a, const void *b)
{
    const struct logit_candidate *x = a, *y = b;
    return x->logit > y->logit ? -1 : x->logit < y->logit ? 1 : (x->id > y->id) - (x->id < y->id);
}

/* Against a full sort. kind 0: random; 1: few different values; 2: all equal; 3: rising; 4:
 * falling; 5: half of them -inf. */
static void one_top_k(int32_t n_tok, int32_t n, int32_t k, int kind)
{
    enum { FIRST = 700 };
    float *logits = floats((size_t)n_tok * (size_t)n);
    struct logit_candidate *sorted = rig_alloc((size_t)n, sizeof *sorted);
    struct logit_candidate *got = rig_alloc((size_t)n_tok * (size_t)k, sizeof *got);
    for (int32_t i = 0; i < n_tok * n; i++) {
        float *l = &logits[i];
        *l = kind == 0   ? 10 * *l
             : kind == 1 ? floorf(3 * *l)
             : kind == 2 ? 0.5f
             : kind == 3 ? (float)i
             : kind == 4 ? (float)-i
             : i % 2     ? *l
                         : -INFINITY;
    }
    struct tensor t = rig_put(&dut, tensor_2d(logits, DT_F32, n_tok, n));
    CHECK_OK(backend_top_k(&dut, got, &t, FIRST, k));
    for (int32_t j = 0; j < n_tok; j++) {
        for (int32_t i = 0; i < n; i++) {
            sorted[i] = (struct logit_candidate){logits[j * n + i], FIRST + i};
        }
        qsort(sorted, (size_t)n, sizeof *sorted, by_order);
        int32_t n_kept = k < n ? k : n;
        bool same =
            memcmp(got + (size_t)j * (size_t)k, sorted, (size_t)n_kept * sizeof *sorted) == 0;
        for (int32_t i = n_kept; i < k; i++) {
            const struct logit_candidate *c = &got[j * k + i];
            same = same && c->id == -1 && c->logit == -INFINITY;
        }
        if (!CHECK(same)) {
            fprintf(stderr, "    n_tok %d, n %d, k %d, kind %d, token %d\n", n_tok, n, k, kind, j);
        }
    }
    rig_drop(&dut, &t);
    free(logits);
    free(sorted);
    free(got);
}

static void test_top_k(void)
{
    static const int32_t ns[] = {1, 2, 31, 32, 33, 255, 256, 257, 1000, 20000};
    static const int32_t ks[] = {1, 2, 7, 255, 256, 300};
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++) {
        for (size_t j = 0; j < sizeof ks / sizeof *ks; j++) {
            for (int kind = 0; kind < 6; kind++) {
                one_top_k(ns[i] > 1000 ? 1 : 3, ns[i], ks[j], kind);
            }
        }
    }
    one_top_k(9, 5000, 256, 0); /* enough work for several threads */
}

/* W has codes 0, 1, 2, 3 in its first columns; see the values at the levels. */
static void test_nested_by_hand(void)
{
    uint8_t planes[2][4] = {{0x0c}, {0x0a}}; /* plane 0: columns 2, 3; plane 1: columns 1, 3 */
    uint16_t scale1 = 0x4400, offset1 = 0, scale2 = 0x4000, offset2 = 0x3800; /* 4, 0, 2, 0.5 */
    const struct nested_source src = {
        .kind = {[1] = LEVEL_TIED, [2] = LEVEL_TIED},
        .n_rows = 1,
        .n_cols = 4,
        .n_cols_padded = 32,
        .group_cols = 32,
        .n_planes = 2,
        .planes = planes[0],
        .scale = {[1] = &scale1, [2] = &scale2},
        .offset = {[1] = &offset1, [2] = &offset2},
    };
    /* 1 bit: -2 -2 2 2; 2 bits: 0.5 + 2 * (-1.5, -0.5, 0.5, 1.5) = -2.5 -0.5 1.5 3.5 */
    const float x[] = {1, 10, 100, 1000, 1, 10, 100, 1000}, hand[] = {2178, 3642.5f};
    const uint8_t bits[] = {1, 2};
    const struct matrix_range whole = rig_whole(&src);
    struct nested_matrix w = {0};
    float y[2];
    CHECK_OK(backend_planes_load(&dut, &w, &src, &whole, 2));
    CHECK_OK(rig_nested(&dut, y, &w, bits, x, 2, NULL, NULL, 1, PRODUCT_SLOTS));
    COMPARE(OP_NESTED, y, hand, 2);
    backend_planes_drop(&dut, &w, 0);
}

int main(int argc, char **argv)
{
    const char *name = argc >= 3 && strcmp(argv[1], "--backend") == 0 ? argv[2] : dut_name;
    dut_name = name;
    quick = argc == 4 && strcmp(argv[3], "--quick") == 0;
    rig_register();
    kernels_register_all(); /* a second time does nothing */
    if (rig_try_open(&dut, name, 2) == ST_UNSUPPORTED) {
        check_skip(status_message());
    }
    backend_close(&dut);
    dut = rig_open(name, 2);
    if (strcmp(dut.ops->name, "cpu") == 0) {
        ops[OP_NESTED].bound = 1e-4 * CPU_PERCENT * CPU_PERCENT;
    }
    ref = rig_open("cpu_ref", 1);
    printf("backend %s (%s), oracle cpu_ref, seed %d\n", name, dut.ops->arithmetic(&dut), RIG_SEED);
    test_nested_by_hand();
    test_nested();
    test_dense();
    test_add_parts();
    test_embed();
    test_rmsnorm();
    test_glu();
    test_rope();
    check_n_failed += cases_attention();
    check_n_failed += cases_layer();
    test_stats();
    test_top_k();
    for (int op = 0; op < OP_N; op++) {
        printf("%-14s worst NMSE %.3g, bound %.3g\n", ops[op].name, ops[op].worst, ops[op].bound);
    }
    backend_close(&dut);
    backend_close(&ref);
    return check_report();
}
