"""
The same work through TRL (requirements-bench.txt). Nothing of the product imports this, and bench.py only where TRL is installed.

TRL gets our token ids where it takes ids, our micro-batches in our order, the same model, precision and optimizer, and neither gradient
checkpointing (its default) nor a tracker. Only its loop is timed: `seconds()` is from the first to the last step of one epoch, without set-up.
"""

import copy
import tempfile
import time

import datasets
import transformers
import trl

transformers.logging.set_verbosity_error()
VERSION = trl.__version__


class Clock(transformers.TrainerCallback):
    """Seconds between the beginning and the end of an epoch."""

    def on_epoch_begin(self, args, state, control, **_):
        self.start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **_):
        self.seconds = time.perf_counter() - self.start


def settings(config_class, B, bf16, **more):
    return config_class(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=B, num_train_epochs=1, learning_rate=1e-6, bf16=bf16, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential", **more,
    )  # fmt: skip


class Peer:
    """A trainer of TRL's; every call of `epoch` trains one epoch more and returns its seconds."""

    def __init__(self, trainer):
        self.trainer, self.clock = trainer, Clock()
        trainer.add_callback(self.clock)
        trainer.remove_callback(transformers.PrinterCallback)

    def epoch(self):
        self.trainer.train()
        return self.clock.seconds


def in_plan_order(plan):
    return [plan.examples[i] for batch in plan.batches for i in batch]


def sft(causal_lm, tokenizer, plan, B, bf16=False, **more):
    """SFT on the rows of our plan, as token ids; only the response is trained on."""
    rows = in_plan_order(plan)
    ids = [(e.prompt_ids.tolist(), e.response_ids.tolist()) for e in rows]
    table = datasets.Dataset.from_list([{"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)} for p, r in ids])
    args = settings(trl.SFTConfig, B, bf16, completion_only_loss=True, max_length=None, **more)
    return Peer(trl.SFTTrainer(model=copy.deepcopy(causal_lm), args=args, train_dataset=table, processing_class=tokenizer))


def dpo(causal_lm, tokenizer, plan, B, bf16=False):
    """DPO on the pairs of our plan, as messages: TRL tokenises them itself."""
    rows = in_plan_order(plan)
    turn = lambda e: [{"role": "assistant", "content": e.response}]
    table = datasets.Dataset.from_list([{"prompt": w.messages, "chosen": turn(w), "rejected": turn(r)} for w, r in zip(rows[0::2], rows[1::2])])
    args = settings(trl.DPOConfig, B, bf16, max_length=None, beta=0.1)
    reference = copy.deepcopy(causal_lm).eval()
    return Peer(trl.DPOTrainer(model=copy.deepcopy(causal_lm), ref_model=reference, args=args, train_dataset=table, processing_class=tokenizer))


def grpo(causal_lm, reward_model, tokenizer, prompts, G, K, micro_batch, max_new_tokens, bf16=False):
    """GRPO: G prompts x K samples a step, in micro-batches of `micro_batch` sequences, scored by a reward model."""
    table = datasets.Dataset.from_list([{"prompt": messages} for messages in prompts])
    accum = G * K // micro_batch
    args = settings(trl.GRPOConfig, micro_batch, bf16, num_generations=K, max_completion_length=max_new_tokens, gradient_accumulation_steps=accum)
    trainer = trl.GRPOTrainer(
        model=copy.deepcopy(causal_lm), reward_funcs=copy.deepcopy(reward_model), args=args, train_dataset=table, processing_class=tokenizer, reward_processing_classes=tokenizer
    )  # fmt: skip
    return Peer(trainer)
