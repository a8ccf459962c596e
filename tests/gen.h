/* Things tests are made from: seeded random numbers, temporary folders, and tiny models as Hugging
 * Face llama folders. The same struct gives the same bytes on every machine; a tensor's values
 * depend on the seed and its name only, never on dtype, shards or the order of writing.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_TESTS_GEN_H
#define PMPD_TESTS_GEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "core/tensor.h"

/* SplitMix64: any seed is good.
 * Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014). */
struct gen_rng {
    uint64_t state;
};
uint64_t gen_next(struct gen_rng *rng);
/* Below n, n > 0 (a small bias does not matter here). */
uint32_t gen_below(struct gen_rng *rng, uint32_t n);
/* [0, 1) */
double gen_uniform(struct gen_rng *rng);
/* Mean 0, variance 1. */
double gen_normal(struct gen_rng *rng);

enum { GEN_PATH_BYTES = 512 };
/* A new empty folder under $TMPDIR or /tmp; ends the program when it cannot be made. */
void gen_folder(char path[GEN_PATH_BYTES]);
/* folder/file into path; returns path. */
const char *gen_path(char path[GEN_PATH_BYTES], const char *folder, const char *file);
/* Writes a whole file, a new one where there is an old one; ends the program when it cannot. */
void gen_write_file(const char *path, const void *data, size_t bytes);
/* A whole file, NUL-terminated, to be given back with free(); NULL when it cannot be read. */
char *gen_read_file(const char *path, size_t *bytes);
/* Removes a file, or a folder with everything in it. */
void gen_remove(const char *path);
/* The same inside a folder: write a text, remove. */
void gen_put_text(const char *folder, const char *file, const char *text);
void gen_drop(const char *folder, const char *file);

/* A safetensors file by hand into out: the header's length, the header padded with blanks so that
 * data begin at a multiple of 8 plus shift, and n_data bytes 1, 2, 3... Returns its bytes; out
 * holds strlen(header) + 15 + shift + n_data. Nothing is checked: headers may lie. */
size_t gen_safetensors(unsigned char *out, const char *header, size_t n_data, size_t shift);

struct gen_model {
    int32_t hidden, n_layers, n_heads, n_kv_heads, head_dim, ffn, vocab, context;
    double rope_theta, norm_eps;
    enum dtype dtype; /* F32, F16 or BF16: of every tensor */
    bool tied;        /* no lm_head.weight */
    bool tokenizer;   /* also tokenizer.json: byte-level BPE without merges; id b is byte b, 256 is
                         <s> (put in front of a text), 257 is </s>; vocab >= 258 */
    int32_t bos, eos; /* -1: not in config.json */
    int32_t n_shards; /* 1: model.safetensors; else shards with an index */
    uint64_t seed;
};

/* 2 layers, 64 wide, 4 heads of 16, 2 KV heads, ffn 160, vocabulary 288, context 128, F32, a head
 * of its own, with tokenizer, one file. */
struct gen_model gen_model_default(void);
/* Writes config.json, generation_config.json, the weights and perhaps tokenizer.json into an
 * existing folder. Logits of these weights spread by about 2, so that argmax is clear and entropy
 * is not 0. Errors: ST_IO; ST_USER (vocabulary too small for the tokenizer). */
MUST_CHECK enum status gen_model_write(const char *folder, const struct gen_model *m);

#endif
