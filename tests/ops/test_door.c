/* The backend door refuses what its header names, with what was found and what was expected, and
 * the registry refuses a table with a hole. Host memory throughout: cpu and cpu_ref.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include <sys/wait.h>
#include <unistd.h>

#include "core/mem.h"
#include "kernels/kernels.h"
#include "tests/ops/rig.h"

static struct backend be;
static float f[4096], g[4096], h[4096];
static int32_t ids[64];
static uint8_t bytes[64];
static struct nested_matrix w; /* (8, 64), group 32, precisions 2, 3, 4; 3 planes resident */
static struct rig_matrix source;

static void test_registry(void)
{
    const struct backend_options none = {0}, minus = {.n_threads = -2};
    struct backend other = {.impl = &other};
    CHECK_STATUS(backend_open(&other, "gpu", &none), ST_USER, "cpu_ref, cpu, cuda");
    CHECK(!other.ops && !other.impl);
    CHECK_STATUS(backend_open(&other, "cuda", &none), ST_UNSUPPORTED, "backend.name = \"cpu\"");
    CHECK(!other.ops);
    CHECK_STATUS(backend_open(&other, "cpu", &minus), ST_USER, "-2 CPU threads");
    backend_close(&other); /* closed, zeroed: fine */
    CHECK(strcmp(backend_registered(0)->name, "cpu_ref") == 0);
    CHECK(strcmp(backend_registered(2)->name, "cuda") == 0);
    CHECK(!backend_registered(4) && !backend_registered(-1));
}

static void abort_quietly(void)
{
    _exit(42);
}

/* Registers a table in a child; true when that broke an invariant. */
static bool is_refused(const struct backend_ops *ops)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) {
            _exit(1);
        }
        status_set_abort(abort_quietly);
        backend_register(ops);
        _exit(0);
    }
    int how = 0;
    return waitpid(child, &how, 0) == child && WIFEXITED(how) && WEXITSTATUS(how) == 42;
}

static void test_registry_invariants(void)
{
    struct backend_ops ops = cpu_ops;
    CHECK(is_refused(&ops)); /* the name is taken */
    ops.name = "fresh";
    CHECK(!is_refused(&ops));
    for (size_t at = 0; at < sizeof ops; at += sizeof(void *)) {
        struct backend_ops hole = ops;
        memset((char *)&hole + at, 0, sizeof(void *));
        CHECK(is_refused(&hole));
    }
}

static void test_memory(void)
{
    float *block = NULL, back[3] = {7, 7, 7};
    CHECK_OK(backend_alloc(&be, (void **)&block, 12));
    CHECK_OK(backend_download(&be, back, block, 12));
    CHECK(back[0] == 0 && back[1] == 0 && back[2] == 0);
    f[0] = 3;
    CHECK_OK(backend_upload(&be, block, f, 4));
    CHECK_OK(backend_zero(&be, block + 1, 8));
    CHECK_OK(backend_download(&be, back, block, 12));
    CHECK_OK(backend_sync(&be));
    CHECK(back[0] == 3 && back[1] == 0);
    CHECK_OK(backend_upload(&be, NULL, NULL, 0));
    CHECK_STATUS(backend_upload(&be, NULL, f, 4), ST_SHAPE, "destination of 4 bytes is NULL");
    CHECK_STATUS(backend_download(&be, f, NULL, 4), ST_SHAPE, "source of 4 bytes is NULL");
    CHECK_STATUS(backend_zero(&be, NULL, 4), ST_SHAPE, "NULL");
    backend_release(&be, block);
    backend_release(&be, NULL);
}

