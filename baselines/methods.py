"""
What `train.py --loss` can be: one entry of LOSSES a method, VAR first. The loop knows nothing else about any of them.

    name   loss                            responses   tables it reads                         B counts
    var    Eq. 10, var.py                  all         r and log pi_ref of every (x_i, y_j)    examples
    sft    -log pi_theta                   chosen      none                                    examples
    wsft   Eq. 12, losses.py               chosen      none; a weight column of the data       examples
    dpo    Eq. 4                           pairs       log pi_ref of the matched pairs         pairs
    alol   Eq. 5; advantages of alol.py    chosen      log pi_ref of the matched pairs         examples
    rlol   Eq. 14                          chosen      r and log pi_ref of the matched pairs   examples
    kto    Sec. 1                          labelled    log pi_ref of (x_i, y_i), (x_i, y_i+1)  examples

All but VAR take sums of log-probs, as their authors do, whatever --ref_logps says. Departures from the paper: 1. rewards of A-LoL and R-LoL
are sigmoid(logit), between 0 and 1, as in A-LoL's own code; the paper does not say. 2. beta of R-LoL (0.1) is ours: the paper gives none.

A `compute` returns the loss of one micro-batch and its metrics: {name: (n,) values}, which the loop averages over all values of a step.
Torch is imported inside them, because train.py reads this table to answer --help.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from formats import InputError


@dataclass(frozen=True)
class Loss:
    compute: Callable  # (Batch, args) -> loss (), {metric: (n,)}
    responses: str  # what --responses means by default
    reads: str  # its own flags, for the note on those it does not read
    tables: Callable = lambda args: None  # args -> {"rewards": cells, "ref_logps": cells}, see tables.cells_of; None: it needs no table
    beta: float | None = None  # the default of --beta
    pairs: bool = False  # a micro-batch is B pairs, 2B rows: chosen, rejected, chosen, ...
    mismatched: bool = False  # it also reads log pi_theta(y_i+1 | x_i)
    per_token: bool = True  # the loss is divided by the run's mean response length; not where log 2 means something
    reward_model: bool = False  # cannot do without one


@dataclass
class Batch:
    """One micro-batch of K rows."""

    examples: list  # K of data.Example
    policy_logps: object  # (K,) nats, summed over tokens, with gradient
    rewards: object  # (K, K) or None; nan where not measured
    ref_logps: object  # (K, K) or None; likewise
    mismatched_logps: object  # (K,) log pi_theta(y_i+1 | x_i), the last row with the first response; without gradient; or None
    process_mean: Callable  # a tensor -> its mean over all processes

    def column(self, name):
        """A number of every example, (K,) float32."""
        return self.policy_logps.new_tensor([getattr(e, name) for e in self.examples])


# ----------------------------------------------------------------------------------------------------------------------
# VAR and weighted likelihoods


def compute_var(batch, args):
    from tables import weights_at_a_glance
    from var import log_partition, log_weights, var_loss, weights_from_log

    tables = batch.rewards, batch.ref_logps, args.beta, args.estimator
    loss = var_loss(batch.policy_logps, *tables, args.normalize_weights)
    weights = weights_from_log(log_weights(*tables), args.normalize_weights)
    ess, share = weights_at_a_glance(*tables)
    metrics = {"rewards": batch.rewards.diagonal(), "log_z": log_partition(*tables), "weights/mean": weights, "weights/max": weights}
    metrics |= {"weights/ess": weights.new_tensor([ess])} | ({} if share is None else {"weights/self_share": weights.new_tensor([share])})
    return loss, metrics


def compute_sft(batch, args):
    from baselines.losses import sft_loss

    return sft_loss(batch.policy_logps), {}


def compute_wsft(batch, args):
    from baselines.losses import weighted_sft_loss

    weights = batch.column("weight")
    return weighted_sft_loss(batch.policy_logps, weights), {"weights/mean": weights, "weights/max": weights}


def compute_alol(batch, args):
    from baselines.losses import alol_loss, clipped_ratio

    advantages, ref_logps = batch.column("weight").clamp(min=0), batch.ref_logps.diagonal()  # below 0 only in held-out data
    loss = alol_loss(batch.policy_logps, ref_logps, advantages, args.clip)  # Eq. 5
    return loss, {"advantages": advantages, "ratio": clipped_ratio(batch.policy_logps, ref_logps, args.clip)}


def compute_rlol(batch, args):
    from baselines.losses import clipped_ratio, rlol_loss

    rewards, ref_logps = batch.rewards.diagonal(), batch.ref_logps.diagonal()
    if args.reward_model:
        rewards = rewards.sigmoid()
    elif not ((rewards >= 0) & (rewards <= 1)).all():
        row = int(((rewards < 0) | (rewards > 1)).nonzero()[0])
        raise InputError(f"{batch.examples[row].where}: score {rewards[row]:g}; without --reward_model, rlol needs scores from 0 to 1")
    loss = rlol_loss(batch.policy_logps, ref_logps, rewards, args.clip, args.beta)  # Eq. 14
    ratio = clipped_ratio(batch.policy_logps, ref_logps, args.clip)
    return loss, {"rewards": rewards, "ratio": ratio, "weights/negative": (rewards * ratio < args.beta).to(rewards.dtype)}


# ----------------------------------------------------------------------------------------------------------------------
# Preferred against dispreferred; the metrics have the names that users of other trainers know


def compute_dpo(batch, args):
    from baselines.losses import dpo_loss

    logps, ref_logps = batch.policy_logps, batch.ref_logps.diagonal()
    sides = logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2]  # chosen, rejected of the policy; of the reference
    loss, chosen, rejected = dpo_loss(*sides, args.beta, args.label_smoothing)  # Eq. 4
    metrics = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    metrics["rewards/accuracies"] = (chosen > rejected).to(chosen.dtype)  # strictly: 0 at the start, where both are 0
    return loss, metrics | {"logps/chosen": logps[0::2].detach(), "logps/rejected": logps[1::2].detach()}


def mismatched(examples):
    """(x_i, y_i) of a micro-batch -> (x_i, y_i+1), the last prompt with the first response. Now and then both answer one prompt, as in KTO's own code."""
    return [replace(x, response_ids=y.response_ids) for x, y in zip(examples, examples[1:] + examples[:1])]


