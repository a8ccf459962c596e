/* SPDX-License-Identifier: Apache-2.0 */
#include "core/h5.h"

#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/replace.h"

/* Rows of a chunk and of the write buffer; tables below one chunk are stored plainly. */
enum {
    CHUNK_BYTES = 256 * 1024,
    DEFLATE_LEVEL = 3,
    RANK_MAX = 3,
    MEMORY_STEP_BYTES = 4 << 20 // growth of a file in memory
};

void h5_quiet(void)
{
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

struct stack_text {
    char outer[256], inner[512];
};

static herr_t keep_ends(unsigned n, const H5E_error2_t *error, void *data)
{
    struct stack_text *text = data;
    if (n == 0) {
        snprintf(text->outer, sizeof text->outer, "%s", error->desc ? error->desc : "");
    }
    snprintf(text->inner, sizeof text->inner, "%s", error->desc ? error->desc : "");
    return 0;
}

enum status h5_raise(const char *file, int line, const char *func, const char *what)
{
    struct stack_text text = {"", ""};
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, keep_ends, &text);
    H5Eclear2(H5E_DEFAULT);
    bool both = strcmp(text.outer, text.inner) != 0;
    for (char *p = text.inner; *p; p++) { // HDF5 puts dates and line ends into some messages
        *p = *p == '\n' ? ' ' : *p;
    }
    return status_raise(ST_HDF5, file, line, func, "%s: HDF5: %s%s%s", what,
                        text.outer[0] ? text.outer : "no message", both ? ": " : "",
                        both ? text.inner : "");
}

enum status h5_create(hid_t *file, const char *path)
{
    enum status st = ST_OK;
    hid_t create = H5I_INVALID_HID, access = H5I_INVALID_HID;
    char *name = NULL;
    TRY(replace_name(&name, path)); // HDF5 would first read a file of this name
    TRY_H5(st, create = H5Pcreate(H5P_FILE_CREATE), done, name);
    TRY_H5(st, access = H5Pcreate(H5P_FILE_ACCESS), done, name);
    TRY_H5(st, H5Pset_obj_track_times(create, false), done, name); // same rows, same bytes
    TRY_H5(st, H5Pset_fclose_degree(access, H5F_CLOSE_STRONG), done, name);
    TRY_H5(st, H5Pset_fapl_core(access, MEMORY_STEP_BYTES, false), done, name);
    TRY_H5(st, *file = H5Fcreate(name, H5F_ACC_TRUNC, create, access), done, name);
done:
    mem_free(name);
    H5Pclose(create);
    H5Pclose(access);
    return st;
}

enum status h5_open(hid_t *file, const char *path)
{
    enum status st = ST_OK;
    hid_t access = H5I_INVALID_HID;
    TRY_H5(st, access = H5Pcreate(H5P_FILE_ACCESS), done, path);
    TRY_H5(st, H5Pset_fclose_degree(access, H5F_CLOSE_STRONG), done, path);
#if H5_VERSION_GE(1, 12, 1) || (H5_VERS_MINOR == 10 && H5_VERS_RELEASE >= 7)
    TRY_H5(st, H5Pset_file_locking(access, false, true), done, path);
#endif
    TRY_H5(st, *file = H5Fopen(path, H5F_ACC_RDONLY, access), done, path);
done:
    H5Pclose(access);
    return st;
}

enum status h5_read_text(char **text, hid_t object, bool is_attribute, const char *what)
{
    enum status st = ST_OK;
    hid_t type = H5I_INVALID_HID, space = H5I_INVALID_HID, memory = H5I_INVALID_HID;
    char *value = NULL;
    *text = NULL;
    TRY_H5(st, type = is_attribute ? H5Aget_type(object) : H5Dget_type(object), done, what);
    TRY_H5(st, space = is_attribute ? H5Aget_space(object) : H5Dget_space(object), done, what);
    if (H5Tis_variable_str(type) <= 0 || H5Sget_simple_extent_npoints(space) != 1) {
        goto done;
    }
    TRY_H5(st, memory = H5Tcopy(H5T_C_S1), done, what);
    TRY_H5(st, H5Tset_size(memory, H5T_VARIABLE), done, what);
    TRY_H5(st, H5Tset_cset(memory, H5Tget_cset(type)), done, what);
    if (is_attribute) {
        TRY_H5(st, H5Aread(object, memory, &value), done, what);
    } else {
        TRY_H5(st, H5Dread(object, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, &value), done, what);
    }
    TRY_GOTO(st, mem_strdup(text, value ? value : ""), done);
done:
    H5free_memory(value);
    H5Tclose(memory);
    H5Sclose(space);
    H5Tclose(type);
    return st;
}

