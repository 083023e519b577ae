"""One experiment: load, find links, calibrate, evaluate the baseline, quantize block by block, evaluate, report."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import yaml

from ptq.config.checking import check
from ptq.config.schema import Recipe
from ptq.data.sampling import Tokens
from ptq.errors import UserError
from ptq.evaluation.token_comparison import Head, TokenComparison, compare_tokens
from ptq.export.registry import with_default_options
from ptq.files.atomic import ensure_folder, write_text
from ptq.files.bounded import parse_json
from ptq.files.store import Store, store_of
from ptq.models.locations import locate
from ptq.models.shared import Shared
from ptq.network.block_stream import Flow
from ptq.network.network import uncollected
from ptq.network.skeleton import skeleton
from ptq.ranks.reduction import in_shares
from ptq.ranks.world import ALONE, World, led
from ptq.report.channel_ranges import outlier_table, save_picture, save_transformed
from ptq.report.tables import summary
from ptq.run.baseline import Baseline, baseline_of, being_evaluated, late_baseline, log_probabilities_of
from ptq.run.exports import (
    QUANTIZED,
    adapted,
    check_export,
    check_places,
    check_turned,
    export_session,
    needs_saved_weights,
)
from ptq.run.forecast.forecast import forecast, has_weights
from ptq.run.forecast.memory_estimate import check_memory
from ptq.run.kept.identity import METRICS, finished
from ptq.run.kept.kept_pass import RESUME
from ptq.run.kept.lent_pass import lending, recipe_of_blocks
from ptq.run.kept.outside_file import stored_type, write_outside
from ptq.run.kept.places import Places, folder_of, places_of, sources_of
from ptq.run.kernel_choice import agreeing, choice_of, keep_timings
from ptq.run.one_pass.quantize import Passed, check_devices, goes_in_one_pass, quantize_in_one_pass
from ptq.run.planning import check_steps, open_context, plan_steps, uncalibrated, warnings_of
from ptq.run.preflight import check_apart, check_before, check_model, check_ranks, check_tokens
from ptq.run.quantize_visitor import QuantizeVisitor, check_quantized
from ptq.run.record.findings import report
from ptq.run.record.journal import Journal
from ptq.run.result import Result
from ptq.run.session import Session, device_of, identity_of, known_identity, open_session
from ptq.run.statistics_pass import being_taken, statistics_of
from ptq.run.task_results import baseline_answers, compared_answers
from ptq.run.trackers.base import TrackedRun, flat, numbers, tracking
from ptq.run.tuned.tuning import check_tuner, save_blocks, targets_of, tune, tuner_of
from ptq.steps._registry import build_steps, with_defaults
from ptq.steps._step import Context, Step
from quantize.kernels.choice import describe


def run(recipe: Recipe, force: bool = False, world: World = ALONE) -> pathlib.Path:
    """Runs `recipe` as `run_recipe`; returns the folder that holds the results."""
    return run_recipe(recipe, force, world=world).folder


def run_recipe(
    recipe: Recipe, force: bool = False, shared: Shared | None = None, world: World = ALONE, lent: Store | None = None
) -> Result:
    """Runs `recipe` from calibration to the report; a run that is finished is not run again, unless by `force`.

    `shared` has what earlier runs of this process have loaded, and keeps what this one loads. All ranks of `world` call this with
    one recipe; rank 0 writes the results, and the others end before the report. `lent` has the finished blocks of runs that
    differ from this one in what comes behind them, or is given this one's.

    Raises:
        UserError: for anything that the user can mend, before the work where it can be known before.
    """
    led(world, lambda: bool(checked(recipe)))
    recipe, steps = checked(recipe)
    shared = shared or Shared(models=False)
    # What has ended here was checked then: its texts are read once for its identity, and its network is not built.
    if not force and led(world, lambda: _shown_finished(recipe, shared)):
        return Result(run_folder(recipe), None, "the run was finished before")
    check_ranks(recipe, sources_of(steps), world)
    check_tuner(recipe, steps)
    check_devices(recipe, steps, world)
    led(world, lambda: check_before(recipe, steps, shared))
    with places_of(recipe, steps, world) as places:
        return _run(recipe, steps, places, shared, force, world, lent)


def finished_before(recipe: Recipe, shared: Shared | None = None) -> pathlib.Path | None:
    """Returns the folder where this very run has ended before, None where it has not.

    Raises:
        UserError: for steps that cannot be built, a model or a text that cannot be had.
    """
    recipe, steps = checked(recipe)
    sources = sources_of(steps)
    folder = folder_of(recipe, sources)
    there = (folder / METRICS).is_file() and finished(folder, known_identity(recipe, sources, shared))
    return folder if there else None


def run_folder(recipe: Recipe) -> pathlib.Path:
    """Returns where a run of `recipe` would write to; nothing is made. Raises `UserError` for steps that cannot be built."""
    recipe, steps = checked(recipe)
    return folder_of(recipe, sources_of(steps))


def blocks_of(recipe: Recipe) -> str | None:
    """Returns a name for the blocks that a run of `recipe` quantizes, the same for runs that can lend them to each other; None where a
    run lends none: a step comes from outside, which may put in what cannot be read again, or blocks pass once.

    Raises:
        UserError: for values that no part of a recipe can use together.
    """
    recipe, steps = checked(recipe)
    if sources_of(steps) or goes_in_one_pass(recipe, steps):
        return None
    return recipe_of_blocks(recipe, steps).digest()


def check_recipe(recipe: Recipe, shared: Shared | None = None) -> list[str]:
    """Checks everything that can be checked without running; `shared` keeps the tokenizer and the windows for runs that follow.

    Returns:
        Lines that say what was checked, what could not be, and where a run would write to.

    Raises:
        UserError: for the first thing that would stop the run.
    """
    recipe, steps = checked(recipe)
    return [
        *check_before(recipe, steps, shared),
        f"ok: {recipe.name} would write to {folder_of(recipe, sources_of(steps))}",
    ]


def checked(recipe: Recipe) -> tuple[Recipe, dict[str, Step]]:
    """Returns the recipe with all its options and what its export fixes, and its steps, which fit its scheme and its export.

    Raises:
        UserError: for values that no part of a recipe can use together; needs no model and no data.
    """
    check(recipe)
    steps = build_steps(recipe.steps)
    recipe = resolved(adapted(recipe))
    check_steps(recipe.scheme, steps)
    check_places(recipe, steps)
    check_tuner(recipe, steps)
    check_devices(recipe, steps, ALONE)
    return recipe, steps


def resolved(recipe: Recipe) -> Recipe:
    """Returns the recipe with the defaults of its steps and its export written out, and the device that ``auto`` is here."""
    export = recipe.export and with_default_options(recipe.export)
    execution = dataclasses.replace(recipe.execution, device=str(device_of(recipe)))
    return dataclasses.replace(recipe, steps=with_defaults(recipe.steps), export=export, execution=execution)


def _shown_finished(recipe: Recipe, shared: Shared | None) -> bool:
    """Returns whether this very run has ended before, and says what it has found."""
    if (folder := finished_before(recipe, shared)) is None:
        return False
    metrics = parse_json((folder / METRICS).read_text(encoding="utf-8"))
    print(f"finished before: {summary(metrics)}; --force runs it again")
    print(f"results: {folder}")
    return True


def _run(
    recipe: Recipe,
    steps: dict[str, Step],
    places: Places,
    shared: Shared,
    force: bool,
    world: World,
    lent: Store | None,
) -> Result:
    folder, journal = places.folder, places.journal("run.log")
    journal.note(f"recipe {recipe.name}, hash {folder.name}")
    if (folder / METRICS).is_file() and not force:
        journal.say("replaces the result that is here, which was of other code, weights, texts or versions")
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    tracked = _tracked(recipe if world.leads else dataclasses.replace(recipe, trackers=()), folder, journal)
    with tracked, open_session(recipe, journal, places.kept, shared, world) as session:
        for note in check_export(recipe, session.network, steps):
            journal.say(f"export: {note}")
        journal.note(check_memory(recipe, session.network, steps))
        for line in (*uncalibrated(recipe.scheme, steps), *warnings_of(recipe.scheme, steps)):
            journal.say(line)
        tokens = session.evaluation_tokens()
        check_tokens(recipe, session.loaded.tokenizer, session.seen_tokens(), tokens, session.network.vocabulary)
        if goes_in_one_pass(recipe, steps):
            passed = quantize_in_one_pass(session, steps, sources_of(steps), tokens, folder)
        else:
            passed = _pass_by_pass(session, steps, tokens, folder, lent)
        visitor, flow, baseline = passed.visitor, passed.flow, passed.baseline
        identity = session.identity(sources_of(steps))
        for name, proof in visitor.proofs.items():
            journal.say(proof.sentence(name))
        with journal.phase("evaluate"), session.stream.heads() as heads:
            compared = _compared(session, heads, baseline, flow, tokens)
        if not world.leads:
            return Result(places.kept, None, "rank 0 writes the results")
        session.stream.change_outside()
        results = compared_answers(session, visitor, passed.answers, folder)
        # Before the results, which say that the run has ended: one that fails or is killed here is gone on with.
        export_session(session, folder, steps, passed.export)
        report(session, visitor, tokens, baseline, compared, folder, identity, results, passed.learned)
        journal.figures(numbers(parse_json((folder / METRICS).read_text(encoding="utf-8"))))
        shutil.rmtree(folder / RESUME, ignore_errors=True)
        journal.say(f"results: {folder}")
        whole = session.loaded.weights.resident and not visitor.unbuildable
        held = (session.network.model, session.loaded.tokenizer) if whole else None
    if held is not None:
        held[0].config.use_cache = True
        from ptq.integrations.cache import use_packed_cache  # transformers, which what is done needs not

        use_packed_cache(held[0])
    return Result(folder, held, "" if whole else visitor.unbuildable or "the weights are on disk")


@contextmanager
def _tracked(recipe: Recipe, folder: pathlib.Path, journal: Journal) -> Iterator[None]:
    """Tells the recipe's trackers what the journal hears, while the context lasts."""
    outputs = pathlib.Path(recipe.outputs).expanduser()
    about = TrackedRun(recipe.name, folder.name, folder, outputs, flat(recipe.as_dict()))
    with tracking(recipe.trackers, about, journal.say) as tracked:
        journal.figures = tracked.figures
        yield


