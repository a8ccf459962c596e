/* Where a pass spends its time: a backend that hands every call to another one and adds up calls,
 * seconds and bytes by operation and shape. The decoder does not know. A device's queue is waited
 * for after every call, so that the time is the call's own.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_PROFILE_H
#define PMPD_EXPERIMENTS_BENCH_PROFILE_H

#include "core/backend.h"

/* Kinds of time, of which the target speaks. */
enum profile_kind { PROFILE_NESTED, PROFILE_ATTENTION, PROFILE_OTHER };

struct profile_entry {
    const char *op;
    enum profile_kind kind;
    int32_t n_rows, n_cols; /* of a product; else 0 */
    uint64_t calls;
    uint64_t bytes; /* of weights that nested products read */
    double seconds;
};

enum { PROFILE_ACCOUNTS = 64, PROFILE_MOST_ENTRIES = 64 };

struct profile;

/* Makes *be a profile of what it was; backend_close gives both back. Nothing is kept until
 * profile_keep. Errors: ST_NOMEM. */
MUST_CHECK enum status profile_wrap(struct backend *be);
/* From now on calls count for account 0..PROFILE_ACCOUNTS - 1; negative: for none. */
void profile_keep(struct backend *be, int account);
/* Entries of an account in order of their first call; *n of them. INVARIANT: be is a profile. */
const struct profile_entry *profile_entries(const struct backend *be, int account, int *n);

#endif
