"""
Preference files of any known shape -> records (prompt messages, responses, scores), or a counted reason why not.

    for record in read_records("pairs.jsonl", report := Report()): ...
    print(report)

Sources: a .jsonl, .jsonl.gz, .json (array or lines) or .parquet file, a folder saved by `datasets`, or a hub name (NAME or
NAME:FOLDER). Shapes, recognised by their columns, in this order:

    instruction, output_1, output_2, label                 OffsetBias; label 1 or 2 says which output is the better
    instruction | prompt, completions [{response, ...}]    UltraFeedback; score = mean annotation rating, else fine-grained_score,
                                                           else overall_score (ratings are strings, "N/A" is no rating)
    prompt, responses, scores                              any number of responses, one number each
    [prompt | instruction (+ input)], chosen, rejected     strings or message lists; without a prompt column the prompt is inside:
                                                           message lists, or HH strings "\\n\\nHuman: ... \\n\\nAssistant: ..."
    prompt, completion, label                              label true = desirable (KTO)
    prompt | instruction (+ input), response | output [, reward | score]
    messages                                               the last assistant turn is the response
    prompt | instruction (+ input) [, id], nothing else    a question to answer: for eval.py generate and baselines/grpo.py

A prompt is a list of {"role", "content"} messages; a string is one user message, or a dialogue if it is written as HH does.
Nothing is guessed: rows that fit no shape stop the program with their line, rows that cannot be used are dropped and counted.
"""

import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, remedy."""


class Unusable(Exception):
    """One row that cannot be used: the reason, a few words that many rows can share."""


@dataclass(slots=True)
class Record:
    """One prompt with its responses. `chosen`, `rejected`: indices into `responses` where the data states a preference."""

    prompt: list  # messages: [{"role": "system" | "user" | "assistant", "content": str}, ...], the last one not the assistant's
    responses: list  # strings
    where: str  # "file:row", for messages to the user
    scores: list | None = None  # a number (or None) per response, higher is better; None = the data has no scores
    chosen: int | None = None
    rejected: int | None = None
    desirable: list | None = None  # a bool per response (KTO's label)
    weights: list | None = None  # a number per response, of the column the caller named


@dataclass
class Report:
    """How many rows came in, and why some did not: reason -> how often, and where first. With `strict` the first one stops the program."""

    strict: bool = False
    rows: int = 0
    dropped: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)

    def drop(self, reason, where):
        if self.strict:
            raise InputError(f"{where}: {reason} (--strict stops at the first unusable row; without it such rows are dropped and counted)")
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def __str__(self):
        lines = [f"{self.rows:,} rows read"]
        return "\n".join(lines + [f"  dropped {n:,}: {reason} (first at {self.first[reason]})" for reason, n in self.dropped.most_common()])


def run(main):
    """Run a program's main(): user errors become one line and exit status 2, Ctrl-C becomes 130. Bugs keep their traceback."""
    rank = os.environ.get("RANK", "0")
    try:
        sys.exit(main())
    except InputError as error:
        message = " ".join(str(error).split())
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain once more when it flushes
        sys.exit(141)
    except KeyboardInterrupt:
        print(f"\n{os.path.basename(sys.argv[0])}: interrupted; what was written is kept", file=sys.stderr)
        sys.exit(130)
    # Out here the error is gone, and with its frames the open progress bars: they would write below the message.
    tag = f" [process {rank}]" if rank != "0" else ""
    print(f"{os.path.basename(sys.argv[0])}{tag}: error: {message}", file=sys.stderr)
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Files -> rows


def read_rows(source, split="train"):
    """Yield (where, row) for every row of a file, a folder saved by `datasets`, or a hub dataset. `where` is "file:row", rows from 1."""
    name = os.path.basename(os.fspath(source).rstrip("/"))
    if os.path.isdir(source):
        try:
            data = _import_datasets(source).load_from_disk(source)
        except OSError as error:
            raise InputError(f"{source}: not a folder saved by `datasets` ({error})") from None
        if hasattr(data, "keys"):  # a DatasetDict
            if split not in data:
                raise InputError(f"{source}: no split {split!r}; it has {', '.join(data)}; choose one with --split")
            data = data[split]
        yield from ((f"{name}:{i}", row) for i, row in enumerate(data, 1))
    elif os.path.isfile(source):
        if source.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
            yield from _read_json(source, name)
        elif source.endswith(".parquet"):
            try:
                import pyarrow.parquet as parquet
            except ImportError:
                raise InputError(f"{source}: .parquet files need the optional package `datasets`: pip install datasets") from None
            try:
                batches = parquet.ParquetFile(source).iter_batches(1024)
            except (OSError, ValueError) as error:
                raise InputError(f"{source}: not a readable parquet file ({error})") from None
            yield from ((f"{name}:{i}", row) for i, row in enumerate((r for b in batches for r in b.to_pylist()), 1))
        else:
            raise InputError(f"{source}: unknown file type; known are .jsonl, .jsonl.gz, .json, .parquet and a folder saved by `datasets`")
    elif source.endswith((".jsonl", ".gz", ".json", ".parquet")) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InputError(f"{source}: no such file or folder")
    else:  # a hub name, NAME or NAME:FOLDER (Anthropic/hh-rlhf:helpful-base)
        hub, _, folder = source.partition(":")
        try:
            data = _import_datasets(source).load_dataset(hub, data_dir=folder or None, split=split, streaming=True)
            yield from ((f"{source}:{i}", row) for i, row in enumerate(data, 1))
        except (OSError, ValueError, RuntimeError) as error:  # offline, misspelt, private, no such split: the library's own words say which
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{source}: neither a file here nor a readable hub dataset ({type(error).__name__}: {str(error)[:200]})"
            ) from None


