/* Settings: defaults, libconfig files and --set, every refusal, the printed form and the committed
 * configs/default.cfg. With the argument --print it writes that file to stdout.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdint.h>
#include <unistd.h>

#include "core/mem.h"
#include "core/settings.h"
#include "tests/check.h"

#ifndef PMPD_SOURCE_DIR
#define PMPD_SOURCE_DIR "."
#endif

/* libconfig's own parser loses a few bytes at a syntax error; only ours are of interest here. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libconfig.so\n";
}

static struct settings parse(const char *text)
{
    struct settings s;
    settings_default(&s);
    CHECK_OK(settings_parse(&s, text, "a.cfg"));
    return s;
}

#define REFUSED(text, part)                                                        \
    do {                                                                           \
        struct settings refused_, before_;                                         \
        settings_default(&refused_);                                               \
        before_ = refused_;                                                        \
        CHECK_STATUS(settings_parse(&refused_, (text), "a.cfg"), ST_USER, (part)); \
        CHECK(memcmp(&refused_, &before_, sizeof before_) == 0);                   \
    } while (0)

static void test_defaults(void)
{
    struct settings s;
    settings_default(&s);
    CHECK(strcmp(s.backend.name, "cpu") == 0 && s.backend.threads == 0);
    CHECK(s.parallel.tensor_ranks == 1 && !s.parallel.reproducible && s.parallel.segments == 8);
    CHECK_NEAR(s.parallel.timeout_s, 300, 0);
    CHECK(s.decode.max_new_tokens == 128 && s.decode.slots == 1 && s.decode.prefill_chunk == 64);
    CHECK(s.decode.context == 0 && s.decode.seed == 0 && s.decode.stop_at_eos);
    CHECK_NEAR(s.decode.temperature, 0, 0);
    CHECK(strcmp(s.kv.format, "auto") == 0 && strcmp(s.policy.name, "fixed") == 0);
    CHECK(strcmp(s.policy.prefill, "max") == 0 && strcmp(s.policy.level, "max") == 0);
    CHECK(s.policy.switches[0] == '\0' && s.policy.alternate[0] == '\0');
    CHECK_NEAR(s.policy.dial, 0.5, 0);
    CHECK(strcmp(s.output.dir, "results/run") == 0 && !s.output.kv_features);
    CHECK(strcmp(s.log.level, "info") == 0 && s.prompts.limit == 0);
}

/* Every row points into the struct, at a place of its own, with a default inside its own range. */
static void test_table(void)
{
    int n = 0;
    size_t covered = 0;
    for (const struct setting_row *row; (row = settings_row(n)) != NULL; n++) {
        CHECK(row->offset + row->bytes <= sizeof(struct settings));
        CHECK(strchr(row->key, '.') && row->help[0] && row->unit && row->fallback);
        covered += row->bytes;
        for (int j = 0; j < n; j++) {
            const struct setting_row *other = settings_row(j);
            CHECK(strcmp(row->key, other->key) != 0);
            CHECK(row->offset >= other->offset + other->bytes ||
                  other->offset >= row->offset + row->bytes);
        }
    }
    CHECK(n > 0 && n < 256);
    CHECK(sizeof(struct settings) - covered < 64); // only padding: no field without a row
    CHECK(settings_row(-1) == NULL && settings_row(n) == NULL && settings_row(n + 1) == NULL);
}

