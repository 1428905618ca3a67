"""model.py: sequence log-probs and their gradients, sampling, learning rate, loading and saving. CPU, no network."""

import copy
import inspect
import json
import math
import os
import random
import socket

import pytest
from tiny import CHATML, TEXTS, bpe_tokenizer, causal_lm, chatml_tokenizer, config, reward_model, save

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import model as model_file
from data import PLAIN_TEMPLATE
from eval.sampling import SampleByRow, generate_responses
from formats import InputError
from model import (
    LOGITS_CHUNK, ChunkedHead, adamw, bind_sequence_logps, fingerprint, load_policy, load_reward_model, lr_at, save_model, sequence_logps,
)  # fmt: skip
from var import var_loss

torch.set_num_threads(1)

V = 97  # vocabulary of the models that never see text
# initializer_range: logits that differ by nats, so that a wrong transform or position cannot hide in the tolerance
ARCHITECTURES = {
    "llama": dict(initializer_range=0.2), "qwen2": dict(initializer_range=0.2), "gpt_neox": dict(initializer_range=0.2), "gpt2": dict(initializer_range=0.2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gemma2": dict(initializer_range=0.2, head_dim=8, final_logit_softcapping=0.5),  # a cap this low changes every logit
    "gemma3_text": dict(initializer_range=0.2, head_dim=8, final_logit_softcapping=0.5),
    "cohere": dict(initializer_range=0.2, logit_scale=0.25), "granite": dict(initializer_range=0.2, logits_scaling=3.0),
}  # fmt: skip
every_model = pytest.mark.parametrize("architecture, tied", [(a, t) for a in ARCHITECTURES for t in (False, True)])


def policy(architecture="llama", tied=False, seed=0, dtype=torch.float32, **more):
    return causal_lm(architecture, vocab_size=V, seed=seed, dtype=dtype, tied=tied, **(ARCHITECTURES[architecture] | more)).train()


def plain_tokenizer():
    """What data.load_tokenizer makes of a tokenizer without a template."""
    return bpe_tokenizer(chat_template=PLAIN_TEMPLATE)


def conversations(seed=0, lengths=((5, 4), (9, 1), (2, 7))):
    """[(prompt ids, response ids), ...]"""
    rng = random.Random(seed)
    return [tuple([rng.randrange(1, V) for _ in range(n)] for n in pair) for pair in lengths]


def batch_of(pairs, side="right"):
    """input_ids, attention_mask, response_mask (B, T), padded with the arbitrary id 3."""
    T = max(len(p) + len(r) for p, r in pairs)
    rows = []
    for p, r in pairs:
        row, pad = [p + r, [1] * len(p + r), [0] * len(p) + [1] * len(r)], T - len(p + r)
        rows.append([x + [fill] * pad if side == "right" else [fill] * pad + x for x, fill in zip(row, (3, 0, 0))])
    return tuple(torch.tensor(rows)[:, i] for i in range(3))


def plain_logps(model, pairs):
    """The definition: every row alone, all its logits, log_softmax, gather, sum; in float32 or wider."""
    out = []
    for p, r in pairs:
        logits = type(model).forward(model, input_ids=torch.tensor([p + r])).logits[0]
        logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        out.append(sum(logps[t - 1, token] for t, token in enumerate(p + r) if t >= len(p)))
    return torch.stack(out)


def float64_throughout(model):
    """transformers' own norms compute in float32 even in a float64 model; an RMS norm of torch in their place does not."""
    for m in model.modules():
        if "Norm" in type(m).__name__ and type(m) is not torch.nn.LayerNorm:
            m.forward = lambda x, m=m: torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + m.weight)
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# sequence_logps: the value


@every_model
def test_sequence_logps_is_the_sum_of_log_softmax_over_response_tokens(architecture, tied):
    """log pi(y|x) of Algorithm 1 lines 2-3, transforms after the head (Gemma, Cohere, Granite) included; left padded = right padded = alone."""
    model, pairs = policy(architecture, tied), conversations()
    expected = plain_logps(model, pairs)
    assert expected.min() < -3  # the check would be empty on log-probs near 0
    for side in ("right", "left"):
        assert torch.allclose(sequence_logps(model, *batch_of(pairs, side)), expected, rtol=0, atol=1e-5), side
    alone = torch.cat([sequence_logps(model, *batch_of([pair])) for pair in pairs])
    assert torch.allclose(alone, expected, rtol=0, atol=1e-5)


def test_a_batch_with_padding_on_both_sides_is_scored_too():
    """Rows of the left-padded form followed by padding on the right: neither the right-padded shortcut nor pure left padding."""
    model, pairs = policy(), conversations()
    ids, attention, response = batch_of(pairs, "left")
    ids, attention, response = (torch.cat([x, torch.full((3, 2), fill)], dim=1) for x, fill in ((ids, 5), (attention, 0), (response, 0)))
    assert torch.allclose(sequence_logps(model, ids, attention, response), plain_logps(model, pairs), rtol=0, atol=1e-5)


