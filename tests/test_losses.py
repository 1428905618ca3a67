"""baselines/losses.py and the objective of GRPO: values and gradients worked by hand, float64."""

import math

import pytest
import tiny  # noqa: F401  puts the repository on the path

import torch

from baselines.grpo import group_advantages, grpo_loss, k3
from baselines.losses import alol_loss, clipped_ratio, dpo_loss, kto_loss, rlol_loss, sft_loss, weighted_sft_loss
from var import optimal_policy, var_loss

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def leaf(*values):
    return t(*values).requires_grad_()


def gradient(loss, logps):
    return torch.autograd.grad(loss, logps)[0]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ----------------------------------------------------------------------------------------------------------------------
# Weighted likelihoods


def test_sft_is_weighted_sft_with_unit_weights_and_var_with_equal_ones():
    """-mean log pi; Eq. 12 with w = 1; VAR with Zhat = 1 and r = 0."""
    logps = leaf(-1.0, -3.0, -8.0)
    assert sft_loss(logps).item() == 4.0 and torch.equal(gradient(sft_loss(logps), logps), t(-1 / 3, -1 / 3, -1 / 3))
    torch.testing.assert_close(sft_loss(logps), weighted_sft_loss(logps, torch.ones(3, dtype=torch.float64)), **CLOSE)
    torch.testing.assert_close(sft_loss(logps), var_loss(logps, t(0, 0, 0), None, 1.0, "constant"), **CLOSE)


def test_eq12_by_hand_and_its_gradient_is_minus_w_over_B():
    """w = (2, 0.5), log pi = (-1, -4): loss (2 + 2) / 2."""
    logps = leaf(-1.0, -4.0)
    loss = weighted_sft_loss(logps, t(2.0, 0.5))
    assert loss.item() == 2.0 and torch.equal(gradient(loss, logps), t(-1.0, -0.25))


