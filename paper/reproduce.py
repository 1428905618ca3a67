"""
Every table and figure of the paper as one command, in miniature.

    python paper/reproduce.py table1                            # the worlds, runs and evaluations of one item; a Markdown table beside the paper's
    python paper/reproduce.py all                               # everything into paper/RESULTS.md; finished runs are not run again
    python paper/reproduce.py table1 --scale full --dry_run     # the paper's own commands, to be run on a cluster

An item (paper/items.py) names its jobs and turns their results into a table. A job is one method from one starting model: it searches the
learning rate on the first seed, trains the other seeds with the best, and samples answers of each. Every method has the same prompts and answers,
number of responses seen, learning rates tried and seeds; what it knows of the answers differs as the methods do (READS). All runs are the
repository's own programs; each command is printed before it runs. `all` takes at most 90 minutes on 2 cores.

The world is that of paper/miniature.py: its true reward is a function, so "better" is known and not a reward model's opinion.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when run as a program: the modules lie one folder up

from eval.averages import mean_and_error
from formats import InputError, run
from paper import full_scale, miniature


# fmt: off
def parse_args(argv=None):
    from paper.items import ITEMS

    parser = argparse.ArgumentParser(description="Reproduce a table or figure of the paper, in miniature, or print the commands of the full size.")
    parser.add_argument("item", choices=[*ITEMS, "all"], help="all: at most 90 minutes on 2 cores; " + "; ".join(f"{name}: {item.title}" for name, item in ITEMS.items()))
    parser.add_argument("--scale", choices=["miniature", "full"], default="miniature", help="full prints the paper's own runs, which need its GPUs (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, one seed: exercises every row, proves nothing")
    parser.add_argument("--out", default=None, metavar="DIR", help="where worlds and runs are kept (default: runs/reproduce, with --quick runs/reproduce_quick)")
    parser.add_argument("--results", default=None, metavar="FILE", help="the report (default: paper/RESULTS.md, with --quick OUT/RESULTS.md)")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one core each (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.scale == "full" and not args.dry_run:
        parser.error("--scale full runs 8 to 32 GPUs for days: it prints its commands with --dry_run, and you run them where the GPUs are")
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    return args


# fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# Jobs


@dataclass(frozen=True)
class Job:
    """One method from one starting model. `key` is its folder; `flags` a command line with {world}, {out}, {steps}, {group_steps}, {seed} in it,
    "" = only evaluate."""

    key: str
    flags: str
    start: str  # a folder under OUT; with {seed} in it, each seed starts from its own
    size: str  # whose base is pi_ref of the exact numbers
    program: str = "train"
    search: bool = True  # else `flags` has the learning rate in it
    beta: float = 1.0  # of the target pi* it is measured against
    seeds: tuple = ()  # fewer than the lab's; empty = all


@dataclass
class Lab:
    """Where jobs run, and how much of each."""

    out: Path
    quick: bool = False
    workers: int = 2
    dry_run: bool = False
    seeds: tuple = (0, 1, 2)
    rates: tuple = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")
    steps: int = 450  # of 8 responses: the 1,800 responses of the world twice; with --partners group 720 of 5
    sizes: dict = field(default_factory=lambda: {"small": 32, "medium": 64, "large": 128})  # hidden sizes, two layers each
    failures: dict = field(default_factory=dict)  # job -> why a run of it failed

    def __post_init__(self):
        if self.quick:
            self.seeds, self.rates, self.steps, self.sizes = (0,), ("1e-3",), 6, {"small": 32, "medium": 64, "large": 96}

    @property
    def world(self):
        return self.out / "world"

    def build(self, architecture="llama"):
        """The world's data and reward model, and a base model of every size: random weights, then all styles of answers."""
        if self.dry_run:
            return
        miniature.build(self.world, *((1, 0.1) if self.quick else ()))
        write_subsets(self.world)
        for size, hidden in self.sizes.items():
            base = self.out / f"{architecture}_{size}"
            if (base / "config.json").exists():
                continue
            texts = [text for p in miniature.split_prompts()[0] for text in (p, *miniature.listed_answers(p))]
            miniature.save_random_model(self.out / f"{architecture}_{size}_random", texts, architecture, hidden)
            rate = 6e-3 if hidden <= 64 else 3e-3
            steps = "--epochs 12" if not self.quick else "--max_steps 60"
            flags = f"--loss sft --responses all --batch_size 32 {steps} --lr {rate} --save_every 0 --resume"
            miniature.call("train", f"{flags} --model {self.out}/{architecture}_{size}_random --data {self.world}/train.jsonl --output_dir {base}", self.out / "log.txt")

    def do(self, jobs):
        """{key: result} of these jobs, side by side; those with a result in their folder are not run again."""
        jobs = list({job.key: job for job in jobs}.values())
        if self.dry_run:
            for job in (job for job in jobs if job.flags):
                for rate, seed in job_runs(job, self):
                    print(f"python {job.program}.py {run_flags(job, self, rate, seed)}")
            return {}
        todo = [job for job in jobs if not result_file(job, self).exists()]
        for number, (job, text) in enumerate(zip(todo, pool(self.workers).map(work, [(job, self) for job in todo])), 1):
            print(f"[{number}/{len(todo)}] {job.key}: {text}", flush=True)
        found = {job.key: json.loads(result_file(job, self).read_text()) for job in jobs}
        self.failures |= {key: result.get("failed") or result["lost"][0] for key, result in found.items() if "failed" in result or "lost" in result}
        return found


