/* SPDX-License-Identifier: Apache-2.0 */
#include "core/level.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"

void level_table_init(struct level_table *t, const struct model_config *config, uint32_t held,
                      uint32_t head_held, int dense_bits, int head_dense_bits)
{
    *t = (struct level_table){.config = config,
                              .held = held,
                              .head_held = head_held,
                              .dense_bits = dense_bits,
                              .head_dense_bits = head_dense_bits};
}

void level_table_release(struct level_table *t)
{
    for (int i = 0; i < t->n; i++) {
        mem_free(t->level[i].bits);
    }
    t->n = 0;
}

static int highest_bit(uint32_t mask)
{
    return mask ? 31 - __builtin_clz(mask) : 0;
}

/* "2, 3, 4" */
static const char *list_bits(uint32_t mask, char *text, size_t bytes)
{
    size_t used = 0;
    text[0] = '\0';
    for (int b = 1; b <= BITS_MAX; b++) {
        if (mask >> b & 1 && used < bytes) {
            int n = snprintf(text + used, bytes - used, "%s%d", used ? ", " : "", b);
            used += n > 0 ? (size_t)n : 0;
        }
    }
    return text;
}

/* One number of bits, "max" included, that the mask holds. */
static enum status parse_bits(int *bits, const char *word, uint32_t held, const char *level,
                              const char *what)
{
    char list[64];
    if (strcmp(word, "max") == 0) {
        *bits = highest_bit(held);
        return ST_OK;
    }
    char *end = NULL;
    long b = strtol(word, &end, 10);
    if (end == word || *end != '\0') {
        FAIL(ST_USER, "level \"%s\": expected a number of bits or \"max\", found \"%s\"", level,
             word);
    }
    if (held == 0) {
        FAIL(ST_USER,
             "level \"%s\": the %s of this model are not nested, so they have one precision "
             "only; use the level \"max\", or quantise the model first (pmpd quantize)",
             level, what);
    }
    if (b < 1 || b > BITS_MAX || !(held >> b & 1)) {
        FAIL(ST_USER, "level \"%s\": the %s of this model do not hold %ld bits; they hold %s",
             level, what, b, list_bits(held, list, sizeof list));
    }
    *bits = (int)b;
    return ST_OK;
}

/* "3", "0-5" or "*" -> a range of layers. */
static enum status parse_layers(int *first, int *last, const char *word, int n_layers,
                                const char *level)
{
    *first = 0;
    *last = n_layers - 1;
    if (strcmp(word, "*") == 0) {
        return ST_OK;
    }
    char *end = NULL;
    long a = strtol(word, &end, 10), b = a;
    bool good = end != word && isdigit((unsigned char)word[0]);
    if (good && *end == '-') {
        const char *second = end + 1;
        b = strtol(second, &end, 10);
        good = end != second;
    }
    if (!good || *end != '\0' || a < 0 || b < a || b >= n_layers) {
        FAIL(ST_USER,
             "level \"%s\": expected layers as \"*\", \"3\" or \"0-5\" within 0-%d, found \"%s\"",
             level, n_layers - 1, word);
    }
    *first = (int)a;
    *last = (int)b;
    return ST_OK;
}

static enum status parse_role(int *first, int *last, const char *word, enum model_family family,
                              const char *level)
{
    if (strcmp(word, "*") == 0) {
        *first = 0;
        *last = M_N_ROLES - 1;
        return ST_OK;
    }
    char list[128] = "";
    for (int r = 0; r < M_N_ROLES; r++) {
        const char *name = model_role_name(family, (enum matrix_role)r);
        if (name && strcmp(word, name) == 0) {
            *first = *last = r;
            return ST_OK;
        }
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s%s", name ? name : "", name ? ", " : "");
    }
    FAIL(ST_USER, "level \"%s\": unknown matrix \"%s\"; expected %s* or head", level, word, list);
}

