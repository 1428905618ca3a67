"""Every method of baselines/methods.py through train.py, as its users meet it: what is trained on, the first loss, the metrics, refusals."""

import dataclasses
import json
import math
import os
import random
import signal

import pytest
from test_train import THINGS, command, groups, metrics_of, pairs, refused, start, world, write  # noqa: F401  world is a fixture
from tiny import SHARED_DATA, bpe_tokenizer, causal_lm, reward_model, run_program, save

import torch
import transformers
from safetensors.torch import load_file

import train
from baselines.alol import fit_value, prompt_state
from baselines.methods import LOSSES, Batch, mismatched
from data import collate, load_plan, load_tokenizer, make_plan, pad_id
from formats import Record, choose_responses, labels, read_rows
from model import load_policy, load_reward_model, sequence_logps
from reward import bind_scores, score

SHORT = dict(max_steps=2, max_response_tokens=16, reward_dtype="float32")


def first_batch(argv, step=0):
    """(examples of the first micro-batch, tokenizer) of this command line."""
    args = train.parse_args(argv)
    loss = LOSSES[args.loss]
    tokenizer, _, plan, _ = load_plan(args, args.responses or loss.responses, False, loss.pairs, "weight" if args.loss == "wsft" else None)
    (m,) = train.step_micro_batches(step, 1, len(plan.batches), args.seed)
    return [plan.examples[i] for i in plan.batches[m]], tokenizer, plan


def gradient_norm(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


# ----------------------------------------------------------------------------------------------------------------------
# DPO


@pytest.fixture(scope="module")
def dpo(world):  # noqa: F811
    out = world.folder / "dpo"
    printed = start(command(world, out, "--loss dpo --beta 0.3", judge=False, **SHORT | {"max_steps": 3}, eval_data=world.held_out, eval_prompts=0, batch_size=2), world.folder)
    return out, printed


def test_eq4_dpo_starts_at_log_2_and_its_first_gradient_is_minus_half_beta_times_the_difference(world, dpo):  # noqa: F811
    """At pi_theta = pi_ref: loss log 2, rewards 0, d loss = -beta/2 * mean (d logp_chosen - d logp_rejected). B = 2 counts pairs."""
    steps, evals = metrics_of(dpo[0])
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) == evals[0]["eval/loss"]
    assert steps[0]["rows"] == 4 and abs(steps[0]["rewards/margins"]) < 1e-4 and steps[-1]["rewards/margins"] > 1e-3
    rows, tokenizer, plan = first_batch(command(world, "x", "--loss dpo", judge=False, batch_size=2, max_response_tokens=16))
    assert len(plan.batches) == 5 and all(a.prompt_key == b.prompt_key for a, b in zip(rows[0::2], rows[1::2]))
    assert all(e.response.startswith("The") for e in rows[0::2]) and not any(e.response.startswith("The") for e in rows[1::2])
    model = load_policy(world.policy)
    logps = sequence_logps(model, **collate(rows, pad_id(tokenizer)))
    (-0.3 / 2 * (logps[0::2] - logps[1::2]).mean()).backward()
    assert steps[0]["grad_norm"] == pytest.approx(gradient_norm(model), rel=1e-3)
    assert steps[0]["logps/chosen"] == pytest.approx(logps[0::2].mean().item(), rel=1e-4) and steps[0]["logps/rejected"] == pytest.approx(logps[1::2].mean().item(), rel=1e-4)


