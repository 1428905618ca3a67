"""
Beyond the paper: which reading of Algorithm 1 gets nearest to pi*?

The paper leaves open what pi_ref(y|x) is numerically (--ref_logps), whether Zhat has that factor (--estimator), whose the y_j are (--partners),
whether weights are normalised, and beta. Here they train on the same answers. The tables of r(x_i, y_j) hold the TRUE reward, in which a
mismatched answer (one to another prompt) costs nothing, 2, or 6, or else the reward model's scores. Normalised weights and other beta are tried
with the reward model's scores alone.

The control trains on answers drawn from pi_ref itself. Equal answers are one example, as everywhere; log c is added to the reward of one that was
drawn c times, so that exp(r), at beta 1, counts it c times. With partners of the same prompt and no pi_ref factor, or with Zhat = 1, Eq. 7-9 then
hold exactly: a mean over draws of pi_ref(.|x) estimates what they say. With partners of other prompts nobody draws y_j from pi_ref(.|x_i).
"""

import json
import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data import load_plan
from paper import miniature
from paper.items import DATA, JUDGE, average, cell, values, verdict, weights_of
from paper.reproduce import Job, table

ESTIMATORS = {"paper, mean": "--estimator paper --ref_logps mean", "paper, sum": "--estimator paper --ref_logps sum", "monte carlo": "--estimator monte_carlo", "Zhat = 1": "--estimator constant"}
COSTS = {"none": 0.0, "mild (2)": 2.0, "high (6)": 6.0, "reward model": None}
BETAS = ("0.5", "2")  # beside 1, where every combination is run


def with_true_rewards(source, target, plan, cost, draws=None):
    """Copy a table file, its rewards replaced by the true ones with this cost of a mismatched answer (None: keep the reward model's).

    `draws`: {(prompt, answer): how often it was drawn}, whose logarithm is added to the answer's column.
    """
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    if cost is not None:
        for m, batch in enumerate(plan.batches):
            rows = [plan.examples[i] for i in batch]
            for i, x in enumerate(rows):
                for j, y in enumerate(rows):
                    tensors["rewards"][m, i, j] = miniature.true_reward(x.messages[-1]["content"], y.response, cost)
                    if draws:
                        tensors["rewards"][m, i, j] += math.log(draws[y.messages[-1]["content"], y.response])
    save_file(tensors, target, metadata=metadata)


def tables_of(lab, partners, data):
    """Table files of this composition, one for each cost: {cost: path with {seed} in it}. The models are run once a seed."""
    import tables

    files = {cost: str(lab.out / "readings" / f"tables_{partners}_{data}_{n}_seed{{seed}}.safetensors") for n, cost in enumerate(COSTS)}
    for seed in lab.seeds:
        of_seed = {cost: Path(file.format(seed=seed)) for cost, file in files.items()}
        if lab.dry_run or all(file.exists() for file in of_seed.values()):
            continue
        measured = of_seed["reward model"]
        measured.parent.mkdir(parents=True, exist_ok=True)
        flags = f"--model {lab.out}/llama_medium --reward_model {lab.world}/reward --data {lab.world}/{data}.jsonl --partners {partners} --max_response_tokens 64 --seed {seed}"
        miniature.call("tables", f"{flags} --out {measured}", lab.out / "log.txt")
        *_, plan, _ = load_plan(tables.parse_args(flags.split()), "all", show=False)
        for cost, file in of_seed.items():
            if COSTS[cost] is not None:
                with_true_rewards(measured, file, plan, COSTS[cost], draws_of(lab) if data == "on_policy" else None)
    return files


def draws_of(lab):
    """{(prompt, answer): how often pi_ref drew it}."""
    rows = [json.loads(line) for line in (lab.world / "on_policy.jsonl").read_text().splitlines()]
    return Counter((row["prompt"], answer) for row in rows for answer in row["responses"])


