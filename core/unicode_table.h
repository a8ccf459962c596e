/* The tables behind unicode_nfc; unicode_table.c is written by make_unicode_table.py.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_UNICODE_TABLE_H
#define PMPD_CORE_UNICODE_TABLE_H

#include <stdint.h>

struct unicode_decomposition {
    int32_t code, first, second; /* second 0: decomposes to one character */
};
struct unicode_mark_range {
    int32_t begin, end, kind; /* begin..end have this canonical combining class, not 0 */
};

extern const int32_t unicode_n_decompositions;
extern const struct unicode_decomposition unicode_decomposition[]; /* in order of code */
/* Those that are put together again, as places in the table above, in order of (first, second). */
extern const int32_t unicode_n_compositions;
extern const int16_t unicode_composition[];
extern const int32_t unicode_n_mark_ranges;
extern const struct unicode_mark_range unicode_mark_range[]; /* in order */

#endif