static void test_files(void)
{
    struct settings s =
        parse("# a comment\n"
              "model: { path = \"models/a \\\"b\\\"\"; };\n"
              "decode: { slots = 4; temperature = 1; seed = 7L; }\n"
              "policy = { name = \"static\", switches = \"0:4 85:3\" \"170:2\"; };\n");
    CHECK(strcmp(s.model.path, "models/a \"b\"") == 0);
    CHECK(s.decode.slots == 4 && s.decode.seed == 7);
    CHECK_NEAR(s.decode.temperature, 1, 0);
    CHECK(strcmp(s.policy.name, "static") == 0);
    CHECK(strcmp(s.policy.switches, "0:4 85:3170:2") == 0); // libconfig joins adjacent texts

    s = parse("decode.slots = 5; decode.seed = 6\nkv.format : \"f16\" /* x = 4 */ // y\n"
              "decode: { max_new_tokens = 0x20; stop_at_eos = false; temperature = 2.5e-1; }");
    CHECK(s.decode.slots == 5 && s.decode.seed == 6 && s.decode.max_new_tokens == 32);
    CHECK(strcmp(s.kv.format, "f16") == 0 && !s.decode.stop_at_eos);
    CHECK_NEAR(s.decode.temperature, 0.25, 0);

    s = parse("decode.seed = 5000000000;"); // beyond 32 bits, without L
    CHECK(s.decode.seed == INT64_C(5000000000));
    s = parse("decode.seed = 9007199254740992;");
    CHECK(s.decode.seed == INT64_C(9007199254740992));
    s = parse("decode.seed = 0x1FFFFFFFFF;");
    CHECK(s.decode.seed == INT64_C(0x1FFFFFFFFF));
    s = parse("decode.slots = 007; decode.temperature = 1e1; policy.dial = .5; "
              "parallel.timeout_s = 2.;");
    CHECK(s.decode.slots == 7);
    CHECK_NEAR(s.decode.temperature, 10, 0);
    CHECK_NEAR(s.parallel.timeout_s, 2, 0);
    s = parse("model.path = \"a # b // c /* d @include 5000000000 x.y \\\\\";");
    CHECK(strcmp(s.model.path, "a # b // c /* d @include 5000000000 x.y \\") == 0);
    s = parse("");
    s = parse("run.name = \"\xc3\xa9t\xc3\xa9\";");
    CHECK(strcmp(s.run.name, "\xc3\xa9t\xc3\xa9") == 0);
    s = parse("run.name = \"a\";\r\ndecode.slots = 4;\r\n");
    CHECK(s.decode.slots == 4);
}

static void test_refusals(void)
{
    REFUSED("decode: {\n slots = 1;\n slot = 2;\n};", "a.cfg:3: unknown setting \"decode.slot\"");
    REFUSED("decode: {\n slots = 1;\n slot = 2;\n};", "nearest is \"decode.slots\"");
    REFUSED("\nslots = 4;", "a.cfg:2: unknown setting \"slots\"; the nearest is \"decode.slots\"");
    REFUSED("Decode.Slots = 4;", "the nearest is \"decode.slots\"");
    REFUSED("\n\ndecoder: { slots = 4; };", "a.cfg:3: unknown group of settings \"decoder\"");
    REFUSED("decoder: { slots = 4; };", "the nearest is \"decode\"");
    REFUSED("decode: { deep: { slots = 4; }; };", "unknown group of settings \"decode.deep\"");
    REFUSED("decode = 4;", "decode is a group");
    REFUSED("decode = (1, 2);", "decode is a group");
    REFUSED("decode: { slots: { a = 1; }; };", "decode.slots is a group { }; expected a whole");
    REFUSED("decode.slots = [1, 2];", "decode.slots is a list");

    REFUSED("\ndecode.slots = 1.5;", "a.cfg:2: decode.slots is 1.5 (a float); expected a whole "
                                     "number from 1 to 4096 (sequences)");
    REFUSED("decode.slots = 4.0;", "(a float)");
    REFUSED("decode.slots = \"4\";", "the text \"4\"; expected a whole number");
    REFUSED("decode.slots = true;", "is true; expected a whole number");
    REFUSED("decode.slots = 0;", "decode.slots is 0; expected a whole number from 1 to 4096");
    REFUSED("decode.slots = 4097;", "is 4097");
    REFUSED("decode.slots = 4294967297;", "is 4294967297"); // 1 when cut to 32 bits
    REFUSED("decode.slots = -1;", "is -1");
    REFUSED("decode.seed = 9007199254740993;", "is 9007199254740993");
    REFUSED("decode.seed = 9223372036854775808;", "too large for a whole number");
    REFUSED("policy.dial = 1.01;", "policy.dial is 1.01 (a float); expected a number from 0 to 1");
    REFUSED("policy.dial = 2;", "expected a number from 0 to 1");
    REFUSED("decode.temperature = 1e999;", "is inf");
    REFUSED("decode.stop_at_eos = 1;", "is 1; expected true or false");
    REFUSED("decode.stop_at_eos = \"yes\";", "expected true or false");
    REFUSED("policy.level = 4;", "policy.level is 4; expected a text in quotes");
    REFUSED("kv.format = \"f61\";", "expected one of \"auto\", \"f16\", \"f32\"");

    REFUSED("decode: { slots = 1; slots = 2; };", "a.cfg:1: duplicate");
    REFUSED("decode.slots = 1;\ndecode: { slots = 2; };",
            "a.cfg:2: decode.slots is given a second");
    REFUSED("\ndecode: { slots = ;", "a.cfg:2: syntax error");
    REFUSED("decode: { slots = 1;", "syntax error");
    REFUSED("decode: { slots = 12ab; };", "syntax error");
    REFUSED("decode*slots = 1;", "unexpected '*'");
    REFUSED("\xef\xbb\xbf"
            "decode.slots = 1;",
            "syntax error");

    REFUSED("@include \"/etc/passwd\"\n", "a.cfg:1: @include is not allowed");
    REFUSED("decode.slots = 1;\n \t @include \"b.cfg\"", "a.cfg:2: @include is not allowed");
    REFUSED("/* a comment\n@include \"b.cfg\"\n*/", "a.cfg:2: @include is not allowed");
    REFUSED("model.path = \"a\n@include \\\"b\\\"\";", "@include is not allowed");
    REFUSED("decode.slots = 1; @include \"b.cfg\"", "unexpected '@'");
    REFUSED("model.path = \"never closed;\ndecode.slots = 4;\n", "a.cfg:1: the text that begins");
    REFUSED("\n/* never closed", "a.cfg:2: the comment that begins");
    REFUSED("model.path = \"a\\x00b\";", "\\x00");
    REFUSED("a = ((((((((((((((((((((1))))))))))))))))))));", "nested more than 16 deep");
    REFUSED("decode.slots = 1111111111111111111111111111111111111111111111111111111111111111111111"
            "1111111111111111;",
            "a number of");
}

