"""
Records -> token ids and response masks -> the batch plan -> micro-batches.

    python data.py --data FILE --model DIR      # what would be trained: examples with the supervised tokens marked, counts, lengths

Tokens. The tokenizer's chat template renders the conversation (without one, PLAIN_TEMPLATE below); prompt and response are tokenised
together and split where the tokens of the prompt alone end, so nothing is encoded twice. Exactly the response and its end-of-turn
token are supervised. The same `prompt_ids` and `response_ids` serve training, the tables (prompt i with response j) and generation.

    input_ids      = prompt_ids + response_ids, padded on the right       (B, T)
    response_mask  = 1 on the tokens whose log-probability is counted     (B, T)

Truncation, in tokens: the prompt loses its oldest turns, then the beginning of its last turn's text. BOS stays, and so do the system
turn and the header before that text, unless they fill more than half of the limit. The response loses its end, and with it the
end-of-turn token: a cut answer must not teach where to stop.

The batch plan is a pure function of (examples, B, partners, seed). It composes the micro-batches once; every epoch reuses them in an
order drawn from (seed, epoch), so one table of rewards and reference log-probs serves all epochs (Algorithm 1 lines 3-5, tables.py).
Departures from the paper: `--partners group` fills a micro-batch with the responses of one prompt (the paper takes other prompts').
"""

import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice

from formats import InputError, Report, Unusable, choose_responses, labels, read_records, run

# Role per line, every turn closed by eos; nothing is added to the vocabulary. bos_token renders as nothing where there is none.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


