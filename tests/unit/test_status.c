/* The text of a failure: one line whatever the file says, whole or cut, with what comes in front.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/status.h"
#include "tests/check.h"

static enum status fail_with(const char *text)
{
    FAIL(ST_FORMAT, "found \"%s\"", text);
}

static enum status pass_on(const char *text)
{
    TRY(fail_with(text));
    return ST_OK;
}

static void test_one_line(void)
{
    CHECK(fail_with("a\nb\r\033[31m\x7f\xC3\xA4") == ST_FORMAT);
    CHECK(strcmp(status_message(), "found \"a?b??[31m?\xC3\xA4\"") == 0);
    CHECK(status_prefix(ST_FORMAT, "prompt \"%s\": ", "x\ty") == ST_FORMAT);
    CHECK(strcmp(status_message(), "prompt \"x?y\": found \"a?b??[31m?\xC3\xA4\"") == 0);
}

static void test_traceback(void)
{
    CHECK(pass_on("x") == ST_FORMAT);
    const char *inner = strstr(status_traceback(), "fail_with");
    CHECK(inner && strstr(inner, "pass_on"));
    status_clear();
    CHECK(status_message()[0] == '\0' && status_traceback()[0] == '\0');
}

static void test_long(void)
{
    static char text[1 << 14];
    memset(text, 'x', sizeof text - 1);
    CHECK(fail_with(text) == ST_FORMAT);
    CHECK(strlen(status_message()) < sizeof text / 2);
    CHECK(status_prefix(ST_FORMAT, "%s", text) == ST_FORMAT);
    for (int i = 0; i < 1000; i++) {
        status_trace(ST_FORMAT, __FILE__, __LINE__, "again");
    }
    CHECK(strlen(status_traceback()) < sizeof text);
}

int main(void)
{
    test_one_line();
    test_traceback();
    test_long();
    return check_report();
}
