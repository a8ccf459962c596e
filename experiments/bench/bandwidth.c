/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE // sched_setaffinity, madvise
#include "experiments/bench/bandwidth.h"

#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "core/log.h"
#include "experiments/bench/machine.h"
#include "experiments/bench/statistics.h"

enum { LINE = 64, LINES = 4, PAGE = 4096, MOST_PASSES = 16, N_STREAMS = 3 };
static const size_t buffer_least = (size_t)64 << 20, buffer_most = (size_t)1 << 30;
static const int streams_of[N_STREAMS] = {1, 2, 4};

/* ---- reading ---- */

typedef uint64_t line __attribute__((vector_size(LINE), may_alias));
typedef void read_fn(uint64_t *sum, const char *p, size_t bytes, int streams);

/* Four lines at a time, of one, two or four places. */
static inline __attribute__((always_inline)) void read_streams(uint64_t *sum, const char *p,
                                                               size_t bytes, int streams)
{
    const int lines = LINES / streams;
    size_t stretch = bytes / (size_t)streams;
    line a[LINES] = {{0}};
    for (size_t at = 0; at < stretch; at += (size_t)(LINE * lines)) {
        for (int s = 0; s < streams; s++) {
            for (int l = 0; l < lines; l++) {
                const char *from = p + (size_t)s * stretch + at + (size_t)(LINE * l);
                a[s * lines + l] += *(const line *)from;
            }
        }
    }
    for (int i = 0; i < LINES; i++) {
        for (int j = 0; j < LINE / 8; j++) {
            *sum += a[i][j];
        }
    }
}

static inline __attribute__((always_inline)) void read_any(uint64_t *sum, const char *p,
                                                           size_t bytes, int streams)
{
    switch (streams) {
    case 1:
        read_streams(sum, p, bytes, 1);
        break;
    case 2:
        read_streams(sum, p, bytes, 2);
        break;
    default:
        read_streams(sum, p, bytes, 4);
        break;
    }
}

static void read_plain(uint64_t *sum, const char *p, size_t bytes, int streams)
{
    read_any(sum, p, bytes, streams);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static void read_avx2(uint64_t *sum, const char *p, size_t bytes,
                                                      int streams)
{
    read_any(sum, p, bytes, streams);
}

__attribute__((target("avx512f"))) static void read_avx512(uint64_t *sum, const char *p,
                                                           size_t bytes, int streams)
{
    read_any(sum, p, bytes, streams);
}

static read_fn *choose_reader(void)
{
    return __builtin_cpu_supports("avx512f") ? read_avx512
           : __builtin_cpu_supports("avx2")  ? read_avx2
                                             : read_plain;
}
#else
static read_fn *choose_reader(void)
{
    return read_plain;
}
#endif

/* ---- threads ---- */

/* Pins the calling thread to the nth of the CPUs that it may use; *before gets what it had. A
 * thread that is bound already stays where it is. */
static bool pin(cpu_set_t *before, int nth)
{
    if (sched_getaffinity(0, sizeof *before, before) != 0 || CPU_COUNT(before) < 2) {
        return false;
    }
    nth %= CPU_COUNT(before);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, before) && nth-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            return sched_setaffinity(0, sizeof one, &one) == 0;
        }
    }
    return false;
}

/* Seconds from the first thread's start to the last one's end; streams 0: write, don't read. */
static double one_pass(struct bandwidth *bw, int streams)
{
    read_fn *read = choose_reader();
    size_t part = bw->bytes / (size_t)bw->n_threads;
    double start = 0, end = 0;
    uint64_t sum = 0;
#pragma omp parallel num_threads(bw->n_threads) reduction(+ : sum)
    {
        int t = omp_get_thread_num();
        cpu_set_t before;
        bool pinned = pin(&before, bw->first_cpu + t);
#pragma omp barrier
#pragma omp master
        start = clock_s();
        if (streams == 0) {
            memset(bw->buffer + (size_t)t * part, 1, part);
        } else {
            read(&sum, bw->buffer + (size_t)t * part, part, streams);
        }
#pragma omp barrier
#pragma omp master
        end = clock_s();
        if (pinned) {
            sched_setaffinity(0, sizeof before, &before);
        }
    }
    bw->sum += sum;
    return end - start;
}

/* ---- the probe ---- */

size_t bandwidth_usual_bytes(void)
{
    size_t bytes = 8 * machine_cache_bytes();
    return bytes < buffer_least ? buffer_least : bytes > buffer_most ? buffer_most : bytes;
}

enum status bandwidth_open(struct bandwidth *out, struct env *env, int n_threads, int local_rank,
                           int n_local_ranks, size_t node_bytes)
{
    /* An odd number of pages to a stream: streams that begin a power of two apart would meet in the
     * same sets of the caches. */
    size_t n_parts = (size_t)n_threads * (size_t)n_local_ranks;
    size_t pages = node_bytes / n_parts / (LINES * PAGE) | (size_t)1;
    *out = (struct bandwidth){.env = env, .n_threads = n_threads};
    out->first_cpu = local_rank * n_threads;
    out->bytes = pages * LINES * PAGE * (size_t)n_threads;
    void *p = mmap(NULL, out->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        size_t bytes = out->bytes;
        *out = (struct bandwidth){0};
        FAIL(ST_NOMEM, "no memory for the bandwidth probe's buffer of %zu bytes", bytes);
    }
    madvise(p, out->bytes, MADV_HUGEPAGE);
    out->buffer = p;
    one_pass(out, 0);
    return ST_OK;
}

void bandwidth_close(struct bandwidth *bw)
{
    if (bw->buffer) {
        munmap(bw->buffer, bw->bytes);
    }
    *bw = (struct bandwidth){0};
}

enum status bandwidth_measure(struct bandwidth *bw, int n_passes, double *gb_s)
{
    double best = 0;
    INVARIANT(n_passes >= 1 && n_passes <= MOST_PASSES);
    for (int s = 0; s < N_STREAMS; s++) {
        double rate[MOST_PASSES];
        for (int i = 0; i < n_passes; i++) {
            TRY_MPI(MPI_Barrier(bw->env->replica_comm));
            double seconds = one_pass(bw, streams_of[s]), bytes = (double)bw->bytes, longest, all;
            TRY_MPI(
                MPI_Allreduce(&seconds, &longest, 1, MPI_DOUBLE, MPI_MAX, bw->env->replica_comm));
            TRY_MPI(MPI_Allreduce(&bytes, &all, 1, MPI_DOUBLE, MPI_SUM, bw->env->replica_comm));
            rate[i] = 1e-9 * all / longest;
        }
        double median = spread_of(rate, n_passes).median;
        best = median > best ? median : best;
    }
    *gb_s = best;
    return ST_OK;
}
