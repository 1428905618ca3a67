"""
From numbers per response to a table: subsets, macro averages as in Tables 1 to 3, and two standard errors, never one for the other.

    error over seeds    standard error of the mean over sampling seeds (ddof = 1): would another sampling of the same prompts say the same?
                        None for one seed.
    error over items    standard error over prompts, a prompt's value being its mean over seeds (ddof = 1): would other prompts say the
                        same? None where a subset has one prompt. Of a macro average of K subsets: sqrt(sum of their squares) / K.
"""

import math


def mean_and_error(values):
    """(mean, standard error of the mean with ddof = 1, or None for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def averaged(measured, quantities, wanted=()):
    """[(subset, seed, item, {quantity: number}), ...] -> {"subsets": {name: numbers}, "averages": {"All", "Helpful"}, "missing": {name: why}}

    Each quantity is averaged over the responses of one (subset, seed), then over subsets, then over the seeds that all these subsets
    have. numbers: n (responses), n_items (prompts), seeds, and per quantity QUANTITY, QUANTITY_error_over_seeds, QUANTITY_error_over_items.
    `wanted`: subsets that must be there. What cannot be computed is None, with its reason in "missing".
    """
    cells = {}
    for subset, seed, item, numbers in measured:
        cells.setdefault((subset, seed), []).append((item, numbers))
    subsets, seeds = list(dict.fromkeys([*(s for s, _ in cells), *wanted])), sorted({seed for _, seed in cells})
    missing = {}

    def over(label, names):
        if absent := [name for name in names if not any((name, seed) in cells for seed in seeds)]:
            missing[label] = f"nothing of the subset {', '.join(absent)}"
            return None
        complete = [seed for seed in seeds if all((name, seed) in cells for name in names)]
        if not complete:
            missing[label] = f"no seed that {', '.join(names)} share"
            return None
        rows = {name: [row for seed in complete for row in cells[name, seed]] for name in names}
        items = [{item for item, _ in some} for some in rows.values()]
        found = {"n": sum(map(len, rows.values())), "n_items": sum(map(len, items)), "seeds": complete}
        for q in quantities:
            of_seed = [sum(mean(numbers[q] for _, numbers in cells[name, seed]) for name in names) / len(names) for seed in complete]
            found[q], found[f"{q}_error_over_seeds"] = mean_and_error(of_seed)
            errors = [error_over_items(rows[name], q) for name in names]
            found[f"{q}_error_over_items"] = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(names)
        return found

    table = {name: over(name, [name]) for name in subsets}
    helpful = [name for name in subsets if name.lower().startswith("helpful")]
    averages = {"All": over("All", subsets), "Helpful": over("Helpful", helpful) if helpful else None}
    if not helpful:
        missing["Helpful"] = "no subset is named helpful*"
    return {"subsets": table, "averages": averages, "missing": missing}


def error_over_items(rows, quantity):
    """Standard error over items of [(item, numbers), ...], the rows of an item first made one."""
    items = {}
    for item, numbers in rows:
        items.setdefault(item, []).append(numbers[quantity])
    return mean_and_error([mean(values) for values in items.values()])[1]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def rows_to_print(table):
    """(name, numbers) of subsets and averages, and a line for each that is missing -> (rows, lines)."""
    rows = [(name, numbers) for name, numbers in table["subsets"].items() if numbers]
    rows += [(f"Avg. {name}", numbers) for name, numbers in table["averages"].items() if numbers]
    return rows, [f"no {name}: {why}" for name, why in table["missing"].items()]


def show(numbers, quantity, factor=1.0, digits=3):
    """'mean +- seeds, items' in three columns of 9, 10 and 10 characters; '-' for an error that does not exist."""
    errors = [numbers[f"{quantity}_error_over_{over}"] for over in ("seeds", "items")]
    texts = ["-" if error is None else f"{factor * error:.{digits}f}" for error in errors]
    return f"{factor * numbers[quantity]:9.{digits}f}" + "".join(f"{text:>10}" for text in texts)
