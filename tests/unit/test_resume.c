/* What a run directory's journal says to the next start: finished and failed prompts, faults,
 * silent deaths, retries; each only for the settings that it belongs to.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "experiments/resume.h"

#include <string.h>

#include "core/mem.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { N = 6 };

static char folder[GEN_PATH_BYTES], dir[GEN_PATH_BYTES];
static struct journal *journal; /* in dir */
static int32_t epoch;           /* of the start that is being written */

static enum status ignore(void *ctx, uint32_t kind, const void *payload, size_t bytes)
{
    (void)ctx;
    (void)kind;
    (void)payload;
    (void)bytes;
    return ST_OK;
}

/* A journal of its own for each test. */
static void open_new(const char *name)
{
    journal_close(&journal);
    epoch = -1;
    CHECK_OK(journal_open(&journal, gen_path(dir, folder, name), ignore, NULL));
}

/* ---- records of made-up starts; key 7 is ours, other keys are other settings' ---- */

static void put(uint32_t kind, const void *payload, size_t bytes)
{
    CHECK_OK(journal_append(journal, kind, payload, bytes, false));
}

static void begin(void)
{
    unsigned char packed[JOURNAL_SMALL_BYTES];
    struct journal_run r = {.epoch = ++epoch};
    put(JOURNAL_RUN, packed, journal_pack_run(packed, &r));
}

static void take(int64_t ordinal, uint64_t key)
{
    unsigned char packed[JOURNAL_SMALL_BYTES];
    struct journal_start r = {.ordinal = ordinal, .key = {key, 1}, .epoch = epoch};
    put(JOURNAL_START, packed, journal_pack_start(packed, &r));
}

static void finish(int64_t ordinal, uint64_t key)
{
    struct turn_record turn = {.n_new_tok = 1};
    struct finished_record r = {
        .ordinal = ordinal, .key = {key, 1}, .attempt = 1, .n_turns = 1, .turns = &turn};
    unsigned char packed[1024];
    CHECK(trace_packed_bytes(&r) <= sizeof packed);
    trace_pack(packed, sizeof packed, &r);
    put(JOURNAL_FINISHED, packed, trace_packed_bytes(&r));
}

static void fault(int64_t ordinal, uint64_t key, int32_t rank, const char *reason)
{
    unsigned char packed[JOURNAL_SMALL_BYTES];
    struct journal_fault r = {
        .ordinal = ordinal, .key = {key, 1}, .epoch = epoch, .rank = rank, .n_company = 1};
    snprintf(r.reason, sizeof r.reason, "%s", reason);
    put(JOURNAL_FAULT, packed, journal_pack_fault(packed, &r));
}

static void end(enum journal_how how)
{
    unsigned char packed[JOURNAL_SMALL_BYTES];
    struct journal_end r = {.epoch = epoch, .how = (int32_t)how};
    put(JOURNAL_END, packed, journal_pack_end(packed, &r));
}

/* ---- the next start ---- */

static struct resume_state state;

/* Reads the whole journal anew, as the next start would. */
static void reread(void)
{
    resume_free(&state);
    CHECK_OK(resume_create(&state, N, false));
    for (int i = 0; i < N; i++) {
        state.prompts[i].key[0] = 7;
        state.prompts[i].key[1] = 1;
    }
    CHECK_OK(journal_read(dir, resume_visit, &state, NULL));
}

static long journal_bytes(void)
{
    char path[GEN_PATH_BYTES + 16];
    size_t bytes = 0;
    snprintf(path, sizeof path, "%s/journal.bin", dir);
    free(gen_read_file(path, &bytes));
    return (long)bytes;
}

/* ---- the tests ---- */

static void test_finished(void)
{
    open_new("finished");
    reread();
    CHECK(state.n_epochs == 0 && state.n_finished == 0 && state.n_other == 0);
    begin();
    take(0, 7);
    take(1, 7);
    finish(1, 7);
    finish(2, 8);
    finish(N, 7); /* beyond the prompt file: it has grown shorter */
    end(JOURNAL_STOPPED);
    begin();
    take(0, 7);
    reread();
    CHECK(state.n_epochs == 2 && state.n_finished == 1 && state.n_other == 2);
    CHECK(state.prompts[1].finished && !state.prompts[0].finished && !state.prompts[2].finished);
    CHECK(state.prompts[0].attempts == 2 && state.prompts[1].attempts == 1);
}

