"""Print core/unicode_table.c: make_unicode_table.py > unicode_table.c

The canonical decompositions and combining classes of Unicode, from Python's own copy of the
Unicode Character Database. SPDX-License-Identifier: Apache-2.0
"""
import sys
import unicodedata


def excluded(code, first, second):
    """A pair that NFC never puts together again (composition exclusions)."""
    return unicodedata.normalize("NFC", chr(first) + chr(second)) != chr(code)


def columns(items, per_line):
    for i in range(0, len(items), per_line):
        yield "    " + " ".join(items[i:i + per_line])


def main():
    pairs, marks = [], []
    for code in range(0x110000):
        if 0xAC00 <= code <= 0xD7A3:  # Hangul syllables are arithmetic
            continue
        text = unicodedata.decomposition(chr(code))
        if text and not text.startswith("<"):
            parts = [int(p, 16) for p in text.split()]
            first, second = parts[0], parts[1] if len(parts) > 1 else 0
            composes = len(parts) == 2 and not excluded(code, first, second)
            pairs.append((code, first, second, int(composes)))
        kind = unicodedata.combining(chr(code))
        if kind:
            if marks and marks[-1][2] == kind and marks[-1][1] == code - 1:
                marks[-1][1] = code
            else:
                marks.append([code, code, kind])
    out = [f"/* Canonical decompositions and combining classes, Unicode {unicodedata.unidata_version}.",
           " * Source: the Unicode Character Database; written by core/make_unicode_table.py.",
           " * SPDX-License-Identifier: Apache-2.0",
           " */",
           '#include "core/unicode_table.h"',
           "",
           "/* clang-format off */",
           f"const int32_t unicode_n_decompositions = {len(pairs)};",
           "const struct unicode_decomposition unicode_decomposition[] = {"]
    out += columns(["{0x%X,0x%X,0x%X}," % p[:3] for p in pairs], 4)
    order = sorted((p for p in pairs if p[3]), key=lambda p: p[1:3])
    place = {p: i for i, p in enumerate(pairs)}
    out += ["};", "", f"const int32_t unicode_n_compositions = {len(order)};",
            "const int16_t unicode_composition[] = {"]
    out += columns(["%d," % place[p] for p in order], 16)
    out += ["};", "", f"const int32_t unicode_n_mark_ranges = {len(marks)};",
            "const struct unicode_mark_range unicode_mark_range[] = {"]
    out += columns(["{0x%X,0x%X,%d}," % tuple(m) for m in marks], 4)
    out += ["};"]
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
