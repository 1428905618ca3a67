"""The benchmark's pieces on tiny sizes, and the planning formula against what is counted and measured. No timing is asserted."""

import json
import math
import subprocess
import sys

import pytest
import tiny
import torch

sys.path.append(str(tiny.ROOT / "bench"))

import naive
import plan
import timing
import workload

import model
import tables

SMALL = plan.dims(64, 3, 4, 2, 176, 500, tied=False, bias=True)


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_every_weight_of_a_model(tied):
    config = plan.dims(64, 3, 4, 2, 176, 500, tied=tied, bias=True)
    assert plan.weights(config) == sum(p.numel() for p in workload.policy(workload.config_of(config)).parameters())


@pytest.mark.parametrize("name, billions", [("Qwen2.5-0.5B", 0.494), ("Qwen2.5-7B", 7.616), ("Qwen2.5-32B", 32.764), ("Llama-3.1-8B", 8.030), ("Llama-2-13B", 13.016)])
def test_the_papers_models_have_their_published_sizes(name, billions):
    assert round(plan.weights(plan.PAPER_MODELS[name]) / 1e9, 3) == billions


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_keeps_what_the_plan_says_for_backward(autocast):
    """Bytes that autograd saves, weights and their copies apart; the difference of two depths leaves one layer."""
    B, T, saved = 2, 40, []
    for layers in (2, 3):
        causal_lm, kept = workload.policy(workload.config_of(SMALL | {"num_hidden_layers": layers})), {}

        def keep(tensor):
            if tensor.shape and set(tensor.shape) & {B * T, T, B}:  # an activation, not a weight
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = causal_lm.base_model(input_ids=torch.zeros(B, T, dtype=torch.long), use_cache=False).last_hidden_state
        saved.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        del hidden
    assert (saved[1] - saved[0]) / (B * T) == pytest.approx(plan.layer_activations(SMALL, autocast), rel=0.02)


def test_the_memory_formula_shares_out_what_fsdp_shares_out_and_knows_the_chunk():
    assert plan.LOGITS_CHUNK == model.LOGITS_CHUNK
    one, eight = (plan.training_memory(plan.PAPER_MODELS["Qwen2.5-7B"], W) for W in (1, 8))
    for name in ("weights", "gradients", "AdamW"):
        assert one[name] == 8 * eight[name]
    assert one["activations"] == eight["activations"]
    adapter = plan.training_memory(plan.PAPER_MODELS["Qwen2.5-7B"], 1, in_4bit=True, lora_rank=16)
    assert adapter["weights"] < one["weights"] / 3 and adapter["AdamW"] < one["AdamW"] / 100


def test_the_cost_of_tables_is_linear_in_n_and_in_the_lengths():
    config = plan.PAPER_MODELS["Qwen2.5-0.5B"]
    base = plan.tables_cost(config, 1000, 8, 100, 50)
    assert base["tokens"] == 1000 * (100 + 8 * 50) and base["bytes"] == 8 * 1000 * 8 + 4 * 1000
    assert plan.tables_cost(config, 2000, 8, 100, 50)["flops"] == 2 * base["flops"]
    assert plan.tables_cost(config, 1000, 16, 100, 50)["tokens"] - base["tokens"] == 1000 * 8 * 50


def test_useful_flops_by_hand():
    """One layer of 2x2 matrices: 7 of 4 weights, 2 FLOPs each a token; attention 2 Q n^2; a head of 3x2 on one token; times 3."""
    config = plan.dims(2, 1, 1, 1, 2, 3, tied=True)
    assert plan.useful_flops(config, [(1, 1)]) == 3 * (2 * 28 * 2 + 2 * 2 * 4 + 2 * 6)


def test_the_naive_table_is_what_tables_py_measures():
    causal_lm = model.bind_sequence_logps(workload.policy(workload.config_of(SMALL))).eval()
    rows = workload.shaped_rows(3, 7, 5, 500)
    x, y = [e.prompt_ids.tolist() for e in rows], [e.response_ids.tolist() for e in rows]
    tokenizer = tiny.chatml_tokenizer()
    ours = torch.tensor([tables.ref_logps_of(causal_lm, tokenizer, prompt, y) for prompt in x])
    for batched in (True, False):
        torch.testing.assert_close(naive.ref_logps_table(causal_lm, x, y, batched=batched), ours, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("loss", ["var", "sft", "dpo", "alol"])
def test_a_training_of_the_bench_takes_a_step(loss):
    causal_lm = workload.policy(workload.config_of(SMALL))
    before = causal_lm.lm_head.weight.detach().clone()
    one = workload.Training(loss, causal_lm, workload.shaped_rows(8, 6, 4, 500), 4, tiny.chatml_tokenizer())
    assert math.isfinite(one.step(0)["loss"]) and not torch.equal(before, causal_lm.lm_head.weight)
    assert one.rows(0) == [(6, 4)] * (8 if loss == "dpo" else 4)


def test_ratios_are_taken_round_by_round():
    times = {"ours": [1.0, 4.0, 2.0], "other": [2.0, 16.0, 2.0]}
    assert timing.ratio(times, "ours", "other") == (0.5, 0.25, 1.0)
    line = timing.compared("x", times, "ours", "other", ">= 3", faster=True)
    assert line["value"] == 2.0 and timing.verdict(line) == "missed (0.67x)"
    assert [timing.verdict({"target": "<= 0.5", "value": v}) for v in (0.5, 0.75)] == ["met", "missed (1.50x)"]
    turns = []
    found = timing.alternate(2, a=lambda: turns.append("a"), b=lambda: turns.append("b") or 7.0)
    assert turns[-4:] in (["a", "b", "b", "a"], ["b", "a", "a", "b"]) and found["b"] == [7.0, 7.0]


def test_the_table_says_what_was_not_measured(tmp_path):
    line = {"what": "a step", "target": "<= 2", "value": 1.5, "low": 1.0, "high": 2.0, "rounds": 5, "ours": 0.5, "other": 2.0}
    about = {"machine": "a laptop", "date": "2026-01-01 10:00", "precision": "float32", "load": 0.1, "lines": [line]}
    found = timing.store(tmp_path / "results.json", "steps", about)
    assert timing.store(tmp_path / "results.json", "memory", about).keys() == {"steps", "memory"}
    text = timing.table(found, ["steps", "grpo"])
    assert "| a step | <= 2 | 1.5x | 1 to 2, 5 rounds | 500.0 ms | 2.00 s | met |" in text
    assert "| `grpo` | | not measured |" in text and "a laptop" in text


def test_the_commands_answer_at_once_and_name_what_is_wrong(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    for flags, status, words in (
        (["bench.py", "--help"], 0, "large_vocabulary"),
        (["bench.py", "--only", "nothing"], 2, "nothing"),
        (["plan.py"], 0, "Qwen2.5-32B, 4 bits"),
        (["plan.py", "--config", f"{tmp_path}/config.json"], 2, "vocab_size"),
    ):
        program = ["-X", "importtime", str(tiny.ROOT / "bench" / flags[0]), *flags[1:]]
        done = subprocess.run([sys.executable, *program], capture_output=True, text=True)
        assert done.returncode == status and words in done.stdout + done.stderr
        assert "| torch\n" not in done.stderr
