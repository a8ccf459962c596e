/* Values into struct settings: from defaults, libconfig files and --set, all through one checked
 * setter. libconfig parses; a scan before it refuses what must not reach it (@include, unclosed
 * texts, deep nesting) and mends what its older versions read wrongly (integers beyond 32 bits).
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/settings.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <libconfig.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"

enum { FILE_MAX_BYTES = 1 << 20, KEY_BYTES = 96, DEPTH_MAX = 16, ROWS_MAX = 256 };

/* ---- one value ---- */

enum found { FOUND_BOOL, FOUND_INT, FOUND_FLOAT, FOUND_TEXT, FOUND_OTHER };

struct value {
    enum found found;
    bool flag;
    int64_t whole;
    double real;
    const char *text; /* of a text; of FOUND_OTHER what it is: "a group" */
};

static void expected_text(char *out, size_t bytes, const struct setting_row *row)
{
    switch (row->type) {
    case SET_BOOL:
        snprintf(out, bytes, "true or false");
        return;
    case SET_I32:
    case SET_I64:
        snprintf(out, bytes, "a whole number from %.0f to %.0f", row->min, row->max);
        break;
    case SET_F64:
        snprintf(out, bytes, "a number from %g to %g", row->min, row->max);
        break;
    case SET_TEXT:
        if (!row->words) {
            snprintf(out, bytes, "a text in quotes");
            return;
        }
        snprintf(out, bytes, "one of");
        for (int i = 0; row->words[i]; i++) {
            size_t used = strlen(out);
            snprintf(out + used, bytes - used, "%s \"%s\"", i ? "," : "", row->words[i]);
        }
        return;
    }
    size_t used = strlen(out);
    if (row->unit[0]) {
        snprintf(out + used, bytes - used, " (%s)", row->unit);
    }
}

static void found_text(char *out, size_t bytes, const struct value *v)
{
    switch (v->found) {
    case FOUND_BOOL:
        snprintf(out, bytes, "%s", v->flag ? "true" : "false");
        break;
    case FOUND_INT:
        snprintf(out, bytes, "%" PRId64, v->whole);
        break;
    case FOUND_FLOAT:
        snprintf(out, bytes, "%g (a float)", v->real);
        break;
    case FOUND_TEXT:
        snprintf(out, bytes, "the text \"%.60s\"%s", v->text, strlen(v->text) > 60 ? "..." : "");
        break;
    case FOUND_OTHER:
        snprintf(out, bytes, "%s", v->text);
        break;
    }
}

static bool word_allowed(const struct setting_row *row, const char *text)
{
    for (int i = 0; row->words && row->words[i]; i++) {
        if (strcmp(row->words[i], text) == 0) {
            return true;
        }
    }
    return row->words == NULL;
}

/* Type and range in one place; `where` begins the message: "run.cfg:12" or "--set". */
static enum status put(struct settings *s, const struct setting_row *row, const struct value *v,
                       const char *where)
{
    char *field = (char *)s + row->offset;
    bool whole = v->found == FOUND_INT;
    bool fits = false;
    switch (row->type) {
    case SET_BOOL:
        fits = v->found == FOUND_BOOL;
        if (fits) {
            *(bool *)field = v->flag;
        }
        break;
    case SET_I32:
    case SET_I64:
        fits = whole && v->whole >= (int64_t)row->min && v->whole <= (int64_t)row->max;
        if (fits && row->type == SET_I32) {
            *(int32_t *)field = (int32_t)v->whole;
        } else if (fits) {
            *(int64_t *)field = v->whole;
        }
        break;
    case SET_F64: {
        double x = whole ? (double)v->whole : v->real;
        fits = (whole || v->found == FOUND_FLOAT) && isfinite(x) && x >= row->min && x <= row->max;
        if (fits) {
            *(double *)field = x;
        }
        break;
    }
    case SET_TEXT:
        fits = v->found == FOUND_TEXT && word_allowed(row, v->text);
        if (fits && strlen(v->text) >= row->bytes) {
            FAIL(ST_USER, "%s: %s is %zu bytes long; at most %zu fit", where, row->key,
                 strlen(v->text), row->bytes - 1);
        }
        if (fits) {
            memset(field, 0, row->bytes);
            memcpy(field, v->text, strlen(v->text));
        }
        break;
    }
    if (!fits) {
        char expected[256], found[128];
        expected_text(expected, sizeof expected, row);
        found_text(found, sizeof found, v);
        FAIL(ST_USER, "%s: %s is %s; expected %s", where, row->key, found, expected);
    }
    return ST_OK;
}

