"""The exponential moving average of a network's weights, for evaluation in its place."""

import copy

import torch


class Average:
    """Averages the weights of a network over its training; `model` is what to evaluate.

    decay: the share that the average keeps at each step, at most (1 + step) / (10 + step). At 0
    there is no average: `model` is the network itself. state: a checkpoint of `state()`, or {}.
    Running statistics are averaged like weights. After the last step the network gets the average.
    """

    def __init__(self, network, decay, state):
        self.network, self.decay, self.model = network, decay, network
        if decay:
            self.model = copy.deepcopy(network).eval()
            if "trained" in state:  # the network itself was loaded with the average
                network.load_state_dict(state["trained"])

    @torch.no_grad()
    def update(self, step, last):
        """Take in the weights after a step, counted from 1."""
        if not self.decay:
            return
        kept = min(self.decay, (1 + step) / (10 + step))
        source = self.network.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(source[name], 1 - kept)
            else:  # the number of batches seen
                value.copy_(source[name])
        if step == last:
            self.network.load_state_dict(self.model.state_dict())

    def state(self):
        """What a checkpoint holds: "model" is the average, "trained" the network in training."""
        if not self.decay:
            return {"model": self.network.state_dict()}
        return {"model": self.model.state_dict(), "trained": self.network.state_dict()}
