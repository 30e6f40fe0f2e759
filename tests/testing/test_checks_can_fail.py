"""A check that cannot fail is worse than none: each one is failed here by optimizers that make its mistake."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leantrain.testing import OPTIMIZER_CHECKS, OptimizerCase, run_checks
from leantrain.testing.twins import SlowAdamW
from tests.testing import broken_optimizers

HONEST = OptimizerCase(
    name="honest",
    optimizer_class=broken_optimizers.Honest,
    settings={"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1},
    knobs={"lr": 2e-2, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.5},
    switches={"fused": True},
    bad=[({"lr": -1.0}, ["lr", "-1.0"]), ({"eps": -1.0}, "eps")],
    twin=SlowAdamW,
    predicted_bytes=lambda params, settings: sum(2 * p.numel() * p.element_size() for p in params),
    off_equals=({"lr": 1e-2}, lambda params: broken_optimizers.Honest(params, lr=1e-2)),
)
BROKEN = replace(HONEST, off_equals=None)

TRAINS, TWIN, KNOBS = "trains_a_small_model", "equals_its_slow_twin", "every_knob_changes_the_weights"
GROUPS, ALONE = "group_options_equal_constructor_arguments", "groups_do_not_touch_each_other"
SCHEDULERS, CHANGED, TENSOR = (
    "schedulers_change_the_step",
    "options_changed_during_a_run_take_effect",
    "lr_may_be_a_tensor",
)
RESUME, RESUME_2 = "resume_is_bit_exact", "resume_is_bit_exact_in_two_processes"
BYTES, STORAGE = "state_bytes_are_as_predicted", "state_keeps_no_larger_storage_alive"
DEEPCOPY, PICKLE = (
    "a_deepcopy_continues_identically_and_independently",
    "a_pickled_optimizer_continues_identically",
)
CLOSURE, LATE = (
    "a_closure_is_called_with_gradients_and_its_loss_returned",
    "parameters_without_gradient_wait_and_join_later",
)
COMPILED, RECOMPILED = "a_compiled_step_equals_the_plain_one", "a_new_lr_compiles_nothing_anew"
SCALER, TWO = "a_gradient_scaler_skips_what_overflowed", "two_processes_equal_one_with_both_batches"

# For each class every check that fails, and no other.
EXPECTED: dict[str, set[str]] = {
    "Ascends": {TRAINS, TWIN},
    "MiscountsTheBias": {TWIN},
    "ForgetsTheBias": {TWIN},
    "CountsInBfloat16": {"keeps_going_after_ten_million_steps"},
    "CorrectsInBfloat16": {"bf16_parameters_train_and_stay_bf16"},
    "AssumesContiguousMemory": {"memory_layout_does_not_matter"},
    "IgnoresMaximize": {"maximize_is_minimize_of_the_opposite"},
    "RefusesInRiddles": {"complex_parameters_work_or_are_refused", "sparse_gradients_work_or_are_refused"},
    "UpdatesRealPartsOnly": {"complex_parameters_work_or_are_refused"},
    "NormalizesWithoutCare": {TWIN, "all_zero_gradients_are_survived"},
    "IgnoresWeightDecay": {TWIN, KNOBS},
    "IgnoresEps": {TWIN, KNOBS},
    "FusedIsAnotherMethod": {"switches_change_nothing_but_rounding"},
    "HasAHiddenArgument": {"every_argument_is_in_the_case"},
    "AcceptsAnyValue": {"bad_settings_are_refused_by_name"},
    "NamesNothing": {"bad_settings_are_refused_by_name"},
    "SwallowsUnknownArguments": {"an_unknown_argument_is_refused"},
    "AcceptsNoParameters": {"an_empty_parameter_list_is_refused"},
    "UsesTheLrItWasBuiltWith": {GROUPS, ALONE, SCHEDULERS, CHANGED, TENSOR},
    "UsesTheFirstGroupsLr": {ALONE},
    "KeepsTheEpsOfItsFirstStep": {CHANGED},
    "TurnsLrIntoANumber": {TENSOR},
    "ForgetsAMoment": {RESUME, RESUME_2},
    "LosesPrecisionOnLoading": {RESUME, BYTES},
    "HidesStateInAnAttribute": {RESUME, RESUME_2, BYTES, DEEPCOPY, PICKLE},
    "KeepsAnObject": {"state_loads_without_unpickling"},
    "KeepsAView": {BYTES, STORAGE},
    "AdoptsTheGradient": {BYTES, STORAGE},
    "StepsInBackward": {"accumulated_gradients_equal_the_big_batch", SCALER, TWO, RESUME_2},
    "TakesSigns": {TWIN, "clipped_gradients_are_the_ones_used"},
    "ScalesGradientsInPlace": {"gradients_are_left_as_they_were"},
    "ClosureWithoutGradients": {CLOSURE},
    "DropsTheLoss": {CLOSURE},
    "DecaysWhatHasNoGradient": {LATE, "zero_grad_leaves_nothing_to_do"},
    "CountsForAllAtOnce": {LATE},
    "StepsTheFirstGroupOnly": {ALONE, "an_added_group_takes_part"},
    "SkipsHooks": {"step_hooks_run", SCHEDULERS},  # schedulers look for the method that hooks wrap
    "ReadsLrAsANumber": {RECOMPILED},
    "IsAnotherMethodWhenCompiled": {COMPILED},
    "IgnoresOverflow": {SCALER},
    "StepsByRank": {TWO, RESUME_2},
}
# What compiles and what forks takes most of the time; these run for the classes that are to fail one of them.
SLOW = ({COMPILED, RECOMPILED}, {TWO, RESUME_2})


def test_the_honest_optimizer_passes_every_check():
    report = run_checks(HONEST)
    assert not report.failed and not report.skipped, str(report)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_mistake_fails_exactly_its_checks(name):
    case = replace(BROKEN, name=name, optimizer_class=getattr(broken_optimizers, name))
    expected = EXPECTED[name]
    left_out = set().union(*(checks for checks in SLOW if not checks & expected))
    report = run_checks(case, set(OPTIMIZER_CHECKS) - left_out)
    assert set(report.failed) == expected, str(report)


def test_an_optimizer_that_differs_when_off_is_found():
    case = replace(HONEST, optimizer_class=broken_optimizers.FlipsBits)
    report = run_checks(case, ["off_equals_the_plain_optimizer"])
    assert set(report.failed) == {"off_equals_the_plain_optimizer"}


def test_an_optimizer_that_draws_from_the_global_generator_is_found():
    case = replace(HONEST, optimizer_class=broken_optimizers.DrawsFromTheGlobalGenerator)
    checks = {"identical_runs_are_bitwise_identical", RESUME, ALONE}
    assert set(run_checks(case, checks).failed) == checks


def test_every_check_is_failed_by_some_mistake():
    failed = set().union(*EXPECTED.values()) | {
        "off_equals_the_plain_optimizer",
        "identical_runs_are_bitwise_identical",
    }
    assert failed == set(OPTIMIZER_CHECKS)


def test_every_mistake_has_an_expectation():
    classes = {n for n, c in vars(broken_optimizers).items() if isinstance(c, type) and n != "Any"}
    subclasses = {n for n in classes if issubclass(getattr(broken_optimizers, n), broken_optimizers.Honest)}
    assert subclasses - {"Honest", "FlipsBits", "DrawsFromTheGlobalGenerator"} == set(EXPECTED)