/* A value without quotes, as a command line has it, read as the row's type wants it. */
static struct value value_of_text(const struct setting_row *row, const char *text)
{
    struct value v = {.found = FOUND_TEXT, .text = text};
    if (row->type == SET_TEXT || text[0] == '\0' || isspace((unsigned char)text[0])) {
        return v;
    }
    if (row->type == SET_BOOL) {
        v.flag = strcmp(text, "true") == 0;
        v.found = v.flag || strcmp(text, "false") == 0 ? FOUND_BOOL : FOUND_TEXT;
        return v;
    }
    char *end = NULL;
    errno = 0;
    v.whole = strtoll(text, &end, 10);
    if (*end == '\0' && errno == 0) {
        v.found = FOUND_INT;
        return v;
    }
    v.real = strtod(text, &end);
    if (*end == '\0') {
        v.found = FOUND_FLOAT; // infinities and NaN fail the range check
    }
    return v;
}

void settings_default(struct settings *s)
{
    memset(s, 0, sizeof *s);
    for (int i = 0; settings_row(i); i++) {
        const struct setting_row *row = settings_row(i);
        struct value v = value_of_text(row, row->fallback);
        INVARIANT(i < ROWS_MAX && put(s, row, &v, "default") == ST_OK);
    }
}

/* ---- names ---- */

static int find_row(const char *key)
{
    for (int i = 0; settings_row(i); i++) {
        if (strcmp(settings_row(i)->key, key) == 0) {
            return i;
        }
    }
    return -1;
}

/* Is `name` a group: the start of some key, up to its dot? */
static bool is_group(const char *name)
{
    size_t n = strlen(name);
    for (int i = 0; settings_row(i); i++) {
        const char *key = settings_row(i)->key;
        if (strncmp(key, name, n) == 0 && key[n] == '.') {
            return true;
        }
    }
    return false;
}

/* Letters to insert, delete or replace between two names, upper and lower case alike; only the
 * first KEY_BYTES count. */
