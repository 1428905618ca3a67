"""
What a run needs, from model configs alone: memory per device of a VAR training run, and the cost of its tables.

    python bench/plan.py                                     # the paper's models on 1 to 32 devices, as two Markdown tables
    python bench/plan.py --config DIR/config.json --devices 1 4 --batch_size 8 --tokens 1024

Per device, W devices under FSDP2, P weights of which each device keeps its share, L layers, D hidden, I intermediate, T tokens a row:

    weights, gradients, AdamW     4 + 4 + 8 bytes x P/W           float32 masters (--dtype float32)
    copies in bfloat16            W = 1: autocast's, 2 bytes a weight; W > 1: embedding and head, two layers gathered, one layer's gradients
    activations                   B T L x (16 D + 14 D + 4 K + 8 I + 4 heads + 8) bytes under autocast, (32 D + 8 K + 16 I + 4 heads + 8) in
                                  float32, K = key-value width; with --gradient_checkpointing B T x 4 D L, and one layer of the above
    head                          8 bytes (float32) or 10 (autocast) x LOGITS_CHUNK: the logits of a chunk and their softmax, whatever V is; where the
                                  embedding is also the head, one V x D gradient more, because two of them are added

With 4 bits and an adapter the linear layers take 0.52 bytes a weight, and gradients and AdamW hold the adapter alone. The terms of a layer
are what autograd saves in it, counted with saved_tensors_hooks; `python bench/bench.py --only plan` compares the sum with measured peaks.

Tables, N examples, P tokens a prompt, R a response: N (P + B R) forward tokens through each of the two models, 8 N B bytes on disk. So the cost is
linear in N, in the prompt and in the response; in B it is linear where B R is larger than P, and free below. W devices take a W-th of the
micro-batches each, but every one of them holds the whole reference: 4 bytes a weight, or 0.52 with --load_in_4bit.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from formats import InputError, run

GB = 1e9
LOGITS_CHUNK = {"cpu": 2**24, "gpu": 2**27}  # of model.py, which needs torch; tests/test_bench.py compares the two


def dims(hidden, layers, heads, kv_heads, intermediate, vocab, tied, bias=False, head_dim=None):
    """The numbers of a Llama- or Qwen2-like config under the names a config.json has."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate, "vocab_size": vocab, "tie_word_embeddings": tied, "attention_bias": bias, "head_dim": head_dim,
    }  # fmt: skip


PAPER_MODELS = {
    "Qwen2.5-0.5B": dims(896, 24, 14, 2, 4864, 151936, True, True),
    "Qwen2.5-1.5B": dims(1536, 28, 12, 2, 8960, 151936, True, True),
    "Qwen2.5-3B": dims(2048, 36, 16, 2, 11008, 151936, True, True),
    "Qwen2.5-7B": dims(3584, 28, 28, 4, 18944, 152064, False, True),
    "Qwen2.5-14B": dims(5120, 48, 40, 8, 13824, 152064, False, True),
    "Qwen2.5-32B": dims(5120, 64, 40, 8, 27648, 152064, False, True),
    "Llama-3.2-1B": dims(2048, 16, 32, 8, 8192, 128256, True),
    "Llama-3.2-3B": dims(3072, 28, 24, 8, 8192, 128256, True, head_dim=128),
    "Llama-3.1-8B": dims(4096, 32, 32, 8, 14336, 128256, False),
    "Llama-2-7B": dims(4096, 32, 32, 32, 11008, 32000, False),
    "Llama-2-13B": dims(5120, 40, 40, 40, 13824, 32000, False),
}
PAPER_DEVICES = {"Qwen2.5-14B": (8, 32), "Qwen2.5-32B": (8, 32), "Llama-3.1-8B": (4, 8, 32), "Llama-2-13B": (4, 8, 32), "Qwen2.5-7B": (4, 8, 32)}


# ----------------------------------------------------------------------------------------------------------------------
# Counting


