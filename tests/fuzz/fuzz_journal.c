/* A journal: read, read against a run's prompts, and opened, which cuts what is damaged.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <isa-l.h>

#include "core/log.h"
#include "core/mem.h"
#include "core/runfile.h"
#include "dist/journal.h"
#include "experiments/inspect_journal.h"
#include "experiments/resume.h"
#include "tests/fuzz/fuzz.h"

enum { PROMPTS = 4, HEAD = 16 };

static uint32_t get_u32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* CRC-32C of a frame's kind, length and payload. */
static uint32_t crc_of(const uint8_t *frame, size_t bytes)
{
    uint32_t crc = crc32_iscsi((unsigned char *)(uintptr_t)(frame + 4), 8, ~0u);
    return ~crc32_iscsi((unsigned char *)(uintptr_t)(frame + HEAD), (int)bytes, crc);
}

/* Every record by every reader of its kind. */
struct seen {
    const uint8_t *input; /* NULL: not compared */
    int n;
    size_t bytes; /* of frames */
    uint32_t last_kind;
};

static enum status count(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    struct seen *s = ctx;
    struct journal_run run;
    struct journal_start start;
    struct journal_failed failed;
    struct journal_fault fault;
    struct journal_end end;
    unsigned char again[JOURNAL_SMALL_BYTES];
    if (s->input) {
        const uint8_t *frame = s->input + s->bytes;
        INVARIANT(get_u32(frame + 4) == kind && memcmp(frame + HEAD, payload, bytes) == 0);
        INVARIANT(get_u32(frame + 12) == crc_of(frame, bytes));
    }
    s->n++;
    s->bytes += HEAD + bytes;
    s->last_kind = kind;
    if (fuzz_ok(journal_unpack_run(&run, payload, bytes))) {
        INVARIANT(journal_pack_run(again, &run) == bytes && memcmp(again, payload, bytes) == 0);
    }
    if (fuzz_ok(journal_unpack_start(&start, payload, bytes))) {
        INVARIANT(journal_pack_start(again, &start) == bytes && memcmp(again, payload, bytes) == 0);
    }
    if (fuzz_ok(journal_unpack_failed(&failed, payload, bytes))) {
        INVARIANT(journal_pack_failed(again, &failed) == bytes);
        INVARIANT(memchr(failed.reason, '\0', sizeof failed.reason) != NULL);
    }
    if (fuzz_ok(journal_unpack_fault(&fault, payload, bytes))) {
        INVARIANT(journal_pack_fault(again, &fault) == bytes);
        INVARIANT(memchr(fault.reason, '\0', sizeof fault.reason) != NULL);
    }
    if (fuzz_ok(journal_unpack_end(&end, payload, bytes))) {
        INVARIANT(journal_pack_end(again, &end) == bytes);
        INVARIANT(memchr(end.reason, '\0', sizeof end.reason) != NULL);
    }
    return ST_OK;
}

static const struct tokenizer *small_tokenizer(void)
{
    static struct tokenizer *tok; // for all inputs; reachable, so no leak
    if (!tok) {
        fuzz_put_tokenizer();
        INVARIANT(tokenizer_open(&tok, fuzz_folder(), FUZZ_VOCAB) == ST_OK);
    }
    return tok;
}

/* What the program writes at the end from what it finds. */
static void check_resumed(const struct resume_state *r)
{
    static char names[PROMPTS][2] = {"a", "b", "c", "d"};
    struct prompt prompt[PROMPTS];
    struct prompts prompts = {.n = PROMPTS, .prompt = prompt};
    struct level_table levels = {
        .n = 2, .level = {{.text = "4", .avg_bits = 4}, {.text = "2", .avg_bits = 2}}};
    struct finished_record finished[PROMPTS];
    struct run_contents c = {.prompts = &prompts,
                             .levels = &levels,
                             .tokenizer = small_tokenizer(),
                             .finished = finished};
    int64_t n_finished = 0, n_failed = 0;
    for (int i = 0; i < PROMPTS; i++) {
        const struct resume_prompt *p = &r->prompts[i];
        prompt[i] = (struct prompt){.id = names[i], .task = names[i], .split = names[i]};
        n_finished += p->finished;
        n_failed += p->failed;
        if (p->finished) {
            INVARIANT(p->record.ordinal == i && p->record.n_turns > 0);
            finished[c.n_finished++] = p->record;
        }
    }
    INVARIANT(r->n_finished == n_finished && r->n_failed == n_failed && r->n_epochs >= 0);
    struct run_metrics m;
    run_metrics_compute(&m, &c);
    INVARIANT(m.n_finished == n_finished && m.n_passes >= 0);
    if (n_finished > 0) {
        (void)fuzz_ok(answers_write(fuzz_path("answers.jsonl"), &c));
    }
}

