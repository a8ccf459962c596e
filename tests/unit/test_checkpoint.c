/* Checkpoints from bytes written by hand: good files, a table of hostile ones, shards, a file of
 * another writer, and thousands of mutations that must never leave the mapping.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/checkpoint.h"
#include "core/checkpoint_internal.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { FILE_BYTES = 1 << 16 };

static char folder[GEN_PATH_BYTES]; /* of the whole test */
static unsigned char image[FILE_BYTES];

static size_t build(const char *header, size_t n_data, size_t shift)
{
    return gen_safetensors(image, header, n_data, shift);
}

static void put(const char *file, size_t bytes)
{
    char path[GEN_PATH_BYTES];
    gen_write_file(gen_path(path, folder, file), image, bytes);
}

static void put_text(const char *file, const char *text)
{
    gen_put_text(folder, file, text);
}

static void drop(const char *file)
{
    gen_drop(folder, file);
}

#define HEAD_A "\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}"
#define HEAD_B "\"b\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[16,22]}"
#define A(dtype, shape, offsets) \
    "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void test_valid(void)
{
    struct checkpoint *ckpt = NULL;
    struct tensor t;
    put("model.safetensors", build("{\"__metadata__\":{\"x\":[1]}," HEAD_B "," HEAD_A "}", 22, 0));
    CHECK_OK(checkpoint_open(&ckpt, folder));
    if (!ckpt) {
        return;
    }
    CHECK(checkpoint_n_tensors(ckpt) == 2);
    CHECK(strcmp(checkpoint_name(ckpt, 0), "a") == 0 && strcmp(checkpoint_name(ckpt, 1), "b") == 0);
    CHECK(checkpoint_has(ckpt, "a") && !checkpoint_has(ckpt, "__metadata__"));
    CHECK_OK(checkpoint_get(ckpt, "b", &t));
    CHECK(t.dtype == DT_F16 && t.n_dims == 1 && t.dims[0] == 3);
    CHECK(t.data && memcmp(t.data, "\x11\x12\x13\x14\x15\x16", 6) == 0);
    CHECK(checkpoint_tensor(ckpt, 1).data == t.data);
    CHECK_OK(checkpoint_get_shape(ckpt, "b", 3, 0, &t));
    CHECK_OK(checkpoint_get_shape(ckpt, "a", 2, 2, &t));
    CHECK(t.dtype == DT_F32 && t.n_dims == 2 && memcmp(t.data, "\1\2\3\4\5\6\7\x8", 8) == 0);
    CHECK_STATUS(checkpoint_get_shape(ckpt, "a", 2, 3, &t), ST_SHAPE,
                 "expected (2, 3) from config");
    CHECK(!t.data && strstr(status_message(), "found (2, 2)") &&
          strstr(status_message(), "/model.safetensors"));
    CHECK_STATUS(checkpoint_get_shape(ckpt, "a", 4, 0, &t), ST_SHAPE, "\"a\"");
    CHECK_STATUS(checkpoint_get(ckpt, "aa", &t), ST_FORMAT, "no tensor \"aa\"");
    CHECK(strstr(status_message(), "\"a\" and \"b\"") && strstr(status_message(), "/model.safet"));
    checkpoint_close(&ckpt);
    CHECK(!ckpt);
    checkpoint_close(&ckpt);
    checkpoint_close(NULL);
}

