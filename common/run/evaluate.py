"""Predictions and their metrics: error, loss, calibration."""

import contextlib
import math

import torch
import torch.nn.functional as F

from common.run.device import Precision, rows, summed
from common.run.errors import UserError


def to_float(x):
    """uint8 images (N,C,H,W) to float in [0,1], channels_last; floats pass unchanged.

    CUDA divides by a number as a product with its reciprocal, which differs in the last bit for
    half of the grey levels. So the divisor is a tensor on the same device.
    """
    if x.dtype == torch.uint8:
        layout = torch.channels_last if x.ndim == 4 else torch.preserve_format
        x = x.to(torch.float32, memory_format=layout).div_(torch.full((), 255.0, device=x.device))
    return x


def logits_of(output):
    """Logits (N,K) fp32 of a network's output: a tensor, a tuple (its first) or a dict."""
    if isinstance(output, dict) or hasattr(output, "logits"):
        found = output.get("logits") if isinstance(output, dict) else output.logits
    elif isinstance(output, (tuple, list)) and len(output):
        found = output[0]
    else:
        found = output
    if not isinstance(found, torch.Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(
            f"the model returned {shape} where logits (N, classes) are needed: a tensor, a tuple "
            'that begins with it, or a dict with the key "logits"'
        )
    return found.float()


@contextlib.contextmanager
def eval_mode(model):
    """Evaluation mode inside; afterwards every submodule has the mode it had."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def predict(model, x, precision=None, batch_size=500):
    """Logits (N,K), fp32, of images x (N,3,H,W), uint8 or float in [0,1], in eval mode."""
    precision = precision or Precision("fp32", x.device)
    with eval_mode(model), precision.autocast():
        return torch.cat([logits_of(model(to_float(part))) for part in x.split(batch_size)])


def counts(logits, y, bins=15):
    """What `metrics` divides, fp64 (3 + bins,): images, wrong ones, cross-entropy, and per bin of
    confidence its sum less the number right. Counts of parts add up to those of the whole. Logits
    that are NaN, or infinite beside one another, decide nothing: they count as wrong."""
    confidence = logits.softmax(1).amax(1)
    predicted = logits.argmax(1)
    confidence = confidence.where(logits.isposinf().sum(1) != 1, 1.0)  # a single one decides
    confidence = confidence.where(~logits.isnan().any(1), torch.nan)
    decided = confidence.isfinite()
    wrong = ((predicted != y) | ~decided).double()
    confidence = confidence.nan_to_num(0)
    which = (confidence * bins).long().clamp(max=bins - 1)
    result = torch.zeros(3 + bins, dtype=torch.float64, device=y.device)
    result[0], result[1] = len(y), wrong.sum()
    result[2] = F.cross_entropy(logits, y, reduction="none").double().sum()
    return result.index_add_(0, 3 + which, confidence.double() - (1 - wrong))


def metrics_of(counts):
    """error (%), loss (nats), ece (%): expected calibration error over equal bins."""
    n, wrong, loss, *gaps = counts.tolist()
    return {"error": 100 * wrong / n, "loss": loss / n, "ece": 100 * sum(map(abs, gaps)) / n}


def not_finite(found):
    """A warning where `metrics` are of logits that are not all finite, else None."""
    if math.isfinite(found["loss"]):
        return None
    return (
        "the logits of some images are not finite: an overflow, no decision; they count as "
        "misclassified; mend the network"
    )


def metrics(logits, y, bins=15):
    """error (%), loss (nats), ece (%) of logits (N,K)."""
    return metrics_of(counts(logits, y, bins))


@torch.inference_mode()
def predict_all(model, images, precision=None, batch_size=500):
    """(logits (N,K), labels (N,)) of the images that can be read, in eval mode.

    images: data.Images, data.Files or the like. Where `only` restricts them to some classes, the
    logits are those of these classes and the labels count them.
    """
    precision = precision or Precision("fp32", images.device)
    logits, labels = [], []
    with eval_mode(model), precision.autocast():
        for x, y in images.batches(batch_size):
            logits.append(model(to_float(x)).float())
            labels.append(y)
    if not labels:
        return torch.zeros(0, 1, device=images.device), images.y[:0]
    logits, labels = torch.cat(logits), torch.cat(labels)
    if images.only is not None and logits.shape[1] > len(images.only):
        only = images.only.to(labels.device)
        logits, labels = logits[:, only], torch.searchsorted(only, labels)
    return logits, labels


def evaluate(model, images, precision=None, batch_size=500, mine=False):
    """`metrics` of the model on images, see `predict_all`. Percent and nats.

    All processes call it and get the same; each takes a share of the images. mine: the images are
    this process's share already (`rows`). Raises UserError where no image can be read.
    """
    part = images if mine else images.subset(rows(len(images.y)))
    logits, labels = predict_all(model, part, precision, batch_size)
    found = summed(counts(logits, labels))
    if not found[0]:
        raise UserError("none of the images to evaluate can be read")
    return metrics_of(found)


def errors_of(networks, images, precision=None):
    """{name: error (%)} of networks {name: model} on the same images."""
    return {name: evaluate(m, images, precision)["error"] for name, m in networks.items()}


def accuracy(logits, y):
    """Percent of logits (N,K) whose largest is the label, 0-d, on their device."""
    return 100 * (logits.detach().argmax(1) == y).float().mean()


def warn_of_chance(accuracies, num_classes):
    """Say first which networks {name: accuracy %} have not learnt: below 1.5 times chance."""
    for name, accuracy in accuracies.items():
        if accuracy < 150 / num_classes:
            print(
                f"warning: {name} is at chance ({accuracy:.1f} % of {num_classes} classes): its "
                "numbers below say nothing about the method; train longer or change --lr"
            )
