/* A run file that is not as it should be: the input says of each thing that a run file holds
 * whether it is there, and of which type, shape and contents. HDF5 writes the file, so that only
 * our reading is tried.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <hdf5.h>
#include <stdlib.h>
#include <string.h>

#include "core/json.h"
#include "core/mem.h"
#include "core/runfile.h"
#include "tests/fuzz/fuzz.h"

enum { TEXT_BYTES = 32, ROWS_MAX = 70, VALUES_BYTES = 8 * ROWS_MAX };

/* Ids below zero are ignored by HDF5, with an error that nobody looks at. */
static void close_all(hid_t a, hid_t b, hid_t c)
{
    const hid_t ids[] = {a, b, c};
    for (int i = 0; i < 3; i++) {
        if (ids[i] >= 0) {
            H5Idec_ref(ids[i]);
        }
    }
}

static hid_t text_type(bool variable, bool utf8)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, variable ? H5T_VARIABLE : TEXT_BYTES);
    H5Tset_cset(type, utf8 ? H5T_CSET_UTF8 : H5T_CSET_ASCII);
    return type;
}

/* The columns of /levels, each perhaps missing or of another type. */
static hid_t row_type(struct fuzz_bytes *b)
{
    static const char *const names[] = {"text", "avg_bits", "head_avg_bits", "more"};
    hid_t row = H5Tcreate(H5T_COMPOUND, 4 * TEXT_BYTES);
    for (size_t i = 0; i < 4; i++) {
        uint8_t what = fuzz_u8(b);
        hid_t text = text_type(what / 16 % 4 == 0, what & 64);
        const hid_t number[] = {H5T_IEEE_F32LE, H5T_IEEE_F64BE, H5T_STD_I8LE, text};
        hid_t type = what % 8 < 4 ? (i == 0 ? text : number[what % 8]) : number[what % 4];
        if (what % 16 != 15) {
            H5Tinsert(row, names[i], i * TEXT_BYTES, type);
        }
        H5Tclose(text);
    }
    return row;
}

/* Any type; the caller closes it. */
static hid_t any_type(struct fuzz_bytes *b)
{
    uint8_t what = fuzz_u8(b);
    const hid_t plain[] = {H5T_STD_I64LE, H5T_IEEE_F64LE,  H5T_STD_U8LE,  H5T_IEEE_F32BE,
                           H5T_STD_B16LE, H5T_STD_REF_OBJ, H5T_STD_I32BE, H5T_STD_U64LE};
    hsize_t dims[2] = {2, 3};
    switch (what % 8) {
    case 0:
    case 1:
        return text_type(true, what & 8);
    case 2:
        return text_type(false, what & 8);
    case 3:
        return row_type(b);
    case 4:
        return H5Tarray_create2(plain[what / 8 % 8], 2, dims);
    case 5:
        return H5Tvlen_create(plain[what / 8 % 8]);
    case 6:
        return H5Tcreate(H5T_OPAQUE, 5);
    default:
        return H5Tcopy(plain[what / 8 % 8]);
    }
}

static hid_t any_space(struct fuzz_bytes *b)
{
    uint8_t what = fuzz_u8(b);
    hsize_t dims[3] = {fuzz_u8(b) % ROWS_MAX, what / 4 % 4, 2};
    int rank = what % 4;
    return rank == 0 ? H5Screate(what & 128 ? H5S_NULL : H5S_SCALAR)
                     : H5Screate_simple(rank, dims, NULL);
}

/* Contents, where the type's memory is plain enough for random bytes or texts. */
static void fill(struct fuzz_bytes *b, hid_t object, bool is_attribute, hid_t type, hid_t space)
{
    static char text[TEXT_BYTES + 1];
    static char *texts[ROWS_MAX * 8];
    static unsigned char values[VALUES_BYTES * 24];
    hssize_t n = H5Sget_simple_extent_npoints(space);
    bool variable = H5Tis_variable_str(type) > 0;
    H5T_class_t class = H5Tget_class(type);
    if (n < 1 || (size_t)n * H5Tget_size(type) > sizeof values || (size_t)n > ROWS_MAX * 8 ||
        (!variable && class != H5T_INTEGER && class != H5T_FLOAT && class != H5T_STRING)) {
        return; // what HDF5 fills it with: zeros
    }
    for (size_t i = 0; i < TEXT_BYTES; i++) {
        text[i] = (char)fuzz_u8(b);
    }
    for (size_t i = 0; i < ROWS_MAX * 8; i++) {
        texts[i] = text;
    }
    for (size_t i = 0; i < sizeof values; i++) {
        values[i] = (unsigned char)text[i % TEXT_BYTES];
    }
    const void *buf = variable ? (const void *)texts : (const void *)values;
    if (is_attribute) {
        H5Awrite(object, type, buf);
    } else {
        H5Dwrite(object, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, buf);
    }
}