def test_dpo_has_the_metrics_users_know_and_prints_its_data(dpo):
    """Accuracy is strict, rewards are beta times log-ratios."""
    steps, evals = metrics_of(dpo[0])
    names = {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")} | {"logps/chosen", "logps/rejected"}
    assert names <= set(steps[0]) and {f"eval/{name}" for name in names} <= set(evals[-1])
    assert steps[0]["rewards/accuracies"] in (0, 0.5, 1) and evals[-1]["eval/rewards/accuracies"] == 1.0
    assert "(--responses pairs)" in dpo[1] and "10 pairs in 5 micro-batches of B = 2" in dpo[1] and "with matched responses" in dpo[1]
    assert transformers.AutoModelForCausalLM.from_pretrained(dpo[0]) and "self_share" not in dpo[1]


def test_dpo_measures_the_reference_once_and_only_the_matched_pairs(dpo):
    """2B x 2B tables with a diagonal; no rewards, and no reward model asked for."""
    tables = load_file(dpo[0] / "tables.safetensors")
    assert tables["ref_logps"].shape == (5, 4, 4) and tables["rewards"].isnan().all()
    known = ~tables["ref_logps"].isnan()
    assert {tuple(k.nonzero().flatten().tolist()) for k in known.any(0)} and known.sum(dim=(1, 2)).tolist().count(4) == 3  # 3 steps, 3 of 5 micro-batches
    assert not (known & ~torch.eye(4, dtype=torch.bool)).any()


def test_scored_responses_become_pairs_of_highest_and_lowest_and_equal_scores_are_counted(world, tmp_path):  # noqa: F811
    """Sec. 4.3."""
    rows = groups(THINGS[:6]) + [{"prompt": "Where is it?", "responses": ["Here.", "There."], "scores": [1.0, 1.0]}]
    printed = start(command(world, tmp_path / "out", "--loss dpo", data=write(tmp_path / "g.jsonl", rows), judge=False, **SHORT, batch_size=2), tmp_path)
    assert "dropped 1: no pair: all scores are equal (first at g.jsonl:7)" in printed and "6 pairs in 3 micro-batches" in printed
    batch, *_ = first_batch(command(world, "x", "--loss dpo", data=tmp_path / "g.jsonl", judge=False, batch_size=2))
    assert [e.score for e in batch[0::2]] == [2.0, 2.0] and all(e.score in (0.5, -1.0, -2.0) for e in batch[1::2])


# ----------------------------------------------------------------------------------------------------------------------
# KTO


def test_labels_are_the_datas_else_the_preference_else_above_or_below_the_mean_score():
    """desirable column; chosen and rejected; scores (1, 3, 2, None): mean 2, so undesirable, desirable, neither, neither."""
    record = lambda **more: Record([], ["a", "b", "c", "d"], "f:1", **more)
    assert labels(record(desirable=[True, False, False, True])) == [True, False, False, True]
    assert labels(record(chosen=2, rejected=0, scores=[9, 1, 1, 1])) == [False, None, True, None]
    assert labels(record(scores=[1.0, 3.0, 2.0, None])) == [False, True, None, None]
    assert choose_responses(record(scores=[1.0, 3.0, 2.0, None]), "labelled") == [0, 1]


def test_kto_starts_at_one_half_and_uses_neighbours_for_its_kl(world, tmp_path):  # noqa: F811
    """At the reference every log-ratio is 0, mismatched ones too. The table holds (i, i) and (i, i+1 mod B), sums of log-probs."""
    argv = command(world, tmp_path / "out", "--loss kto", judge=False, **SHORT)
    printed = start(argv, tmp_path)
    steps, _ = metrics_of(tmp_path / "out")
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5) and steps[0]["kl"] == pytest.approx(0, abs=1e-4) and "(--responses labelled)" in printed
    tables = load_file(tmp_path / "out" / "tables.safetensors")
    known = [table for table in ~tables["ref_logps"].isnan() if table.any()]
    assert len(known) == 2 and all(k.nonzero().tolist() == [[0, 0], [0, 1], [1, 1], [1, 2], [2, 2], [2, 3], [3, 0], [3, 3]] for k in known)
    batch, tokenizer, plan = first_batch(argv)
    shifted = mismatched(batch)
    assert [list(e.response_ids) for e in shifted] == [list(e.response_ids) for e in batch[1:] + batch[:1]] and [e.prompt_ids for e in shifted] == [e.prompt_ids for e in batch]
    (m,) = train.step_micro_batches(0, 1, len(plan.batches), 0)
    with torch.no_grad():
        expected = sequence_logps(load_policy(world.policy).eval(), **collate(shifted, pad_id(tokenizer)))
    torch.testing.assert_close(tables["ref_logps"][m].roll(-1, dims=1).diagonal(), expected, rtol=1e-4, atol=1e-4)


def kto_batch(policy, mismatched_logps, ref=0.0):
    K = len(policy)
    examples = [type("E", (), {"desirable": i % 2 == 0})() for i in range(K)]
    return Batch(examples, torch.tensor(policy), None, torch.full((K, K), ref), torch.tensor(mismatched_logps), lambda t: t)


