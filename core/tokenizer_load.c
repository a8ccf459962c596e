/* tokenizer.json to struct tokenizer: vocabulary, merges, added tokens. Ids and texts are checked
 * here once, so that encoding and decoding index without a further look.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/tokenizer_internal.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/mem.h"
#include "core/tokenizer_spm.h"
#include "core/unicode.h"

enum { FILE_BYTES = 256 * 1024 * 1024, MAX_MERGES = 1 << 24 };

#define CHECK_KEYS(object, what, path, ...) \
    TRY(tokenizer_check_keys((object), (const char *const[]){__VA_ARGS__, NULL}, (what), (path)))

int32_t vocab_find(const struct tokenizer *tok, const char *text, size_t bytes)
{
    size_t at = (size_t)XXH3_64bits(text, bytes) & tok->table_mask;
    for (; tok->table[at] >= 0; at = (at + 1) & tok->table_mask) {
        const struct piece *p = &tok->piece[tok->table[at]];
        if (p->bytes == bytes && memcmp(tok->text + p->offset, text, bytes) == 0) {
            return tok->table[at];
        }
    }
    return -1;
}

static size_t merge_place(const struct tokenizer *tok, int32_t left, int32_t right)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t at = (size_t)XXH3_64bits(&key, sizeof key) & tok->merge_mask;
    while (tok->merge[at].left >= 0 &&
           (tok->merge[at].left != left || tok->merge[at].right != right)) {
        at = (at + 1) & tok->merge_mask;
    }
    return at;
}

const struct merge *merge_find(const struct tokenizer *tok, int32_t left, int32_t right)
{
    const struct merge *m = &tok->merge[merge_place(tok, left, right)];
    return m->left >= 0 ? m : NULL;
}

void tokenizer_index_merge(struct tokenizer *tok, struct merge m)
{
    tok->merge[merge_place(tok, m.left, m.right)] = m; // of two equal pairs the later one counts
}

/* A power of two that is at least twice n, less one. */
static size_t mask_for(size_t n)
{
    size_t size = 16;
    while (size < 2 * n) {
        size *= 2;
    }
    return size - 1;
}

