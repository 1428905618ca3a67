"""
Win rate against a baseline (Sec. 4.1, Figure 1, Table 3): a judge sees the two answers to a prompt in both orders.

    python eval.py winrate --gen gen.jsonl --baseline chosen --base_url URL --judge NAME --per_subset 99 --out winrate.json
    python eval.py winrate --gen gen.jsonl --baseline other.jsonl --judge reward:DIR         # a reward model as judge, no server
    python eval.py winrate ... --dry_run                                                     # calls, tokens and cost, nothing is asked

Per order +1, 0, -1 from the model's side, then their sum: above 0 a win, below 0 a loss, else a tie. So win and tie are a win, win and
loss a tie, tie and loss a loss. (Other tools turn every disagreement into a tie: another rule, other numbers.)

    win_rate = wins / n     win_rate_tie_half = (wins + ties / 2) / n     n = valid items: neither invalid nor failed

An item is a prompt and a seed. Averages and their two errors: averages.py. An identical answer is a tie without a call. A template that
grades single answers gives one comparison an item, of two grades, and no orders.
"""

import hashlib
import json
import os
import sys

from data import add_loading_flags
from eval.averages import averaged, rows_to_print, show
from eval.files import dtype_of, inputs_sha256, item_of, read_generations, versions, write_json
from eval.judge import Cache, fill, key_of, load_template, reward_judge, verdict
from eval.server import add_server_flags, ask_all, check_server_flags
from formats import InputError

QUANTITIES = ("win_rate", "tie_rate", "loss_rate", "win_rate_tie_half")


# fmt: off
def add_flags(parser):
    parser.add_argument("--gen", required=True, metavar="FILE", help="the model's answers, a file that generate wrote")
    parser.add_argument("--baseline", required=True, metavar="chosen|FILE", help="chosen: the data's preferred responses (the paper's); or another file that generate wrote, with the same seeds or a single one")
    parser.add_argument("--judge", required=True, metavar="NAME|reward:DIR", help="the model the server is asked for (paper: gpt-4o-2024-11-20), or a reward model")
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON, with the outcome of every item")
    parser.add_argument("--per_subset", type=int, metavar="N", help="judge only N prompts of each subset, drawn by --sample_seed (default: all; paper: 99)")
    parser.add_argument("--sample_seed", type=int, default=0, help="which N prompts; the same ones whatever the order of the file (default: %(default)s)")
    parser.add_argument("--templates", metavar="FILE", help="judge prompts in MT-Bench's judge_prompts.jsonl format, pairwise or single (default: our own wording)")
    parser.add_argument("--template", metavar="NAME", help="which of them (default: the first that can be used)")
    parser.add_argument("--max_judge_tokens", type=int, default=1024, metavar="N", help="longest reply of the judge, in tokens (default: %(default)s)")
    parser.add_argument("--max_invalid", type=float, default=5.0, metavar="PERCENT", help="more items without a verdict than this: exit status 3 (default: %(default)s)")
    parser.add_argument("--cache", metavar="FILE", help="where replies are kept for the next run (default: GEN.judge.jsonl)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be asked and what it would cost, and ask nothing")
    parser.add_argument("--price_in", type=float, metavar="X", help="for --dry_run: price of a million prompt tokens")
    parser.add_argument("--price_out", type=float, metavar="X", help="for --dry_run: price of a million reply tokens")
    parser.add_argument("--batch_size", type=int, default=32, help="of a reward model as judge (default: %(default)s)")
    add_server_flags(parser)
    add_loading_flags(parser, policy=False)
# fmt: on


def check(parser, args):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("winrate runs in one process; --concurrency says how many requests at once")
    if is_reward(args):
        if args.base_url or args.templates:
            parser.error(f"--judge {args.judge}: a reward model is asked here; it takes neither --base_url nor --templates")
    elif not args.base_url:
        parser.error(f"--judge {args.judge}: add --base_url, the server that has it, or take a reward model: --judge reward:DIR")
    else:
        check_server_flags(parser, args)
    if args.template and not args.templates:
        parser.error(f"--template {args.template}: add --templates, the file it is in")
    args.cache = args.cache or f"{args.gen}.judge.jsonl"


