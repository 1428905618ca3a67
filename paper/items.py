"""
The items of paper/reproduce.py as data: which runs, from where, and how their results become the paper's table or figure.

    ITEMS[name] = Item(title, note, run)        run(lab, figures) -> {"markdown": str, "claims": [(claim, verdict), ...]}

The four held-out subsets stand for the paper's four subsets of HHA, training prompts for its OffsetBias column, and true reward for its judges.
Figures are drawn by paper/figures.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval.averages import mean_and_error
from paper import miniature
from paper.full_scale import AVG_ALL
from paper.reproduce import SUBSETS, Job, cell, folder_of, table

DATA, JUDGE = "--data {world}/train.jsonl", "--reward_model {world}/reward"
METHODS = {  # name -> flags; B = 4 pairs of DPO are 8 responses, as everywhere; the 5 answers of a prompt make a micro-batch of `group`
    "SFT": f"--loss sft --responses best {DATA} --max_steps {{steps}}",
    "DPO": "--loss dpo --batch_size 4 --data {world}/pairs.jsonl --max_steps {steps}",
    "DPO, best against worst": f"--loss dpo --batch_size 4 {DATA} --max_steps {{steps}}",
    "VAR": f"--loss var {JUDGE} {DATA} --max_steps {{steps}}",
    "VAR, group": f"--loss var --partners group {JUDGE} {DATA} --max_steps {{group_steps}}",
    "A-LoL": f"--loss alol --responses all {JUDGE} {DATA} --max_steps {{steps}}",
    "R-LoL": f"--loss rlol --responses all {JUDGE} {DATA} --max_steps {{steps}}",
    "R-LoL, beta 1e-6": f"--loss rlol --beta 1e-6 --responses all {JUDGE} {DATA} --max_steps {{steps}}",
    "KTO": f"--loss kto {DATA} --max_steps {{steps}}",
    "VAR, Zhat = 1": f"--loss var --estimator constant {JUDGE} {DATA} --max_steps {{steps}}",
    "SFT, all": f"--loss sft --responses all {DATA} --max_steps {{steps}}",
}
GRPO = f"{JUDGE} {DATA} --prompts 8 --samples 8 --micro_batch 64"


@dataclass
class Item:
    title: str
    note: str
    run: Callable


def verdict(holds):
    return "holds in miniature" if holds else "does not"


def word(gap):
    """The honest word for a difference of so many standard errors."""
    return "holds in miniature" if gap > 2 else "holds, within two standard errors" if gap > 0 else "does not"


def above(a, b, *path):
    """The honest word for "job a above job b" in a number (default: true reward), seeds and their errors considered."""
    return word(in_standard_errors(*(values(result, *(path or ("all", "true"))) for result in (a, b))))


def weakest(words):
    """The word for a claim that says several things at once."""
    return max(words, key=["holds in miniature", "holds, within two standard errors", "does not"].index)


def values(result, *path):
    """One number of every seed of a job, [] if it failed."""
    found = []
    for numbers in result["runs"]:
        for name in path:
            numbers = numbers[name]
        found.append(numbers)
    return found


def in_standard_errors(a, b):
    """How far the mean of a is above that of b, in standard errors of the difference; nan if one of them failed."""
    if not a or not b:
        return float("nan")
    (mean_a, error_a), (mean_b, error_b) = mean_and_error(a), mean_and_error(b)
    error = ((error_a or 0.0) ** 2 + (error_b or 0.0) ** 2) ** 0.5
    return (mean_a - mean_b) / max(error, 1e-9)


def macro(result, name="true"):
    """Of every seed, the mean over the four subsets of their means: the paper's Avg. All."""
    return [sum(numbers["subsets"][s][name] for s in SUBSETS) / len(SUBSETS) for numbers in result["runs"]]


def average(result, name="true"):
    return mean_and_error(values(result, "all", name))[0] if result["runs"] else float("-inf")


# ----------------------------------------------------------------------------------------------------------------------
# Tables 1 and 2, and what is read off the same runs