def _pass_by_pass(
    session: Session, steps: dict[str, Step], tokens: Tokens, folder: pathlib.Path, lent: Store | None
) -> Passed:
    """Calibrates, evaluates the baseline, plans and quantizes, each for the whole network before the next.

    What another run computes at this moment for both is fetched as late as it can be, and what nobody does is done meanwhile.
    """
    tuner, baseline = tuner_of(steps), None
    if being_taken(session) and not being_evaluated(session, tokens):
        baseline = baseline_of(session, tokens)
    context = open_context(session, steps)
    if baseline is None and (tuner is not None or not being_evaluated(session, tokens)):
        baseline = baseline_of(session, tokens)
    targets = None if tuner is None else targets_of(session)
    answers = baseline_answers(session)
    taken, identity = context.statistics, session.identity(sources_of(steps))
    context.keep = lambda what, flows, visitor: session.kept(what, identity, flows, visitor)
    plan_steps(session, steps, context)
    check_turned(session.recipe, steps, context)
    if taken is not None and context.statistics is not None:
        save_transformed(taken, context.statistics, context.labels, folder / "channels.png")
    visitor, flow = _quantize(session, steps, context, tokens, folder, lent)
    baseline = late_baseline(session, tokens) if baseline is None else baseline
    if targets is not None:
        flow = _tune(session, steps, context, targets, tokens, identity, visitor, folder)
    learned = None if tuner is None else context.plans[tuner[0]].figures
    return Passed(visitor, flow, baseline, answers, learned)


