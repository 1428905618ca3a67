"""
The reward model r(x, y): Bradley-Terry training (paper Eq. 1), scoring, accuracy.

    python reward.py train    --model BASE --data PAIRS --output_dir runs/reward       # any model, a fresh one-label head
    python reward.py accuracy --model runs/reward --data PAIRS                         # how often chosen scores above rejected

    loss = -mean log sigmoid( r(x, y_w) - r(x, y_l) )                                  Eq. 1

A reward model is any AutoModelForSequenceClassification with one label. Its input is built from messages with its own chat template,
never from the policy's token ids, and r is its raw logit: pipelines put a sigmoid on one-label models unless told not to.
Eq. 1 fixes r only up to a constant per prompt; VAR's weights do not see that constant either (it cancels against Zhat).

Where the score is read: at the last token under the attention mask. transformers reads "the last token that is not pad_token_id" instead,
which is the same unless the text ends with the pad token; then its answer is one token early and ours is not.
"""

import argparse
import math
import os

from data import (
    add_data_flags,
    add_loading_flags,
    encode_text,
    load_examples,
    load_tokenizer,
    pad_id,
    pad_right,
    plan_micro_batches,
    render,
    step_micro_batches,
)
from formats import InputError, Unusable, run


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a reward model on preference pairs (Bradley-Terry, Eq. 1), or measure how often it prefers the chosen response."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|accuracy")
    for name, text in (("train", "fit a reward model"), ("accuracy", "share of pairs whose chosen response scores higher, ties apart")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--model", required=True, help="train: any model, its body is the start; accuracy: a reward model (folder or hub name)")
        command.add_argument("--batch_size", type=int, default=32, help="pairs per optimizer step over all processes; for accuracy, conversations per forward (default: %(default)s)")
        if name == "train":
            command.add_argument("--output_dir", required=True, help="where the reward model is written")
            command.add_argument("--eval_data", nargs="+", metavar="SOURCE", help="pairs whose accuracy is printed after training")
            command.add_argument("--epochs", type=float, default=1.0, help="passes over the pairs (default: %(default)s)")
            command.add_argument("--lr", type=float, default=1e-5, help="peak learning rate of AdamW (default: %(default)s)")
            command.add_argument("--warmup_ratio", type=float, default=0.03, help="share of the steps with rising learning rate (default: %(default)s)")
            command.add_argument("--weight_decay", type=float, default=0.0, help="of AdamW, matrices only (default: %(default)s)")
            command.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm (default: %(default)s)")
            command.add_argument("--seed", type=int, default=0, help="order of the pairs and the fresh head (default: %(default)s)")
        else:
            command.add_argument("--out", metavar="FILE", help="also write the numbers as JSON")
        add_data_flags(command, responses="pairs, the only choice here")
        add_loading_flags(command, policy=False)
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data is required")
    if args.command == "train" and args.load_in_4bit:
        parser.error("--load_in_4bit: weights of 4 bits cannot be trained, and reward.py trains no adapters; leave it out")
    if args.responses not in (None, "pairs"):
        parser.error(f"--responses {args.responses}: a reward model is trained and judged on pairs")
    for name in ("batch_size", "epochs", "lr", "max_reward_tokens"):
        if not getattr(args, name, 1) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    return args


# fmt: on


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is loaded: --help and typing errors answer at once

import torch
import transformers
from tqdm import tqdm

from eval.files import write_json
from model import adamw, bind, load_reward_model, lr_at, make_accelerator, model_inputs, save_model

# ----------------------------------------------------------------------------------------------------------------------
# Eq. 1


def bradley_terry_loss(chosen_rewards, rejected_rewards):
    """-mean log sigmoid(r(x, y_w) - r(x, y_l)), Eq. 1. (B,), (B,) -> (). log 2 when the model cannot tell them apart."""
    return -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Score


def encode_conversation(tokenizer, messages, response, max_tokens):
    """Token ids the reward model reads: prompt and response in its own template, cut from the left (BOS kept). InputError: turns the template refuses."""
    try:
        ids = encode_text(tokenizer, [render(tokenizer, [*messages, {"role": "assistant", "content": response}])])[0]
    except Unusable:
        beginning = f"the conversation that begins {messages[0]['role']}: {messages[0]['content'][:60]!r}"
        raise InputError(
            f"the reward model's chat template refuses the turns of {beginning}; remove it from the data, or take another reward model"
        ) from None
    if len(ids) > max_tokens:
        bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        ids = bos + ids[len(ids) - max_tokens + len(bos) :]
    return ids


def bind_scores(model):
    """Let `model(input_ids=..., attention_mask=...)` return the rewards, (B, T) x2 -> (B,) float32, read at the last attended token."""

    def scores(self, input_ids, attention_mask):
        if not hasattr(self, "score"):  # an encoder (BERT, DeBERTa, ...): it pools a fixed place, padding is masked out
            return type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1).float()
        # the mask also where model_inputs leaves it out: not every body under such a head is causal (Gemma 3 can look both ways)
        inputs = model_inputs(input_ids, attention_mask) | {"attention_mask": attention_mask}
        hidden = self.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device) * attention_mask  # 1, 2, 3, ... where attended
        return head_scores(self, hidden[torch.arange(len(hidden)), places.argmax(dim=1)])  # (B, D) -> (B,)

    return bind(model, scores)


