"""The paper's theorems on tensors small enough to work by hand. float64, tight tolerances; each docstring has the equation."""

import math

import pytest
import torch
from tiny import ROOT  # noqa: F401  (puts the repository on the path)

from baselines.losses import sft_loss
from var import effective_sample_size, log_partition, log_weights, optimal_policy, self_share, var_loss, weights_from_log

CLOSE = dict(rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def tables(B=4, scale=1.0):
    """Random rewards and log pi_ref of short responses, (B, B) each, and policy log-probs, (B,)."""
    return scale * torch.randn(B, B), -3 * torch.rand(B, B) - 0.1, -5 * torch.rand(B)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------- Algorithm 1


def literal_algorithm_1(policy_logps, rewards, ref_probs, beta):
    """Lines 1-8 as printed: probabilities, exponentials, products. To be maximised."""
    B, total = len(rewards), 0.0
    for i in range(B):
        z = sum(math.exp(rewards[i, j] / beta) * ref_probs[i, j] for j in range(B)) / B  # line 5
        total += math.exp(rewards[i, i] / beta) / z * policy_logps[i]  # line 6
    return total / B  # line 8


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_log_space_equals_algorithm_1_as_printed(beta):
    """loss = -(1/B) sum_i exp(r_ii/beta)/Zhat_i log pi_i with Zhat_i = (1/B) sum_j exp(r_ij/beta) pi_ref_ij (Eq. 9, 10)."""
    rewards, ref_logps, policy_logps = tables()
    expected = -literal_algorithm_1(policy_logps, rewards, ref_logps.exp(), beta)
    torch.testing.assert_close(var_loss(policy_logps, rewards, ref_logps, beta), torch.as_tensor(expected), **CLOSE)


def test_two_by_two_worked_by_hand():
    """r = [[1, 0], [0, 2]] log 2, pi_ref = [[1/2, 1/4], [1/8, 1/2]], beta 1: Zhat = (1 + 1/4)/2, (1/8 + 2)/2; w = 2/0.625, 4/1.0625."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0]]) * math.log(2)
    ref_logps = torch.tensor([[0.5, 0.25], [0.125, 0.5]]).log()
    torch.testing.assert_close(log_partition(rewards, ref_logps, 1.0).exp(), torch.tensor([0.625, 1.0625]), **CLOSE)
    torch.testing.assert_close(log_weights(rewards, ref_logps, 1.0).exp(), torch.tensor([3.2, 64 / 17]), **CLOSE)
    torch.testing.assert_close(var_loss(torch.tensor([-1.0, -2.0]), rewards, ref_logps, 1.0), torch.tensor((3.2 + 2 * 64 / 17) / 2), **CLOSE)


def test_the_gradient_is_minus_w_over_b_and_weights_carry_none():
    """d loss / d log pi_i = -w_i / B; none flows into rewards or pi_ref."""
    rewards, ref_logps, policy_logps = tables()
    for t in (rewards, ref_logps, policy_logps):
        t.requires_grad_()
    var_loss(policy_logps, rewards, ref_logps, 0.7).backward()
    torch.testing.assert_close(policy_logps.grad, -log_weights(rewards, ref_logps, 0.7).exp() / 4, **CLOSE)
    assert rewards.grad is None and ref_logps.grad is None


def test_a_constant_per_prompt_cancels_a_constant_per_response_does_not():
    """r(x_i, .) + c_i leaves w as it is (row), r(., y_j) + c_j does not (column), nor does the transposed table."""
    rewards, ref_logps, _ = tables()
    before = log_weights(rewards, ref_logps, 1.0)
    torch.testing.assert_close(log_weights(rewards + torch.randn(4, 1), ref_logps, 1.0), before, **CLOSE)
    assert (log_weights(rewards + torch.tensor([3.0, 0, 0, 0]), ref_logps, 1.0) - before).abs().max() > 0.1
    assert (log_weights(rewards.T, ref_logps.T, 1.0) - before).abs().max() > 0.1


def test_permuting_the_batch_permutes_the_weights():
    """The order of a micro-batch means nothing."""
    rewards, ref_logps, _ = tables()
    p = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(log_weights(rewards[p][:, p], ref_logps[p][:, p], 1.0), log_weights(rewards, ref_logps, 1.0)[p], **CLOSE)


def test_two_micro_batches_of_two_are_not_one_of_four():
    """B sets Zhat: accumulating two micro-batches of 2 does not make one of 4."""
    rewards, ref_logps, logps = tables()
    halves = (var_loss(logps[:2], rewards[:2, :2], ref_logps[:2, :2], 1.0) + var_loss(logps[2:], rewards[2:, 2:], ref_logps[2:, 2:], 1.0)) / 2
    assert (halves - var_loss(logps, rewards, ref_logps, 1.0)).abs() > 0.05


def test_the_order_of_rewards_decides_the_gradient():
    """Swapping the rewards of two matched pairs moves weight from one to the other."""
    rewards, ref_logps, _ = torch.zeros(2, 2), torch.full((2, 2), -1.0), None
    rewards[0, 0], rewards[1, 1] = 1.0, -1.0
    log_w = log_weights(rewards, ref_logps, 1.0)
    assert log_w[0] > log_w[1]
    rewards[0, 0], rewards[1, 1] = -1.0, 1.0
    assert log_weights(rewards, ref_logps, 1.0)[0] < log_w[0]


# ---------------------------------------------------------------------------------------------------------------------- Sec. 3.3, Theorem 1


def test_weights_are_positive():
    """w > 0 whatever the rewards (Eq. 13)."""
    rewards, ref_logps, _ = tables(8, scale=5.0)
    assert (log_weights(rewards, ref_logps, 1.0).exp() > 0).all()


def test_all_weights_one_is_sft():
    """Zhat = 1 and r = 0 give w = 1: the SFT loss."""
    *_, logps = tables()
    torch.testing.assert_close(var_loss(logps, torch.zeros(4), None, 1.0, "constant"), sft_loss(logps), **CLOSE)


def test_theorem1_the_loss_is_at_least_zero():
    """-E[w log pi] >= 0 for w > 0 and log pi <= 0 (Eq. 21-25)."""
    for _ in range(20):
        rewards, ref_logps, logps = tables(scale=3.0)
        assert var_loss(logps, rewards, ref_logps, 1.0) >= 0
    assert var_loss(torch.zeros(4), rewards, ref_logps, 1.0) == 0


def test_theorem1_equality_needs_a_single_certain_response():
    """min over pi of -sum_y w(y) log pi(y) is at pi = w / sum w, where it is positive unless one single y has weight; the paper's
    delta at argmax w has an infinite loss as soon as a second y has weight."""
    w = torch.tensor([3.0, 2.0, 1.0])
    loss = lambda pi: -(w * pi.log()).sum()
    best = w / w.sum()
    assert all(loss(torch.rand(3).softmax(0)) >= loss(best) for _ in range(200)) and loss(best) > 0
    assert math.isinf(loss(torch.tensor([1.0, 0.0, 0.0])))
    single = torch.tensor([1.0])
    assert -(torch.tensor([3.0]) * single.log()).sum() == 0


def test_negative_weights_are_unbounded_below():
    """w < 0: -w log pi falls below any bound as pi(y) -> 0 (Sec. 3.3, Eq. 12)."""
    w = torch.tensor([1.0, -0.5])
    losses = [-(w * torch.tensor([1 - 10.0**-k, 10.0**-k]).log()).sum().item() for k in (1, 10, 100, 300)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < -300


def test_rewards_100_and_99_are_told_apart_by_pi_star_but_not_by_their_ratio():
    """App. A.1: R/(R1 + R2) gives 0.5025 and 0.4975; exp(R/beta) gives e/(e+1) and 1/(e+1)."""
    rewards = torch.tensor([100.0, 99.0])
    pi = optimal_policy(rewards, torch.full((2,), 0.5).log(), 1.0).exp()
    torch.testing.assert_close(pi, torch.tensor([math.e, 1.0]) / (math.e + 1), **CLOSE)
    torch.testing.assert_close(rewards / rewards.sum(), torch.tensor([0.5025125628140703, 0.4974874371859296]), **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------- Eq. 2, 3, 7, 8, 9 on a listable Y


def listed(answers=5):
    return torch.randn(answers), torch.randn(answers).log_softmax(0), torch.randn(answers).log_softmax(0)  # r, log pi_ref, log pi


def test_eq3_optimal_policy_is_the_normalised_tilted_reference():
    """pi* = pi_ref exp(r/beta) / Z, for several prompts at once."""
    r, ref = torch.randn(3, 5), torch.randn(3, 5).log_softmax(1)
    tilted = ref.exp() * (r / 0.3).exp()
    torch.testing.assert_close(optimal_policy(r, ref, 0.3).exp(), tilted / tilted.sum(1, keepdim=True), **CLOSE)


def test_eq2_is_bounded_by_beta_log_z_and_only_pi_star_attains_it():
    """E_pi[r] - beta KL(pi, pi_ref) = beta log Z - beta KL(pi, pi*)."""
    r, ref, pi = listed()
    beta, bound = 0.7, 0.7 * torch.logsumexp(ref + r / 0.7, 0)
    value = lambda log_pi: (log_pi.exp() * r).sum() - beta * kl(log_pi, ref)
    star = optimal_policy(r, ref, beta)
    torch.testing.assert_close(value(star), bound, **CLOSE)
    torch.testing.assert_close(value(pi), bound - beta * kl(pi, star), **CLOSE)
    assert value(pi) < bound


def test_eq7_forward_kl_is_minus_entropy_minus_expected_loglik():
    """KL(pi*, pi) = -H(pi*) - E_pi*[log pi]."""
    r, ref, pi = listed()
    star = optimal_policy(r, ref, 1.0)
    entropy, loglik = -(star.exp() * star).sum(), (star.exp() * pi).sum()
    torch.testing.assert_close(kl(star, pi), -entropy - loglik, **CLOSE)


def test_eq8_the_kl_minimiser_is_the_likelihood_maximiser():
    """Both orders of any two policies agree, and pi* itself is best."""
    r, ref, _ = listed()
    star = optimal_policy(r, ref, 1.0)
    policies = torch.randn(50, 5).log_softmax(1)
    kls, logliks = kl(star, policies), (star.exp() * policies).sum(1)
    assert kls.argsort().tolist() == logliks.argsort(descending=True).tolist()
    assert (logliks < (star.exp() * star).sum()).all()


def test_eq9_importance_sampling_identity_is_exact():
    """E_pi*[log pi] = E_pi_ref[exp(r/beta)/Z log pi]."""
    r, ref, pi = listed()
    z = (ref.exp() * (r / 0.5).exp()).sum()
    torch.testing.assert_close((optimal_policy(r, ref, 0.5).exp() * pi).sum(), (ref.exp() * (r / 0.5).exp() / z * pi).sum(), **CLOSE)


def test_a_batch_that_lists_the_answers_gives_pi_star():
    """One prompt whose B responses are all of Y: w_i pi_ref(y_i) / B = pi*(y_i) under the paper's Zhat."""
    r, ref, _ = listed()
    w = log_weights(r.expand(5, 5), ref.expand(5, 5), 0.6).exp()
    torch.testing.assert_close(w * ref.exp() / 5, optimal_policy(r, ref, 0.6).exp(), **CLOSE)


def test_bradley_terry_on_rewards_is_dpo_evaluated_at_pi_star():
    """-log sigmoid(r_w - r_l) = -log sigmoid(beta log pi*_w/pi_ref_w - beta log pi*_l/pi_ref_l) (Eq. 1 and 4): Z(x) cancels."""
    from reward import bradley_terry_loss

    r, ref, _ = listed()
    ratio = 0.4 * (optimal_policy(r, ref, 0.4) - ref)
    torch.testing.assert_close(bradley_terry_loss(r[:1], r[1:2]), -torch.nn.functional.logsigmoid(ratio[0] - ratio[1]), **CLOSE)


def test_a_tabular_policy_trained_on_samples_of_pi_ref_reaches_pi_star():
    """Minimising the shipped loss over y ~ pi_ref with responses of one prompt in the micro-batch: KL(pi*, pi) < 1e-3 (Eq. 3, 8, 9)."""
    torch.manual_seed(1)
    r, ref, _ = listed()
    star, theta = optimal_policy(r, ref, 1.0), torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.5)
    B, late = 1024, []
    for step in range(400):
        y = torch.multinomial(ref.exp(), B, replacement=True)
        # row i = the same prompt, column j = y_j: every row of rewards is r(x, y_1), ..., r(x, y_B)
        loss = var_loss(theta.log_softmax(0)[y], r[y].expand(B, B), None, 1.0, "monte_carlo")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        late += [theta.detach().clone()] * (step >= 200)
    assert kl(star, torch.stack(late).mean(0).log_softmax(0)) < 1e-3 < kl(star, ref)


