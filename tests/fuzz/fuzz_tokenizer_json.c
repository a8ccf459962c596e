/* tokenizer.json, a text to encode with it, and tokenizer_config.json.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/fuzz/fuzz_tokenizer.h"

enum { VOCAB = 1000 };

static const char *const words[] = {"version",
                                    "truncation",
                                    "padding",
                                    "added_tokens",
                                    "normalizer",
                                    "pre_tokenizer",
                                    "post_processor",
                                    "decoder",
                                    "model",
                                    "id",
                                    "content",
                                    "single_word",
                                    "lstrip",
                                    "rstrip",
                                    "normalized",
                                    "special",
                                    "type",
                                    "dropout",
                                    "unk_token",
                                    "continuing_subword_prefix",
                                    "end_of_word_suffix",
                                    "fuse_unk",
                                    "byte_fallback",
                                    "ignore_merges",
                                    "vocab",
                                    "merges",
                                    "normalizers",
                                    "pretokenizers",
                                    "processors",
                                    "decoders",
                                    "prepend",
                                    "pattern",
                                    "String",
                                    "Regex",
                                    "replacement",
                                    "prepend_scheme",
                                    "add_prefix_space",
                                    "split",
                                    "str_rep",
                                    "trim_offsets",
                                    "use_regex",
                                    "behavior",
                                    "invert",
                                    "single",
                                    "pair",
                                    "special_tokens",
                                    "SpecialToken",
                                    "Sequence",
                                    "ids",
                                    "start",
                                    "stop",
                                    "add_bos_token",
                                    "bos_token",
                                    "BPE",
                                    "Prepend",
                                    "Replace",
                                    "NFC",
                                    "Metaspace",
                                    "ByteLevel",
                                    "Split",
                                    "Isolated",
                                    "TemplateProcessing",
                                    "ByteFallback",
                                    "Fuse",
                                    "Strip",
                                    "always",
                                    "first",
                                    "never",
                                    "<0x41>",
                                    "<s>",
                                    "a",
                                    "b",
                                    "ab",
                                    "▁",
                                    "Ġ",
                                    "(?i:a)",
                                    "(?=a)",
                                    "(?<=a)b",
                                    "(?>a+)",
                                    "\\p{L}+",
                                    "\\p{N}{1,3}",
                                    "\\s+",
                                    "[^\\s]+",
                                    "\\x{41}",
                                    "\\u0061",
                                    "\\v",
                                    "(?:a|aa)*b",
                                    NULL};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_part part[3];
    struct tokenizer *tok = NULL;
    fuzz_split(part, 3, data, size);
    fuzz_put_part("tokenizer.json", &part[0]);
    fuzz_put_part("tokenizer_config.json", &part[2]);
    if (fuzz_ok(tokenizer_open(&tok, fuzz_folder(), VOCAB))) {
        fuzz_tokenizer(tok, VOCAB, &part[1]);
    }
    tokenizer_close(&tok);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    return fuzz_mutate_part(data, size, max_size, seed, words, 0xFF);
}
