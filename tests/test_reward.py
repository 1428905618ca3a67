"""reward.py: Eq. 1 by hand, scores that depend on nothing but the conversation, and the two commands. CPU, no network."""

import json
import math
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny import ENVIRONMENT, ROOT, bpe_tokenizer, causal_lm, chatml_tokenizer, reward_model, run_program, save, write

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import processors

import reward
from data import PLAIN_TEMPLATE, encode_text, load_examples, pad_right
from formats import InputError
from model import load_reward_model
from reward import accuracy, bind_scores, bradley_terry_loss, encode_conversation, score
from var import log_weights

torch.set_num_threads(1)

DECODERS = {"llama": {}, "qwen2": {}, "gpt_neox": {}, "gpt2": {}, "gemma2": dict(head_dim=8, sliding_window=8)}
ENCODERS = {"bert": {}, "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False), "modernbert": dict(cls_token_id=None, sep_token_id=None)}


def judge(architecture="llama", tokenizer=None, **more):
    """A random reward model whose scores differ by tenths and more, in eval mode, as transformers made it."""
    more = {"initializer_range": 0.2} | (DECODERS | ENCODERS).get(architecture, {}) | more
    return reward_model(architecture, vocab_size=len(tokenizer or plain_tokenizer()), **more).eval()


def plain_tokenizer(**more):
    """What data.load_tokenizer makes of a tokenizer without a template: BOS, role per line, every turn ended by eos."""
    return bpe_tokenizer(**({"chat_template": PLAIN_TEMPLATE, "pad": "<pad>"} | more))


def user(text):
    return {"role": "user", "content": text}


def conversations():
    """Seven of them, from a few to 150 tokens: with a system turn, with earlier turns, with anything in the text."""
    long = "Fold the letter twice, put it in the envelope, and do not forget the stamp! "
    return [
        ([user("Which tree keeps its leaves?")], "The pine."),
        ([user("How long does bread dough need to rise?")], "About an hour in a warm kitchen. " + long),
        ([{"role": "system", "content": "You are brief."}, user("Where is the stamp?")], "No."),
        ([user("a")], long * 2),
        ([user(long), {"role": "assistant", "content": "Yes."}, user("And then?")], "Send it."),
        ([user("naïve café, 日本語 🙂?")], "tabs\tand\nnew lines"),
        ([user("Which tree keeps its leaves?")], "Not the oak, not the beech, not the birch."),
    ]


@torch.no_grad()
def own_logit(model, ids):
    """What transformers gives for one conversation, alone and without padding: the raw logit."""
    return type(model).forward(model, input_ids=torch.tensor([ids])).logits.item()


def own_logits(model, tokenizer, texts=None):
    return [own_logit(model, encode_conversation(tokenizer, *text, 2048)) for text in texts or conversations()]


def scores_of(model, tokenizer, texts, **more):
    return score(bind_scores(model), tokenizer, texts, progress=False, **more)


# ----------------------------------------------------------------------------------------------------------------------
# Eq. 1


def test_bradley_terry_loss_is_eq_1_by_hand():
    """-mean log sigmoid(r_w - r_l), Eq. 1, with sigmoid and log written out, in float64."""
    chosen, rejected = [0.5, -1.0, 3.0], [0.25, 1.5, -2.0]
    by_hand = -sum(math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen, rejected)) / 3
    loss = bradley_terry_loss(torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64))
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(by_hand, rel=1e-14)


def test_bradley_terry_loss_is_log_2_where_rewards_are_equal():
    """A model that cannot tell the two apart says 1/2, whatever it scores them."""
    rewards = torch.tensor([0.0, -3.0, 50.0], dtype=torch.float64)
    assert bradley_terry_loss(rewards, rewards).item() == pytest.approx(math.log(2), rel=1e-14)