# fmt: off
def add_data_flags(parser, responses="all"):
    """The flags of every program that reads preference data. `responses`: the default, in words."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", metavar="SOURCE", help="preference files (.jsonl, .jsonl.gz, .json, .parquet), folders saved by `datasets`, or hub names (NAME or NAME:FOLDER); see formats.py for the shapes")
    group.add_argument("--split", default="train", help="split of a hub dataset or a saved DatasetDict (default: %(default)s)")
    group.add_argument("--responses", choices=["all", "chosen", "best", "pairs", "labelled"], help=f"which responses of a row are used (default: {responses})")
    group.add_argument("--max_prompt_tokens", type=int, default=512, metavar="N", help="longer prompts are cut from the left, in tokens (default: %(default)s; not stated in the paper)")
    group.add_argument("--max_response_tokens", type=int, default=512, metavar="N", help="longer responses are cut from the right, in tokens (default: %(default)s; not stated in the paper)")
    group.add_argument("--strict", action="store_true", help="stop at the first unusable row instead of dropping and counting it")


def add_plan_flags(parser):
    """What composes the micro-batches: train.py and tables.py must agree on it."""
    group = parser.add_argument_group("batch plan")
    group.add_argument("--batch_size", type=int, default=8, metavar="B", help="examples in ONE micro-batch on one device; it sets Zhat, and nothing else enlarges it (default: %(default)s; paper: 8)")
    group.add_argument("--partners", choices=["batch", "group"], default="batch", help="whose responses share a micro-batch: other prompts' (the paper), or those of one prompt (default: %(default)s)")
    group.add_argument("--eval_data", nargs="+", metavar="SOURCE", help="held-out preference data")
    group.add_argument("--eval_fraction", type=float, default=0.0, metavar="F", help="without --eval_data: share of the prompts held out (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="composition and order of the micro-batches, generation (default: %(default)s)")


def add_loading_flags(parser, policy=True, reward=True):
    """How models are loaded. Here and not in model.py, which needs torch: --help should not."""
    group = parser.add_argument_group("loading models")
    dtypes = ["float32", "bfloat16", "float16", "auto"]
    if policy:
        group.add_argument("--dtype", choices=dtypes, default="float32", help="weights of policy and reference; to train, keep float32: smaller types lose small updates (default: %(default)s)")
    if reward:
        group.add_argument("--reward_dtype", choices=dtypes, default="auto", help="weights of the reward model; auto = as its checkpoint is stored (default: %(default)s)")
        group.add_argument("--max_reward_tokens", type=int, default=2048, metavar="N", help="longer conversations are cut from the left for the reward model, in tokens (default: %(default)s)")
    group.add_argument("--load_in_4bit", action="store_true", help="all models in 4 bits (nf4, double quantisation), through bitsandbytes; a policy then trains an adapter: --lora_rank")
    group.add_argument("--attn_implementation", metavar="NAME", help="attention kernel: sdpa, eager, flash_attention_2, ... (default: transformers chooses)")
    group.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a model; off unless given")


# fmt: on


def check_bounds(parser, args, above_zero, from_zero):
    """parser.error unless these flags are finite and above 0, or at least 0; a flag that is None is not checked."""
    for name in (*above_zero, *from_zero):
        value = getattr(args, name)
        if value is not None and not (0 < value < float("inf") or (value == 0 and name in from_zero)):
            parser.error(f"--{name} must be {'at least' if name in from_zero else 'above'} 0 and finite, got {value}")


def check_adapter(parser, args):
    """True if --lora_rank or --model brings an adapter to train; parser.error if 4 bits are to be trained without one."""
    adapter = bool(args.lora_rank) or os.path.exists(os.path.join(args.model, "adapter_config.json"))
    if args.load_in_4bit and not adapter:
        parser.error("--load_in_4bit: weights of 4 bits cannot take a gradient step; add --lora_rank R to train an adapter on top of them")
    return adapter


# ----------------------------------------------------------------------------------------------------------------------
# Conversation -> token ids


def load_tokenizer(name, trust_remote_code=False):
    """Tokenizer of a local folder or hub name, with PLAIN_TEMPLATE if it has no chat template. InputError: none there, no eos token."""
    check_model_name(name)
    from transformers import AutoTokenizer  # here, not above: --help and a misspelt folder answer without loading it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # any kind: `tokenizers` raises plain Exceptions, a missing sentencepiece is an ImportError
        raise InputError(f"{name}: no tokenizer can be loaded from there ({str(error)[:200]})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: the tokenizer has no eos_token, so a response could not be ended; set one in its tokenizer_config.json")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def check_model_name(name):
    """InputError unless `name` is a folder with a config.json or could be a hub name. Cheap: touches no weights and no network."""
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")) and not os.path.exists(os.path.join(name, "adapter_config.json")):
            raise InputError(f"{name}: not a model folder, there is no config.json in it")
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise InputError(f"{name}: model folder does not exist")


def special_ids(tokenizer):
    """Ids that only a template may produce. The unknown token is left out: ordinary text can map to it."""
    ids = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})


def special_text(*tokenizers):
    """A pattern that finds any special token of these tokenizers written out in user text, where it would become a control token."""
    words = {str(tokenizer.convert_ids_to_tokens(i)) for tokenizer in tokenizers for i in special_ids(tokenizer)}
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")


def render(tokenizer, messages, **template_flags):
    """The chat template's text of these messages. A system turn the template refuses or drops is folded into the first user turn.

    Unusable: the template refuses the order of the turns.
    """
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **template_flags)  # tokenize=True returns a dict, not ids
        if messages[0]["role"] != "system" or messages[0]["content"].strip() in text:
            return text
    except TemplateError:
        if messages[0]["role"] != "system":
            raise Unusable("the chat template refuses these turns") from None
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise Unusable("the chat template refuses the system turn, and no user turn follows it")
    folded = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    return render(tokenizer, [folded, *messages[2:]], **template_flags)


def prompt_text(tokenizer, messages):
    """The prompt as the model sees it before it answers, the header of the assistant's turn included."""
    return render(tokenizer, messages, add_generation_prompt=True)


