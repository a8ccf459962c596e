/* The normaliser, pre-tokeniser, post-processor and decoder of a tokenizer.json. Every member and
 * every type that is not known here is refused by name.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/tokenizer_internal.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { CONFIG_BYTES = 16 * 1024 * 1024 };

enum status tokenizer_check_keys(const json_t *object, const char *const *allowed, const char *what,
                                 const char *path)
{
    if (!json_is_object(object)) {
        FAIL(ST_FORMAT, "%s: %s is not an object", path, what);
    }
    void *at = json_object_iter((json_t *)object);
    for (; at; at = json_object_iter_next((json_t *)object, at)) {
        const char *key = json_object_iter_key(at);
        bool known = false;
        for (int i = 0; allowed[i] && !known; i++) {
            known = strcmp(key, allowed[i]) == 0;
        }
        if (!known) {
            FAIL(ST_UNSUPPORTED, "%s: %s has the member \"%.60s\", which is not supported", path,
                 what, key);
        }
    }
    return ST_OK;
}

#define CHECK_KEYS(object, what, path, ...) \
    TRY(tokenizer_check_keys((object), (const char *const[]){__VA_ARGS__, NULL}, (what), (path)))

static enum status part_type(const char **type, const json_t *part, const char *what,
                             const char *path)
{
    if (!json_is_object(part)) {
        FAIL(ST_FORMAT, "%s: a %s is not an object", path, what);
    }
    TRY(json_get_string(type, part, "type", path));
    return ST_OK;
}

/* The parts of a Sequence, or the part itself: *n of them. */
static enum status part_list(const json_t *part, const char *list, const json_t **items, size_t *n,
                             const char *what, const char *path)
{
    const char *type = NULL;
    *items = NULL;
    *n = 1;
    TRY(part_type(&type, part, what, path));
    if (strcmp(type, "Sequence") == 0) {
        CHECK_KEYS(part, what, path, "type", list);
        *items = json_member(part, list);
        if (!json_is_array(*items)) {
            FAIL(ST_FORMAT, "%s: the %s is a Sequence without a list \"%s\"", path, what, list);
        }
        *n = json_array_size(*items);
    }
    return ST_OK;
}

static enum status copy_short(char out[TOKENIZER_MAX_REPLACEMENT + 1], const json_t *part,
                              const char *key, const char *what, const char *path)
{
    const char *text = NULL;
    TRY(json_get_string(&text, part, key, path));
    if (strlen(text) > TOKENIZER_MAX_REPLACEMENT) {
        FAIL(ST_UNSUPPORTED, "%s: \"%s\" of %s has %zu bytes, at most %d are supported", path, key,
             what, strlen(text), TOKENIZER_MAX_REPLACEMENT);
    }
    memcpy(out, text, strlen(text) + 1);
    return ST_OK;
}

/* {"type": "Replace", "pattern": {"String": from}, "content": to} */
static enum status read_replace(const json_t *part, struct norm_step *step, const char *what,
                                const char *path)
{
    CHECK_KEYS(part, what, path, "type", "pattern", "content");
    const json_t *pattern = json_member(part, "pattern");
    if (!json_is_object(pattern) || !json_member(pattern, "String")) {
        FAIL(ST_UNSUPPORTED, "%s: %s Replace: only a pattern {\"String\": ...} is supported", path,
             what);
    }
    step->kind = NORM_REPLACE;
    TRY(copy_short(step->from, pattern, "String", what, path));
    TRY(copy_short(step->to, part, "content", what, path));
    if (step->from[0] == '\0') {
        FAIL(ST_FORMAT, "%s: %s Replace: the pattern is empty", path, what);
    }
    return ST_OK;
}