def test_mean_is_sum_divided_by_response_tokens():
    """--ref_logps mean: nats per response token, the end-of-turn token counted, the prompt not; bool masks count as ints."""
    model, pairs = policy(), conversations()
    total, mean = sequence_logps(model, *batch_of(pairs)), sequence_logps(model, *batch_of(pairs), mean=True)
    assert torch.allclose(mean, total / torch.tensor([4.0, 1.0, 7.0]), rtol=1e-6)
    ids, *masks = batch_of(pairs)
    assert torch.equal(sequence_logps(model, ids, *(m.bool() for m in masks)), total)


def test_other_tokens_and_the_first_position_are_not_scored():
    """A response mask with gaps scores just its tokens; a mask on position 0, before which there is nothing, adds nothing."""
    model, (pair, *_) = policy(), conversations()
    ids, attention, response = batch_of([pair])
    tokens = model_file.token_logps(model, ids, attention, response)  # (1, T-1)
    assert tokens.shape == (1, 8) and torch.equal(tokens != 0, response[:, 1:].bool())
    gaps = torch.tensor([[1, 0, 0, 0, 0, 1, 0, 1, 0]])
    assert torch.allclose(sequence_logps(model, ids, attention, gaps), tokens[:, 4] + tokens[:, 6], atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_bfloat16_weights_give_float32_log_probs(architecture):
    """The log-softmax runs in float32: 100 times nearer to the float64 value of the same logits than a bfloat16 log-softmax."""
    model, pairs = policy(architecture, dtype=torch.bfloat16), conversations(lengths=((5, 200),))
    (p, r), ours = pairs[0], sequence_logps(model, *batch_of(pairs))
    logits = type(model).forward(model, input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1]  # (200, V) bfloat16
    exact, rounded = (torch.log_softmax(x, dim=-1).gather(1, torch.tensor(r)[:, None]).sum() for x in (logits.double(), logits))
    assert ours.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert abs(ours - exact) < 1e-2 * abs(rounded - exact) and abs(ours - exact) < 1e-3, (ours.item(), exact.item(), rounded.item())


def test_autocast_gives_float32_log_probs():
    """Training on a GPU runs bfloat16 autocast over float32 weights; what is summed is float32, and near the float32 run."""
    model, pairs = policy(), conversations()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = sequence_logps(model, *batch_of(pairs))
    assert ours.dtype == torch.float32 and torch.allclose(ours, plain_logps(model, pairs), rtol=0.05)


def test_a_row_without_response_token_is_named():
    """Its sum would be 0, the log-prob of a certain event, and its mean 0/0."""
    ids, attention, response = batch_of(conversations())
    response[1] = 0
    response[1, 0] = 1  # the first position cannot be scored
    with pytest.raises(ValueError, match="row 1 .*no response token"):
        sequence_logps(policy(), ids, attention, response)


# ----------------------------------------------------------------------------------------------------------------------
# sequence_logps: gradients and memory


@pytest.mark.parametrize("architecture, tied", [(a, t) for a in ARCHITECTURES if a != "gemma2" for t in (False, True)])  # its attention is float32 inside
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradients_are_those_of_the_plain_form(architecture, tied, checkpointing, monkeypatch):
    """Every parameter, float64 to 1e-10, one chunk or one per response token, both paddings, with and without gradient checkpointing."""
    model, pairs = float64_throughout(policy(architecture, tied, dtype=torch.float64)), conversations()
    factors = torch.tensor([1.0, -0.3, 2.0], dtype=torch.float64)  # unequal, as VAR's weights are
    expected = gradients(model, (factors * plain_logps(model, pairs)).sum())
    assert min(g.abs().max() for name, g in expected.items() if "norm" not in name) > 0
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # the name that transformers 5.17 knows too
    for chunk, side in ((LOGITS_CHUNK["cpu"], "right"), (5 * V, "left"), (1, "right")):
        monkeypatch.setattr(model_file, "LOGITS_CHUNK", {"cpu": chunk})
        logps = sequence_logps(model, *batch_of(pairs, side))
        assert logps.dtype == torch.float64 and torch.allclose(logps, plain_logps(model, pairs), rtol=0, atol=1e-10)
        assert largest_difference(gradients(model, (factors * logps).sum()), expected) < 1e-10, (chunk, side)


@pytest.mark.parametrize("tied", [False, True])
def test_chunks_under_autocast_give_the_gradients_of_one_chunk(tied, monkeypatch):
    """bfloat16 products over float32 weights: 48 chunks add up to what a single one gives, because the sum is kept in float32."""
    model, pairs, found = policy("qwen2", tied), conversations(lengths=((2, 60), (2, 36))), []
    for chunk in (2 * V, LOGITS_CHUNK["cpu"]):
        monkeypatch.setattr(model_file, "LOGITS_CHUNK", {"cpu": chunk})
        with torch.autocast("cpu", torch.bfloat16):
            logps = sequence_logps(model, *batch_of(pairs))
        assert logps.dtype == torch.float32
        found.append((logps.detach(), gradients(model, logps.sum())))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-3)
    for name, grad in found[1][1].items():
        assert grad.dtype == torch.float32 and (found[0][1][name] - grad).norm() < 2e-2 * grad.norm(), name