def encode_text(tokenizer, texts):
    """Ids of rendered texts. The template has already written BOS and the like, so the tokenizer must not add them again."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def end_of_turn_id(tokenizer):
    """The id that ends a response in the rendered conversation: what training teaches to emit, so what generation must stop on."""
    return encode_records(tokenizer, [([{"role": "user", "content": "a"}], ["b"])], 10**9, 10**9)[0][1][0][-1]


def encode_records(tokenizer, conversations, max_prompt_tokens, max_response_tokens, counts=None):
    """[(prompt messages, [response, ...]), ...] -> [(prompt_ids, [response_ids, ...]), ...], or an Unusable in place of a conversation.

    All responses of one prompt share its prompt_ids. `counts` collects what was cut or merged.
    """
    counts = Counter() if counts is None else counts
    specials = special_ids(tokenizer)
    texts, spans = [], []  # the rendered prompt of each conversation, then its rendered responses: one call tokenises them all
    for messages, responses in conversations:
        try:
            messages = _drop_oldest_turns(tokenizer, messages, max_prompt_tokens)
            rendered = [prompt_text(tokenizer, messages)]
            rendered += [render(tokenizer, [*messages, {"role": "assistant", "content": response}]) for response in responses]
            if any(r.strip() not in text for r, text in zip(responses, rendered[1:])):
                raise Unusable("the chat template changes the response")
        except Unusable as reason:
            spans.append(reason)
            continue
        spans.append((messages, slice(len(texts), len(texts) + len(rendered))))
        texts += rendered
    ids = encode_text(tokenizer, texts) if texts else []
    return [
        s if isinstance(s, Unusable) else _split(tokenizer, s[0], ids[s[1]], specials, max_prompt_tokens, max_response_tokens, counts)
        for s in spans
    ]


def _split(tokenizer, messages, ids, specials, max_prompt_tokens, max_response_tokens, counts):
    """[ids of the prompt, ids of the conversation with response 1, with response 2, ...] -> (prompt_ids, [response_ids, ...])."""
    prompt_ids, conversations = ids[0], ids[1:]
    # A token may join the last characters of the prompt and the first of a response, or the template may write the header of an answered
    # turn differently. Then the split is where all of them still agree, the same for all responses.
    split = min(_common_prefix(prompt_ids, conversation) for conversation in conversations)
    counts["prompts split early because a token spans the boundary"] += split < len(prompt_ids)
    responses = []
    for conversation in conversations:
        response_ids = conversation[split:]
        # Up to the first special token after the text: the end-of-turn token. What a template writes after it ("\n") is not the answer.
        # Sought from behind, because the header of an answered turn may hold special tokens too (gpt-oss: <|channel|>final<|message|>).
        text_end = len(response_ids)
        while text_end and (response_ids[text_end - 1] in specials or not tokenizer.decode([response_ids[text_end - 1]]).strip()):
            text_end -= 1
        end = next((t for t in range(text_end, len(response_ids)) if response_ids[t] in specials), None)
        response_ids = response_ids[: end + 1] if end is not None else response_ids + [tokenizer.eos_token_id]
        if len(response_ids) > max_response_tokens:
            response_ids = response_ids[:max_response_tokens]  # and no end-of-turn token put back
            counts["responses truncated"] += 1
        responses.append(response_ids)
    prompt_ids = prompt_ids[:split]
    if len(prompt_ids) > max_prompt_tokens:
        head = prompt_ids[: _head_length(tokenizer, messages, prompt_ids)]
        if len(head) > max_prompt_tokens // 2:
            head = prompt_ids[:1] if prompt_ids[0] == tokenizer.bos_token_id else []
        prompt_ids = head + prompt_ids[len(prompt_ids) - (max_prompt_tokens - len(head)) :]  # never ids[-0:], which is everything
        counts["prompts truncated inside a turn"] += 1
    return prompt_ids, responses


def _head_length(tokenizer, messages, prompt_ids):
    """How many tokens stand before the text of the last turn: BOS, the system turn, the turn's header."""
    try:
        without_text = prompt_text(tokenizer, [*messages[:-1], messages[-1] | {"content": ""}])
    except Unusable:
        return 0
    return _common_prefix(prompt_ids, encode_text(tokenizer, [without_text])[0])


def _drop_oldest_turns(tokenizer, messages, max_prompt_tokens):
    """The conversation without its oldest exchanges, as few as needed; the system turn and the last user turn always stay."""
    system, turns = [m for m in messages[:1] if m["role"] == "system"], messages[messages[0]["role"] == "system" :]
    while later_user_turns := [i for i, m in enumerate(turns) if i > 0 and m["role"] == "user"]:
        text = prompt_text(tokenizer, system + turns)
        if len(text.encode()) <= max_prompt_tokens or len(encode_text(tokenizer, [text])[0]) <= max_prompt_tokens:
            break  # a token is at least a byte, so short prompts stop at the first question
        turns = turns[later_user_turns[0] :]
    return system + turns


