/* kv_append and attention: rows and slots in any order, shared heads, probes in a spare row.
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

static struct cache cache_make(struct backend *be, enum dtype k_type, enum dtype v_type,
                               int32_t head_dim)
{
    return (struct cache){{
        .k = rig_room(be, tensor_4d(NULL, k_type, SLOTS, KV_HEADS, ROWS, head_dim)),
        .v = rig_room(be, tensor_4d(NULL, v_type, SLOTS, KV_HEADS, ROWS, head_dim)),
    }};
}

static void cache_free(struct backend *be, struct cache *c)
{
    rig_drop(be, &c->kv.k);
    rig_drop(be, &c->kv.v);
}

static void append(struct backend *be, struct cache *c, const float *k, const float *v,
                   const int32_t *slot, const int32_t *pos, const int32_t *row, int32_t n_tok)
{
    int32_t head_dim = c->kv.k.dims[3];
    struct token_place place = put_place(be, slot, pos, row, n_tok);
    struct tensor k_t = rig_put(be, tensor_3d((void *)k, DT_F32, n_tok, KV_HEADS, head_dim));
    struct tensor v_t = rig_put(be, tensor_3d((void *)v, DT_F32, n_tok, KV_HEADS, head_dim));
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
        struct cache c = cache_make(be, k_type, v_type, head_dim);
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
    struct cache c = cache_make(&dut, DT_F32, DT_F32, 2);
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

/* Scratch does not follow the position: every step of a long answer would allocate. */
static void test_no_allocation(void)
{
    struct backend be = rig_open(dut.ops->name, 2); /* one that has seen nothing yet */
    struct cache c = cache_make(&be, DT_F32, DT_F16, 32);
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
    test_no_allocation();
    printf("attention: %d checks, %d failed\n", check_n_run, check_n_failed);
    return check_n_failed;
}