static void test_unusable(void)
{
    struct checkpoint *ckpt = NULL;
    struct tensor t;
    // another writer's types are no reason to refuse the file, only the tensor
    put("model.safetensors",
        build("{\"d\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]},"
              "\"future\":{\"dtype\":\"F4_X\",\"shape\":[3],\"data_offsets\":[8,10]},"
              "\"e\":{\"dtype\":\"U8\",\"shape\":[0,9],\"data_offsets\":[10,10]},"
              "\"s\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[10,11]},"
              "\"odd\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[11,13]}}",
              13, 0));
    CHECK_OK(checkpoint_open(&ckpt, folder));
    if (!ckpt) {
        return;
    }
    CHECK_STATUS(checkpoint_get(ckpt, "d", &t), ST_FORMAT, "\"d\" in");
    CHECK(strstr(status_message(), "dtype F64") && !t.data);
    CHECK_STATUS(checkpoint_get(ckpt, "future", &t), ST_FORMAT, "dtype F4_X");
    CHECK_STATUS(checkpoint_get(ckpt, "odd", &t), ST_FORMAT, "multiple of the 2 bytes of BF16");
    CHECK_OK(checkpoint_get(ckpt, "e", &t));
    CHECK(tensor_count(&t) == 0 && t.n_dims == 2);
    CHECK_STATUS(checkpoint_get_shape(ckpt, "s", 1, 0, &t), ST_FORMAT,
                 "expected weights as F32, F16 or BF16, found U8");
    CHECK(!t.data);
    CHECK_OK(checkpoint_get(ckpt, "s", &t));
    CHECK(t.n_dims == 1 && tensor_count(&t) == 1 && *(unsigned char *)t.data == 11);
    CHECK(strcmp(checkpoint_name(ckpt, 2), "future") == 0);
    CHECK(strcmp(checkpoint_dtype(ckpt, 2), "F4_X") == 0);
    CHECK(checkpoint_tensor(ckpt, 2).dtype == DT_N && !checkpoint_tensor(ckpt, 2).data);
    CHECK(!checkpoint_tensor(ckpt, 3).data); // odd
    checkpoint_close(&ckpt);
    // a header that is not padded, as early writers left it
    put("model.safetensors", build("{" HEAD_A "}", 16, 1));
    CHECK_OK(checkpoint_open(&ckpt, folder));
    CHECK_STATUS(checkpoint_get(ckpt, "a", &t), ST_FORMAT, "multiple of the 4 bytes of F32");
    checkpoint_close(&ckpt);
}

/* Every message names the file; `part` is what else it must say. */
static const struct hostile {
    const char *what, *header;
    size_t n_data;
    const char *part;
} hostile[] = {
    {"end outside", A("\"F32\"", "[2,2]", "[0,16]"), 15, "\"a\": data_offsets [0, 16]"},
    {"begin outside", A("\"U8\"", "[0]", "[9,9]"), 8, "\"a\""},
    {"begin after end", A("\"F32\"", "[2,2]", "[16,0]"), 16, "\"a\": data_offsets [16, 0]"},
    {"negative begin", A("\"F32\"", "[2,2]", "[-16,0]"), 16, "\"a\": data_offsets [-16, 0]"},
    {"one offset", A("\"F32\"", "[2,2]", "[16]"), 16, "\"a\": expected data_offsets"},
    {"three offsets", A("\"F32\"", "[2,2]", "[0,16,16]"), 16, "\"a\": expected data_offsets"},
    {"real offset", A("\"F32\"", "[2,2]", "[0,16.0]"), 16, "\"a\": expected data_offsets"},
    {"text offsets", A("\"F32\"", "[2,2]", "\"0,16\""), 16, "\"a\": expected data_offsets"},
    {"offset near 2^63", A("\"F32\"", "[2,2]", "[0,9223372036854775807]"), 16, "\"a\""},
    {"offset beyond 64 bits", A("\"F32\"", "[2,2]", "[0,18446744073709551632]"), 16, "not valid"},
    {"too few bytes", A("\"F32\"", "[2,2]", "[0,12]"), 12, "\"a\": 12 bytes, expected 16"},
    {"too many bytes", A("\"F16\"", "[2,2]", "[0,16]"), 16, "\"a\": 16 bytes, expected 8"},
    {"known but unusable type", A("\"F64\"", "[2,2]", "[0,16]"), 16,
     "\"a\": 16 bytes, expected 32"},
    {"unknown type outside", A("\"F4\"", "[2,2]", "[0,17]"), 16, "\"a\": data_offsets"},
    {"overlap", "{" HEAD_A ",\"b\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[14,20]}}", 20,
     "\"b\" begins at byte 14 of the data, overlapping"},
    {"same place", "{" HEAD_A ",\"b\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":[0,16]}}",
     16, "overlapping"},
    {"empty tensor inside another",
     "{" HEAD_A ",\"b\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[3,3]}}", 16,
     "overlapping"},
    {"hole", "{" HEAD_A ",\"b\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[18,24]}}", 24,
     "\"b\" begins at byte 18 of the data, leaving a hole"},
    {"hole at the start", A("\"F32\"", "[2,2]", "[4,20]"), 20, "leaving a hole from 0"},
    {"bytes behind", "{" HEAD_A "}", 17, "end at byte 16 of the data, the file at 17"},
    {"negative dimension", A("\"F32\"", "[-2,-2]", "[0,16]"), 16, "\"a\": dimension 0"},
    {"dimension of 2^31", A("\"U8\"", "[2147483648,0]", "[0,0]"), 0, "\"a\": dimension 0"},
    {"real dimension", A("\"F32\"", "[2,2.0]", "[0,16]"), 16,
     "\"a\": dimension 1 of the shape is 2"},
    {"text dimension", A("\"F32\"", "[2,\"2\\n\"]", "[0,16]"), 16, "\"2?\""},
    {"shape missing", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,16]}}", 16,
     "\"a\": expected a sh"},
    {"shape a number", A("\"F32\"", "4", "[0,16]"), 16, "\"a\": expected a shape"},
    {"five dimensions", A("\"F32\"", "[1,1,2,2,1]", "[0,16]"), 16, "\"a\": expected a shape"},
    {"count overflows", A("\"U8\"", "[2147483647,2147483647,2147483647]", "[0,16]"), 16,
     "overflows"},
    {"count overflows before 0", A("\"U8\"", "[2147483647,2147483647,2147483647,0]", "[0,0]"), 0,
     "overflows"},
    {"bytes overflow", A("\"I64\"", "[1073741824,1073741824,2]", "[0,0]"), 0, "\"a\": 0 bytes"},
    {"type a number", A("32", "[2,2]", "[0,16]"), 16, "\"a\": dtype is 32"},
    {"type missing", "{\"a\":{\"shape\":[2,2],\"data_offsets\":[0,16]}}", 16,
     "\"a\": dtype is nothing"},
    {"entry a list", "{\"a\":[0,16]}", 16, "\"a\" is an array"},
    {"duplicate name", "{" HEAD_A "," HEAD_A "}", 16, "duplicate"},
    {"duplicate key",
     "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"U8\",\"shape\":[2,2],"
     "\"data_offsets\":[0,16]}}",
     16, "duplicate"},
    {"half a header", "{" HEAD_A, 16, "not valid JSON"},
    {"not UTF-8", "{\"\xff\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}", 16,
     "not valid JSON"},
    {"a list", "[1, 2]", 16, "expected a JSON object"},
    {"garbage behind", "{" HEAD_A "} x", 16, "not valid JSON"},
    {"no header", "", 16, "not valid JSON"},
    {"no tensor", "{}", 0, "holds no tensor"},
    {"only metadata", "{\"__metadata__\":{\"format\":\"pt\"}}", 0, "holds no tensor"},
    {"empty name", "{\"\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}", 16,
     "name"},
    {"line break in a name",
     "{\"x\\ny\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", 16,
     "control characters"},
    {"NUL in a name", "{\"a\\u0000\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
     16, "not valid JSON"},
};