def test_ktos_kl_is_the_mean_of_the_mismatched_log_ratios_clamped_at_zero():
    """Drifts (1, 3) -> 2; (-1, -3) -> 0. loss = mean(1 - sigmoid(beta(1 - kl)), 1 - sigmoid(beta(kl - 1)))."""
    args = type("A", (), {"beta": 1.0})
    s = lambda x: 1 / (1 + math.exp(-x))
    for drifts, kl in (([1.0, 3.0], 2.0), ([-1.0, -3.0], 0.0)):
        loss, metrics = LOSSES["kto"].compute(kto_batch([1.0, 1.0], drifts), args)
        assert metrics["kl"].item() == kl and loss.item() == pytest.approx((2 - s(1 - kl) - s(kl - 1)) / 2)
    assert metrics["rewards/chosen"].tolist() == [1.0] and metrics["rewards/rejected"].tolist() == [1.0]


def test_dpos_accuracy_is_strict():
    """Equal rewards are not a pair told right: 0 of 2 here, 1 of 2 with one margin above 0."""
    args = type("A", (), {"beta": 1.0, "label_smoothing": 0.0})
    for chosen, right in ((-3.0, [0.0, 0.0]), (-2.0, [1.0, 0.0])):
        batch = Batch([None] * 4, torch.tensor([chosen, -3.0, -5.0, -5.0]), None, torch.diag(torch.tensor([-3.0, -3.0, -5.0, -5.0])), None, None)
        assert LOSSES["dpo"].compute(batch, args)[1]["rewards/accuracies"].tolist() == right


def test_a_step_without_an_undesirable_response_leaves_that_metric_out(world, tmp_path):  # noqa: F811
    """A mean over nothing is nothing, not nan, and is no reason to stop."""
    rows = [{"prompt": f"Where is the {x}?", "completion": f"The {x} is here.", "label": True} for x in THINGS]
    start(command(world, tmp_path / "out", "--loss kto", data=write(tmp_path / "k.jsonl", rows), judge=False, **SHORT), tmp_path)
    steps, _ = metrics_of(tmp_path / "out")
    assert "rewards/chosen" in steps[0] and "rewards/rejected" not in steps[0]


# ----------------------------------------------------------------------------------------------------------------------
# Weighted SFT


def weighted(weight):
    return [row | {"weight": weight(i)} for i, row in enumerate(pairs(THINGS[:8]))]


def test_eq12_weights_come_from_the_column_and_unit_weights_are_sft(world, tmp_path):  # noqa: F811
    """w = 1: the losses of --loss sft to the last digit; w = 2: twice the loss; another column by --weight_column."""
    runs = {}
    for name, more, rows in (("sft", "--loss sft", weighted(lambda i: 1)), ("one", "--loss wsft", weighted(lambda i: 1.0)), ("two", "--loss wsft", weighted(lambda i: "2")),
                             ("other", "--loss wsft --weight_column w", [row | {"w": 2} for row in pairs(THINGS[:8])])):  # fmt: skip
        start(command(world, tmp_path / name, more, data=write(tmp_path / "w.jsonl", rows), judge=False, **SHORT), tmp_path)
        runs[name] = [step["loss"] for step in metrics_of(tmp_path / name)[0]]
    assert runs["one"] == runs["sft"] and runs["two"][0] == pytest.approx(2 * runs["sft"][0]) and runs["other"] == runs["two"]


def test_each_example_gets_its_own_weight(world, tmp_path):  # noqa: F811
    """A number for the row, or a list with one for each response; after shuffling each weight is still with its response."""
    rows = [{"prompt": f"Where is the {x}?", "responses": ["Here.", "There."], "scores": [1, 2], "weight": [i, 10 + i]} for i, x in enumerate(THINGS[:6])]
    batch, *_ = first_batch(command(world, "x", "--loss wsft --responses all", data=write(tmp_path / "w.jsonl", rows), judge=False))
    assert all(e.weight == (int(e.where.split(":")[1]) - 1) + 10 * (e.response == "There.") for e in batch)