def _common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _as_rendered(tokenizer, messages, response):
    """The response as the template writes it: some trim it, and the reward model must score the text that is trained on."""
    if response == response.strip() or response in render(tokenizer, [*messages, {"role": "assistant", "content": response}]):
        return response
    return response.strip()


# ----------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass(slots=True)
class Example:
    """One (prompt, response) to train on."""

    prompt_ids: array  # int32
    response_ids: array  # int32, with the end-of-turn token unless the response was truncated
    messages: list  # the prompt, for the reward model's own template
    response: str  # the response as text, likewise
    score: float | None  # the data's own score, if it has one
    where: str  # "file:row"
    weight: float | None = None  # what its loss is multiplied by: the data's weight column (wsft), the advantage (alol)
    desirable: bool | None = None  # with --responses labelled (kto)

    @property
    def prompt_key(self):
        return json.dumps(self.messages)


def load_examples(
    sources, tokenizer, mode, max_prompt_tokens, max_response_tokens, split="train", strict=False, other_tokenizers=(), progress=True,
    weight_column=None,
):  # fmt: skip
    """Every usable (prompt, response) of the sources, equal ones once -> (examples, report, counts).

    `other_tokenizers` (the reward model's) only widen the search for special-token text in the data. With mode "pairs" the
    examples come preferred, dispreferred, preferred, ...  InputError: a bad file, no usable row, limits below 1.
    """
    from tqdm import tqdm

    for flag, value in (("max_prompt_tokens", max_prompt_tokens), ("max_response_tokens", max_response_tokens)):
        if value < 1:
            raise InputError(f"--{flag} must be at least 1, got {value}")
    report, counts, examples, seen = Report(strict), Counter(), [], set()
    special = special_text(tokenizer, *other_tokenizers)
    records = chain.from_iterable(read_records(source, report, split, weight_column) for source in sources)
    bar = tqdm(desc="reading", unit=" rows", disable=not progress, mininterval=1.0)
    while block := list(islice(records, 256)):  # tokenizers are fast on many texts at once
        chosen = []
        for record in block:
            try:
                keep = choose_responses(record, mode)
                # a written-out eos at the very end is how some files mark the end: the template will put it there itself
                responses = [record.responses[i].removesuffix(tokenizer.eos_token) for i in keep]
                if not all(map(str.strip, responses)):
                    raise Unusable("an empty or blank response")
                if any(special.search(text) for text in responses + [m["content"] for m in record.prompt]):
                    raise Unusable("special-token text inside the data")
                responses = [_as_rendered(tokenizer, record.prompt, response) for response in responses]
                columns = (record.scores, record.weights, labels(record) if mode == "labelled" else None)
                numbers = [[column[i] if column else None for column in columns] for i in keep]
                chosen.append((record, numbers, responses))
            except Unusable as reason:
                report.drop(str(reason), record.where)
        encoded = encode_records(
            tokenizer, [(record.prompt, responses) for record, _, responses in chosen], max_prompt_tokens, max_response_tokens, counts
        )
        for (record, numbers, responses), ids in zip(chosen, encoded):
            if isinstance(ids, Unusable):
                report.drop(str(ids), record.where)
                continue
            for response_ids, response, (score, weight, desirable) in zip(ids[1], responses, numbers):
                key = hashlib.blake2b(array("i", ids[0]).tobytes() + b"|" + array("i", response_ids).tobytes(), digest_size=16).digest()
                if key in seen and mode != "pairs":
                    counts["equal (prompt, response) examples kept once"] += 1
                    continue
                seen.add(key)
                ids_as_arrays = array("i", ids[0]), array("i", response_ids)
                examples.append(Example(*ids_as_arrays, record.prompt, response, score, record.where, weight, desirable))
        bar.update(len(block))
    bar.close()
    if not examples:
        why = "; ".join(f"{n} x {reason}, first at {report.first[reason]}" for reason, n in report.dropped.most_common(3))
        raise InputError(f"{', '.join(sources)}: no usable row for --responses {mode} ({why})")
    return examples, report, +counts


