"""Topology primitives of Neuroplastic Expansion (NE): what the scripts share, and nothing else.

A layer is any linear layer with `weight (out, in)`, `bias (out,)` and a boolean `mask (out, in)`, True where a
connection is active. Everything here works in place, draws only from the generator it is given, and is called between
updates, never inside one. Section and equation numbers are those of the paper.
"""

import math
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F


def erdos_renyi_densities(shapes: list[tuple[int, int]], density: float) -> list[float]:
    """Densities of the layers of one sparse network in Erdos-Renyi style (§4.2; Mocanu et al. 2018, Evci et al. 2020).

    Args:
        shapes: (out, in) of each layer.
        density: share of all connections of the network that is active, in (0, 1].
    Returns:
        One density in (0, 1] per layer.
    Raises:
        ValueError: if `density` is outside (0, 1].

    A layer's density is eps * (out + in) / (out * in), so it has eps * (out + in) connections. Over all layers that is
    density * sum(out * in), hence eps = (density * sum(out * in) - connections of dense layers) / sum(out + in). Where
    eps makes a layer denser than 1, that layer is made dense and eps is solved again for the rest.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    sizes = [n_out * n_in for n_out, n_in in shapes]
    dense: set[int] = {layer for layer in range(len(shapes)) if density == 1}
    while len(dense) < len(shapes):
        sparse = [layer for layer in range(len(shapes)) if layer not in dense]
        wanted = density * sum(sizes) - sum(sizes[layer] for layer in dense)
        eps = wanted / sum(sum(shapes[layer]) for layer in sparse)
        too_dense = {layer for layer in sparse if eps * sum(shapes[layer]) > sizes[layer]}
        if not too_dense:
            return [1.0 if n in dense else eps * sum(shapes[n]) / sizes[n] for n in range(len(shapes))]
        dense |= too_dense
    return [1.0] * len(shapes)


def sample_mask(shape: tuple[int, int], density: float, generator: torch.Generator) -> torch.Tensor:
    """A boolean mask (out, in) with exactly round(density * out * in) connections, at least one, at random places."""
    count = max(1, round(density * shape[0] * shape[1]))
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:count]] = True
    return mask.view(shape)


@torch.no_grad()
def sparsify(layers: list, density: float, sparse_init: str, rng: torch.Generator) -> None:
    """Draws the masks of one network, "erdos-renyi" or "uniform", and zeroes what they mask. `density` in (0, 1]."""
    densities = [density] * len(layers)
    if sparse_init == "erdos-renyi":
        densities = erdos_renyi_densities([tuple(layer.mask.shape) for layer in layers], density)
    for layer, layer_density in zip(layers, densities, strict=True):
        layer.initial_density = layer_density
        layer.mask.copy_(sample_mask(layer.mask.shape, layer_density, rng))
        apply_mask(layer)


@torch.no_grad()
def apply_mask(layer) -> None:
    """After a change of `layer.mask`: zeroes what it masks, and notes whether the layer has weights to clip."""
    layer.keep.copy_(layer.mask)
    layer.weight.mul_(layer.keep)
    layer.clipped = layer.mask.is_cuda or bool(layer.bound.isfinite().any())  # a captured graph clips in any case


def apply_masks(layers: list, targets: list) -> None:
    """The same for all layers and for those of the target networks, which take over the masks."""
    for layer, target in zip(layers, targets, strict=True):
        target.mask.copy_(layer.mask)
        apply_mask(layer)
        apply_mask(target)


def network_density(layers: list) -> float:
    """Share of active connections over all layers, in [0, 1]."""
    return sum(int(layer.mask.sum()) for layer in layers) / sum(layer.mask.numel() for layer in layers)


# --- networks with masks ----------------------------------------------------------------------------------------------
class MaskedLinear(nn.Linear):
    """A linear layer whose weight (out, in) is exactly 0 wherever the boolean mask (out, in) is False.

    `forward` ignores the mask, so autograd gives the dense gradient, which growth looks at; the optimiser's step then
    multiplies it by `keep`. `bound` (out, in) limits |weight|: infinite, except for neurons that were reset.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out)
        self.initial_density, self.clipped = 1.0, False
        self.register_buffer("mask", torch.ones(n_out, n_in, dtype=torch.bool))
        self.register_buffer("keep", torch.ones(n_out, n_in))  # the mask as floats: 8 times faster to multiply by
        self.register_buffer("bound", torch.full((n_out, n_in), math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, in) -> (B, out); compiled, bias and ReLU share a loop
        return x @ self.weight.t() + self.bias if torch.compiler.is_compiling() else super().forward(x)


class MaskedMLP(nn.Module):
    """Hidden layers (masked linear, LayerNorm if asked for, ReLU) and a masked linear output."""

    def __init__(self, sizes: list[int], layer_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(MaskedLinear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(nn.LayerNorm(n) if layer_norm else nn.Identity() for n in sizes[1:-1])

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, sizes[0]) -> [(B, n), ...] of the hidden layers."""
        hidden = []
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = F.relu(norm(layer(x)), inplace=True)
            hidden.append(x)
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[-1](self.activations(x)[-1])  # (B, sizes[-1])


@torch.no_grad()
def orthogonal(module: nn.Module) -> None:
    """Initialises a convolution or a linear layer as DrQ-v2 does. What is drawn for it later is likewise."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(module.weight, gain=math.sqrt(2) if isinstance(module, nn.Conv2d) else 1.0)
        module.bias.zero_()
        module.orthogonal = True


# --- the growth schedule ---------------------------------------------------------------------------------------------
def growth_schedule(args, network: str | None = None) -> tuple[range, float, str]:
    """The environment steps of the rounds, alpha, and one line that says what density they will reach.

    Rounds come every `grow_interval` steps, after the first update and before the cosine is 0 at T_end. alpha is
    `grow_rate` or, where that is None, what takes `initial_density` to `final_density` in these rounds; for one
    network, "actor" or "critic", `{network}_grow_rate` and `{network}_final_density`.
    """
    rate, final_density = (f"{network}_{name}" if network else name for name in ("grow_rate", "final_density"))
    growth_end = args.growth_end or args.total_timesteps
    first = (args.learning_starts // args.grow_interval + 1) * args.grow_interval
    rounds = range(first, growth_end, args.grow_interval)
    start = args.initial_density
    on = {"actor": args.ne_actor and network != "critic", "critics": args.ne_critic and network != "actor"}
    networks = " and ".join(name for name in on if on[name])
    if start == 1 or not networks:
        return rounds, 0.0, "topology: dense, nothing to grow"
    alpha = getattr(args, rate)
    if alpha is None:
        alpha = solve_growth_rate(start, getattr(args, final_density), len(rounds))
    if args.growth == "none" or not rounds:
        return rounds, 0.0, f"topology: {networks} stay at {start:.0%}, nothing grows"
    rounds = range(first, min(growth_end, args.total_timesteps + 1), args.grow_interval)  # T_end may be after the run
    inactive = 1 - start
    for step in rounds:
        inactive *= 1 - growth_fraction(alpha, step, growth_end)
    plan = f"{start:.0%} -> {1 - inactive:.0%} in {len(rounds)} rounds, less what is pruned"
    return rounds, alpha, f"topology: {networks} {plan} (every {args.grow_interval:,} steps, alpha {alpha:.3g})"


def solve_growth_rate(initial_density: float, final_density: float, rounds: int) -> float:
    """alpha that takes a network from `initial_density` to about `final_density` (both in (0, 1]) in so many rounds.

    A round leaves 1 - a of the inactive connections inactive, where a is alpha / 2 on average over the cosine. So
    exp(-rounds * alpha / 2) = (1 - final_density) / (1 - initial_density).
    """
    if rounds == 0 or initial_density >= final_density:
        return 0.0
    return 2 / rounds * math.log((1 - initial_density) / (1 - final_density))


def growth_fraction(alpha: float, step: int, growth_end: int) -> float:
    """Cosine-annealed share of a layer's inactive connections that is born at `step` (§4.2), in [0, 1]."""
    return min(1.0, alpha / 2 * (1 + math.cos(math.pi * step / growth_end)))


# --- one step of the optimiser ----------------------------------------------------------------------------------------
def adam(params: list[torch.Tensor], learning_rate: float) -> torch.optim.Adam:
    """torch's fused Adam with its state made at once, so that `masked_step` finds it."""
    optimizer = torch.optim.Adam(params, lr=learning_rate, fused=True, capturable=params[0].is_cuda)
    for p in params:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)}
        optimizer.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@torch.no_grad()
def masked_step(optimizer: torch.optim.Adam, layers: list, gradients: tuple[torch.Tensor, ...]) -> None:
    """Adam on the active connections only, then weight clipping of reset neurons (§B.2; Elsayed et al. 2024).

    `gradients` are the dense ones of all parameters; those of the weights come in the order of `layers` and are changed
    in place. This calls the kernel of `torch.optim.Adam.step` without the bookkeeping around it, which takes longer on
    a CPU than the arithmetic.
    """
    if layers:
        torch._foreach_mul_([g for g in gradients if g.dim() == 2], [layer.keep for layer in layers])
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] for p in group["params"]]
    means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    torch._foreach_add_(steps, 1)
    torch._fused_adam_(group["params"], gradients, means, squares, [], steps, beta1=0.9, beta2=0.999, **settings)
    for layer in layers:
        if layer.clipped:
            layer.weight.clamp_(-layer.bound, layer.bound)