static int edit_distance(const char *a, const char *b)
{
    int row[KEY_BYTES + 1];
    int n_b = (int)strnlen(b, KEY_BYTES), n_a = (int)strnlen(a, KEY_BYTES);
    for (int j = 0; j <= n_b; j++) {
        row[j] = j;
    }
    for (int i = 1; i <= n_a; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n_b; j++) {
            bool same = tolower((unsigned char)a[i - 1]) == tolower((unsigned char)b[j - 1]);
            int best = diagonal + (same ? 0 : 1);
            best = row[j] + 1 < best ? row[j] + 1 : best;
            best = row[j - 1] + 1 < best ? row[j - 1] + 1 : best;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[n_b];
}

/* The key that `name` was most likely meant to be: `name` may lack its group ("slots"). */
static const char *nearest_key(const char *name)
{
    const char *best = "";
    int least = INT32_MAX;
    for (int i = 0; settings_row(i); i++) {
        const char *key = settings_row(i)->key;
        int whole = edit_distance(name, key);
        int leaf = strchr(name, '.') ? INT32_MAX : edit_distance(name, strchr(key, '.') + 1);
        int d = leaf < whole ? leaf : whole;
        if (d < least) {
            least = d;
            best = key;
        }
    }
    return best;
}

static enum status fail_unknown(const char *where, const char *name)
{
    FAIL(ST_USER,
         "%s: unknown setting \"%.64s\"; the nearest is \"%s\" (pmpd help-config lists "
         "all)",
         where, name, nearest_key(name));
}

static enum status fail_unknown_group(const char *where, const char *name)
{
    char group[KEY_BYTES], best[KEY_BYTES] = "";
    int least = INT32_MAX;
    for (int i = 0; settings_row(i); i++) {
        const char *key = settings_row(i)->key;
        snprintf(group, sizeof group, "%.*s", (int)strcspn(key, "."), key);
        int d = edit_distance(name, group);
        if (d < least) {
            least = d;
            memcpy(best, group, sizeof best);
        }
    }
    FAIL(ST_USER,
         "%s: unknown group of settings \"%.64s\"; the nearest is \"%s\" (pmpd help-config "
         "lists all)",
         where, name, best);
}

enum status settings_set(struct settings *s, const char *assignment)
{
    const char *equals = strchr(assignment, '=');
    if (!equals || equals == assignment) {
        FAIL(ST_USER, "--set %.80s: expected key=value, as in --set decode.slots=4", assignment);
    }
    char key[KEY_BYTES];
    snprintf(key, sizeof key, "%.*s",
             (int)(equals - assignment < KEY_BYTES ? equals - assignment : KEY_BYTES - 1),
             assignment);
    int i = find_row(key);
    if (i < 0 && is_group(key)) {
        FAIL(ST_USER, "--set: %s is a group; name one of its settings, as in --set %s=...", key,
             nearest_key(key));
    }
    if (i < 0) {
        return fail_unknown("--set", key);
    }
    const struct setting_row *row = settings_row(i);
    const char *text = equals + 1;
    char *inner = NULL;
    size_t n = strlen(text);
    if (row->type == SET_TEXT && n >= 2 && text[0] == '"' && text[n - 1] == '"') {
        TRY(mem_strdup(&inner, text + 1)); // quotes that outlived the shell
        inner[n - 2] = '\0';
    }
    struct value v = value_of_text(row, inner ? inner : text);
    enum status st = put(s, row, &v, "--set");
    mem_free(inner);
    return st;
}

/* ---- files ---- */

struct scan {
    const char *name, *in; /* in: the next byte */
    char *out;             /* the next byte of the text for libconfig */
    int line, depth;
};

static void copy(struct scan *c, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        c->line += *c->in == '\n';
        *c->out++ = *c->in++;
    }
}

static enum status scan_quoted(struct scan *c)
{
    int first = c->line;
    copy(c, 1);
    while (*c->in && *c->in != '"') {
        if (strncmp(c->in, "\\x00", 4) == 0) {
            FAIL(ST_USER, "%s:%d: a text holds \\x00; texts end there, so write it without",
                 c->name, c->line);
        }
        copy(c, c->in[0] == '\\' && c->in[1] ? 2 : 1);
    }
    if (!*c->in) {
        FAIL(ST_USER, "%s:%d: the text that begins here has no closing quote", c->name, first);
    }
    copy(c, 1);
    return ST_OK;
}

static enum status scan_comment(struct scan *c)
{
    if (c->in[0] == '#' || c->in[1] == '/') {
        copy(c, strcspn(c->in, "\n"));
        return ST_OK;
    }
    const char *end = strstr(c->in + 2, "*/");
    if (!end) {
        FAIL(ST_USER, "%s:%d: the comment that begins here has no closing */", c->name, c->line);
    }
    copy(c, (size_t)(end + 2 - c->in));
    return ST_OK;
}

/* Names may be dotted. libconfig does not know that; its names may hold '*', which ours never do.
 */
static void scan_name(struct scan *c)
{
    while (isalnum((unsigned char)*c->in) || (*c->in && strchr("_-.", *c->in))) {
        *c->out++ = *c->in == '.' ? '*' : *c->in;
        c->in++;
    }
}

/* libconfig before 1.6 reads 5000000000 without its suffix L as some other number, silently.
 * Whole numbers are therefore written anew: decimal, with the suffix where it is needed; the new
 * form is at most one byte longer. */
