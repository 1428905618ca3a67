"""Which tokens are supervised, what is cut, what is dropped, and the batch plan. The numbered traps are the places where others fell.

Traps 22 (padding in generation) is in test_model.py, 25 (reward-model input) in test_reward.py, 26 (keys of stored tables) in test_tables.py.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from tiny import ENVIRONMENT, ROOT, SHARED_DATA, bpe_tokenizer, causal_lm, chatml_tokenizer, config, run_program, save

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
import transformers

import data
from data import (
    PLAIN_TEMPLATE, Example, array, collate, describe, encode_records, encode_text, end_of_turn_id, hold_out, load_examples, load_tokenizer, pad_id, plan_micro_batches,
    prompt_text, render, step_micro_batches,
)  # fmt: skip
from formats import InputError

BIG = 10**6
USER = lambda text: [{"role": "user", "content": text}]
TALK = [{"role": "system", "content": "Be brief."}, *USER("one one one"), {"role": "assistant", "content": "two two"}, *USER("three")]
LLAMA3_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN_TEMPLATE
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
MUST_ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}"
)


def plain(template=PLAIN_TEMPLATE, **more):
    return bpe_tokenizer(chat_template=template, **more)


def llama3(**more):
    return bpe_tokenizer(eos="<|eot|>", extra=("<|head|>", "<|/head|>"), chat_template=LLAMA3_LIKE, **more)


def encode(tokenizer, prompt, *responses, prompt_tokens=BIG, response_tokens=BIG, counts=None):
    """(prompt ids, [response ids, ...]) of one conversation."""
    (result,) = encode_records(tokenizer, [(prompt if isinstance(prompt, list) else USER(prompt), list(responses))], prompt_tokens, response_tokens, counts)
    return result


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, tokenizer, mode="all", prompt_tokens=BIG, response_tokens=BIG, **more):
    return load_examples([path], tokenizer, mode, prompt_tokens, response_tokens, progress=False, **more)


# ---------------------------------------------------------------------------------------------------------------------- supervised tokens


@pytest.mark.parametrize("tokenizer", [plain(), chatml_tokenizer(), llama3()], ids=["plain", "chatml", "llama3-like"])
def test_exactly_the_response_and_its_end_of_turn_token_are_supervised(tokenizer):
    """decode(response_ids) == response + end of turn, decode(prompt_ids) == the rendered prompt."""
    for text in ("Two days.", "naïve 🙂 日本語", "a\nb\n\nc"):
        prompt_ids, (response_ids,) = encode(tokenizer, TALK, text)
        assert tokenizer.decode(response_ids) == text + tokenizer.eos_token
        assert tokenizer.decode(prompt_ids) == prompt_text(tokenizer, TALK)


def test_the_plain_template_adds_no_vocabulary_and_ends_turns_with_eos():
    """A role per line, eos after each turn."""
    tokenizer = plain()
    size = len(tokenizer)
    assert render(tokenizer, TALK + [{"role": "assistant", "content": "four"}]).count("</s>") == 5
    assert encode(tokenizer, "a", "b")[1][0][-1] == tokenizer.eos_token_id == end_of_turn_id(tokenizer) and len(tokenizer) == size


@pytest.mark.parametrize("limit", [BIG, 48])
def test_every_supervised_token_of_a_real_file_belongs_to_a_response(limit):
    """Real dialogues of several turns, whole and cut to 48 tokens: BOS first, the answer's header last, the response and its end supervised."""
    path = SHARED_DATA / "hh_helpful_base.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tokenizer = llama3()
    header = tokenizer("<|head|>assistant<|/head|>\n", add_special_tokens=False)["input_ids"]
    examples, report, counts = load(str(path), tokenizer, "chosen", limit, limit)
    assert len(examples) == 1198 - counts["equal (prompt, response) examples kept once"] and sum(report.dropped.values()) == 2
    cut = 0
    for e in examples:
        prompt, response = list(e.prompt_ids), list(e.response_ids)
        assert prompt[0] == tokenizer.bos_token_id and prompt[-len(header) :] == header and len(prompt) <= limit and len(response) <= limit
        if response[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(response) == e.response + "<|eot|>"
        else:
            cut += 1
            assert len(response) == limit and (e.response + "<|eot|>").startswith(tokenizer.decode(response).rstrip("\ufffd"))
    assert cut == counts["responses truncated"] and (cut == 0 if limit == BIG else cut > 100)


def test_trap_01_a_pad_token_that_is_eos_does_not_hide_the_real_eos():
    """Masks follow positions, not ids."""
    tokenizer = plain(pad="</s>")
    examples = [Example(array("i", p), array("i", r), [], "", None, "") for p, (r,) in (encode(tokenizer, "a", "b"), encode(tokenizer, "a", "a longer answer"))]
    batch = collate(examples, pad_id(tokenizer))
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in examples]
    for name in ("input_ids", "attention_mask", "response_mask"):
        assert batch[name].shape == (2, max(lengths)) and str(batch[name].dtype) == "torch.int64"
    assert batch["input_ids"][0, lengths[0] :].tolist() == [pad_id(tokenizer)] * (lengths[1] - lengths[0])
    assert not batch["response_mask"][batch["attention_mask"] == 0].any()
    for row, e in enumerate(examples):
        supervised = batch["input_ids"][row][batch["response_mask"][row] == 1].tolist()
        assert supervised == list(e.response_ids) and supervised[-1] == tokenizer.eos_token_id
        assert batch["attention_mask"][row].sum() == len(e.prompt_ids) + len(e.response_ids)


