"""The command `leantrain plan`, from its options to its exit code."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from leantrain.display import size
from leantrain.errors import LeantrainError, RunError, UsageError
from leantrain.plan.check import Measured, measure
from leantrain.plan.links import OnLink, bits_per_second, plan_links
from leantrain.plan.memory_size import memory_size
from leantrain.plan.plan import FORMATS, Plan, Prediction, make_plan
from leantrain.plan.show import SCHEMA, check_picture, picture, show, show_check, to_json
from leantrain.plan.show_links import links_to_json, show_links
from leantrain.plan.subject import CONTEXT, Subject, from_recipe, named


def answer(options: argparse.Namespace) -> int:
    """Make the plan that the options ask for and say it in the form they ask for.

    Raises:
        UsageError: an option is wrong.
        LeantrainError: nothing fits; or what was to be checked does not fit this machine.
    """
    if options.memory is None and options.bandwidth is None:
        raise UsageError("plan needs --memory, --bandwidth or both")
    links = _links(options) if options.bandwidth is not None else None
    if options.memory is None:
        _say_links(options, links)
        return 0
    memory, device = memory_size(options.memory), _device(options.device)
    if options.picture is not None:
        check_picture(options.picture)
    subject = _subject(options)
    plan = make_plan(subject, memory, options.dtype, device)
    if not options.json:
        show(plan, everything=options.all)
    check = _check(plan, subject) if options.check and plan.fitting else None
    if options.json:
        extra = {} if links is None else {"exchanges": links_to_json(links)}
        print(json.dumps(to_json(plan, check) | extra, indent=1))  # noqa: T201  # what was asked for
    elif check is not None:
        show_check(*check)
    if links is not None and not options.json:
        _say_links(options, links)
    if options.picture is not None:
        picture(plan, options.picture)
    if not plan.fitting:
        raise LeantrainError(plan.advice[0])
    return 0


def _subject(options: argparse.Namespace) -> Subject:
    if options.model is not None:
        return named(
            options.model,
            1 if options.batch is None else options.batch,
            CONTEXT if options.context is None else options.context,
        )
    flags = [] if options.batch is None else ["--batch_size", str(options.batch)]
    flags += [] if options.context is None else ["--data.context", str(options.context)]
    return from_recipe(Path(options.recipe), flags, options.allow)


def _links(options: argparse.Namespace) -> list[OnLink]:
    bandwidth = bits_per_second(options.bandwidth)
    with FakeTensorMode():  # sizes are all that is needed
        params = [param for param in _subject(options).build_model().parameters() if param.requires_grad]
    return plan_links(params, options.processes, bandwidth, options.latency_ms / 1000)


def _say_links(options: argparse.Namespace, links: list[OnLink] | None) -> None:
    assert links is not None
    if options.json:
        print(json.dumps({"schema": SCHEMA, "exchanges": links_to_json(links)}, indent=1))  # noqa: T201
        return
    what = f"gradients of {options.model or options.recipe} among {options.processes} processes"
    delay = f", {options.latency_ms:g} ms from one to another" if options.latency_ms else ""
    show_links(links, f"{what} at {options.bandwidth}{delay}; forward and backward pass left out")


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda needs a GPU here: only with one does PyTorch choose a GPU's kernels; use cpu")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _check(plan: Plan, subject: Subject) -> tuple[Prediction, Measured]:
    """The first combination that fits, predicted and measured."""
    first, free = plan.fitting[0], _free_memory(plan.device)
    if free is not None and first.peak > free:
        raise RunError(f"cannot check {first.combination}: it needs {size(first.peak)}, and {size(free)} are free here")
    one = first.combination
    return first, measure(
        subject,
        one.make,
        dtype=FORMATS.get(one.dtype),
        checkpoint=one.checkpointing,
        in_backward=one.in_backward,
        device=plan.device,
    )


def _free_memory(device: str) -> int | None:
    """Bytes that may still be had here; None if the system does not say."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
