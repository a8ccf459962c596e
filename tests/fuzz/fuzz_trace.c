/* A finished record as it lies in the journal.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdlib.h>
#include <string.h>

#include "core/prompts.h"
#include "core/trace.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct finished_record r;
    if (!fuzz_ok(trace_unpack(&r, data, size))) {
        INVARIANT(r.turns == NULL && r.n_turns == 0);
        return 0;
    }
    INVARIANT(r.ordinal >= 0 && r.n_turns >= 1 && r.n_turns <= PROMPT_MAX_TURNS);
    INVARIANT(r.n_steps >= 0 && r.n_switches >= 0 && r.n_passes >= 0);
    INVARIANT((r.features != NULL) == (r.n_feature_tok > 0));
    int at = 0;
    for (int i = 0; i < r.n_turns; i++) {
        INVARIANT(r.turns[i].finish == FINISH_EOS || r.turns[i].finish == FINISH_LENGTH);
        for (int k = 0; k < r.turns[i].n_steps; k++, at++) {
            INVARIANT(at < r.n_steps && r.steps[at].turn == i && r.steps[at].step >= k);
        }
    }
    for (int i = 0; i < r.n_passes; i++) {
        INVARIANT(r.passes[i].kind == PASS_PREFILL || r.passes[i].kind == PASS_DECODE);
    }
    INVARIANT(at == r.n_steps && trace_packed_bytes(&r) == size);
    void *packed = malloc(size);
    INVARIANT(packed != NULL);
    trace_pack(packed, size, &r);
    INVARIANT(memcmp(packed, data, size) == 0);
    free(packed);
    trace_free(&r);
    return 0;
}
