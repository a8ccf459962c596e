/* kernels/gpu.h and kernels/emulate.h on the host: fibers, their order, and memory whose ends are
 * guarded.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <errno.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "kernels/device.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
static inline void __sanitizer_start_switch_fiber(void **, const void *, size_t)
{
}
static inline void __sanitizer_finish_switch_fiber(void *, const void **, size_t *)
{
}
#endif

/* ---- fibers ---- */

namespace emulate
{

struct thread *self;
struct block now;

enum { STACK_BYTES = ASAN ? 256 * 1024 : 64 * 1024, ERROR_BYTES = 512 };

struct fiber {
    struct thread thread;
    jmp_buf at;
    bool begun;
    void *fake_stack; /* AddressSanitizer's */
    ucontext_t first; /* enters the stack; later switches are cheaper */
};

static struct fiber fibers[MAX_THREADS];
static unsigned char *stacks; /* (MAX_THREADS, STACK_BYTES), mapped once and kept */
static jmp_buf scheduler;
enum { CAME_BACK = 1, FAILED = 2 };
static const void *own_stack; /* the scheduler's */
static size_t own_stack_bytes;
static const std::function<void()> *body;
static uint64_t random_state = 1;
static char error_text[ERROR_BYTES];

void set_seed(uint64_t seed)
{
    random_state = seed * 2 + 1;
}

/* splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014) */
static uint64_t next_random()
{
    uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void shuffle_order(unsigned *order, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        order[i] = i;
    }
    for (unsigned i = n; i > 1; i--) {
        unsigned j = (unsigned)(next_random() % i), kept = order[i - 1];
        order[i - 1] = order[j];
        order[j] = kept;
    }
}

void fail(const char *fmt, ...)
{
    va_list ap;
    int n = snprintf(error_text, sizeof error_text, "block (%u, %u, %u): ", now.index.x,
                     now.index.y, now.index.z);
    va_start(ap, fmt);
    vsnprintf(error_text + n, sizeof error_text - (size_t)n, fmt, ap);
    va_end(ap);
    __sanitizer_start_switch_fiber(NULL, own_stack, own_stack_bytes);
    _longjmp(scheduler, FAILED);
}

void report_race(const char *array, long at, const char *what, int other)
{
    fail("%s[%ld] is %s by thread %d and touched by thread %d with no barrier between", array, at,
         what, self->id, other);
}

/* Back to the scheduler; returns when it comes back here. */
static void yield()
{
    struct fiber *f = &fibers[self->id];
    if (_setjmp(f->at) == 0) {
        __sanitizer_start_switch_fiber(&f->fake_stack, own_stack, own_stack_bytes);
        _longjmp(scheduler, CAME_BACK);
    }
    __sanitizer_finish_switch_fiber(f->fake_stack, NULL, NULL);
}

static void enter()
{
    __sanitizer_finish_switch_fiber(NULL, &own_stack, &own_stack_bytes);
    (*body)();
    self->done = true;
    now.warps[self->id / WARP_SIZE].done |= 1u << lane();
    __sanitizer_start_switch_fiber(NULL, own_stack, own_stack_bytes);
    _longjmp(scheduler, CAME_BACK);
}

static void resume(struct fiber *f, void **fake_stack)
{
    unsigned char *stack = stacks + (size_t)f->thread.id * STACK_BYTES;
    self = &f->thread;
    __sanitizer_start_switch_fiber(fake_stack, stack, STACK_BYTES);
    if (f->begun) {
        _longjmp(f->at, 1);
    }
    f->begun = true;
    getcontext(&f->first);
    f->first.uc_stack.ss_sp = stack;
    f->first.uc_stack.ss_size = STACK_BYTES;
    f->first.uc_link = NULL;
    makecontext(&f->first, enter, 0);
    setcontext(&f->first);
}

void barrier(const void *place)
{
    if (now.n_at_barrier == 0) {
        now.barrier_place = place;
    } else if (now.barrier_place != place) {
        fail("thread %d is at another __syncthreads than the threads before it", self->id);
    }
    if (now.n_done > 0) {
        fail("thread %d is at a __syncthreads that %d threads have passed by and ended", self->id,
             now.n_done);
    }
    unsigned mine = now.barriers;
    if (++now.n_at_barrier == now.n_threads) {
        now.n_at_barrier = 0;
        now.barriers++;
        for (int i = 0; i < now.n_threads; i++) {
            fibers[i].thread.waits_at = NULL;
        }
        return;
    }
    self->waits_at = place;
    while (now.barriers == mine) {
        yield();
    }
}

/* All lanes of the mask meet; returns the number of their meeting. Lanes of a warp that meet in two
 * groups at once are not supported: it is an error. */
static unsigned meet(unsigned mask, uint64_t value, const void *place, bool orders_memory)
{
    struct warp *w = &now.warps[self->id / WARP_SIZE];
    int first = self->id / WARP_SIZE * WARP_SIZE;
    int n_lanes = now.n_threads - first < WARP_SIZE ? now.n_threads - first : WARP_SIZE;
    unsigned present = n_lanes == WARP_SIZE ? 0xffffffffu : (1u << n_lanes) - 1;
    mask &= present;
    if (!(mask >> lane() & 1)) {
        fail("thread %d is at a warp operation whose mask leaves it out", self->id);
    }
    if (w->arrived == 0) {
        w->place = place;
        w->mask = mask;
    } else if (w->place != place || w->mask != mask) {
        fail("thread %d is at another warp operation than the lanes before it", self->id);
    }
    if (mask & w->done) {
        fail("thread %d is at a warp operation that thread %d has passed by and ended", self->id,
             first + __builtin_ctz(mask & w->done));
    }
    unsigned mine = w->generation;
    w->value[mine & 1][lane()] = value;
    w->arrived++;
    if ((int)w->arrived == __builtin_popcount(mask)) {
        w->arrived = 0;
        w->generation++;
        w->synced += orders_memory;
        for (int i = 0; i < n_lanes; i++) {
            if (mask >> i & 1) {
                fibers[first + i].thread.waits_at = NULL;
            }
        }
        return mine;
    }
    self->waits_at = place;
    while (w->generation == mine) {
        yield();
    }
    return mine;
}

uint64_t shuffle(unsigned mask, uint64_t value, int from, const void *place)
{
    struct warp *w = &now.warps[self->id / WARP_SIZE];
    unsigned mine = meet(mask, value, place, false);
    from &= WARP_SIZE - 1;
    if (!(w->mask >> from & 1)) {
        fail("thread %d reads lane %d, which is not in the mask of the shuffle", self->id, from);
    }
    return w->value[mine & 1][from];
}

void sync_warp(unsigned mask, const void *place)
{
    meet(mask, 0, place, true);
}

/* In a function of its own: what is live across _setjmp must not be in registers. */
__attribute__((noinline)) static bool run_until_it_waits(struct fiber *f, void **fake_stack)
{
    int came = _setjmp(scheduler);
    if (came == 0) {
        resume(f, fake_stack);
    }
    __sanitizer_finish_switch_fiber(*fake_stack, NULL, NULL);
    return came != FAILED;
}

/* One thread after another, in a new order each round, until all are done or nobody can move. */
static bool run_block()
{
    static unsigned order[MAX_THREADS];
    static void *fake_stack;
    while (now.n_done < now.n_threads) {
        bool moved = false;
        shuffle_order(order, (unsigned)now.n_threads);
        for (int i = 0; i < now.n_threads; i++) {
            struct fiber *f = &fibers[order[i]];
            if (!f->thread.done && !f->thread.waits_at) {
                moved = true;
                if (!run_until_it_waits(f, &fake_stack)) {
                    return false;
                }
                now.n_done += f->thread.done;
            }
        }
        if (!moved) {
            snprintf(error_text, sizeof error_text,
                     "block (%u, %u, %u): the threads wait for each other: a barrier or shuffle "
                     "that some never reach",
                     now.index.x, now.index.y, now.index.z);
            return false;
        }
    }
    return true;
}

static void begin_block(dim3 index, dim3 grid, dim3 dim)
{
    static uint64_t serial;
    memset((void *)&now, 0, sizeof now);
    now.serial = ++serial;
    now.index = index;
    now.grid = grid;
    now.dim = dim;
    now.n_threads = (int)(dim.x * dim.y * dim.z);
    for (int i = 0; i < now.n_threads; i++) {
        unsigned t = (unsigned)i;
        fibers[i].begun = false;
        fibers[i].thread = {i, dim3(t % dim.x, t / dim.x % dim.y, t / (dim.x * dim.y)), false,
                            NULL};
    }
}

static size_t greatest_common_divisor(size_t a, size_t b)
{
    while (b != 0) {
        size_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static void run_grid(dim3 grid, dim3 dim)
{
    size_t n = (size_t)grid.x * grid.y * grid.z;
    /* a step that has no factor in common with n visits every block once, in another order */
    size_t step = n > 1 ? (size_t)(next_random() % n) | 1 : 1, at = 0;
    while (n > 1 && greatest_common_divisor(step, n) != 1) {
        step++;
    }
    for (size_t i = 0; i < n; i++, at = (at + step) % n) {
        dim3 index((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y),
                   (unsigned)(at / ((size_t)grid.x * grid.y)));
        begin_block(index, grid, dim);
        if (!run_block()) {
            return; /* the other fibers are dropped where they stand */
        }
    }
}

void launch(dim3 grid, dim3 dim, const std::function<void()> &kernel)
{
    if (error_text[0]) {
        return; /* as on a device: after a fault nothing runs any more */
    }
    body = &kernel;
    memset((void *)&now, 0, sizeof now);
    size_t n_threads = (size_t)dim.x * dim.y * dim.z;
    if (n_threads == 0 || n_threads > MAX_THREADS || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.y > 65535 || grid.z > 65535) {
        snprintf(error_text, sizeof error_text, "a grid of (%u, %u, %u) blocks of %zu threads",
                 grid.x, grid.y, grid.z, n_threads);
        return;
    }
    if (!stacks) {
        void *p = mmap(NULL, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            snprintf(error_text, sizeof error_text, "no memory for %d stacks", (int)MAX_THREADS);
            return;
        }
        stacks = (unsigned char *)p;
    }
    run_grid(grid, dim);
}

} // namespace emulate

/* ---- memory ---- */

using namespace emulate;

/* A block of device memory ends at a page that nobody may touch. Under AddressSanitizer malloc does
 * better. */
struct allocation {
    void *base;
    size_t mapped;
    struct allocation *next;
    void *ptr;
};
static struct allocation *allocations;

extern "C" enum status gpu_open(struct gpu *g, int device)
{
    (void)device;
    memset(g, 0, sizeof *g);
    snprintf(g->name, sizeof g->name, "emulated");
    snprintf(g->arch, sizeof g->arch, "emulated");
    g->impl = &fibers;
    g->n_processors = 4;
    g->page_bytes = (size_t)64 << 10;
    error_text[0] = '\0';
    const char *seed = getenv("PMPD_EMULATE_SEED"); /* another order of blocks and threads */
    if (seed) {
        set_seed(strtoull(seed, NULL, 10));
    }
    return ST_OK;
}

extern "C" void gpu_close(struct gpu *g)
{
    memset(g, 0, sizeof *g);
}

extern "C" enum status gpu_alloc(struct gpu *g, void **out, size_t bytes)
{
    (void)g;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + 15) / 16 * 16;
    if (bytes > SIZE_MAX / 2) {
        FAIL(ST_NOMEM, "the GPU has no %zu bytes", bytes);
    }
    struct allocation *a = (struct allocation *)calloc(1, sizeof *a);
    if (!a) {
        FAIL(ST_NOMEM, "no memory for an allocation of %zu bytes", bytes);
    }
    if (ASAN) {
        a->base = a->ptr = calloc(1, bytes ? bytes : 1);
    } else {
        a->mapped = (room + page - 1) / page * page + page;
        a->base = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        a->base = a->base == MAP_FAILED ? NULL : a->base;
    }
    if (!a->base) {
        free(a);
        FAIL(ST_NOMEM, "the GPU has no %zu bytes", bytes);
    }
    if (!ASAN) {
        unsigned char *guard = (unsigned char *)a->base + a->mapped - page;
        mprotect(guard, page, PROT_NONE);
        a->ptr = guard - room;
    }
    a->next = allocations;
    allocations = a;
    *out = a->ptr;
    return ST_OK;
}

extern "C" void gpu_release(struct gpu *g, void *ptr)
{
    (void)g;
    for (struct allocation **at = &allocations; *at; at = &(*at)->next) {
        struct allocation *a = *at;
        if (a->ptr == ptr) {
            *at = a->next;
            if (ASAN) {
                free(a->base);
            } else {
                munmap(a->base, a->mapped);
            }
            free(a);
            return;
        }
    }
}

extern "C" enum status gpu_upload(struct gpu *g, void *dst, const void *src_host, size_t bytes)
{
    (void)g;
    memcpy(dst, src_host, bytes);
    return ST_OK;
}

extern "C" enum status gpu_upload_rows(struct gpu *g, void *dst, size_t dst_stride,
                                       const void *src_host, size_t src_stride, size_t row_bytes,
                                       size_t n_rows)
{
    (void)g;
    for (size_t r = 0; r < n_rows; r++) {
        memcpy((unsigned char *)dst + r * dst_stride,
               (const unsigned char *)src_host + r * src_stride, row_bytes);
    }
    return ST_OK;
}

extern "C" enum status gpu_download(struct gpu *g, void *dst_host, const void *src, size_t bytes)
{
    TRY(gpu_sync(g));
    memcpy(dst_host, src, bytes);
    return ST_OK;
}

extern "C" enum status gpu_zero(struct gpu *g, void *dst, size_t bytes)
{
    (void)g;
    memset(dst, 0, bytes);
    return ST_OK;
}

extern "C" enum status gpu_sync(struct gpu *g)
{
    return gpu_launched(g, "an earlier kernel");
}

extern "C" enum status gpu_launched(struct gpu *g, const char *kernel)
{
    (void)g;
    if (error_text[0]) {
        FAIL(ST_CUDA, "%s: %s", kernel, error_text);
    }
    return ST_OK;
}

extern "C" enum status gpu_reserve(struct gpu *g, void **out, size_t bytes)
{
    (void)g;
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        FAIL(ST_NOMEM, "no address space of %zu bytes: %s", bytes, strerror(errno));
    }
    *out = p;
    return ST_OK;
}

extern "C" void gpu_unreserve(struct gpu *g, void *begin, size_t bytes)
{
    (void)g;
    munmap(begin, bytes);
}

extern "C" enum status gpu_commit(struct gpu *g, void *begin, size_t bytes)
{
    (void)g;
    if (mprotect(begin, bytes, PROT_READ | PROT_WRITE) != 0) {
        FAIL(ST_NOMEM, "the GPU has no %zu bytes: %s", bytes, strerror(errno));
    }
    memset(begin, 0xa5, bytes); /* fresh pages hold anything */
    return ST_OK;
}

extern "C" void gpu_decommit(struct gpu *g, void *begin, size_t bytes)
{
    (void)g;
    madvise(begin, bytes, MADV_DONTNEED);
    mprotect(begin, bytes, PROT_NONE);
}