# ---------------------------------------------------------------------------------------------------------------------- Estimators, self_share, B = 1


def test_monte_carlo_has_no_pi_ref_factor_and_constant_is_exp_r_over_beta():
    """log Zhat = logsumexp(r/beta) - log B, and 0. Neither reads ref_logps; "constant" reads the matched pairs only."""
    rewards, ref_logps, _ = tables()
    expected = rewards.diagonal() / 2 - ((rewards / 2).exp().mean(1)).log()
    torch.testing.assert_close(log_weights(rewards, None, 2.0, "monte_carlo"), expected, **CLOSE)
    torch.testing.assert_close(log_weights(rewards.diagonal(), None, 2.0, "constant"), rewards.diagonal() / 2, **CLOSE)
    only_matched = torch.full((4, 4), math.nan).diagonal_scatter(rewards.diagonal())
    torch.testing.assert_close(log_weights(only_matched, only_matched, 2.0, "constant"), rewards.diagonal() / 2, **CLOSE)


def test_self_share_by_hand():
    """r/beta + log pi_ref = log [[3, 1], [4, 4]]: shares 3/4 and 4/8 of their rows, mean 0.625."""
    terms = torch.tensor([[3.0, 1.0], [4.0, 4.0]]).log()
    assert self_share(terms / 2, terms / 2, 1.0).item() == self_share(terms, 0 * terms, 1.0).item() == pytest.approx(0.625, abs=1e-12)


