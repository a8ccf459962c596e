/* ROUGE-L: how much of a reference's word order a text keeps.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_ROUGE_H
#define PMPD_CORE_ROUGE_H

#include "core/status.h"

/* F1 of the longest common subsequence of words: 2 P R / (P + R) with P = LCS / words of text and
 * R = LCS / words of reference; 0 when nothing is common. Words are the longest runs of ASCII
 * letters and digits (lower-cased) and of bytes of other characters; nothing is stemmed, and texts
 * without spaces between words are one word. Errors: ST_NOMEM.
 * Source: Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), section 3, with
 * beta = 1; without its Porter stemmer, which is for English only. */
MUST_CHECK enum status rouge_l(double *f1, const char *text, const char *reference);

#endif
