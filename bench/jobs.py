"""What bench.py measures in a process of its own, so that nothing else has touched its memory: `python bench/jobs.py JSON` prints JSON."""

import json
import os
import sys


def memory(job):
    """Peak of one training step of B rows of T tokens (half prompt, half response), ours or TRL's, after a step of short rows that has
    allocated what stays. "whole": with weights, gradients and optimizer."""
    import workload

    B, T = job["B"], job["T"]
    examples = workload.shaped_rows(B, 8, 8, 4096, seed=1) + workload.shaped_rows(B, T // 2, T // 2, 4096)
    batches = [list(range(B)), list(range(B, 2 * B))]  # the short ones first
    causal_lm, tokenizer = workload.policy(workload.config_of(job["shape"])), workload.tiny.chatml_tokenizer()
    held = 16 * sum(p.numel() for p in causal_lm.parameters()) if job.get("whole") else 0
    return {"peak": held + (ours if job["side"] == "ours" else theirs)(causal_lm, tokenizer, workload.data.Plan(examples, batches, {}), B, job["bf16"])}


def ours(causal_lm, tokenizer, plan, B, bf16):
    import workload
    from timing import Peak

    peak, one = Peak(), workload.Training("var", causal_lm, plan.examples, B, tokenizer)
    one.plan.batches = plan.batches
    one.tables = workload.random_tables(one.plan)
    one.step(0)
    peak.begin(causal_lm)
    one.step(1)
    return peak.end()


def theirs(causal_lm, tokenizer, plan, B, bf16):
    import peers
    import transformers
    from timing import Peak

    peak = Peak()

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            peak.begin(model)  # the second step's is the one that stays

    peer = peers.sft(causal_lm, tokenizer, plan, B, bf16)
    del causal_lm
    peer.trainer.add_callback(Watch())
    peer.epoch()
    return peak.end()


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if job["bf16"] else "no"
    if job["device"] == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    print("\n" + json.dumps({"memory": memory}[job["job"]](job)))
