"""benchmark/plasticity.py: every arm runs, probes on known cases, the table; shifted_tasks.py."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import ne_td3_continuous as ne
import plasticity
import pool
import shifted_tasks
from baselines import td3_continuous as td3

ROOT = Path(__file__).parent.parent
SMALL = "--env-id Pendulum-v1 --actor-hidden 24 16 --critic-hidden 24 16 --batch-size 32"
SMALL += " --buffer-size 1000 --gamma 0.95 --no-cuda"
RUN = "--learning-starts 200 --eval-frequency 100 --eval-episodes 1"
PRIMING = "--priming-updates 30 --normal-steps 200 --loss-frequency 10"
PRIMING += " --probe-inputs 64 --probe-fits 5 --probe-episodes 1"


def call(monkeypatch, *arguments: str) -> None:
    """A command in this process."""
    words = []
    for argument in arguments:
        words += argument.split()
    monkeypatch.setattr(sys, "argv", ["plasticity.py", *words])
    plasticity.main()


def prime(monkeypatch, out: Path, arm: str, *more: str) -> Path:
    call(monkeypatch, f"priming --arm {arm} --out {out}", SMALL, RUN, PRIMING, *more)
    return out / f"{arm}_seed1"


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def column(file: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(file)]


@pytest.fixture(autouse=True)
def quiet_handlers(monkeypatch):
    """`main` looks at a stream of its own."""
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)


# --- runs ---------------------------------------------------------------------
@pytest.mark.parametrize("arm", plasticity.ARMS)
def test_every_arm_runs(arm, monkeypatch, tmp_path):
    folder = prime(monkeypatch, tmp_path, arm)
    assert column(folder / "results.csv", "step") == [100, 200, 300, 400]
    assert column(folder / "results.csv", "updates") == [0, 30, 130, 230]
    assert column(folder / "losses.csv", "updates") == list(range(10, 231, 10))
    assert np.isfinite(column(folder / "losses.csv", "losses/qf_values")).all()
    probes = rows(folder / "probes.csv")
    assert [row["point"] for row in probes] == ["before", "after", "end"]
    for row in probes:
        numbers = [float(value) for key, value in row.items() if key != "point"]
        assert np.isfinite(numbers).all()
    start, *_, end = column(folder / "results.csv", "ne/critic/density")
    assert (start < 1) == (arm in plasticity.NE_ARMS)
    assert (end > start) == (arm in ("ne", "ne_no_review", "random_growth"))
    reviewed = column(folder / "results.csv", "ne/review_share")[-1]
    assert (reviewed > 0) == (arm == "ne")


@pytest.mark.parametrize(("arm", "script"), [("ne", ne), ("recency", td3), ("reset", td3)])
def test_without_priming_it_is_the_script(arm, script, monkeypatch, tmp_path):
    folder = prime(monkeypatch, tmp_path, arm, "--priming-updates 0")
    method = "" if arm == "ne" else f"--method {arm}"
    if arm == "reset":
        method += " --reset-interval 200"
    script_run = tmp_path / "script"
    flags = f"{SMALL} {RUN} {method} --total-timesteps 400 --run-dir {script_run}"
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
    script.main()
    keys = ["eval/return_mean", "ne/critic/density", "ne/critic/fau", "ne/review_share"]
    keys += ["charts/episodic_return"]
    own, theirs = (rows(run / "results.csv") for run in (folder, script_run))
    for key in keys:
        assert [row[key] for row in own] == [row[key] for row in theirs]


def test_same_seed_same_run(monkeypatch, tmp_path):
    folders = []
    for number in range(2):
        folders.append(prime(monkeypatch, tmp_path / str(number), "ne"))
    for name in ("results.csv", "losses.csv", "probes.csv"):
        one, two = (folder / name for folder in folders)
        assert one.read_bytes() == two.read_bytes()


def test_growth_while_priming(monkeypatch, tmp_path):
    """Of 230 rounds (interval 1), 30 come before the first row after priming."""
    more = "--priming-updates 100 --normal-steps 100"
    grown = {}
    for flag in ("--growth-while-priming", "--no-growth-while-priming"):
        folder = prime(monkeypatch, tmp_path / flag, "ne", more, flag)
        grown[flag] = column(folder / "results.csv", "ne/critic/grown")
    # rows: step 100, 200 (after priming), 300
    assert grown["--growth-while-priming"][1] > 0
    assert grown["--no-growth-while-priming"][1] == 0
    for of_all in grown.values():
        assert of_all[2] > of_all[1]


def test_a_finished_run_stays_and_an_interrupted_one_starts_over(monkeypatch, tmp_path, capsys):
    folder = prime(monkeypatch, tmp_path, "td3")
    whole = (folder / "results.csv").read_bytes()
    prime(monkeypatch, tmp_path, "td3")
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prime(monkeypatch, tmp_path, "td3", "--priming-updates 40")
    assert "--priming-updates is 30 there, 40 is wanted" in capsys.readouterr().err
    # as if it had been killed before the last probe, or the disk had been full at the first
    lines = (folder / "probes.csv").read_text().splitlines(keepends=True)
    for left in (lines[:-1], []):
        (folder / "probes.csv").write_text("".join(left))
        prime(monkeypatch, tmp_path, "td3")
        assert "was interrupted after step 400: it starts over" in capsys.readouterr().out
        assert (folder / "results.csv").read_bytes() == whole
        assert len(rows(folder / "probes.csv")) == 3


@pytest.mark.parametrize("flag", ["--normal-steps 0", "--probe-fits 0", "--gamma 2"])
def test_refusals(flag, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prime(monkeypatch, tmp_path, "td3", flag)
    assert stop.value.code == 2
    assert flag.split()[0] in capsys.readouterr().err


def test_run_makes_what_is_missing(monkeypatch, tmp_path, capsys):
    made = []

    def start(job):
        job.folder.mkdir()
        made.append(job.folder.name)
        (job.folder / "probes.csv").write_text("point\nend\n")
        code = 1 if "static" in job.command else 0
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])

    monkeypatch.setattr(pool, "start", start)
    (tmp_path / "ne_seed1").mkdir()
    (tmp_path / "ne_seed1" / "probes.csv").write_text("point\nend\n")
    previous = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, f"run --arms ne static --seeds 2 --out {tmp_path}")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert stop.value.code == 1
    assert made == ["static_seed1", "ne_seed2", "static_seed2"]
    assert "failed: static_seed1" in capsys.readouterr().err


def test_run_refuses_what_is_not_the_same(monkeypatch, tmp_path, capsys):
    """A finished run of other flags is not the one that is asked for."""
    prime(monkeypatch, tmp_path, "td3")
    monkeypatch.setattr(pool, "make", lambda due, workers: print(f"made {len(due)}"))
    same = f"{SMALL} {RUN} {PRIMING}"
    for flags, words in (
        (same, "made 0"),
        (f"{same} --gamma 0.5", "holds another run: --gamma is 0.95 there, 0.5 is wanted"),
        (f"{same} --nonsense", "nonsense"),
        (f"{same} --probe-fits 0", "--probe-fits must be at least 1, got 0"),
        ("'", "--flags: No closing quotation"),
    ):
        run = ["plasticity.py", "run", "--arms", "td3", "--seeds", "1", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*run, f"--flags={flags}"])
        code = 0
        try:
            plasticity.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert words in said.out + said.err
        assert code == (0 if "made" in words else 2)


@pytest.mark.parametrize(
    "flags", ["--workers 0", "--seeds 0", "--out /dev/null", "--out /dev/null/runs"]
)
def test_run_refuses(flags, monkeypatch, tmp_path, capsys, one_minute):
    out = tmp_path / "runs"
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, f"run --arms td3 --out {out} {flags}")
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
    assert not out.exists()


def test_run_refuses_a_damaged_args_json(monkeypatch, tmp_path, capsys):
    synthetic(tmp_path, "td3", 1, 100)
    (tmp_path / "td3_seed1" / "args.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, f"run --arms td3 --seeds 1 --out {tmp_path}")
    assert stop.value.code == 2
    assert "args.json is damaged" in capsys.readouterr().err


def test_stopping_run_stops_its_children(tmp_path):
    command = [sys.executable, "benchmark/plasticity.py", "run", "--arms", "td3", "--seeds", "1"]
    command += ["--out", str(tmp_path), f"--flags={SMALL} {RUN} --priming-updates 1000000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "td3_seed1.log"
    while "step 100" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped" in out
    child = int((tmp_path / "td3_seed1" / "lock").read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


# --- arms ---------------------------------------------------------------------
@pytest.mark.parametrize(("n_obs", "n_act"), [(17, 6), (105, 8), (3, 1)])
def test_the_small_dense_networks_have_the_weights_of_the_sparse_ones(n_obs, n_act):
    args = plasticity.Args(arm="small_dense")
    small = plasticity.arm_args(args, n_obs, n_act)
    sparse = ne.Agent(ne.Args(), n_obs, n_act, 0, torch.device("cpu"))
    sizes = {"actor": [n_obs, *small.actor_hidden, n_act]}
    sizes["critic_1"] = [n_obs + n_act, *small.critic_hidden, 1]
    for name, own in sizes.items():
        active = sum(int(layer.mask.sum()) for layer in getattr(sparse, name).layers)
        assert plasticity.weights_of(own) == pytest.approx(active, rel=0.05)
        assert own[1] / own[2] == pytest.approx(2, rel=0.05)


# --- probes -------------------------------------------------------------------
def probes_args(**changes) -> plasticity.ProbeArgs:
    return plasticity.ProbeArgs(**{"probe_inputs": 256, "probe_fits": 100} | changes)


def critic(density: float = 1.0) -> ne.Critic:
    torch.manual_seed(0)
    mlp = ne.Critic([6, 48, 32, 1], False)
    rng = torch.Generator().manual_seed(1)
    ne.topology.sparsify(mlp.layers, density, "erdos-renyi", rng)
    return mlp


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_a_fresh_network_is_as_trainable_as_a_fresh_network(density):
    mlp = critic(density)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(2))
    found = plasticity.trainability(mlp, x, probes_args(), seed=3)
    assert 0.85 < found["fit_ratio"] < 1.15
    assert found["fit_loss"] < 0.95  # both learn


def test_a_network_of_dormant_neurons_is_less_trainable():
    mlp = critic()
    for layer in mlp.layers[:-1]:
        layer.bias.data[4:] = -100.0
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(2))
    found = plasticity.trainability(mlp, x, probes_args(), seed=3)
    assert found["fit_ratio"] > 1.3


def test_trainability_changes_nothing_and_keeps_masks():
    mlp = critic(0.3)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(2))
    before = [p.detach().clone() for p in mlp.parameters()]
    random_state = torch.get_rng_state()
    plasticity.trainability(mlp, x, probes_args(probe_fits=5), seed=3)
    assert torch.equal(random_state, torch.get_rng_state())
    for p, old in zip(mlp.parameters(), before, strict=True):
        assert torch.equal(p, old)
    fresh = plasticity.fresh_copy(mlp, torch.Generator().manual_seed(4))
    for own, new in zip(mlp.layers, fresh.layers, strict=True):
        assert int(own.mask.sum()) == int(new.mask.sum())
        assert not torch.equal(own.weight, new.weight)
        assert torch.equal(new.weight, new.weight * new.mask)


def test_the_loss_of_a_fit_starts_at_that_of_its_targets():
    mlp = critic()
    mlp.layers[-1].bias.data += 1_000.0  # large values are no obstacle of their own
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(2))
    targets = torch.randn(256, 1, generator=torch.Generator().manual_seed(3))
    loss = plasticity.fit(mlp, x, targets, probes_args(probe_fits=0))
    assert loss == pytest.approx(float(targets.square().mean()), rel=1e-3)


def test_effective_rank():
    assert plasticity.effective_rank(torch.eye(10)) == 10
    assert plasticity.effective_rank(torch.ones(10, 4)) == 1
    # 98.5 and 99.5% of the sum
    assert plasticity.effective_rank(torch.diag(torch.tensor([98.5, 1.0, 0.5]))) == 2
    assert plasticity.effective_rank(torch.diag(torch.tensor([99.5, 0.3, 0.2]))) == 1


def test_discounted_returns():
    returns = plasticity.discounted_returns([1.0, 0.0, 4.0], gamma=0.5)
    assert returns.tolist() == [2.0, 2.0, 4.0]


class Countdown(gym.Env):
    """Reward 1 in each of 20 steps, then the episode terminates or is cut off."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

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
    found = plasticity.overestimation(agent, Countdown(terminates), 0.5, episodes=2, seed=1)
    assert found["q"] == 5.0
    value = [2 - 0.5**n * 2 for n in range(20, 0, -1)]
    kept = 20 if terminates else 13  # 0.5^7 < 1%
    assert found["return"] == pytest.approx(np.mean(value[:kept]))
    assert found["overestimation"] == pytest.approx(5 - found["return"])