def test_eq12_with_a_negative_weight_has_no_minimum():
    """w = -1: each step down the gradient makes the response less likely and the loss smaller, for ever."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses = []
    for _ in range(4000):
        loss = weighted_sft_loss(torch.log_softmax(logits, 0)[:1], t(-1.0))
        losses.append(loss.item())
        logits = (logits - 10 * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
    assert all(b < a for a, b in zip(losses, losses[1:])) and losses[-1] < -9  # a bound would be 0, Theorem 1


def test_the_importance_ratio_is_of_whole_sequences_clipped_on_both_sides_and_carries_no_gradient():
    """exp(0.1) stays, exp(2) -> 1.9, exp(-5) -> 0.1, exp(800) = inf -> 1.9."""
    logps = leaf(-1.0, -1.0, -9.0, 0.0)
    ratio = clipped_ratio(logps, t(-1.1, -3.0, -4.0, -800.0), 0.9)
    torch.testing.assert_close(ratio, t(math.exp(0.1), 1.9, 0.1, 1.9), **CLOSE)
    assert not ratio.requires_grad
    assert torch.equal(clipped_ratio(logps, t(-1.1, -3.0, -4.0, -800.0), 0.0), t(1, 1, 1, 1))


def test_eq5_alol_by_hand():
    """A = (2, 0.5), ratio = (1, 1.9), log pi = (-3, -2): loss (2*1*3 + 0.5*1.9*2) / 2; the gradient sees the ratio only as a weight."""
    logps = leaf(-3.0, -2.0)
    loss = alol_loss(logps, t(-3.0, -5.0), t(2.0, 0.5), 0.9)
    torch.testing.assert_close(loss, t(3.95)[0], **CLOSE)
    torch.testing.assert_close(gradient(loss, logps), t(-1.0, -0.475), **CLOSE)


def test_eq5_at_the_reference_is_eq12_with_the_advantages_as_weights():
    """pi_theta = pi_ref: every ratio is 1."""
    logps, A = t(-3.0, -2.0, -40.0), t(0.3, 1.2, 2.0)
    torch.testing.assert_close(alol_loss(logps, logps, A, 0.2), weighted_sft_loss(logps, A), **CLOSE)


def test_a_clipped_example_keeps_its_gradient_unlike_ppos():
    """The difference between A-LoL's clip and PPO's min: ratio e^2 with A > 0 still pushes, at weight 1.9."""
    logps = leaf(-1.0)
    assert gradient(alol_loss(logps, t(-3.0), t(1.0), 0.9), logps).item() == pytest.approx(-1.9)
    tokens, old = leaf(-1.0), t(-3.0)[None]
    assert gradient(grpo_loss(tokens[None], old, t(1.0), torch.ones(1, 1), 0.9), tokens).item() == 0.0


def test_eq14_rlol_by_hand():
    """R = (0.8, 0.1), ratio 1, beta 0.2, log pi = (-1, -2): loss ((0.8-0.2)*1 + (0.1-0.2)*2) / 2 = 0.2; the second weight is negative."""
    logps = leaf(-1.0, -2.0)
    loss = rlol_loss(logps, t(-1.0, -2.0), t(0.8, 0.1), 0.9, 0.2)
    torch.testing.assert_close(loss, t(0.2)[0], **CLOSE)
    torch.testing.assert_close(gradient(loss, logps), t(-0.3, 0.05), **CLOSE)
    torch.testing.assert_close(rlol_loss(logps, t(-1.0, -2.0), t(0.8, 0.1), 0.9, 0.0), alol_loss(logps, t(-1.0, -2.0), t(0.8, 0.1), 0.9), **CLOSE)


def test_eq20_the_optimum_of_rlol_on_a_list_is_proportional_to_r_times_ratio_minus_beta():
    """Eq. 16-20 with the ratio frozen at 1: descent on a table of three answers ends at (R - beta) / sum (R - beta)."""
    R, beta = t(0.9, 0.5, 0.3), 0.1
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        logps = torch.log_softmax(logits, 0)
        loss = rlol_loss(logps, logps.detach(), R, 0.9, beta)
        logits = (logits - 2 * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
    torch.testing.assert_close(torch.softmax(logits, 0), (R - beta) / (R - beta).sum(), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Preferences


def test_eq4_dpo_is_log_2_at_the_reference():
    """Every log-ratio is 0: -log sigmoid(0), whatever beta and the smoothing are."""
    chosen, rejected = t(-3.0, -50.0), t(-4.0, -2.0)
    for beta, smoothing in ((0.1, 0.0), (5.0, 0.0), (0.1, 0.3)):
        loss, a, b = dpo_loss(chosen, rejected, chosen, rejected, beta, smoothing)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-15) and a.abs().max() == b.abs().max() == 0


def test_eq4_dpo_by_hand():
    """beta 0.5, log-ratios (2, -2) and (0, 4): margins 2 and -2, so the loss is mean(-log sigmoid(2), -log sigmoid(-2))."""
    chosen, rejected = leaf(-1.0, -5.0), leaf(-7.0, -1.0)
    loss, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, t(-3.0, -5.0), t(-5.0, -5.0), 0.5)
    assert chosen_rewards.tolist() == [1.0, 0.0] and rejected_rewards.tolist() == [-1.0, 2.0] and not chosen_rewards.requires_grad
    torch.testing.assert_close(loss, t(-(math.log(sigmoid(2)) + math.log(sigmoid(-2))) / 2)[0], **CLOSE)
    expected = t(-0.5 * sigmoid(-2) / 2, -0.5 * sigmoid(2) / 2)  # -beta sigmoid(-margin) / B
    d_chosen, d_rejected = torch.autograd.grad(loss, (chosen, rejected))
    torch.testing.assert_close(d_chosen, expected, **CLOSE)
    torch.testing.assert_close(d_rejected, -expected, **CLOSE)


def test_dpo_label_smoothing_by_hand():
    """margin 2, smoothing 0.1: 0.9 * -log sigmoid(2) + 0.1 * -log sigmoid(-2); its gradient vanishes where sigmoid(margin) = 0.9."""
    loss, *_ = dpo_loss(t(-1.0), t(-3.0), t(-3.0), t(-3.0), 1.0, 0.1)
    torch.testing.assert_close(loss, t(-0.9 * math.log(sigmoid(2)) - 0.1 * math.log(sigmoid(-2)))[0], **CLOSE)
    chosen = leaf(math.log(9.0))
    assert abs(gradient(dpo_loss(chosen, t(0.0), t(0.0), t(0.0), 1.0, 0.1)[0], chosen).item()) < 1e-15


def test_eq4_dpo_is_minimised_by_pi_star_on_a_list():
    """Preferences drawn with Bradley-Terry's probability over three answers: at pi* of Eq. 3 the expected DPO gradient is zero."""
    r, ref, beta = t(1.0, 0.0, -2.0), torch.log_softmax(t(0.3, -0.2, 0.7), 0), 0.5
    logps = optimal_policy(r, ref, beta).requires_grad_()
    loss = sum(torch.sigmoid(r[a] - r[b]) * dpo_loss(logps[a : a + 1], logps[b : b + 1], ref[a : a + 1], ref[b : b + 1], beta)[0] for a in range(3) for b in range(3) if a != b)
    assert gradient(loss, logps).abs().max() < 1e-15