static void test_planes_load(void)
{
    const struct matrix_range whole = rig_whole(&source.src);
    struct nested_matrix m = {0};
    struct nested_source bad;
    struct matrix_range r;
#define REFUSE_SOURCE(change, part)                                                  \
    do {                                                                             \
        bad = source.src;                                                            \
        bad.change;                                                                  \
        CHECK_STATUS(backend_planes_load(&be, &m, &bad, &whole, 2), ST_SHAPE, part); \
        CHECK(m.n_resident == 0 && !m.planes);                                       \
    } while (0)
    REFUSE_SOURCE(n_rows = 0, "expected at least (1, 1)");
    REFUSE_SOURCE(n_cols = 65, "padded to 64");
    REFUSE_SOURCE(group_cols = 0, "groups of 0 columns");
    REFUSE_SOURCE(group_cols = 16, "multiple of 32");
    REFUSE_SOURCE(n_cols_padded = 80, "80 padded columns, expected a multiple of the group of 32");
    REFUSE_SOURCE(n_planes = 0, "0 planes");
    REFUSE_SOURCE(n_planes = 9, "9 planes");
    REFUSE_SOURCE(planes = NULL, "no plane data");
    REFUSE_SOURCE(scale[2] = NULL, "levels of 2 bits, kind tied");
    REFUSE_SOURCE(alpha[3] = NULL, "levels of 3 bits, kind free");
    REFUSE_SOURCE(offset[3] = NULL, "levels of 3 bits, kind free");
    REFUSE_SOURCE(lut[4] = NULL, "levels of 4 bits, kind lut");
    REFUSE_SOURCE(kind[5] = LEVEL_LUT, "levels of 5 bits");
    REFUSE_SOURCE(kind[2] = LEVEL_TAIL, "kind tail");
    REFUSE_SOURCE(kind[2] = (enum level_kind)99, "levels of 2 bits");
    REFUSE_SOURCE(n_planes = 3, "levels of 4 bits");
#define REFUSE_RANGE(change, part)                                                      \
    do {                                                                                \
        r = whole;                                                                      \
        r.change;                                                                       \
        CHECK_STATUS(backend_planes_load(&be, &m, &source.src, &r, 2), ST_SHAPE, part); \
    } while (0)
    REFUSE_RANGE(row_begin = -1, "rows -1..8");
    REFUSE_RANGE(row_end = 9, "expected a part of (8, 64)");
    REFUSE_RANGE(row_begin = 8, "not empty");
    REFUSE_RANGE(col_end = 65, "columns 0..65");
    REFUSE_RANGE(col_end = 0, "columns 0..0");
    REFUSE_RANGE(col_begin = 16, "multiples of the group of 32");
    REFUSE_RANGE(col_end = 48, "multiples of the group of 32");
    CHECK_STATUS(backend_planes_load(&be, &m, &source.src, &whole, 5), ST_SHAPE, "expected 1..4");
    CHECK_STATUS(backend_planes_load(&be, &m, &source.src, &whole, 0), ST_SHAPE, "expected 1..4");
    r = whole;
    r.row_end = 4;
    CHECK_STATUS(backend_planes_load(&be, &w, &source.src, &r, 4), ST_SHAPE, "the matrix holds");
    CHECK(w.n_resident == 3);
}