def ladder(lab, architecture, methods=("DPO", "VAR")):
    """{(size, variant): result} of Base, DPO, VAR, SFT+DPO, SFT+VAR for every size; seed s of SFT+... starts from seed s of SFT, on the best answers."""
    lab.build(architecture)
    base = {size: f"{architecture}_{size}" for size in lab.sizes}
    first = [Job(f"{architecture}/{size}/{m}", METHODS[m], base[size], base[size]) for size in lab.sizes for m in ("SFT", *methods)]
    first += [Job(f"{architecture}/{size}/Base", "", base[size], base[size]) for size in lab.sizes]
    done = lab.do(first)
    sft = {size: trained(lab, done, f"{architecture}/{size}/SFT") for size in lab.sizes}
    done |= lab.do([Job(f"{architecture}/{size}/SFT+{m}", METHODS[m], sft[size], base[size]) for size in lab.sizes for m in methods])
    variants = ("Base", *methods, "SFT", *(f"SFT+{m}" for m in methods))
    return {(size, v): done[f"{architecture}/{size}/{v}"] for size in lab.sizes for v in variants} if done else {}


def trained(lab, done, key):
    """The models of a job as the start of another, relative to lab.out, {seed} left open; in a dry run (or if all failed) where they would be."""
    rate = done[key].get("lr", lab.rates[0]) if done else lab.rates[0]
    return f"{folder_of(Job(key, '', '', ''), lab).relative_to(lab.out)}/lr{rate}_seed{{seed}}"


def rewards_table(architecture):
    def run(lab, figures):
        results = ladder(lab, architecture)
        if not results:
            return None
        rows = []
        for (size, variant), result in results.items():
            tail = [cell(macro(result)), cell(values(result, "training prompts", "true")), cell(macro(result, "score")), cell(values(result, "all", "E[r]-bKL"))]
            rows.append([size if variant == "Base" else "", variant, *(cell(values(result, "subsets", s, "true")) for s in SUBSETS), *tail, result.get("lr") or "-"])
        head = ["size", "", *(s.replace("_", " ") for s in SUBSETS), "all (macro)", "training prompts", "all, reward model", "E[r] - beta KL", "lr"]
        pairs = [(results[size, f"{pre}VAR"], results[size, f"{pre}DPO"]) for size in lab.sizes for pre in ("", "SFT+")]
        apart = [in_standard_errors(macro(a), macro(b)) for a, b in pairs]
        better, clear, worse = sum(x > 0 for x in apart), sum(x > 2 for x in apart), sum(x < -2 for x in apart)
        papers = [numbers for name, numbers in AVG_ALL.items() if name.startswith({"llama": "Llama", "qwen2": "Qwen"}[architecture])]
        theirs = sum((var > dpo) + (sft_var > sft_dpo) for _, dpo, var, sft_dpo, sft_var in papers)
        text = f"VAR above DPO in true reward in {better} of {len(pairs)} pairs of rows, in {clear} by more than two standard errors; below by as much in {worse} (paper, Avg. All: above in {theirs} of {2 * len(papers)})"
        claims = [(text, weakest(map(word, apart)))]
        claims += [("VAR above its base at every size", weakest(above(results[s, "VAR"], results[s, "Base"]) for s in lab.sizes))]
        claims += [("SFT before VAR helps at every size", weakest(above(results[s, "SFT+VAR"], results[s, "VAR"]) for s in lab.sizes))]
        edges = [f"{size} {variant}" for (size, variant), r in results.items() if r.get("lr") in (lab.rates[0], lab.rates[-1])]
        return {"markdown": table(head, rows) + f"\n\nBest rate at an edge of those tried: {', '.join(edges) or 'none'}.", "claims": claims}

    return run


VARIANTS = ("SFT", "DPO", "VAR", "SFT+DPO", "SFT+VAR")


def samples(lab, figures):
    """Table 7: one prompt, five answers."""
    results = ladder(lab, "llama")
    if not results:
        return None
    rows, prompt = [], None
    for variant in VARIANTS:
        answers = [json.loads(line) for line in Path(results["medium", variant]["runs"][0]["samples"]).read_text().splitlines()]
        prompt = prompt or answers[0]["prompt"][0]["content"]
        row = next(a for a in answers if a["prompt"][0]["content"] == prompt)
        answer = row["response"].replace("|", "\\|").replace("\n", " ")
        rows.append([variant, answer, f"{miniature.true_reward(prompt, row['response']):g}", miniature.style_of(prompt, row["response"])])
    return {"markdown": f"Prompt: {prompt}\n\n" + table(["variant", "answer", "true reward", "style"], rows), "claims": []}


