"""What the benchmark runs on: rows, tokenizer, models, and a training of ours built from the product's own functions."""

import copy
import gzip
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny
import torch
import transformers

import data
import model as product
import tables
import train

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))

# ----------------------------------------------------------------------------------------------------------------------
# Rows


def generated_pairs(n, seed=0):
    """n rows of prompt / chosen / rejected made of random words, with lengths like those of real dialogues."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(3000)]
    text = lambda mean: " ".join(rng.choices(words, k=max(3, int(rng.lognormvariate(0, 0.7) * mean))))
    return [{"prompt": text(70), "chosen": text(30), "rejected": text(30)} for _ in range(n)]


def rows_file(folder):
    """(file of preference pairs, what it is in words)."""
    real = SHARED_DATA / "hh_helpful_base.jsonl.gz"
    if real.exists():
        return str(real), "real dialogues (hh_helpful_base)"
    return tiny.write(Path(folder) / "generated.jsonl", generated_pairs(1200)), "generated text"


def tokenizer_of(file, vocab_size=4096):
    """A byte-level BPE of at most `vocab_size` tokens, trained on the rows themselves. Models may have a larger V."""
    with gzip.open(file, "rt") if file.endswith(".gz") else open(file) as lines:
        texts = [value for line in lines for value in json.loads(line).values() if isinstance(value, str)]
    return tiny.chatml_tokenizer(texts=texts, vocab_size=vocab_size)


def pairs_of(file, tokenizer, n, seed=0, longest=512):
    """n preference pairs none of whose texts had to be cut: examples chosen, rejected, chosen, ..."""
    examples, _, _ = data.load_examples([file], tokenizer, "pairs", longest, longest, progress=False)
    pairs = [p for p in zip(examples[0::2], examples[1::2]) if max(len(ids) for e in p for ids in (e.prompt_ids, e.response_ids)) < longest]
    random.Random(seed).shuffle(pairs)
    return [e for pair in pairs[:n] for e in pair]


def shaped_rows(n, prompt_tokens, response_tokens, vocab_size, seed=0):
    """n examples of random tokens, all of one length."""
    rng = random.Random(seed)
    ids = lambda k: data.array("i", [rng.randrange(3, vocab_size) for _ in range(k)])
    turn = lambda i: [{"role": "user", "content": f"{i}"}]
    return [data.Example(ids(prompt_tokens), ids(response_tokens), turn(i), f"{i}", 0.0, f"row:{i}", desirable=i % 2 == 0) for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# Models with random weights


def config_of(shape, vocab_size=None):
    """A Qwen2 config from the numbers of plan.dims (or a subset of them)."""
    numbers = {k: v for k, v in shape.items() if v is not None and k != "attention_bias"} | ({"vocab_size": vocab_size} if vocab_size else {})
    nothing = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return transformers.AutoConfig.for_model("qwen2", max_position_embeddings=4096, **numbers, **nothing)


def policy(config, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def reward_model(config, seed=1):
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = 1, 0
    return transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Our training


def random_tables(plan):
    """Tables of the size that tables.py would measure. Their numbers do not change how long a step takes."""
    found = tables.Tables(plan)
    found.rewards.normal_()
    found.ref_logps = found.rewards - 3.0 * found.response_tokens[:, None, :].float()
    return found


class Training:
    """A training as train.py's main composes it: `step(m)` is one optimizer step on micro-batch m, `epoch()` all of them in order."""

    def __init__(self, loss, causal_lm, examples, B, tokenizer, compiled=False):
        flags = ["--model", "-", "--data", "-", "--reward_model", "-", "--loss", loss, "--batch_size", str(B), "--lr", "1e-6"]
        self.args, self.loss, self.tokenizer = train.parse_args(flags), train.LOSSES[loss], tokenizer
        self.plan = data.make_plan(examples, self.args, self.loss.responses, self.loss.pairs)
        self.tables = random_tables(self.plan) if self.loss.tables(self.args) else None
        for e in self.plan.examples:
            e.weight = 1.0  # the advantage of A-LoL
        self.accelerator = product.make_accelerator()
        inner = product.bind_sequence_logps(causal_lm).train()
        if compiled:
            inner.base_model.compile()
        self.model, self.optimizer = self.accelerator.prepare(inner, product.adamw(inner, self.args.lr, 0.0))

    def step(self, m):
        value, metrics = train.forward(self.model, self.loss, self.plan, self.tables, m, self.args, self.tokenizer, self.accelerator)
        self.accelerator.backward(value / 40)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = product.lr_at(m, 10**6, 0, self.args.lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return train.reduce_metrics(self.accelerator, [metrics], 40)

    def epoch(self):
        for m in range(len(self.plan.batches)):
            self.step(m)

    def rows(self, m=None):
        """(prompt tokens, response tokens) of the rows of micro-batch m, or of all."""
        batches = self.plan.batches if m is None else [self.plan.batches[m]]
        return [(len(self.plan.examples[i].prompt_ids), len(self.plan.examples[i].response_ids)) for batch in batches for i in batch]
