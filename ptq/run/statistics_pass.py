"""Calibration: statistics of a recipe's model on its calibration tokens, out of the store when they were taken before."""

import dataclasses
import pathlib
from collections.abc import Mapping

import ptq
from ptq.calibration.statistics import Provenance, Statistics
from ptq.calibration.statistics_visitor import shared_statistics
from ptq.data.sampling import Tokens
from ptq.errors import UserError
from ptq.run.session import Session


def statistics_of(session: Session) -> tuple[Statistics, pathlib.Path]:
    """Returns the statistics that the recipe asks for, and their file: a given file, the store's, or taken now."""
    recipe, journal = session.recipe, session.journal
    if recipe.calibration.statistics is not None:
        path = pathlib.Path(recipe.calibration.statistics).expanduser()
        statistics = Statistics.load(path, session.stream.device)
        statistics.check_fits(session.loaded.fingerprint, session.network.shapes)
        evaluated = session.evaluation_tokens()
        if statistics.provenance.data_fingerprint == evaluated.fingerprint and not recipe.data.allow_overlap:
            raise UserError(
                f"calibration.statistics: {path} was taken on the evaluation windows ({evaluated.source}): "
                "take them on another text, or use data.allow_overlap=true"
            )
        journal.say(f"statistics: {path}")
        return statistics, path
    tokens = session.calibration_tokens()
    key = key_of(session, tokens)
    with session.store.found_or_mine("statistics", key, lambda line: journal.say(f"statistics: {line}")) as found:
        if found is not None and (known := _usable(found, session, tokens)) is not None:
            journal.say("statistics: taken before, read from the store")
            return known, found
        statistics = take_statistics(session, tokens, key)
        return statistics, session.store.add("statistics", key, statistics.save, session.about(tokens))


def being_taken(session: Session) -> bool:
    """Returns whether another run takes the statistics that the recipe asks for at this moment."""
    if session.recipe.calibration.statistics is not None:
        return False
    return session.store.being_made("statistics", key_of(session, session.calibration_tokens()))


def known_statistics(session: Session) -> Statistics | None:
    """Returns the statistics that the recipe asks for where the store has them, else None; the weights' digest has to be known."""
    tokens = session.calibration_tokens()
    found = session.store.find("statistics", key_of(session, tokens))
    return None if found is None else _usable(found, session, tokens)


def keep_statistics(session: Session, statistics: Statistics) -> None:
    """Keeps statistics that were taken otherwise than by `take_statistics`, for later runs."""
    tokens = session.calibration_tokens()
    session.store.add("statistics", key_of(session, tokens), statistics.save, session.about(tokens))


def key_of(session: Session, tokens: Tokens) -> dict[str, object]:
    """Returns all that statistics of these tokens depend on, for the store."""
    return {**session.key(tokens), "batch_size": session.recipe.calibration.batch_size}


def take_statistics(session: Session, tokens: Tokens, key: Mapping[str, object]) -> Statistics:
    """Runs the calibration tokens through the network and gathers statistics of every Linear; `key` says what of."""
    with session.journal.phase("calibration"):
        visitor, flow = shared_statistics(session.stream, tokens.ids, session.recipe.calibration.batch_size)
        session.stream.run([flow], visitor, "calibration", session.kept("calibration", key, [flow], visitor))
    statistics = visitor.result(provenance_of(session, tokens))
    say_unreached(session, statistics)
    return statistics


def say_unreached(session: Session, statistics: Statistics) -> None:
    """Names the Linears that no calibration token reached."""
    for name in statistics.unreached:
        session.journal.say(f"calibration: no token reaches {name}: nothing can be fitted to its input")


def _usable(path: pathlib.Path, session: Session, tokens: Tokens) -> Statistics | None:
    """Returns what an entry of the store holds; None, which is said, where it has to be made again."""
    try:
        return _read(path, session, tokens)
    except ValueError as error:
        session.store.made_again("statistics", str(error))
        return None


def _read(path: pathlib.Path, session: Session, tokens: Tokens) -> Statistics:
    """Returns the store's statistics under the names that this run gives to model and text, not those of the run that took them.

    Raises:
        ValueError: when the file holds something else, or statistics of other Linears.
    """
    try:
        found = Statistics.load(path, session.stream.device)
        found.check_fits(session.loaded.fingerprint, session.network.shapes)
    except (UserError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("calibration.statistics: ").split())
        raise ValueError(f"it is no file of statistics of this model: {reason}") from None
    return dataclasses.replace(found, provenance=provenance_of(session, tokens))


def provenance_of(session: Session, tokens: Tokens) -> Provenance:
    """Returns what statistics of these tokens say of themselves."""
    loaded = session.loaded
    return Provenance(
        model=session.recipe.model.path,
        revision=loaded.revision,
        weight_fingerprint=loaded.fingerprint,
        data_fingerprint=tokens.fingerprint,
        data_source=tokens.source,
        samples=tokens.ids.shape[0],
        length=tokens.ids.shape[1],
        dtype=loaded.arithmetic_dtype,
        version=ptq.__version__,
    )
