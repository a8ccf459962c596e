/* What pmpd itself writes and how it is read back: the bytes of a file, every way of writing it
 * wrongly, nested matrices, and the digest.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <signal.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "core/checkpoint.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { FILE_BYTES = 1 << 16 };

static char folder[GEN_PATH_BYTES]; /* of the whole test */
static unsigned char image[FILE_BYTES];

/* ---- the writer ---- */

static void test_writer_bytes(void)
{
    struct checkpoint_writer *w = NULL;
    char path[GEN_PATH_BYTES];
    struct tensor half = tensor_2d(NULL, DT_F16, 1, 2), byte = tensor_1d(NULL, DT_U8, 3),
                  none = tensor_1d(NULL, DT_U8, 0);
    gen_put_text(folder, "out.safetensors", "an old file");
    CHECK_OK(checkpoint_writer_create(&w, gen_path(path, folder, "out.safetensors")));
    CHECK_OK(checkpoint_writer_announce(w, "q\"", &half));
    CHECK_OK(checkpoint_writer_announce(w, "x", &byte));
    CHECK_OK(checkpoint_writer_announce(w, "n", &none));
    CHECK_OK(checkpoint_writer_bytes(w, "\1\2\3", 3));
    CHECK_OK(checkpoint_writer_bytes(w, "", 0));
    CHECK_OK(checkpoint_writer_bytes(w, "\4\5\6\7", 4));
    CHECK_OK(checkpoint_writer_finish(w));
    checkpoint_writer_destroy(&w);
    CHECK(!w);
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},"
        "\"q\\\"\":{\"dtype\":\"F16\",\"shape\":[1,2],\"data_offsets\":[0,4]},"
        "\"x\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[4,7]},"
        "\"n\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[7,7]}}";
    size_t expected = gen_safetensors(image, header, 7, 0), bytes = 0;
    char *found = gen_read_file(path, &bytes);
    CHECK(found && bytes == expected && memcmp(found, image, bytes) == 0);
    CHECK(expected % 8 == 7);
    free(found);
    gen_drop(folder, "out.safetensors");
}

static int count_files(void)
{
    char command[GEN_PATH_BYTES + 32], text[32] = "";
    snprintf(command, sizeof command, "ls -A '%s' | wc -l", folder);
    FILE *p = popen(command, "r");
    if (p) {
        CHECK(fgets(text, sizeof text, p) != NULL);
        pclose(p);
    }
    return atoi(text);
}

static void test_writer_errors(void)
{
    struct checkpoint_writer *w = NULL;
    char path[GEN_PATH_BYTES];
    struct tensor byte = tensor_1d(NULL, DT_U8, 3), half = tensor_1d(NULL, DT_F16, 2),
                  bad = tensor_2d(NULL, DT_U8, 4, -1),
                  huge = tensor_3d(NULL, DT_I64, 1 << 30, 1 << 30, 8), shapeless = {.dtype = DT_U8};
    int before = count_files();
    CHECK_STATUS(checkpoint_writer_create(&w, gen_path(path, folder, "no/such.safetensors")), ST_IO,
                 "no/such.safetensors");
    CHECK(!w);
    checkpoint_writer_destroy(&w);
    CHECK_OK(checkpoint_writer_create(&w, gen_path(path, folder, "out.safetensors")));
    CHECK(count_files() == before + 1);
    CHECK_OK(checkpoint_writer_announce(w, "x", &byte));
    CHECK_STATUS(checkpoint_writer_announce(w, "x", &byte), ST_SHAPE, "\"x\" is announced twice");
    CHECK_STATUS(checkpoint_writer_announce(w, "__metadata__", &byte), ST_SHAPE, "twice");
    CHECK_STATUS(checkpoint_writer_announce(w, "h", &half), ST_SHAPE, "would begin at byte 3");
    CHECK_STATUS(checkpoint_writer_announce(w, "bad", &bad), ST_SHAPE, "\"bad\"");
    CHECK_STATUS(checkpoint_writer_announce(w, "huge", &huge), ST_SHAPE, "begin at byte 3");
    CHECK_STATUS(checkpoint_writer_announce(w, "shapeless", &shapeless), ST_SHAPE, "\"shapeless\"");
    CHECK_STATUS(checkpoint_writer_announce(w, "\xff", &byte), ST_FORMAT, "UTF-8");
    CHECK_STATUS(checkpoint_writer_finish(w), ST_SHAPE, "0 bytes were written");
    CHECK_STATUS(checkpoint_writer_bytes(w, "12345", 5), ST_SHAPE, "have 3 left");
    CHECK_OK(checkpoint_writer_bytes(w, "12", 2));
    CHECK_STATUS(checkpoint_writer_bytes(w, "12", 2), ST_SHAPE, "have 1 left");
    CHECK_STATUS(checkpoint_writer_announce(w, "y", &byte), ST_SHAPE, "after the first bytes");
    CHECK_STATUS(checkpoint_writer_finish(w), ST_SHAPE, "2 bytes were written");
    checkpoint_writer_destroy(&w);
    CHECK(count_files() == before); // neither a half file nor a temporary one
    CHECK_OK(checkpoint_writer_create(&w, path));
    CHECK_STATUS(checkpoint_writer_announce(w, "huge", &huge), ST_SHAPE, "\"huge\"");
    checkpoint_writer_destroy(&w);
    checkpoint_writer_destroy(NULL);
}

