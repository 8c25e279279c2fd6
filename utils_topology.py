"""Topology primitives of Neuroplastic Expansion (NE), shared by the scripts.

A layer is a linear layer with `weight (out, in)`, `bias (out,)` and `mask (out, in)`, 1.0
where a connection is active and 0.0 elsewhere. All functions work in place, draw only from
the generator they are given (on the CPU), and are called between updates, never in one.
Section and equation numbers are those of the paper.
"""

import math

import torch

try:  # Adam imports it, and crashes if rendering has loaded Mesa's LLVM
    import triton  # noqa: F401
except ImportError:  # torch's CPU build has none
    pass


# --- sparse start (§4.2) ------------------------------------------------------
def erdos_renyi_densities(shapes: list[tuple[int, int]], density: float) -> list[float]:
    """Densities of the layers of a network (Mocanu et al. 2018, Evci et al. 2020).

    A layer has eps * (out + in) connections, all have density * sum(out * in). A layer that
    eps would make denser than 1 is made dense, and eps is solved again for the rest.

    Args:
        shapes: (out, in) of each layer.
        density: active share of all connections of the network, in (0, 1].
    """
    sizes = [n_out * n_in for n_out, n_in in shapes]
    densities = [1.0] * len(shapes)
    sparse = list(range(len(shapes)))
    while density < 1 and sparse:
        connections = density * sum(sizes)
        connections -= sum(sizes[n] for n in range(len(shapes)) if n not in sparse)
        eps = connections / sum(sum(shapes[n]) for n in sparse)
        for n in sparse:
            densities[n] = min(1.0, eps * sum(shapes[n]) / sizes[n])
        if all(densities[n] < 1 for n in sparse):
            break
        sparse = [n for n in sparse if densities[n] < 1]
    return densities


def sample_mask(shape, density: float, rng: torch.Generator) -> torch.Tensor:
    """A random mask (out, in) with exactly round(density * out * in) ones, at least 1."""
    size = math.prod(shape)
    count = max(1, round(density * size))
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=rng)[:count]] = 1.0
    return mask.view(shape)


@torch.no_grad()
def sparsify(layers, density: float, sparse_init: str, rng: torch.Generator) -> None:
    """Draws the masks of one network, "erdos-renyi" or "uniform"; zeroes what they mask."""
    densities = [density] * len(layers)
    if sparse_init == "erdos-renyi":
        shapes = [tuple(layer.mask.shape) for layer in layers]
        densities = erdos_renyi_densities(shapes, density)
    for layer, layer_density in zip(layers, densities, strict=True):
        layer.initial_density = layer_density
        layer.mask.copy_(sample_mask(layer.mask.shape, layer_density, rng))
        layer.weight.mul_(layer.mask)


@torch.no_grad()
def copy_masks(layers, target_layers) -> None:
    """Target layers take over the masks of the online layers."""
    for layer, target in zip(layers, target_layers, strict=True):
        target.mask.copy_(layer.mask)
        target.weight.mul_(layer.mask)


def network_density(layers) -> float:
    """Share of active connections over all layers, in [0, 1]."""
    active = sum(count_active(layer.mask) for layer in layers)
    return active / sum(layer.mask.numel() for layer in layers)


def count_active(mask: torch.Tensor) -> int:
    return int(mask.count_nonzero())  # a sum in half precision would overflow


