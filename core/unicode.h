/* The little of Unicode that the tokenizer needs: UTF-8, white space, normal form C.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_UNICODE_H
#define PMPD_CORE_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

/* Bytes of the well-formed UTF-8 character at text (1..4), 0 when there is none; *code may be
 * NULL. */
int utf8_read(const char *text, size_t bytes, int32_t *code);
/* Writes a code point and returns its bytes (1..4). */
int utf8_write(char text[4], int32_t code);
/* How many bytes a character that begins with these n bytes has: 1..4 when they can be the
 * beginning of one (or all of it), 0 when no character begins so. n is 1..4. */
int utf8_expects(const unsigned char *begin, int n);
/* The offset of the first byte that is not well-formed UTF-8; bytes when all are. */
size_t utf8_check(const char *text, size_t bytes);
/* Unicode's White_Space property. */
bool unicode_is_space(int32_t code);
/* Normal form C of valid UTF-8, not NUL-terminated; *out is allocated (mem_free).
 * Source: Unicode Standard Annex 15; Hangul by the arithmetic of chapter 3.12. */
MUST_CHECK enum status unicode_nfc(const char *text, size_t bytes, char **out, size_t *out_bytes);

#endif