def test_self_share_tells_when_the_reward_cancels_though_ess_looks_healthy():
    """r_ij = r_i - cost for i != j: as the cost grows, w_i -> B/pi_ref_ii whatever r_i is, ess -> B and self_share -> 1."""
    matched, ref_logps = torch.tensor([2.0, 1.0, 0.0, -2.0]), torch.full((4, 4), -1.0)
    share, ess, spread = [], [], []
    for cost in (0.0, 2.0, 6.0, 30.0):
        rewards = matched.expand(4, 4) - cost * (1 - torch.eye(4))
        log_w = log_weights(rewards, ref_logps, 1.0)
        share.append(self_share(rewards, ref_logps, 1.0).item())
        ess.append(effective_sample_size(log_w).item())
        spread.append((log_w.max() - log_w.min()).item())
    assert share == sorted(share) and ess == sorted(ess) and spread == sorted(spread, reverse=True)
    assert share[-1] > 0.999 and ess[-1] > 3.999 and spread[-1] < 1e-3 and spread[0] > 3.9


def test_a_micro_batch_of_one_cancels_the_reward():
    """B = 1: Zhat = exp(r/beta) pi_ref, so w = 1/pi_ref for every r. Refused, except where Zhat is constant."""
    for r in (-3.0, 0.0, 7.0):
        assert math.exp(r) / (math.exp(r) * 0.2) == pytest.approx(5.0)
    for estimator in ("paper", "monte_carlo"):
        with pytest.raises(ValueError, match="B = 1"):
            log_partition(torch.ones(1, 1), torch.ones(1, 1), 1.0, estimator)
    assert var_loss(torch.tensor([-2.0]), torch.zeros(1), None, 1.0, "constant") == 2.0


