/* An index and the shards that it lists: index text, then the headers of a.safetensors and
 * b.safetensors.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <string.h>

#include "core/checkpoint.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const files[] = {"a.safetensors", "b.safetensors"};
    struct fuzz_part part[3], none = {NULL, 0};
    struct checkpoint *ckpt = NULL;
    fuzz_split(part, 3, data, size);
    fuzz_put_part("model.safetensors.index.json", &part[0]);
    for (int i = 0; i < 2; i++) {
        if (part[i + 1].text) {
            fuzz_put_safetensors(files[i], &part[i + 1], &none);
        } else {
            fuzz_put(files[i], NULL, 0);
        }
    }
    if (fuzz_ok(checkpoint_open(&ckpt, fuzz_folder()))) {
        for (int i = 0; i < checkpoint_n_tensors(ckpt); i++) {
            const char *name = checkpoint_name(ckpt, i);
            struct tensor t;
            INVARIANT(i == 0 || strcmp(checkpoint_name(ckpt, i - 1), name) < 0);
            if (fuzz_ok(checkpoint_get(ckpt, name, &t))) {
                const volatile unsigned char *p = t.data;
                for (size_t k = 0; k < tensor_bytes(&t); k++) {
                    (void)p[k];
                }
            }
        }
    }
    checkpoint_close(&ckpt);
    return 0;
}