def test_the_head_sees_response_positions_only_and_never_more_than_a_chunk(monkeypatch):
    """Memory does not grow with B*T*V: 12 response tokens of 28 go through the head, at most LOGITS_CHUNK // V at once, and once more in backward."""
    model, pairs, rows = policy(), conversations(), []
    monkeypatch.setattr(model_file, "LOGITS_CHUNK", {"cpu": 5 * V + 3})
    plain = ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", staticmethod(lambda hidden, *rest: rows.append(len(hidden)) or plain(hidden, *rest)))
    loss = sequence_logps(model, *batch_of(pairs)).sum()
    assert rows == [5, 5, 2]
    loss.backward()
    assert sorted(rows) == [2, 2, 5, 5, 5, 5]
    rows.clear()
    with torch.no_grad():
        sequence_logps(model, *batch_of(pairs))
    assert rows == [5, 5, 2]


def test_no_logits_are_kept_for_backward(monkeypatch):
    """What autograd saves between forward and backward holds no tensor of vocabulary size except the head's own weight."""
    model, pairs, saved = policy(), conversations(lengths=((2, 60), (2, 60))), []
    monkeypatch.setattr(model_file, "LOGITS_CHUNK", {"cpu": 10 * V})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        sequence_logps(model, *batch_of(pairs))
    assert saved and [s for s in saved if s and s[-1] == V] == []


# ----------------------------------------------------------------------------------------------------------------------
# A bound model is still an ordinary model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_without_response_mask_the_forward_is_unchanged(architecture):
    """Logits, the cross-entropy of labels, positional arguments, generate and the argument names stay; response_mask is one more name."""
    model = policy(architecture).eval()
    twin, ids = bind_sequence_logps(copy.deepcopy(model)), torch.arange(1, 9)[None]
    assert torch.equal(twin(ids).logits, model(ids).logits) and torch.equal(twin(ids, labels=ids).loss, model(ids, labels=ids).loss)
    assert torch.equal(twin.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, max_new_tokens=5, do_sample=False))
    names, own = list(inspect.signature(twin.forward).parameters), list(inspect.signature(model.forward).parameters)
    assert set(names) - set(own) == {"response_mask"} and [n for n in names if n != "response_mask"] == own


def test_a_bound_model_saves_and_loads(tmp_path):
    """save_pretrained and from_pretrained know nothing of the binding, and the weights come back bit for bit."""
    model, pairs = bind_sequence_logps(policy("qwen2", tied=True)), conversations()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(sequence_logps(again, *batch_of(pairs)), sequence_logps(model, *batch_of(pairs)))


def test_a_deep_copy_of_a_bound_model_is_independent():
    """A copy's forward must run the copy: a reference model made with deepcopy would otherwise follow the policy."""
    model, pairs = bind_sequence_logps(policy()), conversations()
    before = sequence_logps(model, *batch_of(pairs))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(-1)
    assert torch.equal(sequence_logps(model, *batch_of(pairs)), before)
    assert (sequence_logps(twin, *batch_of(pairs)) - before).abs().min() > 0.1


def test_binding_twice_changes_nothing():
    """load_policy binds, a caller may bind again."""
    model, pairs = policy(), conversations()
    once = sequence_logps(model, *batch_of(pairs))
    assert torch.equal(sequence_logps(bind_sequence_logps(bind_sequence_logps(model)), *batch_of(pairs)), once)


def test_accelerate_autocast_stays_around_the_bound_forward():
    """Accelerator(mixed_precision=bf16).prepare wraps model.forward; sequence_logps must run inside that wrapper, not rebind over it."""
    AcceleratorState._reset_state(True)
    try:
        model = bind_sequence_logps(policy())
        prepared, dtypes = Accelerator(cpu=True, mixed_precision="bf16").prepare(model), []
        prepared.get_output_embeddings().register_forward_hook(lambda head, args, logits: dtypes.append(logits.dtype))
        assert sequence_logps(prepared, *batch_of(conversations())).dtype == torch.float32
        assert dtypes == [torch.bfloat16]
        with pytest.raises(ValueError, match="bind_sequence_logps"):  # binding now would throw the autocast away
            sequence_logps(Accelerator(cpu=True, mixed_precision="bf16").prepare(policy()), *batch_of(conversations()))
    finally:
        AcceleratorState._reset_state(True)