def test_bradley_terry_gradient_by_hand():
    """d/dr_w = -sigmoid(r_l - r_w) / B and d/dr_l its negative: descending raises the chosen reward, most where the order is wrong."""
    chosen = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.25, 1.5, -2.0], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(chosen, rejected).backward()
    by_hand = [-1 / (1 + math.exp(c - r)) / 3 for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert chosen.grad.tolist() == pytest.approx(by_hand, rel=1e-14)
    assert rejected.grad.tolist() == pytest.approx([-g for g in by_hand], rel=1e-14)


def test_bradley_terry_loss_survives_large_margins():
    """log(sigmoid(x)) written out is -inf at x = -1000 in float32; the loss there is 1000 and its gradient -1."""
    margins = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss = bradley_terry_loss(margins, torch.zeros(2))
    loss.backward()
    assert loss.item() == 500.0 and margins.grad.tolist() == [-0.5, 0.0]


def test_a_reward_known_up_to_a_constant_per_prompt_gives_the_same_var_weights():
    """Eq. 1 sees r(x, y_w) - r(x, y_l) only, so it fits r up to some c(x). Zhat takes c(x) out of VAR's weights again (Eq. 10); without Zhat it stays in."""
    torch.manual_seed(0)
    rewards, ref_logps, c = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64) - 2, torch.tensor([7.0, -3.0, 0.5, 40.0], dtype=torch.float64)
    shifted = rewards + c[:, None]  # row i = prompt x_i
    assert bradley_terry_loss(shifted[:, 0], shifted[:, 1]).item() == pytest.approx(bradley_terry_loss(rewards[:, 0], rewards[:, 1]).item(), rel=1e-12)
    for estimator in ("paper", "monte_carlo"):
        assert torch.allclose(log_weights(shifted, ref_logps, 0.5, estimator), log_weights(rewards, ref_logps, 0.5, estimator), rtol=0, atol=1e-12), estimator
    moved = log_weights(shifted, None, 0.5, "constant") - log_weights(rewards, None, 0.5, "constant")
    assert torch.allclose(moved, c / 0.5, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy


def test_strictly_greater_is_right_and_ties_stand_apart():
    """One right, one wrong, two ties: accuracy 1/4, ties 2/4, and the mean margin by hand."""
    assert accuracy([1.0, 0.0, 2.0, -1.0], [0.5, 0.25, 2.0, -1.0]) == {"pairs": 4, "accuracy": 0.25, "ties": 0.5, "mean_margin": (0.5 - 0.25) / 4}


@pytest.mark.parametrize("bad", [([math.nan, 1.0], [0.0, 0.0]), ([2.0, 1.0], [0.0, math.nan])])
def test_accuracy_refuses_nan(bad):
    """A NaN is neither above, below nor equal: counted, it would pass for a wrong answer."""
    with pytest.raises(ValueError, match="nan"):
        accuracy(*bad)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS])
def test_a_score_is_the_raw_logit_alone_or_in_any_batch(architecture):
    """Any batch size and any order, to 1e-5 of what transformers gives for the conversation alone; no sigmoid, or all would be between 0 and 1."""
    tokenizer = plain_tokenizer()
    model = judge(architecture, tokenizer)
    expected, texts = own_logits(model, tokenizer), conversations()
    assert (min(expected) < 0 or max(expected) > 1) and max(expected) - min(expected) > 0.05  # else the checks below would be empty
    for batch_size in (1, 2, 3, 7, 100):
        assert scores_of(model, tokenizer, texts, batch_size=batch_size) == pytest.approx(expected, abs=1e-5), batch_size
    for seed in range(3):
        order = random.Random(seed).sample(range(7), 7)
        assert scores_of(model, tokenizer, [texts[i] for i in order], batch_size=3) == pytest.approx([expected[i] for i in order], abs=1e-5), order


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_left_padded_batch_scores_the_same(architecture):
    """Through the forward that training and tables use: the last attended token, positions counted from the first attended one."""
    tokenizer = plain_tokenizer()
    model = judge(architecture, tokenizer)
    expected = own_logits(model, tokenizer)
    ids = [encode_conversation(tokenizer, *text, 2048) for text in conversations()]
    width = max(map(len, ids)) + 2
    input_ids = torch.tensor([[9] * (width - len(row)) + row for row in ids])  # any id: it is under the mask
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        assert bind_scores(model)(input_ids=input_ids, attention_mask=attention_mask).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_decoder_that_looks_both_ways_is_not_disturbed_by_padding():
    """Gemma 3 with bidirectional attention has a decoder's head: without a mask its tokens would see the padding on their right."""
    tokenizer = plain_tokenizer()
    model = judge("gemma3_text", tokenizer, head_dim=8, use_bidirectional_attention=True)
    expected = own_logits(model, tokenizer)
    assert scores_of(model, tokenizer, conversations(), batch_size=7) == pytest.approx(expected, abs=1e-5)


