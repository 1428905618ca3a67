"""
Algorithm 1 lines 3-5, offline: the B x B tables of r(x_i, y_j) and log pi_ref(y_j | x_i) for every micro-batch of the plan.

    python tables.py --model DIR --reward_model DIR --data FILE --batch_size 8 --out tables.safetensors
    accelerate launch --num_processes 8 tables.py ...                # the micro-batches are shared out

train.py builds the same tables by itself when they are missing. They hold what was measured: raw rewards, SUMS of log-probs in nats,
response lengths in tokens. beta, estimator, per-token means and normalisation are applied later, so one file serves a whole grid of runs.

    rewards         (M, B, B)   [m, i, j] = r(x_i, y_j) of micro-batch m; nan where not measured (fewer rows, or not needed)
    ref_logps       (M, B, B)   [m, i, j] = log pi_ref(y_j | x_i), summed over the tokens of y_j
    response_tokens (M, B)      tokens of y_j, its end-of-turn token included; 0 where the micro-batch has no such row

Speed. Scored naively this is B^2 full forwards a micro-batch. Here each prompt is run once and all its responses continue from its
key-value cache, the LM head sees response positions only, and equal (prompt, response) texts of a piece are scored once. Two responses
of the first prompt are scored both ways: a model for which the two differ (a bidirectional encoder, say) is scored by full forwards, and said.

An interrupted run continues: finished pieces lie in OUT.parts-*/ until the whole is there. The header of the file names everything it
depends on; a table that does not fit what is about to be trained is refused with the difference named.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

from data import add_data_flags, add_loading_flags, add_plan_flags, check_model_name, load_plan, pad_id, pad_right
from formats import InputError, run


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Measure r(x_i, y_j) and log pi_ref(y_j | x_i) for every micro-batch (Algorithm 1 lines 3-5) and store them in one safetensors file."
    )
    parser.add_argument("--model", required=True, help="the policy, folder or hub name: its tokenizer makes the plan")
    parser.add_argument("--ref_model", metavar="MODEL", help="the reference pi_ref, folder or hub name, with the policy's tokenizer (default: --model)")
    parser.add_argument("--reward_model", metavar="MODEL", help="one-label sequence classifier, folder or hub name; may be left out with --partners group if every response of the data has a score")
    parser.add_argument("--out", default="tables.safetensors", metavar="FILE", help="the file to write (default: %(default)s)")
    add_data_flags(parser)
    add_plan_flags(parser)
    add_loading_flags(parser)
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data is required")
    if args.batch_size < 2:
        parser.error(f"--batch_size {args.batch_size}: with a single response in the micro-batch the reward cancels out of Zhat; use at least 2")
    if args.max_reward_tokens < 1:
        parser.error(f"--max_reward_tokens must be above 0, got {args.max_reward_tokens}")
    return args


# fmt: on


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is loaded: --help and typing errors answer at once

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model import fingerprint, load_policy, load_reward_model, logps_from_hidden, make_accelerator, release, sequence_logps, without_adapter_wrapper  # fmt: skip
from reward import bind_scores, encode_conversation, head_scores
from var import effective_sample_size, log_weights, self_share

PIECE = 16  # micro-batches between two writes to disk: what an interruption costs
BETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


# ----------------------------------------------------------------------------------------------------------------------
# What a table depends on


def header(plan, ref_model, reward_model, dtype, reward_dtype, max_reward_tokens, autocast="no"):
    """Everything the numbers depend on, as a dict of strings and numbers. beta, estimator, mean or sum and normalisation are not in it."""
    return {
        **plan.settings,
        "examples": len(plan.examples),
        "ref_model": None if ref_model is None else fingerprint(ref_model),
        "reward_model": "the data's own scores" if reward_model is None else fingerprint(reward_model),
        "dtype": dtype,
        "autocast": autocast,  # of the reference only; in bf16 its sums differ by tenths of a nat
        "reward_dtype": reward_dtype,
        "max_reward_tokens": max_reward_tokens,
        "plan": plan_fingerprint(plan),
    }


def plan_fingerprint(plan):
    """A short id of the micro-batches, token by token, and of the texts the reward model reads."""
    digest = hashlib.sha256()
    for batch in plan.batches:
        for i in batch:
            e = plan.examples[i]
            digest.update(e.prompt_ids.tobytes() + b"|" + e.response_ids.tobytes() + f"|{e.prompt_key}|{e.response}\n".encode())
    return digest.hexdigest()[:16]


def check_fits(path, wanted):
    """InputError naming every difference between the header of the table at `path` and the wanted one."""
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("var_tables", "null"))
    except Exception as error:  # safetensors raises its own exception types for torn files
        raise InputError(f"{path}: not a readable safetensors file ({error}); remove it to build it again") from None
    if found is None:
        raise InputError(f"{path}: a safetensors file, but not one that tables.py wrote")
    # a half that was never measured (None) can still be measured; a half measured with another model cannot be used
    differs = [k for k in wanted if found.get(k) != wanted[k] and not (k == "ref_model" and None in (found.get(k), wanted[k]))]
    if differs:
        what = "; ".join(f"{k}: {found.get(k)} in the table, {wanted[k]} in this run" for k in differs)
        raise InputError(f"{path}: this table does not fit the run ({what}); use the same settings, another file, or remove it")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Many responses to one prompt


def continue_prefix(decoder, prefix, suffixes, pad):
    """Hidden states of `suffixes` after a common `prefix` that is run once: lists of ids -> (n, 1 + S, D), column 0 = the prefix's last token."""
    device = decoder.device
    first = decoder(input_ids=torch.tensor([prefix], device=device), use_cache=True)
    cache = first.past_key_values
    cache.batch_repeat_interleave(len(suffixes))
    batch = {k: v.to(device) for k, v in pad_right(suffixes, pad).items()}
    ones = torch.ones(len(suffixes), len(prefix), dtype=torch.long, device=device)
    rest = decoder(
        input_ids=batch["input_ids"],
        attention_mask=torch.cat([ones, batch["attention_mask"]], dim=1),
        position_ids=torch.arange(len(prefix), len(prefix) + batch["input_ids"].shape[1], device=device)[None].expand(len(suffixes), -1),
        past_key_values=cache,
        use_cache=True,
    )
    last = first.last_hidden_state[:, -1:].expand(len(suffixes), -1, -1)
    return torch.cat([last, rest.last_hidden_state], dim=1)


