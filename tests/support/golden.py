"""Golden values of every method on the toy task: `make golden` writes them, tests/methods/test_golden.py reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from methods import all_methods
from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Remaining

FOLDER = Path(__file__).resolve().parents[1] / "methods" / "golden"
ALLOTMENT = Remaining(requests=300, images=20_000)
SETTINGS: dict[str, dict[str, float]] = {
    "blackvip": {"perturbation": 0.3},
    "vp_spsa": {"perturbation": 0.3, "lr": 0.5},
}
"""Settings in place of the defaults, under which an 8-bit value that rounds otherwise on another processor changes the
result by less than the test's tolerance."""


def record(name: str) -> dict[str, Any]:
    """What method `name` does with seed 0: its bill, what it noted, its accuracy and first logits."""
    torch.set_num_threads(1)
    info = all_methods()[name]
    task, test = toy_task()
    method, box = info.cls(info.cls.Config(**SETTINGS.get(name, {}))), ToyBox(info.access, ALLOTMENT)
    steps = fit(method, task, box, seed=0)
    bill = box.bill
    box.allotment = Remaining()
    logits = method.predict(test.images, box)
    return {
        "version": info.version,
        "steps": steps,
        "requests": bill.requests,
        "images": bill.images,
        "prompts": bill.prompts,
        "outputs": bill.outputs,
        "trainable_params": method.trainable_params,
        "notes": method.notes,
        "accuracy": round(100 * float((logits.argmax(1) == test.labels).double().mean()), 6),
        "logits": [[round(float(x), 4) for x in row] for row in logits[::25]],
    }


def main() -> None:
    """Write every method's file anew."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name in all_methods():
        (FOLDER / f"{name}.json").write_text(json.dumps(record(name), indent=1) + "\n")


if __name__ == "__main__":
    main()
