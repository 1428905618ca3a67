"""What the subcommands share about files: JSON lines, the rows that `eval.py generate` wrote, what a result was made of."""

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from formats import InputError

COLUMNS = {"id": str, "subset": str, "seed": int, "prompt": list, "response": str, "response_tokens": int, "finished": bool}


def read_jsonl(path, torn_end=False):
    """Rows of a JSONL file. `torn_end`: an unreadable last line (a killed writer) is skipped instead of refused."""
    rows = []
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    lines = text.removesuffix(b"\n").split(b"\n")  # texts may hold U+2028 and others where splitlines() of a str cuts
    for i, line in enumerate(lines if lines != [b""] else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # a torn line may end inside a UTF-8 character
            if not (torn_end and i == len(lines)):
                raise InputError(f"{path}:{i}: not valid JSON ({error})") from None
    return rows


def write_jsonl(path, rows):
    """Write JSON lines by atomic rename."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def write_json(path, value):
    """Write a JSON file by atomic rename; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_generations(path, flag="--gen"):
    """Rows that `eval.py generate` wrote. InputError: no rows, a row of another shape, an id twice; with file and line."""
    rows, seen = read_jsonl(path), {}
    if not rows:
        raise InputError(f"{path}: no rows")
    for i, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {}
        if missing := [name for name in COLUMNS if name not in row]:
            raise InputError(f"{path}:{i}: no column {missing[0]!r}; {flag} takes files that `eval.py generate` wrote")
        if wrong := [name for name, kind in COLUMNS.items() if not isinstance(row[name], kind)]:
            kind = COLUMNS[wrong[0]].__name__
            raise InputError(f"{path}:{i}: {wrong[0]} must be a {kind}; {flag} takes files that `eval.py generate` wrote")
        if row["id"] in seen:
            raise InputError(f"{path}:{i}: the id {row['id']} stands in line {seen[row['id']]} already; remove one of them")
        seen[row["id"]] = i
    return rows


def item_of(row):
    """What the rows of one prompt share, whatever their seed: the id without its seed."""
    return row["id"].rsplit("/", 1)[0]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def inputs_sha256(*paths):
    """{path: hash} of those that are files; hub names and folders have fingerprints of their own in the settings."""
    return {str(path): sha256(path) for path in paths if path and os.path.isfile(path)}


def dtype_of(dtype, args):
    """What the settings of a result call the weights' type."""
    return "nf4" if args.load_in_4bit else dtype


def versions(*packages):
    """{name: version} of python and the packages; None = not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
