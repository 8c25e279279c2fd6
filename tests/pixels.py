"""Small pixel agents with a buffer of random frames, for the tests of the DrQ-v2 scripts."""

import numpy as np
import torch
import torch.nn as nn

import ne_drq_dmc as ne

SIZES = {"frame_size": 24, "channels": 4, "hidden_dim": 32, "batch_size": 16, "buffer_size": 60}
SIZES |= {"total_timesteps": 1_000, "stddev_duration": 100, "learning_starts": 100}


def make_agent(module=ne, device="cpu", **changes) -> tuple:
    """An agent (2 actions) of a script and a buffer with 60 frames in episodes of 20.

    Args:
        changes: of the script's Args.
    """
    args = module.Args(**SIZES | changes)
    if module is ne:
        ne.scale_to_run(args)
    device = torch.device(device)
    torch.manual_seed(0)
    agent = module.Agent(args, 2, 1, device)
    buffer = ne.ReplayBuffer(args, 2, 2, device)
    rng = np.random.default_rng(3)
    for number in range(60):
        obs = rng.integers(256, size=(9, args.frame_size, args.frame_size), dtype=np.uint8)
        if number % 20 == 0:
            buffer.start_episode(obs)
        else:
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            buffer.add(obs, action, rng.normal(), 1.0)
    return agent, buffer


def train(agent, buffer, updates: int) -> None:
    for _ in range(updates):
        agent.update(buffer.sample(16))


def heads(agent) -> list[nn.Module]:
    return [*agent.actor.heads, *agent.critic.heads]


def silence_some(agent) -> None:
    """Makes every third hidden neuron of each head dormant, LayerNorm or not."""
    for head in heads(agent):
        for layer, norm in zip(head.layers, head.norms, strict=False):
            part = norm if isinstance(norm, nn.LayerNorm) else layer
            part.bias.data[::3] = -100.0


def adam_of(agent, module: nn.Module) -> list[dict]:
    """Adam's state of the parameters of a part of an agent."""
    state = {}
    for optimizer in agent.optimizers:
        state |= optimizer.state
    return [state[p] for p in module.parameters()]


def assert_captures(agent, buffer, between) -> None:
    """What a CUDA graph needs: no value is read, and what it reads and writes stays in place.

    Args:
        between: what a script does between two updates.
    """
    tensors = [t for t in agent.state_dict().values() if torch.is_tensor(t)]
    for optimizer in agent.optimizers:
        for state in optimizer.state.values():
            tensors += state.values()
    places = [t.data_ptr() for t in tensors]
    captured = buffer.sample(16)
    agent.update(captured)
    between()
    agent.stddev.fill_(0.5)
    batch = buffer.sample(16)
    captured.copy_(batch)
    for one, two in zip(captured, batch, strict=True):
        assert torch.equal(one, two)
    agent.update(captured)
    assert [t.data_ptr() for t in tensors] == places
    now = [t for t in agent.state_dict().values() if torch.is_tensor(t)]
    assert [t.data_ptr() for t in now] == places[: len(now)]


def assert_reads_no_values(monkeypatch, module, **changes) -> None:
    """On the device "meta", where reading a value raises, as does what comes from elsewhere."""
    agent, buffer = make_agent(module, **changes)
    example = buffer.sample(16)
    monkeypatch.setattr(module, "orthogonal", lambda part: None)
    with torch.device("meta"):
        agent = module.Agent(agent.args, 2, 1, torch.device("meta"))
        batch = ne.Batch(*[torch.empty(x.shape, dtype=x.dtype) for x in example])
    losses = list(agent.update(batch).values())
    assert [loss.device.type for loss in losses] == ["meta"] * 3
    for at_home in ("pixels", "rows"):
        assert getattr(batch, at_home).device.type == "meta"
