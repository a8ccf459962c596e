/* What the fuzz entries share. An entry is one file with LLVMFuzzerTestOneInput: it reads an input
 * as the program would, checks with INVARIANT what the headers promise of everything that was
 * accepted, and gives all of it back. libFuzzer drives it, or replay.c a folder of inputs.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_TESTS_FUZZ_H
#define PMPD_TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

/* The faces of libFuzzer. An entry may have a mutator of its own; replay.c never calls it. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

/* st is ST_OK, or an error whose message is one line that a terminal can show. Returns st == ST_OK;
 * the message is gone then. */
bool fuzz_ok(enum status st);

/* A folder of this process, in memory where the system has such a place; removed at exit. Messages
 * below LOG_ERROR are off from the first call. */
const char *fuzz_folder(void);
/* A file of that folder; bytes of NULL remove it. */
void fuzz_put(const char *file, const void *data, size_t bytes);
/* folder/file, valid until the next call */
const char *fuzz_path(const char *file);

/* Texts side by side in one input: byte 0xFF, which is nowhere in UTF-8, ends each but the last.
 * Parts that are missing have no text (NULL). */
struct fuzz_part {
    const char *text;
    size_t bytes;
};
void fuzz_split(struct fuzz_part *parts, int n_parts, const uint8_t *data, size_t size);
/* A part as a file of fuzz_folder; none where it is missing. */
void fuzz_put_part(const char *file, const struct fuzz_part *part);
/* A part as a string, without what follows its first zero byte; free() it. */
char *fuzz_text(const struct fuzz_part *part);

/* A safetensors file with this text as its header and as many bytes of data as the text's offsets
 * ask for (at most 1 MiB): those given, then some that are moderate numbers as F16 and F32. */
void fuzz_put_safetensors(const char *file, const struct fuzz_part *header,
                          const struct fuzz_part *data);
/* Makes the offsets of a safetensors header agree with its dtypes and shapes. Returns the new size,
 * 0: the text is left as it was, because it is no such header or does not fit. */
size_t fuzz_mend_header(char *text, size_t bytes, size_t max_bytes);

/* A tokenizer.json of four ids: "?", "a", "b" and "ab". */
enum { FUZZ_VOCAB = 4 };
void fuzz_put_tokenizer(void);

/* Numbers from an input that is no file; zeros behind its end. */
struct fuzz_bytes {
    const uint8_t *at, *end;
};
uint8_t fuzz_u8(struct fuzz_bytes *b);
uint32_t fuzz_u32(struct fuzz_bytes *b);

#endif
