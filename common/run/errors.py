"""The two errors that end a run in one line."""

import math


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do."""


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
