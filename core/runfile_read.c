/* A run file read back for people: provenance, levels, table sizes and metrics into one JSON
 * object, which is also what the text form is printed from. SPDX-License-Identifier: Apache-2.0
 */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/h5.h"
#include "core/invariance.h"
#include "core/level.h"
#include "core/mem.h"
#include "core/runfile.h"
#include "core/runfile_internal.h"
#include "core/unicode.h"

static const char *const table_names[] = {"prompts",       "steps",     "passes", "plans",
                                          "plan_switches", "decisions", "failed", NULL};

/* Sets a member; a text that is not UTF-8 or a number that is not finite becomes null. */
static enum status set_member(json_t *object, const char *key, json_t *value)
{
    size_t bytes = strlen(key);
    if (utf8_check(key, bytes) < bytes) { // jansson would print it as something that is no JSON
        json_decref(value);
        FAIL(ST_FORMAT, "the name \"%.60s\" is not UTF-8", key);
    }
    if (json_object_set_new_nocheck(object, key, value ? value : json_null()) != 0) {
        FAIL(ST_NOMEM, "out of memory for the description of a run file");
    }
    return ST_OK;
}

static enum status check_format(hid_t file, const char *path)
{
    char *format = NULL, *version = NULL;
    enum status st = ST_OK;
    TRY_GOTO(st, h5_read_attribute(&format, file, "format"), done);
    TRY_GOTO(st, h5_read_attribute(&version, file, "format_version"), done);
    if (!format || strcmp(format, RUNFILE_FORMAT) != 0) {
        FAIL_GOTO(st, ST_FORMAT, done,
                  "%s: an HDF5 file, but not a run file: its attribute format "
                  "is %.60s%s; expected \"%s\"",
                  path, format ? format : "missing", format ? "" : " or no text", RUNFILE_FORMAT);
    }
    if (!version || strcmp(version, RUNFILE_FORMAT_VERSION) != 0) {
        FAIL_GOTO(st, ST_FORMAT, done,
                  "%s: a run file of format version %.20s; this program reads "
                  "version %s",
                  path, version ? version : "(missing)", RUNFILE_FORMAT_VERSION);
    }
done:
    mem_free(version);
    mem_free(format);
    return st;
}

/* What every run file says, also one that was written before it was a fact of its own. */
static enum status describe_invariance(json_t *facts, const char *config)
{
    struct settings s;
    char text[INVARIANCE_BYTES];
    const char *product = json_string_value(json_object_get(facts, "product"));
    settings_default(&s);
    if (settings_parse(&s, config, "config") != ST_OK) {
        status_clear();
        return ST_OK; // settings of another version of the program
    }
    invariance_text(text, &s, product ? product : invariance_product(&s, false));
    return set_member(facts, "invariant_under", json_string(text));
}

static enum status describe_provenance(json_t *all, hid_t file)
{
    enum status st = ST_OK;
    hid_t group = H5I_INVALID_HID, attribute = H5I_INVALID_HID, config = H5I_INVALID_HID;
    char *text = NULL;
    json_t *facts = json_object();
    H5O_info_t info;
    TRY_H5(st, group = H5Gopen2(file, "provenance", H5P_DEFAULT), done, "/provenance");
    TRY_H5(st, H5Oget_info2(group, &info, H5O_INFO_NUM_ATTRS), done, "/provenance");
    for (hsize_t i = 0; i < info.num_attrs; i++) {
        char name[256];
        TRY_H5(st,
               attribute = H5Aopen_by_idx(group, ".", H5_INDEX_NAME, H5_ITER_INC, i, H5P_DEFAULT,
                                          H5P_DEFAULT),
               done, "/provenance");
        TRY_H5(st, H5Aget_name(attribute, sizeof name, name), done, "/provenance");
        TRY_GOTO(st, h5_read_text(&text, attribute, true, name), done);
        if (strcmp(name, "description") != 0) {
            TRY_GOTO(st, set_member(facts, name, text ? json_string(text) : NULL), done);
        }
        mem_free(text);
        text = NULL;
        H5Aclose(attribute);
        attribute = H5I_INVALID_HID;
    }
    TRY_H5(st, config = H5Dopen2(group, "config", H5P_DEFAULT), done, "/provenance/config");
    TRY_GOTO(st, h5_read_text(&text, config, false, "/provenance/config"), done);
    TRY_GOTO(st, describe_invariance(facts, text ? text : ""), done);
    TRY_GOTO(st, set_member(all, "provenance", json_incref(facts)), done);
    TRY_GOTO(st, set_member(all, "config", text ? json_string(text) : NULL), done);
done:
    H5Dclose(config);
    H5Aclose(attribute);
    H5Gclose(group);
    mem_free(text);
    json_decref(facts);
    return st;
}

static enum status row_count(int64_t *n, hid_t file, const char *name)
{
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID, space = H5I_INVALID_HID;
    TRY_H5(st, set = H5Dopen2(file, name, H5P_DEFAULT), done, name);
    TRY_H5(st, space = H5Dget_space(set), done, name);
    TRY_H5(st, *n = H5Sget_simple_extent_npoints(space), done, name);
done:
    H5Sclose(space);
    H5Dclose(set);
    return st;
}