def is_reward(args):
    return args.judge.startswith("reward:")


# ----------------------------------------------------------------------------------------------------------------------
# Items


def read_items(gen, baseline, per_subset=None, sample_seed=0):
    """[{id, item, subset, seed, prompt, model, baseline}, ...], the two answers last, and how many rows had no baseline answer.

    `per_subset` prompts of each subset, all their seeds: a prompt's rank is a hash of its id, so the order of the file does not matter.
    """
    rows, unmatched, items = read_generations(gen), 0, []
    if baseline == "chosen":
        answer = lambda row: row.get("chosen")
    else:
        others = read_generations(baseline, "--baseline")
        same = {(item_of(row), row["seed"]): row["response"] for row in others}
        single = {item_of(row): row["response"] for row in others} if len({row["seed"] for row in others}) == 1 else {}
        answer = lambda row: same.get((item_of(row), row["seed"]), single.get(item_of(row)))
    for row in rows:
        if not isinstance(answer(row), str):
            unmatched += 1
            continue
        answers = {"model": row["response"], "baseline": answer(row)}
        items.append({key: row[key] for key in ("id", "subset", "seed", "prompt")} | {"item": item_of(row)} | answers)
    if not items:
        why = f"has an answer in {baseline} to the same prompt of the same subset"
        why = "has a preferred response (column chosen)" if baseline == "chosen" else why
        raise InputError(f"{gen}: no row {why}; name another --baseline")
    if per_subset:
        prompts = {}
        for item in items:
            prompts.setdefault(item["subset"], set()).add(item["item"])
        rank = lambda name: hashlib.sha256(f"{sample_seed} {name}".encode()).hexdigest()
        kept = {name for some in prompts.values() for name in sorted(some, key=rank)[:per_subset]}
        items = [item for item in items if item["item"] in kept]
    return items, unmatched


def identical(item):
    return item["model"].strip() == item["baseline"].strip()


def requests_of(item, template, args):
    """[(order, request), ...]: order 0 shows the model's answer first, order 1 the baseline's; single grades: 0 the model's."""
    answers = (item["model"], item["baseline"])
    if is_reward(args):
        how = {"messages": item["prompt"], "dtype": dtype_of(args.reward_dtype, args), "max_tokens": args.max_reward_tokens}
        return [(0, how | {"answers": list(answers)}), (1, how | {"answers": list(answers[::-1])})]
    how = {"model": args.judge, "temperature": 0, "max_tokens": args.max_judge_tokens}
    if template["type"] == "single":
        return [(order, how | {"messages": fill(template, item["prompt"], answer=answer)}) for order, answer in enumerate(answers)]
    pairs = (answers, answers[::-1])
    return [(order, how | {"messages": fill(template, item["prompt"], answer_a=a, answer_b=b)}) for order, (a, b) in enumerate(pairs)]


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def outcome(template, verdicts):
    """Verdicts of orders 0 and 1 -> "win", "tie" or "loss" of the model, "invalid" if one is None."""
    if None in verdicts:
        return "invalid"
    if template["type"] == "single":
        total = (verdicts[0] > verdicts[1]) - (verdicts[0] < verdicts[1])
    else:
        total = {"A": 1, "B": -1, "C": 0}[verdicts[0]] + {"A": -1, "B": 1, "C": 0}[verdicts[1]]
    return "win" if total > 0 else "loss" if total < 0 else "tie"


def win_table(items, outcomes):
    """Items and {id: outcome} -> `averages.averaged`, with the counts of each subset."""
    valid, subsets = ("win", "tie", "loss"), dict.fromkeys(item["subset"] for item in items)
    measured = []
    for item in items:
        if (found := outcomes[item["id"]]) in valid:
            win, tie = found == "win", found == "tie"
            rates = {"win_rate": win, "tie_rate": tie, "loss_rate": found == "loss", "win_rate_tie_half": win + tie / 2}
            measured.append((item["subset"], item["seed"], item["item"], rates))
    table = averaged(measured, QUANTITIES, subsets)
    plural = {"win": "wins", "tie": "ties", "loss": "losses", "invalid": "invalid", "failed": "failed"}
    counts = {}
    for name in subsets:
        mine = [outcomes[item["id"]] for item in items if item["subset"] == name]
        counts[name] = {word: mine.count(what) for what, word in plural.items()}
        counts[name]["identical"] = sum(identical(item) for item in items if item["subset"] == name)
        if table["subsets"][name]:
            table["subsets"][name] |= counts[name]
    return table | {"counts": {word: sum(count[word] for count in counts.values()) for word in (*plural.values(), "identical")}}


