/* Which changes leave a run's tokens as they are, by construction: one text, which the provenance
 * of a run file, `pmpd inspect` and replays show. The rule itself: a token's arithmetic is fixed by
 * the configuration (product, prefill chunk, KV format, backend, order of sums), never by who
 * shares a pass or where it runs.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_INVARIANCE_H
#define PMPD_CORE_INVARIANCE_H

#include <stdbool.h>
#include <stddef.h>

#include "core/settings.h"

enum { INVARIANCE_BYTES = 192 };

/* The product of decode passes by the name that run files use: "one", or "slots" when several
 * sequences (or added tokens) may share a pass. */
const char *invariance_product(const struct settings *s, bool policy_adds_tokens);

/* "any number of replicas and threads, any service placement, any number of slots > 1, any of 1..8
 * tensor ranks that fits (reproducible, 8 segments)". product: invariance_product's. */
void invariance_text(char text[INVARIANCE_BYTES], const struct settings *s, const char *product);

#endif