def _import_datasets(source):
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{source}: reading this needs the optional package `datasets`: pip install datasets (or pass a .jsonl file)"
        ) from None
    return datasets


def _read_json(source, name):
    opener = gzip.open if source.endswith(".gz") else open
    try:
        with opener(source, "rt", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):  # one array, whatever the file is called
                for i, row in enumerate(json.load(file), 1):
                    yield f"{name}:{i}", row
                return
            for i, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{name}:{i}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise InputError(
                            f"{name}:{i}: not valid JSON ({error.msg} at column {error.colno}); mend or remove this line"
                        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); the file must be one array or one object a line"
        ) from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{name}: cannot be read as UTF-8 text ({error})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Rows -> records


def read_records(source, report, split="train", weight_column=None):
    """Yield a `Record` per usable row of `source`; `report` counts the others. InputError: a bad file, an unknown shape, no usable row.

    `weight_column`: a number per row, or a list with one for each response; rows without it are not usable.
    """
    usable = 0
    for where, row in read_rows(source, split):
        report.rows += 1
        if not isinstance(row, dict):
            raise InputError(f"{where}: a row must be an object with named columns, got {type(row).__name__}")
        try:
            record = to_record(row, where)
            if weight_column:
                record.weights = _weights(row, weight_column, len(record.responses))
            record = _without_blank_responses(record, report)
            "".join([m["content"] for m in record.prompt] + record.responses).encode()
        except Unusable as reason:
            report.drop(str(reason), where)
            continue
        except UnicodeEncodeError:
            report.drop("text that is not valid Unicode (half of a surrogate pair)", where)
            continue
        usable += 1
        yield record
    if not usable:
        why = "; ".join(f"{n} x {reason}" for reason, n in report.dropped.most_common(3)) or "it is empty"
        raise InputError(f"{source}: no usable row among {report.rows} ({why})")


def to_record(row, where):
    """One row of any known shape -> Record. Raises Unusable (drop the row) or InputError (the file has an unknown shape)."""
    has = lambda *columns: all(row.get(column) is not None for column in columns)
    if has("instruction", "output_1", "output_2") and "label" in row:
        better = {"1": 0, "2": 1}.get(_label(row))
        if better is None:
            raise Unusable("label is neither 1 nor 2")
        outputs = [_text(row["output_1"]), _text(row["output_2"])]
        record = Record(_prompt(row, where), outputs, where, chosen=better, rejected=1 - better)
    elif has("completions") and (has("instruction") or has("prompt")):
        responses, scores = [], []
        for completion in _list(row["completions"]):
            if not isinstance(completion, dict):
                raise Unusable("a completion is not an object")
            responses.append(_text(completion.get("response")))
            scores.append(_ultrafeedback_score(completion))
        record = Record(_prompt(row, where), responses, where, scores=scores)
    elif has("prompt", "responses", "scores"):
        if len(_list(row["responses"])) != len(_list(row["scores"])):
            raise Unusable("responses and scores differ in number")
        record = Record(_prompt(row, where), [_text(r) for r in row["responses"]], where, scores=[_number(s) for s in row["scores"]])
    elif has("chosen", "rejected"):
        record = _pair(row, where)
    elif has("prompt", "completion") and "label" in row:
        prompt, (response,) = _split_prompt(row, where, row["completion"])
        good, bad = ("1", "true", "desirable"), ("0", "false", "undesirable")
        if _label(row) not in good + bad:
            raise Unusable("label is neither true nor false")
        record = Record(prompt, [response], where, desirable=[_label(row) in good])
    elif (has("prompt") or has("instruction")) and (has("response") or has("output")):
        prompt, (response,) = _split_prompt(row, where, row["response"] if has("response") else row["output"])
        score = next((_number(row[name]) for name in ("reward", "score") if has(name)), None)
        record = Record(prompt, [response], where, scores=None if score is None else [score])
    elif has("messages"):
        prompt, (response,) = _split_prompt({}, where, row["messages"])
        record = Record(prompt, [response], where)
    elif set(row) <= {"prompt", "instruction", "input", "id"} and any(row.values()):
        record = Record(_prompt(row, where), [], where)
    elif None in row.values():
        raise Unusable("a needed column is null")
    else:
        shapes = (
            "prompt/chosen/rejected, prompt/response, prompt/responses/scores, prompt/completion/label, instruction/completions, messages"
        )
        raise InputError(
            f"{where}: unknown format, columns are {', '.join(sorted(row)) or 'none'}; known are {shapes} (see the header of formats.py)"
        )
    return record