/* A disk that fills up, played by a limit on the size of files. */
static void test_writer_full(void)
{
    struct checkpoint_writer *w = NULL;
    char path[GEN_PATH_BYTES];
    struct tensor big = tensor_1d(NULL, DT_U8, FILE_BYTES);
    struct rlimit old, small;
    int before = count_files();
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    signal(SIGXFSZ, SIG_IGN);
    small = old;
    small.rlim_cur = 20000;
    CHECK_OK(checkpoint_writer_create(&w, gen_path(path, folder, "full.safetensors")));
    CHECK_OK(checkpoint_writer_announce(w, "x", &big));
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    CHECK_STATUS(checkpoint_writer_bytes(w, image, FILE_BYTES), ST_IO, "full.safetensors");
    CHECK_STATUS(checkpoint_writer_finish(w), ST_IO, "full.safetensors");
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    checkpoint_writer_destroy(&w);
    CHECK(count_files() == before);
}

/* ---- nested matrices ---- */

enum { N_ROWS = 3, N_COLS = 70, GROUP = 32, N_GROUPS = 3, N_PLANES = 8 };

struct part {
    const char *name;
    struct tensor shape;
};

static const struct part nested_parts[] = {
    {"m.planes", {NULL, DT_U8, 3, {N_PLANES, N_ROWS, 12}}},
    {"m.alpha.3", {NULL, DT_F16, 3, {N_ROWS, N_GROUPS, 3}}},
    {"m.lut.4", {NULL, DT_F16, 2, {N_ROWS, 16}}},
    {"m.offset.2", {NULL, DT_F16, 2, {N_ROWS, N_GROUPS}}},
    {"m.offset.3", {NULL, DT_F16, 2, {N_ROWS, N_GROUPS}}},
    {"m.offset.8", {NULL, DT_F16, 2, {N_ROWS, N_GROUPS}}},
    {"m.scale.2", {NULL, DT_F16, 2, {N_ROWS, N_GROUPS}}},
    {"m.scale.8", {NULL, DT_F16, 2, {N_ROWS, N_GROUPS}}},
    {"m.tail.8", {NULL, DT_F16, 2, {N_ROWS, N_GROUPS}}},
};
enum { N_PARTS = sizeof nested_parts / sizeof nested_parts[0] };

/* Writes the parts; part `odd` (or -1) gets another shape, part `missing` is left out. */
static void write_nested(int odd, struct tensor odd_shape, int missing)
{
    struct checkpoint_writer *w = NULL;
    char path[GEN_PATH_BYTES];
    CHECK_OK(checkpoint_writer_create(&w, gen_path(path, folder, "model.safetensors")));
    for (int i = 0; i < N_PARTS; i++) {
        if (i != missing) {
            const struct tensor *t = i == odd ? &odd_shape : &nested_parts[i].shape;
            CHECK_OK(checkpoint_writer_announce(w, nested_parts[i].name, t));
        }
    }
    for (int i = 0; i < N_PARTS; i++) {
        if (i != missing) {
            memset(image, 'A' + i, FILE_BYTES);
            const struct tensor *t = i == odd ? &odd_shape : &nested_parts[i].shape;
            CHECK_OK(checkpoint_writer_bytes(w, image, tensor_bytes(t)));
        }
    }
    CHECK_OK(checkpoint_writer_finish(w));
    checkpoint_writer_destroy(&w);
}

