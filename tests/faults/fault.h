/* What is to go wrong, where and when: the environment variable PMPD_FAULT of pmpd_faulty, which is
 * pmpd with some functions sent through tests/faults/wrap*.c by the linker. Production code
 * knows nothing of it.
 *
 *   PMPD_FAULT="POINT:CALL:ACTION[@CONDITION[,CONDITION]]", several separated by blanks
 *
 * POINT, a place in the program:
 *   load                    a block of weights goes to the backend
 *   start                   a prompt is put into a slot
 *   prefill, decode         the middle of a pass (the first layer's attention)
 *   finish                  a finished record is about to be handed over
 *   journal_write, journal_sync
 *   run_write, run_sync, run_close, run_rename, run_renamed             the file run.h5
 *   answers_write, answers_close, answers_sync, answers_rename, answers_renamed   answers.jsonl
 *                           before the system call; close and renamed: after it
 * CALL: the how-manieth call there that fulfils the conditions, from 1; "3+": the third and all
 *   later ones; "*": every one.
 * ACTION: kill (SIGKILL), segv (a write to address 0), abort, term (SIGTERM), stop (SIGSTOP), slow
 *   (20 ms), parent (SIGKILL to mpirun, then to itself), error (a status or EIO), nan (prefill and
 *   decode: in the prompt's rows), torn (writes: half of it, then SIGKILL), enospc (writes and
 *   closes: half of it; from then on that file finds the disk full).
 * CONDITION: rank=N of the world; tensor=N: of the replica; prompt=N: this prompt takes part.
 *
 * PMPD_FAULT_LOG: a file that gets a line for every fault ("fault RANK POINT CALL ACTION") but slow
 * ones, and for every prompt that a rank begins ("start RANK ORDINAL").
 * PMPD_FAULT_IDLE: this replica takes no prompts. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_TESTS_FAULT_H
#define PMPD_TESTS_FAULT_H

#include <stdbool.h>
#include <stdint.h>

enum fault_action {
    FAULT_NONE = 0,
    FAULT_KILL,
    FAULT_SEGV,
    FAULT_ABORT,
    FAULT_TERM,
    FAULT_STOP,
    FAULT_SLOW,
    FAULT_PARENT,
    FAULT_ERROR, /* these are the caller's to carry out: */
    FAULT_NAN,
    FAULT_TORN,
    FAULT_ENOSPC
};

/* This process's place, for conditions; until it is known, conditions on it do not hold. */
void fault_set_rank(int rank);
void fault_set_grid(int tensor_rank, int replica);
int fault_rank(void);
/* PMPD_FAULT_IDLE names this replica. */
bool fault_is_idle(void);

/* A call of `point` that n prompts take part in (ordinals; n may be 0). Actions that end or slow
 * the process happen here; what is left for the caller is returned, with the index of the prompt
 * that a prompt condition named in *which (may be NULL; 0 without such a condition). Both later
 * parts may be asked for apart: fault_due decides and counts, fault_act does. */
enum fault_action fault_at(const char *point, const int64_t *ordinals, int n, int *which);
enum fault_action fault_due(const char *point, const int64_t *ordinals, int n, int *which);
enum fault_action fault_act(enum fault_action action);
void fault_kill(void);
/* A line into PMPD_FAULT_LOG. */
void fault_log(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