def _pair(row, where):
    """chosen and rejected as strings, HH transcripts or message lists, with the prompt beside or inside them."""
    prompt, responses = _split_prompt(row, where, row["chosen"], row["rejected"])
    scores = [_number(row[name]) for name in ("score_chosen", "score_rejected") if row.get(name) is not None]
    return Record(prompt, responses, where, scores=scores if len(scores) == 2 else None, chosen=0, rejected=1)


def _split_prompt(row, where, *answers):
    """(prompt messages, response strings) of answers that may carry the prompt inside. Unusable: answers to different prompts."""
    prompt = _prompt(row, where) if row.get("prompt") is not None or row.get("instruction") is not None else None
    prompts, responses = [], []
    for answer in answers:
        if isinstance(answer, str) and prompt is None and not answer.startswith("\n\nHuman:"):
            raise InputError(
                f"{where}: chosen/rejected are plain strings and there is no prompt column; add one (a common beginning is no prompt)"
            )
        turns = parse_hh(answer) if isinstance(answer, str) and answer.startswith("\n\nHuman:") else answer
        if isinstance(turns, list):
            turns = _messages(turns)
            if turns[-1]["role"] != "assistant":
                raise Unusable("the last turn is not the assistant's")
            # the whole conversation, or only the answer to the prompt column
            prompts.append(turns[:-1] or prompt)
            responses.append(turns[-1]["content"])
        else:
            prompts.append(prompt)
            responses.append(_text(answer))
    if any(p != prompts[0] for p in prompts) or (prompt is not None and _bare(prompts[0]) != _bare(prompt)):
        raise Unusable("chosen and rejected answer different prompts")
    return _ends_with_user(prompts[0] or []), responses


def _bare(messages):
    """Conversation without its system turn, stripped: a prompt column rarely repeats the system turn of the message list beside it."""
    return [(m["role"], m["content"].strip()) for m in messages if m["role"] != "system"]


def _prompt(row, where):
    """The prompt column (or instruction, plus input if there is one) -> messages that end with the user's turn."""
    value = row["prompt"] if row.get("prompt") is not None else row.get("instruction")
    if isinstance(value, list):
        messages = _messages(value)
    elif isinstance(value, str) and value.startswith("\n\nHuman:"):
        messages = parse_hh(value)
        if messages[-1] == {"role": "assistant", "content": ""}:  # "... \n\nAssistant:" waits for the answer
            messages.pop()
    else:
        text = _text(value)
        if isinstance(row.get("input"), str) and row["input"].strip():
            text = text.rstrip() + "\n\n" + row["input"]
        messages = [{"role": "user", "content": text}]
    return _ends_with_user(messages)


def _ends_with_user(messages):
    if not messages or messages[-1]["role"] == "assistant" or not messages[-1]["content"].strip():
        raise Unusable("the prompt is empty or does not end with the user's turn")
    return messages


def parse_hh(text):
    """An HH transcript -> messages. Unusable unless Human and Assistant take turns and the turns put together again are the text.

    Only "\\n\\nHuman:" and "\\n\\nAssistant:" at the start of a paragraph mark a turn; the same word inside a line is text.
    """
    parts = re.split(r"\n\n(Human|Assistant):", text)  # ["", "Human", " hello", "Assistant", " hi", ...]
    speakers, contents = parts[1::2], parts[2::2]
    if parts[0] or any(s != ("Human", "Assistant")[i % 2] for i, s in enumerate(speakers)):
        raise Unusable("Human and Assistant do not take turns")
    assert "".join(f"\n\n{s}:{c}" for s, c in zip(speakers, contents)) == text
    return [{"role": "user" if s == "Human" else "assistant", "content": c.strip()} for s, c in zip(speakers, contents)]