/* Opening fails so, the message names the file in one line, and nothing is left open. */
static void check_refused(const char *what, enum status st, const char *part)
{
    struct checkpoint *ckpt = (void *)image;
    enum status found = checkpoint_open(&ckpt, folder);
    const char *message = status_message();
    if (!CHECK(found == st && strstr(message, part) && strstr(message, folder) && !ckpt &&
               !strchr(message, '\n'))) {
        fprintf(stderr, "    %s: %s: %s\n", what, status_name(found), message);
    }
    if (found == ST_OK) {
        checkpoint_close(&ckpt);
    }
}

static void test_hostile(void)
{
    for (size_t i = 0; i < sizeof hostile / sizeof hostile[0]; i++) {
        put("model.safetensors", build(hostile[i].header, hostile[i].n_data, 0));
        check_refused(hostile[i].what, ST_FORMAT, hostile[i].part);
    }
    // nesting deep enough to exhaust a careless parser's stack
    size_t n = build("", 0, 40000);
    memset(image + 8, '[', 40000);
    put("model.safetensors", n);
    check_refused("deep nesting", ST_FORMAT, "not valid JSON");
}

static void test_lengths(void)
{
    char path[GEN_PATH_BYTES];
    size_t whole = build("{" HEAD_A "," HEAD_B "}", 22, 0);
    for (size_t n = 0; n < whole; n++) {
        put("model.safetensors", n);
        check_refused("cut short", ST_FORMAT, "/model.safetensors");
    }
    // inside the bound and outside the file, by much and by one; then beyond the bound
    const uint64_t lengths[] = {90000000,  whole - 7, UINT64_MAX, UINT64_MAX - 7,
                                INT64_MAX, 1u << 31,  100000001};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        build("{" HEAD_A "," HEAD_B "}", 22, 0);
        for (int k = 0; k < 8; k++) {
            image[k] = (unsigned char)(lengths[i] >> 8 * k);
        }
        put("model.safetensors", whole);
        check_refused("header length", ST_FORMAT, "header length");
    }
    image[0] = 8 + 1; // only 100000001 is left: now the file is long enough, with a hole
    CHECK(truncate(gen_path(path, folder, "model.safetensors"), 100000100) == 0);
    check_refused("header above the bound", ST_FORMAT, "header length 100000001");
    put_text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n");
    check_refused("LFS pointer", ST_FORMAT, "git lfs pull");
}

