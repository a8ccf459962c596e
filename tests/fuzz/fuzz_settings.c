/* A settings file, and behind bytes 0xFF up to three assignments of --set.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/settings.h"
#include "tests/fuzz/fuzz.h"

/* libconfig 1.5 does not give back the text that it was reading when it came upon an error. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libconfig.so\n";
}

/* What is printed reads back to the same. */
static void check_round_trip(const struct settings *s, bool comments)
{
    char *text = NULL;
    static struct settings back;
    INVARIANT(settings_print(&text, s, comments) == ST_OK);
    settings_default(&back);
    INVARIANT(settings_parse(&back, text, "printed") == ST_OK);
    INVARIANT(memcmp(s, &back, sizeof back) == 0);
    mem_free(text);
}

static void check_ranges(const struct settings *s)
{
    char value[4 * SETTINGS_PATH_BYTES];
    for (int i = 0; settings_row(i); i++) {
        const struct setting_row *row = settings_row(i);
        const char *field = (const char *)s + row->offset;
        settings_value(s, row, value, sizeof value);
        INVARIANT(value[0] != '\0');
        if (row->type == SET_I32) {
            int32_t x = *(const int32_t *)field;
            INVARIANT((double)x >= row->min && (double)x <= row->max);
        } else if (row->type == SET_F64) {
            double x = *(const double *)field;
            INVARIANT(x >= row->min && x <= row->max);
        } else if (row->type == SET_TEXT) {
            INVARIANT(memchr(field, '\0', row->bytes) != NULL);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_part part[4];
    static struct settings s, before;
    fuzz_split(part, 4, data, size);
    settings_default(&s);
    before = s;
    bool changed = false;
    for (int i = 0; i < 4 && part[i].text; i++) {
        char *text = fuzz_text(&part[i]);
        bool good = fuzz_ok(i ? settings_set(&s, text) : settings_parse(&s, text, "run.cfg"));
        free(text);
        INVARIANT(good || memcmp(&s, &before, sizeof s) == 0);
        changed |= good;
        before = s;
    }
    if (changed) {
        check_ranges(&s);
        check_round_trip(&s, size % 16 == 0);
    }
    return 0;
}