static void test_matmul_nested(void)
{
    const int32_t cut[] = {0, 32, 64}, odd_cut[] = {0, 20, 64}, back_cut[] = {0, 0, 64};
    const int32_t short_cut[] = {0, 32, 60};
    struct tensor x = tensor_2d(f, DT_F32, 2, 64), y = tensor_2d(g, DT_F32, 2, 8);
    struct tensor y2 = tensor_3d(g, DT_F32, 2, 2, 8), bias = tensor_1d(h, DT_F32, 8);
    struct tensor bits = tensor_1d(bytes, DT_U8, 2), bad;
    const struct how good = {.n_segments = 1, .bits_used = 1u << 2 | 1u << 3};
    struct how how = good;
    bytes[0] = 2;
    bytes[1] = 3;
#define NESTED(y, x, bits, bias) backend_matmul_nested(&be, y, &w, bits, x, bias, &how)
    CHECK_OK(NESTED(&y, &x, &bits, &bias));
    bad = tensor_2d(f, DT_F32, 2, 60);
    CHECK_STATUS(NESTED(&y, &bad, &bits, NULL), ST_SHAPE, "x is F32 (2, 60), expected F32 (n, 64)");
    bad = tensor_2d(f, DT_F16, 2, 64);
    CHECK_STATUS(NESTED(&y, &bad, &bits, NULL), ST_SHAPE, "x is F16 (2, 64)");
    bad = tensor_2d(f, DT_F32, 0, 64);
    CHECK_STATUS(NESTED(&y, &bad, &bits, NULL), ST_SHAPE, "x is F32 (0, 64)");
    bad = tensor_2d(NULL, DT_F32, 2, 64);
    CHECK_STATUS(NESTED(&y, &bad, &bits, NULL), ST_SHAPE, "x has no data");
    bad = tensor_2d(g, DT_F32, 3, 8);
    CHECK_STATUS(NESTED(&bad, &x, &bits, NULL), ST_SHAPE, "y is F32 (3, 8), expected F32 (2, 8)");
    bad = tensor_2d(f, DT_F32, 2, 8);
    CHECK_STATUS(NESTED(&bad, &x, &bits, NULL), ST_SHAPE, "the same memory");
    bad = tensor_1d(bytes, DT_U8, 3);
    CHECK_STATUS(NESTED(&y, &x, &bad, NULL), ST_SHAPE, "bits is U8 (3), expected U8 (2)");
    bad = tensor_1d(bytes, DT_I32, 2);
    CHECK_STATUS(NESTED(&y, &x, &bad, NULL), ST_SHAPE, "bits is I32 (2)");
    bad = tensor_1d(h, DT_F32, 7);
    CHECK_STATUS(NESTED(&y, &x, &bits, &bad), ST_SHAPE, "bias is F32 (7), expected F32 (8)");

    how.product = (enum product)3;
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_SHAPE, "product 3");
    how = good;
    how.n_segments = 0;
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_SHAPE, "0 parts");
    how.n_segments = 2;
    CHECK_STATUS(NESTED(&y2, &x, &bits, NULL), ST_SHAPE, "without cuts");
    how.cut = odd_cut;
    CHECK_STATUS(NESTED(&y2, &x, &bits, NULL), ST_SHAPE, "cut 1 is 20, expected a multiple");
    how.cut = back_cut;
    CHECK_STATUS(NESTED(&y2, &x, &bits, NULL), ST_SHAPE, "ascending");
    how.cut = short_cut;
    CHECK_STATUS(NESTED(&y2, &x, &bits, NULL), ST_SHAPE, "cuts run from 0 to 60, expected 0 to 64");
    how.cut = cut;
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_SHAPE, "y is F32 (2, 8), expected F32 (2, 2, 8)");
    CHECK_STATUS(NESTED(&y2, &x, &bits, &bias), ST_SHAPE, "bias with 2 segments");
    CHECK_OK(NESTED(&y2, &x, &bits, NULL));
    how.add_up = true;
    CHECK_STATUS(NESTED(&y2, &x, &bits, NULL), ST_SHAPE, "expected F32 (1, 2, 8)");
    CHECK_STATUS(NESTED(&y, &x, &bits, &bias), ST_SHAPE, "bias with 2 segments");
    CHECK_OK(NESTED(&y, &x, &bits, NULL));

    how = good;
    how.bits_used = 0;
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_SHAPE, "bits_used is 0x0");
    how.bits_used = 1;
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_SHAPE, "bits_used is 0x1");
    how.bits_used = 1u << 9;
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_SHAPE, "bits_used is 0x200");
    how.bits_used = 1u << 3 | 1u << 4; /* the source holds 4, but its plane is not resident */
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_UNSUPPORTED,
                 "a token asks for 4 bits, expected a precision that this (8, 64) matrix holds: "
                 "2, 3; 3 of its 4 planes are resident");
    how.bits_used = 1u << 1; /* its plane is there, but no levels */
    CHECK_STATUS(NESTED(&y, &x, &bits, NULL), ST_UNSUPPORTED, "asks for 1 bits");
    struct nested_matrix empty = {0};
    CHECK_STATUS(backend_matmul_nested(&be, &y, &empty, &bits, &x, NULL, &good), ST_UNSUPPORTED,
                 "no resident planes");
}

static void test_matmul_dense(void)
{
    const struct how how = {.n_segments = 1};
    struct tensor m = tensor_2d(h, DT_F16, 8, 64), x = tensor_2d(f, DT_F32, 2, 64);
    struct tensor y = tensor_2d(g, DT_F32, 2, 8), bad;
    CHECK_OK(backend_matmul_dense(&be, &y, &m, &x, NULL, &how));
    bad = tensor_2d(h, DT_U8, 8, 64);
    CHECK_STATUS(backend_matmul_dense(&be, &y, &bad, &x, NULL, &how), ST_SHAPE,
                 "w is U8 (8, 64), expected F32/F16/BF16 (n, n)");
    bad = tensor_2d(h, DT_F16, 8, 63);
    CHECK_STATUS(backend_matmul_dense(&be, &y, &bad, &x, NULL, &how), ST_SHAPE,
                 "x is F32 (2, 64), expected F32 (n, 63)");
    bad = tensor_1d(h, DT_F16, 8);
    CHECK_STATUS(backend_matmul_dense(&be, &y, &bad, &x, NULL, &how), ST_SHAPE, "w is F16 (8)");
    bad = tensor_2d(g, DT_F32, 2, 9);
    CHECK_STATUS(backend_matmul_dense(&be, &bad, &m, &x, NULL, &how), ST_SHAPE, "y is F32 (2, 9)");
}