static void test_sizes(void)
{
    enum { BIG = (1 << 20) + 2 };
    char *text = malloc(BIG + 1);
    struct settings s;
    settings_default(&s);
    memset(text, ' ', BIG);
    text[BIG - 2] = '\0'; // exactly 1 MiB
    CHECK_OK(settings_parse(&s, text, "big.cfg"));
    text[BIG - 2] = ' ';
    text[BIG] = '\0';
    CHECK_STATUS(settings_parse(&s, text, "big.cfg"), ST_USER, "at most 1048576");

    char line[SETTINGS_TEXT_BYTES + 64] = "policy.level = \"";
    size_t head = strlen(line);
    memset(line + head, 'x', SETTINGS_TEXT_BYTES - 1); // with its terminator, just fits
    strcpy(line + head + SETTINGS_TEXT_BYTES - 1, "\";");
    CHECK_OK(settings_parse(&s, line, "long.cfg"));
    CHECK(strlen(s.policy.level) == SETTINGS_TEXT_BYTES - 1);
    strcpy(line + head + SETTINGS_TEXT_BYTES - 1, "x\";");
    CHECK_STATUS(settings_parse(&s, line, "long.cfg"), ST_USER,
                 "policy.level is 1024 bytes long; at most 1023 fit");

    // a name of 100 kB is unknown, cut in the message, and harmless
    memset(text, 'a', 100000);
    strcpy(text + 100000, " = 1;");
    CHECK_STATUS(settings_parse(&s, text, "name.cfg"), ST_USER, "unknown setting \"aaaa");
    CHECK(strlen(status_message()) < 400);
    free(text);
}

