/* SPDX-License-Identifier: Apache-2.0 */
#include "core/tokenizer_internal.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"

enum {
    MAX_PATTERN = 4096, /* bytes */
    FIRST_STEPS =
        10000,       /* of one attempt at a match, and so many more for each byte that is left: */
    BYTE_STEPS = 16, /* the patterns of real tokenizers need about one for each */
    MOST_STEPS = 1 << 30,
    MATCH_HEAP_KIB = 256 * 1024,
    JIT_STACK_FIRST = 64 * 1024, /* bytes */
    JIT_STACK_LAST = 16 * 1024 * 1024
};

struct regex {
    pcre2_code *code;
};
struct regex_scratch {
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack; /* NULL where there is no JIT */
};

/* \s as Oniguruma has it; PCRE2's own adds U+180E. To stand inside a class. */
#define SPACE_CLASS "\\x09-\\x0d\\x20\\x{85}\\p{Z}"

static enum status refuse(const char *what, int length, const char *pattern, const char *path)
{
    FAIL(ST_UNSUPPORTED,
         "%s: split pattern %.120s: \"%.*s\" is not supported (its meaning differs between regular "
         "expression libraries)",
         path, pattern, length, what);
}

static bool is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Bytes of the hexadecimal escape at p ("x{...}", "xHH" below 0x80, "uHHHH"), 0 when it is none. */
static size_t hex_escape(const char *p)
{
    if (p[0] == 'x' && p[1] == '{') {
        size_t n = 2;
        while (is_hex(p[n])) {
            n++;
        }
        return n > 2 && p[n] == '}' ? n + 1 : 0;
    }
    if (p[0] == 'x') {
        return p[1] >= '0' && p[1] <= '7' && is_hex(p[2]) ? 3 : 0;
    }
    for (int i = 1; i <= 4; i++) {
        if (!is_hex(p[i])) {
            return 0;
        }
    }
    return 5;
}

/* Copies the escape after a backslash at p; *used is set to its bytes, the backslash included. */
static enum status translate_escape(struct byte_buffer *out, const char *p, bool in_class,
                                    size_t *used, const char *pattern, const char *path)
{
    char c = p[1];
    *used = 2;
    if (c == 's') {
        TRY(in_class ? byte_buffer_add(out, SPACE_CLASS, strlen(SPACE_CLASS))
                     : byte_buffer_add(out, "[" SPACE_CLASS "]", strlen(SPACE_CLASS) + 2));
    } else if (c == 'S' && !in_class) {
        TRY(byte_buffer_add(out, "[^" SPACE_CLASS "]", strlen(SPACE_CLASS) + 3));
    } else if (c == 'v') {
        TRY(byte_buffer_add(out, "\\x0b", 4)); // PCRE2's \v is any vertical space
    } else if (c == 'x' || c == 'u') {
        size_t n = hex_escape(p + 1);
        if (n == 0) {
            TRY(refuse(p, 2, pattern, path));
        }
        if (c == 'u') {
            TRY(byte_buffer_add(out, "\\x{", 3));
            TRY(byte_buffer_add(out, p + 2, 4));
            TRY(byte_buffer_add(out, "}", 1));
        } else {
            TRY(byte_buffer_add(out, p, n + 1));
        }
        *used = n + 1;
    } else if (c == 'p' || c == 'P') {
        const char *end = p[2] == '{' ? strchr(p, '}') : NULL;
        if (!end) {
            TRY(refuse(p, 2, pattern, path));
        } else {
            *used = (size_t)(end - p) + 1;
            TRY(byte_buffer_add(out, p, *used));
        }
    } else if (c != '\0' && (strchr("dDrntfae", c) || (c > ' ' && c < 127 && !is_digit(c) &&
                                                       !((c | 32) >= 'a' && (c | 32) <= 'z')))) {
        TRY(byte_buffer_add(out, p, 2));
    } else {
        TRY(refuse(p, c ? 2 : 1, pattern, path));
    }
    return ST_OK;
}

/* Bytes of the opening of a group at p that means the same everywhere, 0: refused. */
static size_t group_opening(const char *p)
{
    static const char *const known[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    if (p[1] != '?' && p[1] != '*') {
        return 1;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strncmp(p, known[i], strlen(known[i])) == 0) {
            return strlen(known[i]);
        }
    }
    return 0;
}

/* Bytes of "{n}", "{n,}" or "{n,m}" at p, 0: refused. A '+' behind it is "possessive" to one
 * library and "repeated" to another; "{,m}" is a repeat to one and plain text to another. */
static size_t repeat_count(const char *p)
{
    size_t n = 1;
    while (is_digit(p[n])) {
        n++;
    }
    if (n == 1) {
        return 0;
    }
    if (p[n] == ',') {
        n++;
        while (is_digit(p[n])) {
            n++;
        }
    }
    return p[n] == '}' && p[n + 1] != '+' ? n + 1 : 0;
}

/* Tokenizer files write patterns for Oniguruma. What means the same in PCRE2 passes, what can be
 * said otherwise is rewritten, the rest is refused, so that no text is ever split silently wrong.
 * Source: Oniguruma doc/RE (Ruby syntax); pcre2pattern(3). */