def ref_logps_of(model, tokenizer, prompt_ids, responses, by_prefix=True):
    """log pi_ref(y | x), summed, of several responses (lists of ids) to one prompt -> list of floats, in nats."""
    prompt_ids = list(prompt_ids)
    if not by_prefix:
        batch = pad_right([prompt_ids + list(y) for y in responses], pad_id(tokenizer))
        response_mask = batch["attention_mask"].clone()
        response_mask[:, : len(prompt_ids)] = 0
        return sequence_logps(model, *(t.to(model.device) for t in (*batch.values(), response_mask))).tolist()
    causal_lm = without_adapter_wrapper(model)
    hidden = continue_prefix(causal_lm.base_model, prompt_ids, responses, pad_id(tokenizer))  # (n, 1 + S, D)
    targets = pad_right(responses, pad_id(tokenizer))
    rows, columns = targets["attention_mask"].nonzero(as_tuple=True)
    logps = logps_from_hidden(
        causal_lm, hidden[rows, columns], targets["input_ids"][rows, columns].to(hidden.device)
    )  # column t predicts token t
    # float64: a long response's sum is thousands of nats, where float32 loses 1e-3 in adding up
    return torch.zeros(len(responses), dtype=torch.float64, device=hidden.device).index_add(0, rows.to(hidden.device), logps.double()).tolist()


