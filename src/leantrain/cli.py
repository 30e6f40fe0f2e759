"""The command `leantrain`: train, compare, report, plan, methods, env.

Nothing here imports torch before it is needed, so that help comes at once. Exit codes: 0 done, 1 failed or
interrupted, 2 asked for something that is not allowed. A traceback is shown only with --debug.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import leantrain
from leantrain.errors import LeantrainError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except LeantrainError as error:
        _explain(f"error: {error}", "--debug" in argv)
        return error.exit_code
    except KeyboardInterrupt:
        _explain("interrupted", "--debug" in argv)
        return 1
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`); what is left in our buffer has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _explain(f"failed: {type(error).__name__}: {error} (--debug shows where)", "--debug" in argv)
        return 1


def _dispatch(argv: list[str]) -> int:
    """Flags that are keys of a recipe are set aside for the recipe; argparse sees only the command's own."""
    parser = _parser()
    recipe_flags: list[str] = []
    if argv and argv[0] in ("train", "compare"):
        argv, recipe_flags = _recipe_flags(argv)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_flag(unknown[0], options)
    if getattr(options, "allow", None):
        # A class in a file of the user's own. Last in the path, so that it cannot stand in for an installed package.
        sys.path.append(str(Path.cwd()))
    run: Callable[[argparse.Namespace, list[str]], int] = options.run
    return run(options, recipe_flags)


def _train(options: argparse.Namespace, flags: list[str]) -> int:
    """`leantrain train [RECIPE.yaml]`."""
    from leantrain.recipe import read_recipe, recipe_to_dict
    from leantrain.recipe.yaml import dump

    if about := _class_help(flags, options.allow):
        print(about)
        return 0
    recipe = read_recipe(options.recipe, flags, options.allow)
    if options.print_config:
        print(dump(recipe_to_dict(recipe)), end="")
        return 0

    from leantrain.display import watch
    from leantrain.train import train

    out = options.out or Path("runs") / recipe.name
    with watch(options.quiet) as on_event:
        result = train(recipe, out, resume=not options.fresh, on_event=on_event)
    if result.status == "finished":
        if not options.quiet and os.environ.get("RANK", "0") == "0":
            print(f"results: {out}")
        return 0
    if result.status == "interrupted":
        raise LeantrainError(f"interrupted at step {result.steps}; the same command goes on from there ({out})")
    raise LeantrainError(f"the run {result.status}; see {out}")


def _compare(options: argparse.Namespace, flags: list[str]) -> int:
    """`leantrain compare RECIPE.yaml`."""
    from leantrain.recipe import read_comparison

    comparison = read_comparison(options.recipe, flags, options.allow)

    from leantrain.compare import compare
    from leantrain.display import summary, watch

    out = options.out or Path("runs") / comparison.name
    with watch(options.quiet) as on_event:
        results = compare(comparison, out, on_event=on_event)
    page = out / "report.html"
    if not options.quiet:
        summary(results)
        print(f"report: {page}")
    if options.open:
        _open(page)
    if results["status"] == "interrupted":
        raise LeantrainError(f"interrupted; the same command goes on from there ({out})")
    if results["status"] != "finished":
        raise LeantrainError(f"not every run finished; the reasons are in {page}")
    return 0


def _report(options: argparse.Namespace, _: list[str]) -> int:
    """`leantrain report FOLDER`."""
    path = options.folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{options.folder} is not the folder of a comparison: it has no results.json") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error

    from leantrain.report import write_report

    page = options.folder / "report.html"
    write_report(results, page)
    print(page)
    if options.open:
        _open(page)
    return 0


def _plan(options: argparse.Namespace, _: list[str]) -> int:
    """`leantrain plan --model NAME --memory SIZE --bandwidth RATE`."""
    if (options.model is None) == (options.recipe is None):
        raise UsageError("plan needs one of --model and --recipe")

    from leantrain.plan.answer import answer

    return answer(options)


def _methods(options: argparse.Namespace, _: list[str]) -> int:
    """`leantrain methods`."""
    from leantrain.registry import METHODS

    if options.json:
        print(json.dumps([asdict(method) for method in METHODS], indent=1))
        return 0

    from leantrain.display import table

    table(["method", "room", "what it does", "source"], [[m.name, m.room, m.summary, m.source] for m in METHODS])
    return 0