def position_bias(template, verdicts):
    """[(verdict of order 0, of order 1), ...] of judged items -> how often the first one won, how often the winner changed with the order."""
    if template["type"] == "single":
        return None
    decided = [v for pair in verdicts for v in pair if v in "AB"]
    flipped = sum(pair in (("A", "A"), ("B", "B")) for pair in verdicts)  # the same place won twice
    return {
        "judged": len(verdicts), "decided": len(decided), "first_position_wins": decided.count("A") / len(decided) if decided else None,
        "flipped": flipped / len(verdicts) if verdicts else None,
    }  # fmt: skip


def judge_all(requests, where, ask, cache, template, about):
    """{key: request} -> (replies with a verdict wherever the judge gave one, {key: why} of those that failed).

    A reply without a verdict is asked for once more; replies of earlier runs are taken from the cache.
    """
    failed = {}
    for attempt in (0, 1):
        wanted = {}
        for key, request in requests.items():
            if key not in failed and (attempt == 0 or verdict(template, cache.replies.get(key)) is None):
                wanted[key] = key_of(where, request, attempt)
        keys = {kept: key for key, kept in wanted.items()}

        def received(kept, reply, keys=keys, attempt=attempt):
            if reply is not None:  # no chat completion: asked once more, and not kept
                cache.keep(kept, reply, attempt=attempt, **about[keys[kept]])

        missing = {kept: requests[key] for key, kept in wanted.items() if kept not in cache.replies}
        why = ask(missing, received) if missing else {}
        failed |= {keys[kept]: reason for kept, reason in why.items()}
    replies = {}
    for key, request in requests.items():
        second = cache.replies.get(key_of(where, request, 1))
        replies[key] = second if verdict(template, cache.replies.get(key)) is None and second is not None else cache.replies.get(key)
    return replies, failed


# ----------------------------------------------------------------------------------------------------------------------
# The program


def format_table(path, part):
    """The rates of every subset and average, then what was left out and how much the order mattered."""
    head = f"{'file':24} {'subset':20} {'n':>5} {'win %':>9}{'+- seeds':>10}{'+- items':>10}"
    lines = [f"{head} {'tie %':>7} {'loss %':>7} {'win+tie/2 %':>12}"]
    rows, reasons = rows_to_print(part)
    for name, t in rows:
        rates = f"{100 * t['tie_rate']:7.1f} {100 * t['loss_rate']:7.1f} {100 * t['win_rate_tie_half']:12.1f}"
        lines.append(f"{path[-24:]:24} {name[:20]:20} {t['n']:5} {show(t, 'win_rate', 100, 1)} {rates}")
    lines += [f"{path[-24:]:24} {reason}" for reason in reasons]
    counts, position = part["counts"], part["position"]
    left_out = f"invalid {counts['invalid']} (no verdict) and failed {counts['failed']} (no reply) are left out of n"
    lines.append(f"{left_out}; identical {counts['identical']}, ties without a call")
    if position and position["decided"]:
        first = f"the answer shown first won {100 * position['first_position_wins']:.1f} % of {position['decided']} decided verdicts"
        lines.append(f"{first}; the order changed the winner in {100 * position['flipped']:.1f} % of {position['judged']} items")
    return "\n".join(lines) + "\n(+- standard error over seeds and over items, which are prompts; - for one of its kind)"


def estimate(requests, cache, args):
    """What asking would cost: a token is about four bytes, a reply at most --max_judge_tokens long, a reward model costs nothing."""
    todo = [request for key, request in requests.items() if key not in cache.replies]
    found = {"calls": len(requests), "cached": len(requests) - len(todo), "to_ask": len(todo), "cost_at_most": None}
    if not is_reward(args):
        found["prompt_tokens"] = sum(len(m["content"].encode()) for request in todo for m in request["messages"]) // 4
        found["reply_tokens_at_most"] = len(todo) * args.max_judge_tokens
        if None not in (args.price_in, args.price_out):
            found["cost_at_most"] = (found["prompt_tokens"] * args.price_in + found["reply_tokens_at_most"] * args.price_out) / 1e6
    return found