EOS_LAST = PLAIN_TEMPLATE.replace("{{ eos_token }}\n", "{{ eos_token }}")  # the text ends with eos, not with a newline


@pytest.mark.parametrize("config_knows_pad", [True, False])
def test_pad_equal_to_eos_does_not_lose_the_final_eos(config_knows_pad):
    """No pad token in the tokenizer, so eos pads; texts end with eos. r is read at that eos, with or without pad_token_id in the config, in any batch."""
    tokenizer = plain_tokenizer(pad=None, chat_template=EOS_LAST)
    model = judge(tokenizer=tokenizer)
    ids = [encode_conversation(tokenizer, *text, 2048) for text in conversations()]
    assert all(row[-1] == tokenizer.eos_token_id for row in ids) and tokenizer.pad_token_id is None
    expected = [own_logit(model, row) for row in ids]  # alone and without a pad id transformers reads the last token
    model.config.pad_token_id = tokenizer.eos_token_id if config_knows_pad else None
    for batch_size in (1, 3, 7):
        assert scores_of(model, tokenizer, conversations(), batch_size=batch_size) == pytest.approx(expected, abs=1e-5)


def test_where_transformers_itself_reads_when_pad_equals_eos():
    """Pinned, so that we notice a change: one token before the final eos. And without a pad id it refuses a batch. reward.py's header says so."""
    tokenizer = plain_tokenizer(pad=None, chat_template=EOS_LAST)
    model = judge(tokenizer=tokenizer)
    ids = encode_conversation(tokenizer, *conversations()[0], 2048)
    at_eos, before_eos = own_logit(model, ids), own_logit(model, ids[:-1])
    assert abs(at_eos - before_eos) > 0.01
    with pytest.raises(ValueError, match="padding token"):
        model(**pad_right([ids, ids], tokenizer.eos_token_id))
    model.config.pad_token_id = tokenizer.eos_token_id
    assert own_logit(model, ids) == pytest.approx(before_eos, abs=1e-6)
    assert scores_of(model, tokenizer, conversations()[:1]) == pytest.approx([at_eos], abs=1e-6)


def test_a_16_bit_model_scores_in_float32():
    """bfloat16 weights as most checkpoints have them: a list of numbers that only float32 or wider can hold comes back, near the float32 score."""
    tokenizer = plain_tokenizer()
    expected = own_logits(judge(tokenizer=tokenizer), tokenizer)
    got = scores_of(judge(tokenizer=tokenizer).to(torch.bfloat16), tokenizer, conversations())
    assert got == pytest.approx(expected, abs=0.1)