def _messages(turns):
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in ("system", "user", "assistant")
            or not isinstance(turn.get("content"), str)
        ):
            raise Unusable('a message is not {"role": system | user | assistant, "content": text}')
    if not turns:
        raise Unusable("an empty message list")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _text(value):
    if not isinstance(value, str):
        raise Unusable(f"text expected, got {type(value).__name__}")
    return value


def _list(value):
    if not isinstance(value, list):
        raise Unusable(f"a list expected, got {type(value).__name__}")
    return value


def _label(row):
    return str(row["label"]).lower().removesuffix(".0")  # a column with gaps turns 1 into 1.0 in many tools


def _number(value):
    """A finite number from a number or a string, None for "N/A", nan and the like."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None  # false for nan as well


def _ultrafeedback_score(completion):
    annotations = completion.get("annotations")
    ratings = [_number(a.get("Rating")) for a in annotations.values() if isinstance(a, dict)] if isinstance(annotations, dict) else []
    ratings = [rating for rating in ratings if rating is not None]
    if ratings:
        return sum(ratings) / len(ratings)
    return next((s for s in map(_number, (completion.get("fine-grained_score"), completion.get("overall_score"))) if s is not None), None)


def _without_blank_responses(record, report):
    """A blank response is never trained on. Where the row states a preference it takes the row with it, elsewhere only itself."""
    keep = [i for i, response in enumerate(record.responses) if response.strip()]
    if len(keep) == len(record.responses):
        return record
    if not keep or record.chosen is not None:
        raise Unusable("an empty or blank response")
    report.drop("an empty or blank response among several (the others stay)", record.where)
    record.responses = [record.responses[i] for i in keep]
    record.scores = record.scores and [record.scores[i] for i in keep]
    record.weights = record.weights and [record.weights[i] for i in keep]
    return record


def _weights(row, column, responses):
    value = row.get(column)
    if value is None and isinstance(row.get("completions"), list):
        value = [completion.get(column) for completion in row["completions"]]
    weights = [_number(v) for v in value] if isinstance(value, list) else [_number(value)] * responses
    if None in weights or len(weights) != responses:
        raise Unusable(f"no number for each response in the column {column!r}")
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# Records -> what is trained on


def best_and_worst(record):
    """Indices of the preferred and the dispreferred response: as the data states, else highest and lowest score, ties by file order.

    Either is None when the data does not tell (no scores; for the worst also when all scores are equal).
    """
    if record.chosen is not None:
        return record.chosen, record.rejected
    if record.desirable is not None:
        return next((i for i, good in enumerate(record.desirable) if good), None), None
    scored = [i for i, score in enumerate(record.scores or []) if score is not None]
    if not scored:
        return (0, None) if len(record.responses) == 1 else (None, None)
    best = max(scored, key=lambda i: record.scores[i])  # max and min keep the first of equals
    worst = min(scored, key=lambda i: record.scores[i])
    return best, worst if record.scores[worst] < record.scores[best] else None


def labels(record):
    """Desirable or not, for each response: as the data says, else chosen or rejected, else scored above or below the row's mean; None = neither."""
    if record.desirable is not None:
        return record.desirable
    if record.chosen is not None:
        return [{record.chosen: True, record.rejected: False}.get(i) for i in range(len(record.responses))]
    known = [score for score in record.scores or [] if score is not None]
    mean = sum(known) / max(1, len(known))
    return [None if score is None or score == mean else score > mean for score in record.scores or [None] * len(record.responses)]


def choose_responses(record, mode):
    """Indices of the responses that `--responses` keeps: all; chosen (the stated one, else the best); best (by score, else the stated
    one); pairs ([preferred, dispreferred]); labelled (those that are desirable or not). Unusable: the row has none."""
    if not record.responses:
        raise Unusable("a prompt without a response")
    if mode == "all":
        return list(range(len(record.responses)))
    if mode == "labelled":
        if labelled := [i for i, label in enumerate(labels(record)) if label is not None]:
            return labelled
        raise Unusable("no label: all scores are equal" if record.scores else "no label, no preference and no scores")
    if mode == "best" and record.scores and any(score is not None for score in record.scores):
        return [max((i for i, s in enumerate(record.scores) if s is not None), key=lambda i: record.scores[i])]
    best, worst = best_and_worst(record)
    if best is None:
        raise Unusable("not a desirable response" if record.desirable else "no preference and no score")
    if mode in ("chosen", "best"):
        return [best]
    if worst is None:
        raise Unusable("no pair: all scores are equal" if record.scores else "no pair: there is no rejected response")
    if record.responses[best].strip() == record.responses[worst].strip():
        raise Unusable("no pair: chosen and rejected are the same text")
    return [best, worst]
