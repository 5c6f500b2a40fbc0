"""When eps is called dead or coarse, and when it is not."""

import numpy as np
import pytest

from zo_offload.eps_watch import WINDOW, EpsWatch, Finding, is_stepwise, spacing


def fp32(value: float) -> float:
    return float(np.float32(value))


def smooth(eps: float, steps: int = WINDOW, slope: float = 3.0) -> Finding | None:
    """Losses of fp32 whose difference is ``2 eps slope z`` before it is rounded."""
    generator, watch = np.random.default_rng(0), EpsWatch(eps)
    for step in range(steps):
        loss, g = 0.7 + 0.1 * generator.standard_normal(), slope * generator.standard_normal()
        losses = [fp32(loss + eps * g), fp32(loss - eps * g)]
        watch.observe(step, losses, [(losses[0] - losses[1]) / (2 * eps)])
    return watch.finding


@pytest.mark.parametrize(
    ("eps", "kind"), [(1e-3, None), (1e-5, None), (1e-8, "coarse"), (1e-11, "dead")]
)
def test_kinds_by_eps(eps: float, kind: str | None):
    found = smooth(eps)
    assert (found.kind if found else None) == kind


def test_the_line_has_numbers_and_the_mend():
    found = smooth(1e-8)
    assert found is not None
    assert "eps 1e-08" in found.text
    assert "6e-08 apart" in found.text
    assert "raise eps" in found.text
    assert "\n" not in found.text


def test_nothing_is_said_before_there_are_enough_steps():
    assert smooth(1e-11, WINDOW - 1) is None
    assert smooth(1e-11, WINDOW + 30).step == WINDOW - 1  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("rows", [4, 16, 64])
@pytest.mark.parametrize(
    ("equal_at_first", "equal_later", "kind"),
    [(0.5, 0.5, None), (0.5, 1.0, None), (1.0, 0.5, "flat"), (1.0, 1.0, "flat")],
)
def test_an_accuracy_is_coarse_by_nature_but_must_change_at_first(
    rows: int, equal_at_first: float, equal_later: float, kind: str | None
):
    generator, watch = np.random.default_rng(rows), EpsWatch(1e-3)
    for step in range(3 * WINDOW):
        hits = int(generator.integers(rows // 2, rows))
        share = equal_at_first if step < WINDOW else equal_later
        other = hits if generator.random() < share else hits - 1
        losses = [fp32(1 - hits / rows), fp32(1 - other / rows)]
        watch.observe(step, losses, [losses[0] - losses[1]])
    found = watch.finding
    assert (found.kind if found else None) == kind
    assert found is None or (found.step == WINDOW - 1 and "20 of 20 pairs" in found.text)


def test_nothing_to_learn_is_not_flat():
    watch = EpsWatch(1e-3)
    for step in range(WINDOW):
        watch.observe(step, [0.0, 0.0], [0.0])
    assert watch.finding is None


def test_few_values_beyond_small_quotients_are_not_taken_for_rounding():
    generator, watch = np.random.default_rng(1), EpsWatch(1e-3)
    for step in range(3 * WINDOW):  # an F1 of many tokens, mostly the same for both signs
        loss = fp32(generator.random())
        losses = [loss, loss if step % 3 else fp32(loss + 0.01)]
        watch.observe(step, losses, [losses[0] - losses[1]])
    assert watch.finding is None


def test_double_precision_resolves_more():
    for significand, kind in ((24, "coarse"), (53, None)):
        watch = EpsWatch(1e-9, significand=significand)
        for step in range(WINDOW):
            losses = [0.70131 + 0.01 * step + 1e-9, 0.70131 + 0.01 * step]
            watch.observe(step, losses, [0.5])
        assert (watch.finding.kind if watch.finding else None) == kind


def test_one_sided_probes_are_compared_with_each_other():
    watch = EpsWatch(1e-9, num_signs=1)
    for step in range(WINDOW):
        watch.observe(step, [0.7131 + step] * 4, [0.0] * 4)
    assert watch.finding is not None
    assert watch.finding.kind == "dead"


def test_rounding_that_was_measured_drowns_what_is_left_of_the_signal():
    for noise, kind in ((1e-4, None), (3e-3, "noisy")):
        generator, watch = np.random.default_rng(2), EpsWatch(1e-3, noise=noise)
        for step in range(WINDOW):
            loss = 0.7 + 0.1 * generator.standard_normal()
            watch.observe(step, [loss, loss + 4e-3 * generator.standard_normal()], [1.0])
        assert (watch.finding.kind if watch.finding else None) == kind


def test_a_step_that_moves_ends_a_row_of_dead_ones():
    watch = EpsWatch(1e-3)
    for step in range(10 * WINDOW):
        loss = 0.6931 + 0.001 * step
        moves = step % WINDOW == 0
        watch.observe(step, [loss, loss + 0.01 * moves], [float(moves)])
    assert watch.finding is None


def test_losses_that_are_no_numbers_are_passed_over():
    watch = EpsWatch(1e-3)
    for step in range(2 * WINDOW):
        watch.observe(step, [float("nan"), 0.7], [0.0])
    assert watch.finding is None


def test_spacing_is_that_of_the_format():
    for value in (0.3, 1.0, 1.5, 700.0, 1e-30):
        assert spacing(value) == float(np.spacing(np.float32(value)))
        assert spacing(value, 53) == pytest.approx(float(np.spacing(value)), abs=1e-44)


def test_quotients_of_small_integers():
    assert is_stepwise([fp32(1 / 3), 0.0, 1.0, fp32(7 / 16)])
    assert not is_stepwise([fp32(1 / 3), fp32(np.pi / 4)])
