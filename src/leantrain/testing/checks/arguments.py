"""Does every argument do what it is for, and is every mistake answered by a message that helps."""

from __future__ import annotations

from leantrain.testing.case import NotApplicable, OptimizerCase
from leantrain.testing.problem import Stream, after_steps, assert_near, same


def every_argument_is_in_the_case(case: OptimizerCase) -> None:
    """Each constructor argument is named as a knob, a switch, or untested with a reason; and nothing else is."""
    arguments = set(case.arguments())
    named = {*case.knobs, *case.switches, *case.untested}
    # `maximize` has a check of its own.
    forgotten, unknown = sorted(arguments - named - {"maximize"}), sorted(named - arguments)
    assert not forgotten, f"arguments that are neither knob, switch nor untested: {', '.join(forgotten)}"
    assert not unknown, f"named in the case, but no argument of the class: {', '.join(unknown)}"


def every_knob_changes_the_weights(case: OptimizerCase) -> None:
    """Changing any one knob leads to other weights."""
    base = after_steps(case)
    idle = [f"{name}={value!r}" for name, value in case.knobs.items() if same(after_steps(case, **{name: value}), base)]
    assert not idle, f"makes no difference to the weights: {', '.join(idle)}"


def switches_change_nothing_but_rounding(case: OptimizerCase) -> None:
    """A switch between implementations leads to the same weights, to 1e-5 of their way."""
    if not case.switches:
        raise NotApplicable("the case names no switches")
    start, base = Stream(case).parameters(), after_steps(case)
    for name, value in case.switches.items():
        assert_near(after_steps(case, **{name: value}), base, start, 1e-5, f"{name}={value!r}")


def bad_settings_are_refused_by_name(case: OptimizerCase) -> None:
    """Each bad setting raises ValueError, at construction, with a message that contains the promised words."""
    if not case.bad:
        raise NotApplicable("the case names no bad settings")
    for changes, words in case.bad:
        try:
            case.build(Stream(case).parameters(), **changes)
        except ValueError as error:
            wanted = [words] if isinstance(words, str) else list(words)
            missing = [word for word in wanted if word not in str(error)]
            assert not missing, f"{dict(changes)} raises {str(error)!r}, which does not contain {missing}"
        else:
            raise AssertionError(f"{dict(changes)} was accepted")


def an_unknown_argument_is_refused(case: OptimizerCase) -> None:
    """A misspelt argument raises TypeError or ValueError and is not swallowed."""
    try:
        case.build(Stream(case).parameters(), no_such_argument=1)
    except (TypeError, ValueError) as error:
        assert "no_such_argument" in str(error), f"the message does not name the argument: {error}"
    else:
        raise AssertionError("no_such_argument=1 was accepted")


def an_empty_parameter_list_is_refused(case: OptimizerCase) -> None:
    """No parameters at all is an error at construction."""
    try:
        case.build([])
    except ValueError:
        return
    raise AssertionError("an empty parameter list was accepted")


CHECKS = (
    every_argument_is_in_the_case,
    every_knob_changes_the_weights,
    switches_change_nothing_but_rounding,
    bad_settings_are_refused_by_name,
    an_unknown_argument_is_refused,
    an_empty_parameter_list_is_refused,
)