static enum status scan_number(struct scan *c)
{
    size_t n = strspn(c->in, "+-");
    while (isalnum((unsigned char)c->in[n]) || c->in[n] == '.' ||
           (c->in[n] && strchr("+-", c->in[n]) && n > 0 && strchr("eE", c->in[n - 1]))) {
        n++;
    }
    char digits[80];
    if (n >= sizeof digits) {
        FAIL(ST_USER, "%s:%d: a number of %zu digits; at most %zu are read", c->name, c->line, n,
             sizeof digits - 1);
    }
    memcpy(digits, c->in, n);
    digits[n] = '\0';
    bool hex = strncmp(digits, "0x", 2) == 0 || strncmp(digits, "0X", 2) == 0;
    char *end = NULL;
    errno = 0;
    long long x = strtoll(digits, &end, hex ? 16 : 10);
    bool whole = end != digits && (!*end || strcmp(end, "L") == 0 || strcmp(end, "LL") == 0);
    if (!whole) { // a float, or something that libconfig will complain about
        copy(c, n);
        return ST_OK;
    }
    if (errno == ERANGE) {
        FAIL(ST_USER, "%s:%d: %s is too large for a whole number of 64 bits", c->name, c->line,
             digits);
    }
    c->in += n;
    c->out += sprintf(c->out, "%lld%s", x, x > INT32_MAX || x < INT32_MIN ? "L" : "");
    return ST_OK;
}

/* Wherever a line begins so, even inside a comment or a text: then no difference between our scan
 * and libconfig's can let one through. */
static enum status refuse_includes(const char *text, const char *name)
{
    int line = 1;
    for (const char *p = text; p; line++) {
        if (strncmp(p + strspn(p, " \t\r\v\f"), "@include", 8) == 0) {
            FAIL(ST_USER, "%s:%d: @include is not allowed; write the settings into this file", name,
                 line);
        }
        p = strchr(p, '\n');
        p = p ? p + 1 : NULL;
    }
    return ST_OK;
}

/* Writes the text for libconfig to c->out. Line ends stay, so that its line numbers are ours. */
static enum status scan_text(struct scan *c)
{
    while (*c->in) {
        char a = c->in[0], b = c->in[1];
        if (a == '"') {
            TRY(scan_quoted(c));
        } else if (a == '#' || (a == '/' && (b == '/' || b == '*'))) {
            TRY(scan_comment(c));
        } else if (isalpha((unsigned char)a)) {
            scan_name(c);
        } else if (isdigit((unsigned char)a) || a == '.' || a == '+' || a == '-') {
            TRY(scan_number(c));
        } else if (a == '*' || a == '@') {
            FAIL(ST_USER, "%s:%d: unexpected '%c'; expected a setting such as decode.slots = 4;",
                 c->name, c->line, a);
        } else {
            c->depth += (strchr("{([", a) != NULL) - (strchr("})]", a) != NULL);
            if (c->depth > DEPTH_MAX) {
                FAIL(ST_USER, "%s:%d: groups are nested more than %d deep; settings need one level",
                     c->name, c->line, DEPTH_MAX);
            }
            copy(c, 1);
        }
    }
    *c->out = '\0';
    return ST_OK;
}

static struct value value_of_setting(const config_setting_t *item)
{
    struct value v = {.found = FOUND_OTHER, .text = "something else"};
    switch (config_setting_type(item)) {
    case CONFIG_TYPE_BOOL:
        v.found = FOUND_BOOL;
        v.flag = config_setting_get_bool(item) != 0;
        break;
    case CONFIG_TYPE_INT:
        v.found = FOUND_INT;
        v.whole = config_setting_get_int(item);
        break;
    case CONFIG_TYPE_INT64:
        v.found = FOUND_INT;
        v.whole = config_setting_get_int64(item);
        break;
    case CONFIG_TYPE_FLOAT:
        v.found = FOUND_FLOAT;
        v.real = config_setting_get_float(item);
        break;
    case CONFIG_TYPE_STRING:
        v.found = FOUND_TEXT;
        v.text = config_setting_get_string(item);
        v.text = v.text ? v.text : "";
        break;
    case CONFIG_TYPE_GROUP:
        v.text = "a group { }";
        break;
    case CONFIG_TYPE_ARRAY:
    case CONFIG_TYPE_LIST:
        v.text = "a list";
        break;
    default:
        break;
    }
    return v;
}

