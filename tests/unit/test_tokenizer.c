/* The tokenizer against another library's ids and texts (tests/golden/tokenizer, written by
 * make_tokenizer_cases.py), against hand-worked merges, and against files and texts that must be
 * refused. With PMPD_TEST_DATA also against a trained model's cases.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <jansson.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/json.h"
#include "core/mem.h"
#include "core/tokenizer.h"
#include "core/tokenizer_internal.h"
#include "core/unicode.h"
#include "tests/check.h"

#ifndef PMPD_GOLDEN
#define PMPD_GOLDEN "tests/golden"
#endif

static char scratch[] = "/tmp/pmpd-tokenizer-XXXXXX";

static bool same_ids(const json_t *want, const int32_t *ids, int32_t n, size_t skip)
{
    bool same = json_array_size(want) + skip == (size_t)n;
    for (size_t i = 0; same && i < json_array_size(want); i++) {
        same = json_integer_value(json_array_get(want, i)) == ids[i + skip];
    }
    return same;
}

static void print_ids(const char *label, const int32_t *ids, int32_t n)
{
    fprintf(stderr, "    %s:", label);
    for (int32_t i = 0; i < n && i < 60; i++) {
        fprintf(stderr, " %d", ids[i]);
    }
    fprintf(stderr, "\n");
}

/* One id at a time gives the same text as all at once, and every piece shown is whole UTF-8. */
static void check_stream(const struct tokenizer *tok, const int32_t *ids, int32_t n,
                         bool strip_first, const char *whole)
{
    struct token_stream s;
    char piece[TOKENIZER_PIECE_BYTES];
    struct byte_buffer all = {0};
    bool pieces_whole = true;
    token_stream_begin(&s, tok, strip_first);
    for (int32_t i = 0; i <= n; i++) {
        size_t bytes = i < n ? token_stream_next(&s, ids[i], piece, sizeof piece)
                             : token_stream_end(&s, piece, sizeof piece);
        pieces_whole = pieces_whole && bytes < sizeof piece && piece[bytes] == '\0' &&
                       utf8_check(piece, bytes) == bytes;
        CHECK_OK(byte_buffer_add(&all, piece, bytes));
    }
    CHECK_OK(byte_buffer_add(&all, "", 1));
    CHECK(pieces_whole);
    CHECK(strcmp(all.data, whole) == 0);
    mem_free(all.data);
}

static void check_decoded(const struct tokenizer *tok, const json_t *want_ids, const char *want,
                          const char *name)
{
    int32_t n = (int32_t)json_array_size(want_ids);
    int32_t *ids = NULL;
    char *text = NULL, *unstripped = NULL;
    CHECK_OK(MEM_NEW(&ids, n));
    for (int32_t i = 0; i < n; i++) {
        ids[i] = (int32_t)json_integer_value(json_array_get(want_ids, (size_t)i));
    }
    CHECK_OK(tokenizer_decode(tok, ids, n, true, &text));
    if (!CHECK(text && strcmp(text, want) == 0)) {
        fprintf(stderr, "    %s: found \"%s\", expected \"%s\"\n", name, text, want);
        print_ids("ids", ids, n);
    }
    check_stream(tok, ids, n, true, text);
    CHECK_OK(tokenizer_decode(tok, ids, n, false, &unstripped));
    check_stream(tok, ids, n, false, unstripped);
    mem_free(text);
    mem_free(unstripped);
    mem_free(ids);
}

static void check_encoded(const struct tokenizer *tok, const char *text, const json_t *first,
                          const json_t *want, const char *name)
{
    for (int special = 0; special < 2; special++) {
        int32_t *ids = NULL, n = 0;
        CHECK_OK(tokenizer_encode(tok, text, strlen(text), special, &ids, &n));
        size_t skip = special ? json_array_size(first) : 0;
        if (!CHECK(same_ids(want, ids, n, skip))) {
            fprintf(stderr, "    %s: \"%.200s\"\n", name, text);
            print_ids("found", ids, n);
            fprintf(stderr, "    expected: %s\n", json_dumps(want, JSON_COMPACT));
        }
        for (size_t i = 0; i < skip && (int32_t)i < n; i++) {
            CHECK(json_integer_value(json_array_get(first, i)) == ids[i]);
        }
        mem_free(ids);
    }
}

