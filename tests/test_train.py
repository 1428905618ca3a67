"""train.py as its users meet it: the loop against hand computation, kills and resumes, refusals, real preference files. CPU, no network."""

import argparse
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny import ENVIRONMENT, ROOT, SHARED_DATA, bpe_tokenizer, causal_lm, chatml_tokenizer, reward_model, run_program, save, write

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval.files as eval_file
import model as model_file
import tables as tables_file
import train
from data import collate, encode_records, load_plan, load_tokenizer, pad_id, step_micro_batches
from formats import read_rows
from model import load_policy, load_reward_model, sequence_logps
from reward import bind_scores, score

torch.set_num_threads(1)
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

THINGS = "kettle lamp stove ladder drawer spoon pillow shelf broom candle bucket mirror".split()
CLOCKS = ("tokens_per_second", "seconds")  # what no two runs share


def pairs(things):
    return [{"prompt": f"Where is the {x}?", "chosen": f"The {x} is in the hall.", "rejected": f"No idea, look for your {x} alone and let me sleep!"} for x in things]


def groups(things):
    """Two, three or four answers to a prompt, with scores."""
    answers = ["It is in the hall.", "Somewhere.", "The {} again? Not my job.", "Ask the dog about your {}, not me."]
    return [{"prompt": f"Where is the {x}?", "responses": [a.format(x) for a in answers[: 2 + i % 3]], "scores": [2.0, 0.5, -1.0, -2.0][: 2 + i % 3]} for i, x in enumerate(things)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a policy (tied head, attention dropout in its config), a reward model with another tokenizer, and data."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, reward_tokenizer = chatml_tokenizer(), bpe_tokenizer(vocab_size=350)
    policy = causal_lm("llama", vocab_size=len(tokenizer), tied=True, attention_dropout=0.1, initializer_range=0.1)
    judge = reward_model("qwen2", vocab_size=len(reward_tokenizer), initializer_range=0.2)
    return SimpleNamespace(
        folder=folder,
        policy=save(folder / "policy", policy, tokenizer),
        judge=save(folder / "judge", judge, reward_tokenizer),
        pairs=write(folder / "pairs.jsonl", pairs(THINGS[:10])),  # 20 examples, 5 micro-batches of 4
        held_out=write(folder / "held_out.jsonl", pairs(THINGS[10:])),
        groups=write(folder / "groups.jsonl", groups(THINGS)),  # micro-batches of 2, 3 and 4 rows
    )


def command(world, out, more="", data="pairs", judge=True, **flags):
    """The words of a command line: the usual ones, then `flags`, then `more`."""
    usual = {"model": world.policy, "data": getattr(world, str(data), data), "output_dir": out, "batch_size": 4, "lr": 1e-3, "save_every": 0}
    usual |= {"reward_model": world.judge} if judge else {}
    return [str(word) for flag, value in (usual | flags).items() for word in (f"--{flag}", value)] + more.split()


def start(argv, folder, before=None):
    """`python train.py ARGV` that must succeed -> what it printed."""
    status, out, err = run_program(train, argv, folder, before)
    assert status == 0, err
    return out


def refused(argv, folder, *words, before=None):
    """`python train.py ARGV` must stop with exit status 2 and one line that has these words, and without a traceback -> that line."""
    status, out, err = run_program(train, argv, folder, before)
    assert status == 2 and "Traceback" not in err, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("train.py: error: "), err
    for word in words:
        assert word in line, (word, line)
    return line


def metrics_of(out):
    """(one dict per optimizer step, one dict per evaluation), without the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]
    steps = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in rows if "loss" in row]
    return steps, [{name: value for name, value in row.items() if name == "step" or name.startswith("eval/")} for row in rows if "eval/loss" in row]


def plan_of(argv):
    args = train.parse_args(argv)
    tokenizer, _, plan, _ = load_plan(args, args.responses or train.LOSSES[args.loss].responses, show=False)
    return plan, tokenizer


def logps_of(folder, examples, tokenizer):
    """log pi(y|x) of each example under the model of this folder, (N,)."""
    with torch.no_grad():
        return sequence_logps(load_policy(str(folder)).eval(), **collate(examples, pad_id(tokenizer)))


def first_gradients(world, rows, coefficient):
    """d/dtheta of -sum_n coefficient_n log pi(y_n | x_n), computed with the model's own full logits, one example at a time -> (model, loss)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(world.policy).eval()
    total = 0.0
    for example, c in zip(rows, coefficient):
        ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
        logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[len(example.prompt_ids) - 1 :].sum()
        (-c * logps).backward()
        total -= c * logps.item()
    return model, total


# ----------------------------------------------------------------------------------------------------------------------
# One run that a user types, and what it leaves


@pytest.fixture(scope="module")
def run(world):
    """`python train.py ...` from another folder: 8 steps of 2 micro-batches, evaluations every 2 steps, checkpoints."""
    out = world.folder / "run"
    flags = dict(eval_data=world.held_out, accum=2, epochs=3, eval_every=2, save_every=2, max_response_tokens=16, reward_dtype="float32")
    argv = command(world, out, **flags)
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv], cwd=world.folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, argv=argv, flags=flags, printed=done.stdout, steps=metrics_of(out)[0], evaluations=metrics_of(out)[1])