enum status h5_read_attribute(char **text, hid_t object, const char *name)
{
    *text = NULL;
    htri_t there = H5Aexists(object, name);
    if (there <= 0) {
        return ST_OK;
    }
    hid_t attribute = H5I_INVALID_HID;
    TRY_H5_PLAIN(attribute = H5Aopen(object, name, H5P_DEFAULT), name);
    enum status st = h5_read_text(text, attribute, true, name);
    H5Aclose(attribute);
    return st;
}

enum status h5_copy_attribute(char *out, size_t bytes, hid_t object, const char *name)
{
    char *text = NULL;
    enum status st = ST_OK;
    TRY(h5_read_attribute(&text, object, name));
    if (!text || strlen(text) >= bytes) {
        FAIL_GOTO(st, ST_FORMAT, done, "attribute %s is %s", name,
                  text ? "too long" : "missing or no text");
    }
    memcpy(out, text, strlen(text) + 1);
done:
    mem_free(text);
    return st;
}

enum status h5_format(char *format, size_t bytes, const char *path)
{
    hid_t file = H5I_INVALID_HID;
    char *text = NULL;
    h5_quiet();
    TRY(h5_open(&file, path));
    enum status st = h5_read_attribute(&text, file, "format");
    snprintf(format, bytes, "%s", text ? text : "");
    mem_free(text);
    H5Fclose(file);
    return st;
}

enum status h5_save(hid_t file, const char *path)
{
    enum status st = ST_OK;
    char *image = NULL;
    ssize_t bytes = 0, copied = 0;
    TRY_H5_PLAIN(H5Fflush(file, H5F_SCOPE_GLOBAL), "flush");
    TRY_H5_PLAIN(bytes = H5Fget_file_image(file, NULL, 0), "image");
    TRY(mem_alloc_array((void **)&image, (size_t)bytes, 1));
    TRY_H5(st, copied = H5Fget_file_image(file, image, (size_t)bytes), done, "image");
    TRY_GOTO(st, replace_with(path, image, (size_t)copied), done);
done:
    mem_free(image);
    return st;
}

static enum status text_type(hid_t *type)
{
    enum status st = ST_OK;
    TRY_H5_PLAIN(*type = H5Tcopy(H5T_C_S1), "text type");
    TRY_H5(st, H5Tset_size(*type, H5T_VARIABLE), failed, "text type");
    TRY_H5(st, H5Tset_cset(*type, H5T_CSET_UTF8), failed, "text type");
    return ST_OK;
failed:
    H5Tclose(*type);
    *type = H5I_INVALID_HID;
    return st;
}

enum status h5_attribute(hid_t object, const char *name, const char *text)
{
    enum status st = ST_OK;
    hid_t type = H5I_INVALID_HID, space = H5I_INVALID_HID, attribute = H5I_INVALID_HID;
    TRY_GOTO(st, text_type(&type), done);
    TRY_H5(st, space = H5Screate(H5S_SCALAR), done, name);
    TRY_H5(st, attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT), done,
           name);
    TRY_H5(st, H5Awrite(attribute, type, &text), done, name);
done:
    H5Aclose(attribute);
    H5Sclose(space);
    H5Tclose(type);
    return st;
}

enum status h5_group(hid_t *group, hid_t parent, const char *name, const char *about)
{
    enum status st = ST_OK;
    hid_t create = H5I_INVALID_HID;
    *group = H5I_INVALID_HID;
    TRY_H5(st, create = H5Pcreate(H5P_GROUP_CREATE), failed, name);
    TRY_H5(st, H5Pset_obj_track_times(create, false), failed, name);
    TRY_H5(st, *group = H5Gcreate2(parent, name, H5P_DEFAULT, create, H5P_DEFAULT), failed, name);
    TRY_GOTO(st, h5_attribute(*group, "description", about), failed);
    H5Pclose(create);
    return ST_OK;
failed:
    H5Pclose(create);
    H5Gclose(*group);
    *group = H5I_INVALID_HID;
    return st;
}