def lengths(lab, figures):
    """Figure 3: distributions of response length."""
    results = ladder(lab, "llama")
    if not results:
        return None
    from paper.figures import lengths_figure

    rows_of = lambda v: (json.loads(line) for r in results["medium", v]["runs"] for line in open(r["samples"]))
    counts = {v: [row["response_tokens"] for row in rows_of(v) if row["subset"] != "training"] for v in ("Base", *VARIANTS)}
    text = lengths_figure(counts, figures / "figure3")
    rows = [[v, cell(values(results["medium", v], "all", "tokens"), 1)] for v in counts]
    longer = above(results["medium", "DPO"], results["medium", "VAR"], "all", "tokens")
    return {"markdown": f"{text}\n\n" + table(["variant", "mean tokens"], rows), "claims": [("from base, DPO writes longer answers than VAR", longer)]}


def win_rates(lab, figures):
    """Figure 1 and Table 3: against the chosen response of a preference pair, judged by the true reward in both orders with the paper's rule."""
    results = ladder(lab, "llama")
    aligned_from = trained(lab, {"llama/medium/SFT": results["medium", "SFT"]} if results else {}, "llama/medium/SFT")
    aligned = lab.do([Job("llama/medium/aligned", METHODS["VAR, group"], aligned_from, "llama_medium")])
    start = trained(lab, aligned, "llama/medium/aligned")
    more = lab.do([Job(f"llama/medium/aligned+{m}", METHODS[m], start, "llama_medium") for m in ("DPO", "VAR")])
    if not results:
        return None
    chosen = chosen_responses(lab.world)
    shown = {f"{size}, {v}": results[size, v] for size in lab.sizes for v in ("Base", *VARIANTS)}
    shown |= {"medium, aligned": aligned["llama/medium/aligned"]} | {f"medium, aligned+{m}": more[f"llama/medium/aligned+{m}"] for m in ("DPO", "VAR")}
    outcomes = {name: [[o for line in open(r["samples"]) if (o := outcome(json.loads(line), chosen)) is not None] for r in result["runs"]] for name, result in shown.items()}
    share = {name: {kind: [100 * seed.count(kind) / len(seed) for seed in seeds] for kind in (1, 0, -1)} for name, seeds in outcomes.items()}  # % of every seed
    shares = {name: [mean_and_error(share[name][kind])[0] / 100 if seeds else 0.0 for kind in (1, 0, -1)] for name, seeds in outcomes.items()}
    from paper.figures import win_figure

    text = win_figure(shares, figures / "figure1")
    rows = [[name, *(cell(share[name][kind], 1) for kind in (1, 0, -1)), sum(map(len, seeds))] for name, seeds in outcomes.items()]
    better = sum(shares[f"{s}, {a}"][0] > shares[f"{s}, {b}"][0] for s in lab.sizes for a, b in (("VAR", "DPO"), ("SFT+VAR", "SFT+DPO")))
    claims = [(f"VAR wins more often than DPO in {better} of {2 * len(lab.sizes)} pairs of rows", verdict(better == 2 * len(lab.sizes)))]
    gap = in_standard_errors(share["medium, aligned+VAR"][1], share["medium, aligned+DPO"][1])
    claims += [(f"so it is from an already aligned model (Table 3; {gap:.1f} standard errors)", word(gap))]
    return {"markdown": f"{text}\n\n" + table(["model", "win %", "tie %", "loss %", "n"], rows), "claims": claims}


def chosen_responses(world):
    """prompt -> the chosen response of its first held-out preference pair."""
    rows = [json.loads(line) for line in (world / "held_out_pairs.jsonl").read_text().splitlines()]
    return {row["prompt"]: row["chosen"] for row in reversed(rows)}


