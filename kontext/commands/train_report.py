"""What `kontext train` tells its report."""

from typing import Any

from kontext.options.base import without_secrets
from kontext.options.train import Train
from kontext.training.journal import HISTORY, REPORT, Journal
from kontext.training.names import Names
from kontext.training.plan import Plan
from kontext.training.report import About, Setting, versions
from kontext.training.session import Start
from kontext.training.team import Team


def journal(options: Train, names: Names, plan: Plan, start: Start, *, seed: int, team: Team) -> Journal:
    """The journal of the run. One that goes on with another run's state begins a history of its own."""
    own = start.folder is not None and start.folder.resolve() in {path.resolve() for path in names.states()}
    about = About(
        name=names.stem,
        plan=plan,
        settings=settings(options, seed),
        versions=versions(team.device),
        samples=names.samples,
    )
    return Journal(
        names.final(HISTORY),
        names.final(REPORT),
        about,
        done=start.progress.step if own else 0,
        wanted=team.leads and not options.no_report,
    )


def settings(options: Train, seed: int) -> tuple[Setting, ...]:
    """All options by their names on the command line, but for secrets; `seed` as it was chosen."""
    values = without_secrets(options) | {"seed": seed}
    given = options.model_fields_set
    return tuple(
        Setting("--" + name.replace("_", "-"), _words(value), name in given or name == "seed")
        for name, value in values.items()
    )


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value)) or "–"
    return "–" if value is None or value == "" else str(value)
