/* The MPI environment of the program: start, end, the grid of replicas x tensor ranks, and
 * agreement, so that one rank never leaves alone.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_ENV_H
#define PMPD_DIST_ENV_H

#include <mpi.h>
#include <stdbool.h>

#include "core/collective.h"
#include "core/status.h"

/* An MPI return code turned into ST_MPI with MPI's own text (ST_OK for MPI_SUCCESS). */
MUST_CHECK
enum status env_mpi_check(int rc, const char *call, const char *file, int line, const char *func);
#define TRY_MPI(call)                                                       \
    do {                                                                    \
        int rc_ = (call);                                                   \
        if (rc_ != MPI_SUCCESS) {                                           \
            return env_mpi_check(rc_, #call, __FILE__, __LINE__, __func__); \
        }                                                                   \
    } while (0)

struct env {
    MPI_Comm world;        /* our own copy of MPI_COMM_WORLD, errors return */
    MPI_Comm lease_comm;   /* another one, for the messages of dist/lease.h */
    MPI_Comm service_comm; /* and one for those of dist/service.h */
    int rank, size;
    int n_service; /* set it before env_grid: 1 where rank 0 is a scheduler service of its own
                      (which decodes nothing), else 0 */
    /* after env_grid: */
    MPI_Comm replica_comm; /* of a service of its own: itself */
    int replica;           /* of a service of its own: -1 */
    int n_replicas, tensor_rank, tensor_size;
    bool started;   /* MPI was initialised by env_start */
    double start_s; /* clock_s when env_start began */
};

/* MPI_Init_thread(FUNNELED), own communicator, errors return. Sets the log's rank and the abort
 * hook (MPI_Abort). Errors: ST_MPI; ST_USER when SLURM_NTASKS (with SLURM_PROCID set: we were
 * started by srun) says more than one task and MPI says one: srun started N singletons; names the
 * fix (srun --mpi=pmix, or mpirun); env->rank is then SLURM_PROCID, so that one of them prints.
 * mpirun inside an allocation is not refused. Works without mpirun as one rank. env_end is allowed
 * after a failure. */
MUST_CHECK enum status env_start(struct env *env, int *argc, char ***argv);
/* Collective over the world. Cuts it into replicas of tensor_ranks consecutive ranks, after the
 * service's rank where it has one (env->n_service).
 * Errors: ST_USER: the number of ranks is no multiple ("mpirun -n 3 with parallel.tensor_ranks = 2:
 * use 2 or 4 ranks"). */
MUST_CHECK enum status env_grid(struct env *env, int tensor_ranks);
/* The world's rank that is a replica's first. */
int env_first_rank(const struct env *env, int replica);
/* Collective over the world: every rank gets ST_OK, or every rank fails. A rank that succeeded
 * where another failed gets the first failing rank's status, its message prefixed with "rank N: ".
 */
MUST_CHECK enum status env_agree(struct env *env, enum status st);
/* Collective over the world: every rank has the same text of less than 256 bytes about `what`, or
 * every rank fails. Errors: ST_USER with both texts and `fix`, what to do about it. */
MUST_CHECK enum status env_agree_text(struct env *env, const char *what, const char *text,
                                      const char *fix);
/* Collective over the world: no two ranks have the same text (less than 128 bytes; "" is nobody's)
 * about `what`, or every rank fails. Errors: ST_USER with the two ranks, the text and `fix`. */
MUST_CHECK enum status env_agree_distinct(struct env *env, const char *what, const char *text,
                                          const char *fix);
/* Collective: this rank's number among the ranks of its node that decode. */
MUST_CHECK enum status env_local_rank(struct env *env, int *rank);
/* Collective: bytes of text from rank 0 to all; *text is allocated (mem_free) on the other ranks.
 */
MUST_CHECK enum status env_broadcast_text(struct env *env, char **text);
/* Collective. Threads of this rank when the settings leave it open: OMP_NUM_THREADS where it is set
 * (0: OpenMP decides), else the CPUs this rank may use, shared among the ranks of the node that see
 * the same CPUs because nothing bound them. */
MUST_CHECK enum status env_default_threads(struct env *env, int *n_threads);
/* Collective. n_threads: that compute on this rank, 0 where it decodes nothing. Where the ranks of
 * a node together have more than there are CPUs for them, one rank of one such node says so and
 * what to do; not where OMP_WAIT_POLICY is passive, which is the least of it. */
MUST_CHECK enum status env_check_threads(struct env *env, int n_threads);
/* Ends the job from one rank. Never returns. */
void env_abort(int code) __attribute__((noreturn));
/* Stops the watchdog; MPI_Finalize once. Call it on the single exit path of main; not after a
 * failure in the token loop (use env_abort). */
void env_end(struct env *env);

/* The collective of this rank's replica: MPI, or the local one for a single rank. Sums are added in
 * rank order from gathered parts, whatever the message size. timeout_s (> 0) arms the watchdog.
 * max_bytes_hint (the same on every rank) sizes the only buffer; longer sums go through it in
 * pieces. Not collective itself; env must outlive it. */
MUST_CHECK enum status coll_mpi_open(struct collective *out, struct env *env, double timeout_s,
                                     size_t max_bytes_hint);

#endif
