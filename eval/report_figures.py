"""
The pictures of report.html: numbers in, one <svg> string out. Hand-written SVG: the page needs no plotting library, no script and no font.

    curves      one line a run over steps                                   Figure 2
    intervals   a mean and an error bar a row                               Tables 1, 2
    ridges      one histogram a row over a common axis, linear or log10     Figure 3, the weights
    shares      win / tie / loss bars that add up to 100 %                  Figure 1

Every function takes rows of (name, colour, numbers); names come from users and are escaped here. Sizes are in SVG units, 1 = one CSS pixel
at full width. Colours are told apart by colour-blind readers too, and every picture also writes the names beside what they name.
"""

import math
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#6a3d9a", "#444444")
WIDTH, LEFT, RIGHT = 860, 170, 24  # of every picture; LEFT holds the names of the rows
WIN, TIE, LOSS = "#009e73", "#c9c9c9", "#d55e00"


def ticks(low, high, about=6):
    """Round numbers 1, 2, 2.5 or 5 times a power of ten apart that lie in [low, high]."""
    span = (high - low) or 1.0
    unit = 10 ** math.floor(math.log10(span / about))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Powers of ten (1, 2, 5 times them where few fit) in [low, high], which are log10 values -> [(log10, label)]."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 4 else (1,)
    every = max(1, len(decades) // 9)
    marks = [(n + math.log10(m), m * 10.0**n) for n in decades if n % every == 0 for m in steps]
    return [(at, f"{value:g}") for at, value in marks if low <= at <= high]


def padded(values, zero=False):
    """[low, high] around values with 5 % of room; `zero`: including 0. One value alone gets room too."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return (low if zero and low == 0 else low - room), high + room


def scale(low, high, start, end):
    return lambda value: round(start + (value - low) / ((high - low) or 1.0) * (end - start), 2)


def text(x, y, words, anchor="start", more=""):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(str(words))}</text>'


def line(x1, y1, x2, y2, colour="#e2e2e2", width=1):
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"/>'


def drawing(parts, height, title):
    """The whole <svg>; `title` is read aloud by screen readers."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}" xmlns="http://www.w3.org/2000/svg">'
        + "".join(parts)
        + "</svg>"
    )


def bottom_axis(x, marks, top, bottom, label):
    """Grid lines at `marks` ([(value, label)]), their labels below, the axis' name below them."""
    parts = []
    for value, words in marks:
        parts += [line(x(value), top, x(value), bottom), text(x(value), bottom + 16, words, "middle")]
    return parts + [text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, label, "middle", 'class="axis"')]


def curves(series, xlabel, ylabel, height=300):
    """series: [(name, colour, [(x, y), ...])] -> a line with points each, its name at its end."""
    top, bottom, right = 14, height - 46, WIDTH - 170
    points = [point for _, _, some in series for point in some]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = padded([y for _, y in points])
    x, y = scale(x_low, x_high, 80, right), scale(y_low, y_high, bottom, top)
    parts = []
    for value in ticks(y_low, y_high):
        parts += [line(80, y(value), right, y(value)), text(72, y(value) + 4, f"{value:g}", "end")]
    for value in ticks(x_low, x_high, 8):
        parts += [line(x(value), bottom, x(value), bottom + 4, "#888"), text(x(value), bottom + 18, f"{value:g}", "middle")]
    parts.append(text((80 + right) / 2, bottom + 38, xlabel, "middle", 'class="axis"'))
    parts.append(text(0, 0, ylabel, "middle", f'class="axis" transform="translate(16 {(top + bottom) / 2}) rotate(-90)"'))
    ends = spread([y(some[-1][1]) for _, _, some in series], 16, bottom)
    for (name, colour, some), end in zip(series, ends):
        places = [(x(a), y(b)) for a, b in some]
        parts.append(f'<polyline points="{" ".join(f"{a},{b}" for a, b in places)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a}" cy="{b}" r="3" fill="{colour}"/>' for a, b in places if len(places) <= 60]
        parts += [line(places[-1][0] + 4, places[-1][1], right + 14, end, colour), text(right + 18, end + 4, short(name, 20), more=f'fill="{colour}"')]
    return drawing(parts, height, f"{ylabel} over {xlabel}")


def spread(places, gap, high):
    """The same places moved apart to at least `gap`, none beyond `high`: labels that do not lie on each other."""
    order, moved, limit = sorted(range(len(places)), key=lambda i: places[i]), list(places), high
    for before, i in zip(order, order[1:]):
        moved[i] = max(moved[i], moved[before] + gap)
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def short(name, most=24):
    return name if len(name) <= most else f"{name[: most - 1]}…"


