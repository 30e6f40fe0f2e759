"""GaLore against AdamW, all tuned, three seeds: once as its claim is meant, once with one learning rate for everything.

    python -m benchmarks.optim.galore

Runs recipes/galore.yaml and recipes/galore-one-rate.yaml into runs/ (an interrupted one goes on where it stopped) and
keeps their summaries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.result import write_result
from leantrain.compare import compare
from leantrain.recipe import read_comparison

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    record("galore", "optim/galore", "GaLore at rank d/4 against AdamW, the same AdamW for embedding and head")
    record("galore-one-rate", "optim/galore_one_rate", "GaLore at rank d/4 against AdamW, one rate for all parameters")


def record(recipe: str, name: str, title: str) -> None:
    """Run a comparison and save its summary under `name`."""
    comparison = read_comparison(ROOT / "recipes" / f"{recipe}.yaml", [], [])
    results = compare(comparison, ROOT / "runs" / recipe, on_event=tell)
    if results["status"] != "finished":
        raise SystemExit(f"{recipe} ended as {results['status']}: nothing is recorded")
    runs, one = results["runs"], results["runs"]["adamw"]["results"][0]
    write_result(
        name,
        title=f"{title}: Llama of {one['parameters'] / 1e6:.2f} M parameters, {one['steps']} steps",
        columns=["run", "lr", "validation perplexity", "against AdamW", "p", "optimizer MB"],
        rows=[row(name, run, results) for name, run in runs.items()],
        notes=[
            f"Mean ± standard deviation over seeds {', '.join(map(str, results['seeds']))}; learning rates chosen from "
            f"{len(results['tune']['adamw']['grid'])} values for each run on another seed. Tokens: "
            f"{one['tokens'] / 1e6:.2f} M of Python's standard library as bytes. p: paired t-test on the validation "
            "loss.",
            *(f"{name}: {note}." for name, run in runs.items() for note in run["notes"]),
        ],
    )


def row(name: str, run: dict[str, Any], results: dict[str, Any]) -> list[str]:
    summary, base = run["summary"], results["runs"]["adamw"]["summary"]
    perplexity, against = summary["val_perplexity"], run["versus_baseline"].get("val_loss")
    change = perplexity["mean"] / base["val_perplexity"]["mean"] - 1
    return [
        name,
        f"{results['tune'][name]['best']:g}",
        f"{perplexity['mean']:.3f} ± {perplexity['std']:.3f}",
        f"{100 * change:+.1f} %" if against else "",
        f"{against['p_value']:.3f}" if against else "",
        f"{summary['optimizer_state_bytes']['mean'] / 1e6:.2f}",
    ]


def tell(event: dict[str, Any]) -> None:
    if event["kind"] == "end":
        print(event["name"], event["status"], event.get("final"), flush=True)


if __name__ == "__main__":
    main()
