/* Levels: named precisions of the whole model, bits for every (layer, matrix). A level is written
 *   "4"                            4 bits everywhere (a nested head too, where it holds them)
 *   "max"                          the most the model holds; the only level of a dense model
 *   "3,0-1.down_proj=4,*.o_proj=4" 3 bits, but for the named layers and matrices; later wins
 *   "3,head=4"                     the nested head at 4
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_LEVEL_H
#define PMPD_CORE_LEVEL_H

#include <stdint.h>

#include "core/model.h"
#include "core/status.h"

enum { LEVEL_TEXT_BYTES = 256, LEVEL_TABLE_MAX = 64 };

struct level {
    char text[LEVEL_TEXT_BYTES]; /* as it was written */
    uint8_t *bits;               /* owned by the table: (n_layers, M_N_ROLES); 0 = dense weights */
    uint8_t head_bits;           /* 0 = dense head */
    float avg_bits;      /* over the weights of the layers' linears; dense: bits of the dtype */
    float head_avg_bits; /* of the head; dense: bits of its dtype */
    uint8_t max_bits;    /* largest of bits; dense: bits of the dtype */
};

struct level_table {
    const struct model_config *config; /* borrowed */
    const char *model_digest; /* borrowed: of the model, on ranks that know it; else NULL */
    uint32_t held;            /* bit b: every nested linear of the layers holds b; 0: dense */
    uint32_t head_held;       /* the same for a nested head; 0: dense head */
    int dense_bits, head_dense_bits; /* bits of the dense dtypes: 16 or 32 */
    int n;
    struct level level[LEVEL_TABLE_MAX]; /* (n); the index is the level's id */
};

void level_table_init(struct level_table *t, const struct model_config *config, uint32_t held,
                      uint32_t head_held, int dense_bits, int head_dense_bits);
void level_table_release(struct level_table *t);
/* Id of the level written as text, added when it is new. Errors: ST_USER: bits that the model does
 * not hold (lists those it holds), an unknown matrix, a layer out of range, bad syntax; too many.
 */
MUST_CHECK enum status level_table_add(struct level_table *t, const char *text, int32_t *id);

#endif