def intervals(rows, xlabel):
    """rows: [(name, colour, mean, error, wider error)], errors may be None -> a dot, a thick bar of +- error, a thin one of +- the other.

    Without the first error the dot is hollow.
    """
    bottom = 10 + 28 * len(rows)
    low, high = padded([mean + sign * (error or 0) for _, _, mean, *errors in rows for error in errors for sign in (-1, 1)])
    x = scale(low, high, LEFT, WIDTH - RIGHT - 130)
    parts = bottom_axis(x, [(v, f"{v:g}") for v in ticks(low, high)], 6, bottom, xlabel)
    for i, (name, colour, mean, *errors) in enumerate(rows):
        middle = 20 + 28 * i
        parts.append(text(LEFT - 12, middle + 4, short(name), "end"))
        for error, width in zip(errors, (5, 1.5)):
            if error is not None:
                a, b = x(mean - error), x(mean + error)
                parts += [line(a, middle, b, middle, colour, width), line(a, middle - 5, a, middle + 5, colour, 1.5), line(b, middle - 5, b, middle + 5, colour, 1.5)]
        inside = colour if errors[0] is not None else "#fff"
        parts.append(f'<circle cx="{x(mean)}" cy="{middle}" r="5" fill="{inside}" stroke="{colour}" stroke-width="2"/>')
        known = [error for error in errors if error]
        digits = min(3, max(0, 1 - math.floor(math.log10(min(known))))) if known else 2  # two figures of the smaller error
        words = f"{mean:.{digits}f}" + (" ± " + " / ".join("–" if e is None else f"{e:.{digits}f}" for e in errors) if known else "")
        parts.append(text(WIDTH, middle + 4, words, "end"))
    return drawing(parts, bottom + 44, xlabel)


def ridges(rows, xlabel, log=False, whole=False, limits=None, bins=40):
    """rows: [(name, colour, values, note)] -> a histogram each (share of its own values) over one axis, its mean marked, `note` at the right.

    log: the axis is log10 of the values; what underflowed to 0 stands at the left edge. whole: the values are whole numbers, no bin cuts one in
    two. limits: the axis' ends, else those of the values.
    """
    least = min((v for _, _, values, _ in rows for v in values if v > 0), default=1.0)
    moved = [[math.log10(max(v, least)) for v in values] if log else list(values) for _, _, values, _ in rows]
    low, high = limits or (min(map(min, moved)), max(map(max, moved)))
    if high == low:
        low, high = low - 0.5, high + 0.5
    size = (high - low) / bins
    if whole:
        size = max(1, math.ceil((high - low + 1) / bins))
        low, bins = low - 0.5, math.ceil((high - low + 1) / size)
    high = low + bins * size
    x, tall = scale(low, high, LEFT, WIDTH - RIGHT - 110), 54
    bottom = 8 + (tall + 8) * len(rows)
    marks = log_ticks(low, high) if log else [(v, f"{v:g}") for v in ticks(low, high, 8) if not whole or v == int(v)]
    parts = bottom_axis(x, marks, 4, bottom, xlabel)
    shares = []
    for values in moved:
        counts = [0] * bins
        for value in values:
            counts[min(bins - 1, max(0, int((value - low) / size)))] += 1
        shares.append([count / len(values) for count in counts])
    highest = max(map(max, shares))
    for i, ((name, colour, values, note), share) in enumerate(zip(rows, shares)):
        floor = 8 + (tall + 8) * (i + 1) - 4
        path = [f"M{x(low)},{floor}"]
        for b, part in enumerate(share):
            height = round(floor - part / highest * tall, 2)
            path += [f"L{x(low + b * size)},{height}", f"L{x(low + (b + 1) * size)},{height}"]
        path.append(f"L{x(high)},{floor}Z")
        mean = sum(values) / len(values)
        at = x(min(max(math.log10(mean or least) if log else mean, low), high))
        parts.append(f'<path d="{"".join(path)}" fill="{colour}" fill-opacity="0.35" stroke="{colour}"/>')
        parts += [line(at, floor - tall, at, floor, colour, 2.5), text(LEFT - 12, floor - 14, short(name), "end"), text(WIDTH, floor - 14, note, "end")]
    return drawing(parts, bottom + 44, xlabel)


def shares(rows, xlabel):
    """rows: [(name, (win, tie, loss) that add up to 1, error of win or None)] -> a bar each, with the error of the win share."""
    bottom = 30 + 34 * len(rows)
    x = scale(0, 100, LEFT, WIDTH - RIGHT)
    parts = bottom_axis(x, [(v, f"{v} %") for v in range(0, 101, 20)], 24, bottom, xlabel)
    for n, (word, colour) in enumerate((("win", WIN), ("tie", TIE), ("loss", LOSS))):
        parts.append(f'<rect x="{LEFT + 80 * n}" y="2" width="12" height="12" fill="{colour}"/>' + text(LEFT + 80 * n + 18, 12, word))
    for i, (name, parts_of_1, error) in enumerate(rows):
        top, start = 30 + 34 * i, 0.0
        parts.append(text(LEFT - 12, top + 16, short(name), "end"))
        for share, colour in zip(parts_of_1, (WIN, TIE, LOSS)):
            wide = round(x(100 * share) - LEFT, 2)
            parts.append(f'<rect x="{x(100 * start)}" y="{top}" width="{wide}" height="24" fill="{colour}"/>')
            if wide > 44:
                ink = "#222" if colour == TIE else "#fff"
                parts.append(text(x(100 * (start + share / 2)), top + 16, f"{100 * share:.0f} %", "middle", f'fill="{ink}"'))
            start += share
        if error:
            a, b = (x(100 * min(1, max(0, parts_of_1[0] + sign * error))) for sign in (-1, 1))
            parts += [line(a, top + 20, b, top + 20, "#000", 2), line(a, top + 16, a, top + 24, "#000", 2), line(b, top + 16, b, top + 24, "#000", 2)]
    return drawing(parts, bottom + 44, xlabel)
