"""
The miniature: a small preference world whose true reward is a function we can call. Written and generated here, nothing is downloaded.

    python paper/miniature.py demo                  # base and reward model, tables, SFT, VAR, and one results table (`make demo`)
    python paper/miniature.py build                 # only the data, the base model and the reward model, in runs/miniature
    python paper/miniature.py report runs/var ...   # the results table for any folders trained on this world

The world. A prompt asks whether a thing fits into a container. To every prompt there are exactly five listed answers, one per style:

    Does a goat fit into a teacup?
    style      true reward   answer
    brief           +2       No, a goat is too big.
    rambling        +1       Well, let me picture a goat there, and turn it this way and that way for a while. No, a goat is too big.
    evasive          0       It depends on the goat.
    wrong           -2       Yes, a goat fits.
    rude            -2       Go and try it with a goat yourself, silly.

Brief and wrong differ in nothing but the truth. A model never reads the sizes; it has to work them out from answers, and held-out prompts
ask about pairs of thing and container that no training prompt has. An answer about another thing, as another prompt's answer mostly is,
costs MISMATCH_COST on top of what its style is worth; a text of no known form is GARBLED.

Because the answers are listable, everything in Eq. 2 and 3 is a short sum: E[r], KL(pi, pi_ref), Z(x), pi* (`exact`). What a policy gives
to other texts is its leaked mass, printed beside the numbers, which are computed on the five renormalised.
"""

import argparse
import contextlib
import importlib
import json
import math
import random
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when run as a program: the modules lie one folder up

FOLDER = ROOT / "runs" / "miniature"
BETA = 1.0

# ----------------------------------------------------------------------------------------------------------------------
# The world: prompts, answers, true reward

CONTAINERS = "thimble teacup bucket bathtub garage stadium".split()  # small to large
THINGS = [  # THINGS[level] fit into CONTAINERS[level] and everything larger; the last level fits nowhere
    "flea crumb pin pea seed", "bee cherry ring coin grape", "lemon shoe teapot hat kitten", "dog goose pillow suitcase goat",
    "car horse sofa piano bed", "bus church whale ship train", "mountain river moon planet star",
]  # fmt: skip
LEVEL = {thing: level for level, things in enumerate(THINGS) for thing in things.split()}

PHRASINGS = ("Does a {thing} fit into a {container}?", "Could you put a {thing} into a {container}?")
YES, NO = "Yes, a {thing} fits.", "No, a {thing} is too big."
RAMBLING = "Well, let me picture a {thing} there, and turn it this way and that way for a while. "
EVASIVE = "It depends on the {thing}."
RUDE = "Go and try it with a {thing} yourself, silly."
VALUES = {"brief": 2.0, "rambling": 1.0, "evasive": 0.0, "wrong": -2.0, "rude": -2.0}
STYLES = tuple(VALUES)
MISMATCH_COST = 2.0
GARBLED = -4.0  # as bad as a wrong answer about another thing: it never pays to lose the form

PROMPTS = {  # text -> (thing, container)
    phrasing.format(thing=thing, container=container): (thing, container)
    for thing in LEVEL
    for container in CONTAINERS
    for phrasing in PHRASINGS
}
FORMS = [  # (pattern, style if the statement is true or there is none, what the statement claims)
    (re.compile(re.escape(text).replace(r"\{thing\}", "([a-z]+)")), style, claim)
    for text, style, claim in [
        (YES, "brief", True), (NO, "brief", False), (RAMBLING + YES, "rambling", True), (RAMBLING + NO, "rambling", False),
        (EVASIVE, "evasive", None), (RUDE, "rude", None),
    ]
]  # fmt: skip


def fits(thing, container):
    return LEVEL[thing] <= CONTAINERS.index(container)


def listed_answers(prompt):
    """The five answers to a prompt, in the order of STYLES."""
    thing, container = PROMPTS[prompt]
    right, wrong = (YES, NO) if fits(thing, container) else (NO, YES)
    return [text.format(thing=thing) for text in (right, RAMBLING + right, EVASIVE, wrong, RUDE)]


