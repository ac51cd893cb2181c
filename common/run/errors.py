"""The errors that end a run in one line."""

import math
import re


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do."""


class InputError(UserError, ValueError):
    """An argument from Python that a function cannot take. `except ValueError` catches it too."""


class Diverged(UserError):
    """The loss, its gradient or a weight is not finite any more, since step `step`."""

    def __init__(self, message, step):
        super().__init__(message)
        self.step = step


def check_finite(loss, step, lr, grad_norm=0.0):
    """Raise Diverged when the loss or the gradient's norm is NaN or infinite: nothing of it may
    reach a checkpoint."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise Diverged(
            f"loss {loss} at step {step} (lr {lr:.4g}, gradient norm {float(grad_norm):.4g}): "
            "stopped; the last checkpoint is from before. Lower --lr, raise --warmup, or --clip",
            step,
        )


def out_of_memory(error, options):
    """One line for a torch.OutOfMemoryError: the batch that did not fit, and what to try.

    options: {name: value} of the script.
    """
    reason = str(error).strip().split("\n")[0]
    asked = re.search(r"Tried to allocate [\d.]+ \w+", reason)
    batch = options.get("batch_size")
    tries = []
    if batch and batch > 1:
        tries.append(f"--batch-size {batch // 2}")
    if options.get("precision") == "fp32":
        tries.append("--precision bf16")
    if options.get("capture"):
        tries.append("--no-capture")
    if "epochs" in options:  # of a training; an evaluation has the network that it has
        tries.append("a smaller --arch")
    where = f" with --batch-size {batch}" if batch else ""
    text = f"out of memory{where} ({asked[0] if asked else reason[:100]}); "
    return text + (f"try {' or '.join(tries)}" if tries else "free the device, then repeat")
