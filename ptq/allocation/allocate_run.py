"""The command ``ptq allocate`` behind its command line: a recipe whose overrides spend a budget best, run beside the best uniform one."""

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from ptq.allocation.allocating import Allocation, allocated, best_uniform, check_budget, recipe_text, scheme_of
from ptq.allocation.budget import Budget
from ptq.allocation.candidates import candidate, candidates_before, named, uniform
from ptq.allocation.sensitivity import Sensitivity, measured, weighing_solver
from ptq.allocation.sensitivity_run import with_samples
from ptq.allocation.tables import place_of
from ptq.config.schema import Recipe
from ptq.errors import UserError
from ptq.files.atomic import ensure_folder, write_text
from ptq.models.shared import Shared
from ptq.report.plain import printable
from ptq.run.experiment import check_recipe, checked, run_recipe
from ptq.run.preflight import check_before
from ptq.run.record.journal import Journal
from ptq.run.session import open_session
from ptq.sweep.comparing import RunPair, as_json, compare_runs, read_run


@dataclass(frozen=True)
class Verdict:
    """The allocation's run beside that of the best uniform setting that is no larger.

    Attributes:
        uniform: the uniform setting's format.
        pair: both runs, the uniform one first.
        better: whether the allocation's loss is less, with an interval that excludes 0.
        less_increase: by which share the allocation's increase of perplexity over the baseline is less than the uniform one's.
    """

    uniform: str
    pair: RunPair
    better: bool
    less_increase: float


def run_allocate(
    recipe: Recipe,
    budget: Budget,
    names: Sequence[str],
    given: bool,
    samples: int | None = None,
    verify: bool = True,
    against: str | None = None,
    output: pathlib.Path | None = None,
    seed: int = 0,
    by_solver: bool = True,
) -> tuple[pathlib.Path, Verdict | None]:
    """Allocates formats under a budget and, to `verify` it, runs the allocation and the best uniform setting of at most its budget.

    Args:
        recipe: the model, its texts, the steps that quantize it, and the scheme whose weights' formats are chosen.
        budget: what the weights may take.
        names: the candidate formats.
        given: whether somebody has named them.
        samples: of the sensitivity's calibration.
        verify: run both; the recipe is written only where the allocation is better.
        against: the uniform format to run; None for the one that fits and is predicted to cost least.
        output: the recipe's file; None for ``allocated/<name>.yaml`` among the recipe's results.
        seed: of the sensitivity.
        by_solver: costs are of what the recipe's solver makes of weights, where it weighs errors; otherwise of rounding to nearest.

    Returns:
        The recipe's file, which is not there where the verdict is against it; and the verdict, None where none was asked for.

    Raises:
        UserError: for anything that the user can mend: a budget below the smallest or above the largest formats, one for which
            there is no uniform setting to verify against.
    """
    own, steps = checked(recipe)
    own, solved = with_samples(own, samples, by_solver and weighing_solver(steps) is not None)
    named(names, own.scheme)
    check_before(own, steps)
    if (before := candidates_before(names, own, given)) is not None:
        check_budget(*before, own, budget)
    name = f"{recipe.name}-{budget.name}"[:100]
    path = output or pathlib.Path(recipe.outputs).expanduser() / recipe.name / "allocated" / f"{name}.yaml"
    if path.suffix != ".yaml":
        raise UserError(f"--output: {path} does not end in .yaml: name a recipe's file")
    ensure_folder(path.parent, "--output")
    journal = Journal(path.with_suffix(".log"))
    with open_session(own, journal) as session:
        found = measured(session, steps, names, given, seed, solved)
        baseline = 4 if session.loaded.baseline_dtype == "fp32" else 2
        room = budget.weight_bytes(found, own, session.network, baseline)
    chosen = allocated(found, room, budget.words)
    reference = _reference(found, own, room, against) if verify else None
    made = dataclasses.replace(recipe, name=name, scheme=scheme_of(recipe.scheme, chosen, found))
    check_recipe(made)
    journal.show(_table(found, chosen))
    journal.say(f"allocated: {chosen.bits:.4f} bits a weight, predicted KL {chosen.cost:.5f} nats a token")
    verdict = None
    if reference is not None:
        verdict = _verified(recipe, made, found, reference, journal)
    facts = {"allocation": dataclasses.asdict(chosen), "verdict": None if verdict is None else _plain(verdict)}
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
    if verdict is not None and not verdict.better:
        path.unlink(missing_ok=True)
        journal.say(f"refused: {_why(verdict)}; no recipe was written")
        return path, verdict
    lines = [f"{recipe.name} with weights' formats chosen by ptq allocate: {chosen.bits:.4f} bits a weight."]
    lines.append("not verified" if verdict is None else _why(verdict))
    write_text(path, recipe_text(made, lines))
    journal.say(f"recipe: {path}")
    return path, verdict