def read_answer(prompt, response):
    """(style, about this prompt's thing) of any text; (None, False) for a text of no known form. A false statement is "wrong", however long."""
    thing, container = PROMPTS[prompt]
    for pattern, style, claim in FORMS:
        found = pattern.fullmatch(response.strip())
        if found and len(named := set(found.groups())) == 1 and (named := named.pop()) in LEVEL:
            true = claim is None or claim == fits(named, container)
            return (style if true else "wrong"), named == thing
    return None, False


def true_reward(prompt, response, mismatch_cost=MISMATCH_COST):
    """r(x, y) as this world defines it. Any text gets a number."""
    style, about_it = read_answer(prompt, response)
    return GARBLED if style is None else VALUES[style] - (0.0 if about_it else mismatch_cost)


def style_of(prompt, response):
    """One of STYLES, "other" (about another thing) or "garbled"."""
    style, about_it = read_answer(prompt, response)
    return "garbled" if style is None else style if about_it else "other"


def split_prompts(held_out_pairs=30, seed=0):
    """(training prompts, held-out prompts), shuffled. A held-out pair of thing and container is held out in both phrasings."""
    rng = random.Random(f"world {seed}")
    pairs = sorted(set(PROMPTS.values()))
    held_out = set(rng.sample(pairs, held_out_pairs))
    sides = [p for p in PROMPTS if PROMPTS[p] not in held_out], [p for p in PROMPTS if PROMPTS[p] in held_out]
    for side in sides:
        rng.shuffle(side)
    return sides


def preference(prompt, one, two):
    """P(one is preferred to two) = sigmoid(r(x, one) - r(x, two)), the assumption behind Eq. 1."""
    return 1 / (1 + math.exp(true_reward(prompt, two) - true_reward(prompt, one)))


def sample_pairs(prompts, count, seed, mismatched=0.4):
    """`count` preference rows {prompt, chosen, rejected}. Which of two answers is chosen is a coin with Bradley-Terry's probability.

    Each answer is one of the five listed or, with probability `mismatched`, an answer to another prompt: that is where a reward model learns
    what such an answer costs, and the tables of Algorithm 1 ask for little else: B - 1 of the B entries of every row are such answers.
    """
    rng, rows = random.Random(f"pairs {seed}"), []
    while len(rows) < count:
        prompt = rng.choice(prompts)
        one, two = (rng.choice(listed_answers(rng.choice(prompts) if rng.random() < mismatched else prompt)) for _ in range(2))
        if one != two:
            first = rng.random() < preference(prompt, one, two)
            rows.append({"prompt": prompt, "chosen": one if first else two, "rejected": two if first else one})
    return rows


def best_accuracy(rows):
    """What the true reward itself would be expected to score on such pairs: the coin is not always right."""
    return sum(max(p, 1 - p) for p in (preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows)) / len(rows)


# ----------------------------------------------------------------------------------------------------------------------
# Build it: data, random models, and then only the programs that users run


