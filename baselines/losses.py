"""
The losses the paper compares VAR with. Tensors in, a scalar out; only torch.

    sft_loss   plain supervised fine-tuning: every weight is 1

Shapes. B = examples in one micro-batch; policy_logps[i] = log pi_theta(y_i | x_i), (B,), nats, summed over the response's tokens.
Every loss is a mean over the batch and is minimised.
"""


def sft_loss(policy_logps):
    """Supervised fine-tuning, (B,) -> (): the VAR loss with all weights 1. Sums, not token means: a long response counts for its length."""
    return -policy_logps.mean()  # maximise the log-likelihood = minimise its negative