def compute_kto(batch, args):
    import torch

    from baselines.losses import kto_loss

    ref_logps = batch.ref_logps.diagonal()
    drift = batch.mismatched_logps - batch.ref_logps.roll(-1, dims=1).diagonal()  # (K,)  log-ratios of (x_i, y_i+1)
    kl = batch.process_mean(drift.mean()).clamp(min=0)  # (), no gradient
    desirable = torch.tensor([e.desirable for e in batch.examples], device=ref_logps.device)
    loss = kto_loss(batch.policy_logps, ref_logps, desirable, kl, args.beta)
    logps = batch.policy_logps.detach()
    rewards = args.beta * (logps - ref_logps)
    metrics = {"kl": kl[None], "rewards/chosen": rewards[desirable], "rewards/rejected": rewards[~desirable]}
    return loss, metrics | {"logps/chosen": logps[desirable], "logps/rejected": logps[~desirable]}


# ----------------------------------------------------------------------------------------------------------------------
# The table

VAR_TABLES = {  # what each estimator of Zhat reads
    "paper": {"rewards": "all", "ref_logps": "all"},
    "monte_carlo": {"rewards": "all", "ref_logps": None},
    "constant": {"rewards": "matched", "ref_logps": None},
}
MATCHED_REF = {"rewards": None, "ref_logps": "matched"}
LOSSES = {
    "var": Loss(compute_var, "all", "beta estimator ref_logps normalize_weights", lambda args: VAR_TABLES[args.estimator], beta=1.0),
    "sft": Loss(compute_sft, "chosen", ""),
    "wsft": Loss(compute_wsft, "chosen", "weight_column"),
    "dpo": Loss(
        compute_dpo, "pairs", "beta label_smoothing", lambda args: MATCHED_REF, beta=0.1, pairs=True, per_token=False
    ),
    "alol": Loss(compute_alol, "chosen", "clip value_prompts", lambda args: MATCHED_REF, reward_model=True),
    "rlol": Loss(compute_rlol, "chosen", "clip beta", lambda args: {"rewards": "matched", "ref_logps": "matched"}, beta=0.1),
    "kto": Loss(compute_kto, "labelled", "beta", lambda args: {"rewards": None, "ref_logps": "neighbours"}, beta=0.1, per_token=False, mismatched=True),
}
