"""
VAR training (paper Algorithm 1): weights from tables measured once, then a loop that is supervised fine-tuning.

    python train.py                                                # no flags: the miniature world of paper/miniature.py, minutes on a laptop
    python train.py --model DIR --reward_model DIR --data FILE --output_dir runs/var
    accelerate launch --num_processes 8 train.py ...               # the same program on several devices

    1. data.py    rows -> examples -> micro-batches of B, composed once
    2. tables.py  r(x_i, y_j) and log pi_ref(y_j|x_i) of every micro-batch (lines 3-5); both models are gone before training starts
    3. below      loss = -(1/B) sum_i w_i log pi_theta(y_i|x_i)  (lines 6-8), AdamW, cosine

OUT/ becomes a plain Hugging Face folder; beside it run.json (settings, versions, fingerprints), metrics.jsonl (one line per optimizer
step, means over all processes), tables.safetensors, checkpoints/ (for --resume) and eval/ (generations along training and their rewards).

Departures from the paper, besides those in var.py:
1. The loss is divided by one constant, the mean response length of the training set, so that it reads in nats per token. No minimiser
   moves; clipping and AdamW's epsilon see smaller gradients. log pi_theta itself stays a sum over tokens.
2. --ref_logps mean, the default, uses pi_ref(y|x)^(1/|y|) in Zhat (see var.py, departure 3).
3. Warm-up, clipping and weight decay are not stated in the paper; ours are flags.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

from data import add_data_flags, add_loading_flags, add_plan_flags, check_model_name, collate, load_plan, pad_id, step_micro_batches
from formats import InputError, run


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a policy with VAR (Algorithm 1) or plain SFT. Without --model and --data: VAR on the miniature world, with its own settings."
    )
    add = parser.add_argument_group("what").add_argument
    add("--model", help="the policy to train, folder or hub name")
    add("--ref_model", help="the reference pi_ref (default: --model before any update, as in the paper)")
    add("--reward_model", help="r(x, y): a one-label sequence classifier, folder or hub name. Scores in the data can replace it with --estimator constant or --partners group")
    add("--output_dir", default="runs/var", help="where everything is written (default: %(default)s)")
    add("--tables", metavar="FILE", help="the tables of Algorithm 1 lines 3-5; built if missing, checked if there (default: OUTPUT_DIR/tables.safetensors)")
    add("--loss", choices=["var", "sft"], default="var", help="default: %(default)s")
    add_data_flags(parser, responses="all for var, chosen for sft")
    add_plan_flags(parser)
    add = parser.add_argument_group("weights (var)").add_argument
    add("--beta", type=float, default=1.0, help="temperature of exp(r/beta), in units of the raw reward (default: %(default)s; not stated in the paper)")
    add("--estimator", choices=["paper", "monte_carlo", "constant"], default="paper", help="Zhat: Sec. 3.2 verbatim, without its pi_ref factor, or 1 (default: %(default)s)")
    add("--ref_logps", choices=["mean", "sum"], default="mean", help="log pi_ref in Zhat: per-token mean, or the sum, which is the paper to the letter and overflows on long texts (default: %(default)s)")
    add("--normalize_weights", action="store_true", help="divide the weights of a micro-batch by their mean (not in the paper)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=1e-5, help="peak learning rate of AdamW (default: %(default)s; paper: 1e-5 and 5e-6)")
    add("--epochs", type=float, default=2.0, help="passes over the micro-batches (default: %(default)s; paper: 2)")
    add("--max_steps", type=int, metavar="N", help="stop after N optimizer steps; only their micro-batches are measured (default: as many as --epochs needs)")
    add("--accum", type=int, metavar="G", help="micro-batches per optimizer step, over all processes (default: one per process)")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps in which the rate rises; then a cosine to zero (default: %(default)s; paper: cosine)")
    add("--weight_decay", type=float, default=0.0, help="of AdamW, matrices only (default: %(default)s; not stated in the paper)")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm (default: %(default)s; not stated in the paper)")
    add("--gradient_checkpointing", action="store_true", help="keep one activation per layer and compute the others again: less memory, a third more time")
    add = parser.add_argument_group("along the way").add_argument
    add("--eval_every", type=int, metavar="N", help="held-out loss and generations every N steps and at the end (default: five times a run, if anything is held out)")
    add("--eval_prompts", type=int, default=32, metavar="N", help="held-out prompts answered each time, one process only; 0 = none (default: %(default)s)")
    add("--save_every", type=int, default=500, metavar="N", help="steps between checkpoints for --resume; 0 = none (default: %(default)s)")
    add("--keep", type=int, default=1, metavar="N", help="how many checkpoints stay on disk (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR (or from the start if there is none)")
    add("--tracker", metavar="NAME", help="also log to tensorboard, wandb or another tracker accelerate knows")
    add_loading_flags(parser)
    args = parser.parse_args(argv)
    if args.model is None and args.data is None:
        from paper import miniature

        parser.set_defaults(**miniature.train_settings())  # what was typed still wins
        args = parser.parse_args(argv)
    if args.model is None or args.data is None:
        parser.error("--model and --data go together (without both, the miniature world is trained)")
    above_zero = ("beta", "lr", "epochs", "max_steps", "accum", "eval_every", "max_grad_norm", "keep", "max_reward_tokens")
    from_zero = ("warmup_ratio", "weight_decay", "eval_prompts", "save_every", "seed")
    for name in above_zero + from_zero:
        value = getattr(args, name)
        if value is not None and not (0 < value < float("inf") or (value == 0 and name in from_zero)):
            parser.error(f"--{name} must be {'at least' if name in from_zero else 'above'} 0 and finite, got {value}")
    if args.eval_every and not (args.eval_data or args.eval_fraction):
        parser.error(f"--eval_every {args.eval_every}: nothing is held out; add --eval_data or --eval_fraction")
    if args.warmup_ratio > 1:
        parser.error(f"--warmup_ratio is a share of the steps, from 0 to 1, got {args.warmup_ratio}")
    if args.loss == "var" and args.estimator != "constant" and args.batch_size < 2:
        parser.error(f"--batch_size {args.batch_size}: with a single response in the micro-batch the reward cancels out of Zhat; use 2 or more, or --estimator constant")
    if args.loss == "var" and args.reward_model is None and args.estimator != "constant" and args.partners != "group":
        parser.error("--reward_model is missing (scores in the data can replace it with --estimator constant or --partners group)")
    return args


# fmt: on


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is loaded: --help and typing errors answer at once

import contextlib
import math
import os
import re
import shutil
import time
from pathlib import Path

import accelerate
import torch
import transformers
from tqdm import tqdm

from baselines.losses import sft_loss
from eval import generate_rows, read_jsonl, sigmoid100, write_jsonl
from model import (
    adamw,
    check_reward_model,
    fingerprint,
    load_policy,
    load_reward_model,
    lr_at,
    make_accelerator,
    save_model,
    sequence_logps,
    write_json,
)
from reward import bind_scores, score
from tables import build_tables, eval_path, plan_fingerprint, summary, weights_at_a_glance
from var import log_partition, log_weights, var_loss, weights_from_log

# ----------------------------------------------------------------------------------------------------------------------
# Losses


@dataclass
class Loss:
    """What a loss needs and how it is computed. The loop knows nothing else about it."""

    responses: str  # what --responses means by default
    tables: Callable  # args -> which cells of the tables it reads: "all", the "matched" diagonal, or None
    compute: Callable  # policy_logps (K,), rewards (K, K), ref_logps (K, K), args -> ()


VAR_TABLES = {  # what each estimator of Zhat reads
    "paper": {"rewards": "all", "ref_logps": "all"},
    "monte_carlo": {"rewards": "all", "ref_logps": None},
    "constant": {"rewards": "matched", "ref_logps": None},
}
LOSSES = {
    "var": Loss(
        responses="all",
        tables=lambda args: VAR_TABLES[args.estimator],
        compute=lambda logps, rewards, ref, args: var_loss(logps, rewards, ref, args.beta, args.estimator, args.normalize_weights),
    ),
    "sft": Loss(responses="chosen", tables=lambda args: None, compute=lambda logps, rewards, ref, args: sft_loss(logps)),
}


def check_weights(tables, needed, args, say):
    """Look at every weight before the first step, so that none can stop or spoil a run halfway. InputError: one would overflow."""
    glances = []
    for m in sorted(needed):
        rewards, ref_logps = tables.micro_batch(m, args.ref_logps)
        try:
            weights_from_log(log_weights(rewards, ref_logps, args.beta, args.estimator), args.normalize_weights)
        except ValueError as error:
            raise InputError(f"micro-batch {m}: {error}") from None
        glances.append(weights_at_a_glance(rewards, ref_logps, args.beta, args.estimator))
    share = None if glances[0][1] is None else sum(s for _, s in glances) / len(glances)
    text = f"beta {args.beta:g}: effective sample size {sum(e for e, _ in glances) / len(glances):.2f} of {args.batch_size}"
    say(text + ("" if share is None else f", self_share {share:.3f}"))
    if share is not None and share > 0.9:
        say(f"warning: self_share {share:.3f} is above 0.9: Zhat(x_i) is y_i's own term, so the reward cancels and this is nearly plain SFT; "
              "a larger --beta, --partners group or --estimator constant keep the reward")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Files of a run


def check_run(args, about, out):
    """InputError if OUT holds another run, or this one without --resume. -> True if it holds this one, finished."""
    file = out / "run.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --output_dir names a folder")
    if not file.exists():
        if (out / "config.json").exists():
            raise InputError(f"{out}: already holds a model, which this run would replace; choose another --output_dir")
        return False
    if not args.resume:
        raise InputError(f"{out}: already holds a run; --resume continues it, another --output_dir starts a new one")
    found = json.loads(file.read_text())
    free = {"resume", "keep", "save_every", "tracker", "output_dir"}  # these may differ from the first start
    old, new = ({**run["args"], **run["models"], "plan": run["plan"], "--num_processes": run["processes"]} for run in (found, about))
    if differs := [f"{k}: {old.get(k)} there, {new.get(k)} now" for k in old | new if k not in free and old.get(k) != new.get(k)]:
        raise InputError(f"{out}: --resume with other settings ({'; '.join(differs)}); use the old ones or another --output_dir")
    return found.get("finished", False)


def save_checkpoint(accelerator, out, step, keep):
    """State of step `step` under its final name only once it is whole; then the oldest beyond `keep` go."""
    folder = out / "checkpoints"
    accelerator.save_state(folder / f".step_{step}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(folder / f".step_{step}", folder / f"step_{step}")
        for old in list_checkpoints(out)[:-keep]:
            shutil.rmtree(folder / f"step_{old}")
    accelerator.wait_for_everyone()


def list_checkpoints(out):
    found = (re.fullmatch(r"step_(\d+)", path.name) for path in (out / "checkpoints").glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


# ----------------------------------------------------------------------------------------------------------------------
# One micro-batch


def forward(model, loss, plan, tables, m, args, tokenizer, device):
    """Loss of micro-batch m in nats per response, and its sums for the metrics."""
    batch = [plan.examples[i] for i in plan.batches[m]]
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in collate(batch, pad_id(tokenizer)).items()}
    policy_logps = sequence_logps(model, **tensors)  # (K,)  Algorithm 1 line 2
    rewards, ref_logps = (t.to(device) for t in tables.micro_batch(m, args.ref_logps)) if tables else (None, None)  # (K, K), lines 3-4
    value = loss.compute(policy_logps, rewards, ref_logps, args)  # lines 5-8
    K = len(batch)
    sums = {"rows": K, "tokens": sum(len(e.prompt_ids) + len(e.response_ids) for e in batch)}
    sums |= {"loss": K * value.detach(), "policy_logps": policy_logps.detach().sum()}
    if args.loss == "var":
        log_w = log_weights(rewards, ref_logps, args.beta, args.estimator)  # (K,)
        weights = weights_from_log(log_w, args.normalize_weights)
        ess, share = weights_at_a_glance(rewards, ref_logps, args.beta, args.estimator)
        sums |= {"rewards": rewards.diagonal().sum(), "log_z": log_partition(rewards, ref_logps, args.beta, args.estimator).sum()}
        sums |= {"weights/mean": weights.sum(), "weights/ess": K * ess, "weights/max": weights.max()}
        sums |= {} if share is None else {"weights/self_share": K * share}
    return value, sums


def reduce_metrics(accelerator, micro_batches, scale):
    """Sums of this process's micro-batches -> means over all rows of all processes (weights/max: the maximum). The loss in nats per token."""
    names = list(micro_batches[0])
    mine = torch.tensor([[float(sums[name]) for name in names] for sums in micro_batches], dtype=torch.float64, device=accelerator.device)
    if accelerator.device.type == "mps":
        mine = mine.float()
    table = dict(zip(names, accelerator.gather(mine).unbind(dim=1)))  # name -> one number per micro-batch of the step
    rows = table["rows"].sum()
    metrics = {name: (column.max() if name == "weights/max" else column.sum() / rows).item() for name, column in table.items()}
    return metrics | {"loss": metrics["loss"] / scale, "rows": int(rows), "tokens": int(table["tokens"].sum())}