def _reference(found: Sensitivity, recipe: Recipe, room: int, against: str | None) -> str:
    """Returns the name of the uniform format to verify against."""
    if against is not None:
        candidate(against, recipe.scheme.weight)
        if against not in found.formats:
            raise UserError(f"--against: {against!r} is none of --formats ({', '.join(found.formats)}): add it there")
        return against
    best = best_uniform(found, room)
    if best is None:
        raise UserError(
            "--formats: no uniform setting fits the budget, so that there is nothing to verify against: add smaller ones, "
            "or use --no-verify"
        )
    return best


def _verified(recipe: Recipe, made: Recipe, found: Sensitivity, reference: str, journal: Journal) -> Verdict:
    """Runs both and compares them."""
    plain = dataclasses.replace(
        recipe, name=f"{recipe.name}-{reference}"[:100], scheme=uniform(recipe.scheme, found.formats[reference])
    )
    journal.say(f"uniform: {reference}, {found.uniform_bits(reference):.4f} bits a weight")
    shared = Shared()
    first, second = (read_run(run_recipe(each, shared=shared).folder) for each in (plain, made))
    pair = compare_runs(first, second, recipe.evaluation.confidence)
    before = first.metrics["baseline_perplexity"]
    increases = [r.metrics["quantized_perplexity"] - before for r in (first, second)]
    less = 1 - increases[1] / increases[0] if increases[0] > 0 else 0.0
    better = pair.paired.high is not None and pair.paired.high < 0
    journal.say(_sentence(Verdict(reference, pair, better, less)))
    return Verdict(reference, pair, better, less)


def _sentence(verdict: Verdict) -> str:
    p = verdict.pair.paired
    perplexities = [r.metrics["quantized_perplexity"] for r in (verdict.pair.first, verdict.pair.second)]
    interval = "one document only, no interval" if p.low is None else f"[{p.low:+.5f}, {p.high:+.5f}]"
    return (
        f"perplexity {perplexities[1]:.4f}, uniform {verdict.uniform} {perplexities[0]:.4f}: increase {verdict.less_increase:.1%} less; "
        f"log perplexity {p.difference:+.5f} {interval}, p = {p.p:.4f}, {p.windows} windows"
    )


def _why(verdict: Verdict) -> str:
    word = "better" if verdict.better else "not better"
    return f"{word} than uniform {verdict.uniform} on the same windows ({_sentence(verdict)})"


def _plain(verdict: Verdict) -> dict[str, object]:
    return {
        "uniform": verdict.uniform,
        "better": verdict.better,
        "less_increase": verdict.less_increase,
        **as_json(verdict.pair),
    }


def _table(found: Sensitivity, chosen: Allocation) -> Table:
    """Returns how many Linears of each kind have each format."""
    table = Table(title="Linears by format", title_justify="left")
    table.add_column("Linear")
    used = [form for form in found.formats if form in chosen.formats.values()]
    for form in used:
        table.add_column(form, justify="right")
    kinds: dict[str, Counter[str]] = {}
    for name, form in chosen.formats.items():
        kinds.setdefault(place_of(name)[1], Counter())[form] += 1
    for kind, counts in kinds.items():
        table.add_row(printable(kind), *(str(counts[form] or "") for form in used))
    return table
