"""tables.py against the naive loop of Algorithm 1, and as its users meet it: subsets, interruptions, tables that do not fit. CPU, no network."""

import gc
import json
import math
import re
import subprocess
import sys
import threading
from array import array
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from tiny import ENVIRONMENT, ROOT, bpe_tokenizer, causal_lm, chatml_tokenizer, reward_model, run_program, save, write

import torch
import transformers
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tables as tables_file
from data import Example, Plan, collate, load_plan
from formats import InputError
from model import fingerprint, load_policy, load_reward_model, sequence_logps
from reward import encode_conversation
from tables import Tables, build_tables, header, ref_scorer, reward_scorer, summary
from var import effective_sample_size, log_weights, self_share

torch.set_num_threads(1)
gc.freeze()  # what the imports left is not searched again each time a model is released: half a second for every table

ALL = {"rewards": "all", "ref_logps": "all"}
FEW = dict(data="few", batch_size=2)  # 12 examples in six micro-batches of two
POLICIES = {"llama": {}, "qwen2": {}, "gpt_neox": {}, "gemma3_text": dict(head_dim=8, sliding_window=8)}  # each layer sees 8 tokens back: less than a prompt
JUDGES = {"llama": {}, "qwen2": {}, "gemma3_text": dict(head_dim=8, use_bidirectional_attention=True), "bert": dict(max_position_embeddings=2048)}


def rows():
    """Eleven rows whose prompts and answers are of one word to sixty, with a system turn, earlier turns, and answers that several prompts share."""
    long = "Fold the letter twice, put it in the envelope, and do not forget the stamp! "
    system, user, assistant = ({"role": role} for role in ("system", "user", "assistant"))
    prompts = ["Why?", "Which tree keeps its leaves in winter?", long * 2 + "Is that right?"] + [f"How long does the {x} need?" for x in ("dough", "letter", "boat", "pine", "kitchen")]
    prompts += [
        [system | {"content": "You are brief."}, user | {"content": "Where is the stamp?"}],
        [user | {"content": "How do I send it?"}, assistant | {"content": long}, user | {"content": "And then?"}],
        [user | {"content": "naïve café, 日本語 🙂?"}],
    ]
    chosen = ["Yes.", "The pine keeps its needles all year.", "Yes.", long * 3, "About an hour.", "I would rather talk about boats.", "a", "Yes."]
    chosen += ["On the envelope.", "Put it in a warm kitchen and wait. " + long, "日本語 🙂🙃, tabs\tand\nnew lines"]
    return [{"prompt": p, "chosen": c, "rejected": f"No, {'really, ' * (i % 4)}not the {i}."} for i, (p, c) in enumerate(zip(prompts, chosen))]


