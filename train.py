"""
VAR training (paper Algorithm 1): weights from tables measured once, then a loop that is supervised fine-tuning.

    python train.py                                                # no flags: the miniature world of paper/miniature.py, minutes on a laptop
    python train.py --model DIR --reward_model DIR --data FILE --output_dir runs/var
    accelerate launch --config_file configs/fsdp2.yaml train.py ...    # the same program on several devices

    1. data.py    rows -> examples -> micro-batches of B, composed once
    2. tables.py  r(x_i, y_j) and log pi_ref(y_j|x_i) of every micro-batch (lines 3-5); both models are gone before training starts
    3. below      loss = -(1/B) sum_i w_i log pi_theta(y_i|x_i)  (lines 6-8), AdamW, cosine

OUT/ becomes a plain Hugging Face folder; beside it run.json (settings, versions, fingerprints), metrics.jsonl (one line per optimizer
step, means over all processes), tables.safetensors, checkpoints/ (for --resume) and eval/ (generations along training and their rewards).

--loss takes the methods VAR is compared with through the same loop: the table in baselines/methods.py says what each of them reads.

Departures from the paper, besides those in var.py and baselines/:
1. The loss (of weighted likelihoods; DPO's and KTO's are numbers of their own) is divided by one constant, the mean response length of the
   training set, so that it reads in nats per token. No minimiser moves; clipping and AdamW's epsilon see smaller gradients. log pi_theta
   itself stays a sum over tokens.
2. --ref_logps mean, the default, uses pi_ref(y|x)^(1/|y|) in Zhat (see var.py, departure 3).
3. Warm-up, clipping and weight decay are not stated in the paper; ours are flags.
"""

import argparse
import json
import os

