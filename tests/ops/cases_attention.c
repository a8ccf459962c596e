/* kv_append and attention: rows and slots in any order, shared heads, a rank's part of the heads,
 * probes in a spare row.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/check.h"

#include "core/mem.h"
#include "tests/ops/cases.h"

struct token_place put_place(struct backend *be, const int32_t *slot, const int32_t *pos,
                             const int32_t *kv_row, int32_t n_tok)
{
    struct token_place place = {
        .slot = rig_put(be, tensor_1d((void *)slot, DT_I32, n_tok)),
        .pos = rig_put(be, tensor_1d((void *)pos, DT_I32, n_tok)),
        .kv_row = rig_put(be, tensor_1d((void *)kv_row, DT_I32, n_tok)),
    };
    for (int32_t t = 0; t < n_tok; t++) {
        place.max_pos = pos[t] > place.max_pos ? pos[t] : place.max_pos;
    }
    return place;
}

void drop_place(struct backend *be, struct token_place *place)
{
    rig_drop(be, &place->slot);
    rig_drop(be, &place->pos);
    rig_drop(be, &place->kv_row);
}

enum { SLOTS = 3, KV_HEADS = 2, ROWS = 41, SPARE_ROW = 40 };

struct cache {
    struct kv_layer kv;
};

static struct cache cache_of_rows(struct backend *be, int32_t n_rows, enum dtype k_type,
                                  enum dtype v_type, int32_t head_dim, int32_t n_kv,
                                  int32_t heads_per_kv)
{
    return (struct cache){{
        .k = rig_room(be, tensor_4d(NULL, k_type, SLOTS, n_kv, n_rows, head_dim)),
        .v = rig_room(be, tensor_4d(NULL, v_type, SLOTS, n_kv, n_rows, head_dim)),
        .heads_per_kv = heads_per_kv,
    }};
}

static struct cache cache_make(struct backend *be, enum dtype k_type, enum dtype v_type,
                               int32_t head_dim, int32_t n_kv, int32_t heads_per_kv)
{
    return cache_of_rows(be, ROWS, k_type, v_type, head_dim, n_kv, heads_per_kv);
}

static void cache_free(struct backend *be, struct cache *c)
{
    rig_drop(be, &c->kv.k);
    rig_drop(be, &c->kv.v);
}

static void append(struct backend *be, struct cache *c, const float *k, const float *v,
                   const int32_t *slot, const int32_t *pos, const int32_t *row, int32_t n_tok)
{
    int32_t n_kv = c->kv.k.dims[1], head_dim = c->kv.k.dims[3];
    struct token_place place = put_place(be, slot, pos, row, n_tok);
    struct tensor k_t = rig_put(be, tensor_3d((void *)k, DT_F32, n_tok, n_kv, head_dim));
    struct tensor v_t = rig_put(be, tensor_3d((void *)v, DT_F32, n_tok, n_kv, head_dim));
    CHECK_OK(backend_kv_append(be, &c->kv, &k_t, &v_t, &place));
    rig_drop(be, &k_t);
    rig_drop(be, &v_t);
    drop_place(be, &place);
}

static void attention(struct backend *be, float *y, const float *q, const struct cache *c,
                      const int32_t *slot, const int32_t *pos, const int32_t *row, int32_t n_tok,
                      int32_t n_heads)
{
    int32_t head_dim = c->kv.k.dims[3];
    struct token_place place = put_place(be, slot, pos, row, n_tok);
    struct tensor q_t = rig_put(be, tensor_3d((void *)q, DT_F32, n_tok, n_heads, head_dim));
    struct tensor y_t = rig_room(be, tensor_3d(NULL, DT_F32, n_tok, n_heads, head_dim));
    CHECK_OK(backend_attention(be, &y_t, &q_t, &c->kv, &place, 1 / sqrtf((float)head_dim)));
    rig_get(be, y, &y_t);
    rig_drop(be, &q_t);
    rig_drop(be, &y_t);
    drop_place(be, &place);
}

static void test_attention(enum dtype k_type, enum dtype v_type, int32_t head_dim, int32_t n_heads)
{
    /* every row of every slot written, in an order of its own; then tokens of all slots */
    enum { ALL = SLOTS * ROWS, N_TOK = 7 };
    static const int32_t slot[N_TOK] = {2, 0, 1, 1, 0, 2, 2};
    static const int32_t pos[N_TOK] = {39, 0, 7, 8, 25, 12, 12};
    static const int32_t row[N_TOK] = {39, 0, 7, 8, 25, 12, SPARE_ROW}; /* the last is a probe */
    int32_t all_slot[ALL], all_row[ALL];
    for (int i = 0; i < ALL; i++) {
        int at = i * 50 % ALL; /* 50 and 123 have no common divisor */
        all_slot[i] = at / ROWS;
        all_row[i] = at % ROWS;
    }
    size_t n_kv = (size_t)(ALL * KV_HEADS * head_dim), n_q = (size_t)(N_TOK * n_heads * head_dim);
    float *k = floats(n_kv), *v = floats(n_kv), *q = floats(n_q), *y[2], *alone = floats(n_q);
    size_t head_q = (size_t)(n_heads * head_dim);
    for (size_t i = 0; i < n_q; i++) {
        q[i] *= 4; /* scores far enough apart to matter */
    }
    memcpy(q + 6 * head_q, q + 5 * head_q,
           head_q * sizeof *q); /* the probe asks what token 5 asks */
    char *raw[2][2];
    for (int i = 0; i < 2; i++) {
        struct backend *be = i ? &dut : &ref;
        struct cache c = cache_make(be, k_type, v_type, head_dim, KV_HEADS, n_heads / KV_HEADS);
        append(be, &c, k, v, all_slot, all_row, all_row, ALL);
        raw[i][0] = rig_alloc(tensor_bytes(&c.kv.k), 1);
        raw[i][1] = rig_alloc(tensor_bytes(&c.kv.v), 1);
        rig_get(be, raw[i][0], &c.kv.k);
        rig_get(be, raw[i][1], &c.kv.v);
        y[i] = floats(n_q);
        attention(be, y[i], q, &c, slot, pos, row, N_TOK, n_heads);
        for (int t = 0; t < N_TOK; t++) {
            attention(be, alone, q + (size_t)t * head_q, &c, slot + t, pos + t, row + t, 1,
                      n_heads);
            CHECK(memcmp(alone, y[i] + (size_t)t * head_q, head_q * sizeof *alone) == 0);
        }
        /* its own row differs from token 5's, and so must its answer; with the same row it is
         * the same answer */
        CHECK(memcmp(y[i] + 5 * head_q, y[i] + 6 * head_q, head_q * sizeof *alone) != 0);
        if (i == 1) {
            float own[KV_HEADS * 128], own_v[KV_HEADS * 128];
            const int32_t two = 2, twelve = 12, spare = SPARE_ROW;
            for (int j = 0; j < ALL; j++) {
                if (all_slot[j] == 2 && all_row[j] == 12) {
                    size_t n = (size_t)(KV_HEADS * head_dim);
                    memcpy(own, k + (size_t)j * n, n * sizeof *k);
                    memcpy(own_v, v + (size_t)j * n, n * sizeof *v);
                }
            }
            append(be, &c, own, own_v, &two, &twelve, &spare, 1);
            attention(be, alone, q, &c, slot, pos, row, N_TOK, n_heads);
            CHECK(memcmp(alone, y[i], 6 * head_q * sizeof *alone) == 0);
            CHECK(memcmp(alone + 5 * head_q, alone + 6 * head_q, head_q * sizeof *alone) == 0);
        }
        cache_free(be, &c);
    }
    COMPARE(OP_ATTENTION, y[1], y[0], n_q);
    /* the caches hold what was written, at (slot, head, row): checked from the definition */
    for (int which = 0; which < 2; which++) {
        enum dtype type = which ? v_type : k_type;
        const float *from = which ? v : k;
        float *got = floats(n_kv), *expected = floats(n_kv);
        floats_from(got, raw[1][which], type, n_kv);
        for (int i = 0; i < ALL; i++) {
            for (int h = 0; h < KV_HEADS; h++) {
                size_t to = (size_t)((all_slot[i] * KV_HEADS + h) * ROWS + all_row[i]);
                for (int d = 0; d < head_dim; d++) {
                    float value = from[(i * KV_HEADS + h) * head_dim + d];
                    expected[to * (size_t)head_dim + (size_t)d] =
                        type == DT_F16 ? (float)rig_f16(f32_to_f16(value)) : value;
                }
            }
        }
        COMPARE(OP_KV, got, expected, n_kv);
        free(got);
        free(expected);
        free(raw[0][which]);
        free(raw[1][which]);
    }
    free(k);
    free(v);
    free(q);
    free(y[0]);
    free(y[1]);
    free(alone);
}

