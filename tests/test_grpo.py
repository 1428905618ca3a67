"""baselines/grpo.py as its users meet it: samples, groups, inner steps, two processes, resume, refusals. Its loss is in test_losses.py."""

import json
import os
import signal

import pytest
from test_train import THINGS, world, write  # noqa: F401  world is a fixture
from tiny import run_program

import torch
import transformers

from baselines import grpo

CLOCKS = ("time/sampling", "time/rewards", "time/update", "time/total", "time/sampling_share")
LENGTH = "def short(messages, response):\n    return -len(response)\n\ndef last(messages, response):\n    return messages[-1]['content'].count('k') - response.count('e') / 9\n\ndef text(messages, response):\n    return 'good'\n"


@pytest.fixture(scope="module")
def rules(world):  # noqa: F811
    file = world.folder / "rules.py"
    file.write_text(LENGTH)
    return file


def words(world, out, more="", **flags):  # noqa: F811
    usual = {"model": world.policy, "data": world.pairs, "output_dir": out, "prompts": 4, "samples": 3, "max_response_tokens": 12, "lr": 1e-3, "max_steps": 3, "save_every": 0}
    return [str(w) for flag, value in (usual | flags).items() for w in (f"--{flag}", value)] + more.split()


def start(argv, folder, before=None, processes=1):
    status, out, err = run_program(grpo, argv, folder, before, processes)
    assert status == 0, err
    return out


def refused(argv, folder, *message, processes=1):
    status, _, err = run_program(grpo, argv, folder, processes=processes)
    line = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err and all(word in line for word in message), err