def _environment(options: argparse.Namespace, _: list[str]) -> int:
    """`leantrain env`."""
    from leantrain.ledger.environment import describe

    found = describe()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for key, value in found.items():
            print(f"{key}: {value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="leantrain", description=leantrain.__doc__, epilog="leantrain COMMAND --help says more.")
    parser.add_argument("--version", action="version", version=f"leantrain {leantrain.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace, list[str]], int], text: str, **more: Any) -> _Parser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **more)
        sub.add_argument("--debug", action="store_true", help="show a traceback when something goes wrong")
        sub.set_defaults(run=run, command=name)
        return sub

    one = command("train", _train, "train one model as a recipe says", add_help=False)
    one.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", type=Path, help="without: a small model on text")
    one.add_argument("--print_config", "--print-config", action="store_true", help="print the whole recipe and stop")
    one.add_argument("--fresh", action="store_true", help="start again instead of going on from a checkpoint")
    one.add_argument("--help", "-h", action=_RecipeHelp, help="show this help and stop")
    several = command("compare", _compare, "train several recipes on equal terms and report the differences")
    several.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="what to compare")
    several.epilog = "Keys of the comparison (--seeds) and of its base (--steps, --optim.lr) may be given as flags too."
    for sub in (one, several):
        sub.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: runs/NAME)")
        sub.add_argument(
            "--allow", action="append", default=[], metavar="PKG", help="let the recipe use classes of this package"
        )
        sub.add_argument("--quiet", action="store_true", help="say nothing but errors")
    reporting = command("report", _report, "write the report of a comparison again")
    reporting.add_argument("folder", type=Path, metavar="FOLDER", help="where the comparison put its results")
    for sub in (several, reporting):
        sub.add_argument("--open", action="store_true", help="open the report in the browser, if there is a display")
    planning = command("plan", _plan, "say which ways of training a model fit a memory or a network")
    planning.add_argument(
        "--model", metavar="NAME", help="llama-60m ... llama-7b, or a Hugging Face config (folder, file, class)"
    )
    planning.add_argument("--recipe", metavar="RECIPE.yaml", type=Path, help="plan what this recipe trains")
    planning.add_argument("--memory", metavar="SIZE", help="what a step may hold, such as 24GB or 22.5GiB")
    planning.add_argument(
        "--bandwidth", metavar="RATE", help="of every process's link, such as 100Mbit: compare the exchanges on it"
    )
    planning.add_argument("--processes", type=int, default=4, metavar="N", help="that exchange gradients (default: 4)")
    planning.add_argument(
        "--latency_ms", type=float, default=0.0, metavar="MS", help="from one process to another (default: 0)"
    )
    planning.add_argument("--batch", type=int, metavar="N", help="examples per step (default: 1, or the recipe's)")
    planning.add_argument("--context", type=int, metavar="N", help="tokens per example (default: 256, or the recipe's)")
    planning.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="format of the weights (default: tries both)"
    )
    planning.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="whose kernels to plan for")
    planning.add_argument(
        "--all", action="store_true", help="every combination, not the first that fits of each method"
    )
    planning.add_argument("--picture", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    planning.add_argument(
        "--check", action="store_true", help="take two real steps of the first that fits, and measure"
    )
    planning.add_argument("--allow", action="append", default=[], metavar="PKG", help="let the recipe use this package")
    planning.add_argument("--json", action="store_true", help="as JSON")
    planning.epilog = "Exit code 0: something fits; 1: nothing does; 2: asked for something that is not allowed."
    for sub in (
        command("methods", _methods, "list the methods of this package"),
        command("env", _environment, "describe this machine and what is installed"),
    ):
        sub.add_argument("--json", action="store_true", help="as JSON")
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one line and no guessing at shortened flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


class _RecipeHelp(argparse.Action):
    """`train --help`: the command's own flags, then the keys of a recipe."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from leantrain.recipe.describe import recipe_help

        print(f"{parser.format_help()}\n{recipe_help()}")
        parser.exit()


def _class_help(flags: list[str], allow: Sequence[str]) -> str | None:
    """What `--optim.help CLASS` asks for, if it is among the flags."""
    for flag, name in itertools.pairwise(flags):
        if flag.endswith(".help"):
            from leantrain.recipe.describe import class_help

            return class_help(flag.removeprefix("--").removesuffix(".help"), name, allow)
    return None


def _recipe_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """`argv` in two: what the command takes, and `--KEY VALUE` pairs for the recipe."""
    from leantrain.recipe.describe import flag_roots

    roots = flag_roots(argv[0])
    own: list[str] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or key.split(".")[0] not in roots:
            own.append(word)
            continue
        flags.append(word)
        if not equals and rest:
            flags.append(rest.pop(0))
    return own, flags


def _refuse_flag(flag: str, options: argparse.Namespace) -> NoReturn:
    from leantrain.errors import nearest
    from leantrain.recipe.describe import flag_roots

    known = [key for key in vars(options) if key not in ("run", "command", "recipe", "folder")]
    if options.command in ("train", "compare"):
        known += flag_roots(options.command)
    word = flag.lstrip("-").split("=")[0].split(".")[0]
    raise UsageError(f"{options.command} has no flag {flag!r}{nearest(word, known)}")


def _open(page: Path) -> None:
    """Show the page in a browser; over ssh and in containers there is none, which is no error."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        print("no display: the report was not opened", file=sys.stderr)
        return
    import webbrowser

    webbrowser.open(page.resolve().as_uri())


def _explain(message: str, debug: bool) -> None:
    """The last words of a command that did not succeed; with several processes, which one speaks."""
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK")
    who = "leantrain" if rank is None else f"leantrain (process {rank})"
    print(f"{who}: {message}", file=sys.stderr)
