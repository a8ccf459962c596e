/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE // sched_getaffinity
#include "dist/env.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>
#include <unistd.h>

#include "core/log.h"
#include "core/mem.h"
#include "dist/lifeline.h"
#include "dist/watchdog.h"

enum { MESSAGE_BYTES = 2048, BROADCAST_PIECE = 1 << 30, INVARIANT_EXIT_CODE = 70 };

enum status env_mpi_check(int rc, const char *call, const char *file, int line, const char *func)
{
    if (rc == MPI_SUCCESS) {
        return ST_OK;
    }
    char text[MPI_MAX_ERROR_STRING + 1] = "unknown error";
    int n = 0;
    MPI_Error_string(rc, text, &n);
    int name = (int)strcspn(call, "(");
    return status_raise(ST_MPI, file, line, func, "%.*s failed: %s", name, call, text);
}

static void abort_hook(void)
{
    lifeline_report(status_message(), true);
    env_abort(INVARIANT_EXIT_CODE);
}

/* Tasks that srun started, when nothing in the environment would join them into one MPI job: 0 if
 * we were not started by srun. Read before MPI_Init, which may add variables of its own. */
static int srun_tasks(void)
{
    if (!getenv("SLURM_PROCID") || !getenv("SLURM_STEP_ID") || getenv("OMPI_COMM_WORLD_SIZE")) {
        return 0; // not in a job step, or mpirun inside an allocation
    }
    const char *n = getenv("SLURM_STEP_NUM_TASKS");
    n = n ? n : getenv("SLURM_NTASKS");
    return n ? atoi(n) : 0;
}

static enum status refuse_singletons(struct env *env, int n_tasks)
{
    // N copies would say this N times: the caller prints on rank 0 only
    env->rank = atoi(getenv("SLURM_PROCID"));
    log_set_rank(env->rank);
    FAIL(ST_USER,
         "srun started %d tasks, but MPI sees each as a job of one rank: use "
         "`srun --mpi=pmix` or, inside the allocation, `mpirun -n %d`",
         n_tasks, n_tasks);
}

enum status env_start(struct env *env, int *argc, char ***argv)
{
    *env = (struct env){.world = MPI_COMM_NULL,
                        .lease_comm = MPI_COMM_NULL,
                        .service_comm = MPI_COMM_NULL,
                        .replica_comm = MPI_COMM_NULL,
                        .size = 1,
                        .start_s = clock_s()};
    int n_tasks = srun_tasks();
    // some MPI libraries end the process inside MPI_Init in this case, with less helpful words
    if (n_tasks > 1 && !getenv("PMIX_RANK") && !getenv("PMI_RANK") && !getenv("PMI_FD")) {
        return refuse_singletons(env, n_tasks);
    }
    int initialised = 0, level = 0;
    TRY_MPI(MPI_Initialized(&initialised));
    if (initialised) {
        TRY_MPI(MPI_Query_thread(&level));
    } else {
        TRY_MPI(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level));
        env->started = true;
    }
    TRY_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    TRY_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &env->world));
    TRY_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &env->lease_comm));
    TRY_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &env->service_comm));
    TRY_MPI(MPI_Comm_set_errhandler(env->service_comm, MPI_ERRORS_RETURN));
    TRY_MPI(MPI_Comm_set_errhandler(env->world, MPI_ERRORS_RETURN));
    TRY_MPI(MPI_Comm_set_errhandler(env->lease_comm, MPI_ERRORS_RETURN));
    TRY_MPI(MPI_Comm_rank(env->world, &env->rank));
    TRY_MPI(MPI_Comm_size(env->world, &env->size));
    log_set_rank(env->rank);
    status_set_abort(abort_hook);
    if (level < MPI_THREAD_FUNNELED) {
        FAIL(ST_MPI,
             "this MPI library grants thread level %d, MPI_THREAD_FUNNELED (%d) is "
             "needed: use one that was built with threads",
             level, MPI_THREAD_FUNNELED);
    }
    if (n_tasks > 1 && env->size == 1) {
        return refuse_singletons(env, n_tasks);
    }
    return ST_OK;
}

/* Ranks that do not make whole replicas: says which numbers do. */
static enum status refuse_grid(const struct env *env, int tensor_ranks)
{
    const char *own = env->n_service ? " and service.rank = own" : "";
    int below = (env->size - env->n_service) / tensor_ranks * tensor_ranks + env->n_service;
    if (below > env->n_service) {
        FAIL(ST_USER, "mpirun -n %d with parallel.tensor_ranks = %d%s: use %d or %d ranks",
             env->size, tensor_ranks, own, below, below + tensor_ranks);
    }
    if (env->n_service) {
        FAIL(ST_USER,
             "mpirun -n %d with parallel.tensor_ranks = %d%s: use %d ranks (1 for the service), or "
             "service.rank = inline",
             env->size, tensor_ranks, own, 1 + tensor_ranks);
    }
    FAIL(ST_USER,
         "mpirun -n %d with parallel.tensor_ranks = %d: use %d ranks or a multiple "
         "of it",
         env->size, tensor_ranks, tensor_ranks);
}

