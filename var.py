"""
VAR: Variational Alignment with Re-weighting (paper Sec. 3; Eq. 3, 7-10, 13; Algorithm 1).

RLHF's optimal policy is known in closed form, pi* = pi_ref exp(r/beta) / Z (Eq. 3). VAR walks towards it by supervised
fine-tuning: minimising KL(pi* || pi_theta) over samples of pi_ref (Eq. 7-9) is a weighted negative log-likelihood,

    loss      = -(1/B) sum_i  exp(log w_i) * log pi_theta(y_i | x_i)                   Eq. 10, Algorithm 1 line 8, negated
    log w_i   = r(x_i, y_i) / beta - log Zhat(x_i)                                     Algorithm 1 line 6
    log Zhat(x_i) = logsumexp_j( r(x_i, y_j) / beta + log pi_ref(y_j | x_i) ) - log B  Sec. 3.2, Algorithm 1 line 5

This file is tensors in, tensors out, and needs only torch. tables.py measures the two (B, B) tables, train.py minimises the loss.

Shapes. B = examples in ONE micro-batch on one device (accumulation and more processes never enlarge it).
    rewards[i, j]   = r(x_i, y_j)              (B, B)   raw reward-model logits; row i = prompt, column j = response
    ref_logps[i, j] = log pi_ref(y_j | x_i)    (B, B)   nats; the diagonal holds the matched pairs
    policy_logps[i] = log pi_theta(y_i | x_i)  (B,)     nats, summed over the response's tokens
float32 or float64 in, the same dtype out. Every wrong input is a ValueError that names the value.

Departures from the paper, and places where it leaves a choice:
1. Sign. The paper prints the objective to maximise (Eq. 9, 10) and then "descends" it. We return its negative, a loss.
2. Log space. Same mathematics, but pi_ref(y|x) of a 100-token response is 0.0 in float32, so only log w is ever formed.
3. Which pi_ref. As a whole-sequence probability log pi_ref is -100 to -500 nats. Zhat then is one single term, lengths decide
   the weights instead of rewards, and w overflows float32 above 88.7 nats. The caller chooses what `ref_logps` holds: the
   mean per token (train.py's default, a departure) or the sum (the paper to the letter). An overflow is an error here, never an inf.
4. Zhat. `estimator="paper"` is Sec. 3.2 verbatim. Its pi_ref factor belongs to y_j uniform on the answer space; with y_j ~ pi_ref
   the Monte Carlo estimate of Z has no such factor: `"monte_carlo"`. `"constant"` is Zhat = 1, reward-weighted regression.
5. `normalize=True` divides the weights of a micro-batch by their mean (in log space), so that they add up to B. Not in the paper.
6. B = 1 makes the reward cancel (w = 1 / pi_ref whatever r is): refused, except with "constant".
"""

import math

import torch

ESTIMATORS = ("paper", "monte_carlo", "constant")


def log_partition(rewards, ref_logps, beta, estimator="paper"):
    """log Zhat(x_i), the log of the partition function estimated in the micro-batch (Sec. 3.2; Algorithm 1 line 5).

    rewards, ref_logps (B, B) -> (B,), in nats. Only "paper" reads ref_logps, elsewhere it may be None. With "constant" the result is
    zeros and rewards may be the matched pairs alone, (B,).
    ValueError: a shape that is not (B, B), B = 1, beta <= 0, a non-finite entry, an unknown estimator.
    """
    _check(rewards, ref_logps, beta, estimator)
    if estimator == "constant":  # Zhat = 1
        return torch.zeros_like(rewards[..., 0])
    terms = rewards / beta  # (B, B)  log of exp(r(x_i, y_j) / beta)
    if estimator == "paper":
        terms = terms + ref_logps  # (B, B)  ... times pi_ref(y_j | x_i)
    # dim=1: over the responses j of one prompt i. The other dimension would be a different estimate of something else.
    return torch.logsumexp(terms, dim=1) - math.log(len(terms))  # (B, B) -> (B,)


def log_weights(rewards, ref_logps, beta, estimator="paper"):
    """log w_i = r(x_i, y_i)/beta - log Zhat(x_i), the reward-driven weight of Eq. 9 and 10, in nats. Detached: weights carry no gradient.

    (B, B), (B, B) -> (B,). Same arguments and errors as `log_partition`.
    """
    log_zhat = log_partition(rewards, ref_logps, beta, estimator)  # (B,)
    matched = rewards if rewards.dim() == 1 else rewards.diagonal()  # (B,)  r(x_i, y_i)
    return (matched / beta - log_zhat).detach()