static void test_missing(void)
{
    struct checkpoint *ckpt = NULL;
    char path[GEN_PATH_BYTES], inner[GEN_PATH_BYTES];
    drop("model.safetensors");
    check_refused("nothing there", ST_IO, "neither model.safetensors nor model.safetensors.index");
    put_text("pytorch_model.bin", "x");
    check_refused("a pickle", ST_IO, "safe_serialization=True");
    CHECK_STATUS(checkpoint_open(&ckpt, gen_path(path, folder, "pytorch_model.bin")), ST_IO,
                 "pytorch_model.bin is a file, expected a model folder");
    drop("pytorch_model.bin");
    CHECK_STATUS(checkpoint_open(&ckpt, gen_path(path, folder, "nowhere")), ST_IO,
                 "nowhere: No such file");
    CHECK(mkdir(gen_path(path, folder, "model.safetensors"), 0700) == 0);
    check_refused("a folder", ST_IO, "it is a folder");
    drop("model.safetensors");
    CHECK(mkfifo(gen_path(path, folder, "model.safetensors"), 0600) == 0);
    check_refused("a pipe", ST_IO, "not a regular file");
    drop("model.safetensors");
    memset(image, 'x', 5000);
    image[5000] = '\0';
    CHECK_STATUS(checkpoint_open(&ckpt, (char *)image), ST_IO, "longer than");
    if (geteuid() != 0) {
        put("model.safetensors", 10);
        CHECK(chmod(gen_path(inner, folder, "model.safetensors"), 0) == 0);
        check_refused("unreadable", ST_IO, "Permission denied");
        drop("model.safetensors");
    }
}

/* ---- shards ---- */

#define MAP(entries) "{\"metadata\":{\"total_size\":22},\"weight_map\":" entries "}"
#define ONE "one.safetensors"
#define TWO "two.safetensors"

static void test_shards(void)
{
    struct checkpoint *ckpt = NULL;
    struct tensor t;
    const char *index = "model.safetensors.index.json";
    put(ONE, build("{" HEAD_A "}", 16, 0));
    put(TWO, build("{\"b\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[0,6]},"
                   "\"extra\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[6,8]}}",
                   8, 0));
    put_text(index, MAP("{\"b\":\"" TWO "\",\"a\":\"" ONE "\"}"));
    CHECK_OK(checkpoint_open(&ckpt, folder));
    if (ckpt) {
        CHECK(checkpoint_n_tensors(ckpt) == 2 && ckpt->n_shards == 2);
        CHECK(!checkpoint_has(ckpt, "extra")); // the index decides
        CHECK_OK(checkpoint_get(ckpt, "a", &t));
        CHECK(((unsigned char *)t.data)[15] == 16);
        CHECK_STATUS(checkpoint_get_shape(ckpt, "b", 9, 0, &t), ST_SHAPE, "/" TWO);
        CHECK_STATUS(checkpoint_get(ckpt, "c", &t), ST_FORMAT, index);
    }
    checkpoint_close(&ckpt);
    static const struct {
        const char *text, *part;
        enum status st;
    } bad[] = {
        {MAP("{\"b\":\"" TWO "\",\"a\":\"three.safetensors\"}"), "/three.safetensors, which",
         ST_IO},
        {MAP("{\"b\":\"" TWO "\",\"c\":\"" TWO "\"}"), "places tensor \"c\" in " TWO, ST_FORMAT},
        {MAP("{\"a\":\"" TWO "\"}"), "places tensor \"a\" in " TWO, ST_FORMAT},
        {MAP("{\"a\":\"../" ONE "\"}"), "names \"../" ONE "\", expected", ST_FORMAT},
        {MAP("{\"a\":\"/etc/passwd\"}"), "names \"/etc/passwd\"", ST_FORMAT},
        {MAP("{\"a\":\"/etc/x.safetensors\"}"), "names \"/etc/x.safetensors\"", ST_FORMAT},
        {MAP("{\"a\":\"..\"}"), "names \"..\"", ST_FORMAT},
        {MAP("{\"a\":\".safetensors\"}"), "names \".safetensors\"", ST_FORMAT},
        {MAP("{\"a\":\"\"}"), "names \"\"", ST_FORMAT},
        {MAP("{\"a\":\"x\\n.safetensors\"}"), "names \"x?.safetensors\"", ST_FORMAT},
        {MAP("{\"a\":1}"), "names 1", ST_FORMAT},
        {MAP("{}"), "weight_map", ST_FORMAT},
        {MAP("[]"), "weight_map", ST_FORMAT},
        {"{}", "weight_map", ST_FORMAT},
        {"{\"weight_map\":", "not valid JSON", ST_FORMAT},
        {"[1]", "expected a JSON object", ST_FORMAT},
        {MAP("{\"a\":\"" ONE "\",\"a\":\"" TWO "\"}"), "duplicate", ST_FORMAT},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        put_text(index, bad[i].text);
        check_refused(bad[i].text, bad[i].st, bad[i].part);
    }
    put_text(index, MAP("{\"b\":\"" TWO "\",\"a\":\"" ONE "\"}"));
    put(ONE, build("{" HEAD_A "," HEAD_B "}", 22, 0)); // a second b, which the index does not mean
    CHECK_OK(checkpoint_open(&ckpt, folder));
    if (ckpt) {
        CHECK(checkpoint_n_tensors(ckpt) == 2);
        CHECK_OK(checkpoint_get(ckpt, "b", &t));
        CHECK(((unsigned char *)t.data)[0] == 1); // of TWO; ONE has 17 there
    }
    checkpoint_close(&ckpt);
    put(ONE, build("{" HEAD_A "}", 15, 0));
    check_refused("a damaged shard", ST_FORMAT, "/" ONE ": tensor \"a\": data_offsets");
    put(ONE, 0);
    check_refused("an empty shard", ST_FORMAT, "/" ONE " has 0 bytes");
    drop(ONE);
    drop(TWO);
    drop(index);
}