/* A dataset with its two attributes. rank 0: a scalar. chunk NULL: stored in one piece. */
static enum status create_set(hid_t *set, hid_t parent, const char *name, hid_t type, int rank,
                              const hsize_t *dims, const hsize_t *chunk, const char *unit,
                              const char *about)
{
    enum status st = ST_OK;
    hid_t space = H5I_INVALID_HID, create = H5I_INVALID_HID;
    *set = H5I_INVALID_HID;
    TRY_H5(st, space = rank ? H5Screate_simple(rank, dims, NULL) : H5Screate(H5S_SCALAR), done,
           name);
    TRY_H5(st, create = H5Pcreate(H5P_DATASET_CREATE), done, name);
    TRY_H5(st, H5Pset_obj_track_times(create, false), done, name);
    if (chunk) {
        TRY_H5(st, H5Pset_chunk(create, rank, chunk), done, name);
        if (H5Zfilter_avail(H5Z_FILTER_DEFLATE) > 0) {
            TRY_H5(st, H5Pset_shuffle(create), done, name);
            TRY_H5(st, H5Pset_deflate(create, DEFLATE_LEVEL), done, name);
        }
    }
    TRY_H5(st, *set = H5Dcreate2(parent, name, type, space, H5P_DEFAULT, create, H5P_DEFAULT), done,
           name);
    TRY_GOTO(st, h5_attribute(*set, "description", about), done);
    TRY_GOTO(st, h5_attribute(*set, "unit", unit), done);
done:
    if (st != ST_OK) {
        H5Dclose(*set);
        *set = H5I_INVALID_HID;
    }
    H5Pclose(create);
    H5Sclose(space);
    return st;
}

static enum status write_scalar(hid_t parent, const char *name, hid_t file_type, hid_t memory_type,
                                const void *value, const char *unit, const char *about)
{
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID;
    TRY(create_set(&set, parent, name, file_type, 0, NULL, NULL, unit, about));
    TRY_H5(st, H5Dwrite(set, memory_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, value), done, name);
done:
    H5Dclose(set);
    return st;
}

enum status h5_scalar_f64(hid_t parent, const char *name, double value, const char *unit,
                          const char *about)
{
    return write_scalar(parent, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &value, unit, about);
}

enum status h5_scalar_i64(hid_t parent, const char *name, int64_t value, const char *unit,
                          const char *about)
{
    return write_scalar(parent, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value, unit, about);
}

enum status h5_scalar_text(hid_t parent, const char *name, const char *text, const char *about)
{
    hid_t type = H5I_INVALID_HID;
    TRY(text_type(&type));
    enum status st = write_scalar(parent, name, type, type, &text, "text", about);
    H5Tclose(type);
    return st;
}

/* ---- tables ---- */

/* The column's type in memory, or on disk (little endian). The caller closes it. */
static enum status column_type(hid_t *type, const struct h5_column *c, bool on_disk)
{
    hid_t kind = H5I_INVALID_HID;
    switch (c->kind) {
    case COL_I32:
        kind = on_disk ? H5T_STD_I32LE : H5T_NATIVE_INT32;
        break;
    case COL_I64:
        kind = on_disk ? H5T_STD_I64LE : H5T_NATIVE_INT64;
        break;
    case COL_U64:
        kind = on_disk ? H5T_STD_U64LE : H5T_NATIVE_UINT64;
        break;
    case COL_F32:
        kind = on_disk ? H5T_IEEE_F32LE : H5T_NATIVE_FLOAT;
        break;
    case COL_F64:
        kind = on_disk ? H5T_IEEE_F64LE : H5T_NATIVE_DOUBLE;
        break;
    case COL_TEXT:
        return text_type(type);
    case COL_CHARS:
        kind = H5T_C_S1;
        break;
    }
    TRY_H5_PLAIN(*type = H5Tcopy(kind), c->name);
    if (c->kind == COL_CHARS &&
        (H5Tset_size(*type, c->bytes) < 0 || H5Tset_strpad(*type, H5T_STR_NULLPAD) < 0)) {
        H5Tclose(*type);
        return h5_raise(__FILE__, __LINE__, __func__, c->name);
    }
    return ST_OK;
}