static enum status get_nested(struct nested_source *out, const enum level_kind kinds[BITS_ALL],
                              int32_t n_rows, int32_t n_cols, int32_t group, int32_t n_planes)
{
    struct checkpoint *ckpt = NULL;
    CHECK_OK(checkpoint_open(&ckpt, folder));
    if (!ckpt) {
        return ST_IO;
    }
    enum status st = checkpoint_get_nested(ckpt, "m", kinds, n_rows, n_cols, group, n_planes, out);
    checkpoint_close(&ckpt);
    return st;
}

static void test_nested(void)
{
    const enum level_kind kinds[BITS_ALL] = {
        [2] = LEVEL_TIED, [3] = LEVEL_FREE, [4] = LEVEL_LUT, [8] = LEVEL_TAIL};
    const struct tensor none = {0};
    struct nested_source s;
    struct checkpoint *ckpt = NULL;
    write_nested(-1, none, -1);
    CHECK_OK(checkpoint_open(&ckpt, folder));
    if (!ckpt) {
        return;
    }
    CHECK_OK(checkpoint_get_nested(ckpt, "m", kinds, N_ROWS, N_COLS, GROUP, N_PLANES, &s));
    CHECK(s.n_rows == N_ROWS && s.n_cols == N_COLS && s.n_cols_padded == 96 && s.n_planes == 8 &&
          s.group_cols == GROUP && memcmp(s.kind, kinds, sizeof s.kind) == 0);
    CHECK(s.planes && s.planes[0] == 'A' && s.planes[N_PLANES * N_ROWS * 12 - 1] == 'A');
    const uint16_t *const expected[N_PARTS] = {NULL,        s.alpha[3],  s.lut[4],
                                               s.offset[2], s.offset[3], s.offset[8],
                                               s.scale[2],  s.scale[8],  s.tail};
    for (int i = 1; i < N_PARTS; i++) {
        size_t n = tensor_count(&nested_parts[i].shape);
        CHECK(expected[i] && expected[i][0] == 0x0101 * ('A' + i) &&
              expected[i][n - 1] == 0x0101 * ('A' + i));
    }
    CHECK(!s.scale[3] && !s.alpha[2] && !s.lut[2] && !s.offset[4] && !s.scale[1]);
    checkpoint_close(&ckpt);
    // every part missing, of another shape, of another type
    for (int i = 0; i < N_PARTS; i++) {
        write_nested(-1, none, i);
        CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, GROUP, N_PLANES), ST_FORMAT,
                     nested_parts[i].name);
        CHECK(!s.planes);
        struct tensor odd = nested_parts[i].shape;
        odd.dims[odd.n_dims - 1] += 4;
        write_nested(i, odd, -1);
        CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, GROUP, N_PLANES), ST_SHAPE,
                     nested_parts[i].name);
        odd = nested_parts[i].shape;
        odd.dtype = odd.dtype == DT_U8 ? DT_F16 : DT_BF16;
        write_nested(i, odd, -1);
        CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, GROUP, N_PLANES), ST_SHAPE,
                     "expected dtype");
        CHECK(strstr(status_message(), nested_parts[i].name) != NULL);
    }
    write_nested(-1, none, -1);
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS, 97, GROUP, N_PLANES), ST_SHAPE, "m.planes");
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS + 1, N_COLS, GROUP, N_PLANES), ST_SHAPE, "m.planes");
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, GROUP, 4), ST_SHAPE, "m.planes");
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, 12, N_PLANES), ST_FORMAT, "groups of 12");
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, 0, N_PLANES), ST_FORMAT, "cannot be");
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS, INT32_MAX, GROUP, 8), ST_FORMAT, "cannot be");
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, GROUP, 9), ST_FORMAT, "9 planes");
    CHECK_STATUS(get_nested(&s, kinds, 0, N_COLS, GROUP, N_PLANES), ST_FORMAT, "0 rows");
    const enum level_kind tail4[BITS_ALL] = {[4] = LEVEL_TAIL};
    CHECK_STATUS(get_nested(&s, tail4, N_ROWS, N_COLS, GROUP, N_PLANES), ST_FORMAT,
                 "cannot hold tail levels of precision 4");
    struct tensor planes2 = nested_parts[0].shape;
    planes2.dims[0] = 2;
    write_nested(0, planes2, -1);
    CHECK_STATUS(get_nested(&s, kinds, N_ROWS, N_COLS, GROUP, 2), ST_FORMAT,
                 "cannot hold free levels of precision 3 with 2 planes");
    gen_drop(folder, "model.safetensors");
}