static void test_attention_by_hand(void)
{
    /* One head of two dimensions, scale 1/sqrt(2), slot 1. Token at pos 1 with its row 1:
     * scores q.k = sqrt(2) ln 3 and 0 -> weights 3/4 and 1/4. At pos 0 it sees only itself. */
    struct cache c = cache_make(&dut, DT_F32, DT_F32, 2, KV_HEADS, 1);
    float ln3 = 1.0986123f * 1.4142135f;
    const float k[] = {1, 0, 1, 0, 0, 1, 0, 1}, v[] = {4, 0, 8, 0, 0, 4, 0, 8};
    const float q[] = {ln3, 0, ln3, 0, ln3, 0, ln3, 0}, hand[] = {4, 0, 8, 0, 3, 1, 6, 2};
    const int32_t slot[] = {1, 1}, pos[] = {0, 1};
    float y[8];
    append(&dut, &c, k, v, slot, pos, pos, 2);
    attention(&dut, y, q, &c, slot, pos, pos, 2, KV_HEADS);
    COMPARE(OP_ATTENTION, y, hand, 8);
    cache_free(&dut, &c);
}

/* Copies heads [begin, end) of every token of from (N_TOK, n_heads, head_dim). */
static void take_heads(float *to, const float *from, int32_t n_tok, int32_t n_heads,
                       int32_t head_dim, int32_t begin, int32_t end)
{
    size_t n = (size_t)((end - begin) * head_dim);
    for (int32_t t = 0; t < n_tok; t++) {
        memcpy(to + (size_t)t * n, from + (t * n_heads + begin) * head_dim, n * sizeof *to);
    }
}

