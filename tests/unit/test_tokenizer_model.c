/* tokenizer.model: files that must be refused, files damaged at random (an error, never a crash),
 * the BOS rules of tokenizer_config.json, streams of bytes, and with PMPD_TEST_DATA a trained model
 * against its tokenizer.json. The ids of other models are in test_tokenizer.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <unistd.h>

#include "core/json.h"
#include "core/mem.h"
#include "core/tokenizer.h"
#include "core/unicode.h"
#include "tests/check.h"

enum { MODEL_ROOM = 1 << 16 };

static char scratch[] = "/tmp/pmpd-spm-XXXXXX";
static unsigned char model[MODEL_ROOM];
static size_t model_bytes;

static void write_file(const char *name, const void *data, size_t bytes)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    FILE *out = fopen(path, "wb");
    CHECK(out && fwrite(data, 1, bytes, out) == bytes);
    CHECK(out && fclose(out) == 0);
}

static void remove_file(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    unlink(path);
}

static void read_model(const char *path)
{
    FILE *in = fopen(path, "rb");
    CHECK(in != NULL);
    model_bytes = in ? fread(model, 1, sizeof model / 2, in) : 0;
    CHECK(model_bytes > 1000 && model_bytes < sizeof model / 2);
    if (in) {
        fclose(in);
    }
}

static void read_golden(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/tokenizer/%s/tokenizer.model", PMPD_GOLDEN, name);
    read_model(path);
}

/* The model with something behind it: fields of a message may come in any order, and again. */
static enum status open_with(struct tokenizer **tok, const void *tail, size_t bytes)
{
    memcpy(model + model_bytes, tail, bytes);
    write_file("tokenizer.model", model, model_bytes + bytes);
    return tokenizer_open(tok, scratch, 0);
}

#define REFUSED(tail, st, part)                                          \
    do {                                                                 \
        struct tokenizer *tok_ = NULL;                                   \
        CHECK_STATUS(open_with(&tok_, tail, sizeof tail - 1), st, part); \
        CHECK(tok_ == NULL);                                             \
    } while (0)

static void test_refused(void)
{
    struct tokenizer *tok = NULL;
    read_golden("spm-bpe");
    CHECK_OK(open_with(&tok, "", 0));
    CHECK(tok && strcmp(tokenizer_kind(tok), "SentencePiece BPE") == 0);
    CHECK(tok && tokenizer_n_vocab(tok) == 560 && tokenizer_bos(tok) == 1);
    tokenizer_close(&tok);
    CHECK_OK(tokenizer_open(&tok, scratch, 560));
    tokenizer_close(&tok);
    CHECK_STATUS(tokenizer_open(&tok, scratch, 559), ST_FORMAT, "vocab_size 559");
    /* normalizer_spec and denormalizer_spec with a precompiled_charsmap of 4 bytes */
    REFUSED("\x1A\x06\x12\x04\x01\x02\x03\x04", ST_UNSUPPORTED, "character map");
    REFUSED("\x2A\x06\x12\x04\x01\x02\x03\x04", ST_UNSUPPORTED, "character map");
    /* pieces: empty, not UTF-8, a zero byte, type 7, type 0, NaN, a byte of another form */
    REFUSED("\x0A\x02\x0A\x00", ST_FORMAT, "piece 560 has 0 bytes");
    REFUSED("\x0A\x00", ST_FORMAT, "piece 560 has 0 bytes");
    REFUSED("\x0A\x03\x0A\x01\xFF", ST_FORMAT, "expected 1 to 1024 bytes of UTF-8");
    REFUSED("\x0A\x05\x0A\x03q\x00q", ST_FORMAT, "expected 1 to 1024 bytes of UTF-8");
    REFUSED("\x0A\x05\x0A\x01q\x18\x07", ST_FORMAT, "type 7");
    REFUSED("\x0A\x05\x0A\x01q\x18\x00", ST_FORMAT, "type 0");
    REFUSED("\x0A\x08\x0A\x01q\x15\x00\x00\xC0\x7F", ST_FORMAT, "score nan");
    REFUSED("\x0A\x06\x0A\x02qq\x18\x06", ST_FORMAT, "not of the form <0xNN>");
    /* a piece twice: the library's word */
    REFUSED("\x0A\x03\x0A\x01t", ST_FORMAT, "SentencePiece refuses it");
    /* fields that end behind the file, groups, endless numbers */
    REFUSED("\x0A\x7F\x0A\x01q", ST_FORMAT, "is cut off or is no SentencePiece model");
    REFUSED("\x0A", ST_FORMAT, "is cut off or is no SentencePiece model");
    REFUSED("\x0B\x0C", ST_FORMAT, "is cut off or is no SentencePiece model");
    REFUSED("\x08\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", ST_FORMAT, "is cut off");
    REFUSED("\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01q", ST_FORMAT, "is cut off");
    REFUSED("\x0A\x03\x0A\x09q", ST_FORMAT, "is cut off");
    REFUSED("\x12\x02\x18\x09", ST_FORMAT, "none of unigram, BPE, word, char");
    REFUSED("\x12\x05\xE2\x02\x02\xC3\xC3", ST_FORMAT, "unk_surface");
    write_file("tokenizer.model", "", 0);
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "is empty");
    write_file("tokenizer.model", "{\"model\": {}}", 13);
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "no SentencePiece model");
    CHECK(tok == NULL);
}