class CudaGraph:
    """Captures an update once and replays it. `batch` must be the same tensors at every call."""

    def __init__(self, update):
        self.update, self.calls, self.graph = update, 0, torch.cuda.CUDAGraph()

    def __call__(self, batch):
        self.calls += 1
        if self.calls <= 3:  # plain updates: the warm-up that a capture needs
            return self.update(batch)
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):  # records without running
                self.losses = self.update(batch)
        self.graph.replay()
        return self.losses


# --- grow, prune, reset ----------------------------------------------------------------------------------------------
@torch.no_grad()
def grow_mask(mask: torch.Tensor, score: torch.Tensor, count: int) -> torch.Tensor:
    """Activates in place the `count` inactive connections with the largest score (§4.2, elastic neuron generation).

    Args:
        mask: (out, in) boolean, changed in place.
        score: (out, in), >= 0: |dense gradient|, or random numbers for the naive growth of §4.1.
        count: at most the number of inactive connections.
    Returns:
        (out, in) boolean, True for the connections born now.
    """
    born = torch.zeros_like(mask)
    if count:
        born.view(-1)[score.masked_fill(mask, -1.0).flatten().topk(count).indices] = True
        mask |= born
    return born


def grow(layers: list, scores: list[torch.Tensor], fraction: float, optimizer: torch.optim.Adam) -> int:
    """In each layer ceil(fraction * inactive) connections are born (§4.2). Returns how many in all.

    Their weight is 0, because a masked weight is kept at 0, and so are their moments: the output does not change.
    """
    grown = 0
    for layer, score in zip(layers, scores, strict=True):
        count = math.ceil(fraction * int((~layer.mask).sum()))
        zero_moments(optimizer, layer.weight, grow_mask(layer.mask, score.abs(), count))
        grown += count
    return grown