/* ---- a file of another writer ---- */

static void test_golden(void)
{
    struct checkpoint *ckpt = NULL;
    struct tensor t;
    CHECK_OK(checkpoint_open(&ckpt, PMPD_GOLDEN "/safetensors"));
    if (!ckpt) {
        return;
    }
    CHECK(checkpoint_n_tensors(ckpt) == 9);
    CHECK_OK(checkpoint_get_shape(ckpt, "matrix", 3, 4, &t));
    for (int i = 0; t.data && i < 12; i++) {
        CHECK(t.dtype == DT_F32 && ((float *)t.data)[i] == ((float)i - 5.5f) / 4);
    }
    float values[6] = {0};
    CHECK_OK(checkpoint_get_shape(ckpt, "half", 2, 3, &t));
    if (t.data) {
        floats_from(values, t.data, t.dtype, 6);
    }
    for (int i = 0; i < 6; i++) {
        CHECK(t.dtype == DT_F16 && values[i] == (float)(i - 2) / 8);
    }
    CHECK_OK(checkpoint_get_shape(ckpt, "brain", 4, 0, &t));
    if (t.data) {
        floats_from(values, t.data, t.dtype, 4);
    }
    CHECK(t.dtype == DT_BF16 && values[0] == 1 && values[1] == -2 && values[2] == 0.25f &&
          isinf(values[3]));
    CHECK_OK(checkpoint_get(ckpt, "bytes", &t));
    CHECK(t.n_dims == 2 && t.dims[0] == 7 && t.dims[1] == 1 && t.dtype == DT_U8 && t.data &&
          memcmp(t.data, "\0\3\6\x9\xc\xf\x12", 7) == 0);
    CHECK_OK(checkpoint_get(ckpt, "numbers", &t));
    CHECK(t.n_dims == 2 && t.dims[0] == 1 && t.dims[1] == 2 && t.dtype == DT_I32 && t.data &&
          ((int32_t *)t.data)[0] == -1 && ((int32_t *)t.data)[1] == INT32_MAX);
    CHECK_OK(checkpoint_get(ckpt, "wide", &t));
    CHECK(t.n_dims == 1 && t.dims[0] == 1 && t.dtype == DT_I64 && t.data &&
          *(int64_t *)t.data == -((int64_t)1 << 62));
    CHECK_OK(checkpoint_get_shape(ckpt, "scalar", 1, 0, &t));
    CHECK(t.dtype == DT_F32 && t.data && *(float *)t.data == 3.25f);
    CHECK_OK(checkpoint_get_shape(ckpt, "nothing", 0, 5, &t));
    CHECK(t.dtype == DT_F16 && tensor_bytes(&t) == 0);
    CHECK_STATUS(checkpoint_get(ckpt, "double", &t), ST_FORMAT, "dtype F64");
    checkpoint_close(&ckpt);
}

