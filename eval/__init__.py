"""
The subcommands of `eval.py`, one file each; this one has the front's two halves, flags in and exit status out.

A subcommand is a module with add_flags(parser), main(args) and, where flags depend on one another, check(parser, args). It imports torch
inside its functions, so that --help and typing errors answer at once.
"""

import argparse
import importlib

COMMANDS = {
    "generate": "sample one response per prompt and seed into a JSONL file; a re-run fills in what is missing",
    "reward": "score generated responses with a reward model: means per subset, macro averages, standard errors over seeds and items",
    "winrate": "let a judge compare responses with a baseline's, in both orders: wins, ties, losses and position bias",
    "report": "one HTML page about runs: rewards, lengths, win rates, weights, and answers side by side",
}
AT_LEAST = {
    "limit": 1, "batch_size": 1, "max_prompt_tokens": 1, "max_response_tokens": 1, "max_reward_tokens": 1, "max_judge_tokens": 1,
    "temperature": 0, "top_k": 0, "concurrency": 1, "retries": 0, "per_subset": 1, "max_invalid": 0, "price_in": 0, "price_out": 0,
    "examples": 0,
}  # fmt: skip
ABOVE = {"timeout": 0, "rpm": 0}


def parse_args(argv=None):
    """Command line -> namespace. SystemExit 2 with the flag and its value for what cannot work."""
    parser = argparse.ArgumentParser(description="Evaluate as the paper does (Sec. 4.1): generate, score, judge, report.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    modules = {name: importlib.import_module(f"eval.{name}") for name in COMMANDS}
    for name, text in COMMANDS.items():
        modules[name].add_flags(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    for bounds, fits, words in ((AT_LEAST, lambda value, low: value >= low, "at least"), (ABOVE, lambda value, low: value > low, "above")):
        for name, low in bounds.items():
            value = getattr(args, name, None)
            if value is not None and not fits(value, low):  # nan fits nowhere
                parser.error(f"--{name} must be {words} {low}, got {value}")
    if hasattr(modules[args.command], "check"):
        modules[args.command].check(parser, args)
    return args


def main(args):
    """Run the subcommand -> exit status: None or 0 complete, 3 incomplete. InputError: what the user gave cannot be used (2)."""
    return importlib.import_module(f"eval.{args.command}").main(args)
