/* The MPI collective, agreement and start-up, for any number of ranks. With the argument `srun`: a
 * singleton that srun started is refused; `hang`: one rank never comes, the watchdog speaks.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdint.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/collective.h"
#include "core/mem.h"
#include "dist/env.h"
#include "dist/watchdog.h"
#include "tests/check.h"

enum { HASH_STEP = 1103515245u };

static uint32_t hash(uint32_t rank, uint32_t i)
{
    uint32_t x = (rank + 1) * 2654435761u ^ (i + 1) * HASH_STEP;
    x ^= x >> 15;
    x *= 2246822519u;
    return x ^ x >> 13;
}

/* Numbers of very different size and both signs: another order of addition gives other bits. */
static float value(int rank, size_t i)
{
    uint32_t h = hash((uint32_t)rank, (uint32_t)i);
    float mantissa = (float)(h & 0xFFFFu) / 65536.0f - 0.5f;
    return ldexpf(mantissa, (int)(h >> 16) % 24);
}

static float sum_in_order(int size, size_t i)
{
    volatile float sum = value(0, i); // volatile: one rounding per addition, whatever the compiler
    for (int r = 1; r < size; r++) {
        sum = sum + value(r, i);
    }
    return sum;
}

static void check_sum(struct collective *c, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = value(c->rank, i);
    }
    x[n] = 123.0f; // behind the end
    struct tensor t = tensor_1d(x, DT_F32, (int32_t)n);
    CHECK_OK(collective_all_reduce_sum(c, &t));
    size_t n_wrong = 0, n_other_order = 0;
    for (size_t i = 0; i < n; i++) {
        float expected = sum_in_order(c->size, i);
        n_wrong += memcmp(&expected, &x[i], sizeof expected) != 0;
        float backwards = value(c->size - 1, i);
        for (int r = c->size - 2; r >= 0; r--) {
            backwards += value(r, i);
        }
        n_other_order += memcmp(&expected, &backwards, sizeof expected) != 0;
    }
    if (!CHECK(n_wrong == 0)) {
        fprintf(stderr, "    %zu of %zu sums\n", n_wrong, n);
    }
    CHECK(n < 1000 || c->size < 3 || n_other_order > n / 100); // the inputs do tell orders apart
    CHECK_NEAR(x[n], 123, 0);
}

/* Around the borders of the ways in which a sum travels. */
static const size_t lengths[] = {0,    1,     2,     7,     640,   4095,  4096,    4097,
                                 8193, 16384, 16385, 20480, 20481, 70001, 1 << 20, (1 << 20) + 5};
enum { N_LENGTHS = sizeof lengths / sizeof lengths[0], MAX_LENGTH = (1 << 20) + 6 };

static void test_sums(struct env *env)
{
    static const size_t hints[] = {0, (size_t)1 << 30, 100000};
    float *x = calloc(MAX_LENGTH, sizeof *x);
    for (int h = 0; h < 3; h++) {
        struct collective c;
        CHECK_OK(coll_mpi_open(&c, env, 60, hints[h]));
        CHECK(strcmp(c.ops->name, env->tensor_size == 1 ? "local" : "mpi") == 0);
        CHECK(c.rank == env->tensor_rank && c.size == env->tensor_size);
        uint64_t allocs = mem_alloc_count();
        // the longest ones once: they take most of the time
        for (int k = 0; k < (h == 1 ? N_LENGTHS : N_LENGTHS - 2); k++) {
            check_sum(&c, x, lengths[k]);
        }
        CHECK(mem_alloc_count() == allocs);
        CHECK(c.size == 1 || c.comm_s > 0);
        struct tensor wrong = tensor_1d(x, DT_I32, 4);
        CHECK_STATUS(collective_all_reduce_sum(&c, &wrong), ST_SHAPE, "found I32");
        collective_close(&c);
        collective_close(&c);
    }
    free(x);
}