static void test_set(void)
{
    struct settings s;
    settings_default(&s);
    CHECK_OK(settings_set(&s, "decode.slots=16"));
    CHECK(s.decode.slots == 16);
    CHECK_OK(settings_set(&s, "decode.seed=9007199254740992"));
    CHECK(s.decode.seed == INT64_C(9007199254740992));
    CHECK_OK(settings_set(&s, "policy.level=3,0-1.down_proj=4"));
    CHECK(strcmp(s.policy.level, "3,0-1.down_proj=4") == 0);
    CHECK_OK(settings_set(&s, "policy.level=4"));
    CHECK(strcmp(s.policy.level, "4") == 0);
    CHECK_OK(settings_set(&s, "policy.switches=\"0:4 85:3\""));
    CHECK(strcmp(s.policy.switches, "0:4 85:3") == 0);
    CHECK_OK(settings_set(&s, "policy.switches="));
    CHECK(s.policy.switches[0] == '\0');
    CHECK_OK(settings_set(&s, "policy.dial=1"));
    CHECK_OK(settings_set(&s, "decode.temperature=7e-1"));
    CHECK_NEAR(s.decode.temperature, 0.7, 0);
    CHECK_OK(settings_set(&s, "output.kv_features=true"));
    CHECK(s.output.kv_features);

    struct settings before = s;
    CHECK_STATUS(settings_set(&s, "decode.slots"), ST_USER, "expected key=value");
    CHECK_STATUS(settings_set(&s, "=4"), ST_USER, "expected key=value");
    CHECK_STATUS(settings_set(&s, "decode.slot=4"), ST_USER, "nearest is \"decode.slots\"");
    CHECK_STATUS(settings_set(&s, "decode=4"), ST_USER, "decode is a group");
    CHECK_STATUS(settings_set(&s, "decode.slots=4;decode.seed=1"), ST_USER, "expected a whole");
    CHECK_STATUS(settings_set(&s, "decode.slots= 4"), ST_USER, "expected a whole");
    CHECK_STATUS(settings_set(&s, "decode.slots="), ST_USER, "expected a whole");
    CHECK_STATUS(settings_set(&s, "decode.slots=4.5"), ST_USER, "4.5 (a float)");
    CHECK_STATUS(settings_set(&s, "decode.slots=99999999999999999999"), ST_USER, "a float");
    CHECK_STATUS(settings_set(&s, "decode.slots=4097"), ST_USER, "from 1 to 4096");
    CHECK_STATUS(settings_set(&s, "policy.dial=nan"), ST_USER, "from 0 to 1");
    CHECK_STATUS(settings_set(&s, "decode.temperature=inf"), ST_USER, "from 0 to 100");
    CHECK_STATUS(settings_set(&s, "decode.stop_at_eos=yes"), ST_USER, "true or false");
    CHECK_STATUS(settings_set(&s, "kv.format=f64"), ST_USER, "one of \"auto\"");
    char word[256] = "run.name=";
    memset(word + 9, 'n', 64);
    CHECK_STATUS(settings_set(&s, word), ST_USER, "at most 63 fit");
    CHECK(memcmp(&s, &before, sizeof s) == 0);
}

/* What is printed reads back to the same bytes, whatever the values are. */
static void test_round_trip(void)
{
    struct settings s, back;
    settings_default(&s);
    CHECK_OK(settings_set(&s, "model.path=a \"b\" \\c\\ \n\t\x01 \xc3\xa9 # // @include"));
    CHECK_OK(settings_set(&s, "decode.seed=123456789012"));
    CHECK_OK(settings_set(&s, "decode.temperature=0.1"));
    CHECK_OK(settings_set(&s, "policy.dial=0.33333333333333331"));
    CHECK_OK(settings_set(&s, "parallel.timeout_s=86400"));
    CHECK_OK(settings_set(&s, "parallel.reproducible=true"));
    for (int comments = 0; comments < 2; comments++) {
        char *text = NULL;
        CHECK_OK(settings_print(&text, &s, comments != 0));
        settings_default(&back);
        CHECK_OK(settings_parse(&back, text, "printed"));
        CHECK(memcmp(&s, &back, sizeof s) == 0);
        CHECK((strstr(text, "#") != strstr(text, "# //")) == (comments != 0));
        mem_free(text);
    }
    s.decode.temperature = 1e-7; // an exponent without a point is no float to every libconfig
    char *text = NULL;
    CHECK_OK(settings_print(&text, &s, false));
    CHECK_OK(settings_parse(&back, text, "printed"));
    CHECK_NEAR(back.decode.temperature, 1e-7, 0);
    mem_free(text);

    char value[64];
    const struct setting_row *row = NULL;
    settings_default(&s);
    for (int i = 0; (row = settings_row(i)) != NULL; i++) {
        settings_value(&s, row, value, sizeof value);
        const char *expected = strcmp(row->key, "backend.name") == 0            ? "\"cpu\""
                               : strcmp(row->key, "decode.temperature") == 0    ? "0.0"
                               : strcmp(row->key, "decode.max_new_tokens") == 0 ? "128"
                               : strcmp(row->key, "decode.stop_at_eos") == 0    ? "true"
                                                                                : NULL;
        CHECK(!expected || strcmp(value, expected) == 0);
    }
    settings_value(&s, settings_row(1), value, 4); // cut, not overrun
    CHECK(strcmp(value, "\"cp") == 0);
}