static enum status describe_tables(json_t *all, hid_t file)
{
    enum status st = ST_OK;
    json_t *tables = json_object();
    int64_t n = 0;
    for (int i = 0; table_names[i]; i++) {
        TRY_GOTO(st, row_count(&n, file, table_names[i]), done);
        TRY_GOTO(st, set_member(tables, table_names[i], json_integer(n)), done);
    }
    if (H5Lexists(file, "budget", H5P_DEFAULT) > 0) { // older files have none
        TRY_GOTO(st, row_count(&n, file, "budget"), done);
        TRY_GOTO(st, set_member(tables, "budget", json_integer(n)), done);
    }
    n = 0;
    if (H5Lexists(file, "kv_features", H5P_DEFAULT) > 0) {
        TRY_GOTO(st, row_count(&n, file, "kv_features/prompt"), done);
    }
    TRY_GOTO(st, set_member(tables, "kv_features", json_integer(n)), done);
    TRY_GOTO(st, set_member(all, "rows", json_incref(tables)), done);
done:
    json_decref(tables);
    return st;
}

static enum status describe_levels(json_t *all, hid_t file)
{
    struct row {
        const char *text;
        float avg_bits, head_avg_bits;
    };
    static const struct h5_column columns[] = {
        {"text", COL_TEXT, offsetof(struct row, text), 0, "", ""},
        {"avg_bits", COL_F32, offsetof(struct row, avg_bits), 0, "", ""},
        {"head_avg_bits", COL_F32, offsetof(struct row, head_avg_bits), 0, "", ""},
    };
    enum status st = ST_OK;
    struct h5_rows rows;
    json_t *levels = json_array();
    TRY_GOTO(st,
             h5_rows_read(&rows, file, "levels", columns, 3, sizeof(struct row), LEVEL_TABLE_MAX),
             done);
    for (uint64_t i = 0; i < rows.n; i++) {
        const struct row *row = (const struct row *)rows.rows + i;
        json_t *level = json_object();
        st = set_member(level, "text", json_string(row->text ? row->text : ""));
        st = st ? st : set_member(level, "avg_bits", json_real((double)row->avg_bits));
        st = st ? st : set_member(level, "head_avg_bits", json_real((double)row->head_avg_bits));
        if (json_array_append_new(levels, level) != 0 && st == ST_OK) {
            FAIL_GOTO(st, ST_NOMEM, done, "out of memory for the description of a run file");
        }
        TRY_GOTO(st, st, done);
    }
    TRY_GOTO(st, set_member(all, "levels", json_incref(levels)), done);
done:
    h5_rows_free(&rows);
    json_decref(levels);
    return st;
}

static enum status describe_metric(json_t *metrics, json_t *units, hid_t group, const char *name)
{
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID, space = H5I_INVALID_HID, type = H5I_INVALID_HID;
    char *unit = NULL;
    TRY_H5(st, set = H5Dopen2(group, name, H5P_DEFAULT), done, name);
    TRY_H5(st, space = H5Dget_space(set), done, name);
    TRY_H5(st, type = H5Dget_type(set), done, name);
    H5T_class_t class = H5Tget_class(type);
    if (H5Sget_simple_extent_npoints(space) != 1 || (class != H5T_INTEGER && class != H5T_FLOAT)) {
        FAIL_GOTO(st, ST_FORMAT, done, "/metrics/%s: expected one number", name);
    }
    if (class == H5T_INTEGER) {
        int64_t x = 0;
        TRY_H5(st, H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &x), done, name);
        TRY_GOTO(st, set_member(metrics, name, json_integer(x)), done);
    } else {
        double x = 0;
        TRY_H5(st, H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, &x), done, name);
        TRY_GOTO(st, set_member(metrics, name, json_real(x)), done);
    }
    TRY_GOTO(st, h5_read_attribute(&unit, set, "unit"), done);
    TRY_GOTO(st, set_member(units, name, json_string(unit ? unit : "")), done);
done:
    mem_free(unit);
    H5Tclose(type);
    H5Sclose(space);
    H5Dclose(set);
    return st;
}

static enum status describe_metrics(json_t *all, hid_t file)
{
    enum status st = ST_OK;
    hid_t group = H5I_INVALID_HID;
    H5G_info_t info;
    json_t *metrics = json_object(), *units = json_object();
    TRY_H5(st, group = H5Gopen2(file, "metrics", H5P_DEFAULT), done, "/metrics");
    TRY_H5(st, H5Gget_info(group, &info), done, "/metrics");
    for (hsize_t i = 0; i < info.nlinks; i++) {
        char name[128];
        TRY_H5(st,
               H5Lget_name_by_idx(group, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name,
                                  H5P_DEFAULT),
               done, "/metrics");
        TRY_GOTO(st, describe_metric(metrics, units, group, name), done);
    }
    TRY_GOTO(st, set_member(all, "metrics", json_incref(metrics)), done);
    TRY_GOTO(st, set_member(all, "units", json_incref(units)), done);
done:
    H5Gclose(group);
    json_decref(units);
    json_decref(metrics);
    return st;
}