def save_random_model(folder, texts, architecture="llama", hidden=64):
    """A model of two layers (109 thousand weights) that knows nothing, with a byte-level BPE tokenizer trained on `texts`."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        initializer_range=0.05, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_settings():
    """Defaults that `python train.py` takes over when it is given no --model and no --data."""
    paths = {
        "model": f"{FOLDER}/base",
        "reward_model": f"{FOLDER}/reward",
        "data": [f"{FOLDER}/train.jsonl"],
        "eval_data": [f"{FOLDER}/held_out.jsonl"],
    }
    return paths | {"lr": 1e-3, "epochs": 4.0, "max_response_tokens": 64, "save_every": 0, "miniature": True}


def call(program, command, log):
    """Run one of the programs in this process. Its command line is shown, what it prints goes to a log file; a finished run is left alone."""
    print(f"$ python {program}.py {command}".replace(f"{ROOT}/", ""), flush=True)
    module = importlib.import_module(program.replace("/", "."))
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        module.main(module.parse_args(command.split()))


def build(folder=FOLDER, base_epochs=12, reward_epochs=2):
    """train, held_out, pairs, held_out_pairs (.jsonl), base/ and reward/ in `folder`, unless they are there already."""
    folder = Path(folder)
    if (folder / "reward" / "config.json").exists():
        return
    start = time.time()
    print("building the miniature world: data, a base model that knows every style, a reward model", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    prompts, held_out = split_prompts()
    answers = lambda some: [
        {"prompt": p, "responses": listed_answers(p), "scores": [true_reward(p, y) for y in listed_answers(p)]} for p in some
    ]
    held_out_pairs = sample_pairs(held_out, 1000, seed=1)
    files = {
        "train": answers(prompts),
        "held_out": answers(held_out),
        "pairs": sample_pairs(prompts, 8000, seed=0),
        "held_out_pairs": held_out_pairs,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_random_model(folder / "random", [text for p in prompts for text in (p, *listed_answers(p))])
    base = f"--loss sft --responses all --model {folder}/random --data {folder}/train.jsonl --batch_size 32 --epochs {base_epochs} --lr 6e-3 --save_every 0"
    call("train", f"{base} --output_dir {folder}/base --resume", folder / "build.log")
    # the reward model starts from the base model's body, as is usual; only its head is new
    pairs = f"--data {folder}/pairs.jsonl --eval_data {folder}/held_out_pairs.jsonl --batch_size 16 --epochs {reward_epochs} --lr 7e-4"
    call("reward", f"train --model {folder}/base {pairs} --output_dir {folder}/reward", folder / "build.log")
    accuracy = 100 * json.loads((folder / "reward" / "accuracy.json").read_text())["accuracy"]
    ceiling = 100 * best_accuracy(held_out_pairs)
    print(
        f"reward model: {accuracy:.1f} % of 1,000 held-out pairs right; the true reward itself would get {ceiling:.1f} %, the preferences are noisy"
    )
    print(f"built in {time.time() - start:.0f} s", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Report


def exact(model_folder, prompts):
    """log pi of the listed answers of each prompt, (number of prompts, 5): sums over tokens, nats."""
    import torch

    from data import Example, array, collate, encode_records, load_tokenizer, pad_id
    from model import load_policy, sequence_logps

    tokenizer, model = load_tokenizer(model_folder), load_policy(model_folder).eval()
    logps = []
    with torch.no_grad():
        for prompt_ids, responses in encode_records(
            tokenizer, [([{"role": "user", "content": p}], listed_answers(p)) for p in prompts], 10**6, 10**6
        ):
            examples = [Example(array("i", prompt_ids), array("i", ids), [], "", None, "") for ids in responses]
            logps.append(sequence_logps(model, **collate(examples, pad_id(tokenizer))))
    return torch.stack(logps)


class Truth:
    """What is known exactly on these prompts: the listed answers' true rewards, pi_ref and pi* over them. The reference is one model folder."""

    def __init__(self, reference, prompts, beta=BETA):
        import torch

        from var import optimal_policy

        self.prompts, self.beta = prompts, beta
        self.rewards = torch.tensor([[true_reward(p, y) for y in listed_answers(p)] for p in prompts])  # (prompts, 5)
        self.ref = torch.log_softmax(exact(reference, prompts), dim=1)  # pi_ref on the listed answers
        self.target = optimal_policy(self.rewards, self.ref, beta)  # log pi*, Eq. 3
        self.bound = beta * torch.logsumexp(self.ref + self.rewards / beta, dim=1).mean().item()  # beta log Z(x), the bound of Eq. 2

    def on_the_list(self, logps):
        """E[r], Eq. 2 and KL(pi*, pi) of log-probs over the listed answers, (prompts, 5), renormalised."""
        p = logps.exp()
        return {
            "E[r]": (p * self.rewards).sum(1).mean().item(),
            "E[r]-bKL": (p * (self.rewards - self.beta * (logps - self.ref))).sum(1).mean().item(),
            "KL(pi*,pi)": (self.target.exp() * (self.target - logps)).sum(1).mean().item(),
        }

    def of(self, folder):
        """The same of a model folder, and `leaked`, its probability of all other texts."""
        logps = exact(folder, self.prompts)
        return self.on_the_list(logps.log_softmax(dim=1)) | {"leaked": 1 - logps.exp().sum(1).mean().item()}


def read_samples(rows):
    """True reward and shares of styles (in percent) of rows that `eval.py generate` wrote."""
    texts = [(row["prompt"][0]["content"], row["response"]) for row in rows]
    styles = [style_of(*text) for text in texts]
    shares = {style: 100 * styles.count(style) / len(styles) for style in (*STYLES, "other", "garbled")}
    return {"true": sum(true_reward(*text) for text in texts) / len(texts), "tokens": sum(row["response_tokens"] for row in rows) / len(rows)} | shares