static enum status translate(struct byte_buffer *out, const char *pattern, const char *path)
{
    bool in_class = false;
    for (const char *p = pattern; *p;) {
        size_t used = 1;
        if (*p == '\\') {
            TRY(translate_escape(out, p, in_class, &used, pattern, path));
            p += used;
            continue;
        }
        if (in_class) {
            if (*p == '[' || (p[0] == '&' && p[1] == '&')) {
                TRY(refuse(p, 2, pattern, path));
            }
            in_class = *p != ']';
        } else if (*p == '[') {
            in_class = true;
            used = p[1] == '^' ? 2 : 1;
            if (p[used] == ']') {
                TRY(refuse(p, (int)used + 1, pattern, path));
            }
        } else if (*p == '(') {
            used = group_opening(p);
        } else if (*p == '{') {
            used = repeat_count(p);
        }
        if (used == 0) {
            TRY(refuse(p, 4, pattern, path));
        }
        TRY(byte_buffer_add(out, p, used));
        p += used;
    }
    return ST_OK;
}

enum status regex_compile(struct regex **out, const char *pattern, const char *path)
{
    enum status st = ST_OK;
    struct byte_buffer text = {0};
    struct regex *re = NULL;
    int error = 0;
    size_t where = 0;
    uint32_t matches_empty = 0;
    if (strlen(pattern) > MAX_PATTERN) {
        FAIL(ST_FORMAT, "%s: a split pattern has %zu bytes, at most %d are read", path,
             strlen(pattern), MAX_PATTERN);
    }
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (!context) {
        FAIL(ST_NOMEM, "out of memory for a split pattern of %s", path);
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    TRY_GOTO(st, MEM_NEW(&re, 1), done);
    TRY_GOTO(st, translate(&text, pattern, path), done);
    re->code = pcre2_compile((PCRE2_SPTR)text.data, text.n,
                             PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                             &error, &where, context);
    if (!re->code) {
        char message[160];
        pcre2_get_error_message(error, (PCRE2_UCHAR *)message, sizeof message);
        FAIL_GOTO(st, ST_FORMAT, done, "%s: split pattern %.120s does not compile: %s", path,
                  pattern, message);
    }
    pcre2_pattern_info(re->code, PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty) {
        FAIL_GOTO(st, ST_UNSUPPORTED, done,
                  "%s: split pattern %.120s can match the empty text, which is not supported", path,
                  pattern);
    }
    // without JIT the interpreter does the same, slower
    (void)pcre2_jit_compile(re->code, PCRE2_JIT_COMPLETE);
    *out = re;
    re = NULL;
done:
    regex_free(&re);
    pcre2_compile_context_free(context);
    mem_free(text.data);
    return st;
}

void regex_free(struct regex **re)
{
    if (re && *re) {
        pcre2_code_free((*re)->code);
        mem_free(*re);
        *re = NULL;
    }
}

enum status regex_scratch_create(struct regex_scratch **out)
{
    struct regex_scratch *s = NULL;
    TRY(MEM_NEW(&s, 1));
    s->match = pcre2_match_data_create(1, NULL);
    s->context = pcre2_match_context_create(NULL);
    if (!s->match || !s->context) {
        regex_scratch_free(&s);
        FAIL(ST_NOMEM, "out of memory for splitting text");
    }
    pcre2_set_heap_limit(s->context, MATCH_HEAP_KIB);
    s->stack = pcre2_jit_stack_create(JIT_STACK_FIRST, JIT_STACK_LAST, NULL);
    if (s->stack) {
        pcre2_jit_stack_assign(s->context, NULL, s->stack);
    }
    *out = s;
    return ST_OK;
}

void regex_scratch_free(struct regex_scratch **s)
{
    if (s && *s) {
        pcre2_match_data_free((*s)->match);
        pcre2_match_context_free((*s)->context);
        pcre2_jit_stack_free((*s)->stack);
        mem_free(*s);
        *s = NULL;
    }
}

enum status regex_find(const struct regex *re, struct regex_scratch *s, const char *text,
                       size_t bytes, size_t from, size_t *begin, size_t *end)
{
    size_t steps = FIRST_STEPS + BYTE_STEPS * (bytes - from);
    pcre2_set_match_limit(s->context, steps < MOST_STEPS ? (uint32_t)steps : MOST_STEPS);
    // the text was checked once as a whole; checking it at every match would cost its square
    int rc = pcre2_match(re->code, (PCRE2_SPTR)text, bytes, from, PCRE2_NO_UTF_CHECK, s->match,
                         s->context);
    if (rc == PCRE2_ERROR_NOMATCH) {
        *begin = *end = bytes;
        return ST_OK;
    }
    if (rc < 0) {
        char message[160];
        pcre2_get_error_message(rc, (PCRE2_UCHAR *)message, sizeof message);
        FAIL(ST_FORMAT,
             "the tokenizer's split pattern takes too long on this text (at byte %zu "
             "of a section of %zu): %s; shorten the text or mend the pattern in tokenizer.json",
             from, bytes, message);
    }
    const size_t *found = pcre2_get_ovector_pointer(s->match);
    if (found[1] <= from || found[0] < from || found[1] > bytes || found[0] >= found[1]) {
        FAIL(ST_FORMAT, "the tokenizer's split pattern matched no text at byte %zu of a section",
             from);
    }
    *begin = found[0];
    *end = found[1];
    return ST_OK;
}
