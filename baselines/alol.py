"""
A-LoL's advantages, offline (Eq. 5): A(x, y) = r(x, y) - V(x), where V(x) is what the reference itself can expect on x.

    1. the reference answers --value_prompts training prompts, one sample each, y ~ pi_ref(.|x)
    2. r = sigmoid(logit of the reward model), of these samples and of every response in the data
    3. V(x) = sigmoid(w . s(x) + b), fitted to the samples' rewards by least squares; s(x) = the reference's last hidden states over the
       prompt, their mean and the last one, standardised. A fifth of the samples is held out: it says when to stop
    4. training examples with A <= 0 are left out; the loss multiplies the others by A

s(x) of a prompt is computed without padding and dropout, so V does not depend on which prompts share a batch. Everything is written to
OUT/advantages.json, which a resumed run reads. train.py --loss alol calls `keep_advantageous`; the loss itself is in losses.py.

Departures from A-LoL's own code: the prompt is pooled by mean and last state instead of a learned attention; samples are drawn at
temperature 1 (V is an expectation under pi_ref) instead of greedily; left-out examples are gone, not sampled with weight 0.
"""

import json
import math

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from data import make_plan
from eval.files import write_json
from eval.sampling import generate_responses
from formats import InputError
from model import fingerprint, load_policy, load_reward_model, release, without_adapter_wrapper
from reward import bind_scores, score
from tables import plan_fingerprint


def keep_advantageous(plan, eval_plan, accelerator, tokenizer, reward_tokenizer, args, file):
    """A(x, y) of every example becomes its `weight`; -> a plan of the training examples with A > 0. InputError: there is none.

    The held-out plan keeps all its examples: below 0 they count nothing in its loss.
    """
    examples = plan.examples + (eval_plan.examples if eval_plan else [])
    names = ("seed", "value_prompts", "dtype", "load_in_4bit", "reward_dtype", "max_prompt_tokens", "max_response_tokens", "max_reward_tokens")
    depends_on = {name: getattr(args, name) for name in names} | {"plan": plan_fingerprint(plan), "examples": len(examples)}
    depends_on |= {"ref_model": fingerprint(args.ref_model or args.model), "reward_model": fingerprint(args.reward_model)}
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get("depends_on") != depends_on:
        fit, rewards, values = measure(examples, len(plan.examples), accelerator, tokenizer, reward_tokenizer, args)
        rows = [{"where": e.where, "reward": r, "value": v, "advantage": r - v} for e, r, v in zip(examples, rewards, values)]
        found = {"depends_on": depends_on, "value_head": fit, "rows": rows}
        if accelerator.is_main_process:
            write_json(file, found)
        accelerator.wait_for_everyone()
    for example, row in zip(examples, found["rows"]):
        example.weight = row["advantage"]
    kept = [e for e in plan.examples if e.weight > 0]
    if accelerator.is_main_process:
        fit = found["value_head"]
        print(
            f"V(x) from {fit['samples']:,} samples of the reference: mean reward {fit['mean_reward']:.3f}, squared error on held-out samples "
            f"{fit['held_out_error']:.4f}, of a constant {fit['held_out_error_of_a_constant']:.4f}"
        )
        print(f"{len(kept):,} examples have an advantage above 0; {len(plan.examples) - len(kept):,} others are left out (A-LoL)")
    if not kept:
        best = max(row["advantage"] for row in found["rows"][: len(plan.examples)])
        raise InputError(
            f"--loss alol: no example has an advantage above 0 (the best: {best:.3g}): the reference expects more than every response of "
            "the data gets. Train from a weaker reference (before SFT), take --responses best, or use --loss rlol, which needs no advantage"
        )
    return make_plan(kept, args, plan.settings["responses"], name="training" if accelerator.is_main_process else None)


