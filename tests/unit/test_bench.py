"""Benches: what is timed gives the answers of what it is compared with, and the command finds and prints them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from methods.craft import CraFT
from methods.optim import epoch_view
from pipeline.bench import craft
from pipeline.config import model_card
from pipeline.data.images import Images


@pytest.mark.parametrize("shots", [1, 4])
def test_a_craft_trial_has_the_fitness_of_the_papers_loop(tmp_path: Path, shots: int) -> None:
    sides, task = craft.Sides(model_card("tiny"), tmp_path), craft.task(shots, first=3)
    found = sides.trial(task, seed=5)
    loop, c = sides.loop(task, seed=5), CraFT.Config()
    loop.start()
    for generation, fitness_P in enumerate(found):
        view = epoch_view(task, generation)
        assert isinstance(view, Images)
        in_force = (generation + 1) * c.n <= craft.GENERATIONS
        wanted = loop.generation(view, c.weight if in_force else 0.0)
        assert len(fitness_P) == 40 and fitness_P.std() > 1e-3, "a fitness that tells candidates apart"
        torch.testing.assert_close(fitness_P, wanted, rtol=0, atol=1e-4)
    assert len(found) == craft.GENERATIONS
    sides.ledger.close()