/* A rank with query heads [begin, end) of a model: it holds the KV heads that they use, and where
 * the range begins or ends inside a group it holds a part of what they would share. Every range
 * gives the bits of all heads together. */
static void test_head_ranges(int32_t n_kv, int32_t per_kv, int32_t head_dim, enum dtype type)
{
    enum { N_TOK = 5, N_ROWS = N_TOK + 1 };
    static const int32_t fill_slot[N_ROWS] = {1, 1, 1, 1, 0, 1},
                         fill_row[N_ROWS] = {0, 1, 2, 3, 0, 4};
    static const int32_t slot[N_TOK] = {1, 0, 1, 1, 1}, pos[N_TOK] = {0, 0, 4, 2, 4};
    int32_t n_heads = n_kv * per_kv;
    size_t n_q = (size_t)(N_TOK * n_heads * head_dim), n_k = (size_t)(N_ROWS * n_kv * head_dim);
    float *q = floats(n_q), *k = floats(n_k), *v = floats(n_k), *whole = floats(n_q);
    float *own_q = floats(n_q), *own_k = floats(n_k), *own_v = floats(n_k);
    float *got = floats(n_q), *expected = floats(n_q);
    for (int i = 0; i < 2; i++) {
        struct backend *be = i ? &dut : &ref;
        struct cache all = cache_make(be, type, type, head_dim, n_kv, per_kv);
        append(be, &all, k, v, fill_slot, fill_row, fill_row, N_ROWS);
        attention(be, i ? whole : expected, q, &all, slot, pos, pos, N_TOK, n_heads);
        cache_free(be, &all);
    }
    COMPARE(OP_ATTENTION, whole, expected, n_q);
    for (int32_t begin = 0; begin < n_heads; begin++) {
        for (int32_t end = begin + 1; end <= n_heads; end++) {
            int32_t kv_begin = begin / per_kv, kv_end = (end + per_kv - 1) / per_kv;
            struct cache own = cache_make(&dut, type, type, head_dim, kv_end - kv_begin, per_kv);
            own.kv.head_in_group = begin % per_kv;
            take_heads(own_k, k, N_ROWS, n_kv, head_dim, kv_begin, kv_end);
            take_heads(own_v, v, N_ROWS, n_kv, head_dim, kv_begin, kv_end);
            take_heads(own_q, q, N_TOK, n_heads, head_dim, begin, end);
            take_heads(expected, whole, N_TOK, n_heads, head_dim, begin, end);
            append(&dut, &own, own_k, own_v, fill_slot, fill_row, fill_row, N_ROWS);
            attention(&dut, got, own_q, &own, slot, pos, pos, N_TOK, end - begin);
            size_t n = (size_t)(N_TOK * (end - begin) * head_dim);
            if (!CHECK(memcmp(got, expected, n * sizeof *got) == 0)) {
                fprintf(stderr, "    heads %d..%d of %d, %d to a KV head\n", begin, end, n_heads,
                        per_kv);
            }
            cache_free(&dut, &own);
        }
    }
    free(q);
    free(k);
    free(v);
    free(whole);
    free(own_q);
    free(own_k);
    free(own_v);
    free(got);
    free(expected);
}