static void test_golden(void)
{
    json_t *cases = NULL;
    CHECK_OK(json_read_file(&cases, PMPD_GOLDEN "/tokenizer/cases.json", 1 << 24));
    const json_t *texts = json_object_get(cases, "texts");
    const json_t *list = json_object_get(cases, "tokenizers");
    CHECK(json_array_size(texts) > 300 && json_array_size(list) == 11);
    for (size_t k = 0; k < json_array_size(list); k++) {
        const json_t *one = json_array_get(list, k);
        const char *name = json_string_value(json_object_get(one, "name"));
        int32_t n_vocab = (int32_t)json_integer_value(json_object_get(one, "n_vocab"));
        const json_t *first = json_object_get(one, "first");
        char folder[512];
        struct tokenizer *tok = NULL;
        snprintf(folder, sizeof folder, "%s/tokenizer/%s", PMPD_GOLDEN, name);
        CHECK_OK(tokenizer_open(&tok, folder, n_vocab));
        if (!tok) {
            continue;
        }
        CHECK(tokenizer_n_vocab(tok) == n_vocab);
        CHECK(tokenizer_bos(tok) == (json_array_size(first) ? 1 : -1));
        for (size_t i = 0; i < json_array_size(texts); i++) {
            const char *text = json_string_value(json_array_get(texts, i));
            const json_t *ids = json_array_get(json_object_get(one, "ids"), i);
            const json_t *decoded = json_array_get(json_object_get(one, "decoded"), i);
            check_encoded(tok, text, first, ids, name);
            check_decoded(tok, ids, json_is_string(decoded) ? json_string_value(decoded) : text,
                          name);
        }
        const json_t *made_up = json_object_get(one, "random_ids");
        CHECK(json_array_size(made_up) == 40);
        for (size_t i = 0; i < json_array_size(made_up); i++) {
            check_decoded(
                tok, json_array_get(made_up, i),
                json_string_value(json_array_get(json_object_get(one, "random_decoded"), i)), name);
        }
        tokenizer_close(&tok);
        CHECK(tok == NULL);
        // one id less than the file has
        CHECK_STATUS(tokenizer_open(&tok, folder, n_vocab - 1), ST_FORMAT, "vocab_size");
        CHECK(tok == NULL);
    }
    json_release(&cases);
}

/* The model that the data folder holds, if there is one. */
static void test_stories(void)
{
    const char *data = getenv("PMPD_TEST_DATA");
    char folder[512], path[600];
    struct tokenizer *tok = NULL;
    json_t *cases = NULL;
    if (!data) {
        printf("PMPD_TEST_DATA is not set: the cases of stories260k were not run\n");
        return;
    }
    snprintf(folder, sizeof folder, "%s/stories260k", data);
    snprintf(path, sizeof path, "%s/tokenizer_cases.json", folder);
    json_error_t error;
    cases = json_load_file(path, 0, &error);
    CHECK(json_array_size(cases) >= 12);
    CHECK_OK(tokenizer_open(&tok, folder, 512));
    CHECK(tok && strcmp(tokenizer_kind(tok), "BPE, metaspace with byte fallback") == 0);
    for (size_t i = 0; tok && i < json_array_size(cases); i++) {
        const json_t *one = json_array_get(cases, i), *want = json_object_get(one, "ids");
        const char *text = json_string_value(json_object_get(one, "text"));
        int32_t *ids = NULL, n = 0;
        CHECK_OK(tokenizer_encode(tok, text, strlen(text), true, &ids, &n));
        if (!CHECK(same_ids(want, ids, n, 0))) {
            fprintf(stderr, "    \"%.100s\"\n", text);
            print_ids("found", ids, n);
        }
        check_decoded(tok, want, text, "stories260k");
        mem_free(ids);
    }
    tokenizer_close(&tok);
    json_decref(cases);
}

/* A small file whose ids can be worked by hand, and variants of it. */
static const char base_json[] =
    "{\"version\": \"1.0\", \"truncation\": null, \"added_tokens\": ["
    "{\"id\": 1, \"content\": \"<s>\", \"special\": true, \"normalized\": false},"
    "{\"id\": 12, \"content\": \"[x]\", \"special\": false, \"normalized\": false}],"
    "\"normalizer\": null,"
    "\"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"\u2581\","
    " \"prepend_scheme\": \"always\", \"split\": false},"
    "\"post_processor\": null,"
    "\"decoder\": {\"type\": \"Metaspace\", \"replacement\": \"\u2581\"},"
    "\"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": \"<unk>\","
    " \"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false,"
    " \"vocab\": {\"<unk>\": 0, \"<s>\": 1, \"\u2581\": 2, \"a\": 3, \"b\": 4, \"c\": 5,"
    "  \"ab\": 6, \"bc\": 7, \"abc\": 8, \"\u2581a\": 9, \"aa\": 10, \"<0xC3>\": 11},"
    " \"merges\": [\"b c\", \"a b\", [\"a\", \"a\"], \"a bc\"]}}";

