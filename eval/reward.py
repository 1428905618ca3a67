"""
Score generated responses with the reward model (Tables 1 and 2).

    python eval.py reward --gen gen.jsonl [--gen OTHER ...] --reward_model DIR --out reward.json

Per subset and seed the mean raw logit, the mean of 100 * sigmoid(logit) (the scale the paper's 20-70 look like), length, and the share
cut at the token limit; macro averages "All" and "Helpful" (subsets named helpful*); two standard errors (averages.py). A score does not
depend on its batch, and processes take whole batches: `accelerate launch` or torchrun gives the same numbers.
"""

import json
import math

from data import add_loading_flags, load_tokenizer
from eval.averages import averaged, rows_to_print, show
from eval.files import dtype_of, inputs_sha256, item_of, read_generations, versions, write_json


# fmt: off
def add_flags(parser):
    parser.add_argument("--gen", action="append", required=True, metavar="FILE", help="a file that generate wrote; several make one table")
    parser.add_argument("--reward_model", required=True, help="one-label sequence classifier, folder or hub name")
    parser.add_argument("--out", metavar="FILE", help="also write the numbers as JSON, with the score of every response")
    parser.add_argument("--batch_size", type=int, default=32, help="conversations per forward and process; changes the speed, not the scores (default: %(default)s)")
    add_loading_flags(parser, policy=False)
# fmt: on


def sigmoid100(logit):
    """100 * sigmoid(logit), in the form that cannot overflow."""
    return 50 * (1 + math.tanh(logit / 2))


def reward_table(rows, scores, wanted=()):
    """Rows and their raw logits -> `averages.averaged` of reward, sigmoid100, response_tokens, cut. `wanted`: subsets it must have."""
    measured = [
        {"reward": logit, "sigmoid100": sigmoid100(logit), "response_tokens": row["response_tokens"], "cut": not row["finished"]}
        for row, logit in zip(rows, scores)
    ]
    quantities = ("reward", "sigmoid100", "response_tokens", "cut")
    return averaged([(row["subset"], row["seed"], item_of(row), m) for row, m in zip(rows, measured)], quantities, wanted)


def format_table(tables):
    """{file: reward_table} -> text, a line per file and subset."""
    head = f"{'file':24} {'subset':20} {'n':>6}"
    lines = [f"{head}{'reward':>9}{'+- seeds':>10}{'+- items':>10}{'100*sigm':>9}{'+- seeds':>10}{'+- items':>10} {'tokens':>8} {'cut':>6}"]
    for file, table in tables.items():
        rows, reasons = rows_to_print(table)
        for name, t in rows:
            rewards = show(t, "reward") + show(t, "sigmoid100", digits=2)
            lines.append(f"{file[-24:]:24} {name[:20]:20} {t['n']:6}{rewards} {t['response_tokens']:8.1f} {100 * t['cut']:5.1f}%")
        lines += [f"{file[-24:]:24} {reason}" for reason in reasons]
    return "\n".join(lines) + "\n(+- standard error over seeds and over items, which are prompts; n responses; - for one of its kind)"


def main(args):
    files = {path: read_generations(path) for path in args.gen}
    from accelerate.utils import gather_object

    from model import fingerprint, load_reward_model, make_accelerator
    from reward import bind_scores, score

    tokenizer = load_tokenizer(args.reward_model, args.trust_remote_code)
    model = load_reward_model(args.reward_model, args.reward_dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit)
    accelerator = make_accelerator()
    process = (accelerator.process_index, accelerator.num_processes)
    model, tables = bind_scores(model.to(accelerator.device)), {}
    wanted = list(dict.fromkeys(row["subset"] for rows in files.values() for row in rows))
    for path, rows in files.items():
        names = [f"{path}:{i} ({row['id']})" for i, row in enumerate(rows, 1)]
        conversations = [(row["prompt"], row["response"]) for row in rows]
        mine = score(model, tokenizer, conversations, args.batch_size, args.max_reward_tokens, process[0] == 0, names, process)
        parts = gather_object([mine]) if process[1] > 1 else [mine]
        scores = [next(s for s in of_row if s is not None) for of_row in zip(*parts)]
        tables[path] = reward_table(rows, scores, wanted) | {"scores": {row["id"]: s for row, s in zip(rows, scores)}}
    if process[0] == 0:
        settings = {"reward_model": fingerprint(args.reward_model), "max_reward_tokens": args.max_reward_tokens}
        settings["reward_dtype"] = dtype_of(args.reward_dtype, args)
        seeds = {path: sorted({row["seed"] for row in rows}) for path, rows in files.items()}
        result = {"results": tables, "settings": settings, "seeds": seeds, "n": {path: len(rows) for path, rows in files.items()}}
        result |= {"inputs_sha256": inputs_sha256(*files), "versions": versions("torch", "transformers", "accelerate")}
        if args.out:
            write_json(args.out, result)
        print(format_table(tables))
        short = {path: {k: v for k, v in table.items() if k != "scores"} for path, table in tables.items()}
        print(json.dumps(result | {"results": short}, ensure_ascii=False))
    accelerator.end_training()
