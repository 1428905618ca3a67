"""
Answers to prompts, one JSON line per (prompt, seed), with the paper's sampling settings: temperature 0.8, top_p 0.9, top_k 50.

    python eval.py generate --model runs/var --data helpful=PATH harmless=PATH --out gen.jsonl --seeds 0,1,2
    torchrun --nproc_per_node 8 eval.py generate ...             # the work split over processes; on GPUs `accelerate launch` does the same
    python eval.py generate --base_url http://localhost:8000/v1 --model NAME ...       # a server does the work

Every line has its own random stream, so neither the batch nor the processes nor a restart change a response; a re-run fills in what is
missing. Whole batches go to a process, the ones it would make alone, so even the padding is the same.

A server has its own streams: it gets a seed for every line, and what it makes of it is its affair (vLLM: a stream for each request;
`transformers serve`: one for all, so repeatable with --concurrency 1 only). Prompts are not cut there, --max_prompt_tokens is the server's.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from data import add_loading_flags, encode_records, load_tokenizer, prompt_text, special_text
from eval.files import dtype_of, inputs_sha256, read_jsonl, sha256, versions, write_json, write_jsonl
from eval.server import add_server_flags, ask_all, check_server_flags
from formats import InputError, Report, Unusable, choose_responses, read_records

PAPER = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}


# fmt: off
def add_flags(parser):
    parser.add_argument("--model", required=True, help="folder or hub name; with --base_url the name the server knows it by")
    parser.add_argument("--data", nargs="+", action="extend", required=True, metavar="[NAME=]SOURCE", help="prompts to answer: any source train.py reads; NAME becomes the subset (default: the file's name)")
    parser.add_argument("--split", default="train", help="split of a hub dataset or a saved DatasetDict (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSONL file to write or to complete")
    parser.add_argument("--seeds", default="0", help="comma-separated; one response per prompt and seed (default: %(default)s; paper: three seeds)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts of each subset (default: all)")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts per batch and process; changes the speed, not the responses (default: %(default)s)")
    parser.add_argument("--max_prompt_tokens", type=int, default=512, metavar="N", help="longer prompts are cut from the left (default: %(default)s)")
    parser.add_argument("--max_response_tokens", type=int, default=512, metavar="N", help="longest response, in tokens (default: %(default)s; not stated in the paper)")
    parser.add_argument("--temperature", type=float, default=PAPER["temperature"], help="0 is greedy (default: %(default)s, the paper's)")
    parser.add_argument("--top_p", type=float, default=PAPER["top_p"], help="smallest set of tokens with this share (default: %(default)s, the paper's; 1 = off)")
    parser.add_argument("--top_k", type=int, default=PAPER["top_k"], help="likeliest k tokens (default: %(default)s, the paper's; 0 = off)")
    add_server_flags(parser)
    parser.add_argument("--server", choices=("vllm", "sglang", "transformers", "openai"), default="vllm", help="how --base_url is told what is not in OpenAI's API, top_k above all; openai itself has none: --top_k 0 (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="NAME", help="with --base_url: the model's tokenizer, to drop the prompts that a run without a server drops (default: all are asked)")
    add_loading_flags(parser, reward=False)
# fmt: on


def check(parser, args):
    try:
        args.seeds = sorted({int(seed) for seed in args.seeds.split(",")})
    except ValueError:
        parser.error(f"--seeds takes whole numbers separated by commas, got {args.seeds!r}")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p must be above 0 and at most 1, got {args.top_p}")
    if args.base_url:
        check_server_flags(parser, args)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            parser.error("--base_url asks from one process; --concurrency says how many requests at once")
        if args.server == "openai" and args.top_k:
            parser.error(f"--server openai: its API has no top_k, got {args.top_k}; add --top_k 0")


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(sources, tokenizer=None, split="train", limit=None):
    """Distinct prompts of [NAME=]SOURCE, ... as dicts: id, subset, prompt (messages), chosen (the data's preferred response or None).

    Dropped and printed: prompts that the tokenizer's template refuses, or with its special tokens written out in them.
    """
    items, special, names = [], tokenizer and special_text(tokenizer), set()
    for source in sources:
        name, path = split_name(source)
        if name in names:
            raise InputError(f"two sources make the subset {name!r}; name them apart: --data ONE={path} TWO=...")
        names.add(name)
        seen, report = set(), Report()
        for record in read_records(path, report, split):
            prompt_id = hashlib.sha256(json.dumps(record.prompt).encode()).hexdigest()[:12]
            if prompt_id in seen:
                continue
            try:
                if special and any(special.search(m["content"]) for m in record.prompt):
                    raise Unusable("special-token text inside the data")
                if tokenizer:
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
        if report.dropped and os.environ.get("RANK", "0") == "0":
            print(f"{path}: {report}", file=sys.stderr)
    return items


def split_name(source):
    """[NAME=]SOURCE -> (subset, path)."""
    name, equals, path = source.partition("=")
    return (name, path) if equals else (Path(source).name.split(".")[0], source)


def stream(item, seed, size=7):
    """The random stream of a line, a whole number of `size` bytes that depends on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{item['id']} {seed}".encode()).digest()[:size])


# ----------------------------------------------------------------------------------------------------------------------
# Responses


def generate_rows(
    model, tokenizer, items, seeds, max_prompt_tokens, max_response_tokens, batch_size=16, progress=True, process=(0, 1), **sampling
):
    """Yield a row per item and seed: the item plus seed, response (text), response_tokens, finished (false = cut at the limit).

    Batches hold prompts of similar length; process (p, P) yields those of the batches p, p+P, ... `sampling`: temperature, top_p, top_k,
    by default the paper's.
    """
    from eval.sampling import generate_responses

    encoded = encode_records(tokenizer, [(item["prompt"], ["x"]) for item in items], max_prompt_tokens, max_response_tokens)
    work = [(len(ids[0]), ids[0], item, seed) for ids, item in zip(encoded, items) if not isinstance(ids, Unusable) for seed in seeds]
    work.sort(key=lambda w: w[0])
    starts = range(process[0] * batch_size, len(work), process[1] * batch_size)
    total = sum(min(batch_size, len(work) - start) for start in starts)
    bar = tqdm(total=total, desc="generating", unit=" responses", disable=not progress, mininterval=1.0)
    for start in starts:
        _, prompts, batch, batch_seeds = zip(*work[start : start + batch_size])
        streams = [stream(item, seed) for item, seed in zip(batch, batch_seeds)]
        drawn = generate_responses(model, tokenizer, prompts, streams, max_response_tokens, **(PAPER | sampling))
        for item, seed, (ids, finished) in zip(batch, batch_seeds, drawn):
            text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            yield {**item, "id": f"{item['id']}/{seed}", "seed": seed, "response": text, "response_tokens": len(ids), "finished": finished}
        bar.update(len(batch))
    bar.close()


def ask_rows(args, missing, write):
    """The same rows from a server: write(row) as each comes in; what failed is printed. `missing`: [(item, seeds), ...]."""
    work = {f"{item['id']}/{seed}": (item, seed) for item, seeds in missing for seed in seeds}
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_response_tokens}
    more = {"top_k": args.top_k} if args.top_k and args.server != "openai" else {}
    if args.server == "transformers":  # it refuses top_k, and without do_sample it takes temperature, top_p and seed and decodes greedily
        own = {"do_sample": args.temperature > 0} | ({"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {})
        more = {"generation_config": json.dumps(own | {"top_k": args.top_k} if own["do_sample"] else own)}
    requests = {
        key: {"model": args.model, "messages": item["prompt"], "seed": stream(item, seed, 4) >> 1, "extra_body": more} | sampling
        for key, (item, seed) in work.items()
    }

    def received(key, reply):
        item, seed = work[key]
        if reply is None or reply["reply_tokens"] is None:
            tqdm.write(f"{key}: the server's reply is no chat completion with its token counts", file=sys.stderr)
            return
        tokens, finished = reply["reply_tokens"], reply["finish"] == "stop"
        write({**item, "id": key, "seed": seed, "response": reply["text"], "response_tokens": tokens, "finished": finished})

    ask_all(args, requests, received)


# ----------------------------------------------------------------------------------------------------------------------
# The file


def check_settings(out, settings):
    """InputError: what is in `out` was made with other settings."""
    about = Path(f"{out}.settings.json")
    if not Path(out).exists():
        return
    found = json.loads(about.read_text()) if about.exists() else {}
    if differs := [f"{k}: {found.get(k)} there, {settings.get(k)} now" for k in found | settings if found.get(k) != settings.get(k)]:
        raise InputError(f"{out}: already holds responses of other settings ({'; '.join(differs)}); choose another --out or remove it")


def read_done(out):
    """{id: row} of what is in `out` already, and in the parts of other processes that are not merged yet."""
    parts = sorted(Path(out).parent.glob(f"{Path(out).name}.rank*"))
    return {row["id"]: row for path in (Path(out), *parts) if path.exists() for row in read_jsonl(path, torn_end=True)}


def merge(out, done, items, seeds):
    """Write the file whole, in the order of the data, whatever the order of the work was, then drop the parts."""
    order = dict.fromkeys(f"{item['id']}/{seed}" for item in items for seed in seeds)
    rows = [done[key] for key in order if key in done] + [row for key, row in done.items() if key not in order]
    write_jsonl(out, rows)
    for part in Path(out).parent.glob(f"{Path(out).name}.rank*"):
        part.unlink()
    return rows


def main(args):
    accelerator, process = None, (0, 1)
    if args.base_url:
        tokenizer = load_tokenizer(args.tokenizer, args.trust_remote_code) if args.tokenizer else None
        settings = {"model": args.model, "base_url": args.base_url, "server": args.server}
    else:
        from model import fingerprint, make_accelerator

        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        settings = {"model": fingerprint(args.model), "dtype": dtype_of(args.dtype, args), "max_prompt_tokens": args.max_prompt_tokens}
    settings |= {name: getattr(args, name) for name in ("max_response_tokens", "temperature", "top_p", "top_k")}
    items = read_prompts(args.data, tokenizer, args.split, args.limit)
    check_settings(args.out, settings)  # before the processes meet: all of them refuse alike
    if not args.base_url:
        accelerator = make_accelerator()
        process = (accelerator.process_index, accelerator.num_processes)
    first, everyone = process[0] == 0, accelerator.wait_for_everyone if accelerator else lambda: None

    if not first:
        everyone()  # until the first process has put the parts of a killed run together
    done = read_done(args.out)
    missing = [(item, [seed for seed in args.seeds if f"{item['id']}/{seed}" not in done]) for item in items]
    if first:
        todo, total = sum(len(seeds) for _, seeds in missing), len(items) * len(args.seeds)
        said = f"{todo:,} responses to generate, {total - todo:,} there already"
        print(f"{len(items):,} prompts x {len(args.seeds)} seeds: {said}", file=sys.stderr)
        write_json(f"{args.out}.settings.json", settings)
        merge(args.out, done, items, args.seeds)  # a torn last line, if there was one, is gone
        everyone()
    everyone()  # all have read the file before anyone adds to it, so all share out the same work

    if any(seeds for _, seeds in missing):
        with open(args.out if first else f"{args.out}.rank{process[0]}", "a", encoding="utf-8") as file:

            def write(row):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            if args.base_url:
                ask_rows(args, missing, write)
            else:
                run_model(args, tokenizer, missing, accelerator.device, process, write)
    everyone()
    absent = finish(args, settings, items) if first else 0
    if accelerator:
        accelerator.end_training()
    return 3 if absent else 0


def run_model(args, tokenizer, missing, device, process, write):
    """write(row) for the share of this process, seed after seed."""
    from model import load_policy

    model = load_policy(args.model, args.dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit).to(device)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    limits = (args.max_prompt_tokens, args.max_response_tokens, args.batch_size)
    for seed in args.seeds:
        some = [item for item, seeds in missing if seed in seeds]
        for row in generate_rows(model, tokenizer, some, [seed], *limits, progress=process[0] == 0, process=process, **sampling):
            write(row)


def finish(args, settings, items):
    """Put the file in order, print the result -> how many responses are missing."""
    done = read_done(args.out)
    rows = merge(args.out, done, items, args.seeds)
    cut, absent = sum(not row["finished"] for row in rows), sum(f"{item['id']}/{seed}" not in done for item in items for seed in args.seeds)
    print(f"{args.out}: {len(rows):,} responses, {cut:,} cut at {args.max_response_tokens} tokens")
    if absent:
        print(f"{args.out}: {absent:,} responses are missing; the same command asks for them again", file=sys.stderr)
    result = {"out": args.out, "sha256": sha256(args.out), "n": len(rows), "cut": cut, "failed": absent, "seeds": args.seeds}
    result |= {"settings": settings, "versions": versions("openai") if args.base_url else versions("torch", "transformers", "accelerate")}
    result["inputs_sha256"] = inputs_sha256(*(split_name(source)[1] for source in args.data))
    print(json.dumps(result, ensure_ascii=False))
    return absent
