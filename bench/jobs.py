"""What bench.py measures in a process of its own, so that nothing else has touched its memory: `python bench/jobs.py JSON` prints JSON."""

import json
import os
import sys


def memory(job):
    """Peak of one training step of B rows of T tokens (half prompt, half response), ours or TRL's, after a first step of the same size.

    "whole": with weights, gradients and optimizer.
    """
    import workload
    from timing import Peak

    peak = Peak()
    rows = workload.shaped_rows(job["B"], job["T"] // 2, job["T"] // 2, 4096)
    causal_lm = workload.policy(workload.config_of(job["shape"]))
    held = 16 * sum(p.numel() for p in causal_lm.parameters()) if job.get("whole") else 0
    if job["side"] == "ours":
        one = workload.Training("var", causal_lm, rows, job["B"], workload.tiny.bpe_tokenizer())
        one.step(0)
        peak.begin(causal_lm)
        one.step(0)
        return {"peak": held + peak.end()}
    import peers
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            peak.begin(model)

    plan = workload.Training("sft", causal_lm, 2 * rows, job["B"], workload.tiny.bpe_tokenizer()).plan
    peer = peers.sft(causal_lm, workload.tiny.bpe_tokenizer(pad="<pad>"), plan, job["B"], job["bf16"])
    del causal_lm
    peer.trainer.add_callback(Watch())
    peer.epoch()
    return {"peak": held + peak.end()}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if job["bf16"] else "no"
    if job["device"] == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    print("\n" + json.dumps({"memory": memory}[job["job"]](job)))