static enum status load_normalizer(struct tokenizer *tok, const json_t *root, const char *path)
{
    const json_t *part = json_member(root, "normalizer"), *items = NULL;
    size_t n = 0, growth = 1;
    if (!part) {
        return ST_OK;
    }
    TRY(part_list(part, "normalizers", &items, &n, "normalizer", path));
    for (size_t i = 0; i < n; i++) {
        const json_t *one = items ? json_array_get(items, i) : part;
        const char *type = NULL;
        TRY(part_type(&type, one, "normalizer", path));
        if (tok->n_norms == TOKENIZER_MAX_NORMS) {
            FAIL(ST_UNSUPPORTED, "%s: more than %d normalizers", path, TOKENIZER_MAX_NORMS);
        }
        struct norm_step *step = &tok->norm[tok->n_norms++];
        if (strcmp(type, "Prepend") == 0) {
            CHECK_KEYS(one, "normalizer Prepend", path, "type", "prepend");
            step->kind = NORM_PREPEND;
            TRY(copy_short(step->to, one, "prepend", "normalizer Prepend", path));
        } else if (strcmp(type, "Replace") == 0) {
            TRY(read_replace(one, step, "normalizer", path));
        } else if (strcmp(type, "NFC") == 0) {
            CHECK_KEYS(one, "normalizer NFC", path, "type");
            step->kind = NORM_NFC;
        } else {
            FAIL(ST_UNSUPPORTED,
                 "%s: normalizer %.60s is not supported; known: Prepend, Replace (of a string), "
                 "NFC, and a Sequence of them",
                 path, type);
        }
        // each step of eight may write sixteen bytes for one
        if (step->kind == NORM_REPLACE && strlen(step->to) > strlen(step->from)) {
            growth *= (strlen(step->to) + strlen(step->from) - 1) / strlen(step->from);
        }
        if (growth > TOKENIZER_MAX_GROWTH) {
            FAIL(ST_UNSUPPORTED,
                 "%s: the normalizers make a text up to %zu times as long, more "
                 "than %d",
                 path, growth, TOKENIZER_MAX_GROWTH);
        }
    }
    return ST_OK;
}

/* Metaspace's prepend_scheme, or add_prefix_space of older files. */
static enum status read_prefix(enum prefix_when *when, const json_t *part, const char *path)
{
    const char *scheme = NULL;
    bool add = true;
    TRY(json_get_string_or(&scheme, part, "prepend_scheme", "always", path));
    TRY(json_get_bool_or(&add, part, "add_prefix_space", true, path));
    if (strcmp(scheme, "always") == 0) {
        *when = PREFIX_ALWAYS;
    } else if (strcmp(scheme, "first") == 0) {
        *when = PREFIX_FIRST;
    } else if (strcmp(scheme, "never") == 0) {
        *when = PREFIX_NEVER;
    } else {
        FAIL(ST_UNSUPPORTED, "%s: Metaspace prepend_scheme \"%.40s\"; known: always, first, never",
             path, scheme);
    }
    if (!add) {
        *when = PREFIX_NEVER;
    }
    return ST_OK;
}

static enum status read_metaspace(const json_t *part, enum prefix_when *when, bool *split,
                                  const char *what, const char *path)
{
    const char *replacement = NULL, *legacy = NULL;
    CHECK_KEYS(part, what, path, "type", "replacement", "prepend_scheme", "add_prefix_space",
               "split", "str_rep");
    TRY(json_get_string_or(&replacement, part, "replacement", METASPACE, path));
    TRY(json_get_string_or(&legacy, part, "str_rep", METASPACE, path));
    if (strcmp(replacement, METASPACE) != 0 || strcmp(legacy, METASPACE) != 0) {
        FAIL(ST_UNSUPPORTED, "%s: %s replacement \"%.16s\"; only U+2581 is supported", path, what,
             replacement);
    }
    TRY(read_prefix(when, part, path));
    TRY(json_get_bool_or(split, part, "split", true, path));
    return ST_OK;
}

static enum status add_split(struct tokenizer *tok, const char *pattern, const char *path)
{
    if (tok->n_splits == TOKENIZER_MAX_SPLITS) {
        FAIL(ST_UNSUPPORTED, "%s: more than %d split patterns", path, TOKENIZER_MAX_SPLITS);
    }
    TRY(regex_compile(&tok->split[tok->n_splits], pattern, path));
    tok->n_splits++;
    return ST_OK;
}

static enum status load_byte_level(struct tokenizer *tok, const json_t *part, const char *path)
{
    bool prefix = false, use_regex = true, trim = true;
    CHECK_KEYS(part, "pre_tokenizer ByteLevel", path, "type", "add_prefix_space", "trim_offsets",
               "use_regex");
    TRY(json_get_bool_or(&prefix, part, "add_prefix_space", true, path));
    TRY(json_get_bool_or(&use_regex, part, "use_regex", true, path));
    TRY(json_get_bool_or(&trim, part, "trim_offsets", true, path));
    if (prefix && tok->n_splits > 0) {
        FAIL(ST_UNSUPPORTED, "%s: ByteLevel add_prefix_space behind a Split is not supported",
             path);
    }
    tok->byte_level = true;
    tok->prefix = prefix ? PREFIX_ALWAYS : PREFIX_NEVER;
    if (use_regex) {
        // Source: the pattern of GPT-2 (Radford et al. 2019); files of this format mean it by
        // use_regex and do not spell it out
        TRY(add_split(tok,
                      "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"
                      "|\\s+(?!\\S)|\\s+",
                      path));
    }
    return ST_OK;
}

