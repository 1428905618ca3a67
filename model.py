"""
What every program does with a model: load it, get log-probabilities from it, step it, save it. (Sampling: eval/sampling.py.)

`sequence_logps` is log pi(y|x) of Algorithm 1 lines 2 and 3 (the paper says "logit"; it is a log-probability):

    log pi(y|x) = sum over response tokens t of log_softmax(logits[t-1])[token t]           (B, T) x3 -> (B,)

Two things make it cheap without changing a gradient. The LM head is applied to response positions only, in chunks that are computed
again in backward, so memory does not grow with B*T*V. And a batch padded on the right needs no mask: causal attention already hides
the padding from every token before it.

The computation is the `forward` of the very module that accelerate prepares (`bind_sequence_logps`). Calling a prepared model's children
instead (`model.model`, then `lm_head`) leaves gradients unsynchronised under DDP, without a word, and fails under FSDP2.
"""

import contextlib
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import os
import shutil
import sys
import types
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from safetensors import SafetensorError
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data import check_model_name, end_of_turn_id, pad_id
from formats import InputError

WORTH_A_CALL = {"cpu": 64, "gpu": 2048}  # padding tokens that cost more than another call of the layers
LOGITS_CHUNK = {"cpu": 2**24, "gpu": 2**27}  # logits alive at once: 64 or 512 MB in float32, whatever B, T and V are

# ----------------------------------------------------------------------------------------------------------------------
# Load


def load_policy(name, dtype="float32", attn_implementation=None, trust_remote_code=False, load_in_4bit=False, lora_rank=None, sharded=False):
    """A causal language model of a local folder or hub name, in train mode, its forward able to give sequence log-probs.

    On CPU, but in 4 bits where it will stay. A folder that peft saved opens as its base with the adapter active and trainable;
    `lora_rank` puts a fresh adapter (which changes nothing yet) on every linear layer. `sharded`: it goes through accelerator.prepare, so
    under FSDP one process of a node may load for all.
    Dropout is off: log pi_theta is then a number, not a sample, and at step 0 it is the reference's own. float32 by default: in
    bfloat16 AdamW loses updates smaller than 1/256 of a weight (learning rates of 1e-5 live there).
    InputError: no such folder, not a causal LM, a head followed by a transform we do not know.
    """
    base = adapter_base(name)
    with contextlib.nullcontext() if sharded else every_process_loads():
        model = _load(transformers.AutoModelForCausalLM, base or name, dtype, attn_implementation, trust_remote_code, load_in_4bit=load_in_4bit)
        _check_head(model, name)
        if base or lora_rank:
            model = _with_adapter(model, name if base else None, lora_rank)
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in attribute or (attribute == "p" and isinstance(module, torch.nn.Dropout))):
                setattr(module, attribute, 0.0)
    return bind_sequence_logps(model).train()


def load_reward_model(name, dtype="auto", attn_implementation=None, trust_remote_code=False, load_in_4bit=False, new_head=False):
    """A sequence classifier with one label, in eval mode, on CPU (in 4 bits: where it will stay). `new_head`, for training: a model without a one-label head gets a fresh one.

    InputError: two labels, or (without new_head) no trained head in the checkpoint: its scores would be random numbers.
    """
    if not new_head:
        check_reward_model(name, trust_remote_code)
    with every_process_loads():
        auto_class = transformers.AutoModelForSequenceClassification
        return _load(auto_class, name, dtype, attn_implementation, trust_remote_code, new_head, load_in_4bit).eval()


def check_reward_model(name, trust_remote_code=False):
    """InputError unless the config of this model has one label. Loads no weights."""
    check_model_name(name)
    config = _from_pretrained(transformers.AutoConfig, name, trust_remote_code=trust_remote_code)
    if config.num_labels != 1:
        raise InputError(
            f"{name}: a reward model has one label, this one has {config.num_labels} ({'/'.join(config.architectures or ['?'])}); pass a one-label AutoModelForSequenceClassification"
        )