def hold_out(examples, fraction, seed):
    """Split by prompt: (training examples, held-out examples); no prompt is on both sides. A pure function of its arguments."""
    keys = [e.prompt_key for e in examples]
    prompts = sorted(set(keys))
    random.Random(f"hold out {seed}").shuffle(prompts)
    held = set(prompts[: math.ceil(fraction * len(prompts))])
    return [e for e, key in zip(examples, keys) if key not in held], [e for e, key in zip(examples, keys) if key in held]


# ----------------------------------------------------------------------------------------------------------------------
# The batch plan


def plan_micro_batches(examples, B, partners="batch", seed=0):
    """The micro-batches as lists of example indices, and a Counter of what was filled up or left out. Pure.

    batch: B examples of any prompts. The last micro-batch is filled up with examples of others; never are two of its rows equal.
    group: the K <= B responses of one prompt; a prompt with one response is left out, one with more than B is split evenly.
    InputError: fewer than B examples (batch), no prompt with two responses (group).
    """
    notes, rng = Counter(), random.Random(f"plan {seed}")
    if partners == "group":
        groups = {}
        for i, example in enumerate(examples):
            groups.setdefault(example.prompt_key, []).append(i)
        batches = []
        for rows in groups.values():
            if len(rows) < 2 or B < 2:
                notes["prompts with a single response left out (--partners group)"] += 1
                continue
            parts = min(math.ceil(len(rows) / B), len(rows) // 2)  # never a part of one
            notes["prompts with more than B responses split evenly"] += parts > 1
            rng.shuffle(rows)
            batches += [rows[part::parts] for part in range(parts)]
        if not batches:
            raise InputError(
                f"--partners group needs prompts with at least two responses and --batch_size >= 2; none of the {len(groups)} prompts has them"
            )
        rng.shuffle(batches)
        return batches, +notes
    if len(examples) < B:
        raise InputError(
            f"--batch_size {B} is more than the {len(examples)} different examples there are; lower it to {len(examples)} or add data"
        )
    order = list(range(len(examples)))
    rng.shuffle(order)
    batches = [order[i : i + B] for i in range(0, len(order), B)]
    if missing := B - len(batches[-1]):
        batches[-1] += order[:missing]  # rows of the first micro-batches: all examples differ, so no two rows are equal
        notes["examples of other micro-batches used to fill up the last one"] = missing
    return batches, notes


@dataclass
class Plan:
    """Examples, their micro-batches (lists of indices), and the settings both depend on."""

    examples: list
    batches: list
    settings: dict


def make_plan(examples, args, mode, pairs=False, name=None):
    """The Plan of these examples. `pairs`: a micro-batch is B pairs, its 2B rows chosen, rejected, chosen, ... `name`: print under it."""
    units = list(zip(examples[0::2], examples[1::2])) if pairs else examples
    batches, notes = plan_micro_batches(units, args.batch_size, args.partners, args.seed)
    if pairs:
        batches = [[row for pair in batch for row in (2 * pair, 2 * pair + 1)] for batch in batches]
    settings = {"responses": mode, "batch_size": args.batch_size, "partners": args.partners, "seed": args.seed}
    settings |= {"max_prompt_tokens": args.max_prompt_tokens, "max_response_tokens": args.max_response_tokens}
    if name:
        what = "pairs" if pairs else "examples"
        print(f"{name}: {len(units):,} {what} in {len(batches):,} micro-batches of B = {args.batch_size}")
        print("".join(f"  {n:,} {note}\n" for note, n in notes.items()), end="")
    return Plan(examples, batches, settings)


def load_plan(args, mode, show=True, pairs=False, weight_column=None):
    """What train.py and tables.py do with their flags -> (tokenizer, the reward model's tokenizer or None, Plan, held-out Plan or None).

    Only tokenizers are loaded, so every fault of the data is met before a model is. InputError: as load_examples and the plan.
    """
    if args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {args.batch_size}")
    if not 0 <= args.eval_fraction < 1:
        raise InputError(f"--eval_fraction must be at least 0 and below 1, got {args.eval_fraction}")
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    reward_tokenizer = load_tokenizer(args.reward_model, args.trust_remote_code) if args.reward_model else None
    others = [reward_tokenizer] if reward_tokenizer else []

    def load(sources):
        examples, report, counts = load_examples(
            sources, tokenizer, mode, args.max_prompt_tokens, args.max_response_tokens, args.split, args.strict, others, show, weight_column
        )
        if show:
            print(f"{', '.join(sources)} (--responses {mode})\n{describe(examples, report, counts)}")
        return examples

    examples, held_out = load(args.data), load(args.eval_data) if args.eval_data else []
    if args.eval_fraction and not args.eval_data:
        examples, held_out = hold_out(examples, args.eval_fraction, args.seed)
    if not examples:
        raise InputError(f"--eval_fraction {args.eval_fraction} leaves no example to train on")
    names = ("training", "held out") if show else (None, None)
    plan = make_plan(examples, args, mode, pairs, names[0])
    try:
        eval_plan = make_plan(held_out, args, mode, pairs, names[1]) if held_out else None
    except InputError as error:
        raise InputError(f"held out: {error}; or hold out more (--eval_fraction, --eval_data), or nothing") from None
    return tokenizer, reward_tokenizer, plan, eval_plan


@functools.lru_cache(maxsize=4)
def _epoch_order(num_micro_batches, seed, epoch):
    order = list(range(num_micro_batches))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return order


def step_micro_batches(step, accum, num_micro_batches, seed):
    """Which micro-batches optimizer step `step` (from 0) takes, over all processes: `accum` of them, epochs laid end to end. Pure, so
    resuming needs nothing but the step. Process p of P takes every P-th, from the p-th on."""
    places = range(step * accum, (step + 1) * accum)
    return [_epoch_order(num_micro_batches, seed, place // num_micro_batches)[place % num_micro_batches] for place in places]


def pad_right(rows, pad_id):
    """Lists of ids -> dict of (B, T) int64 tensors input_ids, attention_mask, padded on the right to the longest."""
    import torch  # here, not above: --help and every check of the data answer without loading it

    input_ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(list(ids))
        attention_mask[i, : len(ids)] = 1  # by position, never by id: pad may be the same id as eos, whose label must stay
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def collate(examples, pad_id):
    """Examples -> dict of (B, T) int64 tensors input_ids, attention_mask, response_mask, padded on the right to the longest."""
    batch = pad_right([e.prompt_ids + e.response_ids for e in examples], pad_id)
    batch["response_mask"] = batch["attention_mask"].clone()
    for i, e in enumerate(examples):
        batch["response_mask"][i, : len(e.prompt_ids)] = 0
    return batch


def pad_id(tokenizer):
    """Any id will do under an attention mask; the tokenizer's own where it has one."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


# ----------------------------------------------------------------------------------------------------------------------
# Show what will be trained


def describe(examples, report, counts):
    """Counts, lengths and what was dropped or cut, as text."""
    prompts, responses = sorted(len(e.prompt_ids) for e in examples), sorted(len(e.response_ids) for e in examples)
    quantiles = lambda x: f"median {x[len(x) // 2]}, 95 % {x[int(0.95 * len(x))]}, longest {x[-1]}"
    lines = [str(report), f"{len(examples):,} examples of {len({e.prompt_key for e in examples}):,} prompts"]
    lines += [f"  {n:,} {what}" for what, n in sorted(counts.items())]
    lines += [f"prompt tokens:   {quantiles(prompts)}", f"response tokens: {quantiles(responses)}, {sum(responses):,} in all"]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Show what would be trained: the first examples with the supervised tokens marked, counts, lengths, and what was dropped and why."
    )
    add_data_flags(parser)
    parser.add_argument("--model", required=True, help="folder or hub name whose tokenizer and chat template are used")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model; off unless given")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many examples to print (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data is required")
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    examples, report, counts = load_examples(
        args.data, tokenizer, args.responses or "all", args.max_prompt_tokens, args.max_response_tokens, args.split, args.strict
    )
    for example in examples[: args.show]:
        score = "" if example.score is None else f", score {example.score:g}"
        print(f"--- {example.where}{score}; supervised tokens between ⟦ ⟧")
        print(tokenizer.decode(example.prompt_ids.tolist()) + "".join(f"⟦{tokenizer.decode([token])}⟧" for token in example.response_ids))
    print("---\n" + describe(examples, report, counts))


if __name__ == "__main__":
    run(main)