def rewards_of(model, tokenizer, conversations, by_prefix=True):
    """r(x, y) of several conversations (lists of ids in the reward model's own template) that begin alike -> list of floats."""
    if not by_prefix:
        batch = pad_right(conversations, pad_id(tokenizer))
        return model(**{k: v.to(model.device) for k, v in batch.items()}).tolist()
    shared = len(os.path.commonprefix(conversations))
    shared = min([shared] + [len(ids) - 1 for ids in conversations])  # at least one token of each is its own
    if shared == 0:
        return rewards_of(model, tokenizer, conversations, by_prefix=False)
    hidden = continue_prefix(model.base_model, conversations[0][:shared], [ids[shared:] for ids in conversations], pad_id(tokenizer))
    ends = torch.tensor([len(ids) - shared for ids in conversations], device=hidden.device)  # column 0 is the prefix's last token
    return head_scores(model, hidden[torch.arange(len(ends), device=hidden.device), ends]).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of a table


def score_cells(cells, prompt_key, response_key, score_group, B):
    """Values of cells [(example of x, example of y), ...], every distinct (prompt, response) scored once: prompt by prompt, B responses of
    similar length at a time."""
    prompts = {}
    for x, y in cells:
        prompts.setdefault(prompt_key(x), {}).setdefault(response_key(y), (x, y))
    values = {}
    for prompt, pairs in prompts.items():
        keys = sorted(pairs, key=len)  # of the texts or the token bytes
        for start in range(0, len(keys), B):
            some = keys[start : start + B]
            values |= {(prompt, key): value for key, value in zip(some, score_group([pairs[key] for key in some]))}
    return [values[prompt_key(x), response_key(y)] for x, y in cells]


def ref_scorer(model, tokenizer, B):
    """cells -> log pi_ref(y | x), summed over tokens, nats."""

    def group(pairs, by_prefix=True):
        return ref_logps_of(model, tokenizer, pairs[0][0].prompt_ids, [y.response_ids.tolist() for _, y in pairs], by_prefix)

    score_group = either_way(group, model, per_token=0.02)
    return lambda cells: score_cells(cells, lambda x: x.prompt_ids.tobytes(), lambda y: y.response_ids.tobytes(), score_group, B)


def reward_scorer(model, tokenizer, B, max_tokens):
    """cells -> r(x, y), raw logits."""
    model = bind_scores(model)

    def group(pairs, by_prefix=True):
        if by_prefix and not hasattr(model, "score"):
            raise NotImplementedError  # an encoder reads both ways: the prefix alone is not what it sees before a response
        ids = [encode_conversation(tokenizer, x.messages, y.response, max_tokens) for x, y in pairs]
        return rewards_of(model, tokenizer, ids, by_prefix)

    score_group = either_way(group, model)
    return lambda cells: score_cells(cells, lambda x: x.prompt_key, lambda y: y.response, score_group, B)


def either_way(group, model, per_token=0.0):
    """`group`, which on its first call scores two pairs by prefix and by full forwards, and stays with full forwards if they disagree or
    a prefix cannot be continued (encoders; a cache that cannot be repeated, as of linear attention).

    What is rounding and no disagreement: 1e-3 in float32; in 16 bits 0.2, and `per_token` more for each token of a sum.
    """
    state = {}

    def scored(pairs):
        if "by_prefix" not in state:
            some = [pairs[0], pairs[-1]][: len(pairs)]  # the shortest and the longest: there is padding between them
            plain, why = group(some, False), ""
            tolerance = 1e-3
            if model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type):
                tolerance = 0.2 + per_token * max(len(y.response_ids) for _, y in some)
            try:
                fast = group(some, True)
                if any(not abs(a - b) <= tolerance + 1e-3 * abs(b) for a, b in zip(fast, plain)):
                    why = f"scores differently from a key-value cache ({fast[0]:.4f} against {plain[0]:.4f})"
            except (AttributeError, NotImplementedError, TypeError, ValueError):
                why = "cannot continue from a key-value cache"
            if why:
                print(f"note: {type(model).__name__} {why}; using full forwards")
            state["by_prefix"] = not why
        return group(pairs, state["by_prefix"])

    return scored