def _load(auto_class, name, dtype, attn_implementation, trust_remote_code, new_head=False, load_in_4bit=False):
    check_model_name(name)
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    more |= {"num_labels": 1, "ignore_mismatched_sizes": True} if new_head else {}
    more |= _four_bits() if load_in_4bit else {}
    transformers.logging.set_verbosity_error()  # its report of missing weights: what matters of it is an error below
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    model, info = _from_pretrained(auto_class, name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **more)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of bitsandbytes: in eval mode on such a CPU it packs 4-bit weights anew, after which
            module.support_avx512bf16_for_cpu = False  # no gradient passes through them, without a word; and narrow layers fail
    missing = sorted(key for key in info["missing_keys"] if not new_head or key.startswith(model.base_model_prefix + "."))
    if missing:  # transformers fills them with random numbers and only warns
        raise InputError(
            f"{name}: the checkpoint has no weights for {', '.join(missing[:3])}; as {auto_class.__name__} it would be random there"
        )
    return model


def _from_pretrained(auto_class, name, **more):
    try:  # safetensors only: a pickle can run code
        return auto_class.from_pretrained(name, **({} if auto_class is transformers.AutoConfig else {"use_safetensors": True}), **more)
    except (
        OSError,
        ValueError,
        ImportError,
        KeyError,
        RuntimeError,
        SafetensorError,
    ) as error:  # a missing or cut file, an unknown architecture, offline, a missing kernel
        raise InputError(
            f"{name}: cannot be loaded as {auto_class.__name__} ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from None


def _four_bits():
    """What from_pretrained needs to load in 4 bits (QLoRA's nf4 with double quantisation). InputError: bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load_in_4bit needs the optional package bitsandbytes: pip install bitsandbytes peft")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    compute = torch.bfloat16 if sharded or (torch.cuda.is_available() and torch.cuda.is_bf16_supported()) else torch.float32
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,  # FSDP shards floating types only, and casts them to bfloat16
        llm_int8_skip_modules=["lm_head", "embed_out", "score"],  # heads stay whole; the name is of 8 bits, the effect is not
    )
    device = torch.device("cuda", PartialState().local_process_index) if torch.cuda.is_available() else torch.device("cpu")
    return {"quantization_config": config, "device_map": {"": device}}


def adapter_base(name):
    """The model under a folder that peft saved, or None for any other name."""
    file = Path(name) / "adapter_config.json"
    return json.loads(file.read_text())["base_model_name_or_path"] if file.exists() else None


def _with_adapter(model, folder, rank):
    """`model` with the adapter of `folder`, or with a fresh one of this rank on all linear layers but the head; only the adapter is trainable."""
    try:
        import peft
    except ImportError:
        raise InputError("adapters (--lora_rank, folders with adapter_config.json) need the optional package peft: pip install peft") from None
    if folder is None:
        # alpha = 2 r, so that the learning rate means the same for every rank
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = json.loads((Path(folder) / "adapter_config.json").read_text())
    if rank and found.get("r") != rank:
        raise InputError(f"{folder}: its adapter has rank {found.get('r')}, --lora_rank is {rank}; leave the flag out to go on training it")
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def keep_only_adapter_in_state_dict(model):
    """From now on `model.state_dict()` holds the trainable weights alone, and loading one needs no others. After accelerator.prepare.

    Checkpoints are then small, and a base in 4 bits, whose packed weights do not load everywhere, is left as from_pretrained made it.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    def drop_frozen(module, state_dict, prefix, _):
        for key in [key for key in state_dict if key.removeprefix(prefix) not in trainable]:
            del state_dict[key]

    model.register_state_dict_post_hook(drop_frozen)
    model.register_load_state_dict_post_hook(lambda module, incompatible: incompatible.missing_keys.clear())


@contextlib.contextmanager
def every_process_loads():
    """Under FSDP with fsdp_cpu_ram_efficient_loading some versions of transformers read a checkpoint in one process alone; a model that is not sharded would be empty elsewhere."""
    name, old = "FSDP_CPU_RAM_EFFICIENT_LOADING", os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if old is None else os.environ.update({name: old})


def mixed_precision(name=None):
    """What accelerate should autocast to: what its launcher was told, else bfloat16 where the device has it and it is faster (float32 master
    weights stay). On a CPU that is from a hidden size of 512 on; `name`: the model that will be run."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if name is None or torch.accelerator.is_available() or not torch.cpu._is_avx512_bf16_supported():
        return "no"
    base = adapter_base(name) or name
    known = os.path.exists(os.path.join(base, "config.json"))  # a hub model is not worth a download here
    config = _from_pretrained(transformers.AutoConfig, base) if known else None
    return "bf16" if getattr(config and config.get_text_config(), "hidden_size", 0) >= 512 else "no"


def make_accelerator(tracker=None, folder=None, model=None):
    """An Accelerator whose collectives may wait long: for tables of unequal work, for one process that writes a checkpoint.

    `torchrun --nproc_per_node 2` works without a GPU too; left to itself, accelerate would run two programs that know nothing of each other.
    InputError: a tracker that is unknown or not installed, processes that cannot see each other.
    """
    patience, processes = InitProcessGroupKwargs(timeout=timedelta(hours=24)), int(os.environ.get("WORLD_SIZE", 1))
    more = {"cpu": processes > 1 and not torch.accelerator.is_available(), "mixed_precision": mixed_precision(model)}
    try:
        accelerator = Accelerator(kwargs_handlers=[patience], log_with=tracker, project_dir=folder, **more)
    except ValueError as error:
        raise InputError(f"{f'--tracker {tracker}' if tracker else 'the launch settings'}: {error}") from None
    if accelerator.num_processes != processes:
        raise InputError(f"{processes} processes were launched, accelerate sees {accelerator.num_processes}: they would write over each other")
    if tracker and not accelerator.log_with:
        raise InputError(
            f"--tracker {tracker}: not installed; pip install {tracker}, or leave the flag out (metrics.jsonl is always written)"
        )
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no" and torch.cuda.is_bf16_supported() and accelerator.is_main_process:
        print("note: the launcher asked for float32, several times slower here; --mixed_precision bf16, or a file of configs/, changes that")
    shard_in_float32(getattr(accelerator.state, "fsdp_plugin", None))
    return accelerator


def shard_in_float32(plugin):
    """Under FSDP2, compute in 16 bits but reduce gradients and return log-probs in float32. accelerate would do both in 16 bits: a token's
    log-prob of -10 is then off by up to 1/32, and DPO's log-ratios are not 0 at step 0."""
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=policy.param_dtype, reduce_dtype=torch.float32)


