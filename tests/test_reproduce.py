"""paper/reproduce.py: the paper's commands parse, jobs search and resume, failures stay, rules and numbers are the paper's."""

import importlib
import json
import math
import re
import shlex

import pytest
from tiny import ROOT

import torch
from safetensors.torch import load_file, save_file

from data import Example, Plan, array
from paper import full_scale, miniature, readings, reproduce
from paper.items import ITEMS, METHODS, average, in_standard_errors, outcome, verdict
from paper.reproduce import SUBSETS, Job, Lab, cell, job_runs, run_flags, table

PROGRAMS = {"train.py": "train", "eval.py": "eval", "baselines/grpo.py": "baselines.grpo"}


def parse(line):
    """What the program of a printed command line makes of it."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word in PROGRAMS)
    return importlib.import_module(PROGRAMS[words[at]]).parse_args(words[at + 1 :])


@pytest.mark.parametrize("item", ITEMS)
def test_every_full_size_command_parses_with_this_repositorys_programs(item):
    """Names of flags, and what each needs; launch files exist; lm_eval's tasks are those of PAPER.md."""
    lines = [line for line in full_scale.commands(item) if not line.startswith("#")]
    assert lines or item == "readings"
    for line in lines:
        if "lm_eval run" in line:
            assert re.search(r"--tasks (\w+) ", line)[1] in (ROOT / "PAPER.md").read_text()
            continue
        if line.startswith("python -c"):
            compile(shlex.split(line)[2], "<command>", "exec")
            continue
        if "--config_file" in line:
            assert (ROOT / line.split("--config_file ")[1].split()[0]).exists()
        args = parse(line)
        if hasattr(args, "loss"):
            assert args.epochs in (1.0, 2.0) and args.batch_size in (2, 4, 8) and args.accum % int(line.split("--num_processes ")[1].split()[0]) == 0


def test_the_full_size_runs_are_the_papers():
    """Table 1 and 2: ten models, DPO and VAR, from base and SFT, both learning rates, three seeds; 32B in 4 bits on 4 x 8; Table 6: B = 2, 4, 8."""
    runs = [parse(line) for item in ("table1", "table2") for line in full_scale.commands(item) if "train.py" in line]
    aligned = [(r.loss, r.lr, r.seed) for r in runs if r.loss != "sft"]
    assert len(aligned) == 10 * 2 * 2 * 2 * 3 and {lr for _, lr, _ in aligned} == {1e-5, 5e-6} and {s for *_, s in aligned} == {0, 1, 2}
    assert all(r.load_in_4bit == ("32B" in r.model or "32B" in r.output_dir) for r in runs)
    assert [parse(line).batch_size for line in full_scale.commands("table6") if "train.py" in line] == [2, 4, 8]
    assert all("--num_machines 4 --num_processes 32" in line for item in ("table5", "table6") for line in full_scale.commands(item) if "train.py" in line)
    folders = [line.split("--out ")[1] for line in full_scale.commands("table1") if "offsetbias=offsetbias_test.jsonl" in line]  # the in-distribution column
    assert len(folders) == 4 * (2 + 24) and all(("Llama3.1-8B" in line or "Llama-3.1-8B" in line) == ("--num_processes 8 train.py" in line) for line in full_scale.commands("table1") if "train.py" in line)
    assert all("--load_in_4bit" in line for line in full_scale.commands("table2") if "32B" in line and "generate" in line)


def test_a_folder_is_made_before_it_is_read():
    """Every model that is a folder of ours was written by a line above."""
    for item in ("table1", "table2", "table5"):
        made = set()
        for line in (line for line in full_scale.commands(item) if "train.py" in line):
            args = parse(line)
            assert not args.model.startswith("runs/") or args.model in made, line
            made.add(args.output_dir)


def test_the_papers_rule_of_wins():
    """+1, 0, -1 in each order from the model's side; the sum decides. A prompt without a pair is left out."""
    prompt = "Does a goat fit into a teacup?"
    brief, rambling, evasive, wrong, _ = miniature.listed_answers(prompt)
    row = lambda text: {"prompt": [{"role": "user", "content": prompt}], "response": text}
    chosen = {prompt: rambling}
    assert [outcome(row(text), chosen) for text in (brief, rambling, evasive, wrong)] == [1, 0, -1, -1]
    assert outcome(row(brief), {}) is None


def lab(tmp_path, **more):
    return Lab(tmp_path, quick=True, **more)


def test_a_job_searches_on_its_first_seed_and_trains_the_others_with_the_best(tmp_path):
    """5 rates on seed 0, then seeds 1 and 2; a job with its own rate has no search; equal budgets: 450 steps of 8 responses for all, DPO 4 pairs."""
    whole = Lab(tmp_path)
    assert job_runs(Job("a", "--loss sft", "m", "m"), whole) == [("1e-5", 0), ("3e-5", 0), ("1e-4", 0), ("3e-4", 0), ("1e-3", 0), ("1e-5", 1), ("1e-5", 2)]
    assert job_runs(Job("a", "--loss sft --lr 1", "m", "m", search=False), whole) == [("", 0), ("", 1), ("", 2)]
    for name, flags in METHODS.items():
        args = importlib.import_module("train").parse_args(run_flags(Job(name, flags, "m", "m"), whole, "1e-3", 1).split())
        rows = 5 if args.partners == "group" else args.batch_size * (2 if args.loss == "dpo" else 1)  # a micro-batch of group: a prompt's five answers
        assert args.max_steps * rows == 3600 and args.seed == 1 and args.lr == 1e-3 and " " not in args.output_dir


