"""
GRPO (paper Table 4; its objective is PPO's, Eq. 11): the online method that VAR is five times as fast as, says the paper.

    python baselines/grpo.py --model DIR --reward_model DIR --data FILE --output_dir runs/grpo
    python baselines/grpo.py --model DIR --reward_function FILE.py:NAME --data FILE          # any Python function (messages, response) -> number

One step, top to bottom in `main`:
    1. sample    K responses to each of G prompts from the policy itself
    2. reward    r(x, y) of all G*K
    3. advantage A = (r - mean of its group) / (std of its group + 1e-4)
    4. update    --inner_steps times: minimise -mean_sequences mean_tokens min(ratio A, clip(ratio, 1-eps, 1+eps) A)  [+ kl_coef KL]

It has the output folder, metrics.jsonl, checkpoints and --resume of train.py. Sampling is most of its time, and `time/sampling_share` says how much.

Shapes. n = sequences, T = tokens of the longest; logps (n, T) in nats per token, 0 where `mask` is 0.

Choices that Eq. 11 leaves open, and departures:
1. Sign. Eq. 11 is printed as an objective to maximise; `grpo_loss` returns its negative. Its advantage A_t is the same for all tokens of a sequence.
2. Mean over a sequence's tokens first (the 1/|o| of Eq. 11), then over sequences. Other trainers divide by all tokens of the batch.
3. The KL to the reference is off by default (--kl_coef 0); the estimate is k3 = e^d - d - 1 with d = log pi_ref - log pi_theta, never below 0.
4. Samples are drawn at temperature 1 without top-p and top-k: from pi_old itself, or the ratio would not be 1 at the first inner step.
5. The paper does not give its GRPO settings; the defaults are ours.
Every process holds a whole policy and whole groups (data parallel). FSDP is refused: generating from a sharded model needs all of it anyway.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a program: the modules lie one folder up

from data import add_loading_flags, check_adapter, check_bounds, check_model_name, collate, encode_records, load_tokenizer, pad_id, step_micro_batches
from formats import InputError, Unusable, run


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train a policy with GRPO: sample, score, normalise within the group, clipped update.")
    add = parser.add_argument_group("what").add_argument
    add("--model", required=True, help="the policy to train, folder or hub name")
    add("--ref_model", help="the reference of the KL, used with --kl_coef (default: --model before any update)")
    add("--reward_model", help="r(x, y): a one-label sequence classifier, folder or hub name")
    add("--reward_function", metavar="FILE.py:NAME", help="instead: a Python function of (messages, response) that returns a number")
    add("--data", nargs="+", required=True, metavar="SOURCE", help="where the prompts come from: anything train.py reads; responses in it are not used")
    add("--split", default="train", help="split of a hub dataset or a saved DatasetDict (default: %(default)s)")
    add("--eval_data", nargs="+", default=[], metavar="SOURCE", help="prompts to answer and score along the way")
    add("--output_dir", default="runs/grpo", help="where everything is written (default: %(default)s)")
    add("--max_prompt_tokens", type=int, default=512, metavar="N", help="longer prompts are cut from the left (default: %(default)s)")
    add("--max_response_tokens", type=int, default=512, metavar="N", help="samples end here at the latest (default: %(default)s)")
    add = parser.add_argument_group("GRPO").add_argument
    add("--prompts", type=int, default=8, metavar="G", help="prompts per batch of samples, over all processes (default: %(default)s)")
    add("--samples", type=int, default=8, metavar="K", help="responses per prompt: the group (default: %(default)s)")
    add("--inner_steps", type=int, default=1, metavar="N", help="optimizer steps on each batch of samples (default: %(default)s)")
    add("--micro_batch", type=int, default=8, metavar="N", help="sequences per forward and backward; changes memory, not the result (default: %(default)s)")
    add("--clip", type=float, default=0.2, metavar="E", help="the ratio is clipped to [1-E, 1+E] (default: %(default)s)")
    add("--kl_coef", type=float, default=0.0, help="weight of the KL to the reference, which is loaded only then (default: %(default)s)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=1e-6, help="peak learning rate of AdamW (default: %(default)s)")
    add("--epochs", type=float, default=1.0, help="passes over the prompts (default: %(default)s)")
    add("--max_steps", type=int, metavar="N", help="stop after N optimizer steps (default: as many as --epochs needs)")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps with rising rate; then a cosine to zero (default: %(default)s)")
    add("--weight_decay", type=float, default=0.0, help="of AdamW, matrices only (default: %(default)s)")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm (default: %(default)s)")
    add("--gradient_checkpointing", action="store_true", help="keep one activation per layer and compute the others again")
    add("--lora_rank", type=int, metavar="R", help="train an adapter of this rank on all linear layers instead of the weights")
    add("--seed", type=int, default=0, help="order of the prompts, samples (default: %(default)s)")
    add = parser.add_argument_group("along the way").add_argument
    add("--eval_every", type=int, metavar="N", help="answer and score --eval_data every N batches of samples (default: five times a run)")
    add("--eval_prompts", type=int, default=32, metavar="N", help="how many of its prompts (default: %(default)s)")
    add("--save_every", type=int, default=100, metavar="N", help="batches of samples between checkpoints for --resume; 0 = none (default: %(default)s)")
    add("--keep", type=int, default=1, metavar="N", help="how many checkpoints stay on disk (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR (or from the start if there is none)")
    add("--tracker", metavar="NAME", help="also log to tensorboard, wandb or another tracker accelerate knows")
    add_loading_flags(parser)
    args = parser.parse_args(argv)
    if (args.reward_model is None) == (args.reward_function is None):
        parser.error("one of --reward_model and --reward_function is needed, and not both")
    above_zero = "lora_rank prompts inner_steps micro_batch lr epochs max_steps max_grad_norm eval_every eval_prompts keep max_prompt_tokens max_response_tokens max_reward_tokens"
    from_zero = "clip kl_coef warmup_ratio weight_decay save_every seed"
    check_bounds(parser, args, above_zero.split(), from_zero.split())
    check_adapter(parser, args)
    if args.samples < 2:
        parser.error(f"--samples {args.samples}: a group of one has no spread, so its advantage is always 0; use 2 or more")
    if args.eval_every and not args.eval_data:
        parser.error(f"--eval_every {args.eval_every}: there is no --eval_data")
    return args


# fmt: on


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is loaded: --help and typing errors answer at once

import hashlib
import importlib.util
import json
import math
import time
from array import array

import accelerate
import torch
from tqdm import tqdm

from data import Example, plan_micro_batches
from eval.files import write_jsonl
from eval.generate import generate_rows, read_prompts
from eval.sampling import generate_responses
from model import adamw, adapter_base, check_reward_model, fingerprint, keep_only_adapter_in_state_dict, load_policy, load_reward_model, lr_at, make_accelerator, save_model, token_logps, without_exchange  # fmt: skip
from reward import bind_scores, score
from train import RunFiles

# ----------------------------------------------------------------------------------------------------------------------
# Eq. 11


def group_advantages(rewards):
    """(G, K) -> (G, K): (r - mean) / (std + 1e-4) over the K samples of a prompt, std with ddof = 1. A group of equal rewards gives zeros."""
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)


def grpo_loss(policy_logps, old_logps, advantages, mask, clip, ref_logps=None, kl_coef=0.0):
    """Eq. 11 negated, (n, T), (n, T), (n,), (n, T) -> (): mean over a sequence's tokens, then over sequences.

    mask is 1 on response tokens; every row has at least one. With kl_coef, ref_logps (n, T) is needed.
    """
    ratio = (policy_logps - old_logps).exp()  # (n, T)
    A = advantages[:, None]  # (n, 1)
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)  # (n, T)  what Eq. 11 maximises
    if kl_coef:
        objective = objective - kl_coef * k3(policy_logps, ref_logps)
    return -((objective * mask).sum(dim=1) / mask.sum(dim=1)).mean()  # the sign flips here


def k3(policy_logps, ref_logps):
    """An estimate of KL(pi_theta, pi_ref) per token from samples of pi_theta: e^d - d - 1 >= 0, d = log pi_ref - log pi_theta."""
    d = ref_logps - policy_logps
    return d.exp() - d - 1


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


def load_reward(args, reward_tokenizer, device):
    """-> function of [(messages, response), ...] that gives a list of numbers. InputError: no such function, a number that is none."""
    if args.reward_model:
        model = load_reward_model(args.reward_model, args.reward_dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit)
        model = bind_scores(model.to(device))
        return lambda texts: score(model, reward_tokenizer, texts, max_tokens=args.max_reward_tokens, progress=False)
    path, _, name = args.reward_function.rpartition(":")
    spec = importlib.util.spec_from_file_location("reward_function", path) if path.endswith(".py") and Path(path).exists() else None
    if spec is None:
        raise InputError(f"--reward_function {args.reward_function}: no such file; write FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise InputError(f"--reward_function: {path} has no function {name!r}")

    def rewards(texts):
        values = [function(messages, response) for messages, response in texts]
        for value, (_, response) in zip(values, texts):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"--reward_function {name} returned {value!r} for the response {response[:60]!r}; it must return a finite number")
        return values

    return rewards


# ----------------------------------------------------------------------------------------------------------------------
# The program


def main(args):
    out = Path(args.output_dir)
    accelerator = make_accelerator(args.tracker, args.output_dir, args.model)
    P, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    say = print if accelerator.is_main_process else lambda *_: None
    files = RunFiles(accelerator, out, args)
    if accelerator.distributed_type == accelerate.DistributedType.FSDP:
        raise InputError("GRPO samples from the policy at every step, which a model sharded by FSDP cannot do alone; launch without FSDP")
    if args.prompts % P:
        raise InputError(f"--prompts {args.prompts} cannot be shared out evenly among {P} processes; use a multiple of {P}")
    for name in filter(None, (args.model, args.ref_model)):
        check_model_name(name)
    if args.reward_model:
        check_reward_model(args.reward_model, args.trust_remote_code)

    # Prompts, their order, and what the run depends on
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    reward_tokenizer = load_tokenizer(args.reward_model, args.trust_remote_code) if args.reward_model else None
    items = read_prompts(args.data, tokenizer, args.split)
    encoded = encode_records(tokenizer, [(item["prompt"], ["x"]) for item in items], args.max_prompt_tokens, args.max_response_tokens)
    prompts = [(item["prompt"], ids[0]) for item, ids in zip(items, encoded) if not isinstance(ids, Unusable)]
    if len(prompts) < args.prompts:
        raise InputError(f"--prompts {args.prompts} is more than the {len(prompts)} different prompts there are; lower it or add data")
    eval_items = read_prompts(args.eval_data, tokenizer, args.split, args.eval_prompts)
    batches, _ = plan_micro_batches(prompts, args.prompts, seed=args.seed)
    total_steps = args.max_steps or math.ceil(args.epochs * len(batches)) * args.inner_steps
    eval_every = (args.eval_every or max(1, total_steps // args.inner_steps // 5)) if eval_items else 0
    say(f"{len(prompts):,} prompts; {total_steps:,} optimizer steps, {args.inner_steps} on each {args.prompts} prompts x {args.samples} samples, on {P} process(es), {device}")
    plan_id = hashlib.sha256(str([[prompts[i] for i in batch] for batch in batches]).encode()).hexdigest()[:16]
    models = {name: fingerprint(name) for name in {args.model, args.ref_model, args.reward_model} - {None}}
    if files.finished({"models": models, "plan": plan_id, "steps": total_steps, "device": str(device)}):
        return say(f"{out}: this run is finished")

    # Models. The reward model stays in memory; the reference is there only for a KL.
    accelerate.utils.set_seed(args.seed)
    load = lambda name, rank=None: load_policy(name, args.dtype, args.attn_implementation, args.trust_remote_code, args.load_in_4bit, rank)
    reference = load(args.ref_model or args.model).eval().requires_grad_(False).to(device) if args.kl_coef else None
    reward = load_reward(args, reward_tokenizer, device)
    policy = load(args.model, args.lora_rank)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(policy, adamw(policy, args.lr, args.weight_decay))
    if args.lora_rank or adapter_base(args.model):
        keep_only_adapter_in_state_dict(accelerator.unwrap_model(model))
    first_step = files.begin()

    def evaluate_at(step):
        rows = list(generate_rows(policy, tokenizer, eval_items, [args.seed], args.max_prompt_tokens, args.max_response_tokens, progress=False))
        rewards = reward([(row["prompt"], row["response"]) for row in rows])
        (out / "eval").mkdir(exist_ok=True)
        write_jsonl(out / "eval" / f"step_{step}.jsonl", [row | {"reward": r} for row, r in zip(rows, rewards)])
        return {"eval/reward": sum(rewards) / len(rewards), "eval/response_tokens": sum(row["response_tokens"] for row in rows) / len(rows)}

    if eval_every and not first_step:
        files.log(0, evaluate_at(0) if accelerator.is_main_process else {})

    # The loop: a batch of samples, then inner steps on it
    bar = tqdm(total=total_steps, initial=first_step, desc="grpo", disable=not accelerator.is_main_process, mininterval=1.0)
    for first in range(first_step, total_steps, args.inner_steps):
        clock = {"start": time.perf_counter()}
        (batch,) = step_micro_batches(first // args.inner_steps, 1, len(batches), args.seed)
        mine = [prompts[i] for i in batches[batch][rank::P]]  # whole groups, so that each is normalised in one place
        n = len(mine) * args.samples

        # 1. sample: K rows per prompt, one random stream per row, whatever the process
        rows = [(messages, ids) for messages, ids in mine for _ in range(args.samples)]
        places = [i for i in range(rank, args.prompts, P) for _ in range(args.samples)]
        seeds = [hash((args.seed, first, place, k % args.samples)) % 2**60 for k, place in enumerate(places)]
        with torch.no_grad(), accelerator.autocast():
            samples = generate_responses(policy, tokenizer, [ids for _, ids in rows], seeds, args.max_response_tokens, 1.0, 1.0, 0)
        texts = [tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True) for ids, finished in samples]
        clock["sampling"] = time.perf_counter()

        # 2. reward, 3. advantage
        rewards = torch.tensor(reward([(messages, text) for (messages, _), text in zip(rows, texts)]), dtype=torch.float32)
        rewards = rewards.view(len(mine), args.samples)  # (G/P, K)
        advantages = group_advantages(rewards).flatten().to(device)  # (n,)
        clock["rewards"] = time.perf_counter()

        # 4. update
        examples = [Example(array("i", ids), array("i", sampled), [], "", None, "") for (_, ids), (sampled, _) in zip(rows, samples)]
        parts = [range(i, min(i + args.micro_batch, n)) for i in range(0, n, args.micro_batch)]
        tensors = [{k: v.to(device) for k, v in collate([examples[i] for i in part], pad_id(tokenizer)).items()} for part in parts]
        masks = [t["response_mask"][:, 1:] for t in tensors]  # (n, T): column t-1 belongs to token t
        with torch.no_grad():
            ref_logps = [token_logps(reference, **t) if reference else None for t in tensors]
            old_logps = [token_logps(model, **t) for t in tensors] if args.inner_steps > 1 else [None] * len(tensors)
        for step in range(first, min(first + args.inner_steps, total_steps)):
            loss_sum, clipped, kl = 0.0, 0.0, 0.0
            for k, (part, t, mask, old, ref) in enumerate(zip(parts, tensors, masks, old_logps, ref_logps)):
                with without_exchange(accelerator, model, last=k == len(parts) - 1):
                    logps = token_logps(model, **t)  # (n, T)
                    old = logps.detach() if old is None else old  # one inner step: pi_old is pi_theta
                    loss = grpo_loss(logps, old, advantages[part], mask, args.clip, ref, args.kl_coef)
                    accelerator.backward(loss * len(part) / n)
                share = (mask / mask.sum(dim=1, keepdim=True) / n).to(logps.dtype)  # sums to 1 over all parts
                loss_sum += loss.detach() * len(part) / n
                clipped += ((((logps - old).exp() - 1).abs() > args.clip) * share).sum()
                kl += (k3(logps.detach(), ref) * share).sum() if ref is not None else 0.0
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total_steps, math.ceil(args.warmup_ratio * total_steps), args.lr)
            optimizer.step()
            optimizer.zero_grad()

            tokens = sum(len(ids) for ids, _ in samples)
            clock["update"] = time.perf_counter()
            numbers = {
                "loss": loss_sum, "reward": rewards.mean(), "reward_std": rewards.std(dim=1).mean(), "groups/constant": (rewards.std(dim=1) == 0).float().mean(),
                "response_tokens": tokens / n, "finished": sum(f for _, f in samples) / n, "clipped": clipped, **({"kl": kl} if args.kl_coef else {}),
                "time/sampling": clock["sampling"] - clock["start"], "time/rewards": clock["rewards"] - clock["sampling"], "time/update": clock["update"] - clock["rewards"], "time/total": clock["update"] - clock["start"],
            }  # fmt: skip
            means = accelerator.reduce(torch.tensor([float(v) for v in numbers.values()], device=device), "mean").tolist()
            metrics = dict(zip(numbers, means)) | {"grad_norm": float(grad_norm), "lr": optimizer.param_groups[0]["lr"]}
            metrics["time/sampling_share"] = metrics["time/sampling"] / metrics["time/total"]
            files.check_finite(step, metrics)
            done = step + 1 == total_steps or step + 1 == first + args.inner_steps
            batch_number = first // args.inner_steps + 1
            if done and eval_every and (batch_number % eval_every == 0 or step + 1 == total_steps) and accelerator.is_main_process:
                metrics |= evaluate_at(step + 1)
            files.log(step + 1, metrics)
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", refresh=False)
        if args.save_every and batch_number % args.save_every == 0 and step + 1 < total_steps:
            files.save_checkpoint(step + 1)  # only between batches of samples: a resumed run samples the next one anew
    bar.close()
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(model, keep_fp32_wrapper=False), tokenizer, out)
        rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
        last = [row for row in rows if row["step"] and (row["step"] % args.inner_steps == 0 or row["step"] == total_steps)]  # of each batch of samples
        total, sampling = (sum(row[name] for row in last) for name in ("time/total", "time/sampling"))
        say(f"{total:.0f} s, of which sampling {100 * sampling / total:.0f} %")
    files.finish()


if __name__ == "__main__":
    run(lambda: main(ARGS))