POOLS = {}  # number of workers -> the processes, kept from item to item: each imports torch once


def pool(workers):
    if workers not in POOLS:
        POOLS[workers] = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    return POOLS[workers]


def folder_of(job, lab):
    return lab.out / re.sub(r"[ ,=()]+", "_", job.key)


def result_file(job, lab):
    return folder_of(job, lab) / "result.json"


def job_runs(job, lab):
    """The (learning rate, seed) pairs a job would train if its first rate is the best."""
    rates, seeds = lab.rates if job.search and job.flags else ("",), job.seeds[: len(lab.seeds)] or lab.seeds
    return [(rate, seeds[0]) for rate in rates] + [(rates[0], seed) for seed in seeds[1:]]


def run_folder(job, lab, rate, seed):
    return folder_of(job, lab) / f"lr{rate or '-given'}_seed{seed}"


def run_flags(job, lab, rate, seed):
    flags = job.flags.format(world=lab.world, size=lab.out / job.size, out=lab.out, steps=lab.steps, group_steps=lab.steps * 8 // 5, seed=seed)
    if job.program == "train" and "--loss sft" not in flags and "--tables" not in flags:
        flags += f" --tables {folder_of(job, lab)}/tables_seed{seed}.safetensors"  # the learning rates of a seed share them
    flags = f"--model {lab.out / job.start.format(seed=seed)} --max_response_tokens 64 --save_every 0 --resume {flags} --seed {seed}"
    return f"{flags} {f'--lr {rate} ' if rate else ''}--output_dir {run_folder(job, lab, rate, seed)}"


def work(job_and_lab):
    """One job, in a process of its own: search, train, evaluate -> a line for the screen. A failure is a result too."""
    job, lab = job_and_lab
    import torch

    torch.set_num_threads(1)
    folder = folder_of(job, lab)
    log = folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    result = {"key": job.key, "search": {}, "runs": []}
    start = time.time()
    with open(folder / "progress.txt", "a") as progress, contextlib.redirect_stderr(progress):  # the bars of runs side by side would be unreadable
        runs = job_runs(job, lab)
        rates = list(dict.fromkeys(rate for rate, _ in runs))
        seeds = list(dict.fromkeys(seed for _, seed in runs))
        for rate in rates:
            result["search"][rate] = train_and_evaluate(job, lab, rate, seeds[0], log)
        # chosen by the true reward of answers to training prompts: the same chance for every method, and no reward model to be fooled
        known = {rate: numbers["training prompts"]["true"] for rate, numbers in result["search"].items() if "failed" not in numbers}
        if known:
            best = max(known, key=known.get)
            result |= {"lr": best, "runs": [result["search"][best]]}
            result["runs"] += [train_and_evaluate(job, lab, best, seed, log) for seed in seeds[1:]]
            lost = [numbers["failed"] for numbers in result["runs"] if "failed" in numbers]
            result["runs"] = [numbers for numbers in result["runs"] if "failed" not in numbers]
            result |= {"lost": lost} if lost else {}
        if not result["runs"]:
            result["failed"] = next(iter(result["search"].values()))["failed"]
    result["minutes"] = (time.time() - start) / 60
    (folder / "result.json.tmp").write_text(json.dumps(result))
    os.replace(folder / "result.json.tmp", folder / "result.json")
    if "failed" in result:
        return f"failed: {result['failed'][:160]}"
    lost = f", {len(result['lost'])} seed(s) failed: {result['lost'][0][:160]}" if "lost" in result else ""
    return f"lr {result['lr'] or 'given'}, {result['minutes']:.1f} minutes{lost}"


def train_and_evaluate(job, lab, rate, seed, log):
    """Train one run and look at it -> numbers, or {"failed": why}."""
    folder, start = run_folder(job, lab, rate, seed), time.time()
    try:
        if job.flags:
            miniature.call(job.program, run_flags(job, lab, rate, seed), log)
    except InputError as error:
        return {"failed": " ".join(str(error).split())}
    except SystemExit as error:  # argparse said why on stderr
        return {"failed": f"exit status {error}, see {folder.parent / 'progress.txt'}"}
    folder.mkdir(parents=True, exist_ok=True)
    numbers = evaluate(folder if job.flags else lab.out / job.start, lab, job.size, job.beta, seed, folder / "samples.jsonl", log)
    return numbers | {"seconds": time.time() - start, "folder": str(folder)}


def evaluate(folder, lab, size, beta, seed, gen, log):
    """Sampled answers on the held-out subsets and on training prompts, their rewards by both judges, and what is exact on the list."""
    from eval.files import read_jsonl

    sources = " ".join(f"{name}={lab.world}/{name}.jsonl" for name in (*SUBSETS, "training"))
    miniature.call("eval", f"generate --model {folder} --data {sources} --out {gen} --seeds {seed} --max_response_tokens 64 --batch_size 60", log)
    miniature.call("eval", f"reward --gen {gen} --reward_model {lab.world}/reward --out {gen}.reward.json", log)
    scored = json.loads(Path(f"{gen}.reward.json").read_text())["results"][str(gen)]["subsets"]
    rows = read_jsonl(gen)
    subsets = {name: miniature.read_samples([row for row in rows if row["subset"] == name]) | {"score": scored[name]["reward"]} for name in (*SUBSETS, "training")}
    held_out = [row for row in rows if row["subset"] != "training"]
    prompts = [row["prompt"][0]["content"] for row in held_out]
    truth = truth_of(lab.out / size, tuple(dict.fromkeys(prompts)), beta)
    everything = miniature.read_samples(held_out) | {"score": sum(subsets[name]["score"] for name in SUBSETS) / len(SUBSETS)}
    return {"subsets": subsets, "training prompts": subsets.pop("training"), "all": everything | truth.of(folder) | {"bound": truth.bound}, "samples": str(gen)}


truth_of = functools.cache(miniature.Truth)  # a worker meets the same reference and prompts in every run


SUBSETS = ("small_does", "small_could", "large_does", "large_could")  # held-out prompts by the size of the thing and the phrasing


def write_subsets(world):
    """The held-out prompts as four files, and 60 training prompts as a fifth (`training`: in distribution)."""
    rows = [json.loads(line) for line in (world / "held_out.jsonl").read_text().splitlines()]

    def subset(row):
        thing, _ = miniature.PROMPTS[row["prompt"]]
        return f"{'small' if miniature.LEVEL[thing] <= 2 else 'large'}_{row['prompt'].split()[0].lower()}"

    files = {name: [row for row in rows if subset(row) == name] for name in SUBSETS}
    files["training"] = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()][:60]
    for name, some in files.items():
        (world / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


# ----------------------------------------------------------------------------------------------------------------------
# Results


def cell(values, digits=2):
    """Markdown of a mean over seeds and its standard error; "failed" for an empty list."""
    if not values:
        return "failed"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if error is None else f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


READS = (
    "SFT: the true scores (it takes the best answer). KTO: whether the true score is above the prompt's mean. DPO: noisy pairs of answers, sampled by true reward; "
    "\"DPO, best against worst\": the true scores. VAR, A-LoL, R-LoL, GRPO: the scores of a reward model trained on pairs like DPO's."
)


def write_results(path, lab, results, minutes, failures):
    """RESULTS.md: every item that has been run, in the paper's order."""
    from paper.items import ITEMS

    lines = [
        "# Results", "",
        "Made by `python paper/reproduce.py all`: everything here is measured by that command, in the miniature world of `paper/miniature.py`, whose true reward",
        "is a function. Nothing here was run at the paper's sizes; `--scale full --dry_run` prints those commands. Numbers are means ± standard errors over",
        f"training seeds {', '.join(map(str, lab.seeds))}; of Base, over sampling seeds. World, reward model and base models are made once, so the errors say nothing about",
        f"others of them. Learning rates tried for every method: {', '.join(lab.rates)}, chosen on seed {lab.seeds[0]} by the true reward of answers to 60 training prompts.",
        f"Every method sees {lab.steps * 8:,} responses, unless a table says otherwise.", "",
        f"What each method knows of the answers. {READS}", "",
        f"Hardware: {platform.machine()}, {os.cpu_count()} cores, no GPU, {lab.workers} runs side by side, one thread each. Python {platform.python_version()}.", "",
    ]  # fmt: skip
    if missing := [item.title for name, item in ITEMS.items() if name not in results]:
        lines += [f"Not run yet: {'; '.join(missing)}.", ""]
    lines += [f"All items together: {sum(minutes[name] for name in results):.0f} minutes.", ""]
    claims = [(item.title, *claim) for name, item in ITEMS.items() if name in results for claim in results[name]["claims"]]
    lines += ["## Claims", "", table(["from", "claim", "in miniature", "at full size"], [[*claim, "not tried"] for claim in claims]), ""]
    for name, item in ITEMS.items():
        if name in results:
            spent = f"{minutes[name]:.0f} minutes" if minutes.get(name, 0) >= 0.5 else "from the runs of other items"
            lines += [f"## {item.title}", "", f"`python paper/reproduce.py {name}`, {spent}. {item.note}", "", results[name]["markdown"], ""]
            if name in full_scale.PAPER:
                lines += ["The paper's own numbers:", "", full_scale.PAPER[name], ""]
            if failures.get(name):
                lines += ["Runs that failed:", "", *(f"- {key}: {why[:200]}" for key, why in failures[name].items()), ""]
    temporary = Path(f"{path}.tmp")
    temporary.write_text("\n".join(lines))
    os.replace(temporary, path)


def main(args):
    from paper.items import ITEMS

    names = list(ITEMS) if args.item == "all" else [args.item]
    if args.scale == "full":
        for name in names:
            print(f"\n# {ITEMS[name].title}\n" + "\n".join(full_scale.commands(name)))
        return
    out = Path(args.out or ROOT / "runs" / ("reproduce_quick" if args.quick else "reproduce")).resolve()
    lab = Lab(out, args.quick, args.workers, args.dry_run)
    path = Path(args.results or (out / "RESULTS.md" if args.quick else ROOT / "paper" / "RESULTS.md"))
    store = out / "results.json"
    known = json.loads(store.read_text()) if store.exists() else {"results": {}, "minutes": {}}
    for name in names:
        start = time.time()
        print(f"== {ITEMS[name].title}", flush=True)
        lab.failures = {}
        result = ITEMS[name].run(lab, path.parent / "figures")
        if args.dry_run:
            continue
        print(result["markdown"])
        spent = (time.time() - start) / 60
        known["results"][name] = result
        known["minutes"][name] = max(spent, known["minutes"].get(name, 0.0))  # a second call only reads what the first has run
        known.setdefault("failures", {})[name] = lab.failures
        store.write_text(json.dumps(known))
        write_results(path, lab, known["results"], known["minutes"], known["failures"])
    for workers in list(POOLS):
        POOLS.pop(workers).shutdown()
    if not args.dry_run:
        print(f"{path}: {len(known['results'])} of {len(ITEMS)} items, {sum(known['minutes'].values()):.0f} minutes in all")


if __name__ == "__main__":
    run(lambda: main(parse_args()))