def test_a_score_that_is_no_number_names_its_place_and_text():
    """One word whose embedding is NaN, as a damaged checkpoint or an overflow in float16 would give it."""
    tokenizer = plain_tokenizer()
    model = judge(tokenizer=tokenizer)
    ids = [set(encode_conversation(tokenizer, *text, 2048)) for text in conversations()]
    only_in_the_sixth = min(ids[5] - set().union(*ids[:5], ids[6]))
    with torch.no_grad():
        model.get_input_embeddings().weight[only_in_the_sixth] = math.nan
    with pytest.raises(InputError, match="conversation 6 of 7, response 'tabs.*, is nan.*--reward_dtype float32"):
        scores_of(model, tokenizer, conversations())
    assert len(scores_of(model, tokenizer, conversations()[:5])) == 5


# ----------------------------------------------------------------------------------------------------------------------
# What the reward model reads


def test_the_input_is_built_from_messages_with_the_reward_models_own_template():
    """Trap 25: the policy's text, decoded and tokenised again, would lose the roles. Here the policy has ChatML and other ids."""
    tokenizer, policys = plain_tokenizer(), chatml_tokenizer()
    model = judge(tokenizer=tokenizer)
    for (messages, response), value in zip(conversations(), scores_of(model, tokenizer, conversations())):
        text = "<s>" + "".join(f"{m['role']}:\n{m['content']}</s>\n" for m in [*messages, {"role": "assistant", "content": response}])
        assert value == pytest.approx(own_logit(model, tokenizer(text, add_special_tokens=False)["input_ids"]), abs=1e-5)
        without_roles = policys.decode(encode_conversation(policys, messages, response, 2048), skip_special_tokens=True)
        assert abs(value - own_logit(model, tokenizer(without_roles)["input_ids"])) > 1e-3


def test_the_pairs_of_a_file_are_scored_as_messages_too(tmp_path):
    """pair_accuracy reads the examples' messages and texts, whatever tokenizer made their ids."""
    tokenizer, policys = plain_tokenizer(), chatml_tokenizer()
    file = write(tmp_path / "pairs.jsonl", [{"prompt": f"Where is the {x}?", "chosen": f"In the {x} box.", "rejected": "Who knows where it went."} for x in ("stamp", "letter", "bread")])
    model, result = judge(tokenizer=tokenizer), []
    for examples_tokenizer in (tokenizer, policys):
        examples, _, _ = load_examples([file], examples_tokenizer, "pairs", 512, 512, progress=False)
        result.append(reward.pair_accuracy(bind_scores(model), tokenizer, examples, 4, 2048))
    logits = own_logits(model, tokenizer, [(e.messages, e.response) for e in examples])
    assert result[0] == result[1] == pytest.approx(accuracy(logits[0::2], logits[1::2]), abs=1e-5)


def test_bos_comes_once():
    """Trap 3: the template writes BOS, and this tokenizer adds one to every text it is given."""
    tokenizer = plain_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    messages, response = conversations()[0]
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2
    ids = encode_conversation(tokenizer, messages, response, 2048)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert encode_conversation(tokenizer, messages, response, 8).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("tokenizer, bos", [(plain_tokenizer(), 1), (chatml_tokenizer(), 0)], ids=["bos", "no bos"])
def test_a_long_conversation_is_cut_from_the_left_and_keeps_bos(tokenizer, bos):
    """The answer and its end stay, BOS stays, the oldest tokens go; what fits exactly is not touched; the score is that of the shorter input."""
    messages, response = conversations()[4]
    whole = encode_conversation(tokenizer, messages, response, 10**6)
    assert whole == encode_text(tokenizer, [tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)])[0]
    assert (whole[0] == tokenizer.bos_token_id) == bool(bos)
    assert encode_conversation(tokenizer, messages, response, len(whole)) == whole
    for n in (len(whole) - 1, 12, 2):
        cut = encode_conversation(tokenizer, messages, response, n)
        assert len(cut) == n and cut[:bos] == whole[:bos] and cut[bos:] == whole[len(whole) - n + bos :]
    assert encode_conversation(tokenizer, messages, response, 1) == (whole[:1] if bos else whole[-1:])
    model = judge(tokenizer=tokenizer)
    cut = encode_conversation(tokenizer, messages, response, 12)
    assert scores_of(model, tokenizer, [(messages, response)], max_tokens=12) == pytest.approx([own_logit(model, cut)], abs=1e-5)
    assert abs(own_logit(model, cut) - own_logit(model, whole)) > 1e-3


