"""
Evaluate as the paper does (Sec. 4.1): generate responses, score them with the reward model.

    python eval.py generate --model runs/var --data helpful=PATH harmless=PATH --out gen.jsonl --seeds 0,1,2
    python eval.py reward   --gen gen.jsonl [--gen OTHER ...] --reward_model DIR --out reward.json

generate: temperature 0.8, top_p 0.9, top_k 50 (the paper's); one JSON line per (prompt, seed). Every line has its own random stream, so
neither the batch nor a restart changes a response; a re-run fills in what is missing.

reward: per subset and seed the mean raw logit, the mean of 100 * sigmoid(logit) (the scale the paper's 20-70 look like), length, and the
share cut at the token limit. Averages are macro averages over subsets, as in Tables 1 and 2: "All" over all of them, "Helpful" over those
named helpful*. The mean over seeds has a standard error (ddof = 1), absent for one seed.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

from data import add_loading_flags, encode_records, load_tokenizer, prompt_text, special_text
from formats import InputError, Report, Unusable, choose_responses, read_records, run

PAPER = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Generate responses with the paper's sampling settings; score them with a reward model (Sec. 4.1)."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate|reward")
    text = "sample one response per prompt and seed into a JSONL file; a re-run fills in what is missing"
    generate = commands.add_parser("generate", help=text, description=text)
    generate.add_argument("--model", required=True, help="folder or hub name")
    generate.add_argument("--data", nargs="+", action="extend", required=True, metavar="[NAME=]SOURCE", help="prompts to answer: any source train.py reads; NAME becomes the subset (default: the file's name)")
    generate.add_argument("--split", default="train", help="split of a hub dataset or a saved DatasetDict (default: %(default)s)")
    generate.add_argument("--out", required=True, metavar="FILE", help="the JSONL file to write or to complete")
    generate.add_argument("--seeds", default="0", help="comma-separated; one response per prompt and seed (default: %(default)s; paper: three seeds)")
    generate.add_argument("--limit", type=int, metavar="N", help="only the first N prompts of each subset (default: all)")
    generate.add_argument("--batch_size", type=int, default=16, help="prompts per batch; changes the speed, not the responses (default: %(default)s)")
    generate.add_argument("--max_prompt_tokens", type=int, default=512, metavar="N", help="longer prompts are cut from the left (default: %(default)s)")
    generate.add_argument("--max_response_tokens", type=int, default=512, metavar="N", help="longest response, in tokens (default: %(default)s; not stated in the paper)")
    generate.add_argument("--temperature", type=float, default=PAPER["temperature"], help="0 is greedy (default: %(default)s, the paper's)")
    generate.add_argument("--top_p", type=float, default=PAPER["top_p"], help="smallest set of tokens with this share (default: %(default)s, the paper's; 1 = off)")
    generate.add_argument("--top_k", type=int, default=PAPER["top_k"], help="likeliest k tokens (default: %(default)s, the paper's; 0 = off)")
    add_loading_flags(generate, reward=False)
    text = "score generated responses with a reward model: means per subset, macro averages, standard errors over seeds"
    reward = commands.add_parser("reward", help=text, description=text)
    reward.add_argument("--gen", action="append", required=True, metavar="FILE", help="a file that generate wrote; several make one table")
    reward.add_argument("--reward_model", required=True, help="one-label sequence classifier, folder or hub name")
    reward.add_argument("--out", metavar="FILE", help="also write the numbers as JSON")
    reward.add_argument("--batch_size", type=int, default=32, help="conversations per forward; changes the speed, not the scores (default: %(default)s)")
    add_loading_flags(reward, policy=False)
    args = parser.parse_args(argv)
    if args.command == "generate":
        try:
            args.seeds = sorted({int(seed) for seed in args.seeds.split(",")})
        except ValueError:
            parser.error(f"--seeds takes whole numbers separated by commas, got {args.seeds!r}")
        if not 0 < args.top_p <= 1:
            parser.error(f"--top_p must be above 0 and at most 1, got {args.top_p}")
    least = {
        "limit": 1,
        "batch_size": 1,
        "max_prompt_tokens": 1,
        "max_response_tokens": 1,
        "max_reward_tokens": 1,
        "temperature": 0,
        "top_k": 0,
    }
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and not value >= low:
            parser.error(f"--{name} must be at least {low}, got {value}")
    return args


# fmt: on


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is loaded: --help and typing errors answer at once

import torch
import transformers
from tqdm import tqdm

from model import fingerprint, generate_responses, load_policy, load_reward_model, make_accelerator, write_json
from reward import bind_scores, score

# ----------------------------------------------------------------------------------------------------------------------
# Generate


def read_prompts(sources, tokenizer, split="train", limit=None):
    """Distinct prompts of [NAME=]SOURCE, ... as dicts: id, subset, prompt (messages), chosen (the data's preferred response or None).

    Dropped and printed: prompts that the tokenizer's template refuses, or with its special tokens written out in them.
    """
    items, special, names = [], special_text(tokenizer), set()
    for source in sources:
        name, equals, path = source.partition("=")
        name, path = (name, path) if equals else (Path(source).name.split(".")[0], source)
        if name in names:
            raise InputError(f"two sources make the subset {name!r}; name them apart: --data ONE={path} TWO=...")
        names.add(name)
        seen, report = set(), Report()
        for record in read_records(path, report, split):
            prompt_id = hashlib.sha256(json.dumps(record.prompt).encode()).hexdigest()[:12]
            if prompt_id in seen:
                continue
            try:
                if any(special.search(m["content"]) for m in record.prompt):
                    raise Unusable("special-token text inside the data")
                prompt_text(tokenizer, record.prompt)
            except Unusable as reason:
                report.drop(str(reason), record.where)
                continue
            seen.add(prompt_id)
            try:
                chosen = record.responses[choose_responses(record, "chosen")[0]]
            except Unusable:  # scores or preferences are not needed to ask a question
                chosen = None
            items.append({"id": f"{name}/{prompt_id}", "subset": name, "prompt": record.prompt, "chosen": chosen})
            if limit and len(seen) >= limit:
                break
        if report.dropped:
            print(f"{path}: {report}", file=sys.stderr)
    return items


def generate_rows(model, tokenizer, items, seeds, max_prompt_tokens, max_response_tokens, batch_size=16, progress=True, **sampling):
    """Yield a row per item and seed: the item plus seed, response (text), response_tokens, finished (false = cut at the limit).

    Batches hold prompts of similar length. `sampling`: temperature, top_p, top_k, by default the paper's.
    """
    encoded = encode_records(tokenizer, [(item["prompt"], ["x"]) for item in items], max_prompt_tokens, max_response_tokens)
    work = [(len(ids[0]), ids[0], item, seed) for ids, item in zip(encoded, items) if not isinstance(ids, Unusable) for seed in seeds]
    work.sort(key=lambda w: w[0])
    bar = tqdm(total=len(work), desc="generating", unit=" responses", disable=not progress, mininterval=1.0)
    for start in range(0, len(work), batch_size):
        _, prompts, batch, batch_seeds = zip(*work[start : start + batch_size])
        streams = [int.from_bytes(hashlib.sha256(f"{item['id']} {seed}".encode()).digest()[:7]) for item, seed in zip(batch, batch_seeds)]
        for item, seed, (ids, finished) in zip(
            batch, batch_seeds, generate_responses(model, tokenizer, prompts, streams, max_response_tokens, **(PAPER | sampling))
        ):
            text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            yield {**item, "id": f"{item['id']}/{seed}", "seed": seed, "response": text, "response_tokens": len(ids), "finished": finished}
        bar.update(len(batch))
    bar.close()


def generate(args):
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    items = read_prompts(args.data, tokenizer, args.split, args.limit)
    settings = {
        "model": fingerprint(args.model),
        "dtype": args.dtype,
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_response_tokens": args.max_response_tokens,
    }
    settings |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    about = Path(f"{args.out}.settings.json")
    done = {}
    if Path(args.out).exists():
        found = json.loads(about.read_text()) if about.exists() else {}
        if differs := [f"{k}: {found.get(k)} there, {settings[k]} now" for k in settings if found.get(k) != settings[k]]:
            raise InputError(
                f"{args.out}: already holds responses of other settings ({'; '.join(differs)}); choose another --out or remove it"
            )
        done = {row["id"]: row for row in read_jsonl(args.out, torn_end=True)}
    missing = [item | {"seeds": [s for s in args.seeds if f"{item['id']}/{s}" not in done]} for item in items]
    missing = [(item, item.pop("seeds")) for item in missing]
    todo = sum(len(seeds) for _, seeds in missing)
    print(
        f"{len(items):,} prompts x {len(args.seeds)} seeds: {todo:,} responses to generate, {len(items) * len(args.seeds) - todo:,} there already",
        file=sys.stderr,
    )
    if todo:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(about, settings)
        write_jsonl(args.out, done.values())  # a torn last line, if there was one, is gone
        model = load_policy(args.model, args.dtype, args.attn_implementation, args.trust_remote_code).to(make_accelerator().device)
        with open(args.out, "a", encoding="utf-8") as file:
            for seed in args.seeds:
                some = [item for item, seeds in missing if seed in seeds]
                sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
                for row in generate_rows(
                    model, tokenizer, some, [seed], args.max_prompt_tokens, args.max_response_tokens, args.batch_size, **sampling
                ):
                    done[row["id"]] = row
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
    order = {f"{item['id']}/{seed}": None for item in items for seed in args.seeds}
    rows = [done[key] for key in order if key in done] + [row for key, row in done.items() if key not in order]
    write_jsonl(args.out, rows)  # in the order of the data, whatever the order of the work was
    print(f"{args.out}: {len(rows):,} responses, {sum(not r['finished'] for r in rows):,} cut at {args.max_response_tokens} tokens")


def read_jsonl(path, torn_end=False):
    """Rows of a JSONL file. `torn_end`: an unreadable last line (a killed writer) is skipped instead of refused."""
    rows = []
    try:
        lines = (
            Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
        )  # texts may hold U+2028 and others where splitlines() of a str cuts
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
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


# ----------------------------------------------------------------------------------------------------------------------
# Reward


def sigmoid100(logit):
    """100 * sigmoid(logit), in the form that cannot overflow."""
    return 50 * (1 + math.tanh(logit / 2))


def mean_and_error(values):
    """(mean, standard error of the mean with ddof = 1, or None for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def reward_table(rows, scores):
    """Rows and their raw logits -> {"subsets": {name: numbers}, "averages": {"All": numbers, "Helpful": numbers}}.

    Each quantity is averaged over the responses of one (subset, seed), then over subsets (the macro averages), then over seeds.
    """
    cells = {}
    for row, logit in zip(rows, scores):
        measured = {"reward": logit, "sigmoid100": sigmoid100(logit), "response_tokens": row["response_tokens"], "cut": not row["finished"]}
        cells.setdefault((row["subset"], row["seed"]), []).append(measured)
    quantities = ("reward", "sigmoid100", "response_tokens", "cut")
    means = {cell: {q: sum(m[q] for m in some) / len(some) for q in quantities} for cell, some in cells.items()}
    subsets, seeds = list(dict.fromkeys(s for s, _ in cells)), sorted({s for _, s in cells})

    def over_seeds(names):
        complete = [seed for seed in seeds if all((name, seed) in means for name in names)]
        numbers = {"n": sum(len(cells[name, seed]) for name in names for seed in complete), "seeds": complete}
        for q in quantities if complete else ():
            mean, error = mean_and_error([sum(means[name, seed][q] for name in names) / len(names) for seed in complete])
            numbers |= {q: mean, f"{q}_error_over_seeds": error}
        return numbers

    helpful = [name for name in subsets if name.lower().startswith("helpful")]
    averages = {name: over_seeds(some) for name, some in {"All": subsets, "Helpful": helpful}.items() if some}
    return {
        "subsets": {name: over_seeds([name]) for name in subsets},
        "averages": {name: numbers for name, numbers in averages.items() if numbers["n"]},
    }


def format_table(tables):
    """{file: reward_table} -> text, a line per file and subset."""
    lines = [f"{'file':24} {'subset':20} {'n':>6} {'reward':>18} {'100*sigmoid':>18} {'tokens':>8} {'cut':>6}"]
    show = lambda mean, error: f"{mean:9.3f}" + (f" +- {error:5.3f}" if error is not None else " " * 9)
    for file, table in tables.items():
        for name, t in (table["subsets"] | {f"Avg. {k}": v for k, v in table["averages"].items()}).items():
            numbers = f"{show(t['reward'], t['reward_error_over_seeds'])} {show(t['sigmoid100'], t['sigmoid100_error_over_seeds'])}"
            lines.append(f"{file[-24:]:24} {name[:20]:20} {t['n']:6} {numbers} {t['response_tokens']:8.1f} {100 * t['cut']:5.1f}%")
    return "\n".join(lines) + "\n(+- standard error over seeds; none for one seed)"


def reward(args):
    files = {path: read_jsonl(path) for path in args.gen}
    for path, rows in files.items():
        if not rows:
            raise InputError(f"{path}: no rows")
        for i, row in enumerate(rows, 1):
            if missing := [
                k
                for k in ("subset", "seed", "prompt", "response", "response_tokens", "finished")
                if not isinstance(row, dict) or k not in row
            ]:
                raise InputError(f"{path}:{i}: no column {missing[0]!r}; --gen takes files that `eval.py generate` wrote")
            if not isinstance(row["prompt"], list) or not isinstance(row["response"], str):
                raise InputError(
                    f"{path}:{i}: prompt must be a list of messages and response a text; --gen takes files that `eval.py generate` wrote"
                )
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.reward_model, args.trust_remote_code)
    model = load_reward_model(args.reward_model, args.reward_dtype, args.attn_implementation, args.trust_remote_code)
    model = bind_scores(model.to(make_accelerator().device))
    tables = {}
    for path, rows in files.items():
        try:
            scores = score(model, tokenizer, [(row["prompt"], row["response"]) for row in rows], args.batch_size, args.max_reward_tokens)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        tables[path] = reward_table(rows, scores)
    print(format_table(tables))
    if args.out:
        settings = {
            "reward_model": fingerprint(args.reward_model),
            "max_reward_tokens": args.max_reward_tokens,
            "reward_dtype": args.reward_dtype,
        }
        inputs = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        write_json(args.out, {"results": tables, "settings": settings, "inputs_sha256": inputs, "versions": versions})


def main(args):
    {"generate": generate, "reward": reward}[args.command](args)


if __name__ == "__main__":
    run(lambda: main(ARGS))
