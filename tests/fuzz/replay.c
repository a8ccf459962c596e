/* Runs an entry over files and folders of inputs, once each, as libFuzzer does with its corpus. An
 * input that breaks a promise ends the program; its name is the last line on stderr.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tests/fuzz/fuzz.h"
#include "tests/gen.h"

enum { STATUS_OK = 0, STATUS_BAD = 1 };
static int n_inputs;

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size)
{
    (void)data;
    return size < max_size ? size : max_size; // nobody calls it: inputs run as they are
}

static int run_file(const char *path)
{
    size_t bytes = 0;
    char *text = gen_read_file(path, &bytes);
    if (!text) {
        perror(path);
        return STATUS_BAD;
    }
    fprintf(stderr, "%s\n", path);
    // of its own size, so that a sanitizer sees every step beyond the end
    uint8_t *exact = malloc(bytes ? bytes : 1);
    INVARIANT(exact != NULL);
    memcpy(exact, text, bytes);
    free(text);
    LLVMFuzzerTestOneInput(exact, bytes);
    free(exact);
    n_inputs++;
    return STATUS_OK;
}

static int run_path(const char *path)
{
    struct dirent **entry = NULL;
    struct stat info;
    int bad = STATUS_OK;
    if (stat(path, &info) == 0 && !S_ISDIR(info.st_mode)) {
        return run_file(path);
    }
    int n = scandir(path, &entry, NULL, alphasort);
    if (n < 0) {
        perror(path);
        return STATUS_BAD;
    }
    for (int i = 0; i < n; i++) {
        char file[GEN_PATH_BYTES];
        if (entry[i]->d_name[0] != '.') {
            bad |= run_file(gen_path(file, path, entry[i]->d_name));
        }
        free(entry[i]);
    }
    free(entry);
    return bad;
}

int main(int argc, char **argv)
{
    int bad = STATUS_OK;
    for (int i = 1; i < argc; i++) {
        bad |= run_path(argv[i]);
    }
    printf("%d inputs\n", n_inputs);
    return bad || n_inputs == 0 ? STATUS_BAD : STATUS_OK;
}