@torch.no_grad()
def evaluate(accelerator, model, loss, plan, tables, args, tokenizer, scale):
    """Loss on the held-out micro-batches, shared out among the processes. Leaves training's random state as it was."""
    P, sums = accelerator.num_processes, []
    model.eval()
    for start in range(0, len(plan.batches), P):  # every process runs equally often, or FSDP would wait forever
        m = start + accelerator.process_index
        one = forward(model, loss, plan, tables, m % len(plan.batches), args, tokenizer, accelerator.device)[1]
        sums.append(one if m < len(plan.batches) else {name: 0 for name in one})
    model.train()
    return {f"eval/{name}": value for name, value in reduce_metrics(accelerator, sums, scale).items() if name not in ("rows", "tokens")}


def score_evaluations(out, reward_tokenizer, args, device):
    """eval/step_*.jsonl -> eval/rewards.jsonl: step, mean reward and 100*sigmoid of the held-out generations (Figure 2)."""
    model = load_reward_model(args.reward_model, args.reward_dtype, args.attn_implementation, args.trust_remote_code)
    model, lines = bind_scores(model.to(device)), []
    for file in sorted((out / "eval").glob("step_*.jsonl"), key=lambda f: int(f.stem[5:])):
        rows = read_jsonl(file)
        conversations = [(row["prompt"], row["response"]) for row in rows]
        rewards = score(model, reward_tokenizer, conversations, max_tokens=args.max_reward_tokens, progress=False)
        sums = {
            "reward": sum(rewards),
            "sigmoid100": sum(map(sigmoid100, rewards)),
            "response_tokens": sum(row["response_tokens"] for row in rows),
        }
        lines.append({"step": int(file.stem[5:]), "n": len(rows)} | {name: total / len(rows) for name, total in sums.items()})
    write_jsonl(out / "eval" / "rewards.jsonl", lines)