/* ---- digest ---- */

static void digest_of(const char *where, char out[DIGEST_TEXT])
{
    struct checkpoint *ckpt = NULL;
    out[0] = '\0';
    CHECK_OK(checkpoint_open(&ckpt, where));
    if (ckpt) {
        CHECK_OK(checkpoint_digest(ckpt, where, out));
        CHECK(strlen(out) == 32);
    }
    checkpoint_close(&ckpt);
}

static void test_digest(void)
{
    char first[DIGEST_TEXT], second[DIGEST_TEXT], path[GEN_PATH_BYTES], inner[GEN_PATH_BYTES];
    struct checkpoint *ckpt = NULL;
    gen_put_text(folder, "config.json", "{}");
    size_t n = gen_safetensors(
        image, "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3, 0);
    gen_write_file(gen_path(path, folder, "model.safetensors"), image, n);
    digest_of(folder, first);
    // python xxhash: xxh3_128("{}" u64(2) u64(1) "a" u64(2) "U8" u64(1) u64(3) u64(3) 01 02 03)
    CHECK(strcmp(first, "fe8714c512f93b5cf13a7a0eaaa43877") == 0);
    gen_drop(folder, "config.json");
    CHECK_OK(checkpoint_open(&ckpt, folder));
    CHECK_STATUS(checkpoint_digest(ckpt, folder, second), ST_IO, "config.json");
    checkpoint_close(&ckpt);
    gen_drop(folder, "model.safetensors");

    struct gen_model m = gen_model_default();
    CHECK(mkdir(gen_path(path, folder, "one"), 0700) == 0);
    CHECK(mkdir(gen_path(path, folder, "many"), 0700) == 0);
    CHECK_OK(gen_model_write(gen_path(path, folder, "one"), &m));
    digest_of(path, first);
    digest_of(path, second);
    CHECK(strcmp(first, second) == 0);
    m.n_shards = 3;
    CHECK_OK(gen_model_write(gen_path(path, folder, "many"), &m));
    digest_of(path, second);
    CHECK(strcmp(first, second) == 0);
    size_t bytes = 0;
    gen_path(inner, path, "model-00002-of-00003.safetensors");
    char *data = gen_read_file(inner, &bytes);
    CHECK(data != NULL);
    if (data) {
        data[bytes - 1] ^= 1;
        gen_write_file(inner, data, bytes);
        digest_of(path, second);
        CHECK(strcmp(first, second) != 0);
        data[bytes - 1] ^= 1;
        gen_write_file(inner, data, bytes);
        free(data);
    }
    digest_of(path, second);
    CHECK(strcmp(first, second) == 0);
    data = gen_read_file(gen_path(inner, path, "config.json"), &bytes);
    CHECK(data != NULL);
    if (data) {
        *strstr(data, "64") = '9';
        gen_write_file(inner, data, bytes);
        free(data);
        digest_of(path, second);
        CHECK(strcmp(first, second) != 0);
    }
    gen_drop(folder, "one");
    gen_drop(folder, "many");
}

int main(void)
{
    gen_folder(folder);
    test_writer_bytes();
    test_writer_errors();
    test_writer_full();
    test_nested();
    test_digest();
    gen_remove(folder);
    return check_report();
}
