"""Experience review and NE's random draws in whole runs."""

import sys

import pytest
import torch

import fake_task
import ne_drq_dmc
import ne_td3_continual
import ne_td3_continuous as ne
from helpers import assert_equal, load, rows

ALL = (
    "--batch-size 8 --eval-frequency 200 --eval-episodes 1 --no-cuda "
    # the threshold is the last reduction, mostly 0
    "--review-interval 10 --review-floor 0 --review-decay 1 "
)
TD3 = "--learning-starts 60 --actor-hidden 8 --critic-hidden 8 "
PIXELS = (
    "--total-timesteps 400 --learning-starts 60 --frame-size 16 --channels 4 --hidden-dim 16 "
    "--grow-interval 100 "
)
SCRIPTS = [
    (ne, f"{TD3} --env-id fake_task:Plain-v0 --total-timesteps 200 "),
    (
        ne_td3_continual,
        f"{TD3} --tasks fake_task:Plain-v0 --cycles 1 --steps-per-task 200 ",
    ),
    (ne_drq_dmc, PIXELS),
]


def run(monkeypatch, folder, flags: str, module=ne) -> None:
    arguments = f"{flags} --run-dir {folder}"
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments.split()])
    module.main()


@pytest.fixture
def drawn(monkeypatch):
    """Notes how batches are drawn, of a script's buffer: (oldest share, batch, generator)."""
    notes = []

    def install(module=ne) -> list:
        sample = module.ReplayBuffer.sample

        def noted(buffer, batch, oldest=1.0, rng=None):
            notes.append((oldest, batch, rng))
            return sample(buffer, batch, oldest, rng)

        monkeypatch.setattr(module.ReplayBuffer, "sample", noted)
        return notes

    return install


@pytest.mark.parametrize(
    ("script", "flags"), SCRIPTS, ids=[script.__name__ for script, _ in SCRIPTS]
)
def test_reviews_are_drawn_from_the_oldest_share_and_other_batches_from_all(
    script, flags, tmp_path, monkeypatch, drawn
):
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    notes = drawn(script)
    flags = f"{flags} {ALL} --review-fraction 0.3 --buffer-size 500"
    run(monkeypatch, tmp_path / "run", flags, script)
    shares = [oldest for oldest, _, rng in notes if rng is None]  # for updates
    assert set(shares) == {0.3, 1.0}
    assert shares[0] == 1.0
    share = float(rows(tmp_path / "run")[-1]["ne/review_share"])
    assert share == shares.count(0.3) / len(shares)
    # what NE looks at is uniform, with its own generator
    assert {oldest for oldest, _, rng in notes if rng is not None} == {1.0}


@pytest.mark.parametrize(
    ("script", "flags"), SCRIPTS, ids=[script.__name__ for script, _ in SCRIPTS]
)
def test_redo_looks_at_a_uniform_batch_by_nes_generator(
    script, flags, tmp_path, monkeypatch, drawn
):
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    notes = drawn(script)
    redo = script.redo
    looked_at = []

    def noted(args, agent, batch):
        oldest, drawn_last, rng = notes[-1]
        looked_at.append((oldest, rng is agent.ne_rng, batch is drawn_last))
        redo(args, agent, batch)

    monkeypatch.setattr(script, "redo", noted)
    run(monkeypatch, tmp_path / "run", f"{flags} {ALL} --redo-interval 5", script)
    assert len(looked_at) > 5
    assert set(looked_at) == {(1.0, True, True)}


TINY = f"{TD3} --env-id fake_task:Plain-v0 --total-timesteps 200 --buffer-size 150 {ALL}"


def test_dormant_neurons_are_counted_on_1024_transitions_by_nes_generator(
    tmp_path, monkeypatch, drawn
):
    notes = drawn()
    agents = []
    build = ne.Agent.__init__

    def noted(agent, *args):
        build(agent, *args)
        agents.append(agent)

    monkeypatch.setattr(ne.Agent, "__init__", noted)
    counts = []
    review_threshold = ne.review_threshold

    def counted(args, progress, dormant, neurons):
        counts.append((dormant, neurons))
        return review_threshold(args, progress, dormant, neurons)

    looked_at = []
    dormant_neurons = ne.topology.dormant_neurons

    def noted_dormant(hidden, tau):
        looked_at.append((tau, {len(h) for h in hidden}))
        return dormant_neurons(hidden, tau)

    monkeypatch.setattr(ne, "review_threshold", counted)
    monkeypatch.setattr(ne.topology, "dormant_neurons", noted_dormant)
    run(monkeypatch, tmp_path / "run", TINY)
    [agent] = agents
    own = [len(batch[0]) for _, batch, rng in notes if rng is agent.ne_rng]
    assert own.count(1_024) == len(counts) == 140 // 10
    assert [sizes for tau, sizes in looked_at if tau == 0.1] == [{1_024}] * len(counts)
    assert {neurons for _, neurons in counts} == {16}
    assert all(0 <= dormant <= 16 for dormant, _ in counts)


