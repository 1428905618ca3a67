"""Our output folders in lm-evaluation-harness, offline: the benchmarks of Table 5 are theirs to score, opening our models is ours to show."""

import json
import os
import subprocess
import sys

import pytest
from tiny import ENVIRONMENT, causal_lm, chatml_tokenizer, run_program, save, write

import train

pytest.importorskip("lm_eval", reason="lm_eval is in requirements-test.txt")

SUMS = [(2, 3), (7, 1), (4, 4), (9, 5), (6, 2), (3, 8)]
ROWS = [{"question": f"Ann has {a} pears and gets {b}. How many?", "answer": f"{a} + {b} is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"} for a, b in SUMS]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {rows}
    test: {rows}
output_type: generate_until
fewshot_split: train
test_split: test
num_fewshot: {shots}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
fewshot_config:
  doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["Question:", "<|im_end|>"]
  do_sample: false
  max_gen_toks: 48
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "#### (-?[0-9.,]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def lm_eval(model, folder, out):
    """`lm_eval run` as PAPER.md has it, on the local tasks -> ({task: exact match}, {task: samples})."""
    command = ["run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--include_path", str(folder), "--tasks", "sums_0shot,sums_4shot"]
    command += ["--apply_chat_template", "--device", "cpu", "--batch_size", "3", "--log_samples", "--output_path", str(out)]
    offline = ENVIRONMENT | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "lm_eval", *command], env=offline, capture_output=True, text=True, timeout=300, cwd=os.path.dirname(out))
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = out.rglob("results_*.json")
    scores = {task: numbers["exact_match,strict-match"] for task, numbers in json.loads(found.read_text())["results"].items()}
    return scores, {task: [json.loads(line) for line in next(out.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()] for task in scores}


@pytest.mark.slow
def test_lm_eval_opens_an_output_folder_and_scores_what_was_learned(tmp_path):
    """A model taught six sums by train.py answers all of them in lm_eval, through our chat template, and the model it came from none.

    So weights, tokenizer, template and end of turn all arrive. The 4-shot prompt shows the examples as turns of the same template.
    """
    texts = [f"Question: {row['question']}\nAnswer:" for row in ROWS] + [row["answer"] for row in ROWS]
    tokenizer = chatml_tokenizer(texts=texts * 3, vocab_size=420)
    base = save(tmp_path / "base", causal_lm(vocab_size=len(tokenizer), hidden=64), tokenizer)
    pairs = [{"prompt": f"Question: {row['question']}\nAnswer:", "response": row["answer"]} for row in ROWS]
    argv = ["--model", base, "--data", write(tmp_path / "pairs.jsonl", pairs), "--loss", "sft", "--responses", "all", "--batch_size", "6"]
    argv += ["--output_dir", str(tmp_path / "run"), "--lr", "5e-3", "--max_steps", "120", "--save_every", "0", "--max_response_tokens", "64"]
    status, _, err = run_program(train, argv, tmp_path)
    assert status == 0, err

    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = write(folder / "rows.jsonl", ROWS)
    for shots in (0, 4):
        (folder / f"sums_{shots}shot.yaml").write_text(TASK.format(name=f"sums_{shots}shot", rows=rows, shots=shots))
    scores, samples = lm_eval(tmp_path / "run", folder, tmp_path / "scored")
    assert scores["sums_0shot"] == 1.0 and len(samples["sums_0shot"]) == len(ROWS)
    by_question = {row["question"]: row["answer"] for row in ROWS}
    for sample in samples["sums_0shot"]:
        assert sample["resps"][0][0] == by_question[sample["doc"]["question"]]  # to the last character: the end of turn stopped it
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        assert prompt == f"<|im_start|>user\nQuestion: {sample['doc']['question']}\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    for sample in samples["sums_4shot"]:
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.count("<|im_start|>assistant\n") == 5 and prompt.count("#### ") == 4 and prompt.endswith("<|im_start|>assistant\n")
    assert lm_eval(base, folder, tmp_path / "before")[0]["sums_0shot"] == 0.0
