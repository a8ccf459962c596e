/* SPDX-License-Identifier: Apache-2.0 */
#include <limits.h>
#include <stdint.h>
#include <string.h>

#include "core/collective.h"
#include "core/mem.h"
#include "dist/env.h"
#include "dist/watchdog.h"

/* A sum of up to GATHER_FLOATS is gathered whole and added by every rank: one message. A longer one
 * is cut into a slice per rank, so that each number travels twice instead of `size` times. Both add
 * the same numbers in the same order, so the bits do not tell which way was taken. */
enum { GATHER_FLOATS = 4096, PIECE_FLOATS = 1 << 20, PIECE_MIN_FLOATS = 1 << 14 };
enum { BROADCAST_PIECE = 1 << 30 };

struct coll_mpi {
    MPI_Comm comm; /* borrowed from env */
    double timeout_s;
    float *buffer;        /* (buffer_floats) owned */
    size_t piece_floats;  /* of one exchange; the same on every rank */
    int *counts, *places; /* (size) owned */
};

#define TRY_WATCHED(m, what, call)                                                  \
    do {                                                                            \
        watchdog_enter(what, (m)->timeout_s);                                       \
        int rc_watched_ = (call);                                                   \
        watchdog_leave();                                                           \
        if (rc_watched_ != MPI_SUCCESS) {                                           \
            return env_mpi_check(rc_watched_, #call, __FILE__, __LINE__, __func__); \
        }                                                                           \
    } while (0)

/* out = row 0 + row 1 + ... of parts (n_rows, n), one after the other. out is not in parts. */
static void add_rows(float *out, const float *parts, int n_rows, size_t n)
{
    memcpy(out, parts, n * sizeof *out);
    for (int r = 1; r < n_rows; r++) {
        const float *row = parts + (size_t)r * n;
        for (size_t i = 0; i < n; i++) {
            out[i] += row[i];
        }
    }
}

static enum status sum_short(struct collective *c, float *x, size_t n)
{
    struct coll_mpi *m = c->impl;
    TRY_WATCHED(m, "all-reduce",
                MPI_Allgather(x, (int)n, MPI_FLOAT, m->buffer, (int)n, MPI_FLOAT, m->comm));
    add_rows(x, m->buffer, c->size, n);
    return ST_OK;
}

static size_t slice_at(size_t n, int size, int rank)
{
    return n * (size_t)rank / (size_t)size;
}

static enum status sum_long(struct collective *c, float *x, size_t n)
{
    struct coll_mpi *m = c->impl;
    size_t begin = slice_at(n, c->size, c->rank);
    size_t mine = slice_at(n, c->size, c->rank + 1) - begin;
    int *sent = m->counts, *from = m->places;
    for (int r = 0; r < c->size; r++) {
        from[r] = (int)slice_at(n, c->size, r);
        sent[r] = (int)slice_at(n, c->size, r + 1) - from[r];
    }
    // my slice of every rank's x, one row per rank
    int *got = m->counts + c->size, *to = m->places + c->size;
    for (int r = 0; r < c->size; r++) {
        got[r] = (int)mine;
        to[r] = r * (int)mine;
    }
    TRY_WATCHED(m, "all-reduce",
                MPI_Alltoallv(x, sent, from, MPI_FLOAT, m->buffer, got, to, MPI_FLOAT, m->comm));
    add_rows(x + begin, m->buffer, c->size, mine);
    TRY_WATCHED(
        m, "all-reduce",
        MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, x, sent, from, MPI_FLOAT, m->comm));
    return ST_OK;
}

static enum status mpi_all_reduce_sum(struct collective *c, struct tensor *x)
{
    struct coll_mpi *m = c->impl;
    float *at = x->data;
    for (size_t left = tensor_count(x); left > 0;) {
        size_t n = left < m->piece_floats ? left : m->piece_floats;
        if (n <= GATHER_FLOATS) {
            TRY(sum_short(c, at, n));
        } else {
            TRY(sum_long(c, at, n));
        }
        at += n;
        left -= n;
    }
    return ST_OK;
}