def test_trap_02_eos_is_there_once_also_when_the_file_wrote_it(tmp_path):
    """One end of turn; a written trailing eos is not doubled; a template without any gets eos."""
    path = write(tmp_path / "a.jsonl", [dict(prompt="q", response="An answer</s>")])
    (example,), *_ = load(path, plain())
    assert list(example.response_ids).count(plain().eos_token_id) == 1 and example.response == "An answer"
    bare = plain("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    assert encode(bare, "q", "yes")[1][0].count(bare.eos_token_id) == 1 and encode(bare, "q", "yes")[1][0][-1] == bare.eos_token_id == end_of_turn_id(bare)


def test_trap_03_one_bos_and_trap_04_none_where_there_is_none():
    """The template writes BOS, the tokenizer must not; a tokenizer without BOS gets no id at all."""
    tokenizer = plain()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # it would add one, as Llama's does
    prompt_ids, _ = encode(tokenizer, TALK, "x")
    assert prompt_ids.count(tokenizer.bos_token_id) == 1 and prompt_ids[0] == tokenizer.bos_token_id
    for without in (chatml_tokenizer(), plain(bos=None)):
        assert without.bos_token_id is None and None not in encode(without, TALK, "x")[0]
        assert "None" not in prompt_text(without, TALK)


def test_trap_05_left_truncation_cuts_the_oldest_turns_and_keeps_bos_and_system():
    """Whole old exchanges first, then tokens from the left behind BOS."""
    tokenizer = plain()
    long_talk = [TALK[0]] + [turn for i in range(5) for turn in (USER(f"question {i} " * 4) + [{"role": "assistant", "content": "well " * 8}])] + USER("last one")
    short = encode(tokenizer, [TALK[0], *USER("last one")], "x")[0]
    assert encode(tokenizer, long_talk, "x", prompt_tokens=len(short))[0] == short
    longer = encode(tokenizer, [TALK[0], *long_talk[-3:]], "x")[0]  # no more goes than must
    assert encode(tokenizer, long_talk, "x", prompt_tokens=len(longer))[0] == longer and encode(tokenizer, long_talk, "x", prompt_tokens=len(longer) - 1)[0] == short
    counts = Counter()
    prompt_ids, (response_ids,) = encode(tokenizer, long_talk, "x", prompt_tokens=7, counts=counts)
    assert prompt_ids == [tokenizer.bos_token_id] + short[-6:] and counts["prompts truncated inside a turn"] == 1
    assert tokenizer.decode(response_ids) == "x</s>"
    # four bytes to a character, and the template's own tokens, count as well
    emoji = [TALK[0], *USER("🙃🪁" * 40), {"role": "assistant", "content": "🪁🙃" * 40}, *USER("last one")]
    assert len(prompt_text(tokenizer, emoji)) < 250 < len(encode(tokenizer, emoji, "x")[0]) and encode(tokenizer, emoji, "x", prompt_tokens=250)[0] == short
    brief = [TALK[0], *USER("a"), {"role": "assistant", "content": "b"}, *USER("last one")]
    assert encode(tokenizer, brief, "x", prompt_tokens=len(short))[0] == short


def test_trap_05_a_cut_inside_the_last_turn_keeps_bos_the_system_turn_and_the_header():
    """Only the beginning of the turn's own text goes, unless what stands before it fills more than half of the limit: then BOS alone is kept."""
    for tokenizer in (plain(), chatml_tokenizer(), llama3(), plain(REFUSES_SYSTEM)):
        full = encode(tokenizer, [TALK[0], *USER("word " * 60 + "What is the end?")], "x")[0]
        prompt_ids, _ = encode(tokenizer, [TALK[0], *USER("word " * 60 + "What is the end?")], "x", prompt_tokens=64)
        text = tokenizer.decode(prompt_ids)
        assert len(prompt_ids) == 64 and "What is the end?" in text and text.count("Be brief.") == 1 and text.count("word") < 60
        before = tokenizer.decode(full).split("word")[0].rstrip()
        assert text.startswith(before)
        bos = full[: tokenizer.bos_token_id is not None]
        assert encode(tokenizer, [TALK[0], *USER("word " * 60)], "x", prompt_tokens=9)[0][: len(bos)] == bos
        assert encode(tokenizer, [TALK[0], *USER("word " * 60 + "What is the end?")], "x", prompt_tokens=9)[0] == bos + full[len(full) - 9 + len(bos) :]


def test_trap_06_a_token_across_the_boundary_is_split_at_the_common_prefix_and_counted():
    """Prompt text ending in "\\n" and a response beginning with one: the joint token is not scored as if it were the response's alone, silently."""
    joined = bpe_tokenizer(["x\n\n"] * 50, vocab_size=300, chat_template="{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}")
    joined.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert len(encode_text(joined, ["\n\n"])[0]) == 1  # this tokenizer merges two line breaks
    counts = Counter()
    prompt_ids, (one, two) = encode(joined, "q", "\nanswer", "answer", counts=counts)
    whole = encode_text(joined, ["q\n\nanswer</s>"])[0]
    assert prompt_ids + one == whole and prompt_ids == encode_text(joined, ["q"])[0]
    assert joined.decode(prompt_ids + two) == "q\nanswer</s>" and counts["prompts split early because a token spans the boundary"] == 1


def test_trap_07_no_prefix_space_is_invented():
    """A Metaspace tokenizer would put a space before a response encoded alone; encoded jointly there is none."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator(["[A]Yes indeed [B] what is this"] * 20, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ 'A' if m['role'] == 'assistant' else 'B' }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    prompt_ids, (response_ids,) = encode(tokenizer, "what", "Yes")
    tokens = tokenizer.convert_ids_to_tokens(response_ids)
    assert "".join(tokens) == "Yes</s>" and tokenizer.convert_ids_to_tokens(encode_text(tokenizer, ["Yes"])[0])[0].startswith("▁")


def test_trap_08_a_template_that_is_not_prefix_preserving_uses_one_common_prefix():
    """The generation prompt opens a thought that an answered turn does not have: all responses share the common prefix."""
    thinks = plain("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:[think]{% endif %}")
    counts = Counter()
    prompt_ids, responses = encode(thinks, "q", "yes", "no", counts=counts)
    assert thinks.decode(prompt_ids) == "user:q</s>assistant:" and [thinks.decode(r) for r in responses] == ["yes</s>", "no</s>"] and sum(counts.values()) == 1


def test_trap_08_special_tokens_in_the_header_of_an_answered_turn_do_not_end_it():
    """As gpt-oss has it: the answered turn names its channel with special tokens, which the model must write itself; the text behind them counts too."""
    channels = bpe_tokenizer(
        eos="<|return|>", extra=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        chat_template="{% for m in messages %}<|start|>{{ m['role'] }}{{ '<|channel|>final' if m['role'] == 'assistant' }}<|message|>{{ m['content'] }}"
        "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    )  # fmt: skip
    for text in ("yes", "final", "two\n"):
        assert channels.decode(encode(channels, "q", text)[1][0]) == f"<|channel|>final<|message|>{text}<|return|>"
    # as Phi-3 has it: two tokens close the conversation, and the first of them closes the turn
    closes_twice = bpe_tokenizer(extra=("<|end|>", "<|a|>"), chat_template="{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}{{ '<|a|>' if add_generation_prompt else eos_token }}")
    assert closes_twice.decode(encode(closes_twice, "q", "yes")[1][0]).endswith("yes<|end|>") and end_of_turn_id(closes_twice) == closes_twice.convert_tokens_to_ids("<|end|>")


def test_trap_09_the_last_supervised_token_is_one_that_generation_stops_on():
    """A template whose end of turn is the next turn's header teaches eos instead of nothing."""
    glm_like = bpe_tokenizer(extra=("<|user|>", "<|bot|>"), chat_template="{% for m in messages %}{{ '<|bot|>' if m['role'] == 'assistant' else '<|user|>' }}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}")
    assert glm_like.decode(encode(glm_like, "q", "yes")[1][0]) == "yes</s>"
    assert end_of_turn_id(glm_like) == glm_like.eos_token_id and end_of_turn_id(chatml_tokenizer()) == chatml_tokenizer().convert_tokens_to_ids("<|im_end|>")


def test_trap_10_the_header_of_the_answer_is_prompt():
    """The generation prompt is part of the prompt, so its tokens are not scored."""
    tokenizer = chatml_tokenizer()
    assert tokenizer.decode(encode(tokenizer, "q", "yes")[0]).endswith("<|im_start|>assistant\n")


def test_trap_11_rendering_gives_a_string_and_ids_are_lists_of_int():
    """apply_chat_template(tokenize=True) would give a dict whose len is 2."""
    prompt_ids, (response_ids,) = encode(plain(), "q", "yes")
    assert isinstance(prompt_text(plain(), USER("q")), str) and all(type(i) is int for i in prompt_ids + response_ids)


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM], ids=["refused", "dropped"])
def test_trap_12_a_system_turn_the_template_will_not_have_is_folded_into_the_user_turn(template):
    """Its text is kept either way."""
    text = prompt_text(plain(template), TALK)
    assert "Be brief.\n\none one one" in text


