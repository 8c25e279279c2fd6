"""Small pixel agents with a buffer of random frames, for the tests of the DrQ-v2 scripts."""

import numpy as np
import torch

import ne_drq_dmc as ne
from helpers import linear_layers

SIZES = {"frame_size": 24, "channels": 4, "hidden_dim": 32, "batch_size": 16, "buffer_size": 60}
SIZES |= {"total_timesteps": 1_000, "stddev_duration": 100, "learning_starts": 100}


def make_agent(module, device="cpu", **changes) -> tuple:
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
    return agent, fill(ne.ReplayBuffer(args, 2, 2, device), args.frame_size)


def fill(buffer, frame_size: int):
    rng = np.random.default_rng(3)
    for number in range(60):
        obs = rng.integers(256, size=(9, frame_size, frame_size), dtype=np.uint8)
        if number % 20 == 0:
            buffer.start_episode(obs)
        else:
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            buffer.add(obs, action, rng.normal(), 1.0)
    return buffer


def sample(buffer, size: int = 16, oldest: float = 1.0, rng=None) -> ne.Batch:
    """A batch in memory of its own."""
    batch = buffer.new_batch(size)
    buffer.sample(batch, oldest, rng)
    return batch


def train(agent, buffer, updates: int) -> None:
    for _ in range(updates):
        agent.update(sample(buffer))


def heads(agent) -> dict[str, list]:
    return {"actor": list(agent.actor.heads), "critic": list(agent.critic.heads)}


def silence_some(agent) -> None:
    """Makes every third hidden neuron of each head dormant."""
    for head in [*agent.actor.heads, *agent.critic.heads]:
        for layer in linear_layers(head)[:-1]:
            layer.bias.data[::3] = -100.0


def optimizers(agent) -> dict[str, torch.optim.Adam]:
    """Of an NE agent, under the names they have in the baseline."""
    named = {name: network.optimizer for name, network in agent.networks.items()}
    return {"encoder": agent.encoder_optimizer} | named


def addresses(agent, batch) -> list[int]:
    """Of all tensors that a CUDA graph of the update reads or writes."""
    tensors = [t for t in agent.state_dict().values() if torch.is_tensor(t)]
    tensors += batch
    all_of_them = agent.optimizers if hasattr(agent, "optimizers") else optimizers(agent)
    for optimizer in all_of_them.values():
        for state in optimizer.state.values():
            tensors += state.values()
    return [t.data_ptr() for t in tensors]
