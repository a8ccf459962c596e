/* Prompt files: what is read, what is refused, and that long conversations are caught before they
 * are decoded. SPDX-License-Identifier: Apache-2.0
 */
#include <sys/stat.h>
#include <unistd.h>

#include "core/mem.h"
#include "core/prompts.h"
#include "tests/check.h"

#ifndef PMPD_GOLDEN
#define PMPD_GOLDEN "tests/golden"
#endif

static char scratch[] = "/tmp/pmpd-prompts-XXXXXX";
static char path[64];

static void write_bytes(const char *text, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(text, 1, bytes, f) == bytes);
    if (f) {
        fclose(f);
    }
}

static enum status read_text(struct prompts *p, const char *text, const char *split, int32_t limit)
{
    write_bytes(text, strlen(text));
    return prompts_read(p, path, split, limit);
}

static void test_members(void)
{
    struct prompts p;
    CHECK_OK(read_text(&p,
                       "{\"id\": \"one\", \"task\": \"story\", \"split\": \"test\", \"turns\": "
                       "[\"Once\", \"and \\u00e9\"], \"reference\": \"upon\", \"other\": [1]}\r\n"
                       "\r\n  \t\n"
                       "{\"turns\": [\"a\"], \"id\": 7, \"template\": \"none\"}\n"
                       "{\"turns\": [\"b\"], \"id\": null, \"task\": null}",
                       "", 0));
    CHECK(p.n == 3);
    const struct prompt *q = p.prompt;
    CHECK(strcmp(q[0].id, "one") == 0 && strcmp(q[0].task, "story") == 0);
    CHECK(strcmp(q[0].split, "test") == 0 && strcmp(q[0].reference, "upon") == 0);
    CHECK(q[0].n_turns == 2 && strcmp(q[0].turns[0], "Once") == 0);
    CHECK(strcmp(q[0].turns[1], "and \u00e9") == 0 && q[0].ids[0] == NULL);
    CHECK(strcmp(q[1].id, "7") == 0 && strcmp(q[1].task, "") == 0 && q[1].n_turns == 1);
    CHECK(strcmp(q[2].id, "5") == 0); // its line
    prompts_free(&p);
    CHECK(p.n == 0 && p.prompt == NULL);
    prompts_free(&p);
    prompts_free(NULL);
}

static void test_splits(void)
{
    static const char text[] = "{\"id\": 1, \"split\": \"test\", \"turns\": [\"a\"]}\n"
                               "{\"id\": 2, \"split\": \"train\", \"turns\": [\"b\"]}\n"
                               "{\"id\": 3, \"split\": \"test\", \"turns\": [\"c\"]}\n"
                               "{\"id\": 2, \"turns\": [\"d\"]}\n";
    struct prompts p;
    CHECK_OK(read_text(&p, text, "test", 0));
    CHECK(p.n == 2 && strcmp(p.prompt[1].turns[0], "c") == 0);
    prompts_free(&p);
    CHECK_OK(read_text(&p, text, "test", 1));
    CHECK(p.n == 1 && strcmp(p.prompt[0].id, "1") == 0);
    prompts_free(&p);
    CHECK_STATUS(read_text(&p, text, "validation", 0), ST_USER,
                 "has no prompt of split \"validation\"; it has: test (2), train (1), "
                 "lines without a split (1)");
    CHECK(p.n == 0 && p.prompt == NULL);
    // the same id twice is an error only where both are taken
    CHECK_STATUS(read_text(&p, text, "", 0), ST_USER,
                 "prompts.jsonl:4: the id \"2\" is that of "
                 "line 2");
    CHECK(p.n == 0 && p.prompt == NULL);
}