def test_turns_that_the_reward_models_template_refuses_are_an_error_of_the_input():
    """The policy's template took them, so the row was not dropped; the line shows where the conversation begins. Without it: a traceback."""
    strict = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('must start with user') }}{% endif %}" + PLAIN_TEMPLATE
    tokenizer = plain_tokenizer(chat_template=strict)
    greeted = ([{"role": "assistant", "content": "Hello, I keep the letters."}, user("Where is the stamp?")], "In the drawer.")
    with pytest.raises(InputError, match="template refuses.*Hello, I keep the letters"):
        scores_of(judge(tokenizer=tokenizer), tokenizer, [*conversations()[:2], greeted])


# ----------------------------------------------------------------------------------------------------------------------
# reward.py train


THINGS = "stamp letter bread kitchen pine leaf boat mountain envelope tree dough emoji".split()


def toy_pairs(seed, n):
    """Easily told apart: the chosen answer, and only it, says "thanks" somewhere; words and lengths are otherwise drawn alike."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        chosen, rejected = ([rng.choice(THINGS) for _ in range(rng.randint(3, 9))] for _ in range(2))
        chosen.insert(rng.randint(0, len(chosen)), "thanks")
        rejected.insert(rng.randint(0, len(rejected)), "later")
        rows.append({"prompt": f"Tell me about the {rng.choice(THINGS)} and the {rng.choice(THINGS)}.", "chosen": " ".join(chosen), "rejected": " ".join(rejected)})
    return rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """`python reward.py train` typed in a shell, from a plain causal language model without a pad token: its folder, what it printed."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = bpe_tokenizer([" ".join(THINGS + ["thanks", "later", "Tell me about the and the."])] * 3)
    base = save(folder / "base", causal_lm("llama", vocab_size=len(tokenizer)), tokenizer)
    train, held_out = write(folder / "train.jsonl", toy_pairs(0, 64)), write(folder / "held_out.jsonl", toy_pairs(1, 24))
    flags = f"--data {train} --eval_data {held_out} --lr 1e-2 --batch_size 16 --epochs 6"
    command = [sys.executable, ROOT / "reward.py", "train", "--model", base, "--output_dir", folder / "reward", *flags.split()]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, base=base, out=str(folder / "reward"), held_out=held_out, train=train, flags=flags.split(), printed=done.stdout)


def held_out_pairs(toy, tokenizer):
    examples, _, _ = load_examples([toy.held_out], tokenizer, "pairs", 512, 512, progress=False)
    return [(e.messages, e.response) for e in examples]


def test_training_raises_held_out_accuracy(toy):
    """From chance at the fresh head to nearly all pairs of new prompts; the number is printed and written."""
    transformers.set_seed(0)  # the head that training started from
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy.out)
    fresh = scores_of(load_reward_model(toy.base, "float32", new_head=True), tokenizer, held_out_pairs(toy, tokenizer))
    before, after = accuracy(fresh[0::2], fresh[1::2]), json.loads((toy.folder / "reward" / "accuracy.json").read_text())
    assert before["accuracy"] < 0.8 and after["accuracy"] > 0.95 and after["mean_margin"] > 1, (before, after)
    assert after["pairs"] == 24 and "reward model of 64 pairs written to" in toy.printed
    assert f"held-out pairs: accuracy {100 * after['accuracy']:.1f} %, ties 0.0 %" in toy.printed