enum status env_grid(struct env *env, int tensor_ranks)
{
    if (tensor_ranks < 1) {
        FAIL(ST_USER, "parallel.tensor_ranks = %d: expected 1 or more", tensor_ranks);
    }
    int n_decode = env->size - env->n_service;
    if (n_decode < 1 || n_decode % tensor_ranks != 0) {
        return refuse_grid(env, tensor_ranks);
    }
    if (env->replica_comm != MPI_COMM_NULL) {
        TRY_MPI(MPI_Comm_free(&env->replica_comm));
    }
    bool is_service = env->rank < env->n_service;
    env->n_replicas = n_decode / tensor_ranks;
    env->replica = is_service ? -1 : (env->rank - env->n_service) / tensor_ranks;
    int colour = is_service ? env->n_replicas : env->replica;
    TRY_MPI(MPI_Comm_split(env->world, colour, env->rank, &env->replica_comm));
    TRY_MPI(MPI_Comm_set_errhandler(env->replica_comm, MPI_ERRORS_RETURN));
    TRY_MPI(MPI_Comm_rank(env->replica_comm, &env->tensor_rank));
    env->tensor_size = tensor_ranks;
    return ST_OK;
}

int env_first_rank(const struct env *env, int replica)
{
    return env->n_service + replica * env->tensor_size;
}

enum status env_agree(struct env *env, enum status st)
{
    int mine = st == ST_OK ? env->size : env->rank, first = 0;
    TRY_MPI(MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, env->world));
    if (first == env->size) {
        return ST_OK;
    }
    struct {
        int32_t st;
        char text[MESSAGE_BYTES];
    } news = {.st = (int32_t)st};
    if (env->rank == first) {
        snprintf(news.text, sizeof news.text, "%s", status_message());
    }
    TRY_MPI(MPI_Bcast(&news, (int)sizeof news, MPI_BYTE, first, env->world));
    if (st != ST_OK) {
        return status_trace(st, __FILE__, __LINE__, __func__);
    }
    news.text[sizeof news.text - 1] = '\0';
    FAIL((enum status)news.st, "rank %d: %s", first, news.text);
}

static enum status compare_text(const char *what, const char *text, const char *first,
                                const char *fix)
{
    if (strcmp(text, first) != 0) {
        FAIL(ST_USER, "%s is %s here and %s on rank 0: %s", what, text, first, fix);
    }
    return ST_OK;
}

enum status env_agree_text(struct env *env, const char *what, const char *text, const char *fix)
{
    char first[256] = "";
    INVARIANT(strlen(text) < sizeof first);
    snprintf(first, sizeof first, "%s", text);
    TRY_MPI(MPI_Bcast(first, (int)sizeof first, MPI_CHAR, 0, env->world));
    return env_agree(env, compare_text(what, text, first, fix));
}

enum { DISTINCT_BYTES = 128 };

static enum status find_twin(const struct env *env, const char *all, const char *what,
                             const char *fix)
{
    const char *mine = all + (size_t)env->rank * DISTINCT_BYTES;
    for (int r = 0; r < env->rank && mine[0]; r++) {
        if (strcmp(all + (size_t)r * DISTINCT_BYTES, mine) == 0) {
            FAIL(ST_USER, "ranks %d and %d share %s %s; %s", r, env->rank, what, mine, fix);
        }
    }
    return ST_OK;
}

enum status env_agree_distinct(struct env *env, const char *what, const char *text, const char *fix)
{
    char mine[DISTINCT_BYTES] = "", *all = NULL;
    INVARIANT(strlen(text) < sizeof mine);
    snprintf(mine, sizeof mine, "%s", text);
    TRY(env_agree(env, mem_alloc_array((void **)&all, (size_t)env->size, DISTINCT_BYTES)));
    int rc =
        MPI_Allgather(mine, DISTINCT_BYTES, MPI_CHAR, all, DISTINCT_BYTES, MPI_CHAR, env->world);
    enum status st = rc == MPI_SUCCESS ? find_twin(env, all, what, fix) : ST_OK;
    mem_free(all);
    TRY_MPI(rc);
    return env_agree(env, st);
}

/* The ranks of this node that decode. */
static enum status count_local(const struct env *env, int *n, int *rank)
{
    MPI_Comm node;
    int decodes = env->rank >= env->n_service;
    TRY_MPI(MPI_Comm_split_type(env->world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node));
    TRY_MPI(MPI_Allreduce(&decodes, n, 1, MPI_INT, MPI_SUM, node));
    TRY_MPI(MPI_Scan(&decodes, rank, 1, MPI_INT, MPI_SUM, node));
    *rank -= decodes;
    TRY_MPI(MPI_Comm_free(&node));
    return ST_OK;
}

enum status env_local_rank(struct env *env, int *rank)
{
    int n = 0;
    return count_local(env, &n, rank);
}

