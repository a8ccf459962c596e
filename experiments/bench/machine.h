/* What a timing depends on beside the program: the processor and its caches, memory that is free,
 * who else is busy, and this process's share of the CPU. Linux's /proc; where a fact is not to be
 * had the functions say so by a value, not by failing.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_BENCH_MACHINE_H
#define PMPD_EXPERIMENTS_BENCH_MACHINE_H

#include <stddef.h>

enum { MACHINE_TEXT_BYTES = 160 };

/* "AMD EPYC 9654", and "unknown". */
void machine_cpu(char text[MACHINE_TEXT_BYTES]);
/* Bytes of the last-level cache; 32 MiB where the system does not tell. */
size_t machine_cache_bytes(void);
/* Bytes that can be allocated now without swapping; 0: not known. The limit of a control group
 * (version 2) counts. */
size_t machine_available_bytes(void);
/* Memory of this process now and at its highest; 0: not known. */
void machine_resident_bytes(size_t *now, size_t *highest);
/* Lets the highest start anew from now, where the system can. */
void machine_forget_highest(void);
/* Running processes, mean of the last minute; below 0: not known. */
double machine_load(void);
/* Asks for the largest share of the CPU: a session of its own where that is allowed, nice -19 for
 * its autogroup (sched(7)) and for the calling thread and those it starts. text gets what came of
 * it, in one sentence. Returns what machine_lower_share takes to give others' autogroup back its
 * share at the end. */
int machine_raise_share(char text[MACHINE_TEXT_BYTES]);
void machine_lower_share(int before);
/* Gives memory that was freed back to the system. */
void machine_trim(void);

#endif