def weights_from_log(log_w, normalize=False):
    """exp(log w), (B,) -> (B,), refusing to overflow. `normalize` first divides by the micro-batch's mean weight (departure 5)."""
    if normalize:
        log_w = log_w - (torch.logsumexp(log_w, dim=0) - math.log(len(log_w)))  # mean weight 1, so w_i <= B
    limit = math.log(torch.finfo(log_w.dtype).max)
    if log_w.max() > limit:
        raise ValueError(
            f"a VAR weight is exp({log_w.max().item():.1f}), above the largest {log_w.dtype} number exp({limit:.1f}). The cause is "
            "almost always that ref_logps are sums of log-probs over long responses: the matched response is then 100 or more nats "
            "likelier than the others and w is about B/pi_ref. Use per-token means (--ref_logps mean), normalised weights "
            "(--normalize_weights) or, if the rewards themselves are large, a larger --beta."
        )
    return log_w.exp()


def var_loss(policy_logps, rewards, ref_logps, beta, estimator="paper", normalize=False):
    """The VAR loss of one micro-batch (Eq. 10, Algorithm 1 line 8), negated so that it is minimised.

    policy_logps (B,), rewards (B, B), ref_logps (B, B) -> (). Gradient: d loss / d policy_logps[i] = -w_i / B.
    Errors: those of `log_partition`, and weights that would overflow the dtype.
    """
    log_w = log_weights(rewards, ref_logps, beta, estimator)
    if policy_logps.shape != log_w.shape:
        raise ValueError(f"policy_logps must be ({len(log_w)},) to match rewards, got {tuple(policy_logps.shape)}")
    weights = weights_from_log(log_w, normalize)
    objective = (weights * policy_logps).mean()  # Eq. 10 as printed: to be maximised
    return -objective  # the sign flips here, once


def effective_sample_size(log_w):
    """(sum w)^2 / sum w^2 of log-weights (B,) -> (), from 1 (one example decides) to B (plain SFT). In log space: cannot overflow."""
    return torch.exp(2 * torch.logsumexp(log_w, dim=0) - torch.logsumexp(2 * log_w, dim=0))


def self_share(rewards, ref_logps, beta):
    """mean_i of the share of Zhat(x_i) that comes from y_i itself, (B, B), (B, B) -> (), between 0 and 1.

    Near 1 the matched term is all of Zhat, w_i is the same number for every reward, and VAR has quietly become SFT. The
    effective sample size then looks its healthiest; this is the number that tells.
    """
    _check(rewards, ref_logps, beta, "paper")
    return torch.softmax(rewards / beta + ref_logps, dim=1).diagonal().mean()


def optimal_policy(rewards, ref_logps, beta):
    """log pi*(y|x) = log pi_ref(y|x) + r(x, y)/beta - log Z(x) (Eq. 3) where the last dimension lists every answer: (..., |Y|) -> (..., |Y|)."""
    if rewards.shape != ref_logps.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and ref_logps {tuple(ref_logps.shape)} must have one shape, (..., |Y|)")
    _check_beta(beta)
    return torch.log_softmax(ref_logps + rewards / beta, dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# What may come in


def _check_beta(beta):
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number above 0, got {beta}")


def _check(rewards, ref_logps, beta, estimator):
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    _check_beta(beta)
    B = len(rewards) if rewards.dim() else 0
    square = rewards.dim() == 2 and rewards.shape == (B, B)
    if not (square or (estimator == "constant" and rewards.dim() == 1)) or B == 0:
        raise ValueError(f"rewards must be (B, B), row = prompt, column = response, got {tuple(rewards.shape)}")
    if ref_logps is None and estimator == "paper":
        raise ValueError('ref_logps is None, but Zhat of estimator="paper" has the factor pi_ref')
    if ref_logps is not None and ref_logps.shape != rewards.shape:
        raise ValueError(f"ref_logps {tuple(ref_logps.shape)} must have the shape of rewards {tuple(rewards.shape)}")
    if B == 1 and estimator != "constant":
        raise ValueError(
            f'B = 1: with one response in the micro-batch the reward cancels out of w (estimator={estimator!r}); use B >= 2 or "constant"'
        )
    needed = {"rewards": rewards.diagonal() if square and estimator == "constant" else rewards}
    if estimator == "paper":
        needed["ref_logps"] = ref_logps
    for name, table in needed.items():
        if not table.dtype.is_floating_point or table.dtype.itemsize < 4:
            raise ValueError(f"{name} must be float32 or float64, got {table.dtype}")
        if not table.isfinite().all():
            at = tuple((~table.isfinite()).nonzero()[0].tolist())
            raise ValueError(f"{name}{list(at)} is {table[at].item()}; every entry must be a finite number")