# ---------------------------------------------------------------------------------------------------------------------- Overflow, normalisation, dtypes


def long_responses(dtype):
    """Matched responses 150 nats likelier than the others: sums of log-probs over long texts."""
    return torch.zeros(2, 2, dtype=dtype), torch.tensor([[-100.0, -250.0], [-260.0, -110.0]], dtype=dtype)


def test_sums_over_long_responses_overflow_and_the_error_explains():
    """w_i is about B/pi_ref = exp(100) > exp(88.7): an error with cause and remedies in float32, finite in float64, 0/0 if taken literally."""
    rewards, ref_logps = long_responses(torch.float32)
    logps = torch.tensor([-100.0, -110.0], dtype=torch.float32)
    with pytest.raises(ValueError, match="sums of log-probs.*--ref_logps mean.*--normalize_weights") as error:
        var_loss(logps, rewards, ref_logps, 1.0)
    assert "110.7" in str(error.value)  # the weight: 110 + log 2
    z = (rewards.exp() * (ref_logps - 10).exp()).mean(1)  # the literal form, 10 nats longer: pi_ref underflows
    assert not (rewards.diagonal().exp() / z).isfinite().all()
    assert torch.isfinite(var_loss(*(t.double() for t in (logps, rewards, ref_logps)), 1.0))
    assert torch.isfinite(var_loss(logps, rewards, ref_logps, 1.0, normalize=True))


