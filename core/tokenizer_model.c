/* tokenizer.model to struct tokenizer. The file is a protobuf message (ModelProto of
 * SentencePiece); it is walked here before the library sees it, because the library trusts parts of
 * it: pieces, scores and types are checked, and a precompiled character map is refused, whose
 * offsets nobody checks. Decoding then needs the pieces only (tokenizer_stream.c); encoding is the
 * library's. Source: sentencepiece_model.proto of the SentencePiece project, field numbers and
 * defaults. SPDX-License-Identifier: Apache-2.0
 */
#include "core/tokenizer_internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/mem.h"
#include "core/tokenizer_spm.h"
#include "core/unicode.h"

enum {
    MODEL_BYTES = 64 * 1024 * 1024,
    JSON_BYTES = 16 * 1024 * 1024,
    WHY_BYTES = 256,
    PATH_BYTES = 4096
};

/* Field numbers. */
enum { MODEL_PIECES = 1, MODEL_TRAINER = 2, MODEL_NORMALIZER = 3, MODEL_DENORMALIZER = 5 };
enum { PIECE_TEXT = 1, PIECE_SCORE = 2, PIECE_TYPE = 3 };
enum { TRAINER_TYPE = 3, TRAINER_UNK_SURFACE = 44 };
enum { NORM_CHARSMAP = 2, NORM_DUMMY_PREFIX = 3, NORM_EXTRA_SPACES = 4 };
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER, TYPE_UNUSED, TYPE_BYTE };
enum { KIND_UNIGRAM = 1, KIND_BPE, KIND_WORD, KIND_CHAR };

/* ---- protobuf ---- */

struct message {
    const unsigned char *at, *end;
    bool broken;
};

struct field {
    uint64_t number, value; /* value: of a varint or a fixed-width number */
    int wire;               /* 0 varint, 1 and 5 fixed width, 2 bytes */
    const unsigned char *data;
    size_t bytes; /* of wire type 2 */
};

static uint64_t read_varint(struct message *m)
{
    uint64_t x = 0;
    for (int shift = 0; shift < 70 && m->at < m->end; shift += 7) {
        unsigned char b = *m->at++;
        x |= shift < 64 ? (uint64_t)(b & 0x7F) << shift : 0;
        if (!(b & 0x80)) {
            return x;
        }
    }
    m->broken = true;
    return 0;
}

/* The next field; false at the end and when the message is broken. */
static bool next_field(struct message *m, struct field *f)
{
    if (m->broken || m->at == m->end) {
        return false;
    }
    uint64_t tag = read_varint(m);
    *f = (struct field){.number = tag >> 3, .wire = (int)(tag & 7)};
    size_t left = (size_t)(m->end - m->at), width = f->wire == 1 ? 8 : 4;
    switch (m->broken ? -1 : f->wire) {
    case 0:
        f->value = read_varint(m);
        break;
    case 1:
    case 5:
        m->broken = left < width;
        for (size_t i = 0; !m->broken && i < width; i++) {
            f->value |= (uint64_t)*m->at++ << (8 * i);
        }
        break;
    case 2:
        f->value = read_varint(m);
        left = (size_t)(m->end - m->at);
        m->broken = m->broken || f->value > left;
        if (!m->broken) {
            f->data = m->at;
            f->bytes = (size_t)f->value;
            m->at += f->bytes;
        }
        break;
    default:
        m->broken = true;
    }
    return !m->broken;
}

static struct message inside(const struct field *f)
{
    return (struct message){.at = f->data, .end = f->data + f->bytes};
}

static bool is_bytes(const struct field *f, uint64_t number)
{
    return f->number == number && f->wire == 2;
}

/* ---- the parts of a model ---- */

struct facts {
    int32_t n_pieces;
    int kind;
    bool dummy_prefix, extra_spaces; /* defaults of the format: true */
    const unsigned char *unk_surface;
    size_t unk_surface_bytes;
};