def outcome(row, chosen):
    """+1, 0, -1 from the model's side by the paper's rule, or None for a prompt without a pair. The judge is the true reward, in both orders, which
    for such a judge always agree."""
    prompt = row["prompt"][0]["content"]
    if prompt not in chosen:
        return None
    ours, theirs = (miniature.true_reward(prompt, text) for text in (row["response"], chosen[prompt]))
    verdicts = [(ours > theirs) - (ours < theirs), -((theirs > ours) - (theirs < ours))]  # ours first; ours second
    return (sum(verdicts) > 0) - (sum(verdicts) < 0)


# ----------------------------------------------------------------------------------------------------------------------
# Tables 4, 5, 6, Figure 2


def grpo_table(lab, figures):
    """Table 4: one epoch of each, timed alone; the tables of VAR apart."""
    lab.build()
    sft = trained(lab, lab.do([Job("llama/medium/SFT", METHODS["SFT"], "llama_medium", "llama_medium")]), "llama/medium/SFT")
    epoch = "--epochs 1" if not lab.quick else "--max_steps 3"
    var = METHODS["VAR"].replace("--max_steps {steps}", epoch)
    jobs = {f"{name}{more}": Job(f"table4/{name}{more}", flags, start, "llama_medium", program) for start, name in (("llama_medium", ""), (sft, "SFT+"))
            for more, flags, program in (("VAR", var, "train"), ("GRPO", f"{GRPO} {epoch}", "baselines/grpo"), ("GRPO, KL 0.1", f"{GRPO} --kl_coef 0.1 {epoch}", "baselines/grpo"))}  # fmt: skip
    workers, lab.workers = lab.workers, 1  # seconds are compared: nothing else may run
    done = lab.do(jobs.values())
    lab.workers = workers
    if not done:
        return None
    rows, seconds = [], {}
    for name, job in jobs.items():
        result = done[job.key]
        times = [times_of(Path(r["folder"])) for r in result["runs"]]
        seconds[name] = sum(t["all"] for t in times) / max(1, len(times))
        parts = [f"{sum(t[part] for t in times) / max(1, len(times)):.1f}" for part in ("all", "tables", "sampling")]
        shares = [cell(values(result, "all", name), 0) for name in ("wrong", "garbled")]
        rows.append([name, cell(values(result, "all", "true")), cell(values(result, "all", "score")), *shares, *parts, result.get("lr", "-")])
    ratio = [seconds[f"{pre}GRPO"] / seconds[f"{pre}VAR"] if seconds[f"{pre}VAR"] else float("nan") for pre in ("", "SFT+")]
    true = {name: average(done[job.key]) for name, job in jobs.items()}
    claims = [(f"an epoch of GRPO takes at least 4 times as long as VAR's, tables included (paper: 4.1 and 5.1 times; here {ratio[0]:.1f} and {ratio[1]:.1f})", verdict(min(ratio) >= 4))]
    claims += [("VAR from base comes within 0.2 of GRPO's true reward from base, with or without KL", verdict(true["VAR"] >= max(true["GRPO"], true["GRPO, KL 0.1"]) - 0.2))]
    claims += [("VAR from base is above GRPO from SFT (the paper's Llama row)", above(done[jobs["VAR"].key], done[jobs["SFT+GRPO"].key]))]
    head = ["", "true reward", "reward model", "wrong %", "garbled %", "seconds an epoch", "of it tables", "of it sampling", "lr"]
    return {"markdown": table(head, rows), "claims": claims}