def test_metrics_hold_one_object_per_optimizer_step_with_the_promised_names(run):
    """Issue, point 7. ceil(3 epochs x 5 micro-batches / 2) = 8 steps."""
    names = "step rows loss lr grad_norm policy_logps rewards log_z weights/mean weights/max weights/ess weights/self_share tokens_per_second seconds".split()
    raw = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in raw if "loss" in row):
        assert sorted(name for name in row if not name.startswith("eval/")) == sorted(names) and all(math.isfinite(value) for value in row.values())
        assert row["tokens_per_second"] > 0 and row["rows"] == 8
    assert [row["step"] for row in run.steps] == list(range(1, 9))
    assert [row["step"] for row in run.evaluations] == [0, 2, 4, 6, 8]


def test_the_first_step_is_algorithm_1_by_hand(world, run):
    """Lines 2-8 written out from the table's numbers with nothing of var.py: sums over the response, divided by its tokens in Zhat (departure 2)."""
    plan, tokenizer = plan_of(run.argv)
    table = load_file(run.out / "tables.safetensors")
    rows = {name: [] for name in ("weights", "rewards", "log_z", "policy", "ess", "share", "examples")}
    for m in step_micro_batches(0, 2, 5, seed=0):
        r, logps, tokens = table["rewards"][m], table["ref_logps"][m], table["response_tokens"][m]
        for i in range(4):
            terms = [math.exp(r[i, j] / 1.0) * math.exp(logps[i, j] / tokens[j]) for j in range(4)]  # Zhat's, beta = 1
            rows["log_z"].append(math.log(sum(terms) / 4))
            rows["weights"].append(math.exp(r[i, i]) / (sum(terms) / 4))
            rows["share"].append(terms[i] / sum(terms))
            rows["rewards"].append(float(r[i, i]))
            rows["policy"].append(float(logps[i, i]))  # at step 0 the policy is the reference
            rows["examples"].append(plan.examples[plan.batches[m][i]])
        w = rows["weights"][-4:]
        rows["ess"] += [sum(w) ** 2 / sum(x * x for x in w)]
    scale = sum(len(e.response_ids) for e in plan.examples) / 20
    mean = lambda values: sum(values) / len(values)
    expected = {
        "loss": mean([-w * logp for w, logp in zip(rows["weights"], rows["policy"])]) / scale, "policy_logps": mean(rows["policy"]), "rewards": mean(rows["rewards"]),
        "log_z": mean(rows["log_z"]), "weights/mean": mean(rows["weights"]), "weights/max": max(rows["weights"]), "weights/ess": mean(rows["ess"]), "weights/self_share": mean(rows["share"]),
    }  # fmt: skip
    assert {name: run.steps[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert max(rows["rewards"]) - min(rows["rewards"]) > 0.5  # weights that differ

    model, loss = first_gradients(world, rows["examples"], [w / 8 / scale for w in rows["weights"]])
    assert loss == pytest.approx(run.steps[0]["loss"], rel=1e-4)
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
    assert norm == pytest.approx(run.steps[0]["grad_norm"], rel=1e-4)


def test_the_learning_rate_warms_up_and_follows_a_cosine(run):
    """8 steps, 3 % warm-up: one step at 1e-3, then the cosine, which would be zero at step 9."""
    cosine = [0.5e-3 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    assert [row["lr"] for row in run.steps] == pytest.approx([1e-3, *cosine], rel=1e-9)


def test_out_is_a_plain_hugging_face_folder(run):
    """It opens without this code, keeps the chat template, and stops where training taught to stop."""
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(run.out), transformers.AutoTokenizer.from_pretrained(run.out)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.attention_dropout == 0.1  # off while we train, but the config is the user's
    assert tokenizer.chat_template == chatml_tokenizer().chat_template
    assert model.generation_config.eos_token_id in (tokenizer.convert_tokens_to_ids("<|im_end|>"), [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_run_json_says_what_was_run(world, run):
    about = json.loads((run.out / "run.json").read_text())
    assert about["args"]["beta"] == 1.0 and about["args"]["data"] == [world.pairs] and about["args"]["accum"] == 2
    assert set(about["args"]) == set(vars(train.parse_args(run.argv)))
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["transformers"] == transformers.__version__ and "accelerate" in about["versions"]
    assert about["models"] == {name: model_file.fingerprint(name) for name in (world.policy, world.judge)}
    assert re.fullmatch(r"[0-9a-f]{16}", about["plan"]) and about["steps"] == 8 and about["processes"] == 1 and about["finished"] is True
    assert not list(run.out.rglob("*.tmp")) and not list(run.out.rglob(".s*"))  # nothing half-written is left


def test_generations_along_training_are_scored_after_it(world, run):
    """Figure 2: eval/step_N.jsonl, and eval/rewards.jsonl with exactly what reward.score gives."""
    lines = [json.loads(line) for line in (run.out / "eval" / "rewards.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    judge, tokenizer = bind_scores(load_reward_model(world.judge)), load_tokenizer(world.judge)
    for line in lines:
        rows = eval_file.read_jsonl(run.out / "eval" / f"step_{line['step']}.jsonl")
        assert line["n"] == len(rows) == 2 and {row["prompt"][0]["content"] for row in rows} == {f"Where is the {x}?" for x in THINGS[10:]}
        rewards = score(judge, tokenizer, [(row["prompt"], row["response"]) for row in rows], progress=False)
        assert line["reward"] == pytest.approx(sum(rewards) / 2, abs=1e-5)
        assert line["sigmoid100"] == pytest.approx(sum(100 / (1 + math.exp(-r)) for r in rewards) / 2, abs=1e-4)
    assert len({line["reward"] for line in lines}) > 1  # the policy moved


def test_the_summary_and_the_cost_are_printed_before_training(run):
    for words in ("8 optimizer steps x 2 micro-batches x B = 4, on 1 process", "rewards: 5 micro-batches", "forward tokens", "self_share", "beta 1: effective sample size"):
        assert words in run.printed


@pytest.mark.parametrize("launcher", ["fork", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_walk_through_the_same_steps(world, run, launcher):
    """The same weights to 1e-6, the same metrics, and a learning rate that is not twice as fast.

    (torchrun, because `accelerate launch --cpu --num_processes 2` starts a single process.)
    """
    out, argv = world.folder / f"two_{launcher}", command(world, world.folder / f"two_{launcher}", **run.flags)
    if launcher == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
        done = subprocess.run([*launch, *argv], cwd=world.folder, env=ENVIRONMENT, capture_output=True, text=True)
        status, printed, err = done.returncode, done.stdout, done.stderr
    else:
        status, printed, err = run_program(train, argv, world.folder, processes=2)
    assert status == 0, err
    assert "on 2 process" in printed and printed.count("done, opens with") == 1
    one, two = load_file(run.out / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == two.keys() and max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6
    for ours, theirs in zip(metrics_of(out), (run.steps, run.evaluations), strict=True):
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs):
            assert a == pytest.approx(b, rel=1e-4)
    assert [row["lr"] for row in metrics_of(out)[0]] == [row["lr"] for row in run.steps]
    for step in (0, 2, 4, 6, 8):  # and the same generations
        texts, alone = ([row["response"] for row in eval_file.read_jsonl(folder / "eval" / f"step_{step}.jsonl")] for folder in (out, run.out))
        assert texts == alone
    assert (out / "eval" / "rewards.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Kill and resume


def kill_at(module, name, call):
    """Make the child kill -9 itself as it is about to call module.name for the `call`-th time."""
    original, calls = getattr(module, name), iter(range(1, 10**9))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def test_a_run_killed_at_six_moments_ends_bit_for_bit_the_same(world, run):
    """kill -9 in the tables, before the first checkpoint, around evaluations and checkpoints, and before the end; then --resume."""
    out = world.folder / "killed"
    argv = command(world, out, "--resume", **run.flags)

    def killed(before):
        status, printed, err = run_program(train, argv, world.folder, before)
        assert status == -signal.SIGKILL, err
        return printed

    killed(lambda: kill_at(tables_file, "save_file", 2))  # in the tables: the rewards are on disk
    assert not (out / "run.json").exists() and not (out / "tables.safetensors").exists()
    printed = killed(lambda: kill_at(train, "lr_at", 2))  # in the second step, before any checkpoint
    assert "rewards: 5 micro-batches" not in printed and "ref_logps: 5 micro-batches" in printed  # the rewards were not measured again
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # a torn line
    assert "forward tokens" not in killed(lambda: kill_at(train, "evaluate", 2))  # at step 2
    killed(lambda: kill_at(train.shutil, "rmtree", 1))  # at step 4: its checkpoint is whole, that of step 2 not yet gone
    printed = killed(lambda: kill_at(train, "evaluate", 1))  # at step 6
    assert "resuming after step 4" in printed and sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_2", "step_4"]
    printed = killed(lambda: kill_at(train, "save_model", 1))
    assert "resuming after step 4" in printed and [p.name for p in (out / "checkpoints").iterdir()] == ["step_6"]  # --keep 1
    assert "finished" not in json.loads((out / "run.json").read_text()) and not (out / "config.json").exists()
    assert "resuming after step 6" in start(argv, world.folder)

    assert metrics_of(out) == (run.steps, run.evaluations)
    for name in ("model.safetensors", "tables.safetensors", "eval/step_2.jsonl", "eval/step_8.jsonl", "eval/rewards.jsonl"):
        assert (out / name).read_bytes() == (run.out / name).read_bytes(), name
    before = (out / "run.json").stat().st_mtime_ns
    assert "this run is finished" in start(argv, world.folder) and (out / "run.json").stat().st_mtime_ns == before


def test_evaluation_leaves_trainings_random_state_alone(world, run):
    """The same weights without any evaluation; with dropout (off in log pi_theta, on in the config), sampling, and another number of evaluations."""
    out = world.folder / "without_evaluation"
    start(command(world, out, tables=run.out / "tables.safetensors", **{k: v for k, v in run.flags.items() if k not in ("eval_data", "eval_every", "save_every")}), world.folder)
    assert metrics_of(out) == (run.steps, [])
    assert (out / "model.safetensors").read_bytes() == (run.out / "model.safetensors").read_bytes()


def test_gradient_checkpointing_changes_no_number(world, run, tmp_path):
    start(command(world, tmp_path / "out", "--gradient_checkpointing --max_steps 2", tables=run.out / "tables.safetensors", accum=2, max_response_tokens=16, reward_dtype="float32"), tmp_path)
    checkpointed, _ = metrics_of(tmp_path / "out")
    for name in ("loss", "grad_norm", "policy_logps"):
        assert checkpointed[0][name] == pytest.approx(run.steps[0][name], rel=1e-5)


def test_a_share_of_the_prompts_can_be_held_out(world, tmp_path):
    """--eval_fraction splits by prompt; without --eval_every there are five evaluations and the one at the start; 0 prompts write nothing."""
    printed = start(command(world, tmp_path / "out", "--loss sft --responses all --eval_fraction 0.2 --eval_prompts 0 --max_steps 10", judge=False), tmp_path)
    assert "training: 16 examples" in printed and "held out: 4 examples" in printed
    steps, evaluations = metrics_of(tmp_path / "out")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6, 8, 10] and len(steps) == 10
    assert all(sorted(row) == ["eval/loss", "eval/policy_logps", "step"] for row in evaluations)
    assert not (tmp_path / "out" / "eval").exists()


def test_resume_with_other_settings_is_refused_naming_them(world, run, tmp_path):
    message = refused(command(world, run.out, "--resume", **run.flags | {"beta": 2, "epochs": 4}), tmp_path, "--resume with other settings", "beta: 1.0 there, 2.0 now", "epochs: 3.0 there, 4.0 now")
    assert "lr" not in message
    other = write(tmp_path / "pairs.jsonl", pairs(THINGS[:9]))
    refused(command(world, run.out, "--resume", **run.flags | {"data": other}), tmp_path, f"data: ['{world.pairs}'] there, ['{other}'] now")
    start(command(world, run.out, "--resume", **run.flags | {"save_every": 3, "keep": 2}), tmp_path)  # these may differ


def test_resume_notices_that_data_or_model_changed_under_their_name(world, tmp_path):
    """SFT has no tables that would tell."""
    data = write(tmp_path / "data.jsonl", pairs(THINGS[:10]))
    policy = save(tmp_path / "policy", causal_lm(vocab_size=400), chatml_tokenizer())
    argv = command(world, tmp_path / "out", "--loss sft --max_steps 1 --resume", model=policy, data=data)
    start(argv, tmp_path)
    save(tmp_path / "policy", causal_lm(vocab_size=400, seed=5), chatml_tokenizer())
    refused(argv, tmp_path, "--resume with other settings", policy)
    save(tmp_path / "policy", causal_lm(vocab_size=400), chatml_tokenizer())
    assert "finished" in start(argv, tmp_path)
    write(tmp_path / "data.jsonl", pairs(THINGS[1:11]))
    refused(argv, tmp_path, "--resume with other settings", "plan: ")


def test_a_folder_that_holds_something_is_not_written_over(world, run, tmp_path):
    """A second start in OUT, and the folder of the base model as OUT."""
    refused(run.argv, tmp_path, str(run.out), "already holds a run", "--resume", "--output_dir")
    base = shutil.copytree(world.policy, tmp_path / "base")
    refused(command(world, base, "--loss sft --max_steps 1", model=base), tmp_path, str(base), "already holds a model", "--output_dir")
    assert model_file.fingerprint(str(base)) == model_file.fingerprint(world.policy)


# ----------------------------------------------------------------------------------------------------------------------
# What it learns


@pytest.fixture(scope="module")
def toy_margins(world):
    """mean log pi(good) - mean log pi(bad) of the toy's answers, before training and after SFT on all of them."""
    plan, tokenizer = plan_of(command(world, "unused", "--loss sft --responses all", data="groups"))
    good = [e for e in plan.examples if e.score == 2.0]
    bad = [e for e in plan.examples if e.score < 0]
    margin = lambda folder: (logps_of(folder, good, tokenizer).mean() - logps_of(folder, bad, tokenizer).mean()).item()
    out = world.folder / "toy_sft"
    start(command(world, out, "--loss sft --responses all --accum 4 --epochs 4 --lr 3e-3", data="groups"), world.folder)
    return margin, margin(world.policy), margin(out)


@pytest.mark.parametrize("weights", ["--partners group --estimator paper", "--partners group --estimator monte_carlo", "--partners batch --estimator constant"])
def test_var_raises_high_reward_responses_over_low_reward_ones(world, toy_margins, tmp_path, weights):
    """Twelve prompts with two to four scored answers. SFT on the same answers raises all of them; VAR prefers. No reward model is needed."""
    margin, before, after_sft = toy_margins
    start(command(world, tmp_path / "out", f"{weights} --accum 4 --epochs 4 --lr 3e-3", data="groups", judge=False), tmp_path)
    assert margin(tmp_path / "out") > max(before, after_sft) + 3, (weights, before, after_sft, margin(tmp_path / "out"))


def test_the_sft_loss_is_the_models_own_cross_entropy(world, tmp_path):
    """transformers' own loss is a mean over tokens; ours is the sum over tokens, the mean over rows, divided by the constant of departure 1."""
    argv = command(world, tmp_path / "out", "--loss sft --accum 2 --max_steps 1", judge=False)
    start(argv, tmp_path)
    (first,), _ = metrics_of(tmp_path / "out")
    assert sorted(first) == ["grad_norm", "loss", "lr", "policy_logps", "rows", "step"]
    plan, tokenizer = plan_of(argv)
    assert len(plan.examples) == 10 and all("hall" in e.response for e in plan.examples)  # chosen only
    model, total, n = transformers.AutoModelForCausalLM.from_pretrained(world.policy).eval(), 0.0, 0
    for m in step_micro_batches(0, 2, 3, seed=0):
        for e in (plan.examples[i] for i in plan.batches[m]):
            ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
            labels = ids.clone()
            labels[:, : len(e.prompt_ids)] = -100
            total, n = total + model(input_ids=ids, labels=labels).loss.item() * len(e.response_ids), n + 1
    scale = sum(len(e.response_ids) for e in plan.examples) / 10
    assert n == first["rows"] == 8 and first["loss"] == pytest.approx(total / 8 / scale, rel=1e-5)
    assert first["policy_logps"] == pytest.approx(-total / 8, rel=1e-5)


def test_accumulation_is_the_mean_over_all_rows(world, tmp_path):
    """--accum 4 with groups of 2, 3 and 4 rows: every row counts the same, not every micro-batch. Loss, gradient norm and the updated weights."""
    argv = command(world, tmp_path / "out", "--accum 4 --max_steps 1 --partners group --max_grad_norm 0.5 --weight_decay 0.1", data="groups", judge=False)
    start(argv, tmp_path)
    (first,), _ = metrics_of(tmp_path / "out")
    plan, tokenizer = plan_of(argv)
    chosen = step_micro_batches(0, 4, len(plan.batches), seed=0)
    assert len({len(plan.batches[m]) for m in chosen}) > 1
    table, rows, weights = load_file(tmp_path / "out" / "tables.safetensors"), [], []
    for m in chosen:
        r, K = table["rewards"][m], len(plan.batches[m])
        terms = (r + table["ref_logps"][m] / table["response_tokens"][m])[:K, :K].exp()
        weights += (r.diagonal()[:K].exp() / terms.mean(dim=1)).tolist()
        rows += [plan.examples[i] for i in plan.batches[m]]
    scale = sum(len(e.response_ids) for e in plan.examples) / len(plan.examples)
    model, loss = first_gradients(world, rows, [w / len(rows) / scale for w in weights])
    assert first["rows"] == len(rows) == sum(len(plan.batches[m]) for m in chosen) and first["loss"] == pytest.approx(loss, rel=1e-4)
    assert first["grad_norm"] == pytest.approx(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item(), rel=1e-4)
    decayed, other = ([p for p in model.parameters() if (p.dim() >= 2) is matrix] for matrix in (True, False))
    torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=1e-3).step()
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    difference = torch.cat([(p - trained[name]).abs().flatten() for name, p in model.state_dict().items()])
    assert (difference < 1e-6).float().mean() > 0.999 and difference.max() < 2.1e-3  # AdamW's first step is +-lr: a gradient of zero may go either way


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_only_the_needed_micro_batches_are_measured_and_the_rest_later(world, run, tmp_path):
    """--max_steps 1 fills two of five micro-batches, the others stay nan; a longer run measures just those three, and the numbers are the same."""
    table = tmp_path / "tables.safetensors"
    printed = start(command(world, tmp_path / "short", tables=table, max_steps=1, accum=2, max_response_tokens=16, reward_dtype="float32"), tmp_path)
    assert "rewards: 2 micro-batches" in printed and "ref_logps: 2 micro-batches" in printed
    needed = step_micro_batches(0, 2, 5, seed=0)
    for name in ("rewards", "ref_logps"):
        values = load_file(table)[name]
        assert [m for m in range(5) if values[m].isfinite().all()] == sorted(needed) and [m for m in range(5) if not values[m].isnan().all()] == sorted(needed)
    printed = start(command(world, tmp_path / "long", tables=table, max_steps=3, accum=2, max_response_tokens=16, reward_dtype="float32"), tmp_path)
    assert "rewards: 3 micro-batches" in printed and "ref_logps: 3 micro-batches" in printed
    full = load_file(run.out / "tables.safetensors")
    for name, values in load_file(table).items():  # rounding depends on which responses share a forward
        assert torch.allclose(values, full[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", ["--beta 0.5", "--beta 2 --estimator monte_carlo", "--estimator constant --normalize_weights", "--ref_logps sum --normalize_weights"])
def test_one_table_serves_every_beta_and_estimator(world, run, tmp_path, weights):
    """Nothing is measured, nothing is written to it, and --lr, --accum and --max_steps do not matter either."""
    table = run.out / "tables.safetensors"
    before = table.stat().st_mtime_ns, table.read_bytes()
    argv = command(world, tmp_path / "out", weights, tables=table, max_steps=2, lr=1e-4, max_response_tokens=16, reward_dtype="float32")
    printed = start(argv, tmp_path, lambda: setattr(tables_file, "measure", None))
    assert "forward tokens" not in printed and (table.stat().st_mtime_ns, table.read_bytes()) == before
    assert not (tmp_path / "out" / "tables.safetensors").exists()


def test_a_table_that_does_not_fit_is_refused_naming_the_difference(world, run, tmp_path):
    fits = dict(tables=run.out / "tables.safetensors", max_steps=1, max_response_tokens=16, reward_dtype="float32")
    for flag, value, words in [
        ("seed", 1, "seed: 0 in the table, 1 in this run"),
        ("batch_size", 5, "batch_size: 4 in the table, 5 in this run"),
        ("data", world.held_out, "plan: "),
        ("reward_dtype", "bfloat16", "reward_dtype: float32 in the table, bfloat16 in this run"),
        ("ref_model", world.folder / "run", "ref_model: "),
    ]:
        refused(command(world, tmp_path / "out", **fits | {flag: value}), tmp_path, "does not fit", words, before=load_nothing)
    assert not (tmp_path / "out" / "run.json").exists()


def test_self_share_above_nine_tenths_is_warned_about(world, run, tmp_path):
    """A table in which a response of another prompt costs 4: the reward cancels and VAR is nearly SFT."""
    table = tmp_path / "tables.safetensors"
    values = load_file(run.out / "tables.safetensors")
    with safe_open(run.out / "tables.safetensors", "pt") as file:
        about = file.metadata()
    values["rewards"] = 4 * torch.eye(4).expand(5, 4, 4).contiguous()
    save_file(values, table, metadata=about)
    argv = command(world, tmp_path / "out", tables=table, max_steps=1, max_response_tokens=16, reward_dtype="float32")
    printed = start(argv, tmp_path)
    assert re.search(r"warning: self_share 0\.9\d+ is above 0\.9", printed) and "nearly plain SFT" in printed and "--partners group" in printed
    assert "warning" not in run.printed
    (first,), _ = metrics_of(tmp_path / "out")
    assert first["weights/self_share"] > 0.9 and first["weights/ess"] > 3.9  # the effective sample size looks its healthiest


LONG = [{"prompt": f"Tell me about the {x}.", "chosen": f"{x} and {y}. " * 12, "rejected": f"no {x}, never {y}! " * 12} for x, y in zip(THINGS[:4], THINGS[4:8])]


def test_sums_over_long_texts_overflow_with_an_explanation_and_run_normalised(world, tmp_path):
    """--ref_logps sum, the paper to the letter, on responses of a hundred tokens: weights above exp(88.7) stop the run before its first step."""
    data = write(tmp_path / "long.jsonl", LONG)
    sums = dict(data=data, tables=tmp_path / "tables.safetensors", ref_logps="sum", max_steps=1)
    line = refused(command(world, tmp_path / "out", **sums), tmp_path, "above the largest torch.float32 number", "sums of log-probs over long responses", "--ref_logps mean", "--normalize_weights", "--beta")
    assert "micro-batch" in line and not (tmp_path / "out" / "run.json").exists() and not (tmp_path / "out" / "metrics.jsonl").exists()
    start(command(world, tmp_path / "out", "--normalize_weights", **sums), tmp_path)
    (first,), _ = metrics_of(tmp_path / "out")
    assert first["weights/mean"] == pytest.approx(1, rel=1e-4) and 0 < first["loss"] < 100


def test_scores_of_the_data_replace_a_reward_model_only_where_they_suffice(world, tmp_path):
    """The matched pairs suffice for --estimator constant, one prompt's answers for --partners group; other prompts' rewards are in no file."""
    start(command(world, tmp_path / "out", "--estimator constant --max_steps 1", data="groups", judge=False), tmp_path)
    plan, _ = plan_of(command(world, tmp_path / "x", "--estimator constant", data="groups", judge=False))
    rewards = load_file(tmp_path / "out" / "tables.safetensors")["rewards"]
    (m,) = step_micro_batches(0, 1, len(plan.batches), seed=0)
    assert rewards[m].diagonal().tolist() == [plan.examples[i].score for i in plan.batches[m]]
    assert rewards[m].isnan().sum() == 12  # off the diagonal nobody knows
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(command(world, "x", data="groups", judge=False))
    line = refused(command(world, tmp_path / "o", "--estimator constant", judge=False), tmp_path, "pairs.jsonl:", "no score", "--reward_model", before=load_nothing)
    assert re.search(r"pairs\.jsonl:\d+: ", line)


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def test_help_answers_without_torch():
    code = "import runpy, sys; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')\nfinally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "--estimator {paper,monte_carlo,constant}" in done.stdout, done.stderr


def flags_of(monkeypatch):
    """The flags of train.py as argparse has them."""
    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv=None: seen.append(self) or sys.exit(0))
    with pytest.raises(SystemExit):
        train.parse_args([])
    return {action.dest: action for action in seen[0]._actions}


def test_every_flag_is_explained_and_the_defaults_are_the_papers(monkeypatch):
    """Sec. 4.1: AdamW, cosine, learning rate 1e-5 (or 5e-6), B = 8, two epochs. And the flags that must be there are."""
    flags = flags_of(monkeypatch)
    assert all(action.help for action in flags.values())
    promised = "model ref_model reward_model data eval_data eval_fraction batch_size accum epochs max_steps lr beta estimator partners ref_logps normalize_weights responses max_prompt_tokens max_response_tokens seed save_every keep resume output_dir loss tracker eval_every gradient_checkpointing"
    assert set(promised.split()) <= set(flags)
    assert flags["lr"].default == 1e-5 and flags["batch_size"].default == 8 and flags["epochs"].default == 2 and train.LOSSES["var"].beta == 1.0
    for name, word in {"lr": "paper: 1e-5 and 5e-6", "batch_size": "paper: 8", "epochs": "paper: 2", "warmup_ratio": "paper: cosine", "beta": "not stated in the paper"}.items():
        assert word in flags[name].help
    assert (flags["estimator"].default, flags["partners"].default, flags["loss"].default, flags["ref_logps"].default) == ("paper", "batch", "var", "mean")
    source = inspect.getsource(train)  # a flag that nothing reads would be a lie
    source += "".join((ROOT / name).read_text() for name in ("data.py", "tables.py", "baselines/methods.py", "baselines/alol.py"))
    assert [name for name in flags if name != "help" and f"args.{name}" not in source and f'"{name}"' not in source] == []


BAD_FLAGS = [
    "--beta 0", "--beta -1", "--beta nan", "--beta inf", "--lr 0", "--lr inf", "--epochs 0", "--epochs inf", "--max_steps 0", "--accum 0", "--eval_every 0", "--max_grad_norm 0", "--batch_size 1", "--batch_size two",
    "--warmup_ratio 1.5", "--warmup_ratio -0.1", "--weight_decay -1", "--eval_prompts -1", "--save_every -1", "--keep 0", "--seed -1", "--max_reward_tokens 0", "--loss ppo", "--estimator exact", "--nonsense 3",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_an_impossible_flag_is_named(world, capsys, bad):
    flag, value = bad.split()
    with pytest.raises(SystemExit) as stop:
        train.parse_args(command(world, "out", bad))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and flag in message and value in message, message


def test_without_data_and_model_it_is_the_miniature_world_and_what_is_typed_wins():
    assert train.parse_args([]).model.endswith("base") and train.parse_args([]).loss == "var"
    assert train.parse_args(["--beta", "3", "--lr", "0.5"]).beta == 3 and train.parse_args(["--beta", "3", "--lr", "0.5"]).lr == 0.5


def test_missing_flags_are_named(world, capsys):
    for argv, word in [(["--model", world.policy], "--data"), (["--data", world.pairs], "--model"), (["--model", world.policy, "--data", world.pairs], "--reward_model is missing")]:
        with pytest.raises(SystemExit, match="2"):
            train.parse_args(argv)
        assert word in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_tracker_gets_the_metrics_too(world, run, tmp_path):
    start(command(world, tmp_path / "out", "--tracker tensorboard", tables=run.out / "tables.safetensors", max_steps=1, max_response_tokens=16, reward_dtype="float32"), tmp_path)
    assert list((tmp_path / "out").rglob("events.out.tfevents*")) and len(metrics_of(tmp_path / "out")[0]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: exit status 2, one line, no traceback, before any model is loaded


def load_nothing():
    """In the child: fail loudly if a model is about to be loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    model_file._load = train.load_policy = tables_file.load_policy = loaded


BAD_INPUT = {
    "a malformed line": (dict(data="torn.jsonl"), ["torn.jsonl:2", "not valid JSON", "mend or remove"]),
    "a missing column": (dict(data="columns.jsonl"), ["columns.jsonl:1", "unknown format", "answer, question", "prompt/chosen/rejected"]),
    "an unknown file type": (dict(data="table.csv"), ["table.csv", "unknown file type", ".jsonl"]),
    "no usable row": (dict(data="blank.jsonl"), ["blank.jsonl", "no usable row among 2", "2 x an empty or blank response"]),
    "half of a surrogate pair": (dict(data="surrogate.jsonl"), ["surrogate.jsonl", "no usable row among 1", "not valid Unicode"]),
    "a folder that datasets did not save": (dict(data="missing"), ["missing", "not a folder saved by `datasets`"]),
    "a broken parquet file": (dict(data="broken.parquet"), ["broken.parquet", "not a readable parquet file"]),
    "an OUT that is a file": (dict(output_dir="torn.jsonl"), ["torn.jsonl: is a file", "--output_dir"]),
    "an empty file": (dict(data="empty.jsonl"), ["empty.jsonl", "no usable row"]),
    "no such file": (dict(data="missing.jsonl"), ["missing.jsonl", "no such file"]),
    "an unusable row under --strict": (dict(data="one_blank.jsonl", more="--strict"), ["one_blank.jsonl:2", "blank", "--strict"]),
    "fewer examples than B": (dict(data="one_blank.jsonl"), ["--batch_size 4 is more than the 2"]),
    "no model folder": (dict(model="missing/model"), ["missing/model", "does not exist"]),
    "a folder that is no model": (dict(model="."), ["not a model folder", "config.json"]),
    "no reference folder": (dict(ref_model="missing/ref"), ["missing/ref", "does not exist"]),
    "no reward model folder": (dict(reward_model="missing/judge"), ["missing/judge", "does not exist"]),
    "a reward model with two labels": (dict(reward_model="two"), ["two", "one label", "this one has 2"]),
    "the same, needed only after training": (dict(reward_model="two", more="--loss sft --eval_fraction 0.5 --batch_size 2"), ["two", "one label", "this one has 2"]),
    "a table that is none": (dict(tables="torn.jsonl"), ["torn.jsonl", "not a readable safetensors file", "remove it"]),
    "a share that is none": (dict(eval_fraction="1.5"), ["--eval_fraction", "1.5"]),
    "a tracker that is none": (dict(tracker="tensorbord"), ["--tracker tensorbord"]),
    "a tracker that is not installed": (dict(tracker="dvclive"), ["--tracker dvclive", "not installed"]),
}


@pytest.fixture(scope="module")
def bad_files(world):
    folder = world.folder / "bad"
    folder.mkdir()
    (good,) = pairs(["kettle"])
    (folder / "torn.jsonl").write_text(json.dumps(good) + '\n{"prompt": "Where is the\n')
    write(folder / "columns.jsonl", [{"question": "Where?", "answer": "There."}])
    (folder / "table.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    write(folder / "blank.jsonl", [good | {"chosen": " "}, good | {"rejected": "\n"}])
    write(folder / "one_blank.jsonl", [good, good | {"chosen": " "}])
    (folder / "empty.jsonl").write_text("")
    write(folder / "surrogate.jsonl", [good | {"chosen": "in the \ud83d hall"}])
    (folder / "broken.parquet").write_text("PAR1")
    (folder / "missing").mkdir()
    tokenizer = bpe_tokenizer()
    save(folder / "two", reward_model(vocab_size=len(tokenizer), num_labels=2), tokenizer)
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_stops_at_once_with_one_clear_line(world, bad_files, case):
    if "dvclive" in case and importlib.util.find_spec("dvclive"):
        pytest.skip("dvclive is installed")
    if case in ("a folder that datasets did not save", "a broken parquet file"):
        pytest.importorskip("datasets")
    flags, words = dict(BAD_INPUT[case][0]), BAD_INPUT[case][1]
    more = flags.pop("more", "")
    flags = {k: v if k in ("eval_fraction", "tracker") else bad_files / v for k, v in flags.items()}
    refused(command(world, bad_files / "out", more, **flags), bad_files, *words, before=load_nothing)
    assert not (bad_files / "out" / "run.json").exists()


def test_the_typed_command_itself_exits_with_two(world, bad_files):
    """The one real process among these: what a shell sees."""
    done = subprocess.run([sys.executable, ROOT / "train.py", *command(world, bad_files / "out", data=bad_files / "torn.jsonl")], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("train.py: error: torn.jsonl:2") and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(world, run, tmp_path):
    """A learning rate that is far too high: the message says so, and no model is written."""
    flags = dict(tables=run.out / "tables.safetensors", max_steps=6, max_response_tokens=16, reward_dtype="float32", lr=1e30, save_every=1)
    refused(command(world, tmp_path / "out", **flags), tmp_path, "step ", "checkpoint is kept", "--lr")
    assert not (tmp_path / "out" / "config.json").exists() and list((tmp_path / "out" / "checkpoints").glob("step_*"))
    assert "finished" not in json.loads((tmp_path / "out" / "run.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Real preference files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truthfulqa_pairs.jsonl", "truthfulqa_ultrafeedback.jsonl", "piqa_pairs.jsonl", "instruction_preference.json", "hh_helpful_base.jsonl.gz", "vicuna_scored.jsonl"])
def test_a_real_preference_file_trains_to_the_end(name, tmp_path):
    """Llama and Qwen2 of random weights, tokenizers trained on the file's own text, a reward model with another tokenizer; the result opens and runs."""
    source = SHARED_DATA / name
    if not source.exists():
        pytest.skip(f"{source} is not there")
    rows = [json.dumps(row, ensure_ascii=False) for _, row in read_rows(str(source))]
    texts = random.Random(0).sample(rows, min(150, len(rows)))
    reward_tokenizer = bpe_tokenizer(texts, vocab_size=700)
    judge = save(tmp_path / "judge", reward_model("gpt_neox", vocab_size=len(reward_tokenizer), initializer_range=0.2), reward_tokenizer)
    for architecture, tokenizer in (("llama", bpe_tokenizer(texts, vocab_size=1000)), ("qwen2", chatml_tokenizer(texts=texts, vocab_size=1200))):
        policy = save(tmp_path / architecture, causal_lm(architecture, vocab_size=len(tokenizer)), tokenizer)
        out = tmp_path / f"out_{architecture}"
        flags = f"--model {policy} --reward_model {judge} --data {source} --max_steps 3 --accum 2 --batch_size 4 --max_prompt_tokens 128 --max_response_tokens 128 --output_dir {out}"
        printed = start(flags.split(), tmp_path)
        assert re.search(r"examples of [\d,]+ prompts", printed)
        steps, _ = metrics_of(out)
        assert len(steps) == 3 and all(math.isfinite(value) for row in steps for value in row.values())
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        opened = transformers.AutoTokenizer.from_pretrained(out)
        (prompt_ids, _), = encode_records(opened, [([{"role": "user", "content": "What now?"}], ["x"])], 128, 8)  # fmt: skip
        assert torch.isfinite(model(input_ids=torch.tensor([prompt_ids])).logits).all()
        changed = [name for name, p in transformers.AutoModelForCausalLM.from_pretrained(policy).state_dict().items() if not torch.equal(p, model.state_dict()[name])]
        assert changed
