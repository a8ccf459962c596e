/* config.json and, behind a byte 0xFF, generation_config.json; the table of nested linears.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <math.h>
#include <string.h>

#include "core/level.h"
#include "core/model.h"
#include "tests/fuzz/fuzz.h"

static void check_numbers(const struct model_config *c)
{
    INVARIANT(c->family < FAMILY_N && c->hidden > 0 && c->n_layers > 0 && c->ffn > 0);
    INVARIANT(c->n_heads > 0 && c->n_kv_heads > 0 && c->n_heads % c->n_kv_heads == 0);
    INVARIANT(c->head_dim > 0 && c->head_dim % 2 == 0 && c->context > 0 && c->vocab > 1);
    INVARIANT(c->rot_dim > 0 && c->rot_dim % 2 == 0 && c->rot_dim <= c->head_dim);
    INVARIANT(c->rope_theta > 0 && isfinite(c->rope_theta) && c->norm_eps > 0);
    INVARIANT(c->bos >= -1 && c->bos < c->vocab && c->n_eos >= 0 && c->n_eos <= MODEL_MAX_EOS);
    for (int i = 0; i < c->n_eos; i++) {
        INVARIANT(c->eos[i] >= 0 && c->eos[i] < c->vocab);
    }
    for (int role = 0; role < M_N_ROLES; role++) {
        int32_t n_rows, n_cols;
        model_matrix_shape(c, (enum matrix_role)role, &n_rows, &n_cols);
        bool has = model_has_role(c, (enum matrix_role)role);
        INVARIANT(has ? n_rows > 0 && n_cols > 0 : n_rows == 0 && n_cols == 0);
    }
}

static void check_rope(const struct model_config *c)
{
    double frequency[4096 / 2];
    rope_frequencies(frequency, c->rope_theta, c->rot_dim, &c->rope_scaling);
    for (int i = 0; i < c->rot_dim / 2; i++) {
        INVARIANT(isfinite(frequency[i]) && frequency[i] >= 0);
    }
}

static void check_nested(const struct model_config *c, const struct nested_index *index)
{
    enum level_kind kinds[BITS_ALL];
    uint32_t mask = 0;
    int32_t n_cols;
    INVARIANT(c->n_planes >= 1 && c->n_planes <= BITS_MAX && c->group_cols % 32 == 0);
    INVARIANT(strlen(c->method) < sizeof c->method);
    bool head = fuzz_ok(nested_index_get(index, MODEL_HEAD_NAME, &n_cols, kinds));
    INVARIANT(head == c->nested_head);
    if (head) {
        INVARIANT(n_cols > 0 && kinds[0] == LEVEL_NONE);
        for (int b = 1; b <= BITS_MAX; b++) {
            INVARIANT(kinds[b] < LEVEL_N && (b <= c->n_planes || kinds[b] == LEVEL_NONE));
        }
    }
    if (c->n_layers <= 64 && fuzz_ok(nested_index_common_bits(index, c, &mask))) {
        INVARIANT(mask >> (c->n_planes + 1) == 0 && !(mask & 1));
        struct level_table levels;
        int32_t id = -1;
        level_table_init(&levels, c, mask, 0, 16, 16);
        if (fuzz_ok(level_table_add(&levels, "max", &id))) {
            INVARIANT(id == 0 && levels.level[0].max_bits <= c->n_planes);
        }
        level_table_release(&levels);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_part part[2];
    struct model_config c;
    struct nested_index *index = NULL;
    fuzz_split(part, 2, data, size);
    fuzz_put_part("config.json", &part[0]);
    fuzz_put_part("generation_config.json", &part[1]);
    bool good = fuzz_ok(model_config_read(&c, fuzz_folder()));
    if (good) {
        check_numbers(&c);
        check_rope(&c);
    }
    bool nested = fuzz_ok(nested_index_read(&index, fuzz_folder()));
    if (good && nested) {
        INVARIANT(c.nested);
        check_nested(&c, index);
    }
    nested_index_destroy(&index);
    return 0;
}
