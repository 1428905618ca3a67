"""
Samples from a policy: one random stream per row, so that a text depends on its seed and not on its batch, the number of processes or a restart.

    generate_responses(model, tokenizer, prompts, seeds, max_new_tokens) -> [(token ids, finished), ...]

Used by eval.py generate, by training's evaluations, and by the baselines that need samples (A-LoL's V, GRPO).
"""

import torch
import transformers
from torch.distributed.fsdp import FSDPModule

from data import pad_id
from model import stop_ids


class SampleByRow(transformers.LogitsProcessor):
    """Temperature, top-k and top-p sampling with one random stream per row, so that a row's text depends on its seed and not on its
    neighbours, their number or the process. Leaves the drawn token as the only finite score; `generate` then runs greedily."""

    def __init__(self, seeds, max_new_tokens, temperature, top_p, top_k, device):
        draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.draws = torch.stack(draws).to(device)  # (B, max_new_tokens)
        self.warpers = [transformers.TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
        self.warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
        self.warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1.0 else []
        self.t = 0

    def __call__(self, input_ids, scores):
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
        threshold = self.draws[:, self.t, None] * cumulative[:, -1:]  # the total is 1 up to rounding
        self.t += 1
        token = torch.searchsorted(cumulative, threshold, right=True).clamp(
            max=scores.shape[-1] - 1
        )  # first token whose share ends beyond it
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@torch.no_grad()
def generate_responses(model, tokenizer, prompts, seeds, max_new_tokens, temperature=0.8, top_p=0.9, top_k=50):
    """Sample one response per prompt -> list of (token ids with the end-of-turn token if reached, finished). temperature 0 is greedy.

    prompts: lists of token ids; one batch, padded on the left. seeds: one int per prompt.
    """
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), pad_id(tokenizer))
    attention_mask = torch.zeros_like(input_ids)
    for row, p in enumerate(prompts):
        input_ids[row, width - len(p) :] = torch.tensor(list(p))
        attention_mask[row, width - len(p) :] = 1
    sampler = [SampleByRow(seeds, max_new_tokens, temperature, top_p, top_k, model.device)] if temperature > 0 else []
    stops = stop_ids(model, tokenizer)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_id(tokenizer)
    )
    own, was_training = model.generation_config, model.training
    try:
        model.generation_config = (
            settings  # generate adds what the model's own asks for, a repetition penalty say, to any config it is given
        )
        out = model.eval().generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            logits_processor=transformers.LogitsProcessorList(sampler),
            generation_config=settings,
            synced_gpus=isinstance(model, FSDPModule),  # nobody stops before all have: each step needs every process's share of the weights
        )
    finally:
        model.generation_config = own
        model.train(was_training)
    results = []
    for ids in out[:, width:].tolist():
        end = next((t for t, token in enumerate(ids) if token in stops), None)
        results.append((ids if end is None else ids[: end + 1], end is not None))
    return results
