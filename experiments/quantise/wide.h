/* Loops compiled for several instruction sets, chosen when the program starts.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_WIDE_H
#define PMPD_EXPERIMENTS_QUANTISE_WIDE_H

/* The wider instructions give the same bits: nothing is contracted, and sums are written out in a
 * fixed order. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

#endif
