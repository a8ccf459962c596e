/* SPDX-License-Identifier: Apache-2.0 */
#include "core/prompts.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/json.h"
#include "core/mem.h"

enum {
    MAX_LINE = 64 * 1024 * 1024, /* bytes */
    CHUNK = 64 * 1024,
    N_SPLITS = 8, /* of which a message speaks */
    WHERE_TEXT = 512
};

/* A file, one line at a time; every byte that is read is digested. */
struct line_reader {
    FILE *file;
    const char *path; /* borrowed */
    XXH3_state_t *digest;
    char *chunk; /* (CHUNK) */
    size_t n_chunk, at;
    char *line; /* the current line without its end */
    size_t n_line, capacity;
    long number; /* 1 for the first line */
};

/* What splits the file has, for the message that none of them was asked for. */
struct split_count {
    char *name; /* owned */
    long n;
};

struct reading {
    struct prompts *out;
    size_t capacity;
    long *line; /* (capacity) of each prompt */
    struct split_count split[N_SPLITS];
    int n_splits;
    bool more_splits;
};

static enum status fill_chunk(struct line_reader *r)
{
    r->at = 0;
    r->n_chunk = fread(r->chunk, 1, CHUNK, r->file);
    if (ferror(r->file)) {
        FAIL(ST_IO, "%s: reading failed: %s", r->path, strerror(errno));
    }
    if (r->n_chunk > 0) {
        XXH3_128bits_update(r->digest, r->chunk, r->n_chunk);
    }
    return ST_OK;
}

static enum status append_to_line(struct line_reader *r, size_t bytes)
{
    if (r->n_line + bytes > MAX_LINE) {
        FAIL(ST_FORMAT,
             "%s:%ld: the line has more than %d bytes; one JSON object per line is "
             "expected",
             r->path, r->number, MAX_LINE);
    }
    if (r->n_line + bytes > r->capacity) {
        size_t more = 2 * (r->n_line + bytes);
        TRY(mem_grow_array((void **)&r->line, r->n_line, more, 1));
        r->capacity = more;
    }
    if (bytes > 0) {
        memcpy(r->line + r->n_line, r->chunk + r->at, bytes);
        r->n_line += bytes;
    }
    return ST_OK;
}

/* *more is false when the file is at its end. The last line may lack its newline. */
static enum status next_line(struct line_reader *r, bool *more)
{
    bool any = false, ended = false;
    r->n_line = 0;
    r->number++;
    while (!ended) {
        if (r->at == r->n_chunk) {
            TRY(fill_chunk(r));
            if (r->n_chunk == 0) {
                break;
            }
        }
        any = true;
        const char *newline = memchr(r->chunk + r->at, '\n', r->n_chunk - r->at);
        size_t bytes = newline ? (size_t)(newline - r->chunk) - r->at : r->n_chunk - r->at;
        TRY(append_to_line(r, bytes));
        r->at += bytes + (newline ? 1 : 0);
        ended = newline != NULL;
    }
    if (r->n_line > 0 && r->line[r->n_line - 1] == '\r') {
        r->n_line--;
    }
    if (r->number == 1 && r->n_line >= 3 && memcmp(r->line, "\xEF\xBB\xBF", 3) == 0) {
        memset(r->line, ' ', 3); // a byte order mark says nothing in UTF-8
    }
    *more = any;
    return ST_OK;
}

static bool is_blank(const struct line_reader *r)
{
    for (size_t i = 0; i < r->n_line; i++) {
        if (r->line[i] != ' ' && r->line[i] != '\t') {
            return false;
        }
    }
    return true;
}

static enum status copy_text(char **out, const json_t *object, const char *key, const char *where)
{
    const char *text = NULL;
    TRY(json_get_string_or(&text, object, key, "", where));
    TRY(mem_strdup(out, text));
    return ST_OK;
}

/* A string or a number; the line's number where the file has none. */
static enum status read_id(struct prompt *p, const json_t *object, long line, const char *where)
{
    const json_t *id = json_member(object, "id");
    char text[32];
    if (json_is_string(id) && json_string_length(id) > 0) {
        TRY(mem_strdup(&p->id, json_string_value(id)));
        return ST_OK;
    }
    if (!id) {
        snprintf(text, sizeof text, "%ld", line);
    } else if (json_is_integer(id)) {
        snprintf(text, sizeof text, "%" JSON_INTEGER_FORMAT, json_integer_value(id));
    } else if (json_is_real(id)) {
        snprintf(text, sizeof text, "%.17g", json_real_value(id));
    } else {
        FAIL(ST_FORMAT, "%s: \"id\" is neither a number nor a string with something in it", where);
    }
    TRY(mem_strdup(&p->id, text));
    return ST_OK;
}