static enum status load_split(struct tokenizer *tok, const json_t *part, const char *path)
{
    const char *behavior = NULL, *text = NULL;
    bool invert = false;
    CHECK_KEYS(part, "pre_tokenizer Split", path, "type", "pattern", "behavior", "invert");
    TRY(json_get_string(&behavior, part, "behavior", path));
    TRY(json_get_bool_or(&invert, part, "invert", false, path));
    if (strcmp(behavior, "Isolated") != 0) {
        FAIL(ST_UNSUPPORTED,
             "%s: pre_tokenizer Split behavior \"%.40s\"; only Isolated is "
             "supported",
             path, behavior);
    }
    const json_t *pattern = json_member(part, "pattern");
    if (invert || !json_is_object(pattern) || !json_member(pattern, "Regex")) {
        FAIL(ST_UNSUPPORTED,
             "%s: pre_tokenizer Split: only a pattern {\"Regex\": ...} that is not "
             "inverted is supported",
             path);
    }
    TRY(json_get_string(&text, pattern, "Regex", path));
    TRY(add_split(tok, text, path));
    return ST_OK;
}

static enum status load_pre_tokenizer(struct tokenizer *tok, const json_t *root, const char *path)
{
    const json_t *part = json_member(root, "pre_tokenizer"), *items = NULL;
    size_t n = 0;
    if (!part) {
        return ST_OK;
    }
    TRY(part_list(part, "pretokenizers", &items, &n, "pre_tokenizer", path));
    for (size_t i = 0; i < n; i++) {
        const json_t *one = items ? json_array_get(items, i) : part;
        const char *type = NULL;
        TRY(part_type(&type, one, "pre_tokenizer", path));
        if (tok->byte_level || tok->spaces_to_metaspace) {
            FAIL(ST_UNSUPPORTED,
                 "%s: pre_tokenizer %.60s behind ByteLevel or Metaspace is not "
                 "supported",
                 path, type);
        }
        if (strcmp(type, "ByteLevel") == 0) {
            TRY(load_byte_level(tok, one, path));
        } else if (strcmp(type, "Split") == 0) {
            TRY(load_split(tok, one, path));
        } else if (strcmp(type, "Metaspace") == 0 && tok->n_splits == 0) {
            TRY(read_metaspace(one, &tok->prefix, &tok->cut_at_metaspace, "pre_tokenizer Metaspace",
                               path));
            tok->spaces_to_metaspace = true;
        } else {
            FAIL(ST_UNSUPPORTED,
                 "%s: pre_tokenizer %.60s is not supported here; known: ByteLevel, Metaspace, and "
                 "a Sequence of Split and ByteLevel",
                 path, type);
        }
    }
    if (tok->n_splits > 0 && !tok->byte_level) {
        FAIL(ST_UNSUPPORTED, "%s: pre_tokenizer Split without ByteLevel is not supported", path);
    }
    return ST_OK;
}

static enum status add_first_id(struct tokenizer *tok, int32_t id, const char *path)
{
    if (tok->n_first_ids == TOKENIZER_MAX_PREFIX) {
        FAIL(ST_UNSUPPORTED, "%s: the post_processor puts more than %d tokens first", path,
             TOKENIZER_MAX_PREFIX);
    }
    tok->first_ids[tok->n_first_ids++] = id;
    return ST_OK;
}

