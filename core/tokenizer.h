/* Text to token ids and back, from tokenizer.json: BPE with metaspace and byte fallback (Llama-2
 * kind), and byte-level BPE with its split pattern through PCRE2 (GPT-2, Llama-3, Qwen2 kinds);
 * added and special tokens; the BOS that a TemplateProcessing post-processor adds. A folder without
 * tokenizer.json may have a tokenizer.model instead, which the SentencePiece library encodes with.
 * Anything in the file that is not understood is refused by name.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_TOKENIZER_H
#define PMPD_CORE_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

struct tokenizer;

/* Reads folder/tokenizer.json (and tokenizer_config.json for add_bos_token where the file has no
 * post-processor), or else folder/tokenizer.model (with a BOS unless tokenizer_config.json says
 * add_bos_token false; tokens added to the model and character maps are refused). Errors: ST_IO
 * (missing: names the folder and what was looked for), ST_FORMAT, ST_UNSUPPORTED (kind named).
 * n_vocab_model: ids at or above it are refused (0: no check). */
MUST_CHECK enum status tokenizer_open(struct tokenizer **out, const char *folder,
                                      int32_t n_vocab_model);
void tokenizer_close(struct tokenizer **tok);

/* Ids of UTF-8 text. add_special: with what the post-processor adds (BOS). Special and added tokens
 * written in the text become their ids (not with a tokenizer.model: there they are text). *ids is
 * allocated (mem_free). Bytes that are not UTF-8 are refused with their offset (ST_USER). The empty
 * text gives only the BOS, or nothing. */
MUST_CHECK enum status tokenizer_encode(const struct tokenizer *tok, const char *text, size_t bytes,
                                        bool add_special, int32_t **ids, int32_t *n_ids);

/* A stream of ids to bytes that never shows half a UTF-8 character: bytes of an unfinished
 * character are held back until it is complete (or shown as U+FFFD when it cannot be, or at the
 * end). Special tokens give nothing. Metaspace's leading space of the very first piece is removed
 * only when strip_first is set (decoding a whole text, not a continuation). */
struct token_stream {
    const struct tokenizer *tok; /* borrowed */
    bool at_start;               /* the next piece is the first one and is to be stripped */
    unsigned char held[8];
    int n_held;
};
void token_stream_begin(struct token_stream *s, const struct tokenizer *tok, bool strip_first);
/* Appends what can be shown to text (capacity bytes, NUL-terminated) and returns its length; text
 * of TOKENIZER_PIECE_BYTES always holds one call. Ids outside the vocabulary give U+FFFD. */
enum { TOKENIZER_PIECE_BYTES = 2048 };
size_t token_stream_next(struct token_stream *s, int32_t id, char *text, size_t capacity);
size_t token_stream_end(struct token_stream *s, char *text, size_t capacity);
/* A whole sequence; *text is allocated (mem_free) and NUL-terminated. */
MUST_CHECK enum status tokenizer_decode(const struct tokenizer *tok, const int32_t *ids,
                                        int32_t n_ids, bool strip_first, char **text);

int32_t tokenizer_n_vocab(const struct tokenizer *tok);
int32_t tokenizer_bos(const struct tokenizer *tok); /* -1: none is added */
/* "BPE, byte-level" for people */
const char *tokenizer_kind(const struct tokenizer *tok);

#endif
