"""A study says what its seeds show: scipy's numbers, the power it planned for, and no more than the interval."""

import gc
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from ecanet.study.conclusions import next_step, verdict
from ecanet.study.statistics import (
    detectable,
    fewest_seeds,
    holm,
    paired_difference,
    plan,
    power,
    seeds_needed,
    sign_flip_p,
    smallest_p,
    summarise,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def made_up(seeds: int, conditions: int = 3) -> dict[str, dict[int, float]]:
    """Metrics of conditions whose seeds have an effect in common."""
    chance = np.random.default_rng(seeds)
    common = chance.normal(90, 1, seeds)
    return {
        name: dict(enumerate((common + chance.normal(0.2 * i, 0.3, seeds)).tolist()))
        for i, name in enumerate(["none", "eca", "se", "gct", "srm"][:conditions])
    }


@pytest.mark.parametrize("seeds", [2, 3, 9, 13, 25])
def test_every_number_of_a_summary_is_what_scipy_and_statsmodels_say(seeds: int) -> None:
    values = made_up(seeds)
    summary = summarise(values, "top1")
    assert (summary.baseline, summary.metric) == ("none", "top1")
    found = []
    for name in ("eca", "se"):
        row, a, b = summary.conditions[name], list(values[name].values()), list(values["none"].values())
        differences = np.subtract(a, b)
        tested = stats.ttest_rel(a, b)
        interval = tested.confidence_interval(0.95)
        flips = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=np.inf if seeds <= 20 else 99_999,
            rng=np.random.default_rng(0),
        )
        told = [row.difference, row.low, row.high, row.mean, row.std]
        want = [differences.mean(), interval.low, interval.high, np.mean(a), np.std(a, ddof=1)]
        np.testing.assert_allclose(told, want, **EXACT)
        np.testing.assert_allclose(row.effect, tested.statistic / math.sqrt(seeds), **EXACT)
        # Beyond 20 seeds the flips of both conditions are drawn together, and only their number is the same.
        assert row.p is not None
        np.testing.assert_allclose(row.p, flips.pvalue, **(EXACT if seeds <= 20 else {"atol": 0.01}))
        found.append(row.p)
    corrected = multipletests(found, method="holm")[1]
    np.testing.assert_allclose([summary.conditions[name].p_holm for name in ("eca", "se")], corrected, **EXACT)


def test_the_interval_of_many_seeds_is_students_too() -> None:
    """A table of quantiles ends somewhere."""
    differences = np.random.default_rng(0).normal(0.1, 1, 60).tolist()
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    found = paired_difference(differences)
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high], **EXACT)


DESIGNS = {"one comparison": (1, 1.0), "one comparison, few seeds": (1, 1.6), "three comparisons": (3, 1.5)}