def _quantize(
    session: Session,
    steps: dict[str, Step],
    context: Context,
    tokens: Tokens,
    folder: pathlib.Path,
    lent: Store | None,
) -> tuple[QuantizeVisitor, Flow]:
    """Quantizes block by block, from where an interrupted run has come to; returns the visitor and the evaluated flow."""
    recipe, stream, samples = session.recipe, session.stream, context.samples
    with session.journal.phase("quantize"):
        tuned, batch = tuner_of(steps) is not None, recipe.evaluation.batch_size
        kernels = choice_of(session)
        with stream.hold_outside(changed=False):
            # What is tuned afterwards is evaluated afterwards: here a batch is enough to measure errors on.
            flow = stream.open(tokens.ids[:batch] if tuned else tokens.ids, batch, exact=True, shared=not tuned)
            visitor = QuantizeVisitor(context, steps, flow, kernels)
        flows = [flow] if samples is None else [flow, samples.flow]
        carried = flows if samples is None or samples.reference is None else [*flows, samples.reference]
        kept = session.kept("quantize", session.identity(sources_of(steps)), carried, visitor)
        with lending(lent, lambda: _key_of_blocks(session, steps), kept, session.journal.say), agreeing():
            stream.run(flows, visitor, "quantize", kept)
        check_quantized(flow)
        keep_timings(session, kernels)
        session.journal.note(describe(kernels.ran, kernels.refused))
        if kept is not None and needs_saved_weights(recipe) and not tuned:
            kept.hand_over(session.network.blocks, folder / QUANTIZED)
            write_outside(stream, stored_type(session.loaded, steps), folder / QUANTIZED)
    return visitor, flow