static enum status broken(const char *path)
{
    FAIL(ST_FORMAT, "%s is cut off or is no SentencePiece model: fetch it again", path);
}

static enum status read_normalizer(struct message m, struct facts *facts, bool is_main,
                                   const char *path)
{
    struct field f;
    while (next_field(&m, &f)) {
        if (is_bytes(&f, NORM_CHARSMAP) && f.bytes > 0) {
            FAIL(ST_UNSUPPORTED,
                 "%s: has a character map (normalization_rule_name other than identity), which is "
                 "not supported: write a tokenizer.json",
                 path);
        }
        if (is_main && f.number == NORM_DUMMY_PREFIX && f.wire == 0) {
            facts->dummy_prefix = f.value != 0;
        }
        if (is_main && f.number == NORM_EXTRA_SPACES && f.wire == 0) {
            facts->extra_spaces = f.value != 0;
        }
    }
    return m.broken ? broken(path) : ST_OK;
}

static enum status read_trainer(struct message m, struct facts *facts, const char *path)
{
    struct field f;
    while (next_field(&m, &f)) {
        if (f.number == TRAINER_TYPE && f.wire == 0) {
            facts->kind = f.value <= KIND_CHAR ? (int)f.value : 0;
        }
        if (is_bytes(&f, TRAINER_UNK_SURFACE)) {
            facts->unk_surface = f.data;
            facts->unk_surface_bytes = f.bytes;
        }
    }
    if (!m.broken && (facts->kind < KIND_UNIGRAM || facts->kind > KIND_CHAR)) {
        FAIL(ST_FORMAT, "%s: the model type is none of unigram, BPE, word, char", path);
    }
    return m.broken ? broken(path) : ST_OK;
}

/* What a model says beside its pieces, and how many there are. */
static enum status read_facts(struct message m, struct facts *facts, const char *path)
{
    struct field f;
    int64_t n = 0;
    while (next_field(&m, &f)) {
        n += is_bytes(&f, MODEL_PIECES);
        if (is_bytes(&f, MODEL_TRAINER)) {
            TRY(read_trainer(inside(&f), facts, path));
        } else if (is_bytes(&f, MODEL_NORMALIZER) || is_bytes(&f, MODEL_DENORMALIZER)) {
            TRY(read_normalizer(inside(&f), facts, f.number == MODEL_NORMALIZER, path));
        }
    }
    if (m.broken || n == 0) {
        return broken(path);
    }
    if (n > TOKENIZER_MAX_VOCAB) {
        FAIL(ST_FORMAT, "%s: %lld pieces, expected at most %d", path, (long long)n,
             TOKENIZER_MAX_VOCAB);
    }
    facts->n_pieces = (int32_t)n;
    return ST_OK;
}