def attention_widths(config):
    """(columns of the query, of the key)."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim


def layer_matrices(config):
    """Weights of the linear layers of one transformer layer, as (in, out)."""
    D, I = config["hidden_size"], config["intermediate_size"]  # noqa: E741
    Q, K = attention_widths(config)
    return [(D, Q), (D, K), (D, K), (Q, D), (D, I), (D, I), (I, D)]


def layer_weights(config):
    Q, K = attention_widths(config)
    return sum(i * o for i, o in layer_matrices(config)) + 2 * config["hidden_size"] + (Q + 2 * K if config.get("attention_bias") else 0)


def head_weights(config):
    """Of the embedding; an untied head has as many again."""
    return config["vocab_size"] * config["hidden_size"]


def weights(config):
    """All of them."""
    embeddings = head_weights(config) * (1 if config["tie_word_embeddings"] else 2)
    return config["num_hidden_layers"] * layer_weights(config) + embeddings + config["hidden_size"]


def adapter_weights(config, rank):
    return config["num_hidden_layers"] * sum(rank * (i + o) for i, o in layer_matrices(config))


def layer_activations(config, autocast):
    """Bytes a token that autograd keeps of one layer."""
    D, I, (Q, K) = config["hidden_size"], config["intermediate_size"], attention_widths(config)  # noqa: E741
    stats = 8 + 4 * config["num_attention_heads"]  # the norms' reciprocals, attention's logsumexp
    if autocast:
        return 16 * D + 2 * (5 * D + 2 * Q + 2 * K + 4 * I) + stats
    return 4 * (6 * D + 2 * Q + 2 * K + 4 * I) + stats


def training_memory(config, devices=1, B=8, T=1024, checkpointing=True, autocast=True, lora_rank=None, in_4bit=False, kind="gpu"):
    """Bytes on one device (of kind "cpu" or "gpu"), by name, of a VAR run with micro-batches of B rows of T tokens."""
    P, L, D, head = weights(config), config["num_hidden_layers"], config["hidden_size"], head_weights(config)
    layer = layer_weights(config)
    linear = L * sum(i * o for i, o in layer_matrices(config))
    trained = adapter_weights(config, lora_rank) if lora_rank else P
    per_layer = B * T * layer_activations(config, autocast)
    half = 2 if autocast else 0
    if in_4bit:
        copies = half * layer  # one layer is unpacked at a time
    elif devices == 1:
        copies = half * (P - (0 if config["tie_word_embeddings"] else head))
    else:
        copies = (half or 4) * ((1 if config["tie_word_embeddings"] else 2) * head + 3 * layer)
    return {
        "weights": (0.52 * linear + 4 * (P - linear) + 4 * (trained if lora_rank else 0) if in_4bit else 4 * (P + (trained if lora_rank else 0))) / devices,
        "gradients": 4 * trained / devices,
        "AdamW": 8 * trained / devices,
        "copies": copies,
        "activations": (B * T * 4 * D * L + per_layer if checkpointing else L * per_layer) + B * T * 8 * D,
        "head": (10 if autocast else 8) * min(LOGITS_CHUNK[kind], B * T * config["vocab_size"]) + (4 * head if config["tie_word_embeddings"] and not lora_rank else 0),
    }


def tables_cost(config, N, B, prompt_tokens, response_tokens):
    """What Algorithm 1 lines 3-5 cost with this model as reference (or as reward model): forward tokens, FLOPs, bytes on disk (both tables)."""
    tokens = N * (prompt_tokens + B * response_tokens)
    body = weights(config) - head_weights(config) * (1 if config["tie_word_embeddings"] else 2)
    return {"tokens": tokens, "flops": 2 * body * tokens + 2 * head_weights(config) * N * B * response_tokens, "bytes": 8 * N * B + 4 * N}


def useful_flops(config, rows):
    """FLOPs of one training step that no implementation can leave out, rows = [(prompt tokens, response tokens), ...].

    Matrix products of the layers on real tokens and of the head on response tokens, causal attention; twice that again for backward.
    No padding, nothing computed twice, nothing that is not a matrix product.
    """
    linear = config["num_hidden_layers"] * sum(i * o for i, o in layer_matrices(config))
    Q, _ = attention_widths(config)
    forward = sum(2 * linear * (p + r) + 2 * config["num_hidden_layers"] * Q * (p + r) ** 2 + 2 * head_weights(config) * r for p, r in rows)
    return 3 * forward


# ----------------------------------------------------------------------------------------------------------------------
# The tables of bench/README.md


def memory_table(configs, devices, B, T):
    lines = [
        f"GB per device, B = {B} rows of {T} tokens, bfloat16 autocast over float32 weights, `--gradient_checkpointing`:",
        "",
        "| model | devices | weights | gradients | AdamW | bf16 copies | activations | head | sum |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, config in configs.items():
        runs = [(name, W, {}) for W in devices or PAPER_DEVICES.get(name, (1, 4))]
        runs += [(f"{name}, 4 bits, rank 16", W, {"in_4bit": True, "lora_rank": 16}) for W in (1, 8, 32) if name == "Qwen2.5-32B"]
        for label, W, more in runs:
            parts = training_memory(config, W, B, T, **more)
            cells = [f"{value / GB:.1f}" for value in (*parts.values(), sum(parts.values()))]
            lines.append(f"| {label} | {W} | " + " | ".join(cells) + " |")
    return lines


def tables_table(configs, N, B, prompt_tokens, response_tokens):
    """Cost of the reference's table for each model. The reward model's costs the same kind of pass, through its own size."""
    lines = [
        f"The reference's table for N = {N:,} examples, prompts of {prompt_tokens} and responses of {response_tokens} tokens, B = {B}:",
        "",
        "| model | forward tokens | PFLOP | of it each of 4, 8, 32 devices | against one epoch of training | weights on each device | on disk, both tables |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, config in configs.items():
        cost = tables_cost(config, N, B, prompt_tokens, response_tokens)
        epoch = useful_flops(config, [(prompt_tokens, response_tokens)]) * N
        peta, shares = cost["flops"] / 1e15, ", ".join(f"{cost['flops'] / 1e15 / W:,.0f}" for W in (4, 8, 32))
        lines.append(f"| {name} | {cost['tokens']:,} | {peta:,.0f} | {shares} | {cost['flops'] / epoch:.2f}x | {4 * weights(config) / GB:.1f} GB | {cost['bytes'] / 1e6:.1f} MB |")
    return lines


# fmt: off
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Memory per device and cost of the tables, from model configs alone, as Markdown tables.")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="config.json of Llama- or Qwen2-like models (default: the paper's models)")
    parser.add_argument("--devices", nargs="+", type=int, metavar="W", help="how many devices (default: 1 and 4; for the paper's larger models up to 32)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="B", help="rows of a micro-batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="T", help="tokens of its longest row (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=17000, metavar="N", help="examples of the tables (default: %(default)s, both responses of the 8.5K pairs of the paper's Sec. 4.1)")
    parser.add_argument("--prompt_tokens", type=int, default=256, metavar="N", help="mean length, for the tables (default: %(default)s)")
    parser.add_argument("--response_tokens", type=int, default=256, metavar="N", help="mean length, for the tables (default: %(default)s)")
    return parser.parse_args(argv)


# fmt: on


def read_config(path):
    """The numbers of a config.json. InputError: not a file, a number missing."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable config.json ({error})") from None
    found = {"attention_bias": found.get("model_type") == "qwen2", "tie_word_embeddings": False, "num_key_value_heads": found.get("num_attention_heads")} | found
    if missing := [name for name in dims(*[0] * 7) if name not in found and name != "head_dim"]:
        raise InputError(f"{path}: has no {', '.join(missing)}; the formula knows Llama- and Qwen2-like models")
    return found


def main(args):
    configs = {Path(path).parent.name or path: read_config(path) for path in args.config} or PAPER_MODELS
    print("\n".join(memory_table(configs, args.devices, args.batch_size, args.tokens)) + "\n")
    print("\n".join(tables_table(configs, args.examples, args.batch_size, args.prompt_tokens, args.response_tokens)))


if __name__ == "__main__":
    run(lambda: main(parse_args()))