enum status env_broadcast_text(struct env *env, char **text)
{
    uint64_t bytes = env->rank == 0 ? (uint64_t)strlen(*text) : 0;
    TRY_MPI(MPI_Bcast(&bytes, 1, MPI_UINT64_T, 0, env->world));
    char *copy = NULL;
    enum status st = ST_OK;
    if (env->rank != 0) {
        size_t room = 0;
        st = mem_add(&room, (size_t)bytes, 1);
        if (st == ST_OK) {
            st = MEM_NEW(&copy, room);
        }
    }
    st = env_agree(env, st); // a rank without memory must not leave the others in the broadcast
    if (st != ST_OK) {
        mem_free(copy);
        return status_trace(st, __FILE__, __LINE__, __func__);
    }
    char *at = env->rank == 0 ? *text : copy;
    for (uint64_t done = 0; done < bytes; done += BROADCAST_PIECE) {
        uint64_t left = bytes - done;
        int n = left < BROADCAST_PIECE ? (int)left : BROADCAST_PIECE;
        int rc = MPI_Bcast(at + done, n, MPI_CHAR, 0, env->world);
        if (rc != MPI_SUCCESS) {
            mem_free(copy);
            TRY_MPI(rc);
        }
    }
    if (env->rank != 0) {
        *text = copy;
    }
    return ST_OK;
}

void env_abort(int code)
{
    fflush(NULL);
    int initialised = 0, finalised = 0;
    MPI_Initialized(&initialised);
    MPI_Finalized(&finalised);
    if (initialised && !finalised) {
        MPI_Abort(MPI_COMM_WORLD, code);
    }
    _exit(code);
}

void env_end(struct env *env)
{
    watchdog_stop();
    int initialised = 0, finalised = 0;
    MPI_Initialized(&initialised);
    MPI_Finalized(&finalised);
    if (initialised && !finalised) {
        MPI_Comm *comms[] = {&env->replica_comm, &env->lease_comm, &env->service_comm, &env->world};
        for (int i = 0; i < 4; i++) {
            if (*comms[i] != MPI_COMM_NULL) {
                MPI_Comm_free(comms[i]);
            }
        }
        status_set_abort(NULL);
        if (env->started) {
            MPI_Finalize();
        }
    }
    env->started = false;
}

enum status env_default_threads(struct env *env, int *n_threads)
{
    int n_local = 1, rank = 0;
    TRY(count_local(env, &n_local, &rank));
    n_local = n_local > 0 ? n_local : 1; // a service alone on its node
    *n_threads = 0;
    if (getenv("OMP_NUM_THREADS")) {
        return ST_OK;
    }
    cpu_set_t mask;
    long n_online = sysconf(_SC_NPROCESSORS_ONLN);
    int n_mine = (int)n_online;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) {
        n_mine = CPU_COUNT(&mask);
    }
    bool unbound = n_mine >= n_online;
    *n_threads = unbound ? n_mine / n_local : n_mine;
    *n_threads = *n_threads < 1 ? 1 : *n_threads;
    return ST_OK;
}

/* Sums the threads of a node's ranks and counts the CPUs that any of them may use. */
static enum status count_on_node(struct env *env, int n_threads, int *n_all, int *n_cpus,
                                 int *n_local, int *local_rank)
{
    MPI_Comm node;
    cpu_set_t mine, all;
    CPU_ZERO(&mine);
    if (sched_getaffinity(0, sizeof mine, &mine) != 0) { /* more CPUs than a cpu_set_t counts */
        CPU_ZERO(&mine);
    }
    TRY_MPI(MPI_Comm_split_type(env->world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node));
    TRY_MPI(MPI_Comm_size(node, n_local));
    TRY_MPI(MPI_Comm_rank(node, local_rank));
    TRY_MPI(MPI_Allreduce(&mine, &all, (int)sizeof mine, MPI_BYTE, MPI_BOR, node));
    TRY_MPI(MPI_Allreduce(&n_threads, n_all, 1, MPI_INT, MPI_SUM, node));
    TRY_MPI(MPI_Comm_free(&node));
    *n_cpus = CPU_COUNT(&all);
    return ST_OK;
}

enum status env_check_threads(struct env *env, int n_threads)
{
    int n_all = 0, n_cpus = 0, n_local = 0, local_rank = 0;
    TRY(count_on_node(env, n_threads, &n_all, &n_cpus, &n_local, &local_rank));
    const char *policy = getenv("OMP_WAIT_POLICY");
    bool knows = policy && (strcmp(policy, "passive") == 0 || strcmp(policy, "PASSIVE") == 0);
    bool too_many = n_cpus > 0 && n_all > n_cpus && !knows;
    int speaker = too_many && local_rank == 0 ? env->rank : env->size, first = 0;
    TRY_MPI(MPI_Allreduce(&speaker, &first, 1, MPI_INT, MPI_MIN, env->world));
    if (first == env->rank) {
        int share = n_cpus / n_local;
        log_warn(
            "%d rank%s of this node run %d threads on %d CPUs: they take turns, and those that "
            "wait keep the others from working (many times slower). Set backend.threads or "
            "OMP_NUM_THREADS to %d%s, or at least OMP_WAIT_POLICY=passive",
            n_local, n_local == 1 ? "" : "s", n_all, n_cpus, share > 0 ? share : 1,
            share > 0 ? "" : " and start fewer ranks");
    }
    return ST_OK;
}