static const char split_json[] =
    "{\"added_tokens\": [], \"normalizer\": {\"type\": \"NFC\"},"
    "\"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\","
    " \"pattern\": {\"Regex\": \"PATTERN\"}, \"behavior\": \"Isolated\", \"invert\": false},"
    "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}]},"
    "\"post_processor\": null, \"decoder\": {\"type\": \"ByteLevel\"},"
    "\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"1\": 2, \"\u0120\": 3,"
    " \"aa\": 4, \"ab\": 5, \"11\": 6}, \"merges\": [\"a a\", \"a b\", \"1 1\"]}}";

static void write_file(const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    FILE *f = fopen(path, "w");
    CHECK(f && fwrite(text, 1, strlen(text), f) == strlen(text));
    if (f) {
        fclose(f);
    }
}

/* Opens `json` with the first `from` replaced by `to`. */
static enum status open_variant(struct tokenizer **tok, const char *json, const char *from,
                                const char *to)
{
    struct byte_buffer b = {0};
    const char *at = strstr(json, from);
    *tok = NULL;
    if (!CHECK(at != NULL)) {
        return ST_N;
    }
    CHECK_OK(byte_buffer_add(&b, json, (size_t)(at - json)));
    CHECK_OK(byte_buffer_add(&b, to, strlen(to)));
    CHECK_OK(byte_buffer_add(&b, at + strlen(from), strlen(at + strlen(from)) + 1));
    write_file("tokenizer.json", b.data);
    mem_free(b.data);
    return tokenizer_open(tok, scratch, 0);
}

static void check_ids(const struct tokenizer *tok, const char *text, const int32_t *want,
                      int32_t n_want)
{
    int32_t *ids = NULL, n = 0;
    CHECK_OK(tokenizer_encode(tok, text, strlen(text), true, &ids, &n));
    if (!CHECK(n == n_want && (n == 0 || memcmp(ids, want, (size_t)n * sizeof *ids) == 0))) {
        fprintf(stderr, "    \"%.100s\"\n", text);
        print_ids("found", ids, n);
        print_ids("expected", want, n_want);
    }
    mem_free(ids);
}

#define CHECK_IDS(tok, text, ...)                            \
    check_ids((tok), (text), (const int32_t[]){__VA_ARGS__}, \
              (int32_t)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)))

static void test_by_hand(void)
{
    struct tokenizer *tok = NULL;
    CHECK_OK(open_variant(&tok, base_json, "1.0", "1.0"));
    CHECK(tokenizer_n_vocab(tok) == 13 && tokenizer_bos(tok) == -1);
    CHECK_IDS(tok, "abc", 2, 8); // b c first, then a bc
    CHECK_IDS(tok, "ab bc", 2, 6, 2, 7);
    CHECK_IDS(tok, "aaa", 2, 10, 3);   // of equal ranks the leftmost
    CHECK_IDS(tok, " a", 2, 3);        // the space is the prefix
    CHECK_IDS(tok, "xya", 2, 0, 0, 3); // fuse_unk off
    CHECK_IDS(tok, "a[x]a", 2, 3, 12, 2, 3);
    CHECK_IDS(tok, "<s>", 1);
    check_ids(tok, "", NULL, 0);
    // the very first piece loses its metaspace only when asked to
    char *text = NULL;
    CHECK_OK(tokenizer_decode(tok, (const int32_t[]){1, 9, 2, 4, 12}, 5, true, &text));
    CHECK(strcmp(text, "a b[x]") == 0);
    mem_free(text);
    CHECK_OK(tokenizer_decode(tok, (const int32_t[]){9, 2, 4}, 3, false, &text));
    CHECK(strcmp(text, " a b") == 0);
    mem_free(text);
    // ids outside the vocabulary
    CHECK_OK(tokenizer_decode(tok, (const int32_t[]){-1, 3, 13, INT32_MAX}, 4, true, &text));
    CHECK(strcmp(text, "\uFFFDa\uFFFD\uFFFD") == 0);
    mem_free(text);
    tokenizer_close(&tok);

    CHECK_OK(open_variant(&tok, base_json, "\"fuse_unk\": false", "\"fuse_unk\": true"));
    CHECK_IDS(tok, "xya", 2, 0, 3);
    tokenizer_close(&tok);
    // bytes: only 0xC3 has a piece, so its fallback is not complete and the character is unknown
    CHECK_OK(open_variant(&tok, base_json, "\"byte_fallback\": false", "\"byte_fallback\": true"));
    CHECK_IDS(tok, "\u00e9", 2, 0);
    tokenizer_close(&tok);
    // older files say add_prefix_space
    CHECK_OK(open_variant(&tok, base_json, "\"prepend_scheme\": \"always\"",
                          "\"add_prefix_space\": false"));
    CHECK_IDS(tok, "a a", 3, 2, 3);
    tokenizer_close(&tok);
    CHECK_OK(open_variant(&tok, base_json, "\"prepend_scheme\": \"always\"",
                          "\"prepend_scheme\": \"first\""));
    CHECK_IDS(tok, "a<s>a", 2, 3, 1, 3);
    CHECK_IDS(tok, "<s>a", 1, 3);
    tokenizer_close(&tok);
    // the whole piece before its merges
    CHECK_OK(open_variant(&tok, base_json, "\"ignore_merges\": false", "\"ignore_merges\": true"));
    CHECK_IDS(tok, "a", 9);
    tokenizer_close(&tok);
}

