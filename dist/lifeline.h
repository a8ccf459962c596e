/* The lifeline: one TCP connection from every rank to rank 0, beside MPI, for what MPI cannot say:
 * who died, and at which prompt. A rank that fails, or gets a fatal signal, names the prompts it
 * was at before it goes; rank 0 journals them from a thread of its own, so also when its main
 * thread waits in a collective for the one that died. A connection that ends without a word is a
 * rank that was killed; one whose host or link is gone is noticed by the kernel's keepalive
 * (LIFELINE_DEAD_S). In both cases rank 0 says which rank of which host, and ends the job; every
 * other rank ends when its connection to rank 0 does, so that nothing is left on a host that was
 * cut off. After a silence both wait 10 s more for a launcher that notices it, too, and ends the
 * job in good order (mpirun: --mca oob_tcp_keepalive_time 10 --mca oob_tcp_keepalive_intvl 5
 * --mca oob_tcp_keepalive_probes 3; without these mpirun waits for its lost daemon).
 *
 * The threads never call MPI. Nothing is sent while all is well. Where no connection can be made
 * (no common network), the run goes on with a warning, and deaths are left to mpirun to report.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_DIST_LIFELINE_H
#define PMPD_DIST_LIFELINE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"
#include "dist/env.h"

enum {
    LIFELINE_DEAD_S = 20,      /* a silent host or link is given up after about so long */
    LIFELINE_MAX_NAMED = 4096, /* prompts in one report: the most slots of a replica */
    LIFELINE_TEXT_BYTES = 256,
    LIFELINE_EXIT_CODE = 69 /* EX_UNAVAILABLE: another rank has died */
};

/* What a failing rank says. */
struct lifeline_fault {
    int32_t rank, replica;
    int32_t signal;    /* 0: an error */
    int32_t n_prompts; /* that it may have been; 0: it was no prompt's doing */
    int64_t *ordinals; /* (n_prompts) borrowed for the call */
    char text[LIFELINE_TEXT_BYTES];
};

/* On rank 0, in the lifeline's thread: makes it durable. Must not allocate or wait for the main
 * thread. The first report is the cause of the job's end, others follow from it: it is called for
 * the first one, and once more only if that named no prompts and a later one does. The job then
 * ends: by the rank that reported, else by rank 0 after 10 s. */
typedef void lifeline_fault_fn(void *ctx, const struct lifeline_fault *fault);
/* The prompts this rank is at, at most capacity of them; returns how many. Called from signal
 * handlers: async-signal-safe. */
typedef int32_t lifeline_suspects_fn(void *ctx, int64_t *ordinals, int32_t capacity);

/* Connects every rank and starts the threads; installs handlers for SIGSEGV, SIGBUS, SIGFPE, SIGILL
 * and SIGABRT, which report and then let the former handler have the signal. on_fault is used on
 * rank 0 only. Collective over the world, after env_grid. Errors: ST_NOMEM (threads); a rank that
 * cannot connect only warns. With one rank there is no network, but faults are reported all the
 * same. */
MUST_CHECK enum status lifeline_open(struct env *env, lifeline_fault_fn *on_fault,
                                     lifeline_suspects_fn *suspects, void *ctx);
/* Reports an error of this rank with the prompts that `suspects` names (by_prompt false: none, as
 * an error of MPI, of a disk or a time-out is no prompt's doing) and waits until rank 0 has it, at
 * most 5 s. Before env_abort; a broken invariant and the watchdog do so by themselves. Does nothing
 * when there is no lifeline. Any thread. */
void lifeline_report(const char *text, bool by_prompt);
/* From a signal handler on another rank than 0: rank 0 is to stop (dist/stop.h). */
void lifeline_pass_stop(int signal);
/* Says good-bye and ends threads and connections; puts the signal handlers back. Every rank calls
 * it before MPI_Finalize, on every way there (else its end is a death); nobody waits for the
 * others. */
void lifeline_close(void);

#endif