static enum status add_template_special(struct tokenizer *tok, const json_t *special,
                                        const json_t *table, const char *path)
{
    const char *name = NULL;
    TRY(json_get_string(&name, special, "id", path));
    const json_t *entry = table ? json_member(table, name) : NULL;
    const json_t *ids = json_is_object(entry) ? json_member(entry, "ids") : NULL;
    if (!json_is_array(ids) || json_array_size(ids) == 0) {
        FAIL(ST_FORMAT,
             "%s: TemplateProcessing names \"%.60s\", which its special_tokens do not "
             "describe",
             path, name);
    }
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < 0 || value >= tok->n_vocab || !tok->piece[value].flags) {
            FAIL(ST_FORMAT, "%s: TemplateProcessing: \"%.60s\" has an id that no token has", path,
                 name);
        }
        TRY(add_first_id(tok, (int32_t)value, path));
    }
    return ST_OK;
}

static enum status load_template(struct tokenizer *tok, const json_t *part, const char *path)
{
    bool seen_text = false;
    CHECK_KEYS(part, "post_processor TemplateProcessing", path, "type", "single", "pair",
               "special_tokens");
    const json_t *single = json_member(part, "single");
    const json_t *table = json_member(part, "special_tokens");
    if (!json_is_array(single) || (table && !json_is_object(table))) {
        FAIL(ST_FORMAT,
             "%s: TemplateProcessing has no list \"single\", or special_tokens that are "
             "no object",
             path);
    }
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *item = json_array_get(single, i);
        const json_t *special = json_is_object(item) ? json_member(item, "SpecialToken") : NULL;
        const json_t *sequence = json_is_object(item) ? json_member(item, "Sequence") : NULL;
        if (json_is_object(sequence) && !seen_text) {
            seen_text = true;
        } else if (json_is_object(special) && !seen_text) {
            TRY(add_template_special(tok, special, table, path));
        } else if (json_is_object(special)) {
            const char *name = NULL;
            TRY(json_get_string(&name, special, "id", path));
            FAIL(ST_UNSUPPORTED,
                 "%s: TemplateProcessing puts \"%.60s\" behind the text, which is "
                 "not supported (a decoder goes on from there); take it out of \"single\"",
                 path, name);
        } else {
            FAIL(ST_FORMAT,
                 "%s: TemplateProcessing: item %zu of \"single\" is neither the one "
                 "Sequence nor a SpecialToken",
                 path, i);
        }
    }
    if (!seen_text) {
        FAIL(ST_FORMAT, "%s: TemplateProcessing \"single\" has no Sequence", path);
    }
    return ST_OK;
}

/* tokenizer_config.json is asked for the BOS only where tokenizer.json leaves the question open. */
static enum status load_config_bos(struct tokenizer *tok, const char *folder)
{
    enum status st = ST_OK;
    json_t *root = NULL;
    bool add = false;
    char path[4096];
    int n = snprintf(path, sizeof path, "%s/tokenizer_config.json", folder);
    if (n < 0 || (size_t)n >= sizeof path || access(path, F_OK) != 0) {
        return ST_OK;
    }
    TRY(json_read_file(&root, path, CONFIG_BYTES));
    TRY_GOTO(st, json_get_bool_or(&add, root, "add_bos_token", false, path), done);
    if (add) {
        const json_t *bos = json_member(root, "bos_token");
        const char *text = NULL;
        // a string, or an object that describes the token
        TRY_GOTO(st,
                 json_get_string(&text, json_is_object(bos) ? bos : root,
                                 json_is_object(bos) ? "content" : "bos_token", path),
                 done);
        int32_t id = -1;
        size_t bytes = strlen(text);
        for (int32_t i = 0; i < tok->n_vocab && id < 0; i++) {
            const struct piece *p = &tok->piece[i];
            if (p->flags && p->bytes == bytes && memcmp(tok->text + p->offset, text, bytes) == 0) {
                id = i;
            }
        }
        if (id < 0) {
            FAIL_GOTO(st, ST_FORMAT, done, "%s: bos_token \"%.60s\" is no token of tokenizer.json",
                      path, text);
        }
        TRY_GOTO(st, add_first_id(tok, id, path), done);
    }
done:
    json_release(&root);
    return st;
}

static enum status load_post_processor(struct tokenizer *tok, const json_t *root, const char *path,
                                       const char *folder)
{
    const json_t *part = json_member(root, "post_processor"), *items = NULL;
    size_t n = 0;
    bool seen_template = false;
    if (!part) {
        TRY(load_config_bos(tok, folder));
        return ST_OK;
    }
    TRY(part_list(part, "processors", &items, &n, "post_processor", path));
    for (size_t i = 0; i < n; i++) {
        const json_t *one = items ? json_array_get(items, i) : part;
        const char *type = NULL;
        TRY(part_type(&type, one, "post_processor", path));
        if (strcmp(type, "TemplateProcessing") == 0 && !seen_template) {
            TRY(load_template(tok, one, path));
            seen_template = true;
        } else if (strcmp(type, "ByteLevel") != 0) { // moves offsets only, which nobody asks for
            FAIL(ST_UNSUPPORTED,
                 "%s: post_processor %.60s is not supported here; known: TemplateProcessing (once) "
                 "and ByteLevel",
                 path, type);
        }
    }
    return ST_OK;
}

