"""The checker as its users meet it: one call, one error, one pytest test per check."""

from __future__ import annotations

import pytest
import torch

from leantrain.errors import UsageError
from leantrain.testing import (
    OPTIMIZER_CHECKS,
    OptimizerCase,
    check_optimizer,
    optimizer_checks,
    parametrize_with_checks,
    run_checks,
)

pytest_plugins = ["pytester"]
SGD = OptimizerCase(name="SGD", optimizer_class=torch.optim.SGD, settings={"lr": 0.1})


def test_all_failures_are_in_one_error_with_their_reasons():
    with pytest.raises(AssertionError) as caught:
        check_optimizer(
            torch.optim.SGD,
            {"lr": 0.1},
            knobs={"lr": 0.2, "dampening": 0.5},  # without momentum there is nothing to dampen
            bad=[({"lr": 0.3}, "lr")],
            trains_below=0.0,
        )
    message = str(caught.value)
    assert message.startswith("SGD: 4 checks failed")
    assert "every_knob_changes_the_weights: makes no difference to the weights: dampening=0.5" in message
    assert "bad_settings_are_refused_by_name: {'lr': 0.3} was accepted" in message
    assert "every_argument_is_in_the_case: arguments that are neither knob, switch nor untested:" in message
    assert "trains_a_small_model: loss went from" in message


def test_a_skipped_check_is_reported_with_its_reason():
    case = OptimizerCase(
        name="SGD", optimizer_class=torch.optim.SGD, settings={"lr": 0.1}, skips={"step_hooks_run": "told so"}
    )
    report = run_checks(case, ["step_hooks_run", "equals_its_slow_twin"])
    assert report.skipped == {"step_hooks_run": "told so", "equals_its_slow_twin": "the case names no twin"}
    assert "skipped  step_hooks_run: told so" in str(report)


def test_skipping_an_unknown_check_is_an_error_that_suggests_the_nearest():
    case = OptimizerCase(name="x", optimizer_class=torch.optim.SGD, settings={"lr": 0.1}, skips={"resume_is_exact": ""})
    with pytest.raises(UsageError, match=r"'resume_is_exact'.*did you mean 'resume_is_bit_exact'"):
        optimizer_checks(case)


def test_a_crash_in_one_check_does_not_stop_the_others():
    def crashes(params, **settings):
        raise KeyError("boom")

    report = run_checks(
        OptimizerCase(name="x", optimizer_class=crashes, settings={"lr": 1.0}),
        ["trains_a_small_model", "identical_runs_are_bitwise_identical"],
    )
    assert report.failed == dict.fromkeys(
        ["trains_a_small_model", "identical_runs_are_bitwise_identical"], "KeyError: 'boom'"
    )


def test_each_check_becomes_a_pytest_test_with_the_names_of_case_and_check(pytester):
    pytester.makepyfile("""
        import torch
        from leantrain.testing import OptimizerCase, parametrize_with_checks

        case = OptimizerCase(name="mine", optimizer_class=torch.optim.SGD, settings={"lr": 0.1},
                             skips={"trains_a_small_model": "takes too long"})

        @parametrize_with_checks([case])
        def test_mine(check):
            check()
    """)
    wanted = "trains or zero_grad_leaves or twin or argument_is_in"
    result = pytester.runpytest("-v", "-rs", "-p", "no:cacheprovider", "-k", wanted)
    result.assert_outcomes(passed=1, skipped=2, failed=1)
    result.stdout.fnmatch_lines(["*mine-zero_grad_leaves_nothing_to_do*PASSED*", "*takes too long*"])


def test_the_marker_holds_every_check_of_every_case():
    marker = parametrize_with_checks([SGD, SGD])
    assert len(marker.args[1]) == 2 * len(OPTIMIZER_CHECKS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"settings": {"rank": 3}}, "settings must contain lr"),
        ({"knobs": {"momentum": 0.5}, "untested": {"momentum": "?"}}, "momentum is in two"),
    ],
)
def test_a_case_that_contradicts_itself_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        OptimizerCase(**{"name": "x", "optimizer_class": torch.optim.SGD, "settings": {"lr": 0.1}, **fields})


def test_checks_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run_checks(SGD, set(OPTIMIZER_CHECKS) - {"a_compiled_step_equals_the_plain_one", "a_new_lr_compiles_nothing_anew"})
    assert torch.equal(torch.rand(3), expected)
