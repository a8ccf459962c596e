/* Rows of token ids as JSON, or a text behind a byte 0xFF.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <string.h>

#include "experiments/windows.h"
#include "tests/fuzz/fuzz.h"

enum { CONTEXT = 64 };

static void check_windows(const struct windows *w, int32_t vocab, int32_t longest)
{
    char digest[WINDOWS_DIGEST_TEXT];
    INVARIANT(w->n > 0 && w->first >= 1 && w->begin[0] == 0);
    for (int32_t i = 0; i < w->n; i++) {
        INVARIANT(windows_length(w, i) > w->first && windows_length(w, i) <= longest);
    }
    for (size_t i = 0; i < w->begin[w->n]; i++) {
        INVARIANT(w->ids[i] >= 0 && w->ids[i] < vocab);
    }
    windows_digest(w, digest);
    INVARIANT(strlen(digest) == WINDOWS_DIGEST_TEXT - 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_part part[2];
    struct windows w;
    static bool has_tokenizer;
    if (!has_tokenizer) {
        fuzz_put_tokenizer();
        has_tokenizer = true;
    }
    fuzz_split(part, 2, data, size);
    bool text = part[1].text != NULL;
    const char *name = text ? "rows.txt" : "rows.json";
    int32_t window = text ? 2 + (int32_t)(size % 7) : 0;
    fuzz_put_part(name, &part[text]);
    if (fuzz_ok(windows_read(&w, fuzz_path(name), fuzz_folder(), FUZZ_VOCAB, CONTEXT, window))) {
        check_windows(&w, FUZZ_VOCAB, text ? window : CONTEXT);
    }
    windows_free(&w);
    return 0;
}