static void test_small(void)
{
    struct tensor x = tensor_2d(f, DT_F32, 2, 8), y = tensor_2d(g, DT_F32, 2, 8), bad;
    struct tensor gain = tensor_1d(h, DT_F32, 8), parts = tensor_3d(g, DT_F32, 3, 2, 8);
    bad = tensor_3d(g, DT_F32, 3, 2, 7);
    CHECK_OK(backend_add_parts(&be, &x, &parts, &gain));
    CHECK_OK(backend_add_parts(&be, &x, &y, NULL));
    CHECK_STATUS(backend_add_parts(&be, &x, &bad, NULL), ST_SHAPE, "parts is F32 (3, 2, 7)");
    CHECK_STATUS(backend_add_parts(&be, &x, &x, NULL), ST_SHAPE, "the same memory");
    bad = tensor_1d(h, DT_F32, 9);
    CHECK_STATUS(backend_add_parts(&be, &x, &parts, &bad), ST_SHAPE, "bias is F32 (9)");

    struct tensor table = tensor_2d(h, DT_BF16, 5, 8), id = tensor_1d(ids, DT_I32, 2);
    ids[0] = 4;
    ids[1] = 0;
    CHECK_OK(backend_embed(&be, &x, &table, &id));
    ids[1] = 5;
    CHECK_STATUS(backend_embed(&be, &x, &table, &id), ST_SHAPE, "id 5 of token 1, expected 0..4");
    ids[1] = -1;
    CHECK_STATUS(backend_embed(&be, &x, &table, &id), ST_SHAPE, "id -1");
    bad = tensor_2d(h, DT_BF16, 5, 9);
    CHECK_STATUS(backend_embed(&be, &x, &bad, &id), ST_SHAPE, "the table is BF16 (5, 9)");
    bad = tensor_1d(ids, DT_I64, 2);
    CHECK_STATUS(backend_embed(&be, &x, &table, &bad), ST_SHAPE, "ids is I64 (2)");

    CHECK_OK(backend_rmsnorm(&be, &y, &x, &gain, 1e-5f));
    CHECK_STATUS(backend_rmsnorm(&be, &y, &x, &gain, -1), ST_SHAPE, "eps is -1");
    CHECK_STATUS(backend_rmsnorm(&be, &y, &x, &gain, NAN), ST_SHAPE, "eps is");
    bad = tensor_1d(h, DT_F32, 7);
    CHECK_STATUS(backend_rmsnorm(&be, &y, &x, &bad, 0), ST_SHAPE, "gain is F32 (7)");
    bad = tensor_2d(g, DT_F32, 2, 7);
    CHECK_STATUS(backend_rmsnorm(&be, &bad, &x, &gain, 0), ST_SHAPE, "y is F32 (2, 7)");

    struct tensor bias = tensor_1d(h + 8, DT_F32, 8), none = tensor_1d(NULL, DT_F32, 8);
    CHECK_OK(backend_layernorm(&be, &y, &x, &gain, &bias, 0));
    CHECK_OK(backend_layernorm(&be, &y, &x, &gain, NULL, 1e-5f));
    CHECK_STATUS(backend_layernorm(&be, &bad, &x, &gain, NULL, 0), ST_SHAPE, "y is F32 (2, 7)");
    CHECK_STATUS(backend_layernorm(&be, &y, &x, &gain, &none, 0), ST_SHAPE, "bias has no data");
    CHECK_STATUS(backend_layernorm(&be, &y, &x, &gain, &bias, -1), ST_SHAPE, "eps is -1");
    CHECK_STATUS(backend_layernorm(&be, &y, &x, &gain, &bias, NAN), ST_SHAPE, "eps is");
    bias.dims[0] = 7;
    CHECK_STATUS(backend_layernorm(&be, &y, &x, &gain, &bias, 0), ST_SHAPE, "bias is F32 (7)");
    CHECK_STATUS(backend_layernorm(&be, &y, &x, &bias, NULL, 0), ST_SHAPE, "gain is F32 (7)");

    struct tensor sums = tensor_3d(g, DT_F32, 2, 2, 2), one = tensor_3d(g, DT_F32, 2, 1, 2);
    static const int32_t part[] = {0, 3, 8}, short_part[] = {0, 3, 7};
    CHECK_OK(backend_moments(&be, &sums, &x, part, 2));
    CHECK_OK(backend_moments(&be, &one, &x, NULL, 1));
    CHECK_STATUS(backend_moments(&be, &one, &x, part, 2), ST_SHAPE, "out is F32 (2, 1, 2)");
    CHECK_STATUS(backend_moments(&be, &sums, &x, short_part, 2), ST_SHAPE, "0 to 7");
    CHECK_STATUS(backend_moments(&be, &sums, &x, NULL, 2), ST_SHAPE, "without cuts");
    CHECK_STATUS(backend_moments(&be, &sums, &sums, part, 2), ST_SHAPE, "x is F32 (2, 2, 2)");

    CHECK_OK(backend_activate(&be, &y, &x, ACT_GELU_TANH));
    CHECK_OK(backend_activate(&be, &y, &y, ACT_GELU_ERF));
    CHECK_STATUS(backend_activate(&be, &bad, &x, ACT_GELU_ERF), ST_SHAPE, "y is F32 (2, 7)");
    CHECK_STATUS(backend_activate(&be, &y, &x, ACT_SILU), ST_UNSUPPORTED, "activation 0");
    CHECK_STATUS(backend_glu(&be, &x, &x, &y, ACT_GELU_TANH), ST_UNSUPPORTED, "activation 1");
    CHECK_OK(backend_glu(&be, &x, &x, &y, ACT_SILU));
    CHECK_STATUS(backend_glu(&be, &x, &x, &bad, ACT_SILU), ST_SHAPE, "up is F32 (2, 7)");
    CHECK_STATUS(backend_glu(&be, &bad, &x, &y, ACT_SILU), ST_SHAPE, "y is F32 (2, 7)");
    CHECK_STATUS(backend_glu(&be, &x, &x, &y, (enum activation)9), ST_UNSUPPORTED, "activation 9");
}