def test_the_trained_folder_opens_without_this_code_and_reproduces_our_scores(toy):
    """AutoModelForSequenceClassification with one label, safetensors, the tokenizer with its template, and a pad id so that other tools can batch it."""
    model, tokenizer = transformers.AutoModelForSequenceClassification.from_pretrained(toy.out), transformers.AutoTokenizer.from_pretrained(toy.out)
    assert model.config.num_labels == 1 and model.dtype == torch.float32 and model.config.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    pairs = held_out_pairs(toy, tokenizer)
    logits = own_logits(model, tokenizer, pairs)
    assert scores_of(load_reward_model(toy.out), tokenizer, pairs) == pytest.approx(logits, abs=1e-5)
    assert accuracy(logits[0::2], logits[1::2])["mean_margin"] == pytest.approx(json.loads((toy.folder / "reward" / "accuracy.json").read_text())["mean_margin"], abs=1e-4)
    texts = [tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False) for messages, response in pairs]
    with torch.no_grad():  # another tool's way: a padded batch through transformers' own forward (these texts do not end with the pad token)
        batch = pad_right(encode_text(tokenizer, texts), model.config.pad_token_id)
        assert model(**batch).logits.squeeze(-1).tolist() == pytest.approx(logits, abs=1e-5)
    assert not list(toy.folder.rglob("*.tmp")) and not (toy.folder / "reward" / ".saving").exists()


def test_training_is_a_function_of_its_seed(toy, tmp_path):
    """The same command, the same weights, bit for bit; another seed, others."""
    written = {}
    for name, seed in (("again", 0), ("other", 1)):
        status, _, err = run_program(reward, ["train", "--model", toy.base, "--output_dir", str(tmp_path / name), *toy.flags, "--seed", str(seed)], tmp_path)
        assert status == 0, err
        written[name] = load_file(tmp_path / name / "model.safetensors")
    first = load_file(f"{toy.out}/model.safetensors")
    assert all(torch.equal(first[name], written["again"][name]) for name in first)
    assert any(not torch.equal(first[name], written["other"][name]) for name in first)


