/* The tokenizer's inside: what tokenizer_load.c fills, and what tokenizer.c, tokenizer_bpe.c,
 * tokenizer_regex.c and tokenizer_stream.c read. Nobody else includes this.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_TOKENIZER_INTERNAL_H
#define PMPD_CORE_TOKENIZER_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/json.h"
#include "core/status.h"
#include "core/tokenizer.h"

enum {
    TOKENIZER_MAX_VOCAB = 1 << 22, /* ids at or above it are refused whatever the model says */
    TOKENIZER_MAX_PIECE = 1024,    /* bytes of one piece; 1.5 times that fits PIECE_BYTES */
    TOKENIZER_MAX_SPLITS = 8,      /* patterns applied one after the other */
    TOKENIZER_MAX_NORMS = 8,
    TOKENIZER_MAX_REPLACEMENT = 16, /* bytes of a normaliser's string */
    TOKENIZER_MAX_GROWTH = 16,      /* of a text, by all replacements together */
    TOKENIZER_MAX_PREFIX = 16,      /* ids that the post-processor puts first */
    TOKENIZER_MAX_TEXT = 1 << 28,   /* bytes of one text */
};

/* U+2581, which stands for a space in metaspace vocabularies. */
#define METASPACE "\xE2\x96\x81"
enum { METASPACE_BYTES = 3 };

enum {
    PIECE_MODEL = 1,  /* in the BPE vocabulary */
    PIECE_ADDED = 2,  /* in added_tokens */
    PIECE_SPECIAL = 4 /* shows nothing when decoded */
};

struct piece {
    uint32_t offset; /* into tokenizer.text */
    uint16_t bytes;
    int16_t byte;  /* value of a byte-fallback piece "<0xNN>", else -1 */
    uint8_t flags; /* 0: a hole, no piece has this id */
};

/* Added tokens that are looked for together, longest first at the leftmost place. */
struct added_token {
    char *text; /* owned; as it is looked for: normalised where the file says so */
    size_t bytes;
    int32_t id;
    bool lstrip, rstrip; /* takes the white space before (after) it along */
};
struct added_set {
    struct added_token *token; /* (n) owned, in order of text */
    int32_t n;
    bool starts[256]; /* some token begins with this byte */
};

enum norm_kind { NORM_PREPEND, NORM_REPLACE, NORM_NFC };
struct norm_step {
    enum norm_kind kind;
    char from[TOKENIZER_MAX_REPLACEMENT + 1]; /* REPLACE */
    char to[TOKENIZER_MAX_REPLACEMENT + 1];   /* REPLACE, PREPEND */
};

enum prefix_when { PREFIX_NEVER, PREFIX_FIRST, PREFIX_ALWAYS };
/* What decoding a whole text removes at its start. */
enum strip_kind {
    STRIP_NOTHING,
    STRIP_ONE_SPACE,
    STRIP_FIRST_PIECE,
    STRIP_METASPACE, /* SentencePiece: a U+2581 that begins the first piece that shows something */
    STRIP_METASPACES /* the same, and of the pieces that follow one of nothing else */
};

struct merge {
    int32_t left, right; /* ids; left is -1 in a free place of the table */
    int32_t rank, made;  /* lower ranks first; the id of left and right together */
};

struct regex; /* a compiled split pattern, tokenizer_regex.c */

struct tokenizer {
    bool byte_level; /* else metaspace */
    struct spm *spm; /* owned; from a tokenizer.model: it encodes, and no part of the model below is
                        filled; else NULL */
    bool spm_is_bpe; /* else unigram (or word, char) */

    /* vocabulary */
    int32_t n_vocab;     /* largest id + 1 */
    struct piece *piece; /* (n_vocab) owned */
    char *text;          /* owned; all pieces, one after the other */
    int32_t *table;      /* (table_mask + 1) owned; hash of text to id, -1 is free */
    size_t table_mask;

    /* model */
    struct merge *merge; /* (merge_mask + 1) owned; hash of (left, right) */
    size_t merge_mask;
    int32_t unk; /* -1: none */
    bool fuse_unk, ignore_merges;
    bool byte_fallback;
    int32_t byte_id[256]; /* byte-level: the id of a byte's letter; else of "<0xNN>"; -1: none */

    /* before the model */
    struct added_set added[2]; /* [0] in the raw text, [1] in the normalised one */
    struct norm_step norm[TOKENIZER_MAX_NORMS];
    int n_norms;
    struct regex *split[TOKENIZER_MAX_SPLITS]; /* owned */
    int n_splits;
    enum prefix_when prefix;  /* a space (a metaspace) before a section that has none */
    bool spaces_to_metaspace; /* pre_tokenizer Metaspace */
    bool cut_at_metaspace;