def settings_of(args, template, where):
    names = ["judge", "baseline", "per_subset", "sample_seed", "max_invalid"]
    settings = {name: getattr(args, name) for name in names + ([] if is_reward(args) else ["base_url", "max_judge_tokens"])}
    if is_reward(args):
        loaded = {"reward_dtype": dtype_of(args.reward_dtype, args), "max_reward_tokens": args.max_reward_tokens}
        return settings | {"reward_model": where} | loaded
    text = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
    return settings | {"temperature": 0, "template": template["name"], "template_sha256": text}


def main(args):
    template = load_template(args.templates, args.template)
    items, unmatched = read_items(args.gen, args.baseline, args.per_subset, args.sample_seed)
    if unmatched:
        print(f"{args.gen}: {unmatched:,} rows have no answer of the baseline and are left out", file=sys.stderr)
    if is_reward(args):
        where, ask = reward_judge(args)
    else:
        where, ask = args.base_url, lambda wanted, received: ask_all(args, wanted, received)
    requests, about, calls = {}, {}, {}  # by key; by key; the two keys of an item by its id
    for item in items:
        for order, request in [] if identical(item) else requests_of(item, template, args):
            key = key_of(where, request, 0)
            requests[key], about[key] = request, {"id": item["id"], "order": order}
            calls.setdefault(item["id"], []).append(key)
    cache = Cache(args.cache, write=not args.dry_run)
    result = {"settings": settings_of(args, template, where), "seeds": sorted({item["seed"] for item in items}), "n": len(items)}
    result["versions"] = versions("torch", "transformers") if is_reward(args) else versions("openai")
    result |= {"inputs_sha256": inputs_sha256(args.gen, args.baseline, args.templates), "without_baseline": unmatched}
    if args.dry_run:
        found = estimate(requests, cache, args)
        cost = f"at most {found['cost_at_most']:.2f}" if found["cost_at_most"] is not None else "--price_in and --price_out give a cost"
        print(f"{len(items):,} items, {found['calls']:,} calls: {found['cached']:,} cached, {found['to_ask']:,} to ask; {cost}")
        print(json.dumps(result | {"dry_run": found}, ensure_ascii=False))
        return 0

    replies, failed = judge_all(requests, where, ask, cache, template, about)
    verdicts = {id: tuple(verdict(template, replies[key]) for key in keys) for id, keys in calls.items()}
    outcomes = {item["id"]: "tie" for item in items}  # what identical answers stay
    for id, keys in calls.items():
        outcomes[id] = "failed" if any(key in failed for key in keys) else outcome(template, verdicts[id])
    part = win_table(items, outcomes)
    part["position"] = position_bias(template, [pair for id, pair in verdicts.items() if outcomes[id] in ("win", "tie", "loss")])
    given = [reply for reply in replies.values() if reply]
    part["tokens"] = {name: sum(reply[name] or 0 for reply in given) for name in ("prompt_tokens", "reply_tokens")}
    result["judge_models"] = sorted({reply["model"] for reply in given if reply.get("model")})
    if args.out:
        write_json(args.out, result | {"results": {args.gen: part | {"outcomes": outcomes}}})
    print(format_table(args.gen, part))
    print(json.dumps(result | {"results": {args.gen: part}}, ensure_ascii=False))
    return status(part["counts"], len(items), args.max_invalid)


def status(counts, n, max_invalid):
    """0, or 3 with the reason on stderr: items failed, or too many have no verdict."""
    if counts["failed"]:
        print(f"incomplete: {counts['failed']:,} of {n:,} items failed; the same command asks for them again", file=sys.stderr)
    if too_many := 100 * counts["invalid"] > max_invalid * n:
        print(f"incomplete: {counts['invalid']:,} of {n:,} items have no verdict, more than --max_invalid {max_invalid:g} %", file=sys.stderr)
    return 3 if counts["failed"] or too_many else 0