def release(*models):
    """Give a model's memory back; the caller must drop its own reference too."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.new_empty(0)  # not model.to("meta"): 4-bit weights refuse it
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fingerprint(name):
    """A short id of a model: the commit of a hub model, a hash over the files of a folder. Large weight files are sampled, not read whole."""
    folder = Path(name)
    if not folder.is_dir():
        config = transformers.utils.cached_file(
            name, "config.json", _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if config is None:
            raise InputError(f"{name}: neither a folder here nor a hub model that can be reached")
        return f"{name}@{Path(config).parent.name}"
    digest = hashlib.sha256((fingerprint(base) if (base := adapter_base(name)) else "").encode())
    patterns = (
        "model*.safetensors",
        "adapter_*",
        "config.json",
        "tokenizer*",
        "chat_template*",
    )  # not run.json or tables that lie beside them
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for block in range(64):  # all of a file up to 64 MB, else 64 evenly spaced megabytes: a fine-tuned model differs in every one
                stream.seek(block * max(size // 64, 2**20))
                digest.update(stream.read(2**20))
    return "sha256:" + digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def sequence_logps(model, input_ids, attention_mask, response_mask, mean=False):
    """log pi(y|x) of each row in nats, (B, T) x3 -> (B,) float32: the sum over the tokens under response_mask, or their mean.

    Left or right padded. `model` may be what accelerate.prepare returned, if `bind_sequence_logps` came before it.
    ValueError: a row without a response token after its first position.
    """
    counts = response_mask[:, 1:].sum(dim=1)  # (B,)  the first token has nothing before it and is never scored
    if (counts == 0).any():
        raise ValueError(f"row {int((counts == 0).nonzero()[0])} has no response token to score")
    logps = token_logps(model, input_ids, attention_mask, response_mask).sum(dim=1)  # (B, T-1) -> (B,)
    return logps / counts if mean else logps


def token_logps(model, input_ids, attention_mask, response_mask):
    """log pi(token t | tokens before t), (B, T) x3 -> (B, T-1) float32; column t-1 belongs to token t, 0 where response_mask is 0."""
    inner = getattr(model, "module", model)  # of DDP
    if "response_mask" not in inspect.signature(inner.forward).parameters:
        if inner is not model or "forward" in vars(model):
            raise ValueError("this model is wrapped already; call bind_sequence_logps(model) before accelerator.prepare(model)")
        bind_sequence_logps(model)
    return model(input_ids=input_ids, attention_mask=attention_mask, response_mask=response_mask)


def bind_sequence_logps(model):
    """Let `model(..., response_mask=...)` return token log-probs; without response_mask it is the forward it was. Returns the model."""

    def forward(self, *args, response_mask=None, **kwargs):
        if response_mask is None:
            return type(self).forward(self, *args, **kwargs)
        return _response_logps(self, response_mask=response_mask, **kwargs)

    # `generate` and peft read the signature, so the new one is the old one plus our argument
    old = inspect.signature(type(model).forward)
    ours = inspect.Parameter("response_mask", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(old.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind == p.VAR_KEYWORD), len(parameters))
    forward.__signature__ = old.replace(parameters=parameters[:at] + [ours] + parameters[at:])
    return bind(model, forward)


def bind(model, forward):
    """Make `forward` the model's own forward, so that what accelerate wraps around the model wraps around it too."""
    model.forward = types.MethodType(forward, model)
    return model


