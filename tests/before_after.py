"""One picture that shows what an adapter learnt. The quick start writes it.

    python tests/before_after.py REAL BEFORE AFTER OUT.png

The first row are real images, below them what was drawn of their captions before and after.
BEFORE and AFTER are folders of sample.py, drawn by the same command but for the adapter.
"""

import sys
from collections import Counter
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metrics import list_images, read_image
from sample import contact_sheet

COLUMNS = 8


def pick(rows):
    """The numbers of COLUMNS rows: the first of each caption, evenly, before any second one."""
    seen = Counter()
    turns = []
    for number, row in enumerate(rows):
        turns.append((seen[row.caption], number))
        seen[row.caption] += 1
    numbers = [number for _, number in sorted(turns)]
    step = max(1, len(seen) // COLUMNS)
    return numbers[: step * COLUMNS : step]


def find_real(reals, wanted):
    """For each wanted row a real one, no one twice: of its caption, else of its label, else any."""
    left = list(reals)
    found = []
    for row in wanted[: len(left)]:
        likeness = [(row.caption == real.caption, row.label == real.label) for real in left]
        found.append(left.pop(likeness.index(max(likeness))))
    return found


def draw_row(rows, name):
    return contact_sheet([(read_image(row.path), row.caption, name) for row in rows])


def main(real, before, after, out):
    old, new = list_images(before), list_images(after)
    numbers = pick(new)
    new = [new[number] for number in numbers]
    old = [old[number] for number in numbers]
    sheets = [
        draw_row(find_real(list_images(real), new), "real"),
        draw_row(old, "before"),
        draw_row(new, "after"),
    ]
    size = (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets))
    picture = Image.new("RGB", size, "white")
    top = 0
    for sheet in sheets:
        picture.paste(sheet, (0, top))
        top += sheet.height
    picture.save(out)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(f"error: give REAL BEFORE AFTER OUT.png, not {len(sys.argv) - 1} arguments")
    main(*sys.argv[1:])