def test_kto_by_hand():
    """beta 0.5, kl 1, log-ratios (3, 3): desirable 1 - sigmoid(0.5 * 2), undesirable 1 - sigmoid(0.5 * -2), and the gradients have opposite signs."""
    logps = leaf(-1.0, -2.0)
    loss = kto_loss(logps, t(-4.0, -5.0), torch.tensor([True, False]), t(1.0)[0], 0.5)
    torch.testing.assert_close(loss, t((1 - sigmoid(1)) / 2 + (1 - sigmoid(-1)) / 2)[0], **CLOSE)
    slope = 0.5 * sigmoid(1) * sigmoid(-1) / 2
    torch.testing.assert_close(gradient(loss, logps), t(-slope, slope), **CLOSE)


def test_kto_at_the_reference_is_one_half():
    """log-ratio 0 and kl 0."""
    logps = t(-4.0, -5.0, -100.0)
    assert kto_loss(logps, logps, torch.tensor([True, False, True]), t(0.0)[0], 0.1).item() == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# GRPO


def test_group_advantages_by_hand_and_a_constant_group_gives_zeros():
    """(1, 2, 3): mean 2, std (ddof 1) 1. Groups do not mix."""
    A = group_advantages(t(1.0, 2.0, 3.0, 7.0, 7.0, 7.0).view(2, 3))
    torch.testing.assert_close(A, torch.stack([t(-1.0, 0.0, 1.0) / 1.0001, t(0, 0, 0)]), **CLOSE)


def test_eq11_by_hand():
    """Two sequences of 2 and 1 tokens. A = 1: ratios 1 and e^0.5 clipped to 1.2, mean 1.1. A = -2: ratio e^-1 < 0.8 counts 0.8: min(-0.74, -1.6). Loss -(1.1 - 1.6)/2."""
    old = t(-1.0, -1.0, -2.0, 0.0).view(2, 2)
    logps = leaf(-1.0, -0.5, -3.0, 0.0)
    mask = t(1, 1, 1, 0).view(2, 2)
    loss = grpo_loss(logps.view(2, 2), old, t(1.0, -2.0), mask, 0.2)
    torch.testing.assert_close(loss, t(-(1.1 - 1.6) / 2)[0], **CLOSE)
    torch.testing.assert_close(gradient(loss, logps), t(-0.25, 0.0, 0.0, 0.0), **CLOSE)  # clipped tokens and padding: none


def test_eq11_a_bad_token_that_became_likelier_is_not_clipped():
    """min() keeps the worse of the two: A = -1, ratio e: objective -e, with gradient."""
    logps = leaf(-1.0)
    loss = grpo_loss(logps[None], t(-2.0)[None], t(-1.0), torch.ones(1, 1), 0.2)
    assert loss.item() == pytest.approx(math.e) and gradient(loss, logps).item() == pytest.approx(math.e)


def test_eq11_means_over_tokens_then_over_sequences():
    """At pi_old the loss is -mean A whatever the lengths are: a long sequence does not count for more."""
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.float64)
    logps = torch.zeros(2, 4, dtype=torch.float64)
    assert grpo_loss(logps, logps, t(1.0, -3.0), mask, 0.2).item() == pytest.approx(1.0)


def test_k3_is_never_negative_and_is_the_kl_on_average():
    """mean_{pi_theta} of e^d - d - 1 over a list is KL(pi_theta, pi_ref) exactly."""
    p, q = torch.log_softmax(t(0.5, -1.0, 2.0), 0), torch.log_softmax(t(0.0, 0.3, 0.1), 0)
    assert (k3(p, q) >= 0).all() and k3(p, p).abs().max() == 0
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), (p.exp() * (p - q)).sum(), **CLOSE)
    loss = grpo_loss(p[None], p[None], t(0.0), torch.ones(1, 3), 0.2, q[None], kl_coef=0.5)
    torch.testing.assert_close(loss, 0.5 * k3(p, q).mean(), **CLOSE)


# ----------------------------------------------------------------------------------------------------------------------
# What may come in


@pytest.mark.parametrize("call", [
    lambda a, b: weighted_sft_loss(a, b), lambda a, b: alol_loss(a, a, b, 0.9), lambda a, b: alol_loss(a, b, a, 0.9), lambda a, b: rlol_loss(a, a, b, 0.9, 0.1),
    lambda a, b: dpo_loss(a, b, a, a, 0.1), lambda a, b: dpo_loss(a, a, a, b, 0.1), lambda a, b: kto_loss(a, b, a > 0, 0.0, 0.1), lambda a, b: kto_loss(a, a, b > 0, 0.0, 0.1),
])  # fmt: skip
def test_shapes_that_would_broadcast_into_nonsense_are_refused(call):
    """(2,) against (2, 1) would make a (2, 2) table of pairs that nobody asked for."""
    with pytest.raises(ValueError, match=r"\(2, 1\) must have the shape of policy_logps \(2,\)"):
        call(t(-1.0, -2.0), t(-1.0, -2.0)[:, None])
