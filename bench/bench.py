"""
How fast, how much memory, against which peer: one command, one Markdown table.

    pip install -r requirements-bench.txt                    # TRL, the peer; without it its rows say "not measured"
    python bench/bench.py                                    # everything on this machine
    python bench/bench.py --only steps memory                # some rows; the others keep what was measured before
    python bench/bench.py --device cuda [--compile]          # the same on an NVIDIA GPU, with models of Qwen2.5's shapes
    python bench/bench.py --show                             # the table again, nothing measured

Contenders take turns, a round each, and the table gives the median of the rounds' ratios with the lowest and the highest: other work on the
machine slows both of a round. Every row's numbers go to a JSON file at once, so rows can be run one by one. Our side is the product's own
functions (train.forward, tables.ref_scorer, tables.build_tables, reward.score); the plain forms are in bench/naive.py, TRL's side in
bench/peers.py. Rows are Anthropic's hh_helpful_base where ../shared/data (or $SHARED_DATA) has it, else generated text of such lengths.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROWS = {
    "b_by_b": "B x B tables against full forwards",
    "reward_scoring": "reward scores against batches padded in file order",
    "steps": "VAR, SFT, DPO and A-LoL steps, against each other and TRL",
    "large_vocabulary": "VAR step against TRL SFT at V = 151,936",
    "grpo": "tables and an epoch of VAR against GRPO",
    "memory": "peak memory against TRL SFT, and when V doubles",
    "plan": "bench/plan.py against measured peaks",
    "utilisation": "FLOP/s of a training step against matrix products",
    "growth": "how step time grows with T, B and V",
}


# fmt: off
def parse_args(argv=None):
    rows = "; ".join(f"{name}: {what}" for name, what in ROWS.items())
    parser = argparse.ArgumentParser(description="Measure, store, and print one Markdown table.", epilog=rows)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help="which rows to measure (default: all; they are listed below)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often the contenders take turns (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round, to see that everything runs; measures nothing")
    parser.add_argument("--precision", choices=["no", "bf16"], help="autocast of ours and of TRL (default: what our programs choose by themselves)")
    parser.add_argument("--compile", action="store_true", help="our model's layers through torch.compile")
    parser.add_argument("--attn_implementation", metavar="NAME", help="attention kernel of both sides: sdpa, flash_attention_2, ... (default: transformers chooses)")
    parser.add_argument("--results", metavar="FILE", help="where the numbers are kept (default: bench/results_DEVICE.json; with --quick runs/bench_quick.json)")
    parser.add_argument("--out", metavar="FILE", help="also write the table to this file")
    parser.add_argument("--show", action="store_true", help="measure nothing, print the table of the stored numbers")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    here = Path(__file__).resolve().parent
    args.results = args.results or str(here.parent / "runs/bench_quick.json" if args.quick else here / f"results_{args.device}.json")
    args.rounds = 1 if args.quick else args.rounds
    return args


# fmt: on


def main(args):
    import gc
    import json

    from timing import machine, store, table

    if not args.show:
        if args.precision:
            os.environ["ACCELERATE_MIXED_PRECISION"] = args.precision
        if args.device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0] if args.device == "cuda" else ""  # one GPU, or none
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        import rows
        import torch

        from formats import InputError
        from model import make_accelerator

        if args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU here")
        args.bf16 = make_accelerator().mixed_precision == "bf16"  # what our programs do by themselves, or what --precision says
        for name in args.only or ROWS:
            load, start = os.getloadavg()[0], time.perf_counter()
            print(f"{name}: {ROWS[name]} ...", file=sys.stderr, flush=True)
            try:
                lines = getattr(rows, name)(args)
            except RuntimeError as error:  # out of memory, here or in a process of its own; the other rows may still fit
                print(error, file=sys.stderr)
                lines = [{"what": ROWS[name], "value": None, "text": "failed", "target": None, "note": str(error).strip().splitlines()[-1][:100]}]
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()  # rows in processes of their own need it
            about = {"machine": machine(args.device), "date": time.strftime("%Y-%m-%d %H:%M"), "load": load, "seconds": time.perf_counter() - start}
            store(args.results, name, about | {"precision": "bf16 autocast" if args.bf16 else "float32", "lines": lines})
    found = json.loads(Path(args.results).read_text()) if Path(args.results).exists() else {}
    text = table(found, ROWS)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is loaded: --help and typing errors answer at once
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from formats import run

    run(lambda: main(ARGS))
