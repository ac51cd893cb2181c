"""What a network keeps under a sequence of attacks."""

import torch

from common import run
from common.attacks.autoattack import attack


def robust_errors(model, images, names, eps=8.0, norm="linf", precision=None, batch_size=250):
    """{attack: error in %} on Images, each attack on what those before left standing.

    The starts are fixed, and all is judged in fp32. Several processes share the images.
    names, eps, norm, precision: as in `attack`.
    """
    size = min(batch_size, -(-len(images.y) // run.world()))
    left = torch.zeros(len(names), dtype=torch.float64)
    for i, (x, y) in enumerate(images.batches(size)):
        if i % run.world() != run.rank():
            continue
        standing = (run.predict(model, x).argmax(1) == y).nonzero()[:, 0]
        x = run.to_float(x)
        for k, name in enumerate(names):
            index = size * i + standing
            _, fooled, _ = attack(
                model, x[standing], y[standing], name, eps, norm, 0, index, precision
            )
            standing = standing[~fooled]
            left[k] += len(standing)
    kept = run.summed(left) / len(images.y)
    return {name: 100 - 100 * share for name, share in zip(names, kept.tolist(), strict=True)}


def warn_of_fall(metrics, error, chance=90.0):
    """The least error (%) under PGD so far. Says when the accuracy falls to half of its best.

    metrics: with the "least_pgd_error" before this one. chance: error (%) of guessing. Networks
    near chance have not learnt anything that could fall, so they get no warning.
    """
    least = metrics.get("least_pgd_error", 100.0)
    best = 100 - least
    robust = 100 - error
    if best > 1.5 * (100 - chance) and robust < best / 2:
        fall = f"from {best:.1f} to {robust:.1f} %"
        print(f"warning: accuracy under PGD-10 fell {fall}: raise --attack-steps")
    return min(least, error)


def picture(model, images, classes, eps=8.0, norm="linf"):
    """Images in the first row, the same attacked by PGD-20 in the second, and under each what the
    network says it is. uint8 (H,W,3)."""
    x = run.to_float(images.x)
    x_adv, _, _ = attack(model, x, images.y, "pgd-20", eps, norm)
    both = torch.cat([x, x_adv])
    said = [str(classes[k]) for k in run.predict(model, both).argmax(1)]
    return run.captioned(both, said, len(x))
