"""After kills, the same command ends with the same rows and the same ledger, and nothing is charged twice.

A sweep runs undisturbed, in this process. Then it runs on Ray, with two replicas and two trials at a time, while
replicas, the ledger actor, a worker of a trial, or the driver are killed. It is continued with one replica and one
trial at a time. Accuracies, predictions and bills must be bit-identical.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from methods.base import Access, Bill
from pipeline.blackbox import ray_pool
from pipeline.blackbox.client import Pool
from pipeline.blackbox.ray_actors import NAMESPACE, LedgerActor, RemoteLedger, Replica
from pipeline.blackbox.ray_pool import RayPool
from pipeline.blackbox.ray_resources import wait_for_resources
from pipeline.blackbox.request import ModelInfo, Request, Response
from pipeline.budget import Limits, Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card
from pipeline.errors import BudgetExceeded, ConfigError, DataError, EndpointBusy, LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import Charge
from pipeline.results.store import ResultStore
from pipeline.sweep.storage import alone
from pipeline.sweep.tune_trials import TrialsInOrder
from pipeline.trials.trial import few_shot_task, run_trial
from tests.faults.points import SLOW, Faults
from tests.support.command import Running, charges, farebox, kill, ledger_record, wait_until
from tests.support.lab import STORAGE, Lab, outcome, run_here, stored_rows
from tests.support.patience import patience

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def words(card: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A sweep with many requests and many checkpoints; `mine` searches its settings first."""
    features = tmp_path_factory.mktemp("kill_features")
    tune = {"space": {"sigma": [0.2, 1.0], "kl_weight": [0.1, 1.0]}, "trials": 3}
    mine = {"method": "craft", "config": {"popsize": 6}, "tune": tune}
    return (
        *("sweep=smoke", f"datasets=[{card}]", "methods=[zero_shot,mine,cbbt]", "shots=[2]", "seeds=[1]"),
        *("views=3", "budget.requests=600", f"variants={json.dumps({'mine': mine})}"),  # some 300 calls
        *("checkpoint_s=0.2", f"features={features}"),
    )