int16_t tokenizer_byte_piece(const char *text, size_t bytes)
{
    if (bytes != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') {
        return -1;
    }
    int value = 0;
    for (int i = 3; i < 5; i++) {
        char c = text[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                           : -1;
        if (digit < 0) {
            return -1;
        }
        value = value * 16 + digit;
    }
    return (int16_t)value;
}

static enum status set_piece(struct tokenizer *tok, struct byte_buffer *all, int32_t id,
                             const char *text, uint8_t flags)
{
    size_t bytes = strlen(text);
    struct piece *p = &tok->piece[id];
    *p = (struct piece){.offset = (uint32_t)all->n,
                        .bytes = (uint16_t)bytes,
                        .flags = flags,
                        .byte = tokenizer_byte_piece(text, bytes)};
    TRY(byte_buffer_add(all, text, bytes)); // the file's size bounds the sum well below 4 GiB
    return ST_OK;
}

static enum status check_piece_text(const char *text, const char *path)
{
    if (text[0] == '\0' || strlen(text) > TOKENIZER_MAX_PIECE) {
        FAIL(ST_FORMAT, "%s: token \"%.40s\" has %zu bytes, expected 1 to %d", path, text,
             strlen(text), TOKENIZER_MAX_PIECE);
    }
    return ST_OK;
}

static enum status check_id(const json_t *id, const char *text, int32_t limit, bool of_model,
                            const char *path)
{
    if (!json_is_integer(id)) {
        FAIL(ST_FORMAT, "%s: token \"%.40s\" has no whole number as its id", path, text);
    }
    json_int_t value = json_integer_value(id);
    if (value < 0 || value >= limit) {
        FAIL(ST_FORMAT, "%s: token \"%.40s\" has id %lld, expected 0 to %d%s", path, text,
             (long long)value, limit - 1,
             of_model ? " (vocab_size of the model's config.json); do tokenizer and model belong "
                        "together?"
                      : "");
    }
    return ST_OK;
}

/* Checks every id of the vocabulary and of added_tokens, and allocates pieces up to the largest. */
static enum status measure(struct tokenizer *tok, json_t *vocab, const json_t *added,
                           int32_t n_vocab_model, const char *path)
{
    int32_t limit = n_vocab_model > 0 && n_vocab_model < TOKENIZER_MAX_VOCAB ? n_vocab_model
                                                                             : TOKENIZER_MAX_VOCAB;
    json_int_t largest = -1;
    void *at = json_object_iter(vocab);
    for (; at; at = json_object_iter_next(vocab, at)) {
        const json_t *id = json_object_iter_value(at);
        TRY(check_piece_text(json_object_iter_key(at), path));
        TRY(check_id(id, json_object_iter_key(at), limit, n_vocab_model > 0, path));
        largest = json_integer_value(id) > largest ? json_integer_value(id) : largest;
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *one = json_array_get(added, i);
        const char *text = NULL;
        if (!json_is_object(one)) {
            FAIL(ST_FORMAT, "%s: added_tokens[%zu] is not an object", path, i);
        }
        CHECK_KEYS(one, "a member of added_tokens", path, "id", "content", "single_word", "lstrip",
                   "rstrip", "normalized", "special");
        TRY(json_get_string(&text, one, "content", path));
        TRY(check_piece_text(text, path));
        TRY(check_id(json_member(one, "id"), text, limit, n_vocab_model > 0, path));
        json_int_t id = json_integer_value(json_member(one, "id"));
        largest = id > largest ? id : largest;
    }
    if (largest < 0) {
        FAIL(ST_FORMAT, "%s: the vocabulary is empty", path);
    }
    tok->n_vocab = (int32_t)largest + 1;
    TRY(MEM_NEW(&tok->piece, tok->n_vocab));
    return ST_OK;
}

static enum status load_vocab(struct tokenizer *tok, json_t *vocab, struct byte_buffer *all,
                              const char *path)
{
    tok->table_mask = mask_for(json_object_size(vocab));
    TRY(MEM_NEW(&tok->table, tok->table_mask + 1));
    for (size_t i = 0; i <= tok->table_mask; i++) {
        tok->table[i] = -1;
    }
    void *at = json_object_iter(vocab);
    for (; at; at = json_object_iter_next(vocab, at)) {
        const char *text = json_object_iter_key(at);
        int32_t id = (int32_t)json_integer_value(json_object_iter_value(at));
        if (tok->piece[id].flags) {
            FAIL(ST_FORMAT, "%s: two tokens have the id %d, one is \"%.40s\"", path, id, text);
        }
        TRY(set_piece(tok, all, id, text, PIECE_MODEL));
        size_t place = (size_t)XXH3_64bits(text, strlen(text)) & tok->table_mask;
        while (tok->table[place] >= 0) {
            place = (place + 1) & tok->table_mask;
        }
        tok->table[place] = id;
    }
    tok->text = all->data;
    return ST_OK;
}

/* The two halves of a merge: "a b", or ["a", "b"]. */
static enum status split_merge(const json_t *item, size_t i, const char *half[2], size_t bytes[2],
                               const char *path)
{
    if (json_is_string(item)) {
        const char *text = json_string_value(item), *gap = strchr(text, ' ');
        if (gap && gap > text && gap[1] && !strchr(gap + 1, ' ')) {
            half[0] = text;
            bytes[0] = (size_t)(gap - text);
            half[1] = gap + 1;
            bytes[1] = strlen(gap + 1);
            return ST_OK;
        }
    } else if (json_is_array(item) && json_array_size(item) == 2 &&
               json_is_string(json_array_get(item, 0)) && json_is_string(json_array_get(item, 1))) {
        for (size_t k = 0; k < 2; k++) {
            half[k] = json_string_value(json_array_get(item, k));
            bytes[k] = strlen(half[k]);
        }
        return ST_OK;
    }
    FAIL(ST_FORMAT, "%s: merge %zu is neither \"a b\" nor [\"a\", \"b\"]", path, i);
}

static enum status load_merges(struct tokenizer *tok, const json_t *merges, const char *path)
{
    size_t n = json_array_size(merges);
    if (!json_is_array(merges) || n > MAX_MERGES) {
        FAIL(ST_FORMAT, "%s: model.merges is not a list of at most %d", path, MAX_MERGES);
    }
    tok->merge_mask = mask_for(n);
    TRY(MEM_NEW(&tok->merge, tok->merge_mask + 1));
    for (size_t i = 0; i <= tok->merge_mask; i++) {
        tok->merge[i].left = -1;
    }
    for (size_t i = 0; i < n; i++) {
        const char *half[2] = {NULL, NULL};
        size_t bytes[2] = {0, 0};
        char both[TOKENIZER_MAX_PIECE];
        TRY(split_merge(json_array_get(merges, i), i, half, bytes, path));
        struct merge m = {.rank = (int32_t)i, .made = -1};
        m.left = vocab_find(tok, half[0], bytes[0]);
        m.right = vocab_find(tok, half[1], bytes[1]);
        if (m.left >= 0 && m.right >= 0 && bytes[0] + bytes[1] <= sizeof both) {
            memcpy(both, half[0], bytes[0]);
            memcpy(both + bytes[0], half[1], bytes[1]);
            m.made = vocab_find(tok, both, bytes[0] + bytes[1]);
        }
        if (m.made < 0) {
            FAIL(ST_FORMAT,
                 "%s: merge %zu (\"%.*s\", \"%.*s\") names or makes a piece that the vocabulary "
                 "does not have",
                 path, i, (int)(bytes[0] < 40 ? bytes[0] : 40), half[0],
                 (int)(bytes[1] < 40 ? bytes[1] : 40), half[1]);
        }
        tokenizer_index_merge(tok, m);
    }
    return ST_OK;
}

/* Text and flags of the added tokens; their pieces' places are known, so decoding is complete. */
static enum status load_added_pieces(struct tokenizer *tok, const json_t *added,
                                     struct byte_buffer *all, const char *path)
{
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *one = json_array_get(added, i);
        const char *text = NULL;
        bool special = false;
        int32_t id = (int32_t)json_integer_value(json_member(one, "id"));
        struct piece *p = &tok->piece[id];
        TRY(json_get_string(&text, one, "content", path));
        TRY(json_get_bool_or(&special, one, "special", false, path));
        int32_t known = vocab_find(tok, text, strlen(text));
        if ((p->flags && known != id) || (known >= 0 && known != id) || p->flags & PIECE_ADDED) {
            FAIL(ST_FORMAT,
                 "%s: added token \"%.40s\" has id %d, which is not its own in the "
                 "vocabulary or is taken",
                 path, text, id);
        }
        uint8_t flags = (uint8_t)(p->flags | PIECE_ADDED | (special ? PIECE_SPECIAL : 0));
        if (p->flags) {
            p->flags = flags;
        } else {
            TRY(set_piece(tok, all, id, text, flags));
            tok->text = all->data;
        }
    }
    return ST_OK;
}

