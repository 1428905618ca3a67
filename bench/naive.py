"""The plain forms that the fast paths are measured against, as one would first write them. Also what the tests compare with."""

import torch

from data import pad_id, pad_right
from reward import encode_conversation


@torch.no_grad()
def ref_logps_table(causal_lm, prompts, responses, pad=0, batched=True):
    """log pi_ref(y_j | x_i) of all B x B pairs by full forwards: lists of ids -> (B, B). `batched`: one forward a prompt, else one a pair."""
    table = torch.zeros(len(prompts), len(responses))
    for i, x in enumerate(prompts):
        for columns in [range(len(responses))] if batched else [[j] for j in range(len(responses))]:
            batch = {k: v.to(causal_lm.device) for k, v in pad_right([x + responses[j] for j in columns], pad).items()}
            logps = causal_lm(**batch).logits[:, :-1].float().log_softmax(dim=-1)  # (B, T-1, V)
            logps = logps.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)  # (B, T-1)
            for row, j in enumerate(columns):
                table[i, j] = logps[row, len(x) - 1 : len(x) + len(responses[j]) - 1].sum()
    return table


@torch.no_grad()
def scores_in_file_order(classifier, tokenizer, conversations, batch_size, max_tokens=2048):
    """r(x, y) of [(messages, response), ...], batches as they come, each padded to its longest. `classifier`: a plain sequence classifier."""
    scores = []
    for start in range(0, len(conversations), batch_size):
        ids = [encode_conversation(tokenizer, messages, response, max_tokens) for messages, response in conversations[start : start + batch_size]]
        batch = {k: v.to(classifier.device) for k, v in pad_right(ids, pad_id(tokenizer)).items()}
        hidden = classifier.base_model(**batch, use_cache=False).last_hidden_state  # (B, T, D)
        last = batch["attention_mask"].sum(dim=1) - 1
        scores += classifier.score(hidden[torch.arange(len(ids)), last]).squeeze(-1).float().tolist()
    return scores