static enum status read_turns(struct prompt *p, const json_t *object, const char *where)
{
    const json_t *turns = json_member(object, "turns");
    size_t n = json_array_size(turns);
    if (!json_is_array(turns) || n == 0) {
        FAIL(ST_FORMAT, "%s: \"turns\" is not a list with at least one text", where);
    }
    if (n > PROMPT_MAX_TURNS) {
        FAIL(ST_USER, "%s: %zu turns, at most %d are possible", where, n, PROMPT_MAX_TURNS);
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *turn = json_array_get(turns, i);
        if (!json_is_string(turn)) {
            FAIL(ST_FORMAT, "%s: turn %zu is not a string", where, i);
        }
        TRY(mem_strdup(&p->turns[i], json_string_value(turn)));
        p->n_turns++;
    }
    return ST_OK;
}

static enum status read_prompt(struct prompt *p, const json_t *object, long line, const char *where)
{
    const char *template = NULL;
    TRY(read_id(p, object, line, where));
    TRY(copy_text(&p->task, object, "task", where));
    TRY(copy_text(&p->split, object, "split", where));
    TRY(copy_text(&p->reference, object, "reference", where));
    TRY(json_get_string_or(&template, object, "template", "none", where));
    if (strcmp(template, "none") != 0) {
        FAIL(ST_USER,
             "%s: template \"%.60s\" is not known; known: \"none\" (put the text as the "
             "model expects it into \"turns\")",
             where, template);
    }
    TRY(read_turns(p, object, where));
    return ST_OK;
}

static void free_prompt(struct prompt *p)
{
    for (int i = 0; i < PROMPT_MAX_TURNS; i++) {
        mem_free(p->turns[i]);
        mem_free(p->ids[i]);
    }
    mem_free(p->id);
    mem_free(p->task);
    mem_free(p->split);
    mem_free(p->reference);
    *p = (struct prompt){0};
}

static enum status count_split(struct reading *r, const char *name)
{
    for (int i = 0; i < r->n_splits; i++) {
        if (strcmp(r->split[i].name, name) == 0) {
            r->split[i].n++;
            return ST_OK;
        }
    }
    if (r->n_splits == N_SPLITS) {
        r->more_splits = true;
        return ST_OK;
    }
    TRY(mem_strdup(&r->split[r->n_splits].name, name));
    r->split[r->n_splits++].n = 1;
    return ST_OK;
}

/* Takes over what p owns. */
static enum status keep_prompt(struct reading *r, struct prompt *p, long line)
{
    size_t n = (size_t)r->out->n;
    if (n == r->capacity) {
        size_t more = n ? 2 * n : 64;
        if (more > INT32_MAX) {
            FAIL(ST_USER, "more than %zu prompts in one file", n);
        }
        TRY(mem_grow_array((void **)&r->out->prompt, n, more, sizeof *r->out->prompt));
        TRY(mem_grow_array((void **)&r->line, n, more, sizeof *r->line));
        r->capacity = more;
    }
    r->out->prompt[n] = *p;
    r->line[n] = line;
    r->out->n++;
    *p = (struct prompt){0};
    return ST_OK;
}

static enum status read_line(struct reading *r, const struct line_reader *lines, const char *split,
                             int32_t limit)
{
    enum status st = ST_OK;
    struct prompt p = {0};
    json_t *object = NULL;
    char where[WHERE_TEXT];
    snprintf(where, sizeof where, "%s:%ld", lines->path, lines->number);
    TRY(json_read_text(&object, lines->line, lines->n_line, where));
    TRY_GOTO(st, read_prompt(&p, object, lines->number, where), done);
    TRY_GOTO(st, count_split(r, p.split), done);
    bool wanted = split[0] == '\0' || strcmp(split, p.split) == 0;
    if (wanted && (limit <= 0 || r->out->n < limit)) {
        TRY_GOTO(st, keep_prompt(r, &p, lines->number), done);
    }
done:
    free_prompt(&p);
    json_release(&object);
    return st;
}

struct id_place {
    const char *id;
    long line;
};

static int compare_ids(const void *a, const void *b)
{
    const struct id_place *x = a, *y = b;
    int order = strcmp(x->id, y->id);
    return order ? order : x->line < y->line ? -1 : x->line > y->line;
}

static enum status check_ids_differ(const struct reading *r, const char *path)
{
    enum status st = ST_OK;
    struct id_place *place = NULL;
    int32_t n = r->out->n;
    TRY(MEM_NEW(&place, n));
    for (int32_t i = 0; i < n; i++) {
        place[i] = (struct id_place){r->out->prompt[i].id, r->line[i]};
    }
    qsort(place, (size_t)n, sizeof *place, compare_ids);
    for (int32_t i = 1; i < n && st == ST_OK; i++) {
        if (strcmp(place[i - 1].id, place[i].id) == 0) {
            st = status_raise(ST_USER, __FILE__, __LINE__, __func__,
                              "%s:%ld: the id \"%.60s\" is that of line %ld already; give every "
                              "prompt its own",
                              path, place[i].line, place[i].id, place[i - 1].line);
        }
    }
    mem_free(place);
    return st;
}