/* Digests from another implementation of XXH3-128 (python xxhash 3.5.0). */
static void test_digest(void)
{
    struct prompts p;
    CHECK_OK(read_text(&p, "{\"id\": \"a\", \"turns\": [\"Hello\"]}\n", "", 0));
    CHECK(strcmp(p.digest, "5ac0b43bed4fe80417449432e671c513") == 0);
    prompts_free(&p);
    // lines that are not taken count too: the digest is the file's
    CHECK_OK(
        read_text(&p, "{\"id\": \"a\", \"turns\": [\"Hello\"]}\n{\"turns\": [\"b\"]}\n", "", 1));
    CHECK(p.n == 1 && strcmp(p.digest, "5ac0b43bed4fe80417449432e671c513") != 0);
    prompts_free(&p);
}

static void test_byte_order_mark(void)
{
    struct prompts p;
    CHECK_OK(read_text(&p, "\xEF\xBB\xBF{\"turns\": [\"a\"]}\n", "", 0));
    CHECK(p.n == 1 && strcmp(p.prompt[0].turns[0], "a") == 0);
    prompts_free(&p);
}

/* Lines longer than the reader's buffer, and many of them. */
static void test_long_lines(void)
{
    enum { LETTERS = 200000, LINES = 300 };
    struct prompts p;
    FILE *f = fopen(path, "wb");
    for (int i = 0; f && i < LINES; i++) {
        fprintf(f, "{\"id\": \"p%d\", \"turns\": [\"", i);
        for (int k = 0; k < (i == 100 ? LETTERS : 700); k++) {
            fputc('a' + (i + k) % 26, f);
        }
        fprintf(f, "\"]}%s", i % 2 ? "\n" : "\r\n");
    }
    CHECK(f && fclose(f) == 0);
    CHECK_OK(prompts_read(&p, path, "", 0));
    CHECK(p.n == LINES);
    bool good = true;
    for (int32_t i = 0; i < p.n; i++) {
        size_t n = strlen(p.prompt[i].turns[0]);
        good = good && n == (i == 100 ? LETTERS : 700) && atoi(p.prompt[i].id + 1) == i &&
               p.prompt[i].turns[0][n - 1] == (char)('a' + (i + (int)n - 1) % 26);
    }
    CHECK(good);
    prompts_free(&p);
}

static void test_refused(void)
{
    static const struct {
        const char *text;
        enum status st;
        const char *part;
    } table[] = {
        {"", ST_USER, "prompts.jsonl has no prompts"},
        {"\n\r\n \n", ST_USER, "has no prompts"},
        {"{\"turns\": [\"a\"]}\n{\"turns\": [", ST_FORMAT, "prompts.jsonl:2"},
        {"\n\n[\"a\"]\n", ST_FORMAT, "prompts.jsonl:3"},
        {"nonsense\n", ST_FORMAT, "prompts.jsonl:1"},
        {"{\"turns\": [\"\xff\"]}\n", ST_FORMAT, "prompts.jsonl:1"},
        {"{\"turns\": [\"a\"], \"turns\": [\"b\"]}\n", ST_FORMAT, "prompts.jsonl:1"},
        {"{\"turns\": [\"a\\u0000b\"]}\n", ST_FORMAT, "prompts.jsonl:1"},
        {"{\"prompt\": \"a\"}\n", ST_FORMAT, "\"turns\" is not a list"},
        {"{\"turns\": \"a\"}\n", ST_FORMAT, "\"turns\" is not a list"},
        {"{\"turns\": []}\n", ST_FORMAT, "\"turns\" is not a list"},
        {"{\"turns\": [\"a\", 3]}\n", ST_FORMAT, "turn 1 is not a string"},
        {"{\"turns\": [\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\",\"\","
         "\"\",\"\",\"\"]}\n",
         ST_USER, "17 turns, at most 16"},
        {"{\"id\": [], \"turns\": [\"a\"]}\n", ST_FORMAT, "\"id\""},
        {"{\"id\": \"\", \"turns\": [\"a\"]}\n", ST_FORMAT, "\"id\""},
        {"{\"id\": true, \"turns\": [\"a\"]}\n", ST_FORMAT, "\"id\""},
        {"{\"task\": 3, \"turns\": [\"a\"]}\n", ST_FORMAT, "task"},
        {"{\"reference\": [\"x\"], \"turns\": [\"a\"]}\n", ST_FORMAT, "reference"},
        {"{\"template\": \"chatml\", \"turns\": [\"a\"]}\n", ST_USER, "template \"chatml\""},
        {"{\"id\": 3, \"turns\": [\"a\"]}\n{\"id\": \"3\", \"turns\": [\"b\"]}\n", ST_USER,
         "the id \"3\" is that of line 1"},
        {"{\"turns\": [\"a\"], \"id\": 2}\n{\"turns\": [\"b\"]}\n", ST_USER, "the id \"2\""},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct prompts p;
        CHECK_STATUS(read_text(&p, table[i].text, "", 0), table[i].st, table[i].part);
        CHECK(p.n == 0 && p.prompt == NULL);
    }
    struct prompts p;
    write_bytes("", 0); // a line that never ends, without a byte on the disk
    CHECK(truncate(path, 65 * 1024 * 1024) == 0);
    CHECK_STATUS(prompts_read(&p, path, "", 0), ST_FORMAT, "prompts.jsonl:1: the line has more");
    CHECK_STATUS(prompts_read(&p, "/nonexistent/p.jsonl", "", 0), ST_IO, "/nonexistent/p.jsonl");
    CHECK_STATUS(prompts_read(&p, scratch, "", 0), ST_IO, scratch);
}

