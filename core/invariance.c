/* SPDX-License-Identifier: Apache-2.0 */
#include "core/invariance.h"

#include <stdio.h>
#include <string.h>

const char *invariance_product(const struct settings *s, bool policy_adds_tokens)
{
    return s->decode.slots == 1 && !policy_adds_tokens ? "one" : "slots";
}

void invariance_text(char text[INVARIANCE_BYTES], const struct settings *s, const char *product)
{
    // with one slot the product of slots is a policy's doing, so that 1 slot is among the numbers
    const char *slots = strcmp(product, "one") == 0 ? "1 slot only"
                        : s->decode.slots == 1      ? "any number of slots"
                                                    : "any number of slots > 1";
    char ranks[80];
    if (s->parallel.reproducible) {
        snprintf(ranks, sizeof ranks,
                 "any of 1..%d tensor ranks that fits (reproducible, %d segments)",
                 s->parallel.segments, s->parallel.segments);
    } else {
        snprintf(ranks, sizeof ranks, "%d tensor rank%s only", s->parallel.tensor_ranks,
                 s->parallel.tensor_ranks == 1 ? "" : "s");
    }
    snprintf(text, INVARIANCE_BYTES,
             "any number of replicas and threads, any service placement, %s, %s", slots, ranks);
}
