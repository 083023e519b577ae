"""Calibration: statistics of a recipe's model on its calibration tokens, out of the store when they were taken before."""

import pathlib

import ptq
from ptq.calibration.statistics import Provenance, Statistics, StatisticsVisitor
from ptq.data.sampling import Tokens
from ptq.run.session import Session


def statistics_of(session: Session) -> tuple[Statistics, pathlib.Path]:
    """Returns the statistics that the recipe asks for, and their file: a given file, the store's, or taken now."""
    recipe, journal = session.recipe, session.journal
    if recipe.calibration.statistics is not None:
        path = pathlib.Path(recipe.calibration.statistics).expanduser()
        statistics = Statistics.load(path)
        statistics.check_fits(session.loaded.fingerprint, session.network.shapes)
        journal.say(f"statistics: {path}")
        return statistics, path
    tokens = session.calibration_tokens()
    key = {**session.key(tokens), "batch_size": recipe.calibration.batch_size}
    found = session.store.find("statistics", key)
    if found is not None:
        journal.say("statistics: taken before, read from the store")
        return Statistics.load(found), found
    statistics = take_statistics(session, tokens)
    return statistics, session.store.add("statistics", key, statistics.save)


def take_statistics(session: Session, tokens: Tokens) -> Statistics:
    """Runs the calibration tokens through the network and gathers statistics of every Linear."""
    with session.journal.phase("calibration"):
        flow = session.stream.open(tokens.ids, session.recipe.calibration.batch_size)
        visitor = StatisticsVisitor()
        session.stream.run([flow], visitor, "calibration")
    loaded = session.loaded
    return visitor.result(
        Provenance(
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
    )