def times_of(folder):
    """Seconds of a run: all steps; the tables (VAR, with loading both models); of the steps, sampling (GRPO)."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    steps = [row for row in rows if row["step"] > 0]
    if "time/total" in steps[0]:
        return {"all": sum(row["time/total"] for row in steps), "tables": 0.0, "sampling": sum(row["time/sampling"] for row in steps)}
    same_seed = folder.parent.glob(f"lr*_{folder.name.rsplit('_', 1)[1]}/run.json")  # they share a table, which the first of them measured
    table_seconds = max(json.loads(file.read_text())["table_seconds"] for file in same_seed)
    return {"all": sum(row["seconds"] for row in steps) + table_seconds, "tables": table_seconds, "sampling": 0.0}


def accuracy_table(lab, figures):
    """Table 5: a benchmark is exact match; here the share of held-out answers that state the truth."""
    lab.build()
    jobs = {m: Job(f"llama/medium/{m}", METHODS[m], "llama_medium", "llama_medium") for m in ("SFT", "DPO", "DPO, best against worst", "A-LoL", "R-LoL", "R-LoL, beta 1e-6", "KTO", "VAR", "VAR, group", "VAR, Zhat = 1", "SFT, all")}
    jobs["Base"] = Job("llama/medium/Base", "", "llama_medium", "llama_medium")
    jobs["GRPO"] = Job("table5/GRPO", f"{GRPO} --max_steps {max(1, lab.steps * 8 // 64)}", "llama_medium", "llama_medium", "baselines/grpo")
    done = lab.do(jobs.values())
    if not done:
        return None
    right = {name: [b + r for b, r in zip(values(done[job.key], "all", "brief"), values(done[job.key], "all", "rambling"))] for name, job in jobs.items()}
    rows = []
    for name, job in jobs.items():
        result = done[job.key]
        columns = [cell(values(result, "all", c), 0) for c in ("wrong", "garbled", "tokens")]
        columns += [cell(values(result, "all", c)) for c in ("true", "E[r]-bKL", "KL(pi*,pi)", "leaked")]
        rows.append([name, cell(right[name], 0), *columns, result.get("lr") or "-"])
    claims = [(f"VAR answers right more often than {other}", word(in_standard_errors(right["VAR"], right[other]))) for other in ("DPO", "DPO, best against worst", "A-LoL")]
    bound = next(run["all"]["bound"] for job in jobs.values() for run in done[job.key]["runs"])
    text = f"pi*: E[r] - beta KL = beta log Z = {bound:.2f}, the most there is; its KL is 0."
    return {"markdown": table(["method", "right %", "wrong %", "garbled %", "tokens", "true reward", "E[r] - beta KL", "KL(pi*, pi)", "leaked", "lr"], rows) + f"\n\n{text}", "claims": claims}


def batch_size_table(lab, figures):
    """Table 6: B = 2 to 32, the same responses seen."""
    lab.build()
    sizes = (2, 4, 8, 16, 32)
    flags = lambda B: METHODS["VAR"].replace("{steps}", str(max(1, lab.steps * 8 // B))) + f" --batch_size {B}"
    done = lab.do([Job(f"table6/B{B}", flags(B), "llama_medium", "llama_medium") for B in sizes])
    if not done:
        return None
    columns = ("true", "E[r]-bKL", "KL(pi*,pi)")
    rows = [[B, *(cell(values(done[f"table6/B{B}"], "all", c)) for c in columns), *(f"{x:.2f}" for x in weights_of(done[f"table6/B{B}"])), done[f"table6/B{B}"].get("lr", "-")] for B in sizes]
    rising = lambda *some: weakest(above(done[f"table6/B{b}"], done[f"table6/B{a}"]) for a, b in zip(some, some[1:]))
    claims = [("the larger B of 2, 4, 8, the better", rising(2, 4, 8)), ("so on to 16 and 32 (not in the paper)", rising(8, 16, 32))]
    return {"markdown": table(["B", "true reward", "E[r] - beta KL", "KL(pi*, pi)", "ESS", "self_share", "lr"], rows), "claims": claims}


def weights_of(result):
    """(effective sample size, self_share) of the runs of a VAR job, means over steps and seeds."""
    rows = [json.loads(line) for r in result["runs"] for line in open(Path(r["folder"]) / "metrics.jsonl")]
    mean = lambda name: sum(row[name] for row in rows if name in row) / max(1, sum(name in row for row in rows))
    return mean("weights/ess"), mean("weights/self_share") if any("weights/self_share" in row for row in rows) else float("nan")


def training_curves(lab, figures):
    """Figure 2: validation reward along training, DPO and VAR, every size, with the learning rates found for Table 1; and DPO at one where it moves."""
    found = ladder(lab, "llama")
    jobs, moving = {}, "DPO at 1e-4"
    for size in lab.sizes:
        for name in ("DPO", moving, "VAR"):
            m = name.split()[0]
            rate = "1e-4" if name == moving else found[size, m].get("lr", lab.rates[0]) if found else lab.rates[0]
            more = f" --eval_data {{world}}/held_out.jsonl --eval_prompts 60 --eval_every {lab.steps // 10 or 3} --lr {rate} " + (JUDGE if m == "DPO" else f"--tables {{out}}/llama/{size}/VAR/tables_seed{{seed}}.safetensors")
            jobs[size, name] = Job(f"figure2/{size}/{name}", METHODS[m] + more, f"llama_{size}", f"llama_{size}", search=False)
    done = lab.do(jobs.values())
    if not done:
        return None
    from paper.figures import curves_figure

    curves = {key: [reward_curve(Path(r["folder"])) for r in done[job.key]["runs"]] for key, job in jobs.items()}
    text = curves_figure(curves, figures / "figure2")
    drop = {key: sum(max(y for _, y in c) - c[-1][1] for c in some) / max(1, len(some)) for key, some in curves.items()}
    rows = [[f"{size}, {m}", *(f"{sum(c[i][1] for c in some) / len(some):.2f}" for i in (0, len(some[0]) // 2, -1)), f"{drop[size, m]:.2f}"] for (size, m), some in curves.items() if some]
    last = lambda size, name: [c[-1][1] for c in curves[size, name]]
    claims = [("VAR ends above DPO, at every size", weakest(word(in_standard_errors(last(s, "VAR"), last(s, "DPO"))) for s in lab.sizes))]
    claims += [(f"{name} falls from its best validation reward further than VAR, at every size", verdict(all(drop[s, name] > drop[s, "VAR"] for s in lab.sizes))) for name in ("DPO", moving)]
    return {"markdown": f"{text}\n\n" + table(["", "true reward at the start", "halfway", "at the end", "best minus last"], rows), "claims": claims}


def reward_curve(folder):
    """[(step, mean true reward of the held-out answers), ...] of one run."""
    points = []
    for file in sorted((folder / "eval").glob("step_*.jsonl"), key=lambda f: int(f.stem[5:])):
        rows = [json.loads(line) for line in open(file)]
        points.append((int(file.stem[5:]), sum(miniature.true_reward(r["prompt"][0]["content"], r["response"]) for r in rows) / len(rows)))
    return points


def readings(lab, figures):
    from paper.readings import run

    return run(lab, figures)


ITEMS = {
    "table1": Item("Table 1: rewards, Llama", "Three hidden sizes of a two-layer Llama; mean true reward of sampled answers (-4 to 2), by subset. The training prompts also chose the rate.", rewards_table("llama")),
    "table2": Item("Table 2: rewards, Qwen2.5", "The same with the Qwen2 architecture.", rewards_table("qwen2")),
    "table3": Item("Figure 1 and Table 3: win rates", "Against the chosen response of a preference pair; an answer as good as the chosen one is a tie. The judge is the true reward, for which both orders agree.", win_rates),
    "table4": Item("Table 4: VAR and GRPO", "One epoch over the 360 prompts: VAR 1,800 responses, GRPO 8 new samples a prompt of about 15 tokens. Runs one after the other. The tables serve every further epoch, learning rate and beta; at this size they are thousands of calls of tiny models, each mostly overhead (bench/README.md compares at a larger one).", grpo_table),
    "table5": Item("Table 5: accuracy, and every method", "Medium Llama. Right: brief or rambling, with the true statement.", accuracy_table),
    "table6": Item("Table 6: batch size", "Medium Llama, VAR as in the paper, `--partners batch`.", batch_size_table),
    "table7": Item("Table 7: samples", "Medium Llama, the first held-out prompt.", samples),
    "figure2": Item("Figure 2: validation reward along training", "Learning rates as found for Table 1; DPO also at 1e-4.", training_curves),
    "figure3": Item("Figure 3: response lengths", "Medium Llama.", lengths),
    "readings": Item("Beyond the paper: which reading of Algorithm 1 gets nearest to pi*", "Medium Llama; rewards in the tables are the true ones, with three costs of a mismatched answer, or a reward model's. Learning rate 1e-3 for all. Normalised weights and other beta (one seed) with the reward model's scores alone.", readings),
}