static void write_bytes(const char *path, const char *bytes, size_t n)
{
    FILE *out = fopen(path, "wb");
    if (CHECK(out != NULL)) {
        CHECK(fwrite(bytes, 1, n, out) == n);
        CHECK(fclose(out) == 0);
    }
}

static void test_read_file(void)
{
    char path[] = "test_settings_XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    close(fd);
    char *text = NULL;
    write_bytes(path, "decode.slots = 3;\n", 18);
    CHECK_OK(settings_read_file(&text, path));
    CHECK(text && strcmp(text, "decode.slots = 3;\n") == 0);
    mem_free(text);
    text = NULL;
    write_bytes(path, "", 0);
    CHECK_OK(settings_read_file(&text, path));
    CHECK(text && text[0] == '\0');
    mem_free(text);
    text = NULL;
    write_bytes(path, "a\0b", 3);
    CHECK_STATUS(settings_read_file(&text, path), ST_USER, "zero byte at offset 1");
    size_t big = ((size_t)1 << 20) + 1;
    char *bytes = malloc(big);
    memset(bytes, ' ', big);
    write_bytes(path, bytes, big);
    CHECK_STATUS(settings_read_file(&text, path), ST_USER, "larger than");
    free(bytes);
    CHECK(unlink(path) == 0);
    CHECK_STATUS(settings_read_file(&text, path), ST_IO, "No such file");
    CHECK_STATUS(settings_read_file(&text, "/"), ST_IO, "/: cannot");
    CHECK(text == NULL);
}

/* Random damage to a good file: any answer, but no crash and no change on refusal. */
static void test_mutations(void)
{
    struct settings defaults;
    settings_default(&defaults);
    char *text = NULL;
    CHECK_OK(settings_print(&text, &defaults, false));
    size_t n = strlen(text);
    char *damaged = malloc(n + 1);
    uint64_t state = 12345;
    for (int round = 0; round < 3000; round++) {
        memcpy(damaged, text, n + 1);
        for (int k = 0; k < 3; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            static const char alphabet[] = "\"\\{}()[]=;:,*.@/#0129eEx+-L\n az\x80";
            damaged[(state >> 20) % n] = alphabet[(state >> 50) % (sizeof alphabet - 1)];
        }
        struct settings s = defaults;
        if (settings_parse(&s, damaged, "damaged") != ST_OK) {
            CHECK(memcmp(&s, &defaults, sizeof s) == 0);
        }
    }
    free(damaged);
    mem_free(text);
}

static void test_committed(void)
{
    struct settings s, back;
    settings_default(&s);
    char *printed = NULL, *committed = NULL;
    CHECK_OK(settings_print(&printed, &s, true));
    CHECK_OK(settings_read_file(&committed, PMPD_SOURCE_DIR "/configs/default.cfg"));
    if (!CHECK(committed && strcmp(printed, committed) == 0)) {
        fprintf(stderr, "    configs/default.cfg is not what the table prints; write it anew with\n"
                        "    test_settings --print > configs/default.cfg\n");
    }
    settings_default(&back);
    CHECK_OK(settings_parse(&back, committed ? committed : "", "configs/default.cfg"));
    CHECK(memcmp(&s, &back, sizeof s) == 0);
    mem_free(printed);
    mem_free(committed);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--print") == 0) {
        struct settings s;
        settings_default(&s);
        char *text = NULL;
        if (settings_print(&text, &s, true) != ST_OK) {
            return 1;
        }
        fputs(text, stdout);
        mem_free(text);
        return 0;
    }
    test_defaults();
    test_table();
    test_files();
    test_refusals();
    test_sizes();
    test_set();
    test_round_trip();
    test_read_file();
    test_mutations();
    test_committed();
    return check_report();
}
