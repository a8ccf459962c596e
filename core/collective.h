/* DOOR 2: the ranks that hold one replica together (a tensor-parallel group). Everything here is
 * collective over the replica and called by all of its ranks in the same order with the same
 * shapes. Results are the same bits on every rank and do not depend on the size of the message.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_COLLECTIVE_H
#define PMPD_CORE_COLLECTIVE_H

#include "core/status.h"
#include "core/tensor.h"

struct collective {
    const struct collective_ops *ops;
    void *impl; /* owned by the collective */
    int rank, size;
    double comm_s; /* seconds spent in collectives since the caller last set it to 0 */
};

struct collective_ops {
    const char *name; /* "local", "mpi", "nccl" */
    enum status (*all_reduce_sum)(struct collective *c, struct tensor *x);
    enum status (*all_gather)(struct collective *c, struct tensor *whole, const struct tensor *part,
                              const size_t *counts);
    enum status (*broadcast)(struct collective *c, struct tensor *x, int root);
    void (*close)(struct collective *c);
};

/* One rank: nothing moves. */
void collective_local(struct collective *out);
void collective_close(struct collective *c);

/* x (F32) = x of rank 0 + x of rank 1 + ..., added in rank order, on every rank.
 * Errors: ST_SHAPE, ST_MPI/ST_NCCL, ST_TIMEOUT. */
MUST_CHECK enum status collective_all_reduce_sum(struct collective *c, struct tensor *x);
/* whole = the parts one after the other in rank order. counts (size) elements of each rank's part;
 * whole holds their sum. Same dtype. part may lie inside whole at its own place. */
MUST_CHECK enum status collective_all_gather(struct collective *c, struct tensor *whole,
                                             const struct tensor *part, const size_t *counts);
/* x of rank `root` on every rank. */
MUST_CHECK enum status collective_broadcast(struct collective *c, struct tensor *x, int root);

#endif
