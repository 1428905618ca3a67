"""Tiny tokenizers and models made on the spot, for the tests. Nothing is downloaded and nothing is kept."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED_DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
