/* tokenizer.json, a text to encode with it, and tokenizer_config.json.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "tests/fuzz/fuzz_tokenizer.h"

enum { VOCAB = 1000 };

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