from baselines.methods import LOSSES, Batch, mismatched
from data import add_data_flags, add_loading_flags, add_plan_flags, check_adapter, check_bounds, check_model_name, collate, load_plan, pad_id, step_micro_batches
from formats import InputError, run


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a policy with VAR (Algorithm 1) or a method it is compared with. Without --model and --data: on the miniature world, with its own settings."
    )
    add = parser.add_argument_group("what").add_argument
    add("--model", help="the policy to train, folder or hub name")
    add("--ref_model", help="the reference pi_ref (default: --model before any update, as in the paper)")
    add("--reward_model", help="r(x, y): a one-label sequence classifier, folder or hub name. Scores in the data can replace it with --estimator constant or --partners group")
    add("--output_dir", help="where everything is written (default: runs/LOSS)")
    add("--tables", metavar="FILE", help="the tables of Algorithm 1 lines 3-5; built if missing, checked if there (default: OUTPUT_DIR/tables.safetensors)")
    add("--loss", choices=list(LOSSES), default="var", help="the method, see baselines/methods.py (default: %(default)s)")
    add_data_flags(parser, responses="; ".join(f"{loss.responses} for {name}" for name, loss in LOSSES.items()))
    add_plan_flags(parser)
    add = parser.add_argument_group("the loss").add_argument
    add("--beta", type=float, help="var: temperature of exp(r/beta), in units of the raw reward; dpo, kto: of the log-ratio; rlol: subtracted (default: 1 for var, 0.1 for the others; not stated in the paper)")
    add("--estimator", choices=["paper", "monte_carlo", "constant"], default="paper", help="var: Zhat: Sec. 3.2 verbatim, without its pi_ref factor, or 1 (default: %(default)s)")
    add("--ref_logps", choices=["mean", "sum"], default="mean", help="var: log pi_ref in Zhat: per-token mean, or the sum, which is the paper to the letter and overflows on long texts (default: %(default)s)")
    add("--normalize_weights", action="store_true", help="var: divide the weights of a micro-batch by their mean (not in the paper)")
    add("--weight_column", default="weight", metavar="NAME", help="wsft: the data's column with a number per row, or a list with one per response (default: %(default)s)")
    add("--label_smoothing", type=float, default=0.0, metavar="E", help="dpo: share of the pairs assumed to be the wrong way round (default: %(default)s)")
    add("--clip", type=float, default=0.9, metavar="E", help="alol, rlol: pi_theta/pi_ref is bounded to [1-E, 1+E] (default: %(default)s, as A-LoL's own code)")
    add("--value_prompts", type=int, default=1000, metavar="N", help="alol: training prompts the reference answers to fit V(x) (default: %(default)s)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=1e-5, help="peak learning rate of AdamW (default: %(default)s; paper: 1e-5 and 5e-6)")
    add("--epochs", type=float, default=2.0, help="passes over the micro-batches (default: %(default)s; paper: 2)")
    add("--max_steps", type=int, metavar="N", help="stop after N optimizer steps; only their micro-batches are measured (default: as many as --epochs needs)")
    add("--accum", type=int, metavar="G", help="micro-batches per optimizer step, over all processes (default: one per process)")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps in which the rate rises; then a cosine to zero (default: %(default)s; paper: cosine)")
    add("--weight_decay", type=float, default=0.0, help="of AdamW, matrices only (default: %(default)s; not stated in the paper)")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm (default: %(default)s; not stated in the paper)")
    add("--gradient_checkpointing", action="store_true", help="keep one activation per layer and compute the others again: less memory, a third more time")
    add("--lora_rank", type=int, metavar="R", help="train an adapter of this rank on all linear layers instead of the weights; OUTPUT_DIR is then the adapter, as peft saves it")
    add("--merge", action="store_true", help="with an adapter: also write base and adapter as one plain folder, OUTPUT_DIR/merged")
    add = parser.add_argument_group("along the way").add_argument
    add("--eval_every", type=int, metavar="N", help="held-out loss and generations every N steps and at the end (default: five times a run, if anything is held out)")
    add("--eval_prompts", type=int, default=32, metavar="N", help="held-out prompts answered each time; 0 = none (default: %(default)s)")
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
    above_zero = ("value_prompts", "lora_rank", "beta", "lr", "epochs", "max_steps", "accum", "eval_every", "max_grad_norm", "keep", "max_reward_tokens")
    from_zero = ("clip", "label_smoothing", "warmup_ratio", "weight_decay", "eval_prompts", "save_every", "seed")
    check_bounds(parser, args, above_zero, from_zero)
    if args.eval_every and not (args.eval_data or args.eval_fraction):
        parser.error(f"--eval_every {args.eval_every}: nothing is held out; add --eval_data or --eval_fraction")
    if args.warmup_ratio > 1:
        parser.error(f"--warmup_ratio is a share of the steps, from 0 to 1, got {args.warmup_ratio}")
    if args.loss == "var" and args.estimator != "constant" and args.batch_size < 2:
        parser.error(f"--batch_size {args.batch_size}: with a single response in the micro-batch the reward cancels out of Zhat; use 2 or more, or --estimator constant")
    loss = LOSSES[args.loss]
    if loss.responses in ("pairs", "labelled") and args.responses not in (None, loss.responses):
        parser.error(f"--responses {args.responses}: --loss {args.loss} takes {loss.responses}, and nothing else")
    if loss.responses in ("pairs", "labelled") and args.partners == "group":
        parser.error(f"--partners group: for --loss {args.loss}, rows of a micro-batch come from any prompts; leave it out")
    if loss.mismatched and args.batch_size < 2:
        parser.error(f"--batch_size {args.batch_size}: --loss {args.loss} estimates its KL from mismatched pairs of the micro-batch; use 2 or more")
    if args.label_smoothing >= 0.5:
        parser.error(f"--label_smoothing {args.label_smoothing}: from 0.5 on, the rejected response would be preferred; use less")
    if loss.reward_model and args.reward_model is None:
        parser.error(f"--reward_model is missing: --loss {args.loss} scores the reference's own samples")
    own = {flag for other in LOSSES.values() for flag in other.reads.split()} - set(loss.reads.split())
    args.not_read = sorted(flag for flag in own if getattr(args, flag) != parser.get_default(flag))
    args.beta = args.beta if args.beta is not None else loss.beta
    args.output_dir = args.output_dir or f"runs/{args.loss}"
    has_adapter = check_adapter(parser, args)
    if args.merge and not has_adapter:
        parser.error("--merge: there is no adapter to merge; add --lora_rank R")
    if args.loss == "var" and args.reward_model is None and args.estimator != "constant" and args.partners != "group":
        parser.error("--reward_model is missing (scores in the data can replace it with --estimator constant or --partners group)")
    return args


# fmt: on


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is loaded: --help and typing errors answer at once

import math
import re
import shutil
import time
from pathlib import Path

import accelerate
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from eval.files import read_jsonl, versions, write_json, write_jsonl
from eval.generate import generate_rows
from eval.reward import sigmoid100
from model import (
    adamw,
    adapter_base,
    check_master_weights,
    check_reward_model,
    fingerprint,
    keep_only_adapter_in_state_dict,
    load_policy,
    load_reward_model,
    lr_at,
    make_accelerator,
    merge_adapter,
    save_model,
    sequence_logps,
    without_exchange,
)
from reward import bind_scores, score
from tables import build_tables, eval_path, plan_fingerprint, summary, weights_at_a_glance
from var import log_weights, weights_from_log

# ----------------------------------------------------------------------------------------------------------------------
# Look before the first step


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


class RunFiles:
    """The folder a run leaves: run.json, metrics.jsonl, checkpoints/. Every process calls every method. Also used by baselines/grpo.py.

    InputError at once if OUT holds a run, unless --resume, or a model that is no run's.
    """

    def __init__(self, accelerator, out, args):
        self.accelerator, self.out, self.args, self.about = accelerator, out, args, {}
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file; --output_dir names a folder")
        if any((out / name).exists() for name in ("config.json", "adapter_config.json")) and not (out / "run.json").exists():
            raise InputError(f"{out}: already holds a model, which this run would replace; choose another --output_dir")
        if (out / "run.json").exists() and not args.resume:
            raise InputError(f"{out}: already holds a run; --resume continues it, another --output_dir starts a new one")

    def finished(self, about):
        """True if OUT holds this run, done. `about`: what the run depends on besides flags and versions. InputError: OUT holds a run of other settings."""
        packages = versions("torch", "transformers", "accelerate")
        self.about = {"args": vars(self.args), "versions": packages, "processes": self.accelerator.num_processes} | about
        if not (self.out / "run.json").exists():
            return False
        found = json.loads((self.out / "run.json").read_text())
        free = {"resume", "keep", "save_every", "tracker", "output_dir", "tables"}  # these may differ from the first start
        old, new = ({**run["args"], **run["models"], "plan": run["plan"], "--num_processes": run["processes"]} for run in (found, self.about))
        if differs := [f"{k}: {old.get(k)} there, {new.get(k)} now" for k in old | new if k not in free and old.get(k) != new.get(k)]:
            raise InputError(f"{self.out}: --resume with other settings ({'; '.join(differs)}); use the old ones or another --output_dir")
        return found.get("finished", False)

    def begin(self):
        """Load the last checkpoint, if there is one, and open the files -> the step to begin with."""
        first_step = broadcast_object_list([max(list_checkpoints(self.out), default=0)])[0]  # one process's answer: disks of nodes can lag
        if first_step:
            self.accelerator.load_state(self.out / "checkpoints" / f"step_{first_step}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if first_step:
                print(f"resuming after step {first_step}")
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "run.json", self.about)
            old = read_jsonl(self.out / "metrics.jsonl", torn_end=True) if first_step else []
            write_jsonl(self.out / "metrics.jsonl", [row for row in old if row["step"] <= first_step])
        if self.args.tracker:
            config = {k: v for k, v in vars(self.args).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("var", config=config)
        return first_step

    def log(self, step, metrics):
        if self.accelerator.is_main_process:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.accelerator.log(metrics, step=step)

    def check_finite(self, step, metrics):
        """InputError unless loss and gradient norm of this step are numbers."""
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise InputError(
                f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; the last checkpoint is kept. A smaller --lr, or --dtype float32, usually helps"
            )

    def save_checkpoint(self, step):
        """State of step `step` under its final name only once it is whole; then the oldest beyond --keep go."""
        folder = self.out / "checkpoints"
        self.accelerator.save_state(folder / f".step_{step}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(folder / f".step_{step}", folder / f"step_{step}")
            for old in list_checkpoints(self.out)[: -self.args.keep]:
                shutil.rmtree(folder / f"step_{old}")
        self.accelerator.wait_for_everyone()

    def finish(self):
        """The last thing a run does: only now does run.json say that it is finished."""
        if self.accelerator.is_main_process:
            write_json(self.out / "run.json", self.about | {"finished": True})
            print(f"{self.out}: done, opens with AutoModelForCausalLM.from_pretrained({str(self.out)!r})")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def list_checkpoints(out):
    found = (re.fullmatch(r"step_(\d+)", path.name) for path in (out / "checkpoints").glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


# ----------------------------------------------------------------------------------------------------------------------
# One micro-batch


def forward(model, loss, plan, tables, m, args, tokenizer, accelerator):
    """Loss of micro-batch m, and its metrics: {name: values (n,)}."""
    examples = [plan.examples[i] for i in plan.batches[m]]

    def logps_of(some):
        return sequence_logps(model, **{k: v.to(accelerator.device, non_blocking=True) for k, v in collate(some, pad_id(tokenizer)).items()})

    with torch.no_grad():  # before the forward with gradient: nothing may come between that and its backward (DDP, FSDP)
        mismatched_logps = logps_of(mismatched(examples)) if loss.mismatched else None
    policy_logps = logps_of(examples)  # (K,)  Algorithm 1 line 2
    ref_logps_as = args.ref_logps if args.loss == "var" else "sum"
    rewards, ref_logps = (t.to(accelerator.device) for t in tables.micro_batch(m, ref_logps_as)) if tables else (None, None)  # (K, K), lines 3-4
    mean = lambda t: accelerator.reduce(t, "mean")
    value, metrics = loss.compute(Batch(examples, policy_logps, rewards, ref_logps, mismatched_logps, mean), args)  # lines 5-8
    return value, {"loss": value.detach().expand(len(examples)), "policy_logps": policy_logps.detach()} | metrics


def reduce_metrics(accelerator, micro_batches, scale):
    """Metrics of this process's micro-batches -> their means over all values of all processes (.../max: the largest). The loss is divided by scale."""
    columns = {name: torch.cat([one[name] for one in micro_batches]).float() for name in micro_batches[0]}
    some = {name: len(values) > 0 for name, values in columns.items()}
    totals = [(values.max() if name.endswith("/max") else values.sum()) if some[name] else values.new_tensor(0.0) for name, values in columns.items()]
    mine = torch.stack([torch.stack(totals), totals[0].new_tensor([len(values) for values in columns.values()])])  # (2, names)
    table, metrics = accelerator.gather(mine[None]), {}  # (P, 2, names)
    for n, name in enumerate(columns):
        total, count = table[:, 0, n], table[:, 1, n]
        if count.sum() > 0:  # a step may hold no undesirable response, say
            metrics[name] = (total[count > 0].max() if name.endswith("/max") else total.sum() / count.sum()).item()
    return metrics | {"loss": metrics["loss"] / scale}


@torch.no_grad()
def evaluate(accelerator, model, loss, plan, tables, args, tokenizer, scale):
    """Loss on the held-out micro-batches, shared out among the processes. Leaves training's random state as it was."""
    P, found = accelerator.num_processes, []
    model.eval()
    for start in range(0, len(plan.batches), P):  # every process runs equally often, or FSDP would wait forever
        m = start + accelerator.process_index
        one = forward(model, loss, plan, tables, m % len(plan.batches), args, tokenizer, accelerator)[1]
        found.append(one if m < len(plan.batches) else {name: values[:0] for name, values in one.items()})
    model.train()
    return {f"eval/{name}": value for name, value in reduce_metrics(accelerator, found, scale).items()}


def score_evaluations(out, reward_tokenizer, args, device):
    """eval/step_*.jsonl -> eval/rewards.jsonl: step, mean reward and 100*sigmoid of the held-out generations (Figure 2)."""
    model = load_reward_model(args.reward_model, args.reward_dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit)
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
    accelerator = make_accelerator(args.tracker, args.output_dir, args.model)
    P, main_process, device = accelerator.num_processes, accelerator.is_main_process, accelerator.device
    say = print if main_process else lambda *_: None
    loss, accum = LOSSES[args.loss], args.accum or P
    if accum % P:
        raise InputError(f"--accum {accum} micro-batches cannot be shared out evenly among {P} processes; use a multiple of {P}")
    if args.ref_model:
        check_model_name(args.ref_model)
    if args.reward_model:
        check_reward_model(args.reward_model, args.trust_remote_code)

    if args.not_read:
        say(f"note: --loss {args.loss} does not read {', '.join('--' + flag for flag in args.not_read)}")
    files = RunFiles(accelerator, out, args)

    # Data and plan. Nothing but tokenizers is loaded yet, so faults of the data cost no time.
    mode, weight_column = args.responses or loss.responses, args.weight_column if args.loss == "wsft" else None
    tokenizer, reward_tokenizer, plan, eval_plan = load_plan(args, mode, main_process, loss.pairs, weight_column)
    if args.loss == "alol":
        from baselines.alol import keep_advantageous

        plan = keep_advantageous(plan, eval_plan, accelerator, tokenizer, reward_tokenizer, args, out / "advantages.json")
    if args.loss == "wsft" and (negative := sum(e.weight < 0 for e in plan.examples)):
        say(f"warning: {negative:,} of {len(plan.examples):,} weights are negative: the loss falls without bound as these responses become "
              "impossible (PAPER.md, Eq. 12)")  # fmt: skip
    M = len(plan.batches)
    total_steps = args.max_steps or math.ceil(args.epochs * M / accum)
    needed = {m for step in range(total_steps) for m in step_micro_batches(step, accum, M, args.seed)}
    mean_response_tokens = sum(len(e.response_ids) for e in plan.examples) / len(plan.examples)
    scale = mean_response_tokens if loss.per_token else 1.0  # departure 1
    eval_every = args.eval_every or max(1, total_steps // 5) if eval_plan else 0
    say(f"{total_steps:,} optimizer steps x {accum} micro-batches x B = {args.batch_size}, on {P} process(es), {device}")
    models = {name: fingerprint(name) for name in {args.model, args.ref_model, args.reward_model} - {None}}
    about = {"models": models, "plan": plan_fingerprint(plan), "device": str(device), "steps": total_steps, "accum": accum, "eval_every": eval_every}
    if files.finished(about | {"mean_response_tokens": mean_response_tokens}):
        return say(f"{out}: this run is finished")

    # Tables: Algorithm 1 lines 3-5, measured once. Reference and reward model are gone afterwards.
    tables = eval_tables = None
    if wanted := loss.tables(args):
        path, clock = args.tables or str(out / "tables.safetensors"), time.perf_counter()
        tables = build_tables(path, plan, wanted, needed, accelerator, tokenizer, reward_tokenizer, args)
        if eval_plan:
            every = range(len(eval_plan.batches))
            eval_tables = build_tables(eval_path(path), eval_plan, wanted, every, accelerator, tokenizer, reward_tokenizer, args)
        files.about["table_seconds"] = time.perf_counter() - clock
        if args.loss == "var":
            say(summary(tables, needed, args.ref_logps, args.estimator))
            check_weights(tables, needed, args, say)

    # Model, optimizer, and where a killed run had got to
    accelerate.utils.set_seed(args.seed)
    model = load_policy(args.model, args.dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit, args.lora_rank, sharded=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter = args.lora_rank or adapter_base(args.model)
    if adapter:
        say(f"training an adapter: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} weights")
    model, optimizer = accelerator.prepare(model, adamw(model, args.lr, args.weight_decay))
    if adapter:
        keep_only_adapter_in_state_dict(accelerator.unwrap_model(model))
    check_master_weights(optimizer, args.dtype)
    first_step = files.begin()

    def evaluate_at(step):
        numbers = evaluate(accelerator, model, loss, eval_plan, eval_tables, args, tokenizer, scale)
        if args.eval_prompts:  # all processes draw the same texts together: under FSDP no process has a model of its own
            prompts = {e.prompt_key: e.messages for e in eval_plan.examples}  # numbered as prompts, so that every --loss draws the same streams
            items = {key: {"id": f"{n}", "subset": "held out", "prompt": prompt} for n, (key, prompt) in enumerate(prompts.items())}
            some, limits = list(items.values())[: args.eval_prompts], (args.max_prompt_tokens, args.max_response_tokens)
            rows = list(generate_rows(accelerator.unwrap_model(model), tokenizer, some, [args.seed], *limits, progress=False))
            if main_process:
                (out / "eval").mkdir(exist_ok=True)
                write_jsonl(out / "eval" / f"step_{step}.jsonl", rows)
        return numbers

    # The loop
    if eval_every and not first_step:
        files.log(0, evaluate_at(0))
    steps = range(first_step, total_steps)
    bar = tqdm(steps, initial=first_step, total=total_steps, desc=args.loss, disable=not main_process, mininterval=1.0)
    for step in bar:
        start = time.perf_counter()
        micro_batches = step_micro_batches(step, accum, M, args.seed)  # of all processes; the same list everywhere
        rows_of_step = sum(len(plan.batches[m]) for m in micro_batches)
        tokens = sum(len(e.prompt_ids) + len(e.response_ids) for m in micro_batches for e in (plan.examples[i] for i in plan.batches[m]))
        mine, found = micro_batches[accelerator.process_index :: P], []
        for k, m in enumerate(mine):
            with without_exchange(accelerator, model, last=k == len(mine) - 1):
                value, metrics = forward(model, loss, plan, tables, m, args, tokenizer, accelerator)
                # `value` is a mean over the micro-batch's rows; the step is the mean over all rows of all processes, whose gradients DDP averages
                share = len(plan.batches[m]) * P / rows_of_step
                accelerator.backward(value * share / scale)
            found.append(metrics)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        lr = lr_at(step, total_steps, math.ceil(args.warmup_ratio * total_steps), args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = {"rows": rows_of_step} | reduce_metrics(accelerator, found, scale)
        metrics |= {"lr": lr, "grad_norm": float(grad_norm), "seconds": time.perf_counter() - start}
        metrics["tokens_per_second"] = tokens / metrics["seconds"]
        files.check_finite(step, metrics)
        if eval_every and ((step + 1) % eval_every == 0 or step + 1 == total_steps):
            metrics |= evaluate_at(step + 1)
        files.log(step + 1, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < total_steps:
            files.save_checkpoint(step + 1)  # last, so that resuming never has to look back

    # Save, then score what was generated along the way (Figure 2); the reward model is loaded once, after training
    state = accelerator.get_state_dict(model)
    if main_process:
        save_model(accelerator.unwrap_model(model, keep_fp32_wrapper=False), tokenizer, out, state)
        if args.merge:
            merge_adapter(out, tokenizer, out / "merged", args.dtype, args.trust_remote_code)
    model, optimizer = accelerator.free_memory(model, optimizer)
    if main_process and reward_tokenizer and (out / "eval").exists():
        score_evaluations(out, reward_tokenizer, args, device)
    files.finish()


if __name__ == "__main__":
    run(lambda: main(ARGS))