static void test_encode(void)
{
    struct prompts p;
    struct tokenizer *tok = NULL;
    CHECK_OK(tokenizer_open(&tok, PMPD_GOLDEN "/tokenizer/llama3", 0));
    CHECK_OK(read_text(&p, "{\"id\": \"x\", \"turns\": [\"<s>\", \"<s></s>\"]}\n", "", 0));
    // BOS + 1 token, then 2 without a BOS: 4, and 2 answers of 3
    CHECK_OK(prompts_encode(&p, tok, 10, 3));
    const struct prompt *q = p.prompt;
    CHECK(q[0].n_ids[0] == 2 && q[0].ids[0][0] == 1 && q[0].ids[0][1] == 1);
    CHECK(q[0].n_ids[1] == 2 && q[0].ids[1][0] == 1 && q[0].ids[1][1] == 2);
    CHECK_OK(prompts_encode(&p, tok, 10, 3)); // again: nothing leaks, nothing doubles
    CHECK(q[0].n_ids[0] == 2);
    CHECK_STATUS(prompts_encode(&p, tok, 9, 3), ST_USER,
                 "prompt \"x\": 4 tokens of text and 6 new ones (3 for each of 2 turns) exceed the "
                 "context of 9");
    CHECK_STATUS(prompts_encode(&p, tok, INT32_MAX, INT32_MAX), ST_USER, "exceed the context");
    prompts_free(&p);
    CHECK_OK(read_text(&p, "{\"id\": \"y\", \"turns\": [\"a\", \"\"]}\n", "", 0));
    CHECK_STATUS(prompts_encode(&p, tok, 100, 3), ST_USER, "prompt \"y\": turn 1 is empty");
    prompts_free(&p);
    CHECK_OK(read_text(&p, "{\"id\": \"z\", \"turns\": [\"\"]}\n", "", 0));
    CHECK_STATUS(prompts_encode(&p, tok, 100, 3), ST_USER, "prompt \"z\": turn 0 is empty");
    prompts_free(&p);
    tokenizer_close(&tok);
}

int main(void)
{
    if (!mkdtemp(scratch)) {
        perror(scratch);
        return 1;
    }
    snprintf(path, sizeof path, "%s/prompts.jsonl", scratch);
    test_members();
    test_splits();
    test_digest();
    test_byte_order_mark();
    test_long_lines();
    test_refused();
    test_encode();
    unlink(path);
    rmdir(scratch);
    return check_report();
}