# --- Adam and its state -------------------------------------------------------
class Adam(torch.optim.Adam):
    """Adam with its state made at once, so that a round can change it before a step.

    `apply` is `step` without its bookkeeping, a tenth of a small network's update on a CPU.
    It takes the rate from `param_groups`. A CUDA graph keeps the number it was captured with:
    to anneal it there, make that entry a tensor.
    """

    def __init__(self, params: list[torch.Tensor], learning_rate: float):
        super().__init__(params, learning_rate)
        for p in params:
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.list_state()

    def __setstate__(self, state: dict) -> None:
        """Of a copy, and of `load_state_dict`, which brings other tensors."""
        super().__setstate__(state)
        self.list_state()

    def list_state(self) -> None:
        self.params = self.param_groups[0]["params"]
        states = [self.state[p] for p in self.params]
        # views of one tensor, so that all count in one operation
        steps = [state["step"].to(state["exp_avg"].device) for state in states]
        self.counter = torch.stack(steps)  # (params,)
        self.steps = list(self.counter)
        for state, step in zip(states, self.steps, strict=True):
            state["step"] = step
        self.exp_avgs = [state["exp_avg"] for state in states]
        self.exp_avg_sqs = [state["exp_avg_sq"] for state in states]

    @torch.no_grad()
    def apply(self, gradients) -> None:
        """One step with gradients of the parameters, in their order."""
        ordered = []
        for p, gradient in zip(self.params, gradients, strict=True):
            if gradient.stride() != p.stride():  # which the kernel does not look at
                gradient = torch.empty_like(p).copy_(gradient)
            ordered.append(gradient)
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        self.counter.add_(1)
        torch._fused_adam_(
            self.params,
            ordered,
            self.exp_avgs,
            self.exp_avg_sqs,
            max_exp_avg_sqs=[],
            state_steps=self.steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def mean_square(optimizer, parameter: torch.Tensor, active: int) -> float:
    """Mean of Adam's exp_avg_sq over the active entries of a parameter; others are 0."""
    total = optimizer.state[parameter]["exp_avg_sq"].float().sum()
    return float(total) / max(1, active)


def set_moments(optimizer, parameter: torch.Tensor, where, square) -> None:
    """Adam's state of the entries `where` (any index): exp_avg 0, exp_avg_sq `square`.

    The step counter t, which all share, stays: with exp_avg_sq 0 at a large t, the first
    steps would be several learning rates.
    """
    state = optimizer.state[parameter]
    state["exp_avg"][where] = 0.0
    state["exp_avg_sq"][where] = square


# --- growth (§4.2, elastic neuron generation) ---------------------------------
def planned_births(layers, fraction: float) -> int:
    """As if all inactive connections were candidates, over all layers."""
    planned = 0
    for layer in layers:
        inactive = layer.mask.numel() - count_active(layer.mask)
        planned += math.ceil(fraction * inactive)
    return planned


def random_scores(layers, rng: torch.Generator) -> list[torch.Tensor]:
    """Naive growth (§4.1): uniform in (0, 1], (out, in) of each layer."""
    scores = []
    for layer in layers:
        uniform = 1 - torch.rand(layer.mask.shape, generator=rng)
        scores.append(uniform.to(layer.mask.device))
    return scores


@torch.no_grad()
def grow(layers, scores, fraction: float, optimizer: torch.optim.Adam) -> int:
    """Activates the candidates with the largest |score| of each layer. Returns how many.

    Candidates are inactive connections whose score is not 0: one without a gradient can
    learn nothing. ceil(fraction * candidates) are born. Their weight is 0, as a masked
    weight always is, so the output does not change.

    Args:
        scores: (out, in) of each layer, the dense gradient of its weight.
        fraction: share of the candidates, in [0, 1].
    """
    grown = 0
    for layer, score in zip(layers, scores, strict=True):
        square = mean_square(optimizer, layer.weight, count_active(layer.mask))
        candidates = (layer.mask == 0) & (score != 0)
        count = math.ceil(fraction * int(candidates.sum()))
        ranked = score.abs().masked_fill(~candidates, -1.0).flatten()
        born = torch.zeros_like(candidates)
        born.view(-1)[ranked.topk(count).indices] = True
        layer.mask[born] = 1.0
        set_moments(optimizer, layer.weight, born, square)
        grown += count
    return grown


# --- dormancy (Eq. 1) ---------------------------------------------------------
def dormancy_scores(hidden: torch.Tensor) -> torch.Tensor:
    """Eq. 1: a neuron's mean |activation| over the mean of its layer. (..., n) -> (n,).

    In a silent layer all scores are 0.
    """
    mean = hidden.flatten(end_dim=-2).abs().mean(dim=0)  # (n,)
    tiny = torch.finfo(mean.dtype).tiny
    return mean / mean.mean().clamp_min(tiny)


def dormant_neurons(hidden: list[torch.Tensor], tau: float) -> list[tuple[int, int]]:
    """(depth, neuron) of all neurons with score <= tau in hidden layers [(B, n), ...]."""
    found = []
    for depth, h in enumerate(hidden):
        dormant = dormancy_scores(h) <= tau  # (n,)
        found += [(depth, neuron) for neuron in dormant.nonzero().flatten().tolist()]
    return found


# --- dormant neuron pruning and reset (§4.2, Eq. 2) ---------------------------
@torch.no_grad()
def prune(layers, hidden, budget: int, clip: float, optimizer, rng, norms=()) -> int:
    """Prunes and resets dormant neurons (score 0) in random order while they fit.

    A pruned neuron loses all outgoing connections. Its incoming ones are drawn anew as at
    birth: fan-in at the layer's initial density but never more than it had, never from a
    dormant neuron, weights and bias from the initialiser. So it is alive again but silent,
    and the output on the batch does not change (but for LayerNorm's statistics).

    Args:
        layers: all layers of the network, from input to output.
        hidden: activations [(B, n), ...] of the hidden layers.
        budget: connections that may go; a neuron that costs more than is left is skipped.
        clip: kappa; bounds the incoming weights of a reset neuron from now on (§B.2).
        norms: between each hidden layer and its ReLU, nn.LayerNorm or nn.Identity.

    Returns: how many connections went, at most `budget`.
    """
    neurons = dormant_neurons(hidden, tau=0.0)
    # before anything goes, so that the order does not matter
    had = [layer.mask.count_nonzero(dim=1).tolist() for layer in layers]
    awake = [torch.ones(layer.in_features, dtype=torch.bool) for layer in layers]
    for depth, neuron in neurons:
        awake[depth + 1][neuron] = False
    gone = 0
    for choice in torch.randperm(len(neurons), generator=rng).tolist():
        depth, neuron = neurons[choice]
        incoming = layers[depth]
        outgoing = layers[depth + 1]

        # what it costs
        inputs = awake[depth].nonzero().flatten()
        at_birth = max(1, round(incoming.initial_density * incoming.in_features))
        fan_in = min(had[depth][neuron], at_birth, len(inputs))
        leaves = count_active(outgoing.mask[:, neuron])
        cost = count_active(incoming.mask[neuron]) - fan_in + leaves
        if gone + cost > budget:
            continue
        gone += cost

        # incoming: drawn anew
        active = count_active(incoming.mask)
        weight_square = mean_square(optimizer, incoming.weight, active)
        bias_square = mean_square(optimizer, incoming.bias, incoming.out_features)
        order = torch.randperm(len(inputs), generator=rng)
        drawn = inputs[order[:fan_in]].to(incoming.mask.device)
        incoming.mask[neuron] = 0.0
        incoming.mask[neuron, drawn] = 1.0
        redraw(incoming, neuron, rng)
        row = weight_square * incoming.mask[neuron]  # (in,)
        set_moments(optimizer, incoming.weight, neuron, row)
        set_moments(optimizer, incoming.bias, neuron, bias_square)
        if clip > 0:
            incoming.bound[neuron] = clip / math.sqrt(incoming.in_features)
        restart_norm(norms, depth, neuron, optimizer)

        # outgoing: removed
        outgoing.mask[:, neuron] = 0.0
        silence(outgoing, neuron, optimizer)
    return gone


@torch.no_grad()
def redraw(layer, neuron: int, rng: torch.Generator) -> None:
    """Draws a neuron's bias and active incoming weights from the layer's initialiser."""
    weight, bias = layer.draw(1, rng)  # (1, in), (1,)
    layer.weight[neuron] = weight[0] * layer.mask[neuron]
    layer.bias[neuron] = bias[0]


@torch.no_grad()
def silence(layer, neuron: int, optimizer: torch.optim.Adam) -> None:
    """Zeroes what leaves a neuron: a column of the next layer's weight, moments too."""
    layer.weight[:, neuron] = 0.0
    set_moments(optimizer, layer.weight, (slice(None), neuron), 0.0)


@torch.no_grad()
def restart_norm(norms, depth: int, neuron: int, optimizer, square=None) -> None:
    """Gain and bias start anew: a neuron that its LayerNorm silences would stay dead."""
    if norms and isinstance(norms[depth], torch.nn.LayerNorm):
        for p, start in ((norms[depth].weight, 1.0), (norms[depth].bias, 0.0)):
            mean = mean_square(optimizer, p, p.numel())
            p[neuron] = start
            set_moments(optimizer, p, neuron, mean if square is None else square)


# --- combinations with rivals (§C), inside the masks --------------------------
def redo(layers, hidden, tau: float, optimizer, rng, norms=()) -> int:
    """ReDo (Sokar et al. 2023): neurons with score <= tau start anew. Returns how many.

    Their moments start at 0, as in ReDo's paper. `norms`: see `prune`.
    """
    neurons = dormant_neurons(hidden, tau)
    for depth, neuron in neurons:
        redraw(layers[depth], neuron, rng)
        set_moments(optimizer, layers[depth].weight, neuron, 0.0)
        set_moments(optimizer, layers[depth].bias, neuron, 0.0)
        restart_norm(norms, depth, neuron, optimizer, square=0.0)
    for depth, neuron in neurons:  # afterwards, so that 0 wins where the two overlap
        silence(layers[depth + 1], neuron, optimizer)
    return len(neurons)


@torch.no_grad()
def reset(layers, rng: torch.Generator) -> None:
    """Reset (Nikishin et al. 2022): all weights and biases start anew; the masks stay."""
    for layer in layers:
        weight, bias = layer.draw(layer.out_features, rng)  # (out, in), (out,)
        layer.weight.copy_(weight * layer.mask)
        layer.bias.copy_(bias)
        layer.bound.fill_(math.inf)


# --- metrics ------------------------------------------------------------------
def activity(hidden: list[torch.Tensor]) -> dict[str, float]:
    """What plasticity is measured by, from activations [(B, n), ...].

    dormant: neurons with score (Eq. 1) 0. active_ratio, active_ratio_0.025 and
    active_ratio_0.1: 1 - share of neurons with score <= 0, 0.025, 0.1.
    fau: share of activations above 0.
    """
    scores = torch.cat([dormancy_scores(h) for h in hidden])  # (neurons,)
    values = {"dormant": int((scores <= 0).sum())}
    for key, tau in (("", 0.0), ("_0.025", 0.025), ("_0.1", 0.1)):
        values[f"active_ratio{key}"] = 1 - int((scores <= tau).sum()) / len(scores)
    positive = sum(int((h > 0).sum()) for h in hidden)
    values["fau"] = positive / sum(h.numel() for h in hidden)
    return values