def test_trap_12_turns_the_template_refuses_drop_the_row(tmp_path):
    """Two user turns in a row under a template that must alternate: counted, not a crash."""
    rows = [dict(prompt=USER("a") + USER("b"), response="c"), dict(prompt="a", response="c")]
    examples, report, _ = load(write(tmp_path / "a.jsonl", rows), plain(MUST_ALTERNATE))
    assert len(examples) == 1 and report.first == {"the chat template refuses these turns": "a.jsonl:1"}


# Traps 13, 14, 15 are about rows: test_formats.py


def test_trap_16_and_17_a_long_prompt_never_eats_the_response():
    """Each has its own limit; a limit of 1 or 2 tokens does not turn into a slice from the wrong end."""
    tokenizer = plain()
    for limit in (1, 2, 3):
        prompt_ids, (response_ids,) = encode(tokenizer, "word " * 50, "yes", prompt_tokens=limit)
        assert len(prompt_ids) == limit and prompt_ids[0] == tokenizer.bos_token_id and tokenizer.decode(response_ids) == "yes</s>"
    without = chatml_tokenizer()
    full = encode(without, "word " * 50, "yes")[0]
    assert [encode(without, "word " * 50, "yes", prompt_tokens=limit)[0] for limit in (1, 2)] == [full[-1:], full[-2:]]