/* A post-processor that is absent leaves the BOS to tokenizer_config.json. */
static void test_config_bos(void)
{
    struct tokenizer *tok = NULL;
    write_file("tokenizer_config.json", "{\"add_bos_token\": true, \"bos_token\": \"<s>\"}");
    CHECK_OK(open_variant(&tok, base_json, "1.0", "1.0"));
    CHECK(tokenizer_bos(tok) == 1);
    CHECK_IDS(tok, "a", 1, 2, 3);
    CHECK_IDS(tok, "", 1);
    tokenizer_close(&tok);
    write_file("tokenizer_config.json",
               "{\"add_bos_token\": true, \"bos_token\": {\"content\": \"[x]\"}}");
    CHECK_OK(open_variant(&tok, base_json, "1.0", "1.0"));
    CHECK(tokenizer_bos(tok) == 12);
    tokenizer_close(&tok);
    // a post-processor answers the question itself
    CHECK_OK(open_variant(&tok, base_json, "\"post_processor\": null",
                          "\"post_processor\": {\"type\": \"ByteLevel\"}"));
    CHECK(tokenizer_bos(tok) == -1);
    tokenizer_close(&tok);
    write_file("tokenizer_config.json", "{\"add_bos_token\": true, \"bos_token\": \"<q>\"}");
    CHECK_STATUS(open_variant(&tok, base_json, "1.0", "1.0"), ST_FORMAT, "<q>");
    write_file("tokenizer_config.json", "{\"add_bos_token\": true}");
    CHECK_STATUS(open_variant(&tok, base_json, "1.0", "1.0"), ST_FORMAT, "bos_token");
    write_file("tokenizer_config.json", "{\"add_bos_token\": false, \"bos_token\": null}");
    CHECK_OK(open_variant(&tok, base_json, "1.0", "1.0"));
    CHECK(tokenizer_bos(tok) == -1);
    tokenizer_close(&tok);
}

struct refused {
    const char *from, *to;
    enum status st;
    const char *part;
};