@pytest.mark.parametrize(("comparisons", "effect"), DESIGNS.values(), ids=DESIGNS)
def test_500_studies_find_a_planted_effect_as_planned_and_false_ones_at_the_level(
    comparisons: int, effect: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # statsmodels calls it each time
    chance, spread = np.random.default_rng(1), 0.4
    seeds = seeds_needed(effect * spread, spread, comparisons)
    assert seeds is not None
    assert power(effect, seeds, comparisons) >= 0.8
    baseline = chance.normal(91, 0.7, (500, 1, seeds))
    nothing = baseline + chance.normal(0, spread, (500, comparisons, seeds))
    planted = nothing.copy()
    planted[:, 0] += effect * spread
    found, false = (
        np.array([[p <= 0.05 for p in holm(row)] for row in sign_flip_p(values - baseline)])
        for values in (planted, nothing)
    )
    assert found[:, 0].mean() >= 0.75
    assert found[:, 1:].any(axis=1).mean() <= 0.07
    assert false.any(axis=1).mean() <= 0.07


def test_the_power_is_not_more_than_the_test_has_down_to_the_fewest_seeds() -> None:
    chance = np.random.default_rng(2)
    for comparisons in (1, 3, 9):
        for seeds in range(fewest_seeds(comparisons), fewest_seeds(comparisons) + 5):
            effect = detectable(seeds, comparisons)
            assert effect is not None
            p = sign_flip_p(chance.normal(effect, 1, (400, seeds)))
            # 400 studies tell a share of 0.8 within 0.06 (three standard errors).
            assert (p <= 0.05 / comparisons).mean() >= 0.8 - 0.06


def test_the_fewest_seeds_are_those_with_which_holm_can_be_passed() -> None:
    assert [fewest_seeds(m) for m in (1, 2, 9)] == [6, 7, 9]
    for comparisons in (1, 2, 5, 9, 20):
        seeds = fewest_seeds(comparisons)
        for n, passes in ((seeds, True), (seeds - 1, False)):
            best = float(sign_flip_p(np.linspace(1, 2, n)))
            assert best == smallest_p(n)
            assert (holm([best] + [1.0] * (comparisons - 1))[0] <= 0.05) is passes
            assert (detectable(n, comparisons) is not None) is passes


def test_seeds_needed_are_the_fewest_that_have_the_power() -> None:
    for comparisons in (1, 9):
        for effect in (0.05, 0.3, 0.9, 2.0, 50.0):
            seeds = seeds_needed(effect, 1.0, comparisons)
            assert seeds is not None
            assert power(effect, seeds, comparisons) >= 0.8 > power(effect, seeds - 1, comparisons)
    assert seeds_needed(0.1, 0.0) == 6
    assert seeds_needed(0.1, 1e6) is None


@pytest.mark.parametrize(("difference", "spread"), [(0, 1), (-0.1, 1), (0.1, -1), (math.nan, 1), (0.1, math.nan)])
def test_a_difference_or_a_spread_that_is_none_is_refused(difference: float, spread: float) -> None:
    with pytest.raises(ValueError, match="difference must be above 0 and spread 0 or more, got "):
        seeds_needed(difference, spread)


def test_a_plan_says_what_a_study_cannot_show_and_what_would_do() -> None:
    assert plan(1, 3) == "One condition: nothing is compared."
    said = plan(10, 8, spread=0.5)
    assert said.startswith("8 seeds cannot show a difference at 0.05: ")
    assert "is 0.0078, and 9 comparisons with the baseline need 0.0056 or less" in said
    assert said.endswith("takes 9 seeds.")
    shown = detectable(9, 3)
    assert shown is not None
    said = plan(4, 9, spread=0.5)
    assert f"a difference of {shown:.2g} standard deviations" in said
    assert f", {shown / 2:.2g} at the spread seen so far (0.5)" in said


def test_seeds_that_only_one_of_two_finished_do_not_count() -> None:
    values = {"none": {0: 80.0, 1: 81.0, 2: 82.0}, "eca": {1: 82.0, 2: 84.0, 7: 10.0}, "se": {}}
    rows = summarise(values, "top1").conditions
    assert (rows["eca"].seeds, rows["eca"].mean, rows["eca"].difference) == (2, 83.0, 1.5)
    assert (rows["none"].seeds, rows["se"].seeds, rows["se"].mean, rows["se"].p) == (3, 0, None, None)
    assert "se: no seed has finished runs of both se and none." in verdict(summarise(values, "top1"))


def test_a_condition_without_enough_seeds_counts_in_holms_correction_and_hides_no_limit_of_the_others() -> None:
    nine = {seed: 80.0 + seed for seed in range(9)}
    higher = {seed: value + 1 + 0.01 * seed for seed, value in nine.items()}
    for seeds in (0, 1):
        summary = summarise({"none": nine, "eca": higher, "se": dict(list(higher.items())[:seeds])}, "top1")
        row = summary.conditions["eca"]
        assert (row.p, row.p_holm) == (2**-8, 2 * 2**-8)
        said = verdict(summary)
        assert "Each interval covers the true difference in 95 of 100 such studies." in said
        assert ("One seed gives no spread, so nothing can be read into its difference." in said) is (seeds == 1)
        assert ("1 seed cannot show a difference" in said) is (seeds == 1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_summary_is_plain_json_whatever_the_numbers_are(seeds: int) -> None:
    same = dict.fromkeys(range(seeds), 0.5)
    document = json.loads(json.dumps(asdict(summarise({"none": same, "eca": same}, "mAP")), allow_nan=False))
    assert document["conditions"]["eca"]["effect"] is None, "the differences have no spread"
    assert document["conditions"]["eca"].keys() == document["conditions"]["none"].keys()
    assert list(document["conditions"]["eca"]["seeds_needed"]) == ["0.1", "0.3", "1.0"]


def test_the_verdict_says_a_difference_is_there_only_if_interval_and_corrected_p_do() -> None:
    chance = np.random.default_rng(0)
    for seeds in (2, 3, 6, 7, 10):
        for shift in (0.0, 0.3, 0.6, 1.0, -0.5, -2.0):
            base = chance.normal(80, 1, seeds)
            values = {
                "none": base,
                "a": base + chance.normal(shift, 0.5, seeds),
                "b": base + chance.normal(0, 1, seeds),
            }
            summary = summarise({name: dict(enumerate(row.tolist())) for name, row in values.items()}, "top1")
            for line, name in zip(verdict(summary).splitlines(), "ab", strict=False):
                row = summary.conditions[name]
                assert row.low is not None
                assert row.high is not None
                assert row.p_holm is not None
                shown = row.low * row.high > 0 and row.p_holm <= 0.05
                assert ("so no difference is shown" in line) is not shown
                assert (f"it is {'higher' if row.low > 0 else 'lower'} on this data" in line) is shown
    assert "7 seeds, p 0.016, 0.031 after Holm's correction" in verdict(
        summarise({"none": dict.fromkeys(range(7), 0.0)} | {n: {i: 1.0 + i for i in range(7)} for n in "ab"}, "x")
    )


def test_the_next_step_is_more_seeds_only_where_they_could_show_more() -> None:
    def after(seeds: int, shift: float, spread: float, failed: int = 0, given: Sequence[int] = ()) -> str:
        noise = [spread * (-1) ** i for i in range(seeds)]
        base = dict.fromkeys(range(seeds), 80.0)
        found = summarise({"none": base, "a": {i: 80 + shift + n for i, n in enumerate(noise)}}, "top1")
        return next_step(found, given or range(seeds + failed))

    failed = summarise({"none": dict.fromkeys(range(9), 80.0), "a": {}, "b": dict.fromkeys(range(9), 81.0)}, "top1")
    assert next_step(failed, range(9)).startswith("next: mend what makes every run of a fail, delete the files")
    assert "every run of none fail" in next_step(summarise({"none": {}, "a": {0: 1.0}}, "top1"), range(9))
    assert "--seeds 6; finished runs are not repeated, and fewer can show nothing" in after(5, 3.0, 0.1)
    assert "--seeds 8; finished runs are not repeated, and fewer can show nothing" in after(5, 3.0, 0.1, failed=2)
    assert f"--seeds {seeds_needed(1.0, float(np.std([1, -1] * 5, ddof=1))) + 1}; " in after(10, 0.0, 1.0, failed=1)
    assert "with 6 seeds in its file; finished runs are not repeated" in after(5, 3.0, 0.1, given=[3, 4, 5, 6, 7])
    unclear = after(10, 0.0, 1.0)
    spread = float(np.std([(-1.0) ** i for i in range(10)], ddof=1))
    assert f"--seeds {seeds_needed(1.0, spread)}; " in unclear
    assert "a difference of 1 is shown in 80 of 100 cases" in unclear
    assert "ecanet validate" in after(10, 3.0, 0.1) == after(8, -3.0, 0.1), "it is shown"


def test_small_metrics_are_told_with_the_digits_of_their_margin() -> None:
    values = {"none": {i: 0.5 + 1e-4 * i for i in range(8)}, "eca": {i: 0.502 + 1e-4 * i * (-1) ** i for i in range(8)}}
    said = verdict(summarise(values, "mAP"))
    row = summarise(values, "mAP").conditions["eca"]
    assert f"eca is {row.difference:.5f} above none (95 % interval {row.low:+.5f} to {row.high:+.5f}, 8 seeds" in said
    rounding = {"none": {0: 0.0, 1: 1.0}, "eca": {0: 0.1, 1: 1.1}}  # 1.1 - 1.0 is not quite 0.1
    assert verdict(summarise(rounding, "mAP")).startswith("eca is 0.10 above none (95 % interval +0.10 to +0.10, 2 se")


def test_without_scipy_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['scipy'] = None; import ecanet.study; ecanet.study.summarise"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ImportError: ecanet.study needs scipy: pip install 'ecanet[study]'"