@pytest.fixture(scope="module")
def undisturbed(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a run in which nothing happens."""
    storage = tmp_path_factory.mktemp("undisturbed")
    run_here(*words, f"storage={storage}")
    return storage


def rows_of(storage: Path) -> dict[str, dict[str, Any]]:
    """Everything of the rows that must not depend on who died."""
    found = [r for path in (storage / "results").iterdir() for r in ResultStore(storage).rows_of(path.stem)]
    return {r.method: outcome(r) for r in found}


def encoded_images(storage: Path) -> int:
    """The images that were encoded for the trials of a storage, as their rows tell."""
    return sum(rows[0].computed_images or 0 for rows in ResultStore(storage).trials().values())


def assert_same(storage: Path, other: Path) -> None:
    """The same rows (accuracy, predictions, bill) and ledger totals; no wall times."""
    here, there = rows_of(storage), rows_of(other)
    assert here.keys() == there.keys()
    for method, row in here.items():
        assert {k: v for k, v in row.items() if v != there[method][k]} == {}, method
    assert [ledger_record(storage)[k] for k in ("phases", "trials")] == [
        ledger_record(other)[k] for k in ("phases", "trials")
    ]


def assert_clean(storage: Path) -> None:
    """Nothing is left over, nothing was replayed at a price, and no call was refunded or paid twice."""
    found = ledger_record(storage)
    assert found["open_trials"] == 0
    assert found["phases"]["replay"] == {"requests": 0, "images": 0, "prompts": 0, "outputs": 0}
    assert not list((storage / "checkpoints").glob("*"))
    assert not (storage / "tune").exists()
    assert not list(storage.rglob("*.tmp"))


def test_rows_and_ledger_survive_the_death_of_every_process(
    words: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    features = tmp_path / "features"
    words = ("run", *words, f"storage={storage}", f"features={features}")
    faults = Faults(tmp_path / "marks", storage).add(SLOW | {"seconds": 0.1})
    faults.on("slow")  # until everything has been killed

    run = Running(*words, "replicas=2", "concurrency=2", env=faults.environment)
    paid = 0
    for title in ("ray::Replica", "ray::LedgerActor", "ray::ResourceTrainable"):
        run.wait_for(lambda title=title: run.below(title), f"a process {title}")
        run.wait_for(lambda paid=paid: charges(storage) > paid + 15, f"charges before {title} is killed")
        run.wait_for(lambda: list((storage / "checkpoints").glob("*.ckpt")), "a checkpoint")
        paid = charges(storage)
        kill(run.below(title)[-1])
    run.wait_for(lambda: charges(storage) > paid + 15, "charges after the kills")
    with pytest.raises(ConfigError, match="another `farebox run` is running"), alone(storage):
        pass
    run.kill()

    faults.on()
    done = farebox(*words, "replicas=1", "concurrency=1", env=faults.environment)
    assert "Traceback" not in done.stdout + done.stderr
    assert_same(storage, undisturbed)
    assert_clean(storage)
    assert encoded_images(storage) == stored_rows(features) > 0
    log = [json.loads(line) for line in (storage / "log.jsonl").read_text().splitlines()]
    assert [line["name"] for line in log if line["event"] == "worker lost"]
    assert log[-1]["event"] == "run ended"


# Below: pieces in this process, on one Ray of its own.


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the tests below, ended before the next module."""
    ray.init(
        address="local",
        num_cpus=2,
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=128 * 2**20,
    )
    yield
    ray.shutdown()


class Actors:
    """A ledger actor and replicas over a storage folder, and ways to kill them."""

    def __init__(self, folder: Path, features: Path, replicas: int = 1, card: ModelCard | None = None) -> None:
        name = f"ledger-{folder.name}"
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        self.ledger = LedgerActor.options(name=name).remote(self.url)  # type: ignore[attr-defined]
        make = Replica.remote  # type: ignore[attr-defined]
        self.replicas = [make(card or model_card("fake"), str(features), 1, name) for _ in range(replicas)]

    @property
    def all(self) -> list[Any]:
        return [self.ledger, *self.replicas]


@pytest.fixture
def actors(cluster: None, tmp_path: Path, features: Path) -> Iterator[Actors]:
    made = Actors(tmp_path, features)
    yield made
    for actor in made.all:
        ray.kill(actor)


def crash(actor: Any) -> None:
    """The process dies at once; Ray starts the actor again."""
    ray.kill(actor, no_restart=False)


class Chaos:
    """Runs `act` after each of the first `times` answers of a pool: named points, not a clock."""

    def __init__(self, pool: Pool, act: Callable[[int], None], times: int) -> None:
        self.pool, self.act, self.times, self.info = pool, act, times, pool.info
        self.asked = 0

    def send(self, request: Request) -> Response:
        answer = self.pool.send(request)
        self.asked += 1
        if self.asked <= self.times:
            self.act(self.asked)
        return answer

    def embed_text(self, text: str) -> Any:
        return self.pool.embed_text(text)


@pytest.fixture
def spec(lab: Lab) -> Any:
    return lab.spec("craft", "budget.requests=120")


def test_a_trial_continues_after_the_death_of_its_only_replica_and_of_the_ledger(
    lab: Lab, spec: Any, actors: Actors
) -> None:
    wanted = [outcome(r) for r in lab.run(spec)]
    ledger = RemoteLedger(actors.ledger)
    ledger.open_account("ceiling", Limits(requests=spec.predicted.requests))
    ledger.reserve(STORAGE, spec.account, ["ceiling"], spec.reserved)
    pool = Chaos(RayPool(actors.replicas), lambda n: crash(actors.all[n % 2]), times=2)
    rows = run_trial(spec, pool, STORAGE, ResultStore(lab.folder / "killed"))
    ledger.release(STORAGE, spec.account)
    assert [outcome(r) for r in rows] == wanted
    assert ledger.verify() == []
    assert Ledger(actors.url).trial_bill(STORAGE, spec.account) == lab.bills(spec)


def test_a_charged_request_whose_response_was_lost_is_a_free_replay(lab: Lab, spec: Any, actors: Actors) -> None:
    ledger, pool = RemoteLedger(actors.ledger), RayPool(actors.replicas)
    ledger.open_account("ceiling", Limits(requests=1))
    ledger.reserve(STORAGE, spec.account, ["ceiling"], Limits(requests=1))
    images = few_shot_task(spec).train.images
    bill = Bill.image_features(len(images), pool.info.feature_dim)
    call = Charge(STORAGE, spec.account, 0, "digest", Phase.ADAPT, bill)
    Ledger(actors.url).charge([call])  # committed, and its sender died before it could answer
    crash(actors.ledger)
    crash(actors.replicas[0])
    found = pool.send(Request("image_features", images, None, call))
    assert found.status == "replayed"
    assert (found.values == lab.pool.endpoint.compute(Request("image_features", images, None, call)).values).all()
    assert Ledger(actors.url).trial_bill(STORAGE, spec.account)[Phase.ADAPT] == bill
    assert ledger.verify() == []
    with pytest.raises(BudgetExceeded, match="1 requests asked"):  # as ours, through two actors
        pool.send(Request("image_features", images, None, replace(call, call=1)))


def test_a_lost_ledger_raises_a_ledger_error_and_no_response_leaves(lab: Lab, spec: Any, actors: Actors) -> None:
    pool = RayPool(actors.replicas)
    ray.kill(actors.ledger)
    images = few_shot_task(spec).train.images
    call = Charge(STORAGE, spec.account, 0, "digest", Phase.ADAPT, Bill.image_features(len(images), 16))
    with pytest.raises(LedgerError, match="the ledger did not answer"):
        pool.send(Request("image_features", images, None, call))
    with pytest.raises(LedgerError, match="the ledger did not answer release"):
        RemoteLedger(actors.ledger).release(STORAGE, spec.account)


def test_a_replica_that_cannot_load_reports_the_reason(cluster: None, tmp_path: Path) -> None:
    garbage = tmp_path / "weights.pt"
    garbage.write_bytes(b"not weights")
    broken = ModelCard(name="broken", kind="open_clip", arch="RN50-quickgelu", weights=str(garbage))
    actors = Actors(tmp_path, tmp_path / "features", card=broken)
    with pytest.raises(DataError, match="broken"):
        RayPool(actors.replicas)
    for actor in actors.all:
        ray.kill(actor)


def test_a_client_with_another_token_is_refused(cluster: None) -> None:
    join = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False); print('in')"
    command = [sys.executable, "-c", join, ray.get_runtime_context().gcs_address]
    retries = {"RAY_NUM_REDIS_GET_RETRIES": "2"}  # a refused client tries 20 times, a second apart
    wrong = os.environ | retries | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    ours, other = (
        subprocess.run(command, env=env, capture_output=True, text=True, check=False) for env in (os.environ, wrong)
    )
    assert (ours.returncode, ours.stdout) == (0, "in\n"), ours.stderr
    assert other.returncode != 0 and other.stdout == "" and "Failed to connect" in other.stderr


