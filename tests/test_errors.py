"""The errors a user reads."""

from __future__ import annotations

import pytest

from leantrain.errors import LeantrainError, RunError, UsageError, nearest


def test_usage_and_run_errors_end_a_command_with_different_codes():
    assert (UsageError.exit_code, RunError.exit_code) == (2, 1)


@pytest.mark.parametrize(("error", "standard"), [(UsageError, ValueError), (RunError, RuntimeError)])
def test_an_error_can_be_caught_as_ours_and_as_the_standard_one(error, standard):
    for expected in (LeantrainError, standard):
        with pytest.raises(expected, match="rank"):
            raise error("rank must be >= 1")


def test_nearest_suggests_the_close_word_and_lists_all_of_them_in_order():
    assert nearest("galroe", ["galore", "adamw"]) == "; did you mean 'galore'? (allowed: adamw, galore)"


def test_nearest_suggests_nothing_when_nothing_is_close():
    assert nearest("zzz", iter(["galore", "adamw"])) == " (allowed: adamw, galore)"
