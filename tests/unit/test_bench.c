/* experiments/bench: statistics against values by hand, the sizes and the weights of a random model
 * against arithmetic written out here, the profile against the calls that were made.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/kvcache.h"
#include "core/mem.h"
#include "dist/shard.h"
#include "experiments/bench/bench.h"
#include "experiments/bench/profile.h"
#include "experiments/bench/random_model.h"
#include "experiments/bench/shape.h"
#include "experiments/bench/statistics.h"
#include "kernels/kernels.h"

static void test_statistics(void)
{
    double odd[] = {3, 1, 10}, even[] = {4, 1, 3, 100}, one[] = {7};
    struct spread s = spread_of(odd, 3);
    CHECK(s.min == 1 && s.median == 3 && s.max == 10);
    s = spread_of(even, 4);
    CHECK(s.min == 1 && s.median == 3.5 && s.max == 100);
    s = spread_of(one, 1);
    CHECK(s.min == 7 && s.median == 7 && s.max == 7);
    struct samples list;
    CHECK_OK(samples_create(&list, 2));
    samples_add(&list, 2);
    CHECK(samples_spread(&list).median == 2);
    samples_add(&list, 1);
    CHECK(samples_spread(&list).median == 1.5);
    samples_free(&list);
}

/* Weights of a named model, without its embedding. */
static void test_shapes(void)
{
    static const struct {
        const char *name;
        double linears; /* of layers and head, in millions */
        int n_matrices;
    } known[] = {
        /* 24 (4 2048^2 + 3 2048 5632) + 32000 2048 */
        {"mobilellama-1.4b", 1298.661376, 4},
        /* 32 (4 4096^2 + 3 4096 11008) + 32000 4096 */
        {"vicuna-7b", 6607.077376, 4},
        /* 24 (4 2048^2 + 2 2048 8192) + 51200 2048 */
        {"phi-1.5", 1312.817152, 4},
        /* 32 (4 2560^2 + 3 2560 6912) + 50432 2560 */
        {"stablelm-3b", 2666.65984, 4},
        /* 32 (2 4096^2 + 2 1024 4096 + 3 4096 14336) + 128256 4096 */
        {"llama-3.1-8b", 7504.658432, 5},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        struct model_config c;
        struct shape_matrix shape[SHAPE_MATRICES_MAX];
        struct model_bytes b;
        size_t making;
        CHECK_OK(shape_get(&c, known[i].name));
        random_model_nest(&c, 64, 1u << 4);
        CHECK(shape_matrices(shape, &c) == known[i].n_matrices);
        random_model_estimate(&b, &making, &c, LEVEL_TIED, 1u << 4);
        double weights = 2 * (double)b.planes; /* two to the byte */
        CHECK_NEAR(weights, 1e6 * known[i].linears, 1);
        CHECK_NEAR((double)b.levels, weights / 64 * 4, 1); /* scale and offset, F16 */
        CHECK(b.embed == 2 * (size_t)c.vocab * (size_t)c.hidden);
    }
    struct model_config c;
    CHECK_STATUS(shape_get(&c, "/no/such/shape"), ST_USER, "mobilellama-1.4b");
}

static void check_weights(enum level_kind kind, int32_t n_rows, int32_t n_cols, int32_t group)
{
    struct random_matrix m;
    uint32_t bits = 1u << 1 | 1u << 2 | 1u << 4;
    CHECK_OK(random_matrix_create(&m, n_rows, n_cols, group, kind, bits, 3));
    CHECK(m.source.n_planes == 4 && m.source.kind[3] == LEVEL_NONE && m.source.kind[2] == kind);
    for (int b = 1; b <= 4; b++) {
        double sum = 0, squares = 0, n = (double)n_rows * n_cols;
        if (!(bits >> b & 1)) {
            continue;
        }
        for (int32_t r = 0; r < n_rows; r++) {
            for (int32_t col = 0; col < n_cols; col++) {
                double w = (double)bitplane_weight(&m.source, r, col, b);
                sum += w;
                squares += w * w;
            }
        }
        /* standard deviation 1 / sqrt(n_cols), up to sampling and the levels' own spread */
        CHECK_NEAR(squares / n * n_cols, 1, 0.06);
        CHECK_NEAR(sum / n * sqrt((double)n_cols), 0, 0.03);
    }
    random_matrix_free(&m);
}