/* A text attribute as it should be, or something else, or nothing. */
static void put_attribute(struct fuzz_bytes *b, hid_t parent, const char *name, const char *value)
{
    uint8_t what = fuzz_u8(b);
    if (what % 8 == 7) {
        return;
    }
    bool as_it_should = what % 8 < 5;
    hid_t type = as_it_should ? text_type(true, true) : any_type(b);
    hid_t space = as_it_should ? H5Screate(H5S_SCALAR) : any_space(b);
    hid_t attribute = H5Acreate2(parent, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    if (as_it_should) {
        H5Awrite(attribute, type, &value);
    } else {
        fill(b, attribute, true, type, space);
    }
    close_all(attribute, space, type);
}

enum kind { TABLE, NUMBER, TEXT, LEVELS };

/* A dataset as it should be (nearly empty), or something else, or a group, or nothing. */
static void put_set(struct fuzz_bytes *b, hid_t parent, const char *name, enum kind kind)
{
    uint8_t what = fuzz_u8(b);
    hsize_t rows = kind == LEVELS && what & 64 ? fuzz_u8(b) % ROWS_MAX : 3;
    if (what % 8 == 7) {
        return;
    }
    if (what % 8 == 6) {
        close_all(H5Gcreate2(parent, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), -1, -1);
        return;
    }
    bool as_it_should = what % 8 < 5;
    hid_t type = -1, space = -1;
    if (!as_it_should) {
        type = any_type(b);
        space = any_space(b);
    } else {
        type = kind == LEVELS ? row_type(b)
               : kind == TEXT ? text_type(true, true)
                              : H5Tcopy(what & 8 ? H5T_IEEE_F64LE : H5T_STD_I64LE);
        space = kind == LEVELS || kind == TABLE ? H5Screate_simple(1, &rows, NULL)
                                                : H5Screate(H5S_SCALAR);
    }
    hid_t set = H5Dcreate2(parent, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    if (set >= 0) {
        fill(b, set, false, type, space);
        put_attribute(b, set, "unit", "s");
    }
    close_all(set, space, type);
}

/* A name that need not be UTF-8. */
static const char *any_name(struct fuzz_bytes *b)
{
    static char name[200];
    size_t n = 1 + fuzz_u8(b) % 8, times = fuzz_u8(b) < 8 ? 20 : 1;
    for (size_t i = 0; i < n * times; i++) {
        uint8_t c = i < n ? fuzz_u8(b) : (uint8_t)name[i % n];
        name[i] = c == '/' || c == '\0' || c == '.' ? 'x' : (char)c;
    }
    name[n * times] = '\0';
    return name;
}

static void put_everything(struct fuzz_bytes *b, hid_t file)
{
    static const char *const tables[] = {"prompts",       "steps",     "passes", "plans",
                                         "plan_switches", "decisions", "failed"};
    static const char *const metrics[] = {"n_prompts", "decode_tok_s"};
    put_attribute(b, file, "format", RUNFILE_FORMAT);
    put_attribute(b, file, "format_version", RUNFILE_FORMAT_VERSION);
    hid_t group = H5Gcreate2(file, "provenance", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    put_attribute(b, group, "description", "about");
    put_attribute(b, group, "git", "abc");
    for (int n = fuzz_u8(b) % 4; n > 0; n--) {
        put_attribute(b, group, any_name(b), "value");
    }
    put_set(b, group, "config", TEXT);
    close_all(group, -1, -1);
    put_set(b, file, "levels", LEVELS);
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        put_set(b, file, tables[i], TABLE);
    }
    if (fuzz_u8(b) % 2) {
        group = H5Gcreate2(file, "kv_features", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
        put_set(b, group, "prompt", TABLE);
        close_all(group, -1, -1);
    }
    group = fuzz_u8(b) % 16 == 15
                ? -1
                : H5Gcreate2(file, "metrics", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    for (size_t i = 0; group >= 0 && i < sizeof metrics / sizeof metrics[0]; i++) {
        put_set(b, group, metrics[i], NUMBER);
    }
    for (int n = fuzz_u8(b) % 4; group >= 0 && n > 0; n--) {
        put_set(b, group, any_name(b), NUMBER);
    }
    close_all(group, -1, -1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_bytes b = {data, data + size};
    char *text = NULL;
    json_t *json = NULL;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    H5set_free_list_limits(-1, -1, -1, -1, -1, -1); // half a MiB per open file is zeroed, not new
    hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_fapl_core(access, 1 << 16, true);
    H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
    hid_t file = H5Fcreate(fuzz_path("run.h5"), H5F_ACC_TRUNC, H5P_DEFAULT, access);
    INVARIANT(file >= 0);
    put_everything(&b, file);
    H5Fclose(file);
    H5Pclose(access);
    H5Eclear2(H5E_DEFAULT);
    bool as_json = size % 4;
    if (fuzz_ok(runfile_describe(&text, fuzz_path("run.h5"), as_json))) {
        INVARIANT(text[0] != '\0');
        INVARIANT(!as_json || fuzz_ok(json_read_text(&json, text, strlen(text), "described")));
        mem_free(text);
    }
    json_release(&json);
    INVARIANT(H5Fget_obj_count((hid_t)H5F_OBJ_ALL, H5F_OBJ_ALL) == 0); // nothing is left open
    return 0;
}
