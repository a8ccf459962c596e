/* CUDA kernels on the host, for tests: every thread of a block is a fiber, blocks run one after the
 * other in a seeded order, and threads are switched in a seeded order wherever they wait (barriers,
 * shuffles). Found and reported (gpu_launched says kernel, block and threads):
 *   a data race on a SHARED array: two threads, one writing, no barrier between;
 *   an index outside a SHARED array; a read of an element nobody has written;
 *   a barrier or shuffle that not all threads (of the mask) reach, or that they reach at
 *   different places.
 * An index outside a device buffer ends at a guard page (or AddressSanitizer says so). Seen by
 * comparing the results of two seeds: whatever depends on the order of blocks or threads.
 * What this cannot show: races between threads on global memory whose result happens to be the
 * same; memory ordering weaker than the host's; alignment and coalescing; registers, occupancy and
 * speed; the device's own expf, logf and division (they differ in the last bits); more than one
 * stream; anything of tensor cores.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_EMULATE_H
#define PMPD_KERNELS_EMULATE_H

#undef _FORTIFY_SOURCE // its longjmp refuses to change stacks
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c)
    {
    }
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __ldg(p) (*(p))

namespace emulate
{

enum { WARP_SIZE = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP_SIZE };

/* One fiber, as the code that runs in it sees it. */
struct thread {
    int id;
    dim3 index;
    bool done;
    const void *waits_at; /* the place of the barrier or shuffle it is in; NULL: it can run */
};

/* Meeting of a warp: values of one generation are kept while those of the next come in. */
struct warp {
    uint64_t value[2][WARP_SIZE];
    unsigned generation, arrived, mask, done; /* done: lanes that have ended */
    const void *place;
    unsigned synced; /* number of __syncwarp so far */
};

struct block {
    uint64_t serial; /* 1, 2, ... over all launches */
    dim3 index, dim, grid;
    int n_threads, n_done, n_at_barrier;
    unsigned barriers; /* passed so far */
    const void *barrier_place;
    struct warp warps[MAX_WARPS];
};

extern struct thread *self;
extern struct block now;

/* Ends the launch: the text is what gpu_launched will say. Never returns to the kernel. */
[[noreturn]] void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void barrier(const void *place);
uint64_t shuffle(unsigned mask, uint64_t value, int from, const void *place);
void sync_warp(unsigned mask, const void *place);
/* Runs a launch; errors are kept for gpu_launched. */
void launch(dim3 grid, dim3 dim, const std::function<void()> &kernel);
/* Seed of the order of blocks and threads from now on. */
void set_seed(uint64_t seed);

/* Who touched one element of a shared array last. */
struct touch {
    int16_t thread; /* -1: nobody */
    uint16_t warp_synced;
    unsigned barriers;
};

static inline bool unordered(const struct touch *t)
{
    if (t->thread < 0 || t->thread == self->id || t->barriers != now.barriers) {
        return false;
    }
    int mine = self->id / WARP_SIZE;
    return t->thread / WARP_SIZE != mine || t->warp_synced == (uint16_t)now.warps[mine].synced;
}

static inline struct touch touched()
{
    return {(int16_t)self->id, (uint16_t)now.warps[self->id / WARP_SIZE].synced, now.barriers};
}

struct history {
    struct touch write, read, read_before; /* the last two readers */
};

void report_race(const char *array, long at, const char *what, int other);

template <typename T> struct element {
    T *value;
    history *past;
    const char *array;
    long at;

    operator T() const
    {
        if (past->write.thread < 0) {
            fail("%s[%ld] is read by thread %d, but nobody has written it", array, at, self->id);
        }
        if (unordered(&past->write)) {
            report_race(array, at, "read after a write", past->write.thread);
        }
        if (past->read.thread != self->id) {
            past->read_before = past->read;
        }
        past->read = touched();
        return *value;
    }
    T operator=(T v) const
    {
        const struct touch *all[] = {&past->write, &past->read, &past->read_before};
        for (const struct touch *t : all) {
            if (unordered(t)) {
                report_race(array, at, "written", t->thread);
            }
        }
        past->write = touched();
        *value = v;
        return v;
    }
    T operator=(const element &other) const
    {
        return *this = (T)other;
    }
    T operator+=(T v) const
    {
        return *this = (T) * this + v;
    }
};