def test_normalised_weights_have_mean_one():
    """w / mean w: they add up to B, and a constant factor of all weights is gone."""
    rewards, ref_logps, logps = tables()
    log_w = log_weights(rewards, ref_logps, 1.0)
    w = weights_from_log(log_w, normalize=True)
    torch.testing.assert_close(w, log_w.exp() / log_w.exp().mean(), **CLOSE)
    torch.testing.assert_close(weights_from_log(log_w + 500, normalize=True), w, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(var_loss(logps, rewards, ref_logps, 1.0, normalize=True), -(w * logps).mean(), **CLOSE)


def test_effective_sample_size_goes_from_one_to_b():
    """(sum w)^2 / sum w^2, without overflow."""
    w = torch.tensor([1.0, 2.0, 3.0])
    assert effective_sample_size(w.log()).item() == pytest.approx(36 / 14)
    assert effective_sample_size(torch.full((8,), 900.0)).item() == pytest.approx(8)
    assert effective_sample_size(torch.tensor([0.0, -900.0])).item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_that_comes_in_goes_out(dtype):
    """float32 and float64, every function."""
    rewards, ref_logps, logps = (t.to(dtype) for t in tables())
    outs = [log_partition(rewards, ref_logps, 1.0), log_weights(rewards, ref_logps, 1.0), var_loss(logps, rewards, ref_logps, 1.0), self_share(rewards, ref_logps, 1.0)]
    outs += [optimal_policy(rewards, ref_logps, 1.0), log_partition(rewards, None, 1.0, "monte_carlo"), log_partition(rewards, None, 1.0, "constant")]
    assert all(out.dtype == dtype for out in outs)


# ---------------------------------------------------------------------------------------------------------------------- Errors name the value

NAN = torch.tensor([[0.0, 0.0], [math.nan, 0.0]])
GOOD = torch.zeros(2, 2)
WRONG = [
    (dict(rewards=torch.zeros(2, 3)), r"\(2, 3\)"), (dict(ref_logps=torch.zeros(3, 3)), r"\(3, 3\).*\(2, 2\)"), (dict(rewards=torch.zeros(2)), r"\(2,\)"),
    (dict(rewards=torch.tensor(1.0)), r"\(\)"), (dict(rewards=torch.zeros(0, 0)), r"\(0, 0\)"), (dict(ref_logps=None), "None"),
    (dict(beta=0.0), "beta.*0.0"), (dict(beta=-1.0), "beta.*-1.0"), (dict(beta=math.nan), "beta.*nan"), (dict(beta=math.inf), "beta.*inf"),
    (dict(rewards=NAN), r"rewards\[1, 0\] is nan"), (dict(ref_logps=-1 / torch.zeros(2, 2)), r"ref_logps\[0, 0\] is -inf"),
    (dict(estimator="best"), "'best'"), (dict(rewards=torch.zeros(2, 2, dtype=torch.int64)), "int64"), (dict(ref_logps=torch.zeros(2, 2, dtype=torch.bfloat16)), "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("change, named", WRONG)
def test_wrong_input_is_a_value_error_that_names_the_value(change, named):
    """Shapes, B, beta, non-finite entries, estimators, dtypes."""
    arguments = dict(rewards=GOOD, ref_logps=GOOD, beta=1.0, estimator="paper") | change
    with pytest.raises(ValueError, match=named):
        log_weights(**arguments)


def test_wrong_policy_logps_and_optimal_policy_shapes_are_named():
    """(3,) against B = 2; (2, 3) against (3, 2)."""
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        var_loss(torch.zeros(3), GOOD, GOOD, 1.0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        optimal_policy(torch.zeros(2, 3), torch.zeros(3, 2), 1.0)
    with pytest.raises(ValueError, match="beta"):
        optimal_policy(torch.zeros(2), torch.zeros(2), 0)