static MPI_Datatype type_of_bytes(size_t bytes)
{
    switch (bytes) {
    case 1:
        return MPI_UINT8_T;
    case 2:
        return MPI_UINT16_T;
    case 4:
        return MPI_UINT32_T;
    case 8:
        return MPI_UINT64_T;
    default:
        return MPI_DATATYPE_NULL;
    }
}

static enum status mpi_all_gather(struct collective *c, struct tensor *whole,
                                  const struct tensor *part, const size_t *counts)
{
    struct coll_mpi *m = c->impl;
    size_t place = 0, mine = 0, bytes = dtype_bytes(whole->dtype);
    for (int r = 0; r < c->size; r++) {
        if (counts[r] > INT_MAX || place > INT_MAX) {
            FAIL(ST_SHAPE, "all-gather: %zu elements at %zu from rank %d, MPI counts up to %d",
                 counts[r], place, r, INT_MAX);
        }
        m->counts[r] = (int)counts[r];
        m->places[r] = (int)place;
        mine = r == c->rank ? place : mine;
        place += counts[r];
    }
    char *own = (char *)whole->data + mine * bytes;
    if (own != part->data && counts[c->rank] > 0) {
        memmove(own, part->data, counts[c->rank] * bytes);
    }
    MPI_Datatype type = type_of_bytes(bytes);
    TRY_WATCHED(m, "all-gather",
                MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, whole->data, m->counts,
                               m->places, type, m->comm));
    return ST_OK;
}

static enum status mpi_broadcast(struct collective *c, struct tensor *x, int root)
{
    struct coll_mpi *m = c->impl;
    char *at = x->data;
    for (size_t left = tensor_bytes(x); left > 0;) {
        int n = left < BROADCAST_PIECE ? (int)left : BROADCAST_PIECE;
        TRY_WATCHED(m, "broadcast", MPI_Bcast(at, n, MPI_BYTE, root, m->comm));
        at += n;
        left -= (size_t)n;
    }
    return ST_OK;
}

static void mpi_close(struct collective *c)
{
    struct coll_mpi *m = c->impl;
    if (m) {
        mem_free(m->buffer);
        mem_free(m->counts);
        mem_free(m->places);
        mem_free(m);
    }
    c->impl = NULL;
}

static const struct collective_ops mpi_ops = {
    .name = "mpi",
    .all_reduce_sum = mpi_all_reduce_sum,
    .all_gather = mpi_all_gather,
    .broadcast = mpi_broadcast,
    .close = mpi_close,
};

enum status coll_mpi_open(struct collective *out, struct env *env, double timeout_s,
                          size_t max_bytes_hint)
{
    if (env->tensor_size == 1 || env->replica < 0) {
        collective_local(out);
        return ST_OK;
    }
    struct collective c = {.ops = &mpi_ops, .rank = env->tensor_rank, .size = env->tensor_size};
    struct coll_mpi *m = NULL;
    enum status st = ST_OK;
    TRY(MEM_NEW(&m, 1));
    c.impl = m;
    m->comm = env->replica_comm;
    m->timeout_s = timeout_s;
    m->piece_floats = max_bytes_hint / sizeof(float);
    if (m->piece_floats < PIECE_MIN_FLOATS) {
        m->piece_floats = PIECE_MIN_FLOATS;
    }
    if (m->piece_floats > PIECE_FLOATS) {
        m->piece_floats = PIECE_FLOATS;
    }
    // the longest slice, once per rank; or a short sum, once per rank
    size_t size = (size_t)c.size, buffer = (m->piece_floats / size + 1) * size;
    if (buffer < size * GATHER_FLOATS) {
        buffer = size * GATHER_FLOATS;
    }
    TRY_GOTO(st, MEM_NEW(&m->buffer, buffer), failed);
    TRY_GOTO(st, MEM_NEW(&m->counts, 2 * size), failed);
    TRY_GOTO(st, MEM_NEW(&m->places, 2 * size), failed);
    if (timeout_s > 0) {
        TRY_GOTO(st, watchdog_start(env->rank), failed);
    }
    *out = c;
    return ST_OK;
failed:
    mpi_close(&c);
    return st;
}