/* The compound of all columns: as the row struct has them, or without gaps on disk. */
static enum status row_type(hid_t *type, const struct h5_column *columns, int n_columns,
                            size_t row_bytes, bool on_disk)
{
    enum status st = ST_OK;
    hid_t column = H5I_INVALID_HID;
    size_t at = 0;
    TRY_H5_PLAIN(*type = H5Tcreate(H5T_COMPOUND, row_bytes), "table type");
    for (int i = 0; i < n_columns; i++) {
        TRY_GOTO(st, column_type(&column, &columns[i], on_disk), failed);
        TRY_H5(st, H5Tinsert(*type, columns[i].name, on_disk ? at : columns[i].offset, column),
               failed, columns[i].name);
        at += H5Tget_size(column);
        H5Tclose(column);
        column = H5I_INVALID_HID;
    }
    if (on_disk) {
        TRY_H5(st, H5Tset_size(*type, at), failed, "table type");
    }
    return ST_OK;
failed:
    H5Tclose(column);
    H5Tclose(*type);
    *type = H5I_INVALID_HID;
    return st;
}

static enum status describe_columns(hid_t set, const struct h5_column *columns, int n_columns)
{
    char text[512];
    for (int i = 0; i < n_columns; i++) {
        const struct h5_column *c = &columns[i];
        snprintf(text, sizeof text, "%s [%s]", c->about, c->unit);
        TRY(h5_attribute(set, c->name, text));
    }
    return ST_OK;
}

enum status h5_table_begin(struct h5_table *t, hid_t parent, const char *name, const char *about,
                           const struct h5_column *columns, int n_columns, size_t row_bytes,
                           uint64_t n_rows)
{
    *t = (struct h5_table){.name = name,
                           .set = H5I_INVALID_HID,
                           .memory = H5I_INVALID_HID,
                           .row_bytes = row_bytes,
                           .n_rows = n_rows};
    enum status st = ST_OK;
    hid_t disk = H5I_INVALID_HID;
    char units[2048] = "";
    for (int i = 0; i < n_columns; i++) {
        size_t used = strlen(units);
        snprintf(units + used, sizeof units - used, "%s%s: %s", i ? "\n" : "", columns[i].name,
                 columns[i].unit);
    }
    hsize_t dims = n_rows, chunk = CHUNK_BYTES / row_bytes;
    t->n_buffer = (size_t)(n_rows < chunk ? n_rows : chunk);
    TRY_GOTO(st, mem_alloc_array((void **)&t->rows, t->n_buffer, row_bytes), done);
    TRY_GOTO(st, row_type(&t->memory, columns, n_columns, row_bytes, false), done);
    TRY_GOTO(st, row_type(&disk, columns, n_columns, row_bytes, true), done);
    TRY_GOTO(st,
             create_set(&t->set, parent, name, disk, 1, &dims, n_rows > chunk ? &chunk : NULL,
                        units, about),
             done);
    TRY_GOTO(st, describe_columns(t->set, columns, n_columns), done);
done:
    H5Tclose(disk);
    if (st != ST_OK) {
        h5_table_close(t);
    }
    return st;
}

static enum status flush_rows(struct h5_table *t)
{
    if (t->n_buffered == 0) {
        return ST_OK;
    }
    enum status st = ST_OK;
    hid_t here = H5I_INVALID_HID, there = H5I_INVALID_HID;
    hsize_t first = t->n_written, n = t->n_buffered;
    TRY_H5(st, here = H5Screate_simple(1, &n, NULL), done, t->name);
    TRY_H5(st, there = H5Dget_space(t->set), done, t->name);
    TRY_H5(st, H5Sselect_hyperslab(there, H5S_SELECT_SET, &first, NULL, &n, NULL), done, t->name);
    TRY_H5(st, H5Dwrite(t->set, t->memory, here, there, H5P_DEFAULT, t->rows), done, t->name);
    t->n_written += t->n_buffered;
    t->n_buffered = 0;
done:
    H5Sclose(there);
    H5Sclose(here);
    return st;
}

enum status h5_table_put(struct h5_table *t, const void *row)
{
    INVARIANT(t->n_written + t->n_buffered < t->n_rows);
    memcpy(t->rows + t->n_buffered * t->row_bytes, row, t->row_bytes);
    t->n_buffered++;
    if (t->n_buffered == t->n_buffer) {
        TRY(flush_rows(t));
    }
    return ST_OK;
}

enum status h5_table_end(struct h5_table *t)
{
    TRY(flush_rows(t));
    INVARIANT(t->n_written == t->n_rows);
    return ST_OK;
}

