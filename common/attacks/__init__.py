"""Adversarial attacks: PGD for training, AutoAttack and its relatives for evaluation."""

from common.attacks.autoattack import (
    CLASSES,
    CLEAR,
    FAST,
    STANDARD,
    STEPS,
    attack,
    autoattack,
    judge,
    lead_of_wrong,
    logits_in_fp32,
    parse,
    victim,
)
from common.attacks.fab import fab
from common.attacks.fastnet import Graphs, folded, logits_of, prepared
from common.attacks.network import frozen, unwrap
from common.attacks.pgd import (
    LOSSES,
    ce_loss,
    check_eps,
    cw_loss,
    default_alpha,
    dlr_loss,
    kl_loss,
    pgd,
    pick,
    unit_noise,
    without,
)
from common.attacks.robust import picture, robust_errors, warn_of_fall
from common.attacks.rows import distance, draw, per_image, start_noise

__all__ = [
    "CLASSES",
    "CLEAR",
    "FAST",
    "LOSSES",
    "STANDARD",
    "STEPS",
    "Graphs",
    "attack",
    "autoattack",
    "ce_loss",
    "check_eps",
    "cw_loss",
    "default_alpha",
    "distance",
    "dlr_loss",
    "draw",
    "fab",
    "folded",
    "frozen",
    "judge",
    "kl_loss",
    "lead_of_wrong",
    "logits_in_fp32",
    "logits_of",
    "parse",
    "per_image",
    "pgd",
    "pick",
    "picture",
    "prepared",
    "robust_errors",
    "start_noise",
    "unit_noise",
    "unwrap",
    "victim",
    "warn_of_fall",
    "without",
]