    /* after it */
    int32_t first_ids[TOKENIZER_MAX_PREFIX];
    int n_first_ids;

    /* decoder */
    bool metaspace_to_space, bytes_decoded;
    enum strip_kind strip;
};

/* A growing array of bytes; zero it first, give it back with mem_free(b.data). */
struct byte_buffer {
    char *data;
    size_t n, capacity;
};
MUST_CHECK enum status byte_buffer_add(struct byte_buffer *b, const void *data, size_t bytes);

/* Growing ids and the scratch of one tokenizer_encode. */
struct bpe_symbol {
    int32_t id, prev, next; /* next -1: the last; id -1: swallowed by its left neighbour */
};
struct bpe_event {
    int32_t rank, pos, made;
};
struct encode_work {
    const struct tokenizer *tok;
    int32_t *ids; /* handed to the caller */
    size_t n_ids, ids_capacity;
    struct bpe_symbol *symbol; /* (symbol_capacity) */
    struct bpe_event *heap;    /* (3 * symbol_capacity) */
    size_t symbol_capacity;
    struct byte_buffer letters; /* a piece in byte-level letters, for ignore_merges */
    struct regex_scratch *scratch;
};
MUST_CHECK enum status encode_work_add(struct encode_work *w, int32_t id);

/* tokenizer_load.c. The id of a piece of the BPE vocabulary, -1 when there is none. */
int32_t vocab_find(const struct tokenizer *tok, const char *text, size_t bytes);
/* -1, or the place of a pair in tok->merge. */
const struct merge *merge_find(const struct tokenizer *tok, int32_t left, int32_t right);
void tokenizer_index_merge(struct tokenizer *tok, struct merge m);
/* tokenizer_parts.c: the normaliser, pre-tokeniser, post-processor and decoder of a file. */
MUST_CHECK enum status tokenizer_load_parts(struct tokenizer *tok, const json_t *root,
                                            const char *path, const char *folder);
/* Refuses members that are not in the list (NULL at the end) by name. */
MUST_CHECK enum status tokenizer_check_keys(const json_t *object, const char *const *allowed,
                                            const char *what, const char *path);

/* The value of a piece "<0xNN>", -1 for any other text. */
int16_t tokenizer_byte_piece(const char *text, size_t bytes);

/* tokenizer_model.c. tokenizer.model, and tokenizer_config.json of the folder. */
MUST_CHECK enum status tokenizer_load_spm(struct tokenizer *tok, const char *folder,
                                          const char *path, int32_t n_vocab_model);
/* A whole text to ids. */
MUST_CHECK enum status tokenizer_encode_spm(struct encode_work *w, const char *text, size_t bytes);

/* tokenizer_bpe.c. One pre-tokenised piece to ids. */
MUST_CHECK enum status bpe_encode(struct encode_work *w, const char *text, size_t bytes);
/* GPT-2's letters for bytes: byte to code point (below 0x144), and back (-1: not a letter).
 * Source: the byte-level BPE of GPT-2 (Radford et al. 2019): printable Latin-1 stands for itself,
 * the 68 others for U+0100 onward in order. */
int32_t byte_to_letter(int byte);
int byte_from_letter(int32_t code);

/* tokenizer_regex.c. Translates a pattern in Oniguruma's syntax to PCRE2 and compiles it.
 * Errors: ST_UNSUPPORTED (a construct that means something else in PCRE2 is named; a pattern that
 * matches the empty text), ST_FORMAT (does not compile). */
MUST_CHECK enum status regex_compile(struct regex **out, const char *pattern, const char *path);
void regex_free(struct regex **re);
struct regex_scratch;
MUST_CHECK enum status regex_scratch_create(struct regex_scratch **out);
void regex_scratch_free(struct regex_scratch **s);
/* The first match in text[from, bytes): *begin == bytes when there is none. text is valid UTF-8.
 * Errors: ST_FORMAT: the pattern takes more steps than allowed. */
MUST_CHECK enum status regex_find(const struct regex *re, struct regex_scratch *s, const char *text,
                                  size_t bytes, size_t from, size_t *begin, size_t *end);

/* tokenizer.c. Applies the normaliser to one section. *out is replaced. */
MUST_CHECK enum status tokenizer_normalise(const struct tokenizer *tok, const char *text,
                                           size_t bytes, struct byte_buffer *out);

#endif