/* ---- for people ---- */

static void print_member(FILE *out, const char *key, const json_t *value, const char *unit)
{
    fprintf(out, "  %-18s ", key);
    if (json_is_string(value)) {
        fputs(json_string_value(value), out);
    } else if (json_is_integer(value)) {
        fprintf(out, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    } else if (json_is_real(value)) {
        fprintf(out, "%.6g", json_real_value(value));
    } else {
        fputc('-', out);
    }
    fprintf(out, "%s%s\n", unit[0] && strcmp(unit, "1") != 0 ? " " : "",
            strcmp(unit, "1") != 0 ? unit : "");
}

static void print_description(FILE *out, const char *path, json_t *all)
{
    const char *key = NULL;
    json_t *value = NULL;
    size_t i = 0;
    fprintf(out, "run file %s, %" JSON_INTEGER_FORMAT " bytes\n", path,
            json_integer_value(json_object_get(all, "bytes")));
    fputs("provenance\n", out);
    json_object_foreach(json_object_get(all, "provenance"), key, value)
    {
        print_member(out, key, value, "");
    }
    fputs("levels (average bits of the layers, of the head)\n", out);
    json_array_foreach(json_object_get(all, "levels"), i, value)
    {
        fprintf(out, "  %-3zu %-30s %6.3f %6.3f\n", i,
                json_string_value(json_object_get(value, "text"))
                    ? json_string_value(json_object_get(value, "text"))
                    : "-",
                json_number_value(json_object_get(value, "avg_bits")),
                json_number_value(json_object_get(value, "head_avg_bits")));
    }
    fputs("rows\n", out);
    json_object_foreach(json_object_get(all, "rows"), key, value)
    {
        print_member(out, key, value, "");
    }
    fputs("metrics\n", out);
    json_object_foreach(json_object_get(all, "metrics"), key, value)
    {
        const char *unit = json_string_value(json_object_get(json_object_get(all, "units"), key));
        print_member(out, key, value, unit ? unit : "");
    }
}

static enum status render(char **text, const char *path, json_t *all, int as_json)
{
    if (as_json) {
        char *dumped = json_dumps(all, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
        if (!dumped) {
            FAIL(ST_NOMEM, "out of memory for the description of a run file");
        }
        enum status st = mem_strdup(text, dumped);
        free(dumped);
        return st;
    }
    char *whole = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&whole, &bytes);
    if (!out) {
        FAIL(ST_NOMEM, "out of memory for the description of a run file");
    }
    print_description(out, path, all);
    enum status st = ST_OK;
    if (fclose(out) != 0) {
        FAIL_GOTO(st, ST_NOMEM, done, "out of memory for the description of a run file");
    }
    TRY_GOTO(st, mem_strdup(text, whole), done);
done:
    free(whole);
    return st;
}

enum status runfile_open(hid_t *file, int64_t *bytes, const char *path)
{
    struct stat info;
    *file = H5I_INVALID_HID;
    if (stat(path, &info) != 0 || access(path, R_OK) != 0) {
        FAIL(ST_IO, "%s: cannot open the run file: %s", path, strerror(errno));
    }
    h5_quiet();
    if (!S_ISREG(info.st_mode) || H5Fis_hdf5(path) <= 0) {
        H5Eclear2(H5E_DEFAULT);
        FAIL(ST_FORMAT, "%s: not an HDF5 file; expected the run.h5 of a run directory", path);
    }
    *bytes = info.st_size;
    TRY(h5_open(file, path));
    enum status st = check_format(*file, path);
    if (st != ST_OK) {
        H5Fclose(*file);
        *file = H5I_INVALID_HID;
    }
    return st;
}

enum status runfile_describe(char **text, const char *path, int as_json)
{
    enum status st = ST_OK;
    hid_t file = H5I_INVALID_HID;
    int64_t bytes = 0;
    json_t *all = json_object();
    TRY_GOTO(st, runfile_open(&file, &bytes, path), done);
    TRY_GOTO(st, set_member(all, "kind", json_string("run")), done);
    TRY_GOTO(st, set_member(all, "path", json_string(path)), done);
    TRY_GOTO(st, set_member(all, "bytes", json_integer(bytes)), done);
    TRY_GOTO(st, describe_provenance(all, file), body_failed);
    TRY_GOTO(st, describe_levels(all, file), body_failed);
    TRY_GOTO(st, describe_tables(all, file), body_failed);
    TRY_GOTO(st, describe_metrics(all, file), body_failed);
    TRY_GOTO(st, render(text, path, all, as_json), done);
    goto done;
body_failed:
    status_prefix(st, "%s: ", path);
done:
    H5Fclose(file);
    json_decref(all);
    return st;
}
