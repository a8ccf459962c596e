/* What the parts of test_ops share.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_TESTS_OPS_CASES_H
#define PMPD_TESTS_OPS_CASES_H

#include "tests/ops/rig.h"

enum op {
    OP_NESTED,
    OP_DENSE,
    OP_ADD_PARTS,
    OP_EMBED,
    OP_RMSNORM,
    OP_LAYERNORM,
    OP_ROPE,
    OP_KV,
    OP_ATTENTION,
    OP_GLU,
    OP_ACTIVATE,
    OP_MOMENTS,
    OP_STATS,
    OP_N
};

extern struct backend ref, dut; /* the oracle and the device under test */
extern const char *dut_name;    /* what rig_open opens */
extern struct rig_rng rng;

/* Notes the error of an operation and checks it against its bound. */
void compare(enum op op, const float *got, const float *expected, size_t n, int line);
#define COMPARE(op, got, expected, n) compare((op), (got), (expected), (n), __LINE__)
/* n random numbers; free with free(). */
float *floats(size_t n);
struct token_place put_place(struct backend *be, const int32_t *slot, const int32_t *pos,
                             const int32_t *kv_row, int32_t n_tok);
void drop_place(struct backend *be, struct token_place *place);

/* The KV cache and attention. Returns the number of failed checks of its own. */
int cases_attention(void);
/* Layer norm and activations; the same. */
int cases_layer(void);

#endif
