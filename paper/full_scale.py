"""
The paper's own runs as commands of this repository, and its numbers. Printed by `python paper/reproduce.py ITEM --scale full --dry_run`.

What the paper gives: models, data, B = 8, AdamW with a cosine, learning rates 1e-5 and 5e-6, 4 x A100 (8 for Llama3.1-8B and Qwen2.5-14B, 4 x 8 for 32B
in 4 bits and for Sec. 4.3, which alone states two epochs), three seeds of evaluation. What it does not: beta, warm-up, length limits, DPO's beta, GRPO's
settings, which part of OffsetBias is its test split (the hub has one split: SPLIT cuts it). There our defaults stand; we also train three seeds.
A batch of DPO is 8 pairs, 16 responses, as elsewhere; of VAR 8 responses.
"""

LLAMA = {"Llama3.2-1B": "meta-llama/Llama-3.2-1B", "Llama3.2-3B": "meta-llama/Llama-3.2-3B", "Llama3.1-8B": "meta-llama/Llama-3.1-8B", "Llama2-13B": "meta-llama/Llama-2-13b-hf"}
QWEN = {f"Qwen2.5-{size}": f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")}
INSTRUCT = {"Llama3.2-1B": "meta-llama/Llama-3.2-1B-Instruct", "Llama3.2-3B": "meta-llama/Llama-3.2-3B-Instruct", "Llama3.1-8B": "meta-llama/Llama-3.1-8B-Instruct"}
JUDGE, DATA = "NCSOFT/Llama-3-OffsetBias-RM-8B", "offsetbias_train.jsonl"
SPLIT = [
    "# OffsetBias: one split on the hub, of which a twentieth is held out (the paper does not say what its test split is)",
    """python -c "import datasets; d = datasets.load_dataset('NCSOFT/offsetbias', split='train').train_test_split(0.05, seed=0); [d[s].to_json(f'offsetbias_{s}.jsonl') for s in d]\"""",
]
HH = "Anthropic/hh-rlhf"
SUBSETS = f"harmless_base={HH}:harmless-base helpful_base={HH}:helpful-base helpful_online={HH}:helpful-online helpful_rejection={HH}:helpful-rejection-sampled"
RATES, SEEDS = ("1e-5", "5e-6"), (0, 1, 2)
ULTRAFEEDBACK = "ultrafeedback_10k.jsonl"
SAMPLE = [
    "# 10,000 prompts of openbmb/UltraFeedback; the paper does not say which",
    f"""python -c "import datasets; datasets.load_dataset('openbmb/UltraFeedback', split='train').shuffle(seed=0).select(range(10000)).to_json('{ULTRAFEEDBACK}')\"""",
]
NODES = "# training: on each of 4 nodes, with --machine_rank 0 to 3 and --main_process_ip of the first (configs/fsdp2_multinode.yaml)"


def launch(name, program="train.py", data=DATA):
    """accelerate launch with the file and number of GPUs of the paper, --accum the same number: one micro-batch a GPU and step."""
    if data == ULTRAFEEDBACK:
        return f"accelerate launch --config_file configs/fsdp2_multinode.yaml --num_machines 4 --num_processes 32 {program} --accum 32"
    if "32B" in name:
        return f"accelerate launch --config_file configs/fsdp2_4bit.yaml --num_machines 4 --num_processes 32 {program} --load_in_4bit --lora_rank 16 --accum 32"
    gpus = 8 if any(size in name for size in ("3.1-8B", "14B")) else 4
    large = " --gradient_checkpointing" if any(size in name for size in ("7B", "8B", "13B", "14B")) else ""
    return f"accelerate launch --config_file configs/fsdp2.yaml --num_processes {gpus} {program} --accum {gpus}{large}"


def train(name, model, loss, out, rate, seed, data=DATA, more="", B=8, epochs=2):
    judge = f"--reward_model {JUDGE}" if loss in ("var", "alol") else ""
    tables = f"--tables {out.rsplit('-lr', 1)[0]}-seed{seed}.safetensors" if loss == "var" else ""
    settings = f"--data {data} --batch_size {B} --epochs {epochs} --lr {rate} --seed {seed}"
    return " ".join(f"{launch(name, data=data)} --loss {loss} --model {model} {judge} {settings} {tables} {more} --output_dir {out}".split())


def evaluate(model, folder=None, name=""):
    """Answers to HHA's four subsets, and to OffsetBias apart (it is not in Avg. All), scored. `folder`: where, if not in the model's own."""
    folder = folder or model
    bits = "--load_in_4bit" if "32B" in name else "--dtype bfloat16"
    generate = f"accelerate launch --num_processes 8 eval.py generate --model {model} {bits} --seeds 0,1,2"
    lines = [f"{generate} --data {SUBSETS} --split test --out {folder}/gen.jsonl", f"{generate} --data offsetbias=offsetbias_test.jsonl --out {folder}/offsetbias.jsonl"]
    return lines + [f"python eval.py reward --gen {folder}/{gen}.jsonl --reward_model {JUDGE} --out {folder}/{out}.json" for gen, out in (("gen", "reward"), ("offsetbias", "offsetbias_reward"))]


def variants(models, losses=("dpo", "var")):
    """Base, DPO, VAR, SFT+DPO, SFT+VAR of these models, every learning rate, three seeds, each generated from and scored."""
    lines = [*SPLIT]
    for name, model in models.items():
        lines += [f"# {name}"] + ([NODES] if "32B" in name else [])
        sft = f"runs/full/{name}/sft-lr1e-5-seed0"
        lines += [*evaluate(model, f"runs/full/{name}/base", name), train(name, model, "sft", sft, "1e-5", 0), *evaluate(sft, name=name)]
        for start, prefix in ((model, ""), (sft, "sft_")):
            for loss in losses:
                for rate in RATES:
                    for seed in SEEDS:
                        out = f"runs/full/{name}/{prefix}{loss}-lr{rate}-seed{seed}"
                        lines += [train(name, start, loss, out, rate, seed), *evaluate(out, name=name)]
    return lines


def win_rates():
    lines = []
    for name, model in INSTRUCT.items():
        for loss in ("dpo", "var"):
            for seed in SEEDS:
                out = f"runs/full/{name}-Instruct/{loss}-lr5e-6-seed{seed}"
                lines += [train(name, model, loss, out, "5e-6", seed), evaluate(out)[0], judge(out)]
    folders = [f"runs/full/{name}/{variant}-lr1e-5-seed{seed}" for name in (*LLAMA, *QWEN) for variant in ("dpo", "var", "sft_dpo", "sft_var") for seed in SEEDS]
    return [*SPLIT, "# Table 3: already aligned models", *lines, "# Figure 1: the folders of Tables 1 and 2", *map(judge, folders)]


def judge(folder):
    """99 prompts of each of 4 subsets, both orders, three seeds: 2,376 calls a folder. The key is read from OPENAI_API_KEY."""
    server = "--base_url https://api.openai.com/v1 --judge gpt-4o-2024-11-20"
    return f"python eval.py winrate --gen {folder}/gen.jsonl --baseline chosen {server} --per_subset 99 --out {folder}/winrate.json"


def grpo():
    lines = [*SPLIT]
    for name, model in (("Qwen2.5-3B", QWEN["Qwen2.5-3B"]), ("Llama3.2-3B", "runs/full/Llama3.2-3B/sft-lr1e-5-seed0")):
        out, base = f"runs/full/{name}/grpo", (QWEN | LLAMA)[name]
        lines += [f"# {name}: both on 4 GPUs. GRPO keeps weights, gradients, AdamW and the judge on each: about 70 GB, not tried"]
        lines += [train(name, base, "sft", model, "1e-5", 0)] if model != base else []
        settings = f"--data {DATA} --prompts 64 --samples 8 --epochs 1 --reward_dtype bfloat16"
        lines += [f"accelerate launch --num_processes 4 --mixed_precision bf16 baselines/grpo.py --model {model} --reward_model {JUDGE} {settings} --output_dir {out}", *evaluate(out)]
        out = f"runs/full/{name}/var-one-epoch"
        lines += [train(name, base, "var", out, "1e-5", 0, epochs=1), *evaluate(out)]
    return lines


TASKS = (("gsm8k", 4, "--gen_kwargs max_gen_toks=512"), ("mmlu", 0, ""), ("bbh_cot_fewshot", 3, ""), ("humaneval_instruct", 0, "--confirm_run_unsafe_code"))


def benchmark(model, out=None):
    """The four benchmarks. A base model of the hub may have no chat template; a folder of ours always has one."""
    template = "" if out else " --apply_chat_template"
    line = f"lm_eval run --model hf --model_args pretrained={model},dtype=bfloat16{template} --batch_size 8 --output_path {out or model}/lm_eval"
    allow = lambda task: "HF_ALLOW_CODE_EVAL=1 " if "humaneval" in task else ""
    return [f"{allow(task)}{line} --tasks {task} --num_fewshot {shots} {more}".strip() for task, shots, more in TASKS]


def benchmarks():
    """Table 5: the best-scored response of a prompt for VAR and A-LoL, best against worst for DPO (Sec. 4.3)."""
    lines = [*SAMPLE, NODES]
    for name, model in (("Llama2-7B", "meta-llama/Llama-2-7b-hf"), ("Qwen2.5-7B", QWEN["Qwen2.5-7B"])):
        lines += [f"# {name}", *benchmark(model, f"runs/full/{name}/base")]
        for loss in ("dpo", "alol", "var"):
            out = f"runs/full/{name}/ultrafeedback-{loss}"
            lines += [train(name, model, loss, out, "5e-6", 0, data=ULTRAFEEDBACK, more="" if loss == "dpo" else "--responses best"), *benchmark(out)]
    return lines


def commands(item):
    """Command lines, with `#` lines between them, of one item of paper/items.py."""
    if item == "table6":
        lines, name = [*SAMPLE, NODES], "Qwen2.5-7B"
        for B in (2, 4, 8):
            out = f"runs/full/{name}/ultrafeedback-var-B{B}"
            lines += [train(name, QWEN[name], "var", out, "5e-6", 0, data=ULTRAFEEDBACK, more="--responses best", B=B), *benchmark(out)]
        return lines
    if item == "figure2":
        names = ("Llama3.2-1B", "Llama3.2-3B", "Llama3.1-8B")
        held_out = "--eval_fraction 0.02 --eval_every 50"  # VAR names the judge anyway
        judged = {"dpo": f"{held_out} --reward_model {JUDGE}", "var": held_out}
        return SPLIT + [train(name, LLAMA[name], loss, f"runs/full/figure2/{name}-{loss}", "1e-5", 0, more=judged[loss]) for name in names for loss in judged]
    found = {"table1": lambda: variants(LLAMA), "table2": lambda: variants(QWEN), "table3": win_rates, "table4": grpo, "table5": benchmarks}
    found |= {"table7": lambda: ["# the generations of Table 1's Llama3.1-8B folders: runs/full/Llama3.1-8B/*/gen.jsonl", *variants({"Llama3.1-8B": LLAMA["Llama3.1-8B"]})]}
    found |= {"figure3": lambda: ["# response_tokens of Table 1's folders, drawn by", "python eval.py report " + " ".join(f"--gen {v}=runs/full/Llama3.1-8B/{v}{'' if v == 'base' else '-lr1e-5-seed0'}/gen.jsonl" for v in ("base", "sft", "dpo", "var", "sft_dpo", "sft_var")) + " --out report.html"]}
    found |= {"readings": lambda: ["# not in the paper"]}
    return found[item]()


# ----------------------------------------------------------------------------------------------------------------------
# The paper's numbers (100 * sigmoid of the reward model's logit, as far as one can tell), for the tables that are shown beside ours

AVG_ALL = {  # Avg. All of Tables 1 and 2: Base, DPO, VAR, SFT+DPO, SFT+VAR
    "Llama3.2-1B": (25.88, 45.66, 57.44, 62.98, 65.84), "Llama3.2-3B": (30.33, 58.42, 61.51, 69.00, 68.52), "Llama3.1-8B": (37.68, 59.48, 62.06, 68.04, 68.32),
    "Llama2-13B": (29.59, 51.61, 60.56, 59.24, 64.09), "Qwen2.5-0.5B": (29.06, 55.93, 59.00, 58.68, 61.77), "Qwen2.5-1.5B": (30.36, 56.41, 65.73, 59.86, 66.69),
    "Qwen2.5-3B": (39.96, 63.17, 67.24, 57.98, 68.75), "Qwen2.5-7B": (44.17, 65.35, 67.98, 61.77, 67.65), "Qwen2.5-14B": (36.55, 57.03, 66.94, 67.97, 69.22),
    "Qwen2.5-32B": (37.27, 34.02, 48.73, 30.61, 52.45),
}  # fmt: skip


def averages(names):
    head = "| Avg. All | Base | DPO | VAR | SFT+DPO | SFT+VAR |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "\n".join(f"| {name} | " + " | ".join(f"{x:.2f}" for x in AVG_ALL[name]) + " |" for name in names)


PAPER = {
    "table1": averages(LLAMA),
    "table2": averages(QWEN),
    "table4": "| Avg. All, time an epoch | GRPO | VAR |\n| --- | --- | --- |\n| Qwen2.5-3B | 68.23, 2h54min | 67.25, 42min |\n| Llama3.2-3B (GRPO from SFT, VAR from base) | 60.34, 3h8min | 61.51, 37min |",
    "table3": "| Avg. win rate, All | DPO | VAR |\n| --- | --- | --- |\n| Llama3.2-1B instruct | 29.21 ± 0.17 | 61.53 ± 0.22 |\n| Llama3.2-3B instruct | 66.42 ± 0.58 | 73.57 ± 0.95 |\n| Llama3.1-8B instruct | 49.41 ± 0.17 | 71.13 ± 0.34 |",
    "table6": "| B, Qwen2.5-7B | 2 | 4 | 8 |\n| --- | --- | --- | --- |\n| mean of four benchmarks | 67.49 | 68.28 | 68.42 |",
    "table5": "| | Base | DPO | A-LoL | VAR |\n| --- | --- | --- | --- | --- |\n| Llama2-7B, mean of four benchmarks | 13.79 | 20.86 | 22.71 | 24.20 |\n| Qwen2.5-7B | 61.80 | 57.44 | 62.40 | 68.42 |",
}