static void test_places(void)
{
    static int32_t slot[2] = {0, 1}, pos[2] = {3, 4}, row[2] = {3, 5};
    struct token_place good = {tensor_1d(slot, DT_I32, 2), tensor_1d(pos, DT_I32, 2),
                               tensor_1d(row, DT_I32, 2), 4};
    struct token_place place = good;
    struct tensor q = tensor_3d(f, DT_F32, 2, 4, 8), k = tensor_3d(g, DT_F32, 2, 2, 8), bad;
    struct tensor y = tensor_3d(h, DT_F32, 2, 4, 8);
    struct rope_table table = {tensor_2d(h, DT_F32, 5, 3), tensor_2d(h + 15, DT_F32, 5, 3), 6};
    struct rope_table bad_table = table;
    CHECK_OK(backend_rope(&be, &q, &k, &place, &table));
    bad = tensor_3d(g, DT_F32, 2, 2, 7);
    CHECK_STATUS(backend_rope(&be, &q, &bad, &place, &table), ST_SHAPE, "k is F32 (2, 2, 7)");
    static const int32_t wrong[] = {0, 1, 5, 10};
    for (int i = 0; i < 4; i++) {
        bad_table.rot_dim = wrong[i];
        CHECK_STATUS(backend_rope(&be, &q, &k, &place, &bad_table), ST_SHAPE,
                     "even number in 2..8");
    }
    bad_table.rot_dim = 8;
    CHECK_STATUS(backend_rope(&be, &q, &k, &place, &bad_table), ST_SHAPE,
                 "cos is F32 (5, 3), expected F32 (n, 4)");
    bad_table = table;
    bad_table.sin.dims[0] = 4;
    CHECK_STATUS(backend_rope(&be, &q, &k, &place, &bad_table), ST_SHAPE, "sin is F32 (4, 3)");
    place.max_pos = 5;
    CHECK_STATUS(backend_rope(&be, &q, &k, &place, &table), ST_SHAPE,
                 "largest position is 5, expected 0..4");
    place = good;
    place.slot.dims[0] = 3;
    CHECK_STATUS(backend_rope(&be, &q, &k, &place, &table), ST_SHAPE, "slot is I32 (3)");
    place = good;
    place.pos.dtype = DT_I64;
    CHECK_STATUS(backend_rope(&be, &q, &k, &place, &table), ST_SHAPE, "pos is I64 (2)");
    place = good;
    place.kv_row.n_dims = 2;
    CHECK_STATUS(backend_rope(&be, &q, &k, &place, &table), ST_SHAPE, "kv_row is I32 (2, ");
    place = good;
    place.max_pos = 3; /* a token is beyond what the host says */
    CHECK_STATUS(backend_rope(&be, &q, &k, &place, &table), ST_SHAPE, "token 1 is at position 4");

    static float cache_k[2 * 2 * 6 * 8], cache_v[2 * 2 * 6 * 8];
    struct kv_layer kv = {tensor_4d(cache_k, DT_F32, 2, 2, 6, 8),
                          tensor_4d(cache_v, DT_F16, 2, 2, 6, 8), 2, 0};
    struct kv_layer bad_kv = kv;
    CHECK_OK(backend_kv_append(&be, &kv, &k, &k, &good));
    CHECK_OK(backend_attention(&be, &y, &q, &kv, &good, 1));
    CHECK_STATUS(backend_kv_append(&be, &kv, &k, &bad, &good), ST_SHAPE, "v is F32 (2, 2, 7)");
    bad_kv.k.dtype = DT_BF16;
    CHECK_STATUS(backend_kv_append(&be, &bad_kv, &k, &k, &good), ST_SHAPE,
                 "the K cache is BF16 (2, 2, 6, 8), expected F32/F16 (n, 2, n, 8)");
    bad_kv = kv;
    bad_kv.v.dims[2] = 5;
    CHECK_STATUS(backend_attention(&be, &y, &q, &bad_kv, &good, 1), ST_SHAPE,
                 "the V cache is F16 (2, 2, 5, 8)");
    bad_kv = kv;
    bad_kv.k.dims[1] = bad_kv.v.dims[1] = 3;
    CHECK_STATUS(backend_attention(&be, &y, &q, &bad_kv, &good, 1), ST_SHAPE,
                 "4 query heads, the first at place 0 of 2 that share a KV head, do not go with 3");
    /* heads per KV head and the place of the first of four: which go with two KV heads */
    static const int32_t places[][3] = {
        {2, 0, 1},  {3, 0, 1}, {3, 1, 1}, {3, 2, 1}, {4, 1, 1},  {2, 1, 0},        {4, 0, 0},
        {5, 0, 0},  {5, 1, 0}, {5, 2, 1}, {1, 0, 0}, {0, 0, 0},  {3, -1, 0},       {3, 3, 0},
        {-2, 0, 0}, {5, 4, 1}, {5, 5, 0}, {1, 1, 0}, {4, -1, 0}, {INT32_MAX, 0, 0}};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        bad_kv = kv;
        bad_kv.heads_per_kv = places[i][0];
        bad_kv.head_in_group = places[i][1];
        if (places[i][2]) {
            CHECK_OK(backend_attention(&be, &y, &q, &bad_kv, &good, 1));
        } else {
            CHECK_STATUS(backend_attention(&be, &y, &q, &bad_kv, &good, 1), ST_SHAPE,
                         "4 query heads, the first at place");
        }
    }
    CHECK_STATUS(backend_attention(&be, &q, &q, &kv, &good, 1), ST_SHAPE, "the same memory");
    CHECK_STATUS(backend_attention(&be, &k, &q, &kv, &good, 1), ST_SHAPE, "y is F32 (2, 2, 8)");
    place = good;
    place.max_pos = 6;
    CHECK_STATUS(backend_attention(&be, &y, &q, &kv, &place, 1), ST_SHAPE, "position is 6");
    CHECK_STATUS(backend_kv_append(&be, &kv, &k, &k, &place), ST_SHAPE, "position is 6");
    place.max_pos = -1;
    CHECK_STATUS(backend_kv_append(&be, &kv, &k, &k, &place), ST_SHAPE, "position is -1");
    slot[1] = 2;
    CHECK_STATUS(backend_kv_append(&be, &kv, &k, &k, &good), ST_SHAPE, "slot 2, row 5");
    slot[1] = 1;
    row[0] = 6;
    CHECK_STATUS(backend_attention(&be, &y, &q, &kv, &good, 1), ST_SHAPE, "slot 0, row 6");
    row[0] = 3;
}