void h5_table_close(struct h5_table *t)
{
    mem_free(t->rows);
    H5Tclose(t->memory);
    H5Dclose(t->set);
    t->rows = NULL;
    t->memory = t->set = H5I_INVALID_HID;
}

/* The type that a column has on disk is the one that we write. */
static enum status check_column(hid_t disk, const struct h5_column *c, const char *table)
{
    static const char *const kinds[] = {
        [COL_I32] = "32-bit integers", [COL_I64] = "64-bit integers",
        [COL_U64] = "64-bit counts",   [COL_F32] = "32-bit floats",
        [COL_F64] = "64-bit floats",   [COL_TEXT] = "texts of variable length",
        [COL_CHARS] = "texts",
    };
    int member = H5Tget_member_index(disk, c->name);
    if (member < 0) {
        H5Eclear2(H5E_DEFAULT);
        FAIL(ST_FORMAT, "/%s has no column %s; expected %s", table, c->name, kinds[c->kind]);
    }
    enum status st = ST_OK;
    hid_t found = H5I_INVALID_HID, expected = H5I_INVALID_HID;
    TRY_H5(st, found = H5Tget_member_type(disk, (unsigned)member), done, c->name);
    TRY_GOTO(st, column_type(&expected, c, true), done);
    if (c->kind == COL_TEXT ? H5Tis_variable_str(found) <= 0 : H5Tequal(found, expected) <= 0) {
        FAIL_GOTO(st, ST_FORMAT, done,
                  "column %s of /%s has another type than pmpd writes; expected %s", c->name, table,
                  kinds[c->kind]);
    }
done:
    H5Tclose(expected);
    H5Tclose(found);
    return st;
}

/* A few bytes of a file can claim any number of rows: a table that was never written, is filled
 * from another file, or whose pieces are missing. Memory is only taken for rows that are there. */
static enum status check_storage(hid_t set, uint64_t n, size_t row_bytes, const char *name)
{
    enum { DEFLATE_AT_MOST = 1100 }; // deflate makes nothing smaller than by 1032 (zlib's notes)
    enum status st = ST_OK;
    hid_t create = H5I_INVALID_HID;
    int n_external = 0;
    TRY_H5(st, create = H5Dget_create_plist(set), done, name);
    TRY_H5(st, n_external = H5Pget_external_count(create), done, name);
    hsize_t stored = H5Dget_storage_size(set);
    if (n_external > 0 || H5Pget_layout(create) == H5D_VIRTUAL ||
        stored < n * row_bytes / DEFLATE_AT_MOST || (n > 0 && stored == 0)) {
        FAIL_GOTO(st, ST_FORMAT, done,
                  "/%s claims %llu rows of %zu bytes, but the file holds %llu bytes of them: "
                  "damaged, or not written by pmpd",
                  name, (unsigned long long)n, row_bytes, (unsigned long long)stored);
    }
done:
    H5Pclose(create);
    return st;
}

enum status h5_rows_read(struct h5_rows *out, hid_t parent, const char *name,
                         const struct h5_column *columns, int n_columns, size_t row_bytes,
                         uint64_t most)
{
    *out = (struct h5_rows){.type = H5I_INVALID_HID, .space = H5I_INVALID_HID};
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID, disk = H5I_INVALID_HID;
    hsize_t n = 0;
    TRY_H5(st, set = H5Dopen2(parent, name, H5P_DEFAULT), done, name);
    TRY_H5(st, disk = H5Dget_type(set), done, name);
    TRY_H5(st, out->space = H5Dget_space(set), done, name);
    if (H5Tget_class(disk) != H5T_COMPOUND || H5Sget_simple_extent_ndims(out->space) != 1 ||
        H5Sget_simple_extent_dims(out->space, &n, NULL) != 1) {
        FAIL_GOTO(st, ST_FORMAT, done, "/%s is no table; expected rows of named columns", name);
    }
    if (n > most) {
        FAIL_GOTO(st, ST_FORMAT, done, "/%s has %llu rows; at most %llu are expected", name,
                  (unsigned long long)n, (unsigned long long)most);
    }
    for (int i = 0; i < n_columns; i++) {
        TRY_GOTO(st, check_column(disk, &columns[i], name), done);
    }
    TRY_GOTO(st, check_storage(set, n, H5Tget_size(disk), name), done);
    TRY_GOTO(st, row_type(&out->type, columns, n_columns, row_bytes, false), done);
    TRY_GOTO(st, mem_alloc_array(&out->rows, n, row_bytes), done);
    TRY_H5(st, H5Dread(set, out->type, H5S_ALL, H5S_ALL, H5P_DEFAULT, out->rows), done, name);
    out->n = n;
done:
    H5Tclose(disk);
    H5Dclose(set);
    if (st != ST_OK) {
        h5_rows_free(out);
    }
    return st;
}