static void test_config(void)
{
    static const struct {
        const char *config;
        int32_t bos;
    } good[] = {{"{}", 1},
                {"{\"add_bos_token\": null}", 1},
                {"{\"add_bos_token\": true, \"add_eos_token\": false}", 1},
                {"{\"add_bos_token\": false}", -1}};
    struct tokenizer *tok = NULL;
    int32_t *ids = NULL, n = 0;
    read_golden("spm-unigram");
    write_file("tokenizer.model", model, model_bytes);
    for (size_t i = 0; i < 4; i++) {
        write_file("tokenizer_config.json", good[i].config, strlen(good[i].config));
        CHECK_OK(tokenizer_open(&tok, scratch, 0));
        CHECK(tok && tokenizer_bos(tok) == good[i].bos);
        CHECK_OK(tokenizer_encode(tok, "", 0, true, &ids, &n));
        CHECK(good[i].bos < 0 ? n == 0 : n == 1 && ids[0] == 1);
        mem_free(ids);
        tokenizer_close(&tok);
    }
    const char *eos = "{\"add_eos_token\": true}", *bad = "{\"add_bos_token\": 1}";
    write_file("tokenizer_config.json", eos, strlen(eos));
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_UNSUPPORTED, "add_eos_token");
    write_file("tokenizer_config.json", bad, strlen(bad));
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "add_bos_token");
    remove_file("tokenizer_config.json");
    write_file("added_tokens.json", "{\"<pad>\": 32000}", 16);
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_UNSUPPORTED, "added_tokens.json");
    remove_file("added_tokens.json");
    CHECK_OK(tokenizer_open(&tok, scratch, 0));
    CHECK_STATUS(tokenizer_encode(tok, "a\xFFz", 3, true, &ids, &n), ST_USER, "byte 1");
    tokenizer_close(&tok);
}

/* What a damaged file that still opens does with texts and ids: anything but a crash. */
static void use(struct tokenizer *tok)
{
    static const char *const texts[] = {"", "the sea \u6D77 \U0001F600 12",
                                        "  wonderful  New York"};
    char piece[TOKENIZER_PIECE_BYTES];
    struct token_stream s;
    for (int i = 0; i < 3; i++) {
        int32_t *ids = NULL, n = 0;
        if (tokenizer_encode(tok, texts[i], strlen(texts[i]), true, &ids, &n) == ST_OK) {
            for (int32_t j = 0; j < n; j++) {
                CHECK(ids[j] >= 0 && ids[j] < tokenizer_n_vocab(tok));
            }
        }
        mem_free(ids);
    }
    token_stream_begin(&s, tok, true);
    for (int32_t id = -1; id <= tokenizer_n_vocab(tok); id++) {
        size_t n = token_stream_next(&s, id, piece, sizeof piece);
        CHECK(utf8_check(piece, n) == n);
    }
}

static void test_damaged(void)
{
    static const char *const names[] = {"spm-bpe", "spm-unigram", "spm-bytes"};
    uint64_t rng = 7;
    int n_opened = 0, n_refused = 0;
    for (int k = 0; k < 3; k++) {
        read_golden(names[k]);
        for (int round = 0; round < 400; round++) {
            struct tokenizer *tok = NULL;
            size_t bytes = model_bytes;
            unsigned char before[3];
            size_t at[3];
            int n_changed = round % 4; /* 0: cut off instead */
            for (int i = 0; i < n_changed; i++) {
                rng = rng * 6364136223846793005u + 1442695040888963407u;
                /* half of the changes near the end, where trainer and normaliser are */
                size_t span = rng >> 20 & 1 ? bytes : bytes < 300 ? bytes : 300;
                at[i] = bytes - 1 - (size_t)(rng >> 33) % span;
                before[i] = model[at[i]];
                model[at[i]] = (unsigned char)(rng >> 24);
            }
            if (n_changed == 0) {
                bytes = (size_t)round * bytes / 400;
            }
            write_file("tokenizer.model", model, bytes);
            if (tokenizer_open(&tok, scratch, 0) == ST_OK) {
                n_opened++;
                use(tok);
            } else {
                n_refused++;
                CHECK(tok == NULL && strlen(status_message()) > 20);
            }
            tokenizer_close(&tok);
            for (int i = n_changed - 1; i >= 0; i--) {
                model[at[i]] = before[i];
            }
        }
    }
    printf("damaged: %d opened, %d refused\n", n_opened, n_refused);
    CHECK(n_opened > 100 && n_refused > 100);
}