/* One "LAYERS.MATRIX=BITS" or "head=BITS". */
static enum status apply_part(const struct level_table *t, struct level *l, char *part)
{
    char *equals = strchr(part, '=');
    if (!equals) {
        FAIL(ST_USER, "level \"%s\": expected LAYERS.MATRIX=BITS or head=BITS, found \"%s\"",
             l->text, part);
    }
    *equals = '\0';
    int bits = 0;
    if (strcmp(part, "head") == 0) {
        TRY(parse_bits(&bits, equals + 1, t->head_held, l->text, "head's weights"));
        l->head_bits = (uint8_t)bits;
        return ST_OK;
    }
    char *dot = strchr(part, '.');
    if (!dot) {
        FAIL(ST_USER, "level \"%s\": expected LAYERS.MATRIX before \"=\", found \"%s\"", l->text,
             part);
    }
    *dot = '\0';
    int layer0 = 0, layer1 = 0, role0 = 0, role1 = 0;
    TRY(parse_layers(&layer0, &layer1, part, t->config->n_layers, l->text));
    TRY(parse_role(&role0, &role1, dot + 1, t->config->family, l->text));
    TRY(parse_bits(&bits, equals + 1, t->held, l->text, "layers"));
    for (int i = layer0; i <= layer1; i++) {
        for (int r = role0; r <= role1; r++) {
            l->bits[i * M_N_ROLES + r] = (uint8_t)bits;
        }
    }
    return ST_OK;
}

static void fill_averages(const struct level_table *t, struct level *l)
{
    double bits = 0, weights = 0;
    int max = 0;
    for (int r = 0; r < M_N_ROLES; r++) {
        int32_t n_rows, n_cols;
        if (!model_has_role(t->config, (enum matrix_role)r)) {
            continue;
        }
        model_matrix_shape(t->config, (enum matrix_role)r, &n_rows, &n_cols);
        for (int i = 0; i < t->config->n_layers; i++) {
            int b = t->held ? l->bits[i * M_N_ROLES + r] : t->dense_bits;
            double n = (double)n_rows * (double)n_cols;
            bits += n * b;
            weights += n;
            max = b > max ? b : max;
        }
    }
    l->avg_bits = (float)(bits / weights);
    l->max_bits = (uint8_t)max;
    l->head_avg_bits = (float)(l->head_bits ? l->head_bits : t->head_dense_bits);
}

static enum status fill_level(const struct level_table *t, struct level *l)
{
    char copy[LEVEL_TEXT_BYTES], *rest = copy;
    memcpy(copy, l->text, sizeof copy);
    char *word = strsep(&rest, ",");
    int bits = 0;
    TRY(parse_bits(&bits, word, t->held, l->text, "layers"));
    memset(l->bits, bits, (size_t)t->config->n_layers * M_N_ROLES);
    /* the head follows the level where it can, else it stays at its best */
    l->head_bits = (uint8_t)(t->head_held >> bits & 1 && bits ? bits : highest_bit(t->head_held));
    while (rest) {
        TRY(apply_part(t, l, strsep(&rest, ",")));
    }
    fill_averages(t, l);
    return ST_OK;
}

enum status level_table_add(struct level_table *t, const char *text, int32_t *id)
{
    struct level l = {0};
    size_t used = 0;
    for (const char *c = text; *c; c++) { /* blanks mean nothing inside a level */
        if (!isspace((unsigned char)*c)) {
            if (used + 1 >= sizeof l.text) {
                FAIL(ST_USER, "a level is at most %d characters long, found \"%.40s...\"",
                     LEVEL_TEXT_BYTES - 1, text);
            }
            l.text[used++] = *c;
        }
    }
    if (used == 0) {
        FAIL(ST_USER, "an empty level; expected e.g. \"4\", \"max\" or \"3,0-1.down_proj=4\"");
    }
    for (int i = 0; i < t->n; i++) {
        if (strcmp(t->level[i].text, l.text) == 0) {
            *id = i;
            return ST_OK;
        }
    }
    if (t->n == LEVEL_TABLE_MAX) {
        FAIL(ST_USER, "a run has at most %d different levels", LEVEL_TABLE_MAX);
    }
    TRY(mem_alloc_array((void **)&l.bits, (size_t)t->config->n_layers * M_N_ROLES, 1));
    enum status st;
    TRY_GOTO(st, fill_level(t, &l), fail);
    *id = t->n;
    t->level[t->n++] = l;
    return ST_OK;
fail:
    mem_free(l.bits);
    return st;
}
