#!/usr/bin/env python3
"""Writes llmc/files/unicode_classes.h: what GPT-2's pre-tokenization takes for letters, numbers and space.

    pip install unicodedata2==16.0.0      # or a Python whose unicodedata is 16.0.0
    python3 dev/make_unicode_classes.py

Source: the Unicode Character Database through Python's unicodedata. The version is pinned: with 16.0.0 every
code point falls into the class that tiktoken 0.14 and Hugging Face's tokenizers 0.23 give it.
"""
import sys
from itertools import groupby

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

VERSION = "16.0.0"
CLASSES = ["OTHER", "LETTER", "NUMBER", "SPACE"]
PATH = "llmc/files/unicode_classes.h"

HEADER = """/*
Unicode classes of GPT-2's pre-tokenization: \\p{{L}} (letter), \\p{{N}} (number), \\s (White_Space), rest.
Unicode {version}. Made by dev/make_unicode_classes.py from the Unicode Character Database: do not edit.

Shapes: classes [UNICODE_SIZE], one byte a code point. Errors: none.
*/
#ifndef UNICODE_CLASSES_H
#define UNICODE_CLASSES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
// defines: size_t, uint8_t, memset

#define UNICODE_VERSION "{version}"
#define UNICODE_SIZE 0x110000

enum {{ {names} }};

static inline void unicode_fill_classes(uint8_t *classes) {{
    // runs of equal class from code point 0 on: 4 * length + class
    // clang-format off
    static const uint32_t runs[] = {{
{runs}
    }};
    // clang-format on
    size_t at = 0;
    for (size_t i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {{
        memset(classes + at, (int)(runs[i] & 3), runs[i] >> 2);
        at += runs[i] >> 2;
    }}
}}

#endif
"""


def class_of(code):
    category = unicodedata.category(chr(code))
    if category[0] in "LN":
        return "LETTER" if category[0] == "L" else "NUMBER"
    # the property White_Space: all separators, and the controls that move the cursor
    space = category[0] == "Z" or 0x09 <= code <= 0x0D or code == 0x85
    return "SPACE" if space else "OTHER"


def wrap(words, width):
    lines, line = [], ""
    for word in words:
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = ""
        line += (" " if line else "        ") + word
    return "\n".join(lines + [line])


def main():
    if unicodedata.unidata_version != VERSION:
        sys.exit(f"error: this Python knows Unicode {unicodedata.unidata_version}, expected {VERSION}\n"
                 f"  ---> pip install unicodedata2=={VERSION}")
    groups = groupby(map(class_of, range(0x110000)))
    runs = [4 * len(list(group)) + CLASSES.index(name) for name, group in groups]
    names = ", ".join(f"UNICODE_{name}" for name in CLASSES)
    text = HEADER.format(version=VERSION, names=names, runs=wrap([f"{run}," for run in runs], 110))
    with open(PATH, "w", encoding="ascii") as file:
        file.write(text)
    print(f"{PATH}: Unicode {VERSION}, {len(runs)} runs")


if __name__ == "__main__":
    main()