def test_trap_18_truncation_comes_before_padding():
    """A row cut to its limits has the same tokens alone and beside a longer one."""
    tokenizer = plain()
    rows = [encode(tokenizer, "word " * n, "tree " * n, prompt_tokens=12, response_tokens=5) for n in (2, 30)]
    examples = [Example(array("i", p), array("i", r), [], "", None, "") for p, (r,) in rows]
    together, alone = collate(examples, 0), collate(examples[1:], 0)
    assert together["input_ids"][1].tolist() == alone["input_ids"][0].tolist() and together["response_mask"][1].sum() == 5


def test_trap_19_a_truncated_response_gets_no_end_of_turn():
    """It must not teach to stop there; counted."""
    tokenizer, counts = plain(), Counter()
    full = encode(tokenizer, "q", "one two three four five six")[1][0]
    assert encode(tokenizer, "q", "one two three four five six", response_tokens=4, counts=counts)[1][0] == full[:4] and counts["responses truncated"] == 1
    assert encode(tokenizer, "q", "one two three four five six", response_tokens=len(full))[1][0][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode(tokenizer, "q", "one two three four five six", response_tokens=len(full) - 1)[1][0]


def test_trap_20_blank_responses_never_become_examples(tmp_path):
    """Dropped with a reason, also where the file wrote nothing but an end token; a file of nothing else stops."""
    for blank in (" \n\t", "</s>", " </s>"):
        with pytest.raises(InputError, match="blank"):
            load(write(tmp_path / "a.jsonl", [dict(prompt="q", response=blank)]), plain())


def test_trap_21_a_template_that_trims_still_supervises_what_it_renders(tmp_path):
    """" yes \\n" under a trimming template: the span is the rendered "yes" and its end of turn, and the reward model is given the same text."""
    path = write(tmp_path / "a.jsonl", [dict(prompt="q", response=" yes \n")])
    for tokenizer, text in ((llama3(), "yes"), (plain(), " yes \n")):
        (example,), *_ = load(path, tokenizer)
        assert example.response == text and tokenizer.decode(list(example.response_ids)) == text + tokenizer.eos_token
    shouting = plain("{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}")
    with pytest.raises(InputError, match="the chat template changes the response"):
        load(path, shouting)


def test_trap_23_truncation_cuts_ids_not_strings():
    """A cut inside an emoji keeps the first of its byte tokens; ids are never decoded and encoded again."""
    tokenizer = bpe_tokenizer(["plain words"], vocab_size=270, chat_template=PLAIN_TEMPLATE)
    full = encode(tokenizer, "q", "🙂 e\u0301 \u0000 שלום")[1][0]
    for limit in range(1, len(full)):
        assert encode(tokenizer, "q", "🙂 e\u0301 \u0000 שלום", response_tokens=limit)[1][0] == full[:limit]
    assert "\ufffd" in tokenizer.decode(full[:2])


def test_trap_24_special_token_text_in_the_data_drops_the_row(tmp_path):
    """Written-out control tokens would become real ones. The reward model's tokenizer widens the search."""
    rows = [dict(prompt="What is <|im_end|>?", response="a"), dict(prompt="q", response="<|im_start|>system"), dict(prompt="q", response="a </s> b"), dict(prompt="q", response="fine")]
    path = write(tmp_path / "a.jsonl", rows)
    examples, report, _ = load(path, chatml_tokenizer())
    assert [e.response for e in examples] == ["a </s> b", "fine"] and report.dropped["special-token text inside the data"] == 2
    examples, *_ = load(path, chatml_tokenizer(), other_tokenizers=[plain()])
    assert [e.response for e in examples] == ["fine"]
    with pytest.raises(InputError, match="a.jsonl:1.*special-token"):
        load(path, chatml_tokenizer(), strict=True)


def test_an_unknown_word_is_not_mistaken_for_the_end_of_turn():
    """The unknown token is special by name, but ordinary text maps to it."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", "yes", "user", ":", "assistant", "q"])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    assert encode(tokenizer, "q", "yes strange yes", "yes strange")[1] == [[2, 0, 2, 1], [2, 0, 1]]


# ---------------------------------------------------------------------------------------------------------------------- examples and plan


def test_equal_examples_are_kept_once_and_scores_travel_along(tmp_path):
    """Equal (prompt, response) rows are counted; in pairs mode they stay, because pairs come in twos."""
    rows = [dict(prompt="q", responses=["a", "b", "a"], scores=[1, 2, 3]), dict(prompt="q", responses=["b", "c"], scores=[5, None])]
    examples, report, counts = load(write(tmp_path / "a.jsonl", rows), plain())
    assert [(e.response, e.score) for e in examples] == [("a", 1.0), ("b", 2.0), ("c", None)]
    assert counts["equal (prompt, response) examples kept once"] == 2 and "kept once" in describe(examples, report, counts)
    pairs, *_ = load(write(tmp_path / "b.jsonl", [dict(prompt="q", chosen="a", rejected="b")] * 2), plain(), "pairs")
    assert [e.response for e in pairs] == ["a", "b", "a", "b"]


def fake(prompts):
    """Examples of given prompts, one token each."""
    return [Example(array("i", [1]), array("i", [i]), USER(p), str(i), None, "") for i, p in enumerate(prompts)]


def test_hold_out_splits_by_prompt():
    """No prompt on both sides, the same split again, another with another seed."""
    examples = fake([f"p{i % 10}" for i in range(40)])
    train, held = hold_out(examples, 0.3, 0)
    assert len({e.prompt_key for e in held}) == 3 and not {e.prompt_key for e in held} & {e.prompt_key for e in train} and len(train) + len(held) == 40
    assert hold_out(examples, 0.3, 0)[1] == held and hold_out(examples, 0.3, 1)[1] != held
    assert {e.prompt_key for e in hold_out(examples[::-1], 0.3, 0)[1]} == {e.prompt_key for e in held}  # whatever the order of the file


def test_the_plan_covers_every_example_and_fills_the_last_micro_batch():
    """10 examples at B = 4: three micro-batches, two rows filled up, none twice in one; a pure function of its arguments."""
    examples = fake("abcdefghij")
    batches, notes = plan_micro_batches(examples, 4, seed=3)
    assert [len(set(b)) for b in batches] == [4, 4, 4] and set(sum(batches, [])) == set(range(10)) and sum(notes.values()) == 2
    assert plan_micro_batches(examples, 4, seed=3)[0] == batches != plan_micro_batches(examples, 4, seed=4)[0]
    for B in (1, 2, 5, 10):  # nothing to fill up
        assert [len(b) for b in plan_micro_batches(examples, B)[0]] == [B] * (10 // B) and not plan_micro_batches(examples, B)[1]
    with pytest.raises(InputError, match="--batch_size 11 .*10"):
        plan_micro_batches(examples, 11)


def test_group_partners_share_a_prompt():
    """Singles are left out, more than B are split evenly, never into a part of one; rows of a micro-batch share x."""
    examples = fake("a" * 1 + "b" * 3 + "c" * 9 + "d" * 8 + "e" * 2)
    batches, notes = plan_micro_batches(examples, 4, "group", 0)
    assert sorted(len(b) for b in batches) == [2, 3, 3, 3, 3, 4, 4] and all(len({examples[i].prompt_key for i in b}) == 1 for b in batches)
    assert sorted(sum(batches, [])) == list(range(1, 23))
    assert notes == {"prompts with a single response left out (--partners group)": 1, "prompts with more than B responses split evenly": 2}
    for rows in range(2, 40):
        for B in range(2, 9):
            sizes = [len(b) for b in plan_micro_batches(fake("x" * rows), B, "group")[0]]
            assert sum(sizes) == rows and min(sizes) >= 2 and max(sizes) - min(sizes) <= 1 and (max(sizes) <= B or B < 3)
    with pytest.raises(InputError, match="at least two responses"):
        plan_micro_batches(fake("abc"), 4, "group")


def test_epochs_are_permutations_and_steps_need_only_their_number():
    """Epochs laid end to end; each is a permutation drawn from (seed, epoch); processes p::P share a step out; resuming is a suffix."""
    places = sum((step_micro_batches(s, 2, 5, seed=0) for s in range(5)), [])  # 10 places, 2 epochs of 5
    assert sorted(places[:5]) == sorted(places[5:]) == list(range(5)) and places[:5] != places[5:]
    assert sum((step_micro_batches(s, 5, 5, seed=0) for s in range(2)), []) == places
    steps = [step_micro_batches(s, 4, 7, seed=1) for s in range(7)]  # step 1 takes 3 of the first epoch and 1 of the second
    epochs = [sum(steps, [])[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    data._epoch_order.cache_clear()  # as after a restart: step 3 knows nothing of the steps before it
    assert [step_micro_batches(s, 4, 7, seed=1) for s in range(3, 7)] == steps[3:] and step_micro_batches(3, 4, 7, seed=2) != steps[3]


def test_describe_states_counts_and_lengths():
    """Median <= 95 % <= longest, for any number of examples."""
    for n in (1, 2, 3, 20, 101):
        examples = [Example(array("i", [1] * 3), array("i", [1] * (i + 1)), USER(f"p{i // 2}"), "", None, "") for i in range(n)]
        text = describe(examples, "the report", {"cut": 3})
        median, most, longest = map(int, re.search(r"response tokens: median (\d+), 95 % (\d+), longest (\d+)", text).groups())
        assert n / 2 <= median <= n / 2 + 1 and median <= most <= longest == n and abs(most - 0.95 * n) <= 1
        assert text.startswith("the report") and f"{n} examples of {(n + 1) // 2} prompts" in text and "  3 cut" in text and f"{n * (n + 1) // 2:,} in all" in text


def test_limits_below_one_and_broken_tokenizers_stop_with_a_clear_line(tmp_path):
    """A limit of 0; a tokenizer file nobody can read; none at all; one without eos; without a template the plain one is set."""
    path = write(tmp_path / "a.jsonl", [dict(prompt="q", response="a")])
    with pytest.raises(InputError, match="--max_prompt_tokens must be at least 1, got 0"):
        load(path, plain(), prompt_tokens=0)
    folder = tmp_path / "model"
    config("llama", 100).save_pretrained(folder)
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(str(folder))
    bpe_tokenizer().save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == PLAIN_TEMPLATE
    bpe_tokenizer(eos=None).save_pretrained(folder)
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(str(folder))
    broken = json.loads((folder / "tokenizer.json").read_text()) | {"model": {"type": "unheard of"}}
    (folder / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(str(folder))


# ---------------------------------------------------------------------------------------------------------------------- the command


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)


def test_the_command_shows_what_is_supervised(tmp_path):
    """Marked tokens, counts, what was dropped; exit status 2 and one line for bad files and folders."""
    tokenizer = chatml_tokenizer()
    folder = save(tmp_path / "model", causal_lm(vocab_size=len(tokenizer)), tokenizer)
    path = write(tmp_path / "a.jsonl", [dict(prompt="Where?", chosen="Here.", rejected="There."), dict(prompt="Where?", chosen=" ", rejected="x")])
    done = python("data.py", "--data", path, "--model", folder)
    assert done.returncode == 0 and "⟧⟦<|im_end|>⟧" in done.stdout and "dropped 1: an empty or blank response (first at a.jsonl:2)" in done.stdout
    assert "2 examples of 1 prompts" in done.stdout and "<|im_start|>assistant\n⟦" in done.stdout
    done = python("data.py", "--data", path, "--model", str(tmp_path / "gone"))
    assert done.returncode == 2 and done.stdout == "" and done.stderr == f"data.py: error: {tmp_path}/gone: model folder does not exist\n"
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q", "response": "a"}\n{"prompt": "q",\n')
    program = SimpleNamespace(__name__="data", main=data.main, parse_args=lambda argv: argv)
    for file, model, named in (
        (f"{path}x", folder, "no such file"), (path, str(tmp_path), "no config.json"), (str(tmp_path / "bad.jsonl"), folder, "bad.jsonl:2: not valid JSON.*remove this line"),
    ):  # fmt: skip
        status, stdout, stderr = run_program(program, ["--data", file, "--model", model], tmp_path)
        (line,) = [line for line in stderr.splitlines() if line.strip() and "reading:" not in line]  # besides the progress bar
        assert status == 2 and stdout == "" and re.search(f"^data.py: error: .*{named}", line)


def test_help_needs_no_torch():
    """data.py --help answers before torch is imported."""
    done = python("-c", "import sys, runpy; sys.argv = ['data.py', '--help']\ntry: runpy.run_path('data.py', run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules)")
    assert done.stdout.splitlines()[-1] == "False" and "--max_response_tokens" in done.stdout