static void test_faults(void)
{
    open_new("faults");
    begin();
    take(0, 7);
    fault(0, 7, 4, "one thing");
    fault(0, 7, 5, "one thing"); /* its tensor ranks fall together: one fault */
    fault(1, 8, 5, "other settings");
    fault(2, 7, 5, "in company");
    fault(3, 7, 5, "in company");
    reread();
    CHECK_OK(resume_fail_broken(&state, journal));
    CHECK(state.prompts[0].n_faults == 1 && state.prompts[1].n_faults == 0);
    CHECK(state.prompts[2].n_faults == 1 && state.prompts[3].n_faults == 1);
    CHECK(state.n_failed == 0);
    begin();
    take(0, 7);
    take(2, 7);
    take(3, 7);
    finish(3, 7); /* it was the other one */
    fault(0, 7, 3, "another thing");
    begin();
    fault(2, 7, 1, "yet another");
    reread();
    long before = journal_bytes();
    CHECK_OK(resume_fail_broken(&state, journal));
    CHECK(state.n_failed == 2 && state.n_finished == 1);
    CHECK(state.prompts[0].failed && state.prompts[2].failed);
    CHECK(!state.prompts[3].failed && state.prompts[3].n_faults == 0);
    CHECK(strcmp(state.prompts[0].failure.reason, "rank 3: another thing") == 0);
    CHECK(strcmp(state.prompts[2].failure.reason, "rank 1: yet another") == 0);
    CHECK(state.prompts[0].failure.attempts == 2 && state.prompts[0].failure.ordinal == 0);
    CHECK(journal_bytes() > before);
    reread(); /* the next start finds it so, and has nothing to add */
    before = journal_bytes();
    CHECK_OK(resume_fail_broken(&state, journal));
    CHECK(state.n_failed == 2 && journal_bytes() == before);
    CHECK(strcmp(state.prompts[0].failure.reason, "rank 3: another thing") == 0);
}

static void test_long_reason(void)
{
    char reason[256];
    memset(reason, 'x', sizeof reason - 1);
    reason[255] = '\0';
    open_new("long");
    for (int i = 0; i < 2; i++) {
        begin();
        fault(5, 7, 123456, reason);
    }
    reread();
    CHECK_OK(resume_fail_broken(&state, journal));
    CHECK(strncmp(state.prompts[5].failure.reason, "rank 123456: xxx", 16) == 0);
    CHECK(strlen(state.prompts[5].failure.reason) > 240);
}

static void test_deaths(void)
{
    open_new("deaths");
    begin();
    begin();
    reread();
    CHECK_OK(resume_check_deaths(&state, 3, dir));
    CHECK_STATUS(resume_check_deaths(&state, 2, dir), ST_USER, "2 starts on ");
    begin();
    reread();
    CHECK_STATUS(resume_check_deaths(&state, 3, dir), ST_USER, "run.max_deaths = 3");
    CHECK_STATUS(resume_check_deaths(&state, 1, dir), ST_USER, "--retry-failed");
    CHECK_OK(resume_check_deaths(&state, 4, dir));
    CHECK_OK(resume_check_deaths(&state, 0, dir)); /* any number */
    begin();
    end(JOURNAL_STOPPED); /* stopped before its first prompt was done: neither here nor there */
    begin();
    fault(0, 8, 1, "an error of other settings");
    begin();
    end(JOURNAL_ERROR);
    reread();
    CHECK_STATUS(resume_check_deaths(&state, 3, dir), ST_USER, "3 starts");
    CHECK_OK(resume_check_deaths(&state, 4, dir));
    begin();
    finish(0, 8); /* of any settings: the machine is good for something, though killed again */
    reread();
    CHECK_OK(resume_check_deaths(&state, 1, dir));
    begin();
    reread();
    CHECK_STATUS(resume_check_deaths(&state, 1, dir), ST_USER, "1 start on ");
    CHECK_OK(resume_check_deaths(&state, 2, dir));
}

static void test_retry(void)
{
    open_new("retry");
    for (int i = 0; i < 2; i++) {
        begin();
        take(4, 7);
        fault(4, 7, 0, "broken");
        fault(5, 7, 0, "broken");
    }
    begin();
    finish(5, 7);
    begin();
    begin();
    reread();
    CHECK_OK(resume_fail_broken(&state, journal));
    CHECK(state.n_failed == 1);
    reread();
    CHECK(state.n_failed == 1);
    CHECK_STATUS(resume_check_deaths(&state, 2, dir), ST_USER, "2 starts");
    CHECK_OK(resume_retry(&state, journal));
    for (int i = 0; i < 2; i++) { /* at once, and for who reads the journal later */
        CHECK(state.n_failed == 0 && !state.prompts[4].failed && state.prompts[4].n_faults == 0);
        CHECK(state.n_finished == 1 && state.prompts[5].finished);
        CHECK_OK(resume_check_deaths(&state, 1, dir));
        reread();
    }
    begin();
    fault(4, 7, 0, "still broken");
    reread();
    CHECK_OK(resume_fail_broken(&state, journal));
    CHECK(state.n_failed == 0 && state.prompts[4].n_faults == 1); /* counted anew */
    begin();
    fault(4, 7, 0, "and again");
    reread();
    CHECK_OK(resume_fail_broken(&state, journal));
    CHECK(strcmp(state.prompts[4].failure.reason, "rank 0: and again") == 0);
}

int main(void)
{
    gen_folder(folder);
    test_finished();
    test_faults();
    test_long_reason();
    test_deaths();
    test_retry();
    resume_free(&state);
    journal_close(&journal);
    gen_remove(folder);
    return check_report();
}