/* ---- mutations ---- */

/* A tensor of a file that opened lies in its mapping, whole; and can be read. */
static unsigned check_inside(const struct checkpoint *ckpt)
{
    unsigned sum = 0;
    for (int i = 0; i < checkpoint_n_tensors(ckpt); i++) {
        const struct entry *e = &ckpt->entries[i];
        const struct shard *s = &ckpt->shards[e->shard];
        struct tensor t;
        bool inside = s->data_at <= s->bytes && e->begin <= s->bytes - s->data_at &&
                      e->bytes <= s->bytes - s->data_at - e->begin;
        if (!CHECK(inside) || checkpoint_get(ckpt, checkpoint_name(ckpt, i), &t) != ST_OK) {
            continue;
        }
        CHECK(tensor_bytes(&t) == e->bytes);
        for (size_t k = 0; k < tensor_bytes(&t); k++) {
            sum += ((const unsigned char *)t.data)[k];
        }
    }
    return sum;
}

static void test_mutations(void)
{
    struct gen_rng rng = {.state = 20240607};
    static unsigned char good[FILE_BYTES];
    size_t n_good = build("{" HEAD_A "," HEAD_B
                          ",\"c\":{\"dtype\":\"U8\",\"shape\":[1,2,3],\"data_offsets\":[22,28]}}",
                          28, 0);
    memcpy(good, image, n_good);
    int opened = 0, refused = 0;
    unsigned sum = 0;
    enum { ROUNDS = 6000 };
    for (int round = 0; round < ROUNDS; round++) {
        size_t n = n_good, n_header = n_good - 28;
        memcpy(image, good, n);
        for (uint32_t k = gen_below(&rng, 3) + 1; k > 0; k--) {
            size_t at = gen_below(&rng, (uint32_t)(round % 2 ? n_header : n));
            if (round % 2 && image[at] >= '0' && image[at] <= '9') {
                image[at] = (unsigned char)('0' + gen_below(&rng, 10));
            } else if (round % 3 == 0) {
                static const char structure[] = "{}[]:,\"\\-e.0 ";
                image[at] = (unsigned char)structure[gen_below(&rng, sizeof structure - 1)];
            } else {
                image[at] ^= (unsigned char)(1u << gen_below(&rng, 8));
            }
        }
        if (round % 5 == 0) {
            n = gen_below(&rng, (uint32_t)n + 1);
        }
        put("model.safetensors", n);
        struct checkpoint *ckpt = NULL;
        if (checkpoint_open(&ckpt, folder) == ST_OK) {
            opened++;
            sum += check_inside(ckpt);
        } else {
            refused++;
            CHECK(!ckpt);
        }
        checkpoint_close(&ckpt);
    }
    printf("mutations: %d opened, %d refused, sum %u\n", opened, refused, sum);
    CHECK(opened > 100 && refused > 1000); // else the loop tests one side only
    drop("model.safetensors");
}

static void test_stories(void)
{
    const char *data = getenv("PMPD_TEST_DATA");
    char path[GEN_PATH_BYTES];
    struct checkpoint *ckpt = NULL;
    struct tensor t;
    if (!data) {
        printf("PMPD_TEST_DATA is not set: stories260k is not read\n");
        return;
    }
    CHECK_OK(checkpoint_open(&ckpt, gen_path(path, data, "stories260k")));
    if (ckpt) {
        CHECK(checkpoint_n_tensors(ckpt) == 47);
        CHECK_OK(checkpoint_get_shape(ckpt, "model.embed_tokens.weight", 512, 64, &t));
        CHECK_OK(checkpoint_get_shape(ckpt, "model.layers.4.mlp.down_proj.weight", 64, 172, &t));
        check_inside(ckpt);
    }
    checkpoint_close(&ckpt);
}

int main(void)
{
    gen_folder(folder);
    test_valid();
    test_unusable();
    test_hostile();
    test_lengths();
    test_missing();
    test_shards();
    test_golden();
    test_mutations();
    test_stories();
    gen_remove(folder);
    return check_report();
}