static void check_gather(struct collective *c, enum dtype dtype, const size_t *counts, int part_at)
{
    size_t bytes = dtype_bytes(dtype), before = 0, sum = 0;
    for (int r = 0; r < c->size; r++) {
        before += r < c->rank ? counts[r] : 0;
        sum += counts[r];
    }
    size_t mine = counts[c->rank] * bytes;
    unsigned char *whole = calloc(sum * bytes + 1, 1), *apart = calloc(mine + 1, 1);
    // 0: the part is apart; 1: at its own place; 2: inside whole, elsewhere
    unsigned char *part = part_at == 0   ? apart
                          : part_at == 1 ? whole + before * bytes
                                         : whole + (sum * bytes - mine) / bytes / 2 * bytes;
    for (size_t i = 0; i < mine; i++) {
        part[i] = (unsigned char)hash((uint32_t)c->rank, (uint32_t)i);
    }
    struct tensor tw = tensor_1d(whole, dtype, (int32_t)sum);
    struct tensor tp = tensor_1d(part, dtype, (int32_t)counts[c->rank]);
    CHECK_OK(collective_all_gather(c, &tw, &tp, counts));
    size_t at = 0, n_wrong = 0;
    for (int r = 0; r < c->size; r++) {
        for (size_t i = 0; i < counts[r] * bytes; i++, at++) {
            n_wrong += whole[at] != (unsigned char)hash((uint32_t)r, (uint32_t)i);
        }
    }
    CHECK(n_wrong == 0 && whole[at] == 0);
    free(whole);
    free(apart);
}

static void test_gathers(struct env *env)
{
    struct collective c;
    CHECK_OK(coll_mpi_open(&c, env, 60, 1 << 16));
    static const enum dtype dtypes[] = {DT_F32, DT_F16, DT_U8, DT_I32, DT_I64};
    size_t *counts = calloc((size_t)c.size, sizeof *counts);
    for (int d = 0; d < 5; d++) {
        for (int shape = 0; shape < 4; shape++) {
            for (int r = 0; r < c.size; r++) {
                // equal; unequal; none from some; all from the last
                counts[r] = shape == 0   ? 5
                            : shape == 1 ? 3 + 1000 * (size_t)r
                            : shape == 2 ? (r % 2 == 0 ? 0 : 17)
                                         : (r == c.size - 1 ? 9000 : 0);
            }
            for (int at = 0; at < 3; at++) {
                check_gather(&c, dtypes[d], counts, at);
            }
        }
    }
    // sizes that disagree are refused by all alike
    float x[64] = {0};
    for (int r = 0; r < c.size; r++) {
        counts[r] = 2;
    }
    struct tensor whole = tensor_1d(x, DT_F32, 2 * c.size + 1), part = tensor_1d(x, DT_F32, 2);
    CHECK_STATUS(collective_all_gather(&c, &whole, &part, counts), ST_SHAPE, "all-gather");
    whole = tensor_1d(x, DT_U8, 2 * c.size);
    CHECK_STATUS(collective_all_gather(&c, &whole, &part, counts), ST_SHAPE, "all-gather");
    if (c.size > 1) {
        // more than MPI can count: nothing is touched
        for (int r = 0; r < c.size; r++) {
            counts[r] = r == 0 ? 2 * (size_t)INT32_MAX : 0;
        }
        whole = tensor_2d(x, DT_U8, INT32_MAX, 2);
        part = c.rank == 0 ? whole : tensor_1d(x, DT_U8, 0);
        CHECK_STATUS(collective_all_gather(&c, &whole, &part, counts), ST_SHAPE, "MPI counts");
    }
    free(counts);
    collective_close(&c);
}

static void test_broadcasts(struct env *env)
{
    struct collective c;
    CHECK_OK(coll_mpi_open(&c, env, 60, 0));
    enum { N = 70000 };
    int32_t *x = calloc(N, sizeof *x);
    for (int root = 0; root < c.size; root++) {
        for (int n = 0; n <= N; n = n == 0 ? 1 : n * 70) {
            for (int i = 0; i < n; i++) {
                x[i] = (int32_t)hash((uint32_t)c.rank, (uint32_t)i);
            }
            struct tensor t = tensor_1d(x, DT_I32, n);
            CHECK_OK(collective_broadcast(&c, &t, root));
            int n_wrong = 0;
            for (int i = 0; i < n; i++) {
                n_wrong += x[i] != (int32_t)hash((uint32_t)root, (uint32_t)i);
            }
            CHECK(n_wrong == 0);
        }
    }
    struct tensor t = tensor_1d(x, DT_I32, 1);
    CHECK_STATUS(collective_broadcast(&c, &t, c.size), ST_SHAPE, "broadcast from rank");
    CHECK_STATUS(collective_broadcast(&c, &t, -1), ST_SHAPE, "broadcast from rank -1");
    free(x);
    collective_close(&c);
}