@torch.no_grad()
def dormancy_scores(hidden: torch.Tensor) -> torch.Tensor:
    """Eq. 1: each neuron's mean |activation| over its layer's; 0 if the layer is silent. (B, n) -> (n,)."""
    mean = hidden.abs().mean(0)  # (n,)
    return mean / mean.mean().clamp_min(torch.finfo(mean.dtype).tiny)  # tiny: 0 / 0 is 0, dormant


def dormant(hidden: torch.Tensor, tau: float) -> torch.Tensor:
    """Neurons whose score (Eq. 1) is at most tau: (B, n) -> (n,) boolean."""
    return dormancy_scores(hidden) <= tau


def count_dormant(hidden: list[torch.Tensor], tau: float) -> int:
    """Number of neurons with score <= tau over all layers [(B, n), ...]."""
    return sum(int(dormant(h, tau).sum()) for h in hidden)


def metrics(prefix: str, layers: list, hidden: list[torch.Tensor]) -> dict[str, float]:
    """What plasticity is measured by, on one batch of activations [(B, n), ...] of a network's hidden layers.

    density: share of active connections. dormant: neurons with score 0. active_ratio, active_ratio_0.025 and
    active_ratio_0.1: 1 - share of neurons with score <= 0, 0.025, 0.1. fau: fraction of activations that are positive.
    """
    neurons = sum(h.shape[1] for h in hidden)
    return {
        f"{prefix}/density": network_density(layers),
        f"{prefix}/dormant": count_dormant(hidden, 0.0),
        f"{prefix}/active_ratio": 1 - count_dormant(hidden, 0.0) / neurons,
        f"{prefix}/active_ratio_0.025": 1 - count_dormant(hidden, 0.025) / neurons,
        f"{prefix}/active_ratio_0.1": 1 - count_dormant(hidden, 0.1) / neurons,
        f"{prefix}/fau": sum(int((h > 0).sum()) for h in hidden) / sum(h.numel() for h in hidden),
    }