static enum status load_decoder_step(struct tokenizer *tok, const json_t *one, const char *type,
                                     bool *fused, const char *path)
{
    struct norm_step step = {0};
    if (strcmp(type, "Replace") == 0) {
        TRY(read_replace(one, &step, "decoder", path));
        if (strcmp(step.from, METASPACE) != 0 || strcmp(step.to, " ") != 0) {
            FAIL(ST_UNSUPPORTED, "%s: decoder Replace other than U+2581 by a space", path);
        }
        tok->metaspace_to_space = true;
    } else if (strcmp(type, "ByteFallback") == 0) {
        tok->bytes_decoded = true;
    } else if (strcmp(type, "Fuse") == 0) {
        *fused = true;
    } else if (strcmp(type, "Strip") == 0) {
        int32_t start = 0, stop = 0;
        CHECK_KEYS(one, "decoder Strip", path, "type", "content", "start", "stop");
        TRY(copy_short(step.from, one, "content", "decoder Strip", path));
        TRY(json_get_i32(&start, one, "start", 0, INT32_MAX, path));
        TRY(json_get_i32(&stop, one, "stop", 0, INT32_MAX, path));
        if (strcmp(step.from, " ") != 0 || start > 1 || stop != 0 || !*fused) {
            FAIL(ST_UNSUPPORTED,
                 "%s: decoder Strip is supported only behind Fuse, for one space "
                 "at the start",
                 path);
        }
        tok->strip = start ? STRIP_ONE_SPACE : tok->strip;
    } else if (strcmp(type, "Metaspace") == 0) {
        enum prefix_when when = PREFIX_NEVER;
        bool split = true;
        TRY(read_metaspace(one, &when, &split, "decoder Metaspace", path));
        tok->metaspace_to_space = true;
        tok->strip = when == PREFIX_NEVER ? STRIP_NOTHING : STRIP_FIRST_PIECE;
    } else {
        FAIL(ST_UNSUPPORTED,
             "%s: decoder %.60s is not supported here; known: ByteLevel, or Replace, ByteFallback, "
             "Fuse, Strip, Metaspace",
             path, type);
    }
    return ST_OK;
}

static enum status load_decoder(struct tokenizer *tok, const json_t *root, const char *path)
{
    const json_t *part = json_member(root, "decoder"), *items = NULL;
    size_t n = 0, n_byte_level = 0;
    bool fused = false;
    if (!part) {
        FAIL(ST_UNSUPPORTED, "%s: no decoder; expected ByteLevel, Metaspace or a Sequence", path);
    }
    TRY(part_list(part, "decoders", &items, &n, "decoder", path));
    for (size_t i = 0; i < n; i++) {
        const json_t *one = items ? json_array_get(items, i) : part;
        const char *type = NULL;
        TRY(part_type(&type, one, "decoder", path));
        if (strcmp(type, "ByteLevel") == 0) {
            n_byte_level++;
        } else {
            TRY(load_decoder_step(tok, one, type, &fused, path));
        }
    }
    if (n_byte_level != (tok->byte_level ? 1 : 0) || (tok->byte_level && n != 1)) {
        FAIL(ST_UNSUPPORTED,
             "%s: the pre_tokenizer is %s, but the decoder is %s; one must undo the other", path,
             tok->byte_level ? "ByteLevel" : "not ByteLevel",
             tok->byte_level ? "not ByteLevel alone" : "ByteLevel");
    }
    return ST_OK;
}

enum status tokenizer_load_parts(struct tokenizer *tok, const json_t *root, const char *path,
                                 const char *folder)
{
    TRY(load_normalizer(tok, root, path));
    TRY(load_pre_tokenizer(tok, root, path));
    TRY(load_post_processor(tok, root, path, folder));
    TRY(load_decoder(tok, root, path));
    return ST_OK;
}