def scored_rows():
    """Two to five answers to a prompt, each with a score."""
    answers = ["Yes.", "No.", "About an hour in a warm kitchen.", "I would rather talk about boats.", "Fold it twice, then ask again."]
    return [{"prompt": row["prompt"], "responses": answers[: 2 + i % 4], "scores": [1.5 * i - 2.0 * j for j in range(2 + i % 4)]} for i, row in enumerate(rows()) if isinstance(row["prompt"], str)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with policies, reward models that have another tokenizer, and data."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, reward_tokenizer = chatml_tokenizer(), bpe_tokenizer(vocab_size=350)
    for name, more in POLICIES.items():
        save(folder / name, causal_lm(name, vocab_size=len(tokenizer), initializer_range=0.2, **more), tokenizer)
    for name, more in JUDGES.items():
        save(folder / f"judge_{name}", reward_model(name, vocab_size=len(reward_tokenizer), initializer_range=0.2, **more), reward_tokenizer)
    save(folder / "other", causal_lm("llama", vocab_size=len(tokenizer), initializer_range=0.2, seed=5), tokenizer)
    save(folder / "judge_other", reward_model("llama", vocab_size=len(reward_tokenizer), initializer_range=0.2, seed=5), reward_tokenizer)
    write(folder / "pairs.jsonl", rows())
    write(folder / "few.jsonl", rows()[:6])
    write(folder / "scored.jsonl", scored_rows())
    return folder


def arguments(world, policy="llama", judge="llama", data="pairs", batch_size=4, **more):
    """The words of a command line. 22 examples in micro-batches of 4: six, the last one filled up. Answers of 30 tokens and more are cut for the policy, not for the judge."""
    usual = {"model": world / policy, "data": world / f"{data}.jsonl", "batch_size": batch_size, "max_response_tokens": 30}
    usual |= {"reward_model": world / f"judge_{judge}"} if judge else {}
    return [str(word) for flag, value in (usual | more).items() for word in (f"--{flag}", value)]


def build(path, world, wanted=ALL, needed=None, **more):
    """What train.py does for its tables, in this process -> (Tables, Plan)."""
    args = tables_file.parse_args(arguments(world, **more))
    tokenizer, reward_tokenizer, plan, _ = load_plan(args, args.responses or "all", show=False)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    needed = range(len(plan.batches)) if needed is None else needed
    return build_tables(str(path), plan, wanted, needed, accelerator, tokenizer, reward_tokenizer, args), plan


@pytest.fixture(scope="module")
def whole(world):
    """One table, measured in one go: the file, its tensors, its plan."""
    path = world / "whole.safetensors"
    tables, plan = build(path, world)
    return SimpleNamespace(path=path, tables=tables, plan=plan, bytes=path.read_bytes())


@pytest.fixture(scope="module")
def few(world):
    """The same of few and small micro-batches."""
    path = world / "few.safetensors"
    return SimpleNamespace(path=path, tables=build(path, world, **FEW)[0])


@pytest.fixture
def measured(monkeypatch):
    """[(table, coverage, micro-batches), ...]: what tables.measure was asked for, in order."""
    asked, original = [], tables_file.measure
    monkeypatch.setattr(tables_file, "measure", lambda name, which, todo, *rest: asked.append((name, which, list(todo))) or original(name, which, todo, *rest))
    return asked


@torch.no_grad()
def naive_ref_logps(folder, plan):
    """Algorithm 1 line 3 as the paper writes it: a full forward of transformers for every (x_i, y_j), all its logits, log_softmax, sum over y_j."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    out = []
    for batch in plan.batches:
        for i in batch:
            for j in batch:
                x, y = plan.examples[i].prompt_ids.tolist(), plan.examples[j].response_ids.tolist()
                logps = torch.log_softmax(model(input_ids=torch.tensor([x + y])).logits[0], dim=-1)
                out.append(logps[len(x) - 1 : -1].gather(1, torch.tensor(y)[:, None]).sum().item())
    return out


@torch.no_grad()
def naive_rewards(folder, plan, max_tokens=2048):
    """A full forward of transformers for every (x_i, y_j), each text in the reward model's own template, alone and unpadded."""
    model, tokenizer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    out = []
    for batch in plan.batches:
        for i in batch:
            for j in batch:
                messages = [*plan.examples[i].messages, {"role": "assistant", "content": plan.examples[j].response}]
                text = "<s>" + "".join(f"{m['role']}:\n{m['content']}</s>\n" for m in messages)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                out.append(model(input_ids=torch.tensor([ids[:1] + ids[1:][-max_tokens + 1 :]])).logits.item())
    return out


def cells(table, plan):
    """The measured cells of (M, B, B), micro-batch by micro-batch, row by row."""
    return [table[m, i, j].item() for m, batch in enumerate(plan.batches) for i in range(len(batch)) for j in range(len(batch))]


def finite(table):
    return [m for m in range(len(table)) if table[m].isfinite().all()]


def same(a, b):
    return torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


# ----------------------------------------------------------------------------------------------------------------------
# The numbers


MODELS = [("llama", "qwen2", "batch"), ("llama", "qwen2", "group"), ("qwen2", "llama", "batch"), ("qwen2", "llama", "group"), ("gpt_neox", "llama", "batch"), ("gpt_neox", "llama", "group"), ("gemma3_text", "llama", "batch")]


@pytest.mark.parametrize("policy, judge, partners", MODELS)
def test_tables_equal_the_naive_loop_of_full_forwards(world, tmp_path, capsys, policy, judge, partners):
    """Algorithm 1 lines 3-5, cell by cell, for ragged lengths, other prompts' responses and one prompt's; the cache is used, or a note would say so."""
    data = "pairs" if partners == "batch" else "scored"
    tables, plan = build(tmp_path / "t.safetensors", world, policy=policy, judge=judge, data=data, partners=partners)
    assert "full forwards" not in capsys.readouterr().out
    lengths = {len(batch) for batch in plan.batches}
    assert lengths == ({4} if partners == "batch" else {2, 3, 4})
    for name, naive in (("ref_logps", naive_ref_logps(world / policy, plan)), ("rewards", naive_rewards(world / f"judge_{judge}", plan))):
        table = getattr(tables, name)
        assert cells(table, plan) == pytest.approx(naive, abs=1e-4), name
        assert max(naive) - min(naive) > 1 and table.isfinite().sum() == len(naive)  # cells of rows that are not there stay nan
    for m, batch in enumerate(plan.batches):
        assert tables.response_tokens[m].tolist() == [len(plan.examples[i].response_ids) for i in batch] + [0] * (max(lengths) - len(batch))
    assert load_file(tmp_path / "t.safetensors").keys() == {"rewards", "ref_logps", "response_tokens"}


def test_the_diagonal_is_the_policys_own_log_prob_at_step_0(world, whole):
    """The very call of the training step (collate, load_policy in train mode, sequence_logps) on the same micro-batches; and so are the response's tokens."""
    model = load_policy(str(world / "llama"))
    for m, batch in enumerate(whole.plan.batches):
        rows = collate([whole.plan.examples[i] for i in batch], 0)
        with torch.no_grad():
            logps = sequence_logps(model, **rows)
        assert whole.tables.ref_logps[m].diagonal().tolist() == pytest.approx(logps.tolist(), abs=1e-4)
        assert whole.tables.response_tokens[m].tolist() == rows["response_mask"].sum(dim=1).tolist()


def test_a_cut_conversation_is_scored_as_cut(world, tmp_path):
    """--max_reward_tokens 40: what is cut from the left no longer begins alike, so nothing but BOS is shared."""
    tables, plan = build(tmp_path / "t.safetensors", world, {"rewards": "all", "ref_logps": None}, max_reward_tokens=40)
    naive = naive_rewards(world / "judge_llama", plan, max_tokens=40)
    assert cells(tables.rewards, plan) == pytest.approx(naive, abs=1e-4)
    assert naive != pytest.approx(naive_rewards(world / "judge_llama", plan), abs=1e-2)


@pytest.mark.parametrize("judge", ["bert", "gemma3_text"])
def test_a_bidirectional_reward_model_is_scored_by_full_forwards_and_says_so(world, tmp_path, capsys, judge):
    """An encoder has no prefix to continue; a decoder with bidirectional attention has one, but it reads differently once the response is there."""
    tables, plan = build(tmp_path / "t.safetensors", world, {"rewards": "all", "ref_logps": None}, judge=judge)
    assert re.search(rf"note: {'Bert' if judge == 'bert' else 'Gemma3'}\w+ .*using full forwards", capsys.readouterr().out)
    assert cells(tables.rewards, plan) == pytest.approx(naive_rewards(world / f"judge_{judge}", plan), abs=1e-4)


def test_a_bidirectional_reward_model_is_noticed_in_16_bits_too(world):
    """There the two ways differ by rounding in any model; the tolerance for a reward must not grow with the response, as it may for a sum over tokens."""
    model, tokenizer = load_reward_model(str(world / "judge_gemma3_text"), "bfloat16"), transformers.AutoTokenizer.from_pretrained(world / "judge_gemma3_text")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompt = "Which tree keeps its leaves in winter? Fold the letter twice, put it in the envelope"
    x, y = (example([3], [4] * 200, response, prompt) for response in ("The pine keeps its needles all year.", "No."))
    with torch.no_grad():
        model.score.weight *= 20  # about 2 between the two ways, less than 0.02 for each of 200 tokens
    expected = [score_alone(model, tokenizer, x, x), score_alone(model, tokenizer, x, y)]
    scorer = reward_scorer(model, tokenizer, 4, 2048)
    with torch.no_grad():
        assert scorer([(x, x), (x, y)]) == pytest.approx(expected, abs=0.5)  # the first call is the one that compares
        assert scorer([(x, x), (x, y)]) == pytest.approx(expected, abs=0.5)


def test_a_policy_whose_cache_cannot_be_repeated_is_scored_by_full_forwards(world, tmp_path, capsys):
    """Linear attention (Qwen 3.5) keeps a state that transformers cannot repeat for several responses; the numbers are those of the naive loop."""
    tokenizer, linear = chatml_tokenizer(), {f"linear_{x}": n for x, n in (("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 8), ("value_head_dim", 8))}
    save(tmp_path / "linear", causal_lm("qwen3_5_text", vocab_size=len(tokenizer), layers=4, head_dim=8, initializer_range=0.2, **linear), tokenizer)
    tables, plan = build(tmp_path / "t.safetensors", world, {"rewards": None, "ref_logps": "all"}, policy=tmp_path / "linear", batch_size=2, data="scored", partners="group")
    assert re.search(r"note: Qwen3_5\w+ .*using full forwards", capsys.readouterr().out)
    assert cells(tables.ref_logps, plan) == pytest.approx(naive_ref_logps(tmp_path / "linear", plan), abs=2e-3)


def test_each_prompt_is_run_once_for_all_its_responses(world, whole):
    """Tokens that go through the model for one prompt with three responses: the prompt, then the responses padded to the longest. Full forwards would be three prompts."""
    plan, tokenizer, seen = whole.plan, transformers.AutoTokenizer.from_pretrained(world / "llama"), []
    model = load_policy(str(world / "llama")).eval()
    scorer, (x, *ys) = ref_scorer(model, tokenizer, 4), plan.examples[4:8]
    with torch.no_grad():
        scorer([(x, y) for y in ys])  # compares with full forwards
        model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
        scorer([(x, y) for y in ys])
    assert len({tuple(y.response_ids) for y in ys}) == 3
    assert sum(seen) == len(x.prompt_ids) + 3 * max(len(y.response_ids) for y in ys)


def test_equal_texts_are_scored_once(world, whole, monkeypatch):
    """Every distinct (prompt, response) of a call exactly once, for both tables, although prompts return in other micro-batches and many rows share an answer."""
    plan, counted = whole.plan, []
    pairs = [(plan.examples[i], plan.examples[j]) for batch in plan.batches for i in batch for j in batch]
    tokenizer, reward_tokenizer = (transformers.AutoTokenizer.from_pretrained(world / name) for name in ("llama", "judge_llama"))
    reward_tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ref = ref_scorer(load_policy(str(world / "llama")).eval(), tokenizer, 4)
    judge = reward_scorer(load_reward_model(str(world / "judge_llama")), reward_tokenizer, 4, 2048)
    with torch.no_grad():
        ref(pairs[:1]), judge(pairs[:1])  # the check of either_way is behind us
        original = tables_file.ref_logps_of, tables_file.rewards_of
        monkeypatch.setattr(tables_file, "ref_logps_of", lambda m, t, x, ys, *rest: counted.extend((tuple(x), tuple(y)) for y in ys) or original[0](m, t, x, ys, *rest))
        monkeypatch.setattr(tables_file, "rewards_of", lambda m, t, texts, *rest: counted.extend(map(tuple, texts)) or original[1](m, t, texts, *rest))
        values = ref(pairs)
        texts = {(tuple(x.prompt_ids), tuple(y.response_ids)) for x, y in pairs}
        assert len(counted) == len(set(counted)) and set(counted) == texts and len(texts) < len(pairs)
        counted.clear()
        judge(pairs)
        texts = {tuple(encode_conversation(reward_tokenizer, x.messages, y.response, 2048)) for x, y in pairs}
        assert len(counted) == len(set(counted)) and set(counted) == texts and len(texts) < len(pairs)
    assert values == pytest.approx(cells(whole.tables.ref_logps, plan), abs=1e-4)  # and every cell got its own text's value


def score_alone(model, tokenizer, x, y):
    with torch.no_grad():
        return type(model).forward(model, input_ids=torch.tensor([encode_conversation(tokenizer, x.messages, y.response, 2048)])).logits.item()


def example(prompt_ids, response_ids, response, prompt="Why?", score=None, where="file:1"):
    return Example(array("i", prompt_ids), array("i", response_ids), [{"role": "user", "content": prompt}], response, score, where)


# ----------------------------------------------------------------------------------------------------------------------
# How much is measured


def test_matched_coverage_fills_the_diagonal_and_can_be_completed_later(world, few, tmp_path, measured):
    """--estimator constant needs r(x_i, y_i) and no reference; a later run with Zhat completes the same file, and its numbers are those of the whole table."""
    path = tmp_path / "t.safetensors"
    tables, plan = build(path, world, {"rewards": "matched", "ref_logps": None}, **FEW)
    assert tables.ref_logps.isnan().all() and tables.rewards.isfinite().sum() == 2 * len(plan.batches)
    for m in range(len(plan.batches)):
        assert tables.rewards[m].diagonal().tolist() == pytest.approx(few.tables.rewards[m].diagonal().tolist(), abs=1e-5)
    assert json.loads(header_of(path))["ref_model"] is None
    tables, _ = build(path, world, **FEW)
    assert torch.allclose(tables.rewards, few.tables.rewards, rtol=0, atol=1e-5) and same(tables.ref_logps, few.tables.ref_logps)
    assert header_of(path) == header_of(few.path)
    written = path.read_bytes()
    build(path, world, {"rewards": "matched", "ref_logps": None}, **FEW)  # and the smaller need is met by the larger table
    assert path.read_bytes() == written
    everything = list(range(len(plan.batches)))
    assert measured == [("rewards", "matched", everything), ("rewards", "all", everything), ("ref_logps", "all", everything)]


def test_only_the_needed_micro_batches_are_measured_and_the_rest_later(world, few, tmp_path, measured, monkeypatch):
    """--max_steps: the others stay nan. More of them later measure only what is new, keep the old numbers bit for bit, and what is all there loads no model."""
    path = tmp_path / "t.safetensors"
    tables, _ = build(path, world, needed={4, 1}, **FEW)
    assert finite(tables.rewards) == finite(tables.ref_logps) == [1, 4] and tables.rewards[[0, 2, 3, 5]].isnan().all() and tables.ref_logps[[0, 2, 3, 5]].isnan().all()
    first = tables.rewards[[1, 4]].clone()
    tables, _ = build(path, world, needed=[0, 1, 2, 4], **FEW)
    assert finite(tables.rewards) == finite(tables.ref_logps) == [0, 1, 2, 4] and torch.equal(tables.rewards[[1, 4]], first)
    build(path, world, **FEW)
    assert measured == [(name, "all", todo) for todo in ([1, 4], [0, 2], [3, 5]) for name in ("rewards", "ref_logps")]
    written, when = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(tables_file, "load_policy", None), monkeypatch.setattr(tables_file, "load_reward_model", None)
    tables, _ = build(path, world, **FEW)
    assert len(measured) == 6 and path.read_bytes() == written and path.stat().st_mtime_ns == when
    for name in ("rewards", "ref_logps"):
        assert torch.allclose(getattr(tables, name), getattr(few.tables, name), rtol=0, atol=1e-4), name
    assert header_of(path) == header_of(few.path)


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


def interrupt(monkeypatch, name, call):
    """Ctrl-C as tables.NAME is about to be called for the `call`-th time."""
    original, calls = getattr(tables_file, name), iter(range(1, 10**9))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(tables_file, name, wrapped)


@pytest.fixture(scope="module")
def straight(world):
    """The bytes of a file that was written without interruption, in pieces of one micro-batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_file, "PIECE", 1)
        build(world / "straight.safetensors", world, **FEW)
    return (world / "straight.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name, call, parts, left", [("save_file", 3, 2, 4), ("score_cells", 2 + 4, 3, 3), ("save_file", 6 + 2, 7, 5), ("save_file", 6 + 6 + 1, 12, 0)], ids=["rewards, writing", "rewards, scoring", "ref_logps, writing", "the whole file"]
)
def test_an_interrupted_run_continues_and_ends_with_the_same_file(world, straight, tmp_path, monkeypatch, measured, name, call, parts, left):
    """A piece is one micro-batch here. Finished pieces stay, only the others are measured, the file is that of an uninterrupted run bit for bit, and no litter stays."""
    monkeypatch.setattr(tables_file, "PIECE", 1)
    folder = tmp_path / "out"
    folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, name, call)
        build(folder / "t.safetensors", world, **FEW)
    assert len(list(folder.rglob("*.safetensors"))) == parts and not (folder / "t.safetensors").exists()
    measured.clear()
    build(folder / "t.safetensors", world, **FEW)
    todo = {"rewards": list(range(6))[6 - left :] if parts < 6 else [], "ref_logps": list(range(6))[6 - left if parts > 6 else 0 :]}
    assert measured == [(table, "all", which) for table, which in todo.items() if which]
    assert (folder / "t.safetensors").read_bytes() == straight
    assert [file.name for file in folder.iterdir()] == ["t.safetensors"]


def test_pieces_that_cannot_be_seen_are_an_error_and_are_kept(world, tmp_path, monkeypatch):
    """Two nodes that do not share a disk: each would write a table with holes and throw away what it has measured."""
    original = tables_file.measure

    def elsewhere(name, which, todo, parts, *rest):
        original(name, which, todo, parts, *rest)
        for part in parts.glob("ref_logps*"):
            part.unlink()  # as if another node had written it

    monkeypatch.setattr(tables_file, "measure", elsewhere)
    with pytest.raises(InputError, match="ref_logps of .* one shared folder"):
        build(tmp_path / "t", world)
    assert not (tmp_path / "t").exists() and list(tmp_path.rglob("rewards*"))


def test_pieces_of_a_smaller_need_do_not_overwrite_those_of_a_larger(world, few, tmp_path, monkeypatch):
    """An interrupted --estimator constant leaves diagonals behind, and a full run that starts over them must not lose what is off the diagonal."""
    monkeypatch.setattr(tables_file, "PIECE", 1)
    path = tmp_path / "t.safetensors"
    build(path, world, needed=[0], **FEW)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "save_file", 3)
        build(path, world, {"rewards": "matched", "ref_logps": None}, **FEW)
    tables, _ = build(path, world, **FEW)
    assert tables.rewards.isfinite().all() and torch.allclose(tables.rewards, few.tables.rewards, rtol=0, atol=1e-4)


def test_pieces_of_other_settings_are_not_mixed_in(world, few, tmp_path, monkeypatch):
    """An interrupted run with another reward model, or another reference, at the same path."""
    monkeypatch.setattr(tables_file, "PIECE", 1)
    for other, call in ((dict(judge="other"), 3), (dict(policy="other"), 6 + 3)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, "save_file", call)
            build(tmp_path / "t.safetensors", world, **FEW, **other)
    tables, _ = build(tmp_path / "t.safetensors", world, **FEW)
    for name in ("rewards", "ref_logps"):
        assert torch.allclose(getattr(tables, name), getattr(few.tables, name), rtol=0, atol=1e-4), name


# ----------------------------------------------------------------------------------------------------------------------
# What a table depends on


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["var_tables"]


def test_the_header_names_what_the_numbers_depend_on_and_nothing_else(world, whole):
    """beta, estimator, --ref_logps and normalisation are applied later: one table serves a whole grid."""
    found = json.loads(header_of(whole.path))
    assert found == {
        "responses": "all", "batch_size": 4, "partners": "batch", "seed": 0, "max_prompt_tokens": 512, "max_response_tokens": 30, "examples": 22,
        "ref_model": fingerprint(str(world / "llama")), "reward_model": fingerprint(str(world / "judge_llama")),
        "dtype": "float32", "autocast": "no", "reward_dtype": "auto", "max_reward_tokens": 2048, "plan": found["plan"],
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{16}", found["plan"]) and found["ref_model"] != found["reward_model"]
    assert not any(word in header_of(whole.path) for word in ("beta", "estimator", "normal", "mean"))


OTHER_SETTINGS = {
    "batch_size": (dict(batch_size=3), ["batch_size: 4 in the table, 3 in this run"]),
    "seed": (dict(seed=1), ["seed: 0 in the table, 1 in this run", "plan: "]),
    "partners": (dict(partners="group"), ["partners: batch in the table, group in this run"]),
    "responses": (dict(responses="chosen"), ["responses: all in the table, chosen in this run", "examples: 22 in the table, 11 in this run"]),
    "reference": (dict(ref_model="OTHER"), ["ref_model: sha256:"]),
    "policy as the reference": (dict(policy="other"), ["ref_model: sha256:"]),
    "reward model": (dict(judge="other"), ["reward_model: sha256:"]),
    "data": (dict(data="other_pairs"), ["plan: "]),
    "prompt limit": (dict(max_prompt_tokens=20), ["max_prompt_tokens: 512 in the table, 20 in this run"]),
    "response limit": (dict(max_response_tokens=31), ["max_response_tokens: 30 in the table, 31 in this run"]),
    "reward limit": (dict(max_reward_tokens=40), ["max_reward_tokens: 2048 in the table, 40 in this run"]),
    "precision": (dict(dtype="bfloat16"), ["dtype: float32 in the table, bfloat16 in this run"]),
    "reward precision": (dict(reward_dtype="bfloat16"), ["reward_dtype: auto in the table, bfloat16 in this run"]),
}


@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_a_table_from_other_settings_is_refused_naming_the_difference(world, whole, measured, case):
    """Before anything is measured, and the file stays as it was."""
    flags, words = OTHER_SETTINGS[case]
    if case == "data":  # one word of one answer
        write(world / "other_pairs.jsonl", [row | {"chosen": row["chosen"].replace("hour", "year")} for row in rows()])
    flags = {name: str(world / "other") if value == "OTHER" else value for name, value in flags.items()}
    with pytest.raises(InputError) as refused:
        build(whole.path, world, **flags)
    message = str(refused.value)
    assert str(whole.path) in message and "does not fit" in message and all(word in message for word in words), message
    named = set(re.findall(r"(\w+): [^;(]* in the table", message))
    assert named <= {word.split(":")[0] for word in words} | {"plan", "examples"}, message  # no difference is named that there is not
    assert not measured and whole.path.read_bytes() == whole.bytes


def test_weights_changed_in_place_are_noticed(world, tmp_path):
    """The same folder name with other weights in it: a name is no identity."""
    folder, tokenizer = tmp_path / "policy", chatml_tokenizer()
    save(folder, causal_lm("llama", vocab_size=len(tokenizer), seed=0), tokenizer)
    build(tmp_path / "t.safetensors", world, policy=folder, needed=[0])
    save(folder, causal_lm("llama", vocab_size=len(tokenizer), seed=1), tokenizer)
    with pytest.raises(InputError, match="ref_model: sha256:"):
        build(tmp_path / "t.safetensors", world, policy=folder, needed=[0])


def plan_of(*examples):
    return Plan(list(examples), [list(range(len(examples)))], {"batch_size": len(examples)})


def test_truncated_and_complete_rows_and_other_splits_do_not_collide(world):
    """Trap 26: equal ids with another split, a response with and without its end, equal ids with another text for the reward model, another order."""
    base = [example([5, 6], [7, 8, 9], "Yes."), example([5], [8], "No.")]
    different = [
        [example([5, 6, 7], [8, 9], "Yes."), base[1]],  # the same tokens, another is scored
        [example([5, 6], [7, 8], "Yes."), base[1]],  # cut by a token
        [example([6], [7, 8, 9], "Yes."), base[1]],  # the prompt cut from the left
        [example([5, 6], [7, 8, 9], "Yes"), base[1]],  # what the reward model reads
        [example([5, 6], [7, 8, 9], "Yes.", prompt="Why"), base[1]],
        [base[1], base[0]],  # another micro-batch
        [example([5, 6], [7, 8], "Yes."), example([9, 5], [8], "No.")],  # a token that moved across the rows
        base,
    ]
    seen = {header(plan_of(*rows), None, None, "float32", "auto", 2048)["plan"] for rows in different}
    assert len(seen) == len(different)


def test_scored_cells_do_not_collide_either(world):
    """Trap 26 within a run: the same token ids split elsewhere are other cells, with another log-prob."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "llama")
    model = load_policy(str(world / "llama")).eval()
    one, two, cut = example([5, 6], [7, 8, 9], "a"), example([5, 6, 7], [8, 9], "a"), example([5, 6], [7, 8], "a")
    with torch.no_grad():
        found = ref_scorer(model, tokenizer, 4)([(e, e) for e in (one, two, cut)])
        alone = [sequence_logps(model, **collate([e], 0)).item() for e in (one, two, cut)]
    assert found == pytest.approx(alone, abs=1e-4) and len({round(value, 3) for value in alone}) == 3


@pytest.mark.parametrize("content", ["torn", "torn header", "empty", "text", "foreign"])
def test_a_file_that_is_no_table_is_refused(world, whole, tmp_path, content):
    """Cut in its numbers or in its header, empty, no safetensors at all, or one that somebody else wrote. It is not written over."""
    path = tmp_path / "t.safetensors"
    if content == "foreign":
        save_file({"rewards": torch.zeros(6, 4, 4), "ref_logps": torch.zeros(6, 4, 4)}, path)
    else:
        path.write_bytes({"torn": whole.bytes[:-100], "torn header": whole.bytes[:200], "empty": b"", "text": b"beta,reward\n1,2\n"}[content])
    before = path.read_bytes()
    with pytest.raises(InputError, match="one that tables.py wrote" if content == "foreign" else "not a readable safetensors file.*remove it"):
        build(path, world)
    assert path.read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# Scores that come with the data


def test_the_datas_own_scores_are_rewards_for_the_answers_of_one_prompt(world, tmp_path):
    """--partners group: r(x, y_j) is known for every row, and it is the same number in all of them, for they share x."""
    tables, plan = build(tmp_path / "t.safetensors", world, judge=None, data="scored", partners="group", batch_size=8)
    for m, batch in enumerate(plan.batches):
        rewards, ref_logps = tables.micro_batch(m, "sum")
        scores = [plan.examples[i].score for i in batch]
        assert rewards.tolist() == [scores] * len(batch) and ref_logps.isfinite().all()
        assert len(set(scores)) == len(scores)
    assert json.loads(header_of(tmp_path / "t.safetensors"))["reward_model"] == "the data's own scores"
    assert {len(batch) for batch in plan.batches} == {2, 3, 4, 5}


def test_the_datas_own_scores_are_the_matched_rewards_of_any_plan(world, tmp_path):
    """--estimator constant asks for r(x_i, y_i) alone; other prompts' rewards are in no file and stay nan."""
    tables, plan = build(tmp_path / "t.safetensors", world, {"rewards": "matched", "ref_logps": None}, judge=None, data="scored")
    for m, batch in enumerate(plan.batches):
        assert tables.rewards[m].diagonal().tolist() == [plan.examples[i].score for i in batch]
        assert tables.rewards[m].isfinite().sum() == len(batch)


def test_scores_that_changed_in_the_data_are_not_read_from_the_old_table(world, tmp_path):
    """The texts are the same, so the reference's half still fits; the rewards are the file's of today, in memory and on disk."""
    path, data = tmp_path / "t.safetensors", world / "changing.jsonl"
    write(data, scored_rows())
    flags = dict(judge=None, data="changing", partners="group")
    build(path, world, **flags)
    write(data, [row | {"scores": [s + 10 for s in row["scores"]]} for row in scored_rows()])
    tables, plan = build(path, world, **flags)
    assert tables.micro_batch(0)[0][0].tolist() == [plan.examples[i].score for i in plan.batches[0]]
    assert same(load_file(path)["rewards"], tables.rewards)


def test_a_missing_score_names_its_row(world, tmp_path):
    rows = scored_rows()
    rows[3]["scores"][1] = "N/A"
    write(world / "unscored.jsonl", rows)
    with pytest.raises(InputError, match=r"unscored.jsonl:4: .*no score.*--reward_model"):
        build(tmp_path / "t.safetensors", world, judge=None, data="unscored", partners="group")
    assert not (tmp_path / "t.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("half", ["rewards", "ref_logps"])
def test_output_that_is_no_number_is_refused_naming_the_rows(world, tmp_path, half):
    """One token that only one answer has is NaN in the model; what was measured before stays."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / ("llama" if half == "ref_logps" else "judge_llama"))
    model = load_policy(str(world / "llama")) if half == "ref_logps" else load_reward_model(str(world / "judge_llama"))
    others = [text for i, row in enumerate(rows()) for text in (json.dumps(row["prompt"], ensure_ascii=False), row["chosen"], row["rejected"]) if i != 8]
    ids = {i for text in (*others, rows()[8]["prompt"][1]["content"], rows()[8]["prompt"][0]["content"], rows()[8]["rejected"]) for i in tokenizer(text)["input_ids"]}
    token = next(i for i in tokenizer(rows()[8]["chosen"])["input_ids"] if i not in ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    save(tmp_path / "bad", model, tokenizer)
    flags = dict(policy=tmp_path / "bad") if half == "ref_logps" else dict(reward_model=tmp_path / "bad")
    flag = "--dtype" if half == "ref_logps" else "--reward_dtype"
    with pytest.raises(InputError, match=rf"{half} of the response of pairs.jsonl:9 to the prompt of pairs.jsonl:\d+ is nan; try {flag} float32"):
        build(tmp_path / "t.safetensors", world, **flags)
    assert not (tmp_path / "t.safetensors").exists()


BAD_INPUT = {
    "no reward model": (dict(judge=None), ["--reward_model is missing", "--partners batch"]),
    "two labels": (dict(reward_model="two"), ["two", "one label", "this one has 2"]),
    "no policy folder": (dict(model="./nowhere"), ["./nowhere", "does not exist"]),
    "no reference folder": (dict(ref_model="./nowhere"), ["./nowhere", "does not exist"]),
    "no reward folder": (dict(reward_model="./nowhere"), ["./nowhere", "does not exist"]),
    "no data file": (dict(data="nowhere"), ["nowhere.jsonl", "no such file"]),
    "one example a micro-batch": (dict(batch_size=1), ["--batch_size 1", "at least 2"]),
    "no batch size": (dict(batch_size=0), ["--batch_size"]),
    "a limit of nothing": (dict(max_reward_tokens=0), ["--max_reward_tokens", "above 0, got 0"]),
    "a torn table": (dict(out="torn.safetensors"), ["torn.safetensors", "not a readable safetensors file"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_status_2(world, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.safetensors").write_text("torn")
    flags, words = BAD_INPUT[case]
    if flags.get("reward_model") == "two":
        tokenizer = bpe_tokenizer()
        save(tmp_path / "two", reward_model(vocab_size=len(tokenizer), num_labels=2), tokenizer)
    status, _, err = run_program(tables_file, arguments(world, **flags), tmp_path, before=forbid_loading if case != "two labels" else None)
    line = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err and line.startswith("tables.py: error: "), err
    assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("tables*"))


def forbid_loading():
    """In the child: all these faults show before a model is loaded."""
    tables_file.load_policy = tables_file.load_reward_model = None


def test_turns_that_the_reward_models_template_refuses_are_an_error_of_the_input(world, tmp_path):
    """A row that begins with the assistant is fine for the policy's ChatML, and not for this reward model: exit status 2, no traceback."""
    tokenizer = bpe_tokenizer(vocab_size=350)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    save(tmp_path / "strict", reward_model("llama", vocab_size=len(tokenizer)), tokenizer)
    greeting = [{"role": "assistant", "content": "Hello, I keep the letters."}, {"role": "user", "content": "Where?"}]
    write(world / "greeting.jsonl", rows()[:4] + [{"prompt": greeting, "chosen": "There.", "rejected": "No."}])
    status, _, err = run_program(tables_file, arguments(world, data="greeting", reward_model=tmp_path / "strict", out=tmp_path / "t.safetensors"), tmp_path)
    assert status == 2 and "Traceback" not in err and "template refuses" in err and "Hello, I keep the letters." in err, err


def test_help_answers_without_torch():
    code = "import runpy, sys; sys.argv = ['tables.py', '--help']\ntry: runpy.run_path('tables.py', run_name='__main__')\nfinally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "--reward_model MODEL" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The command, in one process and in two


@pytest.fixture(scope="module")
def many(world):
    """38 examples in 19 micro-batches of 2: a piece of 16 and one of 3."""
    write(world / "many.jsonl", [{"prompt": f"How long does letter {i} take?", "chosen": "A " + "warm " * (i % 7) + "year.", "rejected": f"Not {i}."} for i in range(19)])
    return SimpleNamespace(argv=arguments(world, data="many", batch_size=2, eval_data=world / "pairs.jsonl"), out=world / "many_one.safetensors")


@pytest.fixture(scope="module")
def typed(world, many):
    """`python tables.py ...` as a shell starts it, with held-out data: what it printed."""
    done = subprocess.run([sys.executable, ROOT / "tables.py", *many.argv, "--out", many.out], cwd=world, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def summary_lines(text, title):
    """{beta: [effective sample size, self_share]} of the block under a line that has `title`."""
    block = text[text.index(title) :].split("\n", 2)[2]
    return {float(line.split()[0]): [float(x) for x in line.split()[1:]] for line in block.split("\nweights")[0].split("\n")[:7]}


def test_the_command_prints_the_cost_and_what_beta_does(many, typed):
    """First what it will cost, in tokens of the policy counted here by hand; at the end effective sample size and self_share for beta 0.1 to 10, recomputed from the file."""
    args = tables_file.parse_args(many.argv)
    *_, plan, held_out = load_plan(args, "all", show=False)
    tokens = sum(len(plan.examples[i].prompt_ids) + 2 * len(plan.examples[i].response_ids) for batch in plan.batches for i in batch)
    for name in ("rewards", "ref_logps"):
        assert re.search(rf"^{name}: 19 micro-batches, {tokens:,} forward tokens .*about \d+\.\d minutes$", typed, re.M), typed
    assert typed.index("forward tokens") < typed.index("effective sample size")
    file = load_file(many.out)
    for mode in ("mean", "sum"):
        found = summary_lines(typed, f"weights over 19 micro-batches, --ref_logps {mode} --estimator paper")
        assert list(found) == [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
        for beta, numbers in found.items():
            assert numbers == pytest.approx(by_hand(file["rewards"], file["ref_logps"], file["response_tokens"], beta, mode), abs=6e-3), (mode, beta)
    assert len(held_out.batches) == 11 and "weights over 11 micro-batches" in typed
    held_out_file = load_file(str(many.out).replace("_one.", "_one_eval."))
    assert finite(held_out_file["rewards"]) == finite(held_out_file["ref_logps"]) == list(range(11))


def test_the_minutes_are_the_time_of_one_micro_batch_scaled_by_its_tokens(world, tmp_path, monkeypatch, capsys):
    """A clock that says one minute for the first micro-batch: the estimate is its tokens' share of all tokens, turned over."""
    monkeypatch.setattr(tables_file, "PIECE", 1)  # up to one piece there is no estimate
    monkeypatch.setattr(tables_file, "time", SimpleNamespace(perf_counter=iter([0.0, 60.0]).__next__))
    _, plan = build(tmp_path / "t.safetensors", world, {"rewards": None, "ref_logps": "all"}, **FEW)
    tokens = [sum(len(plan.examples[i].prompt_ids) + 2 * len(plan.examples[i].response_ids) for i in batch) for batch in plan.batches]
    assert f"{sum(tokens):,} forward tokens (each prompt once, with every response), about {sum(tokens) / tokens[0]:.1f} minutes" in capsys.readouterr().out


def by_hand(rewards, ref_logps, lengths, beta, mode):
    """[mean effective sample size, mean self_share], Algorithm 1 lines 5-6 with exponentials written out, in float64 and shifted so that none overflows."""
    ess, share = [], []
    for r, logp, tokens in zip(rewards.double().tolist(), ref_logps.double().tolist(), lengths.tolist()):
        B = len(r)
        terms = [[r[i][j] / beta + (logp[i][j] / tokens[j] if mode == "mean" else logp[i][j]) for j in range(B)] for i in range(B)]
        zhat = [math.log(sum(math.exp(t - max(row)) for t in row) / B) + max(row) for row in terms]
        log_w = [r[i][i] / beta - zhat[i] for i in range(B)]
        w = [math.exp(x - max(log_w)) for x in log_w]
        ess.append(sum(w) ** 2 / sum(x * x for x in w))
        share += [math.exp(terms[i][i] - max(terms[i])) / sum(math.exp(t - max(terms[i])) for t in terms[i]) for i in range(B)]
    return [sum(ess) / len(ess), sum(share) / len(share)]


@pytest.mark.parametrize("launcher", ["processes", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_write_the_same_file_as_one(world, many, typed, launcher):
    """Pieces of 16 and 3 micro-batches, one each; the held-out eleven all fall to the first process. Every cell to 1e-5, the same header, no litter."""
    folder = world / launcher.split()[0]
    argv = [*many.argv, "--out", str(folder / "t.safetensors")]
    if launcher == "processes":
        status, out, err = run_program(tables_file, argv, world, processes=2)
    else:
        # on a CPU `accelerate launch --cpu --num_processes 2` starts a single process
        launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
        done = subprocess.run([sys.executable, *launch, ROOT / "tables.py", *argv], cwd=world, env=ENVIRONMENT, capture_output=True, text=True)
        status, out, err = done.returncode, done.stdout, done.stderr
    assert status == 0, err
    assert sorted(file.name for file in folder.iterdir()) == ["t.safetensors", "t_eval.safetensors"]
    for one, two in ((many.out, folder / "t.safetensors"), (str(many.out).replace("_one.", "_one_eval."), folder / "t_eval.safetensors")):
        assert header_of(one) == header_of(two)
        one, two = load_file(one), load_file(two)
        assert torch.equal(one["response_tokens"], two["response_tokens"])
        for name in ("rewards", "ref_logps"):
            assert two[name].isfinite().all() and torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name
    assert out.count("rewards: 19 micro-batches") == 1 and out.count("weights over 19 micro-batches, --ref_logps mean") == 1


def test_a_process_that_comes_late_agrees_on_who_measures_what(world, tmp_path, monkeypatch):
    """Two processes, played by threads. If the late one looked for finished pieces when the early one had already written some, the two would share out different
    lists and leave micro-batches that nobody measures."""
    monkeypatch.setattr(tables_file, "PIECE", 1)
    args = tables_file.parse_args(arguments(world))
    tokenizer, reward_tokenizer, plan, _ = load_plan(args, "all", show=False)
    models, barrier, results, parts = [load_policy(args.model) for _ in range(2)], threading.Barrier(2, timeout=60), {}, []
    monkeypatch.setattr(tables_file, "save_file", lambda tensors, path, **more: parts.append(path) or save_file(tensors, path, **more))
    monkeypatch.setattr(tables_file, "load_policy", lambda *_: models.pop())
    monkeypatch.setattr(tables_file, "release", lambda *_: None)

    def process(p):
        accelerator = SimpleNamespace(process_index=p, num_processes=2, is_main_process=p == 0, wait_for_everyone=barrier.wait, device=torch.device("cpu"), autocast=nullcontext, mixed_precision="no")
        results[p] = build_tables(tmp_path / "t.safetensors", plan, {"rewards": None, "ref_logps": "all"}, range(6), accelerator, tokenizer, reward_tokenizer, args)

    early, late = (threading.Thread(target=process, args=(p,)) for p in range(2))
    early.start()
    early.join(timeout=0.8)  # without a barrier its pieces are there now
    late.start()
    early.join(), late.join()
    assert finite(results[0].ref_logps) == finite(results[1].ref_logps) == finite(load_file(tmp_path / "t.safetensors")["ref_logps"]) == list(range(6))
    assert len(parts) == len(set(map(str, parts))) == 6 + 1  # no piece by both, and the whole file by one


# ----------------------------------------------------------------------------------------------------------------------
# Reading a table


def small_table():
    """Two micro-batches of three and of two rows, with numbers to check by hand."""
    plan = Plan([example([3], [4] * n, "a") for n in (1, 2, 4, 5, 10)], [[0, 1, 2], [3, 4]], {"partners": "batch"})
    tables = Tables(plan)
    tables.rewards[0] = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.5, -1.0], [0.0, 0.0, 0.0]])
    tables.rewards[1, :2, :2] = torch.tensor([[3.0, 1.0], [-1.0, 0.0]])
    tables.ref_logps[0] = torch.tensor([[-2.0, -4.0, -8.0], [-1.0, -3.0, -12.0], [-2.5, -5.0, -10.0]])
    tables.ref_logps[1, :2, :2] = torch.tensor([[-10.0, -10.0], [-5.0, -30.0]])
    return tables


def test_a_micro_batchs_means_divide_columns_by_the_tokens_of_their_response():
    """Column j holds y_j: ref_logps[i, j] / |y_j|. "sum" is what was measured; rows that are not there do not come back; nothing stored changes."""
    tables = small_table()
    stored = tables.ref_logps.clone()
    rewards, means = tables.micro_batch(0)
    assert torch.equal(rewards, tables.rewards[0]) and means.tolist() == [[-2.0, -2.0, -2.0], [-1.0, -1.5, -3.0], [-2.5, -2.5, -2.5]]
    assert tables.micro_batch(1, "mean")[1].tolist() == [[-2.0, -1.0], [-1.0, -3.0]]
    assert tables.micro_batch(1, "sum")[1].tolist() == [[-10.0, -10.0], [-5.0, -30.0]] and tables.micro_batch(1)[0].tolist() == [[3.0, 1.0], [-1.0, 0.0]]
    assert same(tables.ref_logps, stored)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_the_summarys_numbers_are_those_of_var_and_of_the_hand(mode):
    """Effective sample size and self_share, averaged over micro-batches of different size, for each beta."""
    tables = small_table()
    found = summary_lines(summary(tables, {0, 1}, mode), f"weights over 2 micro-batches, --ref_logps {mode} --estimator paper")
    assert list(found) == list(tables_file.BETAS)
    for beta, numbers in found.items():
        each = [by_hand(*(x[None] for x in (*tables.micro_batch(m, "sum"), tables.response_tokens[m][tables.response_tokens[m] > 0])), beta, mode) for m in (0, 1)]
        from_var = [[effective_sample_size(log_weights(*tables.micro_batch(m, mode), beta)).item(), self_share(*tables.micro_batch(m, mode), beta).item()] for m in (0, 1)]
        for expected in (each, from_var):
            assert numbers == pytest.approx([(a + b) / 2 for a, b in zip(*expected)], abs=6e-3), beta
    assert len({tuple(numbers) for numbers in found.values()}) > 3


def test_the_summary_of_the_other_estimators():
    """monte_carlo: Zhat without pi_ref, so the share is softmax of r/beta alone. constant: r/beta alone decides the weights and there is no sum to have a share of."""
    tables = small_table()
    tables.ref_logps[:] = math.nan  # neither needs them
    mc = [float(x) for x in summary(tables, [0], "mean", "monte_carlo", betas=(1.0,)).split("\n")[2].split()]
    r = tables.rewards[0].tolist()
    shares = [math.exp(r[i][i]) / sum(map(math.exp, r[i])) for i in range(3)]
    assert mc == pytest.approx([1.0, sum(shares) ** 2 / sum(s * s for s in shares), sum(shares) / 3], abs=6e-3)  # here w_i = 3 share_i
    tables.rewards[0] = torch.where(torch.eye(3, dtype=torch.bool), tables.rewards[0], math.nan)
    constant = [float(x) for x in summary(tables, [0], "mean", "constant", betas=(1.0,)).split("\n")[2].split()]
    w = [math.exp(r[i][i]) for i in range(3)]
    assert constant == pytest.approx([1.0, sum(w) ** 2 / sum(x * x for x in w)], abs=6e-3)


@pytest.mark.parametrize("n, most", [(5, 2), (1999, 1000), (4, 4), (3, 10)])
def test_the_summary_looks_at_no_more_micro_batches_than_it_says(monkeypatch, n, most):
    """At most `most`, spread evenly: a large table does not make the user wait."""
    seen = []
    monkeypatch.setattr(tables_file, "weights_at_a_glance", lambda *_: (1.0, 0.5))
    text = summary(SimpleNamespace(micro_batch=lambda m, _: (seen.append(m), None)), range(n), betas=(1.0,), most=most)
    assert len(seen) <= most and f"weights over {len(seen):,} micro-batches" in text and seen[0] == 0 and len(set(seen)) == len(seen)
    assert len(seen) >= min(n, most) / 2
