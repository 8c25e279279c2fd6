"""Experience review, the replay ratio and NE's random draws in whole runs."""

import pytest
import torch

import fake_task
import ne_drq_dmc
import ne_td3_continuous as ne
from helpers import assert_equal, count_calls, load, rows, run_here

ALL = (
    "--batch-size 8 --eval-frequency 200 --eval-episodes 1 --no-cuda --grow-interval 50 "
    # the threshold is the last reduction, mostly 0
    "--review-interval 10 --review-floor 0 --review-decay 1 "
)
TD3 = "--learning-starts 60 --actor-hidden 8 --critic-hidden 8 "
TINY = f"{TD3} {ALL} --env-id fake_task:Plain-v0 --total-timesteps 200 --buffer-size 250 "
SCRIPTS = {
    ne: TINY,
    ne_drq_dmc: f"{ALL} --total-timesteps 400 --learning-starts 60 --frame-size 16 --channels 4 "
    "--hidden-dim 16 --buffer-size 500 ",
}


@pytest.fixture
def drawn(monkeypatch):
    """Notes how batches are drawn, of a script's buffer: (oldest share, batch, generator)."""
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    notes = []

    def install(module=ne) -> list:
        sample = module.ReplayBuffer.sample

        def noted(buffer, size, oldest=1.0, rng=None):
            batch = sample(buffer, size, oldest, rng)
            notes.append((oldest, batch, rng))
            return batch

        monkeypatch.setattr(module.ReplayBuffer, "sample", noted)
        return notes

    return install


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_reviews_are_of_the_oldest_share_and_what_ne_looks_at_is_uniform(
    script, tmp_path, monkeypatch, drawn
):
    """Dormant neurons are counted on 1,024 transitions, ReDo's found on a batch, both NE's own."""
    notes = drawn(script)
    redo = script.redo
    of_redo = []

    def noted_redo(agent, batch):
        _, drawn_last, rng = notes[-1]
        of_redo.append(rng is agent.rng and batch is drawn_last)
        redo(agent, batch)

    counted = []
    dormant_neurons = script.topology.dormant_neurons

    def noted_dormant(hidden, tau):
        if tau == 0.3:
            counted.append({len(h) for h in hidden})
        return dormant_neurons(hidden, tau)

    monkeypatch.setattr(script, "redo", noted_redo)
    monkeypatch.setattr(script.topology, "dormant_neurons", noted_dormant)
    calls = count_calls(monkeypatch, script, "review_threshold")
    flags = "--review-fraction 0.3 --redo-interval 5 --review-tau 0.3"
    folder = tmp_path / "run"
    assert run_here(f"{SCRIPTS[script]} {flags} --run-dir {folder}", script) == 0
    shares = [oldest for oldest, _, rng in notes if rng is None]  # for updates
    assert set(shares) == {0.3, 1.0}
    assert shares[0] == 1.0
    assert float(rows(folder)[-1]["ne/review_share"]) == shares.count(0.3) / len(shares)
    assert {oldest for oldest, _, rng in notes if rng is not None} == {1.0}
    assert len(of_redo) == len(shares) // 5 and all(of_redo)
    assert calls["review_threshold"] == len(shares) // 10
    assert counted == [{1_024}] * (len(shares) // 10)


def test_the_level_rule_reviews_with_the_dormant_share(tmp_path, monkeypatch):
    """With half of the neurons dormant, half of the batches are reviews."""
    monkeypatch.setattr(ne.topology, "dormant_neurons", lambda hidden, tau: [(0, 0)] * 8)
    flags = f"{TINY} --review-rule level --total-timesteps 400 --no-prune"
    assert run_here(f"{flags} --run-dir {tmp_path / 'run'}") == 0
    last = rows(tmp_path / "run")[-1]
    assert float(last["ne/review_epsilon"]) == 0.5
    assert float(last["ne/review_share"]) == pytest.approx(0.5, abs=0.12)


# --- replay ratio -------------------------------------------------------------
@pytest.mark.parametrize("ratio", [1, 3])
def test_updates_and_what_counts_them_follow_the_replay_ratio(ratio, tmp_path, monkeypatch):
    names = ("review_threshold", "redo", "reset", "topology_round")
    calls = count_calls(monkeypatch, ne, *names)
    flags = f"{TINY} --replay-ratio {ratio} --redo-interval 20 --reset-interval 40"
    assert run_here(f"{flags} --run-dir {tmp_path / 'run'}") == 0
    parts = load(tmp_path / "run")["parts"]
    assert parts["progress"]["updates"] == 140 * ratio
    counts = [140 * ratio // 10, 140 * ratio // 20, 4, 2]  # the last two count steps
    assert [calls[name] for name in names] == counts
    # since the last reset at step 160
    steps = [optimizer["state"][0]["step"] for optimizer in parts["optimizers"]]
    assert steps == [20 * ratio, 40 * ratio]


# --- losses -------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_losses_are_those_of_uniform_batches(script, tmp_path, monkeypatch):
    """From the first count on all batches are reviews here, so the losses stay the same."""
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)

    def all_neurons(hidden, tau):
        return range(sum(h.shape[1] for h in hidden))

    monkeypatch.setattr(script.topology, "dormant_neurons", all_neurons)
    flags = f"{SCRIPTS[script]} --review-rule level --no-prune --eval-frequency 100"
    assert run_here(f"{flags} --run-dir {tmp_path / 'run'}", script) == 0
    results = [row for row in rows(tmp_path / "run") if row["losses/qf_loss"] != "nan"]
    assert len(results) > 1
    assert len({row["losses/qf_loss"] for row in results}) == 1
    assert len({row["losses/qf_values"] for row in results}) == 1
    assert results[-1]["ne/review_epsilon"] == "0.0"
    assert 0.5 < float(results[-1]["ne/review_share"]) < 1


# --- NE's draws do not shift exploration and batches --------------------------
OTHER_DRAWS = [
    "--initial-density 1 --review-floor 1",
    "--growth random --grow-interval 17 --review-interval 3",
    "--growth none --no-prune --redo-interval 20 --redo-tau 0.5 --reset-interval 90",
]


def random_states(monkeypatch, folder, flags: str) -> dict:
    """What exploration, batches and the environment would draw next, and NE."""
    buffers = []
    build = ne.ReplayBuffer.__init__

    def noted(buffer, *args):
        build(buffer, *args)
        buffers.append(buffer)

    with monkeypatch.context() as patch:
        patch.setattr(ne.ReplayBuffer, "__init__", noted)
        assert run_here(f"{TINY} {flags} --run-dir {folder}") == 0
    parts = load(folder)["parts"]
    names = ("noise_rng", "env_rngs", "agent_rng", "numpy_rng", "python_rng")
    states = {name: parts[name] for name in names}
    states["batches"] = buffers[0].rng.get_state()
    states["torch"] = torch.get_rng_state()
    states["first"] = buffers[0].data[:60]  # before the first update
    return states


def test_what_ne_draws_shifts_neither_exploration_nor_batches(tmp_path, monkeypatch):
    usual = random_states(monkeypatch, tmp_path / "usual", "")
    ne_draws = usual.pop("agent_rng")
    for n, flags in enumerate(OTHER_DRAWS):
        states = random_states(monkeypatch, tmp_path / str(n), flags)
        assert not torch.equal(states.pop("agent_rng"), ne_draws)
        assert_equal(states, usual)
