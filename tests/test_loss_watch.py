"""What is seen in the losses of a run, and what is not taken for it."""

import math
import random
from collections.abc import Sequence

import pytest

from zo_offload.config_guard import GuardConfig
from zo_offload.journal import Flags, Journal, Probe, Record
from zo_offload.loss_watch import LossWatch

WINDOW = 20


def step(number: int, loss: float, skipped: bool = False, branch: int = 0) -> Record:
    flags = Flags.SKIPPED if skipped else Flags.NONE
    probes = (Probe(0, 1.0, 1e-3),)
    return Record(number, probes, (loss, loss), 1e-3, 1e-3, flags=flags, branch=branch)


def watch(losses: Sequence[float], **settings: float) -> LossWatch:
    config = GuardConfig.model_validate({"window": WINDOW, **settings})
    return LossWatch(config, [step(number, loss) for number, loss in enumerate(losses)])


def noisy(count: int, level: float, spread: float = 0.1, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(level, spread) for _ in range(count)]


def test_a_loss_far_above_those_before_it_explodes():
    found = watch(noisy(WINDOW, 0.7)).explosion(9.0)
    assert found is not None
    assert found.kind == "explosion"
    assert found.text.startswith("the loss is 9, and those of the steps before it are 0.6")


@pytest.mark.parametrize("loss", [0.7, 1.5, 0.0, -9.0])
def test_a_usual_loss_or_a_lower_one_does_not(loss: float):
    assert watch(noisy(WINDOW, 0.7)).explosion(loss) is None


def test_of_the_first_losses_only_what_is_many_times_as_large_explodes():
    assert watch([]).explosion(1e9) is None
    assert watch([0.7]).explosion(7.0) is None
    assert watch([0.7]).explosion(8.0) is not None


def test_losses_that_rise_from_the_beginning_diverge():
    rising = [0.7 * 1.5**t for t in range(12)]
    assert watch(rising[:4]).divergence() is None
    found = watch(rising).divergence()
    assert found is not None
    assert found.good in (0, 1, 2)


def test_heavy_tails_are_no_divergence():
    for seed in range(20):
        generator = random.Random(seed)
        assert (
            watch([generator.expovariate(1.0) for _ in range(400)], window=50).divergence() is None
        )
        tails = [generator.lognormvariate(0.0, 1.0) for _ in range(400)]
        assert watch(tails, window=50).divergence() is None


def test_what_the_first_steps_said_is_forgotten():
    """One small loss, or one large one, sets no measure for the run."""
    assert watch([0.01, *noisy(200, 0.7)]).divergence() is None
    assert watch([100.0, *noisy(200, 0.7)]).explosion(5.0) is not None


def test_noise_of_any_seed_is_no_alarm():
    for seed in range(50):
        seen = watch(noisy(200, 0.7, seed=seed))
        assert seen.divergence() is None
        assert all(seen.explosion(loss) is None for loss in noisy(50, 0.7, seed=seed + 1000))


def test_one_bad_loss_is_no_divergence():
    assert watch([*noisy(60, 0.7), 1e6, *noisy(20, 0.7, seed=1)]).divergence() is None


def test_losses_that_rise_and_stay_diverge_and_the_lowest_window_was_good():
    falling = [1.0 - 0.01 * t for t in range(60)]
    seen = watch([*falling, *noisy(WINDOW, 5.0)])
    found = seen.divergence()
    assert found is not None
    assert found.kind == "divergence"
    assert found.good == 59
    assert "up to step 59" in found.text


def test_losses_that_fall_do_not_diverge():
    assert watch([5.0 - 0.04 * t for t in range(100)]).divergence() is None


def test_losses_that_are_all_equal_make_no_alarm_of_a_small_change():
    assert watch([0.7] * 60).explosion(0.9) is None
    assert watch([0.0] * 60).explosion(0.1) is None
    assert watch([0.7] * 40 + [0.75] * 40).divergence() is None


def test_the_good_step_is_the_newest_one_that_is_not_above_the_usual():
    losses = [*([0.7, 0.8] * 20), 0.7, 1.4, 1.6]
    assert watch(losses).good() == 40
    assert watch([0.7, math.nan]).good() == 0
    assert watch([math.nan]).good() is None
    assert watch([]).good() is None


def test_steps_that_were_skipped_count_for_nothing():
    records = [step(t, loss) for t, loss in enumerate(noisy(WINDOW, 0.7))]
    records += [step(WINDOW + t, 1e6, skipped=True) for t in range(WINDOW)]
    seen = LossWatch(GuardConfig(window=WINDOW), records)
    assert seen.divergence() is None
    good = seen.good()
    assert good is not None
    assert good < WINDOW
    assert seen.explosion(9.0) is not None


def test_a_branch_forgets_what_it_took_back():
    journal = Journal.memory({})
    seen = LossWatch(GuardConfig(window=WINDOW), journal.records)
    for t, loss in enumerate([*noisy(WINDOW, 0.7), *noisy(2 * WINDOW, 5.0)]):
        journal.append(step(t, loss))
    assert seen.divergence() is not None
    journal.rewind(WINDOW)
    assert seen.divergence() is None
    journal.append(step(WINDOW, 0.7, branch=1))
    assert seen.good() is not None


def test_it_is_the_same_whether_steps_are_seen_as_they_come_or_at_once():
    losses = [*noisy(70, 0.7), *noisy(31, 3.0)]
    records: list[Record] = []
    seen = LossWatch(GuardConfig(window=WINDOW), records)
    found = []
    for t, loss in enumerate(losses):
        records.append(step(t, loss))
        found.append(seen.divergence())
    assert found[-1] == watch(losses).divergence()
    assert found[-1] is not None