static void test_logit_stats(void)
{
    struct logit_stats out[6];
    struct logit_want want[2] = {{.target = -1}, {.target = -1}};
    const int32_t cut[] = {0, 3, 10}, bad_cut[] = {0, 3, 9};
    struct tensor l = tensor_2d(f, DT_F32, 2, 10), bad = tensor_2d(f, DT_F16, 2, 10);
    CHECK_OK(backend_logit_stats(&be, out, &l, 0, cut, 2, want));
    CHECK_STATUS(backend_logit_stats(&be, out, &bad, 0, cut, 2, want), ST_SHAPE, "logits is F16");
    CHECK_STATUS(backend_logit_stats(&be, out, &l, -1, cut, 2, want), ST_SHAPE, "first id is -1");
    CHECK_STATUS(backend_logit_stats(&be, out, &l, INT32_MAX - 5, cut, 2, want), ST_SHAPE,
                 "first id");
    CHECK_STATUS(backend_logit_stats(&be, out, &l, 0, NULL, 2, want), ST_SHAPE, "without cuts");
    CHECK_STATUS(backend_logit_stats(&be, out, &l, 0, bad_cut, 2, want), ST_SHAPE, "0 to 9");
    CHECK_STATUS(backend_logit_stats(&be, out, &l, 0, NULL, 1, NULL), ST_SHAPE, "NULL");
    CHECK_STATUS(backend_logit_stats(&be, NULL, &l, 0, NULL, 1, want), ST_SHAPE, "NULL");
    want[1].temperature = -0.5f;
    CHECK_STATUS(backend_logit_stats(&be, out, &l, 0, cut, 2, want), ST_SHAPE,
                 "token 1 has temperature -0.5");
    want[1].temperature = NAN;
    CHECK_STATUS(backend_logit_stats(&be, out, &l, 0, cut, 2, want), ST_SHAPE, "temperature");
    want[1].temperature = 0;
    want[1].restricted = true;
    CHECK_STATUS(backend_logit_stats(&be, out, &l, 0, cut, 2, want), ST_SHAPE,
                 "token 1 is restricted at temperature 0");
}