# ----------------------------------------------------------------------------------------------------------------------
# The program


def main(args):
    if getattr(args, "miniature", False):
        from paper import miniature

        miniature.build()
    out = Path(args.output_dir)
    accelerator = make_accelerator(args.tracker, args.output_dir)
    P, main_process, device = accelerator.num_processes, accelerator.is_main_process, accelerator.device
    say = print if main_process else lambda *_: None
    loss, accum = LOSSES[args.loss], args.accum or P
    if accum % P:
        raise InputError(f"--accum {accum} micro-batches cannot be shared out evenly among {P} processes; use a multiple of {P}")
    if args.ref_model:
        check_model_name(args.ref_model)
    if args.reward_model:
        check_reward_model(args.reward_model, args.trust_remote_code)

    # Data and plan. Nothing but tokenizers is loaded yet, so faults of the data cost no time.
    tokenizer, reward_tokenizer, plan, eval_plan = load_plan(args, args.responses or loss.responses, main_process)
    M = len(plan.batches)
    total_steps = args.max_steps or math.ceil(args.epochs * M / accum)
    needed = {m for step in range(total_steps) for m in step_micro_batches(step, accum, M, args.seed)}
    scale = sum(len(e.response_ids) for e in plan.examples) / len(plan.examples)  # the constant of departure 1, in tokens
    eval_every = args.eval_every or max(1, total_steps // 5) if eval_plan else 0
    say(f"{total_steps:,} optimizer steps x {accum} micro-batches x B = {args.batch_size}, on {P} process(es), {device}")
    versions = {"python": sys.version.split()[0]} | {package.__name__: package.__version__ for package in (torch, transformers, accelerate)}
    models = {name: fingerprint(name) for name in {args.model, args.ref_model, args.reward_model} - {None}}
    about = {"args": vars(args), "models": models, "plan": plan_fingerprint(plan), "versions": versions, "processes": P}
    about |= {"device": str(device), "steps": total_steps, "accum": accum, "eval_every": eval_every, "mean_response_tokens": scale}
    if check_run(args, about, out):
        return say(f"{out}: this run is finished")

    # Tables: Algorithm 1 lines 3-5, measured once. Reference and reward model are gone afterwards.
    tables = eval_tables = None
    if wanted := loss.tables(args):
        path = args.tables or str(out / "tables.safetensors")
        tables = build_tables(path, plan, wanted, needed, accelerator, tokenizer, reward_tokenizer, args)
        if eval_plan:
            every = range(len(eval_plan.batches))
            eval_tables = build_tables(eval_path(path), eval_plan, wanted, every, accelerator, tokenizer, reward_tokenizer, args)
        say(summary(tables, needed, args.ref_logps, args.estimator))
        check_weights(tables, needed, args, say)

    # Model, optimizer, and where a killed run had got to
    accelerate.utils.set_seed(args.seed)
    model = load_policy(args.model, args.dtype, args.attn_implementation, args.trust_remote_code)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, adamw(model, args.lr, args.weight_decay))
    first_step = max(list_checkpoints(out), default=0) if args.resume else 0
    if first_step:
        accelerator.load_state(out / "checkpoints" / f"step_{first_step}")
        say(f"resuming after step {first_step}")
    accelerator.wait_for_everyone()
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", about)
        old = read_jsonl(out / "metrics.jsonl", torn_end=True) if first_step else []
        write_jsonl(out / "metrics.jsonl", [row for row in old if row["step"] <= first_step])
    if args.tracker:
        accelerator.init_trackers("var", config={k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))})

    def log(step, metrics):
        if main_process:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        accelerator.log(metrics, step=step)

    def evaluate_at(step):
        numbers = evaluate(accelerator, model, loss, eval_plan, eval_tables, args, tokenizer, scale)
        if P == 1 and args.eval_prompts:
            items = {e.prompt_key: {"id": f"{n}", "subset": "held out", "prompt": e.messages} for n, e in enumerate(eval_plan.examples)}
            some, limits = list(items.values())[: args.eval_prompts], (args.max_prompt_tokens, args.max_response_tokens)
            rows = generate_rows(model, tokenizer, some, [args.seed], *limits, progress=False)
            (out / "eval").mkdir(exist_ok=True)
            write_jsonl(out / "eval" / f"step_{step}.jsonl", rows)
        return numbers

    # The loop
    if eval_every and not first_step:
        log(0, evaluate_at(0))
    steps = range(first_step, total_steps)
    bar = tqdm(steps, initial=first_step, total=total_steps, desc=args.loss, disable=not main_process, mininterval=1.0)
    for step in bar:
        start = time.perf_counter()
        micro_batches = step_micro_batches(step, accum, M, args.seed)  # of all processes; the same list everywhere
        rows_of_step = sum(len(plan.batches[m]) for m in micro_batches)
        mine, sums = micro_batches[accelerator.process_index :: P], []
        for k, m in enumerate(mine):
            with contextlib.nullcontext() if k == len(mine) - 1 else accelerator.no_sync(model):  # gradients are exchanged once a step
                value, metrics = forward(model, loss, plan, tables, m, args, tokenizer, device)
                # `value` is a mean over the micro-batch's rows; the step is the mean over all rows of all processes, whose gradients DDP averages
                share = len(plan.batches[m]) * P / rows_of_step
                accelerator.backward(value * share / scale)
            sums.append(metrics)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        lr = lr_at(step, total_steps, math.ceil(args.warmup_ratio * total_steps), args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = reduce_metrics(accelerator, sums, scale)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(float(grad_norm)):
            raise InputError(
                f"step {step + 1}: loss {metrics['loss']}, gradient norm {float(grad_norm)}; the last checkpoint is kept. A smaller --lr, or --dtype float32, usually helps"
            )
        metrics |= {"lr": lr, "grad_norm": float(grad_norm), "tokens_per_second": metrics.pop("tokens") / (time.perf_counter() - start)}
        if eval_every and ((step + 1) % eval_every == 0 or step + 1 == total_steps):
            metrics |= evaluate_at(step + 1)
        log(step + 1, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < total_steps:
            save_checkpoint(accelerator, out, step + 1, args.keep)  # last, so that resuming never has to look back

    # Save, then score what was generated along the way (Figure 2); the reward model is loaded once, after training
    state = accelerator.get_state_dict(model)
    if main_process:
        save_model(accelerator.unwrap_model(model, keep_fp32_wrapper=False), tokenizer, out, state)
    model, optimizer = accelerator.free_memory(model, optimizer)
    if main_process and reward_tokenizer and (out / "eval").exists():
        score_evaluations(out, reward_tokenizer, args, device)
    if main_process:
        write_json(out / "run.json", about | {"finished": True})
    say(f"{out}: done, opens with AutoModelForCausalLM.from_pretrained({args.output_dir!r})")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(lambda: main(ARGS))
