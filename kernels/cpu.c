/* cpu: threads (OpenMP) over rows, heads and tokens, inner loops by instruction set (cpu.h). Owns
 * the backend's life, its table, and how work is shared out.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu.h"

#include <omp.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/kernels.h"

enum { MAX_THREADS = 1024 };

/* The instruction set called name; "auto": the widest that this processor has. */
static enum status choose_isa(const struct cpu_isa **out, const char *name)
{
    const struct cpu_isa *const known[] = {cpu_isa_avx512(), cpu_isa_avx2(), &cpu_isa_scalar};
    char here[64] = "";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!known[i]) {
            continue;
        }
        if (strcmp(name, "auto") == 0 || strcmp(name, known[i]->name) == 0) {
            *out = known[i];
            return ST_OK;
        }
        strcat(here, " ");
        strcat(here, known[i]->name);
    }
    FAIL(ST_UNSUPPORTED,
         "the instruction set \"%s\" is not to be had on this processor: expected auto or one of%s",
         name, here);
}

static enum status cpu_open(struct backend *be, const struct backend_options *options)
{
    int n_threads = options->n_threads;
    if (n_threads < 0 || n_threads > MAX_THREADS) {
        FAIL(ST_USER, "%d CPU threads asked for, expected 0 (all that this process may use) to %d",
             n_threads, MAX_THREADS);
    }
    if (n_threads == 0) {
        n_threads = omp_get_max_threads(); /* knows the affinity mask and OMP_NUM_THREADS */
    }
    const struct cpu_isa *isa = NULL;
    TRY(choose_isa(&isa, options->isa ? options->isa : "auto"));
    struct cpu *cpu = NULL;
    TRY(MEM_NEW(&cpu, 1));
    cpu->isa = isa;
    cpu->n_threads = n_threads > 0 ? n_threads : 1;
    enum status st = MEM_NEW(&cpu->shares, cpu->n_threads);
    if (st != ST_OK) {
        mem_free(cpu);
        return st;
    }
    be->impl = cpu;
    return ST_OK;
}

static void cpu_close(struct backend *be)
{
    struct cpu *cpu = be->impl;
    mem_free(cpu->rows.data);
    mem_free(cpu->acts.data);
    mem_free(cpu->last.x.data);
    mem_free(cpu->shares);
    mem_free(cpu->scores.data);
    mem_free(cpu);
}

static const char *cpu_arithmetic(const struct backend *be)
{
    const struct cpu *cpu = be->impl;
    return cpu->isa->name;
}

int cpu_threads(const struct cpu *cpu, size_t work)
{
    /* Waking a team takes 0.7 us while its threads still spin and 10 us when they sleep, in which a
     * core does about this much (GCC 12's libgomp, AMD EPYC with AVX-512, 2 threads, 2026-11). */
    const size_t worth_a_team = 131072;
    return work < worth_a_team ? 1 : cpu->n_threads;
}

size_t cpu_scratch_width(size_t n_floats)
{
    return (n_floats + 31) / 32 * 32;
}

struct share {
    void (*task)(void *context, size_t begin, size_t end);
    void *context;
    size_t n, unit;
};

static void share_begin_end(const struct share *s, size_t i, size_t n)
{
    size_t n_units = (s->n + s->unit - 1) / s->unit;
    size_t begin = n_units * i / n * s->unit, end = n_units * (i + 1) / n * s->unit;
    end = end < s->n ? end : s->n;
    if (begin < end) {
        s->task(s->context, begin, end);
    }
}

void cpu_share(int n_threads, size_t n, size_t unit,
               void (*task)(void *context, size_t begin, size_t end), void *context)
{
    const struct share s = {task, context, n, unit};
    if (n_threads <= 1 || n <= unit) {
        share_begin_end(&s, 0, 1); /* even a parallel region of one thread costs 0.3 us */
        return;
    }
#pragma omp parallel num_threads(n_threads)
    share_begin_end(&s, (size_t)omp_get_thread_num(), (size_t)omp_get_num_threads());
}

const struct backend_ops cpu_ops = {
    .name = "cpu",
    .help = "threads, and AVX2 or AVX-512 where the processor has it",
    .open = cpu_open,
    .close = cpu_close,
    .arithmetic = cpu_arithmetic,
    .is_host = host_is_host,
    .device = host_device,
    .alloc = host_alloc,
    .release = host_release,
    .upload = host_upload,
    .download = host_download,
    .zero = host_zero,
    .sync = host_sync,
    .planes_load = cpu_planes_load,
    .planes_drop = cpu_planes_drop,
    .matmul_nested = cpu_matmul_nested,
    .matmul_dense = cpu_matmul_dense,
    .add_parts = cpu_add_parts,
    .embed = cpu_embed,
    .rmsnorm = cpu_rmsnorm,
    .layernorm = cpu_layernorm,
    .rope = cpu_rope,
    .kv_append = cpu_kv_append,
    .attention = cpu_attention,
    .glu = cpu_glu,
    .activate = cpu_activate,
    .moments = cpu_moments,
    .logit_stats = cpu_logit_stats,
    .top_k = cpu_top_k,
};