static enum status fail_here(int rank)
{
    FAIL(ST_IO, "no such file on %d", rank);
}

static void test_agree(struct env *env)
{
    CHECK_OK(env_agree(env, ST_OK));
    // the last rank fails
    bool mine = env->rank == env->size - 1;
    enum status st = mine ? fail_here(env->rank) : ST_OK;
    char expected[64];
    snprintf(expected, sizeof expected, mine ? "no such file on %d" : "rank %d: no such file on %d",
             env->size - 1, env->size - 1);
    CHECK_STATUS(env_agree(env, st), ST_IO, expected);
    CHECK(!mine || strncmp(status_message(), "no such", 7) == 0);
    // all but rank 0 fail: rank 0 hears of rank 1
    if (env->size > 1) {
        st = env->rank > 0 ? fail_here(env->rank) : ST_OK;
        snprintf(expected, sizeof expected,
                 env->rank == 0 ? "rank 1: no such file on 1" : "no such file on %d", env->rank);
        CHECK_STATUS(env_agree(env, st), ST_IO, expected);
    }
    CHECK_OK(env_agree(env, ST_OK));
}

static void test_text(struct env *env)
{
    static const size_t sizes[] = {0, 1, 100000};
    for (int k = 0; k < 3; k++) {
        char *text = NULL;
        if (env->rank == 0) {
            CHECK_OK(mem_alloc_array((void **)&text, sizes[k] + 1, 1));
            memset(text, 'a' + k, sizes[k]);
        }
        CHECK_OK(env_broadcast_text(env, &text));
        CHECK(text && strlen(text) == sizes[k]);
        CHECK(text && (sizes[k] == 0 || text[sizes[k] - 1] == 'a' + k));
        mem_free(text);
    }
}

static void test_same_text(struct env *env)
{
    CHECK_OK(env_agree_text(env, "the kind", "apple", "buy others"));
    if (env->size > 1) { /* the last rank has another one */
        bool other = env->rank == env->size - 1;
        char expected[96];
        snprintf(expected, sizeof expected,
                 "%sthe kind is pear here and apple on rank 0: buy others",
                 other ? "" : "rank N: ");
        char *rank = strchr(expected, 'N');
        if (rank) {
            *rank = (char)('0' + env->size - 1);
        }
        CHECK_STATUS(env_agree_text(env, "the kind", other ? "pear" : "apple", "buy others"),
                     ST_USER, expected);
    }
}

static void test_grid(struct env *env)
{
    CHECK_STATUS(env_grid(env, 0), ST_USER, "parallel.tensor_ranks = 0");
    char expected[96];
    int wrong = env->size + 1;
    snprintf(expected, sizeof expected, "mpirun -n %d with parallel.tensor_ranks = %d: use %d",
             env->size, wrong, wrong);
    CHECK_STATUS(env_grid(env, wrong), ST_USER, expected);
    if (env->size == 4) {
        CHECK_STATUS(env_grid(env, 3), ST_USER,
                     "mpirun -n 4 with parallel.tensor_ranks = 3: use 3 or 6 ranks");
        CHECK_OK(env_grid(env, 2));
        CHECK(env->n_replicas == 2 && env->replica == env->rank / 2);
        CHECK(env->tensor_rank == env->rank % 2 && env->tensor_size == 2);
        test_sums(env); // two replicas at once
    }
    CHECK_OK(env_grid(env, 1));
    CHECK(env->n_replicas == env->size && env->replica == env->rank && env->tensor_size == 1);
    CHECK_OK(env_grid(env, env->size)); // replaces the grid before
    CHECK(env->n_replicas == 1 && env->replica == 0 && env->tensor_rank == env->rank);
}

