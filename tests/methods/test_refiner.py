"""The refiner's loss against values worked out by hand, and its life through a pickle."""

import math
import pickle

import pytest
import torch

from methods._refiner import Refiner, kl_divergence

LN3 = math.log(3.0)


def make(**settings: float) -> Refiner:
    return Refiner(2, Refiner.Config(**settings), torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def constant_net(refiner: Refiner, out: list[float]) -> Refiner:
    """Make net(anything) = out."""
    with torch.no_grad():
        refiner.w2_HC.zero_()
        refiner.b2_C.copy_(torch.tensor(out))
    return refiner


def test_kl_by_hand_and_its_direction() -> None:
    # p = (1/2, 1/2), q = (3/4, 1/4)
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[LN3, 0.0]])
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    backward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert abs(forward - backward) > 0.01
    assert kl_divergence(p, q).item() == pytest.approx(forward, abs=1e-6)
    assert kl_divergence(q, p).item() == pytest.approx(backward, abs=1e-6)


def test_kl_is_a_mean_over_images_for_each_prompt_set() -> None:
    same, other = [0.0, 0.0], [LN3, 0.0]
    p_PBC = torch.tensor([[same, same], [same, same]])
    q_PBC = torch.tensor([[other, same], [other, other]])
    one = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl_divergence(p_PBC, q_PBC).tolist() == pytest.approx([one / 2, one], abs=1e-6)


def test_loss_is_ce_of_the_refined_plus_weighted_kl_from_raw_to_refined() -> None:
    refiner = constant_net(make(kl_weight=0.1), [LN3, 0.0])
    raw, labels = torch.tensor([[0.0, 0.0], [-LN3, 0.0]]), torch.tensor([1, 0])
    # refined probabilities: (3/4, 1/4) and (1/2, 1/2); raw: (1/2, 1/2) and (1/4, 3/4)
    ce = (-math.log(1 / 4) - math.log(1 / 2)) / 2
    kl_0 = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    kl_1 = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert torch.allclose(refiner.refine(raw), torch.tensor([[LN3, 0.0], [0.0, 0.0]]), atol=1e-6)
    assert refiner.loss(raw, labels).item() == pytest.approx(ce + 0.1 * (kl_0 + kl_1) / 2, abs=1e-6)
    assert refiner.loss(raw, labels, kl=False).item() == pytest.approx(ce, abs=1e-6)


def test_gradient_of_the_output_bias_by_hand() -> None:
    # d CE / d refined = q - onehot; d KL(raw || refined) / d refined = q - p
    refiner = constant_net(make(kl_weight=0.5), [LN3, 0.0])
    refiner.loss(torch.zeros(1, 2), torch.tensor([1])).backward()
    expected = [(0.75 - 0) + 0.5 * (0.75 - 0.5), (0.25 - 1) + 0.5 * (0.25 - 0.5)]
    assert refiner.b2_C.grad is not None
    assert refiner.b2_C.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_sizes_and_the_range_of_the_first_weights() -> None:
    refiner = Refiner(100, Refiner.Config(hidden=256), torch.Generator().manual_seed(3))
    assert refiner.n_params == 2 * 100 * 256 + 256 + 100
    for weight, bound in ((refiner.w1_CH, 0.1), (refiner.b1_H, 0.1), (refiner.w2_HC, 1 / 16), (refiner.b2_C, 1 / 16)):
        assert weight.abs().max().item() <= bound
        assert weight.abs().max().item() > 0.9 * bound
        assert abs(weight.mean().item()) < 0.15 * bound


def test_first_step_of_adam_moves_by_the_learning_rate() -> None:
    refiner = constant_net(make(lr=0.01), [0.0, 0.0])
    refiner.train_epoch(torch.zeros(3, 2), torch.tensor([0, 0, 0]), torch.Generator().manual_seed(0))
    assert refiner.b2_C.tolist() == pytest.approx([0.01, -0.01], rel=1e-4)


def test_every_image_is_seen_once_an_epoch_the_short_batch_too() -> None:
    refiner, seen = make(batch_size=4), []
    loss = refiner.loss
    refiner.loss = lambda raw, labels, kl: (seen.append(raw[:, 0]), loss(raw, labels, kl))[1]  # type: ignore
    raw = torch.stack([torch.arange(10.0), torch.zeros(10)], dim=1)
    refiner.train_epoch(raw, torch.zeros(10, dtype=torch.long), torch.Generator().manual_seed(0))
    assert [len(s) for s in seen] == [4, 4, 2]
    assert sorted(torch.cat(seen).tolist()) == list(range(10))
    assert torch.cat(seen).tolist() != list(range(10))


def test_a_pickled_refiner_trains_on_as_the_first_does() -> None:
    raw, labels = torch.randn(20, 2, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2
    one, g1 = make(batch_size=8), torch.Generator().manual_seed(5)
    one.train_epoch(raw, labels, g1)
    two, g2 = pickle.loads(pickle.dumps((one, g1)))
    assert all(a is b for a, b in zip(two.optimizer.param_groups[0]["params"], two.weights(), strict=True))
    before = two.b2_C.clone()
    one.train_epoch(raw, labels, g1)
    two.train_epoch(raw, labels, g2)
    assert not torch.equal(before, two.b2_C)
    assert all(torch.equal(a, b) for a, b in zip(one.weights(), two.weights(), strict=True))