static void test_top_k(void)
{
    struct logit_candidate out[8];
    struct tensor l = tensor_2d(f, DT_F32, 2, 10), bad = tensor_2d(f, DT_F16, 2, 10);
    CHECK_OK(backend_top_k(&be, out, &l, 0, 4));
    CHECK_STATUS(backend_top_k(&be, out, &bad, 0, 4), ST_SHAPE, "logits is F16");
    CHECK_STATUS(backend_top_k(&be, out, &l, -1, 4), ST_SHAPE, "first id is -1");
    CHECK_STATUS(backend_top_k(&be, out, &l, INT32_MAX - 5, 4), ST_SHAPE, "first id");
    CHECK_STATUS(backend_top_k(&be, out, &l, 0, 0), ST_SHAPE, "0 candidates");
    CHECK_STATUS(backend_top_k(&be, NULL, &l, 0, 4), ST_SHAPE, "NULL");
}

int main(void)
{
    static const enum level_kind kind[BITS_ALL] = {
        [2] = LEVEL_TIED, [3] = LEVEL_FREE, [4] = LEVEL_LUT};
    struct rig_rng rng = {RIG_SEED};
    rig_register();
    test_registry();
    test_registry_invariants();
    rig_matrix_make(&source, &rng, 8, 64, 32, 4, kind);
    const struct matrix_range whole = rig_whole(&source.src);
    for (int i = 0; i < 2; i++) {
        be = rig_open(i ? "cpu" : "cpu_ref", 2);
        CHECK_OK(backend_planes_load(&be, &w, &source.src, &whole, 3));
        test_memory();
        test_planes_load();
        test_matmul_nested();
        test_matmul_dense();
        test_small();
        test_places();
        test_logit_stats();
        test_top_k();
        backend_planes_drop(&be, &w, 0);
        backend_close(&be);
    }
    rig_matrix_free(&source);
    return check_report();
}
