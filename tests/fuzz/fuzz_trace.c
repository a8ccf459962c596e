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
    INVARIANT(trace_packed_bytes(&r) == size);
    void *packed = malloc(size);
    INVARIANT(packed != NULL);
    trace_pack(packed, size, &r);
    INVARIANT(memcmp(packed, data, size) == 0);
    free(packed);
    trace_free(&r);
    return 0;
}