def test_sequence_logps_reaches_through_a_lora_model():
    """A peft model's own .base_model returns logits; get_base_model is the causal LM with the adapters in place."""
    peft = pytest.importorskip("peft")
    model, pairs = policy(), conversations()
    plain = plain_logps(model, pairs)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert torch.allclose(sequence_logps(lora, *batch_of(pairs)), plain, atol=1e-5)  # a fresh adapter adds nothing
    with torch.no_grad():
        for name, p in lora.named_parameters():
            p.add_(0.1 * ("lora_B" in name))
    logps = sequence_logps(lora, *batch_of(pairs))
    assert torch.allclose(logps, plain_logps(lora.get_base_model(), pairs), atol=1e-5) and (logps - plain).abs().min() > 1e-4
    logps.sum().backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in lora.named_parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Two processes


def micro_batches():
    """Four global micro-batches of B = 2: (input_ids, attention_mask, response_mask, rewards, ref_logps)."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        pairs = conversations(seed, lengths=((3 + seed, 5), (6, 2 + seed)))
        yield *batch_of(pairs), torch.randn(2, 2, generator=generator), -torch.rand(2, 2, generator=generator)


def micro_batch_loss(model, batch):
    *ids_and_masks, rewards, ref_logps = batch
    return var_loss(sequence_logps(model, *ids_and_masks), rewards, ref_logps, beta=1.0)


DATA_PARALLEL = [("llama", False), ("qwen2", True), ("gpt_neox", False), ("gpt_neox", True)]


def data_parallel_process(rank, port, folder):
    """One of two processes: micro-batches rank, rank + 2 of the step, as the batch plan deals them; writes its gradients."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    mine = list(micro_batches())[rank::2]
    for architecture, tied in DATA_PARALLEL:
        model = policy(architecture, tied, dtype=torch.float64)
        prepared = accelerator.prepare(bind_sequence_logps(model))
        with accelerator.no_sync(prepared):
            accelerator.backward(micro_batch_loss(prepared, mine[0]) / 2)
        accelerator.backward(micro_batch_loss(prepared, mine[1]) / 2)
        torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"{architecture} {tied} {rank}")
    prepared.zero_grad()
    micro_batch_loss(accelerator.unwrap_model(prepared), mine[0]).backward()  # the trap: past the module that DDP watches
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"unwrapped {rank}")
    try:
        sequence_logps(accelerator.prepare(policy()), *mine[0][:3])
    except Exception as error:
        (folder / f"unbound {rank}").write_text(f"{type(error).__name__}: {error}")
    accelerator.end_training()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Data parallel through accelerate.prepare == one process over the same four micro-batches (1e-6), tied and untied; going past the
    prepared module leaves gradients unsynchronised; a model prepared before it was bound is an error that says so."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    torch.multiprocessing.spawn(data_parallel_process, args=(port, tmp_path), nprocs=2)
    for architecture, tied in DATA_PARALLEL:
        model = policy(architecture, tied, dtype=torch.float64)
        loss = sum(micro_batch_loss(model, batch) for batch in micro_batches()) / 4
        expected = gradients(model, loss)
        for rank in range(2):
            found = torch.load(tmp_path / f"{architecture} {tied} {rank}")
            assert largest_difference(found, expected) < 1e-6, (architecture, tied, rank)
    apart = largest_difference(*(torch.load(tmp_path / f"unwrapped {rank}") for rank in range(2)))
    assert apart > 1e-2, "gradients of different data agree: were they synchronised after all?"
    assert "bind_sequence_logps" in (tmp_path / "unbound 0").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Samples


TURNS = "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"


def turn_tokenizer():
    """End of turn <|stop|>, eos </s>: two different tokens, and no pad token."""
    return bpe_tokenizer(bos=None, eos="</s>", extra=("<|turn|>", "<|stop|>"), chat_template=TURNS, vocab_size=300)


def talker(tokenizer, **more):
    """A random model over the tokenizer's vocabulary, float64 so that no two scores tie and batching cannot change an argmax."""
    return causal_lm("llama", vocab_size=len(tokenizer), dtype=torch.float64, initializer_range=0.3, **more).train()


def bigram_model(tokenizer, follows, V):
    """A model that always says `follows[last token]`, else the last token again: the layer adds nothing, embeddings are one-hot."""
    model = causal_lm("llama", vocab_size=V, hidden=V + -V % 8, layers=1, intermediate_size=8)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[range(V), range(V)] = 1.0
        model.lm_head.weight[[follows.get(t, t) for t in range(V)], range(V)] = 1.0
    return model


PROMPTS = [[40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66, 67], [70, 71]]