static int compare_added(const void *a, const void *b)
{
    const struct added_token *x = a, *y = b;
    size_t n = x->bytes < y->bytes ? x->bytes : y->bytes;
    int order = memcmp(x->text, y->text, n);
    return order ? order : x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* A token that is looked for in its normalised form is shown in that form too, so that the decoder
 * undoes what the normaliser did. (Not one that the BPE vocabulary has as well.) */
static enum status show_normalised(struct tokenizer *tok, struct byte_buffer *all,
                                   const struct added_token *t, const char *path)
{
    struct piece *p = &tok->piece[t->id];
    if (t->bytes == 0 || t->bytes > TOKENIZER_MAX_PIECE) {
        FAIL(ST_FORMAT,
             "%s: the added token of id %d has %zu bytes once it is normalised, "
             "expected 1 to %d",
             path, t->id, t->bytes, TOKENIZER_MAX_PIECE);
    }
    if (!(p->flags & PIECE_MODEL)) {
        p->offset = (uint32_t)all->n;
        p->bytes = (uint16_t)t->bytes;
        TRY(byte_buffer_add(all, t->text, t->bytes));
        tok->text = all->data;
    }
    return ST_OK;
}

static enum status add_to_set(struct tokenizer *tok, const json_t *one, struct byte_buffer *all,
                              const char *path)
{
    const char *text = NULL;
    bool single_word = false, normalized = false, special = false;
    struct added_token t = {.id = (int32_t)json_integer_value(json_member(one, "id"))};
    struct byte_buffer form = {0};
    TRY(json_get_string(&text, one, "content", path));
    TRY(json_get_bool_or(&special, one, "special", false, path));
    TRY(json_get_bool_or(&normalized, one, "normalized", !special, path));
    TRY(json_get_bool_or(&single_word, one, "single_word", false, path));
    TRY(json_get_bool_or(&t.lstrip, one, "lstrip", false, path));
    TRY(json_get_bool_or(&t.rstrip, one, "rstrip", false, path));
    if (single_word) {
        FAIL(ST_UNSUPPORTED, "%s: added token \"%.40s\": single_word is not supported", path, text);
    }
    struct added_set *set = &tok->added[normalized ? 1 : 0];
    if (normalized) {
        TRY(tokenizer_normalise(tok, text, strlen(text), &form));
        t.text = form.data;
        t.bytes = form.n;
    } else {
        TRY(mem_strdup(&t.text, text));
        t.bytes = strlen(text);
    }
    set->token[set->n++] = t; // owned by the set from here on
    if (normalized) {
        TRY(show_normalised(tok, all, &t, path));
    }
    set->starts[(unsigned char)t.text[0]] = true;
    return ST_OK;
}

static enum status load_added_sets(struct tokenizer *tok, const json_t *added,
                                   struct byte_buffer *all, const char *path)
{
    size_t n = json_array_size(added);
    for (int k = 0; k < 2; k++) {
        TRY(MEM_NEW(&tok->added[k].token, n));
    }
    for (size_t i = 0; i < n; i++) {
        TRY(add_to_set(tok, json_array_get(added, i), all, path));
    }
    for (int k = 0; k < 2; k++) {
        struct added_set *set = &tok->added[k];
        if (set->n > 0) {
            qsort(set->token, (size_t)set->n, sizeof *set->token, compare_added);
        }
        for (int32_t i = 1; i < set->n; i++) {
            if (compare_added(&set->token[i - 1], &set->token[i]) == 0) {
                FAIL(ST_FORMAT, "%s: two added tokens read \"%.*s\"", path,
                     (int)(set->token[i].bytes < 40 ? set->token[i].bytes : 40),
                     set->token[i].text);
            }
        }
    }
    return ST_OK;
}

/* The switches of the model, and the pieces that stand for single bytes. */
static enum status load_model_switches(struct tokenizer *tok, const json_t *model, const char *path)
{
    const char *unk = NULL;
    TRY(json_get_bool_or(&tok->fuse_unk, model, "fuse_unk", false, path));
    TRY(json_get_bool_or(&tok->byte_fallback, model, "byte_fallback", false, path));
    TRY(json_get_bool_or(&tok->ignore_merges, model, "ignore_merges", false, path));
    TRY(json_get_string_or(&unk, model, "unk_token", NULL, path));
    tok->unk = unk ? vocab_find(tok, unk, strlen(unk)) : -1;
    if (unk && tok->unk < 0) {
        FAIL(ST_FORMAT, "%s: unk_token \"%.40s\" is not in the vocabulary", path, unk);
    }
    if (tok->byte_level && tok->byte_fallback) {
        FAIL(ST_UNSUPPORTED, "%s: byte_fallback together with ByteLevel is not supported", path);
    }
    for (int b = 0; b < 256; b++) {
        char text[8];
        int bytes = tok->byte_level ? utf8_write(text, byte_to_letter(b))
                                    : snprintf(text, sizeof text, "<0x%02X>", (unsigned)b);
        tok->byte_id[b] = vocab_find(tok, text, (size_t)bytes);
    }
    return ST_OK;
}

static enum status check_model(const json_t *root, const char *path)
{
    const json_t *model = json_member(root, "model");
    const char *type = NULL, *affix = NULL;
    double dropout = 0;
    CHECK_KEYS(root, "the file", path, "version", "truncation", "padding", "added_tokens",
               "normalizer", "pre_tokenizer", "post_processor", "decoder", "model");
    if (!json_is_object(model)) {
        FAIL(ST_FORMAT, "%s: has no object \"model\"; is it a tokenizer of Hugging Face?", path);
    }
    TRY(json_get_string_or(&type, model, "type", "?", path));
    if (strcmp(type, "BPE") != 0) {
        FAIL(ST_UNSUPPORTED, "%s: model type %.40s is not supported, only BPE", path, type);
    }
    CHECK_KEYS(model, "the model", path, "type", "dropout", "unk_token",
               "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
               "ignore_merges", "vocab", "merges");
    TRY(json_get_f64_or(&dropout, model, "dropout", 0, path));
    if (dropout > 0 || dropout < 0) {
        FAIL(ST_UNSUPPORTED, "%s: dropout %g is not supported (the ids would be random)", path,
             dropout);
    }
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (int i = 0; i < 2; i++) {
        TRY(json_get_string_or(&affix, model, affixes[i], "", path));
        if (affix[0]) {
            FAIL(ST_UNSUPPORTED, "%s: %s \"%.40s\" is not supported", path, affixes[i], affix);
        }
    }
    if (!json_is_object(json_member(model, "vocab"))) {
        FAIL(ST_FORMAT, "%s: model.vocab is not an object", path);
    }
    if (json_member(root, "added_tokens") && !json_is_array(json_member(root, "added_tokens"))) {
        FAIL(ST_FORMAT, "%s: added_tokens is not a list", path);
    }
    return ST_OK;
}

static enum status load(struct tokenizer *tok, const json_t *root, const char *path,
                        const char *folder, int32_t n_vocab_model)
{
    enum status st = ST_OK;
    struct byte_buffer all = {0};
    TRY(check_model(root, path));
    const json_t *model = json_member(root, "model"), *added = json_member(root, "added_tokens");
    json_t *vocab = (json_t *)json_member(model, "vocab"); // jansson's iterators take no const
    TRY(measure(tok, vocab, added, n_vocab_model, path));
    TRY_GOTO(st, load_vocab(tok, vocab, &all, path), done);
    TRY_GOTO(st, load_added_pieces(tok, added, &all, path), done);
    TRY_GOTO(st, load_merges(tok, json_member(model, "merges"), path), done);
    TRY_GOTO(st, tokenizer_load_parts(tok, root, path, folder), done);
    TRY_GOTO(st, load_model_switches(tok, model, path), done);
    TRY_GOTO(st, load_added_sets(tok, added, &all, path), done);
done:
    tok->text = all.data; // also on failure: tokenizer_close gives it back
    return st;
}

enum status tokenizer_open(struct tokenizer **out, const char *folder, int32_t n_vocab_model)
{
    enum status st = ST_OK;
    struct tokenizer *tok = NULL;
    json_t *root = NULL;
    char path[4096], other[4096];
    *out = NULL;
    int n = snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    int m = snprintf(other, sizeof other, "%s/tokenizer.model", folder);
    if (n < 0 || m < 0 || (size_t)n >= sizeof path || (size_t)m >= sizeof other) {
        FAIL(ST_USER, "the name of the model folder is too long (%zu bytes)", strlen(folder));
    }
    bool has_json = access(path, F_OK) == 0;
    if (!has_json && access(other, F_OK) != 0) {
        FAIL(ST_IO,
             "%s has no tokenizer.json and no tokenizer.model; put the one that belongs to the "
             "model there",
             folder);
    }
    TRY(MEM_NEW(&tok, 1));
    if (has_json) {
        TRY_GOTO(st, json_read_file(&root, path, FILE_BYTES), done);
        TRY_GOTO(st, load(tok, root, path, folder, n_vocab_model), done);
    } else {
        TRY_GOTO(st, tokenizer_load_spm(tok, folder, other, n_vocab_model), done);
    }
    *out = tok;
    tok = NULL;
done:
    json_release(&root);
    tokenizer_close(&tok);
    return st;
}

void tokenizer_close(struct tokenizer **tok)
{
    if (!tok || !*tok) {
        return;
    }
    struct tokenizer *t = *tok;
    for (int k = 0; k < 2; k++) {
        for (int32_t i = 0; i < t->added[k].n; i++) {
            mem_free(t->added[k].token[i].text);
        }
        mem_free(t->added[k].token);
    }
    for (int i = 0; i < TOKENIZER_MAX_SPLITS; i++) {
        regex_free(&t->split[i]);
    }
    spm_close(t->spm);
    mem_free(t->piece);
    mem_free(t->text);
    mem_free(t->table);
    mem_free(t->merge);
    mem_free(t);
    *tok = NULL;
}