def head_scores(model, hidden):
    """The one-label head on hidden states, (n, D) -> (n,) float32."""
    return model.score(hidden).squeeze(-1).float()


@torch.no_grad()
def score(model, tokenizer, conversations, batch_size=32, max_tokens=2048, progress=True, names=None, process=(0, 1)):
    """r(x, y) of [(messages, response), ...] -> list of raw logits, in the order given. `model` comes from `bind_scores`.

    Batches hold conversations of similar length, so little of the work is padding; a score does not depend on its batch.
    Process (p, P) scores the batches p, p+P, ... and leaves None in the others' places. InputError: a score that is not a finite number,
    with its entry in `names`, or its place in the list.
    """
    ids = [encode_conversation(tokenizer, messages, response, max_tokens) for messages, response in conversations]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    scores = [None] * len(ids)
    starts = range(process[0] * batch_size, len(order), process[1] * batch_size)
    bar = tqdm(total=sum(min(batch_size, len(ids) - start) for start in starts), desc="reward scores", unit=" texts", disable=not progress, mininterval=1.0)
    for start in starts:
        rows = order[start : start + batch_size]
        batch = pad_right([ids[i] for i in rows], pad_id(tokenizer))
        for i, value in zip(rows, model(**{k: v.to(model.device) for k, v in batch.items()}).tolist()):
            if not math.isfinite(value):
                name = names[i] if names else f"conversation {i + 1} of {len(ids)}"
                raise InputError(f"the reward model's score of {name}, response {conversations[i][1][:60]!r}, is {value}; try --reward_dtype float32")
            scores[i] = value
        bar.update(len(rows))
    bar.close()
    return scores


def accuracy(chosen_rewards, rejected_rewards):
    """Share of pairs with chosen strictly above rejected, and share of exact ties, which are neither right nor wrong. ValueError: a nan."""
    pairs = list(zip(chosen_rewards, rejected_rewards))
    right, ties = sum(c > r for c, r in pairs), sum(c == r for c, r in pairs)
    margins = [c - r for c, r in pairs]
    if any(map(math.isnan, margins)):
        raise ValueError(f"pair {[*map(math.isnan, margins)].index(True) + 1} of {len(pairs)} has a reward that is nan")
    return {"pairs": len(pairs), "accuracy": right / len(pairs), "ties": ties / len(pairs), "mean_margin": sum(margins) / len(pairs)}


