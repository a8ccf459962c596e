/* A model.safetensors file as it stands.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdlib.h>
#include <string.h>

#include "core/checkpoint.h"
#include "tests/fuzz/fuzz.h"

static const char *const words[] = {
    "dtype", "shape", "data_offsets", "__metadata__", "F32", "F16",     "BF16",
    "U8",    "I32",   "I64",          "F64",          "I8",  "F8_E4M3", NULL};

static volatile unsigned char sink;

/* Every byte of a tensor can be read. */
static void read_through(const struct tensor *t)
{
    const unsigned char *p = t->data;
    INVARIANT((uintptr_t)p % dtype_bytes(t->dtype) == 0);
    for (size_t i = 0; i < tensor_bytes(t); i++) {
        sink = p[i];
    }
}

static void check_tensor(const struct checkpoint *ckpt, int i)
{
    const char *name = checkpoint_name(ckpt, i);
    struct tensor t = checkpoint_tensor(ckpt, i), got, shaped;
    INVARIANT(name[0] && checkpoint_has(ckpt, name) && checkpoint_dtype(ckpt, i)[0]);
    INVARIANT(i == 0 || strcmp(checkpoint_name(ckpt, i - 1), name) < 0);
    INVARIANT(t.n_dims >= 1 && t.n_dims <= TENSOR_MAX_DIMS);
    for (int d = 0; d < t.n_dims; d++) {
        INVARIANT(t.dims[d] >= 0);
    }
    bool usable = fuzz_ok(checkpoint_get(ckpt, name, &got));
    INVARIANT(usable == (t.data != NULL));
    if (usable) {
        INVARIANT(got.data == t.data && t.dtype < DT_N);
        read_through(&got);
    }
    bool flat = t.n_dims == 1 || (t.n_dims == 2 && t.dims[1] > 0);
    if (usable && flat) {
        int32_t d1 = t.n_dims == 2 ? t.dims[1] : 0;
        bool is_float = t.dtype == DT_F32 || t.dtype == DT_F16 || t.dtype == DT_BF16;
        INVARIANT(fuzz_ok(checkpoint_get_shape(ckpt, name, t.dims[0], d1, &shaped)) == is_float);
        bool other = fuzz_ok(checkpoint_get_shape(ckpt, name, t.dims[0] ^ 1, d1, &shaped));
        INVARIANT(!other);
    }
    checkpoint_done_with(ckpt, name);
}

/* No byte belongs to two tensors. */
static void check_apart(const struct checkpoint *ckpt, int n)
{
    for (int i = 0; i < n && i < 32; i++) {
        struct tensor a = checkpoint_tensor(ckpt, i);
        for (int k = 0; k < i; k++) {
            struct tensor b = checkpoint_tensor(ckpt, k);
            const char *p = a.data, *q = b.data;
            INVARIANT(!p || !q || p + tensor_bytes(&a) <= q || q + tensor_bytes(&b) <= p);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct checkpoint *ckpt = NULL;
    char digest[DIGEST_TEXT], again[DIGEST_TEXT];
    static bool has_config;
    if (!has_config) {
        fuzz_put("config.json", "{}", 2); // part of a digest
        has_config = true;
    }
    fuzz_put("model.safetensors", data ? data : (const uint8_t *)"", size);
    if (fuzz_ok(checkpoint_open(&ckpt, fuzz_folder()))) {
        int n = checkpoint_n_tensors(ckpt);
        INVARIANT(n > 0);
        for (int i = 0; i < n; i++) {
            check_tensor(ckpt, i);
        }
        check_apart(ckpt, n);
        INVARIANT(!checkpoint_has(ckpt, ""));
        INVARIANT(fuzz_ok(checkpoint_digest(ckpt, fuzz_folder(), digest)));
        INVARIANT(fuzz_ok(checkpoint_digest(ckpt, fuzz_folder(), again)));
        INVARIANT(strlen(digest) == DIGEST_TEXT - 1 && strcmp(digest, again) == 0);
    }
    checkpoint_close(&ckpt);
    return 0;
}

/* Changes header or data, and lets the length in front tell the truth again most of the time;
 * sometimes the offsets too. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    uint64_t length = 0;
    for (int i = 7; size >= 8 && i >= 0; i--) {
        length = length << 8 | data[i];
    }
    if (size < 8 || length > size - 8 || seed % 8 == 0 || max_size < 64) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    size_t n_header = (size_t)length, n_data = size - 8 - n_header;
    if (n_data && seed % 8 == 1) {
        return 8 + n_header +
               LLVMFuzzerMutate(data + 8 + n_header, n_data, max_size - 8 - n_header);
    }
    uint8_t *tail = malloc(n_data + 1);
    INVARIANT(tail != NULL);
    memcpy(tail, data + 8 + n_header, n_data);
    size_t room = max_size - 8 - n_data;
    size_t n = seed % 2 ? fuzz_mutate_json((char *)data + 8, n_header, room, seed, words) : 0;
    n = n ? n : LLVMFuzzerMutate(data + 8, n_header, room);
    if (seed % 8 > 3) {
        size_t mended = fuzz_mend_header((char *)data + 8, n, room);
        n = mended ? mended : n;
    }
    for (int i = 0; i < 8; i++) {
        data[i] = (uint8_t)((uint64_t)n >> 8 * i);
    }
    memcpy(data + 8 + n, tail, n_data);
    free(tail);
    return 8 + n + n_data;
}