@functools.lru_cache
def cells_of(K, which):
    """Places (i, j) of a micro-batch of K rows that are measured: "all", the "matched" diagonal, or "neighbours": (i, i) and (i, i+1 mod K)."""
    columns = {"all": lambda i: range(K), "matched": lambda i: [i], "neighbours": lambda i: [i, (i + 1) % K]}[which]
    return [(i, j) for i in range(K) for j in columns(i)]


# ----------------------------------------------------------------------------------------------------------------------
# The whole table


class Tables:
    """The three tensors of a table file, and a view of one micro-batch."""

    def __init__(self, plan):
        M, B = len(plan.batches), max(map(len, plan.batches))
        self.rewards, self.ref_logps = torch.full((M, B, B), math.nan), torch.full((M, B, B), math.nan)
        self.response_tokens = torch.zeros(M, B, dtype=torch.int32)
        for m, batch in enumerate(plan.batches):
            self.response_tokens[m, : len(batch)] = torch.tensor([len(plan.examples[i].response_ids) for i in batch])

    def micro_batch(self, m, ref_logps="mean"):
        """(rewards, ref_logps) of micro-batch m, (K, K) each. `ref_logps`: "sum" as stored, "mean" divided by the tokens of each response."""
        lengths = self.response_tokens[m][self.response_tokens[m] > 0]
        K = len(lengths)
        logps = self.ref_logps[m, :K, :K]
        return self.rewards[m, :K, :K], logps / lengths if ref_logps == "mean" else logps  # column j holds y_j: divide columns

    def lacks(self, name, m, which):
        rows, columns = zip(*cells_of(int((self.response_tokens[m] > 0).sum()), which))
        return bool(getattr(self, name)[m, rows, columns].isnan().any())

    def take(self, tensors):
        for name in ("rewards", "ref_logps"):
            if name in tensors:
                where = tensors["micro_batches"].long() if "micro_batches" in tensors else slice(None)
                mine = getattr(self, name)
                mine[where] = torch.where(tensors[name].isnan(), mine[where], tensors[name])  # a diagonal does not erase what is around it


def build_tables(path, plan, wanted, needed, accelerator, tokenizer, reward_tokenizer, args):
    """Measure what `wanted` ({"rewards": "all" | "matched" | "neighbours" | None, "ref_logps": ...}) lacks for the micro-batches `needed` -> Tables.

    Reads the file at `path` and finished pieces, measures the rest (every process its share), writes the file. The models are loaded
    one after the other, only if there is something to measure, and are gone afterwards.
    InputError: a table that does not fit, data without the scores that would replace a reward model.
    """
    path, main = Path(path), accelerator.is_main_process
    ref_model = args.ref_model or args.model if wanted["ref_logps"] else None
    bits = " in 4 bits" if args.load_in_4bit else ""
    precision = {"dtype": args.dtype + bits, "reward_dtype": args.reward_dtype + bits, "autocast": accelerator.mixed_precision}
    about = header(plan, ref_model, args.reward_model, max_reward_tokens=args.max_reward_tokens, **precision)
    tables = Tables(plan)
    if path.exists():
        found = check_fits(path, about)
        about["ref_model"] = about["ref_model"] or found["ref_model"]
        tables.take(load_file(path))
    # pieces of other settings must not be mistaken for ours; the reference stands apart because a table can get its ref_logps later
    settings = hashlib.sha256(json.dumps({k: v for k, v in about.items() if k != "ref_model"}).encode()).hexdigest()[:8]
    parts = path.with_name(f"{path.name}.parts-{settings}-{(about['ref_model'] or '')[-8:]}")
    for part in sorted(parts.glob("*.safetensors")):
        tables.take(load_file(part))
    if args.reward_model is None and wanted["rewards"]:
        take_scores(tables, plan)
    accelerator.wait_for_everyone()  # all have seen the same pieces, before the first new one appears

    to_write = args.reward_model is None and bool(wanted["rewards"])  # the data's scores are written again: they may have changed
    for name, which in wanted.items():
        todo = [m for m in sorted(needed) if which and tables.lacks(name, m, which)]
        if todo:
            to_write = True
            measure(name, which, todo, parts, plan, accelerator, tokenizer, reward_tokenizer, args)
    if to_write or not path.exists():
        accelerator.wait_for_everyone()
        for part in sorted(parts.glob("*.safetensors")):
            tables.take(load_file(part))
        for name, which in wanted.items():
            if which and (lost := [m for m in sorted(needed) if tables.lacks(name, m, which)]):
                raise InputError(f"{parts}: pieces with {name} of {len(lost):,} micro-batches are not to be seen from here; all nodes must write to one shared folder. The pieces are kept")
        accelerator.wait_for_everyone()
        if main:
            temporary = path.with_name(path.name + ".tmp")
            tensors = {"rewards": tables.rewards, "ref_logps": tables.ref_logps, "response_tokens": tables.response_tokens}
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"var_tables": json.dumps(about)})
            os.replace(temporary, path)
            shutil.rmtree(parts, ignore_errors=True)
        accelerator.wait_for_everyone()
    return tables


