"""The money of a run: refused before the first call, never above its limit, and continued with a higher one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.commands.plan import http_by_method
from pipeline.config.compose import compose
from pipeline.errors import BudgetExceeded, ConfigError, EndpointStopped
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import PurseRecord
from pipeline.remote.call_log import total_of
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.sweep.in_process import run_all
from pipeline.sweep.purses import money_lines
from pipeline.trials.estimate import estimate
from pipeline.trials.physical import SendPlan, Sent, total_sent
from pipeline.trials.plan import make_plan
from tests.support.command import here
from tests.support.lab import outcome
from tests.support.service import call, serving

PRICES = "usd_per_request: 0.001, usd_per_image: 0.0002, usd_per_1k_tokens: 0.01, tokens_per_image: 10"
PRICE = f"price: {{{PRICES}, as_of: 2026-11-01}}"
Words = Callable[..., list[str]]


def card_of(folder: Path, url: str, *lines: str) -> Path:
    """Write the card of a served toy model."""
    path = folder / "api.yaml"
    own = ("kind: http", f"url: {url}", "adapter: farebox", "grant: TEXT+PIXELS+FEATURES", "image: {size: 32}")
    model = ("feature_dim: 16", "logit_scale: 20.0", "max_text: 60", "text_norm: 1.0")
    retry = ("retry: {first_s: 0.01, most_s: 0.05}", "batch: {images: 7, texts: 4}")
    path.write_text("\n".join((*own, *model, *retry, *lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("model=fake") as address:
        yield address


@pytest.fixture
def words(tmp_path: Path, card: Path, url: str) -> Words:
    """Overrides of a small sweep on a served toy model with a price."""

    def words(*more: str, at: str = url, lines: tuple[str, ...] = (PRICE,)) -> list[str]:
        model = card_of(tmp_path, at, *lines)
        base = ("sweep=smoke", f"storage={tmp_path / 'storage'}", f"model={model}", f"datasets=[{card}]", "views=2")
        return [*base, "shots=2", "seeds=1", "methods=[zero_shot,gda,score_ridge]", *more]

    return words


def purse(storage: Path) -> PurseRecord:
    ledger = Ledger(f"sqlite:///{storage / 'ledger.db'}")
    assert ledger.verify() == []
    (found,) = ledger.money.purses()
    ledger.close()
    return found


def rows_of(storage: Path) -> list[ResultRow]:
    """The rows of a storage by method."""
    store = ResultStore(storage)
    trials = sorted(set(store.read()["trial_id"].to_pylist()))
    return sorted((row for trial in trials for row in store.rows_of(trial)), key=lambda row: row.method)


def run(words: list[str]) -> None:
    run_all(make_plan(compose(words)), lambda line: None)


def bound(words: list[str]) -> Sent:
    return total_sent(http_by_method(estimate(compose(words))).values())


def test_logit_scale_of_the_toy_model_is_that_of_the_cards(url: str) -> None:
    info = call(f"{url}/v1/info")[1]
    assert (info["logit_scale"], info["feature_dim"]) == (20.0, 16)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("views=fresh", "methods=[craft,linear_probe]"),
        ("seeds=1,2", "curve=2", "methods=[tip_adapter_f,ss_text,sim]"),
        ("curve=2", "methods=[bar,vp_spsa]"),
    ],
)
def test_what_is_sent_is_within_the_bound_of_the_plan(words: Words, tmp_path: Path, more: tuple[str, ...]) -> None:
    if "craft" in str(more):
        more = (more[0], "methods=[linear_probe,lp_pp,taskres]")
    used = words(*more, "budget.requests=100")
    run(used)
    sent, most = total_of(tmp_path / "storage"), bound(used)
    real = Sent(sent.calls, sent.images, sent.texts, 0, sent.bytes, sent.micro_usd)
    for field in fields(Sent):
        if field.name != "tokens":  # the toy model reports none
            assert 0 < getattr(real, field.name) <= getattr(most, field.name), field.name
    assert purse(tmp_path / "storage").spent == sent.micro_usd
    assert (purse(tmp_path / "storage").unsettled, purse(tmp_path / "storage").reserved) == (0, 0)


def test_the_probes_of_scores_of_single_images_are_counted(words: Words, tmp_path: Path) -> None:
    used = words("methods=[zero_shot]")
    text = (tmp_path / "api.yaml").read_text().replace("images: 7, texts: 4", "images: 1, texts: 1")
    (tmp_path / "api.yaml").write_text(text.replace("TEXT+PIXELS+FEATURES", "TEXT+SCORES"))
    run(used)
    of_images = 60  # one for each test image
    assert total_of(tmp_path / "storage").calls - of_images == SendPlan(compose(used)).probes(0).calls


def test_images_are_counted_once_for_all_methods_of_a_draw(words: Words) -> None:
    names = ("zero_shot", "gda", "taskres", "zero_shot,gda,taskres")
    *single, joint = (bound(words(f"methods=[{name}]")) for name in names)
    test_images, views_of_the_draw, probes = 60, 10 * (2 + 1) + 10, 4
    assert joint.images == test_images + views_of_the_draw + probes < sum(sent.images for sent in single)
    assert bound(words("offline=true")) == Sent()


def test_a_plan_that_may_cost_more_is_refused_before_the_first_call(
    words: Words, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = call(f"{url}/v1/count")[1]
    dollars = bound(words()).micro_usd / 1e6
    for verb in ("plan", "run"):
        assert main([verb, *words(f"budget.usd={dollars - 0.001:.6f}")]) == 2
        out, err = capsys.readouterr()
        assert "asked of account" in err and err.splitlines()[-1].startswith("farebox: $")
        if verb == "plan":
            assert "prices of 2026-11-01" in out and f"${dollars:.6f}".rstrip("0") in out
    assert call(f"{url}/v1/count")[1] == before
    assert main(["plan", *words(f"budget.usd={dollars:.6f}")]) == 0


def test_a_plan_states_the_hours_that_the_slowest_limit_implies(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    hours = []
    for lines in ((), ("rate: {requests_per_minute: 1000, images_per_minute: 2}",)):
        assert main(["plan", *words(lines=lines)]) == 0
        total = [line for line in capsys.readouterr().out.splitlines() if line.startswith("total")][-1]
        assert "no price" in total
        hours.append(total.rsplit("  ", 1)[-1])
    assert hours == ["no rate", f"{bound(words()).images / 2 / 60:.2f}"]


@pytest.mark.parametrize(
    ("more", "lines", "says"),
    [
        (("budget.usd=1",), (), "has no price: add price:"),
        (("budget.global.usd=1", "budget.global.name=team"), (), "budget.global.usd limits money, and the card"),
        (("budget.global.usd=1",), (PRICE,), "of a budget without a name"),
        (("budget.usd=-1",), (PRICE,), "expected an amount of dollars"),
        (("budget.usd=1e3",), (PRICE,), "expected an amount of dollars"),
        (("budget.usd=0.0000001",), (PRICE,), "at most six decimals"),
        (("budget.usd=1", "model=fake"), (), "budget.usd limits money, and model fake costs none"),
    ],
)
def test_a_limit_without_a_meaning_is_refused(
    words: Words,
    tmp_path: Path,
    more: tuple[str, ...],
    lines: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb in ("plan", "run"):
        assert main([verb, *words(*more, lines=lines)]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "storage" / "ledger.db").exists()


def test_a_run_ends_at_its_limit_and_continues_with_a_higher_one(words: Words, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    by_image = ("price: {usd_per_image: 0.001, as_of: 2026-11-01}",)
    with serving("model=fake", "fault.drop_every=3") as faulty:  # a lost call counts with its upper bound
        limit = bound(words(at=faulty, lines=by_image)).micro_usd
        limited = words(f"budget.usd={limit / 1e6:.6f}", at=faulty, lines=by_image)
        ends = 0
        for _ in range(50):
            try:
                run(limited)
                break
            except (EndpointStopped, BudgetExceeded) as error:
                assert "asked of account 'sweep:" in str(error)
                ends += 1
                spent = purse(storage)
                assert spent.limit is not None and spent.spent <= spent.limit and spent.reserved == 0
                limit += 20_000
                limited = words(f"budget.usd={limit / 1e6:.6f}", at=faulty, lines=by_image)
        rows = [outcome(row) for row in rows_of(storage)]
        assert ends and len(rows) == 3
    paid = purse(storage)
    assert paid.spent <= limit and paid.spent == total_of(storage).micro_usd
    other = tmp_path / "other"
    run([*words(), f"storage={other}", f"records={tmp_path / 'records of its own'}"])
    differ = ("usd", "http_", "uncertain", "device", "model_digest", "trial_id")  # another address
    for a, b in zip(rows, [outcome(row) for row in rows_of(other)], strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(differ)} == {
            k: v for k, v in b.items() if not k.startswith(differ)
        }


def test_with_a_partial_budget_the_trials_that_fit_are_run(words: Words, tmp_path: Path) -> None:
    whole, first = bound(words()).micro_usd, bound(words("methods=[zero_shot]")).micro_usd
    usd = (whole + first) // 2 / 1e6
    with pytest.raises(ConfigError, match="asked of account"):  # in one process, unfunded trials are an error
        run(words(f"budget.usd={usd:.6f}", "budget.partial=true"))
    assert purse(tmp_path / "storage").spent == 0


def test_status_and_ledger_show_dollars_and_warn(words: Words, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    run(words())
    spent = purse(storage).spent
    run(words(f"budget.usd={(spent + 100) / 1e6:.6f}", "methods=[zero_shot]"))
    for verb in ("status", "ledger"):
        text = here(verb, f"storage={storage}")
        assert f"${spent / 1e6:.6f}".rstrip("0") + " spent, $0.00 reserved, $0.0001 left of" in text
        assert "warning: " in text and "% of the money" in text
        (record,) = json.loads(here(verb, f"storage={storage}", "--json"))["money"]
        assert record["settled"] == spent / 1e6 and record["limit"] == (spent + 100) / 1e6


def test_a_warning_is_printed_from_four_fifths() -> None:
    assert ["warning" in " ".join(money_lines([PurseRecord("team", 100, n, 0, 0)])) for n in (79, 80)] == [False, True]
    assert money_lines([PurseRecord("team", None, 0, 0, 0)]) == []


def test_a_shared_budget_limits_the_money_of_two_sweeps(words: Words, tmp_path: Path) -> None:
    shared = [f"budget.global.url=sqlite:///{tmp_path / 'shared.db'}", "budget.global.name=team"]
    limit = bound(words("methods=[zero_shot]")).micro_usd
    run([*words("methods=[zero_shot]"), *shared, f"budget.global.usd={limit / 1e6:.6f}"])
    other = [f"storage={tmp_path / 'other'}", f"records={tmp_path / 'own'}"]
    with pytest.raises(BudgetExceeded, match="asked of account 'team'"):
        run([*words("methods=[zero_shot]"), *other, *shared])
    with pytest.raises(ConfigError, match="farebox budget set team usd="):
        run([*words("methods=[zero_shot]"), *other, *shared, "budget.global.usd=7"])
    assert main(["budget", "set", "team", "usd=9", f"url=sqlite:///{tmp_path / 'shared.db'}"]) == 0
    run([*words("methods=[zero_shot]"), *other, *shared])
    ledger = Ledger(f"sqlite:///{tmp_path / 'shared.db'}")
    by_name = {p.name: p for p in ledger.money.purses()}
    assert by_name["team"].spent == sum(p.spent for name, p in by_name.items() if name != "team") > 0
    assert by_name["team"].limit == 9_000_000 and ledger.verify() == []
    ledger.close()