def test_a_negative_weight_warns_and_a_missing_one_drops_the_row(world, tmp_path):  # noqa: F811
    """PAPER.md Eq. 12: no minimum; counted and said before training."""
    rows = weighted(lambda i: -0.5 if i == 3 else 1.0)
    del rows[5]["weight"]
    printed = start(command(world, tmp_path / "out", "--loss wsft", data=write(tmp_path / "w.jsonl", rows), judge=False, **SHORT), tmp_path)
    assert "warning: 1 of 7 weights are negative" in printed and "dropped 1: no number for each response in the column 'weight' (first at w.jsonl:6)" in printed
    line = refused(command(world, tmp_path / "none", "--loss wsft", judge=False), tmp_path, "pairs.jsonl", "column 'weight'")
    assert "10 x" in line


# ----------------------------------------------------------------------------------------------------------------------
# A-LoL and R-LoL


@pytest.fixture(scope="module")
def alol(world):  # noqa: F811
    out = world.folder / "alol"
    printed = start(command(world, out, "--loss alol --responses all", **SHORT, eval_data=world.held_out, eval_prompts=0, batch_size=2), world.folder)
    return out, printed, json.loads((out / "advantages.json").read_text())


def test_eq5_advantages_are_sigmoid_of_the_reward_minus_v_and_only_positive_ones_are_trained_on(world, alol):  # noqa: F811
    """A = r - V; the table of the run holds the kept examples, and the count is printed."""
    out, printed, found = alol
    rows = found["rows"]
    assert len(rows) == 24 and all(row["advantage"] == pytest.approx(row["reward"] - row["value"]) and 0 < row["value"] < 1 for row in rows)
    kept = [row for row in rows[:20] if row["advantage"] > 0]
    assert 0 < len(kept) < 20 and f"{len(kept)} examples have an advantage above 0; {20 - len(kept)} others are left out" in printed
    assert (load_file(out / "tables.safetensors")["response_tokens"] > 0).sum() in (len(kept), len(kept) + 1)
    judge_tokenizer = load_tokenizer(world.judge)
    row = json.loads(open(world.pairs).readline())
    judge = bind_scores(load_reward_model(world.judge, "float32"))
    logit = score(judge, judge_tokenizer, [([{"role": "user", "content": row["prompt"]}], row["chosen"])], progress=False)
    assert rows[0]["where"] == "pairs.jsonl:1" and rows[0]["reward"] == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=1e-5)


def test_eq5_the_first_step_of_a_run_is_weighted_by_the_advantages(world, alol):  # noqa: F811
    """At pi_theta = pi_ref the ratio is 1: loss = -mean A log pi / mean response length."""
    out, _, found = alol
    argv = command(world, "x", "--loss alol --responses all", **SHORT, batch_size=2)
    _, tokenizer, plan = first_batch(argv)
    for e, row in zip(plan.examples, found["rows"]):
        e.weight = row["advantage"]
    kept = make_plan([e for e in plan.examples if e.weight > 0], train.parse_args(argv), "all")
    (m,) = train.step_micro_batches(0, 1, len(kept.batches), 0)
    batch = [kept.examples[i] for i in kept.batches[m]]
    with torch.no_grad():
        logps = sequence_logps(load_policy(world.policy).eval(), **collate(batch, pad_id(tokenizer)))
    A, tokens = torch.tensor([e.weight for e in batch]), [len(e.response_ids) for e in kept.examples]
    steps, _ = metrics_of(out)
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-4) and steps[0]["advantages"] == pytest.approx(A.mean().item(), rel=1e-4)
    assert steps[0]["loss"] == pytest.approx(-(A * logps).mean().item() / (sum(tokens) / len(tokens)), rel=1e-4)


def test_advantages_are_measured_once_and_a_resumed_run_reads_them(world, alol, tmp_path):  # noqa: F811
    """A kill after the advantages: the second start loads no reward model; other settings measure again."""
    argv = command(world, tmp_path / "out", "--loss alol --responses all --resume", **SHORT, batch_size=2)

    def die_at_the_first_step():
        train.lr_at = lambda *a: os.kill(os.getpid(), signal.SIGKILL)

    def no_measuring():
        import baselines.alol

        baselines.alol.measure = None

    assert run_program(train, argv, tmp_path, die_at_the_first_step)[0] == -9 and (tmp_path / "out" / "advantages.json").exists()
    start(argv, tmp_path, no_measuring)
    assert [s["loss"] for s in metrics_of(tmp_path / "out")[0]][0] == metrics_of(alol[0])[0][0]["loss"]