def take_scores(tables, plan):
    """The data's own scores as rewards. Rows of one prompt know every r(x, y_j); otherwise only the matched pairs are known."""
    for m, batch in enumerate(plan.batches):
        for j, e in enumerate(plan.examples[i] for i in batch):
            if e.score is None:
                raise InputError(f"{e.where}: no reward model was given and this response has no score in the data; pass --reward_model")
            rows = slice(0, len(batch)) if plan.settings["partners"] == "group" else j
            tables.rewards[m, rows, j] = e.score


def measure(name, which, todo, parts, plan, accelerator, tokenizer, reward_tokenizer, args):
    """Measure one of the two tables for the micro-batches `todo`, this process every P-th piece; pieces are files in `parts`."""
    if name == "ref_logps":
        model = load_policy(args.ref_model or args.model, args.dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit).eval()
        scorer = ref_scorer(model, tokenizer, args.batch_size)
    else:
        model = load_reward_model(args.reward_model, args.reward_dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit)
        scorer = reward_scorer(model, reward_tokenizer, args.batch_size, args.max_reward_tokens)
    model.to(accelerator.device).requires_grad_(False)  # autocast keeps 16-bit copies of weights that could be trained
    size = min(PIECE, math.ceil(len(todo) / accelerator.num_processes))  # few micro-batches: smaller pieces, so that all have work
    pieces = [todo[i : i + size] for i in range(0, len(todo), size)]
    mine = pieces[accelerator.process_index :: accelerator.num_processes]
    parts.mkdir(parents=True, exist_ok=True)

    def values_of(batches):
        cells = [(m, i, j) for m in batches for i, j in cells_of(len(plan.batches[m]), which)]
        example = lambda m, i: plan.examples[plan.batches[m][i]]
        # as in training: the same autocast, so that the diagonal is the policy's own log-prob at step 0; the reward model has its own dtype
        with torch.no_grad(), accelerator.autocast() if name == "ref_logps" else torch.autocast(accelerator.device.type, enabled=False):
            return cells, scorer([(example(m, i), example(m, j)) for m, i, j in cells])

    tokens = sum(forward_tokens(plan, m, which) for m in todo)
    about = f"{name}: {len(todo):,} micro-batches, {tokens:,} forward tokens (each prompt once, with {'every response' if which == 'all' else f'{which} responses'})"
    if mine and len(todo) > PIECE:  # otherwise the estimate would cost more than it tells
        values_of(mine[0][:1])  # warm-up, and the check of either_way
        start = time.perf_counter()
        values_of(mine[0][:1])
        minutes = (time.perf_counter() - start) * tokens / forward_tokens(plan, mine[0][0], which) / accelerator.num_processes / 60
        about += f", about {minutes:.1f} minutes"
    if accelerator.is_main_process:
        print(about)
    bar = tqdm(total=sum(map(len, mine)), desc=name, unit=" micro-batches", disable=not accelerator.is_main_process, mininterval=1.0)
    B = max(map(len, plan.batches))
    for piece in mine:
        values = {m: torch.full((B, B), math.nan) for m in piece}
        cells, numbers = values_of(piece)
        for (m, i, j), value in zip(cells, numbers):
            if not math.isfinite(value):
                x, y = plan.examples[plan.batches[m][i]], plan.examples[plan.batches[m][j]]
                raise InputError(
                    f"{name} of the response of {y.where} to the prompt of {x.where} is {value}; try --{'reward_' if name == 'rewards' else ''}dtype float32"
                )
            values[m][i, j] = value
        file = parts / f"{name}-{which}-{piece[0]:08d}.safetensors"
        save_file({name: torch.stack(list(values.values())), "micro_batches": torch.tensor(piece)}, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
        bar.update(len(piece))
    bar.close()
    release(model)


def forward_tokens(plan, m, which):
    """Tokens that scoring micro-batch m runs through the model, in the policy's tokens: each prompt once, then its responses."""
    rows = [plan.examples[i] for i in plan.batches[m]]
    responses = sum(len(e.response_ids) for e in rows)
    return sum(len(e.prompt_ids) for e in rows) + responses * {"all": len(rows), "neighbours": 2, "matched": 1}[which]


# ----------------------------------------------------------------------------------------------------------------------
# What beta does to the weights: the one number the paper withholds


def summary(tables, needed, ref_logps="mean", estimator="paper", betas=BETAS, most=1000):
    """Text: effective sample size (1 to B) and self_share (0 to 1) for each beta, means over at most `most` micro-batches."""
    some = sorted(needed)[:: math.ceil(len(needed) / most)]
    lines = [
        f"weights over {len(some):,} micro-batches, --ref_logps {ref_logps} --estimator {estimator}",
        "   beta   effective sample size   self_share",
    ]
    for beta in betas:
        ess, share = zip(*(weights_at_a_glance(*tables.micro_batch(m, ref_logps), beta, estimator) for m in some))
        lines.append(
            f"{beta:7g}   {sum(ess) / len(ess):21.2f}   {'':10}"
            if share[0] is None
            else f"{beta:7g}   {sum(ess) / len(ess):21.2f}   {sum(share) / len(share):10.3f}"
        )
    return "\n".join(lines)


def weights_at_a_glance(rewards, ref_logps, beta, estimator):
    """(effective sample size, self_share or None) of one micro-batch. The share is of the sum that the estimator takes: without the
    pi_ref factor for "monte_carlo"; "constant" has no sum."""
    if estimator == "constant":
        return effective_sample_size(log_weights(rewards.diagonal(), None, beta, estimator)).item(), None
    ref_logps = torch.zeros_like(rewards) if estimator == "monte_carlo" else ref_logps
    return effective_sample_size(log_weights(rewards, ref_logps, beta, estimator)).item(), self_share(rewards, ref_logps, beta).item()


def main(args):
    accelerator = make_accelerator(model=args.model)
    if args.ref_model:
        check_model_name(args.ref_model)
    tokenizer, reward_tokenizer, plan, eval_plan = load_plan(args, args.responses or "all", accelerator.is_main_process)
    wanted = {"rewards": "all", "ref_logps": "all"}
    if args.reward_model is None and args.partners != "group":
        raise InputError("--reward_model is missing: with --partners batch, r(x_i, y_j) of other prompts' responses is in no data file")
    for p, path in ((plan, args.out), (eval_plan, eval_path(args.out))):
        if p is not None:
            needed = range(len(p.batches))
            tables = build_tables(path, p, wanted, needed, accelerator, tokenizer, reward_tokenizer, args)
            if accelerator.is_main_process:
                print(f"{path}: {len(p.batches):,} micro-batches\n" + "\n".join(summary(tables, needed, mode) for mode in ("mean", "sum")))
    accelerator.end_training()


def eval_path(path):
    """Where the table of the held-out examples lies: tables.safetensors -> tables_eval.safetensors."""
    return str(Path(path).with_name(Path(path).stem + "_eval" + Path(path).suffix))


if __name__ == "__main__":
    run(lambda: main(ARGS))