static enum status fail_without_prompts(const struct reading *r, const char *path,
                                        const char *split)
{
    char list[640] = "";
    size_t n = 0;
    if (r->n_splits == 0) {
        FAIL(ST_USER, "%s has no prompts; one JSON object with \"turns\" per line is expected",
             path);
    }
    for (int i = 0; i < r->n_splits && n < sizeof list; i++) {
        const char *name = r->split[i].name;
        n += (size_t)snprintf(list + n, sizeof list - n, "%s%.40s (%ld)", i ? ", " : "",
                              name[0] ? name : "lines without a split", r->split[i].n);
    }
    FAIL(ST_USER, "%s has no prompt of split \"%.60s\"; it has: %s%s", path, split, list,
         r->more_splits ? ", ..." : "");
}

static void print_digest(char out[DIGEST_TEXT], XXH128_hash_t hash)
{
    snprintf(out, DIGEST_TEXT, "%016" PRIx64 "%016" PRIx64, (uint64_t)hash.high64,
             (uint64_t)hash.low64);
}

static enum status read_all(struct reading *r, struct line_reader *lines, const char *split,
                            int32_t limit)
{
    bool more = true;
    TRY(mem_alloc_array((void **)&lines->chunk, CHUNK, 1));
    lines->digest = XXH3_createState();
    if (!lines->digest) {
        FAIL(ST_NOMEM, "out of memory for the digest of %s", lines->path);
    }
    XXH3_128bits_reset(lines->digest);
    TRY(next_line(lines, &more));
    while (more) {
        if (!is_blank(lines)) {
            TRY(read_line(r, lines, split, limit));
        }
        TRY(next_line(lines, &more));
    }
    print_digest(r->out->digest, XXH3_128bits_digest(lines->digest));
    if (r->out->n == 0) {
        TRY(fail_without_prompts(r, lines->path, split));
    }
    TRY(check_ids_differ(r, lines->path));
    return ST_OK;
}

enum status prompts_read(struct prompts *out, const char *path, const char *split, int32_t limit)
{
    struct reading r = {.out = out};
    struct line_reader lines = {.path = path};
    *out = (struct prompts){0};
    lines.file = fopen(path, "rb");
    if (!lines.file) {
        FAIL(ST_IO, "the prompt file %s cannot be opened: %s", path, strerror(errno));
    }
    enum status st = read_all(&r, &lines, split, limit);
    fclose(lines.file);
    XXH3_freeState(lines.digest);
    mem_free(lines.chunk);
    mem_free(lines.line);
    mem_free(r.line);
    for (int i = 0; i < r.n_splits; i++) {
        mem_free(r.split[i].name);
    }
    if (st != ST_OK) {
        prompts_free(out);
    }
    TRY(st);
    return ST_OK;
}

static enum status encode_prompt(struct prompt *p, const struct tokenizer *tok, int32_t context,
                                 int32_t n_new)
{
    int64_t n_text = 0, n_answers = (int64_t)p->n_turns * n_new;
    for (int32_t t = 0; t < p->n_turns; t++) {
        size_t bytes = strlen(p->turns[t]);
        mem_free(p->ids[t]);
        p->ids[t] = NULL;
        p->n_ids[t] = 0;
        enum status st =
            tokenizer_encode(tok, p->turns[t], bytes, t == 0, &p->ids[t], &p->n_ids[t]);
        if (st != ST_OK) {
            status_prefix(st, "prompt \"%.60s\", turn %d: ", p->id, t);
        }
        TRY(st);
        if (bytes == 0 || p->n_ids[t] == 0) {
            FAIL(ST_USER, "prompt \"%.60s\": turn %d is empty; give it a text or take the line out",
                 p->id, t);
        }
        n_text += p->n_ids[t];
    }
    if (n_text + n_answers > context) {
        FAIL(ST_USER,
             "prompt \"%.60s\": %" PRId64 " tokens of text and %" PRId64 " new ones (%d for each "
             "of %d turns) exceed the context of %d; shorten the text or lower max_new_tokens",
             p->id, n_text, n_answers, n_new, p->n_turns, context);
    }
    return ST_OK;
}

enum status prompts_encode(struct prompts *p, const struct tokenizer *tok, int32_t context,
                           int32_t n_new)
{
    for (int32_t i = 0; i < p->n; i++) {
        TRY(encode_prompt(&p->prompt[i], tok, context, n_new));
    }
    return ST_OK;
}

void prompts_free(struct prompts *p)
{
    if (!p) {
        return;
    }
    for (int32_t i = 0; i < p->n; i++) {
        free_prompt(&p->prompt[i]);
    }
    mem_free(p->prompt);
    *p = (struct prompts){0};
}