def test_a_text_depends_on_its_prompt_and_seed_alone():
    """The same ids alone and in any batch and order: left padding, and one random stream per row. Other seeds give other texts."""
    tokenizer = turn_tokenizer()
    model, seeds = talker(tokenizer), [7, 8, 9, 7]
    together = generate_responses(model, tokenizer, PROMPTS, seeds, 12)
    assert [generate_responses(model, tokenizer, [p], [s], 12)[0] for p, s in zip(PROMPTS, seeds)] == together
    assert generate_responses(model, tokenizer, PROMPTS[::-1], seeds[::-1], 12) == together[::-1]
    one_prompt = generate_responses(model, tokenizer, PROMPTS[:1] * 8, range(8), 12)
    assert len({tuple(ids) for ids, _ in one_prompt}) == 8
    longer = generate_responses(model, tokenizer, PROMPTS[:1] * 8, range(8), 20)  # a larger limit continues the texts, it does not change them
    assert [ids[:12] for ids, _ in longer] == [ids for ids, _ in one_prompt]


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=1.3, top_k=1, top_p=1.0), dict(temperature=1e-4)])
def test_no_temperature_or_one_candidate_is_greedy(settings):
    """temperature 0 and top_k 1 pick the argmax at each step, as `generate(do_sample=False)` does on the unpadded prompt."""
    tokenizer = turn_tokenizer()
    model = talker(tokenizer)
    found = generate_responses(model, tokenizer, PROMPTS, [0, 1, 2, 3], 10, **settings)
    stops = model_file.stop_ids(model, tokenizer)
    for prompt, (ids, _) in zip(PROMPTS, found):
        hf = model.eval().generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=stops, pad_token_id=0)
        assert ids == hf[0, len(prompt) :].tolist()


def test_a_response_ends_at_the_end_of_turn_or_eos_token():
    """finished: a stop token was reached; it is part of the ids, what follows it is not. At the limit: all ids, not finished."""
    tokenizer = turn_tokenizer()
    stop, eos = tokenizer.convert_tokens_to_ids("<|stop|>"), tokenizer.eos_token_id
    model = bigram_model(tokenizer, {40: 41, 41: stop, 50: eos, 60: 61, 61: 62, 62: 99}, len(tokenizer))
    for settings in (dict(temperature=0), dict(temperature=0.01)):
        found = generate_responses(model, tokenizer, [[70, 40], [50], [60], [80, 81]], [0, 1, 2, 3], 4, **settings)
        assert found == [([41, stop], True), ([eos], True), ([61, 62, 99, 99], False), ([81] * 4, False)]
    model.generation_config.eos_token_id = [99]  # a stop of the model's own
    assert generate_responses(model, tokenizer, [[60]], [0], 8, temperature=0) == [([61, 62, 99], True)]


def test_the_models_own_generation_settings_do_not_leak_in():
    """Published models carry repetition_penalty, min_new_tokens and the like; `generate` would add them to ours without a word."""
    tokenizer = turn_tokenizer()
    model = talker(tokenizer)
    expected = [generate_responses(model, tokenizer, PROMPTS, range(4), 12, temperature=t) for t in (0, 0.8)]
    own = transformers.GenerationConfig(do_sample=True, temperature=0.1, top_k=2, repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2, max_length=9)
    model.generation_config = own
    assert [generate_responses(model, tokenizer, PROMPTS, range(4), 12, temperature=t) for t in (0, 0.8)] == expected
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_generation_leaves_the_rest_as_it_was():
    """Training mode, torch's random state, the weights' gradients and the tokenizer's padding side (trap C22) are untouched."""
    tokenizer = turn_tokenizer()
    model = talker(tokenizer)
    for side, training in (("right", True), ("left", False)):
        tokenizer.padding_side = side
        model.train(training)
        state = torch.get_rng_state()
        generate_responses(model, tokenizer, PROMPTS, range(4), 5)
        assert tokenizer.padding_side == side and model.training is training and torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def draw(scores, n, steps=1, **settings):
    """Tokens that SampleByRow draws from one score vector with seeds 0 to n-1, (n, steps)."""
    sampler = SampleByRow(range(n), steps, **(dict(temperature=1.0, top_p=1.0, top_k=0) | settings), device="cpu")
    rows = scores.expand(n, -1)
    out = [sampler(None, rows) for _ in range(steps)]
    assert all(torch.equal(x.isfinite().sum(dim=1), torch.ones(n, dtype=torch.long)) for x in out)  # one finite score per row
    return torch.stack([x.argmax(dim=1) for x in out], dim=1)


P = [0.02, 0.4, 0.08, 0.2, 0.01, 0.15, 0.04, 0.1]  # unsorted


@pytest.mark.parametrize(
    "settings, kept, power",
    [
        (dict(), [0, 1, 2, 3, 4, 5, 6, 7], 1), (dict(temperature=0.5), [0, 1, 2, 3, 4, 5, 6, 7], 2), (dict(top_k=3), [1, 3, 5], 1),
        (dict(top_p=0.7), [1, 3, 5], 1),  # 0.4 + 0.2 is not 0.7 yet
        (dict(top_k=5, top_p=0.9), [1, 3, 5, 7], 1),  # 0.85 of the 0.93 that top_k left is above 0.9, 0.75 is not
        (dict(temperature=0.5, top_p=0.7), [1, 3], 2),  # the temperature comes first: 0.16 + 0.04 of 0.2494
    ],
)  # fmt: skip
def test_draws_follow_the_filtered_softmax(settings, kept, power):
    """Chi-square over 20,000 seeds against p^(1/temperature) renormalised over what top-k, then top-p keep; nothing else is ever drawn."""
    n = 20_000
    tokens = draw(torch.tensor(P).log() + 3.0, n, **settings)[:, 0]
    expected = torch.tensor([p**power if i in kept else 0.0 for i, p in enumerate(P)])
    expected *= n / expected.sum()
    observed = tokens.bincount(minlength=8).float()
    assert observed[expected == 0].sum() == 0
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < {1: 10.8, 2: 13.8, 3: 16.3, 7: 24.3}[len(kept) - 1]  # exceeded once in a thousand by chance


