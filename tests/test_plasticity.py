"""benchmark/plasticity.py, priming.py, probes.py: every arm runs, known cases, the table."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import ne_td3_continuous as ne
import plasticity
import priming
import probes
import run
from baselines import td3_continuous as td3
from helpers import call, equal, make_agent, run_here, train, values

SMALL = "--env-id fake_task:Plain-v0 --actor-hidden 24 16 --critic-hidden 24 16 --batch-size 32"
SMALL += " --buffer-size 1000 --gamma 0.95 --no-cuda --learning-starts 200 --eval-frequency 100"
SMALL += " --eval-episodes 1 --total-timesteps 400"
PRIMING = f"{SMALL} --priming-updates 30 --loss-frequency 10 --checkpoint-frequency 100"
PRIMING += " --probe-inputs 64 --probe-fits 5 --probe-episodes 1"
FILES = ("results.csv", "losses.csv", "probes.csv")


def prime(folder: Path, arm: str, more: str = "") -> Path:
    assert run_here(f"{PRIMING} --arm {arm} --run-dir {folder} {more}", priming) == 0
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def column(file: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(file)]


@pytest.fixture(scope="module")
def primed(tmp_path_factory) -> dict[str, Path]:
    """{arm: folder}, of a run of each."""
    out = tmp_path_factory.mktemp("primed")
    return {arm: prime(out / f"{arm}_seed1", arm) for arm in priming.ARMS}


# --- runs ---------------------------------------------------------------------
@pytest.mark.parametrize("arm", priming.ARMS)
def test_every_arm_runs(arm, primed):
    folder = primed[arm]
    assert column(folder / "results.csv", "step") == [100, 200, 300, 400]
    assert column(folder / "results.csv", "updates") == [0, 30, 130, 230]
    assert column(folder / "losses.csv", "updates") == list(range(10, 231, 10))
    q = np.abs(column(folder / "losses.csv", "losses/qf_values"))
    assert (q <= np.array(column(folder / "losses.csv", "losses/abs_q")) + 1e-6).all()
    assert [row.pop("point") for row in rows(folder / "probes.csv")] == list(plasticity.POINTS)
    for row in rows(folder / "probes.csv"):
        del row["point"]
        assert np.isfinite([float(value) for value in row.values()]).all()
    start, *_, end = column(folder / "results.csv", "ne/critic/density")
    assert (start < 1) == (priming.ARMS[arm].script is ne)
    name = arm.removesuffix("_while")
    reviews = ("ne", "ne_layer_norm", "ne_floor_90")
    assert (end > start) == (name in (*reviews, "ne_fau", "ne_no_review", "random_growth"))
    reviewed = column(folder / "results.csv", "ne/review_share")[-1]
    assert (reviewed > 0) == (name in reviews)  # `fau` is above 0.4
    assert len({(other / "results.csv").read_bytes() for other in primed.values()}) > 9


@pytest.mark.parametrize(
    ("arm", "script", "flags"),
    [
        ("ne", ne, ""),
        ("redo", td3, "--method redo"),
        ("reset", td3, "--method reset --reset-interval 200"),
    ],
)
def test_without_priming_it_is_the_script(arm, script, flags, tmp_path):
    more = "--replay-ratio 6" if arm == "redo" else ""  # so that ReDo acts
    own = prime(tmp_path / "own", arm, f"{more} --priming-updates 0")
    theirs = tmp_path / "theirs"
    assert run_here(f"{SMALL} {flags} {more} --run-dir {theirs}", script) == 0
    keys = ["eval/return_mean", "ne/critic/density", "ne/critic/fau", "ne/review_share"]
    for key in [*keys, "charts/episodic_return"]:
        one, two = ([row[key] for row in rows(f / "results.csv")] for f in (own, theirs))
        assert one == two


def test_same_seed_same_run_though_it_is_killed(primed, tmp_path):
    folder = tmp_path / "ne"
    flags = f"{PRIMING} --arm ne --run-dir {folder}"
    assert run_here(flags, priming, due={390: "SIGKILL"}) == -9
    assert column(folder / "results.csv", "step") == [100, 200, 300]
    assert column(folder / "losses.csv", "updates")[-1] == 220
    assert run_here(f"--resume {folder}", priming) == 0
    for name in FILES:
        assert (folder / name).read_bytes() == (primed["ne"] / name).read_bytes()


def test_growth_while_priming(primed):
    """Of 230 rounds (interval 1), 30 come before the first row after priming."""
    on = primed["ne_while"]
    grown_on = column(on / "results.csv", "ne/critic/grown")
    grown_off = column(primed["ne"] / "results.csv", "ne/critic/grown")
    # rows: step 100, 200 (after priming), 300
    assert grown_off[1] == 0 < grown_on[1]
    assert grown_on[2] > grown_on[1] and grown_off[2] > 0
    # and no review is drawn or counted meanwhile
    epsilons = [
        column(folder / "results.csv", "ne/review_epsilon") for folder in (on, primed["ne"])
    ]
    assert epsilons[0][1] < 1 == epsilons[1][1] > epsilons[1][2]


@pytest.mark.parametrize(
    ("due", "code"),
    [({390: "SIGKILL"}, -9), ({400: "SIGTERM"}, 0)],  # the second stops the handing over
)
def test_a_fresh_agent_is_handed_the_buffer(due, code, primed, tmp_path):
    """As many updates, of a dense agent, on the same transitions; the run stays the same."""
    folder = tmp_path / "ne"
    flags = f"{PRIMING} --arm ne --run-dir {folder} --hand-over"
    assert run_here(flags, priming, due=due) == code
    assert not (folder / "handed.csv").exists()
    assert run_here(f"--resume {folder}", priming) == 0
    for name in FILES:
        assert (folder / name).read_bytes() == (primed["ne"] / name).read_bytes()
    assert column(folder / "handed.csv", "step") == [100, 200, 230]
    assert column(folder / "handed.csv", "updates") == [100, 200, 230]
    assert column(folder / "handed.csv", "ne/critic/density") == [1, 1, 1]
    losses = column(folder / "handed.csv", "losses/qf_loss")
    assert losses[0] > losses[-1]


NETWORK_OF = {"actor": "actor", "critic_1": "critic", "critic_2": "critic"}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("", ["000000", "000000", "000000"]),
        ("actor", ["111111", "000000", "000000"]),
        ("critic", ["000000", "111111", "111111"]),
        ("outputs", ["000000", "000011", "000011"]),
        ("all", ["111111", "111111", "111111"]),
    ],
)
def test_what_is_reset_after_priming(part, expected):
    """Of each network three layers, a weight and a bias each."""
    agent, buffer = make_agent(td3)
    train(agent, buffer, 20)
    before = {name: values(getattr(agent, name)) for name in NETWORK_OF}
    priming.reset_part(agent, part)
    changed = {}
    for name, network in NETWORK_OF.items():
        mlp = getattr(agent, name)
        state = agent.networks[network].optimizer.state
        new = []
        for p, old in zip(mlp.parameters(), before[name], strict=True):
            new.append(not torch.equal(p, old))
            assert new[-1] != any(value.any() for value in state[p].values())
        assert not any(new) or equal(values(mlp), values(getattr(agent, f"target_{name}")))
        changed[name] = "".join("01"[is_new] for is_new in new)
    assert changed == dict(zip(NETWORK_OF, expected, strict=True))


def test_the_small_dense_networks_have_the_weights_of_the_sparse_ones():
    sparse = ne.Agent(ne.Args(), 17, 6, 0, torch.device("cpu"))
    small = td3.Agent(td3.Args(**priming.SMALL), 17, 6, 0, torch.device("cpu"))
    for name in ("actor", "critic_1"):
        active = sum(int(layer.mask.sum()) for layer in getattr(sparse, name).layers)
        weights = sum(layer.weight.numel() for layer in getattr(small, name).layers)
        assert weights == pytest.approx(active, rel=0.05)


# --- many runs ----------------------------------------------------------------
def test_run_makes_what_is_missing(primed, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(run, "make_all", lambda args, jobs: made.extend(jobs) or {})
    out = primed["ne"].parent
    words = ["run", "--arms", "td3", "ne", "--seeds", 2, "--out", out, f"--flags={PRIMING}"]
    _, _, err = call(capsys, plasticity, *words)
    assert [job.name for job in made] == ["td3_seed2", "ne_seed2"]
    assert "2 finished, 2 new" in err
    other = f"--flags={PRIMING} --gamma 0.5"
    _, _, err = call(capsys, plasticity, *words[:-1], other)
    assert "--gamma is 0.95 there, 0.5 is wanted" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--seeds 0", "--seeds must be in [1, "),
        ("--flags=--arm=td3", "say what run it is: --arm=td3"),
    ],
)
def test_refusals(flags, says, tmp_path, capsys):
    code, _, err = call(capsys, plasticity, "run", "--out", tmp_path / "runs", *flags.split())
    assert code == 2 and says in err
    assert not (tmp_path / "runs").exists()


# --- probes -------------------------------------------------------------------
X = torch.randn(256, 6, generator=torch.Generator().manual_seed(2))


def critic(density: float = 1.0) -> ne.Critic:
    torch.manual_seed(0)
    mlp = ne.Critic([6, 48, 32, 1], False)
    rng = torch.Generator().manual_seed(1)
    ne.topology.sparsify(mlp.layers, density, "erdos-renyi", rng)
    return mlp


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_a_fresh_network_is_as_trainable_as_a_fresh_network(density):
    found = probes.trainability(critic(density), X, 100, 1e-3, seed=3)
    assert 0.85 < found["fit_ratio"] < 1.15
    assert found["fit_loss"] < 0.95  # both learn


def test_a_network_of_dormant_neurons_is_less_trainable():
    mlp = critic()
    for layer in mlp.layers[:-1]:
        layer.bias.data[4:] = -100.0
    assert probes.trainability(mlp, X, 100, 1e-3, seed=3)["fit_ratio"] > 1.3
    assert probes.dormant_share(mlp.activations(X), 0.0) == pytest.approx((44 + 28) / 80)


def test_trainability_changes_nothing_and_keeps_masks():
    mlp = critic(0.3)
    before = [p.detach().clone() for p in mlp.parameters()]
    random_state = torch.get_rng_state()
    probes.trainability(mlp, X, 5, 1e-3, seed=3)
    assert torch.equal(random_state, torch.get_rng_state())
    for p, old in zip(mlp.parameters(), before, strict=True):
        assert torch.equal(p, old)
    fresh = probes.fresh_copy(mlp, torch.Generator().manual_seed(4))
    for own, new in zip(mlp.layers, fresh.layers, strict=True):
        assert int(own.mask.sum()) == int(new.mask.sum())
        assert not torch.equal(own.weight, new.weight)
        assert torch.equal(new.weight, new.weight * new.mask)


def test_effective_rank():
    assert probes.effective_rank(torch.eye(10)) == 10
    assert probes.effective_rank(torch.ones(10, 4)) == 1
    # 98.5 and 99.5% of the sum
    assert probes.effective_rank(torch.diag(torch.tensor([98.5, 1.0, 0.5]))) == 2
    assert probes.effective_rank(torch.diag(torch.tensor([99.5, 0.3, 0.2]))) == 1


def test_saturated_actions_pass_no_gradient_on():
    torch.manual_seed(0)
    actor = ne.Actor([6, 16, 3], False)
    assert probes.saturated_share(actor, X) == 0
    actor.layers[-1].bias.data[1] = -20.0
    assert probes.saturated_share(actor, X) == pytest.approx(1 / 3)
    actor(X).sum().backward()
    assert torch.equal(actor.layers[-1].bias.grad != 0, torch.tensor([True, False, True]))


class Countdown(gym.Env):
    """Reward 1 in each of 20 steps, then the episode terminates or is cut off."""

    def __init__(self, terminates: bool):
        self.terminates = terminates

    def reset(self, seed=None):
        self.left = 20
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        return np.zeros(3, dtype=np.float32), 1.0, over and self.terminates, over, {}


@pytest.mark.parametrize("terminates", [True, False])
def test_overestimation(terminates):
    args = ne.Args(actor_hidden=(8, 8), critic_hidden=(8, 8))
    agent = ne.Agent(args, 3, 3, 0, torch.device("cpu"))
    for p in agent.critic_1.parameters():
        p.data.zero_()
    agent.critic_1.layers[-1].bias.data.fill_(5.0)
    found = probes.overestimation(agent, Countdown(terminates), 0.5, episodes=2, seed=1)
    assert found["q"] == 5.0
    value = [2 - 0.5**n * 2 for n in range(20, 0, -1)]
    kept = 20 if terminates else 13  # 0.5^7 < 1%
    assert found["return"] == pytest.approx(np.mean(value[:kept]))
    assert found["overestimation"] == pytest.approx(5 - found["return"])


# --- the table ----------------------------------------------------------------
def synthetic(out: Path, level: float, arm: str = "td3", seed: int = 1, steps: int = 40_000):
    folder = out / f"{arm}_seed{seed}"
    folder.mkdir(parents=True)
    lines = ["step,eval/return_mean"]
    for step in range(5_000, steps + 1, 5_000):
        lines.append(f"{step},{0 if step < 25_000 else level}")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    lines = ["point,step," + ",".join(plasticity.PROBES)]
    for point in plasticity.POINTS:
        lines.append(
            f"{point},{steps if point == 'end' else 5_000}" + ",1" * len(plasticity.PROBES)
        )
    (folder / "probes.csv").write_text("\n".join(lines) + "\n")


def synthetic_arms(out: Path, levels: dict[str, float]) -> Path:
    for arm, level in levels.items():
        for seed in (1, 2, 3):
            synthetic(out, level + 10 * (seed - 2), arm, seed)
    return out


def test_table_and_picture(tmp_path, capsys):
    synthetic_arms(tmp_path, {"td3": 100, "ne": 200})
    synthetic(tmp_path, 150, "static")
    synthetic(tmp_path, 150, "redo", steps=35_000)
    earlier = tmp_path / "static_seed1" / "probes.csv"
    earlier.write_text(earlier.read_text().replace("actor/saturated", "other"))
    picture = tmp_path / "priming.png"
    _, out, err = call(capsys, plasticity, "table", tmp_path, "--out", picture)
    assert "left out: redo_seed1 is at step 35,000 of 40,000" in err
    returns, fits, of_probes, *_ = out.split("\n\n")
    assert "| td3 | 3 | 100 [75, 125] | – | – | 100 [75, 125] | – | – |" in returns
    # Welch: 4 degrees of freedom, standard error sqrt(2 * 10^2 / 3)
    half = "200 [175, 225] | 100 [77, 123] | < 0.001 |"
    assert f"| ne | 3 | {half} {half}" in returns
    assert "| static | 1 | 150 | 50 | – | 150 | 50 | – |" in returns
    assert "| ne | 3 | 1.00 | 0.00 | – | 1.00 | 0.00 | – |" in fits
    assert "| ne | after | 1.00 | 1.00 | 1 | 100.0% |" in of_probes
    assert "| static | after | 1.00 | 1.00 | 1 | – |" in of_probes
    assert out.startswith((tmp_path / "priming.md").read_text())
    assert picture.stat().st_size > 10_000
    # returns are 0 before step 25,000
    steps = ("--from-step", "10_000", "--to-step", "30_000")
    _, out, _ = call(capsys, plasticity, "table", tmp_path, *steps, "--out", picture)
    assert "from step 10,000 to 30,000" in out
    assert "| 40 [30, 50] | – | – |" in out.split("\n\n")[0]


def test_ladder(tmp_path, capsys):
    """Seed 2 loses nothing; a reset mends seed 1, the fresh agent seed 3."""
    runs = {  # seed: returns not primed, primed, reset, fresh
        1: (1_000, 500, 800, 100),
        2: (1_000, 510, 900, 100),
        3: (2_000, 100, 200, 1_700),
    }
    for seed, (not_primed, primed, reset, fresh) in runs.items():
        synthetic(tmp_path / "0", not_primed, "td3", seed)
        synthetic(tmp_path / "50000", primed, "td3", seed)
        synthetic(tmp_path / "50000", reset, "reset_primed", seed)
        rows = f"step,eval/return_mean\n100,-9\n200,-9\n300,{fresh}\n400,{fresh}\n"
        (tmp_path / "50000" / f"td3_seed{seed}" / "handed.csv").write_text(rows)
        for dose, arms in (("0", ["td3"]), ("50000", ["td3", "reset_primed"])):
            primed_rows = "50,5000,77\n100,5000,66\n" if dose == "50000" else ""
            for arm in arms:
                file = tmp_path / dose / f"{arm}_seed{seed}" / "losses.csv"
                file.write_text(
                    "updates,step,losses/abs_q\n" + primed_rows + "200,10000,9\n300,40000,5\n"
                )
    picture = tmp_path / "ladder.png"
    _, out, _ = call(capsys, plasticity, "ladder", tmp_path, "--out", picture)
    assert "| 0 | 1 | 1,000 (100%) | – | – | – | – | 5 |" in out
    assert "| 50,000 | 1 | 500 (50%) | 800 (80%) | 100 (10%) | yes | 66 | 5 |" in out
    assert "| 50,000 | 2 | 510 (51%) | 900 (90%) | 100 (10%) | no | 66 | 5 |" in out
    assert "| 50,000 | 3 | 100 (5%) | 200 (10%) | 1,700 (85%) | yes | 66 | 5 |" in out
    # the first half has no return; of the last, as scipy.stats.ttest_1samp and ttest_ind say
    costs = "| 50,000 | 3 | 0 | 0 | 370 [-211, 951] | -963 [-2,202, 275] |"
    assert costs in out
    assert picture.stat().st_size > 10_000
    (tmp_path / "50000" / "td3_seed1" / "handed.csv").unlink()
    (tmp_path / "50000" / "reset_primed_seed1" / "results.csv").unlink()
    _, out, _ = call(capsys, plasticity, "ladder", tmp_path, "--out", picture)
    assert "| 50,000 | 1 | 500 (50%) | – | – | – | 66 | 5 |" in out  # no cure is known
    synthetic(tmp_path / "25000", 100, "td3", steps=35_000)  # still going
    code, _, err = call(capsys, plasticity, "ladder", tmp_path)
    assert code == 2 and "there are no finished runs of td3" in err
    code, _, err = call(capsys, plasticity, "ladder", tmp_path / "none")
    assert code == 2 and "must hold TD3, not primed" in err