def test_one_step_moves_the_weights_along_eq_1(toy, tmp_path):
    """One optimizer step on one batch of all pairs: AdamW's first step is the sign of the gradient of Eq. 1 over the pairs, written out here pair by pair."""
    flags = f"--data {toy.train} --lr 1e-3 --batch_size 64 --warmup_ratio 0 --max_grad_norm 1e9".split()
    status, _, err = run_program(reward, ["train", "--model", toy.base, "--output_dir", str(tmp_path / "out"), *flags], tmp_path)
    assert status == 0, err
    transformers.set_seed(0)
    model, tokenizer = load_reward_model(toy.base, "float32", new_head=True), transformers.AutoTokenizer.from_pretrained(toy.out)
    head = model.score.weight.detach().clone()
    rows = [json.loads(line) for line in open(toy.train)]
    for row in rows:
        r = [model(input_ids=torch.tensor([encode_conversation(tokenizer, [user(row["prompt"])], row[side], 2048)])).logits.squeeze() for side in ("chosen", "rejected")]
        (-torch.log(torch.sigmoid(r[0] - r[1])) / len(rows)).backward()
    moved, gradient = load_file(tmp_path / "out" / "model.safetensors")["score.weight"] - head, model.score.weight.grad
    assert torch.allclose(moved, -1e-3 * gradient / (gradient.abs() + 1e-8), rtol=0, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# reward.py accuracy


def test_the_accuracy_command_prints_and_writes_what_the_scores_say(toy, tmp_path):
    """Recounted from transformers' own logits. --out is JSON with the model and the data it was measured on."""
    status, out, err = run_program(reward, ["accuracy", "--model", toy.out, "--data", toy.held_out, "--batch_size", "5", "--out", str(tmp_path / "accuracy.json")], tmp_path)
    assert status == 0, err
    model, tokenizer = transformers.AutoModelForSequenceClassification.from_pretrained(toy.out), transformers.AutoTokenizer.from_pretrained(toy.out)
    logits = own_logits(model, tokenizer, held_out_pairs(toy, tokenizer))
    margins = [c - r for c, r in zip(logits[0::2], logits[1::2])]
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["model"] == toy.out and found["data"] == [toy.held_out] and found["pairs"] == len(margins) == 24
    assert found["accuracy"] == sum(m > 0 for m in margins) / 24 and found["ties"] == 0
    assert found["mean_margin"] == pytest.approx(sum(margins) / 24, abs=1e-4)
    assert re.search(rf"^accuracy {100 * found['accuracy']:.1f} %, ties 0.0 %, mean margin {found['mean_margin']:.3f} \(24 pairs\)$", out, re.M), out


def test_a_model_that_scores_everything_alike_has_only_ties(toy, tmp_path):
    """A head of zeros: accuracy 0 %, not 50 and not 100."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy.out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(toy.out)
    torch.nn.init.zeros_(model.score.weight)
    status, out, err = run_program(reward, ["accuracy", "--model", save(tmp_path / "flat", model, tokenizer), "--data", toy.held_out], tmp_path)
    assert status == 0 and "accuracy 0.0 %, ties 100.0 %, mean margin 0.000" in out, (out, err)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture(scope="module")
def bad(toy):
    folder = toy.folder / "bad"
    folder.mkdir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy.out)
    save(folder / "two", reward_model(vocab_size=len(tokenizer), num_labels=2), tokenizer)
    (folder / "torn.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    write(folder / "one_answer.jsonl", [{"prompt": "a", "response": "b"}])
    return folder


BAD_INPUT = {
    "two labels": ("accuracy --model bad/two --data held_out.jsonl", ["bad/two", "one label", "this one has 2"]),
    "no trained head": ("accuracy --model base --data held_out.jsonl", ["base", "one label", "LlamaForCausalLM"]),
    "no such data": ("accuracy --model reward --data nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    "no such data to train on": ("train --model base --data nowhere.jsonl --output_dir bad/out", ["nowhere.jsonl", "no such file"]),
    "no such held-out data": ("train --model base --data train.jsonl --eval_data nowhere.jsonl --output_dir bad/out", ["nowhere.jsonl", "no such file"]),
    "a malformed line": ("train --model base --data bad/torn.jsonl --output_dir bad/out", ["torn.jsonl:2", "not valid JSON"]),
    "no pairs": ("train --model base --data bad/one_answer.jsonl --output_dir bad/out", ["one_answer.jsonl", "no usable row", "one_answer.jsonl:1"]),
    "no model": ("train --model ./nowhere --data train.jsonl --output_dir bad/out", ["./nowhere", "does not exist"]),
    "a limit of nothing": ("accuracy --model reward --data held_out.jsonl --max_reward_tokens 0", ["--max_reward_tokens", "above 0, got 0"]),
    "a batch of nothing": ("train --model base --data train.jsonl --output_dir bad/out --batch_size 0", ["--batch_size", "above 0, got 0"]),
    "data not given": ("accuracy --model reward", ["--data is required"]),
    "responses that are no pairs": ("accuracy --model reward --data held_out.jsonl --responses all", ["--responses all", "pairs"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_status_2(toy, bad, case, monkeypatch, tmp_path):
    monkeypatch.chdir(toy.folder)
    words, parts = BAD_INPUT[case]
    status, _, err = run_program(reward, words.split(), tmp_path)
    line = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err and "reward.py" in line and "error: " in line, err
    assert all(part in line for part in parts), line
    assert not (bad / "out").exists()


@pytest.mark.parametrize("command", ["", "train", "accuracy"])
def test_help_answers_without_torch(command):
    """The flags of both commands, explained, before anything heavy is imported."""
    code = f"import runpy, sys; sys.argv = ['reward.py', *'{command} --help'.split()]\ntry: runpy.run_path('reward.py', run_name='__main__')\nfinally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"": "train|accuracy", "train": "--output_dir OUTPUT_DIR", "accuracy": "--out FILE"}[command] in done.stdout