def test_streams_of_neighbouring_seeds_and_steps_are_unrelated():
    """Seeds 0, 1, 2, ... are what people pass: their draws must not move together, nor must the steps of one seed."""
    draws = SampleByRow(range(10_000), 4, 1.0, 1.0, 0, "cpu").draws  # (10000, 4)
    for a, b in ((draws[:-1, 0], draws[1:, 0]), (draws[:, 0], draws[:, 1]), (draws[:-1, 1], draws[1:, 0])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(10_000)
    first, second = draw(torch.zeros(2), 10_000, steps=2).unbind(dim=1)  # two fair coins per seed
    assert ((2 * first + second).bincount() - 2500).abs().max() < 4 * math.sqrt(10_000 * 0.25 * 0.75)


@pytest.mark.parametrize("value, filtered", [(0.0, 0), (1 - 2**-24, -1)])
def test_the_extreme_draws_still_pick_a_kept_token(value, filtered):
    """torch.rand returns 0 to 1 - 2^-24: at either end, with shares that add up to 1 only roughly, no filtered token may be next in line."""
    scores = torch.randn(500, 4000, generator=torch.Generator().manual_seed(0))
    scores[:, filtered] = -torch.inf
    sampler = SampleByRow(range(500), 1, 1.0, 1.0, 0, "cpu")
    sampler.draws.fill_(value)
    token = sampler(None, scores).argmax(dim=1)
    assert scores.gather(1, token[:, None]).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Step


def test_learning_rate_warms_up_peaks_and_falls_to_zero():
    """Linear over the warm-up, then half a cosine: 1/2 in its middle, (2 +- sqrt 2)/4 at its quarters, 0 at total_steps and after."""
    lr = [lr_at(step, total_steps=12, warmup_steps=4, peak_lr=8.0) for step in range(14)]
    assert lr[:5] == [2.0, 4.0, 6.0, 8.0, 8.0] and lr[8] == pytest.approx(4.0)
    assert lr[6] == pytest.approx(2 * (2 + math.sqrt(2))) and lr[10] == pytest.approx(2 * (2 - math.sqrt(2)))
    assert lr[12:] == [0.0, 0.0] and all(a > b for a, b in zip(lr[4:], lr[5:13])) and min(lr[:12]) > 0
    assert lr_at(0, 1, 0, 8.0) == 8.0 and lr_at(0, 3, 3, 9.0) == 3.0  # no warm-up; nothing but warm-up


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_weight_decay_spares_norms_and_biases(architecture):
    """Without gradients a step of AdamW is the decay alone: matrices shrink by 1 - lr * decay, 1-D parameters stay."""
    model = policy(architecture)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, lr=0.1, weight_decay=0.5).step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.dim() >= 2 else 1.0), rtol=1e-6), name


def test_frozen_parameters_are_not_in_the_optimizer():
    """Adapters train, the rest has no optimizer state; a model without 1-D parameters has one group."""
    model = policy()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    groups = adamw(model, 0.1, 0.0).param_groups
    assert [len(g["params"]) for g in groups] == [1] and groups[0]["params"][0] is model.lm_head.weight


# ----------------------------------------------------------------------------------------------------------------------
# Load


def refuses(call, *words):
    """The call ends in an InputError of one line with these words in it."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message


class ScaledLlama(transformers.LlamaForCausalLM):
    """Logits that the head alone does not give."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


def test_a_head_followed_by_an_unknown_transform_is_refused(monkeypatch, tmp_path):
    """Its log-probs would be wrong without a word; known transforms pass, and the model's mode is left alone."""
    scaled = ScaledLlama(policy().config)
    refuses(lambda: model_file._check_head(scaled, "some/model"), "some/model", "ScaledLlama")
    save(tmp_path, policy(), plain_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "_load", lambda *args, **kwargs: scaled)
        refuses(lambda: load_policy(str(tmp_path)), "ScaledLlama")
    for architecture in ARCHITECTURES:
        for training in (True, False):
            model = policy(architecture).train(training)
            model_file._check_head(model, architecture)
            assert model.training is training


def test_load_policy_gives_a_trainable_float32_model(tmp_path):
    """float32 whatever the checkpoint's dtype, in train mode, bound; --dtype changes it, auto keeps the checkpoint's."""
    model, pairs = policy("qwen2", tied=True), conversations()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())  # numbers that bfloat16 holds exactly
    name = save(tmp_path, copy.deepcopy(model).bfloat16(), plain_tokenizer())
    loaded = load_policy(name)
    assert loaded.training and loaded.dtype == torch.float32 and "response_mask" in inspect.signature(loaded.forward).parameters
    assert torch.equal(sequence_logps(loaded, *batch_of(pairs)), sequence_logps(model, *batch_of(pairs)))
    assert load_policy(name, dtype="auto").dtype == load_policy(name, dtype="bfloat16", attn_implementation="eager").dtype == torch.bfloat16


