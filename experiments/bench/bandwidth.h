/* How fast this machine reads memory, measured beside every timing: the buses of shared machines
 * change by tens of percent within minutes, so only ratios of neighbours mean something. Each
 * thread is pinned and sums its own part of a buffer much larger than the last-level cache, in 1, 2
 * and 4 sequential streams; the best of the three is the machine's bandwidth.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_BANDWIDTH_H
#define PMPD_EXPERIMENTS_BENCH_BANDWIDTH_H

#include <stddef.h>

#include "core/status.h"
#include "dist/env.h"

struct bandwidth {
    struct env *env; /* borrowed: its replica reads together */
    char *buffer;    /* (bytes) owned, in huge pages where the system has them */
    size_t bytes;
    int n_threads, first_cpu; /* thread t goes to the (first_cpu + t)-th CPU that it may use */
    uint64_t sum;             /* what was read, so that it must be */
};

/* Bytes of all buffers of a node when nobody says: 8 times the last-level cache, from 64 MiB to
 * 1 GiB. */
size_t bandwidth_usual_bytes(void);
/* node_bytes: of all buffers of a node, about. Each thread touches its own part first. Not
 * collective; env_grid has been called. Errors: ST_NOMEM. */
MUST_CHECK enum status bandwidth_open(struct bandwidth *out, struct env *env, int n_threads,
                                      int local_rank, int n_local_ranks, size_t node_bytes);
void bandwidth_close(struct bandwidth *bw);
/* GB/s (1e9 bytes) of all ranks of the replica together: the median of n_passes, the best number of
 * streams. Collective over the replica; every rank gets the same. */
MUST_CHECK enum status bandwidth_measure(struct bandwidth *bw, int n_passes, double *gb_s);

#endif