def pair_accuracy(model, tokenizer, examples, batch_size, max_tokens):
    """`accuracy` over examples that come preferred, dispreferred, preferred, ... (load_examples with mode "pairs")."""
    scores = score(model, tokenizer, [(e.messages, e.response) for e in examples], batch_size, max_tokens)
    return accuracy(scores[0::2], scores[1::2])


# ----------------------------------------------------------------------------------------------------------------------
# Train


def train(args):
    if os.path.exists(os.path.join(args.output_dir, "config.json")):
        raise InputError(f"{args.output_dir}: already holds a model, which this run would replace; choose another --output_dir")
    accelerator = make_accelerator()
    transformers.set_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    examples, eval_examples = (
        sources and load_pairs(args, sources, tokenizer, accelerator.is_main_process) for sources in (args.data, args.eval_data)
    )
    pairs = list(zip(examples[0::2], examples[1::2]))
    B, P = args.batch_size, accelerator.num_processes
    if B % P:
        raise InputError(f"--batch_size {B} pairs cannot be shared out evenly among {P} processes")
    batches, _ = plan_micro_batches(pairs, min(B, len(pairs)), seed=args.seed)
    total_steps = math.ceil(args.epochs * len(batches))

    model = load_reward_model(args.model, "float32", args.attn_implementation, args.trust_remote_code, new_head=True)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = pad_id(tokenizer)  # or no other tool could batch it
    model = bind_scores(model).train()
    model, optimizer = accelerator.prepare(model, adamw(model, args.lr, args.weight_decay))
    bar = tqdm(range(total_steps), desc="reward model", disable=not accelerator.is_main_process, mininterval=1.0)
    for step in bar:
        (batch,) = step_micro_batches(step, 1, len(batches), args.seed)
        mine = [pairs[i] for i in batches[batch]][accelerator.process_index :: P]
        ids = [
            encode_conversation(tokenizer, e.messages, e.response, args.max_reward_tokens) for side in zip(*mine) for e in side
        ]  # chosen, then rejected
        rewards = model(**{k: v.to(accelerator.device) for k, v in pad_right(ids, pad_id(tokenizer)).items()})  # (2B,)
        loss = bradley_terry_loss(*rewards.chunk(2))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total_steps, math.ceil(args.warmup_ratio * total_steps), args.lr)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        save_model(unwrapped, tokenizer, args.output_dir, state)
        print(f"reward model of {len(pairs):,} pairs written to {args.output_dir}")
    del unwrapped
    model, optimizer = accelerator.free_memory(model, optimizer)
    if accelerator.is_main_process:
        if eval_examples:  # as it was written: one process alone cannot run a model that FSDP shares out
            saved = load_reward_model(args.output_dir, "auto", args.attn_implementation, args.trust_remote_code).to(accelerator.device)
            result = pair_accuracy(bind_scores(saved), tokenizer, eval_examples, 2 * B, args.max_reward_tokens)
            write_json(f"{args.output_dir}/accuracy.json", result)
            print(f"held-out pairs: {show(result)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def load_pairs(args, sources, tokenizer, progress=True):
    examples, report, _ = load_examples(
        sources, tokenizer, "pairs", args.max_prompt_tokens, args.max_response_tokens, args.split, args.strict, progress=progress
    )
    if progress:
        print(f"{', '.join(sources)}: {len(examples) // 2:,} pairs; {report}")
    return examples


def show(result):
    return f"accuracy {100 * result['accuracy']:.1f} %, ties {100 * result['ties']:.1f} %, mean margin {result['mean_margin']:.3f} ({result['pairs']:,} pairs)"


def main(args):
    if args.command == "train":
        return train(args)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    examples = load_pairs(args, args.data, tokenizer)
    model = load_reward_model(args.model, args.reward_dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit)
    model.to(make_accelerator().device)
    result = pair_accuracy(bind_scores(model), tokenizer, examples, args.batch_size, args.max_reward_tokens)
    print(show(result))
    if args.out:
        write_json(args.out, {"model": args.model, "data": args.data, **result})


if __name__ == "__main__":
    run(lambda: main(ARGS))