static void test_refused_files(void)
{
    static const struct refused table[] = {
        {"\"version\"", "\"wibble\"", ST_UNSUPPORTED, "wibble"},
        {"\"BPE\"", "\"Unigram\"", ST_UNSUPPORTED, "Unigram"},
        {"\"dropout\": null", "\"dropout\": 0.5", ST_UNSUPPORTED, "dropout 0.5"},
        {"\"dropout\": null", "\"end_of_word_suffix\": \"</w>\"", ST_UNSUPPORTED, "</w>"},
        {"\"dropout\": null", "\"wobble\": 1", ST_UNSUPPORTED, "wobble"},
        {"\"<unk>\",", "\"<none>\",", ST_FORMAT, "unk_token \"<none>\""},
        {"\"a\": 3", "\"a\": \"3\"", ST_FORMAT, "no whole number"},
        {"\"a\": 3", "\"a\": 3.5", ST_FORMAT, "no whole number"},
        {"\"a\": 3", "\"a\": -3", ST_FORMAT, "id -3"},
        {"\"a\": 3", "\"a\": 4", ST_FORMAT, "two tokens have the id 4"},
        {"\"a\": 3", "\"a\": 2000000000", ST_FORMAT, "id 2000000000"},
        {"\"a\": 3", "\"a\": 9223372036854775807", ST_FORMAT, "id 9223372036854775807"},
        {"\"a\": 3", "\"a\": 99999999999999999999", ST_FORMAT, ""},
        {"\"a\": 3", "\"\": 3", ST_FORMAT, "0 bytes"},
        {"\"a\": 3", "\"b\": 3", ST_FORMAT, "uplicate"},
        {"\"vocab\": {", "\"vocab\": [], \"merges\": {", ST_FORMAT, ""},
        {"\"b c\"", "\"b d\"", ST_FORMAT, "merge 0"},
        {"\"b c\"", "\"c b\"", ST_FORMAT, "merge 0 (\"c\", \"b\")"},
        {"\"b c\"", "\"bc\"", ST_FORMAT, "merge 0 is neither"},
        {"\"b c\"", "\"b  c\"", ST_FORMAT, "merge 0 is neither"},
        {"\"b c\"", "[\"b\", \"c\", \"c\"]", ST_FORMAT, "merge 0 is neither"},
        {"\"b c\"", "[\"b\", 3]", ST_FORMAT, "merge 0 is neither"},
        {"\"b c\"", "7", ST_FORMAT, "merge 0 is neither"},
        {"\"id\": 1,", "\"id\": 3,", ST_FORMAT, "added token \"<s>\" has id 3"},
        {"\"id\": 12,", "\"id\": 3,", ST_FORMAT, "added token \"[x]\" has id 3"},
        {"\"id\": 12,", "\"id\": 12000000,", ST_FORMAT, "id 12000000"},
        {"\"id\": 12,", "", ST_FORMAT, "no whole number"},
        {"false, \"normalized\": false}],\"normalizer\": null",
         "false, \"normalized\": true}], \"normalizer\": {\"type\": \"Replace\", \"pattern\": "
         "{\"String\": \"[x]\"}, \"content\": \"\"}",
         ST_FORMAT, "once it is normalised"},
        {"\"[x]\"", "\"\"", ST_FORMAT, "0 bytes"},
        {"\"[x]\"", "[]", ST_FORMAT, "content"},
        {"\"special\": false", "\"single_word\": true", ST_UNSUPPORTED, "single_word"},
        {"\"special\": false", "\"special\": 3", ST_FORMAT, "special"},
        {"\"special\": false", "\"shy\": false", ST_UNSUPPORTED, "shy"},
        {"\"normalizer\": null", "\"normalizer\": {\"type\": \"NFKC\"}", ST_UNSUPPORTED, "NFKC"},
        {"\"normalizer\": null", "\"normalizer\": {\"type\": \"Sequence\"}", ST_FORMAT, "Sequence"},
        {"\"normalizer\": null", "\"normalizer\": [3]", ST_FORMAT, "normalizer is not an object"},
        {"\"normalizer\": null",
         "\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \"\"}, "
         "\"content\": \"x\"}",
         ST_FORMAT, "empty"},
        {"\"normalizer\": null",
         "\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"Regex\": \"a\"}, "
         "\"content\": \"x\"}",
         ST_UNSUPPORTED, "String"},
        {"\"normalizer\": null",
         "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": ["
         "{\"type\": \"Replace\", \"pattern\": {\"String\": \"a\"}, \"content\": \"bbbb\"},"
         "{\"type\": \"Replace\", \"pattern\": {\"String\": \"bb\"}, \"content\": \"cc\"},"
         "{\"type\": \"Replace\", \"pattern\": {\"String\": \"cc\"}, \"content\": "
         "\"0123456789\"}]}",
         ST_UNSUPPORTED, "20 times as long"},
        {"\"normalizer\": null",
         "\"normalizer\": {\"type\": \"Prepend\", \"prepend\": \"01234567890123456789\"}",
         ST_UNSUPPORTED, "20 bytes"},
        {"\"Metaspace\"", "\"Whitespace\"", ST_UNSUPPORTED, "Whitespace"},
        {"\"always\"", "\"often\"", ST_UNSUPPORTED, "often"},
        {"\"replacement\": \"\u2581\"", "\"replacement\": \"_\"", ST_UNSUPPORTED, "replacement"},
        {"\"decoder\"", "\"decoder\": null, \"padding\"", ST_UNSUPPORTED, "no decoder"},
        {"\"decoder\": {\"type\": \"Metaspace\"", "\"decoder\": {\"type\": \"CTC\"", ST_UNSUPPORTED,
         "CTC"},
        {"\"decoder\": {\"type\": \"Metaspace\", \"replacement\": \"\u2581\"}",
         "\"decoder\": {\"type\": \"ByteLevel\"}", ST_UNSUPPORTED, "one must undo the other"},
        {"\"decoder\": {\"type\": \"Metaspace\", \"replacement\": \"\u2581\"}",
         "\"decoder\": {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}",
         ST_UNSUPPORTED, "Strip"},
        {"\"post_processor\": null", "\"post_processor\": {\"type\": \"RobertaProcessing\"}",
         ST_UNSUPPORTED, "RobertaProcessing"},
        {"\"post_processor\": null",
         "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": ["
         "{\"Sequence\": {\"id\": \"A\"}}, {\"SpecialToken\": {\"id\": \"<s>\"}}]}",
         ST_UNSUPPORTED, "behind the text"},
        {"\"post_processor\": null",
         "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": ["
         "{\"SpecialToken\": {\"id\": \"<s>\"}}, {\"Sequence\": {\"id\": \"A\"}}]}",
         ST_FORMAT, "do not describe"},
        {"\"post_processor\": null",
         "\"post_processor\": {\"type\": \"TemplateProcessing\", \"special_tokens\": {\"<s>\": "
         "{\"ids\": [77]}}, \"single\": ["
         "{\"SpecialToken\": {\"id\": \"<s>\"}}, {\"Sequence\": {\"id\": \"A\"}}]}",
         ST_FORMAT, "no token has"},
        {"\"post_processor\": null",
         "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": []}", ST_FORMAT,
         "no Sequence"},
        {"\"merges\"", "\"merges", ST_FORMAT, "tokenizer.json"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct tokenizer *tok = NULL;
        CHECK_STATUS(open_variant(&tok, base_json, table[i].from, table[i].to), table[i].st,
                     table[i].part);
        if (!CHECK(tok == NULL)) {
            fprintf(stderr, "    row %zu: %s\n", i, table[i].to);
        }
        tokenizer_close(&tok);
    }
}

static void test_patterns(void)
{
    static const struct refused table[] = {
        {"PATTERN", "\\\\w+", ST_UNSUPPORTED, "\"\\w\""},
        {"PATTERN", "\\\\b", ST_UNSUPPORTED, "\"\\b\""},
        {"PATTERN", "(a)\\\\1", ST_UNSUPPORTED, "\"\\1\""},
        {"PATTERN", "[a\\\\S]", ST_UNSUPPORTED, "\\S"},
        {"PATTERN", "[a&&b]", ST_UNSUPPORTED, "&&"},
        {"PATTERN", "[a[b]]", ST_UNSUPPORTED, "\"[b\""},
        {"PATTERN", "(?m:a)", ST_UNSUPPORTED, "(?m:"},
        {"PATTERN", "(*ACCEPT)", ST_UNSUPPORTED, "(*AC"},
        {"PATTERN", "a{1,2}+", ST_UNSUPPORTED, "{1,2"},
        {"PATTERN", "a{,2}", ST_UNSUPPORTED, "{,2}"},
        {"PATTERN", "a*", ST_UNSUPPORTED, "empty text"},
        {"PATTERN", "[]a]", ST_UNSUPPORTED, "\"[]\""},
        {"PATTERN", "\\\\xe9", ST_UNSUPPORTED, "\"\\x\""},
        {"PATTERN", "(?<name>a)", ST_UNSUPPORTED, "(?<n"},
        {"PATTERN", "(a", ST_FORMAT, "does not compile"},
        {"PATTERN", "\\\\p{Nonsense}", ST_FORMAT, "does not compile"},
        {"PATTERN", "a\\\\", ST_UNSUPPORTED, "\\"},
        {"Isolated", "Removed", ST_UNSUPPORTED, "Removed"},
        {"Isolated", "MergedWithNext", ST_UNSUPPORTED, "MergedWithNext"},
        {"\"invert\": false", "\"invert\": true", ST_UNSUPPORTED, "inverted"},
        {"{\"Regex\": \"PATTERN\"}", "{\"String\": \"a\"}", ST_UNSUPPORTED, "Regex"},
        {"\"add_prefix_space\": false", "\"add_prefix_space\": true", ST_UNSUPPORTED,
         "behind a Split"},
        {"{\"type\": \"ByteLevel\", \"add", "{\"type\": \"Digits\", \"add", ST_UNSUPPORTED,
         "Digits"},
        {"\"type\": \"BPE\"", "\"type\": \"BPE\", \"byte_fallback\": true", ST_UNSUPPORTED,
         "byte_fallback"},
    };
    struct tokenizer *tok = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        CHECK_STATUS(open_variant(&tok, split_json, table[i].from, table[i].to), table[i].st,
                     table[i].part);
        CHECK(tok == NULL);
        tokenizer_close(&tok);
    }
    CHECK_OK(open_variant(&tok, split_json, "PATTERN", "\\\\u0061b?|1"));
    CHECK_IDS(tok, "aab11", 0, 5, 2, 2); // a, ab, 1, 1 are pieces of their own
    int32_t *ids = NULL, n = 0;
    CHECK_STATUS(tokenizer_encode(tok, "aq", 2, true, &ids, &n), ST_USER, "character \"q\"");
    CHECK(ids == NULL && n == 0);
    tokenizer_close(&tok);
    // a pattern whose work doubles with every letter ends with an error, soon
    static char letters[64];
    memset(letters, 'a', sizeof letters - 1);
    CHECK_OK(open_variant(&tok, split_json, "PATTERN", "(a+a?)+[bc]"));
    double start = (double)clock() / CLOCKS_PER_SEC;
    CHECK_STATUS(tokenizer_encode(tok, letters, strlen(letters), true, &ids, &n), ST_FORMAT,
                 "takes too long");
    CHECK((double)clock() / CLOCKS_PER_SEC - start < 5);
    tokenizer_close(&tok);
    // so does one whose work is near any bound that does not depend on the text, word after word
    static char words[130 * 31];
    for (size_t i = 0; i < sizeof words; i++) {
        words[i] = i % 31 == 30 ? '1' : 'a';
    }
    CHECK_OK(open_variant(&tok, split_json, "PATTERN", "(?:a|aa)*c|a"));
    CHECK_STATUS(tokenizer_encode(tok, words, sizeof words, true, &ids, &n), ST_FORMAT,
                 "takes too long");
    tokenizer_close(&tok);
}

static bool found_at(const char *pattern, const char *text, size_t want_begin, size_t want_end)
{
    struct regex *re = NULL;
    struct regex_scratch *s = NULL;
    size_t begin = 99, end = 99;
    CHECK_OK(regex_compile(&re, pattern, "test"));
    CHECK_OK(regex_scratch_create(&s));
    CHECK_OK(regex_find(re, s, text, strlen(text), 0, &begin, &end));
    regex_scratch_free(&s);
    regex_free(&re);
    return begin == want_begin && end == want_end;
}

/* What the two libraries read differently. U+180E was white space until Unicode 6.3. */
static void test_pattern_meaning(void)
{
    CHECK(found_at("\\s", "a\u180e", 4, 4) && found_at("[x\\s]", "\u180e", 3, 3));
    CHECK(found_at("\\S", "\u180e", 0, 3) && found_at("[^\\s]", "\u180e", 0, 3));
    CHECK(
        found_at("\\s+", "a\t\n\v\f\r \xC2\x85\u00a0\u1680\u2000\u2028\u2029\u202f\u3000b", 1, 29));
    CHECK(found_at("\\S", " \u200bx", 1, 4));
    CHECK(found_at("\\v", "a\n\xC2\x85\v", 4, 5));
    CHECK(found_at("\\u00e9+\\x{301}\\x41", "a\u00e9\u00e9\u0301A", 1, 8));
    CHECK(found_at("b$", "ab\nb", 1, 2) && found_at("^b", "ab\nb", 3, 4));
    CHECK(found_at("(?i:'S)", "'\u017f", 0, 3));
    CHECK(found_at("[\\]\\[{(]+", "a]{([", 1, 5));
}

static void test_refused_texts(void)
{
    static const struct {
        const char *text, *part;
        size_t bytes;
    } table[] = {
        {"ab\xff", "byte 2 of the text (0xff)", 3},
        {"\xc3", "byte 0", 1},
        {"a\xc0\x80", "byte 1", 3},
        {"\xed\xa0\x80", "byte 0", 3},
        {"aaa\xf4\x90\x80\x80", "byte 3", 7},
        {"\xe2\x96", "byte 0", 2},
        {"\xf0\x8f\xbf\xbf", "byte 0", 4},
        {"a\x80", "byte 1", 2},
        {"\xe0\x9f\xbf", "byte 0", 3},
        {"\xf8\x88\x80\x80\x80", "byte 0", 5},
    };
    struct tokenizer *tok = NULL;
    int32_t *ids = NULL, n = 0;
    CHECK_OK(open_variant(&tok, base_json, "1.0", "1.0"));
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        CHECK_STATUS(tokenizer_encode(tok, table[i].text, table[i].bytes, true, &ids, &n), ST_USER,
                     table[i].part);
        CHECK(ids == NULL && n == 0);
    }
    // a NUL is a character like any other
    CHECK_OK(tokenizer_encode(tok, "a\0b", 3, false, &ids, &n));
    CHECK(n == 4 && ids[0] == 2 && ids[1] == 3 && ids[2] == 0 && ids[3] == 4);
    mem_free(ids);
    tokenizer_close(&tok);
}

/* Text without a word boundary, where pairs looked for again and again would cost the square. */
static void test_long_text(void)
{
    enum { BYTES = 400000 };
    static char text[BYTES + 1];
    struct tokenizer *tok = NULL;
    int32_t *ids = NULL, n = 0;
    char *back = NULL;
    for (int i = 0; i < BYTES; i++) {
        text[i] = "aabcb"[(i * 7 + i / 11) % 5];
    }
    CHECK_OK(open_variant(&tok, base_json, "\"always\"", "\"never\""));
    double start = (double)clock() / CLOCKS_PER_SEC;
    CHECK_OK(tokenizer_encode(tok, text, BYTES, false, &ids, &n));
    double seconds = (double)clock() / CLOCKS_PER_SEC - start;
    CHECK(seconds < 4); // a fifth of a second; the square would take minutes
    CHECK_OK(tokenizer_decode(tok, ids, n, false, &back));
    CHECK(back && strcmp(back, text) == 0);
    CHECK(n < BYTES);
    mem_free(back);
    mem_free(ids);
    tokenizer_close(&tok);
}

static void test_stream_edges(void)
{
    struct tokenizer *tok = NULL;
    struct token_stream s;
    char text[TOKENIZER_PIECE_BYTES], small[3] = "??";
    CHECK_OK(tokenizer_open(&tok, PMPD_GOLDEN "/tokenizer/llama2", 0));
    const int32_t e3 = 3 + 0xE6, b2 = 3 + 0xB5, b3 = 3 + 0xB7; // U+6D77, as <0xE6><0xB5><0xB7>
    token_stream_begin(&s, tok, true);
    CHECK(token_stream_next(&s, e3, text, sizeof text) == 0);
    CHECK(token_stream_next(&s, 1, text, sizeof text) == 0); // <s> shows nothing, breaks nothing
    CHECK(token_stream_next(&s, b2, text, sizeof text) == 0);
    CHECK(token_stream_next(&s, b3, text, sizeof text) == 3 && strcmp(text, "\u6d77") == 0);
    CHECK(token_stream_end(&s, text, sizeof text) == 0 && text[0] == '\0');
    // a character that is not finished: U+FFFD when it cannot be any more, or at the end
    token_stream_begin(&s, tok, true);
    CHECK(token_stream_next(&s, e3, text, sizeof text) == 0);
    CHECK(token_stream_next(&s, b2, text, sizeof text) == 0);
    CHECK(token_stream_next(&s, 3 + 'a', text, sizeof text) == 4);
    CHECK(strcmp(text, "\uFFFDa") == 0);
    CHECK(token_stream_next(&s, e3, text, sizeof text) == 0);
    CHECK(token_stream_end(&s, text, sizeof text) == 3 && strcmp(text, "\uFFFD") == 0);
    CHECK(token_stream_end(&s, text, sizeof text) == 0);
    // bytes that begin no character: one U+FFFD each
    CHECK(token_stream_next(&s, 3 + 0xFF, text, sizeof text) == 3);
    CHECK(token_stream_next(&s, b2, text, sizeof text) == 3 && strcmp(text, "\uFFFD") == 0);
    // a buffer that is too small is never left
    CHECK(token_stream_next(&s, 3 + 'a', small, 1) == 0 && small[0] == '\0' && small[1] == '?');
    CHECK(token_stream_next(&s, 99999, small, sizeof small) == 0 && small[2] == '\0');
    tokenizer_close(&tok);
}

static void test_missing(void)
{
    struct tokenizer *tok = NULL;
    char path[512];
    CHECK_STATUS(tokenizer_open(&tok, "/nonexistent/model", 0), ST_IO,
                 "/nonexistent/model has no tokenizer.json and no tokenizer.model");
    snprintf(path, sizeof path, "%s/tokenizer.json", scratch);
    unlink(path);
    write_file("tokenizer.model", "");
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "tokenizer.model is empty");
    write_file("tokenizer.json", "");
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "tokenizer.json");
    write_file("tokenizer.json", "[1]");
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "tokenizer.json");
    write_file("tokenizer.json", "{}");
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "\"model\"");
    write_file("tokenizer.json", "{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}}");
    CHECK_STATUS(tokenizer_open(&tok, scratch, 0), ST_FORMAT, "vocabulary is empty");
    CHECK(tok == NULL);
    tokenizer_close(&tok);
    tokenizer_close(NULL);
}

static void test_letters(void)
{
    bool seen[0x144] = {false};
    for (int b = 0; b < 256; b++) {
        int32_t letter = byte_to_letter(b);
        CHECK(letter > 0x20 && letter < 0x144 && !seen[letter] && byte_from_letter(letter) == b);
        seen[letter] = true;
    }
    CHECK(byte_to_letter(' ') == 0x120 && byte_to_letter('\n') == 0x10A);
    CHECK(byte_to_letter(0xAD) == 0x143 && byte_to_letter(0x7F) == 0x121);
    CHECK(byte_from_letter(' ') == -1 && byte_from_letter(0x144) == -1);
    CHECK(byte_from_letter(0x2581) == -1 && byte_from_letter(0xAD) == -1);
}

int main(void)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json",
                                        "tokenizer.model"};
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 1;
    }
    test_letters();
    test_golden();
    test_stories();
    test_by_hand();
    test_config_bos();
    test_refused_files();
    test_patterns();
    test_pattern_meaning();
    test_refused_texts();
    test_long_text();
    test_stream_edges();
    test_missing();
    for (int i = 0; i < 3; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", scratch, names[i]);
        unlink(path);
    }
    rmdir(scratch);
    return check_report();
}
