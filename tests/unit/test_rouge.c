/* ROUGE-L against values worked out by hand. SPDX-License-Identifier: Apache-2.0
 */
#include "core/rouge.h"
#include "tests/check.h"

static void expect(const char *text, const char *reference, double f1)
{
    double found = -1;
    CHECK_OK(rouge_l(&found, text, reference));
    CHECK_NEAR(found, f1, 1e-12);
    CHECK_OK(rouge_l(&found, reference, text));
    CHECK_NEAR(found, f1, 1e-12);
}

int main(void)
{
    expect("", "", 0);
    expect("one", "", 0);
    expect("...", "one", 0);
    expect("One, two!", "one two", 1);
    expect("the cat sat", "the dog sat", 2.0 / 3);
    /* LCS "police the gunman" of 4 and 4; "police kill the gunman" against Lin's examples */
    expect("police kill the gunman", "police killed the gunman", 3.0 / 4);
    expect("the gunman kill police", "police killed the gunman", 2.0 / 4);
    expect("a b c d e f", "b d f x", 2 * 3.0 / 10);
    expect("Caf\xc3\xa9 au lait", "caf\xc3\xa9 lait", 4.0 / 5);
    expect("testing one two", "testing", 0.5);
    return check_report();
}