# --- the table ----------------------------------------------------------------
def synthetic(out: Path, arm: str, seed: int, level: float, end: bool = True) -> None:
    folder = out / f"{arm}_seed{seed}"
    folder.mkdir()
    lines = ["step,eval/return_mean"]
    for step in range(5_000, 40_001, 5_000):
        value = 0 if step < 25_000 else level
        lines.append(f"{step},{value}")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    points = ["before", "after"]
    if end:
        points.append("end")
    columns = ",".join(plasticity.PROBES)
    numbers = ",".join("1" for _ in plasticity.PROBES)
    text = [f"point,{columns}"]
    text += [f"{point},{numbers}" for point in points]
    (folder / "probes.csv").write_text("\n".join(text) + "\n")


def test_table(monkeypatch, tmp_path, capsys):
    for seed, noise in enumerate((-10, 0, 10), start=1):
        synthetic(tmp_path, "td3", seed, 100 + noise)
        synthetic(tmp_path, "ne", seed, 200 + noise)
    synthetic(tmp_path, "static", 1, 150)
    synthetic(tmp_path, "static", 2, 1_000, end=False)
    call(monkeypatch, f"table {tmp_path} --out {tmp_path}/priming.png")
    out, err = capsys.readouterr()
    assert "static_seed2 is at step 40,000, unfinished" in err
    table = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 1 and cells[1] in ("td3", "ne", "static") and cells[2].isdigit():
            table.setdefault(cells[1], cells[2:-1])  # of the returns, which come first
    assert table["td3"] == ["3", "100 [75, 125]", "–", "–", "100 [75, 125]", "–", "–"]
    seeds, late, difference, p, whole, _, _ = table["ne"]
    assert (seeds, late, whole) == ("3", "200 [175, 225]", "200 [175, 225]")
    # Welch: 4 degrees of freedom, standard error sqrt(2 * 10^2 / 3)
    assert difference == "100 [77, 123]"
    assert p == "< 0.001"
    assert table["static"] == ["1", "150", "50", "–", "150", "50", "–"]
    assert "| ne | 3 | 1.00 | 0.00 | – | 1.00 | 0.00 | – |" in out
    assert "| ne | after | 1.00 | 1.00 | 1 | 100.0% |" in out
    assert out.startswith((tmp_path / "priming.md").read_text())
    assert (tmp_path / "priming.png").stat().st_size > 10_000
    call(monkeypatch, f"table {tmp_path} --reference ne --out {tmp_path}/priming.png")
    assert "| td3 | 3 | 100 [75, 125] | -100 [-123, -77] |" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "cut"), [("results.csv", 2), ("probes.csv", 2)])