void h5_rows_free(struct h5_rows *r)
{
    if (r->rows && r->n > 0) {
        H5Dvlen_reclaim(r->type, r->space, H5P_DEFAULT, r->rows);
    }
    mem_free(r->rows);
    H5Tclose(r->type);
    H5Sclose(r->space);
    *r = (struct h5_rows){.type = H5I_INVALID_HID, .space = H5I_INVALID_HID};
}

/* ---- arrays ---- */

enum status h5_array_create(hid_t *set, hid_t parent, const char *name, hid_t type, int rank,
                            const hsize_t *dims, const char *unit, const char *about)
{
    INVARIANT(rank >= 1 && rank <= RANK_MAX);
    hsize_t chunk[RANK_MAX];
    uint64_t row = H5Tget_size(type);
    for (int i = 1; i < rank; i++) {
        chunk[i] = dims[i];
        row *= dims[i];
    }
    chunk[0] = row && row < CHUNK_BYTES ? CHUNK_BYTES / row : 1;
    bool large = row > 0 && row <= UINT32_MAX / 2 && dims[0] > chunk[0];
    return create_set(set, parent, name, type, rank, dims, large ? chunk : NULL, unit, about);
}

enum status h5_array_write(hid_t set, hid_t type, hsize_t first, hsize_t n, const void *data)
{
    enum status st = ST_OK;
    hid_t here = H5I_INVALID_HID, there = H5I_INVALID_HID;
    hsize_t dims[RANK_MAX] = {0}, start[RANK_MAX] = {first, 0, 0};
    int rank = 0;
    TRY_H5(st, there = H5Dget_space(set), done, "array");
    TRY_H5(st, rank = H5Sget_simple_extent_dims(there, dims, NULL), done, "array");
    dims[0] = n;
    TRY_H5(st, H5Sselect_hyperslab(there, H5S_SELECT_SET, start, NULL, dims, NULL), done, "array");
    TRY_H5(st, here = H5Screate_simple(rank, dims, NULL), done, "array");
    TRY_H5(st, H5Dwrite(set, type, here, there, H5P_DEFAULT, data), done, "array");
done:
    H5Sclose(there);
    H5Sclose(here);
    return st;
}

enum status h5_array_read(void **data, hid_t parent, const char *name, hid_t type, int rank,
                          hsize_t *dims, uint64_t most)
{
    enum status st = ST_OK;
    hid_t set = H5I_INVALID_HID, disk = H5I_INVALID_HID, space = H5I_INVALID_HID;
    void *values = NULL;
    uint64_t n = 1;
    *data = NULL;
    INVARIANT(rank >= 1 && rank <= RANK_MAX);
    TRY_H5(st, set = H5Dopen2(parent, name, H5P_DEFAULT), done, name);
    TRY_H5(st, disk = H5Dget_type(set), done, name);
    TRY_H5(st, space = H5Dget_space(set), done, name);
    if (H5Tget_class(disk) != H5Tget_class(type) || H5Sget_simple_extent_ndims(space) != rank ||
        H5Sget_simple_extent_dims(space, dims, NULL) != rank) {
        FAIL_GOTO(st, ST_FORMAT, done, "/%s is no array of %s with %d dimensions", name,
                  H5Tget_class(type) == H5T_FLOAT ? "floats" : "integers", rank);
    }
    for (int i = 0; i < rank; i++) {
        if (dims[i] > 0 && n > most / dims[i]) {
            FAIL_GOTO(st, ST_FORMAT, done, "/%s has more than the %llu elements that are expected",
                      name, (unsigned long long)most);
        }
        n *= dims[i];
    }
    TRY_GOTO(st, check_storage(set, n, H5Tget_size(disk), name), done);
    TRY_GOTO(st, mem_alloc_array(&values, n, H5Tget_size(type)), done);
    TRY_H5(st, H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values), done, name);
    *data = values;
    values = NULL;
done:
    mem_free(values);
    H5Sclose(space);
    H5Tclose(disk);
    H5Dclose(set);
    return st;
}