def metrics_of(out):
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in open(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(world, rules):  # noqa: F811
    out = world.folder / "grpo"
    printed = start(words(world, out, reward_function=f"{rules}:last", eval_data=world.held_out, inner_steps=2, max_steps=6, save_every=1, keep=5, lr=1e-2, seed=3), world.folder)
    return out, printed


def test_the_folder_is_train_pys_and_reopens(run):
    """safetensors, run.json, metrics.jsonl with one line a step and one before, evaluations with rewards; the share of sampling is told."""
    out, printed = run
    rows = metrics_of(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6] and json.loads((out / "run.json").read_text())["finished"]
    assert transformers.AutoModelForCausalLM.from_pretrained(out) and "of which sampling" in printed
    share = json.loads(open(out / "metrics.jsonl").readlines()[1])
    assert share["time/sampling_share"] == pytest.approx(share["time/sampling"] / share["time/total"]) and share["time/total"] >= share["time/sampling"] + share["time/rewards"]
    for step in (0, 6):
        answers = [json.loads(line) for line in open(out / "eval" / f"step_{step}.jsonl")]
        assert rows[step]["eval/reward"] == pytest.approx(sum(a["reward"] for a in answers) / 2) and len(answers) == 2


def test_the_first_inner_step_has_ratio_one_and_a_loss_of_zero_and_the_second_moves(run):
    """Advantages of a group add up to 0, so -mean A = 0 at pi_old; after one update the ratio differs from 1."""
    rows = metrics_of(run[0])
    assert all(abs(rows[step]["loss"]) < 1e-5 and rows[step]["clipped"] == 0 for step in (1, 3, 5))
    assert all(abs(rows[step]["loss"]) > 1e-4 for step in (2, 4)) and 0 < rows[2]["clipped"] <= 1
    assert rows[1]["reward"] == rows[2]["reward"] != rows[3]["reward"]  # inner steps share their samples


def test_a_kill_and_a_resume_end_in_the_same_weights(world, rules, run, tmp_path):  # noqa: F811
    """Checkpoints stand between batches of samples; what follows is sampled anew from the same random streams."""
    argv = words(world, tmp_path / "out", "--resume", reward_function=f"{rules}:last", eval_data=world.held_out, inner_steps=2, max_steps=6, save_every=1, keep=5, lr=1e-2, seed=3)

    def die_in_the_fourth_step():
        lr_at = grpo.lr_at
        grpo.lr_at = lambda step, *rest: os.kill(os.getpid(), signal.SIGKILL) if step == 3 else lr_at(step, *rest)

    assert run_program(grpo, argv, tmp_path, die_in_the_fourth_step)[0] == -9
    assert "resuming after step 2" in start(argv, tmp_path)
    assert metrics_of(tmp_path / "out") == metrics_of(run[0])
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (run[0], tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_size_of_a_micro_batch_and_the_number_of_processes_change_nothing(world, rules, tmp_path):  # noqa: F811
    """12 sequences at once, 5 at a time, or 6 on each of two processes: the same samples, advantages and gradients."""
    runs = {}
    for name, more, processes in (("one", "--micro_batch 12", 1), ("parts", "--micro_batch 5", 1), ("two", "--micro_batch 4", 2)):
        start(words(world, tmp_path / name, more + " --kl_coef 0.1", reward_function=f"{rules}:last"), tmp_path, processes=processes)
        runs[name] = metrics_of(tmp_path / name)
    for name in ("parts", "two"):
        for a, b in zip(runs["one"], runs[name]):
            assert a["reward"] == pytest.approx(b["reward"], abs=1e-6) and a["response_tokens"] == b["response_tokens"]
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-3) and a["kl"] == pytest.approx(b["kl"], abs=1e-5)
    assert runs["one"][0]["kl"] == pytest.approx(0, abs=1e-6) and runs["one"][2]["kl"] > 0


def test_a_reward_that_can_be_learned_is_learned(world, rules, tmp_path):  # noqa: F811
    """Shorter is better: 25 steps make the samples shorter."""
    start(words(world, tmp_path / "out", reward_function=f"{rules}:short", max_steps=25, prompts=6, samples=6, lr=5e-3), tmp_path)
    rows = metrics_of(tmp_path / "out")
    first, last = (sum(row["reward"] for row in some) / 5 for some in (rows[:5], rows[-5:]))
    assert last > first + 3


def test_a_reward_model_serves_too_and_questions_without_answers_are_enough(world, tmp_path):  # noqa: F811
    questions = write(tmp_path / "q.jsonl", [{"prompt": f"Where is the {x}?"} for x in THINGS])
    printed = start(words(world, tmp_path / "out", reward_model=world.judge, data=questions), tmp_path)
    assert "12 prompts; 3 optimizer steps" in printed and len({row["reward"] for row in metrics_of(tmp_path / "out")}) == 3


def test_refusals_are_one_line(world, rules, tmp_path):  # noqa: F811
    refused(words(world, tmp_path / "a", reward_function=f"{rules}:nothing"), tmp_path, "has no function 'nothing'")
    refused(words(world, tmp_path / "b", reward_function="gone.py:f"), tmp_path, "gone.py:f", "no such file")
    refused(words(world, tmp_path / "c", reward_function=f"{rules}:text"), tmp_path, "returned 'good'", "finite number")
    refused(words(world, tmp_path / "d", reward_function=f"{rules}:short", prompts=11), tmp_path, "--prompts 11", "10 different prompts")
    refused(words(world, tmp_path / "e", reward_function=f"{rules}:short", prompts=3), tmp_path, "--prompts 3", "multiple of 2", processes=2)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.json").write_text("{}")
    refused(words(world, tmp_path / "f", reward_function=f"{rules}:short"), tmp_path, "already holds a model")


@pytest.mark.parametrize("bad", ["--samples 1", "--clip -0.1", "--prompts 0", "--inner_steps 0", "--eval_every 2", "--reward_model x"])
def test_an_impossible_flag_is_named(world, rules, capsys, bad):  # noqa: F811
    with pytest.raises(SystemExit, match="2"):
        grpo.parse_args(words(world, "x", reward_function=f"{rules}:short") + bad.split())
    assert bad.split()[0] in capsys.readouterr().err


def test_samples_come_from_the_policy_itself(world, tmp_path, monkeypatch):  # noqa: F811
    """Temperature 1, no top-p, no top-k: otherwise the ratio would not be 1 at the start."""
    seen = []
    monkeypatch.setattr(grpo, "generate_responses", lambda *a: seen.append(a) or torch.missing)
    with pytest.raises(AttributeError):
        grpo.main(grpo.parse_args(words(world, tmp_path / "out", reward_model=world.judge)))
    _, _, prompts, seeds, most, temperature, top_p, top_k = seen[0]
    assert (most, temperature, top_p, top_k) == (12, 1.0, 1.0, 0) and len(prompts) == 12 == len(set(seeds)) and prompts[0] == prompts[2] != prompts[3]