/* Contexts of several blocks of rows, however a backend forms them: the oracle's answer, the same
 * bits for a token alone as in company, for a probe as for the token at its place, and for any
 * number of threads, whether these share heads out or (the last tokens alone, few KV heads) blocks.
 */
static void test_long_contexts(enum dtype type, int32_t head_dim, int32_t n_kv, int32_t per_kv)
{
    enum { N_TOK = 9, LAST = 600, SPARE = LAST + 1, N_ROWS = LAST + 2, N_FILL = LAST + 1 };
    static const int32_t pos[N_TOK] = {0, 254, 255, 256, 511, 512, 512, 300, LAST};
    static const int32_t row[N_TOK] = {0, 254, 255, 256, 511, 512, SPARE, 300, LAST};
    static const int32_t slot[N_TOK] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, spare = SPARE;
    int32_t fill_slot[N_FILL], fill_row[N_FILL], n_heads = n_kv * per_kv;
    for (int32_t i = 0; i < N_FILL; i++) {
        fill_slot[i] = 1;
        fill_row[i] = i;
    }
    size_t row_q = (size_t)(n_heads * head_dim), row_k = (size_t)(n_kv * head_dim);
    float *q = floats(N_TOK * row_q), *k = floats(N_FILL * row_k), *v = floats(N_FILL * row_k);
    float *expected = floats(N_TOK * row_q), *got = floats(N_TOK * row_q), *alone = floats(row_q);
    for (size_t i = 0; i < N_TOK * row_q; i++) {
        q[i] *= 3;
    }
    memcpy(q + 6 * row_q, q + 5 * row_q, row_q * sizeof *q); /* the probe */
    for (int n_threads = 0; n_threads <= 3; n_threads++) {
        struct backend be = n_threads == 0 ? ref : rig_open(dut_name, n_threads);
        struct cache c = cache_of_rows(&be, N_ROWS, type, type, head_dim, n_kv, per_kv);
        append(&be, &c, k, v, fill_slot, fill_row, fill_row, N_FILL);
        append(&be, &c, k + 512 * row_k, v + 512 * row_k, slot, &pos[5], &spare, 1);
        float *own = n_threads == 0 ? expected : n_threads == 1 ? got : floats(N_TOK * row_q);
        attention(&be, own, q, &c, slot, pos, row, N_TOK, n_heads);
        if (n_threads > 1) {
            CHECK(memcmp(own, got, N_TOK * row_q * sizeof *got) == 0);
            free(own);
        }
        for (int t = 0; n_threads > 0 && t < N_TOK; t++) {
            size_t at = (size_t)t * row_q;
            attention(&be, alone, q + at, &c, slot, pos + t, row + t, 1, n_heads);
            if (!CHECK(memcmp(alone, got + at, row_q * sizeof *alone) == 0)) {
                fprintf(stderr, "    %d threads, head_dim %d, %d KV heads, token %d\n", n_threads,
                        head_dim, n_kv, t);
            }
        }
        cache_free(&be, &c);
        if (n_threads > 0) {
            backend_close(&be);
        }
    }
    CHECK(memcmp(got + 5 * row_q, got + 6 * row_q, row_q * sizeof *got) == 0);
    COMPARE(OP_ATTENTION, got, expected, N_TOK * row_q);
    free(q);
    free(k);
    free(v);
    free(expected);
    free(got);
    free(alone);
}