/* A whole model in the oracle: sizes by arithmetic, and what the profile of a product says. */
static void test_model(void)
{
    struct backend be;
    struct model_config c;
    struct model_shard shard;
    struct weights w;
    struct model_bytes loaded, expected;
    size_t making;
    uint32_t mask = 1u << 2 | 1u << 3;
    kernels_register_all();
    CHECK_OK(backend_open(&be, "cpu_ref", &(struct backend_options){0}));
    CHECK_OK(profile_wrap(&be));
    CHECK_OK(shape_get(&c, "tiny"));
    random_model_nest(&c, 32, mask);
    CHECK_OK(shard_model(&shard, &c, 32, &(struct shard_options){.size = 1}, 0));
    CHECK_OK(random_model_load(&w, &be, &c, &shard, LEVEL_FREE, mask));
    random_model_bytes(&loaded, &w);
    random_model_estimate(&expected, &making, &c, LEVEL_FREE, mask);
    CHECK(loaded.planes == expected.planes && loaded.levels == expected.levels);
    CHECK(loaded.embed == expected.embed);

    float x[256] = {1}, y[640], dx[256] = {0};
    uint8_t bits[1] = {3};
    struct tensor tx = tensor_2d(x, DT_F32, 1, 256), ty = tensor_2d(y, DT_F32, 1, 640),
                  tb = tensor_1d(bits, DT_U8, 1), td = tensor_2d(dx, DT_F32, 1, 256);
    struct how how = {.product = PRODUCT_ONE, .n_segments = 1, .bits_used = 1u << 3};
    const struct nested_matrix *gate = &w.layers[0].matrix[M_GATE].nested;
    CHECK_OK(backend_matmul_nested(&be, &ty, gate, &tb, &tx, NULL, &how)); /* not kept */
    profile_keep(&be, 3);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(backend_matmul_nested(&be, &ty, gate, &tb, &tx, NULL, &how));
    }
    CHECK_OK(backend_add_parts(&be, &tx, &td, NULL));
    profile_keep(&be, -1);
    int n = 0;
    const struct profile_entry *e = profile_entries(&be, 3, &n);
    CHECK(n == 2);
    if (n == 2) {
        /* 3 planes of 640 x 256, and 4 F16 values for each of 8 groups of a row, twice */
        CHECK(strcmp(e[0].op, "matmul_nested") == 0 && e[0].calls == 2);
        CHECK(e[0].bytes == 2 * (640 * 256 * 3 / 8 + 640 * 8 * 4 * 2));
        CHECK(e[0].n_rows == 640 && e[0].n_cols == 256 && e[0].seconds > 0);
        CHECK(strcmp(e[1].op, "add_parts") == 0 && e[1].calls == 1 && e[1].bytes == 0);
    }
    CHECK(profile_entries(&be, 2, &n) != NULL && n == 0);
    weights_free(&w);
    backend_close(&be);
}

/* Rows that a slot has stay when it is made shorter and longer; others' are not touched. */
static void test_fill(void)
{
    struct backend be;
    struct model_config c;
    struct model_shard shard;
    struct kvcache kv;
    enum { ROWS = 6, DIM = 64 };
    CHECK_OK(backend_open(&be, "cpu_ref", &(struct backend_options){0}));
    CHECK_OK(shape_get(&c, "tiny"));
    CHECK_OK(shard_model(&shard, &c, 32, &(struct shard_options){.size = 1}, 0));
    CHECK_OK(kvcache_create(&kv, &be, &c, &shard, 2, ROWS - 1, 1, DT_F32));
    CHECK_OK(kvcache_fill(&kv, 1, 3, 9));
    CHECK(kv.n_filled[0] == 0 && kv.n_filled[1] == 3);
    const float *v = kv.layers[1].v.data; /* (2 slots, 2 heads, ROWS, DIM) */
    const float *mine = v + (size_t)3 * ROWS * DIM;
    int bad = 0;
    for (size_t i = 0; i < (size_t)4 * ROWS * DIM; i++) {
        size_t slot = i / (2 * ROWS * DIM), row = i / DIM % ROWS;
        bool filled = slot == 1 && row < 3;
        bad += filled ? !(v[i] != 0 && fabsf(v[i]) <= 1) : v[i] != 0;
    }
    CHECK(bad == 0);
    float first = mine[0], last = mine[3 * DIM - 1];
    CHECK_OK(kvcache_fill(&kv, 1, 1, 8));
    CHECK(kv.n_filled[1] == 1);
    CHECK_OK(kvcache_fill(&kv, 1, ROWS - 1, 8));
    CHECK(mine[0] == first && mine[3 * DIM - 1] != last && mine[(ROWS - 1) * DIM - 1] != 0);
    CHECK_STATUS(kvcache_fill(&kv, 0, ROWS, 1), ST_SHAPE, "expected 0 to 5");
    kvcache_free(&kv);
    backend_close(&be);
}

int main(void)
{
    test_statistics();
    test_shapes();
    check_weights(LEVEL_TIED, 96, 256, 64);
    check_weights(LEVEL_FREE, 96, 250, 32);
    test_model();
    test_fill();
    return check_report();
}
