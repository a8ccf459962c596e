/* SPDX-License-Identifier: Apache-2.0 */
#include "core/json.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "core/mem.h"

/* A hostile string must neither break the one line of a message nor fill it. */
enum { SHOWN_CHARS = 60, SHOWN_BYTES = 96 };

static void describe_string(char *text, size_t bytes, const char *s)
{
    size_t at = 0;
    text[at++] = '"';
    for (size_t i = 0; s[i] && at + 6 < bytes; i++) {
        if (i >= SHOWN_CHARS && ((unsigned char)s[i] & 0xc0) != 0x80) {
            memcpy(text + at, "...", 3);
            at += 3;
            break;
        }
        unsigned char c = (unsigned char)s[i];
        text[at++] = c < 0x20 || c == 0x7f ? '?' : (char)c;
    }
    text[at++] = '"';
    text[at] = '\0';
}

const char *json_describe(const json_t *json, char *text, size_t text_bytes)
{
    INVARIANT(text_bytes >= 16);
    if (!json) {
        snprintf(text, text_bytes, "nothing");
        return text;
    }
    switch (json_typeof(json)) {
    case JSON_OBJECT:
        snprintf(text, text_bytes, "an object");
        break;
    case JSON_ARRAY:
        snprintf(text, text_bytes, "an array");
        break;
    case JSON_STRING:
        describe_string(text, text_bytes, json_string_value(json));
        break;
    case JSON_INTEGER:
        snprintf(text, text_bytes, "%lld", (long long)json_integer_value(json));
        break;
    case JSON_REAL:
        snprintf(text, text_bytes, "%g", json_real_value(json));
        break;
    case JSON_TRUE:
        snprintf(text, text_bytes, "true");
        break;
    case JSON_FALSE:
        snprintf(text, text_bytes, "false");
        break;
    case JSON_NULL:
        snprintf(text, text_bytes, "null");
        break;
    }
    return text;
}

enum status json_read_text(json_t **out, const char *text, size_t bytes, const char *where)
{
    *out = NULL;
    json_error_t error;
    json_t *json = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
    if (!json) {
        FAIL(ST_FORMAT, "%s: not valid JSON at line %d, column %d: %s", where, error.line,
             error.column, error.text);
    }
    if (!json_is_object(json)) {
        char found[SHOWN_BYTES];
        json_describe(json, found, sizeof found);
        json_decref(json);
        FAIL(ST_FORMAT, "%s: expected a JSON object {...}, found %s", where, found);
    }
    *out = json;
    return ST_OK;
}

/* Reads at most max_bytes of an open file; *text is the caller's even on failure. */
static enum status read_all(int fd, const char *path, size_t max_bytes, char **text, size_t *bytes)
{
    struct stat info;
    if (fstat(fd, &info) != 0) {
        FAIL(ST_IO, "cannot read %s: %s", path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        FAIL(ST_IO, "cannot read %s: it is %s, expected a JSON file", path,
             S_ISDIR(info.st_mode) ? "a folder" : "not a regular file");
    }
    if ((unsigned long long)info.st_size > max_bytes) {
        FAIL(ST_FORMAT, "%s has %lld bytes, at most %zu are read; is this the right file?", path,
             (long long)info.st_size, max_bytes);
    }
    size_t size = (size_t)info.st_size, done = 0;
    TRY(MEM_NEW(text, size));
    while (done < size) {
        ssize_t n = read(fd, *text + done, size - done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            FAIL(ST_IO, "cannot read %s: %s", path, strerror(errno));
        }
        if (n == 0) {
            break; // it shrank while we read; the parser judges what is left
        }
        done += (size_t)n;
    }
    *bytes = done;
    return ST_OK;
}

enum status json_read_file(json_t **out, const char *path, size_t max_bytes)
{
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // O_NONBLOCK: a FIFO must not hang us
    if (fd < 0) {
        FAIL(ST_IO, "cannot open %s: %s", path, strerror(errno));
    }
    enum status st = ST_OK;
    char *text = NULL;
    size_t bytes = 0;
    TRY_GOTO(st, read_all(fd, path, max_bytes, &text, &bytes), done);
    TRY_GOTO(st, json_read_text(out, text, bytes, path), done);
done:
    mem_free(text);
    close(fd);
    return st;
}

void json_release(json_t **json)
{
    if (json && *json) {
        json_decref(*json);
        *json = NULL;
    }
}

const json_t *json_member(const json_t *object, const char *key)
{
    const json_t *member = json_object_get(object, key);
    return json_is_null(member) ? NULL : member;
}

static enum status wrong_member(const json_t *object, const char *key, const char *expected,
                                const char *where)
{
    const json_t *member = json_object_get(object, key);
    if (!member) {
        FAIL(ST_FORMAT, "%s: \"%s\" is missing, expected %s", where, key, expected);
    }
    char found[SHOWN_BYTES];
    FAIL(ST_FORMAT, "%s: \"%s\" is %s, expected %s", where, key,
         json_describe(member, found, sizeof found), expected);
}

enum status json_get_i32(int32_t *out, const json_t *object, const char *key, int32_t min,
                         int32_t max, const char *where)
{
    const json_t *member = json_member(object, key);
    if (!json_is_integer(member) || json_integer_value(member) < min ||
        json_integer_value(member) > max) {
        char expected[64];
        snprintf(expected, sizeof expected, "an integer from %d to %d", min, max);
        return wrong_member(object, key, expected, where);
    }
    *out = (int32_t)json_integer_value(member);
    return ST_OK;
}

enum status json_get_i32_or(int32_t *out, const json_t *object, const char *key, int32_t min,
                            int32_t max, int32_t fallback, const char *where)
{
    if (!json_member(object, key)) {
        *out = fallback;
        return ST_OK;
    }
    return json_get_i32(out, object, key, min, max, where);
}

enum status json_get_f64_or(double *out, const json_t *object, const char *key, double fallback,
                            const char *where)
{
    const json_t *member = json_member(object, key);
    if (!member) {
        *out = fallback;
        return ST_OK;
    }
    if (!json_is_number(member)) {
        return wrong_member(object, key, "a number", where);
    }
    *out = json_number_value(member);
    return ST_OK;
}

enum status json_get_bool_or(bool *out, const json_t *object, const char *key, bool fallback,
                             const char *where)
{
    const json_t *member = json_member(object, key);
    if (!member) {
        *out = fallback;
        return ST_OK;
    }
    if (!json_is_boolean(member)) {
        return wrong_member(object, key, "true or false", where);
    }
    *out = json_is_true(member);
    return ST_OK;
}

enum status json_get_string(const char **out, const json_t *object, const char *key,
                            const char *where)
{
    const json_t *member = json_member(object, key);
    if (!json_is_string(member)) {
        return wrong_member(object, key, "a string", where);
    }
    *out = json_string_value(member);
    return ST_OK;
}

enum status json_get_string_or(const char **out, const json_t *object, const char *key,
                               const char *fallback, const char *where)
{
    if (!json_member(object, key)) {
        *out = fallback;
        return ST_OK;
    }
    return json_get_string(out, object, key, where);
}