def measure(examples, training, accelerator, tokenizer, reward_tokenizer, args):
    """-> what is known of the fit, then r and V of every example. Every process does its share; all return the same."""
    P, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    bar = {"disable": not accelerator.is_main_process, "mininterval": 1.0}
    prompts = {e.prompt_ids.tobytes(): e for e in examples}  # one example per distinct prompt
    mine = list(prompts.values())[rank::P]
    of_training = list({e.prompt_ids.tobytes(): e for e in examples[:training]}.values())
    every = max(1, len(of_training) // args.value_prompts)
    asked = of_training[::every][: args.value_prompts]  # spread over the data, whose order may mean something
    place = {e.prompt_ids.tobytes(): n for n, e in enumerate(asked)}
    my_asked = [(n, e) for n, e in enumerate(mine) if e.prompt_ids.tobytes() in place]

    loading = (args.attn_implementation, args.trust_remote_code, args.load_in_4bit)
    model = load_policy(args.ref_model or args.model, args.dtype, *loading).eval().to(device)
    samples = []
    with torch.no_grad(), accelerator.autocast():
        states = [prompt_state(model, e.prompt_ids) for e in tqdm(mine, desc="prompt states", **bar)]  # (2D,) each
        for start in tqdm(range(0, len(my_asked), 16), desc="samples of the reference", **bar):
            some = [e for _, e in my_asked[start : start + 16]]
            seeds = [args.seed * 2**20 + place[e.prompt_ids.tobytes()] for e in some]
            limits = (args.max_response_tokens, 1.0, 1.0, 0)  # tokens, temperature, top_p, top_k: pi_ref itself
            ids = generate_responses(model, tokenizer, [e.prompt_ids for e in some], seeds, *limits)
            samples += [tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True) for ids, finished in ids]
    release(model)

    model = load_reward_model(args.reward_model, args.reward_dtype, *loading)
    model = bind_scores(model.to(device))
    settings = {"max_tokens": args.max_reward_tokens, "progress": accelerator.is_main_process}
    my_examples = examples[rank::P]
    texts = [(e.messages, text) for (_, e), text in zip(my_asked, samples)] + [(e.messages, e.response) for e in my_examples]
    rewards = torch.tensor(score(model, reward_tokenizer, texts, **settings)).sigmoid().tolist()
    release(model)

    sampled = gather_object([(states[n].tolist(), r) for (n, _), r in zip(my_asked, rewards)])
    value, fit = fit_value(torch.tensor([s for s, _ in sampled]), torch.tensor([r for _, r in sampled]), args.seed)
    values = dict(gather_object([(e.prompt_ids.tobytes(), v) for e, v in zip(mine, value(torch.stack(states)).tolist() if mine else [])]))
    known = dict(gather_object(list(zip(range(rank, len(examples), P), rewards[len(my_asked) :]))))
    return fit, [known[i] for i in range(len(examples))], [values[e.prompt_ids.tobytes()] for e in examples]


def prompt_state(model, prompt_ids):
    """s(x): mean and last of the final hidden states over one prompt, without padding, (2D,) float32 on CPU."""
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    hidden = without_adapter_wrapper(model).base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()  # (T, D)
    return torch.cat([hidden.mean(dim=0), hidden[-1]]).cpu()


def fit_value(states, rewards, seed=0, steps=500):
    """V on states: (n, 2D), rewards in [0, 1] (n,) -> (function (m, 2D) -> (m,), what is known of the fit).

    Full-batch Adam from the constant mean reward; the step with the least error on a held-out fifth is kept, so V is never worse there
    than the constant. With fewer than 10 samples V is the constant.
    """
    rewards, center, spread = rewards.double(), states.double().mean(dim=0), states.double().std(dim=0, correction=0).clamp(min=1e-6)
    standard = lambda s: (s.double() - center) / spread
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    mean = rewards[rest].mean().clamp(1e-4, 1 - 1e-4)
    w = torch.zeros(states.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.logit(mean).clone().requires_grad_()
    error = lambda rows: ((torch.sigmoid(standard(states[rows]) @ w + b) - rewards[rows]) ** 2).mean()
    best = (math.inf, None, None)
    optimizer = torch.optim.Adam([w, b], lr=1e-2)
    for step in range(steps if len(held) >= 2 else 1):
        with torch.no_grad():
            now = error(held).item() if len(held) else math.nan
            if step == 0:
                constant = now
            if step == 0 or now < best[0]:
                best = (now, w.detach().clone(), b.detach().clone())
        optimizer.zero_grad()
        error(rest).backward()
        optimizer.step()
    _, w_best, b_best = best
    fit = {"samples": len(rewards), "mean_reward": rewards.mean().item(), "held_out_error": best[0], "held_out_error_of_a_constant": constant}
    return lambda s: torch.sigmoid(standard(s) @ w_best + b_best), fit