/* Scratch does not follow the position: every step of a long answer would allocate. */
static void test_no_allocation(void)
{
    struct backend be = rig_open(dut_name, 2); /* one that has seen nothing yet */
    struct cache c = cache_make(&be, DT_F32, DT_F16, 32, KV_HEADS, 2);
    const int32_t zero = 0;
    struct token_place place = put_place(&be, &zero, &zero, &zero, 1);
    struct tensor q = rig_room(&be, tensor_3d(NULL, DT_F32, 1, 4, 32));
    struct tensor y = rig_room(&be, tensor_3d(NULL, DT_F32, 1, 4, 32));
    struct tensor k = rig_room(&be, tensor_3d(NULL, DT_F32, 1, KV_HEADS, 32));
    uint64_t before = 0;
    for (int32_t pos = 0; pos < ROWS; pos++) {
        place.max_pos = pos;
        CHECK_OK(backend_upload(&be, place.pos.data, &pos, sizeof pos));
        CHECK_OK(backend_upload(&be, place.kv_row.data, &pos, sizeof pos));
        CHECK_OK(backend_kv_append(&be, &c.kv, &k, &k, &place));
        CHECK_OK(backend_attention(&be, &y, &q, &c.kv, &place, 1));
        if (pos == 0) {
            before = mem_alloc_count();
        }
    }
    CHECK(mem_alloc_count() == before);
    rig_drop(&be, &q);
    rig_drop(&be, &y);
    rig_drop(&be, &k);
    drop_place(&be, &place);
    cache_free(&be, &c);
    backend_close(&be);
}

int cases_attention(void)
{
    test_attention(DT_F32, DT_F32, 64, 2);
    test_attention(DT_F16, DT_F16, 32, 4);
    test_attention(DT_F16, DT_F32, 20, 8);
    test_attention(DT_F32, DT_F16, 20, 2);
    test_attention_by_hand();
    test_head_ranges(2, 3, 20, DT_F32);
    test_head_ranges(3, 1, 8, DT_F32);
    test_head_ranges(1, 5, 64, DT_F16);
    test_head_ranges(2, 7, 32, DT_F16); /* Qwen2-0.5B */
    test_long_contexts(DT_F16, 128, 1, 4);
    test_long_contexts(DT_F16, 80, 5, 1);
    test_long_contexts(DT_F16, 96, 2, 1);
    test_long_contexts(DT_F32, 20, 1, 3);
    test_long_contexts(DT_F16, 64, 3, 2);
    test_no_allocation();
    printf("attention: %d checks, %d failed\n", check_n_run, check_n_failed);
    return check_n_failed;
}