@pytest.mark.parametrize(("rule", "floor"), [("slope", 1), ("level", 1)])
def test_a_floor_of_1_turns_reviews_off(rule, floor, tmp_path, monkeypatch, drawn):
    notes = drawn()
    flags = f"{TINY} --review-rule {rule} --review-floor {floor}"
    run(monkeypatch, tmp_path / "run", flags)
    assert {oldest for oldest, _, rng in notes if rng is None} == {1.0}
    for row in rows(tmp_path / "run"):
        assert (float(row["ne/review_epsilon"]), float(row["ne/review_share"])) == (1, 0)


def test_the_level_rule_reviews_with_the_dormant_share(tmp_path, monkeypatch):
    """With half of the neurons dormant, half of the batches are reviews."""
    monkeypatch.setattr(ne.topology, "dormant_neurons", lambda hidden, tau: [(0, 0)] * 8)
    flags = f"{TINY} --review-rule level --total-timesteps 400 --no-prune"
    run(monkeypatch, tmp_path / "run", flags)
    last = rows(tmp_path / "run")[-1]
    assert float(last["ne/review_epsilon"]) == 0.5
    assert float(last["ne/review_share"]) == pytest.approx(0.5, abs=0.12)


# --- losses -------------------------------------------------------------------
def test_losses_and_values_are_of_uniform_batches_only(tmp_path, monkeypatch):
    last = {"review": False}
    uniform = {}
    sample = ne.ReplayBuffer.sample
    update_critic = ne.Agent.update_critic

    def noted_sample(buffer, batch, oldest=1.0, rng=None):
        if rng is None:
            last["review"] = oldest < 1
        return sample(buffer, batch, oldest, rng)

    def noted_update(agent, batch):
        loss, mean_q = update_critic(agent, batch)
        if last["review"]:
            reviews.append(None)
        else:
            uniform.update(qf_loss=loss.item(), qf_values=mean_q.item())
        return loss, mean_q

    expected = []
    reviews = []
    measure = ne.measure

    def noted_measure(*args):
        expected.append((last["review"], dict(uniform)))
        return measure(*args)

    monkeypatch.setattr(ne.ReplayBuffer, "sample", noted_sample)
    monkeypatch.setattr(ne.Agent, "update_critic", noted_update)
    monkeypatch.setattr(ne, "measure", noted_measure)
    flags = f"{TINY} --eval-frequency 7 --review-decay 0.2"
    run(monkeypatch, tmp_path / "run", flags)
    assert len(reviews) > 20
    after_review = 0
    for row, (review, losses) in zip(rows(tmp_path / "run"), expected, strict=True):
        if losses:
            assert float(row["losses/qf_loss"]) == losses["qf_loss"]
            assert float(row["losses/qf_values"]) == losses["qf_values"]
            after_review += review
    assert after_review > 3  # rows written right after a review show the batch before it


# --- NE's draws do not shift exploration and batches --------------------------
OTHER_DRAWS = [
    "--initial-density 1 --review-floor 1",
    "--growth random --grow-interval 17",
    "--growth none --no-prune",
    "--review-interval 3",
    "--redo-interval 20 --redo-tau 0.5",
    "--reset-interval 90",
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
        run(patch, folder, flags)
    parts = load(folder)["parts"]
    states = {name: parts[name] for name in ("noise_rng", "env_rng", "ne_rng")}
    states["batches"] = buffers[0].rng.get_state()
    states["torch"] = torch.get_rng_state()
    states["first"] = buffers[0].data[:60]  # before the first update
    return states


def test_what_ne_draws_shifts_neither_exploration_nor_batches(tmp_path, monkeypatch):
    usual = random_states(monkeypatch, tmp_path / "usual", TINY + "--buffer-size 250")
    ne_draws = usual.pop("ne_rng")
    for n, flags in enumerate(OTHER_DRAWS):
        folder = tmp_path / str(n)
        states = random_states(monkeypatch, folder, f"{TINY} --buffer-size 250 {flags}")
        assert not torch.equal(states.pop("ne_rng"), ne_draws)
        assert_equal(states, usual)
