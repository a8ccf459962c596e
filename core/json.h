/* JSON through jansson with errors that name file, path and what was expected. Every reader of JSON
 * files (config.json, tokenizer.json, safetensors headers, JSONL) goes through here.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_JSON_H
#define PMPD_CORE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef struct json_t json_t; /* jansson's; jansson.h itself need not be included by callers */

/* Parses a whole file. max_bytes: refused above that. The caller owns *out, back with json_release.
 * Errors: ST_IO (file), ST_FORMAT (syntax with line and column, duplicate keys, not an object). */
MUST_CHECK enum status json_read_file(json_t **out, const char *path, size_t max_bytes);
/* Parses a text; `where` names it in messages ("prompts.jsonl:12"). */
MUST_CHECK enum status json_read_text(json_t **out, const char *text, size_t bytes,
                                      const char *where);
void json_release(json_t **json);

/* Members of an object. The required forms fail with ST_FORMAT when the member is missing or of
 * another type; the _or forms take `fallback` when it is missing or null and fail on another type.
 * `where` names the file. Strings are borrowed from the object. */
MUST_CHECK enum status json_get_i32(int32_t *out, const json_t *object, const char *key,
                                    int32_t min, int32_t max, const char *where);
MUST_CHECK enum status json_get_i32_or(int32_t *out, const json_t *object, const char *key,
                                       int32_t min, int32_t max, int32_t fallback,
                                       const char *where);
MUST_CHECK enum status json_get_f64_or(double *out, const json_t *object, const char *key,
                                       double fallback, const char *where);
MUST_CHECK enum status json_get_bool_or(bool *out, const json_t *object, const char *key,
                                        bool fallback, const char *where);
MUST_CHECK enum status json_get_string(const char **out, const json_t *object, const char *key,
                                       const char *where);
MUST_CHECK enum status json_get_string_or(const char **out, const json_t *object, const char *key,
                                          const char *fallback, const char *where);
/* The member, or NULL when it is missing or null. */
const json_t *json_member(const json_t *object, const char *key);
/* The value in a few printable words for messages: `"gptq"`, 12, true, an object; NULL is
 * "nothing". Returns text, which holds at least 16 bytes; in 96 every value is whole or cut with
 * "...". */
const char *json_describe(const json_t *json, char *text, size_t text_bytes);

#endif