def test_a_damaged_file_is_refused(name, cut, monkeypatch, tmp_path, capsys):
    synthetic(tmp_path, "td3", 1, 100)
    file = tmp_path / "td3_seed1" / name
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, f"table {tmp_path} --out {tmp_path}/priming.png")
    assert stop.value.code == 2
    assert "is damaged: a row of it is not complete" in capsys.readouterr().err


def test_a_run_without_one_of_the_probes_is_refused(monkeypatch, tmp_path, capsys):
    synthetic(tmp_path, "td3", 1, 100)
    file = tmp_path / "td3_seed1" / "probes.csv"
    head, _, *others = file.read_text().splitlines()
    file.write_text("\n".join([head, *others, ""]))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, f"table {tmp_path} --out {tmp_path}/priming.png")
    assert stop.value.code == 2
    assert "before, after, end, got ['after', 'end']" in capsys.readouterr().err


def test_table_of_what_priming_adds(monkeypatch, tmp_path, capsys):
    levels = {"primed": {"td3": 100, "ne": 200, "static": 0}, "without": {"td3": 70, "ne": 150}}
    for name, arms in levels.items():
        (tmp_path / name).mkdir()
        for arm, level in arms.items():
            for seed, noise in enumerate((-10, 0, 10), start=1):
                synthetic(tmp_path / name, arm, seed, level + noise)
    primed, without = tmp_path / "primed", tmp_path / "without"
    call(monkeypatch, f"table {primed} --control {without} --out {tmp_path}/priming.png")
    out = capsys.readouterr().out
    assert "| td3, last two evaluations | 3, 3 | 70 [45, 95] | – | 30 [7, 53] | – |" in out
    # 8 degrees of freedom, standard error sqrt(4 * 10^2 / 3)
    own = "| ne, last two evaluations | 3, 3 | 150 [125, 175] | 80 [57, 103] |"
    assert f"{own} 50 [27, 73] | 20 [-7, 47] |" in out
    assert "| static, last two" not in out