def test_remote_code_is_off_unless_asked_for():
    """A model's Python code never runs by itself."""
    for load in (load_policy, load_reward_model):
        assert inspect.signature(load).parameters["trust_remote_code"].default is False


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_a_name_that_cannot_be_loaded_is_one_clear_line(load, tmp_path, monkeypatch):
    """No such folder, a file, a folder without config.json, an unknown architecture, broken JSON, no weights, a pickle, a hub name without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses(lambda: load(str(tmp_path / "nowhere")), "nowhere", "does not exist")
    refuses(lambda: load("./nowhere"), "./nowhere", "does not exist")
    (tmp_path / "file").write_text("x")
    refuses(lambda: load(str(tmp_path / "file")), str(tmp_path / "file"))
    folder = tmp_path / "folder"
    folder.mkdir()
    refuses(lambda: load(str(folder)), str(folder), "config.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "from_the_future"}))
    refuses(lambda: load(str(folder)), str(folder), "from_the_future")
    (folder / "config.json").write_text("{")
    refuses(lambda: load(str(folder)), str(folder))
    config = policy().config
    config.num_labels = 1
    config.save_pretrained(folder)
    refuses(lambda: load(str(folder)), str(folder), "safetensors")
    torch.save(policy().state_dict(), folder / "pytorch_model.bin")  # a pickle can run code
    refuses(lambda: load(str(folder)), str(folder), "safetensors")
    (folder / "model.safetensors").write_bytes(b"cut short")
    refuses(lambda: load(str(folder)), str(folder))
    refuses(lambda: load("nobody/no-such-model"), "nobody/no-such-model")


def test_a_reward_model_needs_one_label_and_trained_weights(tmp_path):
    """Two labels, or a head that the checkpoint does not hold: its scores would be random. A fresh head is given only when asked for."""
    two = save(tmp_path / "two", reward_model(vocab_size=V, num_labels=2), plain_tokenizer())
    refuses(lambda: load_reward_model(two), two, "one label", "2", "LlamaForSequenceClassification")
    policy_folder = save(tmp_path / "policy", policy(), plain_tokenizer())
    refuses(lambda: load_reward_model(policy_folder), policy_folder, "LlamaForCausalLM")  # two labels by default
    model = policy()
    model.config.num_labels = 1
    one = save(tmp_path / "one", model, plain_tokenizer())
    refuses(lambda: load_reward_model(one), one, "score.weight", "random")
    for base in (policy_folder, one):
        fresh = load_reward_model(base, new_head=True)
        assert fresh.score.weight.shape == (1, 32) and not fresh.training
    trained = reward_model(vocab_size=V)
    again = load_reward_model(save(tmp_path / "trained", trained, plain_tokenizer()))
    assert torch.equal(again.score.weight, trained.score.weight) and not again.training


def test_a_policy_without_trained_head_is_refused(tmp_path):
    """A reward model's folder given as --model: transformers would put a random head on it and only warn. Tied heads are not missing."""
    refuses(lambda: load_policy(save(tmp_path / "reward", reward_model(vocab_size=V), plain_tokenizer())), "lm_head.weight")
    load_policy(save(tmp_path / "tied", policy(tied=True), plain_tokenizer()))


# ----------------------------------------------------------------------------------------------------------------------
# Save


def test_a_saved_folder_is_a_plain_hugging_face_folder(tmp_path):
    """AutoModelForCausalLM and AutoTokenizer open it, template included; `generate` without settings stops where training taught to stop."""
    tokenizer = turn_tokenizer()
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    model = bind_sequence_logps(bigram_model(tokenizer, {40: 41, 41: stop}, len(tokenizer)))
    model.generation_config = transformers.GenerationConfig(temperature=0.3)  # refuses to be saved as it is: do_sample is off
    save_model(model, tokenizer, tmp_path / "run" / "out")
    found, again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "out")
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters(), strict=True))
    assert again.chat_template == TURNS and again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert set(found.generation_config.eos_token_id) == {stop, tokenizer.eos_token_id}
    assert found.generate(torch.tensor([[40]]), max_new_tokens=9).tolist() == [[40, 41, stop]]
    names = {f.name for f in (tmp_path / "run" / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} == names


def test_saving_writes_the_given_state_dict(tmp_path):
    """Under FSDP the weights are gathered first and handed over; the module's own are shards."""
    tokenizer, model = plain_tokenizer(), policy(tied=True)
    other = policy(tied=True, seed=1)
    save_model(model, tokenizer, tmp_path, state_dict=other.state_dict())
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), other.parameters(), strict=True))


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and ".saving" not in f.parts}


