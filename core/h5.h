/* What our HDF5 files are made of: compound tables with a unit and a meaning for every column,
 * arrays, scalars and text attributes. HDF5's own error printing is off; its messages become ours.
 * Knows nothing of what the tables mean. For core and sched: experiments write no HDF5 by hand.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_H5_H
#define PMPD_CORE_H5_H

#include <hdf5.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

/* Turns HDF5's printing off; call it before the first other HDF5 call. */
void h5_quiet(void);
/* ST_HDF5 with `what` and the outermost and innermost message of HDF5's error stack. */
enum status h5_raise(const char *file, int line, const char *func, const char *what);
/* Ids and results below zero are failures. */
#define TRY_H5(st, call, label, what)                              \
    do {                                                           \
        if ((call) < 0) {                                          \
            (st) = h5_raise(__FILE__, __LINE__, __func__, (what)); \
            goto label;                                            \
        }                                                          \
    } while (0)
/* TRY_H5 where nothing is owned yet. */
#define TRY_H5_PLAIN(call, what)                                   \
    do {                                                           \
        if ((call) < 0) {                                          \
            return h5_raise(__FILE__, __LINE__, __func__, (what)); \
        }                                                          \
    } while (0)

/* A new file in memory, to become the file at `path`. It is no file on disk until h5_save:
 * HDF5 1.10 whose last write fails (disk full) keeps the file half open and crashes when the
 * program ends. Closing it with H5Fclose closes everything in it. */
MUST_CHECK enum status h5_create(hid_t *file, const char *path);
/* Writes what the open file holds to path, whole or not at all. Errors: ST_HDF5, ST_IO, ST_NOMEM.
 */
MUST_CHECK enum status h5_save(hid_t file, const char *path);
/* Opens for reading, without the lock that some parallel file systems do not have. */
MUST_CHECK enum status h5_open(hid_t *file, const char *path);
/* Text from an attribute or dataset that is a scalar of variable-length strings; *text NULL when it
 * is something else. The caller owns *text (mem_free). */
MUST_CHECK enum status h5_read_text(char **text, hid_t object, bool is_attribute, const char *what);
/* The same of an attribute by name; *text NULL also when there is none. */
MUST_CHECK enum status h5_read_attribute(char **text, hid_t object, const char *name);
/* The same into a buffer. Errors: ST_FORMAT (none, no text, or too long), ST_HDF5. */
MUST_CHECK enum status h5_copy_attribute(char *out, size_t bytes, hid_t object, const char *name);
/* The root attribute "format" of a file, what of it fits; "" without one. Errors: ST_HDF5 (no HDF5
 * file). */
MUST_CHECK enum status h5_format(char *format, size_t bytes, const char *path);
/* A group with a description. */
MUST_CHECK enum status h5_group(hid_t *group, hid_t parent, const char *name, const char *about);
/* A text attribute: UTF-8, variable length, what h5py gives back as str. */
MUST_CHECK enum status h5_attribute(hid_t object, const char *name, const char *text);
/* Scalar datasets with description and unit. */
MUST_CHECK enum status h5_scalar_f64(hid_t parent, const char *name, double value, const char *unit,
                                     const char *about);
MUST_CHECK enum status h5_scalar_i64(hid_t parent, const char *name, int64_t value,
                                     const char *unit, const char *about);
MUST_CHECK enum status h5_scalar_text(hid_t parent, const char *name, const char *text,
                                      const char *about);

/* Memory types of columns; TEXT is a const char * (borrowed until the row is flushed), CHARS a char
 * array of `bytes` without terminator. */
enum h5_kind { COL_I32, COL_I64, COL_U64, COL_F32, COL_F64, COL_TEXT, COL_CHARS };
struct h5_column {
    const char *name;
    enum h5_kind kind;
    size_t offset, bytes; /* in the row; bytes: of CHARS */
    const char *unit;     /* "1": a count, an id or another pure number */
    const char *about;
};

/* A table that is written row by row, its length known before. Attributes: description; unit: one
 * "column: unit" per line; and one attribute per column with its meaning. */
struct h5_table {
    const char *name;
    hid_t set, memory;
    unsigned char *rows; /* owned: (n_buffer) rows */
    size_t row_bytes, n_buffer, n_buffered;
    uint64_t n_rows, n_written;
};
MUST_CHECK enum status h5_table_begin(struct h5_table *t, hid_t parent, const char *name,
                                      const char *about, const struct h5_column *columns,
                                      int n_columns, size_t row_bytes, uint64_t n_rows);
MUST_CHECK enum status h5_table_put(struct h5_table *t, const void *row);
/* Writes what is buffered; exactly n_rows rows have been put. */
MUST_CHECK enum status h5_table_end(struct h5_table *t);
/* Gives everything back; also after a failure. */
void h5_table_close(struct h5_table *t);

/* A table read whole. The file is not believed: it must be one-dimensional, with these columns in
 * exactly the types that h5_table_begin writes (others may be there too), have at most `most` rows,
 * and hold its data itself. Texts belong to out; an empty one is NULL. Errors: ST_FORMAT, ST_HDF5,
 * ST_NOMEM. */
struct h5_rows {
    void *rows; /* owned: (n) structs of row_bytes */
    uint64_t n;
    hid_t type, space; /* of the rows */
};
MUST_CHECK enum status h5_rows_read(struct h5_rows *out, hid_t parent, const char *name,
                                    const struct h5_column *columns, int n_columns,
                                    size_t row_bytes, uint64_t most);
void h5_rows_free(struct h5_rows *rows);

/* An array of rank 1 to 3 whose rows (first dimension) are written piece by piece. type: a native
 * type. The caller closes *set. */
MUST_CHECK enum status h5_array_create(hid_t *set, hid_t parent, const char *name, hid_t type,
                                       int rank, const hsize_t *dims, const char *unit,
                                       const char *about);
MUST_CHECK enum status h5_array_write(hid_t set, hid_t type, hsize_t first, hsize_t n,
                                      const void *data);
/* An array read whole as `type`, a native type; dims (rank, 1 to 3) come back. The file is not
 * believed: the array must have this rank and class of numbers, at most `most` elements, and hold
 * its data itself. The caller owns *data (mem_free). Errors: ST_FORMAT, ST_HDF5, ST_NOMEM. */
MUST_CHECK enum status h5_array_read(void **data, hid_t parent, const char *name, hid_t type,
                                     int rank, hsize_t *dims, uint64_t most);

#endif
