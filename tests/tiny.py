"""Tiny tokenizers and models made on the spot, for the tests. Nothing is downloaded and nothing is kept."""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED_DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # of the programs the tests start

import accelerate
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import formats

TEXTS = [
    "Which tree keeps its leaves in winter? The pine keeps its needles all year.",
    "How long does bread dough need to rise? About an hour in a warm kitchen.",
    "user:\nWhat is the tallest mountain?\nassistant:\nI would rather talk about boats.",
    "Fold the letter twice, put it in the envelope, and do not forget the stamp!",
    "naïve café, 日本語, emoji 🙂🙃, tabs\tand\nnew lines\n\n", "system: you are brief. Answer yes or no.",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bpe_tokenizer(texts=TEXTS, vocab_size=400, bos="<s>", eos="</s>", pad=None, extra=(), chat_template=None):
    """A byte-level BPE tokenizer trained on `texts`."""
    specials = [token for token in dict.fromkeys([bos, eos, pad, *extra]) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=list(extra) or None, clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat_template
    return fast


def chatml_tokenizer(**more):
    """ChatML turns, no BOS (as Qwen2), end of turn <|im_end|>, a pad token of its own."""
    return bpe_tokenizer(bos=None, eos="<|im_end|>", pad="<|endoftext|>", extra=("<|im_start|>",), chat_template=CHATML, **more)


def config(architecture, vocab_size, hidden=32, layers=2, tied=False, **more):
    """A config of `architecture` (llama, qwen2, gpt_neox, ...) small enough for a test."""
    common = dict(
        vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * hidden,
        max_position_embeddings=1024, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if architecture != "gpt_neox":
        common["num_key_value_heads"] = 2
    return transformers.AutoConfig.for_model(architecture, **(common | more))


def causal_lm(architecture="llama", vocab_size=400, seed=0, dtype=torch.float32, **more):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config(architecture, vocab_size, **more)).to(dtype)


def reward_model(architecture="llama", vocab_size=400, seed=1, num_labels=1, **more):
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_config(config(architecture, vocab_size, num_labels=num_labels, **more))


def save(folder, model, tokenizer):
    """A Hugging Face folder with both; returns its path as a string."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    """A .jsonl file of these rows; returns its path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hears_ctrl_c():
    """preexec_fn of a program that will be sent Ctrl-C: whoever is started in the background (`make test &`) passes on that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_program(module, argv, folder, before=None, processes=1):
    """`python MODULE.py ARGV` in a forked child, which spares it five seconds of imports -> (exit status, stdout, stderr) of the first process.

    `before` is called in the child first: what it patches is gone with the child. Exit status -9 is a kill -9. `processes`: so many
    children that know of each other, as torchrun starts them.
    """
    files = [[Path(folder) / f"{name}{rank}.txt" for name in ("stdout", "stderr")] for rank in range(processes)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush(), sys.stderr.flush()
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            _be_the_program(module, argv, files[rank], before)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses[0] or max(statuses, key=abs), *(file.read_text() for file in files[0])


def _be_the_program(module, argv, files, before):
    """The child's whole life; does not return."""
    status = 1
    try:
        for number, file in zip((1, 2), files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = [f"{module.__name__}.py", *argv]
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of tests that ran before in this process
        accelerate.state.GradientState._reset_state()
        if before:
            before()
        formats.run(lambda: module.main(module.parse_args(argv)))
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