def test_alol_with_no_positive_advantage_says_so(world, tmp_path):  # noqa: F811
    """The reference expects more than the data offers."""

    def all_negative():
        import baselines.alol

        measure = baselines.alol.measure
        baselines.alol.measure = lambda *a: (lambda fit, r, v: (fit, r, [1.0] * len(v)))(*measure(*a))

    refused(command(world, tmp_path / "out", "--loss alol", **SHORT), tmp_path, "no example has an advantage above 0", "--loss rlol", before=all_negative)


def test_v_of_a_prompt_does_not_depend_on_padding_or_batch_mates_and_has_no_dropout(world):  # noqa: F811
    """s(x) is computed alone: mean and last of the final hidden states of the model's own forward."""
    model = load_policy(world.policy).train()
    ids = [5, 9, 17, 30]
    with torch.no_grad():
        state = prompt_state(model, ids)
        hidden = transformers.AutoModelForCausalLM.from_pretrained(world.policy).eval().model(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(state, torch.cat([hidden.mean(0), hidden[-1]]))


def test_the_value_head_finds_a_rule_in_the_states_and_is_a_constant_where_there_is_none():
    """r = sigmoid(2 s_0 - 1): held-out error falls below a tenth of the constant's. Random r: never worse than the constant."""
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(200, 6, generator=rng)
    value, fit = fit_value(states, torch.sigmoid(2 * states[:, 0] - 1))
    assert fit["held_out_error"] < 0.1 * fit["held_out_error_of_a_constant"]
    new = torch.randn(50, 6, generator=rng)
    assert ((value(new) - torch.sigmoid(2 * new[:, 0] - 1)) ** 2).mean() < 0.005
    _, fit = fit_value(torch.randn(200, 300, generator=rng), torch.rand(200, generator=rng))  # enough states to learn the noise by heart
    assert fit["held_out_error"] <= fit["held_out_error_of_a_constant"]
    value, fit = fit_value(states[:3], torch.tensor([0.2, 0.4, 0.6]))
    assert value(new).tolist() == pytest.approx([0.4] * 50) and fit["samples"] == 3


def test_eq14_rlol_takes_sigmoids_of_logits_or_scores_between_0_and_1(world, tmp_path):  # noqa: F811
    """The first loss by hand: -mean (sigmoid(r) - beta) log pi, over the mean response length."""
    start(command(world, tmp_path / "out", "--loss rlol --beta 0.2", **SHORT), tmp_path)
    batch, tokenizer, plan = first_batch(command(world, "x", "--loss rlol", **SHORT))
    (m,) = train.step_micro_batches(0, 1, len(plan.batches), 0)
    tables = load_file(tmp_path / "out" / "tables.safetensors")
    assert all(e.response.startswith("The") for e in batch)  # chosen
    R, logps = tables["rewards"][m].diagonal().sigmoid(), tables["ref_logps"][m].diagonal()
    expected = -((R - 0.2) * logps).mean().item() / json.loads((tmp_path / "out" / "run.json").read_text())["mean_response_tokens"]
    steps, _ = metrics_of(tmp_path / "out")
    assert steps[0]["loss"] == pytest.approx(expected, rel=1e-4) and steps[0]["rewards"] == pytest.approx(R.mean().item(), rel=1e-5)
    scored = [{"prompt": f"Where is the {x}?", "response": "Here.", "score": 0.25} for x in THINGS]
    start(command(world, tmp_path / "scores", "--loss rlol", data=write(tmp_path / "s.jsonl", scored), judge=False, **SHORT), tmp_path)
    assert metrics_of(tmp_path / "scores")[0][0]["rewards"] == 0.25
    scored[4]["score"] = 7.5
    refused(command(world, tmp_path / "no", "--loss rlol", data=write(tmp_path / "s.jsonl", scored), judge=False, **SHORT | {"max_steps": 9}), tmp_path, "s.jsonl:5", "score 7.5", "from 0 to 1")


# ----------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("words, message", [
    ("--loss dpo --responses all", "--loss dpo takes pairs"), ("--loss kto --responses chosen", "--loss kto takes labelled"), ("--loss kto --batch_size 1", "use 2 or more"),
    ("--loss dpo --partners group", "leave it out"), ("--loss dpo --label_smoothing 0.5", "use less"), ("--loss alol --clip -1", "--clip must be at least 0"),
])  # fmt: skip
def test_what_makes_no_sense_for_a_method_is_refused(world, capsys, words, message):  # noqa: F811
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(command(world, "x", words))
    assert message in capsys.readouterr().err