/* Before MPI starts, in a child: the watchdog lets quick operations pass and ends a slow one. */
static void test_watchdog(void)
{
    int out[2];
    CHECK(pipe(out) == 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct timespec short_time = {.tv_nsec = 150 * 1000 * 1000}, long_time = {.tv_sec = 8};
        dup2(out[1], STDERR_FILENO);
        if (watchdog_start(0) != ST_OK || watchdog_start(3) != ST_OK) {
            _exit(1);
        }
        for (int i = 0; i < 3; i++) { // together longer than the limit
            watchdog_enter("all-gather", 0.35);
            nanosleep(&short_time, NULL);
            watchdog_leave();
        }
        watchdog_enter("broadcast", 0); // no limit
        nanosleep(&short_time, NULL);
        watchdog_leave();
        nanosleep(&short_time, NULL);
        watchdog_stop();
        watchdog_stop();
        if (watchdog_start(3) != ST_OK) {
            _exit(1);
        }
        watchdog_enter("all-reduce", 0.2);
        nanosleep(&long_time, NULL);
        _exit(0);
    }
    close(out[1]);
    char text[512] = "";
    ssize_t n = read(out[0], text, sizeof text - 1);
    close(out[0]);
    int rc = 0;
    CHECK(waitpid(child, &rc, 0) == child);
    CHECK(WIFEXITED(rc) && WEXITSTATUS(rc) == WATCHDOG_EXIT_CODE);
    CHECK(n > 0 && strstr(text, "[rank 3] error: all-reduce has lasted 0.") != NULL);
    CHECK(strstr(text, "parallel.timeout_s") != NULL);
}

static void check_refused(int argc, char **argv)
{
    struct env env;
    CHECK_STATUS(env_start(&env, &argc, &argv), ST_USER, "srun --mpi=pmix");
    CHECK(strstr(status_message(), "srun started 4 tasks") != NULL);
    CHECK(strstr(status_message(), "mpirun -n 4") != NULL);
    CHECK(env.rank == 2); // one of the four prints
    env_end(&env);
}

/* The environment that srun without --mpi=pmix leaves behind. */
static int srun_main(int argc, char **argv)
{
    setenv("SLURM_NTASKS", "4", 1);
    setenv("SLURM_PROCID", "2", 1);
    setenv("SLURM_STEP_ID", "0", 1);
    check_refused(argc, argv); // MPI is not even asked
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        setenv("PMI_RANK", "2", 1); // a server may be at hand: MPI is asked, and sees one rank
        check_refused(argc, argv);
        _exit(check_report());
    }
    int rc = 1;
    CHECK(waitpid(child, &rc, 0) == child && rc == 0);
    unsetenv("SLURM_STEP_ID"); // a batch script's own process is no task of a step
    struct env env;
    CHECK_OK(env_start(&env, &argc, &argv));
    CHECK(env.size == 1 && env.rank == 0);
    env_end(&env);
    return check_report();
}

/* Rank 0 never takes part: the others must not wait for ever. */
static int hang_main(struct env *env)
{
    struct collective c;
    float x[8] = {0};
    struct tensor t = tensor_1d(x, DT_F32, 8);
    CHECK_OK(env_grid(env, env->size));
    CHECK_OK(coll_mpi_open(&c, env, 0.5, sizeof x));
    if (env->rank == 0) {
        sleep(30);
    }
    CHECK_OK(collective_all_reduce_sum(&c, &t));
    printf("nobody ended the job\n");
    return 1;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    if (strcmp(mode, "srun") == 0) {
        return srun_main(argc, argv);
    }
    if (strcmp(mode, "hang") != 0) {
        test_watchdog();
    }
    if (getenv("OMPI_COMM_WORLD_SIZE")) {
        // mpirun inside an allocation, whatever the number of its tasks: not refused
        setenv("SLURM_NTASKS", "8", 1);
        setenv("SLURM_PROCID", "0", 1);
        setenv("SLURM_STEP_ID", "0", 1);
    }
    struct env env;
    CHECK_OK(env_start(&env, &argc, &argv));
    if (env.world == MPI_COMM_NULL) {
        return check_report();
    }
    if (strcmp(mode, "hang") == 0) {
        return hang_main(&env);
    }
    test_agree(&env);
    test_text(&env);
    test_same_text(&env);
    test_grid(&env);
    test_sums(&env);
    test_gathers(&env);
    test_broadcasts(&env);
    env_end(&env);
    env_end(&env);
    return check_report();
}