/* One piece: its text, as it is shown, is appended to all. */
static enum status read_piece(struct tokenizer *tok, struct message m, int32_t id,
                              const struct facts *facts, struct byte_buffer *all, const char *path)
{
    struct field f;
    const unsigned char *text = NULL;
    size_t bytes = 0;
    uint64_t type = TYPE_NORMAL;
    uint32_t score_bits = 0;
    float score = 0;
    while (next_field(&m, &f)) {
        if (is_bytes(&f, PIECE_TEXT)) {
            text = f.data;
            bytes = f.bytes;
        } else if (f.number == PIECE_SCORE && f.wire == 5) {
            score_bits = (uint32_t)f.value;
        } else if (f.number == PIECE_TYPE && f.wire == 0) {
            type = f.value;
        }
    }
    if (m.broken) {
        return broken(path);
    }
    memcpy(&score, &score_bits, sizeof score);
    if (bytes == 0 || bytes > TOKENIZER_MAX_PIECE || memchr(text, 0, bytes) ||
        utf8_check((const char *)text, bytes) < bytes) {
        FAIL(ST_FORMAT, "%s: piece %d has %zu bytes, expected 1 to %d bytes of UTF-8", path, id,
             bytes, TOKENIZER_MAX_PIECE);
    }
    if (!isfinite(score) || type < TYPE_NORMAL || type > TYPE_BYTE) {
        FAIL(ST_FORMAT, "%s: piece %d has score %g and type %llu, expected a number and 1 to 6",
             path, id, (double)score, (unsigned long long)type);
    }
    int byte = type == TYPE_BYTE ? tokenizer_byte_piece((const char *)text, bytes) : -1;
    if (type == TYPE_BYTE && byte < 0) {
        FAIL(ST_FORMAT, "%s: piece %d is a byte, but not of the form <0xNN>", path, id);
    }
    if (type == TYPE_UNKNOWN) {
        text = facts->unk_surface;
        bytes = facts->unk_surface_bytes;
    }
    tok->piece[id] =
        (struct piece){.offset = (uint32_t)all->n,
                       .bytes = (uint16_t)bytes,
                       .byte = (int16_t)byte,
                       .flags = type == TYPE_CONTROL ? PIECE_MODEL | PIECE_SPECIAL : PIECE_MODEL};
    return byte_buffer_add(all, text, bytes);
}

static enum status read_pieces(struct tokenizer *tok, struct message m, const struct facts *facts,
                               const char *path)
{
    enum status st = ST_OK;
    struct byte_buffer all = {0};
    struct field f;
    int32_t id = 0;
    TRY(MEM_NEW(&tok->piece, facts->n_pieces));
    tok->n_vocab = facts->n_pieces;
    while (next_field(&m, &f)) {
        if (is_bytes(&f, MODEL_PIECES)) {
            TRY_GOTO(st, read_piece(tok, inside(&f), id++, facts, &all, path), done);
        }
    }
done:
    tok->text = all.data; /* also on failure: tokenizer_close gives it back */
    return st;
}

/* ---- the folder's other files ---- */

static bool has_file(char path[PATH_BYTES], const char *folder, const char *name)
{
    int n = snprintf(path, PATH_BYTES, "%s/%s", folder, name);
    return n > 0 && n < PATH_BYTES && access(path, F_OK) == 0;
}

/* tokenizer_config.json: a BOS is added unless it says otherwise. Source: add_bos_token and
 * add_eos_token of LlamaTokenizer in Hugging Face transformers, defaults true and false. */
static enum status read_config(struct tokenizer *tok, const char *folder)
{
    enum status st = ST_OK;
    json_t *root = NULL;
    bool bos = true, eos = false;
    char path[PATH_BYTES];
    int32_t id = spm_bos(tok->spm);
    if (has_file(path, folder, "tokenizer_config.json")) {
        TRY(json_read_file(&root, path, JSON_BYTES));
        TRY_GOTO(st, json_get_bool_or(&bos, root, "add_bos_token", true, path), done);
        TRY_GOTO(st, json_get_bool_or(&eos, root, "add_eos_token", false, path), done);
        if (eos) {
            FAIL_GOTO(st, ST_UNSUPPORTED, done, "%s: add_eos_token is not supported", path);
        }
    }
    if (bos && id >= 0 && id < tok->n_vocab) {
        tok->first_ids[tok->n_first_ids++] = id;
    }
done:
    json_release(&root);
    return st;
}

static enum status refuse_added_tokens(const char *folder)
{
    char path[PATH_BYTES];
    if (has_file(path, folder, "added_tokens.json")) {
        FAIL(ST_UNSUPPORTED,
             "%s: tokens added to a tokenizer.model are not supported: write a tokenizer.json with "
             "save_pretrained of a fast tokenizer",
             path);
    }
    return ST_OK;
}