static enum status read_group(struct settings *s, const config_setting_t *group, const char *prefix,
                              const char *name, bool seen[ROWS_MAX])
{
    for (int i = 0; i < config_setting_length(group); i++) {
        const config_setting_t *item = config_setting_get_elem(group, (unsigned)i);
        const char *leaf = config_setting_name(item);
        char key[KEY_BYTES * 2], where[SETTINGS_PATH_BYTES + 32];
        snprintf(key, sizeof key, "%s%s%.*s", prefix, prefix[0] ? "." : "", KEY_BYTES,
                 leaf ? leaf : "");
        for (char *p = strchr(key, '*'); p; p = strchr(p, '*')) {
            *p = '.';
        }
        snprintf(where, sizeof where, "%.*s:%u", SETTINGS_PATH_BYTES, name,
                 config_setting_source_line(item));
        int at = find_row(key);
        if (at >= 0 && seen[at]) {
            FAIL(ST_USER, "%s: %s is given a second time; keep one of the two", where, key);
        } else if (at >= 0) {
            struct value v = value_of_setting(item);
            seen[at] = true;
            TRY(put(s, settings_row(at), &v, where));
        } else if (is_group(key) && config_setting_is_group(item)) {
            TRY(read_group(s, item, key, name, seen));
        } else if (is_group(key)) {
            FAIL(ST_USER,
                 "%s: %s is a group; expected %s: { ... } or a single setting such as "
                 "%s = ...;",
                 where, key, key, nearest_key(key));
        } else if (config_setting_is_group(item)) {
            return fail_unknown_group(where, key);
        } else {
            return fail_unknown(where, key);
        }
    }
    return ST_OK;
}

enum status settings_parse(struct settings *s, const char *text, const char *name)
{
    size_t bytes = strlen(text);
    if (bytes > FILE_MAX_BYTES) {
        FAIL(ST_USER, "%s: %zu bytes; a settings file has at most %d", name, bytes, FILE_MAX_BYTES);
    }
    char *prepared = NULL;
    struct settings next = *s; // *s changes only when the whole text is good
    bool seen[ROWS_MAX] = {false};
    config_t config;
    config_init(&config);
    enum status st = ST_OK;
    TRY_GOTO(st, refuse_includes(text, name), done);
    TRY_GOTO(st, mem_alloc_array((void **)&prepared, 2 * bytes + 1, 1), done);
    struct scan scan = {.name = name, .in = text, .out = prepared, .line = 1};
    TRY_GOTO(st, scan_text(&scan), done);
    if (config_read_string(&config, prepared) != CONFIG_TRUE) {
        FAIL_GOTO(st, ST_USER, done, "%s:%d: %s; expected lines such as decode: { slots = 4; };",
                  name, config_error_line(&config), config_error_text(&config));
    }
    TRY_GOTO(st, read_group(&next, config_root_setting(&config), "", name, seen), done);
    *s = next;
done:
    config_destroy(&config);
    mem_free(prepared);
    return st;
}

enum status settings_read_file(char **text, const char *path)
{
    FILE *in = fopen(path, "rb");
    if (!in) {
        FAIL(ST_IO, "%s: cannot open the settings file: %s", path, strerror(errno));
    }
    enum status st = ST_OK;
    char *whole = NULL;
    TRY_GOTO(st, mem_alloc_array((void **)&whole, FILE_MAX_BYTES + 2, 1), done);
    size_t bytes = fread(whole, 1, FILE_MAX_BYTES + 1, in);
    if (ferror(in)) {
        FAIL_GOTO(st, ST_IO, done, "%s: cannot read the settings file: %s", path, strerror(errno));
    }
    if (bytes > FILE_MAX_BYTES) {
        FAIL_GOTO(st, ST_USER, done, "%s: larger than %d bytes; is this a settings file?", path,
                  FILE_MAX_BYTES);
    }
    if (memchr(whole, '\0', bytes)) {
        FAIL_GOTO(st, ST_USER, done, "%s: a zero byte at offset %zu; expected a text file", path,
                  strlen(whole));
    }
    TRY_GOTO(st, mem_strdup(text, whole), done);
done:
    mem_free(whole);
    fclose(in);
    return st;
}
