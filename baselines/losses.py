"""
The losses the paper compares VAR with. Tensors in, a scalar out; only torch.

    sft_loss            plain supervised fine-tuning: every weight is 1
    weighted_sft_loss   Eq. 12, weights from anywhere
    dpo_loss            Eq. 4, direct preference optimisation, pairs
    alol_loss           Eq. 5, advantage-leftover-lunch: weight = advantage times a clipped importance ratio
    rlol_loss           Eq. 14, the same with the reward itself, minus beta
    kto_loss            Kahneman-Tversky optimisation (Sec. 1): single responses, each labelled desirable or not

Shapes. B = examples (DPO: pairs) in one micro-batch. policy_logps[i] = log pi_theta(y_i | x_i) and ref_logps[i] = log pi_ref(y_i | x_i) are
(B,), in nats, SUMMED over the response's tokens: the importance ratio pi_theta/pi_ref of a sequence is exp of the difference of sums.
Every loss is a mean over the batch and is minimised. float32 or float64 in, the same dtype out. ValueError: shapes that differ.

Departures from the paper:
1. Sign. Eq. 12 and 5 are printed as losses, Eq. 14 as an objective "loss" that is maximised; all are minimised here.
2. Eq. 5 has no clip; its authors' method, and the paper's Sec. 3.3, bound the ratio to [1 - clip, 1 + clip].
3. The ratio only weighs: it carries no gradient (Eq. 16 "theta_1 frozen", and the gradient form of Eq. 5). This is not PPO's
   min(ratio A, clip(ratio) A): here the clip acts on both sides whatever the sign of A, and a clipped example keeps its gradient.
4. KTO is named in Sec. 1 without an equation; the one here is its authors', with unit weights for both labels.
"""

import torch
import torch.nn.functional as F


def sft_loss(policy_logps):
    """Supervised fine-tuning, (B,) -> (): the VAR loss with all weights 1. Sums, not token means: a long response counts for its length."""
    return -policy_logps.mean()  # maximise the log-likelihood = minimise its negative


def weighted_sft_loss(policy_logps, weights):
    """Eq. 12, -mean w_i log pi_theta(y_i|x_i): (B,), (B,) -> (). With any w_i < 0 it has no minimum: log pi_theta(y_i|x_i) -> -infinity."""
    _same_shape(policy_logps, weights=weights)
    return -(weights * policy_logps).mean()


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0):
    """Eq. 4, -log sigmoid(beta * margin of log-ratios): four (B,) -> loss (), chosen_rewards (B,), rejected_rewards (B,), both detached.

    "Rewards" is DPO's word for beta log(pi_theta/pi_ref). label_smoothing is the share of pairs assumed to be labelled the wrong way round.
    At pi_theta = pi_ref every margin is 0 and the loss is log 2. ValueError: shapes that differ.
    """
    _same_shape(policy_chosen_logps, rejected=policy_rejected_logps, ref_chosen=ref_chosen_logps, ref_rejected=ref_rejected_logps)
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)  # (B,)
    return losses.mean(), chosen_rewards.detach(), rejected_rewards.detach()


def clipped_ratio(policy_logps, ref_logps, clip):
    """pi_theta(y|x) / pi_ref(y|x) of whole sequences, bounded to [1 - clip, 1 + clip]: (B,), (B,) -> (B,), detached. exp(89) = inf is bounded too."""
    return (policy_logps - ref_logps).exp().clamp(1 - clip, 1 + clip).detach()


def alol_loss(policy_logps, ref_logps, advantages, clip):
    """Eq. 5, -mean A_i clip(ratio_i, 1-clip, 1+clip) log pi_theta(y_i|x_i): (B,) x3 -> ()."""
    _same_shape(policy_logps, ref_logps=ref_logps, advantages=advantages)
    return -(advantages * clipped_ratio(policy_logps, ref_logps, clip) * policy_logps).mean()


def rlol_loss(policy_logps, ref_logps, rewards, clip, beta):
    """Eq. 14 and 15, -mean (R_i clip(ratio_i, 1-clip, 1+clip) - beta) log pi_theta(y_i|x_i): (B,) x3 -> ().

    The weight is negative where R_i ratio_i < beta; there the loss is unbounded below, as in Eq. 12.
    """
    _same_shape(policy_logps, ref_logps=ref_logps, rewards=rewards)
    return -((rewards * clipped_ratio(policy_logps, ref_logps, clip) - beta) * policy_logps).mean()


def kto_loss(policy_logps, ref_logps, desirable, kl, beta):
    """KTO: (B,), (B,), (B,) bool, () -> loss (). Mean of 1 - sigmoid(beta (log-ratio - kl)), or (kl - log-ratio) where not desirable.

    kl estimates KL(pi_theta, pi_ref) from mismatched pairs (x_i, y_i+1); the caller clamps it at 0, averages it over processes and detaches it.
    """
    _same_shape(policy_logps, ref_logps=ref_logps, desirable=desirable)
    log_ratios = policy_logps - ref_logps  # (B,)
    towards = torch.where(desirable, log_ratios - kl, kl - log_ratios)  # (B,)  the sign flips for undesirable responses
    return (1 - torch.sigmoid(beta * towards)).mean()


def _same_shape(policy_logps, **others):
    for name, tensor in others.items():
        if tensor.shape != policy_logps.shape or policy_logps.dim() != 1:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of policy_logps {tuple(policy_logps.shape)}, which is (B,)")