def test_alol_needs_a_reward_model(world, capsys):  # noqa: F811
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(command(world, "x", "--loss alol", judge=False))
    assert "--reward_model is missing" in capsys.readouterr().err


def test_flags_a_method_does_not_read_are_named_and_sums_are_used_whatever_ref_logps_says(world, dpo, tmp_path):  # noqa: F811
    """--ref_logps sum changes nothing in DPO's run, and is said to."""
    printed = start(command(world, tmp_path / "out", "--loss dpo --beta 0.3 --ref_logps sum --clip 0.5", judge=False, **SHORT | {"max_steps": 3}, batch_size=2), tmp_path)
    assert "note: --loss dpo does not read --clip, --ref_logps" in printed
    assert [s["loss"] for s in metrics_of(tmp_path / "out")[0]] == [s["loss"] for s in metrics_of(dpo[0])[0]]


def test_the_default_beta_is_the_methods_own(world):  # noqa: F811
    assert {name: train.parse_args(command(world, "x", f"--loss {name}")).beta for name in LOSSES} == {"var": 1.0, "sft": None, "wsft": None, "dpo": 0.1, "alol": None, "rlol": 0.1, "kto": 0.1}


def test_every_flag_a_method_says_it_reads_exists(world):  # noqa: F811
    known = vars(train.parse_args(command(world, "x")))
    assert {flag for loss in LOSSES.values() for flag in loss.reads.split()} <= set(known)
    assert {f.name for f in dataclasses.fields(Batch)} >= {"policy_logps", "rewards", "ref_logps"}


REAL = {"truthfulqa_pairs.jsonl": None, "truthfulqa_ultrafeedback.jsonl": "score", "piqa_pairs.jsonl": None, "instruction_preference.json": None, "hh_helpful_base.jsonl.gz": None, "vicuna_scored.jsonl": "score"}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_preference_file_goes_through_every_method_to_a_folder_that_reopens(name, tmp_path):
    """Tiny models, a few steps of each; DPO starts at log 2, KTO at 1/2; a file without what a method needs is refused in one line."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    texts = [json.dumps(row, ensure_ascii=False) for _, row in list(read_rows(str(path)))]
    texts = random.Random(0).sample(texts, min(100, len(texts)))
    tokenizer, judge_tokenizer = bpe_tokenizer(texts, vocab_size=800), bpe_tokenizer(texts, vocab_size=600)
    policy = save(tmp_path / "policy", causal_lm("qwen2", vocab_size=len(tokenizer)), tokenizer)
    judge = save(tmp_path / "judge", reward_model("llama", vocab_size=len(judge_tokenizer), initializer_range=0.2), judge_tokenizer)
    done = set()
    for loss in LOSSES:
        out = tmp_path / loss
        argv = f"--loss {loss} --model {policy} --reward_model {judge} --data {path} --output_dir {out} --batch_size 4 --max_steps 3 --lr 1e-3 --max_prompt_tokens 96 --max_response_tokens 64 --value_prompts 24 --eval_fraction {0.15 if 'vicuna' in name else 0.02} --eval_every 3 --eval_prompts 2 --save_every 0"
        argv += " --weight_column score" if loss == "wsft" else ""
        status, printed, err = run_program(train, argv.split(), tmp_path)
        assert "Traceback" not in err
        if status:
            assert status == 2 and "no usable row" in err.splitlines()[-1], err[-2000:]
            continue
        done.add(loss)
        steps, evals = metrics_of(out)
        assert len(steps) == 3 and all(math.isfinite(s["loss"]) for s in steps)
        assert steps[0]["loss"] == pytest.approx({"dpo": math.log(2), "kto": 0.5}.get(loss, steps[0]["loss"]), abs=1e-3)
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        ids = transformers.AutoTokenizer.from_pretrained(out)("Hello", return_tensors="pt")["input_ids"]
        assert torch.isfinite(model(ids).logits).all() and list((out / "eval").glob("step_3.jsonl"))
    assert done >= {"var", "sft", "alol", "rlol"} and (("dpo" in done and "kto" in done) or name == "vicuna_scored.jsonl"), done