def sample_from_reference(lab, per_prompt=5):
    """on_policy.jsonl: answers to the training prompts sampled from pi_ref itself (temperature 1), with their true rewards."""
    file = lab.world / "on_policy.jsonl"
    if lab.dry_run or file.exists():
        return
    gen, seeds = lab.world / "on_policy_samples.jsonl", ",".join(map(str, range(100, 100 + per_prompt)))
    flags = f"--seeds {seeds} --temperature 1 --top_p 1 --top_k 0 --max_response_tokens 64 --batch_size 60"
    miniature.call("eval", f"generate --model {lab.out}/llama_medium --data train={lab.world}/train.jsonl --out {gen} {flags}", lab.out / "log.txt")
    groups = {}
    for row in map(json.loads, open(gen)):
        if row["response"].strip():
            groups.setdefault(row["prompt"][0]["content"], []).append(row["response"])
    rows = [{"prompt": p, "responses": some, "scores": [miniature.true_reward(p, y) for y in some]} for p, some in groups.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(lab, figures):
    lab.build()
    sample_from_reference(lab)
    torch.set_num_threads(1)
    files = {(partners, data): tables_of(lab, partners, data) for partners in ("batch", "group") for data in ("train", "on_policy")}
    jobs = {}

    def add(estimator, partners, cost, normalize, beta, data="train"):
        steps = "{steps}" if partners == "batch" else "{group_steps}"
        flags = f"--loss var {JUDGE} {DATA.replace('train', data)} --max_steps {steps} --lr 1e-3 --partners {partners} {ESTIMATORS[estimator]} --beta {beta}"
        flags += f" --tables {files[partners, data][cost]}" + (" --normalize_weights" if normalize else "")
        key = f"readings/{estimator}/{partners}/{cost}/{data}/beta{beta}{'/normalised' if normalize else ''}"
        jobs[estimator, partners, cost, normalize, beta, data] = Job(key, flags, "llama_medium", "llama_medium", search=False, beta=float(beta), seeds=() if beta == "1" else (0,))

    for estimator in ESTIMATORS if not lab.quick else ("paper, mean", "paper, sum"):
        for partners in ("batch", "group"):
            for cost in COSTS:
                if cost in ("mild (2)", "high (6)") and (partners == "group" or estimator == "Zhat = 1"):
                    continue  # no mismatched answer enters the weights: the same run as "none"
                if lab.quick and cost not in ("mild (2)", "reward model"):
                    continue
                add(estimator, partners, cost, False, "1")
                if cost == "reward model" and not lab.quick:
                    add(estimator, partners, cost, True, "1")
                    for beta in BETAS:
                        add(estimator, partners, cost, estimator == "paper, sum", beta)
            add(estimator, partners, "mild (2)", False, "1", "on_policy")
    done = lab.do(jobs.values())
    if not done:
        return None
    rows, points = [], []
    for (estimator, partners, cost, normalize, beta, data), job in jobs.items():
        result = done[job.key]
        name = [estimator, partners, cost if data == "train" else f"{cost}; y ~ pi_ref", "yes" if normalize else "no", beta]
        if "failed" in result:
            why = "refused: a weight overflows float32" if "above the largest" in result["failed"] else f"failed: {result['failed'][:60]}"
            rows.append([*name, why, *[""] * 6])
            continue
        ess, share = weights_of(result)
        columns = [cell(values(result, "all", c)) for c in ("true", "E[r]-bKL")] + [f"{result['runs'][0]['all']['bound']:.2f}"]
        rows.append([*name, *columns, *(cell(values(result, "all", c)) for c in ("KL(pi*,pi)", "leaked")), f"{ess:.1f}", "-" if share != share else f"{share:.2f}"])
        if beta == "1":
            number = {c: average(result, n) for c, n in (("gap", "KL(pi*,pi)"), ("objective", "E[r]-bKL"), ("reward", "true"))}
            points.append(number | {"estimator": estimator, "partners": partners, "cost": cost, "data": data, "normalize": normalize, "share": None if share != share else share})
    from paper.figures import readings_figure

    bound = next((r["runs"][0]["all"]["bound"] for key, job in jobs.items() if key[4] == "1" and "failed" not in (r := done[job.key])), float("nan"))
    text = readings_figure(points, bound, figures / "readings")
    head = ["Zhat", "partners", "cost of a mismatch", "normalised", "beta", "true reward", "E[r] - beta KL", "beta log Z", "KL(pi*, pi)", "leaked", "ESS", "self_share"]
    return {"markdown": f"{text}\n\n" + table(head, rows), "claims": claims_of(points)}


def claims_of(points):
    def mean(name, **wanted):
        some = [p[name] for p in points if all(p[k] == v for k, v in wanted.items())]
        return sum(some) / len(some) if some else float("nan")

    paper = {"estimator": "paper, mean", "normalize": False, "data": "train"}
    claims = [("as mismatched answers cost more (0, 2, 6), VAR with the paper's partners gains less reward",
               verdict(mean("reward", partners="batch", cost="none", **paper) > mean("reward", partners="batch", cost="mild (2)", **paper) > mean("reward", partners="batch", cost="high (6)", **paper)))]  # fmt: skip
    claims += [("partners of the same prompt come nearer to pi* than the paper's", verdict(mean("gap", partners="group", cost="reward model", **paper) < mean("gap", partners="batch", cost="reward model", **paper)))]
    on_policy = [p for p in points if p["data"] == "on_policy"]
    if on_policy:
        best = min(on_policy, key=lambda p: p["gap"])
        exact = best["estimator"] == "Zhat = 1" or (best["estimator"] == "monte carlo" and best["partners"] == "group")
        claims += [(f"with y ~ pi_ref, a reading for which Eq. 7-9 hold exactly is nearest to pi* (nearest: {best['estimator']}, {best['partners']}, KL {best['gap']:.2f})", verdict(exact))]
    return claims