def test_a_crash_while_saving_leaves_the_old_folder_intact(tmp_path, monkeypatch):
    """Files are written beside and moved when whole: after a crash the previous model still opens; the next save clears what was left."""
    tokenizer, old, new = plain_tokenizer(), policy(seed=0), policy(seed=1)
    save_model(old, tokenizer, tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_model(new, tokenizer, tmp_path)
    assert contents(tmp_path) == before
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, old.lm_head.weight)
    save_model(new, tokenizer, tmp_path)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, new.lm_head.weight)
    assert not (tmp_path / ".saving").exists() and not list(tmp_path.glob("*.tmp"))


def test_saving_over_another_model_leaves_none_of_its_weights(tmp_path):
    """A folder that held shards, or a whole file where now are shards, must open with the new weights; other files stay."""
    tokenizer, old, new = plain_tokenizer(), policy(seed=0), policy(seed=1)
    for shards_first in (True, False):
        folder = tmp_path / str(shards_first)
        for model, sharded in ((old, shards_first), (new, not shards_first)):
            with pytest.MonkeyPatch.context() as patch:
                whole = type(model).save_pretrained
                patch.setattr(type(model), "save_pretrained", lambda *a, whole=whole, sharded=sharded, **k: whole(*a, max_shard_size="20KB" if sharded else "5GB", **k))
                save_model(model, tokenizer, folder)
            (folder / "metrics.jsonl").write_text("{}\n")
        assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, new.lm_head.weight)
        assert (len(list(folder.glob("*.safetensors"))) == 1) == shards_first and (folder / "metrics.jsonl").exists()


def test_saving_twice_works_for_a_tokenizer_with_several_templates(tmp_path):
    """Such a tokenizer writes a folder of templates beside the files (Command-R does)."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ messages[0]['content'] }}"}
    for seed in (0, 1):
        save_model(policy(seed=seed), tokenizer, tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_a_fingerprint_follows_the_weights_and_nothing_else(tmp_path):
    """Tables are kept by it: one changed weight, config value or template changes it; a copy elsewhere and what a run writes beside it do not."""
    tokenizer, model = plain_tokenizer(), policy()
    first = fingerprint(save(tmp_path / "a", model, tokenizer))
    assert first == fingerprint(str(tmp_path / "a")) and first == fingerprint(save(tmp_path / "b", model, tokenizer))
    for name in ("metrics.jsonl", "run.json", "tables.safetensors", "notes.txt"):
        (tmp_path / "a" / name).write_text("{}")
    (tmp_path / "a" / "checkpoints").mkdir()
    assert fingerprint(str(tmp_path / "a")) == first
    others = [copy.deepcopy(model) for _ in range(2)]
    others[0].config.rms_norm_eps = 1e-3
    with torch.no_grad():
        others[1].lm_head.weight[50, 7] += 1e-3
    ids = {first, *(fingerprint(save(tmp_path / f"other {i}", other, tokenizer)) for i, other in enumerate(others))}
    tokenizer.chat_template = CHATML
    assert len(ids | {fingerprint(save(tmp_path / "template", model, tokenizer))}) == 4


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_rows_run_in_groups_of_similar_length_score_as_the_padded_batch_does(architecture):
    """Lengths 3 to 200: the layers see little padding, the numbers and gradients are those of one padded batch. Left padding stays one group."""
    model = policy(architecture)
    lengths = [200, 3, 120, 118, 60, 4, 199, 30]
    ids = torch.randint(1, V, (8, 200), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(200) < torch.tensor(lengths)[:, None]).long()
    response = mask.clone()
    response[:, :2] = 0
    groups = model_file.rows_of_similar_length(model, mask)
    assert sorted(torch.cat(groups).tolist()) == list(range(8)) and 1 < len(groups) < 8
    assert all(max(lengths[i] for i in g) - min(lengths[i] for i in g) <= model_file.WORTH_A_CALL["cpu"] for g in groups)
    gradients = []
    for limit in (model_file.WORTH_A_CALL, {"cpu": 10**9}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_file, "WORTH_A_CALL", limit)
            model.zero_grad()
            logps = sequence_logps(model, ids, mask, response)
            (logps * torch.arange(8)).sum().backward()
            gradients.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-3)
    assert len(model_file.rows_of_similar_length(model, mask.flip(1))) == 1


def test_bfloat16_on_a_cpu_is_for_models_it_makes_faster(tmp_path, monkeypatch):
    """Hidden 512 and a CPU with the instructions: yes; a smaller model, another CPU, or what the launcher was told: no."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if torch.accelerator.is_available():
        pytest.skip("a machine with an accelerator")
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        for hidden in (256, 512):
            config("llama", 50, hidden=hidden).save_pretrained(tmp_path / str(hidden))
            assert model_file.mixed_precision(str(tmp_path / str(hidden))) == ("bf16" if has and hidden == 512 else "no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert model_file.mixed_precision(str(tmp_path / "512")) is None
