/* What both kinds of tokenizer files must keep to once they are read.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_TESTS_FUZZ_TOKENIZER_H
#define PMPD_TESTS_FUZZ_TOKENIZER_H

#include "core/tokenizer.h"
#include "tests/fuzz/fuzz.h"

/* Encodes the text, decodes its ids and every id of the vocabulary. n_vocab_model: as opened. */
void fuzz_tokenizer(const struct tokenizer *tok, int32_t n_vocab_model,
                    const struct fuzz_part *text);

#endif