static enum status read_whole(struct byte_buffer *out, const char *path)
{
    enum status st = ST_OK;
    char block[65536];
    FILE *in = fopen(path, "rb");
    if (!in) {
        FAIL(ST_IO, "%s: cannot be read", path);
    }
    for (size_t n = 1; n > 0 && out->n <= MODEL_BYTES;) {
        n = fread(block, 1, sizeof block, in);
        TRY_GOTO(st, byte_buffer_add(out, block, n), done);
    }
    if (ferror(in) || out->n > MODEL_BYTES) {
        FAIL_GOTO(st, ST_IO, done, "%s: %s", path,
                  ferror(in) ? "reading failed" : "larger than 64 MiB");
    }
done:
    fclose(in);
    return st;
}

enum status tokenizer_load_spm(struct tokenizer *tok, const char *folder, const char *path,
                               int32_t n_vocab_model)
{
    enum status st = ST_OK;
    struct byte_buffer file = {0};
    char why[WHY_BYTES] = "";
    static const unsigned char unk_surface[] = " \xE2\x81\x87 "; /* the format's default, U+2047 */
    struct facts facts = {.kind = KIND_UNIGRAM,
                          .dummy_prefix = true,
                          .extra_spaces = true,
                          .unk_surface = unk_surface,
                          .unk_surface_bytes = sizeof unk_surface - 1};
    TRY(refuse_added_tokens(folder));
    TRY_GOTO(st, read_whole(&file, path), done);
    if (file.n == 0) {
        FAIL_GOTO(st, ST_FORMAT, done, "%s is empty", path);
    }
    const unsigned char *data = (const unsigned char *)file.data;
    struct message m = {.at = data, .end = data + file.n};
    TRY_GOTO(st, read_facts(m, &facts, path), done);
    if (facts.unk_surface_bytes > TOKENIZER_MAX_PIECE ||
        utf8_check((const char *)facts.unk_surface, facts.unk_surface_bytes) <
            facts.unk_surface_bytes) {
        FAIL_GOTO(st, ST_FORMAT, done, "%s: unk_surface is not at most %d bytes of UTF-8", path,
                  TOKENIZER_MAX_PIECE);
    }
    if (n_vocab_model > 0 && facts.n_pieces > n_vocab_model) {
        FAIL_GOTO(
            st, ST_FORMAT, done,
            "%s: %d pieces, the model's config.json has vocab_size %d; do tokenizer and model "
            "belong together?",
            path, facts.n_pieces, n_vocab_model);
    }
    TRY_GOTO(st, read_pieces(tok, m, &facts, path), done);
    if (!spm_open(&tok->spm, file.data, file.n, why, sizeof why)) {
        FAIL_GOTO(st, ST_FORMAT, done, "%s: SentencePiece refuses it: %s", path, why);
    }
    if (spm_n_pieces(tok->spm) != facts.n_pieces) {
        FAIL_GOTO(st, ST_FORMAT, done, "%s: %d pieces, of which SentencePiece reads %d", path,
                  facts.n_pieces, spm_n_pieces(tok->spm));
    }
    tok->metaspace_to_space = true;
    tok->bytes_decoded = true;
    tok->strip = facts.extra_spaces   ? STRIP_METASPACES
                 : facts.dummy_prefix ? STRIP_METASPACE
                                      : STRIP_NOTHING;
    tok->spm_is_bpe = facts.kind == KIND_BPE;
    TRY_GOTO(st, read_config(tok, folder), done);
done:
    mem_free(file.data);
    return st;
}

static bool take_id(void *ctx, int32_t id)
{
    return encode_work_add(ctx, id) == ST_OK;
}

enum status tokenizer_encode_spm(struct encode_work *w, const char *text, size_t bytes)
{
    char why[WHY_BYTES];
    if (!spm_encode(w->tok->spm, text, bytes, take_id, w, why, sizeof why)) {
        if (why[0] == '\0') {
            return ST_NOMEM; /* encode_work_add has said why */
        }
        FAIL(ST_FORMAT, "SentencePiece cannot encode a text of %zu bytes: %s", bytes, why);
    }
    return ST_OK;
}