@torch.no_grad()
def prune(layers: list, hidden: list[torch.Tensor], budget: int, optimizer: torch.optim.Adam, clip: float, rng) -> int:
    """Prunes and resets dormant neurons (score 0) of one network in random order while they fit (§4.2, Eq. 2).

    A pruned neuron loses all outgoing connections. Its incoming ones are drawn anew as at birth: fan-in at the layer's
    initial density but never more than it had, never from a neuron pruned in this round, weights and bias from the
    initialiser. So it is alive again but silent, and the network's output on the batch does not change.

    Args:
        layers: all layers from input to output; `initial_density` is a layer's density at birth, `bound` (out, in) the
            limit of its weights.
        hidden: activations [(B, n), ...] of the hidden layers, one less than `layers`.
        budget: connections that may go. A neuron that needs more than what is left of it is passed over.
        clip: kappa; the incoming weights of a reset neuron are bound to kappa / sqrt(in) from now on; 0 = not.
        rng: CPU generator of order and draws.
    Returns:
        How many connections went, at most `budget`.
    """
    gone = 0
    neurons = [(layer, n) for layer, h in enumerate(hidden) for n in dormant(h, 0.0).nonzero().flatten().tolist()]
    blocked = [torch.zeros_like(layer.mask[0]) for layer in layers]  # (in,) inputs pruned in this round
    for choice in torch.randperm(len(neurons), generator=rng).tolist() if budget else []:
        depth, neuron = neurons[choice]
        incoming, outgoing = layers[depth], layers[depth + 1]
        inputs = (~blocked[depth]).nonzero().flatten()
        had = int(incoming.mask[neuron].sum())
        fan_in = min(had, max(1, round(incoming.initial_density * incoming.in_features)), len(inputs))
        cost = int(outgoing.mask[:, neuron].sum()) + had - fan_in
        if gone + cost > budget:
            continue
        gone += cost
        blocked[depth + 1][neuron] = True
        incoming.mask[neuron] = False
        incoming.mask[neuron, inputs[torch.randperm(len(inputs), generator=rng)[:fan_in].to(inputs.device)]] = True
        redraw_neuron(incoming, neuron, optimizer, rng)
        outgoing.mask[:, neuron] = False
        silence_neuron(outgoing, neuron, optimizer)
        if clip > 0:
            incoming.bound[neuron] = clip / math.sqrt(incoming.in_features)
    return gone


@torch.no_grad()
def redraw_neuron(incoming, neuron: int, optimizer: torch.optim.Adam, rng: torch.Generator) -> None:
    """Draws a neuron's bias and active incoming weights from the layer's initialiser."""
    values = initial_values(incoming, 1, rng)[0]  # (in + 1,)
    incoming.weight[neuron] = values[:-1] * incoming.mask[neuron]
    incoming.bias[neuron] = values[-1]
    zero_moments(optimizer, incoming.weight, neuron)
    zero_moments(optimizer, incoming.bias, neuron)


def initial_values(layer, rows: int, rng: torch.Generator) -> torch.Tensor:
    """Weights and, in the last column, biases of so many neurons at birth: (rows, in + 1).

    As `nn.Linear` draws them, U(-1, 1) / sqrt(in), or, where `layer.orthogonal` is set, rows of an orthogonal matrix
    (out, in) and 0. A single row of such a matrix is a random direction of length sqrt(min(1, in / out)).
    """
    n_out, n_in = layer.weight.shape
    if getattr(layer, "orthogonal", False):
        values = torch.zeros(rows, n_in + 1)
        if rows == n_out:
            nn.init.orthogonal_(values[:, :-1], generator=rng)
        else:
            directions = F.normalize(torch.randn(rows, n_in, generator=rng), dim=1)
            values[:, :-1] = directions * math.sqrt(min(1.0, n_in / n_out))
    else:
        values = (2 * torch.rand(rows, n_in + 1, generator=rng) - 1) / math.sqrt(n_in)
    return values.to(layer.weight.device)


@torch.no_grad()
def silence_neuron(outgoing, neuron: int, optimizer: torch.optim.Adam) -> None:
    """Zeroes a neuron's outgoing weights: column `neuron` of the next layer's weight (out, in)."""
    outgoing.weight[:, neuron] = 0.0
    zero_moments(optimizer, outgoing.weight, (slice(None), neuron))


@torch.no_grad()
def zero_moments(optimizer: torch.optim.Adam, parameter: torch.Tensor, where) -> None:
    """Forgets Adam's moments of the entries `where` (any index) of a parameter; its shared step counter stays."""
    for moment in ("exp_avg", "exp_avg_sq"):
        if moment in optimizer.state[parameter]:  # not before the optimiser's first step
            optimizer.state[parameter][moment][where] = 0.0