def test_a_closed_pipe_ends_the_table_in_silence(tmp_path):
    """As with `| head`: the exit code is that of a process killed by SIGPIPE."""
    (tmp_path / "runs").mkdir()
    synthetic(tmp_path / "runs", "td3", 1, 100)
    command = [sys.executable, plasticity.__file__, "table", tmp_path / "runs"]
    command += ["--out", tmp_path / "priming.png"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_table_without_runs(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, f"table {tmp_path}")
    assert stop.value.code == 2


# --- shifted tasks ------------------------------------------------------------
def one_step(env) -> tuple[np.ndarray, float]:
    """From the same state, on the ground, with the same action."""
    env.reset(seed=1)
    body = env.unwrapped
    qpos = body.init_qpos.copy()
    qpos[1] = -0.15  # its feet touch the floor
    qvel = np.full_like(body.init_qvel, 0.5)
    body.set_state(qpos, qvel)
    for _ in range(5):
        obs, reward, *_ = env.step(np.full(6, 0.8, dtype=np.float32))
    return obs, reward


def test_shifts_are_ten_tasks_that_differ():
    plain = gym.make("HalfCheetah-v5")
    seen = [one_step(plain)]
    assert len(shifted_tasks.SHIFTS) == len(set(shifted_tasks.SHIFTS.values())) == 10
    for name in shifted_tasks.SHIFTS:
        env = gym.make(f"shifted_tasks:{name}-v0")
        assert env.observation_space == plain.observation_space
        assert env.action_space == plain.action_space
        assert env.spec.max_episode_steps == plain.spec.max_episode_steps
        obs, reward = one_step(env)
        for other_obs, other_reward in seen:
            assert not np.allclose(obs, other_obs) or reward != other_reward
        seen.append((obs, reward))
        env.close()


def test_what_a_shift_changes():
    obs, reward = one_step(gym.make("HalfCheetah-v5"))
    backward_obs, backward_reward = one_step(gym.make("shifted_tasks:CheetahBackward-v0"))
    assert np.array_equal(obs, backward_obs)
    cost = 0.1 * 6 * 0.8**2
    assert backward_reward + cost == pytest.approx(-(reward + cost))
    for name in ("CheetahSlippery", "CheetahHeavy", "CheetahLight", "CheetahSticky"):
        other_obs, _ = one_step(gym.make(f"shifted_tasks:{name}-v0"))
        assert not np.allclose(obs, other_obs)


def test_shifted_tasks_are_ids_in_the_root(capsys):
    env = ne.make_env("benchmark.shifted_tasks:CheetahHeavy-v0", 1_000)
    assert env.unwrapped.model.opt.gravity[2] == pytest.approx(-9.81 * 1.5)
    shifted_tasks.main()
    assert capsys.readouterr().out.count("Cheetah") == 10