def _response_logps(model, input_ids, attention_mask, response_mask):
    causal_lm = without_adapter_wrapper(model)
    found = []
    for some in rows_of_similar_length(causal_lm, attention_mask):
        T = int(attention_mask[some].sum(dim=1).max()) if len(some) < len(input_ids) else input_ids.shape[1]
        inputs = model_inputs(input_ids[some, :T], attention_mask[some, :T])
        hidden = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state  # (b, T, D)
        rows, columns = response_mask[some, 1:T].nonzero(as_tuple=True)  # (n,) each: the response tokens of these rows
        found.append((hidden[:, :-1][rows, columns], some[rows], columns))  # (b, T, D) -> (n, D): position t-1 predicts token t
    hidden, rows, columns = map(torch.cat, zip(*found))  # (N, D), (N,), (N,): the N response tokens of the batch
    logps = logps_from_hidden(causal_lm, hidden, input_ids[:, 1:][rows, columns])  # (N,)
    return logps.new_zeros(response_mask[:, 1:].shape).index_put((rows, columns), logps)  # (N,) -> (B, T-1)


def rows_of_similar_length(causal_lm, attention_mask):
    """The rows of a batch in groups whose common padding is little, as tensors of indices: dialogues of one batch differ so much in length
    that more than half of it would be padding. One group where padding stands on the left, and under FSDP, where every process must call
    the layers equally often."""
    B, device = len(attention_mask), attention_mask.device
    padded_right = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
    if not padded_right or any(isinstance(module, FSDPModule) for module in causal_lm.modules()):
        return [torch.arange(B, device=device)]
    lengths = attention_mask.sum(dim=1).tolist()
    groups, padding = [], 0
    for row in sorted(range(B), key=lambda i: -lengths[i]):
        padding += (lengths[groups[-1][0]] - lengths[row]) if groups else 0
        if not groups or padding > WORTH_A_CALL[cpu_or_gpu(device)]:
            groups.append([])
            padding = 0
        groups[-1].append(row)
    return [torch.tensor(rows, device=device) for rows in groups]