static bool resume(struct resume_state *r)
{
    INVARIANT(resume_create(r, PROMPTS, true) == ST_OK);
    for (int i = 0; i < PROMPTS; i++) {
        r->prompts[i].key[0] = 1;
        r->prompts[i].key[1] = 2;
    }
    return fuzz_ok(journal_read(fuzz_folder(), resume_visit, r, NULL));
}

/* A new start goes on from the journal; what it decides it finds again. */
static void check_resume(struct journal *j)
{
    struct resume_state r, again;
    if (resume(&r)) {
        check_resumed(&r);
        INVARIANT(resume_n_deaths(&r) >= 0);
        (void)fuzz_ok(resume_check_deaths(&r, 3, "dir"));
        INVARIANT(fuzz_ok(resume_fail_broken(&r, j)));
        INVARIANT(resume(&again) && again.n_failed == r.n_failed);
        resume_free(&again);
        INVARIANT(fuzz_ok(resume_retry(&r, j)) && r.n_failed == 0);
        INVARIANT(resume(&again) && again.n_failed == 0 && again.n_finished == r.n_finished);
        resume_free(&again);
    }
    resume_free(&r);
}

static void check_inspect(void)
{
    json_t *json = NULL;
    if (fuzz_ok(inspect_journal(&json, fuzz_folder()))) {
        INVARIANT(json != NULL);
    }
    json_release(&json);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct seen all = {.input = data}, cut = {0}, longer = {0};
    struct journal *j = NULL;
    struct stat info;
    size_t bad = 0;
    fuzz_put("journal.bin", data ? data : (const uint8_t *)"", size);
    bool good = fuzz_ok(journal_read(fuzz_folder(), count, &all, &bad));
    if (good) {
        INVARIANT(all.bytes + bad == size);
        check_inspect();
    }
    INVARIANT(fuzz_ok(journal_open(&j, fuzz_folder(), count, &cut)) == good);
    if (good) {
        INVARIANT(cut.n == all.n && stat(fuzz_path("journal.bin"), &info) == 0);
        INVARIANT((size_t)info.st_size == all.bytes);
        INVARIANT(journal_append(j, 77, "end", 3, false) == ST_OK);
        INVARIANT(journal_read(fuzz_folder(), count, &longer, &bad) == ST_OK);
        INVARIANT(longer.n == all.n + 1 && longer.last_kind == 77 && bad == 0);
        check_resume(j);
    }
    journal_close(&j);
    return 0;
}

/* ---- a mutator that closes the frames again ---- */

static void put_u32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(v >> 8 * i);
    }
}

/* A frame with a true length and CRC in place of the one at p. */
static void seal(uint8_t *p, uint32_t bytes)
{
    memcpy(p, "PMJ1", 4);
    put_u32(p + 8, bytes);
    put_u32(p + 12, crc_of(p, bytes));
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    size_t at = 0, n = 0, pick = 0;
    if (seed % 8 == 0 || max_size < size + HEAD) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    while (size - at >= HEAD && get_u32(data + at + 8) <= size - at - HEAD) {
        if ((seed >> 8) % ++n == 0) {
            pick = at;
        }
        at += HEAD + get_u32(data + at + 8);
    }
    if (n == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    size_t bytes = get_u32(data + pick + 8), end = pick + HEAD + bytes, n_tail = size - end;
    uint8_t *tail = malloc(n_tail + 1);
    INVARIANT(tail != NULL);
    memcpy(tail, data + end, n_tail);
    if (seed % 8 == 1) { // once more
        if (size + HEAD + bytes <= max_size) {
            memcpy(data + end, data + pick, HEAD + bytes);
            end += HEAD + bytes;
        }
    } else if (seed % 8 == 2) { // another kind
        data[pick + 4] = (uint8_t)(seed >> 16) % 9;
        seal(data + pick, (uint32_t)bytes);
    } else {
        size_t n_new = LLVMFuzzerMutate(data + pick + HEAD, bytes, max_size - n_tail - pick - HEAD);
        bytes = seed % 8 < 6 ? bytes : n_new; // the length is right nearly always
        seal(data + pick, (uint32_t)bytes);
        end = pick + HEAD + bytes;
    }
    memcpy(data + end, tail, n_tail);
    free(tail);
    return end + n_tail;
}