def _key_of_blocks(session: Session, steps: dict[str, Step]) -> str:
    """Returns a digest of all that the finished blocks depend on."""
    recipe = recipe_of_blocks(session.recipe, steps)
    tokens = (session.seen_tokens(), session.evaluation_tokens())
    return identity_of(recipe, sources_of(steps), session.loaded.fingerprint, tokens, session.stream.device)


def _tune(
    session: Session,
    steps: dict[str, Step],
    context: Context,
    targets: torch.Tensor,
    tokens: Tokens,
    identity: str,
    visitor: QuantizeVisitor,
    folder: pathlib.Path,
) -> Flow:
    """Tunes the quantized network; returns the flow that is evaluated."""
    if visitor.unbuildable:
        raise UserError(f"steps: {visitor.unbuildable}, so that an interrupted run cannot be tuned: add --force")
    flow = tune(session, steps, context, targets, tokens, identity)
    check_quantized(flow)
    if needs_saved_weights(session.recipe):
        save_blocks(context, folder / QUANTIZED)
        write_outside(session.stream, stored_type(session.loaded, steps), folder / QUANTIZED)
    return flow


def _compared(
    session: Session, heads: tuple[Head, Head], baseline: Baseline, flow: Flow, tokens: Tokens
) -> TokenComparison:
    """Compares the models' tokens; the ranks share the windows."""
    chunk = session.recipe.evaluation.chunk

    def work(w: slice) -> tuple[torch.Tensor, ...]:
        known = log_probabilities_of(session, tokens, w)
        return compare_tokens(heads, baseline.hidden[w], flow.hidden[w], tokens.ids[w], chunk, known).tensors()

    return TokenComparison(*in_shares(session.world, len(tokens.ids), work))


def collect_statistics(recipe: Recipe, output: pathlib.Path | None = None, world: World = ALONE) -> pathlib.Path:
    """Takes calibration statistics only. Returns the file: `output`, or ``statistics.safetensors`` in the run's folder."""
    check(recipe)
    recipe = resolved(recipe)
    steps, shared = build_steps(recipe.steps), Shared(models=False)
    check_ranks(recipe, sources_of(steps), world)
    led(world, lambda: check_before(recipe, shared=shared))
    recipe = dataclasses.replace(recipe, calibration=dataclasses.replace(recipe.calibration, statistics=None))
    with places_of(recipe, steps, world) as places:
        return _collect_statistics(recipe, places, output or places.folder / "statistics.safetensors", shared, world)


def _collect_statistics(
    recipe: Recipe, places: Places, path: pathlib.Path, shared: Shared, world: World
) -> pathlib.Path:
    folder, journal = places.folder, places.journal("statistics.log")
    ensure_folder(path.parent, "--output")
    with open_session(recipe, journal, places.kept, shared, world) as session:
        statistics, _ = statistics_of(session)
        if not world.leads:
            return path
        statistics.save(path)
        journal.show(outlier_table(statistics))
        picture = path.with_suffix(".png")
        save_picture(statistics, picture)
        shutil.rmtree(folder / RESUME / "calibration", ignore_errors=True)
    journal.say(f"statistics: {path}")
    journal.say(f"picture: {picture}")
    return path


@uncollected()
def dry_run(recipe: Recipe) -> None:
    """Says what a run would take, and checks everything that can be checked without running.

    A config.json is enough of a model: what its run would take is said all the same.
    """
    recipe, steps = checked(recipe)
    journal, network, weights = Journal(), None, True
    # What needs no model is refused first; what a run would take is said even of one that does not fit.
    lines = check_apart(recipe, steps)
    if locate(recipe.model).kind != "hub":
        weights = has_weights(recipe)
        network = skeleton(recipe.model, store_of(recipe), weights)
        for part in forecast(recipe, network, steps):
            journal.say(part) if isinstance(part, str) else journal.show(part)
    about = uncalibrated(recipe.scheme, steps) + warnings_of(recipe.scheme, steps)
    for line in (*lines, *check_model(recipe, steps, network=network, weights=weights), *about):
        print(line)
    print(f"ok: {recipe.name} would write to {folder_of(recipe, sources_of(steps))}")


def output_folder(recipe: Recipe) -> pathlib.Path:
    """Returns ``<outputs>/<recipe>/<hash of the recipe and of methods from outside>``, created and proved writable."""
    recipe, steps = checked(recipe)
    folder = folder_of(recipe, sources_of(steps))
    ensure_folder(folder, "outputs")
    return folder