def cpu_or_gpu(device):
    return "cpu" if device.type == "cpu" else "gpu"


def without_adapter_wrapper(model):
    """The transformers model under peft's (whose own .base_model returns logits). Its layers still have the adapter in them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_inputs(input_ids, attention_mask):
    """Keyword arguments of a decoder's forward. Padding on the right needs no mask: causal attention hides it from all tokens before it."""
    if bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        return {"input_ids": input_ids}
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)}


def logps_from_hidden(causal_lm, hidden, targets):
    """log_softmax(head(hidden))[target], (N, D), (N,) -> (N,) float32, never holding more than LOGITS_CHUNK logits.

    Backward computes each chunk's logits again instead of keeping them: a third more work in the head for none of its memory.
    """
    head, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()

    def chunk_logps(hidden, targets):
        logits = head(hidden)  # (n, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 log-probs would be off by tenths of a nat after the sum
        return -cross_entropy(_after_head(logits, config), targets, reduction="none")  # (n,); minus: its word is the loss

    size = max(1, LOGITS_CHUNK[cpu_or_gpu(hidden.device)] // config.vocab_size)
    chunks = list(zip(hidden.split(size), targets.split(size)))
    if len(chunks) == 1:  # its logits may stay: backward holds one chunk in any case
        return chunk_logps(hidden, targets)
    if type(head) is torch.nn.Linear and head.bias is None and _after_head(hidden, config) is hidden:  # nothing but a matrix
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        return ChunkedHead.apply(hidden.to(dtype), head.weight, targets, size)
    return torch.cat([checkpoint(chunk_logps, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in chunks])


class ChunkedHead(torch.autograd.Function):
    """log_softmax(hidden W^T)[target], (N, D), (V, D), (N,) -> (N,) float32, its backward by hand: with g = dL/dlogp,

        dL/dlogits = g (onehot(target) - softmax(logits))          (n, V), one chunk at a time, in place

    and dL/dW added up in one (V, D) matrix, where autograd would hold two, the sum and the chunk's. All chunks use the same memory: on a
    CPU, asking for it anew costs a third of the time. The plain form is the line with `checkpoint` above; the tests compare the two.
    """

    @staticmethod
    def forward(ctx, hidden, given, targets, size):
        weight = given.to(hidden.dtype)  # under autocast hidden is of 16 bits
        logps, normalizers = [], []  # (n,) each; the normalizer is logsumexp(logits)
        buffer = ChunkedHead.buffer(hidden, weight, size)
        log_probs = torch.empty_like(buffer, dtype=torch.promote_types(buffer.dtype, torch.float32))
        for h, t in zip(hidden.split(size), targets.split(size)):
            logits = ChunkedHead.logits(h, weight, buffer)
            chunk = torch.log_softmax(logits, dim=1, out=log_probs[: len(h)])
            logps.append(chunk.gather(1, t[:, None]).squeeze(1))
            normalizers.append(logits.gather(1, t[:, None]).squeeze(1) - logps[-1])
        ctx.save_for_backward(hidden, given, targets, torch.cat(normalizers))
        ctx.size = size
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        buffer, grad_hidden = ChunkedHead.buffer(hidden, weight, ctx.size), torch.empty_like(hidden)
        # float32, also where products are bfloat16: a sum of many chunks
        grad_weight = torch.zeros_like(weight, dtype=normalizers.dtype) if ctx.needs_input_grad[1] else None
        weight = weight.to(hidden.dtype)
        for start in range(0, len(hidden), ctx.size):
            rows = slice(start, start + ctx.size)
            probs = ChunkedHead.logits(hidden[rows], weight, buffer).sub_(normalizers[rows, None]).exp_()
            grad_logits = probs.mul_(-grad[rows, None]).scatter_add_(1, targets[rows, None], grad[rows, None]).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None and grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None

    @staticmethod
    def buffer(hidden, weight, size):
        return hidden.new_empty(min(size, len(hidden)), len(weight))

    @staticmethod
    def logits(hidden, weight, buffer):
        """(n, D), (V, D) -> (n, V), at least float32; in `buffer` unless that is of a smaller type."""
        logits = torch.mm(hidden, weight.T, out=buffer[: len(hidden)])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _after_head(logits, config):
    """What some architectures do to logits after the head; `_check_head` refuses a model that does something else."""
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None) is not None:  # Gemma
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


@torch.no_grad()
def _check_head(model, name):
    """InputError unless head(base model) gives the model's own logits on a few tokens."""
    if any(p.is_meta for p in model.parameters()):
        return
    was_training = model.training
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    own = model.eval()(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = _after_head(model.get_output_embeddings()(hidden).float(), model.config.get_text_config())
    model.train(was_training)
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise InputError(
            f"{name}: {type(model).__name__} changes its logits after the head in a way _after_head in model.py does not know; add it there"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Step


def adamw(model, lr, weight_decay):
    """AdamW over the trainable parameters; norms and biases are not decayed. The fused kernel where there is one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=all(p.device.type in ("cuda", "cpu") for p in parameters))


def without_exchange(accelerator, model, last):
    """A context for all but the last backward of a step: DDP then exchanges gradients once. FSDP exchanges every time, because each GPU
    would otherwise hold the gradients of the whole model between them."""
    return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else accelerator.no_sync(model)


def check_master_weights(optimizer, dtype):
    """InputError unless the weights that AdamW steps are float32, where that was asked for: some sharding and casting settings change them silently."""
    found = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    if dtype == "float32" and found != {torch.float32}:
        raise InputError(f"the optimizer holds weights of {found}, not float32 as --dtype says: small updates would be lost; check the launch file's mixed precision")


def lr_at(step, total_steps, warmup_steps, peak_lr):
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then a cosine that is 0 at `total_steps`. A pure function, so it
    cannot run N times too fast on N processes (a prepared scheduler does) and needs no state in a checkpoint."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ----------------------------------------------------------------------------------------------------------------------
# Save


def stop_ids(model, tokenizer):
    """What ends a response: the template's end-of-turn token (what we train), eos, and what the model's own generation config says."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({end_of_turn_id(tokenizer), tokenizer.eos_token_id, *own})


def save_model(model, tokenizer, folder, state_dict=None):
    """A plain Hugging Face folder (safetensors, config, tokenizer with its chat template). Files appear whole: config.json, without which
    nothing opens the folder, comes last."""
    folder, temporary = Path(folder), Path(folder) / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if getattr(model, "generation_config", None) is not None:
        # every tool that opens the folder should stop where training taught to stop; a value left over from greedy decoding refuses to be saved
        model.generation_config = transformers.GenerationConfig(eos_token_id=stop_ids(model, tokenizer), pad_token_id=pad_id(tokenizer))
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        (state_dict or {}).pop(tied, None)  # FSDP gathers a tied head as a second matrix
    model.save_pretrained(temporary, state_dict=state_dict)
    tokenizer.save_pretrained(temporary)
    files = sorted(temporary.iterdir(), key=lambda f: (f.name in ("config.json", "adapter_config.json"), f.name))
    for file in files:
        shutil.rmtree(folder / file.name, ignore_errors=True)  # does nothing to a file; a folder (of chat templates) cannot be renamed over
        os.replace(file, folder / file.name)
    for old in set(folder.glob("model*.safetensors*")) - {folder / file.name for file in files}:
        old.unlink()  # a model split into other shards was here; from_pretrained might open those
    temporary.rmdir()


def merge_adapter(folder, tokenizer, out, dtype="auto", trust_remote_code=False):
    """Write the base model of an adapter folder with the adapter added into its weights, a plain folder; the base is read anew, not in 4 bits."""
    model = load_policy(folder, dtype, trust_remote_code=trust_remote_code)
    save_model(model.merge_and_unload(), tokenizer, out)