def test_resources_held_by_others_end_the_run_with_a_reason(cluster: None) -> None:
    said: list[str] = []
    wait_for_resources({"CPU": 1, "GPU": 0}, said.append)
    assert said == []

    @ray.remote(num_cpus=2)
    class Other:
        def here(self) -> None: ...

    other = Other.remote()
    ray.get(other.here.remote())
    wait_until(lambda: ray.available_resources().get("CPU", 0) < 1, "the cores are taken", 30)
    with pytest.raises(ConfigError, match=r"waited 2 s for 1 CPU in use by other jobs \(the cluster has CPU 2\): end"):
        wait_for_resources({"CPU": 1}, said.append, timeout_s=2)
    assert said == ["waiting for 1 CPU in use by other jobs of this cluster (it has CPU 2)"]
    ray.kill(other)
    wait_for_resources({"CPU": 1}, said.append, timeout_s=30)


@ray.remote(num_cpus=0, max_concurrency=4)
class Asleep:
    """A replica that lives and does not answer."""

    async def info(self) -> ModelInfo:
        return ModelInfo("loaded", 100.0, 1.0, 0, 8, 32, Access.SCORES, "fp32", "none", "cpu")

    async def send(self, request: Request) -> None:
        await asyncio.sleep(60)


def test_a_replica_that_does_not_answer_raises_endpoint_busy(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "RESPONSE_TIMEOUT_S", patience())  # the actor starts
    asleep = Asleep.remote()
    pool = RayPool([asleep])
    monkeypatch.setattr(ray_pool, "RESPONSE_TIMEOUT_S", 0.5)
    request = Request("scores", None, None, Charge("storage", "trial", 0, "digest", Phase.ADAPT, Bill()))
    with pytest.raises(EndpointBusy, match="did not respond"):
        pool.send(request)
    ray.kill(asleep)


def test_a_worker_that_starts_is_not_ended_when_another_trial_ends(cluster: None, tmp_path: Path) -> None:
    class Shift(tune.Trainable):  # local, so that Ray sends it by value
        """A trial that ends at once. The second worker starts slowly: it waits until three trials have ended."""

        def setup(self, config: dict[str, Any]) -> None:
            (tmp_path / f"worker.{os.getpid()}").touch()
            self.index = config["index"]
            try:
                (tmp_path / "first").touch(exist_ok=False)
            except FileExistsError:
                wait_until(lambda: len(list(tmp_path.glob("ended.*"))) >= 3, "three trials have ended", 60)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.index = new_config["index"]
            return True

        def step(self) -> dict[str, Any]:
            (tmp_path / f"ended.{self.index}").touch()
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None: ...

    tune.Tuner(
        tune.with_resources(Shift, {"cpu": 1}),
        param_space={"index": tune.grid_search(list(range(8)))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=2, scheduler=TrialsInOrder()),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert len(list(tmp_path.glob("ended.*"))) == 8
    assert len(list(tmp_path.glob("worker.*"))) == 2