# --- combinations with rivals (Appendix C) ---------------------------------------------------------------------------
def redo(mlps: dict, hidden: dict, tau: float, optimizers: dict, rng: torch.Generator) -> int:
    """ReDo (Sokar et al. 2023) inside the masks: neurons with score (Eq. 1) <= tau start anew. Targets stay.

    Their bias and active incoming weights are drawn from the initialiser, then their outgoing weights become 0 (0 wins
    where the two overlap), all without Adam's moments.

    Args:
        mlps: {network: MLPs}, each with `layers`.
        hidden: {network: [[(B, n), ...], ...]}, the activations of each MLP's hidden layers.
        optimizers: {network: Adam}.
        rng: CPU generator of the draws.
    Returns:
        How many neurons.
    """
    neurons = [
        (optimizers[name], mlp.layers, depth, neuron)
        for name in mlps
        for mlp, activations in zip(mlps[name], hidden[name], strict=True)
        for depth, h in enumerate(activations)
        for neuron in dormant(h, tau).nonzero().flatten().tolist()
    ]
    for optimizer, layers, depth, neuron in neurons:
        redraw_neuron(layers[depth], neuron, optimizer, rng)
    for optimizer, layers, depth, neuron in neurons:
        silence_neuron(layers[depth + 1], neuron, optimizer)
    return len(neurons)


@torch.no_grad()
def reset(mlps: dict, targets: list[torch.Tensor], optimizers: dict, rng: torch.Generator) -> None:
    """Reset (Nikishin et al. 2022) inside the masks: MLPs, their targets and Adam's state start anew; the masks stay.

    Args:
        mlps: {network: MLPs}, each with `layers` and `norms`.
        targets: parameters of the target networks, in the order of those of `mlps`.
        optimizers: {network: Adam}. Of a network that is more than its MLPs, the rest keeps weights and state.
        rng: CPU generator of the draws.
    """
    online = [mlp for name in mlps for mlp in mlps[name]]
    for layer in (layer for mlp in online for layer in mlp.layers):
        values = initial_values(layer, layer.out_features, rng)  # (out, in + 1)
        layer.weight.copy_(values[:, :-1])
        layer.bias.copy_(values[:, -1])
        layer.bound.fill_(math.inf)
        apply_mask(layer)
    for norm in (norm for mlp in online for norm in mlp.norms if isinstance(norm, nn.LayerNorm)):
        norm.reset_parameters()
    torch._foreach_copy_(targets, [p for mlp in online for p in mlp.parameters()])
    for name in mlps:
        for p in (p for mlp in mlps[name] for p in mlp.parameters()):
            torch._foreach_zero_([*optimizers[name].state[p].values()])


# --- plan and round of ne_td3_continual.py, which has no room for them ------------------------------------------------
def planned_densities(args, rounds: range, alpha: float, tasks: tuple[str, ...]) -> str:
    """A line, or "" where nothing grows: densities at the start of equally long tasks, less what is pruned."""
    growth_end, plan = args.growth_end or args.total_timesteps, []
    for part, task in enumerate(tasks if alpha else ()):
        start = args.total_timesteps * part // len(tasks)
        inactive = math.prod(1 - growth_fraction(alpha, step, growth_end) for step in rounds if step <= start)
        plan.append(f"{task} {1 - (1 - args.initial_density) * inactive:.0%}")
    return f"\ndensity at the start: {', '.join(plan)}" if plan else ""


def topology_round(agent, batch, step: int, alpha: float) -> dict[str, int]:
    """§4.2, Eq. 2: grows, then prunes and resets every NE network in place. Returns {"ne/{network}/grown": n, ...}."""
    args, counts, hidden = agent.args, Counter(), agent.hidden(batch)
    fraction = growth_fraction(alpha, step, args.growth_end or args.total_timesteps)
    losses = {"actor": agent.actor_loss(batch), "critic": agent.critic_loss(batch)[0]}  # no step is taken with them
    for name, optimizer in agent.optimizers.items():
        for mlp, activations in zip(agent.mlps[name], hidden[name], strict=True):
            # Elastic neuron generation
            scores = torch.autograd.grad(losses[name], [layer.weight for layer in mlp.layers], retain_graph=True)
            if args.growth == "random":
                scores = [torch.rand(g.shape, generator=agent.ne_rng).to(g.device) for g in scores]
            grown = grow(mlp.layers, scores, fraction, optimizer)
            # Dormant neuron pruning
            budget = int(args.prune_ratio * grown) if args.prune else 0
            pruned = prune(mlp.layers, activations, budget, optimizer, args.weight_clip, agent.ne_rng)
            counts.update({f"ne/{name}/grown": grown, f"ne/{name}/pruned": pruned})
    apply_masks(agent.online_layers, agent.target_layers)
    return counts