def report(folders, folder=FOLDER, seeds="0,1,2"):
    """Print the results table on the held-out prompts: sampled responses as the paper evaluates them, and exact sums over the listed answers."""
    from eval.files import read_jsonl

    truth, lines, log = Truth(folder / "base", [row["prompt"] for row in read_jsonl(folder / "held_out.jsonl")]), [], folder / "report.log"
    for name in folders:
        gen = Path(name) / "held_out_responses.jsonl"
        sampling = f"--seeds {seeds} --max_response_tokens 64 --batch_size 60"
        call("eval", f"generate --model {name} --data held_out={folder}/held_out.jsonl --out {gen} {sampling}", log)
        call("eval", f"reward --gen {gen} --reward_model {folder}/reward --out {gen}.reward.json", log)
        scored = json.loads(Path(f"{gen}.reward.json").read_text())["results"][str(gen)]["averages"]["All"]
        lines.append((Path(name).name, {"model score": scored["reward"]} | read_samples(read_jsonl(gen)) | truth.of(name)))
    nothing = dict.fromkeys(lines[0][1], math.nan)
    shares = {s: 100 * v for s, v in zip(STYLES, truth.target.exp().mean(0).tolist())}
    lines.append(("pi*", nothing | shares | truth.on_the_list(truth.target) | {"leaked": 0.0}))
    print(format_report(lines, truth.bound, len(truth.prompts), seeds))
    return lines


def format_report(lines, bound, prompts, seeds):
    percent = {*STYLES, "other", "garbled"}
    show = lambda name, value: (
        f"{'-' if math.isnan(value) else format(value, '.0f') + '%' if name in percent else format(value, '.3f' if name == 'leaked' else '.2f'):>11}"
    )
    head = f"{'':12}" + "".join(f"{name:>11}" for name in lines[0][1])
    body = [f"{name:12}" + "".join(show(k, v) for k, v in numbers.items()) for name, numbers in lines]
    notes = [
        "",
        f"{prompts} held-out prompts; sampled columns: temperature 0.8, top_p 0.9, top_k 50, seeds {seeds}; model score = the reward model's raw logit,",
        "true = the world's own reward of the same texts. E[r], E[r]-bKL (Eq. 2) and KL(pi*, pi) are exact sums over the five listed answers,",
        f"renormalised, with the true reward and beta = {BETA:g}; leaked = probability of all other texts. Eq. 2 is bounded by beta log Z = {bound:.2f}.",
    ]
    return "\n".join(["", head, *body, *notes])


def demo(folder=FOLDER):
    start = time.time()
    build(folder)
    print(f"[{time.time() - start:.0f} s] training", flush=True)
    common = f"--model {folder}/base --data {folder}/train.jsonl --lr 1e-3 --epochs 4 --max_response_tokens 64 --save_every 0 --resume"
    var = f"--reward_model {folder}/reward --beta {BETA:g} {common}"
    for name, flags in {
        "sft_all": f"--loss sft --responses all {common}",
        "sft_best": f"--loss sft --responses best {common}",
        "var_batch": f"--loss var --partners batch {var}",
        "var_group": f"--loss var --partners group {var}",
    }.items():
        call("train", f"{flags} --output_dir {folder}/{name}", folder / "demo.log")
    print(f"[{time.time() - start:.0f} s] evaluation on held-out prompts", flush=True)
    report([folder / name for name in ("base", "sft_all", "sft_best", "var_batch", "var_group")], folder)
    print(f"\n{time.time() - start:.0f} s in all. What each program printed: {folder}/*.log. The same VAR run by hand: python train.py")


def main():
    parser = argparse.ArgumentParser(
        description="The miniature preference world: build it, run the whole method on it, or report on folders trained on it."
    )
    parser.add_argument("command", choices=["demo", "build", "report"])
    parser.add_argument("folders", nargs="*", help="report: the folders to compare (base is always the reference)")
    args = parser.parse_args()
    if args.command == "report":
        build()
        report([FOLDER / "base", *args.folders])
    else:
        {"demo": demo, "build": build}[args.command]()


if __name__ == "__main__":
    from formats import run

    run(main)