/* Byte pieces: a character of three is shown when it is whole, a broken one as one U+FFFD. */
static void test_bytes(void)
{
    struct tokenizer *tok = NULL;
    struct token_stream s;
    char text[TOKENIZER_PIECE_BYTES];
    int32_t *ids = NULL, n = 0;
    read_golden("spm-bpe");
    write_file("tokenizer.model", model, model_bytes);
    CHECK_OK(tokenizer_open(&tok, scratch, 0));
    CHECK_OK(
        tokenizer_encode(tok, "\u0939\u0F40", 6, false, &ids, &n)); /* ka of Tibetan: no piece */
    CHECK(n >= 4);
    int32_t first = n >= 3 ? ids[n - 3] : 0;
    token_stream_begin(&s, tok, true);
    for (int32_t i = 0; i < n; i++) {
        size_t bytes = token_stream_next(&s, ids[i], text, sizeof text);
        CHECK(i < n - 3 || (i < n - 1 ? bytes == 0 : strcmp(text, "\u0F40") == 0));
    }
    CHECK(token_stream_next(&s, first, text, sizeof text) == 0);
    CHECK(token_stream_next(&s, 1, text, sizeof text) == 0); /* <s> shows nothing */
    CHECK(token_stream_end(&s, text, sizeof text) == 3 && strcmp(text, "\uFFFD") == 0);
    CHECK(token_stream_next(&s, 100000, text, sizeof text) == 3);
    mem_free(ids);
    /* a space that follows a broken character does not begin the text */
    char *whole = NULL;
    CHECK_OK(tokenizer_encode(tok, "t", 1, false, &ids, &n));
    int32_t broken_first[2] = {first, n > 0 ? ids[0] : 0};
    CHECK_OK(tokenizer_decode(tok, broken_first, 2, true, &whole));
    CHECK(whole && strncmp(whole, "\uFFFD ", 4) == 0);
    mem_free(whole);
    CHECK_OK(tokenizer_decode(tok, broken_first + 1, 1, true, &whole));
    CHECK(whole && whole[0] != ' ');
    mem_free(whole);
    mem_free(ids);
    tokenizer_close(&tok);
}

/* The trained model of the data folder: both of its files say the same. */
static void test_stories(void)
{
    const char *data = getenv("PMPD_TEST_DATA");
    char folder[512], path[600];
    struct tokenizer *by_json = NULL, *tok = NULL;
    json_t *golden = NULL;
    json_error_t error;
    long n_compared = 0;
    if (!data) {
        printf("PMPD_TEST_DATA is not set: stories260k was not compared\n");
        return;
    }
    snprintf(folder, sizeof folder, "%s/stories260k", data);
    snprintf(path, sizeof path, "%s/tokenizer.model", folder);
    read_model(path);
    write_file("tokenizer.model", model, model_bytes);
    CHECK_OK(tokenizer_open(&by_json, folder, 512));
    CHECK_OK(tokenizer_open(&tok, scratch, 512));
    snprintf(path, sizeof path, "%s/tokenizer_cases.json", folder);
    json_t *cases = json_load_file(path, 0, &error);
    CHECK(json_array_size(cases) >= 12);
    for (size_t i = 0; tok && i < json_array_size(cases); i++) {
        const json_t *one = json_array_get(cases, i), *want = json_object_get(one, "ids");
        const char *text = json_string_value(json_object_get(one, "text"));
        int32_t *ids = NULL, n = 0;
        char *shown = NULL;
        CHECK_OK(tokenizer_encode(tok, text, strlen(text), true, &ids, &n));
        bool same = n == (int32_t)json_array_size(want);
        for (int32_t j = 0; same && j < n; j++) {
            same = ids[j] == json_integer_value(json_array_get(want, (size_t)j));
        }
        CHECK(same);
        CHECK_OK(tokenizer_decode(tok, ids, n, true, &shown));
        CHECK(shown && strcmp(shown, text) == 0);
        mem_free(shown);
        mem_free(ids);
    }
    json_decref(cases);
    CHECK_OK(json_read_file(&golden, PMPD_GOLDEN "/tokenizer/cases.json", 1 << 24));
    const json_t *texts = json_object_get(golden, "texts");
    for (size_t i = 0; tok && by_json && i < json_array_size(texts); i++) {
        const char *text = json_string_value(json_array_get(texts, i));
        int32_t *a = NULL, *b = NULL, n_a = 0, n_b = 0;
        if (strstr(text, "<s>") || strstr(text, "</s>") || strstr(text, "<unk>")) {
            continue; /* tokens in a tokenizer.json, text in a tokenizer.model */
        }
        CHECK_OK(tokenizer_encode(tok, text, strlen(text), true, &a, &n_a));
        CHECK_OK(tokenizer_encode(by_json, text, strlen(text), true, &b, &n_b));
        if (!CHECK(n_a == n_b && memcmp(a, b, (size_t)n_a * sizeof *a) == 0)) {
            fprintf(stderr, "    \"%.100s\"\n", text);
        }
        n_compared++;
        mem_free(a);
        mem_free(b);
    }
    printf("stories260k: %ld texts give the same ids\n", n_compared);
    json_release(&golden);
    tokenizer_close(&by_json);
    tokenizer_close(&tok);
}

int main(void)
{
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 1;
    }
    test_refused();
    test_config();
    test_bytes();
    test_damaged();
    test_stories();
    remove_file("tokenizer.model");
    remove_file("tokenizer_config.json");
    rmdir(scratch);
    return check_report();
}