/* A pointer into a shared array. */
template <typename T> struct shared_ptr {
    T *values;
    history *past;
    const char *array;
    long first, count;

    element<T> operator[](long i) const
    {
        long at = first + i;
        if (at < 0 || at >= count) {
            fail("%s[%ld] is outside its %ld elements (thread %d)", array, at, count, self->id);
        }
        return {values + at, past + at, array, at};
    }
    shared_ptr operator+(long n) const
    {
        return {values, past, array, first + n, count};
    }
    element<T> operator*() const
    {
        return (*this)[0];
    }
};

/* At its first use in a block it forgets what it held. */
template <typename T, long N> struct shared_array {
    const char *name;
    uint64_t block; /* of the last use */
    T values[N];
    history past[N];

    explicit shared_array(const char *text) : name(text), block(0)
    {
    }
    operator shared_ptr<T>()
    {
        if (block != now.serial) {
            block = now.serial;
            memset((void *)values, 0xff, sizeof values); /* NaN */
            for (long i = 0; i < N; i++) {
                past[i].write.thread = past[i].read.thread = past[i].read_before.thread = -1;
            }
        }
        return {values, past, name, 0, N};
    }
    element<T> operator[](long i)
    {
        return ((shared_ptr<T>)*this)[i];
    }
    shared_ptr<T> operator+(long n)
    {
        return (shared_ptr<T>)*this + n;
    }
};

template <typename T> uint64_t to_word(T v)
{
    uint64_t w = 0;
    static_assert(sizeof v <= sizeof w, "a shuffle moves at most 8 bytes");
    memcpy(&w, &v, sizeof v);
    return w;
}

template <typename T> T from_word(uint64_t w)
{
    T v;
    memcpy(&v, &w, sizeof v);
    return v;
}

template <typename T> T exchange(unsigned mask, T v, int from, const void *place)
{
    return from_word<T>(shuffle(mask, to_word(v), from, place));
}

static inline int lane()
{
    return self->id % WARP_SIZE;
}

/* Lanes beyond the warp's end get their own value back, as on the device. */
static inline int lane_below(int d)
{
    return lane() + d < WARP_SIZE ? lane() + d : lane();
}

} // namespace emulate

#define SHARED(type, name, count) static emulate::shared_array<type, (count)> name(#name)
#define shared_ptr_of(type) emulate::shared_ptr<type>
#define LAUNCH(kernel, grid, block, gpu, ...) \
    ((void)(gpu), emulate::launch((grid), (block), [=] { (kernel)(__VA_ARGS__); }))

#define threadIdx (emulate::self->index)
#define blockIdx (emulate::now.index)
#define blockDim (emulate::now.dim)
#define gridDim (emulate::now.grid)

/* The address of a label-like static tells one place in the source from another. */
#define EMULATE_PLACE       \
    ([]() -> const void * { \
        static char place;  \
        return &place;      \
    }())
#define __syncthreads() emulate::barrier(EMULATE_PLACE)
#define __syncwarp(...) emulate::sync_warp(0xffffffffu, EMULATE_PLACE)
#define __shfl_sync(mask, v, from) emulate::exchange((mask), (v), (int)(from), EMULATE_PLACE)
#define __shfl_xor_sync(mask, v, d) \
    emulate::exchange((mask), (v), emulate::lane() ^ (int)(d), EMULATE_PLACE)
#define __shfl_down_sync(mask, v, d) \
    emulate::exchange((mask), (v), emulate::lane_below((int)(d)), EMULATE_PLACE)

static inline int __popc(unsigned v)
{
    return __builtin_popcount(v);
}
static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)(((uint64_t)a * b) >> 32);
}
static inline float __uint_as_float(unsigned v)
{
    return emulate::from_word<float>(v);
}
static inline unsigned __float_as_uint(float v)
{
    return (unsigned)emulate::to_word(v);
}

#endif
