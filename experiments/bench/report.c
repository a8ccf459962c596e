/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/bench/report.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

enum { CELL_BYTES = 64 };

enum status report_add(json_t *root, const char *key, json_t *row)
{
    json_t *rows = json_object_get(root, key);
    if (!rows && json_object_set_new(root, key, json_array()) == 0) {
        rows = json_object_get(root, key);
    }
    if (json_array_append_new(rows, row) != 0) {
        FAIL(ST_NOMEM, "no memory for a row of results (or a number among them is not finite)");
    }
    return ST_OK;
}

static void write_cell(char cell[CELL_BYTES], const json_t *value, int decimals)
{
    if (json_is_string(value)) {
        snprintf(cell, CELL_BYTES, "%s", json_string_value(value));
    } else if (json_is_integer(value)) {
        snprintf(cell, CELL_BYTES, "%lld", (long long)json_integer_value(value));
    } else if (json_is_real(value)) {
        snprintf(cell, CELL_BYTES, "%.*f", decimals, json_real_value(value));
    } else {
        snprintf(cell, CELL_BYTES, "-");
    }
}

void report_table(const json_t *root, const char *key, const struct column *columns)
{
    const json_t *rows = json_object_get(root, key), *row;
    size_t at;
    char cell[CELL_BYTES];
    for (long line = -1; rows && line < (long)json_array_size(rows); line++) {
        for (const struct column *c = columns; c->key; c++) {
            int width = (int)strlen(c->title);
            bool text = false;
            json_array_foreach((json_t *)rows, at, row)
            {
                const json_t *value = json_object_get(row, c->key);
                write_cell(cell, value, c->decimals);
                width = (int)strlen(cell) > width ? (int)strlen(cell) : width;
                text = text || json_is_string(value);
            }
            if (line >= 0) {
                row = json_array_get(rows, (size_t)line);
                write_cell(cell, json_object_get(row, c->key), c->decimals);
            }
            printf("%s%*s", c == columns ? "" : "  ", text ? -width : width,
                   line < 0 ? c->title : cell);
        }
        printf("\n");
    }
}