def test_the_best_rate_is_that_of_the_highest_true_reward_and_a_failure_is_kept(tmp_path, monkeypatch):
    """Never the reward model's opinion. A rate that failed cannot win; a job of failures says why, and its cell reads "failed"."""
    rewards = {"1e-5": 0.0, "3e-5": 0.2, "1e-4": 0.5, "3e-4": 1.5, "1e-3": 0.1}

    def fake(job, lab, rate, seed, log):
        return {"failed": "a weight is inf"} if job.key == "bad" or rate == "1e-3" else {"training prompts": {"true": rewards[rate]}, "all": {"true": seed}}

    monkeypatch.setattr(reproduce, "train_and_evaluate", fake)
    whole = Lab(tmp_path)
    for key in ("good", "bad"):
        reproduce.work((Job(key, "--loss sft", "m", "m"), whole))
    good, bad = (json.loads((tmp_path / key / "result.json").read_text()) for key in ("good", "bad"))
    assert good["lr"] == "3e-4" and [run["all"]["true"] for run in good["runs"]] == [0, 1, 2] and average(good) == 1.0
    assert bad["failed"] == "a weight is inf" and bad["runs"] == [] and cell([]) == "failed" and average(bad) == float("-inf")


def test_a_finished_job_is_not_run_again_and_a_dry_run_runs_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text('{"key": "a"}')
    monkeypatch.setattr(reproduce, "work", None)
    assert lab(tmp_path).do([Job("a", "--loss sft", "m", "m")]) == {"a": {"key": "a"}}
    assert lab(tmp_path, dry_run=True).do([Job("b", "--loss sft --data {world}/train.jsonl", "m", "m")]) == {}
    assert capsys.readouterr().out.startswith("python train.py --model") and not (tmp_path / "b").exists()


@pytest.mark.parametrize("item", ITEMS)
def test_a_dry_run_of_every_item_prints_commands_that_parse(item, tmp_path, capsys):
    assert ITEMS[item].run(lab(tmp_path, dry_run=True), tmp_path) is None
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert lines and all(parse(line) for line in lines) and not list(tmp_path.iterdir())


def test_numbers_are_means_with_standard_errors_over_seeds():
    """(1, 2, 6): mean 3, error sqrt(7 / 3); one seed has none."""
    assert cell([1.0, 2.0, 6.0]) == "3.00 ± 1.53" and cell([2.0]) == "2.00" and verdict(False) == "does not"
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_true_rewards_replace_the_models_in_a_table_with_the_cost_of_a_mismatch(tmp_path):
    """r(x_i, y_j) of two prompts: the diagonal is what the style is worth, the rest costs 6 more."""
    prompts = ["Does a goat fit into a teacup?", "Does a pea fit into a garage?"]
    answers = [miniature.listed_answers(p)[0] for p in prompts]
    examples = [Example(array("i", [1]), array("i", [2]), [{"role": "user", "content": p}], y, None, "") for p, y in zip(prompts, answers)]
    save_file({"rewards": torch.zeros(1, 2, 2), "ref_logps": torch.full((1, 2, 2), -3.0)}, tmp_path / "a", metadata={"var_tables": "{}"})
    readings.with_true_rewards(tmp_path / "a", tmp_path / "b", Plan(examples, [[0, 1]], {}), 6.0)
    found = load_file(tmp_path / "b")
    right = miniature.true_reward(prompts[0], answers[1], 6.0)
    assert found["rewards"][0, 0, 0] == found["rewards"][0, 1, 1] == 2.0 and found["rewards"][0, 0, 1] == right < -3 and (found["ref_logps"] == -3).all()
    readings.with_true_rewards(tmp_path / "a", tmp_path / "c", Plan(examples, [[0, 1]], {}), 6.0, {(prompts[0], answers[0]): 1, (prompts[1], answers[1]): 3})
    torch.testing.assert_close(load_file(tmp_path / "c")["rewards"][0] - found["rewards"][0], torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]]))  # column j: drawn 3 times


def test_the_subsets_cover_the_held_out_prompts_once(tmp_path):
    _, held_out = miniature.split_prompts()
    rows = lambda prompts: "".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    (tmp_path / "held_out.jsonl").write_text(rows(held_out))
    (tmp_path / "train.jsonl").write_text(rows(miniature.split_prompts()[0]))
    reproduce.write_subsets(tmp_path)
    found = [json.loads(line)["prompt"] for name in SUBSETS for line in open(tmp_path / f"{name}.jsonl")]
    assert sorted(found) == sorted(held_out) and len(open(tmp_path / "training.jsonl").readlines()) == 60


def test_full_scale_only_prints(capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.parse_args(["table1", "--scale", "full"])
    assert "--dry_run" in capsys.readouterr().err
    reproduce.main(reproduce.parse_args(["table4", "--scale", "full", "--dry_run"]))
    assert "baselines/grpo.py" in capsys.readouterr().out


@pytest.mark.slow
def test_every_row_of_every_item_runs(tmp_path):
    """`all --quick`: a few steps of everything. Every item is in the report, nothing failed, every picture is there."""
    reproduce.main(reproduce.parse_args(["all", "--quick", "--out", str(tmp_path)]))
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"## {item.title}" in text for item in ITEMS.values()) and "failed" not in text
    for name in ("figure1", "figure2", "figure3", "readings"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "figures" / f"{name}.svg").read_text()
    assert "does not" in text or "holds in miniature" in text


def test_a_difference_is_read_in_its_standard_errors():
    """(mean a - mean b) / sqrt(se_a^2 + se_b^2): 2, 4 against 0, 2: means 3 and 1, both errors 1."""
    assert in_standard_errors([2.0, 4.0], [0.0, 2.0]) == pytest.approx(2 / 2**0.5)
    assert in_standard_errors([1.0, 1.0], [1.0, 1.0]) == 0 and math.isnan(in_standard_errors([], [1.0]))
