"""
Evaluate as the paper does (Sec. 4.1): generate, score with the reward model, let a judge compare, and look at it all on one page.

    python eval.py generate --model runs/var --data helpful=PATH harmless=PATH --out gen.jsonl --seeds 0,1,2
    python eval.py reward   --gen gen.jsonl [--gen OTHER ...] --reward_model DIR --out reward.json
    python eval.py winrate  --gen gen.jsonl --baseline chosen|OTHER.jsonl --base_url URL --judge NAME [--dry_run] --out winrate.json
    python eval.py report   --run DIR [--run DIR ...] --out report.html

The front of the folder eval/, which has a file for each of them. A table and, as the last line, one JSON result go to stdout, progress to
stderr. Exit status: 0 complete, 2 bad usage or input, 3 incomplete (it says how many failed; the same command goes on), 130 Ctrl-C.
"""

from eval import main, parse_args  # the folder: a package comes before a module of the same name
from formats import run

if __name__ == "__main__":
    ARGS = parse_args()
    run(lambda: main(ARGS))
